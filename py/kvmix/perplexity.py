"""python -m kvmix.perplexity MODEL TEXT: perplexity in llama.cpp's protocol, and what a KV cache costs in quality.

The text is tokenized once and cut into chunks of -c tokens, each evaluated as a fresh sequence; where the file asks
for a BOS, it takes the place of a chunk's first token. The second half is scored: positions n_ctx/2 .. n_ctx-2
predict their next token.

--kld runs the same tokens through a second session whose cache is f16, and compares the predictions position by
position. --sweep does so for several recipes beside one f16 run, and prints them by their bits:

    --sweep k8v8,k4v3,k4v3@0/16,k4v2     RECIPE, RECIPE@WINDOW or RECIPE@WINDOW/SINK

All run with act=f32: 8-bit activations re-roll their rounding at every small change, which alone shows as a
divergence. --floor measures that one: the f16 cache with 8-bit activations, against itself without. --act q8 keeps
them on both sides instead.

--kl-divergence-base FILE writes the predictions as llama-perplexity does, of the f16 cache unless a recipe is named;
with --kl-divergence, FILE (ours or llama.cpp's) takes the place of the text and of the f16 cache.
"""

import os
import signal
import sys

if __name__ == "__main__":  # a Ctrl-C while the modules below are loaded
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from . import _cli, _plot
from ._logits_file import LogitsFile, LogitsWriter, n_scored, read_logits_file
from ._model import Model
from ._score import KldResult
from ._sweep import Base, Cache, Lineup, choose_batch, cut, parse_settings, with_bos
from .errors import ArgumentError, ModelIOError

F16 = {"kv": "f16", "k_type": None, "v_type": None}
N_CTX = 512
SWEEP_N_CTX, SWEEP_CHUNKS = 2048, 4  # under three minutes for six recipes of the smallest model in the catalog


def parser() -> _cli.Parser:
    p = _cli.Parser(prog="python -m kvmix.perplexity", description=__doc__)
    _cli.add_model_args(p)
    p.add_argument("text", nargs="?", metavar="TEXT", help="a text file")
    p.add_argument("-f", "--file", metavar="TEXT", help="the same")
    _cli.add_kv_args(p, n_batch=None)
    measure = p.add_argument_group("measuring")
    measure.add_argument(
        "--chunks",
        type=_cli.integer(-1),
        metavar="N",
        help=f"stop after N chunks; below 1 = all (default: all; {SWEEP_CHUNKS} of {SWEEP_N_CTX} tokens with --sweep)",
    )
    measure.add_argument("--skip-chunks", type=_cli.integer(0), default=0, metavar="N", help="leave the first N out")
    measure.add_argument(
        "--act", choices=("q8", "f32"), help="activations in the matmuls (default: q8; f32 for divergences)"
    )
    measure.add_argument("--kld", action="store_true", help="compare with the same model's f16 cache")
    measure.add_argument("--sweep", metavar="RECIPES", help="--kld for several recipes in one run")
    measure.add_argument("--plot", metavar="FILE", help="with --sweep: draw bits against divergence (.png, .svg, .pdf)")
    measure.add_argument("--floor", action="store_true", help="with --kld: what 8-bit activations alone do to it")
    measure.add_argument("--kl-divergence-base", metavar="FILE", help="write the predictions to FILE")
    measure.add_argument("--kl-divergence", action="store_true", help="compare with the predictions in that FILE")
    measure.add_argument("--strict", action="store_true", help="a row reads its own page packed too (-ub 128, 256 ..)")
    measure.add_argument("--json", action="store_true", help="one JSON object instead of text, a list with --sweep")
    return p


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = parser()
    args: argparse.Namespace = p.parse_args(argv)
    if args.model_flag is not None and args.text is None and args.file is None and not args.kl_divergence:
        args.model, args.text = None, args.model  # with -m, a lone positional is the text
    if args.text is not None and args.file is not None:
        p.error("two texts are given: MODEL TEXT, or -f TEXT")
    args.text = args.text or args.file
    if args.text is None and not args.kl_divergence:
        p.error("one text is needed: MODEL TEXT, or -f TEXT")
    complaint = contradiction(args)
    if complaint is not None:
        p.error(complaint)
    if args.ctx_size is None and not args.kl_divergence:
        args.ctx_size = N_CTX if args.sweep is None else SWEEP_N_CTX
    if args.chunks is None:
        args.chunks = -1 if args.sweep is None or args.kl_divergence else SWEEP_CHUNKS
    compares = args.kld or args.sweep is not None or args.kl_divergence_base is not None
    args.act = args.act or ("f32" if compares else "q8")
    return args


def names_recipe(args: argparse.Namespace) -> bool:
    return any(flag is not None for flag in (args.kv, args.cache_type_k, args.cache_type_v))


