"""Which files of a model directory are read, and how wrong ones are named."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from longlora.decoder.config import read_config
from longlora.errors import UserError
from longlora.files import huggingface
from longlora.files.open_model import open_model, refuse_folder_of_gguf

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
SMALL = dict(num_hidden_layers=1, hidden_size=8, head_dim=4, intermediate_size=8, vocab_size=9)
DTYPES = {"float32": "f4", "float16": "f2", "float64": "f8", "bfloat16": ml_dtypes.bfloat16}


def tensors(dtype="float32", **fields):
    """The tensors of a tiny model: small integers, which every dtype holds."""
    shapes = read_config({**tiny.CONFIG, **fields}).tensor_shapes()
    rng = np.random.default_rng(0)
    return {name: rng.integers(-9, 9, shape).astype(DTYPES[dtype]) for name, shape in shapes.items()}


def single(path, change=None, dtype="float32", name=SINGLE, **fields):
    """Make a directory with one file of weights; change(tensors) may change them. Returns `path`."""
    fields = {**SMALL, **fields}
    tiny.config(path, **fields)
    found = tensors(dtype, **{key: value for key, value in fields.items() if key in tiny.CONFIG})
    save_file((change and change(found)) or found, path / name)
    return path


def sharded(path, change=None, index=INDEX, **fields):
    """As `single`, but with two shards; change(weight_map) may change their index."""
    single(path, name="whole.safetensors", **fields)
    found = load_file(path / "whole.safetensors")
    (path / "whole.safetensors").unlink()
    names = list(found)
    shards = {"one.safetensors": names[:4], "two.safetensors": names[4:]}
    for file, part in shards.items():
        save_file({name: found[name] for name in part}, path / file)
    places = {name: file for file, part in shards.items() for name in part}
    places = (change and change(places)) or places
    (path / index).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return path


def refusal(path):
    """The message of open_model without the path of the directory."""
    with pytest.raises(UserError) as caught:
        open_model(path)
    return str(caught.value).replace(f"{path}{os.sep}", "").removeprefix(f"{path}: ")


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_each_float_dtype_are_read(tmp_path, dtype):
    ours, wanted = open_model(single(tmp_path, dtype=dtype)), {}
    single(tmp_path / "f4", lambda found: wanted.update(found))
    assert ours.kind == "huggingface" and set(ours.names()) == set(wanted)
    for name in ours.names():
        assert ours.dtype(name) == ours.storage(name) == dtype
        np.testing.assert_array_equal(ours.read(name), wanted[name])


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8"])
def test_weights_of_integers_are_refused(tmp_path, dtype):
    ours = open_model(single(tmp_path, lambda found: {**found, NORM: found[NORM].astype(dtype)}))
    message = f"^{tmp_path}: {NORM} has dtype {dtype}; supported are float32, bfloat16, float16 and float64$"
    for look in (lambda: ours.read(NORM), ours.fingerprint):
        with pytest.raises(UserError, match=message):
            look()


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "model.layers.0.self_attn.masked_bias",
        "model.layers.0.attn.bias",
    ],
)
def test_buffers_of_old_files_are_left_out(tmp_path, name):
    """transformers 4 and earlier saved them. A name that only begins with theirs is unknown."""
    path = single(tmp_path / "one", lambda found: {**found, name: np.ones(4, np.float32)})
    assert name not in open_model(path).names()
    path = single(tmp_path / "two", lambda found: {**found, f"{name}.more": np.ones(4, np.float32)})
    assert refusal(path) == f"1 tensors do not belong to a llama model: {name}.more"


# ---- which files are read ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        3,
        ["x.safetensors"],
        False,
        "",
        ".",
        "..",
        "sub/x.safetensors",
        "../x.safetensors",
        "/x.safetensors",
        "x.bin",
        "x.index.json",
    ],
)
def test_transformers_weights_must_name_a_file_beside_the_config(tmp_path, name):
    path = single(tmp_path, transformers_weights=name)
    assert refusal(path) == (
        f"transformers_weights should name a .safetensors file or its index beside config.json, got {name!r}"
    )


def test_the_weights_that_a_config_names_come_before_others(tmp_path):
    path = single(tmp_path, transformers_weights="x.safetensors")
    assert refusal(path) == "x.safetensors: No such file or directory"
    single(tmp_path, lambda found: {**found, NORM: found[NORM] + 100}, name="x.safetensors")
    single(tmp_path, transformers_weights="x.safetensors")
    assert open_model(path).read(NORM).min() > 50
    sharded(path, index="y.safetensors.index.json", transformers_weights="y.safetensors.index.json")
    assert open_model(path).read(NORM).max() < 50
    for file in ("one", "two"):
        (path / f"{file}.safetensors").unlink()
    assert refusal(path) == "one.safetensors: No such file or directory"


def test_a_directory_without_safetensors_is_refused(tmp_path):
    (single(tmp_path) / SINGLE).rename(tmp_path / "pytorch_model.bin")
    assert refusal(tmp_path) == f"has neither {SINGLE} nor {INDEX}; only safetensors weights are read"


def test_one_rank_of_a_distributed_run_is_refused(tmp_path, monkeypatch):
    """With such files in the directory, transformers reads only these, and needs as many ranks."""
    path = single(tmp_path / "model")
    (tmp_path / "shard-00000-model-00001-of-00002.safetensors").write_text("")
    monkeypatch.chdir(tmp_path)
    open_model(path)
    for number in (1, 0):
        name = f"shard-0000{number}-model-00001-of-00002.safetensors"
        (path / name).write_text("")
        assert refusal(path) == f"{name} is one rank's part of a model; wanted a whole model"


def test_an_adapter_is_refused_as_a_model(tmp_path):
    (single(tmp_path) / "adapter_config.json").write_text("{}")
    assert refusal(tmp_path) == "is an adapter; wanted the model it was trained on, or a merged model"


# ---- the index -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: [*m], "should be an object that maps tensor names to file names"),
        (lambda m: "one.safetensors", "should be an object that maps tensor names to file names"),
        (lambda m: {**m, NORM: None}, "should be an object that maps tensor names to file names"),
        (
            lambda m: {**m, NORM: ["one.safetensors"]},
            "should be an object that maps tensor names to file names",
        ),
        (
            lambda m: {**m, NORM: "../one.safetensors"},
            "should name files beside it, got '../one.safetensors'",
        ),
        (lambda m: {**m, NORM: "/one.safetensors"}, "should name files beside it, got '/one.safetensors'"),
        (lambda m: {**m, NORM: ""}, "should name files beside it, got ''"),
        (lambda m: {**m, NORM: "."}, "should name files beside it, got '.'"),
        (lambda m: {**m, NORM: ".."}, "should name files beside it, got '..'"),
    ],
)
def test_a_wrong_weight_map_is_named(tmp_path, change, message):
    assert refusal(sharded(tmp_path, change)) == f"{INDEX}: weight_map {message}"


def test_an_index_without_a_weight_map_is_named(tmp_path):
    (sharded(tmp_path) / INDEX).write_text('{"metadata": {}}')
    assert refusal(tmp_path).startswith(f"{INDEX}: weight_map should be an object")


def test_a_tensor_that_no_shard_has_is_named(tmp_path):
    sharded(tmp_path, lambda places: {**places, "model.more": "one.safetensors"})
    assert refusal(tmp_path) == f"{INDEX}: model.more should be in one.safetensors, which does not have it"


def test_all_tensors_of_the_listed_shards_are_read(tmp_path):
    path = sharded(tmp_path, lambda places: {n: f for n, f in places.items() if n != NORM})
    file = path / "two.safetensors"
    save_file({**load_file(file), "unlisted": np.ones(4)}, file)
    ours, wanted = open_model(path), open_model(single(tmp_path / "whole"))
    assert ours.names() == wanted.names()
    for name in ours.names():
        np.testing.assert_array_equal(ours.read(name), wanted.read(name))


# ---- the head ------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [None, (0, 0), (0, 7), (1, 0), (4, 3), (8, 7)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_head_is_tied_if_each_number_is_that_of_the_embedding(tmp_path, monkeypatch, place, dtype):
    """They may be stored in different dtypes. Their 72 numbers are compared in pieces."""

    def change(found):
        head = found[EMBEDDING].astype(np.float32)
        if place is not None:
            head[place] += 1
        return {**found, HEAD: head}

    path, tied = single(tmp_path, change, dtype), place is None
    for chunk in (1, 7, 8, 71, 72, 1000):
        monkeypatch.setattr(huggingface, "CHUNK", chunk)
        ours = open_model(path)
        assert ours.config.tie_word_embeddings is ours.config.raw["tie_word_embeddings"] is tied
        assert (HEAD in ours.names()) is not tied


@pytest.mark.parametrize("shape", [(72,), (8, 8), (9, 8, 1), (9, 0), (0, 8), ()], ids=str)
@pytest.mark.parametrize("names", [[HEAD], [EMBEDDING], [HEAD, EMBEDDING]], ids=["head", "embedding", "both"])
def test_a_head_or_an_embedding_of_another_shape_is_named(tmp_path, shape, names):
    wrong = dict.fromkeys(names, np.ones(shape, np.float32))
    path = single(tmp_path, lambda found: {**found, HEAD: found[EMBEDDING], **wrong})
    assert refusal(path) == f"{names[-1]} should have shape [9, 8] by the config, got {list(shape)}"


def test_a_head_without_an_embedding_is_both(tmp_path):
    wanted = {}

    def change(found):
        wanted[EMBEDDING] = found[EMBEDDING]
        return {HEAD if name == EMBEDDING else name: array for name, array in found.items()}

    ours = open_model(single(tmp_path, change))
    assert ours.config.tie_word_embeddings and HEAD not in ours.names()
    np.testing.assert_array_equal(ours.read(EMBEDDING), wanted[EMBEDDING])
    path = single(tmp_path / "untied", change, tie_word_embeddings=False)
    assert refusal(path) == f"1 tensors of the config are missing: {EMBEDDING}"


def test_pages_that_were_compared_are_released(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(huggingface, "release", lambda *place: calls.append(place[1:]))
    ours = open_model(single(tmp_path, lambda found: {**found, HEAD: found[EMBEDDING]}))
    file = ours._places[HEAD][0]
    assert calls == [file.entries[name][2:] for name in (HEAD, EMBEDDING)]


# ---- other files ---------------------------------------------------------------------------------


def test_the_generation_config_is_copied_with_a_model(tmp_path):
    path = single(tmp_path)
    assert open_model(path).beside() == {}
    content = b'{\n  "temperature": 0.6\n}'
    (path / "generation_config.json").write_bytes(content)
    assert open_model(path).beside() == {"generation_config.json": content}
    (path / "generation_config.json").write_bytes(b"{")
    with pytest.raises(UserError, match="generation_config.json: not JSON"):
        open_model(path).beside()


def test_a_directory_may_lack_a_tokenizer(tmp_path):
    ours = open_model(single(tmp_path, vocab_size=260))
    assert ours.has_tokenizer() is True and ours.tokenizer().encode("a").tolist() == [97]
    (tmp_path / "tokenizer.json").unlink()
    assert ours.has_tokenizer() is False


# ---- what is not a model -------------------------------------------------------------------------


def test_a_path_without_a_model_is_named(tmp_path):
    assert refusal(tmp_path).startswith("config.json: No such file")
    path = tmp_path / "nowhere"
    assert refusal(path) == (
        "no such file or directory; wanted a model directory with config.json, or a .gguf file"
    )
    path.write_text("a text of more than eight bytes")
    assert refusal(path) == "not a GGUF file (and not a model directory)"


def test_a_directory_of_ggufs_names_the_first(tmp_path):
    for name in ("b.gguf", "a.gguf", "a.bin"):
        (tmp_path / name).write_text("")
    wanted = f"has no config.json; give the file {os.path.join(tmp_path, 'a.gguf')}"
    with pytest.raises(UserError, match=f"^{tmp_path}: {wanted}$"):
        open_model(tmp_path)
    open_model(single(tmp_path))
    for path in (tmp_path, tmp_path / "a.gguf", tmp_path / "nowhere"):
        refuse_folder_of_gguf(path)
