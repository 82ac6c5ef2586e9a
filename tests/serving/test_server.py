"""longlora serve over a socket, by the official client of OpenAI and by plain requests."""

import asyncio
import json
import operator
import random
import re
import socket
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
import served
from served import PATIENCE, ask, engine, held, until

import longlora
from longlora.decoder.sampling import Sampling
from longlora.errors import UserError
from longlora.serving import listen, server, streams
from longlora.serving.answer import Answer
from longlora.serving.open import open_engine
from longlora.serving.text import TextStream

HELLO = [{"role": "user", "content": "hello"}]
# Only printable ASCII is drawn, and no end token.
ASCII = {str(token): -100 for token in (*range(32), *range(127, 260))}
ENDS = operator.methodcaller("stop")  # for a server that should be refused, so that no test waits for it


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("served") / "tiny"


@pytest.fixture(scope="module")
def running(path):
    with served.serving(path, rows=2, queue=4, temperature=0.0) as found:
        yield found


@pytest.fixture(scope="module")
def client(running):
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def opened(path, running):
    """The same model, without a server."""
    return open_engine(path)


def test_models_and_health(client, running, path):
    (model,) = client.models.list().data
    assert model.id == "tiny" and model.max_model_len == 512
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="there is no model 'other' here"):
        client.models.retrieve("other")
    assert ask(running, "GET", "/health")[2] == dict(status="ok", running=0, waiting=0)


def test_a_model_may_have_slashes_in_its_name(path):
    with served.serving(path, served_model_name="someone/tiny") as other:
        for name in ("someone/tiny", "someone%2Ftiny"):
            assert ask(other, "GET", f"/v1/models/{name}")[2]["id"] == "someone/tiny"
        assert ask(other, "GET", "/v1/models/")[2] == ask(other, "GET", "/v1/models")[2]
        assert ask(other, "GET", "/v1/models/someone")[0] == 404


def test_a_chat_is_what_generate_says(client, opened):
    answer = Answer(opened, opened.tokenizer.encode("u:hello\n"), Sampling(), 12)
    text = "".join(answer)
    found = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=12)
    assert found.choices[0].message.content == text and found.choices[0].finish_reason == "length"
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (8, 12, 20)
    done = client.completions.create(model="tiny", prompt="u:hello\n", max_tokens=12, echo=True)
    assert done.choices[0].text == "u:hello\n" + text


def test_a_stream_has_the_same_text_and_tokens(client):
    how: dict = dict(model="tiny", messages=HELLO, max_tokens=40, temperature=1.0, seed=7, n=2)
    how |= dict(logprobs=True, logit_bias=ASCII)
    whole = client.chat.completions.create(**how)
    for choice in whole.choices:
        assert len(choice.logprobs.content) == 40
    assert whole.choices[0].message.content != whole.choices[1].message.content
    texts, tokens, reasons, usage = ["", ""], [[], []], [None, None], None
    for chunk in client.chat.completions.create(**how, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
            tokens[choice.index] += choice.logprobs.content if choice.logprobs else []
    assert texts == [choice.message.content for choice in whole.choices] and reasons == ["length"] * 2
    assert [[t.logprob for t in one] for one in tokens] == [
        [t.logprob for t in choice.logprobs.content] for choice in whole.choices
    ]
    assert usage.completion_tokens == 80 and usage.prompt_tokens == 8


def test_events_of_a_stream(running):
    body = dict(messages=HELLO, max_tokens=3, stream=True)
    status, headers, data = ask(running, body=body)
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    lines = data.decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""] and all(line.startswith("data: ") for line in lines[:-1])
    chunks = [json.loads(line[6:]) for line in lines[:-2]]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-1]["choices"][0]["finish_reason"] == "length" and "usage" not in chunks[0]
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_a_stop_string_that_spans_tokens(client):
    """Every token is a byte, so each stop string of two letters spans two."""
    how = dict(model="tiny", prompt="hello", max_tokens=60, temperature=1.0, seed=3, logit_bias=ASCII)
    whole = client.completions.create(**how).choices[0].text
    cut = next(i for i in range(5, 60) if whole[i : i + 2].isascii() and whole.index(whole[i : i + 2]) == i)
    stop = whole[cut : cut + 2]
    found = client.completions.create(**how, stop=[stop, "never"], logprobs=0).choices[0]
    assert found.text == whole[:cut] and found.finish_reason == "stop"
    assert all(offset < cut for offset in found.logprobs.text_offset)
    parts = list(client.completions.create(**how, stop=stop, stream=True))
    assert "".join(part.choices[0].text for part in parts) == whole[:cut]
    assert parts[-1].choices[0].finish_reason == "stop"


