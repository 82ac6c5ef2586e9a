"""The limits of each field of a request: the last accepted value, and the first that is refused."""

import json

import pytest

from longlora.serving import protocol
from longlora.serving.protocol import Limits, Refused, read_chat, read_completion

LIMITS = Limits("m", 1000, 8, 500, {"temperature": 1.0})
HELLO = [{"role": "user", "content": "hello"}]


def chat(limits=LIMITS, **fields):
    return read_chat(json.dumps({"messages": HELLO, **fields}).encode(), limits)


def completion(limits=LIMITS, **fields):
    return read_completion(json.dumps({"prompt": "a", **fields}).encode(), limits)


def refused(read, **fields):
    """The error of a request that is refused."""
    with pytest.raises(Refused) as caught:
        read(**fields)
    return caught.value


SAMPLING = dict(
    temperature=0.5,
    top_p=0.25,
    top_k=7,
    min_p=0.125,
    repetition_penalty=1.5,
    presence_penalty=1,
    frequency_penalty=-2,
    logit_bias={"3": 4.5, "999999999": -1},
    seed=11,
)


@pytest.mark.parametrize("read", [chat, completion])
def test_fields_of_sampling_reach_the_sampler(read):
    found = vars(read(**SAMPLING).sampling)
    wanted = SAMPLING | dict(logit_bias={3: 4.5, 999999999: -1})
    assert {name: found[name] for name in wanted} == wanted
    assert read().sampling.temperature == 1 and read().sampling.seed is None
    assert read(Limits("m", 10, 1)).sampling == protocol.Sampling()


def test_each_choice_has_a_seed_of_its_own():
    wanted = chat(seed=11, top_k=7, n=2)
    assert [wanted.sampling_of(i).seed for i in range(3)] == [11, 12, 13]
    assert wanted.sampling_of(1).top_k == 7 and wanted.sampling_of(1).temperature == 1
    assert chat(n=2).sampling_of(1) == chat().sampling


def test_the_defaults_of_fields_that_are_left_out():
    for wanted in (chat(), completion()):
        assert (wanted.n, wanted.stop, wanted.top_logprobs, wanted.keep_tokens) == (1, (), None, None)
        assert (wanted.stream, wanted.include_usage, wanted.echo, wanted.drop_turns) == (False,) * 4
    assert chat().template == {} and chat().prompts == [] and completion().messages is None


@pytest.mark.parametrize(
    "read, fields, name, value",
    [
        (chat, dict(max_tokens=1), "max_tokens", 1),
        (chat, dict(max_tokens=500), "max_tokens", 500),
        (chat, dict(max_tokens=9, max_completion_tokens=9), "max_tokens", 9),
        (chat, dict(max_completion_tokens=1), "max_tokens", 1),
        (chat, dict(n=8), "n", 8),
        (chat, dict(stop="a"), "stop", ("a",)),
        (chat, dict(stop=[]), "stop", ()),
        (chat, dict(stop=["a", "b" * 256]), "stop", ("a", "b" * 256)),
        (chat, dict(stop=["a"] * 16), "stop", ("a",) * 16),
        (chat, dict(stream=False), "stream", False),
        (chat, dict(stream=True), "include_usage", False),
        (chat, dict(stream=True, stream_options={}), "include_usage", False),
        (chat, dict(stream_options={"include_usage": False}), "include_usage", False),
        (chat, dict(stream=True, stream_options={"include_usage": None}), "include_usage", False),
        (chat, dict(stream=True, stream_options={"include_obfuscation": True}), "include_usage", False),
        (chat, dict(stream=True, stream_options={"include_usage": True}), "include_usage", True),
        (chat, dict(logprobs=True), "top_logprobs", 0),
        (chat, dict(logprobs=False), "top_logprobs", None),
        (chat, dict(logprobs=True, top_logprobs=0), "top_logprobs", 0),
        (chat, dict(logprobs=True, top_logprobs=20), "top_logprobs", 20),
        (chat, dict(truncation="auto"), "drop_turns", True),
        (chat, dict(truncation="disabled"), "drop_turns", False),
        (chat, dict(chat_template_kwargs={"a": [1], "b": "\u00e9"}), "template", {"a": [1], "b": "\u00e9"}),
        (completion, dict(max_tokens=0), "max_tokens", 0),
        (completion, dict(max_tokens=500), "max_tokens", 500),
        (completion, dict(logprobs=0), "top_logprobs", 0),
        (completion, dict(logprobs=20), "top_logprobs", 20),
        (completion, dict(echo=True), "echo", True),
        (completion, dict(truncate_prompt_tokens=1), "keep_tokens", 1),
        (completion, dict(prompt=["a"] * 4, n=2), "n", 2),
        (completion, dict(prompt=["a", "b"]), "prompts", ["a", "b"]),
    ],
)
def test_accepted_values_at_the_limits(read, fields, name, value):
    found = getattr(read(**fields), name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "fields, name, value",
    [
        (dict(top_k=-1), "top_k", 0),
        (dict(top_k=0), "top_k", 0),
        (dict(top_k=(1 << 31) - 1), "top_k", (1 << 31) - 1),
        (dict(seed=0), "seed", 0),
        (dict(seed=-1), "seed", (1 << 64) - 1),
        (dict(seed=-(1 << 63)), "seed", 1 << 63),
        (dict(seed=(1 << 64) - 1), "seed", (1 << 64) - 1),
        (dict(logit_bias={"0": -100, "1": 100}), "logit_bias", {0: -100, 1: 100}),
        (dict(logit_bias={str(i): 1 for i in range(1024)}), "logit_bias", dict.fromkeys(range(1024), 1)),
    ],
)
def test_accepted_sampling_values_at_the_limits(fields, name, value):
    for read in (chat, completion):
        assert getattr(read(**fields).sampling, name) == value


