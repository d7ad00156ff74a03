"""Recipes as allocations: the paper's own patterns, the optimum against brute force, budgets, guards, the ladder."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import tiny
from kvmix import Model
from kvmix.convert import allocate, kvtypes, ladder, solve
from kvmix.convert.recipe import Layer, Recipe, pair_of, pair_text
from kvmix.errors import ArgumentError

LLAMA = [Layer(8, 128, 128)] * 32
UNEVEN = [Layer(n, d_k, d_v) for n, d_k, d_v in ((1, 256, 256), (4, 64, 64), (2, 80, 80), (3, 128, 64)) * 3]
BUDGETS = (2.9, 3.1, 3.35, 3.6, 3.8125, 4.1, 5.0, 6.4, 8.5)


def golden(shared: Path, name: str) -> list[dict]:
    return json.loads((shared / "golden" / name).read_text())["patterns"]


def norms(shared: Path, model: str, score: str) -> tuple[list[float], list[float]]:
    """Of W_K and W_V by layer; the files are named without the vendor, `-it` for Instruct."""
    name = model.split("/")[-1].replace("Llama-", "Llama").replace("-Instruct", "-it")
    data = json.loads((shared / "norms" / f"{score}_norm" / f"{name}.json").read_text())
    return data["w_k"], data["w_v"]


def random_scores(seed: int, n_layer: int) -> tuple[list[float], list[float]]:
    rng = np.random.default_rng(seed)
    return tuple(np.exp(rng.normal(mean, 0.7, n_layer)).tolist() for mean in (1.0, 0.2))


# ---- the paper's code -----------------------------------------------------------------------------------------------


def test_the_papers_bit_patterns(shared: Path) -> None:
    patterns = golden(shared, "bit_patterns.json")
    assert len(patterns) == 32
    for p in patterns:
        found = solve.paper_bits(*norms(shared, p["model"], p["score"]), p["budget"], p["bit_range"])
        assert found == (p["k"], p["v"]), (p["model"], p["budget"], p["score"])


def test_the_papers_group_patterns(shared: Path) -> None:
    patterns = golden(shared, "group_patterns.json")
    assert len(patterns) == 48
    for p in patterns:
        found = solve.paper_groups(*norms(shared, p["model"], p["score"]), p["budget"], p["sizes"])
        assert found == (p["k"], p["v"]), (p["model"], p["budget"], p["score"])


def test_ties_go_to_keys_and_early_layers() -> None:
    assert solve.paper_bits([1, 1, 1], [1, 1, 1], 2 + 4 / 6, [2, 3]) == ([3, 3, 2], [3, 3, 2])
    assert solve.paper_bits([1, 1, 1], [1, 1, 1], 2 + 3 / 6, [2, 3]) == ([3, 3, 2], [3, 2, 2])
    closer_than_the_tolerance = [1, 1 + 1e-7, 1]
    assert solve.paper_bits(closer_than_the_tolerance, [1, 1, 1], 2 + 1 / 6, [2, 3]) == ([3, 2, 2], [2, 2, 2])


def test_greedy_without_its_guard_is_the_papers(shared: Path) -> None:
    for model, score in itertools.product(("Llama3.1-8B", "Qwen3-8B"), ("frobenius", "spectral")):
        k, v = norms(shared, model, score)
        layers = [Layer(8, 128, 128)] * len(k)
        types = ("q2", "q3", "q4", "q6", "q8")
        options = {"solver": "greedy", "types": types, "nominal": True, "keys_first": False}
        for budget in (2.5, 3, 3.3, 4, 5):
            recipe = allocate.by_scores(layers, k, v, **options).recipe(budget)
            bits = tuple([kvtypes.TYPES[name].bits for name in side] for side in (recipe.k, recipe.v))
            assert bits == solve.paper_bits(k, v, budget, [2, 3, 4, 6, 8])


def test_the_guard_against_starved_keys(shared: Path) -> None:
    """By Frobenius norms, which say nothing of keys behind a per-head norm, the paper's rule gives them less."""
    k, v = norms(shared, "Qwen3-8B", "frobenius")
    layers = [Layer(8, 128, 128)] * len(k)
    options = {"solver": "greedy", "types": ("q2", "q4", "q6", "q8"), "nominal": True}
    starved = allocate.by_scores(layers, k, v, **options, keys_first=False).recipe(3)
    assert starved.k.count("q2") > 30 and starved.v.count("q4") > 30
    guarded = allocate.by_scores(layers, k, v, **options).recipe(3)
    assert keys_first(guarded) and guarded.nominal_bits(layers) == 3


