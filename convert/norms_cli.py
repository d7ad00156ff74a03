"""python -m kvmix.convert norms MODEL: what the weights say about keys and values, layer by layer.

F and S are the Frobenius and spectral norms of W_K and W_V, gap is log2 of K's over V's: by so many bits keys would
lead. gain is the rms of the gains of a norm on each key head, where the family has one (QK-norm), bias the norm of K's
bias; eff is the effective score, which takes these and W_Q and W_O in (convert/norms.py has the formula). Marked are
layers where K is not above V. MODEL is a GGUF file or a Hugging Face folder with safetensors.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from kvmix import _cli
from kvmix.errors import ArgumentError, ModelIOError

from . import norms_plot
from .cache_norms import N_TOKENS, CacheLayer, CacheSide, cache_norms, scores
from .norms import SCORES, LayerNorms, ModelNorms, gap, model_norms, ratio

MARKS = {"frobenius": "F", "spectral": "S", "effective": "eff"}


def add_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", type=Path, help="a GGUF file, or a Hugging Face folder")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("--plot", metavar="FILE", help="a picture of the norms by layer (.png, .svg, .pdf)")
    parser.add_argument(
        "--cache", metavar="TEXT", type=Path, help="also run the model over a text and look at what its cache holds"
    )
    parser.add_argument(
        "--tokens", type=_cli.integer(128), default=N_TOKENS, metavar="N", help="of that text (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    if args.plot is not None:
        norms_plot.check(args.plot)
    if args.cache is not None and args.model.is_dir():
        raise ArgumentError(f"--cache runs the model, which a GGUF file is needed for: {args.model} is a folder")
    text = None if args.cache is None else read_text(args.cache)
    norms = measure_weights(args.model)
    cache = None if text is None else measure_cache(args.model, text, args.tokens)
    if args.plot is not None:
        norms_plot.save(args.plot, norms, cache)
    if args.json:
        print(json.dumps(as_json(norms, cache)))
    else:
        print(*weight_table(norms), sep="\n")
        if cache is not None:
            print("", *cache_table(cache), sep="\n")
    return 0


def read_text(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise ModelIOError(f"cannot read the text {path}: {e.strerror}") from None


def measure_weights(path: Path) -> ModelNorms:
    with tqdm(desc="norms", unit="layer", disable=None, leave=False) as bar:
        return model_norms(path, lambda done, total: move(bar, done, total))


def measure_cache(path: Path, text: bytes, n_tokens: int) -> tuple[CacheLayer, ...]:
    from .validate import CheckedModel

    with tqdm(desc="cache", unit="token", disable=None, leave=False) as bar:
        return cache_norms(CheckedModel(path).model, text, n_tokens, lambda done, total: move(bar, done, total))


def move(bar: Any, done: int, total: int) -> None:
    bar.total = total
    bar.update(done - bar.n)


# ---- what is said ---------------------------------------------------------------------------------------------------


def weight_table(norms: ModelNorms) -> Iterator[str]:
    yield f"{norms.model}: {norms.family}, {len(norms.layers)} layers, {heads(norms)}"
    yield (
        f"{'layer':>5} {'F_K':>8} {'F_V':>8} {'gap':>6} | {'S_K':>8} {'S_V':>8} {'gap':>6} | {'gain':>6} {'bias':>7} | "
        f"{'eff_K':>9} {'eff_V':>9} {'gap':>6}"
    )
    for i, layer in enumerate(norms.layers):
        yield weight_row(i, layer)
    for score in SCORES:
        k, v = norms.scores(score)
        n_ahead = sum(a > b for a, b in zip(k, v, strict=True))
        yield (
            f"{score}: keys {ratio(k, v):.2f}x values, above them in {n_ahead} of {len(k)} layers, "
            f"gap {gap(k, v):.2f} bits"
        )
    if any(layer.k.gain is not None for layer in norms.layers):
        yield "QK-norm: the gains set the size of the keys, W_K does not; the effective score counts them"


def heads(norms: ModelNorms) -> str:
    kinds = sorted(set(zip(norms.n_head_kv, norms.d_k, norms.d_v, strict=True)))
    return ", ".join(f"{n} KV heads of {d_k}" + (f" and {d_v}" if d_k != d_v else "") for n, d_k, d_v in kinds)


def weight_row(index: int, layer: LayerNorms) -> str:
    k, v = layer.k, layer.v
    gaps = {score: np.log2(getattr(k, score) / getattr(v, score)) for score in SCORES}
    behind = [mark for score, mark in MARKS.items() if getattr(k, score) <= getattr(v, score)]
    row = f"{index:5} {k.frobenius:8.2f} {v.frobenius:8.2f} {gaps['frobenius']:6.2f} | "
    row += f"{k.spectral:8.2f} {v.spectral:8.2f} {gaps['spectral']:6.2f} | "
    row += f"{optional(k.gain, 6)} {optional(k.bias, 7)} | "
    row += f"{k.effective:9.3g} {v.effective:9.3g} {gaps['effective']:6.2f}"
    return row + (f"  K <= V: {' '.join(behind)}" if behind else "")


def optional(value: float | None, width: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{width}.2f}"


def cache_table(layers: Sequence[CacheLayer]) -> Iterator[str]:
    """Norms over all heads; errors as means over heads."""
    bits = (2, 3, 4)
    titles = [f"{side}{b} {codec}" for codec in ("min-max", "ours") for b in bits for side in ("K", "V")]
    yield f"the cache: Frobenius norm, largest singular value of a head, mean squared error at {bits} bits"
    yield f"{'layer':>5} {'F_K':>8} {'F_V':>8} {'gap':>6} | {'S_K':>8} {'S_V':>8} | " + " ".join(
        f"{t:>10}" for t in titles
    )
    k_scores, v_scores = scores(layers)
    for i, (layer, k, v) in enumerate(zip(layers, k_scores, v_scores, strict=True)):
        errors = [
            np.mean([getattr(head, f"mse_{codec}")[b] for head in side])
            for codec in ("min_max", "ours")
            for b in bits
            for side in (layer.k, layer.v)
        ]
        top_k, top_v = (max(head.spectral for head in side) for side in (layer.k, layer.v))
        yield (
            f"{i:5} {k:8.1f} {v:8.1f} {np.log2(k / v):6.2f} | {top_k:8.1f} {top_v:8.1f} | "
            + " ".join(f"{error:10.3g}" for error in errors)
        )
    yield f"cache: keys {ratio(k_scores, v_scores):.2f}x values, gap {gap(k_scores, v_scores):.2f} bits"


def as_json(norms: ModelNorms, cache: Sequence[CacheLayer] | None) -> dict[str, Any]:
    """Each score as {"w_k": [...], "w_v": [...]}, one number a layer, as the paper's code has them in files."""
    result: dict[str, Any] = {
        "model": norms.model,
        "family": norms.family,
        "n_head_kv": norms.n_head_kv,
        "d_k": norms.d_k,
        "d_v": norms.d_v,
        **{score: dict(zip(("w_k", "w_v"), norms.scores(score), strict=True)) for score in SCORES},
        "gap": {score: norms.gap(score) for score in SCORES},
        "bias": {"w_k": [layer.k.bias for layer in norms.layers], "w_v": [layer.v.bias for layer in norms.layers]},
        "k_norm_gain": [layer.k.gain for layer in norms.layers],
    }
    if cache is not None:
        result["cache"] = [{"k": list(map(head_json, c.k)), "v": list(map(head_json, c.v))} for c in cache]
    return result


def head_json(head: CacheSide) -> dict[str, Any]:
    return {"spectral": head.spectral, **asdict(head)}
