"""The text of a PDF, and the process that reads an uploaded one."""

import asyncio
import io
import os
import resource
import sys
from types import SimpleNamespace

import pytest
from served import pdf_page

from longlora.errors import UserError
from longlora.serving import pdf


class Standard(io.BytesIO):
    """A standard stream whose `buffer` is the stream itself."""

    buffer = property(lambda self: self)


def test_pages_become_paragraphs(monkeypatch):
    pages = [SimpleNamespace(extract_text=lambda text=text: text) for text in ("one", "two")]
    monkeypatch.setattr("pypdf.PdfReader", lambda file: SimpleNamespace(pages=pages))
    assert pdf.pdf_text(io.BytesIO(), "a.pdf") == "one\n\ntwo"


@pytest.mark.parametrize(
    "data, words",
    [
        (b"%PDF-1.4", "^a.pdf: cannot be read as a PDF: "),
        (pdf_page(""), "^a.pdf: has no text; a scanned PDF needs text recognition first$"),
    ],
)
def test_a_pdf_without_text_is_named(data, words):
    with pytest.raises(UserError, match=words):
        pdf.pdf_text(io.BytesIO(data), "a.pdf")


def run(monkeypatch, data, limits=(resource.RLIM_INFINITY,) * 2):
    """Run the program that reads a PDF, in this process. limits: soft and hard, as getrlimit gives them.

    Returns its exit status, what it wrote to both streams, and the limits that it set.
    """
    streams, set_limits, code = [Standard(data), Standard(), Standard()], {}, 0
    with monkeypatch.context() as patch:
        for name, stream in zip(("stdin", "stdout", "stderr"), streams):
            patch.setattr(sys, name, stream)
        patch.setattr(resource, "getrlimit", lambda kind: limits)
        patch.setattr(resource, "setrlimit", set_limits.__setitem__)
        try:
            pdf._main()
        except SystemExit as error:
            code = error.code
    return code, streams[1].getvalue(), streams[2].getvalue(), set_limits


def test_the_process_writes_the_text(monkeypatch):
    code, out, err, limits = run(monkeypatch, pdf_page("Ann is five."))
    assert (code, out.decode().strip(), err) == (0, "Ann is five.", b"")
    assert limits == {resource.RLIMIT_AS: (2 << 30,) * 2, resource.RLIMIT_CPU: (60, 60)}
    monkeypatch.setattr(pdf, "pdf_text", lambda *_: "\ud800\u00e9")
    assert run(monkeypatch, b"")[1] == "?\u00e9".encode()


@pytest.mark.parametrize(
    "soft, hard, least", [(None, 30, 30), (None, 90, 60), (20, None, 20), (20, 30, 20), (70, 90, 60)]
)
def test_a_lower_limit_stays(monkeypatch, soft, hard, least):
    both = tuple(resource.RLIM_INFINITY if x is None else x for x in (soft, hard))
    limits = run(monkeypatch, pdf_page("a"), both)[3]
    assert limits[resource.RLIMIT_CPU] == (least, least)
    assert limits[resource.RLIMIT_AS][0] == min(x for x in (soft, hard) if x is not None)


def test_the_process_says_why_there_is_no_text(monkeypatch):
    code, out, err, _ = run(monkeypatch, pdf_page(""))
    assert (code, out) == (2, b"") and err.startswith(b"\nthe PDF: has no text")


def convert(monkeypatch, code, out=b"", err=b""):
    """Convert a PDF with a process that ends with `code` -> the text, and what the process was given."""
    given = {}

    class Process:
        returncode = None

        async def communicate(self, data):
            given["data"], self.returncode = data, code
            return out, err

        def kill(self):
            given["killed"] = True

        async def wait(self):
            pass

    async def start(*command, **how):
        given.update(how, command=command)
        return Process()

    monkeypatch.setattr(asyncio, "create_subprocess_exec", start)
    return asyncio.run(pdf.convert(b"%PDF")), given


@pytest.mark.parametrize("before", [None, "/else/where"])
def test_a_process_is_given_the_bytes(monkeypatch, before):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    if before:
        monkeypatch.setenv("PYTHONPATH", before)
    monkeypatch.setenv("OTHER", "kept")
    text, given = convert(monkeypatch, 0, "\u00e9".encode())
    assert text == "\u00e9" and given["data"] == b"%PDF" and "killed" not in given
    assert given["command"] == (sys.executable, "-m", "longlora.serving.pdf")
    assert [given[name] for name in ("stdin", "stdout", "stderr")] == [asyncio.subprocess.PIPE] * 3
    root, *rest = given["env"]["PYTHONPATH"].split(os.pathsep)
    assert os.path.exists(f"{root}/longlora/serving/pdf.py") and rest == ([before] if before else [])
    assert given["env"]["OTHER"] == "kept"


@pytest.mark.parametrize(
    "code, err, words",
    [
        (2, b"warned\n\nthe PDF: has \xff no text", "^the PDF: has \ufffd no text$"),
        (-9, b"", "^the PDF takes too much memory or time to read$"),
        (1, b"Traceback\nMemoryError", "^the PDF takes too much memory or time to read$"),
    ],
)
def test_the_error_of_the_process_is_passed_on(monkeypatch, code, err, words):
    with pytest.raises(UserError, match=words):
        convert(monkeypatch, code, b"", err)


def test_a_process_that_does_not_end_is_killed(monkeypatch):
    done = []

    class Process:
        returncode = None

        async def communicate(self, data):
            await asyncio.Event().wait()

        def kill(self):
            done.append("killed")

        async def wait(self):
            done.append("waited")

    async def start(*command, **how):
        return Process()

    monkeypatch.setattr(asyncio, "create_subprocess_exec", start)
    monkeypatch.setattr(pdf, "SECONDS", 0.001)
    with pytest.raises(UserError, match="the PDF takes too long to read"):
        asyncio.run(pdf.convert(b""))
    assert done == ["killed", "waited"]
