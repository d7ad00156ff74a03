"""The engine against the NumPy reference (tests/ref) on tiny random models, and against itself, bit for bit."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvmix
import tiny
from kvmix import Row
from kvmix._native import Page, cpu_kernels
from kvmix.perplexity import main as perplexity_main
from ref import perplexity as reference
from ref.cache import CacheOptions, LayerCache
from ref.codec import PAGE, nmse
from ref.model import Model, Sequence, load

ALL_KERNELS = ["scalar", "avx2", "avx512"]
KERNELS = ALL_KERNELS[: ALL_KERNELS.index(cpu_kernels()) + 1]  # those that this machine can run
WEIGHTS = ["F16", "BF16", "MXFP4"]
WEIGHTS += [f"Q{name}" for name in ("4_0", "4_1", "5_0", "5_1", "8_0", "2_K", "3_K", "4_K", "5_K", "6_K")]
WEIGHTS += [f"IQ{name}" for name in ("1_S", "2_XXS", "2_XS", "2_S", "3_XXS", "3_S", "4_NL", "4_XS")]
SMALL = {"n_embd": 128, "n_ff": 256}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "llama-tied-mha": SMALL | {"tied": True, "n_head_kv": 4},
    "llama-d128": SMALL | {"head_dim": 128, "n_head": 3, "n_head_kv": 1},
    "llama-d256": SMALL | {"head_dim": 256, "n_head": 2, "n_head_kv": 1},
    "qwen2": SMALL | {"arch": "qwen2", "k_bias": 20.0, "rope_base": 1e6},
    "qwen2-tied-gqa7": SMALL | {"arch": "qwen2", "k_bias": 5.0, "tied": True, "n_head": 7, "n_head_kv": 1},
    "qwen2-d128": SMALL | {"arch": "qwen2", "k_bias": 20.0, "head_dim": 128, "n_head": 2},
    "qwen2-d256": SMALL | {"arch": "qwen2", "k_bias": 5.0, "head_dim": 256, "n_head": 2, "n_head_kv": 1},
}

# The engine computes in f32, the reference in f64: keys and values that lie on the edge between two f16 numbers are
# stored one unit apart, about one in 500. That is the floor below which no f16 cache can be told from another.
F16_CACHE = 1e-8
# With quantized weights the same, and the two decode a weight in different precisions.
QUANTIZED_WEIGHTS = 1e-6
# Through packed pages, every single row. A key that was stored one unit apart may fall to the other side of an edge
# between two codes, a step of the codec apart; so the reference packs the rows that the engine shows its page hook.
PACKED = 1e-5
# Those rows against the reference's own: one unit of f16 in some.
F16_ROWS = 1e-7


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The file of a tiny model, written once for the same arguments."""
    folder = tmp_path_factory.mktemp("models")
    paths: dict[str, Path] = {}

    def write(shape: str = "llama", **arguments: Any) -> Path:
        key = f"{shape} {arguments}"
        if key not in paths:
            paths[key] = folder / f"{len(paths)}.gguf"
            tiny.write_model(paths[key], **SHAPES[shape] | arguments)
        return paths[key]

    return write


def random_ids(n_tokens: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, n_tokens).tolist()


def open_session(path: Path, **options: Any) -> kvmix.Session:
    defaults = {"n_ctx": 2048, "n_logits": 512, "n_threads": 1, "act": "f32"}
    return kvmix.Model(path).session(**defaults | options)


def feed(session: kvmix.Session, ids: SequenceOf[int], batches: SequenceOf[int] | None = None) -> np.ndarray:
    """Appends the tokens, in batches of these sizes; -> logits of all of them [n, n_vocab]."""
    logits, start = [], 0
    for n in batches or [len(ids)]:
        part = ids[start : start + n]
        session.decode([Row(token, want_logits=True) for token in part])
        logits += [session.logits_view(i).copy() for i in range(len(part))]
        start += n
    assert start == len(ids)
    return np.array(logits)


# ---- against the reference ------------------------------------------------------------------------------------------


@functools.cache
def reference_model(path: Path) -> Model:
    return load(path)


TYPES = {"f16": "f16", "8": "q8", "6": "q6", "5": "q5", "4": "q4", "3": "q3", "2": "q2"}


