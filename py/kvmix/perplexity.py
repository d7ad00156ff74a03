"""python -m kvmix.perplexity MODEL TEXT: perplexity in llama.cpp's protocol, and what a KV cache costs in quality.

The text is tokenized once and cut into chunks of -c tokens (512), each evaluated as a fresh sequence; where the file
asks for a BOS, it takes the place of a chunk's first token. The second half is scored: positions n_ctx/2 .. n_ctx-2
predict their next token.

--kld runs the same tokens through a second session whose cache is f16, and compares the predictions position by
position. Both run with act=f32: 8-bit activations re-roll their rounding at every small change, which alone shows as a
divergence. --floor measures that one: the f16 cache with 8-bit activations, against itself without.
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
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from . import _cli
from ._model import Model
from ._score import Divergence, KldResult, Perplexity, Predictions
from ._session import LayerKV, Row, Session
from .errors import ArgumentError, ModelIOError

# Rows whose logits are held in float64 at a time: a vocabulary of 262k tokens makes 2 MiB of each.
SCORED_AT_ONCE = 8


@dataclass
class Cache:
    """A session under measurement, and what was measured."""

    session: Session
    act: str
    perplexity: Perplexity = field(default_factory=Perplexity)
    divergence: Divergence = field(default_factory=Divergence)
    n_scored: int = 0
    bits_sum: float = 0.0

    def decode(self, tokens: NDArray[np.int32], scored: Sequence[bool]) -> None:
        self.session.decode([Row(int(token), want) for token, want in zip(tokens, scored, strict=True)])
        self.n_scored += sum(scored)
        self.bits_sum += sum(scored) * self.session.stats.bits_now

    def predictions(self, first: int, n: int) -> Predictions:
        """Of rows first .. first + n - 1 among those scored in the last batch."""
        return Predictions(np.stack([self.session.logits_view(first + i) for i in range(n)]))

    def bits(self, strict: bool) -> float:
        """Physical bits a value, window and sinks included, on average over the scored positions; in strict mode
        nothing but sinks is read in f16, and the bits are those of packed pages."""
        return packed_bits(self.session.layers) if strict else self.bits_sum / self.n_scored


def packed_bits(layers: Sequence[LayerKV]) -> float:
    n_values = sum(128 * layer.n_head_kv * (layer.d_k + layer.d_v) for layer in layers)
    return 8 * sum(layer.page_bytes for layer in layers) / n_values


def cut(model: Model, text: bytes, n_ctx: int, n_chunks: int) -> list[NDArray[np.int32]]:
    """The chunks [n_ctx] of a text; n_chunks below 1 = all."""
    if n_ctx < 4:
        raise ArgumentError(f"a chunk of {n_ctx} tokens leaves nothing to score: give -c 4 or more")
    ids = np.array(model.tokenize(text), dtype=np.int32)
    n_whole = len(ids) // n_ctx
    if n_whole == 0:
        raise ArgumentError(
            f"the text has {len(ids)} tokens, one chunk has {n_ctx}: give a longer text or a smaller -c"
        )
    n_chunks = n_whole if n_chunks < 1 else min(n_chunks, n_whole)
    chunks = [ids[i * n_ctx : (i + 1) * n_ctx] for i in range(n_chunks)]
    if model.info.add_bos:
        for chunk in chunks:
            chunk[0] = model.info.bos
    return chunks


@dataclass(frozen=True)
class Lineup:
    """What runs in lockstep: the measured cache and, with --kld, the f16 base and the floor where it is asked for."""

    measured: Cache
    base: Cache | None = None
    floor: Cache | None = None

    @property
    def caches(self) -> list[Cache]:
        """The first one is what the others are compared with."""
        return [cache for cache in (self.base, self.measured, self.floor) if cache is not None]

    def evaluate(self, chunk: NDArray[np.int32], n_batch: int) -> None:
        """Runs a chunk and scores its second half."""
        for cache in self.caches:
            cache.session.rewind(0)
        for start in range(0, len(chunk), n_batch):
            positions = np.arange(start, min(start + n_batch, len(chunk)))
            scored = (positions >= len(chunk) // 2) & (positions < len(chunk) - 1)
            for cache in self.caches:
                cache.decode(chunk[positions], scored.tolist())
            targets = chunk[positions[scored] + 1]
            for first in range(0, len(targets), SCORED_AT_ONCE):
                self._score(first, targets[first : first + SCORED_AT_ONCE])

    def _score(self, first: int, targets: NDArray[np.int32]) -> None:
        base, *others = self.caches
        expected = base.predictions(first, len(targets))
        base.perplexity.add(expected, targets)
        for cache in others:
            rows = cache.predictions(first, len(targets))
            cache.perplexity.add(rows, targets)
            cache.divergence.add(expected, rows)


def parser() -> _cli.Parser:
    p = _cli.Parser(prog="python -m kvmix.perplexity", description=__doc__)
    _cli.add_model_args(p)
    p.add_argument("text", nargs="?", metavar="TEXT", help="a text file")
    p.add_argument("-f", "--file", metavar="TEXT", help="the same")
    _cli.add_kv_args(p)
    p.set_defaults(ctx_size=512, ubatch_size=128)  # 128 rows of logits fit whatever the vocabulary
    measure = p.add_argument_group("measuring")
    measure.add_argument(
        "--chunks", type=_cli.integer(-1), default=-1, metavar="N", help="stop after N chunks; below 1 = all"
    )
    measure.add_argument(
        "--act", choices=("q8", "f32"), help="activations in the matmuls (default: q8; f32 with --kld)"
    )
    measure.add_argument("--kld", action="store_true", help="compare with the same model's f16 cache")
    measure.add_argument("--floor", action="store_true", help="with --kld: what 8-bit activations alone do to it")
    measure.add_argument("--strict", action="store_true", help="a row reads its own page packed too (-ub 128, 256 ..)")
    measure.add_argument("--json", action="store_true", help="one JSON object instead of text")
    return p


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = parser()
    args: argparse.Namespace = p.parse_args(argv)
    if args.model_flag is not None and args.text is None and args.file is None:
        args.model, args.text = None, args.model  # with -m, a lone positional is the text
    if (args.text is None) == (args.file is None):
        p.error("one text is needed: MODEL TEXT, or -f TEXT")
    args.text = args.text or args.file
    if args.kld and args.act == "q8":
        p.error("--kld is measured with --act f32; --floor adds the row of 8-bit activations")
    if args.floor and not args.kld:
        p.error("--floor is a row beside --kld")
    args.act = args.act or ("f32" if args.kld else "q8")
    return args


def read_text(path: str) -> bytes:
    try:
        text = Path(path).read_bytes()
        text.decode()
    except OSError as error:
        raise ModelIOError(f"cannot read the text {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{path} is not valid UTF-8 at its byte {error.start}") from None
    return text


def open_lineup(model: Model, args: argparse.Namespace, options: dict[str, Any]) -> Lineup:
    def cache(act: str, **changes: Any) -> Cache:
        return Cache(model.session(**options | changes, act=act), act)

    f16 = {"kv": "f16", "k_type": None, "v_type": None}
    return Lineup(
        measured=cache(args.act),
        base=cache("f32", **f16) if args.kld else None,
        floor=cache("q8", **f16) if args.floor else None,
    )


def run(lineup: Lineup, chunks: Sequence[NDArray[np.int32]], n_batch: int, show: bool) -> None:
    """Evaluates all chunks, with a bar on stderr; `show` prints the running perplexities as llama.cpp does."""
    one_terminal = sys.stdout.isatty() and sys.stderr.isatty()  # then the line waits for the bar to end
    line = ""
    bar = tqdm(chunks, unit="chunk", file=sys.stderr, disable=None)
    for i, chunk in enumerate(bar, 1):
        lineup.evaluate(chunk, n_batch)
        ppl, _ = lineup.measured.perplexity.result()
        bar.set_postfix(ppl=f"{ppl:.4f}")
        line += f"[{i}]{ppl:.4f},"
        if show and not one_terminal:
            print(line, end="", flush=True)
            line = ""
    if show:
        print(line)


def kld_fields(cache: Cache | None) -> dict[str, float | None]:
    values = {f.name: None for f in fields(KldResult)} if cache is None else asdict(cache.divergence.result())
    return {name if name == "same_top" else f"kld_{name}": value for name, value in values.items()}


def numbers(lineup: Lineup, strict: bool) -> dict[str, Any]:
    """What was measured, under fixed names; None for what was not."""
    measured = lineup.measured
    stats = measured.session.stats
    ppl, ppl_se = measured.perplexity.result()
    return {
        "recipe": stats.recipe,
        "window": stats.window,
        "sink": stats.sink,
        "strict": strict,
        "act": measured.act,
        "bits": measured.bits(strict),
        "ppl": ppl,
        "ppl_se": ppl_se,
        "ppl_f16": lineup.base.perplexity.result()[0] if lineup.base else None,
        **kld_fields(measured if lineup.base else None),
        "floor": kld_fields(lineup.floor) if lineup.floor else None,
    }


def table(lineup: Lineup, strict: bool) -> Iterator[str]:
    columns = f"{'median':>9} {'99%':>9} {'99.9%':>9} {'same top':>9}"
    yield f"{'cache':<16} {'act':<4} {'bits':>6} {'PPL':>20} {'mean KLD':>22} {columns}"
    for cache in lineup.caches:
        ppl, ppl_se = cache.perplexity.result()
        head = f"{cache.session.stats.recipe:<16} {cache.act:<4} {cache.bits(strict):6.2f}"
        row = f"{head} {f'{ppl:.4f} +/- {ppl_se:.4f}':>20}"
        if cache is not lineup.base:
            k = cache.divergence.result()
            row += f" {f'{k.mean:.6f} +/- {k.se:.6f}':>22} {k.median:9.6f} {k.p99:9.6f} {k.p999:9.6f} {k.same_top:9.2%}"
        yield row
    yield "KLD against the f16 cache of the same model, both with act=f32" + ("; strict" if strict else "")
    if lineup.floor:
        yield "the floor, f16 with act=q8: what 8-bit activations do to it without any quantized cache"


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    resolved = _cli.resolve_model(_cli.model_name(args))
    text = read_text(args.text)
    options = _cli.session_options(args)
    options |= {"n_logits": options["n_batch"], "n_seq_max": 1, "n_checkpoint": 0}
    options |= {"strict": args.strict, "kv_default": resolved.kv_default}
    with Model(resolved.path, mmap=args.mmap) as model:
        n_ctx = options["n_ctx"] or model.info.n_ctx_train
        chunks = cut(model, text, n_ctx, args.chunks)
        _cli.mention_long_context(n_ctx, model.info.n_ctx_train)
        lineup = open_lineup(model, args, options)
        _cli.note(f"{resolved.name}: {len(chunks)} x {n_ctx} tokens, act={args.act}")
        run(lineup, chunks, options["n_batch"], show=not args.json)
        result = {
            "model": resolved.name,
            "text_sha256": hashlib.sha256(text).hexdigest(),
            "n_ctx": n_ctx,
            "chunks": len(chunks),
            **numbers(lineup, args.strict),
        }
        if args.json:
            print(json.dumps(result))
            return 0
        print("Final estimate: PPL = {ppl:.4f} +/- {ppl_se:.5f}".format(**result))
        if lineup.base:
            print(*table(lineup, args.strict), sep="\n")
        print("{recipe}, window {window}, sink {sink}, {bits:.2f} bits per value".format(**result))
        print("text sha256 {text_sha256}".format(**result))
    return 0


if __name__ == "__main__":
    sys.exit(_cli.run(main))
