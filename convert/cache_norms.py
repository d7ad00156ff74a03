"""What a model's cache holds, from one run over a text: sizes and spectra of K and V, and what quantizers make of them.

A run with an f16 cache shows every page of keys (after RoPE) and values to Collector, as kvmix's page hook does. Only
d x d Gram matrices and sums of squares are kept, so a text may be of any length. Per layer and KV head:

    frobenius, spectral, spectrum   of the matrix of all tokens by d channels, singular values descending
    mse                             mean squared error of a value behind a quantizer, by bits:
        min_max   the paper's: uniform levels from the least to the largest of GROUP channels of a token
        ours      the types q2 .. q8 as packed, keys with the page's own mean and balance
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kvmix.errors import ArgumentError

from .kvtypes import GROUP, PAGE, TYPES

if TYPE_CHECKING:
    from kvmix import Model
    from kvmix._native import Page

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

QUANTIZED = {t.name: t.bits for t in TYPES.values() if t.bits < 16}
N_TOKENS = 2048


@dataclass(frozen=True)
class CacheSide:
    """K or V of one KV head."""

    frobenius: float
    spectrum: tuple[float, ...]  # singular values, descending
    mse_min_max: dict[int, float]  # by bits
    mse_ours: dict[int, float]

    @property
    def spectral(self) -> float:
        return self.spectrum[0]


@dataclass(frozen=True)
class CacheLayer:
    k: tuple[CacheSide, ...]  # by KV head
    v: tuple[CacheSide, ...]


def scores(layers: Sequence[CacheLayer]) -> tuple[list[float], list[float]]:
    """K and V per layer: the Frobenius norm of all heads together."""
    k, v = (
        [float(np.sqrt(sum(head.frobenius**2 for head in getattr(layer, side)))) for layer in layers] for side in "kv"
    )
    return k, v


def cache_norms(
    model: Model, text: bytes, n_tokens: int = N_TOKENS, progress: Callable[[int, int], None] | None = None
) -> tuple[CacheLayer, ...]:
    """Of the text's first tokens, in whole pages; progress(done, all) counts tokens."""
    tokens = model.tokenize(text)[:n_tokens]
    tokens = tokens[: len(tokens) // PAGE * PAGE]
    if not tokens:
        raise ArgumentError(f"the text is shorter than a page of the cache, {PAGE} tokens: give a longer one")
    collector = Collector()
    # so that every page is shown, once and complete
    options: dict[str, Any] = {"window": 0, "sink": 0, "strict": True, "n_batch": PAGE}
    options |= {"n_seq_max": 1, "n_checkpoint": 0, "page_hook": collector}
    with model.session(len(tokens), "f16", **options) as session:
        session.sync(tokens, progress)
    return collector.layers()


def min_max(x: F32, bits: int, group: int) -> F32:
    """x [d, n]: uniform levels between the least and the largest of each group of channels of a position, unrounded."""
    d, n = x.shape
    groups = x.reshape(d // group if d % group == 0 else 1, -1, n)
    low = groups.min(axis=1, keepdims=True)
    step = (groups.max(axis=1, keepdims=True) - low) / np.float32(2**bits - 1)
    step[step == 0] = 1
    decoded: F32 = np.rint((groups - low) / step) * step + low
    return decoded.reshape(d, n)


@dataclass
class Sums:
    """Of one side of one head, over the pages so far."""

    gram: F64  # [d, d]
    n: int = 0
    min_max: dict[int, float] = field(default_factory=lambda: dict.fromkeys(QUANTIZED.values(), 0.0))
    ours: dict[int, float] = field(default_factory=lambda: dict.fromkeys(QUANTIZED.values(), 0.0))

    def add(self, x: F32, decoded: dict[int, F32]) -> None:
        """x [d, n]; decoded: what our types make of it."""
        wide = x.astype(np.float64)
        self.gram += wide @ wide.T
        self.n += x.shape[1]
        for bits, ours in decoded.items():
            self.ours[bits] += squared_error(x, ours)
            self.min_max[bits] += squared_error(x, min_max(x, bits, GROUP))

    def side(self) -> CacheSide:
        d = len(self.gram)
        spectrum = np.sqrt(np.maximum(np.linalg.eigvalsh(self.gram)[::-1], 0))
        mse_min_max, mse_ours = (
            {bits: total / (d * self.n) for bits, total in sums.items()} for sums in (self.min_max, self.ours)
        )
        return CacheSide(float(np.sqrt(np.trace(self.gram))), tuple(spectrum.tolist()), mse_min_max, mse_ours)


def squared_error(x: F32, y: F32) -> float:
    return float(np.square((x - y).astype(np.float64)).sum())


class Collector:
    """A page hook that keeps sums."""

    def __init__(self) -> None:
        self._sums: dict[tuple[int, int], tuple[Sums, Sums]] = {}  # of K and V, by layer and head

    def __call__(self, page: Page) -> None:
        there = slice(page.first, page.n_valid)
        key = page.layer, page.head
        if key not in self._sums:
            d_k, d_v = len(page.k), page.v.shape[1]
            self._sums[key] = Sums(np.zeros((d_k, d_k))), Sums(np.zeros((d_v, d_v)))
        packed = {bits: page.roundtrip(name, name) for name, bits in QUANTIZED.items()}
        k, v = self._sums[key]
        k.add(page.k[:, there], {bits: copy.k[:, there] for bits, copy in packed.items()})
        v.add(page.v[there].T, {bits: copy.v[there].T for bits, copy in packed.items()})

    def layers(self) -> tuple[CacheLayer, ...]:
        return tuple(self._layers())

    def _layers(self) -> Iterator[CacheLayer]:
        n_layer = 1 + max(layer for layer, _ in self._sums)
        for layer in range(n_layer):
            heads = [self._sums[key] for key in sorted(self._sums) if key[0] == layer]
            yield CacheLayer(tuple(k.side() for k, _ in heads), tuple(v.side() for _, v in heads))
