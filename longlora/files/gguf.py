"""A GGUF file of a llama, qwen2 or qwen3 model, seen as a Hugging Face checkpoint.

The header is walked here, each length checked against the file before it is believed: the `gguf` library's reader needs
seconds for a vocabulary and may loop for ever on a damaged count. That library knows the block formats and dequantises.
"""

import mmap
import os
import struct

import numpy as np

from longlora.decoder.config import read_config
from longlora.decoder.families import FAMILIES
from longlora.errors import UserError
from longlora.files.open_model import Checkpoint
from longlora.files.safetensors import release

# Named as our families; Mistral is a llama here.
ARCHITECTURES = ("llama", "qwen2", "qwen3")
NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Metadata value types 0..12: struct format of the scalars; 8 is a string, 9 an array.
SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
# Keys of an architecture that change what it computes and that the decoder does not know.
REFUSED = (
    "expert_count",
    "attention.sliding_window",
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attention.scale",
    "logit_scale",
    "embedding_scale",
    "residual_scale",
    "attn_logit_softcapping",
    "final_logit_softcapping",
)


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
        """As `string` so often: a vocabulary has a hundred thousand of them."""
        buffer, at, end, length, found = (
            self.buffer,
            self.at,
            len(self.buffer),
            struct.Struct("<Q").unpack_from,
            [],
        )
        if count * 8 > end:
            raise EOFError
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


