"""safetensors files: read by mapping, written one tensor at a time.

The reader gives views of the mapping without a copy, bfloat16 included. It checks the header as strictly as
the format demands (no holes, no overlaps, no duplicate names) before it uses a byte. The writer holds one
tensor at a time, which the `safetensors` library cannot.
"""

import json
import math
import mmap
import os
import struct
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from longlora.device import host
from longlora.disk import map_file, replacing
from longlora.errors import UserError, reason

Path = str | os.PathLike[str]

MAX_HEADER = 100_000_000
# safetensors' names -> (ours, bytes per element). Files may hold other dtypes, which `array` refuses.
DTYPES = {
    "F32": ("float32", 4),
    "BF16": ("bfloat16", 2),
    "F16": ("float16", 2),
    "F64": ("float64", 8),
    "I32": ("int32", 4),
    "I64": ("int64", 8),
    "U8": ("uint8", 1),
}
WIDTHS = dict(DTYPES.values())  # bytes per element, by our names
OTHER_SIZES = {
    "BOOL": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1,
    "I16": 2,
    "U16": 2,
    "U32": 4,
    "U64": 8,
    "C64": 8,
}


class SafetensorsFile:
    """An open file. `.entries`: name -> (dtype, shape, first byte in the file, end); UserError if damaged."""

    def __init__(self, path: Path):
        self.path = os.fspath(path)
        self.buffer = map_file(path, "a safetensors file")
        size = len(self.buffer)
        (length,) = struct.unpack("<Q", self.buffer[:8])
        if length > min(size - 8, MAX_HEADER):
            raise UserError(
                f"{self.path}: truncated or not a safetensors file: its header should have {length} bytes, "
                f"the file has {size}"
            )
        self.metadata, self.entries = self._header(self.buffer[8 : 8 + length], 8 + length, size)

    def _header(self, text, base, size):
        def unique(pairs):
            found: dict[str, Any] = {}
            for name, value in pairs:
                if name in found:
                    raise UserError(f"{self.path}: the header names {name!r} twice")
                found[name] = value
            return found

        try:
            header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
        except UserError:
            raise
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.path}: the header is not JSON: {reason(error)}") from None
        if not isinstance(header, dict):
            raise UserError(f"{self.path}: the header should be a JSON object, got {type(header).__name__}")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict):
            raise UserError(f"{self.path}: __metadata__ should be a JSON object, got {metadata!r}")
        entries = {name: self._entry(name, entry, base, size) for name, entry in header.items()}
        end = base
        for name, (_, _, start, stop) in sorted(entries.items(), key=lambda item: item[1][2:]):
            if start != end:
                raise UserError(
                    f"{self.path}: {name}: data starts at byte {start}, should start at {end}: tensors "
                    f"{'overlap' if start < end else 'have a hole between them'}"
                )
            end = stop
        if end != size:
            raise UserError(f"{self.path}: the file has {size} bytes, its header describes {end}")
        return metadata, entries

    def _entry(self, name, entry, base, size):
        def integers(key):
            value = entry.get(key) if isinstance(entry, dict) else None
            if not isinstance(value, list) or any(type(n) is not int or not 0 <= n < 1 << 63 for n in value):
                raise UserError(
                    f"{self.path}: {name}: {key} should be a list of integers from 0, got {value!r}"
                )
            return tuple(value)

        shape, offsets, dtype = integers("shape"), integers("data_offsets"), entry.get("dtype")
        width = (OTHER_SIZES | {code: size for code, (_, size) in DTYPES.items()}).get(str(dtype))
        if width is None:
            raise UserError(
                f"{self.path}: {name}: dtype {dtype!r} is not supported; supported are {', '.join(DTYPES)}"
            )
        if len(offsets) != 2 or offsets[1] < offsets[0]:
            raise UserError(
                f"{self.path}: {name}: data_offsets should be a start and an end, got {list(offsets)}"
            )
        if offsets[1] > size - base:
            raise UserError(
                f"{self.path}: truncated: {name} ends at byte {base + offsets[1]}, the file has {size}"
            )
        needed = _bytes(shape, width)
        if needed != offsets[1] - offsets[0]:
            raise UserError(
                f"{self.path}: {name}: {dtype} of shape {list(shape)} needs "
                f"{'more than 2^63' if needed is None else needed} bytes, its data_offsets span "
                f"{offsets[1] - offsets[0]}"
            )
        return DTYPES.get(dtype, (dtype,))[0], shape, base + offsets[0], base + offsets[1]

    def array(self, name: str) -> np.ndarray:
        """A read-only view of a tensor (bfloat16: uint16 bits). UserError for an unsupported dtype."""
        dtype, shape, start, end = self.entries[name]
        if dtype not in (known for known, _ in DTYPES.values()):
            raise UserError(
                f"{self.path}: {name}: dtype {dtype} is not supported; supported are {', '.join(DTYPES)}"
            )
        stored = np.dtype("uint16" if dtype == "bfloat16" else dtype)
        flat = np.frombuffer(self.buffer, stored, (end - start) // stored.itemsize, start)
        try:
            return flat.reshape(shape)
        except ValueError as error:  # too many axes, or an empty array with a size that NumPy cannot hold
            raise UserError(f"{self.path}: {name}: shape {list(shape)}: {error}") from None


def _bytes(shape, width):
    """The bytes of a tensor, or None if they exceed 2^63: the product of many sizes would take long."""
    for size in shape:
        width *= size
        if width > 1 << 63:
            return None
    return width


def release(buffer: mmap.mmap, start: int, end: int) -> None:
    """Release the pages of bytes start..end of a mapped file: they count as memory of this process."""
    first = start // mmap.PAGESIZE * mmap.PAGESIZE
    if end > first and hasattr(buffer, "madvise"):
        buffer.madvise(mmap.MADV_DONTNEED, first, end - first)


def write(
    path: Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    read: Callable[[str], Any],
    metadata: dict[str, str] | None = None,
) -> None:
    """Write a safetensors file to `path` with one tensor in memory at a time.

    tensors: name -> (dtype name, shape); read(name) gives its array (bfloat16 may come as uint16 bits).
    ValueError for an array of the wrong size, and for an empty tensor: an empty weight in a saved model is
    always a mistake. UserError when the file cannot be written.
    """
    codes = {name: (code, width) for code, (name, width) in DTYPES.items()}
    # Wide elements come first, so every tensor is aligned to its own element.
    order = sorted(tensors, key=lambda name: -codes[tensors[name][0]][1])
    header: dict[str, Any] = {"__metadata__": metadata or {"format": "pt"}}
    end = 0
    for name in order:
        (code, width), shape = codes[tensors[name][0]], list(tensors[name][1])
        size = math.prod(shape) * width
        if size == 0:
            raise ValueError(f"{name}: refusing to save an empty tensor of shape {shape}")
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    with replacing(path) as aside, open(aside, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            array = np.asarray(read(name))
            if array.nbytes != header[name]["data_offsets"][1] - header[name]["data_offsets"][0]:
                raise ValueError(f"{name}: wanted {tensors[name]}, got {array.dtype} of shape {array.shape}")
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def save(path: Path, tensors: Mapping[str, Any], metadata: dict[str, str] | None = None) -> None:
    """Write `tensors` (name -> ndarray or longlora.Tensor) as `write` does, one tensor at a time."""
    write(
        path,
        {name: (str(array.dtype), array.shape) for name, array in tensors.items()},
        lambda name: host(tensors[name]),
        metadata,
    )
