"""Whole models on disk: a base with an adapter merged in, written as a Hugging Face directory."""

import math
import os
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

from longlora import _C
from longlora.decoder.config import read_config
from longlora.device import CPU, choose, host, send
from longlora.disk import flush, make_directory, read_json, write_json
from longlora.errors import UserError
from longlora.files.adapter import load
from longlora.files.huggingface import INDEX, SINGLE
from longlora.files.model_file import from_float32
from longlora.files.open_model import open_model
from longlora.files.safetensors import WIDTHS, write
from longlora.files.tokenizer import Tokenizer

Path = str | os.PathLike[str]
SHARD = 5_000_000_000  # bytes; a smaller model is one file


def merge(model: Path, adapter: Path, output_dir: Path, device: str = CPU) -> None:
    """Merge the adapter at path `adapter` into the model at path `model` and write a Hugging Face directory.

    Each tensor is W + scale B A in float32, rounded once to the base's dtype (float32 where the base is
    quantised). output_dir should not exist or be empty; it appears whole or not at all. device: cpu, cuda,
    cuda:1, ... or auto; reading and writing take most of the time on either. UserError if the two do not
    belong together or nothing can be written.
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
    make_directory(os.path.dirname(output_dir))
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


def save_merged(
    directory: Path,
    read: Callable[[str], Any],
    raw: dict[str, Any],
    tokenizer: Tokenizer | None = None,
    dtype: str | dict[str, str] = "float32",
) -> None:
    """Write a whole model as a Hugging Face directory, with one tensor in memory at a time.

    read(name) gives the float32 array of a tensor of the config `raw`. dtype: the dtype on disk, one name for
    all or a dict by tensor. A model below 5 GB is one file, a larger one is shards with an index. UserError
    when it cannot be written.
    """
    config = read_config(raw)
    shapes = config.tensor_shapes()
    dtypes = dtype if isinstance(dtype, dict) else dict.fromkeys(shapes, dtype)
    shards: list[list[tuple[str, int]]] = [[]]
    total = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * WIDTHS[dtypes[name]]
        if shards[-1] and sum(known for _, known in shards[-1]) + size > SHARD:
            shards.append([])
        shards[-1].append((name, size))
        total += size

    def rounded(name):
        return from_float32(np.asarray(read(name), np.float32), dtypes[name])

    make_directory(directory)
    files = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    )
    for file, shard in zip(files, shards, strict=True):
        write(
            os.path.join(directory, file), {name: (dtypes[name], shapes[name]) for name, _ in shard}, rounded
        )
    if len(shards) > 1:
        places = {name: file for file, shard in zip(files, shards, strict=True) for name, _ in shard}
        write_json(os.path.join(directory, INDEX), {"metadata": {"total_size": total}, "weight_map": places})
    elif os.path.exists(os.path.join(directory, INDEX)):
        os.unlink(os.path.join(directory, INDEX))  # of an earlier model; readers would follow it
    kept = dtypes["model.embed_tokens.weight"]
    other = ("dtype", "transformers_weights")  # the latter names the base's file of weights
    raw = {key: value for key, value in raw.items() if key not in other} | {"torch_dtype": kept}
    write_json(os.path.join(directory, "config.json"), raw)
    if tokenizer is not None:
        tokenizer.save(directory, config.max_position_embeddings)
