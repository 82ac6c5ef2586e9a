"""A base with an adapter merged in: read tensor by tensor, written as a Hugging Face directory or as GGUF."""

import contextlib
import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from longlora import _C, disk
from longlora.decoder.config import read_config
from longlora.device import CPU, choose, host, send
from longlora.disk import make_directory, parse_json, read_bytes, write_bytes, write_json
from longlora.errors import UserError, printable
from longlora.files import card, tokenizer_to_gguf
from longlora.files.adapter import load
from longlora.files.gguf_writer import DTYPES, OF_BASE, GgufWriter, sampling
from longlora.files.huggingface import GENERATION, INDEX, SINGLE
from longlora.files.model_file import narrowed
from longlora.files.open_model import open_model
from longlora.files.safetensors import WIDTHS, write
from longlora.files.tokenizer import Tokenizer
from longlora.files.tokenizer_files import CHAT_TEMPLATE

Path = str | os.PathLike[str]
FORMATS = ("huggingface", "gguf")
WORDS = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}  # names of dtypes -> those of the package
SHARD = 5_000_000_000  # bytes; a smaller model is one file


class Merged:
    """The tensors of `base`, an opened model, with an adapter merged in: W + scale B A in float32.

    lora, tensors: as adapter.load returns them. It is read like the model itself: `path`, names() and
    read(name, out).
    """

    def __init__(self, base: Any, lora: Any, tensors: dict[str, np.ndarray], device: str = CPU):
        self.path, self.names = base.path, base.names
        self._base, self._lora, self._tensors, self._device = base, lora, tensors, device

    def read(self, name: str, out: Any = None) -> Any:
        """Read tensor `name` -> `out`, an array of any float dtype, by default a new float32 ndarray."""
        weight, module = self._tensors.get(name), name.removesuffix(".weight")
        if weight is None and f"{module}.lora_A.weight" not in self._tensors:
            return self._base.read(name, out)
        if weight is None:
            weight = self._base.read(name)
            a, b = (self._tensors[f"{module}.lora_{which}.weight"] for which in "AB")
            if self._device == CPU:
                weight += np.float32(self._lora.scale) * (b @ a)
            else:
                there = send(weight, self._device)
                _C.matmul(there, send(b, self._device), send(a, self._device), self._lora.scale, 1.0)
                weight = host(there)
        if out is None:
            return weight
        out.copy_(weight)
        return out


def merge(
    model: Path,
    adapter: Path | None,
    output_dir: Path,
    device: str = CPU,
    format: str = "huggingface",
    dtype: str = "auto",
) -> str:
    """Merge the adapter at path `adapter` into the model at path `model` and write one model -> its path.

    Each tensor is W + scale B A in float32, rounded once. Without an adapter the base itself is written.
    format: "huggingface", a directory, or "gguf", a file model-DTYPE.gguf in output_dir. dtype: f32, f16,
    bf16, with gguf also q8_0, or auto: that of the base (float32 where the base is quantised). output_dir
    should not exist or be empty; a new one appears whole or not at all. device: cpu, cuda, cuda:1, ... or
    auto; reading and writing take most of the time on either. UserError if the two do not belong together or
    nothing can be written.
    """
    device, _ = choose(device)
    if format not in FORMATS:
        raise UserError(f"format should be one of {', '.join(FORMATS)}, got {format!r}")
    if dtype not in ("auto", *DTYPES):
        raise UserError(f"dtype should be one of auto, {', '.join(DTYPES)}, got {dtype!r}")
    base = open_model(model)
    source: Any = base
    raw: dict[str, Any] = base.config.raw
    if adapter is not None:
        lora, tensors, extended = load(adapter, base)
        source, raw = Merged(base, lora, tensors, device), extended or raw
    write = _gguf if format == "gguf" else _huggingface
    return write(base, adapter, source, raw, output_dir, dtype)


def _huggingface(base, adapter, source, raw, output_dir, dtype):
    """Write a Hugging Face directory -> its path."""
    if dtype == "q8_0":
        raise UserError("dtype q8_0 is for format gguf; a Hugging Face directory takes f32, f16 and bf16")
    tokenizer, beside = base.tokenizer() if base.has_tokenizer() else None, base.beside()
    template = _template(adapter)
    if tokenizer is not None and template is not None:
        tokenizer.put(CHAT_TEMPLATE, template)
    dtypes = {name: base.dtype(name) if dtype == "auto" else WORDS[dtype] for name in base.names()}
    shapes, name = base.config.tensor_shapes(), _name(output_dir)
    size = sum(math.prod(shapes[tensor]) * WIDTHS[dtype] for tensor, dtype in dtypes.items())
    with _appearing(output_dir, size) as aside:
        save_merged(aside, source.read, raw, tokenizer, dtypes, beside)
        kept = dtypes["model.embed_tokens.weight"]
        card.write(aside, card.merged(base, adapter, read_config(raw, base.path), name, kept, None))
    return os.fspath(output_dir)


