"""The answers to one request, and the stream of its events, without a socket."""

import asyncio
import contextlib
from types import SimpleNamespace

import pytest
from served import PATIENCE, Bytes

from longlora.decoder.sampling import Sampling
from longlora.serving import streams
from longlora.serving.protocol import Refused, Wanted
from longlora.serving.replies import DONE, Reply
from longlora.serving.streams import PING, Answers, Gone, Stream
from longlora.serving.text import Spelling
from longlora.serving.worker import Piece


def client(*messages):
    """A request whose client sends messages of these types, and then stays."""
    left = list(messages)

    async def receive():
        if not left:
            await asyncio.Event().wait()
        return dict(type=left.pop(0))

    return SimpleNamespace(receive=receive)


def choices(count):
    """Choices that record whether they were cancelled."""
    made = [SimpleNamespace(cancelled=False) for _ in range(count)]
    for one in made:
        one.request = SimpleNamespace(cancel=lambda one=one: vars(one).update(cancelled=True))
    return made


def test_pieces_that_are_ready_come_together():
    async def go():
        answers = Answers(client(), 2)
        assert answers.count == 2
        parts = [Piece(0, "a"), Piece(1, "b", reason="stop"), Piece(0, "c", reason="length")]
        answers.put(parts[0])
        answers.put(parts[1])
        assert await answers.next() == parts[:2]
        answers.put(parts[2])
        assert await answers.next() == parts[2:]
        assert await answers.next() == []  # at once

    asyncio.run(go())


@pytest.mark.parametrize(
    "piece, words, status",
    [
        (Piece(0, "", reason="refused"), "^the server is stopping$", 503),
        (Piece(0, "", reason="error", error="no power"), "^no power$", 500),
        (Piece(0, "", reason="error"), "^$", 500),
    ],
)
def test_an_answer_that_failed_is_refused(piece, words, status):
    async def go():
        answers = Answers(client(), 1)
        answers.put(piece)
        with pytest.raises(Refused, match=words) as caught:
            await answers.next()
        assert caught.value.status == status

    asyncio.run(go())


def test_a_wait_may_have_a_time_limit():
    async def go():
        with pytest.raises(TimeoutError):
            await Answers(client(), 1).next(0.001)

    asyncio.run(go())


def test_a_client_that_goes_is_noticed_and_its_answers_end():
    async def go():
        answers = Answers(client("http.request", "http.disconnect"), 2)
        answers.choices = choices(2)
        with pytest.raises(Gone):
            async with answers.watched():
                assert not any(choice.cancelled for choice in answers.choices)
                await answers.next(PATIENCE)
        assert all(choice.cancelled for choice in answers.choices)
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == 1  # nothing watches any more

        answers = Answers(client("http.request"), 1)
        async with answers.watched():
            for _ in range(5):
                await asyncio.sleep(0)
            assert answers._queue.empty()
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(go())


def test_a_loop_that_has_ended_takes_no_pieces():
    async def go():
        return Answers(client(), 1)

    answers = asyncio.run(go())
    answers.put(Piece(0, "a"))
    assert answers._queue.empty()


def streamed(act, begun=(), **how):
    """The messages that a stream sends. `act` is called after each, with the answers and their number so far.

    At the end the answers are cancelled.
    """

    async def go():
        answers = Answers(client(), 1)
        answers.choices = choices(1)
        made = Reply(Wanted(Sampling(), **how), "m", Spelling(Bytes), [""], 1, lambda: 0)
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(answers.watched())
            stream = Stream(answers, made, list(begun), stack.pop_all())
        assert not answers.choices[0].cancelled

        async def send(message):
            sent.append(message)
            act(answers, len(sent))

        await stream({}, None, send)
        assert answers.choices[0].cancelled

    sent = []
    asyncio.run(go())
    return sent


def said(text, reason):
    """The end of an event of a completion."""
    reason = "null" if reason is None else f'"{reason}"'
    return (
        f'"choices":[{{"index":0,"text":"{text}","logprobs":null,"finish_reason":{reason}}}]}}\n\n'.encode()
    )


def test_a_stream_begins_with_the_pieces_that_are_there():
    """Pieces that are ready together are one message. An empty part is not sent."""

    def act(answers, sent):
        if sent == 2:
            answers.put(Piece(0, "c"))
            answers.put(Piece(0, "d", reason="stop"))

    start, first, second, last, end = streamed(act, [Piece(0, "a"), Piece(0, "b")])
    assert start["type"] == "http.response.start" and start["status"] == 200
    headers = dict(start["headers"])
    assert headers == {b"cache-control": b"no-cache", b"content-type": b"text/event-stream; charset=utf-8"}
    for message in (first, second, last):
        assert message["type"] == "http.response.body" and message["more_body"] is True
    assert first["body"].count(b"data: ") == second["body"].count(b"data: ") == 2
    assert said("a", None) in first["body"] and first["body"].endswith(said("b", None))
    assert said("c", None) in second["body"] and second["body"].endswith(said("d", "stop"))
    assert last["body"] == DONE and end == {"type": "http.response.body", "body": b""}


def test_a_chat_begins_with_its_role():
    messages = streamed(
        lambda *_: None, [Piece(0, "a", reason="stop")], messages=[dict(role="user", content="hello")]
    )
    bodies = [message["body"] for message in messages[1:]]
    assert len(bodies) == 4 and b'"delta":{"role":"assistant","content":""}' in bodies[0]
    assert b'"delta":{"content":"a"}' in bodies[1] and b'"delta":{}' in bodies[1] and bodies[2] == DONE


def test_a_stream_that_waits_pings(monkeypatch):
    monkeypatch.setattr(streams, "PING_SECONDS", 0.001)

    def act(answers, sent):
        if sent == 4:
            monkeypatch.setattr(streams, "PING_SECONDS", PATIENCE)
            answers.put(Piece(0, "a", reason="stop"))

    bodies = [message["body"] for message in streamed(act)[1:]]
    assert bodies[:3] == [PING] * 3 and bodies[3].endswith(said("a", "stop")) and bodies[4:] == [DONE, b""]
    assert PING.startswith(b":") and PING.endswith(b"\n\n")  # a comment among server-sent events


def test_a_failure_is_the_last_event_of_a_stream():
    def act(answers, sent):
        if sent == 2:
            answers.put(Piece(0, "", reason="error", error="no power"))

    bodies = [message["body"] for message in streamed(act, [Piece(0, "a")])[1:]]
    assert len(bodies) == 3 and bodies[2] == b""
    assert bodies[1].startswith(b'data: {"error":{"message":"no power","type":"server_error"')


def test_a_stream_whose_client_goes_ends():
    def act(answers, sent):
        if sent == 2:
            answers._queue.put_nowait(None)

    messages = streamed(act, [Piece(0, "a")])
    assert [message["body"] for message in messages[2:]] == [b""]
