"""The routes of a server without a socket: access, refusals, limits, and the requests to the engine."""

import asyncio
import base64
import contextlib
import hashlib
import json
import time

import numpy as np
import pytest
import served
import tiny

from longlora.data.chat_template import ChatTemplate
from longlora.decoder.sampling import Sampling
from longlora.errors import UserError
from longlora.serving import server
from longlora.serving.answer import Answer
from longlora.serving.log import USAGE
from longlora.serving.open import open_engine
from longlora.serving.protocol import Limits, Refused, Wanted
from longlora.serving.server import Service, _is_here, refusal

HELLO = [{"role": "user", "content": "hello"}]
CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    path = tmp_path_factory.mktemp("service") / "tiny"
    return open_engine(tiny.model(path, max_position_embeddings=512), rows=2)


@pytest.fixture
def make(opened):
    """A function that makes a Service whose worker does not run."""
    with contextlib.ExitStack() as stack:

        def made(*how, context=512, choices=6, tokens=None, **more):
            template = ChatTemplate(served.TEMPLATE, {}, "/some/where/template.jinja")
            limits = Limits("m", context, choices, tokens)
            found = Service(opened, template, limits, *how, **more)
            stack.callback(found._pool.shutdown)
            return found

        yield made


@contextlib.contextmanager
def working(service):
    """Run the worker of a service."""
    service.worker.start()
    try:
        yield service
    finally:
        service.worker.stop()
        service.worker._thread.join(served.PATIENCE)


def request(service, method, path, parts, headers, read):
    """An ASGI scope, and `receive` for the parts of a body. It appends those that are received to `read`.

    A part that is None is the end of the connection.
    """
    scope = dict(type="http", method=method, path=path, query_string=b"", root_path="", scheme="http")
    scope |= dict(headers=[(a.encode(), b.encode()) for a, b in headers.items()], http_version="1.1")
    scope |= dict(server=("127.0.0.1", 1), client=("127.0.0.1", 2))

    async def receive():
        if len(read) == len(parts):
            await asyncio.Event().wait()
        part = parts[len(read)]
        read.append(part)
        if part is None:
            return dict(type="http.disconnect")
        return dict(type="http.request", body=part, more_body=len(read) < len(parts))

    return scope, receive


def call(service, method, path, body=b"", read=None, **headers):
    """Call a route. Returns the status, the headers, and the response as JSON or bytes.

    body: bytes, a list of parts, or what becomes JSON.
    """
    if isinstance(body, dict):
        body = json.dumps(body).encode()
    parts, sent = body if isinstance(body, list) else [body], []
    headers = {name.replace("_", "-"): text for name, text in headers.items()}
    scope, receive = request(service, method, path, parts, headers, [] if read is None else read)

    async def send(message):
        sent.append(message)

    with contextlib.suppress(ZeroDivisionError):  # after the answer 500 Starlette raises it again
        asyncio.run(service.app(scope, receive, send))
    found = {name.decode(): text.decode() for name, text in sent[0]["headers"]}
    data = b"".join(message.get("body", b"") for message in sent[1:])
    is_json = found.get("content-type") == "application/json"
    return sent[0]["status"], found, json.loads(data) if is_json else data


def said(found):
    """The status and the message of an error that `call` returned."""
    return found[0], found[2]["error"]["message"]


@pytest.mark.parametrize(
    "host, here",
    [
        *((host, True) for host in ("localhost", "localhost:80", "LocalHost:", "a.localhost")),
        *((host, True) for host in ("127.0.0.1:8000", "10.1.2.3", "[::1]:80", "[fe80::1]")),
        *((host, False) for host in ("", "evil.example", "evil.example:80", "notlocalhost")),
        *((host, False) for host in ("localhost.evil", "127.0.0.1.evil", "127.0.0.1:80:x", "x:80")),
    ],
)
def test_hosts_that_are_an_address_or_localhost(host, here):
    assert _is_here(host) is here


def admitted(service, method="GET", path="/v1/models", **headers):
    """The status with which a request is refused, or None."""
    headers = {name.encode(): text.encode() for name, text in headers.items()}
    try:
        service._admit(method, path, headers)
    except Refused as error:
        return error.status
    return None