def pairs(kv: str, n_layer: int) -> list[tuple[str, str]]:
    """k4v3,0:k8v4 -> the types of each layer, for a single layer after the comma."""

    def pair(text: str) -> tuple[str, str]:
        k, v = text[1:].split("v")
        return TYPES[k], TYPES[v]

    first, *rest = kv.split(",")
    types = [pair(first)] * n_layer
    for change in rest:
        layer, text = change.split(":")
        types[int(layer)] = pair(text)
    return types


def fed(sequence: Sequence, n_tokens: int, batches: tuple[int, ...] = ()) -> np.ndarray:
    """Hidden states [n_tokens, n_embd] of random_ids(n_tokens)."""
    ids, hidden, start = random_ids(n_tokens), [], 0
    for n in batches or (n_tokens,):
        hidden.append(sequence.feed(ids[start : start + n]))
        start += n
    return np.concatenate(hidden)


@functools.lru_cache(maxsize=64)
def expected(path: Path, n_tokens: int, kv: str, batches: tuple[int, ...] = (), **options: Any) -> np.ndarray:
    """The reference's logits for random_ids(n_tokens)."""
    model = reference_model(path)
    sequence = model.sequence(pairs(kv, model.hyper.n_layer), CacheOptions(**options))
    return model.logits(fed(sequence, n_tokens, batches))


