"""What llama.cpp's cache types and kvmix's recipes cost, on the same model, text, chunks and tokens.

    python tests/bench/kld.py llama  CSV MODEL.gguf PART [-c 2048] [--chunks 16] --cache q8_0/q8_0 q4_0/q4_0 ...
    python tests/bench/kld.py kvmix  CSV MODEL.gguf PART [-c 2048] [--chunks 16] --sweep k4v4,k4v3@0/16 [--strict]
    python tests/bench/kld.py ratios CSV
    python tests/bench/kld.py logits FILE MODEL.gguf PART [-c 512] [--chunks 4] [--cache f16/f16]

Each engine is compared with its own f16 cache, the second half of each chunk scored. PART is one of texts.py's. Give
an F32 copy of a model (to_f32.py), or --act q8 for the default paths of both engines on the file itself. A cache of
llama.cpp is K/V; its Hadamard rotation is on by default, and off in K/V:plain. Rows are appended to CSV; what stands
there already is not measured again. `ratios` prints ours / theirs with a 95% interval, a bootstrap over the chunks that
both have. `logits` writes llama.cpp's predictions for python -m kvmix.perplexity MODEL.gguf --kl-divergence-base FILE
--kl-divergence: with --kv f16 on an F32 copy, that is how far the engines are apart.

`llama` and `logits` need the package llama-cpp-python (a peer to measure, never a dependency), and tokenize with kvmix.
"""

import argparse
import csv
import ctypes
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
import texts
from compare import cpu_name
from numpy.typing import NDArray
from tqdm import tqdm

import kvmix
from kvmix import _native
from kvmix._logits_file import LogitsWriter, n_scored
from kvmix._score import Divergence, Perplexity, Prediction
from kvmix._sweep import Lineup, cut, parse_settings, with_bos

KEY = ["model", "text", "text_sha256", "n_ctx", "chunks", "engine", "cache", "strict", "act"]
MEASURED = ["bits", "bits_32k", "ppl", "ppl_se", "ppl_base"]
DIVERGENCE = ["kld_mean", "kld_se", "kld_median", "kld_p99", "kld_p999", "same_top", "kld_chunks"]
COLUMNS = [*KEY, *MEASURED, *DIVERGENCE, "version", "cpu"]
GGML_BITS = {"f16": 16, "q8_0": 8.5, "q5_1": 6, "q5_0": 5.5, "q4_1": 5, "q4_0": 4.5}
LLAMA_CACHES = ["q8_0/q8_0", "q5_1/q5_1", "q4_0/q4_0", "q4_0/q4_0:plain"]
BATCH = 512
Row = dict[str, object]


# ---- the table ------------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append_row(path: Path, row: Row) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow({name: format_cell(row[name]) for name in COLUMNS})
    print(f"{row['engine']} {row['cache']}: {row['bits']:.2f} bits, mean KLD {row['kld_mean']:.3g}", flush=True)


def format_cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return " ".join(f"{x:.6g}" for x in value)
    return str(value)


def common(args: argparse.Namespace, text: bytes) -> Row:
    """What the rows of one run share."""
    return {
        "model": args.model.name,
        "text": args.part,
        "text_sha256": hashlib.sha256(text).hexdigest(),
        "n_ctx": args.c,
        "chunks": args.chunks,
        "strict": getattr(args, "strict", False),
        "act": args.act,
        "cpu": cpu_name(),
    }


def still_to_do(path: Path, shared: Row, engine: str, caches: Sequence[str]) -> list[str]:
    def key(row: Row | dict[str, str]) -> tuple[str, ...]:
        return tuple(str(row[name]) for name in KEY)

    done = {key(row) for row in read_rows(path)}
    return [cache for cache in caches if key({**shared, "engine": engine, "cache": cache}) not in done]


# ---- llama.cpp ------------------------------------------------------------------------------------------------------


@contextmanager
def rotation(on: bool) -> Iterator[None]:
    """llama.cpp reads the variable when a context is made."""
    if not on:
        os.environ["LLAMA_ATTN_ROT_DISABLE"] = "1"
    try:
        yield
    finally:
        os.environ.pop("LLAMA_ATTN_ROT_DISABLE", None)


class LlamaModel:
    def __init__(self, path: Path) -> None:
        import llama_cpp as lib

        self.lib = lib
        lib.llama_backend_init()
        self.log = lib.llama_log_callback(lambda level, text, data: None)
        lib.llama_log_set(self.log, ctypes.c_void_p())
        self.handle = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        self.n_vocab: int = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.handle))


