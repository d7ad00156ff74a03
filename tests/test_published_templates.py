"""What three turns cost with the chat templates that models were published with.

Their texts belong to others and are not kept here. KVMIX_TEMPLATES names a folder of them, NAME.jinja; the package trl
has many (trl/chat_templates: qwen3, llama3, llama3_1, gemma3 ...), and every GGUF file has its own.
"""

import os
from pathlib import Path

import pytest

from test_chat_turns import make_chat, say, words

FOLDER = os.environ.get("KVMIX_TEMPLATES")
TEMPLATES = sorted(Path(FOLDER).glob("*.jinja")) if FOLDER else []
THOUGHTS = "<think>\n" + words(200) + "\n</think>\n\n"
# beside what is new: the last token of the prompt or the answer before, the end of its turn, and what begins turns
AROUND = 24


@pytest.mark.skipif(not TEMPLATES, reason="KVMIX_TEMPLATES names no folder of published templates (NAME.jinja)")
@pytest.mark.parametrize("answer", ["plain", "thoughts", "no thoughts"])
@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_three_turns(path: Path, answer: str) -> None:
    """A turn evaluates the question that is new. Where a template drops old thoughts, or writes another beginning of
    the answer than it did when it was asked for, it evaluates the last answer again, without its thoughts."""
    source = path.read_text(encoding="utf-8")
    thinks = "think" in source
    if answer != "plain" and not thinks:
        pytest.skip("the template knows no thoughts")
    chat, session, model = make_chat(source, thinking=answer != "no thoughts")
    messages: list[dict[str, str]] = []
    n_answer = 150
    for turn in range(3):
        session.answer = ((THOUGHTS if answer == "thoughts" else "") + "x" * n_answer).encode()
        held, before = len(session.tokens), chat.turn.n_prompt if turn else 0
        say(chat, messages, f"question {turn} " + words(300))
        n_new = 303 + AROUND
        if turn == 0:
            assert chat.turn.n_evaluated == chat.turn.n_prompt
        elif not thinks:
            assert chat.turn.n_evaluated == chat.turn.n_prompt - held <= n_new
        else:
            assert chat.turn.n_evaluated <= n_new + n_answer
            assert chat.turn.n_prompt - before <= n_new + n_answer
        text = b"".join(map(model.token_bytes, session.tokens[: chat.turn.n_prompt]))
        assert text.removeprefix(b"<s>") == chat.template.render(messages[:-1]).text.removeprefix(b"<s>")
