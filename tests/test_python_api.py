"""The library layer: models, tokens, sessions, forks, generation, and what happens when things end early."""

import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Generator
from pathlib import Path

import numpy as np
import pytest

import kvmix
import tiny
from kvmix import Row, _native


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("model") / "tiny.gguf", n_ctx=2048).path


@pytest.fixture
def model(path: Path) -> kvmix.Model:
    return kvmix.Model(path)


def text_ids(model: kvmix.Model, n_tokens: int) -> list[int]:
    rng = np.random.default_rng(n_tokens)
    return rng.integers(0, 256, n_tokens).tolist()


def greedy(session: kvmix.Session, n_tokens: int) -> list[int]:
    return list(session.generate(max_tokens=n_tokens, temp=0.0))


# ---- the package ----------------------------------------------------------------------------------------------------


def test_all_is_what_is_visible() -> None:
    assert dir(kvmix) == sorted(kvmix.__all__)
    for name in kvmix.__all__:
        assert getattr(kvmix, name).__name__ == name
    with pytest.raises(AttributeError, match="nonsense"):
        _ = kvmix.nonsense  # type: ignore[attr-defined]


def test_importing_the_package_does_not_load_the_engine() -> None:
    code = "import sys, kvmix; assert 'kvmix._native' not in sys.modules; kvmix.Model; kvmix._native"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- models and tokens ----------------------------------------------------------------------------------------------


def test_a_model_describes_itself(model: kvmix.Model) -> None:
    info = model.info
    assert (info.arch, info.name, info.n_layer, info.n_embd, info.n_ctx_train) == ("llama", "tiny", 2, 256, 2048)
    assert (info.n_head, info.n_head_kv, info.head_dim, info.n_ff) == (4, 2, 64, 512)
    assert info.weights == "F32 100%"
    assert info.file_bytes == Path(model.path).stat().st_size
    assert model.metadata("general.architecture") == "llama"
    assert model.metadata("no.such.key") is None
    assert model.chat_template == tiny.CHATML
    with pytest.raises(kvmix.FormatError, match=r"llama\.block_count"):
        model.metadata("llama.block_count")


def test_mmap_and_private_memory_give_the_same(path: Path) -> None:
    logits = []
    for mmap in (True, False):
        with kvmix.Model(path, mmap=mmap) as model, model.session(n_ctx=64, kv="f16") as session:
            session.sync(model.tokenize("the world"))
            logits.append(session.logits)
    assert np.array_equal(*logits)


@pytest.mark.parametrize("text", ["hello world", "", "naïve 🙂", b"\xff\xfe broken \x80 bytes \x00"])
def test_tokens_give_the_text_back(model: kvmix.Model, text: str | bytes) -> None:
    data = text if isinstance(text, bytes) else text.encode()
    tokens = model.tokenize(text, add_special=False)
    assert b"".join(model.token_bytes(t) for t in tokens) == data
    assert model.detokenize(tokens) == data.decode("utf-8", "replace")


@pytest.mark.parametrize("text", ["ab\udcffc", "ab\ud800"])
def test_half_a_surrogate_pair_is_refused(model: kvmix.Model, text: str) -> None:
    for use in (model.tokenize, model.metadata, lambda kv: model.session(kv=kv)):
        with pytest.raises(kvmix.ArgumentError, match="not Unicode, at its character 2"):
            use(text)


def test_control_tokens_are_recognized_where_trusted(model: kvmix.Model) -> None:
    text = b"<|im_end|>"
    [end] = model.tokenize(text, parse_special=True)
    assert model.is_end(end) and kvmix.TokenAttr.CONTROL in model.token_attr(end)
    assert model.token_bytes(end) == text
    assert end not in model.tokenize(text)
    assert model.tokenize(text, parse_special=True, trusted=b"\1" * len(text)) == [end]
    assert end not in model.tokenize(text, parse_special=True, trusted=b"\1" * (len(text) - 1) + b"\0")
    with pytest.raises(kvmix.ArgumentError, match="3 bytes"):
        model.tokenize(text, trusted=b"abc")


@pytest.mark.parametrize("token", [-1, 10**6, 2**40])
def test_a_token_that_does_not_exist(model: kvmix.Model, token: int) -> None:
    with pytest.raises(kvmix.ArgumentError):
        model.token_bytes(token)


