"""Chat templates: messages -> the bytes of a prompt, with a flag on each byte that says who wrote it.

The template's own text is *trusted*: control tokens are recognized in it. The text of messages is not: a user who
writes "<|im_end|>" gets those ten characters, never the token. How the flags are kept is explained in _sandbox.py,
the process that renders; this file owns that process, its time limit and what a template is asked.

Invariants
1. Templates run only in the sandbox process. It is started once, answers in milliseconds, is killed when it takes
   longer than WALL_SECONDS and started anew for the next rendering; a terminal's Ctrl-C does not reach it.
2. A rendering is the same bytes that transformers' apply_chat_template gives, or TemplateError.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from .errors import ArgumentError, FormatError

Message = Mapping[str, str]  # role: "system", "user" or "assistant"; content

ROLES = ("system", "user", "assistant")
SOURCE_BYTES = 1 << 20
START_SECONDS = 30.0
WALL_SECONDS = 2.0


class TemplateError(FormatError):
    """The chat template is broken or went past its limits."""


class TemplateRefusal(TemplateError):
    """The template itself refused the messages (raise_exception)."""


@dataclass(frozen=True)
class Prompt:
    text: bytes
    trusted: bytes  # [len(text)], 1 where the template wrote the byte

    def __getitem__(self, part: slice) -> Prompt:
        return Prompt(self.text[part], self.trusted[part])

    def __add__(self, other: Prompt) -> Prompt:
        return Prompt(self.text + other.text, self.trusted + other.trusted)


class Renderer(Protocol):
    def render(self, messages: Sequence[Message]) -> Prompt:
        """The prompt that asks for the next assistant message."""
        ...


class ChatTemplate:
    """A jinja chat template with the texts of the model's BOS and EOS tokens.

    variables go to the template as they are ({"enable_thinking": False}). A template that refuses a system role, or
    silently drops it, gets the system text at the head of the first user message; folds_system then says so.
    """

    def __init__(self, source: str, *, bos: str = "", eos: str = "", variables: Mapping[str, bool] | None = None):
        if len(source) > SOURCE_BYTES:
            raise TemplateError(f"the chat template has {len(source)} characters, more than {SOURCE_BYTES}")
        self._source = source
        self._globals = {"bos_token": bos, "eos_token": eos}
        self._variables = dict(variables or {})
        self._folds_system: bool | None = None

    @property
    def folds_system(self) -> bool:
        if self._folds_system is None:
            probe = "system text of a probe"
            messages = [{"role": "system", "content": probe}, {"role": "user", "content": "user text"}]
            try:
                self._folds_system = probe.encode() not in self._render(messages).text
            except TemplateRefusal:
                self._folds_system = True
        return self._folds_system

    def render(self, messages: Sequence[Message]) -> Prompt:
        check_messages(messages)
        if messages[0]["role"] == "system" and len(messages) > 1 and self.folds_system:
            system, first, *rest = messages
            messages = [{**first, "content": system["content"] + "\n\n" + first["content"]}, *rest]
        return self._render(messages)

    def _render(self, messages: Sequence[Message]) -> Prompt:
        reply = _ask(
            {
                "source": self._source,
                "globals": self._globals,
                "messages": [{"role": m["role"], "content": m["content"]} for m in messages],
                "variables": {**self._variables, "add_generation_prompt": True},
            }
        )
        if "refused" in reply:
            raise TemplateRefusal(f"the chat template refuses these messages: {reply['refused']}")
        if "failed" in reply:
            raise TemplateError(f"the chat template cannot be rendered: {reply['failed']}")
        text: str = reply["text"]
        encoded, flags, at = [], [], 0
        for i, n in enumerate(reply["runs"]):
            piece = text[at : at + n].encode()
            encoded.append(piece)
            flags.append((b"\1" if i % 2 else b"\0") * len(piece))
            at += n
        return Prompt(b"".join(encoded), b"".join(flags))


@dataclass(frozen=True)
class PlainText:
    """Completion mode: what was said so far, as it stands; an answer ends with a line break."""

    trust_user: bool = False  # the user writes whole prompts, control tokens too; else nothing is trusted

    def render(self, messages: Sequence[Message]) -> Prompt:
        check_messages(messages)
        prompt = Prompt(b"", b"")
        for m in messages:
            answer = m["role"] == "assistant"
            text = (m["content"] + ("\n" if answer else "")).encode()
            flag = b"\1" if self.trust_user and not answer else b"\0"
            prompt += Prompt(text, flag * len(text))
        return prompt


def check_messages(messages: Sequence[Message]) -> None:
    if not messages:
        raise ArgumentError("there are no messages to answer")
    for m in messages:
        if m.get("role") not in ROLES:
            raise ArgumentError(f"a message has the role {m.get('role')!r}; roles are {', '.join(ROLES)}")
        try:
            m["content"].encode()
        except (KeyError, AttributeError, UnicodeEncodeError):
            raise ArgumentError(f"the content of a {m['role']} message is not valid text") from None


class _Worker:
    """The sandbox process: one request, one reply, within WALL_SECONDS."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            # by path and with -P: the child must not find kvmix's files as top-level modules, nor load libkvmix
            [sys.executable, "-P", str(Path(__file__).with_name("_sandbox.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._stop = weakref.finalize(self, _stop_process, self.process)
        self._buffer = b""
        try:
            self._reply(START_SECONDS)
        except BaseException:
            self._stop()
            raise

    def alive(self) -> bool:
        return self.process.poll() is None

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
            reply: dict[str, Any] = self._reply(WALL_SECONDS)
        except BrokenPipeError:
            self._stop()
            raise TemplateError("the process that renders chat templates has died; try again") from None
        except BaseException:  # Ctrl-C too: the reply on its way would answer the next request
            self._stop()
            raise
        return reply

    def _reply(self, seconds: float) -> Any:
        assert self.process.stdout is not None
        fd = self.process.stdout.fileno()
        deadline = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            left = max(deadline - time.monotonic(), 0)
            if not select.select([fd], [], [], left)[0]:
                raise TemplateError(f"the chat template was stopped: it takes longer than {seconds:g} s")
            piece = os.read(fd, 1 << 16)
            if not piece:
                raise TemplateError("the process that renders chat templates has died, perhaps for want of memory")
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)


def _stop_process(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


_running: list[_Worker] = []
_turn = threading.Lock()  # one request at a time, from whichever thread


def _ask(request: Mapping[str, Any]) -> dict[str, Any]:
    with _turn:
        if not (_running and _running[0].alive()):
            _running[:] = [_Worker()]
        return _running[0].ask(request)


# The wire formats that people name on the command line. A model's own template, where there is one, says more.
NAMED = {
    "chatml": """
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}""",
    "llama3": """
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}""",
    "gemma": """
{{- bos_token }}
{%- if messages[0].role == 'system' %}
    {{- raise_exception('gemma has no system role') }}
{%- endif %}
{%- for message in messages %}
    {{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}
    {{- message.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<start_of_turn>model\\n' }}
{%- endif %}""",
    "mistral": """
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' + message.content + ' [/INST]' }}
    {%- elif message.role == 'assistant' %}
        {{- message.content + eos_token }}
    {%- else %}
        {{- raise_exception('mistral has no system role') }}
    {%- endif %}
{%- endfor %}""",
}


def template_source(choice: str) -> str:
    """What --chat-template names: a well-known name, jinja text, or a file with it."""
    if choice in NAMED:
        return NAMED[choice]
    if "{{" in choice or "{%" in choice:
        return choice
    try:
        return Path(choice).read_text(encoding="utf-8")
    except (OSError, ValueError) as e:
        names = ", ".join(NAMED)
        raise ArgumentError(
            f"--chat-template {choice!r} is no jinja text, no readable file ({e}) and none of {names}"
        ) from None
