"""A recipe, which type every layer's K and V has (runtime/recipe.h reads it), and the shape that gives it a size."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from .kvtypes import PAGE, TYPES, page_bytes

Pair = tuple[str, str]  # types of K and V


@dataclass(frozen=True)
class Layer:
    """What a layer caches of one token: n_head_kv keys of d_k values, and as many values of d_v."""

    n_head_kv: int
    d_k: int
    d_v: int

    @property
    def n_values(self) -> int:
        return self.n_head_kv * (self.d_k + self.d_v)

    def k_bytes(self, name: str) -> int:
        """Of a packed page."""
        return self.n_head_kv * page_bytes(name, self.d_k, is_k=True)

    def v_bytes(self, name: str) -> int:
        return self.n_head_kv * page_bytes(name, self.d_v, is_k=False)

    def pair_bytes(self, pair: Pair) -> int:
        return self.k_bytes(pair[0]) + self.v_bytes(pair[1])


@dataclass(frozen=True)
class Recipe:
    k: tuple[str, ...]
    v: tuple[str, ...]

    @classmethod
    def of(cls, pairs: Sequence[Pair]) -> "Recipe":
        return cls(tuple(k for k, _ in pairs), tuple(v for _, v in pairs))

    @classmethod
    def uniform(cls, pair: Pair, n_layer: int) -> "Recipe":
        return cls.of([pair] * n_layer)

    @property
    def pairs(self) -> list[Pair]:
        return list(zip(self.k, self.v, strict=True))

    @property
    def text(self) -> str:
        """The commonest pair, then the layers that differ: "k4v3,0-1:k8v4"."""
        base = Counter(self.pairs).most_common(1)[0][0]
        parts = [pair_text(base)]
        for pair, run in groupby(enumerate(self.pairs), key=lambda item: item[1]):
            if pair != base:
                numbers = [layer for layer, _ in run]
                where = f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
                parts.append(f"{where}:{pair_text(pair)}")
        return ",".join(parts)

    def bits(self, layers: Sequence[Layer]) -> float:
        """Physical bits a value of its packed pages."""
        return mean_bits(layers, sum(layer.pair_bytes(pair) for layer, pair in zip(layers, self.pairs, strict=True)))

    def nominal_bits(self, layers: Sequence[Layer]) -> float:
        """Widths of the codes alone, a value."""
        widths = (
            layer.n_head_kv * (layer.d_k * TYPES[k].bits + layer.d_v * TYPES[v].bits)
            for layer, (k, v) in zip(layers, self.pairs, strict=True)
        )
        return sum(widths) / sum(layer.n_values for layer in layers)


def mean_bits(layers: Sequence[Layer], page_total: int) -> float:
    """Bits a value, of so many bytes a page of all layers."""
    return 8 * page_total / (PAGE * sum(layer.n_values for layer in layers))


def pair_text(pair: Pair) -> str:
    """("q4", "f16") -> "k4vf16" """
    k, v = (name.removeprefix("q") for name in pair)
    return f"k{k}v{v}"


def pair_of(text: str) -> Pair:
    """ "k4vf16" -> ("q4", "f16")"""
    k, _, v = text.removeprefix("k").partition("v")
    pair = tuple(name if name == "f16" else f"q{name}" for name in (k, v))
    if not set(pair) <= set(TYPES):
        raise ValueError(f"{text!r} is no pair of types")
    return pair[0], pair[1]
