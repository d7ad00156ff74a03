"""Families beyond the baseline against the NumPy reference: norms of heads, layers that slide, factors of RoPE.

Where layers slide the texts are 700 tokens long, so that those which see 200 positions have let go of pages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvmix
import tiny
from kvmix import Row
from ref.cache import CacheOptions
from ref.codec import KVTYPES, Side, nmse, physical_bits
from ref.model import load, sliding_layers
from test_engine import (
    F16_CACHE,
    KERNELS,
    QUANTIZED_WEIGHTS,
    assert_agrees,
    assert_same_bits,
    expected,
    feed,
    open_session,
    packed_run,
    pairs,
    random_ids,
    reference_model,
    row_errors,
)

PAGE = 128
N_TOKENS, SPAN = 700, 200
BATCHES = (300, 90, 10, 240, 60)  # as many of them as the text is long
SMALL = {"n_embd": 128, "n_ff": 256}
GEMMA = SMALL | {"arch": "gemma3", "span": SPAN, "tied": True, "spm": True}
EVERY = "gemma3.attention.sliding_window_pattern"
SHAPES: dict[str, dict[str, Any]] = {
    "llama-factors": SMALL | {"rope_freqs": True, "rope_base": 5e5},
    "qwen3": SMALL | {"arch": "qwen3", "rope_base": 1e6},
    "qwen3-d128": SMALL | {"arch": "qwen3", "head_dim": 128, "n_head": 3, "n_head_kv": 1, "tied": True},
    "gemma3": GEMMA | {"n_layer": 7, "n_head": 2, "n_head_kv": 1, "rope_base": 1e6},  # the 6th sees all
    "gemma3-d128": GEMMA | {"head_dim": 128, "n_head": 2, "extra_keys": {EVERY: 2}},
    "gemma3-d256": GEMMA | {"head_dim": 256, "n_head_kv": 1, "rope_base": 1e6, "extra_keys": {EVERY: [False, True]}},
    "gemma3-slides": GEMMA | {"extra_keys": {EVERY: [True, True]}},
}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The file of a tiny model, written once for the same arguments."""
    folder = tmp_path_factory.mktemp("families")
    paths: dict[str, Path] = {}

    def write(shape: str, **arguments: Any) -> Path:
        key = f"{shape} {arguments}"
        if key not in paths:
            paths[key] = folder / f"{len(paths)}.gguf"
            tiny.write_model(paths[key], **SHAPES[shape] | arguments)
        return paths[key]

    return write


# ---- against the reference ------------------------------------------------------------------------------------------


def batches_of(shape: str) -> tuple[int, ...]:
    """400 tokens, more where layers slide."""
    return BATCHES if "span" in SHAPES[shape] else BATCHES[:3]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("shape", SHAPES)
def test_an_f16_cache_agrees_with_the_reference(make: Callable[..., Path], shape: str, kernels: str) -> None:
    path, n_tokens = make(shape), sum(batches_of(shape))
    got = feed(open_session(path, kv="f16", kernels=kernels), random_ids(n_tokens), batches_of(shape))
    assert nmse(expected(path, n_tokens, "kf16vf16"), got) <= F16_CACHE


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("weights", ["F16", "Q4_0", "Q8_0", "Q4_K", "Q6_K"])
@pytest.mark.parametrize("shape", ["llama-factors", "qwen3", "gemma3-d256"])
def test_quantized_weights_agree_with_the_reference(
    make: Callable[..., Path], shape: str, weights: str, kernels: str
) -> None:
    path = make(shape, weight_type=weights, n_embd=256)
    got = feed(open_session(path, kv="f16", kernels=kernels), random_ids(260))
    assert nmse(expected(path, 260, "kf16vf16"), got) <= QUANTIZED_WEIGHTS


def assert_packed_agrees(path: Path, kernels: str, kv: str, batches: tuple[int, ...], **options: Any) -> None:
    assert_agrees(*packed_run(path, kv, sum(batches), batches, kernels, **options))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("kv", ["k8v8", "k4v3", "k2v2", "kf16v3"])
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_pages_agree_with_the_reference(make: Callable[..., Path], shape: str, kv: str, kernels: str) -> None:
    assert_packed_agrees(make(shape), kernels, kv, batches_of(shape))