def keys_first(recipe: Recipe) -> bool:
    return all(kvtypes.TYPES[k].bits >= kvtypes.TYPES[v].bits for k, v in recipe.pairs)


# ---- the optimum ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_exact_is_the_optimum(seed: int) -> None:
    rng = np.random.default_rng(seed)
    costs = [sorted(rng.integers(1, 12, rng.integers(1, 5)).tolist()) for _ in range(5)]
    errors = [rng.exponential(1, len(options)).tolist() for options in costs]
    least, most = sum(map(min, costs)), sum(map(max, costs))
    for total in range(least, most + 1):
        found = solve.exact(costs, errors, total)
        assert sum(options[i] for options, i in zip(costs, found, strict=True)) <= total
        best = min(
            math.fsum(error for _, error in choice)
            for choice in itertools.product(
                *(list(zip(*item, strict=True)) for item in zip(costs, errors, strict=True))
            )
            if sum(cost for cost, _ in choice) <= total
        )
        assert math.fsum(options[i] for options, i in zip(errors, found, strict=True)) == pytest.approx(best)
    with pytest.raises(ValueError, match=f"costs {least}, the budget is {least - 1}"):
        solve.exact(costs, errors, least - 1)


@pytest.mark.parametrize("nominal", [False, True], ids=["physical", "nominal"])
@pytest.mark.parametrize("solver", allocate.SOLVERS)
@pytest.mark.parametrize("layers", [LLAMA, UNEVEN], ids=["even", "uneven"])
def test_a_budget_is_kept_and_used(layers: list[Layer], solver: str, nominal: bool) -> None:
    problem = allocate.by_scores(layers, *random_scores(1, len(layers)), solver=solver, nominal=nominal)
    for budget in BUDGETS:
        recipe = problem.recipe(budget)
        assert problem.bits(recipe) <= budget + 1e-9
        assert keys_first(recipe)
        if budget < 6:  # above, whole layers take two bits a step
            assert problem.bits(recipe) > budget - 0.3
    assert set(problem.recipe(16).pairs) == {("q8", "q8")}


