"""The tensors of GGUF files: their names, offsets and types, and the order of their rows."""

import re

import gguf
import numpy as np
import pytest
from gguf_small import arrays, heads, refused, stored, write
from refusals import refusal
from test_gguf_header import header

from longlora.errors import UserError
from longlora.files import model_file
from longlora.files.open_model import open_model
from longlora.files.safetensors import release

FAMILIES = {
    "llama": dict(attention_bias=True),
    "qwen2": {},
    "qwen3": dict(attention_bias=True, head_dim=16),
    "phi3": {},
    "granite": dict(attention_bias=True),
    "smollm3": dict(attention_bias=True),
}
Q, UP, NORM = (
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.norm.weight",
)
PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@pytest.mark.parametrize("family, fields", FAMILIES.items())
@pytest.mark.parametrize("chunk", [40, 100, 1 << 17])
def test_names_and_rows_of_tensors(tmp_path, monkeypatch, family, fields, chunk):
    """Matrices are read in pieces of one row, of three rows, and of all rows."""
    wanted = arrays(family, **fields)
    keys = heads(*[fields.get("head_dim", 8)] * 3)
    ours = open_model(write(tmp_path / "m.gguf", family, keys, stored(wanted, family)))
    monkeypatch.setattr(model_file, "CHUNK", chunk)
    assert ours.names() == list(wanted) and ours.kind == "gguf"
    for name, array in wanted.items():
        assert ours.shape(name) == array.shape
        np.testing.assert_array_equal(ours.read(name), array, err_msg=name)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])
def test_values_of_each_type(tmp_path, kind):
    """They are those that the gguf library reads. Norms may be quantised too."""
    tensors = stored(arrays())
    path = write(tmp_path / "m.gguf", tensors=tensors, kinds=dict.fromkeys(tensors, kind))
    ours, reader = open_model(path), gguf.GGUFReader(path)
    wanted = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    for name, theirs in ((UP, "blk.0.ffn_up.weight"), (NORM, "output_norm.weight")):
        assert ours.dtype(name) == PLAIN.get(kind, "float32")
        assert ours.storage(name) == PLAIN.get(kind, kind.lower())
        assert ours._part(name, 0, 2)[1] == ours.dtype(name)  # no further conversion
        np.testing.assert_array_equal(ours.read(name), wanted[theirs])
    assert {ours.storage(name) for name in ours.names()} == {PLAIN.get(kind, kind.lower())}


def test_spans_are_those_of_the_gguf_library(tmp_path):
    kinds = {"blk.0.ffn_up.weight": "Q8_0", "token_embd.weight": "F16"}
    path = write(tmp_path / "m.gguf", kinds=kinds)
    ours = open_model(path)
    names = {
        "blk.0.ffn_up": UP,
        "token_embd": "model.embed_tokens.weight",
        "output_norm": NORM,
        "blk.0.attn_q": Q,
    }
    found = {tensor.name.removesuffix(".weight"): tensor for tensor in gguf.GGUFReader(path).tensors}
    for theirs, name in names.items():
        buffer, start, end = ours._span(name)
        tensor = found[theirs]
        assert (start, end) == (int(tensor.data_offset), int(tensor.data_offset + tensor.n_bytes))
        assert buffer[start:end] == tensor.data.tobytes()
        release(buffer, start, end)


@pytest.mark.parametrize("kind", ["I8", "I32", "F64"])
def test_types_that_hold_no_weights_are_refused(tmp_path, kind):
    code = {"I8": np.int8, "I32": np.int32, "F64": np.float64}[kind]
    tensors = stored(arrays())
    tensors["blk.0.ffn_up.weight"] = tensors["blk.0.ffn_up.weight"].astype(code)
    path = write(tmp_path / "m.gguf", tensors=tensors, kinds={"blk.0.ffn_up.weight": kind})
    with pytest.raises(UserError, match=f"^{path}: weights of type {kind} cannot be dequantised$"):
        open_model(path).read(UP)


@pytest.mark.parametrize(
    "name",
    [
        "blk.0.more.weight",
        "blk.x.attn_q.weight",
        "blk.0.attn_q.more.weight",
        "blk.0.weight",
        "blk.weight",
        "blk.0.0.attn_q.weight",
        "layer.0.attn_q.weight",
        "attn_q.weight",
        "more.weight",
        "weight",
        "token_embd",
        "model.more.weight",
    ],
)
def test_unknown_tensors_are_named_as_in_the_file(tmp_path, name):
    tensors = stored(arrays()) | {name: np.ones(32, np.float32)}
    assert refused(tmp_path, tensors=tensors) == f"1 tensors do not belong to a llama model: {name}"


@pytest.mark.parametrize("family, name", [("llama", "attn_qkv"), ("qwen2", "attn_qkv"), ("phi3", "attn_q")])
def test_tensors_of_another_architecture_are_unknown(tmp_path, family, name):
    foreign = f"blk.0.{name}.weight"
    tensors = stored(arrays(family), family) | {foreign: np.ones((32, 32), np.float32)}
    wanted = Q if family == "phi3" else foreign
    assert refused(tmp_path, family=family, tensors=tensors).endswith(
        f"do not belong to a {family} model: {wanted}"
    )


