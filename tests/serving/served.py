"""A server of a tiny model in a thread of the test, requests to it, and what other tests of serving share."""

import contextlib
import http.client
import json
import re
import threading
import time

import tiny
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

import longlora

PATIENCE = 120  # seconds until a wait for something that must happen fails
# It adds little to the messages, so tokens are easy to count.
TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}"
    "{% if m['name'] %}({{ m['name'] }}){% endif %}{{ tail }}\n{% endfor %}"
)


class Bytes:
    """A tokenizer with one token for each byte, and <|end|>, which is token 256."""

    backend = Tokenizer.from_str(tiny.tokenizer_json())


def pdf_page(text):
    """A PDF of one page that says `text`."""
    content = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode()
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>>>>>",
        b"<</Length %d>>stream\n%s\nendstream" % (len(content), content),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    made, places = b"%PDF-1.4\n", []
    for number, part in enumerate(objects, 1):
        places.append(len(made))
        made += b"%d 0 obj%s endobj\n" % (number, part)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    return (
        made
        + b"xref\n0 6\n0000000000 65535 f \n%strailer<</Size 6/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF"
        % (table, len(made))
    )


def rewrite(path, change):
    """Write a safetensors file again after change(tensors, metadata)."""
    tensors = load_file(path)
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    change(tensors, metadata)
    save_file(tensors, path, metadata)


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
    """Send a request -> status, headers, and the JSON or the bytes of the body."""
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
    """Wait until the server has logged all requests that it has answered. Drops what was logged."""
    said, end = "", time.monotonic() + PATIENCE
    ask(running, "GET", "/settle")
    while not re.search("/settle.*\n", said):
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
