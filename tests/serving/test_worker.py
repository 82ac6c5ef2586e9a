"""The thread of the engine: events become pieces of answers; a failure ends answers, and not the thread."""

import io
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from served import Bytes

from longlora.decoder.sampling import Sampling
from longlora.serving.engine import Event
from longlora.serving.worker import FAULT, Choice, Piece, Score, Worker

END = 256


def choice(stop=(), **how):
    """A Choice, and the list of its pieces."""
    pieces = []
    opened = SimpleNamespace(tokenizer=Bytes, end=frozenset([END]))
    made = Choice(opened, 5, np.array([1, 2]), Sampling(), 9, pieces.append, stop, **how)
    return made, pieces


def notify(made, *events):
    for event in events:
        made.request.notify(event)


def test_the_request_of_a_choice():
    request = choice(top_logprobs=3, score_prompt=True)[0].request
    assert request.prompt.tolist() == [1, 2] and request.sampling == Sampling()
    assert (request.max_new_tokens, request.end) == (9, {END})
    assert (request.top_logprobs, request.score_prompt) == (3, True)
    request = choice()[0].request
    assert (request.top_logprobs, request.score_prompt) == (None, False)


def test_tokens_become_pieces():
    """The two bytes of a character are one piece of two tokens."""
    made, pieces = choice()
    notify(made, Event(ord("a")), Event(0xC3), Event(0xA9), Event(end=END, reason="stop"))
    assert pieces == [Piece(5, "a", 1), Piece(5, "\u00e9", 2), Piece(5, "", 0, reason="stop")]
    assert not made.request.cancelled


def test_scores_come_with_the_text():
    made, pieces = choice()
    notify(
        made,
        Event(0, prompt=True),
        Event(7, -1.0, [(8, -0.5)], prompt=True),
        Event(0xC3, -2.0),
        Event(0xA9, -3.0, [(4, -0.25)]),
        Event(end=END, logprob=-4.0, top=[(6, -0.75)], reason="stop"),
    )
    scores = [Score(0, None), Score(7, -1.0, [(8, -0.5)]), Score(0xC3, -2.0), Score(0xA9, -3.0, [(4, -0.25)])]
    last = [Score(END, -4.0, [(6, -0.75)], ends=True)]
    assert pieces == [Piece(5, "\u00e9", 2, scores), Piece(5, "", 0, last, reason="stop")]


def test_a_stop_string_cancels_the_request():
    """The answer leaves out what the engine makes after that."""
    made, pieces = choice(["b"])
    notify(made, Event(ord("a")))
    assert not made.request.cancelled
    notify(made, Event(ord("b")))
    assert made.request.cancelled
    notify(made, Event(ord("c")), Event(reason="cancelled"))
    assert pieces == [Piece(5, "a", 1), Piece(5, "", 1, cut=True, reason="stop")]


def test_an_error_of_the_engine_is_passed_on():
    made, pieces = choice(["bc"])
    notify(made, Event(ord("b")), Event(reason="error", error="no power"))
    assert pieces == [Piece(5, "b", 1, reason="error", error="no power")]


def test_an_exception_ends_the_answer_once(capsys):
    made, pieces = choice()
    made._stream.add = None
    notify(made, Event(ord("a")), Event(ord("b")), Event(reason="cancelled"))
    assert pieces == [Piece(5, "", 1, reason="error", error=FAULT)] and made.request.cancelled
    assert capsys.readouterr().err.count("TypeError") == 1


class Engine:
    """It is busy for `ticks` ticks. `fails`: how many ticks are left after one that raises."""

    def __init__(self, ticks=0, fails=(), room=True):
        self.left, self.fails, self.room, self.done = ticks, fails, room, []

    @property
    def busy(self):
        return self.left > 0

    def submit(self, *requests):
        self.done.append(requests)
        self.left += len(requests) if self.room else 0
        return self.room

    def tick(self):
        self.done.append("tick")
        self.left -= 1
        if self.left in self.fails:
            raise MemoryError("no memory")

    def refuse_waiting(self):
        self.done.append("refuse")

    def abort(self, error):
        self.done.append(error)


def test_a_worker_that_stops_finishes_what_runs(capsys):
    worker = Worker(Engine(ticks=2, fails=[1]))
    worker.stop()
    worker._run()
    assert worker.stopping and worker.engine.done == ["refuse", "tick", FAULT, "refuse", "tick", "refuse"]
    assert "MemoryError: no memory" in capsys.readouterr().err


def test_a_worker_without_standard_error_goes_on(monkeypatch):
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr("sys.stderr", closed)
    worker = Worker(Engine(ticks=1, fails=[0]))
    worker.stop()
    worker._run()
    assert worker.engine.done == ["refuse", "tick", FAULT, "refuse"]


@pytest.mark.parametrize("room", [True, False])
def test_a_worker_takes_requests_until_it_stops(room):
    worker = Worker(Engine(room=room))
    assert not worker.stopping and not worker.alive
    assert worker.submit(["a", "b"]) is room and worker.engine.done == [("a", "b")]
    worker.stop()
    assert not worker.submit(["c"]) and worker.engine.done == [("a", "b")]


def test_a_worker_sleeps_until_it_is_woken():
    """The thread ticks once for each request, and ends after stop()."""
    ticked, engine = threading.Semaphore(0), Engine()
    tick = engine.tick
    engine.tick = lambda: (tick(), ticked.release())
    worker = Worker(engine)
    worker.start()
    for name in "ab":
        assert worker.alive and worker.submit([name]) and ticked.acquire(timeout=60)
    worker.stop()
    worker._thread.join(60)
    assert not worker.alive and engine.done == [("a",), "tick", ("b",), "tick", "refuse"]
    assert worker._thread.daemon and worker._thread.name == "engine"
