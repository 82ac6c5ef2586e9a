"""LoRA adapters in PEFT's format, with the embedding and norms that were trained beside them.

Tensors have the names of the Hugging Face model ("model.layers.0.self_attn.q_proj.lora_A.weight"). PEFT's own
prefix is added on writing and removed on reading.
"""

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import numpy as np

from longlora.decoder.config import ModelConfig, read_config
from longlora.decoder.lora import LoraConfig
from longlora.disk import make_directory, read_json, write_json
from longlora.errors import UserError
from longlora.files import base_folder, card
from longlora.files.model_file import ModelFile, some, to_float32
from longlora.files.safetensors import SafetensorsFile
from longlora.files.safetensors import save as save_tensors
from longlora.files.tokenizer import Tokenizer

Path = str | os.PathLike[str]
PREFIX = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Fields of adapter_config.json that do not change what a trained adapter computes.
FREE = (
    "peft_type",
    "task_type",
    "peft_version",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "runtime_config",
    "lora_dropout",
    "megatron_core",
    "ensure_weight_tying",  # the tensors show what was tied
    # How the weights were initialised: init_lora_weights says whether that matters.
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "qalora_group_size",  # of use_qalora
)
# Values of init_lora_weights that leave the base model as it is. The others (PiSSA, OLoRA, CorDA, LoftQ,
# LoRA-GA) train the adapter on changed weights, and PEFT changes the base again when it loads the adapter.
INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")
# Each other field changes what a layer computes, unless it has one of these values. A number is none of them:
# `layers_to_transform: 0` is a layer.
OFF: tuple[Any, ...] = (None, False, "", "none", [], {})
DEFAULTS = {"r": 8, "lora_alpha": 8}  # of PEFT, for a file that does not say


def save(
    directory: Path,
    tensors: Mapping[str, Any] | None,
    lora: LoraConfig,
    base: ModelFile,
    raw: dict[str, Any],
    tokenizer: Tokenizer | None = None,
    home: Path | None = None,
) -> None:
    """Write a PEFT adapter that AutoPeftModelForCausalLM.from_pretrained(directory) loads.

    tensors: name -> float32 array, exactly those of `lora.tensor_shapes`, or None to write everything but
    the weights; base: the model it was trained on;
    raw: the config dict with the new rope, written to the folder of files.base_folder unless it has the
    positions of the base; tokenizer: its files are written too; home: where the adapter will lie, if
    `directory` is renamed. A trained embedding that is also the head (tied) is written under both names with
    ensure_weight_tying, or PEFT would keep the untrained head. UserError when it cannot be written; each file
    is whole or absent.
    """
    config = read_config(raw)
    lora = lora.for_model(config)
    shapes, modules = lora.tensor_shapes(config), list(lora.modules_to_save)
    if tensors is not None:
        check(tensors, shapes, "tensors")
    tied = config.tie_word_embeddings and "model.embed_tokens.weight" in shapes
    if tied:
        modules = [*dict.fromkeys([*modules, "embed_tokens", "lm_head"])]
    path = os.path.abspath(base.path)
    extended = (config.rope, config.max_position_embeddings) != (
        base.config.rope,
        base.config.max_position_embeddings,
    )
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": path,
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": 0.0,
        "target_modules": list(lora.target_modules),
        "modules_to_save": modules or None,
        "use_rslora": lora.use_rslora,
        "init_lora_weights": True,
        "inference_mode": True,
        "revision": None,
        "ensure_weight_tying": tied,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": None,
        "layers_pattern": None,
    }
    make_directory(directory)
    if extended:
        described |= base_folder.fields(home or directory, path)
        write_json(os.path.join(base_folder.make(directory, path), base_folder.CONFIG), raw)
    if tensors is not None:
        out = {PREFIX + name: array for name, array in tensors.items()}
        if tied:
            out[PREFIX + "lm_head.weight"] = tensors["model.embed_tokens.weight"]
        of_base = {"format": "pt", "longlora_base": base.fingerprint()}
        save_tensors(os.path.join(directory, WEIGHTS), out, of_base)
    write_json(os.path.join(directory, CONFIG), described, sort_keys=True)
    note = base_folder.NOTE if extended else ""
    card.write(directory, card.adapter(base, directory, config.max_position_embeddings, described, note))
    if tokenizer is not None:
        tokenizer.save(directory, config.max_position_embeddings)


def load(
    directory: Path, base: ModelFile | None = None
) -> tuple[LoraConfig, dict[str, np.ndarray], dict[str, Any] | None]:
    """Read an adapter -> (LoraConfig, name -> float32 array, its config's dict or None).

    base: the model that the adapter should belong to. UserError if the adapter has another base, if a tensor
    is missing, extra or of the wrong shape, or if it uses a PEFT feature that is not supported.
    """
    lora, raw = describe(directory) if base is None else describe(directory, base.config, base.path)
    path = os.path.join(directory, WEIGHTS)
    file = SafetensorsFile(path)
    made_for = file.metadata.get("longlora_base")
    if base is not None and made_for is not None and made_for != base.fingerprint():
        raise UserError(f"{directory}: is an adapter for a base model other than {base.path}")
    foreign = [name for name in file.entries if not name.startswith(PREFIX)]
    if foreign:
        raise UserError(f"{path}: {len(foreign)} tensors lack PEFT's prefix {PREFIX!r}: {some(foreign)}")
    for name, (dtype, *_) in file.entries.items():
        if dtype not in ("float32", "bfloat16", "float16", "float64"):
            raise UserError(f"{path}: {name} has dtype {dtype}; supported are floating-point numbers")
    tensors = {
        name.removeprefix(PREFIX): to_float32(file.array(name), file.entries[name][0])
        for name in file.entries
    }
    config = base.config if base is not None else None if raw is None else read_config(raw)
    if config is not None:
        _tie(tensors, config, path)
        check(tensors, lora.tensor_shapes(config), path)
    for name, array in tensors.items():
        if not np.isfinite(array).all():
            raise UserError(f"{path}: {name} is not finite")
    return lora, tensors, raw