@pytest.mark.parametrize("name, known", [("blk.0.attn_q.weight", Q), ("output_norm.weight", NORM)])
def test_a_tensor_with_two_names_is_refused(tmp_path, name, known):
    found = refused(tmp_path, tensors=stored(arrays()) | {known: np.ones((32, 32), np.float32)})
    assert found == f"{known} is a second {known}"
    found = refused(tmp_path, tensors={known: np.ones((32, 32), np.float32)} | stored(arrays()))
    assert found == f"{name} is a second {known}"


# ---- offsets -------------------------------------------------------------------------------------


def placed(path, tensors, size=4096):
    """Write a header and `size` bytes of data. Returns the refusal's message and where the data begins."""
    pairs = [("general.architecture", 8, b"\5\0\0\0\0\0\0\0llama")]
    header(path / "m.gguf", pairs, tensors)
    base = -(-(path / "m.gguf").stat().st_size // 32) * 32
    data = (path / "m.gguf").read_bytes().ljust(base, b"\0") + bytes(size)
    (path / "m.gguf").write_bytes(data)
    return refusal(path / "m.gguf", lambda: open_model(path / "m.gguf")), base


F32, Q8_0, Q4_0 = 0, 8, 2  # from ggml.h
FITS = "the metadata lacks llama.embedding_length"  # the error that follows where the tensors are right


@pytest.mark.parametrize(
    "tensors, size, message",
    [
        ([("a", (32,), F32, 0)], 128, FITS),
        ([("a", (32,), F32, 0)], 127, "truncated: a ends at byte {128}, the file has {127}"),
        ([("a", (64, 3), Q8_0, 0)], 204, FITS),
        ([("a", (64, 3), Q8_0, 0)], 203, "truncated: a ends at byte {204}, the file has {203}"),
        ([("a", (32, 2, 3), Q4_0, 64)], 172, FITS),
        ([("a", (32, 2, 3), Q4_0, 64)], 171, "truncated: a ends at byte {172}, the file has {171}"),
        ([("a", (32, 1 << 40), F32, 0)], 64, f"truncated: a ends at byte {{{1 << 47}}}, the file has {{64}}"),
        ([("a", (32,), F32, 0), ("b", (32,), F32, 128)], 256, FITS),
        ([("b", (32,), F32, 128), ("a", (32,), F32, 0)], 256, FITS),
        ([("a", (32,), F32, 128), ("b", (32,), F32, 0)], 256, FITS),
        ([("a", (32,), F32, 0), ("b", (32,), F32, 224)], 352, FITS),
        ([("a", (32,), F32, 0), ("b", (32,), F32, 96)], 256, "b overlaps the tensor before it"),
        ([("a", (32, 2), Q8_0, 0), ("b", (32,), F32, 64)], 256, "b overlaps the tensor before it"),
        ([("a", (32, 2), Q8_0, 0), ("b", (32,), F32, 68)], 256, FITS),
        ([("a", (32,), F32, 0), ("b", (32,), F32, 0)], 256, "b overlaps the tensor before it"),
        ([("a", (31,), Q8_0, 0)], 64, "a has shape [31], rows should be a multiple of 32"),
        ([("a", (48, 2), Q8_0, 0)], 999, "a has shape [2, 48], rows should be a multiple of 32"),
        ([("a", (2, 32), Q8_0, 0)], 999, "a has shape [32, 2], rows should be a multiple of 32"),
        ([("a", (0,), F32, 0)], 64, "a has shape [0], rows should be a multiple of 1"),
        ([("a", (32, 0), F32, 0)], 64, "a has shape [0, 32], rows should be a multiple of 1"),
        ([("a", (32, 0, 2), Q8_0, 0)], 64, "a has shape [2, 0, 32], rows should be a multiple of 32"),
        ([("a", (32, 1), Q8_0, 0)], 34, FITS),
        ([("a", (32,), 4, 0)], 999, "a has the unknown type 4"),
        ([("a", (32,), 999, 0)], 999, "a has the unknown type 999"),
    ],
)
def test_tensors_must_fit_into_the_file_side_by_side(tmp_path, tensors, size, message):
    """Numbers in braces count from the start of the data. ggml has removed type 4."""
    found, base = placed(tmp_path, tensors, size)
    assert found == re.sub(r"\{(\d+)\}", lambda number: str(base + int(number[1])), message)


def test_a_model_without_a_tokenizer_says_so(tmp_path):
    ours = open_model(write(tmp_path / "m.gguf"))
    assert ours.has_tokenizer() is False and ours.beside() == {}
    with pytest.raises(UserError, match="m.gguf"):
        ours.tokenizer()
    tokens = {"tokenizer.ggml.tokens": ["a"] * 6}
    assert open_model(write(tmp_path / "m.gguf", keys=tokens)).has_tokenizer() is True
