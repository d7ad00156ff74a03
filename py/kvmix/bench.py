"""python -m kvmix.bench MODEL: speed as llama-bench measures it, and what the cache costs beside it.

Tests are pp (a prompt of -p tokens, in batches of -b) and tg (-n tokens, one at a time), each behind every depth of
-d tokens. Flags with several values, separated by commas, multiply. A test runs -r times after one that is not
counted; tokens are arbitrary, neither tokenizing nor sampling is timed. A depth is filled once, through the cache's
packed pages, and forked for every repetition. -np N runs N sequences in each batch; t/s counts all their tokens.

A row stands as soon as it is measured: t/s is the mean and the standard deviation of the repetitions, KV MiB and bits
are of one sequence of depth + test tokens.
"""

import os
import signal
import sys

if __name__ == "__main__":  # a Ctrl-C while the modules below are loaded
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import csv
import io
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from . import _cli, _native
from ._model import Model
from ._session import Row, Session

T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """One line of the product of all lists."""

    kv: str | None
    k_type: str | None
    v_type: str | None
    n_threads: int
    n_batch: int
    n_depth: int

    def options(self, n_ctx: int) -> dict[str, Any]:
        """Model.session()'s keyword arguments, for one sequence of n_ctx tokens."""
        values = asdict(self) | {"n_ctx": n_ctx, "n_logits": 1, "n_seq_max": 1, "n_checkpoint": 0}
        del values["n_depth"]
        return values


@dataclass(frozen=True)
class Result:
    """A row, with llama-bench's names; ours are kv, kv_bytes, bits, n_parallel and kernels."""

    build_version: str
    cpu_info: str
    kernels: str
    model_filename: str
    model_type: str
    model_size: int
    model_n_params: int
    n_batch: int
    n_threads: int
    type_k: str
    type_v: str
    kv: str
    kv_bytes: int
    bits: float
    n_parallel: int
    n_prompt: int
    n_gen: int
    n_depth: int
    test_time: str
    avg_ns: int
    stddev_ns: int
    avg_ts: float
    stddev_ts: float
    samples_ns: list[int]
    samples_ts: list[float]

    @property
    def test(self) -> str:
        name = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"
        return name + (f" @ d{self.n_depth}" if self.n_depth else "")


# ---- measuring ------------------------------------------------------------------------------------------------------


def tokens(model: Model, first: int, n: int) -> list[int]:
    """Ids that are no control tokens in any vocabulary we know, and not all the same."""
    return [(7 * (first + i)) % min(1000, model.info.n_vocab - 10) + 10 for i in range(n)]


def prompt(sequences: Sequence[Session], n: int, n_batch: int) -> None:
    """n tokens into each sequence, together at most n_batch a batch; the last one's logits are computed."""
    for sequence in sequences:
        model, depth = sequence.model, sequence.length
        ids = tokens(model, depth, n)
        for first in range(0, n, n_batch):
            part = ids[first : first + n_batch]
            sequence.decode([Row(token, first + i == n - 1) for i, token in enumerate(part)])


def generate(sequences: Sequence[Session], n: int) -> None:
    """n tokens of each sequence, one row each a batch."""
    depth = sequences[0].length
    for token in tokens(sequences[0].model, depth, n):
        sequences[0].decode([Row(token, True, sequence) for sequence in sequences])


def timed(root: Session, n_parallel: int, work: Callable[[Sequence[Session]], None]) -> int:
    """Nanoseconds of work(n_parallel forks of root)."""
    forks = [root.fork() for _ in range(n_parallel)]
    try:
        start = time.perf_counter_ns()
        work(forks)
        return time.perf_counter_ns() - start
    finally:
        for fork in forks:
            fork.close()


def open_root(model: Model, setting: Setting, n_most: int, n_parallel: int) -> Session:
    """A session that holds n_depth tokens, with room for n_parallel forks that go on for n_most."""
    options = setting.options(setting.n_depth + n_parallel * (n_most + 128))
    session = model.session(**options | {"n_seq_max": 1 + n_parallel, "n_logits": n_parallel})
    with tqdm(total=setting.n_depth, desc="filling the depth", leave=False, disable=None) as bar:
        session.sync(tokens(model, 0, setting.n_depth), lambda held, _: bar.update(held - bar.n) and None)
    return session


