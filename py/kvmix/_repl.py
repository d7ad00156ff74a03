"""The interactive part of chat: reading messages, commands, and Ctrl-C.

On a terminal prompt_toolkit edits the line and keeps the history; otherwise messages are lines of stdin until its end.
A message of several lines: between lines of three quotes, or with a backslash at each line's end, or pasted.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from .catalog import cache_dir
from .errors import ArgumentError, Cancelled

if TYPE_CHECKING:
    from ._session import Session

HELP = """\
/help      this list
/clear     begin a new conversation
/regen     answer the last message again
/kv        types and bytes of the KV cache, by layer
/exit      leave (also /bye, or Ctrl-D)
Several lines: put them between lines of \"\"\", or end each but the last with \\. Ctrl-C stops an answer."""

COMMANDS = ("/help", "/?", "/clear", "/regen", "/kv", "/exit", "/bye")

ReadLine = Callable[[str], str]  # (prompt) -> a line; EOFError at the end, KeyboardInterrupt for Ctrl-C


def is_interactive() -> bool:
    return sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()


def line_reader() -> ReadLine:
    return _tty_reader() if is_interactive() else _pipe_reader


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
        history=history, completer=WordCompleter(COMMANDS, sentence=True), complete_while_typing=False
    )
    return session.prompt


def _pipe_reader(_prompt: str) -> str:
    line = sys.stdin.buffer.readline() if sys.stdin is not None else b""
    if not line:
        raise EOFError
    try:
        return line.decode().rstrip("\r\n")
    except UnicodeDecodeError as e:
        raise ArgumentError(f"a line of the input is not valid UTF-8 at its byte {e.start}") from None


def read_message(read_line: ReadLine) -> str:
    """One message; EOFError when there is none left."""
    text = read_line("> ")
    if text.strip() == '"""':
        lines: list[str] = []
        with contextlib.suppress(EOFError):
            while (line := read_line(". ")).strip() != '"""':
                lines.append(line)
        return "\n".join(lines)
    while text.endswith("\\"):
        text = text[:-1] + "\n"
        with contextlib.suppress(EOFError):
            text += read_line(". ")
    return text


@contextlib.contextmanager
def interruptible(session: Session) -> Iterator[None]:
    """Ctrl-C inside the block cancels the session's call, within a token or a batch of the prompt; a second one raises
    KeyboardInterrupt.

    Python runs signal handlers between byte codes, so not while the library evaluates; the wakeup descriptor is
    written at once, and a thread that waits on it can cancel meanwhile."""
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    presses = 0

    def watch() -> None:
        while data := receiver.recv(16):
            if signal.SIGINT in data:
                session.cancel()

    def on_interrupt(_signum: int, _frame: object) -> None:
        nonlocal presses
        presses += 1
        if presses > 1:
            raise KeyboardInterrupt

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    earlier_handler = signal.signal(signal.SIGINT, on_interrupt)
    earlier_fd = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(earlier_fd)
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
