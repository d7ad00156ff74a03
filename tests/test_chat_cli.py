"""The chat command: flags, what it prints, and whole runs of it through pipes and on a terminal."""

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gguf import GGUFReader

import kvmix
import tiny
from kvmix import _cli, _repl, _terminal, chat, perplexity
from kvmix._chat import Turn
from kvmix._context import choose_context
from kvmix.errors import ArgumentError, OutOfMemory

# ---- flags ----------------------------------------------------------------------------------------------------------


def parse(*argv: str) -> Any:
    return chat.parser().parse_args(chat.bare_flash_attn(argv))


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--tempp", "1"], "unknown flag --tempp; did you mean --temp?"),
        (["-temp", "1"], "unknown flag -temp; did you mean --temp?"),
        (["--top_k=3"], "unknown flag --top_k; did you mean --top-k?"),
        (["-kv", "k4v3"], "unknown flag -kv; did you mean --kv?"),
        (["-n", "-2"], "-2 is not in -1.."),
        (["-c", "many"], "'many' is not a whole number"),
        (["-c", "16777217"], "16777217 is not in 0..16777216"),
        (["--window", "16777217"], "16777217 is not in 0..16777216"),
        (["--temp", "nan"], "nan is not a finite number"),
        (["--temp", "inf"], "inf is not a finite number"),
        (["--temp", "-1"], "-1 is not at least 0"),
        (["--top-p", "1.5"], "1.5 is above 1"),
        (["--top-p", "0"], "--top-p: 0 is not above 0"),
        (["--repeat-penalty", "0"], "--repeat-penalty: 0 is not above 0"),
        (["-ub", "5000"], "5000 is not in 1..4096"),
        (["--sink", "65"], "65 is not in 0..64"),
        (["-p", "x", "-f", "y"], "not allowed with"),
        (["-fa", "on", "one", "two"], "two"),
    ],
)
def test_a_wrong_command_line_exits_with_2(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(*argv)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_defaults_are_llama_cpps() -> None:
    args = parse()
    assert (args.predict, args.seed, args.batch_size, args.ubatch_size) == (-1, -1, 2048, 512)
    assert (args.escape, args.mmap, args.reasoning, args.ctx_size) == (True, True, "auto", None)
    sampling = chat.sampling_of(args, {})
    assert (sampling.temp, sampling.top_k, sampling.top_p, sampling.min_p) == (0.8, 40, 0.95, 0.05)
    assert (sampling.repeat_penalty, sampling.repeat_last_n) == (1.0, 64)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.0, 0.0)


def test_top_k_may_be_off_as_in_llama_cpp() -> None:
    assert chat.sampling_of(parse("--top-k", "-1"), {}).top_k == -1


