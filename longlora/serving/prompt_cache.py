"""Saved prompt caches: a safetensors file with tokens, and keys and values of each layer.

Its metadata name the model, the adapter and the dtypes that made it, and `load` takes no other. Each tensor
has a checksum.
"""

import os
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from longlora import _C, disk
from longlora.device import host
from longlora.errors import UserError
from longlora.files.model_file import finite
from longlora.files.safetensors import SafetensorsFile, release, write
from longlora.serving.engine import Engine

Path = str | os.PathLike[str]
FORMAT = "longlora prompt cache 2"
CHECKSUMS = "checksums"  # uint8 [N,4]: the CRC-32 of each other tensor, in the order of their names
BLOCK = 4096  # tokens of a layer that are checked and copied at a time


def _layers(engine: Engine, tokens: int) -> dict[str, Any]:
    """Name -> the Tensor [tokens,K,D] of row 0 of the cache: keys and values of each layer."""
    found = {}
    for i, (keys, values) in enumerate(engine.cache.layers):
        found[f"layers.{i}.keys"], found[f"layers.{i}.values"] = keys[0, :tokens], values[0, :tokens]
    return found


def check(path: Path, engine: Engine) -> None:
    """UserError if the engine's cache cannot be in a file."""
    if engine.cache.limit is None:
        raise UserError(f"{path}: a streaming session forgets what it reads; its cache cannot be in a file")


def rehearse(path: Path) -> None:
    """UserError if no file can be written at `path`: a long text would be read for nothing."""
    folder, name = os.path.split(os.path.abspath(path))
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made: {error.strerror or error}") from None
    with disk.passing(folder, name):
        pass


def save(path: Path, engine: Engine, identity: Mapping[str, str]) -> int:
    """Write row 0 of the engine's cache to the file `path` -> its tokens. identity: see open.Opened.

    UserError if the row is empty, or if the file cannot be written; what was there is then untouched.
    """
    check(path, engine)
    tokens = engine.tokens(0)
    if not len(tokens):
        raise UserError(f"{path}: the cache is empty, there is nothing to save")
    layers = _layers(engine, len(tokens))
    sums: dict[str, int] = {}

    def read(name: str) -> np.ndarray:
        if name == CHECKSUMS:  # the writer asks for it last: its elements are the narrowest
            return np.array([sums[name] for name in sorted(sums)], "<u4")
        array = tokens
        if name != "tokens":
            x = layers[name]  # the rows of a cache are contiguous; a view has offsets
            out = _C.Tensor(x.shape, x.dtype, x.device)
            out.copy_(x)
            array = host(out.view((out.nbytes,), "uint8"))
        sums[name] = zlib.crc32(array)
        return array

    write(path, _kinds(layers, len(tokens)), read, {"format": FORMAT, **identity})
    return len(tokens)


def _kinds(layers: Mapping[str, Any], tokens: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> dtype and shape of each tensor of a file."""
    kinds = {name: (str(x.dtype), tuple(x.shape)) for name, x in layers.items()}
    return kinds | {"tokens": ("int32", (tokens,)), CHECKSUMS: ("uint8", (len(kinds) + 1, 4))}


def load(path: Path, engine: Engine, identity: Mapping[str, str]) -> int:
    """Read row 0 of the engine's cache from the file `path` -> its tokens. identity: see open.Opened.

    UserError for a file of another model, adapter or dtype, one that is damaged, and one that has more tokens
    than the context. Where keys or values are at fault the row is then empty, else it is untouched.
    """
    file = SafetensorsFile(path)
    if file.metadata.get("format") != FORMAT:
        raise UserError(f"{path}: is not a {FORMAT}")
    for what, ours in identity.items():
        if (theirs := file.metadata.get(what)) != ours:
            shown = f": {theirs}, wanted {ours}" if "dtype" in what else ""
            raise UserError(f"{path}: is the prompt cache of another {what.replace('_', ' ')}{shown}")
    count = file.entries["tokens"][1][0] if file.entries.get("tokens", ("", ()))[1] else 0
    if not 0 < count <= engine.cache.places:
        raise UserError(f"{path}: has {count} tokens, the context is {engine.cache.places}")
    layers = _layers(engine, count)
    wanted = _kinds(layers, count)
    found = {name: (dtype, shape) for name, (dtype, shape, _, _) in file.entries.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise UserError(
                f"{path}: {name} should be {_shown(wanted.get(name))}, got {_shown(found.get(name))}"
            )
    tokens = np.array(file.array("tokens"), np.int32)
    vocab = engine.model.config.vocab_size
    if tokens.min() < 0 or tokens.max() >= vocab:
        raise UserError(f"{path}: has tokens outside 0 to {vocab - 1}")
    names = sorted(wanted.keys() - {CHECKSUMS})
    sums = dict(zip(names, file.array(CHECKSUMS).reshape(-1).view("<u4").tolist(), strict=True))

    def check_sum(name, crc):
        if crc != sums[name]:
            raise UserError(f"{path}: {name} is damaged: its checksum is {crc:08x}, not {sums[name]:08x}")

    check_sum("tokens", zlib.crc32(tokens))
    engine.hold(0, tokens[:0])
    for name, x in layers.items():
        stored, crc = file.array(name), 0
        for start in range(0, count, BLOCK):
            part = np.ascontiguousarray(stored[start : start + BLOCK])
            crc = zlib.crc32(part, crc)
            if not finite(part, x.dtype).all():
                raise UserError(f"{path}: {name} is not finite")
            x[start : start + BLOCK].copy_(_typed(part, x.dtype))
        check_sum(name, crc)
        release(file.buffer, *file.entries[name][2:])
    engine.hold(0, tokens)
    return count


def _typed(part: np.ndarray, dtype: Any) -> Any:
    """The array as a Tensor of its dtype, without a copy."""
    return _C.Tensor.wrap(part.view(np.uint8), part.shape, dtype)


def _shown(kind: Any) -> str:
    return "absent" if kind is None else f"{kind[0]} {list(kind[1])}"
