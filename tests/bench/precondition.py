"""What each part of K's way into a page is worth: mean, balance, clamp, rotation, page size, 8-bit page vectors.

    python tests/bench/precondition.py MODEL TEXT --csv results/precondition.csv [--chunks 4] [--types q4,q3]

Every variant is a page hook (tests/ref/study.py) in strict mode with 16 sinks, V in f16: the damage of K alone. Mean
KLD against the f16 cache, act=f32, chunks of 2048, second half scored; all variants of a type run in lockstep beside
one f16 run. A row holds the chunks' means, so that variants can be compared pair by pair. Rows that the file already
has are not measured again. --in-use: window 128 instead of strict mode.
"""

import argparse
import csv
import hashlib
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

import kvmix
from kvmix._sweep import Cache, Lineup, choose_batch, cut, with_bos
from kvmix.convert.source import Attention, open_source
from ref.study import CODECS, Codec, Precondition, Study, min_max

N_CTX, N_BATCH = 2048, 512
VARIANTS: dict[str, Precondition] = {
    "mean, balance first, H (default)": Precondition(),
    "plain": Precondition(mean=False, balance="none", rotation=0),
    "H": Precondition(mean=False, balance="none"),
    "mean, H": Precondition(balance="none"),
    "balance first, H": Precondition(mean=False),
    "mean, balance first, no rotation": Precondition(rotation=0),
    "mean, balance page, H": Precondition(balance="page"),
    "mean, balance weights, H": Precondition(balance="weights"),
    "clamp 4": Precondition(clamp=4),
    "clamp 64": Precondition(clamp=64),
    "H64": Precondition(rotation=64),
    "statistics over 64": Precondition(statistics=64),
    "statistics over 64, balance page": Precondition(statistics=64, balance="page"),
    "page vectors in 8 bits": Precondition(vector_bits=8),
}
MIN_MAX = {
    "min-max g64 plain": Precondition(mean=False, balance="none", rotation=0),
    "min-max g64, H": Precondition(mean=False, balance="none"),
    "min-max g64, mean, balance first, H": Precondition(),
}
FIELDS = [
    "model", "text", "text_sha256", "chunks", "mode", "type", "variant", "kld", "kld_se", "same_top", "kld_chunks",
]  # fmt: skip


def rms_of_rows(matrix: np.ndarray, bias: np.ndarray | None, gain: np.ndarray | None, norm: np.ndarray) -> np.ndarray:
    """[n_head][d]: the size of each channel when the input is white under the norm's gains; QK-norm replaces it."""
    size = np.sqrt(np.square(matrix.astype(np.float64) * norm).sum(axis=1) + (0 if bias is None else np.square(bias)))
    heads = size.reshape(-1, len(gain) if gain is not None else len(size))
    if gain is not None:
        heads = heads / np.sqrt(np.square(heads).mean(axis=1, keepdims=True)) * np.abs(gain)
    return heads


