"""GGUF files of a model with one small layer, written by the gguf library without torch."""

import functools
import math

import gguf
import numpy as np
from refusals import refusal

from longlora.decoder.config import read_config
from longlora.files.open_model import open_model

ARCH = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
PERMUTED = ("llama", "granite", "smollm3")  # their converters derive from LlamaModel, which permutes q and k
SIZES = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    vocab_size=6,
    head_dim=8,
)
KEYS = {
    "embedding_length": 32,
    "feed_forward_length": 64,
    "block_count": 1,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "context_length": 64,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "attention.key_length": 8,
    "attention.value_length": 8,
    "rope.dimension_count": 8,
    "rope.freq_base": 10000.0,
}


def permute(weights, heads):
    """llama.cpp's convert_hf_to_gguf.py, LlamaModel.permute."""
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def arrays(family="llama", **fields):
    """Random float32 tensors of a model, by their Hugging Face names."""
    raw = {"model_type": family, "sliding_window": None, "tie_word_embeddings": False, **SIZES, **fields}
    config = read_config(raw)
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(s, np.float32) for name, s in config.tensor_shapes().items()}


@functools.cache
def names_of(family):
    """The gguf library's names of a family's tensors."""
    return gguf.get_tensor_name_map(ARCH[family], 8)


def stored(tensors, family="llama", heads=4, kv_heads=2):
    """Rename tensors, and permute q and k, as llama.cpp's converter does."""
    names, found = names_of(family), {}
    for name, array in tensors.items():
        if family in PERMUTED and ("q_proj" in name or "k_proj" in name):
            array = permute(array, heads if "q_proj" in name else kv_heads)
        found[names.get_name(name, (".weight", ".bias"))] = array
    return found


def divisors(theta, size, length, factor):
    """The tensor rope_freqs.weight, as llama.cpp's convert_hf_to_gguf.py computes it for Llama 3."""
    found = []
    for i in range(0, size, 2):
        wave = 2 * math.pi * theta ** (i / size)
        if wave < length / 4:
            found.append(1)
        elif wave > length:
            found.append(factor)
        else:
            smooth = (length / wave - 1) / (4 - 1)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


def kind_of(value):
    """The GGUF type that llama.cpp's converter gives a value."""
    if type(value) is int:
        signed, small = gguf.GGUFValueType.INT32, gguf.GGUFValueType.UINT32
        return signed if value < 0 else small if value < 1 << 32 else gguf.GGUFValueType.UINT64
    if isinstance(value, np.float64):
        return gguf.GGUFValueType.FLOAT64
    return gguf.GGUFValueType.get_type(value)


def write(path, family="llama", keys=None, tensors=None, kinds=None):
    """Write a GGUF file. Returns its path.

    keys: metadata added to KEYS; None leaves a key out. Keys get the family's name in front unless they start
    with general. or tokenizer. tensors: as `stored` returns them. kinds: tensor name -> type, by default F32.
    Only float32 arrays are converted to their type.
    """
    writer = gguf.GGUFWriter(path, family)
    for key, value in {**KEYS, **(keys or {})}.items():
        if value is not None:
            whole = key if key.startswith(("general.", "tokenizer.")) else f"{family}.{key}"
            writer.add_key_value(whole, value, kind_of(value))
    for name, array in (stored(arrays(family), family) if tensors is None else tensors).items():
        type_ = gguf.GGMLQuantizationType[(kinds or {}).get(name, "F32")]
        array = np.ascontiguousarray(array)
        if array.dtype == np.float32:
            array = gguf.quants.quantize(array, type_)
        writer.add_tensor(name, array, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def heads(key, value, turned):
    """The keys of the head size: key_length, value_length and rope.dimension_count."""
    names = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    return dict(zip(names, (key, value, turned), strict=True))


def refused(path, *args, **kwargs):
    """Write a file in `path` as `write` does. Returns the message with which open_model refuses it."""
    file = write(path / "m.gguf", *args, **kwargs)
    return refusal(file, lambda: open_model(file))
