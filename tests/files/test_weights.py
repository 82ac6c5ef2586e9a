"""Model directories of transformers are read bit for bit. Errors say what is wrong with a directory."""

import json
import os
import re
import struct

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longlora.decoder.families import FAMILIES
from longlora.disk import write_json, write_text
from longlora.errors import UserError
from longlora.files import safetensors as safetensors_file
from longlora.files.open_model import open_model
from longlora.files.safetensors import SafetensorsFile

SIZES = dict(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    head_dim=8,
)
# What a tiny model of each family needs beside the sizes: the features that distinguish it.
OF_FAMILY = {
    "mistral": dict(sliding_window=None),
    "phi3": dict(bos_token_id=1, eos_token_id=2, pad_token_id=None),
    "granite": dict(
        embedding_multiplier=3.0, residual_multiplier=0.25, attention_multiplier=0.3, logits_scaling=1.5
    ),
    "smollm3": dict(bos_token_id=1, eos_token_id=2, pad_token_id=None, no_rope_layer_interval=2),
}


def build(path, family="llama", dtype=torch.float32, **fields):
    """Save a tiny random model of a family at `path` with save_pretrained(**save) -> the model."""
    import transformers

    save = fields.pop("save", {})
    name = FAMILIES[family].architecture
    torch.manual_seed(0)
    config = getattr(transformers, name.replace("ForCausalLM", "Config"))
    config = config(**{**SIZES, **OF_FAMILY.get(family, {}), **fields})
    model = getattr(transformers, name)(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2 + 0.05)
    model.save_pretrained(path, **save)
    return model


def failure(path):
    """The one line of the error when the model at `path` is opened and read."""
    with pytest.raises(UserError) as caught:
        model = open_model(path)
        for name in model.names():
            model.read(name)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("sharded", [False, True])
def test_we_read_the_tensors_that_transformers_saved(tmp_path, family, tied, dtype, sharded):
    save = dict(max_shard_size="3KB") if sharded else {}
    model = build(tmp_path, family, getattr(torch, dtype), tie_word_embeddings=tied, save=save)
    assert os.path.exists(tmp_path / "model.safetensors.index.json") is sharded
    ours, state = open_model(tmp_path), model.state_dict()
    assert ours.kind == "huggingface" and set(ours.names()) == set(state) - (
        {"lm_head.weight"} if tied else set()
    )
    for name in ours.names():
        assert ours.shape(name) == tuple(state[name].shape) and ours.dtype(name) == dtype
        wanted = state[name].float().numpy()
        out = np.full(wanted.shape, np.nan, np.float32)
        assert ours.read(name, out) is out
        np.testing.assert_array_equal(out, wanted)
        np.testing.assert_array_equal(ours.read(name), wanted)
        half = ours.read(name, np.empty(wanted.shape, ml_dtypes.bfloat16))
        np.testing.assert_array_equal(half.astype(np.float32), state[name].bfloat16().float().numpy())
        half = ours.read(name, np.empty(wanted.shape, np.float16))
        np.testing.assert_array_equal(half, state[name].half().numpy())


def test_fingerprint_tells_models_apart(tmp_path):
    one, two = build(tmp_path / "a"), build(tmp_path / "b")
    assert open_model(tmp_path / "a").fingerprint() == open_model(tmp_path / "b").fingerprint()
    with torch.no_grad():
        two.model.layers[1].self_attn.o_proj.weight[-1, -1] += 1
    two.save_pretrained(tmp_path / "c")
    one.config.rope_parameters["rope_theta"] = 5e5
    one.save_pretrained(tmp_path / "d")
    assert len({open_model(tmp_path / name).fingerprint() for name in "acd"}) == 3


