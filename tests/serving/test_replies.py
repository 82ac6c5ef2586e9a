"""The bodies and the streams of OpenAI's API, made from given pieces of answers."""

import json
import math
import time

import pytest
from served import Bytes

from longlora import __version__
from longlora.decoder.sampling import Sampling
from longlora.serving import replies
from longlora.serving.protocol import Wanted
from longlora.serving.replies import Reply, event
from longlora.serving.text import Spelling
from longlora.serving.worker import Piece, Score

HELLO = [{"role": "user", "content": "hello"}]
A, B, END = ord("a"), ord("b"), 256


def made(chat=False, echoes=("",), **how):
    wanted = Wanted(Sampling(), messages=HELLO if chat else None, **how)
    return Reply(wanted, "m", Spelling(Bytes), echoes, 7, lambda: 3)


def events(parts):
    """The JSON of server-sent events, whose form is checked."""
    found = list(parts)
    assert all(part.startswith(b"data: ") and part.endswith(b"\n\n") for part in found)
    return [json.loads(part[6:]) for part in found]


def test_an_event_is_one_line_of_json():
    assert event({"a": "\u00e9\n", "b": [1, 2]}) == 'data: {"a":"\u00e9\\n","b":[1,2]}\n\n'.encode()
    assert replies.DONE == b"data: [DONE]\n\n"


@pytest.mark.parametrize("chat", [True, False])
def test_a_whole_answer_has_openais_fields(chat):
    reply, before = made(chat, ["", ""]), int(time.time())
    reply.add(Piece(0, "a", 1))
    reply.add(Piece(1, "c", 2, reason="stop"))
    assert not reply.complete
    reply.add(Piece(0, "b", 1, reason="length"))
    assert reply.complete
    found = reply.body()
    first = dict(message=dict(role="assistant", content="ab", refusal=None)) if chat else dict(text="ab")
    second = dict(message=dict(role="assistant", content="c", refusal=None)) if chat else dict(text="c")
    assert found["choices"] == [
        dict(index=0, **first, logprobs=None, finish_reason="length"),
        dict(index=1, **second, logprobs=None, finish_reason="stop"),
    ]
    assert found["object"] == ("chat.completion" if chat else "text_completion")
    assert found["usage"] == dict(
        prompt_tokens=7, completion_tokens=4, total_tokens=11, prompt_tokens_details=dict(cached_tokens=3)
    )
    prefix, _, rest = found["id"].partition("-")
    assert prefix == ("chatcmpl" if chat else "cmpl") and len(bytes.fromhex(rest)) == 12
    assert found["model"] == "m" and found["system_fingerprint"] == f"longlora-{__version__}"
    assert before <= found["created"] <= time.time()
    assert found.keys() == {*("id", "object", "created", "model", "system_fingerprint", "choices", "usage")}
    assert made(chat).body()["id"] != found["id"]


def test_a_chat_comes_in_events():
    reply = made(True, ["", ""])
    begun = events(reply.beginning())
    assert [one["choices"] for one in begun] == [
        [dict(index=i, delta=dict(role="assistant", content=""), logprobs=None, finish_reason=None)]
        for i in (0, 1)
    ]
    assert begun[0]["object"] == "chat.completion.chunk" and begun[0]["model"] == "m"
    assert "usage" not in begun[0]
    (said,) = events(reply.events(Piece(1, "x", 1)))
    assert said["choices"] == [dict(index=1, delta=dict(content="x"), logprobs=None, finish_reason=None)]
    assert events(reply.events(Piece(1, "", 1))) == []
    said, ended = events(reply.events(Piece(1, "y", 1, reason="stop")))
    assert said["choices"] == [dict(index=1, delta=dict(content="y"), logprobs=None, finish_reason=None)]
    assert ended["choices"] == [dict(index=1, delta={}, logprobs=None, finish_reason="stop")]
    (ended,) = events(reply.events(Piece(0, "", reason="length")))
    assert ended["choices"] == [dict(index=0, delta={}, logprobs=None, finish_reason="length")]
    assert reply.complete and list(reply.end()) == [replies.DONE]
    assert reply.usage()["completion_tokens"] == 3


def test_a_completion_comes_in_events():
    reply = made(echoes=["hi ", "yo "])
    assert list(reply.beginning()) == []
    (said,) = events(reply.events(Piece(0, "x", 1)))
    assert said["object"] == "text_completion"
    assert said["choices"] == [dict(index=0, text="hi x", logprobs=None, finish_reason=None)]
    (said,) = events(reply.events(Piece(0, "y", 1, reason="length")))
    assert said["choices"] == [dict(index=0, text="y", logprobs=None, finish_reason="length")]
    (said,) = events(reply.events(Piece(1, "", reason="length")))
    assert said["choices"] == [dict(index=1, text="yo ", logprobs=None, finish_reason="length")]
    silent = made()
    assert list(silent.events(Piece(0, "", 1))) == []
    (ended,) = events(silent.events(Piece(0, "", reason="stop")))
    assert ended["choices"] == [dict(index=0, text="", logprobs=None, finish_reason="stop")]


