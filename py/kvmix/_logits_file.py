"""llama.cpp's file of a base model's predictions, as llama-perplexity --kl-divergence-base writes and reads it.

    "_logits_"  n_ctx  n_vocab  n_chunk    8 bytes, 3 x int32
    tokens                                 int32 [n_chunk][n_ctx]; a BOS that takes a first token's place is not in it
    rows                                   [n_chunk][n_ctx - 1 - n_ctx/2], a row for each scored position:
        scale  min                         2 x float32
        codes                              uint16 [n_vocab, rounded up to even]: log-probability = min + scale * code

All little-endian. A row spans 16 nats: what lies further below its first token has code 0. Log-probabilities of -16
and less are left out of a divergence, as in llama.cpp; we divide by the mass of those that remain.
"""

import contextlib
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ._score import Perplexity, Prediction
from .errors import FormatError, ModelIOError

MAGIC = b"_logits_"
SPAN = 16.0  # nats
CODE_MAX = 65535
HEADER_BYTES = len(MAGIC) + 3 * 4


def row_type(n_vocab: int) -> np.dtype[np.void]:
    return np.dtype([("scale", "<f4"), ("min", "<f4"), ("codes", "<u2", (n_vocab + n_vocab % 2,))])


def n_scored(n_ctx: int) -> int:
    """Positions of a chunk that are scored: n_ctx/2 .. n_ctx - 2."""
    return n_ctx - 1 - n_ctx // 2


class LogitsWriter:
    """Writes beside the file and takes its name in close(), so that what has the name is whole."""

    def __init__(self, path: str, chunks: NDArray[np.int32], n_vocab: int) -> None:
        """chunks: [n_chunk][n_ctx], as tokenized"""
        self.path = Path(path)
        self._partial = self.path.with_name(self.path.name + ".part")
        self._row = np.zeros((), row_type(n_vocab))
        self._n_vocab = n_vocab
        n_chunk, n_ctx = chunks.shape
        self.n_bytes = HEADER_BYTES + chunks.size * 4 + n_chunk * n_scored(n_ctx) * self._row.nbytes
        try:
            self._file = self._partial.open("wb")
        except OSError as error:
            raise self._failed(error) from None
        self._write(MAGIC + np.array([n_ctx, n_vocab, n_chunk], "<i4").tobytes() + chunks.astype("<i4").tobytes())

    def add(self, row: Prediction) -> None:
        """The next scored position."""
        logits, top = row.logits, row.logits[row.top]
        low = max(logits.min(), top - np.float32(SPAN))
        scale = (top - low) / np.float32(CODE_MAX)
        self._row["scale"], self._row["min"] = scale, low - row.log_sum
        codes = np.rint((np.maximum(logits, low) - low) / scale) if scale > 0 else np.zeros_like(logits)
        self._row["codes"][: self._n_vocab] = np.minimum(codes, CODE_MAX)
        self._write(self._row.tobytes())

    def close(self) -> None:
        try:
            self._file.close()
            os.replace(self._partial, self.path)
        except OSError as error:
            raise self._failed(error) from None

    def discard(self) -> None:
        """Leaves nothing behind; after close(), leaves the file."""
        with contextlib.suppress(OSError):  # what was still to be written may not fit
            self._file.close()
        self._partial.unlink(missing_ok=True)

    def _write(self, data: bytes) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            self.discard()
            raise self._failed(error) from None

    def _failed(self, error: OSError) -> ModelIOError:
        return ModelIOError(f"cannot write {self.path}: {error.strerror}")


@dataclass
class LogitsFile:
    """Another run's predictions, in the place of a base cache that decodes."""

    name: str
    n_ctx: int
    n_vocab: int
    tokens: NDArray[np.int32]  # [n_chunk][n_ctx]
    rows: NDArray[np.void]  # [n_chunk * n_scored], mapped
    perplexity: Perplexity = field(default_factory=Perplexity)
    _next: int = 0  # the first row of the batch to come
    _batch: int = 0  # the first row of the batch at hand

    def start(self, chunk: int) -> None:
        self._next = chunk * n_scored(self.n_ctx)

    def decode(self, tokens: NDArray[np.int32], scored: NDArray[np.bool_]) -> None:
        self._batch = self._next
        self._next += int(scored.sum())

    def prediction(self, index: int) -> Prediction:
        row = self.rows[self._batch + index]
        log_p = row["min"] + row["scale"] * row["codes"][: self.n_vocab].astype(np.float32)
        weights = np.exp(log_p, dtype=np.float64)
        weights[log_p <= -SPAN] = 0
        return Prediction(log_p, weights, float(weights.sum()), 0.0, int(log_p.argmax()))


def read_logits_file(path: str, n_vocab: int) -> LogitsFile:
    """The file of a model with this vocabulary."""
    try:
        with open(path, "rb") as file:
            header = file.read(HEADER_BYTES)
            if len(header) < HEADER_BYTES or not header.startswith(MAGIC):
                raise FormatError(f"{path} is not a file of logits: it does not begin with {MAGIC.decode()}")
            n_ctx, n_vocab_file, n_chunk = (int(n) for n in np.frombuffer(header, "<i4", offset=len(MAGIC)))
            if n_ctx < 4 or n_vocab_file < 2 or n_chunk < 1:
                raise FormatError(f"{path} claims {n_chunk} chunks of {n_ctx} tokens of {n_vocab_file}")
            if n_vocab_file != n_vocab:
                raise FormatError(f"{path} is of another model: its vocabulary is {n_vocab_file}, this one's {n_vocab}")
            n_rows, size = n_chunk * n_scored(n_ctx), os.fstat(file.fileno()).st_size
            rows_at = HEADER_BYTES + 4 * n_chunk * n_ctx
            wanted = rows_at + n_rows * row_type(n_vocab).itemsize
            if size != wanted:
                raise FormatError(
                    f"{path} has {size} bytes, {n_chunk} chunks of {n_ctx} tokens take {wanted}: write it again"
                )
            tokens = np.frombuffer(file.read(rows_at - HEADER_BYTES), "<i4").reshape(n_chunk, n_ctx)
            rows = np.memmap(file, row_type(n_vocab), "r", offset=rows_at, shape=(n_rows,))
    except OSError as error:
        raise ModelIOError(f"cannot read {path}: {error.strerror}") from None
    if tokens.min() < 0 or tokens.max() >= n_vocab:
        raise FormatError(f"{path} has a token outside its vocabulary of {n_vocab}")
    return LogitsFile(path, n_ctx, n_vocab, tokens.astype(np.int32), rows)
