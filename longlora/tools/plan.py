"""longlora.plan and the command: the memory of a training run, or of generation, from the config alone."""

import math
import os
from typing import Any

from longlora.decoder import generation_plan
from longlora.decoder.config import ModelConfig, read_config
from longlora.decoder.generate import CHUNK, LONG_CHUNK
from longlora.device import choose_to_plan
from longlora.errors import UserError
from longlora.files.adapter import describe
from longlora.files.open_model import open_model, refuse_folder_of_gguf
from longlora.memory.plan import GenerationPlan, Plan
from longlora.training import driver

PathLike = str | os.PathLike[str]


def plan(*, generate: bool = False, **keywords: Any) -> Plan | GenerationPlan:
    """Plan the memory of a training run from the config alone, or with generate=True that of generation.

    keywords: of a run, the fields of options.TrainOptions; of generation, the arguments of `generation`.
    """
    return generation(**keywords) if generate else driver.plan(**keywords)


def generation(
    model: PathLike,
    adapter: PathLike | None = None,
    *,
    context: int | None = None,
    rows: int = 1,
    dtype: str = "auto",
    cache_dtype: str = "auto",
    device: str = "auto",
    max_memory: float | None = None,
) -> GenerationPlan:
    """Plan the memory of generation: weights, the cache, a pass, and what would make them fit.

    model: a directory with a config.json, with or without weights, or a .gguf file. adapter: trained on it.
    context: tokens of prompt and answer together, by default what the model was made for.
    rows: answers that advance side by side. max_memory: GiB, by default what the device has.
    dtype, cache_dtype, device: as for longlora.generate.
    """
    if max_memory is not None:
        right = isinstance(max_memory, (int, float)) and not isinstance(max_memory, bool)
        if not right or not 0 < max_memory < math.inf:
            raise UserError(f"max_memory should be a number of GiB above 0, got {max_memory!r}")
    device, _ = choose_to_plan(device, max_memory)
    config, stored = _described(model)
    if adapter is not None:
        _, raw = describe(adapter, config, model)
        config = config if raw is None else read_config(raw)
    return generation_plan.plan(
        config,
        context=config.max_position_embeddings if context is None else context,
        rows=rows,
        dtype=stored if dtype == "auto" else dtype,
        cache_dtype=None if cache_dtype == "auto" else cache_dtype,
        chunk=LONG_CHUNK if rows == 1 else CHUNK,  # as Session, and as the server
        device=device,
        memory=None if max_memory is None else int(max_memory * 2**30),
    )


def _described(model: PathLike) -> tuple[ModelConfig, str]:
    """The config of a model and the dtype of its weights: that of the files, else what config.json says."""
    refuse_folder_of_gguf(model)
    if os.path.isdir(model) and not any(".safetensors" in name for name in os.listdir(model)):
        config = read_config(model)
        named = config.raw.get("dtype") or config.raw.get("torch_dtype")
        return config, named if named in ("bfloat16", "float16") else "float32"
    base = open_model(model)
    return base.config, base.dtype("model.embed_tokens.weight")
