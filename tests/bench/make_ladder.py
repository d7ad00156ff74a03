"""Makes convert/ladder.csv: what each pair of types costs, in all layers alike, on real models.

    python tests/bench/make_ladder.py MODEL.gguf:NAME ... [--chunks 2] > convert/ladder.csv

Mean KLD against the f16 cache, strict, 16 sinks, act=f32, over the first chunks of 2048 tokens of Kim and of the
calibration text (texts.py), second half scored, all pairs in lockstep. bits: of a packed value, both sides, at a head
size of 64.
"""

import argparse
import csv
import sys
from pathlib import Path

import texts
from tqdm import tqdm

import kvmix
from kvmix._sweep import Cache, Lineup, choose_batch, cut, with_bos
from kvmix.convert.recipe import Layer, Recipe, pair_of

PAIRS = "k3v2 k4v2 k3v3 k4v3 k4v4 k5v4 k5v5 k6v4 k6v5 k6v6 k8v4 k8v6 k8v8".split()  # noqa: SIM905
N_CTX = 2048
PARTS = ("kim", "calibration")


def divergences(path: Path, n_chunks: int) -> list[float]:
    """Mean KLD of each pair."""
    with kvmix.Model(path) as model:
        n_batch = choose_batch(1 + len(PAIRS), N_CTX, model.info.n_vocab)
        options = {"n_ctx": N_CTX, "n_batch": n_batch, "n_logits": n_batch, "n_seq_max": 1, "n_checkpoint": 0}
        options |= {"act": "f32", "sink": 16, "strict": True}
        caches = [Cache(model, options | {"kv": pair}, pair) for pair in PAIRS]
        lineup = Lineup(caches, Cache(model, options | {"kv": "f16", "strict": False}, "f16"))
        chunks = [chunk for part in PARTS for chunk in with_bos(model, cut(model, texts.part(part), N_CTX))[:n_chunks]]
        for i, chunk in enumerate(tqdm(chunks, desc=path.stem)):
            lineup.evaluate(i, chunk, n_batch)
        return [cache.divergence.result().mean for cache in caches]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("models", nargs="+", metavar="MODEL.gguf:NAME")
    p.add_argument("--chunks", type=int, default=2, help="of each text (default: 2)")
    args = p.parse_args()
    paths, names = zip(*(model.rsplit(":", 1) for model in args.models), strict=True)
    columns = [divergences(Path(path), args.chunks) for path in paths]
    layer = (Layer(1, 64, 64),)
    out = csv.writer(sys.stdout, lineterminator="\n")
    out.writerow(["pair", "bits", *names])
    rows = [(Recipe.uniform(pair_of(pair), 1).bits(layer), i) for i, pair in enumerate(PAIRS)]
    for bits, i in sorted(rows):
        out.writerow([PAIRS[i], f"{bits:g}", *(f"{column[i]:.4g}" for column in columns)])


if __name__ == "__main__":
    main()