def test_all_chunks_by_number_as_in_llama_cpp() -> None:
    assert perplexity.parse(["m.gguf", "text", "--chunks", "-1"]) == perplexity.parse(["m.gguf", "text"])


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("--version")
    assert caught.value.code == 0
    assert re.fullmatch(r"kvmix \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_flags_win_over_the_catalog() -> None:
    sampling = chat.sampling_of(parse("--temp", "0", "-s", "9"), {"temp": 0.2, "top_p": 0.9})
    assert (sampling.temp, sampling.top_p, sampling.top_k, sampling.seed) == (0.0, 0.9, 40, 9)
    assert chat.sampling_of(parse(), {}).seed != chat.sampling_of(parse(), {}).seed


def test_spellings() -> None:
    args = parse("-m", "a.gguf", "-c4096", "-t2", "-n", "5", "-st", "-no-cnv", "-sys", "S", "-ctk", "q4_0", "-ctv=q3")
    assert (args.model_flag, args.ctx_size, args.threads, args.predict) == ("a.gguf", 4096, 2, 5)
    assert (args.single_turn, args.no_conversation, args.system_prompt) == (True, True, "S")
    assert (args.cache_type_k, args.cache_type_v) == ("q4_0", "q3")
    assert _cli.model_name(args) == "a.gguf"
    with pytest.raises(ArgumentError, match=r"a\.gguf and -m b\.gguf"):
        _cli.model_name(parse("a.gguf", "-m", "b.gguf"))


def test_what_is_taken_without_effect_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    args = parse("-fa", "m.gguf", "-ngl", "99", "--jinja", "-cnv", "-tb", "4", "--no-warmup")
    assert (args.model, args.fa) == ("m.gguf", "on")
    assert parse("-fa", "off", "m.gguf").fa == "off"
    chat.mention_taken(args)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(f"{flag} (" in error for flag in chat.TAKEN)
    chat.mention_taken(parse("m.gguf"))
    assert capsys.readouterr().err == ""


def test_session_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert _cli.session_options(parse()) == {"kv": None, "k_type": None, "v_type": None, "n_batch": 512}
    args = parse("-c", "0", "-b", "64", "--kv", "k8v4", "-ctk", "q4_0", "-ctv", "q3", "--window", "0", "--sink", "4")
    assert _cli.session_options(args) == {
        "kv": "k8v4", "k_type": "q4", "v_type": "q3", "n_batch": 64, "n_ctx": 0, "window": 0, "sink": 4,
    }  # fmt: skip
    assert re.search("q4_0 is llama.cpp's name .*; q4 is used", capsys.readouterr().err)


def test_escapes() -> None:
    assert chat.unescape(r"a\nb\t\\n \"\' \q C:\x") == "a\nb\t\\n \"' \\q C:\\x"
    assert chat.first_message(parse("-p", r"a\nb")) == "a\nb"
    assert chat.first_message(parse("-p", r"a\nb", "--no-escape")) == r"a\nb"


# ---- how large a context --------------------------------------------------------------------------------------------


class Planner:
    """A model whose cache takes 100 bytes a token, and its workspace 10,000."""

    def __init__(self, n_ctx_train: int, weight_bytes: int = 0):
        self.info = SimpleNamespace(n_ctx_train=n_ctx_train, weight_bytes=weight_bytes)

    def plan(self, n_ctx: int, **_options: Any) -> Any:
        return SimpleNamespace(kv_bytes=100 * n_ctx, workspace_bytes=10_000)


@pytest.mark.parametrize(
    ("trained", "weights", "asked", "free", "chosen"),
    [
        (8192, 0, None, 10_000_000, 8192),  # all of it fits
        (131072, 0, None, 10_000_000, 79872),  # 80% of free, in pages
        (131072, 3_000_000, None, 10_000_000, 49792),  # beside the weights
        (2048, 0, None, 10_000_000, 2048),
        (8192, 0, 0, 10_000_000, 8192),
        (8192, 0, 70000, 10_000_000, 70000),  # more than trained is the user's affair
        (8192, 0, 100, 10_000_000, 100),
    ],
)
def test_choosing_a_context(trained: int, weights: int, asked: int | None, free: int, chosen: int) -> None:
    options = {} if asked is None else {"n_ctx": asked}
    context = choose_context(Planner(trained, weights), options, free)  # type: ignore[arg-type]
    assert context.n_ctx == chosen
    assert chosen <= context.n_fits
    assert context.memory_limit == 0.8 * free - weights


@pytest.mark.parametrize("asked", [None, 0, 90000])
def test_a_context_that_does_not_fit_is_refused_with_the_numbers(asked: int | None) -> None:
    options = {} if asked is None else {"n_ctx": asked}
    free = 10_000_000 if asked else 300_000
    with pytest.raises(OutOfMemory, match=r"-c \d+ fits") as caught:
        choose_context(Planner(8192), options, free)  # type: ignore[arg-type]
    assert str(asked or (4096 if asked is None else 8192)) in str(caught.value)
    assert "MiB" in str(caught.value)


# ---- what it writes -------------------------------------------------------------------------------------------------


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def written(pieces: list[str], stream: io.StringIO, thinking: bool = False) -> str:
    writer = _terminal.AnswerWriter(stream, thinking=thinking)
    for piece in pieces:
        writer.write(piece)
    writer.close()
    return stream.getvalue()


def test_thoughts_are_dim_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = "a <think>\nhm</think> b < c"
    want = "a \x1b[2m<think>\nhm</think>\x1b[0m b < c\n"
    assert written([text], Tty()) == want
    assert written(list(text), Tty()) == want  # a tag in pieces
    assert written(["hm", "</thi", "nk>b"], Tty(), thinking=True) == "\x1b[2mhm</think>\x1b[0mb\n"
    assert written(["hm"], Tty(), thinking=True) == "\x1b[2mhm\x1b[0m\n"
    assert written(list(text), io.StringIO()) == text + "\n"
    monkeypatch.setenv("NO_COLOR", "1")
    assert written(list(text), Tty()) == text + "\n"


def test_a_model_cannot_steer_the_terminal() -> None:
    evil = "a\x1b]0;title\x07b\x9b2Jc\rd\te\n"
    assert written([evil], Tty()) == "a]0;titleb2Jcd\te\n"
    assert written([evil], io.StringIO()) == evil


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["one"], "one"),
        (["one\\", "two\\", "three"], "one\ntwo\nthree"),
        (['"""', "one", "", "  two", '"""'], "one\n\n  two"),
        (['"""', "never closed"], "never closed"),
        (['"""one', "two", ' three"""'], "one\ntwo\n three"),
        (['"""one line"""'], "one line"),
        (['"""', 'a """ inside', "", '"""'], 'a """ inside\n'),
        (['"""pasted\ntext"""\n'], "pasted\ntext"),
        (["ends\\"], "ends\n"),
        (["pasted\ntext"], "pasted\ntext"),
    ],
)
def test_messages_of_several_lines(lines: list[str], message: str) -> None:
    rest = iter(lines)

    def read_line(_prompt: str) -> str:
        for line in rest:
            return line
        raise EOFError

    assert _repl.read_message(read_line) == message
    with pytest.raises(EOFError):
        _repl.read_message(read_line)


