"""The interactive part of chat: reading messages, commands, and Ctrl-C.

On a terminal prompt_toolkit edits the line and keeps the history; otherwise messages are lines of stdin until its end.
A message of several lines: between three quotes and three quotes, or with a backslash at each line's end, or pasted.

Ctrl-C on a terminal stops an answer, or takes back what is being typed, and leaves the second time in a row that there
is nothing of either. Between answer and prompt it is ignored, for there it was meant for an answer that has just ended.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING

from . import _cli, _terminal
from .catalog import cache_dir
from .errors import ArgumentError, Cancelled

if TYPE_CHECKING:
    from ._session import Session

HELP = """\
/help            this list
/clear           begin a new conversation
/regen           answer the last message again
/system TEXT     the system message from now on; without TEXT none
/read FILE       put a text file before the next message
/set NAME VALUE  change how answers are sampled (temp, top_k, ...); without NAME list all
/save FILE       keep the conversation and its KV cache
/load FILE       go on with a conversation that was saved, with the same model and recipe
/kv              types and bytes of the KV cache, by layer
/exit            leave (also /bye, /quit, or Ctrl-D)
Several lines: put them between \"\"\" and \"\"\", or end each but the last with \\.
Ctrl-C stops an answer, or takes back what is being typed; twice at an empty prompt it leaves."""

# each with its argument; one in brackets may be left out
COMMANDS = {
    "/help": "", "/?": "", "/clear": "", "/regen": "", "/system": "[TEXT]", "/read": "FILE", "/set": "[NAME VALUE]",
    "/save": "FILE", "/load": "FILE", "/kv": "", "/exit": "", "/bye": "", "/quit": "",
}  # fmt: skip
QUOTES = '"""'


class TakenBack(Exception):
    """Ctrl-C while a message was being typed."""


ReadLine = Callable[[str], str]  # (prompt) -> a line; EOFError at the end; for Ctrl-C TakenBack or KeyboardInterrupt


def is_interactive() -> bool:
    return sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()


def _tty_reader() -> ReadLine:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory

    history: History
    try:
        path = cache_dir() / "history"
        path.parent.mkdir(parents=True, exist_ok=True)
        # what people say is theirs: nobody else may read it, whatever the umask
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
        path.chmod(0o600)
        history = FileHistory(str(path))
    except OSError:
        history = InMemoryHistory()
    session: PromptSession[str] = PromptSession(
        history=history, completer=WordCompleter(list(COMMANDS), sentence=True), complete_while_typing=False
    )

    def read_line(prompt: str) -> str:
        try:
            return session.prompt(prompt)
        except KeyboardInterrupt:
            if session.default_buffer.text:
                raise TakenBack from None
            raise

    return read_line


def _pipe_reader(_prompt: str) -> str:
    line = sys.stdin.buffer.readline() if sys.stdin is not None else b""
    if not line:
        raise EOFError
    return _decoded(line, "a line of the input").rstrip("\r\n")


def read_stdin() -> str:
    """All of it as one message, '' where there is none."""
    text = sys.stdin.buffer.read() if sys.stdin is not None else b""
    return _decoded(text, "the input").removesuffix("\n")


def _decoded(text: bytes, what: str) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as e:
        raise ArgumentError(f"{what} is not valid UTF-8 at its byte {e.start}") from None


def read_message(read_line: ReadLine) -> str:
    """One message; EOFError when there is none left, else as ReadLine."""
    text = read_line("> ")
    try:
        return _quoted(text, read_line) if text.lstrip().startswith(QUOTES) else _continued(text, read_line)
    except KeyboardInterrupt:
        raise TakenBack from None


def _quoted(text: str, read_line: ReadLine) -> str:
    text = text.lstrip().removeprefix(QUOTES)
    with contextlib.suppress(EOFError):
        while not text.rstrip().endswith(QUOTES):
            text += "\n" + read_line(". ")
    return text.rstrip().removesuffix(QUOTES).removeprefix("\n").removesuffix("\n")


def _continued(text: str, read_line: ReadLine) -> str:
    while text.endswith("\\"):
        text = text[:-1] + "\n"
        with contextlib.suppress(EOFError):
            text += read_line(". ")
    return text


def read_messages() -> Iterator[str]:
    """All messages, until their end; KeyboardInterrupt when Ctrl-C leaves."""
    return _tty_messages() if is_interactive() else _pipe_messages()


def _pipe_messages() -> Iterator[str]:
    with contextlib.suppress(EOFError):
        while True:
            yield read_message(_pipe_reader)


def _tty_messages() -> Iterator[str]:
    _cli.ignore_interrupts()
    read_line = _tty_reader()
    _terminal.say("/help lists the commands")
    leaves = False
    while True:
        try:
            text = read_message(read_line)
        except EOFError:
            return
        except TakenBack:
            leaves = False
            continue
        except KeyboardInterrupt:
            if leaves:
                raise
            leaves = True
            _terminal.say("Ctrl-C again leaves, as /exit does")
            continue
        leaves = False
        yield text


def parse_command(text: str) -> tuple[str, str] | None:
    """The name and argument of a line that is a command, None where it is a message; ArgumentError where it only looks
    like a command."""
    line = re.fullmatch(r"(/\w+|/\?)( .*)?", text.strip())
    if line is None:
        return None
    name, argument = line[1], (line[2] or "").strip()
    wanted = COMMANDS.get(name)
    if wanted is None:
        raise ArgumentError(f"there is no command {name}; /help lists them")
    if argument and not wanted:
        raise ArgumentError(f"{name} takes no argument")
    if not argument and wanted and not wanted.startswith("["):
        raise ArgumentError(f"{name} takes an argument: {name} {wanted}")
    return name, argument


def agrees(question: str) -> bool:
    """The answer to a question on the terminal; Ctrl-C and Ctrl-D mean no."""
    from prompt_toolkit import prompt

    _terminal.say(question)
    with contextlib.suppress(KeyboardInterrupt, EOFError):
        return prompt("[y/n] ").strip().lower() in ("y", "yes")
    return False


@contextlib.contextmanager
def interruptible(session: Session) -> Iterator[None]:
    """Ctrl-C inside the block cancels the session's call, within a token or a batch of the prompt; a second one ends
    the command.

    Python runs signal handlers between byte codes, so not while the library evaluates; the wakeup descriptor is
    written at once, and a thread that waits on it can cancel meanwhile."""
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    presses = 0

    def watch() -> None:
        while data := receiver.recv(16):
            if signal.SIGINT in data:
                session.cancel()

    def on_interrupt(signum: int, frame: FrameType | None) -> None:
        nonlocal presses
        presses += 1
        if presses > 1:
            _cli.interrupt(signum, frame)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    earlier_handler = signal.signal(signal.SIGINT, on_interrupt)
    earlier_fd = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(earlier_fd)
        if presses < 2:
            signal.signal(signal.SIGINT, earlier_handler)
        sender.close()
        watcher.join()
        receiver.close()
        if presses:
            _absorb_cancel(session)


def _absorb_cancel(session: Session) -> None:
    """A Ctrl-C that came after the last evaluation would stop the next one: let a step that changes nothing take it."""
    with contextlib.suppress(Cancelled):
        session.sync(session.tokens)
