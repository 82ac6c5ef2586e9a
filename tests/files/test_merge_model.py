"""What a merged model holds: numbers, dtypes, shards, config, chat template and name."""

import json
import os

import gguf
import ml_dtypes
import numpy as np
import pytest
import tiny
from adapter_small import NORM, written
from adapter_small import QUERY as LORA
from gguf_cases import TEMPLATE
from gguf_cases import base as gguf_base
from safetensors.numpy import load_file, save_file

from longlora import Tensor
from longlora.decoder.config import read_config
from longlora.errors import UserError
from longlora.files import merge
from longlora.files.open_model import open_model

QUERY = "model.layers.0.self_attn.q_proj.weight"
UP = "model.layers.1.mlp.up_proj.weight"
A, B = (np.arange(64, dtype=np.float32).reshape(shape) % 5 for shape in ((2, 32), (32, 2)))


def adapter(path, template=None):
    """Write an adapter of scale 3 / 2 that changes q_proj of layer 0 and the last norm. Returns `path`."""
    tensors = {LORA.format(i, "A"): A * (i == 0) for i in (0, 1)}
    tensors |= {LORA.format(i, "B"): B for i in (0, 1)}
    written(path, tensors | {NORM: TRAINED[NORM]}, lora_alpha=3)
    if template is not None:
        (path / "chat_template.jinja").write_bytes(template)
    return path


def config(path):
    return json.loads((path / "config.json").read_text())


class Stub:
    """A stand-in for an opened model. Its tensors are ones."""

    path = "base"

    def names(self):
        return [QUERY, NORM, UP]

    def read(self, name, out=None):
        array = np.ones(32 if name == NORM else (32, 32), np.float32)
        if out is None:
            return array
        out.copy_(array)
        return out


class Lora:
    scale = 1.5


TRAINED = {QUERY.replace("weight", "lora_A.weight"): A, QUERY.replace("weight", "lora_B.weight"): B}
TRAINED |= {NORM: np.full(32, 2.5, np.float32)}
WANTED = {QUERY: 1 + 1.5 * (B @ A), NORM: TRAINED[NORM], UP: np.ones((32, 32))}


@pytest.mark.parametrize("name", WANTED)
def test_a_tensor_is_merged_or_replaced_or_stays(name):
    merged = merge.Merged(Stub(), Lora, TRAINED)
    assert merged.names() == [QUERY, NORM, UP] and merged.path == "base"
    found = merged.read(name)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, WANTED[name])
    out = Tensor(WANTED[name].shape, "float32")
    assert merged.read(name, out) is out
    np.testing.assert_array_equal(out.numpy(), WANTED[name])


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_only_a_gpu_gets_a_copy_of_weights(monkeypatch, device):
    """Here the copy is on the CPU, where it is multiplied too."""
    sent = []

    def send(array, where):
        sent.append(where)
        tensor = Tensor(array.shape, "float32")
        tensor.copy_(array)
        return tensor

    monkeypatch.setattr(merge, "send", send)
    merged = merge.Merged(Stub(), Lora, TRAINED, device)
    for name, wanted in WANTED.items():
        np.testing.assert_array_equal(merged.read(name), wanted)
    assert sent == ([] if device == "cpu" else [device] * 3)