@pytest.mark.parametrize("before", [['"""', "two"], ["one\\"]])
def test_ctrl_c_takes_back_what_was_begun(before: list[str]) -> None:
    rest = iter(before)

    def read_line(_prompt: str) -> str:
        for line in rest:
            return line
        raise KeyboardInterrupt

    with pytest.raises(_repl.TakenBack):
        _repl.read_message(read_line)
    with pytest.raises(KeyboardInterrupt):
        _repl.read_message(read_line)


def test_the_line_about_an_answer_is_short() -> None:
    turn = Turn(n_evaluated=123, n_kept=8123, prompt_s=0.25, generate_s=9.9, tokens=[0] * 512)
    stats = SimpleNamespace(kv_used_bytes=99 << 20, bits_now=12.3, bits_full=3.9, n_tokens=8758, n_ctx=32768)
    line = _terminal.turn_line(turn, stats)  # type: ignore[arg-type]
    assert line == (
        "prompt 123 492.0 t/s (8123 kept) | answer 512 51.7 t/s | KV 99.0 MiB 12.3 bits (full 3.9) | context 8758/32768"
    )
    assert len(line) <= 110


@pytest.mark.parametrize(
    ("statement", "code", "says"),
    [
        ("raise ArgumentError('no such thing')", 1, "kvmix: error: no such thing\n"),
        ("raise KeyboardInterrupt", 130, ""),
        ("os.kill(os.getpid(), 2); os.kill(os.getpid(), 2)", 130, ""),
        (
            "os.dup2(os.open('/dev/full', os.O_WRONLY), 1); print('x'); return 0",
            1,
            "kvmix: error: the output cannot be written: No space left on device\n",
        ),
        ("os.dup2(os.open('/dev/full', os.O_WRONLY), 2); raise OSError(28, 'full')", 1, ""),
        ("return 3", 3, ""),
        ("os.close(1); os.dup2(os.pipe()[1], 1); [os.close(i) for i in range(3, 20) if i != 1]; print('x')", 141, ""),
    ],
)
def test_exit_codes(statement: str, code: int, says: str) -> None:
    program = f"""
import os, sys
from kvmix import _cli
from kvmix.errors import ArgumentError
def main(argv):
    {statement}
sys.exit(_cli.run(main))"""
    program = program.replace("[os.close(i) for i in range(3, 20) if i != 1]", "os.closerange(3, 20)")
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (code, says)


# ---- whole runs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.write_model(tmp_path_factory.mktemp("chat") / "tiny.gguf", n_ctx=100_000).path)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {**os.environ, "KVMIX_CACHE": str(tmp_path_factory.mktemp("cache")), "PROMPT_TOOLKIT_NO_CPR": "1",
            "TERM": "xterm", "PIP_NO_INDEX": "1"}  # fmt: skip


Run = subprocess.CompletedProcess[bytes]


def run(environment: dict[str, str], *argv: str, stdin: bytes = b"", **more: Any) -> Run:
    command = [sys.executable, "-m", "kvmix.chat", *argv]
    return subprocess.run(command, input=stdin, capture_output=True, env=environment, timeout=120, **more)


