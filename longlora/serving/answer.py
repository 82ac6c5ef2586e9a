"""An answer as it comes: the engine advances as its text is asked for."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from longlora.decoder.sampling import Sampling
from longlora.errors import UserError
from longlora.serving.engine import Event, Request
from longlora.serving.open import Opened
from longlora.serving.text import TextStream


class Answer:
    """An answer as it comes: iterate over its pieces of text. To leave the loop early ends the answer.

    on_read: is called once, when the prompt has been read and the text of the first token was taken.
    When it has ended: reason ("stop", "length"), tokens (ids), prompt_tokens, reused (of these, those that
    the cache still held), first (seconds to the first token), seconds (for all), logprobs if asked for.
    """

    def __init__(
        self,
        opened: Opened,
        ids: np.ndarray,
        sampling: Sampling,
        max_new_tokens: int | None,
        stop: Sequence[str] = (),
        top_logprobs: int | None = None,
        on_read: Callable[[], Any] | None = None,
    ):
        limit = opened.engine.cache.limit
        room = sys.maxsize if limit is None else limit - len(ids)
        if room < 1:
            raise UserError(
                f"the prompt has {len(ids)} tokens, the context is {limit}: "
                f"shorten it by {1 - room} to leave room for an answer"
            )
        self._opened, self._events = opened, list[Event]()
        self._stream, self._on_read, self._begun = TextStream(opened.tokenizer, stop), on_read, False
        count = room if max_new_tokens is None else min(max_new_tokens, room)
        self._request = Request(ids, sampling, count, self._events.append, opened.end, top_logprobs)
        self.prompt_tokens, self.tokens = len(ids), list[int]()
        self.logprobs: list[tuple[int, float, Sequence[tuple[int, float]]]] = []
        self.reason: str | None = None
        self.first = self.seconds = 0.0

    @property
    def reused(self) -> int:
        return self._request.reused

    def stop(self) -> None:
        """End the answer at the next token."""
        self._request.cancel()

    def __iter__(self) -> Iterator[str]:
        if self._begun:
            return
        began, engine, self._begun = time.perf_counter(), self._opened.engine, True
        engine.submit(self._request)
        try:
            while self.reason is None:
                engine.tick()
                read = bool(self._events)
                for event in self._events:
                    piece = self._take(event, began)
                    if piece:
                        yield piece
                self._events.clear()
                if read and self._on_read is not None:
                    self._on_read()
                    self._on_read = None
        finally:
            self._request.cancel()
            self.seconds = time.perf_counter() - began

    def _take(self, event, began):
        """The text of an event; what a stop string has ended is not added to."""
        if event.reason == "error":
            raise UserError(event.error)
        if event.reason is not None:
            self.reason = self._stream.reason(event.reason)
            return self._stream.finish()
        if self._stream.stopped:
            return ""
        if not self.tokens:
            self.first = time.perf_counter() - began
        self.tokens.append(event.token)
        if event.logprob is not None:
            self.logprobs.append((event.token, event.logprob, event.top))
        piece = self._stream.add(event.token)
        if self._stream.stopped:
            self._request.cancel()
        return piece


def chat_ids(opened: Opened, template: Any, messages: Sequence[dict[str, Any]], **extra: Any) -> np.ndarray:
    """The tokens of a conversation, up to where the assistant begins to answer."""
    text = template.render(messages, add_generation_prompt=True, **extra)
    return opened.tokenizer.encode_parts([text])[0]
