"""safetensors: read by mapping the file, written tensor by tensor, aside and renamed.

Reader and writer are our own: the reader hands out views of the mapping without a copy, in bfloat16 too, and checks the
header as strictly as the format says (no holes, no overlaps, no duplicate names) before a single byte is used; the writer
holds one tensor at a time, which the `safetensors` library cannot. The tests read and write across with that library.
"""

import contextlib
import json
import math
import mmap
import os
import struct
import tempfile

import numpy as np

from longlora.device import host
from longlora.errors import UserError

MAX_HEADER = 100_000_000
# safetensors' names -> (ours, bytes per element); the others are legal in a file but not in a model we read.
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
    """An open file: `.entries` is a dict of name -> (dtype, shape, start, end), offsets in bytes of the file; `.metadata`."""

    def __init__(self, path):
        self.path = os.fspath(path)
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < 8:
                    raise UserError(f"{self.path}: truncated: {size} bytes are not a safetensors file")
                self.buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror or error}") from None
        (length,) = struct.unpack("<Q", self.buffer[:8])
        if length > min(size - 8, MAX_HEADER):
            raise UserError(
                f"{self.path}: truncated or not a safetensors file: its header should have {length} bytes, the "
                f"file has {size}"
            )
        self.metadata, self.entries = self._header(self.buffer[8 : 8 + length], 8 + length, size)

    def _header(self, text, base, size):
        def unique(pairs):
            found = dict(pairs)
            if len(found) != len(pairs):
                names = [name for name, _ in pairs]
                twice = next(name for name in names if names.count(name) > 1)
                raise UserError(f"{self.path}: the header names {twice!r} twice")
            return found

        try:
            header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
        except UserError:
            raise
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.path}: the header is not JSON: {error}") from None
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
                    f"{self.path}: {name}: data starts at byte {start}, should at {end}: tensors "
                    f"{'overlap' if start < end else 'have a hole between them'}"
                )
            end = stop
        if end != size:
            raise UserError(f"{self.path}: the file has {size} bytes, its header speaks of {end}")
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
        if math.prod(shape) * width != offsets[1] - offsets[0]:
            raise UserError(
                f"{self.path}: {name}: {dtype} of shape {list(shape)} needs {math.prod(shape) * width} bytes, its "
                f"data_offsets span {offsets[1] - offsets[0]}"
            )
        return DTYPES.get(dtype, (dtype,))[0], shape, base + offsets[0], base + offsets[1]

    def array(self, name):
        """A read-only view of a tensor, as an ndarray; bfloat16 as uint16 bits (NumPy has no bfloat16 of its own)."""
        dtype, shape, start, end = self.entries[name]
        if dtype not in (known for known, _ in DTYPES.values()):
            raise UserError(
                f"{self.path}: {name}: dtype {dtype} is not supported; supported are {', '.join(DTYPES)}"
            )
        stored = np.dtype("uint16" if dtype == "bfloat16" else dtype)
        return np.frombuffer(self.buffer, stored, (end - start) // stored.itemsize, start).reshape(shape)


def release(buffer, start, end):
    """Let go of the pages of a mapped file that were read: bytes start .. end, which count as this process's memory until then."""
    first = start // mmap.PAGESIZE * mmap.PAGESIZE
    if end > first and hasattr(buffer, "madvise"):
        buffer.madvise(mmap.MADV_DONTNEED, first, end - first)


@contextlib.contextmanager
def replacing(path):
    """A temporary path beside `path` to write to; on success flushed to disk and renamed, on failure removed.

    What was at `path` stays untouched until the rename. OSError (a full disk) comes out as UserError.
    """
    path = os.path.abspath(path)
    aside = None
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        handle, aside = tempfile.mkstemp(
            prefix=f".{os.path.basename(path)}.", suffix=".partial", dir=os.path.dirname(path)
        )
        os.fchmod(handle, 0o644)
        os.close(handle)
        yield aside
        flush(aside)
        os.replace(aside, path)
        aside = None
        flush(os.path.dirname(path))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written: {error.strerror or error}; what was there is untouched"
        ) from None
    finally:
        if aside is not None:
            with contextlib.suppress(OSError):
                os.unlink(aside)


def flush(path):
    """fsync the file or directory at `path`."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path, text):
    """Write `text` to `path`, aside, flushed and renamed."""
    with replacing(path) as aside, open(aside, "w", encoding="utf-8") as file:
        file.write(text)


def write_json(path, value, sort_keys=False):
    write_text(path, json.dumps(value, indent=2, sort_keys=sort_keys, ensure_ascii=False) + "\n")


def write(path, tensors, read, metadata=None):
    """Write a safetensors file to `path`, one tensor in memory at a time.

    tensors: dict of name -> (dtype name, shape); read(name) -> C-contiguous array of it (bfloat16 may come as uint16 bits).
    ValueError for an empty tensor: a zero-byte weight in a saved model is always somebody's mistake.
    """
    codes = {name: (code, width) for code, (name, width) in DTYPES.items()}
    # Wide elements first: every tensor is then aligned to its own element.
    order = sorted(tensors, key=lambda name: -codes[tensors[name][0]][1])
    header, end = {"__metadata__": metadata or {"format": "pt"}}, 0
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
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def save(path, tensors, metadata=None):
    """Write the dict `tensors` of name -> array or Tensor to `path`, as `write` does; from a GPU one crosses at a time."""
    write(
        path,
        {name: (str(array.dtype), array.shape) for name, array in tensors.items()},
        lambda name: host(tensors[name]),
        metadata,
    )
