"""LoRA adapters in PEFT's format, with the trained embedding and norms in them, and models with the adapter merged in.

Names of tensors are those of the Hugging Face model ("model.layers.0.self_attn.q_proj.lora_A.weight"); PEFT's own prefix is put
on when writing and taken off when reading.
"""

import json
import math
import os
import shutil
import tempfile
from dataclasses import dataclass, fields, replace

import numpy as np

from longlora import _C
from longlora.decoder.config import read_config, read_json
from longlora.device import CPU, choose, host, send
from longlora.errors import UserError
from longlora.files.open_model import INDEX, SINGLE, from_float32, open_model, some, to_float32
from longlora.files.safetensors import WIDTHS, SafetensorsFile, flush, write, write_json, write_text
from longlora.files.safetensors import save as save_tensors

PREFIX = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WHOLE = (
    "embed_tokens",
    "lm_head",
    "input_layernorm",
    "post_attention_layernorm",
    "norm",
    "q_norm",
    "k_norm",
    "model.norm",
)
# What PEFT can have switched on that changes the function, and the value that leaves it off.
PLAIN = {
    "bias": "none",
    "fan_in_fan_out": False,
    "use_dora": False,
    "use_qalora": False,
    "lora_bias": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layers_to_transform": None,
    "layers_pattern": None,
    "layer_replication": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "exclude_modules": None,
    "megatron_config": None,
    "use_bdlora": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "kasa_config": None,
}
SHARD = 5_000_000_000  # bytes; a smaller model is one file


@dataclass(frozen=True)
class LoraConfig:
    """What is trained, in PEFT's words. The defaults are LongLoRA's (section 3.3): LoRA on attention, embedding, norms."""

    r: int = 8
    lora_alpha: float = 16
    target_modules: tuple = ("q_proj", "k_proj", "v_proj", "o_proj")
    modules_to_save: tuple = ("embed_tokens", "input_layernorm", "post_attention_layernorm", "norm")
    use_rslora: bool = False

    def __post_init__(self):
        def number(value, kinds):
            return isinstance(value, kinds) and not isinstance(value, bool) and 0 < value < 1 << 20

        if not number(self.r, int):
            raise UserError(f"r should be an integer above 0, got {self.r!r}")
        if not number(self.lora_alpha, (int, float)):
            raise UserError(f"lora_alpha should be a number above 0, got {self.lora_alpha!r}")
        for field, known in (("target_modules", LINEARS), ("modules_to_save", WHOLE)):
            value = getattr(self, field)
            value = (
                ()
                if value is None
                else LINEARS
                if value == "all-linear" and field == "target_modules"
                else value
            )
            if not isinstance(value, (list, tuple, set)) or any(name not in known for name in value):
                raise UserError(f"{field} should be a list of {', '.join(known)}, got {value!r}")
            object.__setattr__(self, field, tuple(value))

    @property
    def scale(self):
        """The factor on B A: alpha / r, or alpha / sqrt(r) with rsLoRA."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def tensor_shapes(self, config):
        """-> dict of every trained tensor of a model of `config`, name -> shape.

        As in PEFT, an entry of modules_to_save means each module whose name ends in it: "norm" is all norms.
        """
        shapes = {}
        for name, shape in config.tensor_shapes().items():
            module, _, kind = name.rpartition(".")
            if kind != "weight":
                continue
            if module.rpartition(".")[2] in self.target_modules:
                shapes[f"{module}.lora_A.weight"], shapes[f"{module}.lora_B.weight"] = (
                    (self.r, shape[1]),
                    (shape[0], self.r),
                )
            elif module.endswith(self.modules_to_save):
                shapes[name] = shape
        if config.tie_word_embeddings and "lm_head" in self.modules_to_save:
            shapes["model.embed_tokens.weight"] = (config.vocab_size, config.hidden_size)
        return shapes


def save(directory, tensors, lora, base, raw, tokenizer=None):
    """Write a PEFT adapter that PeftModel.from_pretrained(base, directory) loads.

    tensors: dict of name -> float32 array, exactly those of `lora.tensor_shapes`; base: the Checkpoint trained on; raw: the
    config dict with the new rope, written as config.json; tokenizer: its files go beside. A trained embedding that is also
    the head (tied) is written under both names, with ensure_weight_tying: PEFT would else go on using the untrained head.
    UserError when it cannot be written; each file is whole or absent.
    """
    config = read_config(raw)
    check(tensors, lora.tensor_shapes(config), "tensors")
    modules = list(lora.modules_to_save)
    out = {PREFIX + name: array for name, array in tensors.items()}
    tied = config.tie_word_embeddings and "model.embed_tokens.weight" in tensors
    if tied:
        modules = [*dict.fromkeys([*modules, "embed_tokens", "lm_head"])]
        out[PREFIX + "lm_head.weight"] = tensors["model.embed_tokens.weight"]
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": os.path.abspath(base.path),
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
        **{
            key: PLAIN[key]
            for key in (
                "bias",
                "fan_in_fan_out",
                "use_dora",
                "rank_pattern",
                "alpha_pattern",
                "layers_to_transform",
                "layers_pattern",
            )
        },
    }
    _directory(directory)
    save_tensors(os.path.join(directory, WEIGHTS), out, {"format": "pt", "longlora_base": base.fingerprint()})
    write_json(os.path.join(directory, CONFIG), described, sort_keys=True)
    write_json(os.path.join(directory, "config.json"), raw)
    write_text(
        os.path.join(directory, "README.md"),
        CARD.format(
            base=json.dumps(described["base_model_name_or_path"]),
            length=config.max_position_embeddings,
            r=lora.r,
            alpha=lora.lora_alpha,
            targets=", ".join(lora.target_modules),
            modules=", ".join(modules) or "nothing",
        ),
    )
    if tokenizer is not None:
        tokenizer.save(directory)


CARD = """---
library_name: peft
base_model: {base}
pipeline_tag: text-generation
tags:
- lora
- longlora
---
Context of {length} tokens, by LongLoRA (arXiv 2309.12307) with `longlora`. LoRA r = {r}, alpha = {alpha} on {targets}; trained
whole and stored here: {modules}.

