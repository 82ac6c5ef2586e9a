"""Requests join and leave the engine, share prefixes, and get what each gets alone."""

import numpy as np
import pytest
import tiny

from longlora.decoder.sampling import Sampling
from longlora.errors import UserError
from longlora.serving.engine import Request, _likely
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
def test_each_request_gets_what_it_gets_alone(opened, sampling):
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
    assert other.reused == 0  # it takes the row that holds nothing of use
    third, again = request(longer, 1)
    engine.submit(third)
    finish(engine)
    assert third.reused == len(longer) - 1 and len(tokens(again)) == 1


def test_a_prompt_of_several_requests_is_read_once(opened):
    """The third request joins while the others are answered. Each gets what it gets alone."""
    alone = []
    for prompt in (PROMPTS[1], [*PROMPTS[1], 5, 6]):
        engine = opened(rows=1).engine
        asked, events = request(prompt, 12)
        engine.submit(asked)
        finish(engine)
        alone.append(tokens(events))
    engine = opened(rows=3).engine
    (first, events), (second, seen), (third, found) = (
        request(prompt, 12) for prompt in (PROMPTS[1], PROMPTS[1], [*PROMPTS[1], 5, 6])
    )
    assert engine.submit(first, second)
    engine.tick()
    engine.tick()
    engine.submit(third)
    finish(engine)
    assert (first.reused, second.reused, third.reused) == (0, 39, 40)
    assert [tokens(events), tokens(seen), tokens(found)] == [alone[0], *alone]


def test_what_two_rows_hold_of_a_prompt_counts_once(opened):
    """The second row has 1 token of the prompt, and takes over the next 4 from the first row."""
    engine, asked = opened(rows=2).engine, []
    for prompts in (([5, 6], [5, 99]), (PROMPTS[3], PROMPTS[3])):
        asked += [request(prompt, 1) for prompt in prompts]
        engine.submit(*(one for one, _ in asked[-2:]))
        finish(engine)
    assert [one.reused for one, _ in asked] == [0, 1, 2, 5]
    assert tokens(asked[2][1]) == tokens(asked[3][1])


def test_answers_end_by_a_token_by_cancelling_or_at_once(opened):
    engine = opened().engine
    asked, events = request(PROMPTS[0], 8)
    engine.submit(asked)
    finish(engine)
    third = tokens(events)[2]
    ended, found = request(PROMPTS[0], 8, end=frozenset([third]))
    engine.submit(ended)
    finish(engine)
    assert found[-1].reason == "stop" and tokens(found) == tokens(events)[: tokens(events).index(third)]
    assert found[-1].end == third and found[-1].token is None
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


def test_probabilities_sum_to_one(opened):
    engine = opened().engine
    asked, events = request(PROMPTS[0], 3, top_logprobs=260)
    engine.submit(asked)
    finish(engine)
    for event in events[:-1]:
        assert event.logprob == event.top[0][1] and event.token == event.top[0][0]
        assert np.exp([logprob for _, logprob in event.top]).sum() == pytest.approx(1)


def test_a_scored_prompt_has_the_log_probabilities_of_one_pass(opened):
    """A prompt that is read in chunks gets what single passes give, also where a row holds it already."""
    engine = opened(rows=2).engine
    plain, _ = request(PROMPTS[1], 1)
    engine.submit(plain)
    finish(engine)
    prompt = np.arange(1, 41, dtype=np.int32)
    engine.generator.extend(1, prompt)
    expected, engine.cache.lengths[1] = [], 0
    for token, following in zip(prompt, prompt[1:]):
        logits = engine.generator.extend(1, np.array([token], np.int32)).astype(np.float64)
        expected.append(logits[following] - np.log(np.exp(logits).sum()))
    engine.cache.lengths[1] = 0
    engine.generator.chunk = 16  # the prompt is read in three pieces
    for _ in range(2):
        asked, events = request(prompt, 1, top_logprobs=2, score_prompt=True)
        engine.submit(asked)
        finish(engine)
        scored = [event for event in events if event.prompt]
        assert [event.token for event in scored] == list(prompt) and scored[0].logprob is None
        np.testing.assert_allclose([event.logprob for event in scored[1:]], expected, atol=1e-5)
        assert all(event.top[0][1] >= event.top[1][1] for event in scored[1:])
        assert asked.reused == 0 and [event.prompt for event in events[40:]] == [False, False]


