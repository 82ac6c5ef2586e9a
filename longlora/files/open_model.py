"""The weights of a model, from a Hugging Face directory or a GGUF file, read tensor by tensor.

Files are mapped and nothing is kept: reading a model into place never needs twice its size.
"""

import hashlib
import json
import os

import numpy as np

from longlora import _C
from longlora.decoder.config import read_config, read_json
from longlora.device import CPU, staged
from longlora.errors import UserError
from longlora.files.safetensors import SafetensorsFile, release

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# Buffers that old files carry and that are computed here.
IGNORED = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")
SAMPLE = 4096  # bytes at the start and at the end of a tensor that go into a fingerprint
CHUNK = 1 << 17  # elements converted at a time: in float32 half of an L2 cache


class Checkpoint:
    """A model on disk: `.path`, `.kind` ("huggingface" or "gguf"), `.config` and the tensors under Hugging Face names.

    Subclasses give `_shapes` (name -> shape), `dtype(name)`, `_part(name, start, stop)` (rows and their dtype), `_span(name)`
    (the mapped file and the tensor's first and last byte in it) and `tokenizer()`. Tensors may be read by several threads.
    """

    def _check(self):
        """Every tensor of the config is there in its shape, and no other: UserError names what is not so."""
        wanted, found = self.config.tensor_shapes(), self._shapes
        head = "lm_head.weight"
        if self.config.tie_word_embeddings and head in found:
            wanted[head] = wanted["model.embed_tokens.weight"]  # written by some, equal to the embedding
        for name, shape in wanted.items():
            if name not in found:
                missing = [name for name in wanted if name not in found]
                raise UserError(
                    f"{self.path}: {len(missing)} tensors of the config are missing: {some(missing)}"
                )
            if tuple(found[name]) != tuple(shape):
                raise UserError(
                    f"{self.path}: {name} should have shape {list(shape)} by the config, got {list(found[name])}"
                )
        extra = [name for name in found if name not in wanted]
        if extra:
            raise UserError(
                f"{self.path}: {len(extra)} tensors are not of a {self.config.family} model: {some(extra)}"
            )
        self._names = [name for name in wanted if name != head or not self.config.tie_word_embeddings]

    def names(self):
        """The tensors' Hugging Face names, in the order of the layers; a tied head is not among them."""
        return list(self._names)

    def shape(self, name):
        return tuple(self._shapes[name])

    def read(self, name, out=None):
        """Read tensor `name` into `out`, a longlora.Tensor or ndarray of any float dtype -> out (default: float32 ndarray).

        Converted in float32, rounded to nearest even. UserError if the weight holds NaN or infinity. A Tensor on a GPU is
        filled piece by piece too: the host never holds it whole.
        """
        shape = self.shape(name)
        if out is None:
            out = np.empty(shape, np.float32)
        if tuple(out.shape) != shape:
            raise ValueError(f"{name}: out should have shape {shape}, got {tuple(out.shape)}")
        write, dtype, place = _writer(out), _name(out), self._span(name)
        step = max(1, CHUNK // max(1, int(np.prod(shape[1:]))))
        for start in range(0, shape[0], step):
            part, stored = self._part(name, start, start + step)
            # All exponent bits set is infinity or NaN; only this way is bfloat16 checked without being converted.
            finite = (part & 0x7F80) != 0x7F80 if stored == "bfloat16" else np.isfinite(part)
            if not finite.all():
                where = np.argwhere(~finite)[0]
                where[0] += start
                raise UserError(f"{self.path}: {name} is not finite at {where.tolist()}")
            write(start, part if stored == dtype else from_float32(to_float32(part, stored), dtype))
        release(*place)
        return out

    def fingerprint(self):
        """A string that tells this base from another: config, names, shapes, and the first and last bytes of each tensor."""
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


class HuggingFace(Checkpoint):
    """config.json, model.safetensors (or shards and their index), tokenizer.json."""

    kind = "huggingface"

    def __init__(self, path):
        self.path = os.fspath(path)
        if os.path.exists(os.path.join(path, "adapter_config.json")):
            raise UserError(
                f"{self.path}: is an adapter, wanted the model it was trained on (or merged into)"
            )
        self.config = read_config(path)
        index = os.path.join(path, INDEX)
        if os.path.exists(index):
            self._files = self._sharded(index)
        elif os.path.exists(os.path.join(path, SINGLE)):
            file = SafetensorsFile(os.path.join(path, SINGLE))
            self._files = dict.fromkeys(file.entries, file)
        else:
            raise UserError(
                f"{self.path}: has neither {SINGLE} nor {INDEX}; only safetensors weights are read"
            )
        self._files = {name: file for name, file in self._files.items() if not name.endswith(IGNORED)}
        self._shapes = {name: file.entries[name][1] for name, file in self._files.items()}
        self._check()

    def _sharded(self, index):
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
            raise UserError(f"{index}: weight_map should be an object of tensor name to file name")
        outside = [
            place for place in places.values() if os.path.basename(place) != place or place in ("", ".", "..")
        ]
        if outside:
            raise UserError(f"{index}: weight_map should name files beside it, got {outside[0]!r}")
        files = {
            place: SafetensorsFile(os.path.join(self.path, place)) for place in sorted(set(places.values()))
        }
        for name, place in places.items():
            if name not in files[place].entries:
                raise UserError(f"{index}: {name} should be in {place}, which does not have it")
        for place, file in files.items():
            extra = [name for name in file.entries if places.get(name) != place]
            if extra:
                raise UserError(f"{file.path}: {len(extra)} tensors are not in the index: {some(extra)}")
        return {name: files[place] for name, place in places.items()}

    def dtype(self, name):
        return self._files[name].entries[name][0]

    def _part(self, name, start, stop):
        return self._files[name].array(name)[start:stop], self.dtype(name)

    def _span(self, name):
        dtype, _, start, end = self._files[name].entries[name]
        if dtype not in ("float32", "bfloat16", "float16", "float64"):
            raise UserError(
                f"{self.path}: {name} has dtype {dtype}; supported are float32, bfloat16, float16 and float64"
            )
        return self._files[name].buffer, start, end

    def has_tokenizer(self):
        """Whether there is a tokenizer to read."""
        return os.path.exists(os.path.join(self.path, "tokenizer.json"))

    def tokenizer(self):
        from longlora.files.tokenizer import Tokenizer

        return Tokenizer.from_directory(self.path).check(self.config, self.path)


def open_model(path):
    """Open the model at `path`, a Hugging Face directory or a .gguf file -> Checkpoint. UserError says what is wrong."""
    if os.path.isdir(path):
        return HuggingFace(path)
    if not os.path.exists(path):
        raise UserError(
            f"{path}: no such file or directory; wanted a model directory with config.json, or a .gguf file"
        )
    from longlora.files.gguf import Gguf

    return Gguf(path)


def to_float32(array, dtype):
    """An ndarray as stored (bfloat16 as uint16 bits) -> float32 ndarray, a copy unless it is float32 already."""
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return np.asarray(array, np.float32)


def from_float32(array, dtype):
    """float32 ndarray -> ndarray as stored of `dtype` (bfloat16 as uint16 bits), rounded to nearest even."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(array).view(np.uint32)
        rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
        return np.where(np.isnan(array), np.uint16(0x7FC0), rounded)
    return array.astype(dtype, copy=False)


def _name(array):
    return str(array.dtype).rpartition(".")[2]


def _bits(array):
    """A writable ndarray over `array`; bfloat16 as uint16 bits."""
    if _name(array) != "bfloat16":
        return array if isinstance(array, np.ndarray) else array.numpy()
    if isinstance(array, np.ndarray):
        return array.view(np.uint16)
    return array.view((array.nbytes,), "uint8").numpy().view(np.uint16).reshape(tuple(array.shape))


def _writer(out):
    """-> a function (first row, rows as stored) that writes them to `out`."""
    if isinstance(out, np.ndarray) or out.device == CPU:
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


def some(names):
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
