"""Saved sessions: a loaded one goes on as the one that was saved, bit for bit; what is damaged or of another session is
refused, and then nothing has changed."""

from __future__ import annotations

import hashlib
import os
import random
import re
import resource
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvmix
import tiny
from kvmix import Row

PAGE = 128
HEAD = struct.Struct("<8sIIQ8i")  # kvm_state_head: magic, version, model's crc and size; then as in FIELDS
FIELDS = ("n_layer", "n_group", "n_marks", "window", "sink", "balance_page", "n_recipe", "n_note")
LAYER_BYTES = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def llama(folder: Path) -> kvmix.Model:
    return kvmix.Model(tiny.write_model(folder / "llama.gguf", n_embd=128, n_ff=128, n_ctx=8192).path)


@pytest.fixture(scope="module")
def gemma3(folder: Path) -> kvmix.Model:
    """Two of the three layers slide, so pages are dropped and two groups hold different ones."""
    shape = {"n_layer": 3, "n_embd": 128, "n_ff": 128, "n_ctx": 2048, "span": 200}
    keys = {"gemma3.attention.sliding_window_pattern": 3}
    return kvmix.Model(tiny.write_model(folder / "gemma3.gguf", arch="gemma3", extra_keys=keys, **shape).path)


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def model(request: pytest.FixtureRequest) -> kvmix.Model:
    return request.getfixturevalue(request.param)


def random_ids(n_tokens: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, n_tokens).tolist()


def open_session(model: kvmix.Model, **options: Any) -> kvmix.Session:
    return model.session(**{"n_ctx": 1024, "kv": "k4v2", "n_threads": 1, "n_seq_max": 2} | options)


def append(session: kvmix.Session, ids: list[int]) -> np.ndarray:
    session.decode([Row(token, want_logits=i + 1 == len(ids)) for i, token in enumerate(ids)])
    return session.logits


# ---- a loaded session goes on as the saved one ----------------------------------------------------------------------

RECIPES = [
    {"kv": "k4v2"},
    {"kv": "f16"},
    {"kv": "k3v2,0:k8v8", "balance_page": 1, "sink": 4},
    {"kv": "k2v2", "window": 0},
    {"kv": "kf16v2", "window": 300},
]
recipes = pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r["kv"])


@recipes
def test_a_loaded_session_continues_bit_for_bit(model: kvmix.Model, recipe: dict[str, Any], tmp_path: Path) -> None:
    """One session goes through 50 cut points; saved at each, it is loaded into a session that held something else,
    evaluates some of the stretches that follow and gives the same logits after each."""
    edges = {1, 2, 16, 17, 127, 128, 129, 255, 256, 257, 383, 384, 385, 511, 512}
    cuts = sorted(edges | set(random.Random(1).sample(sorted(set(range(1, 700)) - edges), 50 - len(edges))))
    ids = random_ids(700)
    ends = [*cuts[1:], 700]
    session, logits = open_session(model, **recipe), []
    session.sync(ids[: cuts[0]])
    for cut, end in zip(cuts, ends, strict=True):
        session.save(tmp_path / f"{cut}.kv", f"note {cut}".encode())
        logits.append(append(session, ids[cut:end]))
    loaded = open_session(model, **recipe)
    for i, cut in enumerate(cuts):
        assert loaded.load(tmp_path / f"{cut}.kv") == f"note {cut}".encode()
        assert (loaded.length, loaded.tokens) == (cut, ids[:cut])
        with pytest.raises(kvmix.StateError, match="no logits"):
            _ = loaded.logits
        n_stretches = len(cuts) if i % 10 == 0 else 3
        for at, end, want in list(zip(cuts, ends, logits, strict=True))[i : i + n_stretches]:
            assert np.array_equal(append(loaded, ids[at:end]), want), (cut, end)


