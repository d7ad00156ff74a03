"""What annotate decides: scores by name, a solver within a budget or a memory, and a judgement of measured recipes."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from kvmix.errors import ArgumentError

from . import allocate
from .allocate import Problem
from .cache_norms import scores as cache_scores
from .norms import ModelNorms, gap
from .norms_cli import measure_cache
from .recipe import Layer, Recipe
from .validate import CheckedModel

SCORES = ("frobenius", "spectral", "effective", "cache", "measured")
BISECTIONS = 14  # of some 6 bits: to 0.0004, less than one step of one layer of 1,000
CLEAR_GAP = 0.1  # bits, below which keys and values count as equal
N_RIVALS = 3  # uniform pairs that a measured recipe is judged beside


@dataclass(frozen=True)
class Room:
    """Bytes that the cache may take when it is made for n_ctx tokens."""

    n_bytes: int
    n_ctx: int


@dataclass(frozen=True)
class Wish:
    """What was asked for."""

    budget: float | Room  # mean bits a value, or the most that fit
    nominal: bool  # the budget counts the codes' widths alone
    types: Sequence[str] | None  # ascending in bits; None = the solver's default
    score: str
    solver: str
    text: bytes  # to measure on, for cache and measured scores
    n_tokens: int  # of it
    window: int
    sink: int


@dataclass(frozen=True)
class Decision:
    recipe: Recipe
    layers: tuple[Layer, ...]
    method: str  # "ladder by spectral"
    k_scores: Sequence[float]
    v_scores: Sequence[float]
    budget: float
    remarks: Sequence[str] = ()


def decide(wish: Wish, model: CheckedModel, norms: ModelNorms) -> Decision:
    layers = tuple(map(Layer, norms.n_head_kv, norms.d_k, norms.d_v))
    if wish.score == "measured":
        return decide_measured(wish, model, layers)
    if wish.score == "cache":
        k, v = cache_scores(measure_cache(model.path, wish.text, wish.n_tokens))
    else:
        k, v = norms.scores(wish.score)
    problem = allocate.by_scores(layers, k, v, solver=wish.solver, types=wish.types, nominal=wish.nominal)
    recipe, budget = spend(wish, model, problem)
    return Decision(recipe, layers, method_of(wish), k, v, budget, doubts(wish.score, k, v, norms))


def method_of(wish: Wish) -> str:
    return f"{wish.solver} by {wish.score}" + (", nominal bits" if wish.nominal else "")


def spend(wish: Wish, model: CheckedModel, problem: Problem) -> tuple[Recipe, float]:
    """The recipe, and its budget: the one that was asked for, or the largest that keeps within the memory."""
    room = wish.budget
    if not isinstance(room, Room):
        return problem.recipe(room), room
    least, most = problem.least_budget, problem.bits(Recipe.uniform(problem.pairs[-1], len(problem.layers)))
    recipe = problem.recipe(least)
    if not fits(wish, model, problem, recipe):
        raise ArgumentError(
            f"the smallest recipe, {recipe.text}, does not fit into {room.n_bytes} bytes at {room.n_ctx} tokens, it "
            f"takes {kv_bytes(wish, model, recipe, room.n_ctx)}: give more --memory, or a smaller --ctx or --window"
        )
    if fits(wish, model, problem, problem.recipe(most)):
        return problem.recipe(most), most
    low, high = least, most  # the lower one fits, the higher one does not
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if fits(wish, model, problem, problem.recipe(middle)):
            low = middle
        else:
            high = middle
    recipe = problem.recipe(low)
    return recipe, problem.bits(recipe)


def fits(wish: Wish, model: CheckedModel, problem: Problem, recipe: Recipe) -> bool:
    if isinstance(wish.budget, Room):
        return kv_bytes(wish, model, recipe, wish.budget.n_ctx) <= wish.budget.n_bytes
    return problem.bits(recipe) <= wish.budget + 1e-9


def kv_bytes(wish: Wish, model: CheckedModel, recipe: Recipe, n_ctx: int) -> int:
    return model.memory(recipe, n_ctx, wish.window, wish.sink).kv_bytes


def doubts(score: str, k: list[float], v: list[float], norms: ModelNorms) -> list[str]:
    """Why the score may not mean what the paper's rule takes it to mean."""
    n_behind, lead = sum(a <= b for a, b in zip(k, v, strict=True)), gap(k, v)
    if 2 * n_behind < len(k) and lead > CLEAR_GAP:
        return []
    of_weights = score in ("frobenius", "spectral")
    what, than = ("norm of W_K", "W_V's") if of_weights else ("score of keys", "values'")
    doubt = f"warning: the {score} {what} leads {than} by {lead:.2f} bits, in {n_behind} of {len(k)} layers not at all"
    if of_weights and any(layer.k.gain is not None for layer in norms.layers):
        doubt += "; each key head is normalized after W_K (QK-norm), so that the norm of W_K does not measure the keys"
    return [doubt + "; keys get at least the values' bits all the same"]


