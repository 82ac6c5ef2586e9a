"""Writes a model as a GGUF file for llama.cpp.

Keys, names of tensors and order of rows are those that files.gguf reads and llama.cpp's
convert_hf_to_gguf.py writes. What llama.cpp does not compute is refused by name.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from longlora.decoder.config import ModelConfig
from longlora.decoder.rope import Rope, inverse_frequencies, yarn_attention
from longlora.disk import replacing
from longlora.errors import UserError
from longlora.files.gguf import ARCHITECTURES, NAMES, REQUIRED, STORED_AS, Architecture
from longlora.files.model_file import CHUNK, narrowed

Path = str | os.PathLike[str]
DTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}  # ours -> ggml's
WIDTHS = {"F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q8_0": (32, 34)}  # elements and bytes of a block
FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
OF_BASE = {"float32": "f32", "float64": "f32", "float16": "f16", "bfloat16": "bf16"}
# Names in generation_config.json -> keys below general.sampling.
SAMPLING = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}
ALIGNMENT = 32
FREQUENCIES = "rope_freqs.weight"


class Place(NamedTuple):
    """A tensor of the file: its Hugging Face name, its shape, and its ggml type."""

    source: str
    shape: tuple[int, ...]
    kind: str

    @property
    def size(self) -> int:
        """Bytes in the file."""
        block, width = WIDTHS[self.kind]
        return int(np.prod(self.shape)) // block * width


class GgufWriter:
    """A GGUF file that is about to be written. Whatever could be wrong with it is found here.

    config: the model. tokenizer: the keys `tokenizer.*`. dtype: one of DTYPES, for the matrices; vectors are
    float32, and q8_0 is float16 where rows do not fill its blocks of 32. name: the model's name in the file.
    general: further keys. UserError for what llama.cpp does not compute.
    """

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Mapping[str, Any],
        dtype: str,
        name: str,
        general: Mapping[str, Any] | None = None,
    ):
        if dtype not in DTYPES:
            raise UserError(f"dtype should be one of {', '.join(DTYPES)}, got {dtype!r}")
        self._family = STORED_AS.get(config.family, config.family)
        if self._family not in ARCHITECTURES:
            raise UserError(f"a {config.family} model cannot be a GGUF file: llama.cpp has no such model")
        self._config, self._arch = config, ARCHITECTURES[self._family]
        _refuse(config, self._arch)
        tokens = len(tokenizer["tokenizer.ggml.tokens"])
        if tokens != config.vocab_size:
            raise UserError(f"the tokenizer has {tokens} tokens, the embedding {config.vocab_size} rows")
        self._divisors = _divisors(config) if config.rope.type == "llama3" else None
        self._keys = {"general.type": "model", "general.name": name, **(general or {})}
        self._dtype = dtype
        self._keys |= {f"{self._family}.{key}": value for key, value in self._model_keys().items()}
        self._keys |= tokenizer
        self._places = self._place()

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(place.size for place in self._places.values())

    def _model_keys(self):
        """The keys of the architecture, without its name."""
        config, rope = self._config, self._config.rope
        keys = {key: getattr(config, name) for name, key in REQUIRED.items()}
        keys |= {
            "vocab_size": config.vocab_size,
            "attention.head_count_kv": config.num_key_value_heads,
            "attention.key_length": config.head_dim,
            "attention.value_length": config.head_dim,
            "rope.dimension_count": config.head_dim,
            "rope.freq_base": rope.theta,
        }
        keys |= {key: getattr(config, name) for key, name in self._arch.multipliers.items()}
        if rope.type in ("linear", "yarn", "llama3"):
            keys["rope.scaling.original_context_length"] = rope.original_length
        if rope.type in ("linear", "yarn"):
            keys |= {"rope.scaling.type": rope.type, "rope.scaling.factor": rope.factor}
        if rope.type == "yarn":
            # llama.cpp multiplies yarn's own factor on cosines and sines by this key.
            own = inverse_frequencies(rope, config.head_dim)[1] / yarn_attention(rope.factor)
            keys |= {"rope.scaling.attn_factor": own} if abs(own - 1) > 1e-9 else {}
        return keys

    def _place(self):
        """The tensors by their names in the file, in the order of the file."""
        modules = {theirs: ours for ours, theirs in (NAMES | self._arch.names).items()}
        places = {}
        for name, shape in self._config.tensor_shapes().items():
            module, _, suffix = name.rpartition(".")
            layer = ""
            if module.startswith("model.layers."):
                number, module = module.removeprefix("model.layers.").split(".", 1)
                layer = f"blk.{number}."
            kind = DTYPES[self._dtype] if len(shape) > 1 else "F32"
            kind = "F16" if shape[-1] % WIDTHS[kind][0] else kind
            places[f"{layer}{modules[module]}.{suffix}"] = Place(name, shape, kind)
        if self._divisors is not None:
            places[FREQUENCIES] = Place(FREQUENCIES, self._divisors.shape, "F32")
        return places

    def write(self, path: Path, read: Callable[[str], Any]) -> None:
        """Write the file with one tensor in memory at a time; read(name) gives a float32 array.

        UserError when it cannot be written, and for a weight that its type cannot hold.
        """
        with replacing(path) as aside:
            self._write_header(aside)
            with open(aside, "ab") as file:
                file.write(bytes(-file.tell() % ALIGNMENT))
                for place in self._places.values():
                    for piece in self._pieces(place, read):
                        file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
                    file.write(bytes(-file.tell() % ALIGNMENT))

    def _write_header(self, path):
        import gguf

        writer = gguf.GGUFWriter(path, self._family)
        kinds = gguf.GGUFValueType
        writer.add_uint32("general.file_type", int(gguf.LlamaFileType[FILE_TYPES[self._dtype]]))
        writer.add_uint32("general.quantization_version", gguf.GGML_QUANT_VERSION)
        for key, value in self._keys.items():
            kind = kinds.UINT32 if type(value) is int and value >= 0 else kinds.get_type(value)
            writer.add_key_value(key, value, kind)
        for name, place in self._places.items():
            type_ = gguf.GGMLQuantizationType[place.kind]
            writer.add_tensor_info(name, place.shape, np.dtype(np.float32), place.size, type_)
        try:
            writer.write_header_to_file(path)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        finally:
            writer.close()

    def _pieces(self, place: Place, read: Callable[[str], Any]) -> Iterator[np.ndarray]:
        """The rows of a tensor as they are stored, a few at a time."""
        name, shape, kind = place
        array = self._divisors if name == FREQUENCIES else np.asarray(read(name), np.float32)
        assert array is not None and array.shape == shape
        if self._arch.interleaved and ("q_proj" in name or "k_proj" in name):
            halves = array.reshape(-1, 2, self._config.head_dim // 2, *shape[1:])
            array = halves.swapaxes(1, 2).reshape(shape)
        step = max(1, CHUNK // max(1, int(np.prod(shape[1:]))))
        for start in range(0, shape[0], step):
            yield _stored(array[start : start + step], kind, name)


def _stored(rows, kind, name):
    if kind != "Q8_0":
        return narrowed(rows, {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[kind], name)
    import gguf

    with np.errstate(over="ignore", invalid="ignore"):
        blocks = gguf.quants.quantize(np.ascontiguousarray(rows), gguf.GGMLQuantizationType.Q8_0)
    scales = np.ascontiguousarray(blocks.reshape(-1, WIDTHS[kind][1])[:, :2]).view(np.float16)
    if not np.isfinite(scales).all():
        raise UserError(f"{name} has a weight that q8_0 cannot hold; choose bf16 or f32")
    return blocks


def _refuse(config: ModelConfig, arch: Architecture) -> None:
    """Stop at what llama.cpp does not compute for the architecture. It would give other logits or fail."""
    family, rope = config.family, config.rope

    def stop(what):
        raise UserError(
            f"a {family} model with {what} cannot be a GGUF file: llama.cpp does not compute that"
        )

    if rope.type == "llama3" and not arch.divisors:
        stop("rope type llama3")
    if rope.type == "yarn":
        for name, fixed in (("beta_fast", 32), ("beta_slow", 1)):
            if getattr(rope, name) not in (None, fixed):
                stop(f"yarn's {name} {getattr(rope, name):g} (only {fixed})")
        if rope.truncate is False:
            stop("yarn's truncate false")
    if config.o_bias and not arch.o_bias:
        stop("a bias on the attention's output (attention_bias)")
    if arch.square and config.num_attention_heads * config.head_dim != config.hidden_size:
        stop(f"{config.num_attention_heads} heads of {config.head_dim} and hidden_size {config.hidden_size}")
    interval = arch.fixed.get("no_rope_layer_interval")
    rotated = config.rope_layers or (True,) * config.num_hidden_layers
    wanted = tuple(interval is None or (i + 1) % interval != 0 for i in range(config.num_hidden_layers))
    if rotated != wanted:
        stop(f"layers without rope other than every {interval}th")


def _divisors(config):
    """What llama.cpp divides the rope's frequencies by, float32 [head_dim / 2]."""
    plain = Rope("default", config.rope.theta, config.rope.original_length)
    one, other = (inverse_frequencies(rope, config.head_dim)[0] for rope in (plain, config.rope))
    return (one / other).astype(np.float32)


def sampling(generation: Mapping[str, Any]) -> dict[str, Any]:
    """Give what a generation_config.json says of sampling, as the keys of llama.cpp's defaults."""
    found: dict[str, Any] = {}
    for name, key in SAMPLING.items():
        value = generation.get(name)
        if generation.get("do_sample") is True and isinstance(value, (int, float)):
            found[f"general.sampling.{key}"] = int(value) if key == "top_k" else float(value)
    return found
