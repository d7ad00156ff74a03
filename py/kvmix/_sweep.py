"""Caches under measurement: they decode the same chunks of a text in lockstep and are scored position by position.

A chunk is a fresh sequence of n_ctx tokens; its second half is scored: positions n_ctx/2 .. n_ctx - 2 predict their
next token. Logits live until the next batch only, so that a large vocabulary fits.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ._logits_file import LogitsWriter, n_scored
from ._model import Model
from ._score import Divergence, Perplexity, Prediction
from ._session import LayerKV, Row, Session
from .errors import ArgumentError

PAGE = 128  # tokens
BATCH_MOST = 512
LOGITS_BYTES = 1 << 30  # of all caches together, unless -ub asks for more
N_CTX_LONG = 32768  # where the bits and bytes of a long context are predicted

ITEM = re.compile(r"(?P<kv>[^@]+)(?:@(?P<window>\d+)(?:/(?P<sink>\d+))?)?")


@dataclass(frozen=True, slots=True)
class Setting:
    """What a cache is: "k4v3", or with window and sinks "k4v3@0/16"."""

    text: str
    kv: str
    window: int | None = None
    sink: int | None = None

    def options(self) -> dict[str, Any]:
        """Model.session()'s keyword arguments."""
        values = {"kv": self.kv, "window": self.window, "sink": self.sink}
        return {name: value for name, value in values.items() if value is not None}


def parse_settings(text: str) -> list[Setting]:
    """Recipes separated by commas; one before a layer range ("k4v3,0-1:k8v4") belongs to its recipe."""
    settings = []
    for item in re.split(r",(?!\s*\d+(?:-\d+)?\s*:)", text):
        match = ITEM.fullmatch(item.strip())
        if match is None:
            raise ArgumentError(f"{item.strip()!r} is no RECIPE, RECIPE@WINDOW or RECIPE@WINDOW/SINK, as k4v3@0/16")
        window, sink = (None if match[name] is None else int(match[name]) for name in ("window", "sink"))
        settings.append(Setting(match[0], match["kv"], window, sink))
    return settings


def cut(model: Model, text: bytes, n_ctx: int) -> NDArray[np.int32]:
    """The whole chunks of a text [n_chunk][n_ctx]."""
    if n_ctx < 4:
        raise ArgumentError(f"a chunk of {n_ctx} tokens leaves nothing to score: give -c 4 or more")
    ids = np.array(model.tokenize(text), dtype=np.int32)
    n_chunk = len(ids) // n_ctx
    if n_chunk == 0:
        raise ArgumentError(
            f"the text has {len(ids)} tokens, one chunk has {n_ctx}: give a longer text or a smaller -c"
        )
    return ids[: n_chunk * n_ctx].reshape(n_chunk, n_ctx)


def with_bos(model: Model, chunks: NDArray[np.int32]) -> NDArray[np.int32]:
    """What is evaluated: where the file asks for a BOS, it takes the place of a chunk's first token."""
    chunks = chunks.copy()
    if model.info.add_bos:
        chunks[:, 0] = model.info.bos
    return chunks


def choose_batch(n_caches: int, n_ctx: int, n_vocab: int) -> int:
    """The most whole pages whose logits fit into LOGITS_BYTES, one at least."""
    n_batch = BATCH_MOST
    while n_batch > PAGE and 4 * n_caches * n_vocab * min(n_batch, n_scored(n_ctx)) > LOGITS_BYTES:
        n_batch -= PAGE
    return n_batch


@dataclass(frozen=True, slots=True)
class Size:
    """Of a cache, window and sinks included."""

    bits: float  # physical bits a value of what a scored position reads, on average over them
    bits_32k: float  # at N_CTX_LONG tokens
    kv_bytes_32k: int  # what a session of N_CTX_LONG tokens allocates


def measure_size(model: Model, session: Session, options: dict[str, Any], n_ctx: int) -> Size:
    """In strict mode nothing but sinks is read in f16, and the bits are those of packed pages."""
    long = model.plan(**options | {"n_ctx": N_CTX_LONG, "n_batch": BATCH_MOST, "n_logits": 1})
    if options["strict"]:
        bits = packed_bits(session.layers)
        return Size(bits, bits, long.kv_bytes)
    # a row reads what a session of as many tokens as stand before it would hold
    held = (model.plan(**options | {"n_ctx": n}).bits_full for n in range(n_ctx // 2, n_ctx - 1))
    return Size(sum(held) / n_scored(n_ctx), long.bits_full, long.kv_bytes)


def packed_bits(layers: Sequence[LayerKV]) -> float:
    n_values = sum(PAGE * layer.n_head_kv * (layer.d_k + layer.d_v) for layer in layers)
    return 8 * sum(layer.page_bytes for layer in layers) / n_values


class Base(Protocol):
    """Whose predictions the others' are compared with: the f16 cache, or a file of another run's."""

    name: str
    perplexity: Perplexity

    def start(self, chunk: int) -> None:
        """The chunk that comes next, counted from the text's first."""
        ...

    def decode(self, tokens: NDArray[np.int32], scored: NDArray[np.bool_]) -> None: ...

    def prediction(self, index: int) -> Prediction:
        """Of the index-th row among those scored in the last batch."""
        ...


class Measured(Base, Protocol):
    divergence: Divergence


class Cache:
    """A session under measurement, and what was measured."""

    def __init__(self, model: Model, options: dict[str, Any], name: str | None = None) -> None:
        """options: those of Model.session(), n_ctx, act and strict among them; without a name it is the recipe's"""
        self.session = model.session(**options)
        self.name = name or self.session.stats.recipe
        self.act: str = options["act"]
        self.size = measure_size(model, self.session, options, options["n_ctx"])
        self.perplexity = Perplexity()
        self.divergence = Divergence(n_scored(options["n_ctx"]))

    def start(self, chunk: int) -> None:
        self.session.rewind(0)

    def decode(self, tokens: NDArray[np.int32], scored: NDArray[np.bool_]) -> None:
        self.session.decode([Row(token, want) for token, want in zip(tokens.tolist(), scored.tolist(), strict=True)])

    def prediction(self, index: int) -> Prediction:
        return Prediction.of_logits(self.session.logits_view(index))


@dataclass(frozen=True)
class Lineup:
    """What runs in lockstep."""

    measured: Sequence[Measured]
    base: Base | None = None
    record: LogitsWriter | None = None  # keeps the predictions of a single measured cache

    def evaluate(self, number: int, chunk: NDArray[np.int32], n_batch: int) -> None:
        """Runs a chunk [n_ctx], the text's number-th, and scores its second half."""
        runs: list[Base] = [*self.measured] if self.base is None else [self.base, *self.measured]
        for run in runs:
            run.start(number)
        for first in range(0, len(chunk), n_batch):
            positions = np.arange(first, min(first + n_batch, len(chunk)))
            scored = (positions >= len(chunk) // 2) & (positions < len(chunk) - 1)
            for run in runs:
                run.decode(chunk[positions], scored)
            for index, target in enumerate(chunk[positions[scored] + 1].tolist()):
                self._score(index, target)

    def _score(self, index: int, target: int) -> None:
        expected = None
        if self.base is not None:
            expected = self.base.prediction(index)
            self.base.perplexity.add(expected, target)
        for cache in self.measured:
            row = cache.prediction(index)
            cache.perplexity.add(row, target)
            if expected is not None:
                cache.divergence.add(expected, row)
            if self.record is not None:
                self.record.add(row)