@recipes
def test_saving_what_was_loaded_gives_the_same_file(model: kvmix.Model, recipe: dict[str, Any], tmp_path: Path) -> None:
    """Of a session with checkpoints, rewound, among pages that a fork goes on with; from slots that others used."""
    ids = random_ids(900)
    session = open_session(model, n_ctx=2048, **recipe)
    session.sync(random_ids(900, seed=5))
    session.sync(ids[:300])
    session.checkpoint()
    session.sync(ids[:500])
    session.checkpoint()
    session.sync(ids[:720])
    fork = session.fork()
    fork.sync(ids[:720] + ids[:100])
    session.rewind(650)
    session.save(tmp_path / "a", b"note")
    loaded = open_session(model, **recipe)
    loaded.sync(ids[100:500])
    assert loaded.load(tmp_path / "a") == b"note"
    loaded.save(tmp_path / "b", b"note")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    for end, kept in ((760, 505), (800, 500), (620, 310), (900, 300)):
        before = [s.stats.n_evaluated for s in (session, loaded)]
        for s in (session, loaded):
            s.sync(ids[:end])
        assert np.array_equal(session.logits, loaded.logits)
        for s in (session, loaded):
            s.rewind(kept)
        after = [s.stats.n_evaluated for s in (session, loaded)]
        assert after[0] - before[0] == after[1] - before[1]  # its checkpoints are there


def lockstep(model: kvmix.Model, recipe: dict[str, Any], tmp_path: Path, n_steps: int, seed: int) -> None:
    """The same random calls on two pairs of a session and its fork; those of the second pair are saved and loaded now
    and then."""
    rng, path = random.Random(seed), tmp_path / "state"
    ids = random_ids(150, seed)
    worlds = []
    for _ in range(2):
        session = open_session(model, n_ctx=2048, n_seq_max=2, n_batch=100, **recipe)
        session.sync(ids)
        worlds.append([session, session.fork()])
    for step in range(n_steps):
        i, action, amount = rng.randrange(2), rng.choice("aaaarrcft"), rng.choice([1, 3, 20, 130])
        held = worlds[0][i].tokens
        keep = len(held) - rng.randint(0, min(len(held), rng.choice([amount, 900])))
        wanted = (held if action == "a" else held[:keep]) + random_ids(amount, rng.randrange(99))
        n_evaluated = []
        for world in worlds:
            session, before = world[i], world[i].stats.n_evaluated
            if action in "at":
                session.sync(wanted[:900])
            elif action == "r":
                session.rewind(keep)
            elif action == "c":
                session.checkpoint()
            else:
                world[1 - i].close()
                world[1 - i] = session.fork()
            n_evaluated.append(world[i].stats.n_evaluated - before)
        assert n_evaluated[0] == n_evaluated[1], step
        for ours, theirs in zip(*worlds, strict=True):
            assert ours.tokens == theirs.tokens
        if action in "at":
            assert np.array_equal(worlds[0][i].logits, worlds[1][i].logits), step
        if rng.random() < 0.3:
            worlds[1][i].save(path)
            worlds[1][i].load(path)


@recipes
@pytest.mark.parametrize("seed", range(3))
def test_the_same_calls_on_loaded_sessions(
    model: kvmix.Model, recipe: dict[str, Any], seed: int, tmp_path: Path
) -> None:
    lockstep(model, recipe, tmp_path, n_steps=80, seed=seed)


@pytest.mark.full
@recipes
@pytest.mark.parametrize("seed", range(100, 106))
def test_many_calls_on_loaded_sessions(model: kvmix.Model, recipe: dict[str, Any], seed: int, tmp_path: Path) -> None:
    lockstep(model, recipe, tmp_path, n_steps=300, seed=seed)


def test_an_empty_session_is_loaded_as_one(llama: kvmix.Model, tmp_path: Path) -> None:
    session = open_session(llama)
    session.save(tmp_path / "empty")
    session.sync(random_ids(300))
    assert session.load(tmp_path / "empty") == b""
    assert (session.length, session.stats.kv_used_bytes) == (0, 0)