def test_a_long_token_is_whole(tmp_path: Path) -> None:
    tokens = tiny.byte_vocab().tokens
    tokens[-2] = "<|" + 100 * "x" + "|>"
    keys = {"tokenizer.ggml.tokens": tokens}
    model = kvmix.Model(tiny.write_model(tmp_path / "long.gguf", n_vocab=len(tokens), extra_keys=keys).path)
    assert model.token_bytes(len(tokens) - 2) == tokens[-2].encode()


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(kvmix.ModelIOError, match=r"nothing\.gguf"):
        kvmix.Model(tmp_path / "nothing.gguf")
    with pytest.raises(OSError):
        kvmix.Model(tmp_path / "nothing.gguf")


# ---- sessions -------------------------------------------------------------------------------------------------------


def test_plan_is_what_a_session_takes(model: kvmix.Model) -> None:
    plan = model.plan(n_ctx=16384, kv="k4v3")
    stats = model.session(n_ctx=16384, kv="k4v3").stats
    assert (plan.n_ctx, plan.kv_bytes, plan.bits_full) == (16384, stats.kv_bytes, stats.bits_full)
    assert plan.kv_bytes < model.plan(n_ctx=16384, kv="f16").kv_bytes / 2


def test_layers_and_stats_name_the_types(model: kvmix.Model) -> None:
    session = model.session(n_ctx=512, kv="k4v3,1:k8v4", window=0, sink=8)
    assert [(layer.k_type, layer.v_type) for layer in session.layers] == [("q4", "q3"), ("q8", "q4")]
    assert (session.stats.window, session.stats.sink, session.stats.recipe_source) == (0, 8, "--kv")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kv": "k9v9"}, "9"),
        ({"act": "f64"}, "q8, f32"),
        ({"kernels": "mmx"}, "auto, scalar, avx2"),
        ({"n_ctx": -1}, "n_ctx"),
        ({"n_ctx": 2**40}, "n_ctx"),
        ({"n_batch": 0}, "n_batch"),
        ({"n_seq_max": 0}, "n_seq_max"),
        ({"sink": 65}, "sink"),
        ({"kv": "k4\0v3"}, "NUL"),
        ({"kv": 3}, "kv must be str, not 3"),
        ({"n_ctx": "a"}, "n_ctx takes a whole number of 32 bits, not 'a'"),
        ({"n_threads": 1.5}, "n_threads takes a whole number of 32 bits, not 1.5"),
        ({"memory_limit": -1}, "memory_limit takes a whole number of 64 bits, from 0 up, not -1"),
        ({"n_contexts": 3}, "unknown option n_contexts; did you mean n_ctx?"),
        ({"zzz": 3}, "unknown option zzz; there are n_ctx, kv, .*kv_default"),
    ],
    ids=lambda value: str(value).replace("\0", "NUL"),
)
def test_a_bad_option_is_named(model: kvmix.Model, options: dict[str, object], sentence: str) -> None:
    with pytest.raises(kvmix.ArgumentError, match=sentence):
        model.session(**options)
    with pytest.raises(kvmix.ArgumentError, match=sentence):
        model.plan(**options)


@pytest.mark.parametrize(
    ("misuse", "sentence"),
    [
        (lambda s: s.chat("hi"), "messages are a list of .*, not 'hi'"),
        (lambda s: s.chat(["hi"]), "messages are a list of"),
        (lambda s: s.chat([], temperature=0.5), "unknown option temperature; did you mean temp?"),
        (lambda s: s.chat([], max_tokens=-2), "max_tokens -2"),
        (lambda s: s.generate(max_tokens="a"), "max_tokens 'a'"),
        (lambda s: s.generate(temp="a"), "temp takes a number, not 'a'"),
        (lambda s: s.decode([1, 2, 3]), r"decode takes rows, not 1: give Row\(token\)"),
        (lambda s: s.decode([Row("a")]), "token takes a whole number of 32 bits, not 'a'"),
        (lambda s: s.decode([Row(1, session=3)]), "decode only its forks"),
        (lambda s: s.rewind("a"), "cannot rewind to 'a' tokens: the session holds 2"),
        (lambda s: s.sync("text"), "tokens are ids, not text"),
        (lambda s: s.sync([1.5]), "tokens are whole numbers"),
        (lambda s: s.logits_view("a"), "index takes a whole number"),
        (lambda s: s.model.tokenize(3), "text must be str, not 3"),
        (lambda s: s.model.token_attr(2**40), "token takes a whole number of 32 bits"),
    ],
)
def test_misuse_is_one_sentence(model: kvmix.Model, misuse: Callable[[kvmix.Session], object], sentence: str) -> None:
    session = model.session(n_ctx=64)
    session.sync([1, 2])
    with pytest.raises(kvmix.ArgumentError, match=sentence):
        misuse(session)
    assert session.tokens == [1, 2]


