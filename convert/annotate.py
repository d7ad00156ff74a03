"""python -m kvmix.convert annotate IN OUT: decides a recipe and writes it into a copy of the file, or beside it.

Written keys (flat arrays, one entry a layer; types by name; runtime/recipe.h says what the engine reads):

    kvmix.version                          uint32, 1
    kvmix.recipe                           string, the types as text
    kvmix.k_type, kvmix.v_type             strings
    kvmix.window, kvmix.sink               uint32, tokens
    kvmix.method                           string, "ladder by spectral"
    kvmix.budget_bits                      float32, the mean bits a value that were asked for
    kvmix.{k,v}_norm.{frobenius,spectral}  float32s, of W_K and W_V
    kvmix.gap.{frobenius,spectral}         float32, mean log2 of K's norm over V's
    kvmix.k_score, kvmix.v_score           float32s, the score that decided

A sidecar, MODEL.kvmix.gguf beside MODEL.gguf, has general.architecture, the keys above, no tensors, and the names of
what it belongs to:

    kvmix.sidecar.file_bytes               uint64, the size of MODEL.gguf
    kvmix.sidecar.header_crc32             uint32, CRC-32 (zlib's) of its bytes before the tensor data, that is of
                                           everything up to the aligned end of the tensor list, the padding included
"""

import argparse
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from kvmix._cli import integer, note, number
from kvmix.errors import ArgumentError

from . import allocate, rewrite
from .decide import SCORES, Decision, Room, Wish, check, decide
from .kvtypes import TYPES
from .norms import ModelNorms, ratio
from .norms_cli import measure_weights, move, read_text
from .recipe import pair_text
from .rewrite import Kind, Value
from .validate import CheckedModel

VERSION = 1
N_CTX_SHOWN = 8192
UNITS = {"": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


# ---- the command line ------------------------------------------------------------------------------------------------


def add_args(p: argparse.ArgumentParser) -> None:
    p.add_argument("input", type=Path, metavar="IN", help="a GGUF file")
    p.add_argument("output", type=Path, nargs="?", metavar="OUT", help="where its copy with the recipe goes")
    p.add_argument("--sidecar", action="store_true", help="write IN.kvmix.gguf beside IN instead: metadata only")
    p.add_argument("--force", action="store_true", help="replace an output that is there already")
    what = p.add_argument_group("what to decide")
    size = what.add_mutually_exclusive_group()
    size.add_argument(
        "--budget", type=number(0, above=True), default=3.8, metavar="BITS", help="mean bits a value (default: 3.8)"
    )
    size.add_argument("--memory", type=memory_size, metavar="SIZE", help="room for the cache at --ctx: 2GiB, 500MB")
    what.add_argument("--ctx", type=integer(1), metavar="N", help="tokens that must fit into --memory")
    what.add_argument(
        "--nominal", action="store_true", help="count the codes' widths only, as the paper does, not what a page takes"
    )
    what.add_argument("--types", type=type_names, metavar="LIST", help="types to choose from, as q2,q3,q4,q6,q8")
    what.add_argument("--window", type=integer(0, 1 << 24), default=128, metavar="N", help="recent tokens kept in f16")
    what.add_argument("--sink", type=integer(0, 64), default=16, metavar="N", help="first tokens kept in f16")
    how = p.add_argument_group("how")
    how.add_argument(
        "--score", choices=SCORES, default="spectral", help="what says how many bits a layer needs (default: spectral)"
    )
    how.add_argument(
        "--solver", choices=allocate.SOLVERS, help="default: ladder; exact for measured scores, which are worth it"
    )
    how.add_argument("--text", type=Path, metavar="TEXT", help="what measured and cache scores are measured on")
    how.add_argument("--check", type=Path, metavar="TEXT", help="measure recipe and nearest uniform pairs on it")
    how.add_argument(
        "--tokens", type=integer(512), default=1024, metavar="N", help="of a text to measure on (default: 1024)"
    )


def memory_size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMG]i?B|)", text)
    if match is None or match[2] not in UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; it looks like 2GiB, 500MB or 1000000")
    return int(float(match[1]) * UNITS[match[2]])


def type_names(text: str) -> tuple[str, ...]:
    """Ascending in bits."""
    names = {name.strip() for name in text.split(",")}
    if unknown := names - set(TYPES):
        raise argparse.ArgumentTypeError(f"{min(unknown)!r} is no KV type; there are {' '.join(TYPES)}")
    return tuple(name for name in TYPES if name in names)


def check_args(args: argparse.Namespace) -> None:
    if (args.output is None) != args.sidecar:
        raise ArgumentError("give OUT, or --sidecar to write the recipe beside the file")
    if (args.memory is None) != (args.ctx is None):
        raise ArgumentError("--memory and --ctx belong together: so much room for so many tokens")
    if args.score in ("measured", "cache") and args.text is None:
        raise ArgumentError(f"--score {args.score} runs the model on a text: give --text")
    args.solver = args.solver or ("exact" if args.score == "measured" else "ladder")


