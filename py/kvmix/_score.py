"""The statistics of perplexity and KL divergence, from blocks of logits that are dropped after use.

Everything is float64: a KL divergence of 1e-5 is a difference of numbers of size 10, which float32 cannot hold.
"""

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class Predictions:
    """The next-token distributions of some rows."""

    def __init__(self, logits: NDArray[np.float32]) -> None:
        """logits: [n][n_vocab]"""
        self.logits: Floats = logits.astype(np.float64)
        top = self.logits.max(axis=1, keepdims=True)
        self.weights: Floats = np.exp(self.logits - top)  # the probabilities times their total
        self.total: Floats = self.weights.sum(axis=1)
        self.log_sum: Floats = top[:, 0] + np.log(self.total)  # of exp(logits), [n]


def negative_log_likelihood(rows: Predictions, targets: NDArray[np.int32]) -> Floats:
    """targets: [n] -> [n]"""
    return np.asarray(rows.log_sum - rows.logits[np.arange(len(targets)), targets])


def kl_divergence(base: Predictions, other: Predictions) -> Floats:
    """KL(base || other) -> [n]"""
    gap = (base.weights * (base.logits - other.logits)).sum(axis=1) / base.total
    return np.asarray(gap - base.log_sum + other.log_sum)


def standard_error(values: Floats) -> float:
    """Of the mean, as llama.cpp computes it."""
    if len(values) < 2:
        return 0.0
    variance = float(np.mean(values**2) - np.mean(values) ** 2)
    return math.sqrt(max(variance, 0.0) / (len(values) - 1))


@dataclass
class Perplexity:
    """exp of the mean negative log-likelihood of the scored tokens."""

    blocks: list[Floats] = field(default_factory=list)

    def add(self, rows: Predictions, targets: NDArray[np.int32]) -> None:
        self.blocks.append(negative_log_likelihood(rows, targets))

    def result(self) -> tuple[float, float]:
        """(perplexity, its standard error)"""
        values = np.concatenate(self.blocks)
        ppl = float(np.exp(np.mean(values)))
        return ppl, ppl * standard_error(values)


@dataclass(frozen=True, slots=True)
class KldResult:
    mean: float
    se: float
    median: float
    p99: float
    p999: float
    same_top: float  # fraction of positions where both put the same token first


@dataclass
class Divergence:
    """How far one cache's predictions are from another's, position by position."""

    blocks: list[Floats] = field(default_factory=list)
    n_same_top: int = 0

    def add(self, base: Predictions, other: Predictions) -> None:
        self.blocks.append(kl_divergence(base, other))
        self.n_same_top += int(np.count_nonzero(base.logits.argmax(axis=1) == other.logits.argmax(axis=1)))

    def result(self) -> KldResult:
        values = np.concatenate(self.blocks)
        median, p99, p999 = (float(np.percentile(values, p)) for p in (50, 99, 99.9))
        same_top = self.n_same_top / len(values)
        return KldResult(float(np.mean(values)), standard_error(values), median, p99, p999, same_top)