@pytest.mark.parametrize(
    "headers, status, of_any_host",
    [
        (dict(host="localhost:80"), None, None),
        (dict(host="localhost:80", origin="http://localhost:80"), None, None),
        (dict(host="localhost:80", origin="https://localhost:80"), None, None),
        (dict(host="localhost:80", origin="http://localhost:81"), 403, 403),
        (dict(host="localhost:80", origin="https://site.example"), 403, 403),
        (dict(host="localhost:80", origin="null"), 403, 403),
        (dict(host="name.example"), 403, None),
        (dict(host="name.example", origin="http://name.example"), 403, None),
        (dict(origin="http://localhost"), 403, 403),
        (dict(), 403, None),
    ],
)
def test_who_is_let_in_without_a_key(make, headers, status, of_any_host):
    """of_any_host: the status of a server that others reach, and may call by any name."""
    assert admitted(make(any_host=False), **headers) == status
    assert admitted(make(), **headers) == of_any_host


def test_sites_that_are_let_in(make):
    named, every = (make(None, sites, any_host=False) for sites in (["https://site.example"], ["*"]))
    for service, origin, status in (
        (named, "https://site.example", None),
        (named, "https://other.example", 403),
        (named, "http://site.example", 403),
        (every, "https://other.example", None),
    ):
        assert admitted(service, host="localhost", origin=origin) == status
    assert admitted(every, host="evil.example", origin="http://evil.example") == 403


@pytest.mark.parametrize(
    "given, status",
    [
        ("Bearer secret", None),
        ("bearer  secret ", None),
        ("BEARER secret", None),
        ("Bearer secrets", 401),
        ("Bearer ", 401),
        ("Basic  secret", 401),
        ("secret", 401),
        ("", 401),
    ],
)
def test_who_is_let_in_with_a_key(make, given, status):
    service = make("secret", any_host=False)
    assert admitted(service, authorization=given, host="evil.example", origin="http://x") == status
    assert admitted(service, "POST", CHAT, authorization=given) == status
    for method, path in (("GET", "/"), ("GET", "/health"), ("OPTIONS", CHAT)):
        assert admitted(service, method, path, authorization=given) is None
    assert admitted(service) == 401


def test_a_request_that_is_not_let_in_gets_an_error(make):
    assert said(call(make(any_host=False), "GET", "/v1/models", host="evil.example")) == (
        403,
        "the host 'evil.example' is not served without --api-key",
    )
    status, headers, found = call(make("secret"), "GET", "/v1/models")
    assert status == 401 and headers["www-authenticate"] == "Bearer"
    assert found["error"]["code"] == "invalid_api_key"
    assert call(make("secret"), "GET", "/v1/models", authorization="Bearer secret")[0] == 200


def test_preflight_requests_of_other_sites(make):
    """A browser sends OPTIONS first. GET and POST are allowed, other methods are not."""
    site = "https://site.example"
    asks = dict(origin=site, access_control_request_headers="authorization,x-other")
    service = make("secret", [site])
    for method, right in (("POST", 200), ("GET", 200), ("DELETE", 400)):
        status, headers, _ = call(service, "OPTIONS", CHAT, access_control_request_method=method, **asks)
        assert status == right and headers["access-control-allow-origin"] == site
    assert "x-other" in headers["access-control-allow-headers"]
    assert call(service, "GET", "/health", origin=site)[1]["access-control-allow-origin"] == site
    assert call(service, "GET", "/v1/models", origin=site)[1]["access-control-allow-origin"] == site  # a 401
    assert "access-control-allow-origin" not in call(make(), "GET", "/health")[1]


@pytest.mark.parametrize("status", [400, 401, 404, 429, 500, 503])
def test_headers_of_a_refusal(status):
    found = refusal(Refused("no", status))
    assert found.status_code == status and json.loads(found.body)["error"]["message"] == "no"
    assert found.headers.get("retry-after") == ("5" if status in (429, 503) else None)
    assert found.headers.get("www-authenticate") == ("Bearer" if status == 401 else None)
    assert found.headers["content-type"] == "application/json"


def test_the_page_may_use_its_own_script_only(make):
    status, headers, data = call(make(), "GET", "/")
    assert status == 200 and headers["content-type"] == "text/html; charset=utf-8"
    assert headers["cache-control"] == "no-cache" and headers["referrer-policy"] == "no-referrer"
    assert headers["x-content-type-options"] == "nosniff"
    parts = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))

    def hashed(tag):
        found = [part.split(b"</" + tag)[0] for part in data.split(b"<" + tag + b">")[1:]]
        return [f"'sha256-{base64.b64encode(hashlib.sha256(x).digest()).decode()}'" for x in found]

    assert parts["script-src"].split() == hashed(b"script") and len(hashed(b"script")) == 1
    assert parts["style-src"].split() == hashed(b"style") and len(hashed(b"style")) == 1
    assert parts["default-src"] == "'none'" and parts["connect-src"] == "'self'"