def test_sync_evaluates_only_what_is_new(model: kvmix.Model) -> None:
    session = model.session(n_ctx=512)
    ids = text_ids(model, 100)
    assert session.sync(ids) == 100
    assert (session.tokens, session.length) == (ids, 100)
    assert session.sync([*ids, 1, 2, 3]) == 3
    assert session.sync([*ids[:90], 7]) == 1
    assert session.tokens == [*ids[:90], 7]
    assert session.sync([]) == 0
    assert session.tokens == []


def test_sync_reports_progress(model: kvmix.Model) -> None:
    session, steps = model.session(n_ctx=512, n_batch=64), []
    session.sync(text_ids(model, 150), progress=lambda held, total: steps.append((held, total)))
    assert steps == [(64, 150), (128, 150), (150, 150)]


def test_sync_takes_numpy_ids_and_tokens_gives_ints(model: kvmix.Model) -> None:
    session = model.session(n_ctx=64)
    session.sync(np.arange(5))
    assert session.tokens == [0, 1, 2, 3, 4]
    assert {type(t) for t in session.tokens} == {int}


def test_logits_are_the_last_tokens_and_the_view_is_the_librarys(model: kvmix.Model) -> None:
    session = model.session(n_ctx=128, kv="f16")
    session.sync([10, 11, 12])
    logits = session.logits
    assert (logits.dtype, logits.shape) == (np.float32, (model.info.n_vocab,))
    view = session.logits_view(0)
    assert np.array_equal(view, logits) and not view.flags.writeable and not np.shares_memory(view, logits)
    session.decode([Row(13, want_logits=True), Row(14), Row(15, want_logits=True)])
    assert np.array_equal(session.logits, session.logits_view(1))
    assert not np.array_equal(session.logits, logits)
    with pytest.raises(kvmix.KvmixError):
        session.logits_view(2)


def test_no_logits_is_said(model: kvmix.Model) -> None:
    session = model.session(n_ctx=128)
    with pytest.raises(kvmix.StateError, match="no logits"):
        _ = session.logits
    session.sync([1, 2, 3])
    session.decode([Row(4)])
    with pytest.raises(kvmix.StateError, match="no logits"):
        _ = session.logits


def test_a_failed_decode_changes_nothing(model: kvmix.Model) -> None:
    session = model.session(n_ctx=128)
    session.sync([1, 2, 3])
    for rows, error in [
        ([Row(4), Row(10**6)], kvmix.ArgumentError),
        ([Row(2**40)], kvmix.ArgumentError),
        ([Row(1)] * 126, kvmix.ContextFull),
    ]:
        with pytest.raises(error):
            session.decode(rows)
        assert session.tokens == [1, 2, 3]
        with pytest.raises(kvmix.StateError, match="no logits"):
            _ = session.logits
    session.decode([Row(4)])
    assert session.tokens == [1, 2, 3, 4]


def test_a_prompt_that_does_not_fit_drops_nothing(model: kvmix.Model) -> None:
    session = model.session(n_ctx=128)
    session.sync([1, 2, 3])
    with pytest.raises(kvmix.ContextFull, match="128"):
        session.sync([9] * 200)
    assert session.tokens == [1, 2, 3]


@pytest.mark.parametrize("kept", [0, 1, 300, 399, 400])
def test_rewind_is_exact(model: kvmix.Model, kept: int) -> None:
    ids = text_ids(model, 400)
    session, fresh = (model.session(n_ctx=600, kv="k4v3", act="f32") for _ in range(2))
    session.sync(ids)
    session.rewind(kept)
    assert session.tokens == ids[:kept]
    tail = [5, 6, 7]
    session.sync(ids[:kept] + tail)
    fresh.sync(ids[:kept] + tail)
    assert greedy(session, 8) == greedy(fresh, 8)