@pytest.mark.parametrize("layers", [LLAMA, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("keys_first", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_exact_is_no_worse_than_any_other(layers: list[Layer], keys_first: bool, seed: int) -> None:
    scores = random_scores(seed, len(layers))
    exact = allocate.by_scores(layers, *scores, solver="exact", keys_first=keys_first)
    greedy, on_ladder = (replace(exact, solver=solver) for solver in ("greedy", "ladder"))
    for budget in BUDGETS:
        least = exact.expected_error(exact.recipe(budget))
        for other in (greedy, on_ladder):
            assert least <= exact.expected_error(other.recipe(budget)) * (1 + 1e-12)


@pytest.mark.parametrize("solver", ["exact", "ladder"])
@pytest.mark.parametrize("layers", [LLAMA, UNEVEN], ids=["even", "uneven"])
def test_more_budget_is_never_worse(layers: list[Layer], solver: str) -> None:
    problem = allocate.by_scores(layers, *random_scores(2, len(layers)), solver=solver)
    errors = [problem.expected_error(problem.recipe(budget)) for budget in np.arange(2.9, 8.5, 0.11)]
    assert errors == sorted(errors, reverse=True)
    assert len(set(errors)) > 30


# ---- the ladder -----------------------------------------------------------------------------------------------------


def test_the_committed_ladder() -> None:
    rungs = ladder.load()
    for rung in rungs:
        k, v = (kvtypes.TYPES[name] for name in rung.pair)
        assert k.bits >= v.bits
        assert rung.bits == Recipe.uniform(rung.pair, 1).bits([Layer(1, 128, 128)])
    pairs = [rung.pair for rung in ladder.hull(rungs)]
    assert pairs[0] == ("q3", "q2") and pairs[-1] == ("q8", "q8")
    assert ("q4", "q3") in pairs


def test_the_hull_keeps_what_no_mix_beats() -> None:
    points = [(2, 10), (3, 6), (3, 5), (4, 4), (5, 1), (6, 2), (7, 0.5)]
    rungs = [ladder.Rung(("q2", "q2"), bits, damage) for bits, damage in points]
    assert [(rung.bits, rung.damage) for rung in ladder.hull(rungs)] == [(2, 10), (3, 5), (5, 1), (7, 0.5)]


def test_layers_step_up_in_the_order_of_their_scores() -> None:
    layers = [Layer(2, 64, 64)] * 4
    problem = allocate.by_scores(layers, [1, 3, 2, 4], [1, 1, 1, 1], types=("q3", "q4"))
    step = 1 / 8  # one layer's K from q3 to q4, of four layers' K and V
    steps = [problem.recipe(3.3125 + n * step).text for n in range(5)]
    assert steps == ["k3v3", "k3v3,3:k4v3", "k3v3,1:k4v3,3:k4v3", "k4v3,0:k3v3", "k4v3"]


def test_a_larger_budget_takes_nothing_back() -> None:
    problem = allocate.by_scores(UNEVEN, *random_scores(3, len(UNEVEN)))
    before = [(0, 0)] * len(UNEVEN)
    for budget in np.arange(2.9, 8.5, 0.05):
        now = [tuple(kvtypes.TYPES[name].bits for name in pair) for pair in problem.recipe(budget).pairs]
        assert all(k >= k0 and v >= v0 for (k, v), (k0, v0) in zip(now, before, strict=True))
        before = now


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, r"a budget of 2\.5 bits is too small, k3v2 in every layer takes 2\.812: .*--solver exact"),
        ({"solver": "exact", "types": ("q3", "q4")}, r"k3v3 in every layer takes 3\.312: .*smaller --types"),
        ({"types": ("q2",)}, "the ladder has no pair of q2 alone"),
    ],
)
def test_what_cannot_be_is_said(options: dict, sentence: str) -> None:
    with pytest.raises(ArgumentError, match=sentence):
        allocate.by_scores(LLAMA, *random_scores(0, 32), **options).recipe(2.5)


# ---- recipes and sizes ----------------------------------------------------------------------------------------------


def test_text_forms() -> None:
    assert Recipe.of([("q4", "q3")] * 3).text == "k4v3"
    pairs = [("q8", "q4"), ("q8", "q4"), ("q4", "q3"), ("f16", "q2"), ("q4", "q3"), ("q4", "q3")]
    assert Recipe.of(pairs).text == "k4v3,0-1:k8v4,3:kf16v2"
    for pair in itertools.product(kvtypes.TYPES, repeat=2):
        assert pair_of(pair_text(pair)) == pair
    with pytest.raises(ValueError, match="'k7v3' is no pair"):
        pair_of("k7v3")


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_sizes_and_texts_are_the_engines(tmp_path: Path, head_dim: int) -> None:
    names = list(kvtypes.TYPES)
    shape = {"n_layer": len(names), "n_embd": 64, "n_head": 4, "n_head_kv": 2, "n_ff": 64, "head_dim": head_dim}
    recipe = Recipe(tuple(names), tuple(reversed(names)))
    with (
        Model(tiny.write_model(tmp_path / "m.gguf", **shape).path) as model,
        model.session(256, recipe.text) as session,
    ):
        layers = session.layers
    assert [(layer.k_type, layer.v_type) for layer in layers] == recipe.pairs
    ours = [Layer(layer.n_head_kv, layer.d_k, layer.d_v).pair_bytes((layer.k_type, layer.v_type)) for layer in layers]
    assert ours == [layer.page_bytes for layer in layers]