def test_the_health_and_the_models_of_a_server(make):
    before, service = int(time.time()), make()
    assert said(call(service, "GET", "/health")) == (500, "the engine has ended")  # it has not begun
    with working(service):
        assert call(service, "GET", "/health")[::2] == (200, dict(status="ok", running=0, waiting=0))
    assert said(call(service, "GET", "/health")) == (503, "the server is stopping")
    found = call(service, "GET", "/v1/models")[2]
    (model,) = found["data"]
    assert before <= model.pop("created") <= time.time() and found["object"] == "list"
    assert model == dict(id="m", object="model", owned_by="longlora", max_model_len=512)
    for path in ("/v1/models/", "/v1/models/m"):
        assert call(service, "GET", path)[0] == 200
    assert call(service, "GET", "/v1/models/m")[2]["id"] == "m"
    status, _, found = call(service, "GET", "/v1/models/a/b")
    assert status == 404 and found["error"]["message"] == "there is no model 'a/b' here"
    assert found["error"]["code"] == "model_not_found" and found["error"]["param"] == "model"


def test_routes_that_are_not_there(make):
    assert said(call(make(), "GET", "/v1/nothing")) == (404, "GET /v1/nothing: Not Found")
    for path in (CHAT, COMPLETE, "/pdf"):
        status, headers, found = call(make(), "GET", path)
        assert status == 405 and headers["allow"] == "POST"
        assert found["error"]["message"] == f"GET {path}: Method Not Allowed"


def test_errors_hide_folders_and_exceptions(make, opened, monkeypatch, capsys):
    service = make()

    def fails(error):
        def prompts(wanted):
            raise error

        monkeypatch.setattr(service, "_prompts", prompts)
        return call(service, "POST", CHAT, dict(messages=HELLO))

    places = f"{opened.base.path}/x and /some/where/template.jinja"
    assert said(fails(UserError(places))) == (400, "tiny/x and template.jinja")
    assert said(fails(ZeroDivisionError("secret"))) == (500, "the server has failed")
    assert fails(server.Gone())[::2] == (499, b"")
    assert service._coming == 0
    gone = [b"{", None]  # the client goes while it sends the body
    assert call(service, "POST", CHAT, gone)[::2] == (499, b"")
    assert "400" in capsys.readouterr().err


def test_the_limit_of_requests_that_are_read(make):
    service = make(choices=2)
    service._coming = 2 + server.MOST_COMING
    assert said(call(service, "POST", CHAT, b"{")) == (429, "too many requests come at the same time")
    assert service._coming == 2 + server.MOST_COMING
    service._coming = 1 + server.MOST_COMING
    assert call(service, "POST", CHAT, b"{")[0] == 400 and service._coming == 1 + server.MOST_COMING


def test_the_limit_of_pdfs(make, monkeypatch):
    service, given = make(), []

    async def convert(data):
        given.append(data)
        assert service._pdfs == 4
        return "text \u00e9"

    monkeypatch.setattr(server.pdf, "convert", convert)
    monkeypatch.setattr(server.pdf, "LARGEST", 3)
    monkeypatch.setattr(server, "MOST_PDFS", 4)
    service._pdfs = 3
    assert call(service, "POST", "/pdf", [b"1", b"23"])[::2] == (200, dict(text="text \u00e9"))
    assert said(call(service, "POST", "/pdf", b"1234")) == (
        413,
        "the body of the request has more than 3 bytes",
    )
    assert call(service, "POST", "/pdf", [b"1", None])[0] == 499
    assert service._pdfs == 3 and given == [b"123"]
    service._pdfs = 4
    assert said(call(service, "POST", "/pdf", b"1")) == (429, "too many PDFs come at the same time")
    assert service._pdfs == 4


def test_how_large_a_body_may_be(make, monkeypatch):
    monkeypatch.setattr(server, "DRAINED", 8)
    monkeypatch.setattr(server.pdf, "LARGEST", 4)
    service = make()
    assert service._body_limit == 4 << 20 and make(context=1 << 20)._body_limit == 64 << 20
    for sizes, taken in (([5], 1), ([2, 2, 1, 3, 1], 5), ([2, 2, 1, 3, 1, 1], 5), ([9, 1], 1)):
        read = []
        found = call(service, "POST", "/pdf", [b"x" * size for size in sizes], read)
        assert said(found) == (413, "the body of the request has more than 4 bytes")
        assert len(read) == taken, sizes