class LlamaCache:
    """A context of llama.cpp in the place of a session under measurement (kvmix._sweep.Measured)."""

    def __init__(self, model: LlamaModel, name: str, n_ctx: int, threads: int) -> None:
        lib, self.model, self.name = model.lib, model, name
        types, _, plain = name.partition(":")
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, BATCH, BATCH
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self.types = types.split("/")
        params.type_k, params.type_v = (getattr(lib, f"GGML_TYPE_{side.upper()}") for side in self.types)
        with rotation(plain != "plain"):
            self.context = lib.llama_init_from_model(model.handle, params)
        if not self.context:
            raise SystemExit(f"llama.cpp refuses a cache of {types}")
        self.batch = lib.llama_batch_init(BATCH, 0, 1)
        self.perplexity = Perplexity()
        self.divergence = Divergence(n_scored(n_ctx))
        self.position = 0
        self.scored: list[int] = []

    def start(self, chunk: int) -> None:
        self.model.lib.llama_memory_clear(self.model.lib.llama_get_memory(self.context), True)
        self.position = 0

    def decode(self, tokens: NDArray[np.int32], scored: NDArray[np.bool_]) -> None:
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, (token, wanted) in enumerate(zip(tokens.tolist(), scored.tolist(), strict=True)):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, self.position + i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, wanted
        if self.model.lib.llama_decode(self.context, batch) != 0:
            raise SystemExit("llama.cpp failed to decode")
        self.position += len(tokens)
        self.scored = np.flatnonzero(scored).tolist()

    def prediction(self, index: int) -> Prediction:
        logits = self.model.lib.llama_get_logits_ith(self.context, self.scored[index])
        return Prediction.of_logits(np.ctypeslib.as_array(logits, (self.model.n_vocab,)))


def open_llama(args: argparse.Namespace, text: bytes) -> tuple[LlamaModel, NDArray[np.int32], NDArray[np.int32]]:
    """The model, its chunks as tokenized, and as evaluated."""
    with kvmix.Model(args.model) as tokenizer:
        if (args.act == "f32") != tokenizer.info.weights.startswith("F32 100%"):
            raise SystemExit(f"--act {args.act}: llama.cpp keeps activations in float with F32 weights, and only then")
        chunks = cut(tokenizer, text, args.c)[: args.chunks]
        if len(chunks) < args.chunks:
            raise SystemExit(f"{args.part} has {len(chunks)} chunks of {args.c}")
        return LlamaModel(args.model), chunks, with_bos(tokenizer, chunks)


def run_lineup(lineup: Lineup, chunks: NDArray[np.int32]) -> None:
    for number, chunk in enumerate(tqdm(chunks, unit="chunk", disable=None)):
        lineup.evaluate(number, chunk, BATCH)


def run_llama(args: argparse.Namespace) -> None:
    text = texts.part(args.part)
    shared = common(args, text) | {"engine": "llama.cpp", "version": version("llama-cpp-python")}
    todo = still_to_do(args.csv, shared, "llama.cpp", args.cache)
    if not todo:
        return
    model, _, chunks = open_llama(args, text)
    base = LlamaCache(model, "f16/f16", args.c, args.t)
    caches = [LlamaCache(model, name, args.c, args.t) for name in todo]
    run_lineup(Lineup(caches, base), chunks)
    for cache in caches:
        bits = sum(GGML_BITS[side] for side in cache.types) / 2
        ppl, ppl_se = cache.perplexity.result()
        k = cache.divergence.result()
        row = shared | {"cache": cache.name, "bits": bits, "bits_32k": bits, "ppl": ppl, "ppl_se": ppl_se}
        row |= {"ppl_base": base.perplexity.result()[0], "same_top": k.same_top, "kld_chunks": list(k.chunks)}
        row |= {f"kld_{name}": getattr(k, name) for name in ("mean", "se", "median", "p99", "p999")}
        append_row(args.csv, row)


def write_logits(args: argparse.Namespace) -> None:
    model, tokens, chunks = open_llama(args, texts.part(args.part))
    cache = LlamaCache(model, args.cache, args.c, args.t)
    record = LogitsWriter(str(args.file), tokens, model.n_vocab)
    try:
        run_lineup(Lineup([cache], record=record), chunks)
        record.close()
    finally:
        record.discard()
    print("llama.cpp: PPL = {:.4f} +/- {:.4f}".format(*cache.perplexity.result()))


