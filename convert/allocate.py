"""From errors that are expected of each type in each layer, and a budget, to a recipe: the solvers, put to use.

    ladder   layers step up along measured pairs (ladder.py)
    exact    the least sum of errors, over all pairs of the types
    greedy   the paper's rule, one side of one layer at a time

Unless `keys_first` is off, K never gets fewer bits than V: every pair with less for K was measured to be worse than its
swap, and a norm may say otherwise for reasons of its own (a per-head norm after W_K, biases).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kvmix.errors import ArgumentError

from . import solve
from .kvtypes import PAGE, TYPES
from .ladder import climb, rungs_of, types_of_ladder
from .recipe import Layer, Pair, Recipe, pair_text

SOLVERS = ("ladder", "exact", "greedy")

Errors = dict[str, float]  # by type


@dataclass(frozen=True)
class Problem:
    layers: tuple[Layer, ...]
    k: tuple[Errors, ...]
    v: tuple[Errors, ...]
    solver: str  # of SOLVERS
    types: Sequence[str]  # ascending in bits
    keys_first: bool
    nominal: bool  # the budget counts the codes' widths alone, no scales and means

    @property
    def pairs(self) -> list[Pair]:
        """What a layer may have, ascending in bits."""
        if self.solver == "ladder":
            return rungs_of(self.types)
        pairs = [(k, v) for k in self.types for v in self.types]
        legal = [(k, v) for k, v in pairs if TYPES[k].bits >= TYPES[v].bits or not self.keys_first]
        return sorted(legal, key=lambda pair: TYPES[pair[0]].bits + TYPES[pair[1]].bits)

    @property
    def least_budget(self) -> float:
        """What the first pair takes in every layer."""
        return self.bits(Recipe.uniform(self.pairs[0], len(self.layers)))

    def bits(self, recipe: Recipe) -> float:
        """As the budget counts them."""
        return recipe.nominal_bits(self.layers) if self.nominal else recipe.bits(self.layers)

    def recipe(self, budget: float) -> Recipe:
        """budget: mean bits a value, never exceeded."""
        pairs = self.pairs
        if self.least_budget > budget + 1e-9:
            smaller = "--solver exact, which has smaller pairs" if self.solver == "ladder" else "smaller --types"
            raise ArgumentError(
                f"a budget of {budget:.4g} bits is too small, {pair_text(pairs[0])} in every layer takes "
                f"{self.least_budget:.4g}: raise it, or give {smaller}"
            )
        if self.solver == "greedy":
            return self._greedy(budget)
        costs = [[self._k_cost(layer, k) + self._v_cost(layer, v) for k, v in pairs] for layer in self.layers]
        errors = [[k[pair[0]] + v[pair[1]] for pair in pairs] for k, v in zip(self.k, self.v, strict=True)]
        choose = climb if self.solver == "ladder" else solve.exact
        chosen = choose(costs, errors, math.floor(budget * self._bit_cost + 1e-6))
        return Recipe.of([pairs[i] for i in chosen])

    def expected_error(self, recipe: Recipe) -> float:
        return math.fsum(k[pair[0]] + v[pair[1]] for k, v, pair in zip(self.k, self.v, recipe.pairs, strict=True))

    def uniform_recipes(self) -> list[Recipe]:
        """One pair throughout, the least expected error first."""
        return sorted((Recipe.uniform(pair, len(self.layers)) for pair in self.pairs), key=self.expected_error)

    def _greedy(self, budget: float) -> Recipe:
        """Costs are in bits of an average side of a layer, as in the paper's code, whose tolerances are absolute."""
        n_sides = 2 * len(self.layers)
        unit = self._bit_cost / n_sides
        costs, errors = [], []
        for layer, k, v in zip(self.layers, self.k, self.v, strict=True):
            costs.append([self._k_cost(layer, name) / unit for name in self.types])
            costs.append([self._v_cost(layer, name) / unit for name in self.types])
            errors += [[side[name] for name in self.types] for side in (k, v)]

        def is_legal(chosen: list[int], side: int) -> bool:
            return side % 2 == 0 or not self.keys_first or chosen[side] < chosen[side - 1]

        names = [self.types[at] for at in solve.greedy(costs, errors, budget * n_sides, is_legal)]
        return Recipe(tuple(names[::2]), tuple(names[1::2]))

    @property
    def _bit_cost(self) -> int:
        """What one bit for every value costs: bytes of a page, or bits of a token."""
        n_values = sum(layer.n_values for layer in self.layers)
        return n_values if self.nominal else n_values * PAGE // 8

    def _k_cost(self, layer: Layer, name: str) -> int:
        return layer.n_head_kv * layer.d_k * TYPES[name].bits if self.nominal else layer.k_bytes(name)

    def _v_cost(self, layer: Layer, name: str) -> int:
        return layer.n_head_kv * layer.d_v * TYPES[name].bits if self.nominal else layer.v_bytes(name)


def by_scores(
    layers: Sequence[Layer],
    k_scores: Sequence[float],
    v_scores: Sequence[float],
    *,
    solver: str = "ladder",
    types: Sequence[str] | None = None,
    keys_first: bool = True,
    nominal: bool = False,
) -> Problem:
    """Scores act as norms: a type's error is expected to be score^2 times its own, which is 4^-bits in the paper's rule
    and else what was measured of our codecs."""
    papers = {t.name: 4.0**-t.bits for t in TYPES.values()}
    k_law = papers if solver == "greedy" else {t.name: t.nmse for t in TYPES.values()}
    v_law = papers if solver == "greedy" else {t.name: t.v_nmse for t in TYPES.values()}
    k, v = (
        tuple({name: score**2 * error for name, error in law.items()} for score in scores)
        for scores, law in ((k_scores, k_law), (v_scores, v_law))
    )
    return Problem(tuple(layers), k, v, solver, types or default_types(solver), keys_first, nominal)


def default_types(solver: str) -> tuple[str, ...]:
    return types_of_ladder() if solver == "ladder" else ("q2", "q3", "q4", "q6", "q8")
