"""longlora.generate and the command: one answer to a prompt, or to a question about a text, as it comes."""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longlora.data.chat_template import find_template
from longlora.decoder.sampling import Sampling
from longlora.device import choose
from longlora.errors import UserError
from longlora.serving.engine import Event, Request
from longlora.serving.open import Opened, open_engine
from longlora.serving.text import TextStream

PathLike = str | os.PathLike[str]
QUESTION = "Below is some material. Read it, then answer the question.\n\n{material}\n\nQuestion: {question}"


class Answer:
    """An answer as it comes: iterate over its pieces of text.

    When it has ended: reason ("stop", "length"), tokens (ids), prompt_tokens, reused (of these, those that
    the cache still held), first (seconds to the first token), seconds (for all), logprobs if asked for.
    """

    def __init__(
        self,
        opened: Opened,
        ids: np.ndarray,
        sampling: Sampling,
        max_new_tokens: int | None,
        stop: Sequence[str] = (),
        top_logprobs: int | None = None,
    ):
        room = opened.engine.cache.places - len(ids)
        if room < 1:
            raise UserError(
                f"the prompt has {len(ids)} tokens, the context is {opened.engine.cache.places}: "
                f"{1 - room} too many to leave room for an answer"
            )
        self._opened, self._events = opened, list[Event]()
        self._stream = TextStream(opened.tokenizer, stop)
        count = room if max_new_tokens is None else min(max_new_tokens, room)
        self._request = Request(ids, sampling, count, self._events.append, opened.end, top_logprobs)
        self.prompt_tokens, self.tokens = len(ids), list[int]()
        self.logprobs: list[tuple[int, float, Sequence[tuple[int, float]]]] = []
        self.reason: str | None = None
        self.first = self.seconds = 0.0

    @property
    def reused(self) -> int:
        return self._request.reused

    def stop(self) -> None:
        """End the answer at the next token."""
        self._request.cancel()

    def __iter__(self) -> Iterator[str]:
        began, engine = time.perf_counter(), self._opened.engine
        engine.submit(self._request)
        while self.reason is None:
            engine.tick()
            for event in self._events:
                piece = self._take(event, began)
                if piece:
                    yield piece
            self._events.clear()
        self.seconds = time.perf_counter() - began

    def _take(self, event, began):
        """The text of an event; what a stop string has ended is not added to."""
        if event.reason == "error":
            raise UserError(event.error)
        if event.reason is not None:
            self.reason = "stop" if self._stream.stopped else event.reason
            return self._stream.finish()
        if self._stream.stopped:
            return ""
        if not self.tokens:
            self.first = time.perf_counter() - began
        self.tokens.append(event.token)
        if event.logprob is not None:
            self.logprobs.append((event.token, event.logprob, event.top))
        piece = self._stream.add(event.token)
        if self._stream.stopped:
            self._request.cancel()
        return piece


def chat_ids(opened: Opened, template: Any, messages: Sequence[dict[str, Any]], **extra: Any) -> np.ndarray:
    """The tokens of a conversation, up to where the assistant begins to answer."""
    text = template.render(messages, add_generation_prompt=True, **extra)
    return np.array(opened.tokenizer.backend.encode(text, add_special_tokens=False).ids, np.int32)


def read_material(path: PathLike) -> str:
    """The text of a .txt, .md or .pdf file. UserError for a file that cannot be read as text."""
    path = os.fspath(path)
    if path.lower().endswith(".pdf"):
        return _pdf(path)
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _pdf(path):
    try:
        import pypdf
    except ImportError:
        raise UserError(f"{path}: reading a PDF needs pypdf: pip install 'longlora[pdf]'") from None
    try:
        text = "\n\n".join(page.extract_text() for page in pypdf.PdfReader(path).pages)
    except Exception as error:  # pypdf raises many kinds for damaged files
        raise UserError(f"{path}: cannot be read as a PDF: {error}") from None
    if not text.strip():
        raise UserError(f"{path}: has no text; a scanned PDF needs text recognition first")
    return text


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
    stop: Sequence[str] = (),
    context: int | None = None,
    dtype: str = "auto",
    cache_dtype: str = "auto",
    chat_template: PathLike | None = None,
    device: str = "auto",
    **sampling: Any,
) -> Answer:
    """Continue `prompt`, or answer `question` about the text file `material` -> an Answer to iterate over.

    A prompt is continued as it is. A question goes through the model's chat template.

    adapter: trained on the model. max_new_tokens: by default what the context has room for.
    stop: texts that end the answer. context: tokens of prompt and answer together, by default what the model
        was made for.
    dtype, cache_dtype: of the weights, and of keys and values; "auto" is that of the files.
    sampling: the fields of decoder.sampling.Sampling: temperature (0, the default, is greedy), top_p, seed...

    UserError for files that cannot be read or do not fit in memory, before any weight is read.
    """
    if (prompt is None) == (question is None):
        raise UserError("generate needs a prompt, or a question about a material")
    if prompt is not None and material is not None:
        raise UserError("material goes with a question, not with a prompt")
    if max_new_tokens is not None and (type(max_new_tokens) is not int or max_new_tokens < 1):
        raise UserError(f"max_new_tokens should be an integer of at least 1, got {max_new_tokens!r}")
    how = Sampling(**sampling)
    text = "" if material is None else read_material(material)
    device, _ = choose(device)
    opened = open_engine(model, adapter, context=context, dtype=dtype, cache_dtype=cache_dtype, device=device)
    if prompt is not None:
        ids = opened.tokenizer.encode(prompt)  # with the special tokens that the tokenizer adds
    else:
        template = find_template(opened.base, opened.tokenizer.special, chat_template)
        messages = (
            question_about(text, str(question)) if material else [{"role": "user", "content": question}]
        )
        ids = chat_ids(opened, template, messages)
    return Answer(opened, ids, how, max_new_tokens, [stop] if isinstance(stop, str) else stop)


def show(answer: Answer, out: Any = None) -> None:
    """Write the pieces of an answer to `out`, by default standard output, as they come."""
    out = out or sys.stdout
    for piece in answer:
        out.write(piece)
        out.flush()
    out.write("\n")
    out.flush()