# ---- kvmix ----------------------------------------------------------------------------------------------------------


def run_kvmix(args: argparse.Namespace) -> None:
    text = texts.part(args.part)
    shared = common(args, text) | {"engine": "kvmix", "version": _native.version()}
    names = [setting.text for setting in parse_settings(args.sweep)]
    todo = still_to_do(args.csv, shared, "kvmix", names)
    if not todo:
        return
    with tempfile.NamedTemporaryFile() as file:
        file.write(text)
        file.flush()
        command = [sys.executable, "-m", "kvmix.perplexity", args.model, file.name, "--sweep", ",".join(todo), "--json"]
        command += ["-c", str(args.c), "--chunks", str(args.chunks), "-t", str(args.t), "--act", args.act]
        command += ["--strict"] if args.strict else []
        run = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    for row in json.loads(run.stdout):
        if row["chunks"] < args.chunks:
            raise SystemExit(f"{args.part} has {row['chunks']} chunks of {args.c}")
        append_row(args.csv, row | shared)


# ---- ratios ---------------------------------------------------------------------------------------------------------


def chunk_means(row: dict[str, str]) -> NDArray[np.float64]:
    return np.array([float(x) for x in row["kld_chunks"].split()])


def ratio(ours: NDArray[np.float64], theirs: NDArray[np.float64], n_draws: int = 10_000) -> tuple[float, float, float]:
    """(ratio of the means, its 95% interval) by drawing chunks, the same ones for both"""
    drawn = np.random.default_rng(0).integers(0, len(ours), (n_draws, len(ours)))
    ratios = ours[drawn].mean(axis=1) / theirs[drawn].mean(axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(ours.mean() / theirs.mean()), float(low), float(high)


def print_ratios(args: argparse.Namespace) -> None:
    def place(row: dict[str, str]) -> tuple[str, ...]:
        return tuple(row[name] for name in ("model", "text", "text_sha256", "n_ctx", "chunks", "act"))

    for where, group in itertools.groupby(sorted(read_rows(args.csv), key=place), place):
        rows = list(group)
        model, text, _, n_ctx, chunks, act = where
        print(f"\n{model}, {text}, {chunks} x {n_ctx}, act={act}")
        print(f"{'ours':<18} {'bits':>5} {'at 32k':>6} {'same top':>8}   {'theirs':<18} {'bits':>5} {'ratio':>8}  95%")
        theirs = [row for row in rows if row["engine"] == "llama.cpp"]
        for our, their in itertools.product((row for row in rows if row["engine"] == "kvmix"), theirs):
            value, low, high = ratio(chunk_means(our), chunk_means(their))
            name = our["cache"] + (" strict" if our["strict"] == "True" else "")
            sizes = f"{float(our['bits']):5.2f} {float(our['bits_32k']):6.2f} {float(our['same_top']):8.2%}"
            print(
                f"{name:<18} {sizes}   {their['cache']:<18} {float(their['bits']):5.2f} "
                f"{value:8.4f}  {low:.4f} .. {high:.4f}"
            )


# ---- the command ----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    def command(name: str, function: Callable[[argparse.Namespace], None], output: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name)
        made.set_defaults(run=function)
        made.add_argument(output, type=Path)
        return made

    def add_run(made: argparse.ArgumentParser, n_ctx: int, n_chunks: int) -> None:
        made.add_argument("model", type=Path)
        made.add_argument("part", choices=texts.NAMES)
        made.add_argument("-c", type=int, default=n_ctx)
        made.add_argument("--chunks", type=int, default=n_chunks)
        made.add_argument("-t", type=int, default=2)
        made.add_argument("--act", choices=("f32", "q8"), default="f32", help="of llama.cpp: what its weights imply")

    llama = command("llama", run_llama, "csv")
    add_run(llama, 2048, 16)
    llama.add_argument("--cache", nargs="+", default=LLAMA_CACHES)
    ours = command("kvmix", run_kvmix, "csv")
    add_run(ours, 2048, 16)
    ours.add_argument("--sweep", required=True)
    ours.add_argument("--strict", action="store_true")
    command("ratios", print_ratios, "csv")
    logits = command("logits", write_logits, "file")
    add_run(logits, 512, 4)
    logits.add_argument("--cache", default="f16/f16")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