def describe(
    directory: Path, base: ModelConfig | None = None, base_path: Path | None = None
) -> tuple[LoraConfig, dict[str, Any] | None]:
    """Read what an adapter says of itself, and no tensor -> (LoraConfig, its config's dict or None).

    base: the config of the model at base_path that the adapter should belong to. UserError as in `load`.
    """
    lora = read_lora(directory)
    folder = base_folder.find(directory)
    raw = None
    if folder is not None:
        path = os.path.join(folder, base_folder.CONFIG)
        raw = read_json(path)
        # It says how the base was stored in training. Here the base is read, whatever its storage.
        raw.pop("quantization_config", None)
        extended = read_config(raw, path)
        if base is not None and extended.tensor_shapes() != base.tensor_shapes():
            raise UserError(
                f"{directory}: is an adapter for a base model other than {base_path}: "
                "its config has other shapes"
            )
        base = base or extended
    if base is None:
        return lora, raw
    try:
        lora = lora.for_model(base)
    except UserError as error:
        raise UserError(f"{os.path.join(directory, CONFIG)}: {error}") from None
    if base.tie_word_embeddings and "embed_tokens" in lora.modules_to_save:  # the head is the embedding
        lora = replace(lora, modules_to_save=tuple(x for x in lora.modules_to_save if x != "lm_head"))
    return lora, raw


def newest_checkpoint(directory: Path) -> str:
    """What an error adds about the directory of a run that was stopped, or "": the run's model is in a
    checkpoint.
    """
    names = os.listdir(directory) if os.path.isdir(directory) else []
    steps = [int(found[1]) for found in (re.fullmatch(r"checkpoint-(\d+)", name) for name in names) if found]
    if not steps:
        return ""
    return f"; a run was stopped here, its newest checkpoint is {directory}/checkpoint-{max(steps)}"


def read_lora(directory: Path) -> LoraConfig:
    """Read the LoraConfig in a PEFT adapter's adapter_config.json. UserError names what is not supported."""
    path = os.path.join(directory, CONFIG)
    if not os.path.exists(directory):
        raise UserError(f"{directory}: no such directory; wanted an adapter")
    if not os.path.exists(path):
        raise UserError(f"{directory}: is not an adapter: it has no {CONFIG}{newest_checkpoint(directory)}")
    found = read_json(path)
    if found.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type {found.get('peft_type')!r} is not supported; supported is LORA")
    read = [field.name for field in fields(LoraConfig)]
    for key, value in found.items():
        if key == "init_lora_weights":
            if value is not None and value not in INITS:
                raise UserError(
                    f"{path}: init_lora_weights {value!r} changes the base model's weights, which is not "
                    "supported; save the adapter again with PEFT's path_initial_model_for_weight_conversion"
                )
        elif key not in (*FREE, base_folder.KEY, *read) and (type(value) in (int, float) or value not in OFF):
            raise UserError(f"{path}: {key} {value!r} is not supported; supported is an adapter without it")
    given = {**DEFAULTS, **{name: found[name] for name in read if found.get(name) is not None}}
    # PEFT writes full names for tied modules and for "all-linear". The tensors show later whether every layer
    # has the module.
    given["modules_to_save"] = _last(found.get("modules_to_save"), "model.embed_tokens")
    given["target_modules"] = _last(found.get("target_modules"), "model.layers.")
    try:
        return LoraConfig(**given)
    except (UserError, TypeError) as error:
        raise UserError(f"{path}: {error}") from None


def _last(names, prefix):
    """Shorten the names that start with `prefix` to their last part, and drop duplicates."""
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        return names
    return tuple(
        dict.fromkeys(name.rpartition(".")[2] if name.startswith(prefix) else name for name in names)
    )


def _tie(tensors, config, path):
    """Drop PEFT's copy of a tied embedding under the head's name. UserError if they differ."""
    head, embedding = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    if not config.tie_word_embeddings or head is None and embedding is None:
        return
    if not np.array_equal(head, embedding):  # None, for one that is missing, equals no array
        raise UserError(
            f"{path}: the base model ties its head to the embedding, but this adapter was trained without "
            "ensure_weight_tying; this is not supported"
        )
    del tensors["lm_head.weight"]


def check(tensors: Mapping[str, Any], wanted: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Stop unless `tensors` (name -> array) are exactly `wanted` (name -> shape). `where` is for messages."""
    missing, extra = (
        [name for name in wanted if name not in tensors],
        [name for name in tensors if name not in wanted],
    )
    if missing:
        raise UserError(f"{where}: {len(missing)} tensors of the adapter are missing: {some(missing)}")
    if extra:
        raise UserError(f"{where}: {len(extra)} tensors do not belong to this adapter: {some(extra)}")
    for name, shape in wanted.items():
        if tuple(tensors[name].shape) != tuple(shape):
            raise UserError(
                f"{where}: {name} should have shape {list(shape)}, got {list(tensors[name].shape)}"
            )


def fingerprint(lora: LoraConfig, tensors: Mapping[str, np.ndarray], config: ModelConfig) -> str:
    """Identify an adapter by what it computes: its scale, its positions and every value of its tensors."""
    digest = hashlib.sha256(repr((lora.scale, config.rope, config.max_position_embeddings)).encode())
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        digest.update(f"{name} {list(array.shape)}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()