def scores(opened, ids):
    """The log-probabilities of tokens 1 to the last, each from a pass of its own."""
    generator, found = opened.engine.generator, []
    opened.engine.cache.lengths[0] = 0
    for token, following in zip(ids, ids[1:]):
        logits = generator.extend(0, np.array([token], np.int32)).astype(np.float64)
        found.append(logits[following] - np.log(np.exp(logits).sum()))
    opened.engine.abort("")
    return found


def test_what_lm_eval_asks(running, opened):
    """The body of lm-evaluation-harness's local-completions for a log-likelihood, and what it reads."""
    context, continuation = [72, 101, 108], [108, 111, 33]
    body = dict(
        model="tiny",
        prompt=[context + continuation] * 2,
        max_tokens=1,
        logprobs=1,
        seed=1234,
        echo=True,
        temperature=0,
    )
    status, _, found = ask(running, path="/v1/completions", body=body)
    assert status == 200 and [choice["index"] for choice in found["choices"]] == [0, 1]
    for choice in found["choices"]:
        logprobs = choice["logprobs"]
        values = logprobs["token_logprobs"][len(context) : -1]
        np.testing.assert_allclose(values, scores(opened, context + continuation)[2:], atol=1e-5)
        tops = logprobs["top_logprobs"][len(context) : -1]
        assert all(value <= max(top.values()) for value, top in zip(values, tops))
        assert len(logprobs["tokens"]) == 7 and logprobs["text_offset"] == list(range(7))


def test_an_end_token_counts_among_the_scores(running, opened, client):
    """A program that drops the last score, as lm-eval does, must not drop one of the prompt."""
    how = dict(prompt="abc", max_tokens=1, logprobs=1, echo=True, logit_bias={"256": 100})
    _, _, found = ask(running, path="/v1/completions", body=how)
    (choice,) = found["choices"]
    assert choice["finish_reason"] == "stop" and choice["text"] == "abc"
    assert choice["logprobs"]["tokens"] == ["a", "b", "c", "<|end|>"]
    chat = client.chat.completions.create(
        model="tiny", messages=HELLO, logit_bias={"256": 100}, logprobs=True, top_logprobs=1
    )
    assert chat.choices[0].logprobs.content == [] and chat.choices[0].message.content == ""


def test_a_conversation_is_not_read_again(client):
    messages = [{"role": "user", "content": "x" * 200}]
    first = client.chat.completions.create(model="tiny", messages=messages, max_tokens=3)
    assert first.usage.prompt_tokens_details.cached_tokens < 10
    messages += [{"role": "assistant", "content": "zz"}, {"role": "user", "content": "again"}]
    second = client.chat.completions.create(model="tiny", messages=messages, max_tokens=3)
    assert second.usage.prompt_tokens_details.cached_tokens >= 202


def test_each_request_for_an_answer_is_a_line(path, running, capsys):
    served.settle(running, capsys)
    body = dict(messages=[dict(role="user", content="log me")], max_tokens=5, logit_bias=ASCII)
    with served.serving(path) as other:
        assert ask(other, body=body)[0] == 200
        status, _, _ = ask(other, body=body | dict(stream=True))
        assert status == 200 and ask(other, "GET", "/health")[0] == 200
        assert ask(other, "GET", "/v1/no%0Ane")[0] == 404 and ask(other, body=b"{")[0] == 400
    lines = capsys.readouterr().err.splitlines()
    found = [re.sub(r"^\d\d:\d\d:\d\d 127.0.0.1 | \d+\.\d\d s$", "", line) for line in lines]
    answered = r"POST /v1/chat/completions 200, prompt \d+ tokens \(\d+ reused\), answer 5,"
    assert len(found) == 4 and re.fullmatch(answered, found[0]) and re.fullmatch(answered, found[1])
    assert found[2:] == [r"GET /v1/no\nne 404,", "POST /v1/chat/completions 400,"]
    assert "log me" not in "".join(lines)


