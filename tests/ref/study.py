"""Codecs for study: what was measured and is not in the runtime, and variants of what is.

They enter through the session's page hook (kvmix.h): a Study is such a hook, for sessions whose side under study is
f16. Pages are X[d, 128], channels by positions, as in codec.py; here only values count, not bits, so everything is
plain f32 and the bits per value are a figure beside it. Nothing outside [first, n_valid) is read or written.

    K:  X --less mean--> --/ balance--> --H--> encode, decode --H--> --* balance--> --+ mean--> X~
    V:  X --H64--> encode, decode --H64--> X~, the whole page at once, 0 outside
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .codec import KVTYPES, PAGE, Array, Side, decode, encode, hadamard, inside, is_trellis

Codec = Callable[[Array], Array]  # [d, n positions] -> what it decodes to

# ---- codecs ---------------------------------------------------------------------------------------------------------


def grouped(x: Array, group: int) -> Array:
    """[d, n] -> [d / group, group, n]; the whole head where the group does not divide it."""
    d = len(x)
    group = group if d % group == 0 else d
    return x.reshape(d // group, group, -1)


def searched(levels: Array, fractions: tuple[float, ...], group: int = 64, unbiased: bool = False) -> Codec:
    """The runtime's encoder (kvtype.h section 3) for symmetric levels, `levels` [m] being the upper half: a
    least-squares scale, in f16, for every position and group of channels, or in the end V's unbiased one."""
    levels = levels.astype(np.float32)
    middles = (levels[1:] + levels[:-1]) / 2

    def nearest(t: Array) -> Array:
        size = np.abs(t)
        if len(middles) > 8:
            m = np.searchsorted(middles, size)
        else:
            m = np.zeros(t.shape, np.uint8)
            for middle in middles:
                m += size > middle
        return np.copysign(levels[m], t)

    def roundtrip(x: Array) -> Array:
        g = grouped(x.astype(np.float32), group)
        amax = np.abs(g).max(axis=1, keepdims=True)
        best, best_gain = np.zeros_like(amax), np.zeros_like(amax)
        with np.errstate(all="ignore"):
            for fraction in fractions:
                level = nearest(g * (levels[-1] / (np.float32(fraction) * amax)))
                num = np.einsum("gcn,gcn->gn", g, level)[:, None]
                den = np.einsum("gcn,gcn->gn", level, level)[:, None]
                gain = np.where(den > 0, num * num / den, 0)
                better = gain > best_gain
                best, best_gain = np.where(better, num / den, best), np.where(better, gain, best_gain)
            scale = best.astype(np.float16).astype(np.float32)
            level = nearest(g / scale)
            if unbiased:
                ratio = np.einsum("gcn,gcn->gn", g, g) / np.einsum("gcn,gcn->gn", g, level)
                scale = np.where(scale == 0, 0, ratio[:, None]).astype(np.float16).astype(np.float32)
            out = level * scale
        return np.where(scale == 0, 0, out).reshape(x.shape)

    return roundtrip


def min_max(bits: float, group: int, along: str = "channels") -> Codec:
    """The paper's quantizer: round(2^bits) levels from the least to the largest of a group; scale and zero in f16.
    along="channels": runs of channels of one position (token-wise); "positions": runs of positions of one channel."""
    top = round(2**bits) - 1

    def roundtrip(x: Array) -> Array:
        g = grouped(x if along == "channels" else x.T, group)
        low = g.min(axis=1, keepdims=True).astype(np.float16).astype(np.float32)
        scale = ((g.max(axis=1, keepdims=True) - low) / top).astype(np.float16).astype(np.float32)
        with np.errstate(all="ignore"):
            code = np.clip(np.rint((g - low) / scale), 0, top)
        out = np.where(scale > 0, code * scale + low, low).reshape(x.shape if along == "channels" else x.T.shape)
        return out if along == "channels" else out.T

    return roundtrip


def runtime_type(name: str, side: Side) -> Codec:
    """q8 .. q2 as the runtime has them."""
    kvtype = KVTYPES[name]
    if is_trellis(kvtype, side):
        return lambda x: decode(kvtype, side, *encode(kvtype, side, x.astype(np.float32)))
    levels = kvtype.levels
    return searched(levels[levels >= 0], kvtype.fractions, unbiased=side is Side.V)


def codecs(side: Side) -> dict[str, Codec]:
    unbiased = side is Side.V
    return {
        **{name: runtime_type(name, side) for name, kvtype in KVTYPES.items() if kvtype.quantized},
        "1": searched(np.array([1.0]), (1.0,), unbiased=unbiased),
        "1.58": searched(np.array([0.0, 1.0]), (1.0, 0.85, 0.7, 0.55, 0.4), unbiased=unbiased),
    }


