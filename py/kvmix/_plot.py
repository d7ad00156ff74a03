"""The Pareto picture of a sweep: what each recipe's bits buy. The only file that needs matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import ArgumentError, ModelIOError, Unsupported

Rows = Sequence[Mapping[str, Any]]


def check(path: str) -> None:
    """Before a long run: whether save() could write there."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise Unsupported("--plot needs matplotlib: pip install 'kvmix[plot]' brings it") from None
    kinds = FigureCanvasBase.get_supported_filetypes()
    kind = Path(path).suffix.removeprefix(".")
    if kind not in kinds:
        raise ArgumentError(f"--plot {path} is no kind of picture: end it in .png, .svg or .pdf")
    if not Path(path).absolute().parent.is_dir():
        raise ModelIOError(f"cannot write {path}: there is no folder {Path(path).parent}")


def lower_hull(rows: Rows) -> list[Mapping[str, Any]]:
    """The rows that no other beats in both bits and divergence, from few bits to many."""
    best: list[Mapping[str, Any]] = []
    for row in sorted(rows, key=lambda row: (row["bits"], row["kld_mean"])):
        if not best or row["kld_mean"] < best[-1]["kld_mean"]:
            best.append(row)
    return best


def save(path: str, rows: Rows, title: str) -> None:
    """rows: of the sweep's JSON"""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel="physical bits per value at the scored positions")
    axes.set_ylabel("mean KLD against the base, 2 standard errors over chunks")
    axes.set_yscale("log")
    axes.margins(x=0.1)  # room for the names
    hull = lower_hull(rows)
    axes.plot([row["bits"] for row in hull], [row["kld_mean"] for row in hull], color="tab:blue", linewidth=1)
    for row in rows:
        bar = None if row["kld_se"] is None else 2 * row["kld_se"]
        color = "tab:blue" if row in hull else "tab:gray"
        axes.errorbar(row["bits"], row["kld_mean"], bar, fmt="o", color=color, capsize=3)
        axes.annotate(row["cache"], (row["bits"], row["kld_mean"]), xytext=(6, 4), textcoords="offset points")
    axes.grid(which="both", alpha=0.3)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise ModelIOError(f"cannot write {path}: {error.strerror}") from None