# ---- measured --------------------------------------------------------------------------------------------------------


def decide_measured(wish: Wish, model: CheckedModel, layers: tuple[Layer, ...]) -> Decision:
    from . import measured

    types = wish.types or allocate.default_types(wish.solver)
    texts = measured.cut_texts(model.model, wish.text, wish.n_tokens)
    found = measured.measure(measured.Referee(model.model, texts.fit, wish.sink), types)
    problem = Problem(layers, *found.errors, wish.solver, types, keys_first=False, nominal=wish.nominal)
    recipe, budget = spend(wish, model, problem)

    candidates = [recipe, *[r for r in problem.uniform_recipes() if fits(wish, model, problem, r)][:N_RIVALS]]
    with suppress(ArgumentError):  # the ladder has no pair of these types, or none so small
        on_ladder = replace(problem, solver="ladder").recipe(budget)
        candidates += [on_ladder] if fits(wish, model, problem, on_ladder) else []
    candidates = list(dict.fromkeys(candidates))
    klds = measured.Referee(model.model, texts.judge, wish.sink).divergences(candidates, "judging")
    best = candidates[klds.index(min(klds))]

    remarks = [found.summary, *comparison(candidates, klds, layers)]
    if best != recipe:
        remarks.append(f"the solver's recipe was judged worse than {best.text}, which is taken instead")
    method = method_of(wish) if best == recipe else "the best judged by measurement"
    return Decision(best, layers, method, *found.scores, budget, remarks)


def check(wish: Wish, model: CheckedModel, decision: Decision, text: bytes) -> list[str]:
    """The recipe's divergence on a text, beside the two uniform pairs that are nearest in size."""
    from . import measured
    from .ladder import rungs_of

    n_layer, bits = len(decision.layers), decision.recipe.bits(decision.layers)
    rungs = [Recipe.uniform(pair, n_layer) for pair in rungs_of(allocate.default_types("ladder"))]
    nearest = sorted((r for r in rungs if r != decision.recipe), key=lambda r: abs(r.bits(decision.layers) - bits))[:2]
    recipes = [decision.recipe, *nearest]
    chunks = measured.cut_chunks(model.model, text, wish.n_tokens)
    klds = measured.Referee(model.model, chunks, wish.sink).divergences(recipes, "checking")
    return comparison(recipes, klds, decision.layers)


def comparison(recipes: Sequence[Recipe], klds: Sequence[float], layers: Sequence[Layer]) -> list[str]:
    rows = zip(klds, recipes, strict=True)
    return [
        f"{'mean KLD':>10}  {'bits':>5}  recipe (every page read packed, float activations)",
        *(f"{kld:10.6f}  {recipe.bits(layers):5.2f}  {recipe.text}" for kld, recipe in rows),
    ]