CODECS, V_CODECS = codecs(Side.K), codecs(Side.V)


# ---- the way of a page ----------------------------------------------------------------------------------------------


class Page(Protocol):
    """kvmix's Page: what a hook is shown."""

    layer: int
    head: int
    page: int
    first: int
    n_valid: int
    k: NDArray[Any]
    v: NDArray[Any]
    q_rms: NDArray[Any]


@dataclass(frozen=True)
class Precondition:
    """What is done to K before it is encoded. The defaults are the runtime's."""

    mean: bool = True
    balance: str = "first"  # "none"; "page": of every page; "first": frozen at page 0; "weights": see Study.weights
    clamp: float = 16.0
    rotation: int = -1  # block of the Hadamard: -1 = the whole head, 0 = none
    statistics: int = PAGE  # positions that share a mean (and a page's balance)
    vector_bits: int = 16  # of mean and balance


def rounded(x: Array, bits: int) -> Array:
    """A page vector: f16, or 8 bits with a scale in f16 for the vector."""
    if bits == 16:
        return x.astype(np.float16).astype(np.float32)
    scale = np.float32(np.float16(np.abs(x).max() / 127))
    return np.rint(x / scale) * scale if scale > 0 else np.zeros_like(x)


def turn(x: Array, block: int) -> Array:
    """Hadamard over the channels of [d, n] in blocks; its own inverse."""
    if block == 0:
        return x
    d = len(x)
    block = min(d & -d, block if block > 0 else d)
    if block not in _TURNS:
        _TURNS[block] = hadamard(np.eye(block, dtype=np.float32), block)
    return (_TURNS[block] @ x.reshape(d // block, block, -1)).reshape(x.shape)


_TURNS: dict[int, Array] = {}


def balance_of(x: Array, q: Array, clamp: float) -> Array:
    """sqrt(rms k / rms q) [d], centred to geometric mean 1; x, q [d, n]."""
    rk, rq = np.sqrt((x * x).mean(axis=1)), np.sqrt((q * q).mean(axis=1))
    if rk.max() == 0 or rq.max() == 0:
        return np.ones(len(x))
    ratio = np.sqrt(np.maximum(rk, 2**-10 * rk.max()) / np.maximum(rq, 2**-10 * rq.max()))
    return np.clip(ratio / np.exp(np.log(ratio).mean()), 1 / clamp, clamp)


@dataclass
class Study:
    """A page hook: k and v are codecs, None leaves that side to its type."""

    k: Codec | None = None
    v: Codec | None = None
    precondition: Precondition = field(default_factory=Precondition)
    v_rotation: int = 64
    weights: Callable[[int, int], Array] | None = None  # (layer, head) -> balance [d_k], for balance="weights"
    frozen: dict[tuple[int, int], Array] = field(default_factory=dict)

    def __call__(self, page: Page) -> None:
        where = slice(page.first, page.n_valid)
        if page.n_valid <= page.first:
            return
        if self.k is not None:
            page.k[:, where] = self.keys(page, where)
        if self.v is not None:
            x = inside(page.v.T.astype(np.float32), page.first, page.n_valid)
            page.v[where] = turn(self.v(turn(x, self.v_rotation)), self.v_rotation).T[where]

    def keys(self, page: Page, where: slice) -> Array:
        """[d_k, n], as decoded."""
        x, q, p = page.k[:, where].astype(np.float32), page.q_rms[:, where].astype(np.float32), self.precondition
        out = np.empty_like(x)
        for start in range(0, x.shape[1], p.statistics):
            some = slice(start, start + p.statistics)
            out[:, some] = self.part(page, x[:, some], q[:, some], start == 0)
        return out

    def part(self, page: Page, x: Array, q: Array, first: bool) -> Array:
        """Keys that share their statistics; `first` ones of the page."""
        p = self.precondition
        mean = rounded(x.mean(axis=1), p.vector_bits)[:, None] if p.mean else 0.0
        x = x - mean
        balance = self.balance(page, x, q, first)[:, None]
        assert self.k is not None
        return turn(self.k(turn(x / balance, p.rotation)), p.rotation) * balance + mean

    def balance(self, page: Page, x: Array, q: Array, first: bool) -> Array:
        """[d_k]"""
        p, key = self.precondition, (page.layer, page.head)
        if p.balance == "none":
            return np.ones(len(x))
        if p.balance == "weights":
            assert self.weights is not None
            return self.weights(*key)
        if p.balance == "page":
            return rounded(balance_of(x, q, p.clamp), p.vector_bits)
        if page.page == 0 and first:
            self.frozen[key] = rounded(balance_of(x, q, p.clamp), p.vector_bits)
        return self.frozen[key]