STATS = re.compile(
    rb"^prompt (\d+)( [\d.]+ t/s)?( \(\d+ kept\))? \| answer (\d+)( [\d.]+ t/s)? \| "
    rb"KV [\d.]+ MiB [\d.]+ bits \(full [\d.]+\) \| context (\d+)/(\d+)$",
    re.MULTILINE,
)


def test_one_shot(model: str, environment: dict[str, str], tmp_path: Path) -> None:
    result = run(environment, model, "-p", "hello", "-n", "8", "--temp", "0", "-c", "1024")
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith(b"\n")
    stats = STATS.search(result.stderr)
    assert stats is not None, result.stderr
    assert [int(stats[i]) for i in (4, 7)] == [8, 1024]
    assert b"tiny.gguf: llama" in result.stderr
    assert b"context 1024 (trained 100000" in result.stderr
    assert b"recipe k4v3 (default), window 128, sink 16; KV " in result.stderr

    file = tmp_path / "prompt.txt"
    file.write_text("hello")
    again = run(environment, "-m", model, "-f", str(file), "-n", "8", "--temp", "0", "-c", "1024")
    assert again.stdout == result.stdout


def test_json(model: str, environment: dict[str, str]) -> None:
    argv = [model, "-n", "8", "-s", "1", "--json", "--kv", "k8v4"]
    by_flag = run(environment, *argv, "-p", "hello")
    by_pipe = run(environment, *argv, stdin=b"hello\n")
    a, b = json.loads(by_flag.stdout), json.loads(by_pipe.stdout)
    assert a["tokens"] == b["tokens"]
    assert (a["n_generated"], a["finish"], a["recipe"]) == (8, "length", "k8v4")
    assert len(a["tokens"]) == 8
    assert a["n_prompt"] == a["n_evaluated"] > 0
    assert 0 < a["kv_used_bytes"] <= a["kv_bytes"]
    assert 0 < a["kv_bits_full"] < a["kv_bits"]
    assert a["prompt_s"] > 0 < a["generate_s"]


def test_json_takes_all_of_stdin(model: str, environment: dict[str, str]) -> None:
    argv = [model, "-n", "2", "--json"]
    whole = json.loads(run(environment, *argv, stdin=b"/clear\ntwo\n\nlines\n").stdout)
    assert whole["n_prompt"] == json.loads(run(environment, *argv, "-p", "/clear\ntwo\n\nlines").stdout)["n_prompt"]
    nothing = run(environment, *argv)
    assert (nothing.returncode, nothing.stdout) == (2, b"")
    assert b"--json needs a message: -p, -f or text on stdin" in nothing.stderr


def test_raw_prompts_may_name_control_tokens(model: str, environment: dict[str, str]) -> None:
    def n_prompt(*argv: str) -> int:
        result = run(environment, model, "-n", "1", "--json", "-p", "<|im_start|>", *argv)
        return int(json.loads(result.stdout)["n_prompt"])

    assert n_prompt("-no-cnv") == 1
    assert n_prompt("--chat-template", "{{ messages[0].content }}") > 1


def test_a_context_beyond_the_trained_one_is_mentioned(tmp_path: Path, environment: dict[str, str]) -> None:
    short = str(tiny.write_model(tmp_path / "short.gguf", n_ctx=256).path)
    for n_ctx, n_lines in ((256, 0), (512, 1)):
        result = run(environment, short, "-c", str(n_ctx), "-n", "1", "-p", "x")
        assert result.stderr.count(b"more than the model was trained for (256)") == n_lines


def test_a_full_context_is_said(model: str, environment: dict[str, str]) -> None:
    result = run(environment, model, "-c", "40", "-p", "hello", "--temp", "0")
    assert result.returncode == 0
    assert b"the context is full" in result.stderr
    assert b"/clear" not in result.stderr
    n_prompt = json.loads(run(environment, model, "-n", "1", "--json", "-p", "hello").stdout)["n_prompt"]
    result = run(environment, model, "-c", str(n_prompt), "-p", "hello")
    assert b"an answer needs room for one more at least" in result.stderr


def test_the_commands_are_listed(environment: dict[str, str]) -> None:
    result = subprocess.run([sys.executable, "-m", "kvmix"], capture_output=True, env=environment, timeout=60)
    assert (result.returncode, result.stderr) == (0, b"")
    assert b"python -m kvmix.chat " in result.stdout
    assert b"python -m kvmix.perplexity " in result.stdout


