"""The picture of `norms --plot`: K and V by layer, one panel a score; with a cache, bands over its heads."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from kvmix._plot import check
from kvmix.errors import ModelIOError

from .cache_norms import CacheLayer, CacheSide
from .norms import SCORES, ModelNorms

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["check", "save"]

COLORS = {"K": "tab:blue", "V": "tab:orange"}


def save(path: str, norms: ModelNorms, cache: Sequence[CacheLayer] | None) -> None:
    from matplotlib.figure import Figure

    n_row = 1 if cache is None else 2
    figure = Figure(figsize=(12, 3.5 * n_row), layout="constrained")
    figure.suptitle(norms.model)
    panels = figure.subplots(n_row, len(SCORES), squeeze=False)
    for axes, score in zip(panels[0], SCORES, strict=True):
        draw_weights(axes, norms, score)
    if cache is not None:
        draw_cache(panels[1], cache)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise ModelIOError(f"cannot write {path}: {error.strerror}") from None


def draw_weights(axes: "Axes", norms: ModelNorms, score: str) -> None:
    for side, values in zip(COLORS, norms.scores(score), strict=True):
        axes.plot(values, color=COLORS[side], marker=".", label=f"W_{side}" if score != "effective" else side)
    decorate(axes, f"{score}, gap {norms.gap(score):.2f} bits")


def draw_cache(panels: "Sequence[Axes]", cache: Sequence[CacheLayer]) -> None:
    wanted: dict[str, Callable[[CacheSide], float]] = {
        "cache, Frobenius by head": lambda head: head.frobenius,
        "cache, spectral by head": lambda head: head.spectral,
        "cache, squared error of q3 by head": lambda head: head.mse_ours[3],
    }
    for axes, (title, value) in zip(panels, wanted.items(), strict=True):
        for side in COLORS:
            heads = [[value(head) for head in getattr(layer, side.lower())] for layer in cache]
            low, high = (list(map(edge, heads)) for edge in (min, max))
            axes.fill_between(range(len(heads)), low, high, color=COLORS[side], alpha=0.3)
            axes.plot([sum(values) / len(values) for values in heads], color=COLORS[side], label=side)
        decorate(axes, title)


def decorate(axes: "Axes", title: str) -> None:
    axes.set(title=title, xlabel="layer", yscale="log")
    axes.grid(which="both", alpha=0.3)
    axes.legend()