@pytest.mark.parametrize("balance_page", [False, True])
@pytest.mark.parametrize("sink", [0, 64])
@pytest.mark.parametrize(("span", "window"), [(SPAN, 0), (130, 128), (100, 0), (384, 128), (60, 128), (128, 500)])
def test_spans_and_windows(make: Callable[..., Path], span: int, window: int, sink: int, balance_page: bool) -> None:
    """Packed pages partly in sight, just in sight and never; sinks that go out of sight before or after the cut."""
    options = {"window": window, "sink": sink, "balance_page": balance_page}
    assert_packed_agrees(make("gemma3-d128", span=span), "auto", "k3v2", (300, 1, 9, 390), **options)


@pytest.mark.parametrize("batches", [(128, 256, 256, 16), (512, 100)])
def test_strict_mode_agrees_with_the_reference(make: Callable[..., Path], batches: tuple[int, ...]) -> None:
    assert_agrees(*packed_run(make("gemma3-d128"), "k4v3", sum(batches), batches, strict=True, sink=4))


@pytest.mark.parametrize("kv", ["kf16vf16", "k2v2"])
def test_a_row_sees_as_many_positions_as_its_span(make: Callable[..., Path], kv: str) -> None:
    """Not one more or less: it is far from a reference with another span, from the first row on where they differ."""
    path, n_tokens = make("gemma3-slides"), 420
    got = feed(open_session(path, kv=kv), random_ids(n_tokens))
    model = reference_model(path)

    def reference(span: int) -> np.ndarray:
        other = dataclasses.replace(model, hyper=dataclasses.replace(model.hyper, span=span))
        return other.logits(other.sequence(pairs(kv, 2), CacheOptions()).feed(random_ids(n_tokens)))

    right = row_errors(got, reference(SPAN))
    for span, first in ((SPAN - 1, SPAN - 1), (SPAN + 1, SPAN)):
        wrong = row_errors(got, reference(span))
        assert nmse(wrong[:first], right[:first]) <= 1e-6
        assert np.mean(right[first:] < 0.01 * wrong[first:]) > 0.95
        assert right[first] < 0.01 * wrong[first]


# ---- bit for bit ----------------------------------------------------------------------------------------------------

SETTINGS: list[dict[str, Any]] = [
    {"kv": "k4v3", "act": "f32", "kernels": "avx2"},
    {"kv": "k3v2", "act": "q8", "kernels": "scalar", "balance_page": 1, "window": 0},
    {"kv": "f16", "act": "q8", "kernels": "avx2"},
    {"kv": "k4v2", "act": "q8", "kernels": "avx512", "window": 0},
]
settings = pytest.mark.parametrize(
    "setting", [s for s in SETTINGS if s["kernels"] in KERNELS], ids=lambda s: "-".join(map(str, s.values()))
)
of_each_family = pytest.mark.parametrize("shape", ["llama-factors", "qwen3", "gemma3-d128"])
QUANTIZED = {"weight_type": "Q4_K", "n_embd": 256}


@settings
@of_each_family
def test_threads_do_not_change_a_bit(make: Callable[..., Path], shape: str, setting: dict[str, Any]) -> None:
    path, ids = make(shape, **QUANTIZED), random_ids(600)
    batches = [500] + [1] * 30 + [3, 8, 59]
    one, two, three = (feed(open_session(path, n_threads=n, **setting), ids, batches) for n in (1, 2, 3))
    assert_same_bits(one, two)
    assert_same_bits(one, three)


@settings
@of_each_family
def test_wide_batches_do_not_change_a_bit(make: Callable[..., Path], shape: str, setting: dict[str, Any]) -> None:
    path, ids = make(shape, **QUANTIZED), random_ids(512)
    whole = feed(open_session(path, **setting), ids)
    for batches in ([9] * 55 + [17], [256, 256], [100, 200, 9, 128, 75]):
        assert_same_bits(whole, feed(open_session(path, **setting), ids, batches))


@settings
def test_rows_of_other_sequences_do_not_change_a_bit(make: Callable[..., Path], setting: dict[str, Any]) -> None:
    """Of sequences that have let go of different pages."""
    path, lengths, n_steps = make("gemma3-d128", **QUANTIZED), (700, 450, 17), 20
    prompts = [random_ids(n, seed=n) for n in lengths]
    answers = [random_ids(n_steps, seed=1000 + n) for n in lengths]
    first = open_session(path, n_seq_max=3, **setting)
    sessions, together = [first, first.fork(), first.fork()], []
    for session, prompt in zip(sessions, prompts, strict=True):
        session.sync(prompt)
    for step in range(n_steps):
        first.decode([Row(answers[i][step], True, sessions[i]) for i in range(3)])
        together.append([first.logits_view(i).copy() for i in range(3)])
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        alone = open_session(path, **setting)
        alone.sync(prompt)
        assert_same_bits(np.array([logits[i] for logits in together]), feed(alone, answer, [1] * n_steps))


