"""The commands of a chat: what counts as one, what they change, and a conversation that is saved and loaded."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kvmix
import tiny
from kvmix import _repl, chat
from kvmix._chat import Chat, model_template
from kvmix.errors import ArgumentError

# ---- lines ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "refusal"),
    [
        ("/clear now", "/clear takes no argument"),
        ("/regen 3 ", "/regen takes no argument"),
        ("/quit please", "/quit takes no argument"),
        ("/foo", "there is no command /foo; /help lists them"),
        ("/foo bar", "there is no command /foo; /help lists them"),
        ("/save", "/save takes an argument: /save FILE"),
    ],
)
def test_lines_that_look_like_commands(line: str, refusal: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        _repl.parse_command(line)
    assert str(caught.value) == refusal


@pytest.mark.parametrize(
    ("line", "command"),
    [
        (" /clear ", ("/clear", "")),
        ("/?", ("/?", "")),
        ("/save  a b.kv ", ("/save", "a b.kv")),
        ("/set", ("/set", "")),
        *((line, None) for line in ("/usr/bin is what?", "/clear\nnow", "/save a\nb", "a /foo", "/", "")),
    ],
)
def test_commands(line: str, command: tuple[str, str] | None) -> None:
    assert _repl.parse_command(line) == command


def test_every_command_is_in_the_help() -> None:
    assert [name for name in _repl.COMMANDS if name not in _repl.HELP] == ["/?"]


# ---- what they change -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> kvmix.Model:
    return kvmix.Model(tiny.write_model(tmp_path_factory.mktemp("chat") / "tiny.gguf", n_ctx=4096).path)


@pytest.fixture
def conversation(model: kvmix.Model) -> chat.Conversation:
    session = model.session(n_ctx=2048, n_threads=1)
    return chat.Conversation(Chat(session, model_template(model)), kvmix.Sampling(temp=0), max_tokens=8, quiet=True)


def contents(conversation: chat.Conversation) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in conversation.messages]


def test_a_system_message_is_set_changed_and_dropped(conversation: chat.Conversation) -> None:
    answer = conversation.ask("hello").text
    talk = [("user", "hello"), ("assistant", answer)]
    chat.run_command(conversation, "/system", "be brief")
    assert contents(conversation) == [("system", "be brief"), *talk]
    chat.run_command(conversation, "/system", "be long")
    assert contents(conversation) == [("system", "be long"), *talk]
    chat.run_command(conversation, "/system", "")
    assert contents(conversation) == talk


def test_a_file_comes_before_the_next_message(conversation: chat.Conversation, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("one\ntwo\n\n", encoding="utf-8")
    chat.run_command(conversation, "/read", str(tmp_path / "a"))
    conversation.ask("what is this?")
    conversation.ask("and this?")
    assert [text for role, text in contents(conversation) if role == "user"] == [
        "one\ntwo\n\nwhat is this?",
        "and this?",
    ]
    with pytest.raises(kvmix.ModelIOError, match="absent cannot be read: No such file"):
        chat.run_command(conversation, "/read", str(tmp_path / "absent"))


def test_sampling_is_set_within_its_limits(conversation: chat.Conversation) -> None:
    conversation.set("top_k 7")
    assert "temp 0.25, top_k 7, top_p 0.95," in conversation.set("temp 0.25")
    assert conversation.set("seed 18446744073709551615").endswith("seed 18446744073709551615")
    for argument, says in (
        ("top_p 2", "top_p: 2 is above 1"),
        ("temp", "temp: '' is not a number"),
        ("top_k x", "top_k: 'x' is not a whole number"),
        ("colour red", "there is nothing called 'colour' to set; there are temp, top_k"),
    ):
        with pytest.raises(ArgumentError, match=says):
            conversation.set(argument)
    conversation.set("seed -1")
    assert 0 <= conversation.sampling.seed < 1 << 32
    assert (conversation.sampling.temp, conversation.sampling.top_k) == (0.25, 7)


# ---- saved and loaded -----------------------------------------------------------------------------------------------


def test_a_loaded_conversation_goes_on(model: kvmix.Model, conversation: chat.Conversation, tmp_path: Path) -> None:
    """The same answers, nothing evaluated again but the message, and another answer on asking again."""
    conversation.sampling = kvmix.Sampling(temp=1, seed=5)
    conversation.max_tokens = 200
    conversation.set_system("be brief")
    conversation.ask("hello")
    conversation.save(tmp_path / "saved")
    session = model.session(n_ctx=2048, n_threads=1)
    other = chat.Conversation(Chat(session, model_template(model)), conversation.sampling, max_tokens=200, quiet=True)
    other.ask("something else")
    other.load(tmp_path / "saved")
    assert other.messages == conversation.messages
    for turn, again in ((c.ask("and the world?"), c.regenerate()) for c in (conversation, other)):
        assert turn.n_evaluated < 40 and again.n_evaluated <= 2
        assert turn.tokens != again.tokens
    assert other.messages == conversation.messages
    assert other.session.tokens == conversation.session.tokens


def test_an_empty_conversation_is_saved(conversation: chat.Conversation, tmp_path: Path) -> None:
    conversation.save(tmp_path / "saved")
    conversation.ask("hello")
    conversation.load(tmp_path / "saved")
    assert conversation.messages == []
    conversation.ask("hello")


@pytest.mark.parametrize(
    "note",
    [
        b"", b"text", b"[]", b"1", b'{"chat": 2, "messages": []}', b'{"chat": 1, "messages": [1]}',
        b'{"chat": 1, "messages": [{"role": "king", "content": ""}]}', b'{"chat": 1, "messages": []}',
        b'{"chat": 1, "messages": [], "n_checkpoint": 0, "n_replies": 0, "segments": [{"text": "x"}]}',
    ],
)  # fmt: skip
def test_a_session_without_a_conversation(conversation: chat.Conversation, note: bytes, tmp_path: Path) -> None:
    """It is refused, and the one that is going on goes on, evaluated again."""
    conversation.ask("hello")
    messages = list(conversation.messages)
    conversation.session.rewind(5)
    conversation.session.save(tmp_path / "saved", note)
    with pytest.raises(ArgumentError):
        conversation.load(tmp_path / "saved")
    assert conversation.messages == messages
    conversation.ask("again")
    assert len(conversation.messages) == 4


def run(folder: Path, *argv: str, stdin: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvmix.chat", *argv]
    environment = {**os.environ, "KVMIX_CACHE": str(folder)}
    return subprocess.run(command, input=stdin, capture_output=True, text=True, env=environment, timeout=120)


def test_save_and_load_through_pipes(model: kvmix.Model, tmp_path: Path) -> None:
    flags, path = (model.path, "-c", "1024", "-n", "20", "-s", "3"), tmp_path / "saved"
    first = run(tmp_path, *flags, stdin=f"hello\n/save {path}\nthe end\n")
    second = run(tmp_path, *flags, stdin=f"/load {path}\nthe end\n")
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert re.search(r"^saved: 2 messages, \d+ tokens$", first.stderr, re.MULTILINE)
    assert re.search(r"^loaded: 2 messages, \d+ tokens$", second.stderr, re.MULTILINE)
    kept = [re.findall(r"\((\d+) kept\)", result.stderr) for result in (first, second)]
    assert kept[0] == kept[1] != []
    assert second.stdout.strip() and first.stdout.endswith(second.stdout)
    for line in (f"/load {tmp_path}/absent", f"/save {tmp_path}", "/read /nonsense"):
        result = run(tmp_path, *flags, stdin=line + "\nhello\n")
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr.splitlines()[-1].startswith("kvmix: error: ")
    result = run(tmp_path, *flags, "--kv", "k8v8", stdin=f"/load {path}\n")
    assert result.returncode == 1 and "open it with --kv k4v3" in result.stderr
