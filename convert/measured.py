"""What quantizing a layer's keys or values does to a model, measured: the KL divergence of its predictions on a text.

Everything is against the model's own f16 cache, with float activations, and strict: every page is read packed, so that
a short text shows what a long one would. Absolute figures are therefore above those of a chat, whose window is f16;
what they are for is comparing recipes.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from kvmix import Model, Row
from kvmix._score import Prediction, kl_divergence
from kvmix._sweep import cut, with_bos

from .kvtypes import PAGE, TYPES
from .recipe import Recipe

CHUNK = 512
SCORED_EVERY = 8  # rows: neighbours see almost the same cache, and a row's logits may be a megabyte
PROBE = "q3"  # the type that one side of one layer gets, all else f16


@dataclass(frozen=True)
class Texts:
    """Two parts of a text, in turns: what is fitted on one is judged on the other."""

    fit: NDArray[np.int32]  # [n_chunk][CHUNK]
    judge: NDArray[np.int32]


def cut_texts(model: Model, text: bytes, n_tokens: int) -> Texts:
    """About n_tokens for each part, as far as the text goes; one of a single chunk is both parts."""
    chunks = cut_chunks(model, text, 2 * n_tokens)
    return Texts(chunks[::2], chunks[1::2] if len(chunks) > 1 else chunks)


def cut_chunks(model: Model, text: bytes, n_tokens: int) -> NDArray[np.int32]:
    return with_bos(model, cut(model, text, CHUNK))[: max(1, n_tokens // CHUNK)]


@dataclass(frozen=True)
class Referee:
    """Judges recipes on some chunks of a text."""

    model: Model
    chunks: NDArray[np.int32]  # [n_chunk][CHUNK]
    sink: int

    def divergences(self, recipes: Sequence[Recipe], task: str) -> list[float]:
        """Mean KL divergence of each."""
        f16 = Recipe.uniform(("f16", "f16"), self.model.info.n_layer)
        total = np.zeros(len(recipes))
        with tqdm(total=len(self.chunks) * len(recipes), desc=task, unit="run", disable=None, leave=False) as bar:
            for chunk in self.chunks:
                base = list(self._predictions(f16, chunk))
                for i, recipe in enumerate(recipes):
                    rows = self._predictions(recipe, chunk)
                    total[i] += math.fsum(map(kl_divergence, base, rows)) / len(base)
                    bar.update()
        return [max(float(kld), 0.0) for kld in total / len(self.chunks)]  # rounding may leave -1e-17 of nothing

    def _predictions(self, recipe: Recipe, chunk: NDArray[np.int32]) -> Iterator[Prediction]:
        scored = [at >= PAGE and at % SCORED_EVERY == 0 for at in range(CHUNK)]
        with self.model.session(
            CHUNK, recipe.text, sink=self.sink, strict=True, act="f32", n_batch=CHUNK, n_logits=sum(scored),
            n_seq_max=1, n_checkpoint=0,
        ) as session:  # fmt: skip
            session.decode([Row(int(token), want) for token, want in zip(chunk, scored, strict=True)])
            for i in range(sum(scored)):
                yield Prediction.of_logits(session.logits_view(i).copy())


@dataclass(frozen=True)
class Sensitivity:
    """KL divergences with one side of one layer at PROBE, and how they grow with the type.

    Divergences of layers and sides add up; that is checked, and put right, by what one side of all layers at once gives
    at each type: a law is that over the sum of the layers' own, so that it is near 1 at PROBE."""

    k: tuple[float, ...]
    v: tuple[float, ...]
    k_law: dict[str, float]
    v_law: dict[str, float]

    @property
    def summary(self) -> str:
        k, v = math.fsum(self.k), math.fsum(self.v)
        return f"{PROBE} in one layer alone, all layers added up: keys KLD {k:.4g}, values {v:.4g}"

    @property
    def scores(self) -> tuple[list[float], list[float]]:
        """As norms: what a relative error of the cache does, so that score^2 times a type's error is a divergence."""
        k, v = ([math.sqrt(kld / TYPES[PROBE].nmse) for kld in side] for side in (self.k, self.v))
        return k, v

    @property
    def errors(self) -> tuple[tuple[dict[str, float], ...], tuple[dict[str, float], ...]]:
        """Expected divergence by layer and type."""
        k, v = (
            tuple({name: kld * factor for name, factor in law.items()} for kld in side)
            for side, law in ((self.k, self.k_law), (self.v, self.v_law))
        )
        return k, v


def measure(referee: Referee, types: Sequence[str]) -> Sensitivity:
    n_layer = referee.model.info.n_layer
    f16 = ("f16",) * n_layer
    probes = [(*f16[:i], PROBE, *f16[i + 1 :]) for i in range(n_layer)]
    wholes = [(name,) * n_layer for name in types]
    sides = [*probes, *wholes]
    klds = referee.divergences([Recipe(k, f16) for k in sides] + [Recipe(f16, v) for v in sides], "measuring")
    measured = []
    for side in (klds[: len(sides)], klds[len(sides) :]):
        alone, together = side[:n_layer], side[n_layer:]
        total = math.fsum(alone) or 1.0  # nothing is sensitive to anything: then no law matters
        measured.append((tuple(alone), {name: kld / total for name, kld in zip(types, together, strict=True)}))
    (k, k_law), (v, v_law) = measured
    return Sensitivity(k, v, k_law, v_law)