def test_a_longer_body_may_take_longer(make, monkeypatch):
    service, ends = make(), []

    class Timer:
        """Records when it would end."""

        def __init__(self, seconds):
            ends.append(asyncio.get_running_loop().time() + seconds)

        async def __aenter__(self):
            return self

        async def __aexit__(self, *_):
            pass

        def reschedule(self, when):
            ends.append(when)

    async def go():
        monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: 1000.0)
        monkeypatch.setattr(server.asyncio, "timeout", Timer)
        part = b"x" * server.BYTES_PER_SECOND
        scope, receive = request(service, "POST", "/", [part * 100, part * 50], {}, [])
        assert await service._read_body(server.Request(scope, receive), 1 << 30) == part * 150

    monkeypatch.setattr(server, "BODY_SECONDS", 30.0)
    asyncio.run(go())
    assert ends[:3] == [1030.0, 1130.0, 1180.0]


def test_a_body_that_comes_too_slowly(make, monkeypatch):
    monkeypatch.setattr(server, "BODY_SECONDS", 0.001)
    service = make()

    async def go():
        scope, receive = request(service, "POST", "/", [], {}, [])
        with pytest.raises(Refused, match="comes too slowly") as caught:
            await service._read_body(server.Request(scope, receive), 9)
        assert caught.value.status == 408

    asyncio.run(go())


def test_a_server_that_stops_reads_no_body(make):
    service, read = make(), []
    service.worker.stop()
    found = call(service, "POST", CHAT, [b"{", b"}"], read)
    assert said(found) == (503, "the server is stopping") and read == []


def asked(service, monkeypatch, path, body):
    """The requests that a POST of `body` gives to the worker, which here has no room for them."""
    found = []
    monkeypatch.setattr(service.worker, "submit", lambda requests: found.extend(requests))
    status, words = said(call(service, "POST", path, body))
    assert (status, words) == (429, "all places are taken, and so is the queue")
    return found


def test_each_answer_is_a_request(make, monkeypatch):
    body = dict(prompt=["ab", "c"], n=2, seed=5, max_tokens=7, stop=["x"], top_k=3)
    found = asked(make(), monkeypatch, COMPLETE, body)
    assert [one.prompt.tolist() for one in found] == [[97, 98]] * 2 + [[99]] * 2
    assert [one.sampling.seed for one in found] == [5, 6, 5, 6]
    assert {(one.sampling.top_k, one.max_new_tokens, one.end) for one in found} == {(3, 7, frozenset([256]))}
    assert {(one.top_logprobs, one.score_prompt) for one in found} == {(None, False)}


@pytest.mark.parametrize(
    "body, top, scored",
    [(dict(logprobs=2), 2, False), (dict(logprobs=0, echo=True), 0, True), (dict(echo=True), None, False)],
)
def test_a_prompt_is_scored_only_if_its_scores_are_shown(make, monkeypatch, body, top, scored):
    (found,) = asked(make(), monkeypatch, COMPLETE, dict(prompt="a", **body))
    assert (found.top_logprobs, found.score_prompt) == (top, scored)


def test_an_answer_has_the_room_that_is_left(make, monkeypatch):
    body = dict(messages=HELLO)  # 8 tokens
    for tokens, longest in ((None, 504), (100, 100), (510, 504)):
        service = make(tokens=tokens)
        assert asked(service, monkeypatch, CHAT, body)[0].max_new_tokens == longest
        assert asked(service, monkeypatch, CHAT, body | dict(max_tokens=9))[0].max_new_tokens == 9
    service = make()
    monkeypatch.setattr(service.worker, "submit", lambda requests: service.worker.stop())
    assert said(call(service, "POST", CHAT, body)) == (503, "the server is stopping")


@pytest.mark.parametrize("n", [1, 2])
def test_answers_come_whole_and_as_streams(make, opened, n):
    answer = Answer(opened, np.array([97, 98]), Sampling(), 5)
    text = "".join(answer)
    body = dict(prompt=["ab", "ab"], temperature=0, max_tokens=5, n=n, echo=True)
    opened.engine.abort("")  # it forgets what the rows hold
    with working(make()) as service:
        status, _, found = call(service, "POST", COMPLETE, body)
        streamed = call(service, "POST", COMPLETE, body | dict(stream=True))[2]
        again = call(service, "POST", COMPLETE, body)[2]
    assert status == 200 and [x["text"] for x in found["choices"]] == ["ab" + text] * 2 * n
    assert found["usage"]["completion_tokens"] == 5 * 2 * n and found["usage"]["prompt_tokens"] == 4
    # Only the first answer to each prompt counts. The cache holds each prompt; its last token is read again.
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 2
    parts = [json.loads(line[6:]) for line in streamed.decode().split("\n\n")[:-2]]
    assert all(part["object"] == "text_completion" for part in parts)
    for index in range(2 * n):
        of = [c["text"] for part in parts for c in part["choices"] if c["index"] == index]
        assert "".join(of) == "ab" + text