def measure(model: Model, name: str, setting: Setting, args: argparse.Namespace) -> Iterator[Result]:
    tests = [(n, 0) for n in args.n_prompt if n > 0] + [(0, n) for n in args.n_gen if n > 0]
    root = open_root(model, setting, max(p + g for p, g in tests), args.parallel)
    try:
        for n_prompt, n_gen in tests:

            def work(forks: Sequence[Session], n_prompt: int = n_prompt, n_gen: int = n_gen) -> None:
                prompt(forks, n_prompt, setting.n_batch) if n_prompt else generate(forks, n_gen)

            started = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            if args.warmup:
                timed(root, args.parallel, work if n_prompt else lambda forks: generate(forks, 1))
            samples = [timed(root, args.parallel, work) for _ in range(args.repetitions)]
            yield result(model, name, root, setting, args.parallel, (n_prompt, n_gen), started, samples)
    finally:
        root.close()


def result(
    model: Model, name: str, root: Session, setting: Setting, n_parallel: int, test: tuple[int, int], started: str,
    samples_ns: list[int],
) -> Result:  # fmt: skip
    info, stats, layers = model.info, root.stats, root.layers
    rates = [n_parallel * max(test) * 1e9 / ns for ns in samples_ns]
    plan = model.plan(**setting.options(setting.n_depth + max(test)))
    k_types, v_types = {layer.k_type for layer in layers}, {layer.v_type for layer in layers}
    return Result(
        build_version=_native.version(),
        cpu_info=cpu_name(),
        kernels=_native.cpu_kernels(),
        model_filename=name,
        model_type=f"{info.arch} {info.n_params / 1e6:.0f}M {info.weights.split()[0]}",
        model_size=info.weight_bytes,
        model_n_params=info.n_params,
        n_batch=setting.n_batch,
        n_threads=stats.n_threads,
        type_k=k_types.pop() if len(k_types) == 1 else "mixed",
        type_v=v_types.pop() if len(v_types) == 1 else "mixed",
        kv=stats.recipe,
        kv_bytes=plan.kv_bytes,
        bits=plan.bits_full,
        n_parallel=n_parallel,
        n_prompt=test[0],
        n_gen=test[1],
        n_depth=setting.n_depth,
        test_time=started,
        avg_ns=round(statistics.mean(samples_ns)),
        stddev_ns=round(deviation(samples_ns)),
        avg_ts=statistics.mean(rates),
        stddev_ts=deviation(rates),
        samples_ns=samples_ns,
        samples_ts=rates,
    )


def deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


# ---- rows -----------------------------------------------------------------------------------------------------------

# name, width, of a Result; a column with one value throughout stands only where llama-bench has it
COLUMNS: list[tuple[str, int, Callable[[Result], str]]] = [
    ("model", 24, lambda r: r.model_type),
    ("size", 10, lambda r: f"{r.model_size / 2**20:.2f} MiB"),
    ("params", 10, lambda r: f"{r.model_n_params / 1e6:.2f} M"),
    ("backend", 7, lambda r: "CPU"),
    ("threads", 7, lambda r: str(r.n_threads)),
    ("type_k", 6, lambda r: r.type_k),
    ("type_v", 6, lambda r: r.type_v),
    ("KV MiB", 8, lambda r: f"{r.kv_bytes / 2**20:.1f}"),
    ("bits", 5, lambda r: f"{r.bits:.2f}"),
    ("test", 15, lambda r: r.test),
    ("t/s", 16, lambda r: f"{r.avg_ts:.2f} ± {r.stddev_ts:.2f}"),
]
OPTIONAL: dict[str, tuple[str, int, Callable[[Result], str]]] = {
    "kv": ("kv", 16, lambda r: r.kv),
    "batch": ("n_batch", 7, lambda r: str(r.n_batch)),
    "parallel": ("np", 4, lambda r: str(r.n_parallel)),
}


