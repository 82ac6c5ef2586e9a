"""The engine: requests join and leave at any step, and those that are there advance together.

It works on tokens. One thread calls `tick` and owns the engine; `submit` and `cancel` may come from others.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from longlora.decoder.cache import Cache, common
from longlora.decoder.generate import CHUNK, Generator
from longlora.decoder.model import Model
from longlora.decoder.sampling import NAN, Sampler, Sampling, largest, log_probabilities
from longlora.errors import UserError


@dataclass(frozen=True)
class Event:
    """A new token of an answer, a token of the prompt with its score, or the end.

    token: None at the end.
    logprob, top: the token's log-probability and the likeliest tokens with theirs, if the request asks. The
        first token of a prompt has none.
    prompt: whether the token is one of the prompt's.
    reason: at the end, "stop" (an end token), "length" (max_new_tokens), "cancelled", "refused" (it has
        waited, and the engine stops) or "error".
    end: the token that has ended the answer, if one has.
    """

    token: int | None = None
    logprob: float | None = None
    top: Sequence[tuple[int, float]] = ()
    prompt: bool = False
    reason: str | None = None
    end: int | None = None
    error: str | None = None


@dataclass(eq=False)
class Request:
    """An answer to `prompt`, int [N], of at most `max_new_tokens` tokens.

    notify: is called with each Event, by the thread of the engine; it must not wait.
    end: the tokens that end an answer. They are not part of it.
    top_logprobs: None for no log-probabilities, else how many of the likeliest tokens get theirs.
    score_prompt: give the log-probabilities of the prompt's tokens too. All of the prompt is read then.
    """

    prompt: np.ndarray
    sampling: Sampling
    max_new_tokens: int
    notify: Callable[[Event], None]
    end: frozenset[int] = frozenset()
    top_logprobs: int | None = None
    score_prompt: bool = False
    sampler: Any = field(default=None, repr=False)  # made by the engine
    reused: int = 0  # tokens of the prompt that a row of the cache already held
    cancelled: bool = field(default=False, repr=False)

    def cancel(self) -> None:
        """End the answer at the next step."""
        self.cancelled = True


class _Slot:
    """A row of the cache: the tokens it holds, and the request it serves, if any."""

    def __init__(self, row):
        self.row, self.tokens, self.used = row, np.zeros(0, np.int32), 0
        self.request: Any = None
        self.rest = np.zeros(0, np.int32)  # of the prompt, not yet in the cache
        self.next: Any = None  # the last token chosen, not yet in the cache
        self.made = 0


class Engine:
    """Serves requests by `model` in the rows of `cache`.

    queue: requests that may wait for a row. chunk: tokens of a prompt in one pass.
    """

    def __init__(self, model: Model, cache: Cache, queue: int = 64, chunk: int = CHUNK):
        self.model, self.cache, self.queue = model, cache, queue
        self.generator = Generator(model, cache, chunk)
        self._slots = [_Slot(row) for row in range(cache.rows)]
        self._waiting: deque[Request] = deque()
        self._lock, self._clock = threading.Lock(), 0

    def submit(self, *requests: Request) -> bool:
        """Queue requests, all or none -> False if the queue has no room for them.

        UserError for one that can never be served.
        """
        for request in requests:
            self._check(request)
            vocab = self.model.config.vocab_size
            request.sampler = Sampler(request.sampling, request.prompt, vocab)
        with self._lock:
            free = sum(slot.request is None for slot in self._slots)
            waiting = sum(not request.cancelled for request in self._waiting)
            if waiting + len(requests) > self.queue + free:
                return False
            self._waiting.extend(requests)
        return True

    def _check(self, request):
        count, limit = len(request.prompt), self.cache.limit
        if not count:
            raise UserError("the prompt has no tokens")
        if limit is not None and count + request.max_new_tokens > limit:
            raise UserError(
                f"the prompt has {count} tokens and max_new_tokens is {request.max_new_tokens}, "
                f"together more than the context of {limit}"
            )
        if request.prompt.min() < 0 or request.prompt.max() >= self.model.config.vocab_size:
            raise UserError(f"the prompt has tokens outside 0 to {self.model.config.vocab_size - 1}")

    def tokens(self, row: int) -> np.ndarray:
        """The tokens that a row of the cache holds, int32 [N]."""
        return self._slots[row].tokens

    def hold(self, row: int, tokens: np.ndarray) -> None:
        """Say which tokens an idle row of the cache holds: keys and values were written by the caller."""
        self._slots[row].tokens, self.cache.lengths[row] = tokens, len(tokens)

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self._waiting) or any(slot.request is not None for slot in self._slots)

    @property
    def load(self) -> tuple[int, int]:
        """How many requests run, and how many wait."""
        return sum(slot.request is not None for slot in self._slots), len(self._waiting)

    def refuse_waiting(self) -> None:
        """End the requests that have not begun."""
        with self._lock:
            waiting, self._waiting = self._waiting, deque()
        for request in waiting:
            request.notify(Event(reason="refused"))

    def abort(self, error: str) -> None:
        """End what runs, after a tick that has failed. What the rows hold is forgotten."""
        for slot in self._slots:
            self._fail(slot, error)

    def tick(self) -> None:
        """Advance: admit requests, read one chunk of one prompt, add a token to every answer."""
        self._admit()
        running = [slot for slot in self._slots if slot.request is not None]
        for slot in running:
            if slot.request.cancelled:
                self._finish(slot, Event(reason="cancelled"))
        reading = [slot for slot in running if slot.request is not None and len(slot.rest)]
        answering = [slot for slot in running if slot.request is not None and not len(slot.rest)]
        if reading:
            self._read(min(reading, key=lambda slot: slot.used))
        if answering:
            tokens = [slot.next for slot in answering]
            logits = self.generator.step([slot.row for slot in answering], tokens)
            for slot, token, row in zip(answering, tokens, logits, strict=True):
                slot.tokens = np.append(slot.tokens, np.int32(token))
                self._choose(slot, row)

    def _read(self, slot):
        """Read one chunk of a prompt."""
        self._share(slot)
        part = slot.rest[: self.generator.chunk]
        try:
            logits = self.generator.extend(slot.row, part, self._scorer(slot))
        except UserError as error:
            self._fail(slot, str(error))
            return
        slot.tokens, slot.rest = np.concatenate([slot.tokens, part]), slot.rest[len(part) :]
        if not len(slot.rest):
            self._choose(slot, logits)

    def _admit(self):
        """Give waiting requests the free rows that hold most of their prompts, else the longest unused."""
        with self._lock:
            left = [request for request in self._waiting if request.cancelled]
            self._waiting = deque(request for request in self._waiting if not request.cancelled)
        for request in left:
            request.notify(Event(reason="cancelled"))
        while True:
            free = [slot for slot in self._slots if slot.request is None]
            with self._lock:
                if not free or not self._waiting:
                    return
                request = self._waiting.popleft()
            prompt = np.ascontiguousarray(request.prompt, np.int32)
            # The last token is read in any case: its logits choose the first token of the answer.
            shared = {
                slot.row: 0 if request.score_prompt else common(slot.tokens, prompt[:-1]) for slot in free
            }
            slot = max(free, key=lambda slot: (shared[slot.row], -slot.used))
            request.reused = self.cache.keep(slot.row, shared[slot.row])
            slot.request, slot.made, slot.next = request, 0, None
            slot.tokens, slot.rest = slot.tokens[: request.reused], prompt[request.reused :]
            self._clock += 1
            slot.used = self._clock

    def _share(self, slot):
        """Copy the part of the prompt that another row holds, so that a shared prompt is read once."""
        request, have = slot.request, len(slot.tokens)
        if request.score_prompt:
            return
        others = [other for other in self._slots if other is not slot]
        shared = {other.row: common(other.tokens, request.prompt[:-1]) for other in others}
        row = max(shared, key=shared.__getitem__, default=slot.row)
        if shared.get(row, 0) > have:
            count = shared[row]
            self.cache.copy(row, slot.row, have, count)
            slot.tokens, slot.rest = request.prompt[:count].astype(np.int32), slot.rest[count - have :]
            request.reused += count - have

    def _choose(self, slot, logits):
        """Choose the next token of an answer by its logits, and end the answer where it ends."""
        request = slot.request
        if request.max_new_tokens == 0:
            self._finish(slot, Event(reason="length"))
            return
        try:
            token = request.sampler.choose(logits)
        except UserError as error:
            self._fail(slot, str(error))
            return
        likely: dict[str, Any] = {}
        if request.top_logprobs is not None:
            likely = _likely(log_probabilities(logits), token, request.top_logprobs)
        if token in request.end:
            self._finish(slot, Event(end=token, **likely, reason="stop"))
            return
        slot.next, slot.made = token, slot.made + 1
        request.notify(Event(token, **likely))
        if slot.made == request.max_new_tokens:
            self._finish(slot, Event(reason="length"))

    @staticmethod
    def _scorer(slot):
        """A function that takes the logits after the tokens of a prompt, piece by piece, if it is scored."""
        request = slot.request
        if not request.score_prompt:
            return None
        prompt, place = request.prompt, len(slot.tokens)
        if place == 0:
            request.notify(Event(int(prompt[0]), prompt=True))

        def score(logits):
            nonlocal place
            if np.isnan(logits).any():
                raise UserError(NAN)
            for logs in log_probabilities(logits[: len(prompt) - 1 - place]):
                place += 1
                token = int(prompt[place])
                likely = _likely(logs, token, request.top_logprobs or 0)
                request.notify(Event(token, **likely, prompt=True))

        return score

    def _fail(self, slot, error):
        """Forget what a row holds, and end its answer, if any."""
        slot.tokens = slot.tokens[: self.cache.keep(slot.row, 0)]
        if slot.request is not None:
            self._finish(slot, Event(reason="error", error=error))

    @staticmethod
    def _finish(slot, event):
        request, slot.request, slot.rest = slot.request, None, slot.rest[:0]
        request.notify(event)


def _likely(logs, token, count):
    """The log-probability of a token, and the `count` likeliest tokens: among equals the first ones."""
    top: list[tuple[int, float]] = []
    if count:
        top = [(int(i), float(logs[i])) for i in largest(logs, count)]
    return dict(logprob=float(logs[token]), top=top)
