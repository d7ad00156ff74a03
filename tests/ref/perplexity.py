"""llama.cpp's protocol for quality: perplexity, and KL divergence of a quantized cache against the f16 one.

The text is tokenized once and cut into chunks of n_ctx tokens, each a fresh sequence; what is left at the end is
dropped. The second half of a chunk is scored: the logits at positions n_ctx/2 .. n_ctx-2 against the next token. Where
the file asks for a BOS, it takes the place of the first token of each chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np

from .cache import CacheOptions
from .codec import Array
from .model import Model, Recipe

BLOCK_ROWS = 64  # rows whose logits are held at a time: a vocabulary may have 262k tokens


@dataclass(frozen=True)
class Setting:
    """A cache to measure."""

    recipe: Recipe
    options: CacheOptions
    n_batch: int = 512


@dataclass(frozen=True)
class Perplexity:
    ppl: float
    error: float  # standard error of ppl
    running: tuple[float, ...]  # the estimate after each chunk


@dataclass(frozen=True)
class Divergence:
    """Of KL(f16 || quantized) in nats over the scored positions."""

    mean: float
    error: float  # standard error of the mean
    median: float
    p99: float
    p999: float
    same_top: float  # fraction of positions where both give the same token the highest logit


# ---- statistics -----------------------------------------------------------------------------------------------------


def log_softmax(logits: Array) -> Array:
    """[n, n_vocab] -> f64 [n, n_vocab]"""
    x = logits.astype(np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def standard_error(x: Array) -> float:
    """Of the mean of x [n], as llama.cpp computes it; no variance is left below 0 by rounding."""
    variance = np.mean(x * x) - np.mean(x) ** 2
    return float(np.sqrt(max(variance, 0.0) / (len(x) - 1)))


def perplexity_of(nll: SequenceOf[Array]) -> Perplexity:
    """From the negative log likelihoods of the scored tokens, [n] for each chunk."""
    pooled = np.concatenate(nll)
    ppl = float(np.exp(pooled.mean()))
    running = tuple(float(np.exp(np.concatenate(nll[: i + 1]).mean())) for i in range(len(nll)))
    return Perplexity(ppl, ppl * standard_error(pooled), running)


def divergence_of(kl: Array, same_top: Array) -> Divergence:
    """From the divergence [n] and the agreement [n] at each scored position; quantiles interpolate linearly."""
    median, p99, p999 = (float(q) for q in np.quantile(kl, [0.5, 0.99, 0.999]))
    return Divergence(float(kl.mean()), standard_error(kl), median, p99, p999, float(same_top.mean()))


# ---- running a model ------------------------------------------------------------------------------------------------


def chunks(tokens: SequenceOf[int] | Array, n_ctx: int, bos: int | None) -> Iterator[Array]:
    """Whole chunks [n_ctx] of a text."""
    ids = np.asarray(tokens)
    for start in range(0, len(ids) - n_ctx + 1, n_ctx):
        chunk = ids[start : start + n_ctx].copy()
        if bos is not None:
            chunk[0] = bos
        yield chunk


def scored(model: Model, chunk: Array, setting: Setting) -> Array:
    """Hidden states of the scored positions of a chunk [n_ctx - 1 - n_ctx/2, n_embd]."""
    sequence = model.sequence(setting.recipe, setting.options)
    batches = [sequence.feed(chunk[i : i + setting.n_batch]) for i in range(0, len(chunk), setting.n_batch)]
    return np.concatenate(batches)[len(chunk) // 2 : -1]


def blocks(n: int) -> Iterator[slice]:
    return (slice(i, min(i + BLOCK_ROWS, n)) for i in range(0, n, BLOCK_ROWS))


def perplexity(model: Model, tokens: SequenceOf[int] | Array, n_ctx: int, setting: Setting) -> Perplexity:
    nll = []
    for chunk in chunks(tokens, n_ctx, model.bos):
        hidden, target = scored(model, chunk, setting), chunk[n_ctx // 2 + 1 :]
        parts = []
        for b in blocks(len(hidden)):
            log_p = log_softmax(model.logits(hidden[b]))
            parts.append(-np.take_along_axis(log_p, target[b, None], axis=-1)[:, 0])
        nll.append(np.concatenate(parts))
    return perplexity_of(nll)


def divergence(model: Model, tokens: SequenceOf[int] | Array, n_ctx: int, setting: Setting) -> Divergence:
    """Against the same forward pass with an f16 cache."""
    exact = Setting([("f16", "f16")] * model.hyper.n_layer, setting.options, setting.n_batch)
    kl, same_top = [], []
    for chunk in chunks(tokens, n_ctx, model.bos):
        hidden_p, hidden_q = scored(model, chunk, exact), scored(model, chunk, setting)
        for b in blocks(len(hidden_p)):
            p, q = log_softmax(model.logits(hidden_p[b])), log_softmax(model.logits(hidden_q[b]))
            kl.append((np.exp(p) * (p - q)).sum(axis=-1))
            same_top.append(p.argmax(axis=-1) == q.argmax(axis=-1))
    return divergence_of(np.concatenate(kl), np.concatenate(same_top))