def test_merging_an_adapter_of_peft(tmp_path):
    """scale = alpha / r = 1.5; the rope is the base's."""
    path = tiny.model(tmp_path / "base", transformers_weights="model.safetensors", dtype="float16")
    base = open_model(path)
    merge.merge(path, adapter(tmp_path / "a"), tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert sorted(found) == sorted(base.names())
    wanted = {QUERY: base.read(QUERY) + np.float32(1.5) * (B @ A), NORM: np.full(32, 2.5)}
    for name, array in found.items():
        np.testing.assert_array_equal(array, wanted.get(name, base.read(name)))
    # These two keys describe the file of the base.
    kept = {key: value for key, value in config(path).items() if key not in ("dtype", "transformers_weights")}
    assert config(tmp_path / "out") == kept | {"torch_dtype": "float32"}


def test_a_merged_model_has_the_positions_of_its_adapter(tmp_path):
    path, trained = tiny.model(tmp_path / "base"), adapter(tmp_path / "a")
    raw = tiny.CONFIG | dict(max_position_embeddings=256, rope_scaling=dict(rope_type="linear", factor=4.0))
    (trained / "config.json").write_text(json.dumps(raw))
    for given in (trained, None):
        out = tmp_path / f"out-{given is None}"
        merge.merge(path, given, out)
        assert config(out)["max_position_embeddings"] == (64 if given is None else 256)
        assert config(out).get("rope_scaling") == (None if given is None else raw["rope_scaling"])


@pytest.mark.parametrize("dtype", ["auto", "f32", "f16", "bf16"])
def test_the_dtype_of_a_directory(tmp_path, dtype):
    """auto: each tensor keeps the dtype that it has in the base."""
    path = tiny.model(tmp_path / "base", tie_word_embeddings=False)
    stored = load_file(path / "model.safetensors")
    stored[UP] = stored[UP].astype(np.float16)
    save_file(stored, path / "model.safetensors")
    assert merge.merge(path, None, tmp_path / "out", dtype=dtype) == str(tmp_path / "out")
    kind = {"auto": np.float32, "f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}[dtype]
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, array in found.items():
        wanted = stored[name].astype(np.float16 if dtype == "auto" and name == UP else kind)
        assert array.dtype == wanted.dtype
        np.testing.assert_array_equal(array, wanted)
    assert config(tmp_path / "out")["torch_dtype"] == np.dtype(kind).name
    assert f"| weights | {np.dtype(kind).name} |" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    "how, message",
    [
        (dict(format="onnx"), "format should be one of huggingface, gguf, got 'onnx'"),
        (dict(dtype="int8"), "dtype should be one of auto, f32, f16, bf16, q8_0, got 'int8'"),
        (dict(format="gguf", dtype="float32"), "dtype should be one of auto, f32, .*, got 'float32'"),
        (
            dict(dtype="q8_0"),
            "dtype q8_0 is for format gguf; a Hugging Face directory takes f32, f16 and bf16",
        ),
        (dict(device="tpu"), "device should be auto, cpu, cuda, .*, got 'tpu'"),
    ],
)
def test_a_wrong_option_is_named_with_the_supported_ones(tmp_path, how, message):
    with pytest.raises(UserError, match=f"^{message}"):
        merge.merge(tiny.model(tmp_path / "base"), None, tmp_path / "out", **how)
    assert os.listdir(tmp_path) == ["base"]


def test_a_gguf_needs_a_tokenizer_and_a_directory_does_not(tmp_path):
    base = tiny.model(tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()
    with pytest.raises(UserError, match=f"^{base}: has no tokenizer; a GGUF file needs one$"):
        merge.merge(base, None, tmp_path / "out", format="gguf")
    merge.merge(base, adapter(tmp_path / "a", b"theirs"), tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["README.md", "config.json", "model.safetensors"]


def test_a_damaged_template_of_an_adapter_is_named(tmp_path):
    base, path = tiny.model(tmp_path / "base"), adapter(tmp_path / "a", b"caf\xe9")
    with pytest.raises(UserError, match=f"^{path}/chat_template.jinja: is not UTF-8 at byte 3$"):
        merge.merge(base, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("template", [None, "caf\xe9 {{ x }}"])
def test_a_directory_has_the_template_that_the_adapter_was_trained_with(tmp_path, template):
    base = tiny.model(tmp_path / "base")
    (base / "chat_template.jinja").write_text("base")
    path = adapter(tmp_path / "a", template and template.encode())
    merge.merge(base, path, tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_bytes() == (template or "base").encode()


def gguf_of(path, *given, dtype="auto"):
    """Merge into a GGUF file in the directory `path`. Returns its path and its metadata."""
    found = merge.merge(*given, path, format="gguf", dtype=dtype)
    kind = "f32" if dtype == "auto" else dtype
    assert found == str(path / f"model-{kind}.gguf")
    assert sorted(os.listdir(path)) == ["README.md", f"model-{kind}.gguf"]
    return found, {name: field.contents() for name, field in gguf.GGUFReader(found).fields.items()}


@pytest.mark.parametrize("template", [None, "caf\xe9\r\n{{ x }}"])
@pytest.mark.parametrize("kind", ["directory", "file"])
def test_a_gguf_has_the_template_that_the_adapter_was_trained_with(tmp_path, kind, template):
    """kind: whether the base is a directory or a file. Line ends become \\n, as in transformers."""
    base, trained = gguf_base(tmp_path / "base"), adapter(tmp_path / "a", template and template.encode())
    if kind == "file":
        base, keys = gguf_of(tmp_path / "one", base, None)
        assert keys["tokenizer.chat_template"] == TEMPLATE and keys["general.name"] == "one"
    _, keys = gguf_of(tmp_path / "two", base, trained, dtype="f16")
    assert keys["tokenizer.chat_template"] == ("caf\xe9\n{{ x }}" if template else TEMPLATE)
    assert keys["general.name"] == "two"
    card = (tmp_path / "two" / "README.md").read_text()
    assert "# two\n" in card and "llama-server -m model-f16.gguf" in card and "| weights | f16 |" in card


def test_a_gguf_has_the_sampling_of_the_base(tmp_path):
    path = gguf_base(tmp_path / "base")
    (path / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.5, "top_k": 7}')
    first, keys = gguf_of(tmp_path / "out", path, None)
    for found in keys, gguf_of(tmp_path / "again", first, None)[1]:
        sampling = {name: value for name, value in found.items() if name.startswith("general.sampling.")}
        assert sampling == {"general.sampling.temp": 0.5, "general.sampling.top_k": 7}


def test_a_model_has_the_name_of_the_directory_that_a_link_leads_to(tmp_path, monkeypatch):
    base = tiny.model(tmp_path / "base")
    (tmp_path / "real\x1b").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real\x1b")
    monkeypatch.chdir(tmp_path / "link")
    merge.merge(base, None, ".")
    assert "# real_x1b\n" in (tmp_path / "link" / "README.md").read_text()


# ---- saving any weights --------------------------------------------------------------------------

RAW = tiny.CONFIG | dict(num_hidden_layers=1)
INDEX = "model.safetensors.index.json"


def save(path, raw=RAW, **how):
    """Save a model whose weights are 1.5. Returns its files of weights: name -> tensors."""
    shapes = read_config(raw).tensor_shapes()
    merge.save_merged(path, lambda name: np.full(shapes[name], 1.5, np.float32), raw, **how)
    return {file.name: load_file(file) for file in sorted(path.glob("*.safetensors"))}


# The tensors of RAW in the order of the network, their bytes in float32, and shards of at most 8320 bytes.
LAYER = "model.layers.0."
SHARDS = [
    {"model.embed_tokens.weight": 33280},
    {
        LAYER + "input_layernorm.weight": 128,
        LAYER + "self_attn.q_proj.weight": 4096,
        LAYER + "self_attn.k_proj.weight": 2048,
        LAYER + "self_attn.v_proj.weight": 2048,
    },
    {LAYER + "self_attn.o_proj.weight": 4096, LAYER + "post_attention_layernorm.weight": 128},
    {LAYER + "mlp.gate_proj.weight": 6144},
    {LAYER + "mlp.up_proj.weight": 6144},
    {LAYER + "mlp.down_proj.weight": 6144, NORM: 128},
]
REST = {name: size for shard in SHARDS[1:] for name, size in shard.items()}


@pytest.mark.parametrize(
    "most, dtype, shards", [(8320, "float32", SHARDS), (15552, "bfloat16", [SHARDS[0], REST])]
)
def test_a_shard_is_filled_up_to_its_size(tmp_path, monkeypatch, most, dtype, shards):
    """A larger tensor has a shard of its own. The index and the names are as in transformers."""
    monkeypatch.setattr(merge, "SHARD", most)
    found = save(tmp_path, dtype=dtype)
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    assert [*found] == files and [sorted(held) for held in found.values()] == [sorted(x) for x in shards]
    assert {str(array.dtype) for held in found.values() for array in held.values()} == {dtype}
    places = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    total = 64384 if dtype == "float32" else 32192
    index = json.loads((tmp_path / INDEX).read_text())
    assert index == {"metadata": {"total_size": total}, "weight_map": places}
    np.testing.assert_array_equal(open_model(tmp_path).read(NORM), np.full(32, 1.5))


def test_a_model_that_fits_is_one_file_of_float32(tmp_path, monkeypatch):
    """The index of an earlier model is removed: readers would follow it."""
    monkeypatch.setattr(merge, "SHARD", 64384)
    (tmp_path / INDEX).write_text("{}")
    found = save(tmp_path)
    assert [*found] == ["model.safetensors"] and not (tmp_path / INDEX).exists()
    arrays = found["model.safetensors"]
    assert arrays.keys() == SHARDS[0].keys() | REST.keys()
    assert {name: array.nbytes for name, array in arrays.items()} == SHARDS[0] | REST
    assert all(array.dtype == np.float32 and (array == 1.5).all() for array in arrays.values())


def test_files_beside_the_weights(tmp_path):
    tokenizer = open_model(tiny.model(tmp_path / "base")).tokenizer()
    tokenizer.put("tokenizer_config.json", b'{"model_max_length": 8}')
    raw = RAW | dict(dtype="float16", transformers_weights="x.safetensors", torch_dtype="float64")
    merge.save_merged(tmp_path / "m", None, raw, tokenizer, "bfloat16", {"generation_config.json": b"{ }"})
    names = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(os.listdir(tmp_path / "m")) == names
    assert config(tmp_path / "m") == RAW | dict(torch_dtype="bfloat16")
    assert (tmp_path / "m" / "generation_config.json").read_bytes() == b"{ }"
    assert json.loads((tmp_path / "m" / "tokenizer_config.json").read_text()) == {"model_max_length": 64}
    merge.save_merged(tmp_path / "bare", None, RAW)
    assert os.listdir(tmp_path / "bare") == ["config.json"]


def test_errors_of_saving_name_the_path_or_the_weight(tmp_path):
    (tmp_path / "m").write_text("mine")
    with pytest.raises(UserError, match=f"^{tmp_path}/m: cannot be made: File exists$"):
        save(tmp_path / "m")
    shapes = read_config(RAW).tensor_shapes()

    def read(name):
        return np.full(shapes[name], 1e6 if name == NORM else 1, np.float32)

    dtypes = dict.fromkeys(shapes, "float32") | {NORM: "float16"}
    with pytest.raises(UserError, match=rf"^{NORM} has a weight of 1e\+06, which float16 cannot hold"):
        merge.save_merged(tmp_path / "n", read, RAW, dtype=dtypes)