class Gguf(Checkpoint):
    """`.metadata` is the dict of the file's keys; tensors under Hugging Face names, q and k rows in Hugging Face order."""

    kind = "gguf"

    def __init__(self, path):
        self.path = os.fspath(path)
        try:
            with open(path, "rb") as file:
                if file.read(4) != b"GGUF":
                    raise UserError(f"{self.path}: not a GGUF file (and not a model directory)")
                self.buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror or error}") from None
        try:
            self.metadata, infos, base = self._header()
        except EOFError:
            raise UserError(
                f"{self.path}: truncated: the header goes on past the file's {len(self.buffer)} bytes"
            ) from None
        except (ValueError, OverflowError) as error:
            raise UserError(f"{self.path}: damaged header: {error}") from None
        self._tensors = self._places(infos, base)
        self._shapes = {name: tensor[0] for name, tensor in self._tensors.items()}
        self.config = read_config(self._config(), self.path)
        self._check()

    def _header(self):
        header = _Header(self.buffer)
        header.take(4)
        version = header.scalar("I")
        if version not in (2, 3):
            raise ValueError(f"GGUF version {version} is not supported; supported are 2 and 3, little-endian")
        tensors, pairs = header.scalar("Q"), header.scalar("Q")
        metadata = {}
        for _ in range(pairs):
            key = header.string()
            if key in metadata:
                raise ValueError(f"key {key!r} twice")
            metadata[key] = header.value(header.scalar("I"))
        infos = {}
        for _ in range(tensors):
            name = header.string()
            if name in infos:
                raise ValueError(f"tensor {name!r} twice")
            axes = header.scalar("I")
            if not 1 <= axes <= 4:
                raise ValueError(f"tensor {name!r} with {axes} axes")
            shape = tuple(header.scalar("Q") for _ in range(axes))[::-1]
            infos[name] = (shape, header.scalar("I"), header.scalar("Q"))
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment {alignment!r}")
        return metadata, infos, -(-header.at // alignment) * alignment

    def _places(self, infos, base):
        """-> dict of Hugging Face name -> (shape, gguf type, first byte, bytes per row); `self._freqs` gets rope_freqs."""
        import gguf

        found, self._freqs, end = {}, None, base
        for name, (shape, code, offset) in sorted(infos.items(), key=lambda item: item[1][2]):
            try:
                kind = gguf.GGMLQuantizationType(code)
                block, width = gguf.GGML_QUANT_SIZES[kind]
            except (ValueError, KeyError):
                raise UserError(f"{self.path}: {name} has the unknown type {code}") from None
            if 0 in shape or shape[-1] % block:
                raise UserError(
                    f"{self.path}: {name} has shape {list(shape)}, rows should be a multiple of {block}"
                )
            row = shape[-1] // block * width
            size = row * int(np.prod([int(n) for n in shape[:-1]], dtype=object)) if len(shape) > 1 else row
            if base + offset < end:
                raise UserError(f"{self.path}: {name} overlaps the tensor before it")
            end = base + offset + size
            if end > len(self.buffer):
                raise UserError(
                    f"{self.path}: truncated: {name} ends at byte {end}, the file has {len(self.buffer)}"
                )
            place = (shape, kind, base + offset, row)
            if name == "rope_freqs.weight":
                self._freqs = self._dequantise(place, None)
            else:
                found[_hugging_face_name(name)] = place
        return found

    def _config(self):
        """The config.json that transformers would have for this file."""
        get, arch = self.metadata.get, self.metadata.get("general.architecture")
        if not isinstance(arch, str) or arch not in ARCHITECTURES:
            raise UserError(
                f"{self.path}: architecture {arch!r} is not supported; supported are {', '.join(ARCHITECTURES)}"
            )
        for name in REFUSED:
            if get(f"{arch}.{name}"):
                raise UserError(f"{self.path}: {arch}.{name} {get(f'{arch}.{name}')!r} is not supported")
        family, layer = arch, "model.layers.0.self_attn."
        raw = {
            "architectures": [FAMILIES[family].architecture],
            "model_type": family,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "use_cache": True,
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            "bos_token_id": get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": get("tokenizer.ggml.eos_token_id"),
            "pad_token_id": get("tokenizer.ggml.padding_token_id"),
        }
        for name, key in (
            ("hidden_size", "embedding_length"),
            ("intermediate_size", "feed_forward_length"),
            ("num_hidden_layers", "block_count"),
            ("num_attention_heads", "attention.head_count"),
            ("max_position_embeddings", "context_length"),
            ("rms_norm_eps", "attention.layer_norm_rms_epsilon"),
        ):
            if get(f"{arch}.{key}") is None:
                raise UserError(f"{self.path}: the metadata lacks {arch}.{key}")
            raw[name] = get(f"{arch}.{key}")
        raw["num_key_value_heads"] = get(f"{arch}.attention.head_count_kv", raw["num_attention_heads"])
        # float32 in the file; the shortest decimal that gives the same float32 is what the model's config.json said.
        raw["rms_norm_eps"] = _decimal(raw["rms_norm_eps"])
        embedding = self._shapes.get("model.embed_tokens.weight")
        raw["vocab_size"] = embedding[0] if embedding else get(f"{arch}.vocab_size")
        key, value, turned = (
            get(f"{arch}.{name}")
            for name in ("attention.key_length", "attention.value_length", "rope.dimension_count")
        )
        raw["head_dim"] = key or turned
        if value not in (None, key) or turned not in (None, raw["head_dim"]):
            raise UserError(
                f"{self.path}: heads with key_length {key}, value_length {value}, {turned} of them rotated are not "
                "supported; supported is one size, rotated whole"
            )
        if family in ("llama", "qwen3"):
            raw["attention_bias"] = layer + "q_proj.bias" in self._tensors
        raw["rope_theta"] = _decimal(get(f"{arch}.rope.freq_base", 10000.0))
        raw["rope_scaling"] = self._rope_scaling(arch, raw)
        return raw

    def _rope_scaling(self, arch, raw):
        found = {
            key.removeprefix(f"{arch}.rope.scaling."): value
            for key, value in self.metadata.items()
            if key.startswith(f"{arch}.rope.scaling.")
        }
        factor = found.pop("factor", None) or self.metadata.get(f"{arch}.rope.scale_linear")
        kind, original = (
            found.pop("type", "linear" if factor else "none"),
            found.pop("original_context_length", None),
        )
        found.pop("finetuned", None)
        if self._freqs is not None:
            return self._llama3(raw, kind)
        if kind == "none" or kind == "linear" and factor in (None, 0, 1):
            return None
        scaling = {"rope_type": kind, "factor": _decimal(factor)}
        if original:
            scaling["original_max_position_embeddings"] = original
        for key, name in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
            if key in found:
                scaling[name] = _decimal(found.pop(key))
        if found:
            raise UserError(f"{self.path}: rope scaling with {', '.join(sorted(found))} is not supported")
        return scaling

    def _llama3(self, raw, kind):
        """llama.cpp stores Llama 3's rule only as its result, the divisors of the frequencies: find the rule again."""
        from longlora.decoder.rope import Rope, inverse_frequencies

        if np.allclose(self._freqs, 1):
            return None
        factor = float(self._freqs.max())
        plain = inverse_frequencies(Rope("default", float(raw["rope_theta"]), 1), 2 * self._freqs.size)[0]
        for power in range(9, 21):
            rope = Rope(
                "llama3",
                float(raw["rope_theta"]),
                1 << power,
                factor,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
            )
            if np.allclose(
                plain / inverse_frequencies(rope, 2 * self._freqs.size)[0], self._freqs, rtol=1e-4
            ):
                return {
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 1 << power,
                }
        raise UserError(
            f"{self.path}: rope_freqs.weight does not follow Llama 3's rule, no other is supported"
        )

    def dtype(self, name):
        """The dtype that the tensor is kept in, "float32" for a quantised one."""
        return {"F16": "float16", "BF16": "bfloat16"}.get(self._tensors[name][1].name, "float32")

    def _span(self, name):
        shape, _, start, row = self._tensors[name]
        return self.buffer, start, start + (row * int(np.prod(shape[:-1])) if len(shape) > 1 else row)

    def _dequantise(self, place, rows):
        """-> float32 [len(rows), ...] of the given rows (a slice or indices) of a matrix, or the whole of a vector."""
        import gguf

        shape, kind, start, row = place
        count = int(np.prod(shape[:-1])) if len(shape) > 1 else 1
        data = np.frombuffer(self.buffer, np.uint8, row * count, start).reshape(count, row)
        data = data if len(shape) == 1 else data[rows]
        try:
            if kind.name in ("F32", "F16"):
                values = data.view("<f4" if kind.name == "F32" else "<f2").astype(np.float32, copy=False)
            else:
                # as one row: the library goes through rows by sixteens, which takes longer than the arithmetic
                values = gguf.quants.dequantize(np.ascontiguousarray(data).reshape(1, -1), kind)
        except NotImplementedError:
            raise UserError(f"{self.path}: weights of type {kind.name} cannot be dequantised") from None
        return values.reshape(-1, *shape[1:])

    def _part(self, name, start, stop):
        place = self._tensors[name]
        rows = slice(start, stop)
        if self.metadata["general.architecture"] == "llama" and ("q_proj" in name or "k_proj" in name):
            pairs = np.arange(place[0][0]).reshape(
                -1, self.config.head_dim // 2, 2
            )  # llama.cpp keeps their rows interleaved
            rows = pairs.swapaxes(1, 2).reshape(-1)[start:stop]
        if len(place[0]) == 1:
            return self._dequantise(place, None)[rows], "float32"
        return self._dequantise(place, rows), "float32"

    def has_tokenizer(self):
        return "tokenizer.ggml.tokens" in self.metadata

    def tokenizer(self):
        from longlora.files.tokenizer import Tokenizer

        return Tokenizer.from_gguf(self.metadata, self.path).check(self.config, self.path)


def _hugging_face_name(name):
    stem, _, suffix = name.rpartition(".")
    if stem in NAMES:
        return f"{NAMES[stem]}.{suffix}"
    parts = stem.split(".")
    if len(parts) == 3 and parts[0] == "blk" and parts[1].isdecimal() and parts[2] in LAYER_NAMES:
        return f"model.layers.{parts[1]}.{LAYER_NAMES[parts[2]]}.{suffix}"
    return name


def _decimal(value):
    return float(str(np.float32(value))) if isinstance(value, float) else value