def edit(path, change, file="model.safetensors"):
    """Rewrite a safetensors file after change(its dict of tensors)."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(path / file)
    save_file(change(tensors) or tensors, path / file)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("model.norm.weight"), "1 tensors of the config are missing: model.norm.weight"),
        (
            lambda t: [t.pop(name) for name in list(t) if "layers.1" in name],
            "9 tensors of the config are missing: .*, ...",
        ),
        (
            lambda t: t.update({"model.extra": np.ones(1, np.float32)}),
            "1 tensors do not belong to a llama model: model.extra",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.ones(15, np.float32)}),
            "should have shape \\[16\\] by the config",
        ),
        (
            lambda t: t["model.layers.1.mlp.up_proj.weight"].__setitem__((3, 5), np.nan),
            "weight is not finite at \\[3, 5\\]",
        ),
        (
            lambda t: t["model.norm.weight"].__setitem__(4, -np.inf),
            "model.norm.weight is not finite at \\[4\\]",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.ones(16, np.int32)}),
            "model.norm.weight has dtype int32",
        ),
        (lambda t: t.update({"model.norm.weight": np.ones(16, np.int8)}), "model.norm.weight has dtype I8"),
    ],
)
def test_wrong_tensors_are_named(tmp_path, change, message):
    build(tmp_path)

    def apply(tensors):
        change(tensors)
        return tensors

    edit(tmp_path, apply)
    assert re.search(message, failure(tmp_path))


def test_a_tied_head_that_is_stored_is_ignored(tmp_path):
    build(tmp_path, tie_word_embeddings=True)
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    assert "lm_head.weight" not in open_model(tmp_path).names()


def test_a_missing_shard_is_named(tmp_path):
    build(tmp_path, save=dict(max_shard_size="3KB"))
    next(tmp_path.glob("model-00001-of-*.safetensors")).unlink()
    assert "No such file" in failure(tmp_path)


def raw_file(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(start, end, shape=None, dtype="F32"):
    return {
        "dtype": dtype,
        "shape": [(end - start) // 4] if shape is None else shape,
        "data_offsets": [start, end],
    }


@pytest.mark.parametrize(
    "header, size, message",
    [
        ({"a": entry(0, 16)}, 12, "truncated: a ends at byte"),
        ({"a": entry(0, 16)}, 20, "the file has .* bytes, its header describes"),
        ({"a": entry(0, 16), "b": entry(8, 24)}, 24, "b: data starts at byte .*: tensors overlap"),
        ({"a": entry(0, 8), "b": entry(12, 24)}, 24, "tensors have a hole between them"),
        ({"a": entry(4, 8)}, 8, "tensors have a hole between them"),
        ({"a": entry(0, 16, [5])}, 16, "F32 of shape \\[5\\] needs 20 bytes, its data_offsets span 16"),
        ({"a": entry(0, 16, [1 << 40, 1 << 40])}, 16, "needs .* bytes"),
        ({"a": entry(0, 16, [-4])}, 16, "shape should be a list of integers from 0, got \\[-4\\]"),
        ({"a": entry(0, 16, [4.0])}, 16, "shape should be a list of integers"),
        ({"a": entry(0, 16, "4")}, 16, "shape should be a list of integers"),
        ({"a": {**entry(0, 16), "data_offsets": [16, 0]}}, 16, "data_offsets should be a start and an end"),
        (
            {"a": {**entry(0, 16), "data_offsets": [-16, 0]}},
            16,
            "data_offsets should be a list of integers from 0",
        ),
        ({"a": {**entry(0, 16), "data_offsets": [0]}}, 16, "data_offsets should be a start and an end"),
        ({"a": entry(0, 16, dtype="F31")}, 16, "dtype 'F31' is not supported"),
        ({"a": entry(0, 16, dtype=["F32"])}, 16, "dtype \\['F32'\\] is not supported"),
        ({"a": 3}, 0, "a: shape should be a list of integers from 0"),
        ({"a\nb": entry(0, 16)}, 12, "truncated: a b ends at byte"),
        ({"__metadata__": [1]}, 0, "__metadata__ should be a JSON object"),
        ([], 0, "should be a JSON object, got list"),
        (b"{", 0, "the header is not JSON"),
        (b'{"a": 1, "a": 2}', 0, "names 'a' twice"),
        (b"\xff\xff", 0, "the header is not JSON"),
        (b"[" * 100000, 0, "the header is not JSON"),
    ],
)
def test_a_damaged_header_is_one_line(tmp_path, header, size, message):
    with pytest.raises(UserError, match=message) as caught:
        SafetensorsFile(raw_file(tmp_path / "x.safetensors", header, bytes(size)))
    assert "\n" not in str(caught.value) and "x.safetensors" in str(caught.value)


@pytest.mark.parametrize("order", ["abcd", "dcba"])
def test_empty_tensors_may_begin_where_others_do(tmp_path, order):
    """The safetensors library reads them too. The order of names in the header does not matter."""
    from safetensors.numpy import load_file

    entries = {"a": entry(0, 0, [0, 3]), "b": entry(0, 16), "c": entry(16, 16, [4, 0]), "d": entry(16, 24)}
    header, data = {name: entries[name] for name in order}, np.arange(6, dtype=np.float32).tobytes()
    path = raw_file(tmp_path / "x.safetensors", header, data)
    ours, theirs = SafetensorsFile(path), load_file(path)
    assert set(ours.entries) == set(theirs) == set("abcd")
    for name, array in theirs.items():
        assert ours.array(name).shape == array.shape
        np.testing.assert_array_equal(ours.array(name), array)


def test_a_header_above_the_limit_of_the_format(tmp_path):
    """The format allows headers of 100,000,000 bytes. This one has one more, in a sparse file."""
    from safetensors import SafetensorError, safe_open

    path = tmp_path / "x.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(300_000_000)
    with pytest.raises(SafetensorError, match="(?i)header ?too ?large"):
        safe_open(path, "np")
    with pytest.raises(UserError, match="its header should have 100000001 bytes"):
        SafetensorsFile(path)


@pytest.mark.parametrize("length", [0, 1, 3, 1 << 40, (1 << 64) - 1])
def test_a_wrong_header_length_is_refused(tmp_path, length):
    with pytest.raises(UserError):
        SafetensorsFile(raw_file(tmp_path / "x.safetensors", {"a": entry(0, 16)}, bytes(16), length))


def test_a_safetensors_file_that_is_cut_anywhere_is_refused(tmp_path):
    build(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    for size in [*range(0, 40), *range(40, len(whole), 997), len(whole) - 1]:
        (tmp_path / "model.safetensors").write_bytes(whole[:size])
        assert "model.safetensors" in failure(tmp_path)


@given(st.data())
@settings(max_examples=150)
def test_a_header_of_noise_is_read_or_refused_in_one_line(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "noise.safetensors"
    raw_file(
        path,
        data.draw(st.binary(max_size=40)),
        data.draw(st.binary(max_size=20)),
        data.draw(st.integers(0, 70)),
    )
    try:
        SafetensorsFile(path)
    except UserError as error:
        assert "\n" not in str(error)


def test_written_files_are_read_by_the_safetensors_library(tmp_path):
    from safetensors import safe_open

    rng = np.random.default_rng(0)
    tensors = {
        "half": rng.standard_normal((3, 5)).astype(np.float16),
        "c": rng.standard_normal((7,)).astype(np.float32),
        "b": rng.standard_normal((2, 3)).astype(ml_dtypes.bfloat16),
        "i": np.arange(3, dtype=np.int64),
        "scalar": np.array(2.5, np.float32),
    }
    safetensors_file.save(tmp_path / "x.safetensors", tensors, {"format": "pt", "who": "us"})
    with safe_open(tmp_path / "x.safetensors", "pt") as theirs:
        assert theirs.metadata() == {"format": "pt", "who": "us"} and set(theirs.keys()) == set(tensors)
        for name, array in tensors.items():
            np.testing.assert_array_equal(theirs.get_tensor(name).float().numpy(), array.astype(np.float32))
    ours = SafetensorsFile(tmp_path / "x.safetensors")
    assert ours.entries["b"][:2] == ("bfloat16", (2, 3)) and not ours.array("c").flags.writeable
    np.testing.assert_array_equal(ours.array("b"), tensors["b"].view(np.uint16))
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_empty_tensors_are_not_saved(tmp_path):
    with pytest.raises(ValueError, match="a: refusing to save an empty tensor of shape \\[0, 4\\]"):
        safetensors_file.save(tmp_path / "x.safetensors", {"a": np.ones((0, 4), np.float32)})
    assert not list(tmp_path.iterdir())


def test_files_have_the_rights_of_any_other(tmp_path):
    """With a umask of 022 open() lets all users read a file and the owner write it."""
    before = os.umask(0o022)
    try:
        (tmp_path / "other").write_text("x")
        safetensors_file.save(tmp_path / "x.safetensors", {"a": np.ones(4, np.float32)})
        write_json(tmp_path / "x.json", {})
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
        "other": 0o644,
        "x.safetensors": 0o644,
        "x.json": 0o644,
    }


def disk_calls(monkeypatch):
    """Record each later fsync and rename -> the list of (name, inode, size of the file)."""
    calls = []

    def watch(function, name, stat):
        original = getattr(os, function)

        def call(what, *rest, **keywords):
            found = stat(what)
            calls.append((name, found.st_ino, found.st_size))
            return original(what, *rest, **keywords)

        monkeypatch.setattr(os, function, call)

    watch("fsync", "fsync", os.fstat)
    watch("replace", "rename", os.stat)
    watch("rename", "rename", os.stat)
    return calls


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """First the bytes of the file are flushed, then it gets its name, then the directory is flushed."""
    calls = disk_calls(monkeypatch)
    safetensors_file.save(tmp_path / "x.safetensors", {"a": np.ones(5000, np.float32)})
    file, directory = os.stat(tmp_path / "x.safetensors"), os.stat(tmp_path)
    assert [call[:2] for call in calls] == [
        ("fsync", file.st_ino),
        ("rename", file.st_ino),
        ("fsync", directory.st_ino),
    ]
    assert calls[0][2] == file.st_size > 20000


def test_a_full_disk_leaves_what_was_there(tmp_path):
    import resource
    import signal

    path = tmp_path / "x.safetensors"
    safetensors_file.save(path, {"a": np.ones(4, np.float32)})
    before = path.read_bytes()
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        with pytest.raises(
            UserError, match="x.safetensors: cannot be written: .*; what was there is untouched"
        ):
            safetensors_file.save(path, {"a": np.ones(4000, np.float32)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written: File exists"):
        write_text(tmp_path / "file" / "x.json", "{}")
