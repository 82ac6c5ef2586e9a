"""A session: a model that answers, and the cache of what it has read."""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from longlora.data.chat_template import find_template
from longlora.decoder.generate import LONG_CHUNK
from longlora.decoder.sampling import Sampling
from longlora.device import choose
from longlora.errors import UserError
from longlora.serving import prompt_cache
from longlora.serving.answer import Answer, chat_ids
from longlora.serving.open import open_engine

PathLike = str | os.PathLike[str]


def check(
    max_new_tokens: int | None, stop: str | Sequence[str], **sampling: Any
) -> tuple[Sampling, Sequence[str]]:
    """Check the arguments of an answer -> its Sampling and its stop strings. UserError names a wrong one."""
    if max_new_tokens is not None and (type(max_new_tokens) is not int or max_new_tokens < 1):
        raise UserError(f"max_new_tokens should be an integer of at least 1, got {max_new_tokens!r}")
    return Sampling(**sampling), [stop] if isinstance(stop, str) else stop


class Session:
    """A model that is ready to answer, one answer at a time, and the cache of keys and values it has made.

    The tokens that a prompt shares with what was read and written last, from the first token on, are not read
    again: a second question about a long text is answered at once.

    context: tokens of prompt and answer together, by default what the model was made for.
    streaming: take prompts and answers of any length in memory of a fixed size. The model then sees the first
        start_size tokens and the last recent_size, by default 8192 or what the model was made for. It forgets
        the others.
    dtype, cache_dtype: of the weights, and of keys and values; "auto" is that of the files.
    adapter: trained on the model. chat_template: a file, by default the one that the adapter was
        trained with, or the model's own.
    chosen: a sentence about the device.

    UserError for files that cannot be read or do not fit in memory, before any weight is read.
    """

    def __init__(
        self,
        model: PathLike,
        adapter: PathLike | None = None,
        *,
        context: int | None = None,
        streaming: bool = False,
        start_size: int = 4,
        recent_size: int | None = None,
        dtype: str = "auto",
        cache_dtype: str = "auto",
        chat_template: PathLike | None = None,
        device: str = "auto",
    ):
        if streaming and context is not None:
            raise UserError("context and streaming exclude each other: a streaming answer has no end")
        if not streaming and (start_size != 4 or recent_size is not None):
            raise UserError("start_size and recent_size go with streaming")
        window = (start_size, recent_size) if streaming else None
        device, self.chosen = choose(device)
        self.opened = open_engine(
            model,
            adapter,
            context=context,
            window=window,
            dtype=dtype,
            cache_dtype=cache_dtype,
            chunk=LONG_CHUNK,  # no other request waits
            device=device,
        )
        self._chat_template, self._adapter = chat_template, adapter
        self._last: Answer | None = None

    @property
    def context(self) -> int | None:
        """How many tokens a prompt and its answer may have together; None if there is no limit."""
        return self.opened.engine.cache.limit

    @property
    def held(self) -> int:
        """How many tokens the cache holds."""
        return len(self.opened.engine.tokens(0))

    @functools.cached_property
    def template(self) -> Any:
        """The chat template. UserError if its file cannot be read."""
        return find_template(self.opened.tokenizer, self._chat_template, self._adapter)

    def generate(self, prompt: str, **how: Any) -> Answer:
        """Continue `prompt` as it is -> an Answer to iterate over. how: see `answer`."""
        return self.answer(self.opened.tokenizer.encode(prompt), **how)

    def chat(self, messages: Sequence[dict[str, Any]], **how: Any) -> Answer:
        """Answer a conversation, dicts of role and content, through the template. how: see `answer`."""
        return self.answer(chat_ids(self.opened, self.template, messages), **how)

    def answer(
        self,
        ids: np.ndarray,
        *,
        max_new_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        top_logprobs: int | None = None,
        on_read: Callable[[], Any] | None = None,
        **sampling: Any,
    ) -> Answer:
        """Continue the tokens `ids`, int [N] -> an Answer. An earlier answer that has not ended ends.

        max_new_tokens: by default what the context has room for. stop: texts that end the answer.
        top_logprobs: None for no log-probabilities, else how many of the likeliest tokens get theirs.
        on_read: is called once, when the prompt has been read.
        sampling: the fields of decoder.sampling.Sampling: temperature (0, the default, is greedy), top_p, ...
        """
        chosen, stops = check(max_new_tokens, stop, **sampling)
        self._end()
        self._last = Answer(self.opened, ids, chosen, max_new_tokens, stops, top_logprobs, on_read)
        return self._last

    def _end(self):
        """End what runs."""
        if self._last is not None:
            self._last.stop()
        while self.opened.engine.busy:
            self.opened.engine.tick()

    def save(self, path: PathLike) -> int:
        """Write the cache to the file `path` -> the tokens it holds.

        UserError if there are none, if the session is streaming, and if the file cannot be written; what was
        there is then untouched.
        """
        return prompt_cache.save(path, self.opened.engine, self.opened.identity)

    def load(self, path: PathLike, missing_ok: bool = False) -> int:
        """Take the cache of the file `path`, which `save` wrote -> the tokens it holds.

        missing_ok: do nothing if there is no file, and return 0.
        UserError for a streaming session, a file of another model, adapter or dtype, one that is damaged, and
        one with more tokens than the context. Where keys or values are at fault the cache is then empty, else
        it is untouched.
        """
        self._end()
        prompt_cache.check(path, self.opened.engine)
        if missing_ok and not os.path.exists(path):
            return 0
        return prompt_cache.load(path, self.opened.engine, self.opened.identity)


def open_session(
    model: PathLike, adapter: PathLike | None, cache: PathLike | None, options: Mapping[str, Any]
) -> tuple[Session, dict[str, Any]]:
    """Open a session with what the file `cache` holds, if that is given and exists.

    options: keywords of Session, and fields of Sampling. Returns the session and the fields of Sampling.
    UserError as for both, and for a `cache` that cannot be written, before any weight is read.
    """
    names = {field.name for field in fields(Sampling)}
    sampling = {name: value for name, value in options.items() if name in names}
    Sampling(**sampling)
    if cache is not None:
        prompt_cache.rehearse(cache)
    session = Session(model, adapter, **{k: v for k, v in options.items() if k not in names})
    if cache is not None:
        session.load(cache, missing_ok=True)
    return session, sampling