def test_a_full_context_is_loaded(llama: kvmix.Model, tmp_path: Path) -> None:
    """Into a session of one sequence, whose pages the one it replaces has all taken; and into a larger one."""
    session = open_session(llama, n_seq_max=1)
    session.sync(random_ids(1000))
    session.checkpoint()
    session.sync(random_ids(1024))
    session.save(tmp_path / "full")
    session.load(tmp_path / "full")
    session.rewind(1000)
    session.sync(random_ids(1024))
    larger = open_session(llama, n_ctx=2048, n_batch=7)
    larger.load(tmp_path / "full")
    assert larger.tokens == random_ids(1024)
    larger.sync(random_ids(1100))


def test_a_packed_state_is_small(llama: kvmix.Model, tmp_path: Path) -> None:
    sizes = {}
    for kv in ("f16", "k4v2"):
        session = open_session(llama, n_ctx=8192, kv=kv, n_threads=0)
        session.sync(random_ids(8192))
        session.save(tmp_path / kv)
        sizes[kv] = (tmp_path / kv).stat().st_size
    assert sizes["f16"] >= 4 * sizes["k4v2"]


def test_a_state_is_its_owners_alone(llama: kvmix.Model, tmp_path: Path) -> None:
    session = open_session(llama)
    session.sync(random_ids(10))
    old = os.umask(0)
    try:
        session.save(tmp_path / "state")
    finally:
        os.umask(old)
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_nothing_of_another_sequence_is_in_a_state(llama: kvmix.Model, tmp_path: Path) -> None:
    """Positions of an open page that hold what was rewound, or a sequence that is gone, are not written."""
    for kv in ({"kv": "k4v2"}, {"kv": "k4v2", "balance_page": 1}):
        clean, used = open_session(llama, **kv), open_session(llama, **kv)
        used.sync(random_ids(700, seed=9))
        used.rewind(0)
        for session, name in ((clean, "clean"), (used, "used")):
            session.sync(random_ids(200))
            session.save(tmp_path / name)
        assert (tmp_path / "clean").read_bytes() == (tmp_path / "used").read_bytes()


# ---- what is refused changes nothing --------------------------------------------------------------------------------


@pytest.fixture
def small(folder: Path) -> kvmix.Model:
    shape = {"n_embd": 64, "n_head": 2, "n_head_kv": 1, "head_dim": 32, "n_ff": 64}
    return kvmix.Model(tiny.write_model(folder / "small.gguf", n_layer=2, **shape).path)


class Unharmed:
    """A session with a checkpoint, which must stay as it is whatever is loaded into it."""

    def __init__(self, model: kvmix.Model, tmp_path: Path, **options: Any) -> None:
        self.session, self.ids = open_session(model, **options), random_ids(400, seed=7)
        self.session.sync(self.ids[:200])
        self.session.checkpoint()
        self.session.sync(self.ids)
        self.logits, self.path = self.session.logits, tmp_path / "before"
        self.session.save(self.path)
        self.bytes = self.path.read_bytes()

    def refuses(self, path: Path, error: type[Exception] | tuple[type[Exception], ...], sentence: str = ".") -> str:
        with pytest.raises(error, match=sentence) as caught:
            self.session.load(path)
        assert self.session.tokens == self.ids
        assert np.array_equal(self.session.logits, self.logits)
        return str(caught.value)

    def check(self) -> None:
        self.session.save(self.path)
        assert self.path.read_bytes() == self.bytes


def saved(model: kvmix.Model, path: Path, n_tokens: int = 300, **options: Any) -> bytes:
    session = open_session(model, **options)
    session.sync(random_ids(min(n_tokens, 150)))
    session.checkpoint()
    session.sync(random_ids(n_tokens))
    session.save(path, b"a note")
    return path.read_bytes()


def sections(data: bytes) -> list[bytes]:
    """The sections before the layers' caches, and these as one; written from state.h, as a second reading of it."""
    fields = dict(zip(FIELDS, HEAD.unpack_from(data)[4:], strict=True))
    marks = 8 * fields["n_marks"] * (1 + fields["n_group"])
    sizes = [HEAD.size, fields["n_recipe"], LAYER_BYTES * fields["n_layer"], marks]
    at = sum(sizes[:3]) + 4 * 3
    sizes += [4 * struct.unpack_from("<i", data, at)[0], fields["n_note"]]
    found, at = [], 0
    for size in sizes:
        found.append(data[at : at + size])
        assert struct.unpack_from("<I", data, at + size)[0] == zlib.crc32(found[-1])
        at += size + 4
    assert hashlib.sha256(data[:-32]).digest() == data[-32:]
    return [*found, data[at:-32]]


