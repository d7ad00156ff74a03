"""python -m kvmix.chat: talk to a model, in a terminal, through pipes, or one question at a time."""

from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__":  # a Ctrl-C while the modules below are loaded
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from . import _cli, _repl, _terminal
from ._chat import Chat, Turn, model_template
from ._context import choose_context
from ._template import (
    NAMED,
    ChatTemplate,
    Message,
    PlainText,
    Renderer,
    TemplateError,
    check_messages,
    template_source,
)
from .errors import ArgumentError, Cancelled, ContextFull, KvmixError, ModelIOError

if TYPE_CHECKING:
    from ._session import Sampling, Session, Stats

SAMPLING: dict[str, dict[str, Any]] = {  # fields of Sampling: their flags, and what /set takes
    "temp": {"type": _cli.number(0), "metavar": "X", "help": "0 = the likeliest token"},
    "top_k": {"type": _cli.integer(-(2**31)), "metavar": "N", "help": "below 1 = off"},
    "top_p": {"type": _cli.number(0, 1, above=True), "metavar": "X"},
    "min_p": {"type": _cli.number(0, 1), "metavar": "X"},
    "repeat_penalty": {"type": _cli.number(0, above=True), "metavar": "X"},
    "repeat_last_n": {"type": _cli.integer(-1), "metavar": "N"},
    "presence_penalty": {"type": _cli.number(-1e3), "metavar": "X"},
    "frequency_penalty": {"type": _cli.number(-1e3), "metavar": "X"},
}
SETTABLE = SAMPLING | {"seed": {"type": _cli.integer(-1, 2**64 - 1), "metavar": "N", "help": "-1 = random"}}
NOTE_VERSION = 1  # of what /save puts beside the session
TAKEN = {  # llama.cpp's flags that are taken because people type them, and why they change nothing
    "-fa": "attention is always fused",
    "-ngl": "the model runs on the CPU",
    "--jinja": "templates always are",
    "-cnv": "conversation is the default",
    "-tb": "-t counts for prompts too",
    "--no-warmup": "there is none",
}


def parser() -> _cli.Parser:
    p = _cli.Parser(prog="python -m kvmix.chat", description=__doc__)
    _cli.add_model_args(p)
    talk = p.add_argument_group("conversation")
    what = talk.add_mutually_exclusive_group()
    what.add_argument("-p", "--prompt", metavar="TEXT", help="answer this and leave")
    what.add_argument("-f", "--file", metavar="FILE", help="answer what the file says and leave")
    talk.add_argument("-sys", "--system-prompt", metavar="TEXT", help="system message")
    talk.add_argument(
        "-n",
        "--predict",
        "--n-predict",
        type=_cli.integer(-1),
        default=-1,
        metavar="N",
        help="most tokens of an answer; -1 = no limit",
    )
    talk.add_argument("-st", "--single-turn", action="store_true", help="leave after one answer")
    talk.add_argument(
        "-no-cnv",
        "--no-conversation",
        action="store_true",
        help="continue the text, its control tokens too; no template",
    )
    talk.add_argument("--chat-template", metavar="TEMPLATE", help=f"jinja text, a file, or {', '.join(NAMED)}")
    talk.add_argument(
        "--reasoning",
        choices=("on", "off", "auto"),
        default="auto",
        help="off: ask the template for an answer without thinking",
    )
    talk.add_argument(
        "-e",
        "--escape",
        action="store_true",
        default=True,
        help='read \\n, \\t, \\\\, \\" in -p and -sys (the default)',
    )
    talk.add_argument("--no-escape", dest="escape", action="store_false", help="take -p and -sys as they are")
    talk.add_argument("--json", action="store_true", help="one answer, as a JSON object on stdout")
    _cli.add_kv_args(p)
    pick = p.add_argument_group("sampling (defaults: the catalog's, else llama.cpp's)")
    pick.add_argument("-s", "--seed", default=-1, **SETTABLE["seed"])
    for name, flag in SAMPLING.items():
        pick.add_argument("--" + name.replace("_", "-"), **flag)
    taken = p.add_argument_group("taken for llama.cpp's sake, without effect")
    taken.add_argument("-fa", "--flash-attn", dest="fa", choices=("on", "off", "auto"))
    taken.add_argument("-ngl", "--gpu-layers", "--n-gpu-layers", dest="ngl", metavar="N")
    taken.add_argument("-tb", "--threads-batch", dest="tb", metavar="N")
    for switch, *more in (("--jinja",), ("-cnv", "--conversation"), ("--no-warmup",)):
        taken.add_argument(switch, *more, dest=switch.strip("-").replace("-", "_"), action="store_true", default=None)
    return p


