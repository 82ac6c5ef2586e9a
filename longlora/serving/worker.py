"""The thread that owns the engine, and the answers that it makes for other threads."""

import contextlib
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from longlora.decoder.sampling import Sampling
from longlora.serving.engine import Engine, Event, Request
from longlora.serving.open import Opened
from longlora.serving.text import TextStream

FAULT = "the server has failed at this answer; its own output says why"


@dataclass(frozen=True)
class Score:
    """A token with its log-probability, and the likeliest tokens with theirs. ends: it ended the answer."""

    token: int
    logprob: float | None
    top: Sequence[tuple[int, float]] = ()
    ends: bool = False


@dataclass(frozen=True)
class Piece:
    """The new part of an answer: text, and scores if asked for.

    cut: whether a stop string has cut the text, so that the last scores may be of tokens that are not in it.
    reason: an Event's, with the last piece.
    """

    index: int
    text: str
    tokens: int = 0
    scores: Sequence[Score] = field(default_factory=list)
    cut: bool = False
    reason: str | None = None
    error: str | None = None


class Choice:
    """One answer. `put` is called with each Piece by the thread of the engine; it must not wait."""

    def __init__(
        self,
        opened: Opened,
        index: int,
        prompt: np.ndarray,
        sampling: Sampling,
        max_new_tokens: int,
        put: Callable[[Piece], None],
        stop: Sequence[str] = (),
        top_logprobs: int | None = None,
        score_prompt: bool = False,
    ):
        self._index, self._put, self._failed = index, put, False
        self._stream = TextStream(opened.tokenizer, stop)
        self._tokens, self._scores = 0, list[Score]()
        self.request = Request(
            prompt, sampling, max_new_tokens, self._take, opened.end, top_logprobs, score_prompt
        )

    def _take(self, event: Event) -> None:
        """Take an event. What fails here, such as a tokenizer, fails this answer alone."""
        if self._failed:
            return
        try:
            self._add(event)
        except Exception as error:
            _report(error)
            self._failed = True
            self.request.cancel()
            self._send("", "error", FAULT)

    def _add(self, event):
        if event.logprob is not None or event.prompt:
            token = event.end if event.token is None else event.token
            ends = event.end is not None
            self._scores.append(Score(int(token or 0), event.logprob, event.top, ends))
        if event.reason is not None:
            self._send(self._stream.finish(), self._stream.reason(event.reason), event.error)
        elif not event.prompt and not self._stream.stopped:
            self._tokens += 1
            text = self._stream.add(event.token)
            if self._stream.stopped:
                self.request.cancel()
            if text:
                self._send(text)

    def _send(self, text, reason=None, error=None):
        piece = Piece(self._index, text, self._tokens, self._scores, self._stream.stopped, reason, error)
        self._tokens, self._scores = 0, []
        self._put(piece)


class Worker:
    """Runs an engine in a thread of its own. A failed step ends the answers that run, not the thread."""

    def __init__(self, engine: Engine):
        self.engine, self.stopping = engine, False
        self._wake = threading.Condition()
        # A second signal ends the process in the middle of a step.
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, requests: Sequence[Request]) -> bool:
        """Queue all requests or none -> whether there was room. UserError as of Engine.submit."""
        with self._wake:
            if self.stopping or not self.engine.submit(*requests):
                return False
            self._wake.notify()
        return True

    def stop(self) -> None:
        """Finish what runs, refuse what waits and what comes, and end the thread. It does not wait."""
        with self._wake:
            self.stopping = True
            self._wake.notify()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        engine = self.engine
        while True:
            with self._wake:
                while not engine.busy and not self.stopping:
                    self._wake.wait()
            if self.stopping:
                engine.refuse_waiting()
                if not engine.busy:
                    return
            try:
                engine.tick()
            except Exception as error:
                _report(error)
                engine.abort(FAULT)


def _report(error):
    with contextlib.suppress(OSError, ValueError):  # nobody may be left to read
        traceback.print_exception(error)