def test_rewind_to_more_than_there_is(model: kvmix.Model) -> None:
    session = model.session(n_ctx=64)
    session.sync([1, 2])
    for n_tokens in (3, -1, 2**40):
        with pytest.raises(kvmix.ArgumentError, match="holds 2"):
            session.rewind(n_tokens)


def test_a_checkpoint_makes_a_far_rewind_cheap(model: kvmix.Model) -> None:
    session = model.session(n_ctx=1024)
    session.sync(text_ids(model, 300))
    session.checkpoint()
    session.sync(session.tokens + text_ids(model, 301))
    evaluated = session.stats.n_evaluated
    session.rewind(300)
    assert session.stats.n_evaluated == evaluated
    session.sync(text_ids(model, 600))
    evaluated = session.stats.n_evaluated
    session.rewind(300)
    assert session.stats.n_evaluated == evaluated + 300
    assert session.length == 300


# ---- forks ----------------------------------------------------------------------------------------------------------


def test_a_fork_goes_its_own_way(model: kvmix.Model) -> None:
    session = model.session(n_ctx=512, act="f32")
    session.sync(text_ids(model, 140))
    fork = session.fork()
    assert fork.tokens == session.tokens
    expected = greedy(session, 12)
    fork.decode([Row(3)])
    assert session.length == 140 + 11 and fork.length == 141
    session.rewind(140)
    assert greedy(session, 12) == expected


def test_a_fork_can_go_on_at_once(model: kvmix.Model) -> None:
    session = model.session(n_ctx=512, act="f32")
    session.sync(text_ids(model, 140))
    fork = session.fork()
    assert greedy(fork, 12) == greedy(session, 12)


def test_forks_are_limited_and_their_places_come_back(model: kvmix.Model) -> None:
    session = model.session(n_ctx=512, n_seq_max=2)
    session.sync([1, 2, 3])
    fork = session.fork()
    with pytest.raises(kvmix.ContextFull, match="n_seq_max"):
        session.fork()
    fork.close()
    fork = session.fork()
    del fork
    gc.collect()
    assert session.fork().tokens == [1, 2, 3]


def test_a_closed_forks_tokens_leave_the_context(model: kvmix.Model) -> None:
    session = model.session(n_ctx=256)
    session.sync(text_ids(model, 100))
    with session.fork() as fork:
        fork.sync(text_ids(model, 101))
        assert session.stats.n_tokens == 201
    assert session.stats.n_tokens == 100


def test_a_fork_outlives_its_source(model: kvmix.Model) -> None:
    session = model.session(n_ctx=256)
    session.sync([1, 2, 3])
    fork = session.fork()
    session.close()
    assert fork.sync([1, 2, 3, 4]) == 1
    with pytest.raises(kvmix.StateError, match="closed"):
        _ = session.tokens


def test_rows_of_forks_share_a_batch(model: kvmix.Model) -> None:
    session, alone = (model.session(n_ctx=512, act="f32") for _ in range(2))
    ids = text_ids(model, 50)
    session.sync(ids)
    fork = session.fork()
    session.decode([Row(1, True), Row(2, True, fork), Row(3, True, fork)])
    assert (session.tokens, fork.tokens) == ([*ids, 1], [*ids, 2, 3])
    together = session.logits, fork.logits
    for tail, logits in zip(([1], [2, 3]), together, strict=True):
        alone.sync(ids)
        alone.decode([Row(token, True) for token in tail])
        assert np.array_equal(alone.logits, logits)
        alone.rewind(50)


def test_a_row_of_another_session_is_refused(model: kvmix.Model) -> None:
    session, other = model.session(n_ctx=64), model.session(n_ctx=64)
    with pytest.raises(kvmix.ArgumentError, match="forks"):
        session.decode([Row(1, session=other)])


# ---- generation -----------------------------------------------------------------------------------------------------


def test_generate_is_greedy_decoding_by_hand(model: kvmix.Model) -> None:
    session, by_hand = (model.session(n_ctx=256, act="f32") for _ in range(2))
    prompt = text_ids(model, 20)
    session.sync(prompt)
    by_hand.sync(prompt)
    expected: list[int] = []
    while len(expected) < 10:
        token = int(by_hand.logits.argmax())
        if model.is_end(token):
            break
        expected.append(token)
        by_hand.decode([Row(token, want_logits=True)])
    assert greedy(session, 10) == expected