def test_the_log_finds_the_usage_of_a_request(make):
    service, body = make(), json.dumps(dict(messages=HELLO, max_tokens=3, temperature=0)).encode()
    scope, receive = request(service, "POST", CHAT, [body], {}, [])

    async def send(message):
        pass

    with working(service):
        asyncio.run(service.app(scope, receive, send))
    assert scope[USAGE]()["completion_tokens"] == 3 and scope[USAGE]()["prompt_tokens"] == 8


def wanted(*contents, system=("s",), **how):
    """A chat: system messages, then contents by the user and the assistant in turn."""
    messages = [dict(role="system", content=content) for content in system]
    roles = ["user", "assistant"] * len(contents)
    messages += [dict(role=role, content=text) for role, text in zip(roles, contents)]
    return Wanted(Sampling(), messages=messages, **how)


def text(service, how):
    """The prompt that a chat becomes."""
    return bytes(service._chat_ids(how).tolist()).decode()


@pytest.mark.parametrize(
    "room, left",
    [
        (24, "s:s\nu:1\na:2\nu:3\na:4\nu:5\n"),
        (23, "s:s\nu:3\na:4\nu:5\n"),
        (16, "s:s\nu:3\na:4\nu:5\n"),
        (15, "s:s\nu:5\n"),
        (8, "s:s\nu:5\n"),
        (7, "s:s\nu:1\na:2\nu:3\na:4\nu:5\n"),  # not even the last turn fits
    ],
)
def test_as_few_turns_as_possible_are_left_out(make, room, left):
    service = make(context=100)
    assert text(service, wanted(*"12345", max_tokens=100 - room, drop_turns=True)) == left
    whole = "s:s\nu:1\na:2\nu:3\na:4\nu:5\n"
    assert text(service, wanted(*"12345", max_tokens=100 - room)) == whole


def test_a_quarter_of_the_context_is_left_for_an_answer(make):
    service = make(context=40)  # 30 for the conversation
    for count, left in ((7, 7), (9, 7), (11, 7)):
        found = text(service, wanted(*"123456789ab"[:count], system=(), drop_turns=True))
        assert found.count("\n") == left
    found = text(service, wanted(*"123456789ab", system=("x", "y"), drop_turns=True))
    assert found == "s:x\ns:y\nu:7\na:8\nu:9\na:a\nu:b\n"


def test_a_conversation_may_be_of_system_messages_alone(make):
    service = make(context=8)
    assert text(service, wanted(system=("x", "y"), drop_turns=True, max_tokens=7)) == "s:x\ns:y\n"
    found = text(service, wanted("1", system=(), template=dict(tail="!")))
    assert found == "u:1!\n"


def test_the_echo_of_a_prompt(make):
    """It is the text of the prompt, or that of the tokens to which the prompt was cut."""
    service = make()

    def prompts(*given, **how):
        found = service._prompts(Wanted(Sampling(), prompts=list(given), **how))
        return [(ids.tolist(), echo) for ids, echo in found]

    ids = np.array([97, 98, 99], np.int32)
    assert prompts("abc", ids, max_tokens=1) == [([97, 98, 99], "")] * 2
    assert prompts("abc", ids, max_tokens=1, echo=True) == [([97, 98, 99], "abc")] * 2
    assert prompts("abc", ids, max_tokens=1, echo=True, keep_tokens=2) == [([98, 99], "bc")] * 2
    assert prompts("abc", max_tokens=1, keep_tokens=1) == [([99], "")]
    special = "a<|end|>"  # its tokens decode to "a"
    assert prompts(special, max_tokens=1, echo=True)[0][1] == special


@pytest.mark.parametrize(
    "count, tokens, right", [(9, 1, True), (9, 2, False), (9, None, True), (10, None, False)]
)
def test_the_longest_prompt_that_fits(make, count, tokens, right):
    service, how = make(context=10), Wanted(Sampling(), prompts=["x"], max_tokens=tokens)
    if right:
        assert service._checked(range(count), how) == range(count)
        return
    with pytest.raises(Refused) as caught:
        service._checked(range(count), how)
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "prompt"
    asked = "" if tokens is None else " and max_tokens is 2"
    assert f"the prompt has {count} tokens{asked}: this is more" in caught.value.message
    with pytest.raises(Refused) as caught:
        service._checked(range(11), Wanted(Sampling(), messages=HELLO))
    assert caught.value.param == "messages" and "11 tokens: this" in caught.value.message
    assert len(service._checked(range(10), Wanted(Sampling(), prompts=["x"], max_tokens=0))) == 10