def balances(layer: Attention, neighbours: bool) -> np.ndarray:
    """[n_head_kv][d_k] from weights alone: RoPE turns pairs, so the two channels of a pair share their size."""
    d, group = layer.d_k, layer.n_head // layer.n_head_kv
    k = rms_of_rows(layer.k, layer.k_bias, layer.k_norm, layer.attn_norm).reshape(layer.n_head_kv, d)
    q = rms_of_rows(layer.q, layer.q_bias, layer.q_norm, layer.attn_norm).reshape(layer.n_head_kv, group, d)
    q = np.sqrt(np.square(q).mean(axis=1))

    def paired(x: np.ndarray) -> np.ndarray:
        pairs = x.reshape(-1, d // 2, 2) if neighbours else x.reshape(-1, 2, d // 2).swapaxes(1, 2)
        mean = np.broadcast_to(np.sqrt(np.square(pairs).mean(axis=2, keepdims=True)), pairs.shape)
        return (mean if neighbours else mean.swapaxes(1, 2)).reshape(x.shape)

    k, q = (np.maximum(x, 2**-10 * x.max(axis=1, keepdims=True)) for x in (paired(k), paired(q)))
    ratio = np.sqrt(k / q)
    return np.clip(ratio / np.exp(np.log(ratio).mean(axis=1, keepdims=True)), 1 / 16, 16)


def studies(kv_type: str, path: Path, d: int, only: list[str] | None) -> dict[str, Study]:
    source = open_source(path)
    weights = [balances(source.layer(i), source.family == "llama") for i in range(source.n_layer)]
    codec: Codec = CODECS[kv_type]
    found = {
        name: Study(codec, precondition=p, weights=lambda layer, head: weights[layer][head])
        for name, p in VARIANTS.items()
        if not (name == "H64" and d <= 64)
    }
    found |= {name: Study(min_max(int(kv_type[1:]), 64), precondition=p) for name, p in MIN_MAX.items()}
    return {name: study for name, study in found.items() if only is None or name in only}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", type=Path)
    p.add_argument("text", type=Path)
    p.add_argument("--csv", type=Path, required=True)
    p.add_argument("--chunks", type=int, default=4)
    p.add_argument("--skip-chunks", type=int, default=0)
    p.add_argument("--types", default="q4,q3")
    p.add_argument("--in-use", action="store_true")
    p.add_argument("--only", help="names of variants, separated by ;")
    p.add_argument("--together", type=int, default=6, help="variants beside one f16 run: each takes a session's memory")
    args = p.parse_args()
    text = args.text.read_bytes()
    mode = "window 128, sink 16" if args.in_use else "strict, sink 16"
    with kvmix.Model(args.model) as model:
        chunks = with_bos(model, cut(model, text, N_CTX))[args.skip_chunks :][: args.chunks]
        info = model.info
        n_batch = choose_batch(1 + args.together, N_CTX, info.n_vocab)
        common = {"n_ctx": N_CTX, "n_batch": n_batch, "n_logits": n_batch, "act": "f32", "n_seq_max": 1}
        common |= {"n_checkpoint": 0, "kv": "f16", "sink": 16}
        head = {"model": args.model.stem, "text": args.text.stem, "text_sha256": hashlib.sha256(text).hexdigest()[:16]}
        for kv_type in args.types.split(","):
            key = head | {"chunks": str(len(chunks)), "mode": mode, "type": kv_type}
            todo = studies(kv_type, args.model, info.head_dim, args.only.split(";") if args.only else None)
            done = {row["variant"] for row in read(args.csv) if key.items() <= row.items()}
            names = [name for name in todo if name not in done]
            for first in range(0, len(names), args.together):
                some = {name: todo[name] for name in names[first : first + args.together]}
                measure(model, chunks, n_batch, common, some, not args.in_use, key, args.csv)


def measure(model, chunks, n_batch, common, studies, strict, key, path) -> None:  # type: ignore[no-untyped-def]
    base = Cache(model, common | {"strict": False}, "f16")
    caches = {
        name: Cache(model, common | {"strict": strict, "page_hook": study}, name) for name, study in studies.items()
    }
    lineup = Lineup([*caches.values()], base)
    for i, chunk in enumerate(tqdm(chunks, desc=f"{key['model']} {key['type']}")):
        lineup.evaluate(i, chunk, n_batch)
    for name, cache in caches.items():
        result = cache.divergence.result()
        append(path, key | {
            "variant": name, "kld": f"{result.mean:.6g}", "kld_se": f"{result.se or 0:.2g}",
            "same_top": f"{result.same_top:.4f}", "kld_chunks": " ".join(f"{x:.5g}" for x in result.chunks),
        })  # fmt: skip
        print(f"{key['model']:<40} {key['type']} {name:<40} {result.mean:.5f} +- {result.se or 0:.5f}", flush=True)
        cache.session.close()
    base.session.close()


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, row: dict[str, str]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
