"""What a chat writes: the answer as it comes, the line about it, the lines about the model, the table of /kv.

Answers go to stdout, everything about them to stderr. Colour only on a terminal and without NO_COLOR. On a terminal a
model's text cannot move the cursor or change the window's title: control characters but tab and line breaks are
dropped.
"""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING, TextIO

from . import _recipes
from ._context import Context, mib

if TYPE_CHECKING:
    from ._chat import Turn
    from ._model import Model
    from ._session import Session, Stats

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
OPEN, CLOSE = "<think>", "</think>"


def has_colour(stream: TextIO) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class AnswerWriter:
    """Streams an answer to a terminal or pipe; thinking blocks are dim on a terminal."""

    def __init__(self, stream: TextIO, *, thinking: bool = False):
        self._stream = stream
        self._tty = stream.isatty()
        self._colour = has_colour(stream)
        self._tag = CLOSE if thinking else OPEN  # the tag that is waited for
        self._held = ""  # the beginning of a tag, perhaps
        self._ends_line = True
        if thinking:
            self._paint(DIM)

    def write(self, piece: str) -> None:
        if not self._colour:
            self._emit(piece)
            return
        text = self._held + piece
        while (at := text.find(self._tag)) >= 0:
            end = at + len(self._tag)
            if self._tag == OPEN:
                self._emit(text[:at])
                self._paint(DIM)
                self._emit(text[at:end])
                self._tag = CLOSE
            else:
                self._emit(text[:end])
                self._paint(PLAIN)
                self._tag = OPEN
            text = text[end:]
        held = next((n for n in range(len(self._tag) - 1, 0, -1) if text.endswith(self._tag[:n])), 0)
        self._emit(text[: len(text) - held])
        self._held = text[len(text) - held :]

    def close(self) -> None:
        """Ends the answer, on a line of its own."""
        self._emit(self._held)
        self._held = ""
        if self._tag == CLOSE:
            self._paint(PLAIN)
        if not self._ends_line:
            self._emit("\n")

    def _emit(self, text: str) -> None:
        if text:
            self._stream.write(CONTROL.sub("", text) if self._tty else text)
            self._stream.flush()
            self._ends_line = text.endswith("\n")

    def _paint(self, code: str) -> None:
        if self._colour:
            self._stream.write(code)
            self._stream.flush()


def say(line: str) -> None:
    """A line about the answer, on stderr."""
    sys.stderr.write(f"{DIM}{line}{PLAIN}\n" if has_colour(sys.stderr) else line + "\n")
    sys.stderr.flush()


def turn_line(turn: Turn, stats: Stats) -> str:
    prompt = f"prompt {turn.n_evaluated}" + rate(turn.n_evaluated, turn.prompt_s)
    if turn.n_kept:
        prompt += f" ({turn.n_kept} kept)"
    answer = f"answer {len(turn.tokens)}" + rate(len(turn.tokens), turn.generate_s)
    cache = f"KV {mib(stats.kv_used_bytes)} {stats.bits_now:.1f} bits (full {stats.bits_full:.1f})"
    return f"{prompt} | {answer} | {cache} | context {stats.n_tokens}/{stats.n_ctx}"


def rate(n: int, seconds: float) -> str:
    return f" {n / seconds:.1f} t/s" if n and seconds > 0 else ""


def model_lines(name: str, model: Model, session: Session, context: Context, f16_bytes: int) -> str:
    """f16_bytes: of the same cache, all of it in f16."""
    info, stats = model.info, session.stats
    fits = f"at least {context.n_fits} fit" if context.n_fits >= context.n_trained else f"{context.n_fits} fit"
    lines = [
        f"{name}: {info.arch}, {info.n_params / 1e6:.0f} M parameters, {mib(info.weight_bytes)} ({info.weights}), "
        f"{stats.n_threads} threads",
        f"context {stats.n_ctx} (trained {context.n_trained}, {fits})",
        f"{_recipes.line(model, stats)}, window {stats.window}, sink {stats.sink}; KV {mib(stats.kv_bytes)} at "
        f"{stats.n_ctx} instead of {mib(f16_bytes)}, {stats.bits_full:.1f} bits/value when full",
    ]
    sliding = [layer for layer in session.layers if layer.span]
    if sliding:
        lines.append(
            f"{len(sliding)} of {info.n_layer} layers slide over {sliding[0].span} tokens: "
            f"{mib(sum(layer.kv_bytes for layer in sliding))} of it, whatever the context"
        )
    return "\n".join([*lines, *_recipes.remarks(model, session)])


def kv_table(session: Session) -> str:
    """/kv: layers that are alike on one line."""
    rows: list[tuple[int, int, str]] = []
    for i, layer in enumerate(session.layers):
        page = f"{layer.page_bytes} bytes for 128 tokens ({layer.n_head_kv} heads of {layer.d_k} and {layer.d_v})"
        text = f"K {layer.k_type:4} V {layer.v_type:4} {page}" + (f", span {layer.span}" if layer.span else "")
        if rows and rows[-1][2] == text:
            rows[-1] = (rows[-1][0], i, text)
        else:
            rows.append((i, i, text))
    lines = [f"layer {a if a == b else f'{a}-{b}':>7}  {text}" for a, b, text in rows]
    stats = session.stats
    lines.append(
        f"{stats.recipe} ({stats.recipe_source}), window {stats.window}, sink {stats.sink}: "
        f"{mib(stats.kv_used_bytes)} in use of {mib(stats.kv_bytes)} for {stats.n_ctx} tokens"
    )
    return "\n".join(lines)