def test_a_conversation_through_pipes(model: str, environment: dict[str, str]) -> None:
    lines = b"hello\n\n/kv\n/nonsense\nthe end\n/regen\n/clear\nagain\n/exit\nnever\n"
    result = run(environment, model, "-n", "200", "--temp", "0", stdin=lines)
    assert result.returncode == 0, result.stderr
    turns = [[int(m[1]), int(m[6])] for m in STATS.finditer(result.stderr)]
    assert len(turns) == 4
    assert turns[1][0] < 30  # the second turn evaluates the end of the first, and its own message
    assert turns[2][0] <= 2  # /regen
    assert turns[2][1] == turns[1][1]
    assert turns[3][1] < turns[1][1]  # /clear
    assert b"there is no command /nonsense" in result.stderr
    assert re.search(rb"layer\s+0-1  K q4   V q3   \d+ bytes", result.stderr)
    assert not re.search(rb"\x1b\[[\d;]*m", result.stdout + result.stderr)  # no colour; a lone escape is the model's


def test_one_turn(model: str, environment: dict[str, str]) -> None:
    result = run(environment, model, "-n", "4", "-st", stdin=b"hello\nmore\n")
    assert (result.returncode, len(STATS.findall(result.stderr))) == (0, 1)


def test_what_is_said_about_templates(tmp_path: Path, model: str, environment: dict[str, str]) -> None:
    bare = str(tiny.write_model(tmp_path / "bare.gguf", chat_template=None).path)
    result = run(environment, bare, "-p", "hello", "-n", "2")
    assert result.returncode == 0
    assert b"no chat template" in result.stderr
    assert b"no chat template" not in run(environment, bare, "-no-cnv", "-p", "hello", "-n", "2").stderr
    folded = run(environment, model, "--chat-template", "gemma", "-sys", "be kind", "-p", "hello", "-n", "2")
    assert folded.stderr.count(b"no system role") == 1
    broken = str(tiny.write_model(tmp_path / "broken.gguf", chat_template="{% if %}").path)
    result = run(environment, broken, "-p", "hello")
    assert result.returncode == 1
    assert b"-no-cnv go without it" in result.stderr
    assert run(environment, broken, "-no-cnv", "-p", "hello", "-n", "2").returncode == 0


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["missing.gguf", "-p", "x"], "there is no file missing.gguf"),
        (["/", "-p", "x"], ""),
        (["", "-p", "x"], "the name of the model is empty"),
        (["nonsense", "-p", "x"], "is neither a file nor one of smollm2-135m-instruct"),
        (["MODEL", "-p", ""], "the prompt is empty"),
        (["MODEL", "-f", "/nonsense"], "cannot be read"),
        (["MODEL", "-p", "bad \udcff"], "not valid UTF-8"),
        (["MODEL", "-c", "64", "-p", "word " * 200], "the context holds 64"),
        (["MODEL", "-ctk", "q9", "-p", "x"], "q9"),
        (["MODEL", "--kv", "k4v", "-p", "x"], "k4v"),
        (["MODEL", "--kv", "k4v3,0-9:k8v4", "-p", "x"], "9"),
        (["MODEL", "--chat-template", "nonsense", "-p", "x"], "chatml"),
        (["-p", "x"], "cannot be fetched"),
    ],
)
def test_bad_input_is_one_sentence(argv: list[str], says: str, model: str, environment: dict[str, str]) -> None:
    result = run(environment, *(model if a == "MODEL" else a for a in argv))
    assert result.returncode == 1, result.stderr
    sentences = [line for line in result.stderr.decode().splitlines() if line.startswith("kvmix: error: ")]
    assert len(sentences) == 1
    assert says in sentences[0]
    assert "Traceback" not in result.stderr.decode()
    assert result.stdout == b""


def test_a_context_that_does_not_fit(tmp_path: Path, environment: dict[str, str]) -> None:
    # 16 KiB a token in f16
    wide = str(tiny.write_model(tmp_path / "wide.gguf", n_layer=8, n_embd=64, n_head_kv=4, head_dim=128, n_ff=64).path)
    result = run(environment, wide, "-c", "16000000", "--kv", "f16", "-p", "x")
    assert result.returncode == 1
    assert re.search(rb"a context of 16000000 tokens needs \d+\.\d+ GiB .*: -c \d+ fits\n", result.stderr)


