"""`longlora inspect PATH` describes a model, an adapter or a checkpoint."""

import math
import os
from typing import Any

from longlora.decoder.config import read_config
from longlora.disk import read_json
from longlora.errors import UserError, printable
from longlora.files import adapter, base_folder
from longlora.files.open_model import open_model, refuse_folder_of_gguf
from longlora.files.safetensors import SafetensorsFile
from longlora.training.resume import STATE


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Describe what is at `path` -> a dict for JSON.

    "kind" is "model", "adapter" or "checkpoint"; other keys give sizes, rope and the trained parameters. Only
    headers are read. UserError if `path` is none of the three, or damaged.
    """
    path = os.fspath(path)
    if os.path.exists(os.path.join(path, adapter.CONFIG)):
        return _adapter(path)
    refuse_folder_of_gguf(path)
    if os.path.isdir(path) and not os.path.exists(os.path.join(path, "config.json")):
        hint = adapter.newest_checkpoint(path)
        raise UserError(f"{path}: is neither a model (config.json) nor an adapter ({adapter.CONFIG}){hint}")
    model = open_model(path)
    count = sum(math.prod(model.shape(name)) for name in model.names())
    dtypes = sorted({model.storage(name) for name in model.names()})
    kind = "checkpoint" if os.path.exists(os.path.join(path, STATE)) else "model"
    return {
        "kind": kind,
        "path": path,
        "format": model.kind,
        **_step(path),
        **_config(model.config),
        "parameters": count,
        "dtypes": dtypes,
        "bytes": _bytes(path),
        "fingerprint": model.fingerprint(),
    }


def _adapter(path):
    lora = adapter.read_lora(path)
    file = SafetensorsFile(os.path.join(path, adapter.WEIGHTS))
    trained: dict[str, int] = {}
    for name, (_, shape, _, _) in file.entries.items():
        kind = _kind(name)
        trained[kind] = trained.get(kind, 0) + math.prod(shape)
    folder = base_folder.find(path)
    config = _config(read_config(folder)) if folder is not None else {}
    if config.get("tied_embeddings"):
        trained.pop("head", None)  # the tied embedding under its second name
    found = read_json(os.path.join(path, adapter.CONFIG))
    return {
        "kind": "checkpoint" if os.path.exists(os.path.join(path, STATE)) else "adapter",
        "path": path,
        "format": "peft",
        "base": found.get(base_folder.KEY) or found.get("base_model_name_or_path"),
        **_step(path),
        **config,
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "target_modules": list(lora.target_modules),
        "modules_to_save": list(lora.modules_to_save),
        "trained": trained,
        "bytes": _bytes(path),
        "base_fingerprint": file.metadata.get("longlora_base"),
    }


def _kind(name):
    if ".lora_" in name:
        return "lora"
    if "embed_tokens" in name:
        return "embedding"
    return "head" if "lm_head" in name else "norm"


def _step(path):
    state = os.path.join(path, STATE)
    if not os.path.exists(state):
        return {}
    found = read_json(state)
    return {"step": found.get("global_step", found.get("step"))}


def _config(config):
    rope, length = config.rope, config.max_position_embeddings
    arithmetic = f"{rope.type}, theta {rope.theta:g}"
    if rope.type != "default":
        arithmetic += f", factor {rope.factor:g}, pretrained at {rope.original_length}"
    return {
        "family": config.family,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "heads": config.num_attention_heads,
        "key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "tied_embeddings": config.tie_word_embeddings,
        "positions": length,
        "rope": arithmetic,
    }


def _bytes(path):
    if os.path.isfile(path):
        return os.path.getsize(path)
    return sum(
        os.path.getsize(os.path.join(path, name))
        for name in os.listdir(path)
        if name.endswith(".safetensors")
    )


def text(described):
    """The dict of `describe` as lines for a terminal."""

    def shown(value):
        if isinstance(value, dict):
            return ", ".join(f"{key} {number:,}" for key, number in value.items())
        return (
            printable(", ".join(map(str, value)))
            if isinstance(value, list)
            else f"{value:,}"
            if type(value) is int
            else printable(str(value))  # what a file says
        )

    width = max(map(len, described))
    known = {key.replace("_", " "): value for key, value in described.items() if value is not None}
    return "\n".join(f"{key:<{width}}  {shown(value)}" for key, value in known.items())
