"""The KV codecs, bit for bit: runtime/kvtype.h in float32 NumPy.

A *page matrix* is X[d, 128]: the channels of one KV head by 128 positions. Functions take any leading axes before it
(heads, pages), written "...". Every arithmetic step on f32 arrays is one IEEE operation rounded to nearest even, which
is what NumPy's elementwise operators do; sums never go through np.sum, whose order is NumPy's own business.

The way of a page:   X --precondition--> X' --encode--> codes, scales --planes_pack--> bytes
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import reduce
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

PAGE = 128  # positions of a page
LANES = 16  # lanes of a tile
LINE = 64  # bytes that a kernel reads at a time
GROUP = 64  # channels that share a scale


class Side(Enum):
    K = "k"
    V = "v"


@dataclass(frozen=True)
class KvType:
    """A format: `levels[code]` is the integer that a code stands for, in units of the group's scale."""

    name: str
    bits: int
    planes: tuple[int, ...]  # widths, high bits first
    positive: tuple[int, ...]  # the positive levels, ascending; none for f16 and for q8, which has all integers to 127
    fractions: tuple[float, ...] = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)  # of the scale that reaches the largest |x|
    v_trellis: bool = False  # V is the code of section 5

    @property
    def quantized(self) -> bool:
        return self.bits < 16

    @property
    def levels(self) -> Array:
        """f32 [2^bits], ascending; q8 never uses its code 0."""
        if not self.positive:
            return np.arange(-128, 128).astype(np.float32)
        return np.array([-level for level in reversed(self.positive)] + list(self.positive), np.float32)

    @property
    def factors(self) -> tuple[np.float32, ...]:
        """The scales to try, in units of the largest |x| of the group."""
        top = self.positive[-1] if self.positive else 127
        return tuple(np.float32(f) / np.float32(top) for f in self.fractions)

    def nearest(self, t: Array) -> Array:
        """The code of the level nearest to t: f32 [...] -> uint8 [...]. A NaN is taken for 0."""
        half = 1 << (self.bits - 1)
        if not self.positive:
            rounded = np.clip(np.rint(np.where(np.isnan(t), np.float32(0), t)), -127, 127)
            return (rounded + half).astype(np.uint8)
        middles = [np.float32(a + b) / 2 for a, b in pairwise(self.positive)]
        m = reduce(np.add, [(np.abs(t) > middle).astype(np.uint8) for middle in middles])
        return np.where(t < 0, half - 1 - m, half + m).astype(np.uint8)


KVTYPES = {
    t.name: t
    for t in (
        KvType("f16", 16, (), ()),
        KvType("q8", 8, (8,), (), (1.0,)),
        KvType("q6", 6, (4, 2), tuple(range(1, 64, 2)), (1.0,)),
        KvType("q5", 5, (4, 1), tuple(range(1, 32, 2)), (1.0, 0.95, 0.9, 0.85, 0.8)),
        KvType("q4", 4, (4,), (3, 9, 15, 22, 29, 37, 48, 63)),
        KvType("q3", 3, (2, 1), (3, 9, 16, 26)),
        KvType("q2", 2, (2,), (3, 10), v_trellis=True),
    )
}


# ---- sums and rounding ----------------------------------------------------------------------------------------------


def sum_in_order(terms: Array, axis: int) -> Array:
    """((terms[0] + terms[1]) + terms[2]) + ... along an axis."""
    return reduce(np.add, np.moveaxis(terms, axis, 0))


