"""What kvmix.h promises of sessions: the same answer whatever the way there, failures that change nothing, bytes."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvmix
import tiny
from kvmix import Row, _native
from ref.codec import KVTYPES, Side, nmse, physical_bits

PAGE = 128
# Logits of the same tokens, computed in other batches: design 4's bound for act=f32.
SAME = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def llama(folder: Path) -> kvmix.Model:
    return kvmix.Model(tiny.write_model(folder / "llama.gguf", n_embd=128, n_ff=256, n_ctx=2048).path)


@pytest.fixture(scope="module")
def gemma3(folder: Path) -> kvmix.Model:
    """Two of the three layers slide, so pages are dropped and two groups hold different ones."""
    shape = {"n_layer": 3, "n_embd": 128, "n_ff": 256, "n_ctx": 2048, "span": 200}
    keys = {"gemma3.attention.sliding_window_pattern": 3}
    return kvmix.Model(tiny.write_model(folder / "gemma3.gguf", arch="gemma3", extra_keys=keys, **shape).path)


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def model(request: pytest.FixtureRequest) -> kvmix.Model:
    return request.getfixturevalue(request.param)


def random_ids(n_tokens: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, n_tokens).tolist()


def open_session(model: kvmix.Model, **options: Any) -> kvmix.Session:
    defaults = {"n_ctx": 1024, "kv": "k4v3", "n_threads": 1, "act": "f32", "n_seq_max": 4}
    return model.session(**defaults | options)


def greedy(session: kvmix.Session, n_tokens: int) -> list[int]:
    """The tokens that the session continues with, all of them in the cache."""
    start = session.length
    for _ in range(n_tokens):
        session.decode([Row(int(session.logits.argmax()), want_logits=True)])
    return session.tokens[start:]


def next_logits(session: kvmix.Session, token: int = 65) -> np.ndarray:
    session.decode([Row(token, want_logits=True)])
    return session.logits


def assert_is_whole(session: kvmix.Session, ids: Sequence[int], **options: Any) -> None:
    """The session holds these tokens, and goes on as one that never did anything else."""
    assert session.tokens == list(ids)
    fresh = open_session(session.model, **options)
    fresh.sync([*ids, 65])
    assert nmse(fresh.logits, next_logits(session)) <= SAME


# ---- the same answer whatever the way there -------------------------------------------------------------------------

RECIPES = [{"kv": "k4v3"}, {"kv": "k2v2", "window": 0}, {"kv": "k3v2,0:k8v8", "balance_page": 1, "sink": 4}]
recipes = pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r["kv"])


@recipes
@pytest.mark.parametrize("n_batch", [1, 7, 32, 512])
def test_prompt_batches_give_the_same_tokens(model: kvmix.Model, recipe: dict[str, Any], n_batch: int) -> None:
    answers = []
    for n in (512, n_batch):
        session = open_session(model, n_batch=n, **recipe)
        session.sync(random_ids(300))
        answers.append(greedy(session, 150))
    assert answers[0] == answers[1]


@recipes
def test_continuing_gives_the_same_tokens(model: kvmix.Model, recipe: dict[str, Any]) -> None:
    whole, session = open_session(model, **recipe), open_session(model, **recipe)
    ids = random_ids(420)
    for start in range(0, 420, 35):
        session.sync(ids[: start + 35])
    whole.sync(ids)
    assert greedy(whole, 40) == greedy(session, 40)


@recipes
@pytest.mark.parametrize("at", [50, 128, 200, 255, 256, 330, 500])
def test_a_fork_and_its_source_go_their_own_ways(model: kvmix.Model, recipe: dict[str, Any], at: int) -> None:
    ids, ways = random_ids(at), [random_ids(300, seed=1), random_ids(300, seed=2)]
    session = open_session(model, n_ctx=2048, **recipe)
    session.sync(ids)
    forks = [session, session.fork()]
    for end in (1, 20, 150, 300):  # by turns, over the same pages
        for fork, way in zip(forks, ways, strict=True):
            fork.sync(ids + way[:end])
    for fork, way in zip(forks, ways, strict=True):
        assert_is_whole(fork, ids + way, **recipe)


@recipes
def test_a_fork_of_a_session_that_was_rewound_into_its_first_page(model: kvmix.Model, recipe: dict[str, Any]) -> None:
    """Sinks and balance of the new first page replace the old ones, in the fork too, whoever packs the page."""
    session, ids = open_session(model, **recipe), random_ids(400)
    session.sync(ids[:300])
    session.rewind(100)
    other = ids[:100] + ids[:60]
    session.sync(other)
    fork = session.fork()
    session.sync(other + ids[:240])
    fork.sync(other + ids[100:340])
    assert_is_whole(session, other + ids[:240], **recipe)
    assert_is_whole(fork, other + ids[100:340], **recipe)


@recipes
def test_forks_of_one_open_page_copy_it(model: kvmix.Model, recipe: dict[str, Any]) -> None:
    """In one batch: the source stays, one fork takes the page over, the others must not write into it."""
    ids = random_ids(200)
    session = open_session(model, **recipe)
    session.sync(ids)
    forks = [session.fork() for _ in range(3)]
    session.decode([Row(10 + i, session=fork) for _ in range(80) for i, fork in enumerate(forks)])
    for i, fork in enumerate(forks):
        assert_is_whole(fork, ids + [10 + i] * 80, **recipe)
    assert_is_whole(session, ids, **recipe)


@recipes
@pytest.mark.parametrize("kept", [499, 430, 400, 385, 384, 373, 372, 200, 100, 1, 0])
def test_a_rewind_goes_on_as_if_nothing_had_been(model: kvmix.Model, recipe: dict[str, Any], kept: int) -> None:
    session, ids = open_session(model, **recipe), random_ids(500)
    session.sync(ids)
    session.rewind(kept)
    assert session.tokens == ids[:kept]
    other = ids[:kept] + random_ids(400, seed=3)
    session.sync(other)
    assert_is_whole(session, other, **recipe)


@recipes
@pytest.mark.parametrize("at", [100, 128, 200, 255, 256, 300])
def test_a_rewind_to_a_checkpoint_goes_on_as_if_nothing_had_been(
    model: kvmix.Model, recipe: dict[str, Any], at: int
) -> None:
    session, ids = open_session(model, **recipe), random_ids(700)
    session.sync(ids[:at])
    session.checkpoint()
    session.sync(ids)
    session.rewind(at)
    other = ids[:at] + random_ids(400, seed=3)
    session.sync(other)
    assert_is_whole(session, other, **recipe)
    session.rewind(at)  # the checkpoint is still there
    session.sync(ids)
    assert_is_whole(session, ids, **recipe)


@pytest.mark.parametrize("kv", ["f16", "k4v3"])
@pytest.mark.parametrize("window", [0, 100, 128])
@pytest.mark.parametrize("n_checkpoint", [0, 1, 4])
def test_a_sequence_fills_the_context_whatever_was_rewound(
    model: kvmix.Model, kv: str, window: int, n_checkpoint: int
) -> None:
    """Every return to a checkpoint leaves it a page of its own: pages that the context must not lack."""
    session = open_session(model, kv=kv, window=window, n_checkpoint=n_checkpoint, n_seq_max=1)
    ids: list[int] = []
    for seed, at in enumerate((300, 450, 600, 700)):
        ids += random_ids(at - len(ids), seed)
        session.sync(ids)
        session.checkpoint()
        session.sync(ids + random_ids(1024 - at, 50 + seed))
        session.rewind(at)
    session.sync(ids + random_ids(1024 - len(ids)))
    assert session.length == 1024


def walk(model: kvmix.Model, recipe: dict[str, Any], n_steps: int, seed: int) -> None:
    """Sessions under random calls, beside the lists of tokens that they should hold."""
    rng = np.random.default_rng(seed)
    first = open_session(model, n_ctx=2048, n_seq_max=3, n_batch=100, **recipe)
    held: dict[kvmix.Session, list[int]] = {first: random_ids(150)}
    first.sync(held[first])

    def pick() -> kvmix.Session:
        return list(held)[rng.integers(len(held))]

    def append(session: kvmix.Session) -> None:
        held[session] += random_ids(int(rng.choice([1, 3, 20, 130])), rng.integers(99))
        del held[session][450:]
        session.sync(held[session])

    def replace_tail(session: kvmix.Session) -> None:
        keep = int(rng.integers(len(held[session])))
        held[session] = held[session][:keep] + random_ids(int(rng.integers(1, 451 - keep)), rng.integers(99))
        session.sync(held[session])

    def rewind(session: kvmix.Session) -> None:
        n = len(held[session])
        del held[session][int(rng.integers(n - min(n, int(rng.choice([128, n]))), n + 1)) :]
        session.rewind(len(held[session]))
        if not held[session]:
            append(session)

    def fork(session: kvmix.Session) -> None:
        if len(held) == 3:
            held.pop(session)
            session.close()
        source = pick()
        held[source.fork()] = list(held[source])

    actions = [append, append, replace_tail, rewind, rewind, fork, kvmix.Session.checkpoint]
    for step in range(n_steps):
        actions[rng.integers(len(actions))](pick())
        session = pick()
        if step % 4 == 3:
            assert_is_whole(session, held[session], **recipe)
            held[session].append(65)


@recipes
def test_a_random_walk_of_calls(model: kvmix.Model, recipe: dict[str, Any]) -> None:
    walk(model, recipe, n_steps=60, seed=1)


@pytest.mark.full
@recipes
@pytest.mark.parametrize("seed", range(20))
def test_long_random_walks_of_calls(model: kvmix.Model, recipe: dict[str, Any], seed: int) -> None:
    walk(model, recipe, n_steps=300, seed=100 + seed)


# ---- what fails changes nothing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "error", "sentence"),
    [
        ([(1, 0, 201, False)], kvmix.ArgumentError, "position 201; the next one is 200"),
        ([(1, 0, 200, False), (1, 0, 200, False)], kvmix.ArgumentError, "position 200; the next one is 201"),
        ([(1, 4, 0, False)], kvmix.ArgumentError, "sequence 4; this session has 0 to 3"),
        ([(1, -1, 0, False)], kvmix.ArgumentError, "sequence -1"),
        ([(9999, 0, 200, False)], kvmix.ArgumentError, "token 9999 is not in the vocabulary"),
        ([(-1, 0, 200, False)], kvmix.ArgumentError, "token -1"),
        ([(1, 0, 200 + i, True) for i in range(3)], kvmix.ArgumentError, "3 rows want logits; .* opened for 2"),
        ([(1, 0, 200 + i, False) for i in range(65)], kvmix.ArgumentError, "n_rows is 65; it takes 1 to 64"),
        ([], kvmix.ArgumentError, "n_rows is 0"),
        ([(1, 0, 200 + i, False) for i in range(57)], kvmix.ContextFull, "needs position 257 of 256"),
        ([(1, 1, 0, False), (1, 0, 199, False)], kvmix.ArgumentError, "row 1 of sequence 0 has position 199"),
    ],
)
def test_a_failed_decode_changes_nothing(
    model: kvmix.Model, rows: list[tuple[int, int, int, bool]], error: type[Exception], sentence: str
) -> None:
    session, ids = open_session(model, n_ctx=256, n_batch=64, n_logits=2), random_ids(200)
    session.sync(ids)
    before = session.stats
    with pytest.raises(error, match=sentence):
        _native.decode(session.core.handle, rows)
    assert session.stats == before
    assert_is_whole(session, ids)


def test_a_batch_that_finds_no_page_changes_nothing(model: kvmix.Model) -> None:
    """A fork needs a copy of the page that its source has written on, and others hold every page."""
    options: dict[str, Any] = {"n_ctx": 256, "n_batch": PAGE, "n_seq_max": 8, "n_checkpoint": 0}
    session, ids = open_session(model, **options), random_ids(200)
    session.sync(ids)
    fork, others = session.fork(), []
    session.sync(ids + [7] * 10)
    with pytest.raises(kvmix.ContextFull, match="page pool"):
        while True:
            others.append(session.fork())
            others[-1].sync(random_ids(256, seed=9))
    before = session.stats
    with pytest.raises(kvmix.ContextFull, match="page pool"):
        fork.decode([Row(9)])
    assert session.stats == before
    for other in others:
        other.close()
    fork.decode([Row(9)] * 20)
    assert_is_whole(session, ids + [7] * 10, **options)
    assert_is_whole(fork, ids + [9] * 20, **options)


def test_cancelling_before_a_call_stops_it(model: kvmix.Model) -> None:
    session, ids = open_session(model), random_ids(200)
    session.sync(ids)
    session.cancel()
    with pytest.raises(kvmix.Cancelled):
        session.decode([Row(1)])
    assert_is_whole(session, ids)


def test_cancelling_in_the_middle_of_a_batch_changes_nothing(folder: Path) -> None:
    """A batch in which pages are packed and an open page grows, stopped after some of ten slow layers."""
    path = tiny.write_model(folder / "deep.gguf", n_layer=10, n_ctx=1024).path
    session, ids = open_session(kvmix.Model(path), kernels="scalar"), random_ids(700)
    session.sync(ids[:200])
    before = session.stats
    timer = threading.Timer(0.1, session.cancel)
    timer.start()
    with pytest.raises(kvmix.Cancelled, match=r"in layer \d of 10"):
        session.decode([Row(token) for token in ids[200:]])
    timer.join()
    assert session.stats == before
    session.sync(ids[:260])
    assert_is_whole(session, ids[:260], kernels="scalar")


# ---- sync evaluates what it must ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kv", "checkpoints", "kept", "n_new", "n_evaluated"),
    [
        ("k4v3", [], 600, 0, 1),  # only the last token again, for its logits
        ("k4v3", [], 600, 50, 50),
        ("k4v3", [], 550, 30, 30),
        ("k4v3", [], 472, 30, 30),  # 128 back
        ("k4v3", [], 472, 0, 129 - 128),
        ("k4v3", [], 384, 30, 30),  # the f16 pages that happen to be there still
        ("k4v3", [], 383, 30, 413),  # 0 is the nearest checkpoint
        ("k4v3", [300], 383, 30, 113),
        ("k4v3", [300], 300, 30, 30),
        ("k4v3", [300], 299, 30, 329),  # the checkpoint lies behind
        ("k4v3", [100, 300], 299, 30, 229),
        ("k4v3", [100, 200, 300], 150, 30, 180),  # two are kept: 100 is forgotten
        ("k4v3", [100, 200, 300], 250, 30, 80),
        ("f16", [], 5, 30, 30),  # nothing is packed: every rewind is exact
    ],
)
def test_sync_evaluates_no_more_than_it_must(
    llama: kvmix.Model, kv: str, checkpoints: list[int], kept: int, n_new: int, n_evaluated: int
) -> None:
    session, ids = open_session(llama, kv=kv), random_ids(600)
    for at in checkpoints:
        session.sync(ids[:at])
        session.checkpoint()
    session.sync(ids)
    before = session.stats.n_evaluated
    assert before == 600
    tail = [255 - token for token in random_ids(600)[kept : kept + n_new]] or [255] * n_new
    other = ids[:kept] + (tail + [1] * n_new)[:n_new]
    assert session.sync(other) == n_evaluated == session.stats.n_evaluated - before
    assert_is_whole(session, other, kv=kv)


def test_a_rewind_drops_the_checkpoints_behind_it(model: kvmix.Model) -> None:
    session, ids = open_session(model), random_ids(900)
    for at in (200, 600):
        session.sync(ids[:at])
        session.checkpoint()
    session.rewind(500)
    session.sync(ids[:500] + ids[:400])  # a checkpoint at 600 would now hold other tokens
    before = session.stats.n_evaluated
    session.rewind(610)
    assert session.stats.n_evaluated - before == 410
    assert_is_whole(session, ids[:500] + ids[:110])


# ---- bytes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", ["f16", "k8v8", "k4v3", "k2v2", "k4v3,0:k8v4", "kf16v2"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"balance_page": 1},
        {"window": 0, "sink": 0},
        {"window": 300, "sink": 64, "n_seq_max": 3, "n_checkpoint": 0},
        {"n_ctx": 100, "n_batch": 1, "n_seq_max": 1},
        {"n_batch": 256, "strict": True},
    ],
    ids=str,
)
def test_what_is_allocated_is_what_was_planned(model: kvmix.Model, kv: str, options: dict[str, Any]) -> None:
    wanted = {"n_ctx": 2000, "kv": kv, "n_threads": 2} | options
    plan, session = model.plan(**wanted), model.session(**wanted)
    stats = session.stats
    assert (stats.kv_bytes, stats.bits_full, stats.n_ctx) == (plan.kv_bytes, plan.bits_full, plan.n_ctx)
    need = plan.kv_bytes + plan.workspace_bytes
    model.session(**wanted, memory_limit=need)
    with pytest.raises(kvmix.OutOfMemory, match=rf"needs {need / 2**20:.1f} MiB .*-c.*--kv"):
        model.session(**wanted, memory_limit=need - 1)


@pytest.mark.parametrize("balance_page", [0, 1])
@pytest.mark.parametrize(("k", "v"), [("8", "8"), ("4", "3"), ("2", "4"), ("f16", "2")])
def test_a_page_has_the_bits_of_its_types(model: kvmix.Model, k: str, v: str, balance_page: int) -> None:
    layer = model.session(kv=f"k{k}v{v}", balance_page=balance_page).layers[0]
    k_bits = physical_bits(KVTYPES[layer.k_type], Side.K, layer.d_k, bool(balance_page))
    v_bits = physical_bits(KVTYPES[layer.v_type], Side.V, layer.d_v)
    n_values = PAGE * layer.n_head_kv * layer.d_k
    assert layer.page_bytes == (k_bits + v_bits) * n_values / 8  # at d = 64 nothing is padded


@pytest.mark.parametrize("n_tokens", [1, 100, 255, 256, 300, 384, 1000, 1500])
@pytest.mark.parametrize(("kv", "window", "sink"), [("f16", 128, 16), ("k4v3", 128, 16), ("k2v2", 0, 4)])
def test_bits_are_bytes(llama: kvmix.Model, kv: str, window: int, sink: int, n_tokens: int) -> None:
    """In use: f16 pages from one before the cut on, for a rewind; packed pages, and with the first of them the sinks
    and the frozen balance. Read by the next token: of each page one form, packed below the cut."""
    session = open_session(llama, n_ctx=1500, kv=kv, window=window, sink=sink)
    assert session.stats.bits_now == 0 and session.stats.kv_used_bytes == 0
    session.sync(random_ids(n_tokens))
    n_packed = 0 if kv == "f16" else max(0, n_tokens - 1 - window) // PAGE
    n_dropped = 0 if kv == "f16" else max(0, max(0, n_tokens - window) // PAGE - 1)
    used = read = n_values = 0
    for layer in session.layers:
        values = layer.n_head_kv * (layer.d_k + layer.d_v)  # of a token
        store = 2 * values * sink + 2 * layer.n_head_kv * layer.d_k if n_packed > 0 else 0
        packed = store + n_packed * layer.page_bytes
        used += packed + 2 * values * (n_tokens - n_dropped * PAGE)
        read += packed + 2 * values * (n_tokens - n_packed * PAGE)
        n_values += values * n_tokens
    stats = session.stats
    assert stats.kv_used_bytes == used <= stats.kv_bytes
    assert stats.bits_now == 8 * read / n_values
    if n_packed == 0:
        assert stats.bits_now == 16.0
    if n_tokens == stats.n_ctx:
        assert stats.bits_now == stats.bits_full


def test_a_long_chat_falls_toward_the_packed_bits(llama: kvmix.Model) -> None:
    session = open_session(llama, n_ctx=2048)
    bits = []
    for n_tokens in (200, 600, 1200, 2048):
        session.sync(random_ids(n_tokens))
        bits.append(session.stats.bits_now)
    assert bits == sorted(bits, reverse=True)
    assert bits[0] == 16.0 and bits[-1] < 7
    assert llama.plan(n_ctx=1 << 17, kv="k4v3").bits_full == pytest.approx((4 + 3) / 2 + 16 / 64 + 1 / 16, rel=0.02)


def test_shared_pages_count_once(model: kvmix.Model) -> None:
    session = open_session(model)
    session.sync(random_ids(700))
    before = session.stats
    fork = session.fork()
    assert session.stats.n_tokens == 2 * before.n_tokens
    shared = session.stats.kv_used_bytes - before.kv_used_bytes
    assert shared < 0.05 * before.kv_used_bytes  # its own sinks and balance
    fork.close()
    assert session.stats == before


def test_layers_share_out_the_cache(model: kvmix.Model) -> None:
    """And only layers that see all grow with the context."""
    small, large = (open_session(model, n_ctx=n_ctx) for n_ctx in (8192, 16384))
    for session in (small, large):
        assert sum(layer.kv_bytes for layer in session.layers) == session.stats.kv_bytes
    grown = [a.kv_bytes < b.kv_bytes for a, b in zip(small.layers, large.layers, strict=True)]
    assert grown == [layer.span == 0 for layer in small.layers]
    assert {layer.span for layer in small.layers} == ({0, 200} if model.info.arch == "gemma3" else {0})


def test_logits_are_those_of_the_last_token(llama: kvmix.Model) -> None:
    session = open_session(llama, n_logits=4)
    session.decode([Row(5, want_logits=True), Row(6)])
    with pytest.raises(kvmix.StateError, match="no logits for the last token"):
        _ = session.logits
    session.decode([Row(7, want_logits=True), Row(8, want_logits=True)])
    assert np.array_equal(session.logits, session.logits_view(1))
