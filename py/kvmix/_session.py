"""Session: a sequence of tokens in a KV cache - extended, rewound, forked, and continued by sampling.

A C session holds several sequences; Core is that C session, a Session object is one of its sequences, and fork()
makes another. Invariants:

1. A core lives as long as one of its Sessions, and its model as long as the core.
2. The cache of a sequence is a prefix of the Session's _ids, of the length that the library reports. _ids is set
   before a call, so that an interrupt (Ctrl-C) during it cannot leave the two apart, and never changed in place.
3. A sequence whose Session is gone is emptied before the core's next call, in the thread of that call: the garbage
   collector may run in any.
4. A core is in one thread's call at a time, and a Session in one answer, generate() or chat(), at a time: another is
   refused, for it would continue from the wrong tokens. Only cancel() may come from another thread.
"""

import difflib
import os
import threading
import weakref
from array import array
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from . import _native
from .errors import ArgumentError, ContextFull, KvmixError, StateError

if TYPE_CHECKING:
    from ._model import Model


@dataclass(frozen=True, slots=True)
class SessionOptions:
    n_ctx: int = 0  # tokens that all sequences together can hold; 0 = the trained context
    kv: str | None = None  # "k4v3,0-1:k8v4", "norms[:BITS]", "paper"; None = the file's, else kv_default, else k4v3
    kv_source: str | None = None  # what Stats.recipe_source says of kv; None = "--kv", or the name
    k_type: str | None = None  # type of every key ("q4"), None = from the recipe
    v_type: str | None = None  # type of every value
    window: int = -1  # recent tokens kept in f16; -1 = the recipe's
    sink: int = -1  # first tokens kept in f16; -1 = the recipe's
    balance_page: int = -1  # 1 = a key balance for every page, 0 = frozen at the first; -1 = the recipe's
    n_batch: int = 512  # most rows of one decode
    n_logits: int = 8  # most of them that want logits
    n_threads: int = 0  # 0 = the cores this process may use
    n_seq_max: int = 2  # this session and its forks
    n_checkpoint: int = 2  # prompts' ends to which a rewind is cheap
    act: str = "q8"  # "f32" = float activations in the matmuls
    strict: bool = False  # a row reads its own page packed too: for measurements
    page_hook: Callable[[_native.Page], None] | None = None  # sees pages; a codec under study
    kernels: str = "auto"  # "scalar", "avx2" and "avx512" are for tests
    memory_limit: int = 0  # refuse to open when more bytes would be needed; 0 = no limit
    kv_default: str | None = None  # recipe for a file without one

    def native(self, hook: _native.PageHook) -> dict[str, Any]:
        """The fields of kvmix_session_options; `hook` is page_hook's, and must live as long as the session."""
        values = {f.name: getattr(self, f.name) for f in fields(self)} | {"page_hook": hook.callback}
        values["act_f32"] = _choice("act", values.pop("act"), ("q8", "f32"))
        values["kernels"] = _choice("kernels", self.kernels, ("auto", "scalar", "avx2", "avx512"))
        return values


def _choice(name: str, value: str, choices: tuple[str, ...]) -> int:
    if value not in choices:
        raise ArgumentError(f"{name} {value!r} is none of {', '.join(choices)}")
    return choices.index(value)


Options = TypeVar("Options", SessionOptions, "Sampling")


def with_fields(options: Options, values: Mapping[str, Any]) -> Options:
    """options with these fields replaced; an unknown name is answered with the nearest one."""
    known = [f.name for f in fields(options)]
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, cutoff=0.5)
            raise ArgumentError(
                f"unknown option {name}; " + (f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}")
            )
    return replace(options, **values)


@dataclass(frozen=True, slots=True)
class Memory:
    n_ctx: int  # as resolved
    n_threads: int
    kv_bytes: int  # the whole cache
    workspace_bytes: int  # activations, scores, logits
    bits_full: float  # physical bits per cached value when one sequence fills the context


@dataclass(frozen=True, slots=True)
class Stats:
    recipe: str  # text form, "k4v3"
    recipe_source: str  # "-ctk/-ctv", "--kv", "norms", "paper", "file", "sidecar", "catalog" or "default"
    window: int
    sink: int
    n_ctx: int
    n_threads: int
    n_tokens: int  # held by all sequences
    n_evaluated: int  # rows run since the session was opened
    kv_bytes: int  # the cache as allocated
    kv_used_bytes: int  # in use now
    bits_now: float  # physical bits per value held; 0 when empty
    bits_full: float  # the same with one sequence filling the context