def test_a_token_id_has_up_to_31_bits():
    (found,) = completion(prompt=[0, (1 << 31) - 1]).prompts
    assert found.tolist() == [0, (1 << 31) - 1]
    text, ids = completion(prompt=["a", [1]]).prompts
    assert text == "a" and ids.tolist() == [1]


def part(**fields):
    """Fields of a chat with one message, whose content is one part with these fields."""
    return dict(messages=[{"role": "user", "content": [fields]}])


def said(**fields):
    """Fields of a chat with two messages. The second one has these fields."""
    return dict(messages=[*HELLO, {"role": "user", "content": "a", **fields}])


BOTH = [
    (dict(model=1), "model", "should be a string, got 1"),
    (dict(n=0), "n", "should be an integer of at least 1, got 0"),
    (dict(n=1.0), "n", "should be an integer of at least 1, got 1.0"),
    (dict(stream=1), "stream", "should be true or false, got 1"),
    (dict(stop=[1]), "stop", "should be a string, got 1"),
    (dict(stop="\ud800"), "stop", "holds half a character at 0"),
    (dict(stop=["a", "b" * 257]), "stop", "should be strings of 1 to 256 characters"),
    (dict(top_k=-2), "top_k", "should be an integer from -1 to 2147483647, got -2"),
    (dict(top_k=1 << 31), "top_k", "should be an integer from -1 to 2147483647"),
    (dict(top_k=True), "top_k", "should be an integer from -1"),
    (dict(temperature=True), "temperature", "should be a number, got True"),
    (dict(min_p=[]), "min_p", "should be a number, got []"),
    (dict(seed=-(1 << 63) - 1), "seed", "should be an integer of 64 bits"),
    (dict(seed=True), "seed", "should be an integer of 64 bits"),
    (dict(logit_bias=[]), "logit_bias", "should be an object, got []"),
    (dict(logit_bias={"1": True}), "logit_bias[1]", "should be a number from -100 to 100, got True"),
    (dict(logit_bias={"1": "2"}), "logit_bias[1]", "should be a number from -100 to 100, got '2'"),
    (dict(logit_bias={"1": -100.5}), "logit_bias[1]", "should be a number from -100 to 100"),
    (dict(logit_bias={"1": 100.5}), "logit_bias[1]", "should be a number from -100 to 100"),
    (dict(logit_bias={"-1": 1}), "logit_bias's names", "should be token ids, got '-1'"),
    (dict(logit_bias={"\u00b2": 1}), "logit_bias's names", "should be token ids"),
    (dict(logit_bias={"1234567890": 1}), "logit_bias's names", "should be token ids, got '1234567890'"),
    (dict(stream_options=[]), "stream_options", "should be an object, got []"),
    (dict(stream=True, stream_options={"include_usage": 1}), "stream_options.include_usage", "true or false"),
    (dict(xyz=1), "xyz", "unknown field 'xyz'"),
]
CHATS = [
    (dict(max_tokens=501), "max_tokens", "is 501, this server gives at most 500"),
    (dict(max_completion_tokens=0), "max_completion_tokens", "should be an integer of at least 1"),
    (dict(logprobs=1), "logprobs", "should be true or false, got 1"),
    (dict(logprobs=False, top_logprobs=0), "top_logprobs", "needs logprobs"),
    (dict(logprobs=True, top_logprobs=-1), "top_logprobs", "should be an integer from 0 to 20, got -1"),
    (dict(truncation=True), "truncation", 'should be "auto" or "disabled", got True'),
    (dict(chat_template_kwargs=[]), "chat_template_kwargs", "should be an object, got []"),
    (dict(chat_template_kwargs={"tools": 1}), "chat_template_kwargs", "cannot set 'tools'"),
    (dict(chat_template_kwargs={"a b": 1}), "chat_template_kwargs", "cannot set 'a b'"),
    (
        dict(chat_template_kwargs={"add_generation_prompt": 1}),
        "chat_template_kwargs",
        "cannot set 'add_generation_prompt'",
    ),
    (dict(messages=None), "messages", "is missing"),
    (dict(messages=[{}]), "messages[0].role", "should be one of system, developer, user, assistant"),
    (said(content=7), "messages[1].content", "should be a string or a list of text parts, got 7"),
    (said(name=7), "messages[1].name", "should be a string, got 7"),
    (said(tool_calls=[], other=7), "messages[1]", ".other is not supported"),
    (said(content=[7]), "messages[1].content[0]", "should be an object, got 7"),
    (part(type="text", text=7), "messages[0].content[0].text", "should be a string, got 7"),
    (part(type="text"), "messages[0].content[0].text", "should be a string, got None"),
    (part(text="a"), "messages[0].content", "[0] is a part of type None"),
    (part(type="text", text="a", b=1, a=2), "messages[0].content", "[0] has an unknown field 'a'"),
]
COMPLETIONS = [
    (dict(max_tokens=-1), "max_tokens", "should be an integer of at least 0, got -1"),
    (dict(max_tokens=501), "max_tokens", "is 501, this server gives at most 500"),
    (dict(logprobs=21), "logprobs", "should be an integer from 0 to 20, got 21"),
    (dict(logprobs=-1), "logprobs", "should be an integer from 0 to 20, got -1"),
    (dict(echo=1), "echo", "should be true or false, got 1"),
    (dict(truncate_prompt_tokens=0), "truncate_prompt_tokens", "should be an integer of at least 1, got 0"),
    (dict(prompt=1), "prompt", "should be a string, a list of strings, of token ids, or of lists"),
    (dict(prompt={}), "prompt", "should be a string, a list of strings, of token ids, or of lists"),
    (dict(prompt="\ud800"), "prompt", "holds half a character at 0"),
    (dict(prompt=["a", [1, "b"]]), "prompt[1]", "should be a string, a list of strings"),
    (dict(prompt=[0, 1 << 31]), "prompt", "has a number that is not a token id"),
    (dict(prompt=["a", [-1]]), "prompt[1]", "has a number that is not a token id"),
    (dict(max_completion_tokens=5), "max_completion_tokens", "unknown field 'max_completion_tokens'"),
]


