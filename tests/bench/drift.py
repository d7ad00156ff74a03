"""Does the damage of a packed cache grow as a text is generated? KLD against position.

    python tests/bench/drift.py MODEL TEXT --recipes k4v4,k4v3,k3v3,k4v2 [--prompts 8] [--csv FILE]

For each prompt (512 tokens of the text) the f16 cache writes 512 greedy tokens; every recipe then reads the same 1,024
tokens (what a row sees depends on its position alone, so one batch is as good as token by token), and its predictions
of the second half are compared with the f16 cache's, act=f32. Printed: the mean KLD of each quarter, and the slope of
KLD against position, per 100 tokens, with its 95% interval over prompts.
"""

import argparse
import csv
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

import kvmix
from kvmix._sweep import Cache, Lineup, choose_batch, cut, parse_settings, with_bos

N = 512
FIELDS = ["model", "text", "recipe", "prompts", "q1", "q2", "q3", "q4", "slope_per_100", "slope_low", "slope_high"]


def written(model: kvmix.Model, prompts: np.ndarray) -> np.ndarray:
    """[n][N] -> [n][2 N]: each prompt and what greedy sampling of the f16 cache makes of it, ends of turns ignored."""
    out = []
    with model.session(n_ctx=2 * N, kv="f16", act="f32", n_seq_max=1) as session:
        for prompt in tqdm(prompts, desc="writing"):
            ids = prompt.tolist()
            session.sync(ids)
            for _ in range(N):
                ids.append(int(session.logits.argmax()))
                session.decode([kvmix.Row(ids[-1], True)])
            session.rewind(0)
            out.append(ids)
    return np.array(out, np.int32)


def slope(kld: np.ndarray) -> tuple[float, float, float]:
    """kld [n_prompt][n] -> per 100 tokens: mean over prompts of the least-squares slope, and its 95% interval."""
    x = np.arange(kld.shape[1]) - (kld.shape[1] - 1) / 2
    slopes = 100 * (kld @ x) / (x @ x)
    half = 1.96 * slopes.std(ddof=1) / np.sqrt(len(slopes))
    return float(slopes.mean()), float(slopes.mean() - half), float(slopes.mean() + half)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", type=Path)
    p.add_argument("text", type=Path)
    p.add_argument("--recipes", default="k4v4,k4v3,k3v3,k4v2")
    p.add_argument("--prompts", type=int, default=8)
    p.add_argument("--csv", type=Path)
    args = p.parse_args()
    settings = parse_settings(args.recipes)
    with kvmix.Model(args.model) as model:
        chunks = written(model, with_bos(model, cut(model, args.text.read_bytes(), N))[: args.prompts])
        n_batch = choose_batch(1 + len(settings), 2 * N, model.info.n_vocab)
        options = {"n_ctx": 2 * N, "n_batch": n_batch, "n_logits": n_batch, "n_seq_max": 1, "n_checkpoint": 0}
        options |= {"act": "f32", "strict": False}
        caches = [Cache(model, options | setting.options(), setting.text) for setting in settings]
        lineup = Lineup(caches, Cache(model, options | {"kv": "f16"}, "f16"))
        for i, chunk in enumerate(tqdm(chunks, desc="reading")):
            lineup.evaluate(i, chunk, n_batch)
        rows = []
        for cache in caches:
            kld = np.array(cache.divergence.values).reshape(len(chunks), -1)
            quarters = [float(part.mean()) for part in np.array_split(kld, 4, axis=1)]
            mean, low, high = slope(kld)
            print(f"{cache.name:<12}" + "".join(f"{q:10.5f}" for q in quarters)
                  + f"   slope {mean:+.6f} per 100 tokens [{low:+.6f}, {high:+.6f}]")  # fmt: skip
            values = [args.model.stem, args.text.stem, cache.name, len(chunks), *quarters, mean, low, high]
            rows.append([f"{v:.4g}" if isinstance(v, float) else v for v in values])
    if args.csv:
        new = not args.csv.exists()
        with args.csv.open("a", newline="") as file:
            csv.writer(file).writerows([FIELDS, *rows] if new else rows)


if __name__ == "__main__":
    sys.exit(main())