def unescape(text: str) -> str:
    known = {"n": "\n", "r": "\r", "t": "\t"}
    return re.sub(r"\\([nrt\\\"'])", lambda m: known.get(m[1], m[1]), text)


def first_message(args: argparse.Namespace) -> str | None:
    """The text of -p or -f."""
    if args.file is not None:
        return read_text(Path(args.file))
    if args.prompt is None:
        return None
    return checked_text("-p", unescape(args.prompt) if args.escape else args.prompt)


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as e:
        raise ModelIOError(f"{path} cannot be read: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise ArgumentError(f"{path} is not valid UTF-8 at its byte {e.start}") from None


def checked_text(flag: str, text: str) -> str:
    """Bytes of the command line that are no UTF-8 arrive as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ArgumentError(f"the text of {flag} is not valid UTF-8 at its character {e.start}") from None
    return text


def sampling_of(args: argparse.Namespace, defaults: dict[str, Any]) -> Sampling:
    from ._session import Sampling

    given = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    return replace(Sampling(), **{**defaults, **given, "seed": resolve_seed(args.seed)})


def resolve_seed(seed: int) -> int:
    return seed if seed >= 0 else secrets.randbits(32)


def mention_taken(args: argparse.Namespace) -> None:
    given = [flag for flag in TAKEN if getattr(args, flag.strip("-").replace("-", "_")) is not None]
    if given:
        _cli.note("without effect here: " + ", ".join(f"{flag} ({TAKEN[flag]})" for flag in given))


@dataclass
class Conversation:
    """The messages so far, and how each is answered."""

    chat: Chat
    sampling: Sampling
    max_tokens: int
    messages: list[Message] = field(default_factory=list)
    quiet: bool = False  # --json: nothing but the object at the end
    attached: str = ""  # /read: what comes before the next message

    @property
    def session(self) -> Session:
        return self.chat.session

    def ask(self, text: str) -> Turn:
        self.messages.append({"role": "user", "content": self.attached + text})
        self.attached = ""
        return self.answer()

    def answer(self) -> Turn:
        """Streams the answer to the last message. A Ctrl-C ends it early, what came of it stays in the conversation;
        where nothing did, the message goes too. When the context has no room, offers to drop the oldest turn, or raises
        ContextFull."""
        while True:
            try:
                return self._answer()
            except ContextFull as e:
                if not self._drop_oldest(e):
                    self.messages.pop()
                    raise

    def _answer(self) -> Turn:
        writer: _terminal.AnswerWriter | None = None
        bar = tqdm(desc="prompt", unit=" tokens", leave=False, disable=True if self.quiet else None, delay=1)

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        try:
            with _repl.interruptible(self.session):
                for piece in self.chat.reply(self.messages, self.sampling, self.max_tokens, progress):
                    bar.close()
                    if self.quiet:
                        continue
                    if writer is None:
                        writer = _terminal.AnswerWriter(sys.stdout, thinking=self.chat.turn.thinking)
                    writer.write(piece)
        except Cancelled:
            pass
        finally:
            bar.close()
            if writer is not None:
                writer.close()
        turn = self.chat.turn
        dropped = turn.finish == "cancelled" and not turn.text
        if dropped:
            self.messages.pop()
        else:
            self.messages.append({"role": "assistant", "content": turn.text})
        if not self.quiet:
            _terminal.say(_terminal.turn_line(turn, self.session.stats))
        if dropped:
            _cli.note("stopped before the answer began: the message is dropped")
        if turn.finish == "full":
            _cli.note("the context is full, the answer ends here; -c opens a larger one")
        return turn

    def _drop_oldest(self, reason: ContextFull) -> bool:
        start = 1 if self.messages[0]["role"] == "system" else 0
        if len(self.messages) - start < 3 or not _repl.is_interactive():
            return False
        _terminal.say(str(reason))
        if not _repl.agrees("Drop the oldest question and its answer?"):
            return False
        del self.messages[start : start + 2]
        return True

    def regenerate(self) -> Turn:
        if self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        if not self.messages or self.messages[-1]["role"] != "user":
            raise ArgumentError("there is no message to answer again yet")
        return self.answer()

    def clear(self) -> None:
        self.messages[:] = [m for m in self.messages[:1] if m["role"] == "system"]

    def set_system(self, text: str) -> None:
        """The system message; '' = none."""
        rest = self.messages[1:] if self.messages and self.messages[0]["role"] == "system" else self.messages
        self.messages = [{"role": "system", "content": text}, *rest] if text else list(rest)

    def set(self, argument: str) -> str:
        """/set: changes one field of the sampling; the line that says how they stand."""
        name, _, value = argument.partition(" ")
        if argument:
            if name not in SETTABLE:
                raise ArgumentError(f"there is nothing called {name!r} to set; there are {', '.join(SETTABLE)}")
            try:
                parsed = SETTABLE[name]["type"](value.strip())
            except argparse.ArgumentTypeError as e:
                raise ArgumentError(f"{name}: {e}") from None
            self.sampling = replace(self.sampling, **{name: resolve_seed(parsed) if name == "seed" else parsed})
        return ", ".join(f"{name} {getattr(self.sampling, name)}" for name in SETTABLE)

    def save(self, path: Path) -> None:
        note = {"chat": NOTE_VERSION, "messages": self.messages, **self.chat.memory()}
        self.session.save(path, json.dumps(note).encode())

    def load(self, path: Path) -> None:
        """Where the file is another program's the messages stay, and the next answer evaluates them again."""
        note = self.session.load(path)
        try:
            memory = json.loads(note)
            messages = list(memory["messages"])
            if memory["chat"] != NOTE_VERSION:
                raise ValueError
            if messages:
                check_messages(messages)
            self.chat.recall(memory)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise ArgumentError(f"{path} was saved by another program: its messages are not known") from None
        self.messages = messages


def open_conversation(args: argparse.Namespace) -> Conversation:
    from ._model import Model

    resolved = _cli.resolve_model(_cli.model_name(args))
    options = _cli.session_options(args) | {"kv_default": resolved.kv_default, "n_seq_max": 1}
    sampling = sampling_of(args, dict(resolved.chat))
    model = Model(str(resolved.path), mmap=args.mmap)
    template: Renderer
    if args.no_conversation:
        template = PlainText(trust_user=True)
    else:
        source = None if args.chat_template is None else template_source(args.chat_template)
        thinking = {"on": True, "off": False, "auto": None}[args.reasoning]
        template = model_template(model, source, enable_thinking=thinking)
    context = choose_context(model, options)
    session = model.session(**{**options, "n_ctx": context.n_ctx, "memory_limit": context.memory_limit})
    _cli.mention_long_context(context.n_ctx, context.n_trained)
    f16 = {"n_ctx": context.n_ctx, "kv": "f16", "k_type": None, "v_type": None}
    f16_bytes = model.plan(**{**options, **f16}).kv_bytes
    _terminal.say(_terminal.model_lines(resolved.name, model, session, context, f16_bytes))
    messages: list[Message] = []
    if args.system_prompt is not None:
        text = checked_text("-sys", unescape(args.system_prompt) if args.escape else args.system_prompt)
        messages.append({"role": "system", "content": text})
    mention_mode(template, args, bool(messages))
    return Conversation(Chat(session, template), sampling, args.predict, messages, args.json)


def mention_mode(template: Renderer, args: argparse.Namespace, has_system: bool) -> None:
    """What a user would wonder about later, once; a template that cannot be rendered fails here."""
    if isinstance(template, ChatTemplate):
        try:
            folds = template.folds_system
        except TemplateError as e:
            raise TemplateError(f"{e}; --chat-template {'|'.join(NAMED)} or -no-cnv go without it") from None
        if has_system and folds:
            _cli.note("this template has no system role: the system text goes to the head of the first message")
    elif not args.no_conversation:
        _cli.note("this model has no chat template: it continues your text (--chat-template names one)")


def exchange(conversation: Conversation, text: str | None) -> int:
    """One message, or None for the last one again, and its answer; the exit code that follows without a terminal."""
    try:
        turn = conversation.regenerate() if text is None else conversation.ask(text)
    except (ArgumentError, ContextFull) as e:
        if not _repl.is_interactive():
            raise
        _terminal.say(str(e))
        return 0
    if conversation.quiet:
        print(json.dumps(report(turn, conversation.session.stats)))
    return 130 if turn.finish == "cancelled" and not _repl.is_interactive() else 0


def report(turn: Turn, stats: Stats) -> dict[str, Any]:
    """--json"""
    return {
        "text": turn.text,
        "tokens": turn.tokens,
        "n_prompt": turn.n_prompt,
        "n_evaluated": turn.n_evaluated,
        "n_generated": len(turn.tokens),
        "prompt_s": turn.prompt_s,
        "generate_s": turn.generate_s,
        "kv_bytes": stats.kv_bytes,
        "kv_used_bytes": stats.kv_used_bytes,
        "kv_bits": stats.bits_now,
        "kv_bits_full": stats.bits_full,
        "n_ctx": stats.n_ctx,
        "recipe": stats.recipe,
        "finish": "length" if turn.finish == "full" else turn.finish,
    }


def run_command(conversation: Conversation, name: str, argument: str) -> None:
    """A command that asks for no answer."""
    path = Path(argument).expanduser()
    match name:
        case "/clear":
            conversation.clear()
        case "/system":
            conversation.set_system(argument)
        case "/read":
            conversation.attached += read_text(path).rstrip("\n") + "\n\n"
            _terminal.say(f"{path} comes before the next message")
        case "/set":
            _terminal.say(conversation.set(argument))
        case "/save":
            conversation.save(path)
            _terminal.say(f"saved: {len(conversation.messages)} messages, {conversation.session.length} tokens")
        case "/load":
            conversation.load(path)
            _terminal.say(f"loaded: {len(conversation.messages)} messages, {conversation.session.length} tokens")
        case "/kv":
            _terminal.say(_terminal.kv_table(conversation.session))
        case _:
            _terminal.say(_repl.HELP)


def repl(conversation: Conversation, single_turn: bool) -> int:
    for text in _repl.read_messages():
        try:
            name, argument = _repl.parse_command(text) or ("", "")
        except ArgumentError as e:
            _terminal.say(str(e))
            continue
        if name in ("/exit", "/bye", "/quit"):
            break
        if name == "/regen" or (not name and text.strip()):
            code = exchange(conversation, None if name else text)
            if single_turn or code:
                return code
        elif name:
            try:
                run_command(conversation, name, argument)
            except KvmixError as e:
                if not _repl.is_interactive():
                    raise
                _terminal.say(str(e))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    p = parser()
    args = p.parse_args(bare_flash_attn(sys.argv[1:] if argv is None else argv))
    mention_taken(args)
    text = first_message(args)
    if text is None and args.json and not _repl.is_interactive():
        text = _repl.read_stdin()
        if not text.strip():
            p.error("--json needs a message: -p, -f or text on stdin")
    if text is not None and not text.strip():
        raise ArgumentError("the prompt is empty: there is nothing to answer")
    conversation = open_conversation(args)
    try:
        if text is not None:
            return exchange(conversation, text)
        return repl(conversation, args.single_turn or args.json)
    finally:
        _cli.ignore_interrupts()  # before the model is closed


def bare_flash_attn(argv: Sequence[str]) -> list[str]:
    """-fa is typed with and without a value; without one it must not take the model's name for it."""
    values = ("on", "off", "auto")
    return [
        arg + "=on" if arg in ("-fa", "--flash-attn") and after not in values else arg
        for arg, after in zip(argv, [*argv[1:], ""], strict=False)
    ]


if __name__ == "__main__":
    sys.exit(_cli.run(main))
