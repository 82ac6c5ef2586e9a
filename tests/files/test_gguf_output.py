"""The GGUF files that we write: keys, types, sizes and numbers, as the gguf library reads them."""

import math

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf_small import SIZES, arrays, divisors, stored, write

from longlora.decoder.config import read_config
from longlora.errors import UserError
from longlora.files import gguf_writer
from longlora.files.gguf_writer import GgufWriter, sampling
from longlora.files.merge import merge
from longlora.files.open_model import open_model

TOKENS = {"tokenizer.ggml.tokens": list("abcdef")}
U32, I32, F32, BOOL, STRING = "UINT32", "INT32", "FLOAT32", "BOOL", "STRING"
DTYPES = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
UP = "model.layers.0.mlp.up_proj.weight"
LLAMA3 = dict(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0)


def config(family="llama", **fields):
    raw = {"model_type": family, "sliding_window": None, "tie_word_embeddings": False, **SIZES}
    raw |= dict(attention_bias=False, rope_theta=10000.0)
    return read_config({**raw, **fields})


def written(path, family="llama", dtype="f32", change=None, general=None, tokenizer=(), **fields):
    """Write a model; change(arrays) may change its arrays. Returns the gguf library's reader of the file."""
    found = arrays(family, **fields)
    found = (change and change(found)) or found
    made = GgufWriter(config(family, **fields), TOKENS | dict(tokenizer), dtype, "mine", general)
    made.write(path / "m.gguf", found.__getitem__)
    reader = gguf.GGUFReader(path / "m.gguf")
    assert made.size == sum(tensor.n_bytes for tensor in reader.tensors)
    assert (path / "m.gguf").stat().st_size % 32 == 0
    return reader


def keys(reader):
    """Map each name of the metadata to (type, value), except those of the tokenizer and of the header."""
    return {
        name: (field.types[0].name, field.contents())
        for name, field in reader.fields.items()
        if not name.startswith(("GGUF.", "tokenizer."))
    }


def refusal(family="llama", dtype="f32", tokenizer=None, **fields):
    with pytest.raises(UserError) as caught:
        GgufWriter(config(family, **fields), tokenizer or TOKENS, dtype, "mine")
    return str(caught.value)


SCALES = {
    "embedding_multiplier": ("embedding_scale", 12.0),
    "residual_multiplier": ("residual_scale", 0.25),
    "attention_multiplier": ("attention.scale", 0.125),
    "logits_scaling": ("logit_scale", 8.0),
}


@pytest.mark.parametrize(
    "family, stored_as",
    [
        ("llama", "llama"),
        ("mistral", "llama"),
        ("qwen2", "qwen2"),
        ("qwen3", "qwen3"),
        ("phi3", "phi3"),
        ("granite", "granite"),
        ("smollm3", "smollm3"),
    ],
)
def test_the_keys_of_each_family(tmp_path, family, stored_as):
    """As llama.cpp's convert_hf_to_gguf.py writes them."""
    scales = SCALES if family == "granite" else {}
    fields = {name: value for name, (_, value) in scales.items()}
    reader = written(tmp_path, family, rope_theta=500000.0, general={"general.license": "mit"}, **fields)
    own = {
        "vocab_size": (U32, 6),
        "context_length": (U32, 64),
        "embedding_length": (U32, 32),
        "block_count": (U32, 1),
        "feed_forward_length": (U32, 64),
        "attention.head_count": (U32, 4),
        "attention.head_count_kv": (U32, 2),
        "attention.key_length": (U32, 8),
        "attention.value_length": (U32, 8),
        "attention.layer_norm_rms_epsilon": (F32, float(np.float32(1e-5))),
        "rope.dimension_count": (U32, 8),
        "rope.freq_base": (F32, 500000.0),
        **{key: (F32, value) for key, value in scales.values()},
    }
    assert keys(reader) == {
        "general.architecture": (STRING, stored_as),
        "general.type": (STRING, "model"),
        "general.name": (STRING, "mine"),
        "general.license": (STRING, "mit"),
        "general.file_type": (U32, 0),
        "general.quantization_version": (U32, 2),
        **{f"{stored_as}.{key}": value for key, value in own.items()},
    }


@pytest.mark.parametrize("dtype, number", [("f32", 0), ("f16", 1), ("q8_0", 7), ("bf16", 32)])
def test_the_file_type_is_that_of_llama_h(tmp_path, dtype, number):
    assert keys(written(tmp_path, dtype=dtype))["general.file_type"] == (U32, number)


