"""OpenAI's API, the requests: from the bytes of a body to what is wanted, checked.

A body may come from anyone. What a field may hold is said once, in CHAT and COMPLETION. A field that is
neither there nor in HARMLESS is refused by its name.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from longlora.decoder.sampling import Sampling
from longlora.errors import UserError, did_you_mean, shown

# Fields that change nothing here, and that clients send without being asked.
HARMLESS = frozenset(
    "user metadata store safety_identifier service_tier prompt_cache_key prompt_cache_retention "
    "parallel_tool_calls".split()
)
# Fields of OpenAI's API that this server does not support. The listed values ask for nothing and pass.
NOTHING: Mapping[str, tuple[Any, ...]] = dict(
    tools=([],),
    tool_choice=("none", "auto"),
    functions=([],),
    function_call=("none", "auto"),
    response_format=({"type": "text"},),
    modalities=(["text"],),
    suffix=("",),
    best_of=(1,),
    audio=(),
    prediction=(),
    reasoning_effort=(),
    verbosity=(),
    web_search_options=(),
)
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# Names that the server passes to a chat template.
RESERVED = ("messages", "add_generation_prompt", "tools", "self")
MOST_STOPS, LONGEST_STOP, MOST_BIASES, MOST_TOP = 16, 256, 1024, 20
COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions


class Refused(Exception):
    """A request that gets an error: HTTP status, message, and the field and code that OpenAI's format has."""

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None):
        super().__init__(message)
        # The message may quote any text.
        self.message, self.status, self.param, self.code = str(UserError(message)), status, param, code

    def body(self) -> dict[str, Any]:
        kinds = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        return {"error": dict(message=self.message, type=kind, param=self.param, code=self.code)}


@dataclass(frozen=True)
class Limits:
    """What the server can do. choices: answers of one request at most. tokens: of an answer at most."""

    model: str
    context: int
    choices: int
    tokens: int | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of the fields of Sampling


@dataclass
class Wanted:
    """A request. messages: of a chat; prompts: of a completion, texts or token ids.

    max_tokens: None for what the context has room for. drop_turns: leave out the oldest turns if the context
    is too short. keep_tokens: of a prompt only the last ones. top_logprobs: None for no log-probabilities.
    """

    sampling: Sampling
    messages: list[dict[str, Any]] | None = None
    prompts: list[str | np.ndarray] = field(default_factory=list)
    n: int = 1
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    top_logprobs: int | None = None
    echo: bool = False
    drop_turns: bool = False
    keep_tokens: int | None = None
    template: dict[str, Any] = field(default_factory=dict)

    def sampling_of(self, choice: int) -> Sampling:
        """How the tokens of one of n choices are drawn: each has a seed of its own."""
        if not choice or self.sampling.seed is None:
            return self.sampling
        return Sampling(**{**vars(self.sampling), "seed": (self.sampling.seed + choice) % (1 << 64)})


def _fail(name: str, wanted: str, value: Any) -> Refused:
    return Refused(f"{name} should be {wanted}, got {shown(value)}", param=name)


def _text(name: str, value: Any, wanted: str = "a string") -> str:
    if not isinstance(value, str):
        raise _fail(name, wanted, value)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Refused(f"{name} holds half a character at {error.start}", param=name) from None
    return value


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _fail(name, "true or false", value)
    return value


def _integer(low: int, high: int | None = None) -> Callable[[str, Any], int]:
    wanted = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"

    def check(name, value):
        if type(value) is not int or value < low or (high is not None and value > high):
            raise _fail(name, wanted, value)
        return value

    return check


def _number(name: str, value: Any) -> float | int:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _fail(name, "a number", value)
    return value  # Sampling knows its range


def _seed(name: str, value: Any) -> int:
    if type(value) is not int or not -(1 << 63) <= value < 1 << 64:
        raise _fail(name, "an integer of 64 bits", value)
    return value % (1 << 64)


