"""The README's table: what each recipe costs in quality, and saves in bytes and time, on one model.

    python tests/bench/recipes.py MODEL.gguf TEXT [--chunks 8] [-c 2048] [-d 8192] [-r 5] [--csv FILE]

Quality: python -m kvmix.perplexity --kld (float activations, default window and sinks), bits averaged over the scored
positions. Memory: the cache's predicted bytes and the bits a value of a full context of -d tokens. Speed: tokens
decoded one by one behind -d tokens, as a ratio to the f16 cache in the same run; all sessions are filled first, then
take turns, and the medians of -r rounds of 16 tokens are compared. Results hold for the machine named in the output.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from compare import cpu_name

import kvmix

RECIPES = ["f16", "k8v8", "k4v4", "k4v3", "k3v3", "k4v2"]
ROUND = 16  # tokens


def quality(model: str, text: str, recipe: str, n_ctx: int, chunks: int) -> dict[str, float]:
    command = [sys.executable, "-m", "kvmix.perplexity", model, text, "--kv", recipe, "--kld", "--json"]
    run = subprocess.run(
        [*command, "-c", str(n_ctx), "--chunks", str(chunks)], stdout=subprocess.PIPE, check=True, text=True
    )
    row: dict[str, float] = json.loads(run.stdout)
    return row


def token_times(model: kvmix.Model, depth: int, rounds: int) -> dict[str, float]:
    """Median seconds of a token behind depth tokens, for every recipe."""
    sessions = {}
    for recipe in RECIPES:
        session = model.session(n_ctx=depth + (rounds + 1) * ROUND, kv=recipe, n_seq_max=1, n_checkpoint=0)
        session.sync([(7 * i) % 1000 + 10 for i in range(depth)])
        sessions[recipe] = session
    times: dict[str, list[float]] = {recipe: [] for recipe in RECIPES}
    for _ in range(rounds):
        for recipe, session in sessions.items():
            start = time.perf_counter()
            for _ in range(ROUND):
                session.sync([*session.tokens, 10])
            times[recipe].append((time.perf_counter() - start) / ROUND)
    return {recipe: statistics.median(values) for recipe, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("-c", type=int, default=2048)
    parser.add_argument("-d", type=int, default=8192)
    parser.add_argument("-r", type=int, default=5)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    model = kvmix.Model(args.model)
    times = token_times(model, args.d, args.r)
    rows = []
    for recipe in RECIPES:
        plan = model.plan(n_ctx=args.d, kv=recipe, n_seq_max=1)
        row: dict[str, object] = {"recipe": recipe, f"bits_at_{args.d}": round(plan.bits_full, 2)}
        row[f"kv_mib_at_{args.d}"] = round(plan.bits_full / 8 * values_per_token(model) * args.d / 2**20, 1)
        row[f"token_time_at_{args.d}"] = round(times[recipe] / times["f16"], 3)
        if recipe != "f16":
            q = quality(args.model, args.text, recipe, args.c, args.chunks)
            row |= {f"bits_at_{args.c}": round(q["bits"], 2)}
            row |= {name: f"{q[name]:.3g}" for name in ("kld_mean", "kld_se", "kld_p99", "kld_p999", "same_top")}
            row |= {"chunks": q["chunks"], "text_sha256": q["text_sha256"]}
        rows.append(row | {"model": Path(args.model).name, "cpu": cpu_name()})
        print(json.dumps(rows[-1]), flush=True)
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
            writer.writeheader()
            writer.writerows(rows)


def values_per_token(model: kvmix.Model) -> int:
    with model.session(n_ctx=128, kv="f16", n_seq_max=1, n_checkpoint=0) as session:
        return sum(layer.n_head_kv * (layer.d_k + layer.d_v) for layer in session.layers)


if __name__ == "__main__":
    main()
