"""The statistics of perplexity and KL divergence, from the logits of one row at a time, which are dropped after use.

Everything is summed in float64: a KL divergence of 1e-5 is a difference of numbers of size 10, which float32 cannot
hold. Positions of one text are not independent, so the error of a divergence is taken over chunks; that of a
perplexity is over positions, as llama.cpp prints it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Prediction:
    """The next-token distribution of a row: probability = weights / total = exp(logits - log_sum)."""

    logits: NDArray[np.float32]  # [n_vocab]
    weights: Floats  # [n_vocab]
    total: float
    log_sum: float
    top: int  # the token put first

    @classmethod
    def of_logits(cls, logits: NDArray[np.float32]) -> Self:
        top = int(logits.argmax())
        weights = logits.astype(np.float64)
        weights -= float(logits[top])
        np.exp(weights, out=weights)
        total = float(weights.sum())
        return cls(logits, weights, total, float(logits[top]) + math.log(total), top)


def negative_log_likelihood(row: Prediction, target: int) -> float:
    return row.log_sum - float(row.logits[target])


def kl_divergence(base: Prediction, other: Prediction) -> float:
    """KL(base || other)"""
    gap = base.logits.astype(np.float64)
    gap -= other.logits
    gap *= base.weights
    return float(gap.sum()) / base.total - base.log_sum + other.log_sum


@dataclass
class Perplexity:
    """exp of the mean negative log-likelihood of the scored tokens."""

    values: list[float] = field(default_factory=list)

    def add(self, row: Prediction, target: int) -> None:
        self.values.append(negative_log_likelihood(row, target))

    def result(self) -> tuple[float, float]:
        """(perplexity, its standard error as llama.cpp computes it)"""
        nll = np.array(self.values)
        ppl = math.exp(nll.mean())
        if len(nll) < 2:
            return ppl, 0.0
        return ppl, ppl * float(nll.std()) / math.sqrt(len(nll) - 1)


@dataclass(frozen=True, slots=True)
class KldResult:
    mean: float
    se: float | None  # over chunks; None for a single one
    median: float
    p99: float
    p999: float
    same_top: float  # fraction of positions where both put the same token first
    chunks: Sequence[float]  # the mean of each


@dataclass
class Divergence:
    """How far one cache's predictions are from another's, position by position."""

    per_chunk: int  # positions
    values: list[float] = field(default_factory=list)
    n_same_top: int = 0

    def add(self, base: Prediction, other: Prediction) -> None:
        self.values.append(kl_divergence(base, other))
        self.n_same_top += base.top == other.top

    def result(self) -> KldResult:
        kld = np.array(self.values)
        chunks = kld.reshape(-1, self.per_chunk).mean(axis=1)
        se = float(chunks.std(ddof=1)) / math.sqrt(len(chunks)) if len(chunks) > 1 else None
        median, p99, p999 = (float(np.percentile(kld, p)) for p in (50, 99, 99.9))
        same_top = self.n_same_top / len(kld)
        return KldResult(float(kld.mean()), se, median, p99, p999, same_top, chunks.tolist())
