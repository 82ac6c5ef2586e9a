"""We read the fields that clients send. Anything else in a body is refused by name."""

import json
import random

import numpy as np
import pytest

from longlora.serving import protocol
from longlora.serving.protocol import CHAT, COMPLETION, Limits, Refused, read_chat, read_completion

LIMITS = Limits("m", 1000, 8, 500, {"temperature": 1.0, "top_p": 0.5})
HELLO = [{"role": "user", "content": "hello"}]


def chat(**fields):
    return read_chat(json.dumps({"messages": HELLO, **fields}).encode(), LIMITS)


def completion(**fields):
    return read_completion(json.dumps({"prompt": "a", **fields}).encode(), LIMITS)


def test_the_server_decides_the_defaults():
    wanted = chat()
    assert wanted.messages == HELLO and wanted.max_tokens is None and wanted.n == 1 and not wanted.stream
    assert wanted.sampling.temperature == 1 and wanted.sampling.top_p == 0.5 and wanted.top_logprobs is None
    assert completion().max_tokens == 16 and completion(max_tokens=0).max_tokens == 0
    assert chat(temperature=0, top_p=None).sampling.temperature == 0


def test_fields_of_the_openai_client_are_read():
    wanted = chat(
        model="m",
        max_completion_tokens=7,
        stop="END",
        stream=True,
        stream_options={"include_usage": True},
        n=2,
        seed=-1,
        logprobs=True,
        top_logprobs=3,
        logit_bias={"5": -100},
        frequency_penalty=0.5,
        presence_penalty=-0.5,
        user="me",
        metadata={"a": "b"},
        store=False,
        tools=None,
        tool_choice="auto",
        response_format={"type": "text"},
        modalities=["text"],
    )
    assert (wanted.max_tokens, wanted.stop, wanted.stream, wanted.include_usage) == (7, ("END",), True, True)
    assert wanted.top_logprobs == 3 and wanted.sampling.logit_bias == {5: -100}
    assert wanted.sampling.seed == (1 << 64) - 1
    assert wanted.sampling_of(0).seed == (1 << 64) - 1 and wanted.sampling_of(1).seed == 0


def test_fields_of_vllms_clients_are_read():
    wanted = chat(
        top_k=-1,
        min_p=0.1,
        repetition_penalty=1.1,
        chat_template_kwargs={"thinking": False},
        truncation="auto",
    )
    assert wanted.sampling.top_k == 0 and wanted.sampling.min_p == 0.1 and wanted.drop_turns
    assert wanted.template == {"thinking": False}
    assert completion(truncate_prompt_tokens=5).keep_tokens == 5


def test_every_kind_of_prompt_is_read():
    assert completion(prompt="ab").prompts == ["ab"] and completion(prompt=["a", "b"]).prompts == ["a", "b"]
    (ids,) = completion(prompt=[1, 2]).prompts
    assert ids.dtype == np.int32 and list(ids) == [1, 2]
    assert [list(x) for x in completion(prompt=[[1], [2, 3]]).prompts] == [[1], [2, 3]]


IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]


@pytest.mark.parametrize(
    "fields, words, param",
    [
        (dict(messages=[]), "messages should be a list of at least one message", "messages"),
        (dict(messages="hi"), "messages should be a list", "messages"),
        (dict(messages=[1]), r"messages\[0\] should be an object, got 1", "messages[0]"),
        (
            dict(messages=[{"role": "tool", "content": "x"}]),
            "role should be one of system",
            "messages[0].role",
        ),
        (dict(messages=[{"role": ["user"]}]), "role should be one of", "messages[0].role"),
        (dict(messages=[{"role": "user"}]), "content should be a string or a list", "messages[0].content"),
        (dict(messages=IMAGE), "part of type 'image_url', and this server takes text only", None),
        (dict(messages=[{**HELLO[0], "tool_calls": [{}]}]), "tool_calls is not supported", "messages[0]"),
        (dict(messages=[{"role": "user", "content": "\ud800"}]), "holds half a character at 0", None),
        (dict(tools=[{"type": "function"}]), "tools is not supported", "tools"),
        (
            dict(response_format={"type": "json_schema"}),
            "response_format is not supported",
            "response_format",
        ),
        (dict(modalities=["text", "audio"]), "modalities is not supported", "modalities"),
        (dict(prompt="x"), "unknown field 'prompt'", "prompt"),
        (dict(max_tokens=0), "max_tokens should be an integer of at least 1, got 0", "max_tokens"),
        (dict(max_tokens=10**30), "max_tokens is 10+, this server gives at most 500", "max_tokens"),
        (dict(max_tokens=5, max_completion_tokens=6), "max_tokens is 5 and max_completion_tokens 6", None),
        (dict(n=9), "asks for 9 answers, this server takes up to 8", "n"),
        (dict(n=True), "n should be an integer of at least 1, got True", "n"),
        (dict(temperature="1"), "temperature should be a number, got '1'", "temperature"),
        (dict(temperature=-1), "temperature should be a number from 0 to 100, got -1", "temperature"),
        (dict(top_p=0), "top_p should be a number above 0 to 1, got 0", "top_p"),
        (dict(presence_penalty=3), "presence_penalty should be a number from -2 to 2", "presence_penalty"),
        (dict(seed=1.5), "seed should be an integer of 64 bits", "seed"),
        (dict(seed=1 << 64), "seed should be an integer of 64 bits", "seed"),
        (dict(stop=[""]), "stop should be strings of 1 to 256 characters", "stop"),
        (dict(stop=["a"] * 17), "list of up to 16 strings", "stop"),
        (dict(stop={"a": 1}), "stop should be a string or a list", "stop"),
        (dict(logit_bias={"x": 1}), "logit_bias's names should be token ids, got 'x'", None),
        (dict(logit_bias={"1": 200}), r"logit_bias\[1\] should be a number from -100 to 100", None),
        (dict(logit_bias={str(i): 1 for i in range(1025)}), "at most 1024 tokens", "logit_bias"),
        (dict(top_logprobs=2), "top_logprobs needs logprobs", "top_logprobs"),
        (dict(logprobs=True, top_logprobs=21), "an integer from 0 to 20", "top_logprobs"),
        (dict(stream_options={"include_usage": True}), "stream_options needs stream", "stream_options"),
        (dict(stream=True, stream_options={"x": 1}), "stream_options has an unknown field", None),
        (dict(truncation="yes"), 'truncation should be "auto" or "disabled"', "truncation"),
        (dict(chat_template_kwargs={"messages": []}), "chat_template_kwargs cannot set 'messages'", None),
        (dict(chat_template_kwargs={"self": 1}), "chat_template_kwargs cannot set 'self'", None),
        (dict(chat_template_kwargs={"a": {"b": "\udfff"}}), "chat_template_kwargs holds half", None),
    ],
)
def test_other_fields_of_chats_are_refused_by_name(fields, words, param):
    with pytest.raises(Refused, match=words) as caught:
        chat(**fields)
    assert caught.value.status == 400 and caught.value.param == (param or caught.value.param)
    assert json.loads(json.dumps(caught.value.body()))["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(prompt=None), "prompt is missing"),
        (dict(prompt=[]), "prompt should be a string, a list of strings"),
        (dict(prompt=[1, "a"]), "prompt should be a string, a list of strings"),
        (dict(prompt=["a", 1]), r"prompt\[1\] should be a string"),
        (dict(prompt=[True]), r"prompt\[0\] should be a string"),
        (dict(prompt=[[1, True]]), r"prompt\[0\] should be a string"),
        (dict(prompt=[-1]), "prompt has a number that is not a token id"),
        (dict(prompt=[1 << 40]), "prompt has a number that is not a token id"),
        (dict(prompt=["a"] * 9), "asks for 9 answers"),
        (dict(suffix="x"), "suffix is not supported"),
        (dict(best_of=2), "best_of is not supported"),
        (dict(best_of=True), "best_of is not supported"),
        (dict(messages=HELLO), "unknown field 'messages'"),
        (dict(logprobs=True), "logprobs should be an integer from 0 to 20"),
    ],
)
def test_other_fields_of_completions_are_refused_by_name(fields, words):
    with pytest.raises(Refused, match=words):
        completion(**fields)


