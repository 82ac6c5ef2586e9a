"""The engine: requests join and leave, share prefixes, and get what each would get alone."""

import numpy as np
import pytest
import tiny

from longlora.decoder.sampling import Sampling
from longlora.errors import UserError
from longlora.serving.engine import Request
from longlora.serving.open import open_engine


@pytest.fixture
def opened(tmp_path):
    tiny.model(tmp_path / "base")
    return lambda **how: open_engine(tmp_path / "base", context=64, **how)


def request(prompt, count=8, **how):
    """A request, and the list of its events."""
    events = []
    sampling = Sampling(**how.pop("sampling", {}))
    return Request(np.array(prompt, np.int32), sampling, count, events.append, **how), events


def tokens(events):
    return [event.token for event in events if event.token is not None]


def finish(engine, ticks=1000):
    for _ in range(ticks):
        if not engine.busy:
            return
        engine.tick()
    raise AssertionError("the engine does not come to an end")


PROMPTS = [[72, 101, 108], [1] * 40, [200, 3], [5, 6, 7, 8, 9, 10]]


@pytest.mark.parametrize("sampling", [{}, dict(temperature=1.0, top_p=0.9, seed=3)], ids=["greedy", "drawn"])
def test_each_gets_what_it_gets_alone(opened, sampling):
    """Four requests on two rows, one of them submitted later."""
    alone = []
    for prompt in PROMPTS:
        engine = opened(rows=1).engine
        asked, events = request(prompt, sampling=sampling)
        assert engine.submit(asked)
        finish(engine)
        assert events[-1].reason == "length" and len(tokens(events)) == 8
        alone.append(tokens(events))
    engine, found = opened(rows=2).engine, []
    for i, prompt in enumerate(PROMPTS):
        asked, events = request(prompt, sampling=sampling)
        engine.submit(asked)
        found.append(events)
        for _ in range(i):
            engine.tick()
    finish(engine)
    assert [tokens(events) for events in found] == alone


def test_a_shared_prefix_is_read_once(opened):
    engine = opened(rows=2).engine
    first, events = request(PROMPTS[1], 4)
    engine.submit(first)
    finish(engine)
    longer = [*PROMPTS[1], *tokens(events)[:-1], 7, 8]
    second, _ = request(longer, 1)
    engine.submit(second)
    finish(engine)
    assert first.reused == 0 and second.reused == len(longer) - 2
    other, _ = request([9, 9, 9], 1)
    engine.submit(other)
    finish(engine)
    assert other.reused == 0  # it took the row that held nothing of use
    third, again = request(longer, 1)
    engine.submit(third)
    finish(engine)
    assert third.reused == len(longer) - 1 and len(tokens(again)) == 1


def test_end_tokens_cancelling_and_no_tokens(opened):
    engine = opened().engine
    asked, events = request(PROMPTS[0], 8)
    engine.submit(asked)
    finish(engine)
    third = tokens(events)[2]
    ended, found = request(PROMPTS[0], 8, end=frozenset([third]))
    engine.submit(ended)
    finish(engine)
    assert found[-1].reason == "stop" and tokens(found) == tokens(events)[: tokens(events).index(third)]
    cancelled, seen = request(PROMPTS[0], 8)
    engine.submit(cancelled)
    engine.tick()
    cancelled.cancel()
    finish(engine)
    assert seen[-1].reason == "cancelled" and len(tokens(seen)) < 8
    none, nothing = request(PROMPTS[0], 0)
    engine.submit(none)
    finish(engine)
    assert [event.reason for event in nothing] == ["length"]


def test_log_probabilities_sum_up(opened):
    engine = opened().engine
    asked, events = request(PROMPTS[0], 3, top_logprobs=260)
    engine.submit(asked)
    finish(engine)
    for event in events[:-1]:
        assert event.logprob == event.top[0][1] and event.token == event.top[0][0]
        assert np.exp([logprob for _, logprob in event.top]).sum() == pytest.approx(1)


def test_a_full_queue_and_requests_that_cannot_be_served(opened):
    engine = opened(rows=1).engine
    engine.queue = 1
    running, _ = request(PROMPTS[0], 30)
    engine.submit(running)
    engine.tick()
    assert engine.submit(request(PROMPTS[0])[0]) and not engine.submit(request(PROMPTS[0])[0])
    for prompt, count, words in (
        ([], 1, "the prompt has no tokens"),
        ([1] * 60, 5, "60 tokens and max_new_tokens is 5, together more than the context of 64"),
        ([260], 1, "tokens outside 0 to 259"),
    ):
        with pytest.raises(UserError, match=words):
            engine.submit(request(prompt, count)[0])


def test_logits_that_are_nan_end_one_answer(opened):
    engine = opened(rows=2).engine
    engine.model.tensor("model.norm.weight").fill(float("nan"))
    asked, events = request(PROMPTS[0])
    engine.submit(asked)
    finish(engine)
    assert events[-1].reason == "error" and "NaN" in events[-1].error


def test_what_does_not_fit_is_refused_before_weights_are_read(tmp_path, opened):
    with pytest.raises(UserError, match="does not fit in memory"):
        opened(rows=4, memory=1 << 20)
    with pytest.raises(UserError, match="dtype should be one of auto, float32"):
        opened(dtype="int8")