def _object(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _fail(name, "an object", value)
    return value


def _stop(name: str, value: Any) -> tuple[str, ...]:
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or len(found) > MOST_STOPS:
        raise _fail(name, f"a string or a list of up to {MOST_STOPS} strings", value)
    for text in found:
        if not _text(name, text) or len(text) > LONGEST_STOP:
            raise _fail(name, f"strings of 1 to {LONGEST_STOP} characters", text)
    return tuple(found)


def _bias(name: str, value: Any) -> dict[int, float]:
    if len(_object(name, value)) > MOST_BIASES:
        raise Refused(f"{name} should have at most {MOST_BIASES} tokens, got {len(value)}", param=name)
    found = {}
    for token, bias in value.items():
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise _fail(f"{name}'s names", "token ids", token)
        if isinstance(bias, bool) or not isinstance(bias, (int, float)) or not -100 <= bias <= 100:
            raise _fail(f"{name}[{token}]", "a number from -100 to 100", bias)
        found[int(token)] = bias
    return found


def _stream_options(name: str, value: Any) -> bool:
    for key, switch in _object(name, value).items():
        if key not in ("include_usage", "include_obfuscation"):
            raise Refused(f"{name} has an unknown field {shown(key)}", param=name)
        if switch is not None:
            _boolean(f"{name}.{key}", switch)
    return bool(value.get("include_usage"))


def _truncation(name: str, value: Any) -> bool:
    if value not in ("auto", "disabled"):
        raise _fail(name, '"auto" or "disabled"', value)
    return value == "auto"


def _template(name: str, value: Any) -> dict[str, Any]:
    for key in _object(name, value):
        if key in RESERVED or not key.isidentifier():
            raise Refused(f"{name} cannot set {shown(key)}", param=name)
    _text(name, json.dumps(value, ensure_ascii=False))
    return value


def _content(where: str, value: Any) -> str:
    """The text of a message: a string, or a list of text parts, which become lines."""
    if not isinstance(value, list):
        return _text(where, value, "a string or a list of text parts")
    parts = []
    for i, part in enumerate(value):
        kind = _object(f"{where}[{i}]", part).get("type")
        if kind != "text":
            raise Refused(
                f"{where}[{i}] is a part of type {shown(kind)}, and this server takes text only", param=where
            )
        extra = set(part) - {"type", "text"}
        if extra:
            raise Refused(f"{where}[{i}] has an unknown field {shown(min(extra))}", param=where)
        parts.append(_text(f"{where}[{i}].text", part.get("text")))
    return "\n".join(parts)


def _messages(name: str, value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise _fail(name, "a list of at least one message", value)
    found = []
    for i, message in enumerate(value):
        where = f"{name}[{i}]"
        role = _object(where, message).get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise Refused(
                f"{where}.role should be one of {', '.join(ROLES)}, got {shown(role)}", param=f"{where}.role"
            )
        plain = dict(role=ROLES[role], content=_content(f"{where}.content", message.get("content")))
        for key, extra in message.items():
            if key in ("role", "content") or extra is None or extra == []:
                continue
            if key != "name":
                raise Refused(f"{where}.{shown(key)[1:-1]} is not supported", param=where)
            plain["name"] = _text(f"{where}.name", extra)
        found.append(plain)
    return found


def _prompts(name: str, value: Any) -> list[str | np.ndarray]:
    """A text, several texts, token ids, or several lists of them."""
    if isinstance(value, str):
        return [_text(name, value)]
    wanted = "a string, a list of strings, of token ids, or of lists of token ids"
    if not isinstance(value, list) or not value:
        raise _fail(name, wanted, value)
    if type(value[0]) is int:
        return [_ids(name, value, wanted)]
    return [
        _ids(f"{name}[{i}]", one, wanted) if isinstance(one, list) else _text(f"{name}[{i}]", one, wanted)
        for i, one in enumerate(value)
    ]


def _ids(name, value, wanted):
    if not all(type(token) is int for token in value):
        raise _fail(name, wanted, value)
    if any(not 0 <= token < 1 << 31 for token in value):
        raise Refused(f"{name} has a number that is not a token id", param=name)
    return np.array(value, np.int32)


_SAMPLING: dict[str, Callable[[str, Any], Any]] = dict(
    temperature=_number,
    top_p=_number,
    top_k=_integer(-1, (1 << 31) - 1),
    min_p=_number,
    repetition_penalty=_number,
    presence_penalty=_number,
    frequency_penalty=_number,
    logit_bias=_bias,
    seed=_seed,
)
_BOTH: dict[str, Callable[[str, Any], Any]] = dict(
    model=_text, n=_integer(1), stop=_stop, stream=_boolean, stream_options=_stream_options, **_SAMPLING
)
CHAT: dict[str, Callable[[str, Any], Any]] = dict(
    messages=_messages,
    max_tokens=_integer(1),
    max_completion_tokens=_integer(1),
    logprobs=_boolean,
    top_logprobs=_integer(0, MOST_TOP),
    truncation=_truncation,
    chat_template_kwargs=_template,
    **_BOTH,
)
COMPLETION: dict[str, Callable[[str, Any], Any]] = dict(
    prompt=_prompts,
    max_tokens=_integer(0),
    logprobs=_integer(0, MOST_TOP),
    echo=_boolean,
    truncate_prompt_tokens=_integer(1),
    **_BOTH,
)


def parse(body: bytes) -> dict[str, Any]:
    """The fields of a JSON object. Refused for anything else."""
    try:
        found = json.loads(body.decode("utf-8"), parse_constant=_constant)
    except UnicodeDecodeError as error:
        raise Refused(f"the body is not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise Refused("the body is nested too deeply") from None
    except ValueError as error:  # also a number with too many digits
        raise Refused(f"the body is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise Refused(f"the body should be a JSON object, got {shown(found)}")
    return found


def _constant(text):
    raise ValueError(f"{text} is not a number in JSON")


def read_chat(body: bytes, limits: Limits) -> Wanted:
    """The request of a body of /v1/chat/completions."""
    found = _fields(parse(body), CHAT, limits)
    if "messages" not in found:
        raise Refused("messages is missing", param="messages")
    both = found.get("max_tokens"), found.get("max_completion_tokens")
    if None not in both and both[0] != both[1]:
        raise Refused(f"max_tokens is {both[0]} and max_completion_tokens {both[1]}", param="max_tokens")
    if found.get("top_logprobs") is not None and not found.get("logprobs"):
        raise Refused("top_logprobs needs logprobs", param="top_logprobs")
    wanted = _wanted(found, both[0] if both[1] is None else both[1], limits)
    wanted.messages = found["messages"]
    wanted.top_logprobs = found.get("top_logprobs", 0) if found.get("logprobs") else None
    wanted.drop_turns = found.get("truncation", False)
    wanted.template = found.get("chat_template_kwargs", {})
    _check_choices(wanted, 1, limits)
    return wanted


def read_completion(body: bytes, limits: Limits) -> Wanted:
    """The request of a body of /v1/completions."""
    found = _fields(parse(body), COMPLETION, limits)
    if "prompt" not in found:
        raise Refused("prompt is missing", param="prompt")
    wanted = _wanted(found, found.get("max_tokens", COMPLETION_TOKENS), limits)
    wanted.prompts = found["prompt"]
    wanted.top_logprobs, wanted.echo = found.get("logprobs"), found.get("echo", False)
    wanted.keep_tokens = found.get("truncate_prompt_tokens")
    _check_choices(wanted, len(wanted.prompts), limits)
    return wanted


def _fields(
    given: dict[str, Any], table: Mapping[str, Callable[[str, Any], Any]], limits: Limits
) -> dict[str, Any]:
    """Check each field by the table -> those that say something. A null says nothing."""
    found = {}
    for name, value in given.items():
        if name in table:
            if value is not None:
                found[name] = table[name](name, value)
        elif name in NOTHING:
            # A bool is not the number 1.
            if value is not None and not any(type(value) is type(x) and value == x for x in NOTHING[name]):
                raise Refused(f"{name} is not supported, got {shown(value)}", param=name)
        elif name not in HARMLESS:
            hint = did_you_mean(name, table)
            raise Refused(f"unknown field {shown(name)}{hint}", param=str(UserError(name[:64])))
    if found.get("model", limits.model) != limits.model:
        raise Refused(
            f"there is no model {shown(found['model'])} here, only {limits.model!r}",
            404,
            "model",
            "model_not_found",
        )
    return found


def _wanted(found: dict[str, Any], max_tokens: int | None, limits: Limits) -> Wanted:
    if max_tokens is not None and limits.tokens is not None and max_tokens > limits.tokens:
        raise Refused(
            f"max_tokens is {max_tokens}, this server gives at most {limits.tokens}", param="max_tokens"
        )
    if found.get("stream_options") and not found.get("stream"):
        raise Refused("stream_options needs stream", param="stream_options")
    sampling = {**limits.defaults, **{name: found[name] for name in _SAMPLING if name in found}}
    if sampling.get("top_k") == -1:  # what vLLM calls all tokens
        sampling["top_k"] = 0
    for name, value in sampling.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise Refused(f"{name} is too large for a number of 64 bits", param=name)
    try:
        how = Sampling(**sampling)
    except UserError as error:
        raise Refused(str(error), param=str(error).partition(" ")[0]) from None
    return Wanted(
        how,
        n=found.get("n", 1),
        max_tokens=max_tokens,
        stop=found.get("stop", ()),
        stream=found.get("stream", False),
        include_usage=found.get("stream_options", False),
    )


def _check_choices(wanted, prompts, limits):
    if wanted.n * prompts > limits.choices:
        raise Refused(
            f"the request asks for {wanted.n * prompts} answers, this server takes up to {limits.choices} "
            "at a time",
            param="n",
        )
