"""How large a context to open: what the model was trained for, what was asked for, and what memory holds.

Memory means the cache and the workspace as the library predicts them to the byte (Model.plan), beside the weights,
within FRACTION of what this machine, or this process's control group, has free.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import OutOfMemory

if TYPE_CHECKING:
    from ._model import Model

FRACTION = 0.8
FLOOR = 4096  # a chat needs this much, or the trained context where that is smaller
STEP = 128  # contexts are tried in pages


@dataclass(frozen=True)
class Context:
    n_ctx: int
    n_trained: int
    n_fits: int  # the largest that memory holds, at most n_trained unless more was asked for
    memory_limit: int  # bytes for cache and workspace


def choose_context(model: Model, options: dict[str, Any], free_bytes: int | None = None) -> Context:
    """options as for Model.session(); n_ctx in it is what the user asked for, 0 the trained context, absent: choose.

    OutOfMemory, with the numbers, when what was asked for (or FLOOR) does not fit; nothing is ever clamped."""
    free = free_memory() if free_bytes is None else free_bytes
    limit = max(int(FRACTION * free) - model.info.weight_bytes, 1)
    trained = model.info.n_ctx_train
    asked = options.get("n_ctx")

    def need(n: int) -> int:
        plan = model.plan(**{**options, "n_ctx": n})
        return plan.kv_bytes + plan.workspace_bytes

    n_fits = _largest(need, limit, max(trained, asked or 0))
    n_ctx = (asked or trained) if asked is not None else max(min(trained, n_fits), min(trained, FLOOR))
    if n_ctx > n_fits:
        raise OutOfMemory(
            f"a context of {n_ctx} tokens needs {mib(need(n_ctx))} for the KV cache and workspace and "
            f"{mib(model.info.weight_bytes)} for the weights, and {FRACTION:.0%} of the {mib(free)} that are free is "
            f"{mib(int(FRACTION * free))}: " + (f"-c {n_fits} fits" if n_fits else "no context fits, free some memory")
        )
    return Context(n_ctx, trained, n_fits, limit)


def _largest(need: Any, limit: int, most: int) -> int:
    """The largest context <= most, in whole steps below it, whose need is within limit; 0 when none is."""

    def fits(n: int) -> bool:
        try:
            return bool(need(n) <= limit)
        except OutOfMemory:
            return False

    if fits(most):
        return most
    low, high = 0, -(-most // STEP)  # low * STEP fits (or is 0), high * STEP does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * STEP) else (low, middle)
    return low * STEP


def free_memory() -> int:
    """Bytes that this process may still take: of the machine, or of a tighter control group around it."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    return min([free, *_group_rooms()])


def _group_rooms() -> list[int]:
    """Limit minus use of every memory control group that holds this process (version 2, then 1)."""
    rooms = []
    for line in _read("/proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            root, limit_name, use_name = Path("/sys/fs/cgroup"), "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit_name, use_name = (
                Path("/sys/fs/cgroup/memory"),
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
            )
        else:
            continue
        folder = root / group.lstrip("/")
        for place in (folder, *folder.parents):
            limit, use = _read(place / limit_name).strip(), _read(place / use_name).strip()
            if limit.isdigit() and use.isdigit():
                rooms.append(max(int(limit) - int(use) + _reclaimable(place), 0))
            if place == root:
                break
    return rooms


def _reclaimable(group: Path) -> int:
    """Files that the kernel keeps in memory on the group's account and drops when it needs the room."""
    stat = dict(line.split() for line in _read(group / "memory.stat").splitlines())
    return int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def mib(n: int) -> str:
    return f"{n / 2**20:.1f} MiB" if n < 2**30 else f"{n / 2**30:.2f} GiB"
