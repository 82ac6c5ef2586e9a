"""A server of a tiny model runs in a thread of the test, which sends requests by hand."""

import contextlib
import http.client
import json
import threading
import time

import tiny

import longlora

PATIENCE = 120  # seconds until a wait for something that must happen fails
# It adds little to the messages, so tokens are easy to count.
TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}"
    "{% if m['name'] %}({{ m['name'] }}){% endif %}{{ tail }}\n{% endfor %}"
)


@contextlib.contextmanager
def serving(path, change=None, **how):
    """Serve a random model in `path` and make it if it is missing -> the server. It stops at the end."""
    if not (path / "config.json").exists():
        tiny.model(path, max_position_embeddings=512, change=change)
        config = dict(eos_token="<|end|>", chat_template=TEMPLATE)
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    begun, servers, failed = threading.Event(), [], []

    def ready(server):
        servers.append(server)
        begun.set()

    def run():
        try:
            longlora.serve(path, port=0, device="cpu", ready=ready, **how)
        except BaseException as error:
            failed.append(error)
            begun.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert begun.wait(PATIENCE)
    if failed:
        raise failed[0]
    try:
        yield servers[0]
    finally:
        servers[0].stop()
        thread.join(PATIENCE)
        assert not thread.is_alive() and not failed


def ask(running, method="POST", path="/v1/chat/completions", body=None, **headers):
    """Send a request by hand -> status, headers, and the JSON or the bytes of the body."""
    connection = http.client.HTTPConnection(running.url.removeprefix("http://"), timeout=PATIENCE)
    body = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method, path, body, {name.replace("_", "-"): text for name, text in headers.items()})
    response = connection.getresponse()
    data = response.read()
    connection.close()
    is_json = data and response.getheader("content-type") == "application/json"
    return response.status, dict(response.getheaders()), json.loads(data) if is_json else data


def until(other, **loads):
    """Wait until as many requests run and wait as `loads` says."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        health = ask(other, "GET", "/health")[2]
        if all(health[name] == count for name, count in loads.items()):
            return
        time.sleep(0.01)
    raise AssertionError(f"{health}, and not {loads}")


def settle(running, capsys):
    """Wait for the lines that a server logs of requests that were answered before, and drop them."""
    said, end = "", time.monotonic() + PATIENCE
    ask(running, "GET", "/settle")
    while "/settle" not in said:
        assert time.monotonic() < end
        time.sleep(0.001)
        said += capsys.readouterr().err


def engine(running):
    return running._drain.__self__.engine


def held(monkeypatch, running):
    """Hold the steps of the answers that run -> an Event that lets them go on.

    So an answer does not end before the test has seen it. A step goes on if the engine has more to do: to end
    a cancelled answer, to begin one that waits, or to refuse it when the server stops.
    """
    worker, goes_on = running._drain.__self__, threading.Event()
    at = worker.engine
    step = at.generator.step

    def more():
        running, waiting = [slot.request for slot in at._slots], list(at._waiting)
        cancelled = any(request is not None and request.cancelled for request in [*running, *waiting])
        return cancelled or bool(waiting) and (None in running or worker.stopping)

    def held_step(*arguments):
        while not more() and not goes_on.wait(0.01):
            pass
        return step(*arguments)

    monkeypatch.setattr(at.generator, "step", held_step)
    return goes_on
