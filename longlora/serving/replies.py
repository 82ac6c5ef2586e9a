"""OpenAI's API, the answers: from pieces of answers to the bodies of responses and streams."""

import json
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from longlora import __version__
from longlora.serving.protocol import Wanted
from longlora.serving.text import Spelling
from longlora.serving.worker import Piece, Score

DONE = b"data: [DONE]\n\n"
LEAST = -9999.0  # stands for a log-probability of minus infinity, which JSON has no word for


def encoded(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def event(value: Any) -> bytes:
    """An event of a stream of server-sent events."""
    return b"data: " + encoded(value) + b"\n\n"


@dataclass
class _Said:
    """One answer so far. start: characters before its next token."""

    echo: str
    text: list[str] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    tokens: int = 0
    start: int = 0
    cut: bool = False
    reason: str | None = None


class Reply:
    """The body or the stream that answers one request. echoes: for each answer the text that it begins with.

    prompt_tokens: of all prompts. cached: a function that says how many of them a cache held.
    """

    def __init__(
        self,
        wanted: Wanted,
        model: str,
        spelling: Spelling,
        echoes: Sequence[str],
        prompt_tokens: int,
        cached: Any,
    ):
        self._wanted, self._spelling, self._chat = wanted, spelling, wanted.messages is not None
        self._prompt_tokens, self._cached = prompt_tokens, cached
        self._said = [_Said(echo) for echo in echoes]
        self._head = dict(
            id=("chatcmpl-" if self._chat else "cmpl-") + secrets.token_hex(12),
            object="",
            created=int(time.time()),
            model=model,
            system_fingerprint=f"longlora-{__version__}",
        )

    @property
    def complete(self) -> bool:
        return all(said.reason for said in self._said)

    def add(self, piece: Piece) -> None:
        """Add the new part of an answer."""
        said = self._said[piece.index]
        said.text.append(piece.text)
        said.scores.extend(piece.scores)
        said.tokens += piece.tokens
        said.cut, said.reason = piece.cut, piece.reason

    def body(self) -> dict[str, Any]:
        """The whole answer."""
        choices = []
        for index, said in enumerate(self._said):
            text = said.echo + "".join(said.text)
            content: dict[str, Any] = dict(text=text)
            if self._chat:
                content = dict(message=dict(role="assistant", content=text, refusal=None))
            logprobs = self._logprobs(said, said.scores, len(text))
            choices.append(dict(index=index, **content, logprobs=logprobs, finish_reason=said.reason))
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        made = sum(said.tokens for said in self._said)
        return dict(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=made,
            total_tokens=self._prompt_tokens + made,
            prompt_tokens_details=dict(cached_tokens=self._cached()),
        )

    def beginning(self) -> Iterator[bytes]:
        """The events before the first piece."""
        for index in range(len(self._said)) if self._chat else ():
            yield self._event(index, dict(delta=dict(role="assistant", content="")), None, None)

    def events(self, piece: Piece) -> Iterator[bytes]:
        """The events of a piece."""
        said, text = self._said[piece.index], piece.text
        if not said.text:
            text = said.echo + text
        self.add(piece)
        logprobs = self._logprobs(said, piece.scores, sum(map(len, said.text)) + len(said.echo))
        if self._chat:
            if text or logprobs and logprobs["content"]:
                yield self._event(piece.index, dict(delta=dict(content=text)), logprobs, None)
            if piece.reason:
                yield self._event(piece.index, dict(delta={}), None, piece.reason)
        elif text or piece.reason or logprobs:
            yield self._event(piece.index, dict(text=text), logprobs, piece.reason)

    def end(self) -> Iterator[bytes]:
        """The events after the last piece."""
        if self._wanted.include_usage:
            yield event({**self._head, "object": self._chunk, "choices": [], "usage": self.usage()})
        yield DONE

    @property
    def _chunk(self):
        return "chat.completion.chunk" if self._chat else "text_completion"

    def _event(self, index, content, logprobs, reason):
        choice = dict(index=index, **content, logprobs=logprobs, finish_reason=reason)
        body = {**self._head, "object": self._chunk, "choices": [choice]}
        if self._wanted.include_usage:
            body["usage"] = None
        return event(body)

    def _logprobs(self, said, scores, length):
        """The log-probabilities of the tokens in the first `length` characters of an answer, its text."""
        if self._wanted.top_logprobs is None:
            return None
        kept = []
        for score in scores:
            # A completion shows the end token, which has no text: programs that count tokens expect it.
            shown = not (self._chat and score.ends)
            if shown and (said.start < length or not said.cut):
                kept.append((score, said.start))
            said.start += self._spelling.width(score.token)
        if self._chat:
            return dict(content=[self._chat_score(score) for score, _ in kept], refusal=None)
        return dict(
            tokens=[self._name(score.token) for score, _ in kept],
            token_logprobs=[_finite(score.logprob) for score, _ in kept],
            top_logprobs=[self._top(score) for score, _ in kept],
            text_offset=[start for _, start in kept],
        )

    def _chat_score(self, score):
        return {
            **self._entry(score.token, score.logprob),
            "top_logprobs": [self._entry(token, logprob) for token, logprob in score.top],
        }

    def _entry(self, token, logprob):
        spelled = self._spelling.bytes(token)
        return dict(token=self._name(token), logprob=_finite(logprob), bytes=list(spelled))

    def _top(self, score):
        if score.logprob is None:
            return None
        found: dict[str, float] = {}
        for token, logprob in (*score.top, (score.token, score.logprob)):
            found.setdefault(self._name(token), _finite(logprob))  # two tokens may have one spelling
        return found

    def _name(self, token):
        """The text of a token; for a part of a character, its bytes as OpenAI writes them."""
        spelled = self._spelling.bytes(token)
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


def _finite(logprob):
    return None if logprob is None else max(logprob, LEAST)
