"""Opening a model to use it: weights with the adapter merged in, tokenizer, cache, engine."""

import os
import sys
from dataclasses import dataclass
from typing import Any

from longlora.decoder.cache import Cache
from longlora.decoder.config import ModelConfig, read_config
from longlora.decoder.generate import CHUNK
from longlora.decoder.generation_plan import plan
from longlora.decoder.model import Model
from longlora.decoder.streaming import StreamingCache, Window
from longlora.decoder.weights import DTYPES
from longlora.disk import read_json
from longlora.errors import UserError
from longlora.files import adapter as adapters
from longlora.files.huggingface import GENERATION
from longlora.files.merge import Merged
from longlora.files.open_model import open_model
from longlora.files.tokenizer import Tokenizer
from longlora.memory.plan import GenerationPlan
from longlora.progress import Quiet
from longlora.serving.engine import Engine

Path = str | os.PathLike[str]


@dataclass(frozen=True)
class Opened:
    """A model that is ready to answer.

    end: the tokens that end an answer. base: the opened files.
    identity: what the cache depends on besides the tokens: hashes of model and adapter, and dtypes.
    """

    engine: Engine
    tokenizer: Tokenizer
    config: ModelConfig
    end: frozenset[int]
    base: Any
    identity: dict[str, str]


@dataclass(frozen=True)
class Prepared:
    """A model that was checked and fits in memory, before its weights are read.

    config: with the adapter's longer positions. weights: what Model.load takes. size: of the cache.
    chunk: tokens of a prompt in one pass.
    """

    base: Any
    config: ModelConfig
    weights: Any
    size: int | Window
    chunk: int
    planned: GenerationPlan
    identity: dict[str, str]

    def load(self) -> Opened:
        """Read the weights."""
        planned, config = self.planned, self.config
        tokenizer = self.base.tokenizer()
        made = Model(config, dtype=planned.dtype, device=planned.device).load(self.weights)
        kind = planned.cache_dtype, planned.device
        if isinstance(self.size, Window):
            cache: Cache = StreamingCache(config, self.size, config.rope, *kind)
        else:
            cache = Cache(config, planned.rows, self.size, *kind)
        end = end_tokens(self.base, tokenizer)
        return Opened(Engine(made, cache, chunk=self.chunk), tokenizer, config, end, self.base, self.identity)


def open_engine(model: Path, adapter: Path | None = None, **how: Any) -> Opened:
    """Open the model at path `model`, with an adapter merged in if given. Arguments as in `prepare`."""
    return prepare(model, adapter, **how).load()


def prepare(
    model: Path,
    adapter: Path | None = None,
    *,
    context: int | None = None,
    window: tuple[int, int | None] | None = None,
    rows: int = 1,
    fewest_rows: int | None = None,
    dtype: str = "auto",
    cache_dtype: str = "auto",
    chunk: int = CHUNK,
    device: str = "cpu",
    memory: int | None = None,
    warns: bool = True,
) -> Prepared:
    """Check the model at path `model`, with an adapter if given, and plan its memory. No weight is read.

    context: tokens of prompt and answer together, by default what the model was made for.
    window: start and recent of a streaming.Window instead, for one answer without end. recent is by default
        8192 or what the model was made for.
    rows: answers that advance side by side. fewest_rows: take fewer where memory is short, down to this many.
    dtype: of the weights; "auto" is that of the files. cache_dtype: of keys and values; "auto" is dtype.
    chunk: tokens of a prompt in one pass, unless there is a window.
    device: "cpu" or "cuda:N". memory: bytes, by default what the device has.
    warns: a context that is longer than the model was made for gets a warning on standard error.

    UserError for files that do not belong together, and for what does not fit in memory.
    """
    base = open_model(model)
    config: ModelConfig = base.config
    weights: Any = base
    identity = {"model": base.fingerprint(), "adapter": "none"}
    if adapter is not None:
        lora, tensors, raw = adapters.load(adapter, base)
        config = read_config(raw) if raw is not None else config
        weights = Merged(base, lora, tensors)
        identity["adapter"] = adapters.fingerprint(lora, tensors, config)
    if dtype == "auto":
        dtype = base.dtype("model.embed_tokens.weight")
    for name, value in (("dtype", dtype), ("cache_dtype", cache_dtype)):
        if value not in (*DTYPES, "auto"):
            raise UserError(f"{name} should be one of auto, {', '.join(DTYPES)}, got {value!r}")
    length = config.max_position_embeddings if context is None else context
    size: int | Window = length
    if window is not None:
        start, recent = window
        size = Window(start, min(8192, length - start) if recent is None else recent)

    def plan_of(rows: int) -> GenerationPlan:
        kind = None if cache_dtype == "auto" else cache_dtype
        return plan(
            config,
            context=size,
            rows=rows,
            dtype=dtype,
            cache_dtype=kind,
            chunk=chunk,
            device=device,
            memory=memory,
        )

    planned = plan_of(rows)
    while not planned.fits and fewest_rows is not None and planned.rows > fewest_rows:
        planned = plan_of(max(fewest_rows, planned.rows // 2))
    if not planned.fits:
        raise UserError(
            f"the model does not fit in memory: with {planned.rows} x {planned.context} tokens it needs "
            f"{planned.total / 2**30:.2f} GiB, {planned.memory / 2**30:.2f} GiB are available; what would "
            f"make it fit: {'; '.join(planned.changes)}"
        )
    made_for = config.max_position_embeddings
    if warns and length > made_for:
        Quiet(sys.stderr).write(
            f"warning: a context of {length} tokens is longer than the {made_for} that the model was made "
            "for; beyond them its answers get poor (longlora train --target-length extends a model)\n"
        )
    identity |= {"dtype": dtype, "cache_dtype": planned.cache_dtype}
    return Prepared(base, config, weights, size, chunk, planned, identity)


def end_tokens(base: Any, tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that end an answer: those of generation_config.json, else of config.json and tokenizer."""
    found: list = []
    path = os.path.join(base.path, GENERATION)
    if os.path.isfile(path):
        found.append(read_json(path).get("eos_token_id"))
    if not found or found[0] is None:
        found = [base.config.raw.get("eos_token_id"), tokenizer.eos_token_id]
    flat = [x for value in found for x in (value if isinstance(value, list) else [value])]
    return frozenset(x for x in flat if isinstance(x, int) and x >= 0)