def sum128(x: Array) -> Array:
    """f32 [..., 128] -> [...]: sixteen lanes summed in order, then folded in halves, as a vector unit would."""
    lanes = sum_in_order(x.reshape(*x.shape[:-1], PAGE // 16, 16), axis=-2)  # [..., 16]
    for n in (8, 4, 2, 1):
        lanes = lanes[..., :n] + lanes[..., n : 2 * n]
    return lanes[..., 0]


def f16_sat(x: Array) -> Array:
    """f16, to nearest even, never an infinity."""
    return np.clip(x, -65504, 65504).astype(np.float16)


def group_of(d: int) -> int:
    return GROUP if d % GROUP == 0 else d


# ---- preconditioning (section 2) ------------------------------------------------------------------------------------


def hadamard_block(d: int, side: Side) -> int:
    """The largest power of two that divides d; for V at most 64."""
    largest = d & -d
    return largest if side is Side.K else min(largest, 64)


def hadamard(x: Array, block: int) -> Array:
    """Orthonormal Hadamard over the channels of [..., d, n], in blocks; its own inverse. f32 or f64, as x is."""
    shape = x.shape
    d, n = shape[-2:]
    step = 1
    while step < block:
        pairs = x.reshape(*shape[:-2], d // (2 * step), 2, step, n)
        a, b = pairs[..., 0, :, :], pairs[..., 1, :, :]
        x = np.stack([a + b, a - b], axis=-3).reshape(shape)
        step *= 2
    return x * x.dtype.type(1 / np.sqrt(np.float64(block)))


def inside(x: Array, first: int, n_valid: int) -> Array:
    """x [..., 128] with positions outside [first, n_valid) - sinks, or not written yet - set to +0."""
    position = np.arange(PAGE)
    return np.where((position >= first) & (position < n_valid), x, x.dtype.type(0))


def balance_of(x: Array, q_rms: Array, n: int) -> Array:
    """The channel balance sqrt(rms k / rms q), centred to geometric mean 1: f16 [..., d].

    x [..., d, 128]: keys less their mean; q_rms [..., d, 128]: queries; n positions of both are not 0.
    """
    rk = np.sqrt(sum128(x * x) / np.float32(n))  # [..., d]
    rq = np.sqrt(sum128(q_rms * q_rms) / np.float32(n))
    k_top, q_top = rk.max(axis=-1, keepdims=True), rq.max(axis=-1, keepdims=True)
    rk = np.maximum(rk, np.float32(2**-10) * k_top)
    rq = np.maximum(rq, np.float32(2**-10) * q_top)
    with np.errstate(divide="ignore", invalid="ignore"):  # all-zero K or q: the last line does not use the ratio
        ratio = np.sqrt(rk / rq)
        log_sum = sum_in_order(np.log2(ratio.astype(np.float64)), axis=-1)
        center = np.exp2(log_sum / x.shape[-2]).astype(np.float32)[..., None]
        balance = np.clip(ratio / center, np.float32(1 / 16), np.float32(16)).astype(np.float16)
    return np.where((k_top == 0) | (q_top == 0), np.float16(1), balance)


def precondition_k(
    x: Array, first: int, n_valid: int, q_rms: Array | None = None, frozen: Array | None = None
) -> tuple[Array, Array, Array]:
    """K to the frame it is encoded in: x' = H((x - mean) / balance).

    x [..., d, 128] f32; q_rms [..., d, 128] f16, the queries' rms over the heads that read this one; frozen [..., d]
    f16, a balance taken earlier, which replaces the one of this page. -> x', mean [..., d] f16, balance [..., d] f16.
    A query reads it as q' = H(balance * q), and its logit is q'.k' + q.mean.
    """
    n = n_valid - first
    if n < 1:
        raise ValueError(f"page has no position in [{first}, {n_valid})")
    x = inside(x, first, n_valid)
    mean = (sum128(x) / np.float32(n)).astype(np.float16)
    x = inside(x - mean.astype(np.float32)[..., None], first, n_valid)
    if frozen is not None:
        balance = frozen
    elif q_rms is not None:
        balance = balance_of(x, inside(q_rms.astype(np.float32), first, n_valid), n)
    else:
        raise ValueError("K needs a frozen balance or the queries of its page")
    x = x / balance.astype(np.float32)[..., None]
    return hadamard(x, hadamard_block(x.shape[-2], Side.K)), mean, balance


# ---- the trellis code (section 5) -----------------------------------------------------------------------------------

TRELLIS_A = np.array([-8, 5, 0, -4, -2, 2, -6, -10, 4, -1, -5, 3, -6, 10, -10, 1])
TRELLIS_B = np.array([0, -6, 4, 7, 15, 7, 21, 23, 42, 25, -12, -24, -14, -22, -38, -6])
STATES = 64  # the last three symbols, W >> 2
RIVAL = 49_000  # more than the three steps cost from the state at the ring's end to any other

_step = np.arange(PAGE)
POSITION = 16 * (_step // 4 % 8) + 4 * (_step % 4) + _step // 32  # of each step
WINDOWS = np.arange(4) | np.arange(STATES)[:, None] << 2  # [state, s[t-3]]
_a = TRELLIS_A[np.arange(256) & 15]
LEVELS = (_a + TRELLIS_B[(np.arange(256) // 16 + _a) & 15]).astype(np.int32)  # of each window


def is_trellis(kvtype: KvType, side: Side) -> bool:
    return kvtype.v_trellis and side is Side.V


def levels_of(kvtype: KvType, side: Side, codes: Array) -> Array:
    """codes [..., d, 128] -> their levels, f32."""
    if not is_trellis(kvtype, side):
        return kvtype.levels[codes]
    ring = codes[..., POSITION].astype(np.int32)
    windows = sum(np.roll(ring, 3 - i, axis=-1) << 2 * i for i in range(4))
    levels = np.empty(codes.shape, np.float32)
    levels[..., POSITION] = LEVELS[windows]
    return levels


def lap(y: Array, cost: Array) -> tuple[Array, Array]:
    """Viterbi over y [n, steps] from costs [n, 64] -> for each step the oldest symbol of the cheapest way into a state
    [steps, n, 64], of equals the lowest; and the last costs, less the least."""
    ways = []
    for target in y.T:
        into = cost[:, WINDOWS % STATES] + np.square(target[:, None] - LEVELS)[:, WINDOWS]  # [n, 64, 4]
        ways.append(into.argmin(axis=-1).astype(np.uint8))
        cost = into.min(axis=-1)
        cost = cost - cost.min(axis=-1, keepdims=True)
    return np.array(ways), cost


def trace(ways: Array, state: Array) -> tuple[Array, Array]:
    """Back from the states [n] after the last step: the state before the first step, and the symbols [n, steps]."""
    symbols = []
    for way in ways[::-1]:
        symbols.append(state >> 4)
        state = WINDOWS[state, way[np.arange(len(state)), state]] % STATES
    return state, np.array(symbols[::-1]).T


def cheapest_ring(y: Array) -> Array:
    """y [n, 128] by step -> symbols."""
    ways, cost = lap(np.concatenate([y[:, 96:], y[:, :32]], axis=1), np.zeros((len(y), STATES), np.int32))
    seam, _ = trace(ways[32:], cost.argmin(axis=-1))
    ways, _ = lap(y, np.where(np.arange(STATES) == seam[:, None], 0, RIVAL))
    return trace(ways, seam)[1]


def trellis_codes(x: Array) -> Array:
    """x [..., d/G, G, 128] -> codes."""
    size = sum_in_order(x * x, axis=-2)[..., None, :]
    with np.errstate(all="ignore"):
        inv = np.where(size > 0, np.float32(20) / np.sqrt(size / np.float32(x.shape[-2])), np.float32(0))
        y = np.rint(np.clip(np.nan_to_num(x * inv, nan=0.0, posinf=75, neginf=-75), -75, 75)).astype(np.int32)
    codes = np.empty(x.shape, np.uint8)
    codes[..., POSITION] = cheapest_ring(y[..., POSITION].reshape(-1, PAGE)).reshape(x.shape)
    return codes


# ---- encoding (section 3) -------------------------------------------------------------------------------------------


def encode(kvtype: KvType, side: Side, x: Array) -> tuple[Array, Array]:
    """x [..., d, 128] f32 -> codes [..., d, 128] uint8, scales [..., d/G, 128] f16."""
    *heads, d, _ = x.shape
    g = group_of(d)
    x = x.reshape(*heads, d // g, g, PAGE)
    with np.errstate(all="ignore"):  # 1 / 0 in groups of zeros, numbers that have no square
        if is_trellis(kvtype, side):
            codes = trellis_codes(x)
            scale = np.zeros((*heads, d // g, 1, PAGE), np.float16)
        else:
            codes, scale = least_squares(kvtype, x)
        if side is Side.V:
            level = levels_of(kvtype, side, codes.reshape(*heads, d, PAGE)).reshape(x.shape)
            num = sum_in_order(x * level, axis=-2)[..., None, :]
            ratio = sum_in_order(x * x, axis=-2)[..., None, :] / num
            has_one = (num > 0) & (ratio > 0) & ((scale > 0) | is_trellis(kvtype, side))
            scale = np.where(has_one, f16_sat(ratio), scale)
    return codes.reshape(*heads, d, PAGE), scale[..., 0, :]


def least_squares(kvtype: KvType, x: Array) -> tuple[Array, Array]:
    """x [..., d/G, G, 128] -> codes, scales [..., d/G, 1, 128].

    Each factor proposes codes; the least-squares scale for them, num / den, removes num^2 / den of the squared error,
    and the proposal that removes most wins. The scale is kept, the codes are taken again with the scale as rounded.
    A group of zeros gains nothing, so it keeps scale 0.
    """
    amax = np.abs(np.where(np.isnan(x), np.float32(0), x)).max(axis=-2, keepdims=True)
    best, best_gain = np.zeros_like(amax), np.zeros_like(amax)
    for factor in kvtype.factors:
        level = kvtype.levels[kvtype.nearest(x * (np.float32(1) / (amax * factor)))]
        num = sum_in_order(x * level, axis=-2)[..., None, :]
        den = sum_in_order(level * level, axis=-2)[..., None, :]
        gain = num * num / den
        better = gain > best_gain
        best, best_gain = np.where(better, num / den, best), np.where(better, gain, best_gain)
    scale = f16_sat(best)
    codes = kvtype.nearest(x * (np.float32(1) / scale.astype(np.float32)))
    return np.where(scale == 0, kvtype.nearest(np.zeros_like(x)), codes), scale


def decode(kvtype: KvType, side: Side, codes: Array, scales: Array) -> Array:
    """codes [..., d, 128], scales [..., d/G, 128] -> f32 [..., d, 128], in the frame that was encoded."""
    d = codes.shape[-2]
    return np.repeat(scales.astype(np.float32), group_of(d), axis=-2) * levels_of(kvtype, side, codes)


@dataclass(frozen=True)
class Encoded:
    """One side of a page of a quantized type: what its bytes say."""

    kvtype: KvType
    side: Side
    codes: Array  # uint8 [..., d, 128]
    scales: Array  # f16 [..., d/G, 128]
    mean: Array | None = None  # f16 [..., d], K only
    balance: Array | None = None

    def raw(self) -> Array:
        """f64 [..., d, 128]: the values back in the frame of the model, the inverse of the preconditioning."""
        stored = decode(self.kvtype, self.side, self.codes, self.scales).astype(np.float64)
        x = hadamard(stored, hadamard_block(stored.shape[-2], self.side))
        if self.mean is None or self.balance is None:
            return x
        return x * self.balance.astype(np.float64)[..., None] + self.mean.astype(np.float64)[..., None]


def encode_side(
    kvtype: KvType,
    side: Side,
    x: Array,
    first: int,
    n_valid: int,
    q_rms: Array | None = None,
    frozen: Array | None = None,
) -> Encoded:
    """A page of keys or values, x [..., d, 128] f32, the rest as precondition_k's; V needs neither q_rms nor frozen."""
    if side is Side.K:
        x, mean, balance = precondition_k(x, first, n_valid, q_rms, frozen)
        return Encoded(kvtype, side, *encode(kvtype, side, x), mean, balance)
    x = hadamard(inside(x, first, n_valid), hadamard_block(x.shape[-2], side))
    return Encoded(kvtype, side, *encode(kvtype, side, x))


# ---- bytes (section 4) ----------------------------------------------------------------------------------------------


def tiles_of(side: Side, x: Array) -> Array:
    """[d, 128] -> [tile, R, 16]: lanes are 16 positions and R the channels (K), or the other way round (V)."""
    rows = x if side is Side.K else x.T  # [R, lanes of all tiles]
    return rows.reshape(rows.shape[0], -1, LANES).transpose(1, 0, 2)


def matrix_of(side: Side, tiles: Array) -> Array:
    """[tile, R, 16] -> [d, 128], the inverse of tiles_of."""
    rows = tiles.transpose(1, 0, 2).reshape(tiles.shape[1], -1)
    return rows if side is Side.K else rows.T


def plane_lines(kvtype: KvType, r: int) -> list[int]:
    """Lines of 64 bytes of each plane of a tile with r reduced indices."""
    return [-(-r // (32 // w)) for w in kvtype.planes]


def planes_pack(kvtype: KvType, side: Side, codes: Array) -> bytes:
    """codes [d, 128] -> the planes of all tiles. Index g*(32/w) + 4*j + i of a lane: byte 4*lane + i, bits w*j up."""
    tiles = tiles_of(side, codes)
    n_tiles, r, _ = tiles.shape
    planes, shift = [], kvtype.bits
    for w, n_lines in zip(kvtype.planes, plane_lines(kvtype, r), strict=True):
        shift -= w
        values = np.zeros((n_tiles, n_lines * (32 // w), LANES), np.uint8)
        values[:, :r] = (tiles >> shift) & ((1 << w) - 1)
        values = values.reshape(n_tiles, n_lines, 8 // w, 4, LANES)  # [tile, g, j, i, lane]
        line = reduce(np.bitwise_or, [values[:, :, j] << (w * j) for j in range(8 // w)])  # [tile, g, i, lane]
        planes.append(line.transpose(0, 1, 3, 2).reshape(n_tiles, -1))
    return np.concatenate(planes, axis=1).tobytes()


def planes_unpack(kvtype: KvType, side: Side, page: bytes, d: int) -> Array:
    """The first bytes of a side -> codes [d, 128]."""
    n_tiles, r = (PAGE // LANES, d) if side is Side.K else (d // LANES, PAGE)
    n_lines = plane_lines(kvtype, r)
    lines = np.frombuffer(page, np.uint8, n_tiles * sum(n_lines) * LINE).reshape(n_tiles, -1, LANES, 4)
    codes, start, shift = np.zeros((n_tiles, r, LANES), np.uint8), 0, kvtype.bits
    for w, n in zip(kvtype.planes, n_lines, strict=True):
        plane = lines[:, start : start + n]  # [tile, g, lane, i]
        values = np.stack([(plane >> (w * j)) & ((1 << w) - 1) for j in range(8 // w)], axis=2)  # [tile, g, j, lane, i]
        start, shift = start + n, shift - w
        codes |= values.swapaxes(3, 4).reshape(n_tiles, -1, LANES)[:, :r] << shift
    return matrix_of(side, codes)


def pack_side(
    kvtype: KvType,
    side: Side,
    x: Array,
    first: int,
    n_valid: int,
    q_rms: Array | None = None,
    frozen: Array | None = None,
    balance_page: bool = False,
) -> bytes:
    """The bytes of one side of one head's page: x [d, 128] f32, the rest as encode_side's; padded to 64 bytes."""
    if not kvtype.quantized:
        values = f16_sat(inside(x, first, n_valid))
        return (values if side is Side.K else values.T).tobytes()
    page = encode_side(kvtype, side, x, first, n_valid, q_rms, frozen)
    parts = [planes_pack(kvtype, side, page.codes), page.scales.tobytes()]
    if page.mean is not None:
        parts.append(page.mean.tobytes())
    if page.balance is not None and balance_page:
        parts.append(page.balance.tobytes())
    data = b"".join(parts)
    return data + bytes(-len(data) % LINE)


def decode_page(kvtype: KvType, side: Side, page: bytes, d: int) -> Array:
    """Bytes of a side -> f32, K [d, 128], V [128, d], as stored: in the frame that was encoded."""
    if not kvtype.quantized:
        shape = (d, PAGE) if side is Side.K else (PAGE, d)
        return np.frombuffer(page, np.float16, d * PAGE).reshape(shape).astype(np.float32)
    codes = planes_unpack(kvtype, side, page, d)
    n_groups, start = d // group_of(d), len(planes_pack(kvtype, side, codes))
    scales = np.frombuffer(page, np.float16, n_groups * PAGE, start).reshape(n_groups, PAGE)
    x = decode(kvtype, side, codes, scales)
    return x if side is Side.K else x.T


def physical_bits(kvtype: KvType, side: Side, d: int, balance_page: bool = False) -> float:
    """Bits of a value of a packed page, scales and page vectors included."""
    if not kvtype.quantized:
        return 16.0
    vectors = 0 if side is Side.V else 1 + balance_page
    return kvtype.bits + 16 / group_of(d) + vectors * 16 / PAGE


def nmse(x: Array, y: Array) -> float:
    """Squared error of y over the energy of x."""
    x64, y64 = x.astype(np.float64), y.astype(np.float64)
    return float(np.square(x64 - y64).sum() / np.square(x64).sum())