def test_generate_wastes_no_evaluation(model: kvmix.Model) -> None:
    session = model.session(n_ctx=256)
    session.sync(text_ids(model, 20))
    evaluated = session.stats.n_evaluated
    produced = greedy(session, 6)
    assert session.tokens == text_ids(model, 20) + produced[:-1]
    assert session.stats.n_evaluated == evaluated + len(produced) - 1
    assert greedy(session, 0) == []


def test_the_same_seed_gives_the_same_tokens(model: kvmix.Model) -> None:
    session = model.session(n_ctx=256, act="f32")
    session.sync(text_ids(model, 20))
    runs = []
    for seed in (1, 1, 2):
        runs.append(list(session.generate(kvmix.Sampling(temp=2.0, seed=seed, top_k=0), max_tokens=20, min_p=0.0)))
        session.rewind(20)
    assert runs[0] == runs[1] != runs[2]


def test_closing_a_generator_leaves_the_session_usable(model: kvmix.Model) -> None:
    session = model.session(n_ctx=256, act="f32")
    prompt = text_ids(model, 20)
    session.sync(prompt)
    tokens = session.generate(temp=0.0)
    first = [next(tokens), next(tokens)]
    tokens.close()
    assert session.tokens == [*prompt, first[0]]
    session.rewind(20)
    assert greedy(session, 2) == first


def test_generate_checks_its_arguments_at_once(model: kvmix.Model) -> None:
    session = model.session(n_ctx=64)
    with pytest.raises(kvmix.ArgumentError, match="empty"):
        session.generate()
    session.sync([1])
    with pytest.raises(kvmix.ArgumentError, match="max_tokens -2"):
        session.generate(max_tokens=-2)
    with pytest.raises(kvmix.ArgumentError, match="temperature; did you mean temp"):
        session.generate(temperature=1.0)


def test_generation_ends_with_a_full_context(model: kvmix.Model) -> None:
    session = model.session(n_ctx=128)
    session.sync([1] * 128)
    with pytest.raises(kvmix.ContextFull):
        list(session.generate(kvmix.Sampling(temp=5.0, min_p=0.0, top_k=0, top_p=1.0)))
    assert session.length == 128


def test_another_thread_cancels(model: kvmix.Model) -> None:
    session = model.session(n_ctx=2048, n_batch=32)
    ids = text_ids(model, 2000)

    def cancel_soon(held: int, total: int) -> None:
        if held == 64:
            thread = threading.Thread(target=session.cancel)
            thread.start()
            thread.join()

    with pytest.raises(kvmix.Cancelled):
        session.sync(ids, progress=cancel_soon)
    assert session.tokens == ids[:64]
    assert session.sync(ids[:100]) == 36


def test_an_interrupt_leaves_tokens_and_cache_together(model: kvmix.Model) -> None:
    session = model.session(n_ctx=2048, n_batch=32)
    ids = text_ids(model, 500)

    def interrupt(held: int, total: int) -> None:
        if held >= 96:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.sync(ids, progress=interrupt)
    assert session.tokens == ids[:96]
    assert session.sync(ids) == 404


# ---- one at a time --------------------------------------------------------------------------------------------------


HELLO, WORLD = ([{"role": "user", "content": text}] for text in ("hello", "the world"))


@pytest.mark.parametrize("first", ["chat", "generate"])
@pytest.mark.parametrize("second", ["chat", "generate"])
def test_a_second_answer_waits_for_the_first(model: kvmix.Model, first: str, second: str) -> None:
    def start(session: kvmix.Session, kind: str, messages: list[dict[str, str]]) -> Generator[object, None, None]:
        sampling = kvmix.Sampling(temp=0.0)
        return session.chat(messages, sampling, max_tokens=6) if kind == "chat" else session.generate(sampling, 6)

    undisturbed, session = (model.session(n_ctx=256, act="f32") for _ in range(2))
    for each in (undisturbed, session):
        each.sync([1, 2, 3])
    expected = list(start(undisturbed, first, HELLO))
    answer, other = start(session, first, HELLO), start(session, second, WORLD)
    pieces = [next(answer)]
    with pytest.raises(kvmix.StateError, match=r"finish or close that generator, or fork\(\)"):
        next(other)
    with session.fork() as fork:  # its tokens may come between
        next(start(fork, second, WORLD))
    assert pieces + list(answer) == expected
    answer = start(session, first, HELLO)
    next(answer)
    answer.close()
    assert next(start(session, second, WORLD))


