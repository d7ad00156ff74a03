"""The process that renders chat templates: started by _template.py, run by path, imports nothing of kvmix.

A GGUF file carries a program, its chat template. It runs here, in jinja2's immutable sandbox, in a process of its own
with limits on memory, time and output, so that the worst it can do is to be stopped.

Invariants
1. Provenance. Every character of the rendered text is *trusted* (the template wrote it) or not (it came from a
   message). Template literals, BOS/EOS text and role names are Text, a str that carries one flag a character. Only the
   operations written out in Text and concat keep flags; whatever else a template does to a string gives a plain str,
   which counts as untrusted. So a new trick in a template can lose trust (a control token is then read as plain text)
   but never give it to a user's words.
2. The text itself is what jinja2 would render without any of this: Text changes flags, never characters.

Protocol, one JSON object a line: "ready" once, then for each request {source, globals, messages, variables} one of
{text, runs}, runs = lengths of alternating runs of characters, untrusted first; {refused}: the template called
raise_exception; {failed}: anything else.
"""

from __future__ import annotations

import functools
import itertools
import json
import resource
import sys
from collections.abc import Iterable
from datetime import datetime
from typing import Any, SupportsIndex

from jinja2 import TemplateError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_BYTES = 512 << 20
CPU_SECONDS = 2
OUTPUT_CHARS = 4 << 20
REPEAT_CHARS = 1 << 20


class Text(str):
    """A string that knows which of its characters are trusted: mask[i] is 1 for those."""

    mask: bytes

    def __new__(cls, value: str = "", mask: bytes | None = None) -> Text:
        self = super().__new__(cls, value)
        # jinja2's sandbox calls type(text)(...) on results of format(): without a mask nothing may be trusted
        self.mask = bytes(len(self)) if mask is None else mask
        return self

    def __str__(self) -> str:
        return self

    def __add__(self, other: str) -> Text:
        return Text(str.__add__(self, other), self.mask + mask_of(other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> Text:
        return Text(str.__add__(other, self), mask_of(other) + self.mask) if isinstance(other, str) else NotImplemented

    def __getitem__(self, key: SupportsIndex | slice) -> Text:
        mask = self.mask[key] if isinstance(key, slice) else bytes([self.mask[key]])
        return Text(str.__getitem__(self, key), mask)

    def lstrip(self, chars: str | None = None, /) -> Text:
        kept = str.lstrip(self, chars)
        return Text(kept, self.mask[len(self) - len(kept) :])

    def rstrip(self, chars: str | None = None, /) -> Text:
        kept = str.rstrip(self, chars)
        return Text(kept, self.mask[: len(kept)])

    def strip(self, chars: str | None = None, /) -> Text:
        return self.lstrip(chars).rstrip(chars)


def mask_of(text: str) -> bytes:
    return text.mask if isinstance(text, Text) else bytes(len(text))


def trust(text: str) -> Text:
    return Text(text, b"\1" * len(text))


def concat(pieces: Iterable[str]) -> Text:
    kept: list[str] = []
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > OUTPUT_CHARS:
            raise SecurityError(f"it writes more than {OUTPUT_CHARS} characters")
        kept.append(piece)
    return Text("".join(kept), b"".join(map(mask_of, kept)))


class TrustingCodeGenerator(CodeGenerator):
    """Compiles the template's own literals to Text, and `a ~ b` so that it keeps flags."""

    def _literal(self, value: Any) -> str:
        return f"environment.trust({value!r})" if isinstance(value, str) else repr(value)

    def _output_const_repr(self, group: Iterable[Any]) -> str:
        return self._literal("".join(group))

    def visit_TemplateData(self, node: nodes.TemplateData, frame: Frame) -> None:
        self.write(self._literal(node.data))

    def visit_Const(self, node: nodes.Const, frame: Frame) -> None:
        self.write(self._literal(node.as_const(frame.eval_ctx)))

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("concat(map(str, (")
        for arg in node.nodes:
            self.visit(arg, frame)
            self.write(", ")
        self.write(")))")


class GenerationTag(Extension):
    """{% generation %}..{% endgeneration %} marks what a model is trained on; rendering looks through it."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Sandbox(ImmutableSandboxedEnvironment):
    code_generator_class = TrustingCodeGenerator
    concat = staticmethod(concat)
    trust = staticmethod(trust)
    intercepted_binops = frozenset(["*", "**", "%"])

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Refuses the operators with which a short template makes a huge value."""
        numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
        if operator == "%" and not numbers:
            raise SecurityError("it formats with %, which is not allowed here")
        if operator == "**" and not (numbers and abs(left) <= 1 << 16 and abs(right) <= 64):
            raise SecurityError("it raises to a power that is too large")
        if operator == "*" and not numbers:
            sized, count = (right, left) if isinstance(left, int) else (left, right)
            if not isinstance(count, int) or len(sized) * count > REPEAT_CHARS:
                raise SecurityError(f"it repeats something to more than {REPEAT_CHARS} items")
        return super().call_binop(context, operator, left, right)


class Refusal(TemplateError):
    """The template called raise_exception."""


def raise_exception(message: str) -> None:
    raise Refusal(message)


def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)


def environment() -> Sandbox:
    """The settings that published templates are written for: those of transformers' apply_chat_template."""
    env = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", GenerationTag])
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return env


def render(request: dict[str, Any], compiled: Any) -> dict[str, Any]:
    messages = [{"role": trust(m["role"]), "content": m["content"]} for m in request["messages"]]
    globals_ = {name: trust(text) for name, text in request["globals"].items()}
    text = compiled(request["source"]).render(
        messages=messages, tools=None, documents=None, **globals_, **request["variables"]
    )
    mask = mask_of(text)
    runs = [sum(1 for _ in group) for _, group in itertools.groupby(mask)]
    if mask[:1] == b"\1":
        runs.insert(0, 0)
    return {"text": str.__str__(text), "runs": runs}


def answer(request: dict[str, Any], compiled: Any) -> dict[str, Any]:
    try:
        return render(request, compiled)
    except Refusal as e:
        return {"refused": str(e)}
    except MemoryError:
        return {"failed": f"it needs more than {MEMORY_BYTES >> 20} MiB"}
    except RecursionError:
        return {"failed": "it nests too deeply"}
    except Exception as e:  # whatever a template does wrong is an answer, not the end of this process
        return {"failed": f"{type(e).__name__}: {e}"}


def main() -> None:
    env = environment()
    compiled = functools.lru_cache(maxsize=8)(env.from_string)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    print('"ready"', flush=True)
    for line in sys.stdin.buffer:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        spent = usage.ru_utime + usage.ru_stime
        # the limit is on the whole process, so it moves with what earlier requests took
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (int(spent) + 1 + CPU_SECONDS, hard))
        reply = json.dumps(answer(json.loads(line), compiled))
        sys.stdout.write(reply + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