@pytest.mark.parametrize(
    "read, fields, name, words",
    [
        *((read, *row) for row in BOTH for read in (chat, completion)),
        *((chat, *row) for row in CHATS),
        *((completion, *row) for row in COMPLETIONS),
    ],
)
def test_refused_values_beyond_the_limits(read, fields, name, words):
    error = refused(read, **fields)
    assert words in error.message and error.status == 400 and error.code is None
    assert name in error.message and error.param == name


def test_the_limit_of_answers_counts_those_of_all_prompts():
    error = refused(completion, prompt=["a"] * 3, n=3)
    assert "asks for 9 answers, this server takes up to 8" in error.message and error.param == "n"
    assert chat(Limits("m", 10, 8), max_tokens=10**9).max_tokens == 10**9  # no limit of the server


# Field -> values by which OpenAI's clients ask for nothing.
EMPTY = dict(
    tools=[[]],
    tool_choice=["none", "auto"],
    functions=[[]],
    function_call=["none", "auto"],
    response_format=[{"type": "text"}],
    modalities=[["text"]],
    suffix=[""],
    best_of=[1],
    audio=[],
    prediction=[],
    reasoning_effort=[],
    verbosity=[],
    web_search_options=[],
)


@pytest.mark.parametrize("name", EMPTY)
def test_unsupported_fields_may_ask_for_nothing(name):
    for value in [None, *EMPTY[name]]:
        assert chat(**{name: value}).messages == HELLO
        assert completion(**{name: value}).prompts == ["a"]
    for value in (7, "7"):
        error = refused(chat, **{name: value})
        assert error.message == f"{name} is not supported, got {value!r}" and error.param == name