@settings
@of_each_family
@pytest.mark.parametrize("at", [200, 256, 327, 328, 500, 640])
def test_a_fork_gives_the_bits_of_its_source(
    make: Callable[..., Path], shape: str, setting: dict[str, Any], at: int
) -> None:
    path, ids = make(shape, **QUANTIZED), random_ids(at + 180)
    session = open_session(path, n_seq_max=2, **setting)
    feed(session, ids[:at], [500, at - 500] if at > 500 else [at])
    fork = session.fork()
    batches = [150] + [1] * 30
    assert_same_bits(feed(session, ids[at:], batches), feed(fork, ids[at:], batches))


# ---- rewinding ------------------------------------------------------------------------------------------------------

recipes = pytest.mark.parametrize("recipe", [{"kv": "k4v3"}, {"kv": "k2v2", "window": 0}, {"kv": "f16"}], ids=str)


def greedy(session: kvmix.Session, n_tokens: int) -> list[int]:
    start = session.length
    for _ in range(n_tokens):
        session.decode([Row(int(session.logits.argmax()), want_logits=True)])
    return session.tokens[start:]


def answer_to(path: Path, ids: list[int], **options: Any) -> list[int]:
    session = open_session(path, **options)
    session.sync(ids)
    return greedy(session, 40)


@recipes
@of_each_family
@pytest.mark.parametrize("kept", [699, 640, 639, 600, 573, 572, 300, 128, 1, 0])
def test_a_rewind_goes_on_as_if_nothing_had_been(
    make: Callable[..., Path], shape: str, recipe: dict[str, Any], kept: int
) -> None:
    """Within the last 128 tokens nothing is evaluated again; a layer that slides may lack pages for more."""
    path, ids = make(shape), random_ids(N_TOKENS)
    session = open_session(path, n_checkpoint=0, **recipe)
    session.sync(ids)
    session.rewind(kept)
    assert session.tokens == ids[:kept]
    assert session.stats.n_evaluated == N_TOKENS or kept < N_TOKENS - PAGE
    other = ids[:kept] + random_ids(60, seed=3)
    session.sync(other)
    assert greedy(session, 40) == answer_to(path, other, **recipe)


@recipes
@of_each_family
def test_a_rewind_through_a_checkpoint(make: Callable[..., Path], shape: str, recipe: dict[str, Any]) -> None:
    """The checkpoint holds the pages that its own end sees, long after the sequence let go of them."""
    path, ids = make(shape), random_ids(460)
    session = open_session(path, **recipe)
    session.sync(ids)
    session.checkpoint()
    session.sync(ids + random_ids(400, seed=1))
    other = ids + random_ids(60, seed=2)
    n_evaluated = session.stats.n_evaluated
    session.sync(other)
    assert session.stats.n_evaluated == n_evaluated + 60
    assert greedy(session, 40) == answer_to(path, other, **recipe)


# ---- memory ---------------------------------------------------------------------------------------------------------