# ---- the keys --------------------------------------------------------------------------------------------------------


def recipe_keys(wish: Wish, norms: ModelNorms, decision: Decision) -> dict[str, Value]:
    keys = {
        "kvmix.version": Value(Kind.UINT32, VERSION),
        "kvmix.recipe": Value(Kind.STRING, decision.recipe.text),
        "kvmix.k_type": Value(Kind.STRING, decision.recipe.k),
        "kvmix.v_type": Value(Kind.STRING, decision.recipe.v),
        "kvmix.window": Value(Kind.UINT32, wish.window),
        "kvmix.sink": Value(Kind.UINT32, wish.sink),
        "kvmix.method": Value(Kind.STRING, decision.method),
        "kvmix.budget_bits": Value(Kind.FLOAT32, decision.budget),
    }
    for score in ("frobenius", "spectral"):
        k, v = norms.scores(score)
        keys[f"kvmix.k_norm.{score}"] = Value(Kind.FLOAT32, k)
        keys[f"kvmix.v_norm.{score}"] = Value(Kind.FLOAT32, v)
        keys[f"kvmix.gap.{score}"] = Value(Kind.FLOAT32, norms.gap(score))
    keys["kvmix.k_score"] = Value(Kind.FLOAT32, decision.k_scores)
    keys["kvmix.v_score"] = Value(Kind.FLOAT32, decision.v_scores)
    return keys


# ---- in people's words -----------------------------------------------------------------------------------------------


def describe(wish: Wish, model: CheckedModel, norms: ModelNorms, decision: Decision) -> Iterator[str]:
    layers, recipe = decision.layers, decision.recipe
    yield f"{model.path.name}: {norms.family}, {len(layers)} layers"
    for score in ("frobenius", "spectral"):
        k, v = norms.scores(score)
        n_ahead = sum(a > b for a, b in zip(k, v, strict=True))
        yield (
            f"keys {ratio(k, v):.1f}x values by {score} norm (a gap of {norms.gap(score):.2f} bits), larger in "
            f"{n_ahead} of {len(layers)} layers"
        )
    yield from decision.remarks
    counts = Counter(recipe.pairs).most_common()
    yield f"recipe {recipe.text} ({decision.method})"
    yield "layers: " + ", ".join(f"{n} at {pair_text(pair)}" for pair, n in counts)
    nominal = f" ({recipe.nominal_bits(layers):.2f} nominal)" if wish.nominal else ""
    room = wish.budget if isinstance(wish.budget, Room) else None
    asked = f"to fit into {room.n_bytes} bytes at {room.n_ctx} tokens" if room else f"of {decision.budget:.4g} allowed"
    yield f"{recipe.bits(layers):.2f} bits a packed value{nominal}, {asked}"
    for n_ctx in sorted({N_CTX_SHOWN, room.n_ctx if room else N_CTX_SHOWN}):
        ours, f16 = (model.memory(kv, n_ctx, wish.window, wish.sink) for kv in (recipe.text, "f16"))
        yield (
            f"cache at {n_ctx} tokens: {ours.kv_bytes / 2**20:.1f} MiB instead of {f16.kv_bytes / 2**20:.1f}; "
            f"{ours.bits_full:.2f} bits a value, window and sinks included"
        )


def run(args: argparse.Namespace) -> int:
    check_args(args)
    source: Path = args.input
    out: Path = source.with_name(source.name.removesuffix(".gguf") + ".kvmix.gguf") if args.sidecar else args.output
    rewrite.check_output(source, out, args.force)
    wish = Wish(
        budget=args.budget if args.memory is None else Room(args.memory, args.ctx),
        nominal=args.nominal,
        types=args.types,
        score=args.score,
        solver=args.solver,
        text=b"" if args.text is None else read_text(args.text),
        n_tokens=args.tokens,
        window=args.window,
        sink=args.sink,
    )
    check_text = None if args.check is None else read_text(args.check)
    model = CheckedModel(source)
    header = rewrite.read_header(source)
    if args.sidecar and "kvmix.version" in header.keys:
        raise ArgumentError(f"{source} carries a recipe itself, which goes before a sidecar's: write a copy, OUT")
    norms = measure_weights(source)
    decision = decide(wish, model, norms)
    print(*describe(wish, model, norms, decision), sep="\n")
    if check_text is not None:
        print(*check(wish, model, decision, check_text), sep="\n")

    keys = recipe_keys(wish, norms, decision)
    if args.sidecar:
        rewrite.write_sidecar(header, out, keys)
    else:
        with tqdm(desc="writing", unit="B", unit_scale=True, disable=None, leave=False) as bar:
            rewrite.write_annotated(source, header, out, keys, lambda done, total: move(bar, done, total))
    note(f"wrote {out}")
    return 0