def test_harmless_and_unsupported_fields():
    assert set(EMPTY) == set(protocol.NOTHING)
    harmless = "user metadata store service_tier parallel_tool_calls safety_identifier prompt_cache_key"
    for name in [*harmless.split(), "prompt_cache_retention"]:
        assert chat(**{name: 7}).messages == HELLO


def test_unknown_fields_get_a_hint():
    assert refused(chat, max_token=5).message == "unknown field 'max_token'; did you mean max_tokens?"
    assert refused(completion, promt=5).message == "unknown field 'promt'; did you mean prompt?"
    assert refused(chat, xyz=5).message == "unknown field 'xyz'"
    assert refused(chat, **{"y" * 99: 5}).param == "y" * 64


def test_another_model_is_not_found():
    error = refused(chat, model="other")
    assert (error.status, error.param, error.code) == (404, "model", "model_not_found")
    assert error.message == "there is no model 'other' here, only 'm'"
    assert chat(model="m").messages == HELLO and chat(model=None).messages == HELLO


@pytest.mark.parametrize(
    "status, kind",
    [
        (400, "invalid_request_error"),
        (404, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "server_error"),
        (503, "server_error"),
    ],
)
def test_an_error_has_openais_form(status, kind):
    error = Refused("a\nb", status, "n", "c")
    assert error.body() == {"error": dict(message="a b", type=kind, param="n", code="c")}
    assert Refused("a").status == 400 and Refused("a").body()["error"]["code"] is None


@pytest.mark.parametrize(
    "body, words",
    [
        (b'{"a": "\xff"}', "the body is not UTF-8 at byte 7"),
        (b"7", "the body should be a JSON object, got 7"),
        (b'{"n": Infinity}', "the body is not JSON: Infinity is not a number in JSON"),
        (b'{"prompt": "a", "temperature": 1e999}', "temperature is too large for a number of 64 bits"),
        (b'{"prompt": "a", "top_p": -1e999}', "top_p is too large for a number of 64 bits"),
    ],
)
def test_the_error_of_a_malformed_body(body, words):
    with pytest.raises(Refused) as caught:
        read_completion(body, LIMITS)
    assert caught.value.message == words


def test_messages_that_clients_send_back_are_read():
    """Text parts, names, developers, and the empty fields of an answer that comes back."""
    empty = {"refusal": None, "tool_calls": [], "annotations": []}
    given = [
        {"role": "system", "content": "s"},
        {"role": "developer", "content": [{"type": "text", "text": "d"}, {"type": "text", "text": "e"}]},
        {"role": "user", "content": [{"type": "text", "text": "f"}, {"type": "text", "text": ""}]},
        {"role": "assistant", "content": "a", "name": "Bob", **empty},
        {"refusal": None, "role": "user", "content": "", "name": "Ann"},
    ]
    assert chat(messages=given).messages == [
        {"role": "system", "content": "s"},
        {"role": "system", "content": "d\ne"},
        {"role": "user", "content": "f\n"},
        {"role": "assistant", "content": "a", "name": "Bob"},
        {"role": "user", "content": "", "name": "Ann"},
    ]
