"""What a model's weights say about its keys and values: norms of W_K and W_V per layer, and scores made of them.

Three scores, each a pair of numbers (K, V) per layer, larger = more in need of bits:

- frobenius, spectral: of the whole matrix, all KV heads stacked, biases and gains left out. The paper's.
- effective: the size of the error that one side's codec puts into what attention adds to the residual stream, per unit
  of relative codec error, for inputs of a normalized hidden state: a row i of W with the gains g of the norm before it
  has outputs of rms s_i = sqrt(sum_j (W_ij g_j)^2 + b_i^2); behind a per-head norm (QK-norm) the s_i of a head are
  scaled to rms 1 and multiplied by that norm's gains. Then per KV head h, with sq_i^2 averaged over its query heads:

      out_h  = sqrt(mean_i sv_i^2 * sum over its query heads of |W_O|_F^2 / n_embd)     a value's size, as added
      V      = sqrt(sum_h out_h^2)
      K      = sqrt(sum_h (noise_h out_h)^2),  noise_h = sum_i sq_i sk_i / d_k

  noise_h is the standard deviation of a logit's error with balanced, rotated keys (kvtype.h) and the usual scale
  1/sqrt(d_k). An error of a logit by its size moves the output as far as an error of the values relative to theirs: so
  K and V are in one unit. No residual size is known from weights: layers are compared as if it were the same in all.

No file is read here, and nothing but numpy is needed, but for model_norms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from .source import Attention

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

SCORES = ("frobenius", "spectral", "effective")
CHECKED_EVERY = 4  # steps of Lanczos
TINY = np.finfo(np.float64).tiny
TOLERANCE = 1e-5  # of an eigenvalue of W W^T; half of that of a singular value


@dataclass(frozen=True)
class SideNorms:
    """One of W_K, W_V."""

    frobenius: float
    spectral: float
    effective: float
    bias: float | None  # Euclidean norm of the bias, where there is one
    gain: float | None  # rms of the gains of the per-head norm behind it (QK-norm)


@dataclass(frozen=True)
class LayerNorms:
    k: SideNorms
    v: SideNorms


@dataclass(frozen=True)
class ModelNorms:
    model: str
    family: str
    n_head_kv: tuple[int, ...]  # one entry a layer, as the next two
    d_k: tuple[int, ...]
    d_v: tuple[int, ...]
    layers: tuple[LayerNorms, ...]

    def scores(self, score: str) -> tuple[list[float], list[float]]:
        """K and V per layer, by one of SCORES."""
        return [getattr(layer.k, score) for layer in self.layers], [getattr(layer.v, score) for layer in self.layers]

    def gap(self, score: str) -> float:
        return gap(*self.scores(score))


def gap(k: list[float], v: list[float]) -> float:
    """By how many bits keys should lead: mean log2 of K over V."""
    return float(np.mean(np.log2(np.array(k) / np.array(v))))


def ratio(k: list[float], v: list[float]) -> float:
    """How many times as large keys are: the mean of K over V."""
    return float(np.mean(np.array(k) / np.array(v)))


# ---- of a matrix ----------------------------------------------------------------------------------------------------
#
# einsum, not @: a matrix-vector product is bound by memory, and BLAS's threads, which wait for each other in a thousand
# short calls, make it many times slower on a machine that is busy or has fewer cores for us than it shows.


def frobenius(w: F32) -> float:
    return float(np.sqrt(np.einsum("ij,ij->", w, w, dtype=np.float64)))


def spectral(w: F32) -> float:
    """The largest singular value, to 1e-4."""
    w = w if w.shape[0] <= w.shape[1] else w.T
    eigenvalue = largest_eigenvalue(lambda x: np.einsum("ij,j->i", w, np.einsum("i,ij->j", x, w)), len(w))
    return float(np.sqrt(max(eigenvalue, 0)))


def largest_eigenvalue(a: Callable[[F32], F32], n: int) -> float:
    """Of a symmetric n x n matrix without negative eigenvalues, given as its product with a vector, to a relative
    TOLERANCE: Lanczos, until the residual's square over the distance to the next eigenvalue, which bounds the error, is
    below that.

    The start is a fixed random vector; the basis is kept orthogonal in full, which costs less than the products."""
    basis = np.empty((0, n))
    diagonal: list[float] = []
    beside: list[float] = []
    v = np.random.default_rng(0).normal(size=n)
    largest = 0.0
    while len(basis) < n:
        norm = float(np.linalg.norm(v))
        if len(basis) > 0:
            beside.append(norm)
        basis = np.vstack([basis, v / max(norm, TINY)])
        v = a(basis[-1].astype(np.float32)).astype(np.float64)
        diagonal.append(float(basis[-1] @ v))
        for _ in range(2):
            v -= np.einsum("k,kn->n", np.einsum("kn,n->k", basis, v), basis)
        if len(basis) % CHECKED_EVERY == 0 or len(basis) == n:
            values, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1))
            largest = float(values[-1])
            residual = float(np.linalg.norm(v)) * abs(vectors[-1, -1])
            if len(basis) > 1 and residual**2 <= TOLERANCE * largest * (largest - values[-2]):
                break
    return largest


# ---- of a layer -----------------------------------------------------------------------------------------------------


def layer_norms(a: Attention) -> LayerNorms:
    k_effective, v_effective = effective(a)
    return LayerNorms(
        k=_side(a.k, k_effective, a.k_bias, a.k_norm),
        v=_side(a.v, v_effective, a.v_bias, None),
    )


def _side(w: F32, score: float, bias: F32 | None, gains: F32 | None) -> SideNorms:
    return SideNorms(
        frobenius=frobenius(w),
        spectral=spectral(w),
        effective=score,
        bias=None if bias is None else float(np.linalg.norm(bias)),
        gain=None if gains is None else float(np.sqrt(np.mean(np.square(gains)))),
    )


def effective(a: Attention) -> tuple[float, float]:
    """(K, V), see the top of this file."""
    sq2 = _output_power(a, a.q, a.q_bias, a.q_norm, a.n_head)
    sk2 = _output_power(a, a.k, a.k_bias, a.k_norm, a.n_head_kv)
    sv2 = _output_power(a, a.v, a.v_bias, None, a.n_head_kv)
    group_q2 = sq2.reshape(a.n_head_kv, -1, a.d_k).mean(axis=1)
    o2 = np.square(a.o, dtype=np.float64).sum(axis=0).reshape(a.n_head_kv, -1).sum(axis=1) / len(a.o)
    noise = np.sqrt(group_q2 * sk2).sum(axis=1) / a.d_k
    out2 = sv2.mean(axis=1) * o2
    return float(np.sqrt(np.sum(noise**2 * out2))), float(np.sqrt(np.sum(out2)))


def _output_power(a: Attention, w: F32, bias: F32 | None, head_gains: F32 | None, n_head: int) -> F64:
    """s_i^2 of each output of a matrix, [n_head, d]."""
    power = np.square(w, dtype=np.float64) @ np.square(a.attn_norm, dtype=np.float64)
    if bias is not None:
        power += np.square(bias, dtype=np.float64)
    power = power.reshape(n_head, -1)
    if head_gains is not None:
        power = power / power.mean(axis=1, keepdims=True) * np.square(head_gains, dtype=np.float64)
    return power


# ---- of a model -----------------------------------------------------------------------------------------------------


def model_norms(path: Path, progress: Callable[[int, int], None] | None = None) -> ModelNorms:
    """Of a GGUF file or a Hugging Face folder, a layer at a time; progress(done, layers) after each."""
    from .source import open_source

    source = open_source(path)
    layers, shapes = [], []
    for i in range(source.n_layer):
        attention = source.layer(i)
        shapes.append((attention.n_head_kv, attention.d_k, attention.d_v))
        layers.append(layer_norms(attention))
        if progress is not None:
            progress(i + 1, source.n_layer)
    n_head_kv, d_k, d_v = zip(*shapes, strict=True)
    return ModelNorms(source.name, source.family, n_head_kv, d_k, d_v, tuple(layers))