def test_a_prompt_over_the_context(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "x" * 600}], max_tokens=9
        )
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "messages"
    assert "603 tokens and max_tokens is 9" in str(caught.value) and "of 512 tokens" in str(caught.value)
    with pytest.raises(openai.BadRequestError, match="the prompt has 512 tokens: this is more than"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x" * 509}])


def test_a_conversation_is_cut_as_asked(client):
    system = {"role": "system", "content": "s"}
    turns = [
        {"role": role, "content": f"{i}" * 97} for i in range(5) for role in ("user", "assistant")
    ]  # of 100 tokens each
    how = dict(model="tiny", messages=[system, *turns, *HELLO], max_tokens=50)
    with pytest.raises(openai.BadRequestError, match="1012 tokens"):
        client.chat.completions.create(**how)
    found = client.chat.completions.create(**how, extra_body={"truncation": "auto"})
    assert found.usage.prompt_tokens == 4 + 400 + 8  # the system message, two turns, the question
    only = [{"role": "user", "content": "x" * 600}]
    with pytest.raises(openai.BadRequestError, match="603 tokens"):
        client.chat.completions.create(model="tiny", messages=only, extra_body={"truncation": "auto"})
    done = client.completions.create(
        model="tiny",
        prompt="a" * 600 + "bc",
        max_tokens=1,
        echo=True,
        extra_body=dict(truncate_prompt_tokens=3),
    )
    assert done.choices[0].text.startswith("abc") and done.usage.prompt_tokens == 3


def test_names_and_template_arguments_reach_the_template(client):
    messages = [{"role": "user", "content": "a", "name": "Ann"}]
    found = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=1, extra_body={"chat_template_kwargs": {"tail": "!!"}}
    )
    assert found.usage.prompt_tokens == len("u:a(Ann)!!\n")


def test_a_full_queue_says_429(client, running, monkeypatch):
    """Two rows and a queue of four: a request of six answers fills it."""
    goes_on = held(monkeypatch, running)
    how = dict(model="tiny", prompt="a", n=6, max_tokens=400, logit_bias=ASCII)
    stream = client.completions.create(**how, stream=True)
    next(iter(stream))
    status, headers, found = ask(running, body=dict(messages=HELLO, n=5, max_tokens=2))
    assert status == 429 and headers["retry-after"] == "5" and found["error"]["type"] == "rate_limit_error"
    stream.close()  # its places are free again
    until(running, running=0, waiting=0)
    goes_on.set()
    assert ask(running, body=dict(messages=HELLO, n=5, max_tokens=2))[0] == 200


def test_pdfs_wait_for_one_another_and_not_too_many(running, monkeypatch):
    """Each may take 32 MiB. One whose client has gone is not converted."""
    service, ends, converted = running.config.app.routes[0].endpoint.__self__, threading.Event(), []

    async def convert(data):
        await asyncio.sleep(0.01)
        while not ends.is_set():
            await asyncio.sleep(0.01)
        converted.append(data)
        return "text"

    def come(count):
        end = time.monotonic() + PATIENCE
        while service._pdfs != count:
            assert time.monotonic() < end, f"{service._pdfs} PDFs, and not {count}"
            time.sleep(0.01)

    monkeypatch.setattr(server.pdf, "convert", convert)
    monkeypatch.setattr(server, "MOST_PDFS", 3)
    address = running.url.removeprefix("http://").split(":")
    with ThreadPoolExecutor(2) as pool:
        asked = []
        for body in (b"1", b"2"):
            asked.append(pool.submit(ask, running, path="/pdf", body=body))
            come(len(asked))
        with socket.create_connection((address[0], int(address[1]))) as gone:
            gone.sendall(b"POST /pdf HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\n3")
            come(3)
            status, headers, found = ask(running, path="/pdf", body=b"4")
            assert status == 429 and "retry-after" in headers and "too many PDFs" in found["error"]["message"]
        ends.set()
        assert [one.result()[2] for one in asked] == [dict(text="text")] * 2
    come(0)
    assert converted == [b"1", b"2"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_place(running, monkeypatch, stream):
    held(monkeypatch, running)
    address = running.url.removeprefix("http://").split(":")
    body = json.dumps(dict(prompt="a", max_tokens=400, stream=stream, logit_bias=ASCII)).encode()
    with socket.create_connection((address[0], int(address[1]))) as gone:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        gone.sendall(head.encode() + body)
        until(running, running=1)
    until(running, running=0)


def test_requests_side_by_side_get_what_each_gets_alone(client):
    prompts = ["a", "bb" * 40, "ccc", "dd" * 90]
    how = dict(model="tiny", max_tokens=30, temperature=1.0, seed=5, logit_bias=ASCII)
    alone = [client.completions.create(prompt=prompt, **how).choices[0].text for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        together = pool.map(lambda p: client.completions.create(prompt=p, **how).choices[0].text, prompts)
        assert list(together) == alone
    listed = client.completions.create(prompt=prompts, **how)
    assert [choice.text for choice in listed.choices] == alone


def test_errors_have_openais_format(client, running):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=HELLO, tools=[{"type": "function"}])
    assert caught.value.param == "tools" and caught.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt' here, only 'tiny'"):
        client.chat.completions.create(model="gpt", messages=HELLO)
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/chat/completions", 405),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/%2e%2e/%2e%2e/etc/passwd", 404),
        ("POST", "/v1/embeddings", 404),
    ):
        found = ask(running, method, path)
        assert found[0] == status and found[2]["error"]["message"], path
    for method in ("GET", "PUT", "OPTIONS", "HEAD"):
        status, headers, data = ask(running, method, "/v1/completions")
        assert status == 405 and headers["allow"] == "POST" and (method != "HEAD" or not data)
    status, _, found = ask(running, body=dict(messages=HELLO, logit_bias={"300": 1}))
    assert status == 400 and "logit_bias names token 300" in found["error"]["message"]