@dataclass(frozen=True, slots=True)
class LayerKV:
    k_type: str
    v_type: str
    n_head_kv: int
    d_k: int
    d_v: int
    span: int  # positions that a token sees, itself included; 0 = all
    page_bytes: int  # 128 packed tokens of this layer
    kv_bytes: int  # its part of the cache as allocated; with a span it does not grow with the context


@dataclass(frozen=True, slots=True)
class Sampling:
    """How generate() picks tokens; the defaults are llama.cpp's."""

    temp: float = 0.8  # <= 0: greedy
    top_k: int = 40  # <= 0: all
    top_p: float = 0.95  # 1 = off
    min_p: float = 0.05  # 0 = off
    repeat_penalty: float = 1.0  # 1 = off
    repeat_last_n: int = 64  # 0 = off, -1 = all
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0


class Row(NamedTuple):
    """A token to append; `session` is a fork of the decoding one, None = itself."""

    token: int
    want_logits: bool = False
    session: "Session | None" = None


class Core:
    """One C session: its handle, which sequences are free, and whose logits the last call left."""

    def __init__(self, model: "Model", options: SessionOptions) -> None:
        self.hook = _native.PageHook(options.page_hook)
        handle = _native.session_open(model.handle, options.native(self.hook))
        self.model = model
        self.free = list(range(options.n_seq_max))
        self.retired: deque[int] = deque()  # sequences whose Session is gone, not emptied yet
        self.logit_seqs: list[int] = []  # the sequence of each row of logits; -1 = no longer its last token
        self._handle = handle
        self._lock = threading.RLock()  # reentrant: a call may be made of others, and sync() calls its progress
        # the registered reference to the model keeps it open until the session is closed
        self._finalizer = weakref.finalize(self, _close, handle, model)
        self._finalizer.atexit = False

    def close(self) -> None:
        with self._alone():
            self._finalizer()

    @property
    def handle(self) -> _native.SessionHandle:
        if not self._finalizer.alive:
            raise StateError("the session is closed: open another with model.session()")
        return self._handle

    @contextmanager
    def ready(self) -> Iterator[_native.SessionHandle]:
        """The handle, for a call that reads or changes the cache."""
        with self._alone():
            handle = self.handle
            while self.retired:
                seq = self.retired.popleft()
                _native.truncate(handle, seq, 0)
                self.free.append(seq)
            yield handle

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            raise StateError(
                "another thread is in a call of the session or of its fork: use them from one thread at a time, or "
                "open another with model.session()"
            )
        try:
            yield
        finally:
            self._lock.release()

    def forget_logits(self, seq: int) -> None:
        self.logit_seqs = [-1 if s == seq else s for s in self.logit_seqs]


def _close(handle: _native.SessionHandle, _model: "Model") -> None:
    _native.session_close(handle)


