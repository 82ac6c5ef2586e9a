"""Small PEFT adapters for the model of tests/tiny.py, written without our own code."""

import json

import numpy as np
from safetensors.numpy import save_file

from longlora.decoder.lora import LoraConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SMALL = LoraConfig(r=2, lora_alpha=8, target_modules=("q_proj",), modules_to_save=("model.norm",))
QUERY = "model.layers.{}.self_attn.q_proj.lora_{}.weight"
NORM = "model.norm.weight"
# The tensors of SMALL.
SHAPES = {
    QUERY.format(layer, side): shape for layer in (0, 1) for side, shape in (("A", (2, 32)), ("B", (32, 2)))
}
SHAPES |= {NORM: (32,)}


def numbers(shapes=SHAPES, dtype=np.float32):
    """Tensors of small integers, which every dtype holds."""
    return {
        name: np.arange(np.prod(shape)).reshape(shape).astype(dtype) % 7 for name, shape in shapes.items()
    }


def described(path, **fields):
    """Write SMALL as adapter_config.json; `fields` replace its fields, ... leaves one out. Returns `path`."""
    path.mkdir(exist_ok=True)
    given = dict(
        peft_type="LORA", r=2, lora_alpha=8, target_modules=["q_proj"], modules_to_save=["model.norm"]
    )
    given = {name: value for name, value in (given | fields).items() if value is not ...}
    (path / CONFIG).write_text(json.dumps(given))
    return path


def written(path, tensors=None, metadata=None, **fields):
    """Write an adapter with these tensors or those of `numbers`. fields: see `described`. Returns `path`."""
    named = {f"base_model.model.{name}": array for name, array in (tensors or numbers()).items()}
    save_file(named, described(path, **fields) / WEIGHTS, metadata)
    return path