def row_errors(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    return np.square(got - want).sum(axis=-1)


class SeenPages:
    """A page hook that keeps what it sees, and gives it to a reference."""

    def __init__(self) -> None:
        self.pages: dict[tuple[int, int, int, int], tuple[np.ndarray, ...]] = {}

    def __call__(self, page: Page) -> None:
        rows = (page.k.T, page.v, page.q_rms.T)
        self.pages[page.layer, page.page, page.n_valid, page.head] = tuple(x[: page.n_valid].astype("f2") for x in rows)

    def give(self, sequence: Sequence) -> None:
        for i, layer in enumerate(sequence.layers):
            layer.given = functools.partial(self.rows, i, layer)

    def rows(self, index: int, layer: LayerCache, page: int, n_valid: int) -> tuple[np.ndarray, ...]:
        """[n_valid, n_head_kv, d] of k, v and q_rms: what the reference computed, but for last bits. A page that slides
        out of sight in the batch that would pack it was not seen, and is read by no row."""
        where = slice(page * PAGE, page * PAGE + n_valid)
        own = layer.k[where], layer.v[where], layer.q_rms[where]
        if (index, page, n_valid, 0) not in self.pages and layer.span > 0:
            return own
        heads = [self.pages[index, page, n_valid, head] for head in range(layer.k.shape[1])]
        given = tuple(np.stack(rows, 1) for rows in zip(*heads, strict=True))
        for mine, rows in zip(own, given, strict=True):
            assert nmse(mine.astype("f8"), rows.astype("f8")) <= F16_ROWS
        return given


def packed_run(
    path: Path, kv: str, n_tokens: int, batches: tuple[int, ...] = (), kernels: str = "auto", **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """The engine's logits for random_ids(n_tokens), and the reference's with the engine's rows in its pages. The
    options are those of CacheOptions."""
    seen, model = SeenPages(), reference_model(path)
    session = open_session(path, kv=kv, kernels=kernels, page_hook=seen, **{k: int(v) for k, v in options.items()})
    got = feed(session, random_ids(n_tokens), batches)
    sequence = model.sequence(pairs(kv, model.hyper.n_layer), CacheOptions(**options))
    seen.give(sequence)
    return got, model.logits(fed(sequence, n_tokens, batches))


def assert_agrees(got: np.ndarray, want: np.ndarray) -> None:
    """Every row."""
    assert (row_errors(got, want) / np.square(want).sum(axis=-1)).max() <= PACKED


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("shape", SHAPES)
def test_an_f16_cache_agrees_with_the_reference(make: Callable[..., Path], shape: str, kernels: str) -> None:
    path = make(shape)
    got = feed(open_session(path, kv="f16", kernels=kernels), random_ids(300))
    assert nmse(expected(path, 300, "kf16vf16"), got) <= F16_CACHE


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_quantized_weights_agree_with_the_reference(make: Callable[..., Path], weights: str, kernels: str) -> None:
    path = make(weight_type=weights, n_embd=256)
    got = feed(open_session(path, kv="f16", kernels=kernels), random_ids(140))
    assert nmse(expected(path, 140, "kf16vf16"), got) <= QUANTIZED_WEIGHTS


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_8_bit_activations_stay_near(make: Callable[..., Path], weights: str, kernels: str) -> None:
    path = make(weight_type=weights, n_embd=256)
    got = feed(open_session(path, kv="f16", kernels=kernels, act="q8"), random_ids(140))
    error = nmse(expected(path, 140, "kf16vf16"), got)
    if weights in ("F16", "BF16"):
        assert error <= QUANTIZED_WEIGHTS  # nothing is quantized for these
    else:
        assert 1e-5 < error < 5e-3  # a step of max / 127 is an NMSE of some 5e-5 in each of 15 products


def assert_packed_agrees(path: Path, kernels: str, kv: str, **options: Any) -> None:
    got, want = packed_run(path, kv, 400, kernels=kernels, **options)
    assert_agrees(got, want)
    assert nmse(expected(path, 400, "kf16vf16"), got) > 2 * PACKED  # what was compared was packed


RECIPES = [
    "k8v8",
    "k6v5",
    "k5v6",
    "k4v4",
    "k4v3",
    "k3v3",
    "k4v2",
    "k2v4",
    "k2v2",
    "kf16v3",
    "k3vf16",
    "k4v3,0:k8v4",
    "kf16vf16,1:k2v3",
]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("kv", RECIPES)
def test_packed_pages_agree_with_the_reference(make: Callable[..., Path], kv: str, kernels: str) -> None:
    assert_packed_agrees(make(), kernels, kv)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_pages_of_every_shape(make: Callable[..., Path], shape: str, kernels: str) -> None:
    assert_packed_agrees(make(shape), kernels, "k4v3")


@pytest.mark.parametrize("balance_page", [False, True])
@pytest.mark.parametrize("sink", [0, 4, 64])
@pytest.mark.parametrize("window", [0, 100, 200])
def test_windows_sinks_and_balances(make: Callable[..., Path], window: int, sink: int, balance_page: bool) -> None:
    assert_packed_agrees(make("qwen2"), "auto", "k3v2", window=window, sink=sink, balance_page=balance_page)


@pytest.mark.full
@pytest.mark.parametrize("balance_page", [False, True])
@pytest.mark.parametrize("sink", [0, 4, 16, 64])
@pytest.mark.parametrize("window", [0, 100, 128])
@pytest.mark.parametrize("kv", [kv for kv in RECIPES if "," not in kv])
def test_everything_with_everything(
    make: Callable[..., Path], kv: str, window: int, sink: int, balance_page: bool
) -> None:
    for kernels in KERNELS:
        options = {"window": window, "sink": sink, "balance_page": balance_page}
        assert_packed_agrees(make("qwen2-d128"), kernels, kv, **options)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("kv", ["k4v3", "k2v2"])
@pytest.mark.parametrize("balance_page", [False, True])
@pytest.mark.parametrize("batches", [(128, 256, 16), (300,), (256, 5)])
def test_strict_mode_agrees_with_the_reference(
    make: Callable[..., Path], kv: str, balance_page: bool, batches: tuple[int, ...], kernels: str
) -> None:
    path, n_tokens = make("qwen2"), sum(batches)
    options = {"strict": True, "sink": 4, "balance_page": balance_page}
    assert_agrees(*packed_run(path, kv, n_tokens, batches, kernels, **options))


@pytest.mark.parametrize("batches", [(400,), (257, 143), (1,) * 400], ids=["1", "2", "400"])
@pytest.mark.parametrize("window", [0, 100, 128])
def test_the_cut_moves_at_the_row_that_the_window_says(
    make: Callable[..., Path], window: int, batches: tuple[int, ...]
) -> None:
    """Row t reads page 0 packed from t = 128 + window on, page 1 from 256 + window on: not a row earlier or later."""
    path, kv, n_tokens = make(), "k2v2", 400
    got = feed(open_session(path, kv=kv, window=window), random_ids(n_tokens), batches)
    right = expected(path, n_tokens, kv, window=window)
    assert nmse(expected(path, n_tokens, "kf16vf16")[: 128 + window], got[: 128 + window]) <= F16_CACHE
    for row, other in ((128 + window, window + 128), (255 + window, window - 1), (256 + window, window + 128)):
        if other < 0 or row >= n_tokens:
            continue
        wrong = expected(path, n_tokens, kv, window=other)  # the cut of this row is one page off
        assert row_errors(got[row], right[row]) < 0.01 * row_errors(got[row], wrong[row])


def test_a_long_sequence_agrees_with_the_reference(make: Callable[..., Path]) -> None:
    """More than 1024 positions: attention runs over eight pages at a time and joins what they give."""
    path, n_tokens = make(n_layer=1), 1400
    exact = expected(path, n_tokens, "kf16vf16", window=100)
    for batches in ([512, 512, 376], [512, 500, 188] + [8] * 25):
        session = open_session(path, kv="f16", n_threads=2)
        assert nmse(exact, feed(session, random_ids(n_tokens), batches)) <= F16_CACHE
        assert_agrees(*packed_run(path, "k4v3", n_tokens, tuple(batches), window=100))


# ---- bit for bit ----------------------------------------------------------------------------------------------------

SETTINGS: list[dict[str, Any]] = [
    {"kv": "k4v3", "act": "f32", "kernels": "avx2"},
    {"kv": "k2v4,0:k8v8", "act": "q8", "kernels": "avx2", "window": 0},
    {"kv": "k3v2", "act": "q8", "kernels": "scalar", "balance_page": 1},
    {"kv": "f16", "act": "q8", "kernels": "avx2"},
    {"kv": "k4v3", "act": "f32", "kernels": "avx512"},
    {"kv": "k4v2,0:k6v5", "act": "q8", "kernels": "avx512", "window": 0},
    {"kv": "f16", "act": "q8", "kernels": "avx512"},
]
RUNNABLE = [setting for setting in SETTINGS if setting["kernels"] in KERNELS]
settings = pytest.mark.parametrize("setting", RUNNABLE, ids=lambda s: "-".join(map(str, s.values())))
QUANTIZED = {"weight_type": "Q4_K", "n_embd": 256}


def assert_same_bits(a: np.ndarray, b: np.ndarray) -> None:
    assert a.shape == b.shape
    differ = np.flatnonzero((a.view(np.uint32) != b.view(np.uint32)).any(axis=-1))
    assert differ.size == 0, f"{differ.size} of {len(a)} rows differ, the first is {differ[0]}"


@settings
def test_threads_do_not_change_a_bit(make: Callable[..., Path], setting: dict[str, Any]) -> None:
    path, ids = make(**QUANTIZED), random_ids(360)
    batches = [300] + [1] * 20 + [3, 8, 29]
    one, two, three = (feed(open_session(path, n_threads=n, **setting), ids, batches) for n in (1, 2, 3))
    assert_same_bits(one, two)
    assert_same_bits(one, three)


@settings
def test_wide_batches_do_not_change_a_bit(make: Callable[..., Path], setting: dict[str, Any]) -> None:
    path, ids = make(**QUANTIZED), random_ids(512)
    whole = feed(open_session(path, **setting), ids)
    for batches in ([9] * 55 + [17], [256, 256], [100, 200, 9, 128, 75], [31] * 16 + [16]):
        assert_same_bits(whole, feed(open_session(path, **setting), ids, batches))


@settings
def test_a_row_does_not_know_who_else_wants_logits(make: Callable[..., Path], setting: dict[str, Any]) -> None:
    path, ids = make(**QUANTIZED), random_ids(200)
    whole, session = feed(open_session(path, **setting), ids), open_session(path, **setting)
    wanted = (3, 77, 199)
    session.decode([Row(token, want_logits=i in wanted) for i, token in enumerate(ids)])
    assert_same_bits(whole[list(wanted)], np.array([session.logits_view(i) for i in range(3)]))


@settings
def test_rows_of_other_sequences_do_not_change_a_bit(make: Callable[..., Path], setting: dict[str, Any]) -> None:
    """Decoding alone, and in batches of 2 to 8 rows of four sequences whose pages are packed at different times."""
    path, lengths, n_steps = make(**QUANTIZED), (300, 250, 17, 127), 12
    prompts = [random_ids(n, seed=n) for n in lengths]
    answers = [random_ids(n_steps, seed=1000 + n) for n in lengths]
    alone = []
    for prompt, answer in zip(prompts, answers, strict=True):
        session = open_session(path, **setting)
        feed(session, prompt)
        alone.append(feed(session, answer, [1] * n_steps))

    first = open_session(path, n_seq_max=4, **setting)
    sessions = [first] + [first.fork() for _ in range(3)]
    for session, prompt in zip(sessions, prompts, strict=True):
        feed(session, prompt)
    together: list[list[np.ndarray]] = [[] for _ in sessions]
    for who in ((0, 1), (2, 1, 0, 3), (0, 0, 1, 1, 2, 2, 3, 3), (3, 2, 3, 2, 3), (0, 1, 2, 3, 0, 1, 2)):
        rows = []
        for i in who:
            step = len(together[i]) + sum(session is sessions[i] for _, _, session in rows)
            rows.append(Row(answers[i][step], True, sessions[i]))
        first.decode(rows)
        for index, i in enumerate(who):
            together[i].append(first.logits_view(index).copy())
    for got, want in zip(together, alone, strict=True):
        assert len(got) > 5
        assert_same_bits(np.array(got), want[: len(got)])


@settings
@pytest.mark.parametrize("at", [100, 128, 200, 256, 300])
def test_a_fork_gives_the_bits_of_its_source(make: Callable[..., Path], setting: dict[str, Any], at: int) -> None:
    path, ids = make(**QUANTIZED), random_ids(460)
    batches = [460 - at - 30] + [1] * 30
    session = open_session(path, n_seq_max=2, **setting)
    feed(session, ids[:at])
    fork = session.fork()
    source = feed(session, ids[at:], batches)
    assert_same_bits(source, feed(fork, ids[at:], batches))


@pytest.mark.parametrize("kernels", KERNELS)
def test_single_rows_agree_with_wide_batches(make: Callable[..., Path], kernels: str) -> None:
    path, ids = make("qwen2"), random_ids(300)
    options = {"kv": "k4v3", "window": 0, "kernels": kernels}
    wide, narrow = open_session(path, **options), open_session(path, **options)
    assert nmse(feed(wide, ids), feed(narrow, ids, [1] * 100 + [8] * 25)) <= PACKED


# ---- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("name", ["token_embd.weight", "blk.0.attn_v.weight", "blk.1.ffn_down.weight", "output.weight"])
def test_logits_that_are_not_finite_are_an_error(
    make: Callable[..., Path], tmp_path: Path, name: str, value: float
) -> None:
    """Only token 7 of the embedding is bad, or the first row of another matrix."""
    data = bytearray(make().read_bytes())
    tensor = tiny.write_model(tmp_path / "same.gguf", **SMALL).tensors[name]
    bad = tensor.copy()
    bad[7 if name == "token_embd.weight" else 0] = value
    at = data.index(tensor.tobytes())
    data[at : at + bad.nbytes] = bad.tobytes()
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)

    session = open_session(path, kv="k4v3")
    healthy = [1, 2, 3] if name == "token_embd.weight" else []
    if healthy:
        session.sync(healthy)
    before = session.stats
    with pytest.raises(kvmix.StateError, match="a logit that is not finite"):
        session.decode([Row(5), Row(7, want_logits=True)])
    assert session.tokens == healthy
    assert session.stats == before
    if healthy:
        again = feed(session, [4])
        assert_same_bits(again, feed(open_session(make(), kv="k4v3"), [*healthy, 4], [3, 1])[-1:])


# ---- a real model ---------------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize(("kv", "within"), [("f16", 2e-4), ("k4v3", 1e-3)])
def test_perplexity_of_a_real_model(
    smollm2: Path, shared: Path, capsys: pytest.CaptureFixture[str], kv: str, within: float
) -> None:
    """A last bit of a key moves some codes by a step: that re-rolls a packed cache's perplexity by some 2e-4, between
    the scalar and the AVX2 kernels, or the reference in f32 and f64, just as well. The bound is five times that."""
    text = shared / "text" / "books.test.txt"
    args = [str(smollm2), str(text), "-c", "512", "--chunks", "2", "--act", "f32", "--kv", kv, "--json"]
    assert perplexity_main(args) == 0
    got = json.loads(capsys.readouterr().out)
    model = load(smollm2, np.float32)
    ids = kvmix.Model(smollm2).tokenize(text.read_text())[:1024]
    recipe = pairs("kf16vf16" if kv == "f16" else kv, model.hyper.n_layer)
    want = reference.perplexity(model, ids, 512, reference.Setting(recipe, CacheOptions()))
    assert got["ppl"] == pytest.approx(want.ppl, rel=within)