class Session:
    """A sequence of tokens and its KV cache. Made by Model.session() and fork()."""

    def __init__(self, core: Core, ids: "array[int]") -> None:
        self._core: Core | None = core
        self._seq = core.free.pop(0)
        self._ids = ids
        self._generating = threading.Lock()
        self._chatting = threading.Lock()
        self._finalizer = weakref.finalize(self, core.retired.append, self._seq)
        self._finalizer.atexit = False

    @property
    def core(self) -> Core:
        if self._core is None:
            raise StateError("the session is closed: open another with model.session()")
        return self._core

    def close(self) -> None:
        """Gives the sequence back; the last one of a C session closes it. A second call does nothing."""
        self._finalizer()
        self._core = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # ---- what it holds

    @property
    def model(self) -> "Model":
        return self.core.model

    @property
    def length(self) -> int:
        """Tokens held."""
        return _native.length(self.core.handle, self._seq)

    @property
    def tokens(self) -> list[int]:
        """The ids held."""
        return self._ids[: self.length].tolist()

    @property
    def stats(self) -> Stats:
        with self.core.ready() as handle:
            return Stats(**_native.session_get_stats(handle))

    @property
    def layers(self) -> list[LayerKV]:
        handle = self.core.handle
        return [LayerKV(**_native.session_get_layer(handle, i)) for i in range(self.model.info.n_layer)]

    @property
    def logits(self) -> NDArray[np.float32]:
        """Logits [n_vocab] after the last token, a copy."""
        with self.core.ready():
            return self.logits_view(self._logits_index()).copy()

    def logits_view(self, index: int) -> NDArray[np.float32]:
        """Logits [n_vocab] of the index-th row that wanted them, in the library's memory: read-only, valid until the
        next decode, sync or close."""
        return _native.logits(self.core.handle, index, self.model.info.n_vocab)

    def _logits_index(self) -> int:
        seqs = self.core.logit_seqs
        if self._seq not in seqs:
            raise StateError("there are no logits for the last token: session.sync(session.tokens) computes them")
        return len(seqs) - 1 - seqs[::-1].index(self._seq)

    # ---- changing it

    def sync(self, tokens: Iterable[int], progress: Callable[[int, int], None] | None = None) -> int:
        """Makes the session hold exactly these tokens, reusing what it holds of them already; returns how many were
        evaluated. progress(held, total) is called after every step of at most n_batch tokens."""
        ids = _native.int32s(tokens)
        if not ids:
            self.rewind(0)
            return 0
        core = self.core
        with core.ready():
            evaluated = self.stats.n_evaluated
            held = 0
            while held < len(ids):
                earlier, self._ids = self._ids, ids
                core.logit_seqs = []
                try:
                    with core.hook.raising():
                        held = _native.sync(core.handle, self._seq, ids)  # progress may have closed it
                except Exception:
                    self._ids = earlier  # the cache is as it was, or a shorter prefix of that
                    raise
                if progress is not None:
                    progress(held, len(ids))
            core.logit_seqs = [self._seq]
            return self.stats.n_evaluated - evaluated

    def decode(self, rows: Iterable[Row]) -> None:
        """Appends tokens, in one batch of at most n_batch rows; rows may belong to forks of this session."""
        core = self.core
        with core.ready() as handle:
            ids: dict[Session, array[int]] = {}
            native_rows: list[tuple[int, int, int, bool]] = []
            for row in rows:
                if not isinstance(row, Row):
                    raise ArgumentError(f"decode takes rows, not {row!r}: give Row(token)")
                session = self if row.session is None else row.session
                if not isinstance(session, Session) or session.core is not core:
                    raise ArgumentError(
                        "a row belongs to another model's or another open session: decode only its forks"
                    )
                if session not in ids:
                    ids[session] = session._ids[: session.length]
                token = _native.int32("token", row.token)
                native_rows.append((token, session._seq, len(ids[session]), bool(row.want_logits)))
                ids[session].append(token)
            for session, held in ids.items():
                session._ids = held
            core.logit_seqs = []
            with core.hook.raising():
                _native.decode(handle, native_rows)
            last = {seq: pos for _, seq, pos, _ in native_rows}
            core.logit_seqs = [seq if pos == last[seq] else -1 for _, seq, pos, want in native_rows if want]

    def rewind(self, n_tokens: int) -> None:
        """Shortens the session to its first n_tokens. The last 128 tokens cost nothing; further back it goes to the
        nearest checkpoint at or below and evaluates again from there."""
        with self.core.ready() as handle:
            length = self.length
            if not (isinstance(n_tokens, Integral) and 0 <= n_tokens <= length):
                raise ArgumentError(f"cannot rewind to {n_tokens!r} tokens: the session holds {length}")
            if n_tokens == length:
                return
            self.core.forget_logits(self._seq)
            if _native.truncate(handle, self._seq, n_tokens) < n_tokens:
                self.sync(self._ids[:n_tokens])

    def fork(self) -> "Session":
        """A copy that shares the cache's pages and goes its own way; close() gives its sequence back."""
        core = self.core
        with core.ready() as handle:
            if not core.free:
                raise ContextFull(
                    "every sequence of the session is in use: close a fork, or open it with a larger n_seq_max"
                )
            fork = Session(core, self._ids)
            try:
                _native.fork(handle, self._seq, fork._seq)
            except KvmixError:
                fork.close()
                raise
            return fork

    def checkpoint(self) -> None:
        """Remembers where the session stands now, for a cheap rewind to it."""
        with self.core.ready() as handle:
            _native.checkpoint(handle, self._seq)

    def save(self, path: str | os.PathLike[str], note: bytes = b"") -> None:
        """Writes the session to a file, with its checkpoints, and bytes of the caller's. What was there before stays
        until the new file is whole."""
        if not isinstance(note, bytes):
            raise ArgumentError(f"note takes bytes, not {note!r}")
        with self.core.ready() as handle:
            _native.save(handle, self._seq, os.fsencode(path), note)

    def load(self, path: str | os.PathLike[str]) -> bytes:
        """Makes the session what was saved, with the same model, recipe, window and sinks; returns the note. Where that
        fails the session is as it was."""
        with self.core.ready() as handle:
            try:
                note = _native.load(handle, self._seq, os.fsencode(path))
                self.core.forget_logits(self._seq)
                return note
            finally:  # whatever came between: invariant 2
                self._ids = _native.tokens(handle, self._seq)

    def cancel(self) -> None:
        """Stops the sync, decode or generate that is running, else the next one, which raises Cancelled. Any thread."""
        _native.cancel(self.core.handle)

    # ---- continuing it

    def generate(
        self, sampling: Sampling | None = None, max_tokens: int = -1, **overrides: Any
    ) -> Generator[int, None, None]:
        """Token ids that continue what the session holds, until a token that ends the turn (not yielded) or max_tokens.
        Overrides are fields of Sampling. A token enters the cache when the next one is asked for, so the last one that
        was yielded is not in it."""
        sampling = with_fields(sampling or Sampling(), overrides)
        _check_max_tokens(max_tokens)
        if self.length == 0:
            raise ArgumentError("the session is empty: sync a prompt before generating")
        sampler = _native.sampler_open(self.model.handle, asdict(sampling))
        return self._generate(sampler, max_tokens)

    def _generate(self, sampler: _native.SamplerHandle, max_tokens: int) -> Generator[int, None, None]:
        try:
            with self._answering(self._generating):
                for token in self.tokens:
                    _native.sampler_accept(sampler, token)
                n_tokens = 0
                while n_tokens != max_tokens:
                    with self.core.ready() as handle:
                        if n_tokens > 0:
                            self.decode([Row(token, want_logits=True)])
                        elif self._seq not in self.core.logit_seqs:
                            self.sync(self.tokens)
                        token = _native.sample(sampler, handle, self._logits_index())
                    if self.model.is_end(token):
                        return
                    _native.sampler_accept(sampler, token)
                    yield token
                    n_tokens += 1
        finally:
            _native.sampler_close(sampler)

    @contextmanager
    def _answering(self, kind: threading.Lock) -> Iterator[None]:
        """Refuses an answer while another is unfinished. There are two locks, for a chat() runs a generate()."""
        if self._generating.locked() or not kind.acquire(blocking=False):
            raise StateError(
                "the session is answering another chat() or generate(): finish or close that generator, or fork()"
            )
        try:
            yield
        finally:
            kind.release()

    def chat(
        self,
        messages: list[dict[str, Any]],
        sampling: Sampling | None = None,
        *,
        max_tokens: int = -1,
        **overrides: Any,
    ) -> Iterator[str]:
        """The answer to a conversation, piece by piece; messages are {"role": ..., "content": ...}. A further call with
        the conversation grown evaluates only what is new. Overrides are fields of Sampling."""
        if not (isinstance(messages, Sequence) and all(isinstance(message, Mapping) for message in messages)):
            raise ArgumentError(f'messages are a list of {{"role": ..., "content": ...}}, not {messages!r}')
        sampling = with_fields(sampling or Sampling(), overrides)
        _check_max_tokens(max_tokens)
        return self._chat(messages, sampling, max_tokens)

    def _chat(self, messages: list[dict[str, Any]], sampling: Sampling, max_tokens: int) -> Iterator[str]:
        from ._chat import chat_stream

        with self._answering(self._chatting):
            yield from chat_stream(self, messages, sampling, max_tokens)


def _check_max_tokens(max_tokens: int) -> None:
    if not (isinstance(max_tokens, Integral) and max_tokens >= -1):
        raise ArgumentError(f"max_tokens {max_tokens!r} is not a whole number from -1, no limit, up")