def sealed(parts: list[bytes]) -> bytes:
    """The file of these sections, all its checksums right."""
    *framed, caches = parts
    body = b"".join(part + struct.pack("<I", zlib.crc32(part)) for part in framed) + caches
    return body + hashlib.sha256(body).digest()


def boundaries(data: bytes) -> list[int]:
    ends = np.cumsum([len(part) + 4 for part in sections(data)[:-1]]).tolist()
    return [0, *ends, len(data) - 32, len(data)]


def test_a_state_cut_short_is_refused(small: kvmix.Model, tmp_path: Path) -> None:
    data, path = saved(small, tmp_path / "state"), tmp_path / "cut"
    session = Unharmed(small, tmp_path)
    sizes = {end + by for end in boundaries(data) for by in (-5, -4, -1, 0, 1)}
    for size in sorted(sizes | set(range(0, len(data), 997))):
        if size < 0 or size == len(data):
            continue
        path.write_bytes(data[:size] if size < len(data) else data + b"\0" * (size - len(data)))
        session.refuses(path, kvmix.FormatError)
    session.check()


def test_a_changed_byte_is_refused(small: kvmix.Model, tmp_path: Path) -> None:
    """Each of the head, in a few ways, and 300 anywhere."""
    data, path = saved(small, tmp_path / "state"), tmp_path / "changed"
    session, rng = Unharmed(small, tmp_path), random.Random(3)
    changes = [(at, flip) for at in range(HEAD.size + 4) for flip in (1, 128, rng.randrange(1, 256))]
    changes += [(rng.randrange(len(data)), rng.randrange(1, 256)) for _ in range(300)]
    for at, flip in changes:
        changed = bytearray(data)
        changed[at] ^= flip
        path.write_bytes(changed)
        session.refuses(path, (kvmix.FormatError, kvmix.Unsupported))
    session.check()


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        (
            {"kv": "k4v3"},
            kvmix.ArgumentError,
            "saved with the recipe k4v2, this session has k4v3: open it with --kv k4v2",
        ),
        ({"window": 0}, kvmix.ArgumentError, "a window of 128, this session has 0: open it with --window 128"),
        ({"sink": 4}, kvmix.ArgumentError, "sinks of 16, this session has 4: open it with --sink 16"),
        ({"balance_page": 1}, kvmix.ArgumentError, "balance_page 0, this session has 1: open it with balance_page 0"),
        ({"n_checkpoint": 0}, kvmix.ArgumentError, "1 checkpoints, this session keeps 0: open it with n_checkpoint 1"),
        ({"n_ctx": 600}, kvmix.ContextFull, r"holds 700 tokens, the context of this session 600: .*\(-c\)"),
        ({"strict": True}, kvmix.Unsupported, "strict mode"),
    ],
)
def test_a_state_of_another_session_is_refused(
    small: kvmix.Model, options: dict[str, Any], error: type[Exception], sentence: str, tmp_path: Path
) -> None:
    saved(small, tmp_path / "state", n_tokens=700)
    session = open_session(small, **options)
    session.sync(random_ids(100, seed=7))
    logits = session.logits
    with pytest.raises(error, match=sentence):
        session.load(tmp_path / "state")
    assert session.tokens == random_ids(100, seed=7)
    assert np.array_equal(session.logits, logits)


def test_a_state_of_another_model_is_refused(small: kvmix.Model, llama: kvmix.Model, tmp_path: Path) -> None:
    saved(llama, tmp_path / "state")
    session = Unharmed(small, tmp_path)
    sentence = session.refuses(tmp_path / "state", kvmix.ArgumentError, "saved with another model")
    assert llama.fingerprint in sentence and small.fingerprint in sentence