def test_values_are_stored_in_the_types_that_llama_cpp_reads(tmp_path):
    more = {
        "zero": 0,
        "one": 1,
        "minus": -1,
        "yes": True,
        "no": False,
        "half": 0.5,
        "text": "t",
        "list": [1, 2],
    }
    reader = written(tmp_path, tokenizer={f"tokenizer.{name}": value for name, value in more.items()})
    found = {name: reader.fields[f"tokenizer.{name}"] for name in more}
    assert {name: field.contents() for name, field in found.items()} == more
    assert {name: field.types[0].name for name, field in found.items()} == dict(
        zero=U32, one=U32, minus=I32, yes=BOOL, no=BOOL, half=F32, text=STRING, list="ARRAY"
    )
    assert reader.fields["tokenizer.ggml.tokens"].contents() == list("abcdef")


@pytest.mark.parametrize(
    "scaling, wanted",
    [
        (None, {}),
        (
            dict(rope_type="linear", factor=4.0),
            {"original_context_length": (U32, 64), "type": (STRING, "linear"), "factor": (F32, 4.0)},
        ),
        (
            dict(
                rope_type="yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=32, beta_slow=1
            ),
            {"original_context_length": (U32, 16), "type": (STRING, "yarn"), "factor": (F32, 4.0)},
        ),
        (
            dict(rope_type="yarn", factor=4.0, attention_factor=1.0, truncate=True),
            {
                "original_context_length": (U32, 64),
                "type": (STRING, "yarn"),
                "factor": (F32, 4.0),
                "attn_factor": (F32, float(np.float32(1 / (1 + 0.1 * math.log(4))))),
            },
        ),
        (
            dict(**LLAMA3, factor=8.0, original_max_position_embeddings=32),
            {"original_context_length": (U32, 32)},
        ),
    ],
)
def test_keys_of_rope_scaling(tmp_path, scaling, wanted):
    """llama.cpp multiplies yarn's own attention factor by attn_factor, so most files need none."""
    found = keys(written(tmp_path, rope_scaling=scaling))
    prefix = "llama.rope.scaling."
    assert {key.removeprefix(prefix): x for key, x in found.items() if key.startswith(prefix)} == wanted


def test_the_divisors_of_llama3_are_a_tensor(tmp_path):
    rope = dict(**LLAMA3, factor=8.0, original_max_position_embeddings=8192)
    reader = written(tmp_path, rope_scaling=rope, head_dim=64)
    (found,) = [tensor for tensor in reader.tensors if tensor.name == "rope_freqs.weight"]
    assert found.tensor_type.name == "F32" and found.data.dtype == np.float32
    np.testing.assert_allclose(found.data, divisors(10000.0, 64, 8192, 8.0), rtol=1e-6)
    for scaling in (None, dict(rope_type="linear", factor=4.0), dict(rope_type="yarn", factor=4.0)):
        names = [tensor.name for tensor in written(tmp_path, rope_scaling=scaling).tensors]
        assert "rope_freqs.weight" not in names


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi3", "granite", "smollm3"])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("chunk", [50, 1 << 17])
def test_names_types_and_numbers_of_tensors(tmp_path, monkeypatch, family, dtype, chunk):
    """Matrices have the file's type, or float16 if rows are not whole blocks of 32. Vectors are float32."""
    monkeypatch.setattr(gguf_writer, "CHUNK", chunk)
    reader = written(tmp_path, family, dtype, intermediate_size=48)
    stored_as = {"mistral": "llama"}.get(family, family)
    wanted = stored(arrays(family, intermediate_size=48), stored_as)
    assert [tensor.name for tensor in reader.tensors] == list(wanted)
    for tensor in reader.tensors:
        array = wanted[tensor.name]
        kind = dtype.upper() if array.ndim == 2 else "F32"
        kind = "F16" if kind == "Q8_0" and array.shape[1] == 48 else kind
        assert tensor.tensor_type.name == kind and tensor.shape[::-1].tolist() == list(array.shape)
        if kind == "Q8_0":
            data = gguf.quants.quantize(array, tensor.tensor_type)
        else:
            data = array.astype(DTYPES[kind.lower()])
        assert tensor.data.tobytes() == data.tobytes(), tensor.name