def _gguf(base, adapter, source, raw, output_dir, dtype):
    """Write a GGUF file into a new directory -> its path."""
    if not base.has_tokenizer():
        raise UserError(f"{base.path}: has no tokenizer; a GGUF file needs one")
    config, tokenizer, template = read_config(raw, base.path), base.tokenizer(), _template(adapter)
    if template is not None:
        tokenizer.put(CHAT_TEMPLATE, template)
    beside = base.beside().get(GENERATION)
    generation = parse_json(beside, GENERATION) if beside is not None else {}
    keys = (
        tokenizer_to_gguf.kept(base.metadata, base.path)
        if base.kind == "gguf"
        else tokenizer_to_gguf.keys(tokenizer, config, generation)
    )
    if template is not None:
        keys["tokenizer.chat_template"], _ = tokenizer.chat_templates()["default"]
    if dtype == "auto":
        dtype = OF_BASE[base.dtype("model.embed_tokens.weight")]
    name, file = _name(output_dir), f"model-{dtype}.gguf"
    writer = GgufWriter(config, keys, dtype, name, sampling(generation))
    with _appearing(output_dir, writer.size) as aside:
        writer.write(os.path.join(aside, file), source.read)
        card.write(aside, card.merged(base, adapter, config, name, dtype, file))
    return os.path.join(output_dir, file)


def _template(adapter):
    """The chat template that the adapter was trained with, bytes, or None."""
    path = None if adapter is None else os.path.join(adapter, CHAT_TEMPLATE)
    if path is None or not os.path.isfile(path):
        return None
    content = read_bytes(path)
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 at byte {error.start}") from None
    return content


def _name(output_dir):
    """The name of the model: that of its directory."""
    return printable(os.path.basename(os.path.realpath(output_dir)))


@contextlib.contextmanager
def _appearing(output_dir, size):
    """Give a directory to write a model of `size` bytes to; at the end it is at output_dir.

    A new directory appears whole by one rename. An empty one that exists may be a mount, a link or the
    shell's own, and its parent read-only: it stays, and files move into it, config.json last.
    """
    where = os.path.abspath(output_dir)
    final = os.path.realpath(where)  # a link may lead to a directory that does not exist yet
    there, name = os.path.isdir(final), os.path.basename(final)
    parent = final if there else os.path.dirname(final)
    aside: str | None = None
    moved: list[str] = []
    try:
        os.makedirs(parent, exist_ok=True)
        disk.sweep(parent, re.escape(name))
        if os.path.lexists(final) and (not there or set(os.listdir(final)) - {"lost+found"}):
            raise UserError(f"{where}: exists and is not an empty directory")
        free = disk.free(parent)
        if free is not None and size > free:
            raise UserError(f"{where}: needs {size:,} bytes, the disk has {free:,} free")
        handle, aside = disk.make_aside(parent, name, directory=True)
        with disk.closing(handle):
            yield aside
            if there:
                for file in sorted(os.listdir(aside), key=lambda file: (file == "config.json", file)):
                    os.rename(os.path.join(aside, file), os.path.join(final, file))
                    moved.append(os.path.join(final, file))
                os.rmdir(aside)
            else:
                os.rename(aside, final)
            aside = None
            disk.flush_names(parent)
    except OSError as error:
        raise UserError(f"{where}: cannot be written: {error.strerror or error}") from None
    finally:
        if aside is not None:
            for path in (aside, *moved):
                disk.remove(path)


def save_merged(
    directory: Path,
    read: Callable[[str], Any] | None,
    raw: dict[str, Any],
    tokenizer: Tokenizer | None = None,
    dtype: str | dict[str, str] = "float32",
    beside: Mapping[str, bytes] | None = None,
) -> None:
    """Write a whole model as a Hugging Face directory, with one tensor in memory at a time.

    read(name) gives the float32 array of a tensor of the config `raw`. Without read everything is written but
    the weights. dtype: the dtype on disk, one name for all or a dict by tensor. beside: other files, name ->
    content. A model below 5 GB is one file, a larger one is shards with an index. UserError when it cannot be
    written.
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
        assert read is not None
        return narrowed(np.asarray(read(name), np.float32), dtypes[name], name)

    make_directory(directory)
    files = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    )
    for file, shard in zip(files, shards, strict=True) if read is not None else ():
        write(
            os.path.join(directory, file), {name: (dtypes[name], shapes[name]) for name, _ in shard}, rounded
        )
    if len(shards) > 1:
        places = {name: file for file, shard in zip(files, shards, strict=True) for name, _ in shard}
        write_json(os.path.join(directory, INDEX), {"metadata": {"total_size": total}, "weight_map": places})
    elif os.path.exists(os.path.join(directory, INDEX)):
        disk.unlink(os.path.join(directory, INDEX))  # of an earlier model; readers would follow it
    kept = dtypes["model.embed_tokens.weight"]
    other = ("dtype", "transformers_weights")  # the latter names the base's file of weights
    raw = {key: value for key, value in raw.items() if key not in other} | {"torch_dtype": kept}
    write_json(os.path.join(directory, "config.json"), raw)
    if tokenizer is not None:
        tokenizer.save(directory, config.max_position_embeddings)
    for name, content in (beside or {}).items():
        write_bytes(os.path.join(directory, name), content)