def test_lines_that_are_no_utf8(model: str, environment: dict[str, str]) -> None:
    result = run(environment, model, "-n", "2", stdin=b"hello\n\xff\xfe\n")
    assert result.returncode == 1
    assert b"not valid UTF-8 at its byte 0" in result.stderr


def test_output_that_nobody_reads(model: str, environment: dict[str, str]) -> None:
    command = f"{sys.executable} -m kvmix.chat {model} -p hello -n 3000 --temp 0"
    closed = subprocess.run(["sh", "-c", command + " >&- 2>&-"], env=environment, timeout=120)
    assert closed.returncode == 0
    head = subprocess.run(["bash", "-o", "pipefail", "-c", command + " | head -c 1"], env=environment, timeout=120,
                          capture_output=True)  # fmt: skip
    assert head.returncode == 141
    assert b"Traceback" not in head.stderr
    for more in ("", " --json"):
        full = subprocess.run(["sh", "-c", command + more + " -n 8 > /dev/full"], env=environment, timeout=120,
                              capture_output=True)  # fmt: skip
        assert full.returncode == 1
        assert full.stderr.endswith(b"kvmix: error: the output cannot be written: No space left on device\n")
        assert b"Traceback" not in full.stderr


def test_ctrl_c_without_a_terminal(model: str, environment: dict[str, str]) -> None:
    process = subprocess.Popen([sys.executable, "-m", "kvmix.chat", model, "-p", "hello", "--temp", "0"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)  # fmt: skip
    assert process.stdout is not None
    process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert STATS.search(errors) is not None
    assert b"Traceback" not in errors


@pytest.mark.parametrize("n_presses", [2, 3, 4])
@pytest.mark.parametrize("pause", [0.005, 0.02])
def test_an_impatient_ctrl_c(n_presses: int, pause: float, talker: str, environment: dict[str, str]) -> None:
    process = subprocess.Popen([sys.executable, "-m", "kvmix.chat", talker, "-p", "hello", "--temp", "0"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)  # fmt: skip
    assert process.stdout is not None
    process.stdout.read(20)
    for _ in range(n_presses):
        process.send_signal(signal.SIGINT)
        time.sleep(pause)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Interrupt" not in errors


@pytest.mark.parametrize("command", ["chat", "perplexity"])
@pytest.mark.parametrize("module", ["tqdm", "numpy"])
def test_ctrl_c_while_modules_are_loaded(
    command: str, module: str, model: str, environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / f"{module}.py").write_text("import os, time\nos.kill(os.getpid(), 2)\ntime.sleep(9)\n")
    (tmp_path / "text.txt").write_text("hello")
    path = os.pathsep.join([str(tmp_path), environment.get("PYTHONPATH", "")])
    result = subprocess.run([sys.executable, "-m", f"kvmix.{command}", model, "-f", str(tmp_path / "text.txt")],
                            capture_output=True, env={**environment, "PYTHONPATH": path}, timeout=60)  # fmt: skip
    assert (result.returncode, result.stdout, result.stderr) == (130, b"", b"")


READY = rb"(?s)>[^>]*\x1b\[\?25h"  # the prompt, and a visible cursor


class Terminal:
    """A chat on a pseudo-terminal."""

    def __init__(self, environment: dict[str, str], *argv: str):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execve(sys.executable, [sys.executable, "-m", "kvmix.chat", *argv], environment)
        self.seen = b""

    def expect(self, pattern: bytes, seconds: float = 60) -> bytes:
        """Waits for pattern, and forgets what came up to it."""
        deadline = time.monotonic() + seconds
        while (match := re.search(pattern, self.seen)) is None:
            assert time.monotonic() < deadline, (pattern, self.seen)
            if select.select([self.fd], [], [], 0.1)[0]:
                self.seen += os.read(self.fd, 1 << 16)
        self.seen = self.seen[match.end() :]
        return match[0]

    def send(self, keys: bytes) -> None:
        os.write(self.fd, keys)

    def exit_code(self) -> int:
        while True:  # until the other side is closed; what is not read would block it
            try:
                if not os.read(self.fd, 1 << 16):
                    break
            except OSError:
                break
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose answers do not end: the output rows of its end tokens are zero, so their logits are."""
    path = tiny.write_model(tmp_path_factory.mktemp("talker") / "talker.gguf", n_ctx=100_000).path
    opened = kvmix.Model(path)
    ends = [token for token in range(opened.info.n_vocab) if opened.is_end(token)]
    opened.close()
    assert ends
    [output] = [tensor for tensor in GGUFReader(path, "r+").tensors if tensor.name == "output.weight"]
    output.data[ends] = 0
    return str(path)


@pytest.fixture
def terminal(talker: str, environment: dict[str, str]) -> Iterator[Terminal]:
    terminal = Terminal(environment, talker, "--temp", "0")
    terminal.expect(b"/help lists the commands")
    yield terminal
    os.close(terminal.fd)


def test_ctrl_c_on_a_terminal(terminal: Terminal, environment: dict[str, str]) -> None:
    terminal.expect(READY)
    terminal.send(b"hello\r")
    terminal.expect(rb"hello.*\n[^\n]*\S")
    time.sleep(0.5)
    pressed = time.monotonic()
    terminal.send(b"\x03")
    terminal.expect(rb"prompt \d+ .*context \d+/")
    assert time.monotonic() - pressed < 1.0
    terminal.expect(READY)
    terminal.send(b"/kv\r")  # the session lives on
    terminal.expect(rb"layer")
    terminal.expect(READY)
    terminal.send(b"\x1b[200~two\nlines\x1b[201~\r")  # pasted
    terminal.expect(rb"lines")
    time.sleep(0.5)
    terminal.send(b"\x03")
    terminal.expect(rb"prompt \d+ [\d.]+ t/s \(\d+ kept\)")
    terminal.expect(READY)
    terminal.send(b"\x03")
    terminal.expect(b"Ctrl-C again leaves")
    terminal.expect(READY)
    terminal.send(b"\x03")
    assert terminal.exit_code() == 130
    history = Path(environment["KVMIX_CACHE"]) / "history"
    assert history.stat().st_mode & 0o777 == 0o600
    assert "+two\n+lines\n" in history.read_text()


def test_ctrl_c_at_the_prompt(terminal: Terminal) -> None:
    terminal.expect(READY)
    terminal.send(b"/exit")  # a line, not entered
    terminal.expect(b"/exit")
    terminal.send(b"\x03")
    terminal.expect(READY)
    terminal.send(b'"""a block\r')
    terminal.expect(rb"(?s)\.[^.>]*\x1b\[\?25h")
    terminal.send(b"\x03")
    terminal.expect(READY)
    terminal.send(b"\x03")
    terminal.expect(b"Ctrl-C again leaves")
    terminal.expect(READY)
    terminal.send(b"/kv\r")  # between two of them: the second is a first one again
    terminal.expect(b"layer")
    terminal.expect(READY)
    terminal.send(b"\x03")
    terminal.expect(b"Ctrl-C again leaves")
    terminal.expect(READY)
    terminal.send(b"/quit\r")
    assert terminal.exit_code() == 0


def test_leaving_a_terminal(terminal: Terminal) -> None:
    terminal.expect(READY)
    terminal.send(b"/help\r")
    terminal.expect(b"/regen")
    terminal.expect(READY)
    terminal.send(b"\x04")
    assert terminal.exit_code() == 0


def test_a_full_context_on_a_terminal(model: str, environment: dict[str, str]) -> None:
    terminal = Terminal(environment, model, "--temp", "0", "-c", "256", "-n", "60")
    for _ in range(2):
        terminal.expect(READY)
        terminal.send(b"one two three four\r")
        terminal.expect(rb"context \d+/256")
    terminal.expect(READY)
    terminal.send(b"word " * 40 + b"\r")
    n_offers = 0
    while b"Drop" in terminal.expect(rb"Drop the oldest question and its answer\?|context \d+/256"):
        n_offers += 1
        terminal.send(b"y\r")
    assert 1 <= n_offers <= 2
    terminal.expect(READY)
    terminal.send(b"word " * 300 + b"\r")
    terminal.expect(rb"Drop the oldest question and its answer\?")
    terminal.send(b"n\r")
    terminal.expect(rb"the context holds 256")
    for key in (b"\x03", b"\x04"):
        terminal.expect(READY)
        terminal.send(b"word " * 300 + b"\r")
        terminal.expect(rb"(?s)Drop the oldest question and its answer\?.*\[y/n\].*\x1b\[\?25h")
        terminal.send(key)
        terminal.expect(rb"the context holds 256")
    terminal.expect(READY)
    terminal.send(b"/exit\r")
    assert terminal.exit_code() == 0
    os.close(terminal.fd)
