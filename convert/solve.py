"""Allocation as mathematics: choose one option for each item, at least error, within a total cost.

`greedy` and `paper_bits` are the rule of the paper's code ("Quantize What Counts", arXiv 2502.15075), its tolerances
and ties included; `paper_groups` is that code's allocation of group sizes. `exact` is the optimum.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

EPSILON = 1e-6  # the paper's code's, absolute: of the budget, and of what one gain must exceed another by


def greedy(
    costs: Sequence[Sequence[float]],
    errors: Sequence[Sequence[float]],
    total: float,
    is_legal: Callable[[list[int], int], bool] = lambda chosen, item: True,
) -> list[int]:
    """The index of an option for each item: from the cheapest options, the step that saves most error for its cost,
    while one fits. An item's options ascend in cost; is_legal(chosen, item): may the item step up now?"""
    chosen = [0] * len(costs)
    used = math.fsum(options[0] for options in costs)
    while used + EPSILON < total:
        best, best_gain = -1, 0.0
        for item, at in enumerate(chosen):
            if at + 1 == len(costs[item]) or not is_legal(chosen, item):
                continue
            step = costs[item][at + 1] - costs[item][at]
            if used + step - total > EPSILON:
                continue
            gain = (errors[item][at] - errors[item][at + 1]) / step
            if best < 0 or gain > best_gain + EPSILON:
                best, best_gain = item, gain
        if best < 0:
            break
        used += costs[best][chosen[best] + 1] - costs[best][chosen[best]]
        chosen[best] += 1
    return chosen


def exact(costs: Sequence[Sequence[int]], errors: Sequence[Sequence[float]], total: int) -> list[int]:
    """The index of an option for each item, with the least sum of errors. Dynamic programming over the cost above the
    cheapest choice, in units of the differences' greatest common divisor."""
    floors = [min(options) for options in costs]
    if sum(floors) > total:
        raise ValueError(f"the cheapest choice costs {sum(floors)}, the budget is {total}")
    unit = math.gcd(*(cost - floor for options, floor in zip(costs, floors, strict=True) for cost in options)) or 1
    extra = [[(cost - floor) // unit for cost in options] for options, floor in zip(costs, floors, strict=True)]
    room = min((total - sum(floors)) // unit, sum(map(max, extra)))

    best = np.zeros(room + 1)  # least error of the items so far within w units
    picks: list[NDArray[np.int16]] = []
    for above, error in zip(extra, errors, strict=True):
        new = np.full(room + 1, np.inf)
        pick = np.zeros(room + 1, np.int16)
        for option in sorted(range(len(above)), key=above.__getitem__):
            shift = above[option]
            if shift > room:
                continue
            candidate = best[: room + 1 - shift] + error[option]
            better = candidate < new[shift:]
            new[shift:][better] = candidate[better]
            pick[shift:][better] = option
        best = new
        picks.append(pick)

    chosen, left = [], room
    for above, pick in zip(reversed(extra), reversed(picks), strict=True):
        chosen.append(int(pick[left]))
        left -= above[chosen[-1]]
    return chosen[::-1]


def interleaved(k: Sequence[float], v: Sequence[float]) -> list[float]:
    """K0 V0 K1 V1 ..: the order in which the paper's code takes the tensors, so that ties go to K and early layers."""
    return [norm for pair in zip(k, v, strict=True) for norm in pair]


def paper_bits(
    k_norms: Sequence[float], v_norms: Sequence[float], budget: float, widths: Sequence[float]
) -> tuple[list[float], list[float]]:
    """Nominal widths of K and V of each layer: the paper's greedy, with errors norm^2 * 4^-bits. budget: mean width."""
    ascending = sorted(widths)
    norms = interleaved(k_norms, v_norms)
    errors = [[norm**2 * 2 ** (-2 * width) for width in ascending] for norm in norms]
    chosen = greedy([ascending] * len(norms), errors, budget * len(norms))
    bits = [ascending[at] for at in chosen]
    return bits[::2], bits[1::2]


def paper_groups(
    k_norms: Sequence[float], v_norms: Sequence[float], budget: float, sizes: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Group sizes of K and V of each layer whose scales take the room of groups of `budget` throughout: sizes near
    kappa / sqrt(norm), then repaired step by step until the room is met."""
    ascending = sorted(sizes)
    norms = interleaved(k_norms, v_norms)
    target = len(norms) / budget  # scales a value, summed over the tensors
    kappa = math.fsum(math.sqrt(norm) for norm in norms) / target
    chosen = [int(np.abs(np.array(ascending) - kappa / math.sqrt(norm)).argmin()) for norm in norms]
    while True:
        excess = math.fsum(1 / ascending[at] for at in chosen) - target
        if abs(excess) <= EPSILON:
            break
        step = 1 if excess > 0 else -1
        best, best_price = -1, math.inf
        for item, at in enumerate(chosen):
            if not 0 <= at + step < len(ascending):
                continue
            old, new = ascending[at], ascending[at + step]
            freed = abs(1 / old - 1 / new)
            if freed - abs(excess) > EPSILON:
                continue
            price = norms[item] * (new - old) / freed  # error added for room freed; negative where room is spent
            if price < best_price:
                best, best_price = item, price
        if best < 0:
            break
        chosen[best] += step
    groups = [ascending[at] for at in chosen]
    return groups[::2], groups[1::2]
