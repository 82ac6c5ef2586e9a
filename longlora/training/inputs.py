"""What a run starts from: the base model, what the options mean for it, and its sequences."""

import hashlib
import json
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from longlora import disk, job
from longlora.data import records
from longlora.data.chat import Instructions, form_of
from longlora.data.chat_template import ChatTemplate, find_template
from longlora.data.sequences import Sequences
from longlora.data.tokens import CACHED, tokenise
from longlora.decoder import plan, rope
from longlora.decoder.config import ModelConfig, read_config
from longlora.decoder.lora import LoraConfig
from longlora.device import CPU
from longlora.errors import UserError
from longlora.files import adapter as adapters
from longlora.files.tokenizer_files import CHAT_TEMPLATE
from longlora.training import from_adapter
from longlora.training.options import OF_ANSWERS, OF_TEXT, TrainOptions

Say = Callable[[str], object]  # receives the lines of a run's report


def use_threads(o: TrainOptions) -> None:
    """Set the number of threads of this process, if the options say one."""
    if o.num_threads:
        from longlora import set_num_threads

        set_num_threads(o.num_threads)


class Source:
    """Where weights and tokenizer come from: a base model, or a config and random weights (`base` is None).

    config               the ModelConfig
    fingerprint          a string that identifies the weights
    tokenizer            or None
    dtype                in which a run with `full` saves the model: one name, or a name for each tensor
    beside               other files that are saved with such a model
    adapter              the adapter that is trained further, name -> float32 array, or None
    adapter_fingerprint  a string that identifies that adapter, or None

    UserError for files that cannot be read.
    """

    def __init__(self, o: TrainOptions):
        self.beside: dict[str, bytes] = {}
        self.adapter: dict[str, np.ndarray] | None = None
        self.adapter_fingerprint: str | None = None
        if o.model:
            from longlora.files.open_model import open_model

            self.base: Any = open_model(o.model)
            self.config, self.fingerprint = self.base.config, self.base.fingerprint()
            self.tokenizer = self.base.tokenizer() if self.base.has_tokenizer() else None
            self.beside = self.base.beside()
            self.dtype: str | dict[str, str] = {name: self.base.dtype(name) for name in self.base.names()}
            if o.adapter is not None:
                lora, self.adapter, raw = adapters.load(o.adapter, self.base)
                config = self.config if raw is None else read_config(raw)
                self.adapter_fingerprint = adapters.fingerprint(lora, self.adapter, config)
            return
        from longlora.files.tokenizer import Tokenizer

        assert o.init is not None
        directory = o.init if os.path.isdir(o.init) else os.path.dirname(o.init) or "."
        self.base, self.config, self.tokenizer = None, read_config(o.init), None
        self.fingerprint = f"random {o.seed}"
        if Tokenizer.is_in(directory):
            self.tokenizer = Tokenizer.from_directory(directory).check(self.config, directory)
        self.dtype = self.config.raw.get("dtype") or self.config.raw.get("torch_dtype") or "float32"

    def template(self, o: TrainOptions) -> ChatTemplate:
        """The chat template of the run. UserError if it cannot be used.

        It goes with the tokenizer's files, so that it is there where the result is used.
        """
        found = find_template(self.tokenizer, o.chat_template, o.adapter)
        if self.tokenizer:
            self.tokenizer.put(CHAT_TEMPLATE, found.source.encode())
        return found


