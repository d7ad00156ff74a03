"""Recipes that have a name, norms[:BITS] and paper, and the norms of W_K and W_V that the first one is made of.

The norms come from the file (or its sidecar) where annotate wrote them, else from $KVMIX_CACHE/recipes, else they are
computed - seconds, a matrix at a time - and kept there under the model's fingerprint. A kept file that does not fit is
replaced; a folder that cannot be written costs the time again.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from . import catalog
from .errors import ArgumentError, FormatError

if TYPE_CHECKING:
    from ._model import Model
    from ._session import Session, Stats

PAPER = "k4v2"
BITS = 3.8  # physical, a value: where a budget is not named
DOMINATES = 5  # times the median over layers: a key bias that outweighs what W_K makes


@dataclass(frozen=True)
class Norms:
    """Of W_K and W_V, by layer."""

    k_frobenius: tuple[float, ...]
    k_spectral: tuple[float, ...]
    v_frobenius: tuple[float, ...]
    v_spectral: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """How many times as large keys are, in spectral norm, on average over layers."""
        return float(np.mean(np.array(self.k_spectral) / np.array(self.v_spectral)))

    @property
    def n_ahead(self) -> int:
        """Layers where keys are larger."""
        return sum(k > v for k, v in zip(self.k_spectral, self.v_spectral, strict=True))

    def fits(self, n_layer: int) -> bool:
        return all(
            len(values) == n_layer and all(0 < value < math.inf for value in values) for values in asdict(self).values()
        )


def is_name(kv: str) -> bool:
    return kv == "paper" or kv.partition(":")[0] == "norms"


def named(model: Model, kv: str) -> tuple[str, str]:
    """What a name stands for, for this model: the recipe's text, and who it says decided."""
    if kv == "paper":
        return PAPER, "paper"
    _, colon, text = kv.partition(":")
    if colon and not re.fullmatch(r"\d+(\.\d+)?", text):
        raise ArgumentError(f"--kv {kv}: {text!r} is no number of bits; it looks like norms or norms:3.5")
    return from_norms(model, known_norms(model) or compute_norms(model), float(text or BITS)), "norms"


def from_norms(model: Model, norms: Norms, bits: float) -> str:
    """The ladder's recipe of at most so many bits a value, layers ordered by their spectral norms."""
    from .convert.allocate import by_scores
    from .convert.recipe import Layer

    layers = []
    for i in range(model.info.n_layer):
        n_k, n_v = (model.shape(tensor_name(i, side))[0] for side in "kv")
        layers.append(Layer(model.info.n_head_kv, n_k // model.info.n_head_kv, n_v // model.info.n_head_kv))
    problem = by_scores(layers, norms.k_spectral, norms.v_spectral)
    if bits < problem.least_budget:
        raise ArgumentError(f"--kv norms:{bits:g}: the smallest recipe takes {problem.least_budget:.4g} bits a value")
    text: str = problem.recipe(bits).text
    return text


def tensor_name(layer: int, side: str) -> str:
    return f"blk.{layer}.attn_{side}.weight"


# ---- what is said when a model is loaded ----------------------------------------------------------------------------


def line(model: Model, stats: Stats) -> str:
    """ "keys 2.4x values (spectral, 29 of 30 layers); recipe k4v3 (ladder by spectral, from the file)" """
    norms = known_norms(model)
    source = stats.recipe_source
    if source in ("file", "sidecar"):
        method = model.metadata("kvmix.method")
        source = f"{method}, from the {source}" if method else f"from the {source}"
    recipe = f"recipe {stats.recipe} ({source})"
    if norms is None:
        return recipe
    return f"keys {norms.ratio:.1f}x values (spectral, {norms.n_ahead} of {model.info.n_layer} layers); {recipe}"


def remarks(model: Model, session: Session) -> list[str]:
    """What makes a model's keys special, and what that means for the recipe in use; nothing where keys stay in f16."""
    layers, stats = session.layers, session.stats
    if all(layer.k_type == "f16" for layer in layers):
        return []
    said = []
    vectors = [model.tensor(f"blk.{i}.attn_k.bias") for i in range(len(layers))]
    biases = [float(np.linalg.norm(vector)) for vector in vectors if vector is not None]
    if biases and max(biases) > DOMINATES * float(np.median(biases)):
        said.append(
            f"key biases (norm {max(biases):.0f} in layer {biases.index(max(biases))}, median {np.median(biases):.0f}) "
            "dominate these keys: page mean and balance, both on, keep them out of the low-bit codes"
        )
    if model.shape("blk.0.attn_k_norm.weight"):
        by_norms = stats.recipe_source == "norms" or (
            stats.recipe_source in ("file", "sidecar")
            and re.search("frobenius|spectral", model.metadata("kvmix.method") or "")
        )
        said.append(
            "QK-norm: gains behind W_K set the size of these keys, so W_K's norm says little of them; "
            + ("this recipe takes from it only which layers come first" if by_norms else "this recipe does not use it")
        )
    return said


# ---- the norms ------------------------------------------------------------------------------------------------------


def known_norms(model: Model) -> Norms | None:
    """Without computing any: of the file or its sidecar, else of the cache."""
    keys = [f"kvmix.{side}_norm.{score}" for side in "kv" for score in ("frobenius", "spectral")]
    for norms in (Norms(*(tuple(model.numbers(key).tolist()) for key in keys)), _kept(model)):
        if norms is not None and norms.fits(model.info.n_layer):
            return norms
    return None


def compute_norms(model: Model) -> Norms:
    """Reads W_K and W_V layer by layer, and keeps what came of it."""
    from .convert.norms import frobenius, spectral

    sides: dict[str, list[float]] = {f"{side}_{score}": [] for side in "kv" for score in ("frobenius", "spectral")}
    for i in tqdm(range(model.info.n_layer), desc="norms of W_K and W_V", unit="layer", disable=None, leave=False):
        for side in "kv":
            matrix = model.tensor(tensor_name(i, side))
            if matrix is None:
                raise FormatError(f"{model.path} has no tensor {tensor_name(i, side)}: give --kv a recipe as text")
            sides[f"{side}_frobenius"].append(frobenius(matrix))
            sides[f"{side}_spectral"].append(spectral(matrix))
    norms = Norms(**{name: tuple(values) for name, values in sides.items()})
    _keep(model, norms)
    return norms


def _place(model: Model) -> Path:
    return catalog.cache_dir() / "recipes" / f"{model.fingerprint}.json"


def _kept(model: Model) -> Norms | None:
    try:
        values: dict[str, Any] = json.loads(_place(model).read_bytes())
        return Norms(**{name: tuple(map(float, numbers)) for name, numbers in values.items()})
    except (OSError, ValueError, TypeError, AttributeError):  # absent, or not what _keep wrote
        return None


def _keep(model: Model, norms: Norms) -> None:
    place = _place(model)
    with contextlib.suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=place.parent, prefix=".", delete=False) as file:
            try:
                json.dump(asdict(norms), file)
                file.close()
                os.replace(file.name, place)
            except BaseException:
                os.unlink(file.name)
                raise