class Table:
    """Rows in one of llama-bench's formats, printed and flushed as they come."""

    def __init__(self, form: str, extra: Sequence[str]) -> None:
        self.form, self.n = form, 0
        self.columns = [*COLUMNS[:-2], *(OPTIONAL[name] for name in extra), *COLUMNS[-2:]]

    def add(self, row: Result) -> None:
        values = asdict(row)
        if self.form == "md":
            if self.n == 0:
                self.line("| " + " | ".join(f"{name:>{width}}" for name, width, _ in self.columns) + " |")
                self.line("| " + " | ".join("-" * (width - 1) + ":" for _, width, _ in self.columns) + " |")
            self.line("| " + " | ".join(f"{text(row):>{width}}" for _, width, text in self.columns) + " |")
        elif self.form == "csv":
            if self.n == 0:
                self.line(csv_line([f.name for f in fields(Result)]))
            self.line(csv_line(json.dumps(v) if isinstance(v, list) else v for v in values.values()))
        elif self.form == "jsonl":
            self.line(json.dumps(values))
        else:
            self.line(("[\n  " if self.n == 0 else ",\n  ") + json.dumps(values), end="")
        self.n += 1

    def close(self) -> None:
        if self.form == "json":
            self.line("\n]" if self.n else "[]")

    @staticmethod
    def line(text: str, end: str = "\n") -> None:
        print(text, end=end, flush=True)


def csv_line(values: Any) -> str:
    out = io.StringIO()
    csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="").writerow(values)
    return out.getvalue()


# ---- the command ----------------------------------------------------------------------------------------------------


def values(parse: Callable[[str], T]) -> Callable[[str], list[T]]:
    """Values separated by commas."""
    return lambda text: [parse(item) for item in text.split(",")]


def recipes(text: str) -> list[str]:
    """Recipes separated by commas, or by ; where one names layers (k4v3;k4v3,0-1:k8v4)."""
    return [item.strip() for item in text.split(";" if ";" in text or ":k" in text else ",")]


def parser() -> _cli.Parser:
    p = _cli.Parser(prog="python -m kvmix.bench", description=__doc__)
    _cli.add_model_args(p)
    count = values(_cli.integer(0, _cli.N_CTX_MAX))
    p.add_argument("-p", "--n-prompt", type=count, default=[512], metavar="N,..", help="prompt tokens; 0 = none (512)")
    p.add_argument("-n", "--n-gen", type=count, default=[128], metavar="N,..", help="generated tokens; 0 = none (128)")
    p.add_argument("-d", "--n-depth", type=count, default=[0], metavar="N,..", help="tokens before the test (0)")
    p.add_argument("-r", "--repetitions", type=_cli.integer(1, 1000), default=5, metavar="N", help="of a test (5)")
    p.add_argument("-b", "--batch-size", type=values(_cli.integer(1, 4096)), default=[512], metavar="N,..")
    p.add_argument("-t", "--threads", type=values(_cli.integer(1, 512)), default=[0], metavar="N,..")
    p.add_argument("-np", "--parallel", type=_cli.integer(1, 255), default=1, metavar="N", help="sequences (1)")
    p.add_argument("-ctk", "--cache-type-k", type=values(str), default=[None], metavar="TYPE,..")
    p.add_argument("-ctv", "--cache-type-v", type=values(str), default=[None], metavar="TYPE,..")
    p.add_argument("--kv", type=recipes, default=[None], metavar="RECIPE,..")
    p.add_argument("--no-warmup", dest="warmup", action="store_false", help="count the first run, too")
    p.add_argument("-o", "--output", choices=("md", "csv", "json", "jsonl"), default="md")
    p.add_argument("--devices", action="store_true", help="say what this machine has and which kernels run on it")
    return p


def settings(args: argparse.Namespace) -> list[Setting]:
    k_types = [_cli.kv_type("-ctk", name) for name in args.cache_type_k]
    v_types = [_cli.kv_type("-ctv", name) for name in args.cache_type_v]
    product = itertools.product(args.kv, k_types, v_types, args.threads, args.batch_size, args.n_depth)
    return [Setting(*item) for item in product]


def main(argv: Sequence[str] | None = None) -> int:
    p = parser()
    args = p.parse_args(argv)
    if args.devices:
        print(f"CPU: {cpu_name()}, {len(os.sched_getaffinity(0))} cores, {_native.cpu_kernels()} kernels")
        return 0
    if not any(args.n_prompt + args.n_gen):
        p.error("-p 0 -n 0 leaves nothing to measure")
    resolved = _cli.resolve_model(_cli.model_name(args))
    chosen = {"kv": args.kv != [None], "batch": len(args.batch_size) > 1, "parallel": args.parallel > 1}
    table = Table(args.output, [name for name, is_chosen in chosen.items() if is_chosen])
    with Model(resolved.path, mmap=args.mmap) as model:
        for setting in settings(args):
            for row in measure(model, resolved.name, setting, args):
                table.add(row)
    table.close()
    return 0


if __name__ == "__main__":
    sys.exit(_cli.run(main))
