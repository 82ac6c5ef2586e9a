"""Reads a GGUF file of a supported family as a Hugging Face model.

The `gguf` library knows the block formats and dequantises. Names, order of rows and metadata are those that
llama.cpp's convert_hf_to_gguf.py writes.
"""

import math
import mmap
import os
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from longlora.decoder.config import read_config
from longlora.decoder.families import FAMILIES
from longlora.decoder.rope import Rope, inverse_frequencies, yarn_attention
from longlora.errors import UserError
from longlora.files.gguf_header import open_files
from longlora.files.model_file import ModelFile, to_float32
from longlora.files.tokenizer import Tokenizer

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
# Types that are not quantised -> how NumPy reads them (bfloat16: bits), and their names here.
PLAIN = {"F32": ("<f4", "float32"), "F16": ("<f2", "float16"), "BF16": ("<u2", "bfloat16")}
# Config keys that every file must have -> their names in the metadata.
REQUIRED = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
# Metadata keys that change what the model computes. They are refused unless the architecture declares them.
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


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp stores a family."""

    interleaved: bool = False  # in q and k, rows that rotate together are neighbours
    rotated_whole: bool = True  # rope.dimension_count is also the head size
    names: dict[str, str] = field(default_factory=lambda: LAYER_NAMES)
    multipliers: dict[str, str] = field(default_factory=dict)  # metadata key -> config key
    fixed: dict[str, Any] = field(default_factory=dict)  # config keys that the architecture implies
    # Whether llama.cpp computes these for the architecture.
    divisors: bool = False  # it divides the rope's frequencies by rope_freqs.weight
    o_bias: bool = False  # it adds a bias to the attention's output
    square: bool = False  # it expects heads x head size to be the hidden size


# An architecture has the name of its family here, unless the family is stored as another one.
STORED_AS = {"mistral": "llama"}
ARCHITECTURES = {
    "llama": Architecture(interleaved=True, divisors=True, o_bias=True),
    "qwen2": Architecture(square=True),
    "qwen3": Architecture(),
    "phi3": Architecture(
        rotated_whole=False,
        square=True,
        names={**LAYER_NAMES, "attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    ),
    "granite": Architecture(
        interleaved=True,
        divisors=True,
        o_bias=True,
        multipliers={
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "attention.scale": "attention_multiplier",
            "logit_scale": "logits_scaling",
        },
    ),
    "smollm3": Architecture(interleaved=True, fixed={"no_rope_layer_interval": 4}),
}


class Place(NamedTuple):
    """Where a tensor is: in which mapped file, from which byte, with how many bytes a row."""

    buffer: mmap.mmap
    shape: tuple[int, ...]
    kind: Any  # a gguf.GGMLQuantizationType
    start: int
    row: int


class Gguf(ModelFile):
    """A GGUF in one file or several; `.metadata` is the dict of its keys. q and k are as Hugging Face's."""

    kind = "gguf"

    def __init__(self, path: str | os.PathLike[str]):
        self.path = os.fspath(path)
        files = open_files(path)
        self.metadata = files[0].metadata
        family = self.metadata.get("general.architecture")
        if not isinstance(family, str) or family not in ARCHITECTURES:
            raise UserError(
                f"{self.path}: architecture {family!r} is not supported; "
                f"supported are {', '.join(ARCHITECTURES)}"
            )
        self._family = family
        self._arch = ARCHITECTURES[self._family]
        self._freqs: np.ndarray | None = None
        self._tensors: dict[str, Place] = {}
        for file in files:
            self._place(file)
        self._shapes = {name: place.shape for name, place in self._tensors.items()}
        self.config = read_config(self._config(), self.path)
        if self._freqs is not None and len(self._freqs) != self.config.head_dim // 2:
            raise UserError(
                f"{self.path}: rope_freqs.weight has {len(self._freqs)} numbers, heads of "
                f"{self.config.head_dim} rotate by {self.config.head_dim // 2}"
            )
        self._check()

    def _get(self, key, default=None):
        """The architecture's own metadata under `key`."""
        return self.metadata.get(f"{self._family}.{key}", default)

    def _place(self, file):
        """Note where the tensors of `file` are, in `_tensors` and `_freqs`."""
        import gguf

        end = file.base
        for name, (shape, code, offset) in sorted(file.infos.items(), key=lambda item: item[1][2]):
            try:
                kind = gguf.GGMLQuantizationType(code)
                block, width = gguf.GGML_QUANT_SIZES[kind]
            except (ValueError, KeyError):
                raise UserError(f"{file.path}: {name} has the unknown type {code}") from None
            if 0 in shape or shape[-1] % block:
                raise UserError(
                    f"{file.path}: {name} has shape {list(shape)}, rows should be a multiple of {block}"
                )
            row, start = shape[-1] // block * width, file.base + offset
            if start < end:
                raise UserError(f"{file.path}: {name} overlaps the tensor before it")
            end = start + row * math.prod(shape[:-1])
            if end > len(file.buffer):
                raise UserError(
                    f"{file.path}: truncated: {name} ends at byte {end}, the file has {len(file.buffer)}"
                )
            place, known = Place(file.buffer, shape, kind, start, row), self._hugging_face_name(name)
            if name == "rope_freqs.weight":
                self._freqs = to_float32(*self._values(place, None))
            elif known in self._tensors:
                raise UserError(f"{file.path}: {name} is a second {known}")
            else:
                self._tensors[known] = place

    def _hugging_face_name(self, name):
        stem, _, suffix = name.rpartition(".")
        if stem in NAMES:
            return f"{NAMES[stem]}.{suffix}"
        parts, names = stem.split("."), self._arch.names
        if len(parts) == 3 and parts[0] == "blk" and parts[1].isdecimal() and parts[2] in names:
            return f"model.layers.{parts[1]}.{names[parts[2]]}.{suffix}"
        return name

    def _config(self):
        """The config.json that transformers would have for this file."""
        get, arch = self._get, self._arch
        for name in REFUSED:
            if get(name) and name not in arch.multipliers:
                raise UserError(f"{self.path}: {self._family}.{name} {get(name)!r} is not supported")
        for name in ("rope_factors_long.weight", "rope_factors_short.weight"):
            if name in self._tensors:
                raise UserError(f"{self.path}: {name} asks for longrope, which is not supported")
        family = FAMILIES[self._family]
        raw = {
            "architectures": [family.architecture],
            "model_type": self._family,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "use_cache": True,
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            "bos_token_id": self.metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.metadata.get("tokenizer.ggml.eos_token_id"),
            "pad_token_id": self.metadata.get("tokenizer.ggml.padding_token_id"),
        }
        for name, key in REQUIRED.items():
            if get(key) is None:
                raise UserError(f"{self.path}: the metadata lacks {self._family}.{key}")
            raw[name] = get(key)
        raw["num_key_value_heads"] = get("attention.head_count_kv", raw["num_attention_heads"])
        # The file holds a float32. The model's config.json had the shortest decimal that rounds to it.
        raw["rms_norm_eps"] = _decimal(raw["rms_norm_eps"])
        embedding = self._shapes.get("model.embed_tokens.weight")
        raw["vocab_size"] = embedding[0] if embedding else get("vocab_size")
        plain = _quotient(raw["hidden_size"], raw["num_attention_heads"])
        head_dim = self._head_dim(plain)
        if head_dim is not None:
            raw["head_dim"] = head_dim
        if family.qkv_bias == "attention_bias":
            raw["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in self._tensors
        for key, name in arch.multipliers.items():
            size = head_dim or plain
            default = size**-0.5 if key == "attention.scale" and size else 1.0
            raw[name] = _decimal(get(key)) or default
        raw.update(arch.fixed)
        raw["rope_theta"] = _decimal(get("rope.freq_base", 10000.0))
        raw["rope_scaling"] = self._rope_scaling(raw)
        return raw

    def _head_dim(self, plain):
        """The head size, None if the metadata does not imply it. UserError if rope rotates a part of it."""
        sizes = []
        for name in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
            sizes.append(self._get(name))
            if sizes[-1] is not None and not (type(sizes[-1]) is int and sizes[-1] > 0):
                raise UserError(
                    f"{self.path}: {self._family}.{name} should be an integer above 0, got {sizes[-1]!r}"
                )
        key, value, turned = sizes
        head_dim = key or (turned if self._arch.rotated_whole else plain)
        if value not in (None, key) or turned not in (None, head_dim):
            raise UserError(
                f"{self.path}: heads with key_length {key}, value_length {value}, rope.dimension_count "
                f"{turned} are not supported; each should be the head size or absent"
            )
        return head_dim

    def _rope_scaling(self, raw):
        prefix = f"{self._family}.rope.scaling."
        found = {
            key.removeprefix(prefix): value for key, value in self.metadata.items() if key.startswith(prefix)
        }
        factor = found.pop("factor", None) or self._get("rope.scale_linear")
        kind = found.pop("type", "linear" if factor else "none")
        original = found.pop("original_context_length", None)
        found.pop("finetuned", None)
        if self._freqs is not None:
            return self._llama3(raw, self._freqs, original)
        if kind == "none" or kind == "linear" and factor in (None, 0, 1):
            return None
        scaling = {"rope_type": kind, "factor": _decimal(factor)}
        if original:
            scaling["original_max_position_embeddings"] = original
        for key, name in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
            if key in found:
                scaling[name] = _decimal(found.pop(key))
        numbers = isinstance(found.get("attn_factor"), float) and isinstance(scaling["factor"], (int, float))
        if kind == "yarn" and numbers:  # llama.cpp multiplies yarn's own factor by it
            scaling["attention_factor"] = found.pop("attn_factor") * yarn_attention(scaling["factor"])
        if found:
            raise UserError(f"{self.path}: rope scaling with {', '.join(sorted(found))} is not supported")
        return scaling

    def _llama3(self, raw, divisors, original):
        """Recover Llama 3's rule. llama.cpp stores only its result, the divisors of the frequencies.

        original: the length of pretraining, if the metadata has it. Otherwise powers of 2 are tried.
        """
        theta = raw["rope_theta"]
        if type(theta) not in (int, float) or not 2 <= theta <= 1e12:
            return None  # read_config refuses it
        if divisors.ndim != 1 or not (np.isfinite(divisors) & (divisors > 0)).all():
            raise UserError(f"{self.path}: rope_freqs.weight should be a list of numbers above 0")
        if np.allclose(divisors, 1):
            return None
        size, plain = 2 * divisors.size, Rope("default", float(theta), 1)
        given = type(original) is int and 0 < original <= 1 << 31
        rule: dict[str, Any] = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        for length in [original] if given else [1 << power for power in range(9, 21)]:
            factor = _llama3_factor(length * inverse_frequencies(plain, size)[0][-1], float(divisors[-1]))
            rope = Rope("llama3", float(theta), length, factor, **rule)
            found = inverse_frequencies(plain, size)[0] / inverse_frequencies(rope, size)[0]
            if np.allclose(found, divisors, rtol=1e-4):
                scaling = {"rope_type": "llama3", "factor": factor, **rule}
                return {**scaling, "original_max_position_embeddings": length}
        raise UserError(
            f"{self.path}: rope_freqs.weight does not follow Llama 3's rule, the only one supported"
        )

    def dtype(self, name: str) -> str:
        return PLAIN.get(self._tensors[name].kind.name, (None, "float32"))[1]

    def storage(self, name: str) -> str:
        kind = self._tensors[name].kind.name
        return PLAIN.get(kind, (None, kind.lower()))[1]

    def _span(self, name):
        place = self._tensors[name]
        return place.buffer, place.start, place.start + place.row * math.prod(place.shape[:-1])

    def _values(self, place, rows):
        """-> [len(rows), ...] and its dtype: rows (a slice or indices) of a matrix, or the whole of a vector.

        Quantised ones become float32; the others are as they are stored.
        """
        import gguf

        shape, kind, count = place.shape, place.kind, math.prod(place.shape[:-1])
        data = np.frombuffer(place.buffer, np.uint8, place.row * count, place.start).reshape(count, place.row)
        data = data if len(shape) == 1 else data[rows]
        try:
            plain, dtype = PLAIN.get(kind.name, (None, "float32"))
            if plain is not None:
                values = data.view(plain)
            else:
                # One long row: the library's loop over rows takes longer than the arithmetic.
                values = gguf.quants.dequantize(np.ascontiguousarray(data).reshape(1, -1), kind)
        except NotImplementedError:
            raise UserError(f"{self.path}: weights of type {kind.name} cannot be dequantised") from None
        return values.reshape(-1, *shape[1:]), dtype

    def _part(self, name, start, stop):
        place = self._tensors[name]
        rows: slice | np.ndarray = slice(start, stop)
        if self._arch.interleaved and ("q_proj" in name or "k_proj" in name):
            pairs = np.arange(place.shape[0]).reshape(-1, self.config.head_dim // 2, 2)
            rows = pairs.swapaxes(1, 2).reshape(-1)[start:stop]
        if len(place.shape) == 1:
            values, dtype = self._values(place, None)
            return values[rows], dtype
        return self._values(place, rows)

    def has_tokenizer(self) -> bool:
        return "tokenizer.ggml.tokens" in self.metadata

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_gguf(self.metadata, self.path).check(self.config, self.path)


def _quotient(hidden, heads):
    """The head size that two sizes of the metadata imply, or None where they are none."""
    good = type(hidden) is int and type(heads) is int and 0 < heads <= hidden
    return hidden // heads if good else None


def _llama3_factor(angle, divisor):
    """The factor of Llama 3's rule. angle, divisor: of the slowest frequency, at the original length."""
    keep = max((angle / (2 * math.pi) - 1.0) / 3.0, 0.0)
    factor = max((1 - keep) / max(1 / divisor - keep, 1e-9), 1.0)  # below 1 where the length is wrong
    return float(round(factor)) if abs(factor - round(factor)) < 1e-3 else factor


def _decimal(value):
    if not isinstance(value, float):
        return value
    with np.errstate(over="ignore"):
        return float(str(np.float32(value)))