def contradiction(args: argparse.Namespace) -> str | None:
    """What does not go together, in one sentence."""
    compares = args.kld or args.sweep is not None
    rules = [
        (args.kl_divergence and args.kl_divergence_base is None, "--kl-divergence needs --kl-divergence-base FILE"),
        (args.kl_divergence and args.kld, "--kl-divergence compares with FILE, --kld with the f16 cache: choose one"),
        (
            args.kl_divergence_base is not None and compares and not args.kl_divergence,
            "--kl-divergence-base writes one cache's predictions: leave --kld and --sweep to a second run",
        ),
        (args.sweep is not None and names_recipe(args), "--sweep names the recipes: leave --kv, -ctk and -ctv out"),
        (args.plot is not None and args.sweep is None, "--plot is the picture of a --sweep"),
        (args.floor and not compares and not args.kl_divergence, "--floor is a row beside --kld"),
        (args.floor and args.act == "q8", "--floor adds the row of 8-bit activations: leave --act q8 out"),
    ]
    return next((sentence for broken, sentence in rules if broken), None)


def read_text(path: str) -> bytes:
    try:
        text = Path(path).read_bytes()
        text.decode()
    except OSError as error:
        raise ModelIOError(f"cannot read the text {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{path} is not valid UTF-8 at its byte {error.start}") from None
    return text


@dataclass(frozen=True)
class Material:
    """What is evaluated: chunks first .. of a text, or of a file of predictions."""

    chunks: NDArray[np.int32]  # [n_chunk][n_ctx], as tokenized
    first: int
    text_sha256: str | None
    stored: LogitsFile | None = None

    @property
    def n_ctx(self) -> int:
        return int(self.chunks.shape[1])


def load_material(model: Model, args: argparse.Namespace) -> Material:
    sha256, stored = None, None
    if args.kl_divergence:
        stored = read_logits_file(args.kl_divergence_base, model.info.n_vocab)
        if args.ctx_size not in (None, stored.n_ctx):
            raise ArgumentError(f"{stored.name} has chunks of {stored.n_ctx} tokens: leave -c {args.ctx_size} out")
        if args.text is not None:
            _cli.note(f"the tokens are those of {stored.name}; {args.text} is not read")
        chunks = stored.tokens
    else:
        text = read_text(args.text)
        sha256 = hashlib.sha256(text).hexdigest()
        chunks = cut(model, text, args.ctx_size or model.info.n_ctx_train)
    first = args.skip_chunks
    if first >= len(chunks):
        raise ArgumentError(f"--skip-chunks {first} leaves nothing: there are {len(chunks)} chunks")
    last = len(chunks) if args.chunks < 1 else first + args.chunks
    return Material(chunks[first:last], first, sha256, stored)


@dataclass(frozen=True)
class Run:
    """Everything that is measured in one go."""

    model_name: str
    material: Material
    lineup: Lineup
    recipes: Sequence[Cache]  # the lineup's, but for the floor
    floor: Cache | None
    n_batch: int
    strict: bool


def open_run(model: Model, model_name: str, kv_default: str | None, args: argparse.Namespace) -> Run:
    material = load_material(model, args)
    settings = [] if args.sweep is None else parse_settings(args.sweep)
    has_f16 = args.kld or (bool(settings) and material.stored is None)
    n_caches = max(len(settings), 1) + has_f16 + args.floor
    args.ubatch_size = args.ubatch_size or choose_batch(n_caches, material.n_ctx, model.info.n_vocab)
    options = _cli.session_options(args)
    n_batch: int = options["n_batch"]
    options |= {"n_ctx": material.n_ctx, "n_logits": min(n_batch, n_scored(material.n_ctx)), "n_seq_max": 1}
    options |= {"n_checkpoint": 0, "act": args.act, "strict": args.strict, "kv_default": kv_default}
    _cli.mention_long_context(material.n_ctx, model.info.n_ctx_train)
    writes = args.kl_divergence_base is not None and not args.kl_divergence
    if writes and not names_recipe(args):
        options |= F16
    measured = [Cache(model, options | setting.options(), setting.text) for setting in settings]
    measured = measured or [Cache(model, options)]
    base: Base | None = material.stored
    if has_f16:
        base = Cache(model, options | F16, "f16")
    floor = Cache(model, options | F16 | {"act": "q8"}, "f16, act=q8") if args.floor else None
    record = LogitsWriter(args.kl_divergence_base, material.chunks, model.info.n_vocab) if writes else None
    if record is not None:
        _cli.note(f"writing the predictions of {measured[0].name} to {record.path}, {record.n_bytes / 2**20:.0f} MiB")
    lineup = Lineup([*measured, floor] if floor else measured, base, record)
    return Run(model_name, material, lineup, measured, floor, n_batch, args.strict)


def evaluate(model: Model, run: Run, show: bool) -> None:
    """Evaluates all chunks, with a bar on stderr; `show` prints the running perplexities as llama.cpp does."""
    one_terminal = sys.stdout.isatty() and sys.stderr.isatty()  # then the line waits for the bar to end
    line = ""
    chunks = with_bos(model, run.material.chunks)
    bar = tqdm(chunks, unit="chunk", file=sys.stderr, disable=None)
    for i, chunk in enumerate(bar):
        run.lineup.evaluate(run.material.first + i, chunk, run.n_batch)
        ppl, _ = run.lineup.measured[0].perplexity.result()
        bar.set_postfix(ppl=f"{ppl:.4f}")
        line += f"[{i + 1}]{ppl:.4f},"
        if show and not one_terminal:
            print(line, end="", flush=True)
            line = ""
    if show:
        print(line)