class Setup:
    """What the options mean for a base model of config `base`.

    config     the ModelConfig of the run, with extended positions; `raw` is its dict for config.json
    rope       a sentence about the positions
    attention  group_size, boundary and shift of S2-Attn as a dict, or None for dense attention
    multiple   the length of every batch is a multiple of this many tokens
    lora       a LoraConfig, or None if every weight is trained
    plan       the Plan of its memory on `device`

    instructs: whether the data are questions and answers. It completes the options (TrainOptions.resolve).
    UserError if they do not fit the base model.
    """

    def __init__(self, o: TrainOptions, base: ModelConfig, device: str = CPU, instructs: bool = False):
        self.config, self.raw = base, base.raw
        self.rope = f"rope: {base.rope.type}, as the base: {base.max_position_embeddings} positions"
        self.lora: LoraConfig | None = None
        if o.adapter is not None:
            self.lora, raw = from_adapter.take_over(o, base)
            if raw is not None:
                self.config, self.raw = read_config(raw), raw
                kind, length = self.config.rope.type, self.config.max_position_embeddings
                self.rope = f"rope: {kind}, as the adapter: {length} positions"
        elif o.target_length is not None:
            extended, self.rope = rope.extend(base, o.rope_type, o.target_length)
            self.raw = rope.to_config(base.raw, extended, o.target_length)
            self.config = read_config(self.raw)
        o.resolve(self.config, instructs)
        dense = o.attention == "dense"
        s2 = {"group_size": o.group_size, "boundary": o.boundary, "shift": o.shift}
        self.attention = None if dense else s2
        self.multiple = 1 if o.boundary == "split" else o.group_size or 1  # dense attention has no group
        if self.lora is None and not o.full:
            targets: Any = "all-linear" if o.target_modules == ("all-linear",) else o.target_modules
            self.lora = LoraConfig(o.r, o.lora_alpha, targets, o.modules_to_save)
        self.plan = plan.plan(
            self.config,
            dtype=o.dtype,
            batch_size=o.per_device_train_batch_size,
            sequence_length=o.sequence_length,
            group_size=o.group_size,
            lora=self.lora,
            packed=o.packing_boundaries == "document",
            checkpointing=o.checkpointing,
            memory=None if o.max_memory is None else int(o.max_memory * 2**30),
            device=device,
        )


def instructs(o: TrainOptions) -> bool:
    """Whether the data are questions and answers. UserError for a file that holds neither these nor text."""
    return form_of(o.data) is not None


def read_data(
    o: TrainOptions, source: Source, setup: Setup, say: Say
) -> tuple[Sequences, Sequences | None, str, str | None]:
    """Tokenise the data, or take it from the cache.

    Returns the sequences to train on, those held out or None, a fingerprint that identifies the former, and
    one of what decides which tokens are answers, or None for text. UserError for data that cannot be read.
    """
    cache = o.cache_dir or os.path.join(o.output_dir, "cache")
    if os.path.isdir(cache):
        disk.sweep(cache, CACHED)
    forms = {path: form_of(path) for path in (o.data, o.eval_data) if path}
    talks = any(form and not form.plain for form in forms.values())
    template = source.template(o) if talks else None
    if o.chat_template and not talks:
        raise UserError(f"chat_template is for conversations; {o.data} holds none")
    if o.train_on_inputs and not any(forms.values()):
        raise UserError(f"train_on_inputs is for questions and answers; {o.data} is text")

    def sequences(path):
        form, how = forms[path], None
        if form is not None:
            how = Instructions(form, None if form.plain else template, o.train_on_inputs)
            over = "everything" if o.train_on_inputs else "the answers"
            by = f", rendered by {how.template.where}" if how.template else ""
            say(f"{path}: records of {form.name}{by}; loss and perplexity are over {over}")
        elif records.kind(path) in (*records.KINDS, records.HUB):
            say(f"{path}: records of text; loss and perplexity are over everything")
        tokens = tokenise(path, source.tokenizer, setup.config.vocab_size, cache, say, how)
        long, boundaries = (of_form(name, form) for name in ("long_documents", "packing_boundaries"))
        return Sequences(tokens, o.sequence_length, long, path, boundaries)

    def of_form(name, form):
        """The run's option; or if nobody has set it and the data's form is another, the default of `form`."""
        if bool(form) == bool(forms[o.data]) or name in o.given:
            return getattr(o, name)
        return (OF_ANSWERS if form else OF_TEXT)[name]

    corpus, held_out = sequences(o.data), None
    if o.eval_data:
        held_out = sequences(o.eval_data)
    elif o.eval_fraction:
        held_out = corpus.hold_out(o.eval_fraction)
    form = forms[o.data]  # what is held out may change in a run
    key = template.key() if template and form and not form.plain else None
    decides = json.dumps([key, o.train_on_inputs])
    rules = hashlib.sha256(decides.encode()).hexdigest() if form else None
    job.trim_heap()  # tokenising leaves tens of MB of freed pieces, which the plan does not count
    return corpus, held_out, f"{corpus.tokens.fingerprint} {len(corpus)}", rules