@pytest.mark.parametrize(
    "call",
    [
        lambda s, fork: s.sync([1, 2, 3]),
        lambda s, fork: fork.decode([Row(1)]),
        lambda s, fork: list(s.chat(HELLO, max_tokens=2)),
        lambda s, fork: s.rewind(0),
        lambda s, fork: s.fork(),
        lambda s, fork: s.model.close(),
    ],
    ids=["sync", "decode", "chat", "rewind", "fork", "close"],
)
def test_a_second_thread_is_refused_while_one_is_inside(
    path: Path, call: Callable[[kvmix.Session, kvmix.Session], object]
) -> None:
    session = kvmix.Model(path).session(n_ctx=512, n_batch=32, n_seq_max=3)
    fork = session.fork()
    refused: list[kvmix.StateError] = []

    def intrude() -> None:
        try:
            call(session, fork)
        except kvmix.StateError as error:
            refused.append(error)

    def in_between(held: int, total: int) -> None:
        if held == 64:
            thread = threading.Thread(target=intrude)
            thread.start()
            thread.join()

    ids = text_ids(session.model, 100)
    assert session.sync(ids, progress=in_between) == 100
    assert session.tokens == ids and len(refused) == 1 and "another thread" in str(refused[0])
    fork.decode([Row(1)])
    assert fork.tokens == [1]


def test_two_threads_in_one_chat_get_no_mixture(model: kvmix.Model) -> None:
    session = model.session(n_ctx=512, act="f32")
    expected = "".join(session.chat(HELLO, temp=0.0, max_tokens=20))
    answers: list[str] = []

    def ask() -> None:
        try:
            answers.append("".join(session.chat(HELLO, temp=0.0, max_tokens=20)))
        except kvmix.StateError:
            answers.append("refused")

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert expected in answers and set(answers) <= {expected, "refused"}


def test_progress_may_close_the_model(path: Path) -> None:
    model = kvmix.Model(path)
    session = model.session(n_ctx=512, n_batch=32)
    with pytest.raises(kvmix.StateError, match="closed"):
        session.sync([1] * 100, progress=lambda held, total: model.close())


# ---- lifetimes ------------------------------------------------------------------------------------------------------


def test_close_is_idempotent_and_use_after_it_is_an_error(path: Path) -> None:
    model = kvmix.Model(path)
    session = model.session(n_ctx=64)
    session.close()
    session.close()
    with pytest.raises(kvmix.StateError, match="closed"):
        session.sync([1])
    model.close()
    model.close()
    with pytest.raises(kvmix.StateError, match="closed"):
        model.tokenize("x")


def test_closing_a_model_closes_its_sessions_first(path: Path) -> None:
    with kvmix.Model(path) as model:
        session = model.session(n_ctx=64)
        session.sync([1, 2])
        tokens = session.generate(temp=0.0)
        next(tokens)
    with pytest.raises(kvmix.StateError, match="closed"):
        next(tokens)
    with pytest.raises(kvmix.StateError, match="closed"):
        session.fork()
    session.close()


def test_a_session_keeps_its_model_open(path: Path) -> None:
    session = kvmix.Model(path).session(n_ctx=64)
    gc.collect()
    assert session.sync([1, 2, 3]) == 3
    model = weakref.ref(session.model)
    session.close()
    gc.collect()
    assert model() is None


def test_the_garbage_collector_closes_a_session_before_its_model(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []
    for name in ("model_close", "session_close"):
        close = getattr(_native, name)
        monkeypatch.setattr(_native, name, lambda handle, name=name, close=close: (closed.append(name), close(handle)))
    cycle: list[object] = [kvmix.Model(path)]
    cycle += [cycle[0].session(n_ctx=64), cycle]
    del cycle
    gc.collect()
    assert closed == ["session_close", "model_close"]


def test_nothing_is_done_at_interpreter_exit(path: Path) -> None:
    code = (
        "import sys, kvmix; m = kvmix.Model(sys.argv[1]); s = m.session(n_ctx=64); s.sync([1, 2]); "
        "g = s.generate(); next(g); f = s.fork()"
    )
    result = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
