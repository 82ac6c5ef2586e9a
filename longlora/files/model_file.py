"""A model on disk, read tensor by tensor: what a Hugging Face directory and a GGUF file have in common.

Files are mapped and nothing is kept, so loading a model never needs twice its size.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from longlora.decoder.config import ModelConfig
from longlora.device import CPU, staged
from longlora.errors import UserError
from longlora.files.safetensors import release
from longlora.files.tokenizer import Tokenizer

SAMPLE = 4096  # bytes at the start and at the end of a tensor that go into a fingerprint
CHUNK = 1 << 17  # elements converted at a time: in float32 half of an L2 cache


class ModelFile:
    """A model on disk: `.path`, `.kind` ("huggingface" or "gguf"), `.config`, tensors by Hugging Face name.

    Subclasses give `_shapes` (name -> shape), `dtype`, `_part` (rows and their dtype), `_span` (the mapped
    file and the tensor's first and last byte in it), `has_tokenizer` and `tokenizer`, and `beside` if there
    are such files. Several threads may read.
    """

    path: str
    kind: str
    config: ModelConfig
    _shapes: dict[str, tuple[int, ...]]
    _fingerprint: str | None = None

    def dtype(self, name: str) -> str:
        """The dtype that tensor `name` has on disk; "float32" for a quantised one."""
        raise NotImplementedError

    def storage(self, name: str) -> str:
        """As `dtype`, but the name of its format for a quantised tensor, such as "q4_1"."""
        return self.dtype(name)

    def has_tokenizer(self) -> bool:
        """Whether there is a tokenizer to read."""
        raise NotImplementedError

    def tokenizer(self) -> Tokenizer:
        """Read the tokenizer. UserError if there is none or its tokens outnumber the embedding's rows."""
        raise NotImplementedError

    def beside(self) -> dict[str, bytes]:
        """Files that go with a copy of the model: name -> content. UserError if one is damaged."""
        return {}

    def _part(self, name, start, stop):
        raise NotImplementedError

    def _span(self, name):
        raise NotImplementedError

    def _check(self):
        """Stop unless the tensors are exactly those of the config, each in its shape."""
        wanted, found = self.config.tensor_shapes(), self._shapes
        head = "lm_head.weight"
        if head in found:  # some writers repeat a tied embedding under this name
            wanted[head] = wanted["model.embed_tokens.weight"]
        for name, shape in wanted.items():
            if name not in found:
                missing = [name for name in wanted if name not in found]
                raise UserError(
                    f"{self.path}: {len(missing)} tensors of the config are missing: {some(missing)}"
                )
            if tuple(found[name]) != tuple(shape):
                raise UserError(
                    f"{self.path}: {name} should have shape {list(shape)} by the config, "
                    f"got {list(found[name])}"
                )
        extra = [name for name in found if name not in wanted]
        if extra:
            raise UserError(
                f"{self.path}: {len(extra)} tensors do not belong to a {self.config.family} model: "
                f"{some(extra)}"
            )
        self._names = [name for name in wanted if name != head or not self.config.tie_word_embeddings]

    def names(self) -> list[str]:
        """The tensors' Hugging Face names, in the order of the layers, without a tied head."""
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of tensor `name`."""
        return tuple(self._shapes[name])

    def read(self, name: str, out: Any = None) -> Any:
        """Read tensor `name` into `out` and return it; the default is a new float32 ndarray.

        out: a longlora.Tensor or ndarray of the tensor's shape and any float dtype. Values are converted in
        float32 and rounded to nearest even. A Tensor on a GPU is filled piece by piece, so the host never
        holds it whole. UserError if the weight holds NaN or infinity, ValueError for an `out` of another
        shape.
        """
        shape = self.shape(name)
        if out is None:
            out = np.empty(shape, np.float32)
        if tuple(out.shape) != shape:
            raise ValueError(f"{name}: out should have shape {shape}, got {tuple(out.shape)}")
        write, dtype, place = _writer(out), str(out.dtype), self._span(name)
        step = max(1, CHUNK // max(1, int(np.prod(shape[1:]))))
        for start in range(0, shape[0], step):
            part, stored = self._part(name, start, start + step)
            right = finite(part, stored)
            if not right.all():
                where = np.argwhere(~right)[0]
                where[0] += start
                raise UserError(f"{self.path}: {name} is not finite at {where.tolist()}")
            write(start, part if stored == dtype else from_float32(to_float32(part, stored), dtype))
        release(*place)
        return out

    def fingerprint(self) -> str:
        """Identify this model: a hash of config and names, shapes, first and last bytes of the tensors.

        It is computed once: a run must not read its base again, which somebody may have changed since.
        """
        if self._fingerprint is None:
            self._fingerprint = self._hash()
        return self._fingerprint

    def _hash(self):
        config = self.config
        seen = [
            config.family,
            config.rms_norm_eps,
            config.tie_word_embeddings,
            config.num_attention_heads,
            repr(config.rope),
        ]
        digest = hashlib.sha256(json.dumps(seen).encode())
        for name in self._names:
            digest.update(f"{name} {list(self.shape(name))} {self.dtype(name)}\n".encode())
            buffer, start, end = self._span(name)
            size = min(SAMPLE, end - start)
            digest.update(buffer[start : start + size] + buffer[end - size : end])
            release(buffer, start, end)
        return digest.hexdigest()


def finite(array: np.ndarray, dtype: str) -> np.ndarray:
    """Whether each number of an ndarray as stored (bfloat16: uint16 bits) is finite -> bool like it."""
    # All exponent bits set means infinity or NaN. This checks bfloat16 without converting it.
    return (array & 0x7F80) != 0x7F80 if dtype == "bfloat16" else np.isfinite(array)


def to_float32(array: np.ndarray, dtype: str) -> np.ndarray:
    """Convert an ndarray as stored (bfloat16: uint16 bits) to float32; a float32 one is returned as it is."""
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return np.asarray(array, np.float32)


def from_float32(array: np.ndarray, dtype: str) -> np.ndarray:
    """Round a float32 ndarray to nearest even in `dtype`, as it is stored (bfloat16: uint16 bits)."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(array).view(np.uint32)
        rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
        return np.where(np.isnan(array), np.uint16(0x7FC0), rounded)
    return array.astype(dtype, copy=False)


def narrowed(array: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """`from_float32` for the tensor `name`. UserError if a number of it is beyond the range of `dtype`."""
    with np.errstate(over="ignore"):
        stored = from_float32(array, dtype)
    beyond = ~finite(stored, dtype)
    if beyond.any():
        largest = float(np.abs(array).max())
        if not np.isfinite(largest):
            raise UserError(f"{name} has a weight of {largest:g}")
        raise UserError(
            f"{name} has a weight of {largest:g}, which {dtype} cannot hold; choose another dtype"
        )
    return stored


def _bits(array):
    """A writable ndarray over `array` (bfloat16: uint16 bits)."""
    if str(array.dtype) != "bfloat16":
        return array if isinstance(array, np.ndarray) else array.numpy()
    if isinstance(array, np.ndarray):
        return array.view(np.uint16)
    return array.view((array.nbytes,), "uint8").numpy().view(np.uint16).reshape(tuple(array.shape))


def _writer(out):
    """-> a function (first row, rows as stored) that writes the rows to `out`."""
    if out.device == CPU:
        target = _bits(out)

        def write(start, rows):
            target[start : start + len(rows)] = rows
    else:

        def write(start, rows):
            part = out[start : start + len(rows)]
            piece = staged(part)
            _bits(piece)[...] = rows
            part.copy_(piece)

    return write


def some(names: Sequence[str]) -> str:
    """The first three of `names`, for a message."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