The longer context is in this directory's `config.json`, which PEFT does not read by itself:

    config = AutoConfig.from_pretrained(adapter)
    model = AutoModelForCausalLM.from_pretrained(base, config=config)
    model = PeftModel.from_pretrained(model, adapter)

Servers that do not take `modules_to_save` (vLLM, llama.cpp) need the merged model: `longlora merge`.
"""


def load(directory, base=None):
    """Read an adapter written by `save` or by PEFT -> (LoraConfig, dict of name -> float32 array, config dict or None).

    base: the Checkpoint it should be for. UserError for an adapter of another base, for missing, extra or misshapen
    tensors, and for PEFT features that are not supported, each by name. The config dict is the directory's config.json.
    """
    lora = read_lora(directory)
    path = os.path.join(directory, WEIGHTS)
    file = SafetensorsFile(path)
    made_for = file.metadata.get("longlora_base")
    if base is not None and made_for is not None and made_for != base.fingerprint():
        raise UserError(f"{directory}: is an adapter for another base model than {base.path}")
    foreign = [name for name in file.entries if not name.startswith(PREFIX)]
    if foreign:
        raise UserError(f"{path}: {len(foreign)} tensors lack PEFT's prefix {PREFIX!r}: {some(foreign)}")
    tensors = {
        name.removeprefix(PREFIX): to_float32(file.array(name), file.entries[name][0])
        for name in file.entries
    }
    described = os.path.join(directory, "config.json")
    raw = read_json(described) if os.path.exists(described) else None
    config = base.config if base is not None else None if raw is None else read_config(described)
    if (
        raw is not None
        and base is not None
        and read_config(described).tensor_shapes() != config.tensor_shapes()
    ):
        raise UserError(
            f"{directory}: is an adapter for another base model than {base.path}: its config has other shapes"
        )
    if config is not None:
        lora = _tie(lora, tensors, config, path)
        check(tensors, lora.tensor_shapes(config), path)
    for name, array in tensors.items():
        if not np.isfinite(array).all():
            raise UserError(f"{path}: {name} is not finite")
    return lora, tensors, raw


def read_lora(directory):
    """The LoraConfig in a PEFT adapter's adapter_config.json; UserError names what is not supported."""
    path = os.path.join(directory, CONFIG)
    if not os.path.exists(path):
        raise UserError(f"{directory}: is not an adapter: it has no {CONFIG}")
    found = read_json(path)
    if found.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type {found.get('peft_type')!r} is not supported; supported is LORA")
    for key, plain in PLAIN.items():
        if found.get(key) and found[key] != plain:
            raise UserError(f"{path}: {key} {found[key]!r} is not supported; supported is {plain!r}")
    given = {
        field.name: found[field.name] for field in fields(LoraConfig) if found.get(field.name) is not None
    }
    # PEFT writes full names for what it tied and for "all-linear"; whether all layers have it shows in the tensors.
    given["modules_to_save"] = _last(found.get("modules_to_save") or (), "model.embed_tokens")
    given["target_modules"] = _last(found.get("target_modules") or (), "model.layers.")
    try:
        return LoraConfig(**given)
    except (UserError, TypeError) as error:
        raise UserError(f"{path}: {error}") from None


def _last(names, prefix):
    """The last part of the names that start with `prefix`, the others as they are, each once."""
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        return names
    return tuple(
        dict.fromkeys(name.rpartition(".")[2] if name.startswith(prefix) else name for name in names)
    )


