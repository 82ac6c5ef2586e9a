"""longlora.generate and the command: one answer to a prompt, or to a question about a text, as it comes."""

import functools
import io
import os
import sys
from collections.abc import Sequence
from typing import Any

from longlora.disk import read_once
from longlora.errors import UserError
from longlora.serving.answer import Answer
from longlora.serving.pdf import pdf_text
from longlora.serving.session import check, open_session

PathLike = str | os.PathLike[str]
QUESTION = "Below is some material. Read it, then answer the question.\n\n{material}\n\nQuestion: {question}"


def read_material(path: PathLike) -> str:
    """The text of a .txt, .md or .pdf file, or of a pipe. UserError if it cannot be read as text."""
    path = os.fspath(path)
    file = io.BytesIO(read_once(path))
    if path.lower().endswith(".pdf"):
        return pdf_text(file, path)
    try:
        return io.TextIOWrapper(file, encoding="utf-8").read()
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text") from None


def question_about(material: str, question: str) -> list[dict[str, Any]]:
    """The conversation that asks `question` about `material`."""
    return [{"role": "user", "content": QUESTION.format(material=material, question=question)}]


def generate(
    model: PathLike,
    prompt: str | None = None,
    *,
    material: PathLike | None = None,
    question: str | None = None,
    adapter: PathLike | None = None,
    max_new_tokens: int | None = None,
    stop: str | Sequence[str] = (),
    prompt_cache: PathLike | None = None,
    **options: Any,
) -> Answer:
    """Continue `prompt`, or answer `question` about the text file `material` -> an Answer to iterate over.

    A prompt is continued as it is. A question goes through the model's chat template. For several answers of
    one model use longlora.Session.

    max_new_tokens, stop: as for Session.answer.
    prompt_cache: a file. If it is there, what the prompt shares with it is not read again. When the whole
        prompt has been read, it is written to the file.
    options: the other keywords of longlora.Session (context, streaming, start_size, recent_size, dtype,
        cache_dtype, chat_template, device), and the fields of decoder.sampling.Sampling (temperature, top_k,
        top_p, min_p, seed, ...).

    UserError for files that cannot be read or do not fit in memory, before any weight is read.
    """
    if (prompt is None) == (question is None):
        raise UserError("generate needs a prompt, or a question; not both")
    if prompt is not None and material is not None:
        raise UserError("material goes with a question, not with a prompt")
    if prompt is not None and options.get("chat_template") is not None:
        raise UserError("chat_template goes with a question: a prompt is continued as it is")
    check(max_new_tokens, stop)
    messages: list[dict[str, Any]] = [{"role": "user", "content": question}]
    if material is not None:
        messages = question_about(read_material(material), str(question))
    session, sampling = open_session(model, adapter, prompt_cache, options)
    save = None if prompt_cache is None else functools.partial(session.save, prompt_cache)
    how = dict(max_new_tokens=max_new_tokens, stop=stop, on_read=save, **sampling)
    return session.chat(messages, **how) if prompt is None else session.generate(prompt, **how)


def show(answer: Answer, out: Any = None) -> None:
    """Write the pieces of an answer to `out`, by default standard output, as they come."""
    out = out or sys.stdout
    for piece in answer:
        out.write(piece)
        out.flush()
    out.write("\n")
    out.flush()