def test_biases_are_written(tmp_path):
    """Those of q and k are permuted as their weights."""
    fields = dict(attention_bias=True, head_dim=16)
    wanted = stored(arrays(**fields))
    found = {tensor.name: tensor.data for tensor in written(tmp_path, **fields).tensors}
    assert "blk.0.attn_k.bias" in wanted and found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize(
    "chunk, rows", [(20, [1] * 6), (40, [1] * 6), (64, [2] * 3), (95, [2] * 3), (999, [6])]
)
def test_a_few_rows_are_converted_at_a_time(tmp_path, monkeypatch, chunk, rows):
    found, original = {}, gguf_writer._stored

    def noted(array, kind, name):
        found.setdefault(name, []).append(len(array))
        return original(array, kind, name)

    monkeypatch.setattr(gguf_writer, "_stored", noted)
    monkeypatch.setattr(gguf_writer, "CHUNK", chunk)
    written(tmp_path)
    assert found["model.embed_tokens.weight"] == rows
    assert found["model.norm.weight"] == ([20, 12] if chunk == 20 else [32])


def test_an_array_of_a_wrong_shape_is_not_written(tmp_path):
    for shape in ((32, 64), (64, 31), (64, 32, 1)):
        with pytest.raises(AssertionError):
            written(tmp_path, change=lambda found: found | {UP: np.zeros(shape, np.float32)})  # noqa: B023
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [1e9, -1e9, np.inf, -np.inf, np.nan, 8.4e6])
def test_a_weight_beyond_q8_0_is_named_without_a_warning(tmp_path, value):
    """A block's scale is a float16, so its largest number is 127 * 65504, or 8.3e6."""

    def change(found):
        found[UP][3, 5] = value

    with pytest.raises(UserError, match=f"^{UP} has a weight that q8_0 cannot hold; choose bf16 or f32$"):
        written(tmp_path, dtype="q8_0", change=change)
    assert not list(tmp_path.iterdir())
    written(tmp_path, dtype="q8_0", change=lambda found: found[UP].__setitem__((3, 5), 8.3e6))


@pytest.mark.parametrize("dtype, name", [("f16", "float16"), ("bf16", "bfloat16")])
def test_a_weight_beyond_float16_or_bfloat16_is_named(tmp_path, dtype, name):
    def change(found):
        found[UP][3, 5] = 3.4e38

    with pytest.raises(UserError, match=f"^{UP} has a weight of 3.4e\\+38, which {name} cannot hold"):
        written(tmp_path, dtype=dtype, change=change)
    written(tmp_path, dtype="f32", change=change)


# ---- what llama.cpp does not compute -------------------------------------------------------------


def stops(family, what):
    return f"a {family} model with {what} cannot be a GGUF file: llama.cpp does not compute that"


def yarn(**more):
    return dict(rope_scaling=dict(rope_type="yarn", factor=4.0, **more))