def test_of_equal_tokens_the_first_come_first():
    logs = np.array([0.0, -1.0, 0.0, -1.0, -1.0])
    assert [token for token, _ in _likely(logs, 1, 4)["top"]] == [0, 2, 1, 3]
    assert _likely(logs, 1, 0) == dict(logprob=-1.0, top=[]) and len(_likely(logs, 1, 9)["top"]) == 5


def test_waiting_requests_are_refused_and_running_ones_aborted(opened):
    engine = opened(rows=1).engine
    (running, events), (waiting, seen) = request(PROMPTS[0]), request(PROMPTS[1])
    assert engine.submit(running, waiting)
    engine.tick()
    assert engine.load == (1, 1)
    engine.refuse_waiting()
    assert [event.reason for event in seen] == ["refused"]
    engine.abort("no power")
    assert events[-1].reason == "error" and events[-1].error == "no power" and not engine.busy
    again, found = request(PROMPTS[0])
    engine.submit(again)
    finish(engine)
    assert found[-1].reason == "length" and again.reused == 0


def test_a_full_queue_and_impossible_requests_are_refused(opened):
    engine = opened(rows=1).engine
    engine.queue = 1
    running, _ = request(PROMPTS[0], 30)
    engine.submit(running)
    engine.tick()
    assert not engine.submit(request(PROMPTS[0])[0], request(PROMPTS[0])[0])  # both are taken, or neither
    assert engine.submit(request(PROMPTS[0])[0]) and not engine.submit(request(PROMPTS[0])[0])
    waiting = engine._waiting[0]
    waiting.cancel()  # its place is free
    assert engine.submit(request(PROMPTS[0])[0])
    engine.tick()
    assert engine.load == (1, 1)
    for prompt, count, words in (
        ([], 1, "the prompt has no tokens"),
        ([1] * 60, 5, "60 tokens and max_new_tokens is 5, together more than the context of 64"),
        ([260], 1, "tokens outside 0 to 259"),
    ):
        with pytest.raises(UserError, match=words):
            engine.submit(request(prompt, count)[0])


def test_nan_logits_end_one_answer(opened):
    engine = opened(rows=2).engine
    engine.model.tensor("model.norm.weight").fill(float("nan"))
    asked, events = request(PROMPTS[0])
    engine.submit(asked)
    finish(engine)
    assert events[-1].reason == "error" and "NaN" in events[-1].error
    scored, events = request(PROMPTS[0], score_prompt=True)
    engine.submit(scored)
    finish(engine)
    assert events[-1].reason == "error" and "NaN" in events[-1].error and scored.reused == 0


def test_an_engine_that_does_not_fit_is_refused(tmp_path, opened):
    with pytest.raises(UserError, match="does not fit in memory"):
        opened(rows=4, memory=1 << 20)
    with pytest.raises(UserError, match="dtype should be one of auto, float32"):
        opened(dtype="int8")


def test_events_say_how_an_answer_ends(opened):
    """Log-probabilities come on request only. The end token has one too."""
    engine = opened().engine
    asked, events = request(PROMPTS[0], 3)
    engine.submit(asked)
    finish(engine)
    assert {(event.logprob, tuple(event.top)) for event in events} == {(None, ())}
    first = events[0].token
    ended, found = request(PROMPTS[0], 3, end=frozenset([first]), top_logprobs=2)
    engine.submit(ended)
    finish(engine)
    (event,) = found
    assert (event.reason, event.end, event.token) == ("stop", first, None)
    assert event.logprob == event.top[0][1] and event.top[0][0] == first and len(event.top) == 2
    counted, found = request(PROMPTS[0], 2, top_logprobs=0)
    engine.submit(counted)
    finish(engine)
    assert [event.top for event in found] == [[], [], ()] and found[0].logprob == event.logprob
    assert [event.reason for event in found] == [None, None, "length"] and engine.load == (0, 0)