def kld_fields(cache: Cache) -> dict[str, Any]:
    compared = bool(cache.divergence.values)
    values = asdict(cache.divergence.result()) if compared else {f.name: None for f in fields(KldResult)}
    return {name if name == "same_top" else f"kld_{name}": value for name, value in values.items()}


def numbers(run: Run, cache: Cache) -> dict[str, Any]:
    """What was measured of a cache, under fixed names; None for what was not."""
    stats = cache.session.stats
    ppl, ppl_se = cache.perplexity.result()
    base = run.lineup.base
    return {
        "model": run.model_name,
        "text_sha256": run.material.text_sha256,
        "n_ctx": run.material.n_ctx,
        "chunks": len(run.material.chunks),
        "skip_chunks": run.material.first,
        "cache": cache.name,
        "recipe": stats.recipe,
        "window": stats.window,
        "sink": stats.sink,
        "strict": run.strict,
        "act": cache.act,
        **asdict(cache.size),
        "ppl": ppl,
        "ppl_se": ppl_se,
        "base": base.name if base else None,
        "ppl_base": base.perplexity.result()[0] if base else None,
        **kld_fields(cache),
        "floor": kld_fields(run.floor) if run.floor else None,
    }


def table(rows: Sequence[dict[str, Any]], run: Run) -> Iterator[str]:
    """rows: those of the recipes"""
    columns = f"{'median':>9} {'99%':>9} {'99.9%':>9} {'same top':>8}"
    head = f"{'cache':<16} {'bits':>5} {'at 32k':>6} {'MiB':>6} {'PPL':>18}"
    yield f"{head} {'mean KLD':>22} {columns}"
    base = run.lineup.base
    if isinstance(base, Cache):
        yield cells(numbers(run, base))
    elif base is not None:
        yield f"{base.name}: PPL {base.perplexity.result()[0]:.4f}"
    for row in rows:
        yield cells(row)
    if run.floor:
        yield cells(numbers(run, run.floor))
    yield "bits: physical bits a value that the scored positions read; at 32k: of 32768 tokens, and the MiB they take"
    acts = {cache.act for cache in run.recipes}
    yield f"KLD against {base.name if base else ''}, act={acts.pop()}" + ("; strict" if run.strict else "")
    if run.floor:
        yield "the floor, f16 with act=q8: what 8-bit activations do to it without any quantized cache"


def cells(row: dict[str, Any]) -> str:
    ppl = f"{row['ppl']:.4f} +/- {row['ppl_se']:.4f}"
    text = f"{row['cache']:<16} {row['bits']:5.2f} {row['bits_32k']:6.2f} {row['kv_bytes_32k'] / 2**20:6.0f} {ppl:>18}"
    if row["kld_mean"] is None:
        return text
    kld = f"{row['kld_mean']:.3g}" + ("" if row["kld_se"] is None else f" +/- {row['kld_se']:.2g}")
    tail = " ".join(f"{row[name]:9.3g}" for name in ("kld_median", "kld_p99", "kld_p999"))
    return f"{text} {kld:>22} {tail} {row['same_top']:8.2%}"


def report(run: Run, rows: Sequence[dict[str, Any]], sweep: bool) -> None:
    if not sweep:
        print("Final estimate: PPL = {ppl:.4f} +/- {ppl_se:.5f}".format(**rows[0]))
    if run.lineup.base:
        print(*table(rows, run), sep="\n")
    if not sweep:
        print("{recipe}, window {window}, sink {sink}, {bits:.2f} bits per value".format(**rows[0]))
    if run.material.text_sha256:
        print(f"text sha256 {run.material.text_sha256}")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.plot:
        _plot.check(args.plot)
    resolved = _cli.resolve_model(_cli.model_name(args))
    with Model(resolved.path, mmap=args.mmap) as model:
        run = open_run(model, resolved.name, resolved.kv_default, args)
        material, record = run.material, run.lineup.record
        _cli.note(f"{resolved.name}: {len(material.chunks)} x {material.n_ctx} tokens, act={args.act}")
        try:
            evaluate(model, run, show=not args.json and args.sweep is None)
            if record is not None:
                record.close()
        finally:
            if record is not None:
                record.discard()
        rows = sorted((numbers(run, cache) for cache in run.recipes), key=lambda row: (row["bits"], row["cache"]))
        if args.json:
            print(json.dumps(rows[0] if args.sweep is None else rows))
        else:
            report(run, rows, sweep=args.sweep is not None)
        if args.plot:
            _plot.save(args.plot, rows, f"{resolved.name}, {len(material.chunks)} x {material.n_ctx} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(_cli.run(main))
