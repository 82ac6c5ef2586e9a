"""The text of a PDF. One that comes from anyone is read by a process of its own, with bounds."""

import asyncio
import os
import sys
from typing import Any, BinaryIO

import longlora
from longlora import job
from longlora.errors import UserError

LARGEST = 32 << 20  # bytes of an uploaded PDF
SECONDS, MEMORY = 60, 2 << 30


def pdf_text(file: BinaryIO, name: str) -> str:
    """The text of an open PDF. UserError, which calls it `name`, if there is none."""
    try:
        import pypdf
    except ImportError:
        raise UserError(f"{name}: reading a PDF needs pypdf: pip install 'longlora[pdf]'") from None
    try:
        text = "\n\n".join(page.extract_text() for page in pypdf.PdfReader(file).pages)
    except Exception as error:  # pypdf raises many kinds for damaged files
        raise UserError(f"{name}: cannot be read as a PDF: {error}") from None
    if not text.strip():
        raise UserError(f"{name}: has no text; a scanned PDF needs text recognition first")
    return text


async def convert(data: bytes) -> str:
    """The text of the bytes of a PDF. UserError as of pdf_text, and for one that takes too long."""
    root = os.path.dirname(os.path.dirname(longlora.__file__))
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), asyncio.subprocess.PIPE)
    command = [sys.executable, "-m", "longlora.serving.pdf"]
    process = await asyncio.create_subprocess_exec(*command, **pipes, env={**os.environ, "PYTHONPATH": path})
    try:
        async with asyncio.timeout(SECONDS):
            text, error = await process.communicate(data)
    except TimeoutError:
        raise UserError("the PDF takes too long to read") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode == 0:
        return text.decode("utf-8")
    if process.returncode == 2:
        said = error.decode("utf-8", "replace").splitlines()  # pypdf warns in lines of its own
        raise UserError(said[-1])
    raise UserError("the PDF takes too much memory or time to read")


def _main():
    import io

    job.limit_memory(MEMORY)
    job.limit_processor_time(SECONDS)
    try:
        text = pdf_text(io.BytesIO(sys.stdin.buffer.read()), "the PDF")
    except UserError as error:
        sys.stderr.buffer.write(b"\n" + str(error).encode("utf-8", "replace"))
        sys.exit(2)
    sys.stdout.buffer.write(text.encode("utf-8", "replace"))


if __name__ == "__main__":
    _main()
