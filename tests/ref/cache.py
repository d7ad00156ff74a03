"""The cache of one layer: what a row at position t reads, and attention over it.

Three segments, one softmax (design: a row's view depends on its position alone, never on the batch it came in). In a
layer that slides, a row sees the last `span` positions of them, itself included: sinks and packed pages fall out of
sight.

    0 .. sink-1       f16, always
    sink .. cut-1     packed pages, decoded;  cut(t) = 128 * floor((t - window) / 128), at least 0
    cut .. t          f16

A page is packed once, from the f16 keys (after RoPE) and values, when the cut of some row passes it. The key balance is
frozen at page 0 (positions sink .. 127), or taken from every page with its own queries.

*Strict* mode, for comparison with engines that quantize at write: before a batch attends, every page it touches is
packed, the incomplete last one too, and its rows read all but the sinks packed, their own key included.

Keys are decoded back to the frame of the query here; the engine turns the query instead. Everything after the codec is
float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .codec import KVTYPES, PAGE, Array, Encoded, Side, encode_side, f16_sat, sum_in_order


@dataclass(frozen=True)
class CacheOptions:
    window: int = 128
    sink: int = 16
    balance_page: bool = False
    strict: bool = False


# (page, n_valid) -> its first n_valid rows of k, v and q_rms, f16 [n_valid, n_head_kv, d]. Another implementation's:
# a codec is a step function, so two implementations that store a key one unit of f16 apart, which is their right, can
# decode it a whole step apart. Given the same rows, everything that reads them can be compared to the last row.
Rows = Callable[[int, int], tuple[Array, Array, Array]]


class LayerCache:
    """Keys and values of one sequence in one layer.

    k, v   f16 [n_tokens, n_head_kv, d]: as appended
    q_rms  f16 [n_tokens, n_head_kv, d_k]: the queries' rms over the heads that share a KV head, for the balance
    k_packed, v_packed  f64 [n_tokens, n_head_kv, d]: as decoded from pages, where one is packed
    """

    def __init__(
        self, k_type: str, v_type: str, n_head_kv: int, d_k: int, d_v: int, options: CacheOptions, span: int = 0
    ) -> None:
        self.k_type, self.v_type = KVTYPES[k_type], KVTYPES[v_type]
        self.options = options
        self.span = span  # 0 = a row sees all that is before it
        self.k = self.q_rms = np.zeros((0, n_head_kv, d_k), np.float16)
        self.v = np.zeros((0, n_head_kv, d_v), np.float16)
        self.k_packed, self.v_packed = self.k.astype(np.float64), self.v.astype(np.float64)
        self.balance: Array | None = None  # f16 [n_head_kv, d_k], the frozen one
        self.given: Rows | None = None  # where the rows of a page come from before it is packed, if not from here

    @property
    def n_tokens(self) -> int:
        return len(self.k)

    def cut(self, t: int) -> int:
        """Row t reads positions below this packed."""
        if self.options.strict:
            return self.n_tokens
        return max(0, PAGE * ((t - self.options.window) // PAGE))

    def append(self, q: Array, k: Array, v: Array) -> None:
        """A batch after RoPE, q [n, n_head, d_k], k [n, n_head_kv, d_k], v [n, n_head_kv, d_v]; packs what it must."""
        n, n_head_kv, d_k = k.shape
        groups = q.astype(np.float32).reshape(n, n_head_kv, -1, d_k)
        mean_square = sum_in_order(groups * groups, axis=2) / np.float32(groups.shape[2])
        start = self.n_tokens
        self.k = np.concatenate([self.k, f16_sat(k)])
        self.v = np.concatenate([self.v, f16_sat(v)])
        self.q_rms = np.concatenate([self.q_rms, f16_sat(np.sqrt(mean_square))])
        self.k_packed = np.concatenate([self.k_packed, self.k[start:].astype(np.float64)])
        self.v_packed = np.concatenate([self.v_packed, self.v[start:].astype(np.float64)])
        if self.options.strict:
            if start % PAGE:
                raise ValueError(f"strict mode needs batches that begin on a page, not at {start}")
            pages = range(start // PAGE, -(-self.n_tokens // PAGE))
        else:
            pages = range(self.cut(start - 1) // PAGE, self.cut(self.n_tokens - 1) // PAGE)
        for page in pages:
            self.pack(page)

    def pack(self, page: int) -> None:
        """Replaces the packed view of one page, which may be incomplete in strict mode."""
        first = self.options.sink if page == 0 else 0
        n_valid = min(PAGE, self.n_tokens - page * PAGE)
        if n_valid <= first:
            return  # sinks only
        where = slice(page * PAGE + first, page * PAGE + n_valid)
        if self.given is not None:
            rows = slice(page * PAGE, page * PAGE + n_valid)
            self.k[rows], self.v[rows], self.q_rms[rows] = self.given(page, n_valid)

        def matrix(rows: Array) -> Array:
            """[n_tokens, n_head_kv, d] -> the page, f32 [n_head_kv, d, 128]"""
            x = rows[page * PAGE : page * PAGE + n_valid].astype(np.float32)
            return np.pad(x, ((0, PAGE - n_valid), (0, 0), (0, 0))).transpose(1, 2, 0)

        def raw(encoded: Encoded) -> Array:
            return encoded.raw().transpose(2, 0, 1)[first:n_valid]

        if self.k_type.quantized:
            frozen = None if self.options.balance_page else self.balance
            keys = encode_side(self.k_type, Side.K, matrix(self.k), first, n_valid, matrix(self.q_rms), frozen)
            if page == 0:
                self.balance = keys.balance
            self.k_packed[where] = raw(keys)
        if self.v_type.quantized:
            self.v_packed[where] = raw(encode_side(self.v_type, Side.V, matrix(self.v), first, n_valid))

    def view(self, below: int, end: int) -> tuple[Array, Array]:
        """K [end, n_head_kv, d_k] and V [end, n_head_kv, d_v] f64, as a row with this cut reads positions 0..end-1."""
        position = np.arange(end)[:, None, None]
        packed = (position >= self.options.sink) & (position < below)
        return np.where(packed, self.k_packed[:end], self.k[:end]), np.where(packed, self.v_packed[:end], self.v[:end])

    def attend(self, q: Array, scale: float) -> Array:
        """The last len(q) positions attend: q [n, n_head, d_k] -> f64 [n, n_head, d_v]."""
        start = self.n_tokens - len(q)
        cuts = np.array([self.cut(t) for t in range(start, self.n_tokens)])
        out = []
        for below in np.unique(cuts):
            rows = np.flatnonzero(cuts == below)
            end = start + int(rows[-1]) + 1
            out.append(attention(q[rows], *self.view(below, end), start + rows, scale, self.span))
        return np.concatenate(out)


def attention(q: Array, k: Array, v: Array, position: Array, scale: float, span: int = 0) -> Array:
    """Causal softmax attention, in float64, over the last `span` positions where it is not 0.

    q [n, n_head, d_k]; k [end, n_head_kv, d_k]; v [end, n_head_kv, d_v]; position [n], of the rows of q
    -> [n, n_head, d_v]. Query head h reads KV head h // (n_head / n_head_kv).
    """
    n, n_head, d_k = q.shape
    end, n_head_kv, d_v = v.shape
    groups = q.astype(np.float64).reshape(n, n_head_kv, -1, d_k).transpose(1, 2, 0, 3)  # [n_head_kv, g, n, d_k]
    logits = groups @ k.transpose(1, 2, 0)[:, None] * scale  # [n_head_kv, g, n, end]
    distance = position[:, None] - np.arange(end)  # [n, end]
    logits = np.where((distance >= 0) & (distance < (span or np.inf)), logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    out = weights @ v.transpose(1, 0, 2)[:, None]  # [n_head_kv, g, n, d_v]
    return out.transpose(2, 0, 1, 3).reshape(n, n_head, d_v)
