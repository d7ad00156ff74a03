"""The sampler against a NumPy one: support, distribution, penalties, ties, seeds and bad input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

import kvmix
import tiny
from kvmix import Sampling, _native

OFF = Sampling(temp=1.0, top_k=0, top_p=1.0, min_p=0.0)


def draw(model: kvmix.Model, logits: np.ndarray, n: int, sampling: Sampling, accepted: Sequence[int] = ()) -> list[int]:
    """n tokens from the same logits [n_vocab] f32."""
    sampler = _native.sampler_open(model.handle, asdict(sampling))
    token, values = _native._ffi.new("int32_t *"), _native._ffi.from_buffer("float[]", logits)
    try:
        for id_ in accepted:
            _native.sampler_accept(sampler, id_)
        return [draw_one(sampler, values, token) for _ in range(n)]
    finally:
        _native.sampler_close(sampler)


def draw_one(sampler: Any, values: Any, token: Any) -> int:
    _native.check(_native._lib.kvmix_sample(sampler, values, token))
    return int(token[0])


def distribution(logits: np.ndarray, s: Sampling, accepted: Sequence[int] = ()) -> np.ndarray:
    """llama.cpp's chain in f64: penalties, top-k, top-p, min-p, temperature -> [n_vocab]."""
    x = logits.astype(np.float64)
    recent = list(accepted)[-s.repeat_last_n :] if s.repeat_last_n > 0 else list(accepted) if s.repeat_last_n else []
    for token in set(recent):
        x[token] = x[token] / s.repeat_penalty if x[token] > 0 else x[token] * s.repeat_penalty
        x[token] -= s.presence_penalty + s.frequency_penalty * recent.count(token)
    order = np.lexsort((np.arange(len(x)), -x))[: s.top_k if s.top_k > 0 else len(x)]
    p = np.exp(x[order] - x[order[0]])
    p /= p.sum()
    n = len(p) if s.top_p >= 1 else int(np.searchsorted(np.cumsum(p), s.top_p)) + 1
    order, p = order[:n], p[:n]
    order = order[p >= s.min_p * p[0]]
    weights = np.exp((x[order] - x[order[0]]) / s.temp)
    out = np.zeros(len(x))
    out[order] = weights / weights.sum()
    return out


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> kvmix.Model:
    return kvmix.Model(tiny.write_model(tmp_path_factory.mktemp("model") / "tiny.gguf").path)


@pytest.fixture
def logits(model: kvmix.Model) -> np.ndarray:
    return np.random.default_rng(5).normal(0, 2.5, model.info.n_vocab).astype(np.float32)


SAMPLINGS = {
    "plain": OFF,
    "temp": replace(OFF, temp=0.5),
    "hot": replace(OFF, temp=3.0),
    "top-k": replace(OFF, top_k=7),
    "top-k-1": replace(OFF, top_k=1),
    "top-p": replace(OFF, top_p=0.6),
    "top-p-small": replace(OFF, top_p=1e-6),
    "min-p": replace(OFF, min_p=0.1),
    "min-p-1": replace(OFF, min_p=1.0),
    "defaults": Sampling(),
    "repeat": replace(OFF, repeat_penalty=1.7, top_k=20),
    "presence": replace(OFF, presence_penalty=1.5, top_k=20),
    "frequency": replace(OFF, frequency_penalty=0.4, top_k=20, repeat_last_n=-1),
    "last-3": replace(OFF, repeat_penalty=1.7, frequency_penalty=0.5, top_k=20, repeat_last_n=3),
    "last-0": replace(OFF, repeat_penalty=1.7, top_k=20, repeat_last_n=0),
    "all": Sampling(temp=1.3, top_k=30, top_p=0.9, min_p=0.02, repeat_penalty=1.2, presence_penalty=0.3),
}


@pytest.mark.parametrize("name", SAMPLINGS)
def test_draws_follow_the_distribution(model: kvmix.Model, logits: np.ndarray, name: str) -> None:
    best = np.argsort(-logits)
    worst = int(np.argsort(logits)[0])  # a negative logit is multiplied by the repeat penalty
    accepted = [int(i) for i in (best[4], best[0], best[0], best[1], best[2], worst, best[1])]
    p, n = distribution(logits, SAMPLINGS[name], accepted), 40_000
    counts = np.bincount(draw(model, logits, n, SAMPLINGS[name], accepted), minlength=len(p))
    assert not counts[p == 0].any()  # nothing outside the support
    assert counts[p > 20 / n].all()  # all of it: missing one has a chance of e^-20
    often = p > 10 / n
    observed, mean = np.append(counts[often], counts[~often].sum()), np.append(p[often], p[~often].sum()) * n
    chi2, freedom = (np.square(observed - mean) / np.maximum(mean, 1)).sum(), len(mean) - 1
    assert chi2 <= freedom + 6 * np.sqrt(2 * max(freedom, 1))  # six standard deviations


def test_a_seed_gives_the_same_draws_and_another_others(model: kvmix.Model, logits: np.ndarray) -> None:
    draws = [draw(model, logits, 200, replace(OFF, seed=seed)) for seed in (3, 3, 4, 2**64 - 1)]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2] != draws[3] != draws[0]


@pytest.mark.parametrize("temp", [0.0, -1.0])
def test_greedy_takes_the_lowest_id_of_equals(model: kvmix.Model, logits: np.ndarray, temp: float) -> None:
    logits[[200, 17, 90]] = 50.0
    assert draw(model, logits, 3, replace(OFF, temp=temp)) == [17] * 3


def test_top_k_takes_the_lowest_ids_of_equals(model: kvmix.Model) -> None:
    flat = np.zeros(model.info.n_vocab, np.float32)
    assert set(draw(model, flat, 500, replace(OFF, top_k=3))) == {0, 1, 2}


def test_greedy_is_penalized_too(model: kvmix.Model, logits: np.ndarray) -> None:
    best, second = (int(i) for i in np.argsort(-logits)[:2])
    sampling = replace(OFF, temp=0.0, presence_penalty=float(logits[best] - logits[second]) + 0.01)
    assert draw(model, logits, 1, sampling) == [best]
    assert draw(model, logits, 1, sampling, [best]) == [second]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temp", [0.0, 1.0])
def test_a_logit_that_is_not_finite_is_named(model: kvmix.Model, logits: np.ndarray, value: float, temp: float) -> None:
    logits[123] = value
    with pytest.raises(kvmix.StateError, match="the logit of token 123 is not finite"):
        draw(model, logits, 1, replace(OFF, temp=temp))


BAD_SAMPLINGS = [
    {"temp": np.nan}, {"temp": np.inf}, {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": -0.1}, {"min_p": np.nan},
    {"repeat_penalty": 0.0}, {"repeat_penalty": np.inf}, {"presence_penalty": np.nan}, {"repeat_last_n": -2},
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD_SAMPLINGS, ids=str)
def test_a_bad_sampling_is_refused(model: kvmix.Model, bad: dict[str, Any]) -> None:
    with pytest.raises(kvmix.ArgumentError):
        _native.sampler_open(model.handle, asdict(replace(OFF, **bad)))