def test_pages_that_others_hold_are_refused(small: kvmix.Model, tmp_path: Path) -> None:
    saved(small, tmp_path / "state", n_tokens=1000)
    session = open_session(small)
    session.sync(random_ids(1000, seed=8))
    fork = session.fork()
    fork.sync(random_ids(200, seed=9))
    before = session.stats
    with pytest.raises(kvmix.ContextFull, match=r"lack \d+ pages for the 1000 saved tokens"):
        fork.load(tmp_path / "state")
    assert fork.tokens == random_ids(200, seed=9) and session.stats == before
    session.load(tmp_path / "state")  # in the place of as many
    assert session.tokens == random_ids(1000)


def put(section: int, at: int, value: int) -> Callable[[list[bytes]], None]:
    """Another i32 there."""

    def change(parts: list[bytes]) -> None:
        part = bytearray(parts[section])
        struct.pack_into("<i", part, at, value)
        parts[section] = bytes(part)

    return change


MARKS, LISTS = 3, 16  # the section; two marks of two i32 before the lists


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        (put(0, 8, 2), kvmix.Unsupported, "a state of version 2, this library has version 1"),
        (put(0, 0, 0), kvmix.FormatError, "no saved session"),
        (put(0, 24, 3), kvmix.FormatError, "head that no session writes"),
        (put(0, 28, 2), kvmix.FormatError, "head that no session writes"),
        (put(0, 32, 0), kvmix.FormatError, "head that no session writes"),
        (put(0, 32, 2**31 - 1), kvmix.ArgumentError, "2147483646 checkpoints"),
        (put(0, 48, -1), kvmix.FormatError, "head that no session writes"),
        (put(0, 48, 2**31 - 1), kvmix.FormatError, "head that no session writes"),
        (put(0, 52, -1), kvmix.FormatError, "head that no session writes"),
        (put(0, 52, 2**31 - 1), kvmix.FormatError, "head that no session writes"),
        (put(0, 52, 60 << 20), kvmix.FormatError, "ends in its note"),
        (put(2, 0, 9), kvmix.FormatError, "other heads or pages in layer 0"),
        (put(2, LAYER_BYTES + 28, 9), kvmix.FormatError, "other heads or pages in layer 1"),
        (put(MARKS, 0, -1), kvmix.FormatError, "mark at -1 tokens, not in 0 to 1024"),
        (put(MARKS, 0, 2**31 - 1), kvmix.ContextFull, "holds 2147483647 tokens, the context of this session 1024"),
        (put(MARKS, 4, 2), kvmix.FormatError, r"sinks \(2\)"),
        (put(MARKS, 8, 0), kvmix.FormatError, "mark at 0 tokens, not in 1 to 300"),
        (put(MARKS, 8, 301), kvmix.FormatError, "mark at 301 tokens, not in 1 to 300"),
        (put(MARKS, LISTS, 1), kvmix.FormatError, "pages from 1 on"),
        (put(MARKS, LISTS, -1), kvmix.FormatError, "pages from -1 on"),
        (put(MARKS, LISTS + 4, 2), kvmix.FormatError, "f16 from 2 on"),
        (put(MARKS, LISTS + 4, -1), kvmix.FormatError, "f16 from -1 on"),
        (put(MARKS, 0, 301), kvmix.FormatError, "ends in its|damaged|bytes behind"),
        (put(4, 400, -1), kvmix.FormatError, "token -1, the vocabulary"),
        (put(4, 400, 320), kvmix.FormatError, "token 320, the vocabulary 320 tokens"),
    ],
)
def test_a_field_that_cannot_be_is_refused(
    small: kvmix.Model, change: Callable[[list[bytes]], None], error: type[Exception], sentence: str, tmp_path: Path
) -> None:
    """Its checksums right, as one who means harm would make them."""
    data = saved(small, tmp_path / "state")
    parts = sections(data)
    assert sealed(parts) == data
    change(parts)
    (tmp_path / "state").write_bytes(sealed(parts))
    session = Unharmed(small, tmp_path)
    session.refuses(tmp_path / "state", error, sentence)
    session.check()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("absent", "cannot be opened: No such file"),
        ("folder", "is no file"),
        ("pipe", "is no file"),
        ("empty", "ends at its byte 0"),
    ],
)
def test_what_is_no_state_is_refused(small: kvmix.Model, name: str, sentence: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").touch()
    session = Unharmed(small, tmp_path)
    error = kvmix.FormatError if name == "empty" else kvmix.ModelIOError
    assert name in session.refuses(tmp_path / name, error, sentence)
    for path in (tmp_path / "pipe", Path("/dev/full")):
        with pytest.raises(kvmix.ModelIOError, match="is there already and no file"):
            session.session.save(path)
    with pytest.raises(kvmix.ModelIOError, match=r"absent/x cannot be written: No such file"):
        session.session.save(tmp_path / "absent" / "x")
    with pytest.raises(kvmix.ArgumentError, match="a note of 67108865 bytes; a state takes 67108864"):
        session.session.save(tmp_path / "x", bytes((64 << 20) + 1))
    with pytest.raises(kvmix.ArgumentError, match="note takes bytes"):
        session.session.save(tmp_path / "x", "text")  # type: ignore[arg-type]
    session.check()


def test_a_full_disk_leaves_the_old_state(small: kvmix.Model, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "state"
    path.parent.mkdir()
    data = saved(small, path)
    session = Unharmed(small, tmp_path)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in [*boundaries(data)[:-1], len(session.bytes) - 1, 5000]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
        try:
            with pytest.raises(kvmix.ModelIOError, match="state cannot be written: File too large"):
                session.session.save(path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
        assert path.read_bytes() == data
        assert list(path.parent.iterdir()) == [path]
    session.check()


def test_a_kill_leaves_a_whole_state(small: kvmix.Model, tmp_path: Path) -> None:
    """A process that saves two sessions by turns over the same file is killed at any time."""
    program = f"""
import kvmix, sys
model = kvmix.Model({small.path!r})
sessions = [model.session(n_ctx=1024, kv="k4v2", n_threads=1) for _ in range(2)]
for session, n in zip(sessions, (300, 500)):
    session.sync(list(range(200)) * 2 + [1] * (n - 400) if n > 400 else list(range(200)) + [1] * (n - 200))
while True:
    for session in sessions:
        session.save({str(tmp_path / "state")!r}, b"note")
        print(flush=True)
"""
    session, rng, lengths = open_session(small), random.Random(1), set()
    for _ in range(8):
        child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
        assert child.stdout is not None
        for _ in range(rng.randrange(1, 6)):
            child.stdout.readline()
        timer = threading.Event()
        timer.wait(rng.random() / 100)
        child.kill()
        child.wait()
        child.stdout.close()
        assert session.load(tmp_path / "state") == b"note"
        lengths.add(session.length)
    assert lengths <= {300, 500}


def test_sessions_for_study_have_no_states(small: kvmix.Model, tmp_path: Path) -> None:
    for options in ({"strict": True}, {"page_hook": lambda _page: None}):
        with pytest.raises(kvmix.Unsupported, match="strict mode or with a page hook"):
            open_session(small, **options).save(tmp_path / "state")


def test_a_call_in_another_thread_refuses_save_and_load(small: kvmix.Model, tmp_path: Path) -> None:
    session, errors = open_session(small), []
    session.sync(random_ids(200))

    def save_and_load() -> None:
        for call in (session.save, session.load):
            with pytest.raises(kvmix.StateError, match="another thread") as caught:
                call(tmp_path / "state")
            errors.append(caught.value)

    def progress(_held: int, _total: int) -> None:
        thread = threading.Thread(target=save_and_load)
        thread.start()
        thread.join()

    session.sync(random_ids(300), progress)
    assert len(errors) == 2 and not (tmp_path / "state").exists()


def test_hostile_states(c_build: Path, small: kvmix.Model, tmp_path: Path) -> None:
    """Under sanitizers: mutants with right checksums are refused or run; both must occur, or they test nothing."""
    command = [c_build / "mutate_state", small.path, tmp_path / "state", "600"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    counts = [int(n) for n in re.findall(r"\d+", result.stdout)]
    assert sum(counts) == 600 and min(counts) > 50