@pytest.mark.parametrize("chat", [True, False])
def test_usage_comes_last_if_it_is_asked_for(chat):
    reply = made(chat, stream=True, include_usage=True)
    before = events([*reply.beginning(), *reply.events(Piece(0, "x", 2, reason="stop"))])
    assert [one["usage"] for one in before] == [None] * (3 if chat else 1)
    *rest, done = reply.end()
    (last,) = events(rest)
    assert done == replies.DONE and last["choices"] == []
    assert last["object"] == ("chat.completion.chunk" if chat else "text_completion")
    assert last["usage"] == reply.usage() and last["usage"]["total_tokens"] == 9


def test_log_probabilities_of_a_chat():
    """The end token is left out. Minus infinity, for which JSON has no word, is written as -9999."""
    reply = made(True, top_logprobs=2)
    reply.add(Piece(0, "a", 1, [Score(A, -0.5, [(A, -0.5), (0xC3, -math.inf)])]))
    reply.add(Piece(0, "", reason="stop", scores=[Score(END, -0.25, [], ends=True)]))
    entry = dict(token="a", logprob=-0.5, bytes=[A])
    half = dict(token="bytes:\\xc3", logprob=-9999.0, bytes=[0xC3])
    logprobs = dict(content=[{**entry, "top_logprobs": [entry, half]}], refusal=None)
    assert reply.body()["choices"][0]["logprobs"] == logprobs
    streamed = made(True, top_logprobs=0)
    # The score of a token that gives no text yet.
    (said,) = events(streamed.events(Piece(0, "", 1, [Score(0xC3, -0.5)])))
    half["logprob"] = -0.5
    assert said["choices"][0]["logprobs"]["content"] == [{**half, "top_logprobs": []}]
    (ended,) = events(streamed.events(Piece(0, "", 0, [Score(END, -0.25, ends=True)], reason="stop")))
    assert ended["choices"][0] == dict(index=0, delta={}, logprobs=None, finish_reason="stop")
    assert list(streamed.events(Piece(0, "", 0, [Score(END, -0.25, ends=True)]))) == []


def test_log_probabilities_of_a_completion():
    """The first token of a prompt has none. The end token is included."""
    scores = [Score(A, None), Score(B, -1.5, [(A, -0.5)])]
    scores += [Score(0xC3, -2.0, [(B, -1.0), (A, -2.0)]), Score(0xA9, -3.0)]
    end = Score(END, -4.0, [(END, -4.0)], ends=True)
    reply = made(echoes=["ab"], echo=True, top_logprobs=2)
    reply.add(Piece(0, "\u00e9", 2, scores))
    reply.add(Piece(0, "", 0, [end], reason="stop"))
    wanted = dict(
        tokens=["a", "b", "bytes:\\xc3", "bytes:\\xa9", "<|end|>"],
        token_logprobs=[None, -1.5, -2.0, -3.0, -4.0],
        top_logprobs=[
            None,
            {"a": -0.5, "b": -1.5},
            {"b": -1.0, "a": -2.0, "bytes:\\xc3": -2.0},
            {"bytes:\\xa9": -3.0},
            {"<|end|>": -4.0},
        ],
        text_offset=[0, 1, 2, 3, 3],
    )
    (choice,) = reply.body()["choices"]
    assert choice["logprobs"] == wanted and choice["text"] == "ab\u00e9"

    streamed = made(echoes=["ab"], echo=True, top_logprobs=2)
    parts = events(streamed.events(Piece(0, "", 0, scores[:2])))  # without any text
    parts += events(streamed.events(Piece(0, "\u00e9", 2, scores[2:])))
    parts += events(streamed.events(Piece(0, "", 0, [end], reason="stop")))
    assert "".join(part["choices"][0]["text"] for part in parts) == "ab\u00e9"
    found = [part["choices"][0]["logprobs"] for part in parts]
    assert {name: [x for one in found for x in one[name]] for name in wanted} == wanted


@pytest.mark.parametrize("cut, tokens", [(True, ["a"]), (False, ["a", "b", "a"])])
def test_tokens_after_a_stop_string_have_no_scores(cut, tokens):
    scores = [Score(A, -1.0), Score(B, -1.0), Score(A, -1.0)]
    reply = made(top_logprobs=0)
    reply.add(Piece(0, "a", 3, scores, cut=cut, reason="stop"))
    assert reply.body()["choices"][0]["logprobs"]["tokens"] == tokens
    streamed = made(echoes=[""], top_logprobs=0)
    (said,) = events(streamed.events(Piece(0, "a", 3, scores, cut=cut, reason="stop")))
    assert said["choices"][0]["logprobs"]["tokens"] == tokens


def test_of_two_likely_tokens_with_one_spelling_the_likelier_counts():
    """It comes first. The spelling of 300 and 301 is empty: the tokenizer has no such tokens."""
    reply = made(top_logprobs=2)
    reply.add(Piece(0, "", 1, [Score(301, -2.0, [(300, -1.0), (301, -2.0)])], reason="length"))
    assert reply.body()["choices"][0]["logprobs"]["top_logprobs"] == [{"": -1.0}]
