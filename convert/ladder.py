"""The ladder: pairs of types that a layer steps up along, the lower hull of measured damage over bytes.

Free choice of types by weight norms was measured to be worse than one good pair throughout, because all layers are
about as sensitive. So a layer moves along pairs that were measured to be worth their bytes, keys never below values,
and a score decides only which layers step up first where a budget lies between two pairs.

ladder.csv: pair, its physical bits a value, and for each model of a column the mean KLD of that pair in all its layers;
tests/bench/make_ladder.py makes it.
"""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from kvmix.errors import ArgumentError

from .kvtypes import TYPES
from .recipe import Pair, pair_of

TABLE = Path(__file__).with_name("ladder.csv")


@dataclass(frozen=True)
class Rung:
    pair: Pair
    bits: float
    damage: float  # mean over the models of KLD, in units of the model's own geometric mean over the pairs


@cache
def load() -> tuple[Rung, ...]:
    with TABLE.open(encoding="ascii", newline="") as file:
        rows = list(csv.DictReader(file))
    models = [name for name in rows[0] if name not in ("pair", "bits")]
    unit = {name: math.exp(math.fsum(math.log(float(row[name])) for row in rows) / len(rows)) for name in models}
    return tuple(
        Rung(
            pair_of(row["pair"]),
            float(row["bits"]),
            math.fsum(float(row[name]) / unit[name] for name in models) / len(models),
        )
        for row in rows
    )


def hull(rungs: Sequence[Rung]) -> list[Rung]:
    """The rungs that no mix of two others beats: what lies between two pairs is a mix of layers of each."""
    corners: list[Rung] = []
    for rung in sorted(rungs, key=lambda rung: (rung.bits, rung.damage)):
        if corners and rung.damage >= corners[-1].damage:
            continue
        while len(corners) >= 2 and slope(corners[-2], rung) <= slope(corners[-2], corners[-1]):
            corners.pop()
        corners.append(rung)
    return corners


def slope(a: Rung, b: Rung) -> float:
    return (b.damage - a.damage) / (b.bits - a.bits)


def climb(costs: Sequence[Sequence[int]], errors: Sequence[Sequence[float]], total: int) -> list[int]:
    """The rung of each layer: the highest that all can have, and one more for the layers that save most error for its
    cost, in that order, while it fits. costs, errors: of each layer on each rung."""
    rung, top = 0, len(costs[0]) - 1
    while rung < top and sum(layer[rung + 1] for layer in costs) <= total:
        rung += 1
    chosen = [rung] * len(costs)
    if rung == top:
        return chosen

    def saved_per_byte(layer: int) -> float:
        return (errors[layer][rung] - errors[layer][rung + 1]) / (costs[layer][rung + 1] - costs[layer][rung])

    left = total - sum(layer[rung] for layer in costs)
    for layer in sorted(range(len(costs)), key=saved_per_byte, reverse=True):
        left -= costs[layer][rung + 1] - costs[layer][rung]
        if left < 0:  # a cheaper layer further down may fit, but a larger budget would take it back
            break
        chosen[layer] += 1
    return chosen


def rungs_of(types: Sequence[str]) -> list[Pair]:
    """The hull's pairs, of these types only."""
    allowed = [rung for rung in load() if set(rung.pair) <= set(types)]
    if not allowed:
        raise ArgumentError(f"the ladder has no pair of {', '.join(types)} alone: give more --types, or --solver exact")
    return [rung.pair for rung in hull(allowed)]


def types_of_ladder() -> tuple[str, ...]:
    used = {name for rung in load() for name in rung.pair}
    return tuple(name for name in TYPES if name in used)