@pytest.mark.parametrize(
    "family, fields, what",
    [
        ("qwen2", dict(rope_scaling=dict(**LLAMA3, factor=8.0)), "rope type llama3"),
        ("qwen3", dict(rope_scaling=dict(**LLAMA3, factor=8.0)), "rope type llama3"),
        ("smollm3", dict(rope_scaling=dict(**LLAMA3, factor=8.0)), "rope type llama3"),
        ("llama", yarn(beta_fast=16.0), "yarn's beta_fast 16 (only 32)"),
        ("llama", yarn(beta_fast=33.0), "yarn's beta_fast 33 (only 32)"),
        ("qwen2", yarn(beta_slow=2.0), "yarn's beta_slow 2 (only 1)"),
        ("mistral", yarn(beta_slow=0.5), "yarn's beta_slow 0.5 (only 1)"),
        ("llama", yarn(truncate=False), "yarn's truncate false"),
        ("qwen3", dict(attention_bias=True), "a bias on the attention's output (attention_bias)"),
        ("smollm3", dict(attention_bias=True), "a bias on the attention's output (attention_bias)"),
        ("qwen2", dict(head_dim=16), "4 heads of 16 and hidden_size 32"),
        ("phi3", dict(head_dim=4), "4 heads of 4 and hidden_size 32"),
        ("smollm3", dict(no_rope_layer_interval=3), "layers without rope other than every 4th"),
        ("smollm3", dict(no_rope_layers=[1] * 8), "layers without rope other than every 4th"),
        ("smollm3", dict(no_rope_layers=[1, 1, 0, 1] * 2), "layers without rope other than every 4th"),
        (
            "smollm3",
            dict(no_rope_layers=[1, 1, 1, 0, 1, 1, 1, 1]),
            "layers without rope other than every 4th",
        ),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(family, fields, what):
    layers = dict(num_hidden_layers=8) if family == "smollm3" else {}
    assert refusal(family, **layers, **fields) == stops(family, what)


@pytest.mark.parametrize(
    "family, fields",
    [
        ("llama", yarn()),
        ("llama", yarn(beta_fast=32.0, beta_slow=1.0, truncate=True)),
        ("qwen3", yarn()),
        ("qwen2", dict(num_attention_heads=8, head_dim=4)),
        ("smollm3", dict(num_hidden_layers=3)),
        ("smollm3", dict(num_hidden_layers=4)),
        ("smollm3", dict(num_hidden_layers=9, no_rope_layers=[1, 1, 1, 0, 1, 1, 1, 0, 1])),
    ],
)
def test_what_llama_cpp_computes_is_not_refused(family, fields):
    GgufWriter(config(family, **fields), TOKENS, "f32", "mine")


LONGER = dict(rope_scaling=dict(**LLAMA3, factor=8.0, original_max_position_embeddings=32))
BIAS, HEADS = dict(attention_bias=True), dict(head_dim=16)


@pytest.mark.parametrize(
    "family, computed",
    [
        ("llama", (LONGER, BIAS, HEADS)),
        ("mistral", (LONGER, HEADS)),
        ("qwen2", ()),
        ("qwen3", (HEADS,)),
        ("phi3", ()),
        ("granite", (LONGER, BIAS, HEADS)),
        ("smollm3", (HEADS,)),
    ],
)
def test_our_reader_gives_back_what_llama_cpp_computes(tmp_path, family, computed):
    """llama.cpp's graphs of the families differ in rope_freqs, biases and head sizes."""
    for fields in ({}, *computed):
        written(tmp_path, family, **fields)
        found, wanted = open_model(tmp_path / "m.gguf").config, config(family, **fields)
        assert found.family == {"mistral": "llama"}.get(family, family)
        for name in ("rope", "head_dim", "o_bias", "qkv_bias", "hidden_size", "vocab_size"):
            assert getattr(found, name) == getattr(wanted, name), name


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_a_merged_file_has_the_types_of_its_base(tmp_path, kind):
    tensors = stored(arrays())
    names = ("model", "pre", "tokens", "token_type", "merges", "eos_token_id")
    values = ("gpt2", "gpt-2", ["a", "b", "ab", "c", "d", "e"], [1] * 6, ["a b"], 5)
    keys = {f"tokenizer.ggml.{name}": value for name, value in zip(names, values, strict=True)}
    base = write(tmp_path / "base.gguf", keys=keys, kinds=dict.fromkeys(tensors, kind))
    file = merge(base, None, tmp_path / "out", format="gguf")
    assert file == str(tmp_path / "out" / f"model-{kind.lower()}.gguf")
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for name, array in tensors.items():
        data = array.astype(DTYPES[kind.lower()])
        data = data if array.ndim > 1 else data.astype(np.float32)
        assert found[name].data.tobytes() == data.tobytes(), name


def test_wrong_arguments_of_the_writer_are_refused(monkeypatch):
    assert refusal(dtype="int4") == "dtype should be one of f32, f16, bf16, q8_0, got 'int4'"
    for count in (5, 7):
        found = refusal(tokenizer={"tokenizer.ggml.tokens": ["x"] * count})
        assert found == f"the tokenizer has {count} tokens, the embedding 6 rows"
    monkeypatch.setattr(gguf_writer, "ARCHITECTURES", {})
    for family in ("mistral", "qwen3"):
        assert refusal(family) == (f"a {family} model cannot be a GGUF file: llama.cpp has no such model")


# ---- sampling ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "generation, wanted",
    [
        ({}, {}),
        (dict(temperature=0.6), {}),
        (dict(do_sample=False, temperature=0.6), {}),
        (dict(do_sample=1, temperature=0.6), {}),
        (dict(do_sample="true", temperature=0.6), {}),
        (dict(do_sample=True, temperature=None, top_k="20", top_p=[0.9], typical_p=0.5), {}),
        (
            dict(do_sample=True, temperature=1, top_k=20.0, top_p=0.9, min_p=0.05, repetition_penalty=1.1),
            dict(temp=1.0, top_k=20, top_p=0.9, min_p=0.05, penalty_repeat=1.1),
        ),
        (dict(do_sample=True, top_k=20), dict(top_k=20)),
    ],
)
def test_the_sampling_keys_of_a_generation_config(generation, wanted):
    """The gguf library names the keys."""
    found = sampling(generation)
    assert set(found) <= {name for name in vars(gguf.Keys.General).values() if isinstance(name, str)}
    assert found == {f"general.sampling.{name}": value for name, value in wanted.items()}
    for name, value in wanted.items():
        assert type(found[f"general.sampling.{name}"]) is type(value)
