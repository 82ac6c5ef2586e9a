"""Our model as lm-eval sees it: log-likelihoods, and texts up to a stop string.

What a task asks, how it is tokenised and where it is cut are as in lm-eval's own `hf` model, so scores agree.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from longlora import progress
from longlora.data.chat_template import ChatTemplate
from longlora.decoder.sampling import NAMES, Sampling
from longlora.errors import UserError, shown
from longlora.evaluation.likelihood import Scorer
from longlora.serving.engine import Event, Request
from longlora.serving.open import Opened, Prepared
from longlora.serving.text import TextStream

NEW_TOKENS = 256  # of an answer, where a task does not say
ENCODED = 64  # texts whose tokens are remembered: the choices of a question have one context


class HarnessModel(TemplateLM):
    """The model in `prepared`, whose weights are read at the first request.

    template: renders chats, if the user wants that. cut: how many requests were longer than the context and
    lost their beginnings.
    """

    def __init__(self, prepared: Prepared, template: ChatTemplate | None = None):
        super().__init__()
        self._prepared, self._template, self.cut = prepared, template, 0
        self._tokenizer = prepared.base.tokenizer()
        self.max_length: int = prepared.planned.context
        self._remembered = functools.lru_cache(ENCODED)(self._encode)

    @functools.cached_property
    def _opened(self) -> Opened:
        return self._prepared.load()

    # ---- tokens ------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context: BOS, or else EOS."""
        bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        found = eos if bos is None else bos
        if found is None:
            raise UserError(
                f"{self._tokenizer.where}: the tokenizer has neither a BOS nor an EOS token, and the task "
                "needs one before a text without context"
            )
        return found

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **how: Any) -> list[int]:
        """Token ids with the special tokens of the tokenizer, unless the text begins with them."""
        return self._remembered(string, add_special_tokens)

    def _encode(self, string, add_special_tokens):
        if add_special_tokens is None:
            bos, eos = (self._tokenizer.special.get(name) for name in ("bos_token", "eos_token"))
            prefix = eos if bos is None else bos
            add_special_tokens = prefix is None or not string.startswith(prefix)
        if add_special_tokens:
            return self._tokenizer.encode(string).tolist()
        return self._tokenizer.encode_parts([string])[0].tolist()

    # ---- chats -------------------------------------------------------------------------------------

    @property
    def tokenizer_name(self) -> str:
        """Identifies the tokenizer."""
        return self._tokenizer.fingerprint()

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render a chat. Without a generation prompt its last message goes on where the text ends.

        Where a template refuses a system message, it is left out.
        """
        assert self._template is not None
        messages, mark = [dict(message) for message in chat_history], "\ue000 "
        if not add_generation_prompt:
            messages[-1]["content"] += mark
        try:
            text = self._template.render(messages, add_generation_prompt)
        except UserError:
            others = [message for message in messages if message["role"] != "system"]
            text = self._template.render(others, add_generation_prompt)
        if add_generation_prompt:
            return text
        at = text.rindex(mark.strip())
        # As transformers: a template that trims messages trims this one too.
        return text[:at] if text[at:].startswith(mark) else text[:at].rstrip()

    # ---- requests ----------------------------------------------------------------------------------

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **how):
        pairs = []
        for texts, context, rest in requests:
            if not rest:
                raise UserError(f"a task asks for the likelihood of a text without tokens: {shown(texts)}")
            if len(rest) > self.max_length:
                raise UserError(
                    f"a task asks for the likelihood of {len(rest)} tokens, the context is {self.max_length}"
                )
            whole = [*context, *rest]
            self.cut += len(whole) > self.max_length + 1
            ids = np.array(whole[-self.max_length - 1 :], np.int32)
            pairs.append((ids[: -len(rest)], ids[-len(rest) :]))
        engine = self._opened.engine
        with progress.bar(total=len(pairs), desc="log-likelihoods", leave=False, disable=None) as bar:
            found = Scorer(engine.generator).score(pairs, bar.update)
        engine.abort("")  # the rows hold other tokens than the engine knows
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in windows of the context, as lm-eval cuts them."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            for context, rest in map(
                make_disjoint_window,
                get_rolling_token_windows(
                    self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
                ),
            ):
                windows.append((None, context, rest))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (logs, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += logs
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers, side by side in the rows of the cache. Prompts with a common beginning come together."""
        texts = [_Text(self, number, *request.args) for number, request in enumerate(requests)]
        engine = self._opened.engine
        waiting = sorted(texts, key=lambda text: text.request.prompt.astype(">i4").tobytes(), reverse=True)
        with progress.bar(total=len(texts), desc="answers", leave=False, disable=None) as bar:
            while waiting or engine.busy:
                while waiting and engine.submit(waiting[-1].request):
                    waiting.pop()
                engine.tick()
                bar.update(sum(text.over for text in texts) - bar.n)
        return [text.result() for text in texts]

    def prompt(self, context: str, new_tokens: int) -> np.ndarray:
        """The tokens of a prompt, int32 [N]. One that leaves no room for an answer loses its beginning."""
        room = self.max_length - new_tokens
        if room < 1:
            raise UserError(
                f"a task asks for {new_tokens} new tokens, the context is {self.max_length}: "
                "there is no room for a prompt"
            )
        ids = np.array(self.tok_encode(context), np.int32)
        self.cut += len(ids) > room
        return ids[-room:]

    def ends(self) -> frozenset[int]:
        """The tokens that end an answer."""
        return self._opened.end | {self._tokenizer.eos_token_id} - {None}

    def stream(self, stop: Sequence[str]) -> TextStream:
        """The text of an answer as it comes, with its special tokens."""
        return TextStream(self._tokenizer, stop, skip_special_tokens=False)

    def text(self, tokens: Sequence[int]) -> str:
        """The text of an answer."""
        return self._tokenizer.decode(tokens, skip_special_tokens=True)


class _Text:
    """An answer that a task asks for. options: as lm-eval's tasks write them."""

    def __init__(self, model, number, context, options):
        options = dict(normalize_gen_kwargs(options, NEW_TOKENS))
        self._model, self._tokens, self.over, self._error = model, list[int](), False, None
        self._stop = handle_stop_sequences(
            options.pop("until"), eos=model._tokenizer.special.get("eos_token")
        )
        self._stream = model.stream(self._stop)
        count = options.pop("max_gen_toks")
        sampling = _sampling(options, number)
        self.request = Request(model.prompt(context, count), sampling, count, self._take, model.ends())

    def _take(self, event: Event):
        if event.reason is not None:
            self.over, self._error = True, event.error
        elif event.token is not None and not self._stream.stopped:
            self._tokens.append(event.token)
            self._stream.add(event.token)
            if self._stream.stopped:
                self.request.cancel()

    def result(self):
        if self._error is not None:
            raise UserError(self._error)
        return postprocess_generated_text(self._model.text(self._tokens), self._stop, None)


def _sampling(options, seed):
    """The Sampling that a task asks for. UserError for what we do not compute."""
    draws = options.pop("do_sample")
    if options.get("num_beams") == 1:
        del options["num_beams"]
    odd = [name for name in options if name not in NAMES]
    if odd:
        raise UserError(
            f"a task generates with {odd[0]}={shown(options[odd[0]])}, which longlora cannot compute"
        )
    return Sampling(**{**options, "seed": seed}) if draws else Sampling()