def _tie(lora, tensors, config, path):
    """With tied embeddings there is one tensor: PEFT's copy under the head's name is dropped, if it is equal -> LoraConfig."""
    head, embedding = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    if not config.tie_word_embeddings or head is None and embedding is None:
        return lora
    if head is None or embedding is None or not np.array_equal(head, embedding):
        raise UserError(
            f"{path}: the base model ties its head to the embedding, this adapter does not (trained without "
            "ensure_weight_tying); it is not supported"
        )
    del tensors["lm_head.weight"]
    return replace(lora, modules_to_save=tuple(name for name in lora.modules_to_save if name != "lm_head"))


def check(tensors, wanted, where):
    missing, extra = (
        [name for name in wanted if name not in tensors],
        [name for name in tensors if name not in wanted],
    )
    if missing:
        raise UserError(f"{where}: {len(missing)} tensors of the adapter are missing: {some(missing)}")
    if extra:
        raise UserError(f"{where}: {len(extra)} tensors are not of this adapter: {some(extra)}")
    for name, shape in wanted.items():
        if tuple(tensors[name].shape) != tuple(shape):
            raise UserError(
                f"{where}: {name} should have shape {list(shape)}, got {list(tensors[name].shape)}"
            )


def merge(model, adapter, output_dir, device=CPU):
    """Write the model at path `model` with the adapter at path `adapter` merged in as a Hugging Face directory.

    W + scale B A in float32, rounded once to the base's dtype (float32 where the base is quantised), tensor by tensor.
    output_dir should not exist or be empty; it appears whole or not at all. device: cpu, cuda, cuda:1, ..., auto; a GPU has little to
    do here beside reading and writing.
    """
    device, _ = choose(device)
    base = open_model(model)
    lora, tensors, raw = load(adapter, base)
    if os.path.exists(output_dir) and (not os.path.isdir(output_dir) or os.listdir(output_dir)):
        raise UserError(f"{output_dir}: exists and is not an empty directory")

    def read(name):
        if name in tensors:
            return tensors[name]
        weight = base.read(name)
        module = name.removesuffix(".weight")
        if f"{module}.lora_A.weight" in tensors:
            a, b = (tensors[f"{module}.lora_{which}.weight"] for which in "AB")
            if device == CPU:
                weight += np.float32(lora.scale) * (b @ a)
            else:
                out = send(weight, device)
                _C.matmul(out, send(b, device), send(a, device), lora.scale, 1.0)
                weight = host(out)
        return weight

    output_dir = os.path.abspath(output_dir)
    _directory(os.path.dirname(output_dir))
    aside = tempfile.mkdtemp(
        prefix=f".{os.path.basename(output_dir)}.", suffix=".partial", dir=os.path.dirname(output_dir)
    )
    try:
        dtypes = {name: base.dtype(name) for name in base.names()}
        save_merged(
            aside, read, raw or base.config.raw, base.tokenizer() if base.has_tokenizer() else None, dtypes
        )
        generation = os.path.join(base.path, "generation_config.json")
        if os.path.exists(generation):
            write_json(os.path.join(aside, "generation_config.json"), read_json(generation))
        os.chmod(aside, 0o755)
        os.replace(aside, output_dir)
        flush(os.path.dirname(output_dir))
    except OSError as error:
        raise UserError(f"{output_dir}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def save_merged(directory, read, raw, tokenizer=None, dtype="float32"):
    """Write a whole model as a Hugging Face directory, one tensor in memory at a time.

    read(name) -> float32 array of each tensor of `raw`'s config; dtype: what they are rounded to, a name or a dict by
    tensor. One file below 5 GB, else shards with an index. UserError when it cannot be written.
    """
    shapes = read_config(raw).tensor_shapes()
    dtypes = dtype if isinstance(dtype, dict) else dict.fromkeys(shapes, dtype)
    shards, total = [[]], 0
    for name, shape in shapes.items():
        size = math.prod(shape) * WIDTHS[dtypes[name]]
        if shards[-1] and sum(known for _, known in shards[-1]) + size > SHARD:
            shards.append([])
        shards[-1].append((name, size))
        total += size

    def rounded(name):
        return from_float32(np.asarray(read(name), np.float32), dtypes[name])

    _directory(directory)
    files = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    )
    for file, shard in zip(files, shards):
        write(
            os.path.join(directory, file), {name: (dtypes[name], shapes[name]) for name, _ in shard}, rounded
        )
    if len(shards) > 1:
        places = {name: file for file, shard in zip(files, shards) for name, _ in shard}
        write_json(os.path.join(directory, INDEX), {"metadata": {"total_size": total}, "weight_map": places})
    elif os.path.exists(os.path.join(directory, INDEX)):
        os.unlink(os.path.join(directory, INDEX))  # of an earlier model: readers would follow it
    kept = dtypes["model.embed_tokens.weight"]
    raw = {key: value for key, value in raw.items() if key != "dtype"} | {"torch_dtype": kept}
    write_json(os.path.join(directory, "config.json"), raw)
    if tokenizer is not None:
        tokenizer.save(directory)


def _directory(path):
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be made: {error.strerror or error}") from None