@pytest.mark.parametrize(
    "body, words",
    [
        (b"", "the body is not JSON"),
        (b"{", "the body is not JSON"),
        (b"[]", r"the body should be a JSON object, got \[\]"),
        (b"\xff{}", "the body is not UTF-8 at byte 0"),
        (b'{"n": NaN}', "NaN is not a number in JSON"),
        (b'{"n": -Infinity}', "-Infinity is not a number"),
        (b"[" * 200_000, "the body is nested too deeply"),
        (b'{"a":' * 200_000, "the body is nested too deeply"),
        (b'{"n": ' + b"9" * 5000 + b"}", "the body is not JSON"),
        (b'{"messages": [{"role": "user", "content": "a"}], "temperature": 1e999}', "temperature"),
    ],
)
def test_bodies_that_are_not_requests_are_refused(body, words):
    with pytest.raises(Refused, match=words):
        read_chat(body, LIMITS)


def test_the_tables_do_not_overlap():
    for table in (CHAT, COMPLETION):
        assert not set(table) & protocol.HARMLESS and not set(table) & set(protocol.NOTHING)
    assert not protocol.HARMLESS & set(protocol.NOTHING)


VALUES = [
    None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, 10**40, 0.5, -1e308, 1e309, "", "a", "\ud800", "\0", [],
    {}, [[]], [1], ["a"], [None], {"a": None}, {"type": "text"}, [{"type": "text", "text": "x"}], "auto",
    "x" * 999, [{"role": "user", "content": "x"}], [{"role": "user", "content": None}], {"include_usage": 1},
    {"1": 1},
]  # fmt: skip


def damaged(random, fields):
    """A body in which some fields, and perhaps some bytes, have any value."""
    body = {name: random.choice(VALUES) for name in random.sample(fields, random.randrange(1, 4))}
    if random.random() < 0.6:
        body[fields[0]] = HELLO if fields[0] == "messages" else "a"
    text = bytearray(json.dumps(body).encode())
    for _ in range(random.choice((0, 0, 1, 3))):
        text[random.randrange(len(text))] = random.randrange(256)
    return bytes(text[: random.randrange(len(text))] if random.random() < 0.1 else text)


@pytest.mark.parametrize("read, table", [(read_chat, CHAT), (read_completion, COMPLETION)])
def test_malformed_bodies_are_read_or_refused(read, table):
    """Each route gets 5000 bodies. Those that are read keep the limits. Any other error fails the test."""
    source, taken = random.Random(0), 0
    fields = [*table, *protocol.NOTHING, *protocol.HARMLESS, "xyz"]
    for _ in range(5000):
        body = damaged(source, fields)
        try:
            wanted = read(body, LIMITS)
        except Refused as error:
            assert error.status in (400, 404)
            json.dumps(error.body(), ensure_ascii=False).encode()
            continue
        taken += 1
        assert 1 <= wanted.n * max(1, len(wanted.prompts)) <= LIMITS.choices
        assert wanted.max_tokens is None or 0 <= wanted.max_tokens <= 500
        assert (wanted.messages is None) == (read is read_completion)
    assert 100 < taken < 4000