def test_the_longest_requests_that_fit(opened):
    engine = opened(rows=1).engine
    for prompt, count in (([0, 259], 62), ([1] * 64, 0), ([1] * 63, 1)):
        assert engine.submit(request(prompt, count)[0])
    for prompt, words in (([-1, 5], "tokens outside 0 to 259"), ([5, 260], "tokens outside 0 to 259")):
        with pytest.raises(UserError, match=words):
            engine.submit(request(prompt)[0])
    with pytest.raises(UserError, match="together more than the context of 64"):
        engine.submit(request([1] * 63, 2)[0])
    assert engine.load == (0, 3) and engine.queue == 64


def test_a_request_that_is_cancelled_while_it_waits(opened):
    engine = opened(rows=1).engine
    (first, events), (second, seen), (third, found) = (request(PROMPTS[0], 2) for _ in range(3))
    assert engine.submit(first, second, third) and engine.busy and engine.load == (0, 3)
    second.cancel()
    engine.tick()
    assert [event.reason for event in seen] == ["cancelled"] and engine.load == (1, 1)
    finish(engine)
    assert [event.reason for event in events] == [event.reason for event in found] == [None, None, "length"]


def test_a_prompt_takes_the_row_that_holds_most_of_it(opened):
    """If no row holds its beginning, it takes the row that was used least recently."""
    engine = opened(rows=3).engine

    def row_of(prompt, **how):
        asked, _ = request(prompt, 1, **how)
        engine.submit(asked)
        engine.tick()
        (row,) = (slot.row for slot in engine._slots if slot.tokens.tolist() == list(prompt))
        finish(engine)
        return row, asked.reused

    assert [row_of([n, n, n]) for n in (10, 20, 30)] == [(0, 0), (1, 0), (2, 0)]
    assert row_of([20, 20, 20, 21]) == (1, 3)
    assert row_of([40, 40]) == (0, 0) and row_of([50, 50]) == (2, 0) and row_of([60]) == (1, 0)
    assert row_of([40, 40]) == (0, 1)  # the last token is always read
    # A scored prompt is read whole, in the row that was used least recently.
    assert row_of([60, 51], score_prompt=True) == (2, 0)
    assert engine.tokens(1).tolist() == [60]
    engine.hold(1, np.array([7, 8], np.int32))
    assert engine.tokens(1).tolist() == [7, 8] and engine.cache.lengths[1] == 2


def test_a_scored_prompt_reuses_nothing(opened):
    engine = opened(rows=2).engine
    (first, _), (second, events) = request(PROMPTS[1], 9), request(PROMPTS[1], 1, score_prompt=True)
    engine.submit(first)
    engine.tick()
    engine.submit(second)
    finish(engine)
    assert second.reused == 0 and sum(event.prompt for event in events) == len(PROMPTS[1])
    assert [event.top for event in events if event.prompt] == [(), *([[]] * (len(PROMPTS[1]) - 1))]


def test_prompts_are_read_in_order_and_in_chunks(opened):
    """Each step reads one chunk of one prompt, while running answers go on."""
    engine = opened(rows=3).engine
    engine.generator.chunk = 4
    (first, events), (second, seen), (third, found) = (
        request(prompt, 9) for prompt in ([1, 2], [3] * 8, [4] * 8)
    )
    engine.submit(first, second, third)
    counts = []
    for _ in range(6):
        engine.tick()
        counts.append(tuple(len(tokens(one)) for one in (events, seen, found)))
    assert counts == [(1, 0, 0), (2, 0, 0), (3, 1, 0), (4, 2, 0), (5, 3, 1), (6, 4, 2)]
    assert [len(slot.tokens) for slot in engine._slots] == [2 + 5, 8 + 3, 8 + 1]


def test_an_error_ends_an_answer_and_empties_its_row(opened, monkeypatch):
    engine = opened(rows=2).engine

    def refuse(*_):
        raise UserError("no power")

    (first, events), (second, seen) = request(PROMPTS[0], 4), request(PROMPTS[2], 4)
    engine.submit(first, second)
    engine.tick()
    monkeypatch.setattr(first.sampler, "choose", refuse)
    monkeypatch.setattr(engine.generator, "extend", refuse)
    engine.tick()
    assert (events[-1].reason, events[-1].error) == (seen[-1].reason, seen[-1].error) == ("error", "no power")
    assert [len(engine.tokens(row)) for row in (0, 1)] == [0, 0] and not engine.busy
    assert list(engine.cache.lengths) == [0, 0] and seen[-1].token is None
