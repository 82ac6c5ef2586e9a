"""The command `longlora serve` in a process of its own: ports, signals, the key, a PDF."""

import asyncio
import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
import tiny
from served import PATIENCE, pdf_page

from longlora.errors import UserError
from longlora.serving import pdf


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.model(tmp_path_factory.mktemp("command") / "tiny", max_position_embeddings=65536)


@contextlib.contextmanager
def started(path, *flags, **environment):
    """Run the command. Yields the process, once it listens, and its URL, and kills it at the end."""
    command = [sys.executable, "-m", "longlora", "serve", "--model", str(path), "--device", "cpu", *flags]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, **pipes, env={**os.environ, **environment}) as process:
        try:
            lines = [process.stdout.readline(), process.stdout.readline()]
            yield process, lines[1].split(" ")[0]
        finally:
            process.kill()


def post(url, fields, **headers):
    body = json.dumps(fields).encode() if isinstance(fields, dict) else fields
    with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=PATIENCE) as response:
        return json.loads(response.read())


def test_a_signal_lets_running_answers_finish(path):
    flags = "--port 0 --temperature 0 --rows 1".split()
    with started(path, *flags, LONGLORA_API_KEY="secret") as (process, url):
        body = json.dumps(dict(prompt="a", max_tokens=1500, stream=True, logit_bias={"256": -100})).encode()
        headers = {"Authorization": "Bearer secret"}
        request = urllib.request.Request(f"{url}/v1/completions", body, headers)
        with urllib.request.urlopen(request, timeout=PATIENCE) as stream:
            stream.readline()
            process.send_signal(signal.SIGTERM)
            rest = stream.read().decode()
        assert rest.endswith("data: [DONE]\n\n") and '"finish_reason":"length"' in rest
        assert process.wait(PATIENCE) == 0
        assert "SIGTERM: finishing the answers that run" in process.stderr.read()


def test_a_second_signal_ends_the_server_at_once(path):
    with started(path, "--port", "0") as (process, url):
        body = json.dumps(dict(prompt="a", max_tokens=60000, stream=True, logit_bias={"256": -100})).encode()
        with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/completions", body)) as stream:
            stream.readline()
            process.send_signal(signal.SIGINT)
            process.stderr.readline()
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE) == 128 + signal.SIGTERM
            with pytest.raises(http.client.IncompleteRead):
                stream.read()


def test_a_taken_port_is_one_line_and_a_pdf_is_read(path):
    with started(path, "--port", "0") as (process, url):
        port = url.rpartition(":")[2]
        with started(path, "--port", port) as (again, _):
            line = again.stderr.read()
            assert again.wait(PATIENCE) == 2 and line.count("\n") == 1
            assert f"port {port}: Address already in use" in line
        assert post(f"{url}/pdf", pdf_page("Ann is five."))["text"].strip() == "Ann is five."
        for data, words in (
            (b"%PDF-1.4 no", "the PDF: cannot be read as a PDF"),
            (b"%PDF-1.4" + b"x" * 99, "the PDF: cannot be read as a PDF"),
            (pdf_page(""), "has no text"),
        ):
            with pytest.raises(urllib.error.HTTPError) as caught:
                post(f"{url}/pdf", data)
            said = json.loads(caught.value.read())["error"]["message"]
            assert caught.value.code == 400 and said.startswith("the PDF: ") and words in said
        process.terminate()
        assert process.wait(PATIENCE) == 0


def test_a_pdf_that_takes_too_long_is_refused(monkeypatch):
    """The process that reads it ends, the server does not."""
    monkeypatch.setattr(pdf, "SECONDS", 0.01)
    with pytest.raises(UserError, match="takes too long to read"):
        asyncio.run(pdf.convert(b"%PDF"))
