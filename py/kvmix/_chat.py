"""A conversation on a session: messages in, pieces of text out, and as little evaluated as the template allows.

A prompt is rendered anew each turn, but token ids already held are kept, never made again from text: what a model
generated need not be what the tokenizer would make of it. So a chat remembers *segments*, each the bytes and flags of
a piece of the conversation with the ids that stand for it: alternately a piece of prompt and an answer.

Invariants
1. tokens(prompt) takes segments, in order, while the prompt continues with exactly their bytes *and flags* (or a
   user's message could stand in for control tokens of an earlier conversation), and tokenizes the rest. Segments end
   where generation began or ended, so no token ever spans that cut.
2. The session is synced to those ids; Session.sync keeps the longest common prefix, so a turn costs what differs.
3. A checkpoint is taken where the next turn's prompt will still agree with this one. That is mostly the prompt's end,
   but a template may open a thinking block there which it drops from history; so it is found by rendering a next turn.
   It is one token short of the end, for answering the same prompt again evaluates the last token again.
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, proxy

from ._template import ChatTemplate, Message, PlainText, Prompt, Renderer
from .errors import ContextFull

if TYPE_CHECKING:
    from ._model import Model
    from ._session import Sampling, Session

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Segment:
    prompt: Prompt
    ids: tuple[int, ...]


@dataclass
class Turn:
    """What the last answer was and cost; filled while it streams."""

    n_prompt: int = 0  # tokens of the whole prompt
    n_kept: int = 0  # of those, still held from before
    n_evaluated: int = 0  # evaluated for this turn: the others, unless it was cancelled
    thinking: bool = False  # the prompt's end opens a thinking block
    prompt_s: float = 0.0
    generate_s: float = 0.0
    finish: str = "cancelled"  # "stop", "length" (max_tokens), "full" (the context), "cancelled"
    tokens: list[int] = field(default_factory=list)
    text: str = ""


def model_template(model: Model, source: str | None = None, *, enable_thinking: bool | None = None) -> Renderer:
    """The template of a model (or `source` instead), or PlainText for a model that has none."""
    source = model.chat_template if source is None else source
    if source is None:
        return PlainText()

    def text_of(token: int) -> str:
        return model.token_bytes(token).decode("utf-8", "replace") if token >= 0 else ""

    variables = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
    return ChatTemplate(source, bos=text_of(model.info.bos), eos=text_of(model.info.eos), variables=variables)


class Chat:
    """A session and its template. `turn` tells about the latest reply()."""

    def __init__(self, session: Session, template: Renderer):
        self.session = session
        self.template = template
        self.turn = Turn()
        self._segments: list[Segment] = []
        self._checkpoint: list[int] = []
        self._n_replies = 0

    def reply(
        self, messages: Sequence[Message], sampling: Sampling, max_tokens: int = -1, progress: Progress | None = None
    ) -> Iterator[str]:
        """Streams the answer to messages in pieces of whole characters.

        ContextFull, before anything is evaluated, when the prompt leaves no room; Cancelled after Session.cancel(). An
        answer that was stopped, also by close(), is kept as far as it came."""
        self.turn = turn = Turn()
        prompt = self._with_bos(self.template.render(messages))
        tokens, self._segments = self._tokens(prompt)
        n_ctx = self.session.stats.n_ctx
        if len(tokens) >= n_ctx:
            raise ContextFull(
                f"the conversation has {len(tokens)} tokens, the context holds {n_ctx}, and an answer needs room for "
                "one more at least: shorten it, start anew, or open a larger context (-c)"
            )
        turn.n_prompt = len(tokens)
        turn.thinking = prompt.text.rstrip().endswith(b"<think>")
        n_stable = self._stable_length(messages, prompt, tokens)
        before, start = self.session.stats.n_evaluated, time.perf_counter()
        try:
            self._evaluate(tokens, n_stable, progress)
        finally:
            turn.n_evaluated = self.session.stats.n_evaluated - before
            turn.prompt_s = time.perf_counter() - start
        turn.n_kept = len(tokens) - turn.n_evaluated
        # without this, asking again for the same prompt would give the same answer again
        sampling = replace(sampling, seed=(sampling.seed + self._n_replies) % (1 << 64))
        self._n_replies += 1
        yield from self._generate(sampling, max_tokens, turn)

    def memory(self) -> dict[str, Any]:
        """What a saved session lacks for this chat to go on, for JSON."""
        segments = [
            {"text": s.prompt.text.hex(), "trusted": s.prompt.trusted.hex(), "ids": s.ids} for s in self._segments
        ]
        return {"segments": segments, "n_checkpoint": len(self._checkpoint), "n_replies": self._n_replies}

    def recall(self, memory: Mapping[str, Any]) -> None:
        """Goes on from memory() and the session that was loaded."""
        segments = [
            Segment(Prompt(bytes.fromhex(s["text"]), bytes.fromhex(s["trusted"])), tuple(s["ids"]))
            for s in memory["segments"]
        ]
        ids = [token for segment in segments for token in segment.ids]
        checkpoint, n_replies = ids[: memory["n_checkpoint"]], int(memory["n_replies"])
        self._segments, self._checkpoint, self._n_replies = segments, checkpoint, n_replies

    def _generate(self, sampling: Sampling, max_tokens: int, turn: Turn) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        start = time.perf_counter()
        try:
            for token in self.session.generate(sampling, max_tokens):
                turn.generate_s = time.perf_counter() - start
                turn.tokens.append(token)
                piece = decoder.decode(self.session.model.token_bytes(token))
                turn.text += piece
                if piece:
                    yield piece
            turn.finish = "length" if len(turn.tokens) == max_tokens else "stop"
        except ContextFull:
            turn.finish = "full"
        finally:
            rest = decoder.decode(b"", final=True)
            turn.text += rest
            if turn.tokens:
                # as text, for so the answer comes back in messages, also where its bytes were no whole characters
                text = turn.text.encode()
                self._segments.append(Segment(Prompt(text, bytes(len(text))), tuple(turn.tokens)))
        if rest:
            yield rest

    def _with_bos(self, prompt: Prompt) -> Prompt:
        """Puts BOS before the prompt where the model wants one and the template has not written it."""
        info = self.session.model.info
        if not info.add_bos or info.bos < 0:
            return prompt
        text = self.session.model.token_bytes(info.bos)
        bos = Prompt(text, b"\1" * len(text))
        return prompt if prompt[: len(text)] == bos else bos + prompt

    def _tokens(self, prompt: Prompt) -> tuple[list[int], list[Segment]]:
        tokens: list[int] = []
        segments: list[Segment] = []
        at = 0
        for segment in self._segments:
            end = at + len(segment.prompt.text)
            if prompt[at:end] != segment.prompt:
                break
            segments.append(segment)
            tokens += segment.ids
            at = end
        rest = prompt[at:]
        ids = self.session.model.tokenize(rest.text, add_special=False, parse_special=True, trusted=rest.trusted)
        return tokens + ids, [*segments, Segment(rest, tuple(ids))]

    def _stable_length(self, messages: Sequence[Message], prompt: Prompt, tokens: list[int]) -> int:
        """How many of tokens, the prompt's, the next turn's prompt will begin with; not all of them."""
        later = [*messages, {"role": "assistant", "content": "."}, {"role": "user", "content": "."}]
        agree = common_length(prompt.text, self._with_bos(self.template.render(later)).text)
        return common_length(tokens[:-1], self._tokens(prompt[:agree])[0])

    def _evaluate(self, tokens: list[int], n_stable: int, progress: Progress | None) -> None:
        def report(done: int, _total: int) -> None:
            if progress is not None:
                progress(done, len(tokens))

        # where it is the same prompt again, the checkpoint is there
        if n_stable and tokens[:n_stable] != self._checkpoint:
            self.session.sync(tokens[:n_stable], report)
            self.session.checkpoint()
            self._checkpoint = tokens[:n_stable]
        self.session.sync(tokens, report)


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


_chats: WeakKeyDictionary[Session, Chat] = WeakKeyDictionary()


def chat_stream(session: Session, messages: Sequence[Message], sampling: Sampling, max_tokens: int) -> Iterator[str]:
    """Session.chat: the chat of a session lives as long as the session, so that calls share what was evaluated."""
    chat = _chats.get(session)
    if chat is None:
        # a proxy, for the values of a WeakKeyDictionary must not keep its keys alive
        chat = _chats[session] = Chat(proxy(session), model_template(session.model))
    yield from chat.reply(messages, sampling, max_tokens)