def test_the_template_refuses_without_naming_the_folder(running, path, tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text("{{ raise_exception('no ' + messages[0]['content']) }}")
    with served.serving(path, chat_template=template) as other:
        status, _, found = ask(other, body=dict(messages=HELLO))
    assert status == 400 and "no hello" in found["error"]["message"]
    assert str(tmp_path) not in found["error"]["message"]


def test_bodies_that_are_too_large_or_too_slow(running, monkeypatch):
    status, _, found = ask(running, body=b'{"user": "' + b"x" * (5 << 20) + b'"}')
    assert status == 413 and "more than 4194304 bytes" in found["error"]["message"]
    monkeypatch.setattr(server, "BODY_SECONDS", 0.1)
    address = running.url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1])), timeout=PATIENCE) as late:
        late.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{")
        assert late.recv(4096).startswith(b"HTTP/1.1 408 ")


def test_heads_that_are_too_slow(running, monkeypatch):
    monkeypatch.setattr(listen, "HEAD_SECONDS", 0.1)
    address = running.url.removeprefix("http://").split(":")
    for sent in (b"", b"GET /health HTTP/1.1\r\nHo"):
        with socket.create_connection((address[0], int(address[1])), timeout=PATIENCE) as late:
            late.sendall(sent)
            assert late.recv(100) == b""
    monkeypatch.undo()
    with socket.create_connection((address[0], int(address[1])), timeout=PATIENCE) as again:
        again.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        found = b""
        while not found.endswith(b"}"):
            found += again.recv(4096)
        assert found.startswith(b"HTTP/1.1 200")
        monkeypatch.setattr(listen, "HEAD_SECONDS", 0.1)
        again.sendall(b"GET /heal")
        assert again.recv(4096) == b""


def test_a_client_that_does_not_read(path, monkeypatch):
    """The buffers of the connection are small, and the answer is long: the server ends the connection."""
    monkeypatch.setattr(listen, "READ_SECONDS", 0.2)
    data = json.dumps(dict(prompt="x" * 500, max_tokens=1, echo=True, logprobs=20)).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
    with served.serving(path) as other, socket.socket() as deaf:
        other._bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = other.url.removeprefix("http://").split(":")
        deaf.connect((host, int(port)))
        deaf.sendall(head.encode() + data)
        found = deaf.recv(1)
        end = time.monotonic() + PATIENCE
        while other.server_state.connections and time.monotonic() < end:
            time.sleep(0.01)
        assert not other.server_state.connections
        while part := deaf.recv(1 << 16):
            found += part
    assert found.startswith(b"HTTP/1.1 200") and not found.endswith(b"}")


def test_a_stream_that_waits_gives_signs_of_life(running, monkeypatch):
    """Before its first token, and between tokens."""
    monkeypatch.setattr(streams, "PING_SECONDS", 0.01)
    monkeypatch.setattr(server, "PING_SECONDS", 0.01)
    generator, reads = engine(running).generator, threading.Event()
    extend = generator.extend
    monkeypatch.setattr(generator, "extend", lambda *how: reads.wait(PATIENCE) and extend(*how))
    goes_on = held(monkeypatch, running)
    body = dict(messages=HELLO, max_tokens=30, stream=True, logit_bias=ASCII)
    request = urllib.request.Request(f"{running.url}/v1/chat/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=PATIENCE) as stream:
        ping, said = streams.PING.split()[0], re.compile(rb'"content":"[^"]')
        assert any(line.startswith(ping) for line in stream)
        reads.set()
        assert any(said.search(line) for line in stream)
        assert any(line.startswith(ping) for line in stream)
        goes_on.set()
        assert stream.read().endswith(b"data: [DONE]\n\n")


def test_hundreds_of_malformed_requests(running, monkeypatch):
    """Damaged heads and bodies over sockets: the server answers each or closes, and goes on."""
    monkeypatch.setattr(listen, "HEAD_SECONDS", 0.02)
    monkeypatch.setattr(server, "BODY_SECONDS", 0.02)
    source = random.Random(1)
    good = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 29\r\n\r\n"
    good += b'{"prompt":"a","max_tokens":1}'
    address = running.url.removeprefix("http://").split(":")
    statuses = set()
    for _ in range(300):
        sent = bytearray(good)
        for _ in range(source.randrange(1, 6)):
            sent[source.randrange(len(sent))] = source.randrange(256)
        with socket.create_connection((address[0], int(address[1])), timeout=PATIENCE) as one:
            one.sendall(sent)
            found = one.recv(100)
        statuses.add(found[9:12])
    assert statuses <= {b"", b"200", b"400", b"403", b"404", b"405", b"408"} and {b"", b"400"} < statuses
    monkeypatch.undo()
    assert ask(running, path="/v1/completions", body=dict(prompt="a", max_tokens=1))[0] == 200


def test_other_sites_cannot_use_it(running):
    body = dict(messages=HELLO, max_tokens=1)
    port = running.url.rpartition(":")[2]
    for headers, status in (
        (dict(Host="localhost:80"), 200),
        (dict(Host=f"127.0.0.1:{port}", Origin=f"http://127.0.0.1:{port}"), 200),
        (dict(Origin="https://evil.example"), 403),
        (dict(Origin="null"), 403),
        (dict(Host="evil.example", Origin="http://evil.example"), 403),
    ):
        assert ask(running, body=body, **headers)[0] == status, headers
    assert "access-control-allow-origin" not in ask(running, "GET", "/v1/models")[1]


def test_a_key_and_cors_where_they_are_asked_for(path, monkeypatch):
    monkeypatch.setenv("LONGLORA_API_KEY", "secret")
    site = "https://site.example"
    with served.serving(path, cors_origin=[site], served_model_name="named") as other:
        assert ask(other, "GET", "/health")[0] == 200
        status, headers, found = ask(other, "GET", "/v1/models")
        assert status == 401 and headers["www-authenticate"] == "Bearer"
        assert found["error"]["code"] == "invalid_api_key"
        assert ask(other, "GET", "/v1/models", authorization="Bearer wrong")[0] == 401
        status, headers, found = ask(other, "GET", "/v1/models", authorization="Bearer secret", origin=site)
        assert status == 200 and headers["access-control-allow-origin"] == site
        assert found["data"][0]["id"] == "named"
        asks = dict(origin=site, access_control_request_method="POST")
        asks["access_control_request_headers"] = "authorization,content-type"
        status, headers, _ = ask(other, "OPTIONS", "/v1/chat/completions", **asks)
        assert status == 200 and headers["access-control-allow-origin"] == site
        _, headers, _ = ask(
            other, "GET", "/v1/models", authorization="Bearer secret", origin="https://x.example"
        )
        assert "access-control-allow-origin" not in headers


def test_logits_that_are_nan_end_an_answer_and_not_the_server(path):
    with served.serving(path) as other:
        weight = engine(other).model.tensor("model.norm.weight")
        right = np.array(weight)
        weight.fill(float("nan"))
        status, _, found = ask(other, path="/v1/completions", body=dict(prompt="a"))
        assert status == 500 and "logits are NaN" in found["error"]["message"]
        assert found["error"]["type"] == "server_error"
        scored = dict(prompt="abc", echo=True, logprobs=1)
        assert ask(other, path="/v1/completions", body=scored)[0] == 500
        np.asarray(weight)[:] = right
        assert ask(other, path="/v1/completions", body=dict(prompt="a"))[0] == 200


def test_an_error_in_a_stream_is_an_event(path, monkeypatch):
    with served.serving(path) as other:
        goes_on = held(monkeypatch, other)
        client = openai.OpenAI(base_url=f"{other.url}/v1", api_key="none", max_retries=0)
        how = dict(model="tiny", prompt="a", max_tokens=400, logit_bias=ASCII)
        stream = iter(client.completions.create(**how, stream=True))
        next(stream)
        engine(other).model.tensor("model.norm.weight").fill(float("nan"))
        goes_on.set()
        with pytest.raises(openai.APIError, match="logits are NaN"):
            list(stream)


def test_a_step_that_fails_ends_what_runs_and_not_the_server(path, monkeypatch, capsys):
    with served.serving(path) as other:
        generator = engine(other).generator
        right, failed = generator.extend, []

        def fails(*arguments):
            if not failed:
                failed.append(1)
                raise MemoryError("no memory")
            return right(*arguments)

        monkeypatch.setattr(generator, "extend", fails)
        status, _, found = ask(other, path="/v1/completions", body=dict(prompt="a"))
        assert status == 500 and "the server has failed at this answer" in found["error"]["message"]
        assert ask(other, path="/v1/completions", body=dict(prompt="a"))[0] == 200
    assert "MemoryError: no memory" in capsys.readouterr().err


def test_a_tokenizer_that_fails_ends_one_answer(path, monkeypatch, capsys):
    """Another answer that is made at the same time goes on."""
    add = TextStream.add

    def fails(self, token):
        if token == ord("!"):
            raise RuntimeError("no such token")
        return add(self, token)

    monkeypatch.setattr(TextStream, "add", fails)
    with served.serving(path) as other, ThreadPoolExecutor(1) as pool:
        goes_on = held(monkeypatch, other)
        whole = pool.submit(ask, other, body=dict(messages=HELLO, max_tokens=30, logit_bias={"65": 100}))
        until(other, running=1)
        status, _, found = ask(other, body=dict(messages=HELLO, max_tokens=30, logit_bias={"33": 100}))
        assert status == 500 and "the server has failed at this answer" in found["error"]["message"]
        goes_on.set()
        assert whole.result()[2]["choices"][0]["message"]["content"] == "A" * 30
    assert capsys.readouterr().err.count("RuntimeError: no such token") == 1


def test_stopping_finishes_what_runs_and_refuses_the_rest(path, monkeypatch):
    with served.serving(path, rows=1) as other:
        goes_on = held(monkeypatch, other)
        client = openai.OpenAI(base_url=f"{other.url}/v1", api_key="none", max_retries=0)
        how = dict(model="tiny", prompt="a", max_tokens=400, logit_bias=ASCII)
        stream = client.completions.create(**how, stream=True)
        parts = [next(iter(stream))]
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(ask, other, body=dict(messages=HELLO))
            until(other, waiting=1)
            other.stop()
            status, _, found = waiting.result()
        assert status == 503 and found["error"]["message"] == "the server is stopping"
        assert ask(other, body=dict(messages=HELLO))[0] == 503 and ask(other, "GET", "/health")[0] == 503
        goes_on.set()
        parts += list(stream)
        assert parts[-1].choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    "how, words",
    [
        (dict(port=70000), "port should be from 0 to 65535"),
        (dict(host="no.such.host.invalid"), "cannot listen at no.such.host.invalid, port [^;]*$"),
        (dict(temperature=-1), "temperature should be a number from 0"),
        (dict(cors_origin=["site.example"]), "cors_origin should be \\* or like https://example.org"),
    ],
)
def test_wrong_options_are_named(path, running, how, words):
    with pytest.raises(UserError, match=words):
        longlora.serve(path, **{"port": 0, "ready": ENDS, **how})


def test_a_port_that_is_taken(path, running):
    with pytest.raises(
        UserError, match="cannot listen at 127.0.0.1, port .*: Address already in use; --port 0"
    ):
        longlora.serve(path, port=int(running.url.rpartition(":")[2]), ready=ENDS)


def test_a_missing_library_is_named(path, monkeypatch):
    monkeypatch.delattr(longlora.serving, "listen")
    monkeypatch.delitem(sys.modules, "longlora.serving.listen")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(UserError, match=r"serving needs uvicorn: pip install 'longlora\[serve\]'"):
        longlora.serve(path, port=0, ready=ENDS)
