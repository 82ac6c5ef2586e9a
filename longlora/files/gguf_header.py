"""The header of a GGUF file: its metadata, and where its tensors are. The files of one that was split.

Each length is checked against the file before it is used. The `gguf` library's reader takes seconds for a
vocabulary and may loop forever on a damaged count.
"""

import mmap
import os
import re
import struct
from typing import Any, NamedTuple

import numpy as np

from longlora.disk import map_file
from longlora.errors import UserError

# Metadata value types 0..12: struct format of the scalars; 8 is a string, 9 an array.
SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


class TensorInfo(NamedTuple):
    """A tensor in the header: `code` is its GGML type, `offset` counts from the start of the data."""

    shape: tuple[int, ...]
    code: int
    offset: int


class GgufFile(NamedTuple):
    """A mapped file: its metadata, its tensors by name, and the first byte of their data."""

    path: str
    buffer: mmap.mmap
    metadata: dict[str, Any]
    infos: dict[str, TensorInfo]
    base: int


class _Header:
    """A cursor over the mapped file: every read is inside the file or raises EOFError."""

    def __init__(self, buffer):
        self.buffer, self.at = buffer, 0

    def take(self, size):
        start, self.at = self.at, self.at + size
        if self.at > len(self.buffer):
            raise EOFError
        return start

    def scalar(self, code):
        return struct.unpack_from("<" + code, self.buffer, self.take(struct.calcsize(code)))[0]

    def string(self):
        size = self.scalar("Q")
        start = self.take(size)
        return self.buffer[start : start + size].decode("utf-8")

    def value(self, kind):
        if kind == STRING:
            return self.string()
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind != ARRAY:
            raise ValueError(f"metadata of unknown type {kind}")
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind in SCALARS:
            dtype = np.dtype(SCALARS[kind]).newbyteorder("<")
            start = self.take(count * dtype.itemsize)
            return np.frombuffer(self.buffer, dtype, count, start).tolist()
        if kind != STRING:
            raise ValueError(f"an array of type {kind}")
        return self.strings(count)

    def strings(self, count):
        """Equals `count` calls of `string`, but faster: a vocabulary has a hundred thousand strings."""
        buffer, at, end, found = self.buffer, self.at, len(self.buffer), []
        length = struct.Struct("<Q").unpack_from
        for _ in range(count):
            start = at + 8
            if start > end:
                raise EOFError
            at = start + length(buffer, at)[0]
            if at > end:
                raise EOFError
            found.append(buffer[start:at].decode("utf-8"))
        self.at = at
        return found


def read_header(buffer: mmap.mmap) -> tuple[dict[str, Any], dict[str, TensorInfo], int]:
    """Read the header of a mapped file -> metadata, name -> TensorInfo, first byte of the data.

    EOFError if the header goes past the end of the file, ValueError or OverflowError for other damage.
    """
    header = _Header(buffer)
    header.take(4)
    version = header.scalar("I")
    if version not in (2, 3):
        raise ValueError(f"GGUF version {version} is not supported; supported are 2 and 3, little-endian")
    tensors, pairs = header.scalar("Q"), header.scalar("Q")
    metadata = {}
    for _ in range(pairs):
        key = header.string()
        if key in metadata:
            raise ValueError(f"key {key!r} appears twice")
        metadata[key] = header.value(header.scalar("I"))
    infos = {}
    for _ in range(tensors):
        name = header.string()
        if name in infos:
            raise ValueError(f"tensor {name!r} appears twice")
        axes = header.scalar("I")
        if not 1 <= axes <= 4:
            raise ValueError(f"tensor {name!r} has {axes} axes, should have 1 to 4")
        shape = tuple(header.scalar("Q") for _ in range(axes))[::-1]
        infos[name] = TensorInfo(shape, header.scalar("I"), header.scalar("Q"))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment should be a power of 2, got {alignment!r}")
    return metadata, infos, -(-header.at // alignment) * alignment


def open_file(path: str | os.PathLike[str]) -> GgufFile:
    """Map a GGUF file and read its header. UserError if it is none, truncated or damaged."""
    name, buffer = os.fspath(path), map_file(path, "a GGUF file")
    if buffer[:4] != b"GGUF":
        raise UserError(f"{name}: not a GGUF file (and not a model directory)")
    try:
        return GgufFile(name, buffer, *read_header(buffer))
    except EOFError:
        raise UserError(
            f"{name}: truncated: the header extends past the file's {len(buffer)} bytes"
        ) from None
    except (ValueError, OverflowError) as error:
        raise UserError(f"{name}: damaged header: {error}") from None


def open_files(path: str | os.PathLike[str]) -> list[GgufFile]:
    """Open a GGUF file, and the other files of its model if llama.cpp's gguf-split made it.

    path: the first of them, whose name ends in -00001-of-00003.gguf, say. It has the metadata of the model.
    UserError as in `open_file`, and if they are not the files of one model.
    """
    first = open_file(path)
    number, count = (
        first.metadata.get(f"split.{key}", default) for key, default in (("no", 0), ("count", 1))
    )
    if count in (0, 1):
        return [first]
    if not isinstance(count, int) or not isinstance(number, int) or not 0 <= number < count < 1 << 16:
        raise UserError(f"{first.path}: split.no {number!r} does not fit split.count {count!r}")
    name = re.fullmatch(rf"(.*-)\d{{5}}(-of-{count:05}\.gguf)", first.path, re.DOTALL)
    if name is None:
        raise UserError(
            f"{first.path}: is part {number + 1} of {count} of a split model, so its name should end in "
            f"-{number + 1:05}-of-{count:05}.gguf"
        )
    paths = [f"{name[1]}{part + 1:05}{name[2]}" for part in range(count)]
    if number != 0 or first.path != paths[0]:
        raise UserError(f"{first.path}: is part {number + 1} of {count}; wanted the first, {paths[0]}")
    files = [first, *map(open_file, paths[1:])]
    for part, file in enumerate(files):
        if (file.metadata.get("split.no"), file.metadata.get("split.count")) != (part, count):
            raise UserError(f"{file.path}: should be part {part + 1} of {count} by its metadata")
    names = [name for file in files for name in file.infos]
    total = first.metadata.get("split.tensors.count")
    if len(set(names)) != len(names) or total not in (None, len(names)):
        raise UserError(
            f"{first.path}: its {count} files hold {len(names)} tensors, {len(set(names))} different, "
            f"split.tensors.count says {total}"
        )
    return files