def slot_bytes(k_type: str, v_type: str, d: int, sink: int) -> tuple[float, float, int]:
    """One KV head's f16 page, its packed page, its store: sinks, the frozen balance and its query rms rows."""
    bits = physical_bits(KVTYPES[k_type], Side.K, d), physical_bits(KVTYPES[v_type], Side.V, d)
    store = 2 * 2 * d * sink + (2 * d + 2 * d * PAGE if k_type != "f16" else 0)
    return 2 * 2 * d * PAGE, sum(bits) * d * PAGE / 8, -(-store // 64) * 64


@pytest.mark.parametrize(("n_seq", "n_checkpoint", "n_batch"), [(1, 2, 512), (4, 0, 100)])
@pytest.mark.parametrize(("kv", "window", "sink"), [("k4v3", 128, 16), ("k2v2", 0, 4), ("k8v8", 300, 16)])
def test_memory_of_layers_that_slide(
    make: Callable[..., Path], kv: str, window: int, sink: int, n_seq: int, n_checkpoint: int, n_batch: int
) -> None:
    """The 6th layer's share grows with the context, the other six's does not; each slot is one KV head's."""
    model = kvmix.Model(make("gemma3"))
    k_type, v_type = pairs(kv, 1)[0]
    f16, packed, store = slot_bytes(k_type, v_type, 64, sink)
    holders = n_seq + n_checkpoint

    def pages(n_ctx: int, span: int) -> tuple[int, int]:
        """(f16, packed) of a group. In sight: span and 128 to rewind, partial pages at both ends. In f16: the window,
        its partial page, one more to rewind into, which a checkpoint does without. New: a batch's, and an open page
        copied for each sequence. One sequence alone can always fill the context, though a checkpoint be the last
        to list the page that it ends in."""
        new = -(-n_batch // PAGE) + 2 * n_seq - 1
        every = n_ctx // PAGE + holders + 1
        if span:
            every = min(every, holders * (-(-span // PAGE) + 3) + new)
        recent = holders * (-(-window // PAGE) + 2) - n_checkpoint + new
        return min(every, recent), every if span else n_ctx // PAGE + n_checkpoint

    def planned(n_ctx: int) -> int:
        options = {"window": window, "sink": sink, "n_seq_max": n_seq, "n_batch": n_batch}
        return model.plan(n_ctx=n_ctx, kv=kv, n_checkpoint=n_checkpoint, **options).kv_bytes

    def computed(n_ctx: int) -> float:
        counts = [(n, pages(n_ctx, span)) for n, span in ((6, SPAN), (1, 0))]
        return sum(n * (n_f16 * f16 + n_packed * packed + holders * store) for n, (n_f16, n_packed) in counts)

    for n_ctx in (4096, 32768):
        assert planned(n_ctx) == computed(n_ctx)
    assert planned(32768) - planned(4096) == (32768 - 4096) / PAGE * packed


def test_pages_in_use_do_not_grow_with_the_text(make: Callable[..., Path]) -> None:
    session = open_session(make("gemma3-slides"), n_ctx=2048, kv="k4v3")
    used = []
    for n_tokens in (780, 1036, 2060 - 256):  # at the same place of a page
        session.sync(random_ids(n_tokens))
        used.append(session.stats.kv_used_bytes)
    assert used[0] == used[1] == used[2]


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [[True, False, True], [True]])
def test_a_pattern_for_another_number_of_layers_is_refused(tmp_path: Path, pattern: list[bool]) -> None:
    path = tiny.write_model(tmp_path / "m.gguf", **GEMMA, extra_keys={EVERY: pattern}).path
    with pytest.raises(kvmix.FormatError, match=rf"{EVERY} has {len(pattern)} entries for 2 layers"):
        kvmix.Model(path)


@pytest.mark.parametrize(("shape", "missing"), [
    ("qwen3", "blk.1.attn_q_norm.weight"), ("gemma3-d128", "blk.0.attn_k_norm.weight"),
    ("gemma3-d128", "blk.1.post_attention_norm.weight"), ("gemma3-d128", "blk.1.post_ffw_norm.weight"),
])  # fmt: skip
def test_a_family_that_lacks_a_norm_is_refused(
    make: Callable[..., Path], tmp_path: Path, shape: str, missing: str
) -> None:
    """The name's last letter is another one."""
    data, name = make(shape).read_bytes(), missing.encode()
    assert data.count(name) == 1
    path = tmp_path / "m.gguf"
    path.write_bytes(data.replace(name, name[:-1] + b"s"))
    with pytest.raises(kvmix.FormatError, match=f"the tensor {missing} is missing"):
        kvmix.Model(path)


def test_factors_of_rope_belong_to_llama(tmp_path: Path) -> None:
    path = tiny.write_model(tmp_path / "m.gguf", **SMALL, arch="qwen3", rope_freqs=True).path
    with pytest.raises(kvmix.Unsupported, match=r"rope_freqs\.weight has no place in the family qwen3"):
        kvmix.Model(path)


def test_one_layer_in_six_sees_all() -> None:
    assert sliding_layers(13, 6) == frozenset(range(13)) - {5, 11}


# ---- against transformers -------------------------------------------------------------------------------------------

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("kernels", [*KERNELS, "reference"])
@pytest.mark.parametrize("name", ["qwen3", "gemma3", "llama3"])
def test_logits_are_those_of_transformers(name: str, kernels: str) -> None:
    """The reference too: it is held to the same definition."""
    path, golden = GOLDEN / f"{name}.gguf", np.load(GOLDEN / f"{name}.npz")
    ids, want = golden["tokens"].tolist(), golden["logits"].astype(np.float64)
    if kernels == "reference":
        model = load(path)
        got = model.logits(model.sequence(pairs("kf16vf16", model.hyper.n_layer), CacheOptions()).feed(ids))
    else:
        got = feed(open_session(path, kv="f16", kernels=kernels, n_ctx=128), ids)
    assert nmse(want, got) <= F16_CACHE
