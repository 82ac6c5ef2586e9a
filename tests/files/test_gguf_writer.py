"""GGUF files that merge writes: our reader gives the same model back, and what llama.cpp lacks is refused."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import faults
import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
from gguf_cases import BOS, CASES, EOS, LONGER, ROPES, TEMPLATE, base, logits, tokenizer
from smollm2 import smollm2  # noqa: F401 (fixture)
from test_adapter import made
from test_sentencepiece import model as sentencepiece_model
from test_tokenizer import UGLY
from test_weights import build

import longlora
from longlora import cli, disk
from longlora.decoder import rope as rope_
from longlora.decoder.lora import LoraConfig
from longlora.decoder.model import Model
from longlora.errors import UserError
from longlora.files import adapter, model_file
from longlora.files.gguf import STORED_AS
from longlora.files.merge import merge
from longlora.files.open_model import open_model

IDS = np.arange(LONGER // 2) * 7 % 500


def written(path, out, **kwargs):
    return merge(path, None, out, format="gguf", **kwargs)


@pytest.mark.parametrize("name", CASES)
def test_our_reader_gives_every_family_back(tmp_path, name):
    path = base(tmp_path / "base", name)
    file = written(path, tmp_path / "out")
    assert file == str(tmp_path / "out" / "model-f32.gguf") and os.listdir(tmp_path / "out")
    before, after = open_model(path), open_model(file)
    assert after.names() == before.names()
    for tensor in before.names():
        np.testing.assert_array_equal(after.read(tensor), before.read(tensor), err_msg=tensor)
    for field in dataclasses.fields(before.config):
        one, other = (getattr(model.config, field.name) for model in (before, after))
        if field.name == "family":
            assert other == STORED_AS.get(one, one)
        elif field.name not in ("raw", "bos_token_id", "eos_token_id"):
            assert other == one, field.name
    np.testing.assert_array_equal(logits(file, IDS[:50]), logits(path, IDS[:50]))


@pytest.mark.parametrize("dtype, ours", [("bf16", "bfloat16"), ("f16", "float16"), ("f32", "float32")])
@pytest.mark.parametrize("format", ["huggingface", "gguf"])
def test_weights_that_have_the_dtype_of_the_run_are_not_converted(tmp_path, monkeypatch, format, dtype, ours):
    """Only a GGUF's norms are, which are float32 in every file."""
    file = merge(base(tmp_path / "base", "llama"), None, tmp_path / "out", format=format, dtype=dtype)
    opened, real, converted = open_model(file), model_file.from_float32, []

    def from_float32(array, dtype):
        converted.append(array.ndim)
        return real(array, dtype)

    monkeypatch.setattr(model_file, "from_float32", from_float32)
    model = Model(opened.config, dtype=ours).load(opened)
    assert set(converted) <= ({1} if format == "gguf" and dtype != "f32" else set())
    monkeypatch.undo()
    for name in opened.names():
        found = model.tensor(name).numpy()
        np.testing.assert_array_equal(found, opened.read(name).astype(found.dtype))


@pytest.mark.parametrize("name, kind", [(name, kind) for name, kinds in ROPES.items() for kind in kinds])
def test_longer_positions_are_read_back(tmp_path, name, kind):
    path = base(tmp_path / "base", name, extend=kind)
    file = written(path, tmp_path / "out")
    before, after = open_model(path).config, open_model(file).config
    assert after.max_position_embeddings == before.max_position_embeddings == LONGER
    if kind != "ntk":  # it is a larger theta in the file
        assert after.rope == before.rope
    one, other = (rope_.inverse_frequencies(config.rope, config.head_dim) for config in (before, after))
    np.testing.assert_allclose(other[0], one[0], rtol=1e-6)
    wanted = logits(path, IDS)
    np.testing.assert_allclose(logits(file, IDS), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_yarn_with_an_attention_factor(tmp_path):
    """llama.cpp multiplies its own factor by the key; transformers puts its factor in the place of both."""
    path = base(tmp_path / "base")
    raw = json.loads((path / "config.json").read_text())
    raw |= dict(max_position_embeddings=256, rope_parameters=None)
    raw["rope_scaling"] = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
    for more in (dict(attention_factor=0.7), dict(mscale=2.0, mscale_all_dim=0.5)):
        raw["rope_scaling"] = raw["rope_scaling"] | more
        (path / "config.json").write_text(json.dumps(raw))
        file = written(path, tmp_path / str(len(raw["rope_scaling"])))
        wanted = logits(path, IDS)
        np.testing.assert_allclose(logits(file, IDS), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
        key = open_model(file).metadata["llama.rope.scaling.attn_factor"]
        assert key == pytest.approx(0.7 / (1 + 0.1 * np.log(4)), rel=1e-6)


@pytest.mark.parametrize("name, extend", [("llama", None), ("llama", "ntk"), ("qwen2-tied", None)])
def test_transformers_reads_the_file(tmp_path, name, extend):
    """Its reader keeps theta, but no other rope, and takes head sizes from elsewhere than llama.cpp."""
    from transformers import AutoModelForCausalLM

    path = base(tmp_path / "base", name, extend=extend)
    file = written(path, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file=os.path.basename(file), dtype=torch.float32
    )
    with torch.no_grad():
        got = theirs.eval()(torch.from_numpy(IDS)[None]).logits[0].numpy()
    wanted = logits(path, IDS)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_matrices_are_rounded_once_and_vectors_stay_float32(tmp_path, dtype):
    path = base(tmp_path / "base", hidden_size=48, head_dim=12, intermediate_size=64)
    file = open_model(written(path, tmp_path / "out", dtype=dtype))
    before = open_model(path)
    numpy_name = {"f16": np.float16, "bf16": ml_dtypes.bfloat16}
    found = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file.path).tensors}
    for tensor in before.names():
        array, got = before.read(tensor), file.read(tensor)
        if array.ndim == 1:
            wanted = array
        elif dtype != "q8_0" or array.shape[1] % 32:  # a row of 48 does not fill blocks of 32
            wanted = array.astype(numpy_name.get(dtype, np.float16)).astype(np.float32)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            wanted = gguf.quants.dequantize(gguf.quants.quantize(array, kind), kind)
        np.testing.assert_array_equal(got, wanted, err_msg=tensor)
    assert found["output_norm.weight"] == "F32"
    assert found["blk.0.ffn_down.weight"] == dtype.upper()
    assert found["token_embd.weight"] == ("F16" if dtype == "q8_0" else dtype.upper())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_auto_is_the_dtype_of_the_base(tmp_path, dtype):
    base(tmp_path / "base", dtype=getattr(torch, dtype))
    file = written(tmp_path / "base", tmp_path / "out")
    assert file.endswith({"bfloat16": "bf16", "float16": "f16"}.get(dtype, "f32") + ".gguf")
    before, after = open_model(tmp_path / "base"), open_model(file)
    for tensor in before.names():
        np.testing.assert_array_equal(after.read(tensor), before.read(tensor), err_msg=tensor)


def test_an_adapter_is_merged_as_into_a_directory(tmp_path):
    path = base(tmp_path / "base", "qwen2-tied")
    opened = open_model(path)
    raw = rope_.to_config(opened.config.raw, rope_.extend(opened.config, "linear", LONGER)[0], LONGER)
    adapter.save(tmp_path / "adapter", made(opened, LoraConfig()), LoraConfig(), opened, raw)
    merge(path, tmp_path / "adapter", tmp_path / "merged")
    file = merge(path, tmp_path / "adapter", tmp_path / "out", format="gguf")
    one, other = open_model(tmp_path / "merged"), open_model(file)
    assert other.config.rope == one.config.rope and other.config.max_position_embeddings == LONGER
    for tensor in one.names():
        np.testing.assert_array_equal(other.read(tensor), one.read(tensor), err_msg=tensor)


def test_from_a_gguf_to_a_gguf(tmp_path):
    """The keys of the tokenizer are kept, also those that we do not read."""
    first = written(base(tmp_path / "base", kind="llama-bpe", **{}), tmp_path / "one", dtype="q8_0")
    file = written(first, tmp_path / "two")
    one, two = open_model(first), open_model(file)
    assert file.endswith("model-f32.gguf")
    for tensor in one.names():
        np.testing.assert_array_equal(two.read(tensor), one.read(tensor), err_msg=tensor)
    keys = [key for key in one.metadata if key.startswith("tokenizer.")]
    assert len(keys) >= 8 and {key: two.metadata[key] for key in keys} == {
        key: one.metadata[key] for key in keys
    }
    types = [
        {name: (field.types[0], field.types[-1]) for name, field in gguf.GGUFReader(path).fields.items()}
        for path in (first, file)
    ]
    assert types[0] == types[1]


@pytest.mark.parametrize("kind", ["gpt2", "llama-bpe", "qwen2", "llama"])
def test_the_tokenizer_gives_the_same_ids(tmp_path, kind):
    path = base(tmp_path / "base", kind=kind)
    if kind == "llama-bpe":
        tokenizer(path, kind, change=lambda described: described["model"].update(ignore_merges=True))
    if kind == "llama":
        tokenizer(path, kind, lambda x: (_metaspace(x), _around(("<s>", 1))(x)))
    file = open_model(written(path, tmp_path / "out"))
    one, other = open_model(path).tokenizer(), file.tokenizer()
    for text in UGLY:
        assert other.encode(text).tolist() == one.encode(text).tolist(), repr(text)
    assert (other.bos_token_id, other.eos_token_id) == (one.bos_token_id, one.eos_token_id)
    assert file.metadata["tokenizer.ggml.add_bos_token"] is (kind == "llama")
    assert file.metadata.get("tokenizer.chat_template") == (None if kind == "llama" else TEMPLATE)


def _metaspace(described):
    """As transformers 5 splits a SentencePiece vocabulary."""
    _complete(described)
    described["normalizer"] = None
    described["pre_tokenizer"] = dict(type="Metaspace", replacement="▁", prepend_scheme="first", split=False)


def _complete(described):
    """Give the merges that SentencePiece's vocabulary implies: each split of each token."""
    from longlora.files.sentencepiece import merges_of

    model = described["model"]
    normal = {text: index for text, index in model["vocab"].items() if index > 258}
    scores = {text: -float(index) for text, index in normal.items()}
    model["merges"] = merges_of(normal, scores)


def _around(first, last=None):
    """A post-processor that puts a token, (text, id), before each text, and one after it."""

    def change(described):
        whole = [{"Sequence": {"id": "A", "type_id": 0}}]
        whole.insert(0, {"SpecialToken": {"id": first[0], "type_id": 0}})
        whole += [{"SpecialToken": {"id": last[0], "type_id": 0}}] if last else []
        ids = {x[0]: {"id": x[0], "ids": [x[1]], "tokens": [x[0]]} for x in (first, last) if x}
        made = {"type": "TemplateProcessing", "single": whole, "pair": whole, "special_tokens": ids}
        described["post_processor"] = made

    return change


def test_metadata_of_the_tokenizer(tmp_path):
    path = base(tmp_path / "base")
    names = {"additional_special_tokens": ["<image>"], "pad_token": "<pad>"}
    tokenizer(path, "qwen2", _around((BOS, 1), (EOS, 2)), **names)
    generation = dict(eos_token_id=[2, 7, 9, 3], do_sample=True, temperature=0.6, top_k=20, top_p=0.9)
    (path / "generation_config.json").write_text(json.dumps(generation))
    (path / "chat_template.jinja").write_bytes(b"one\r\ntwo")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tools.jinja").write_text("with tools")
    found = open_model(written(path, tmp_path / "my-model")).metadata
    tokens = found["tokenizer.ggml.tokens"]
    described = open_model(path).tokenizer()
    assert len(tokens) == 512 == len(set(tokens))
    for index, text in enumerate(tokens):
        kind, known = found["tokenizer.ggml.token_type"][index], described.backend.id_to_token(index)
        assert text == (f"[PAD{index}]" if known is None else known)
        assert kind == (
            5 if known is None else 3 if text in (BOS, EOS, "<image>", "<pad>", "<|endoftext|>") else 1
        )
    ids = {name: tokens.index(text) for name, text in (("bos", BOS), ("eos", EOS), ("padding", "<pad>"))}
    for name, index in ids.items():
        assert found[f"tokenizer.ggml.{name}_token_id"] == index
    assert ids["eos"] == 2 and found["tokenizer.ggml.eot_token_id"] == 7
    assert found["tokenizer.ggml.eom_token_id"] == 9
    assert found["tokenizer.ggml.add_bos_token"] and found["tokenizer.ggml.add_eos_token"]
    assert found["tokenizer.ggml.pre"] == "qwen2" and found["general.name"] == "my-model"
    assert found["tokenizer.chat_template"] == "one\ntwo"
    assert found["tokenizer.chat_templates"] == ["tools"]
    assert found["tokenizer.chat_template.tools"] == "with tools"
    sampling = {key: value for key, value in found.items() if key.startswith("general.sampling.")}
    assert sampling == pytest.approx(
        {"general.sampling.temp": 0.6, "general.sampling.top_k": 20, "general.sampling.top_p": 0.9}
    )


def split(*steps):
    return lambda described: described.update(pre_tokenizer=dict(type="Sequence", pretokenizers=list(steps)))


LETTERS = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)


@pytest.mark.parametrize(
    "change, found",
    [
        (split(dict(type="Digits", individual_digits=True), LETTERS), "smollm"),
        (split(LETTERS), "gpt-2"),
        (lambda x: x["model"].update(ignore_merges=True), "ignore_merges true"),
        (split(dict(type="Digits", individual_digits=False), LETTERS), "does not split texts by"),
        (split({**LETTERS, "add_prefix_space": True}), "does not split texts by"),
        (split(dict(type="Punctuation", behavior="Isolated"), LETTERS), "does not split texts by"),
        (split(LETTERS, LETTERS), "has no name for texts split by"),
        (lambda x: x.update(normalizer=dict(type="Lowercase")), "does not have the normalizer"),
        (lambda x: x["model"].update(merges=[]), "without merges"),
        (lambda x: x["model"].update(end_of_word_suffix="</w>"), "does not have end_of_word_suffix '</w>'"),
        (split(dict(type="Whitespace")), "BPE without bytes"),
        (
            lambda x: x.update(model=dict(type="WordLevel", vocab={"a": 0, EOS: 2}, unk_token="a")),
            "of type WordLevel",
        ),
    ],
)
def test_the_name_of_the_split(tmp_path, change, found):
    path = base(tmp_path / "base")
    tokenizer(path, "qwen2", change, tokenizer_class="TokenizersBackend")
    if " " in found:
        refused(tmp_path, path, found)
    else:
        file = open_model(written(path, tmp_path / "out"))
        assert file.metadata["tokenizer.ggml.pre"] == found


def refused(tmp_path, path, *words, **kwargs):
    with pytest.raises(UserError) as caught:
        written(path, tmp_path / "out", **kwargs)
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_sentencepiece_with_other_merges(tmp_path):
    """A BPE that was trained by merges has one merge a token. llama.cpp would take any split."""
    refused(tmp_path, base(tmp_path / "base", kind="llama"), "merges are not those of SentencePiece")


def test_sentencepiece_scores_order_the_merges(tmp_path):
    path = base(tmp_path / "base")
    tokenizer(path, "llama", _complete)
    found = open_model(written(path, tmp_path / "out")).metadata
    tokens, scores = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.scores"]
    ids = [index for index, text in enumerate(tokens) if f" {text}" in str(found["tokenizer.ggml.merges"])]
    assert len(ids) > 10
    pairs = [pair.split(" ") for pair in found["tokenizer.ggml.merges"]]
    ranks = [scores[tokens.index(left + right)] for left, right in pairs]
    assert ranks == sorted(ranks, reverse=True) and ranks[0] > ranks[-1]
    types = found["tokenizer.ggml.token_type"]
    assert (types[0], types[1], types[3], types[258]) == (2, 3, 6, 6)
    assert found["tokenizer.ggml.model"] == "llama" and found["tokenizer.ggml.add_space_prefix"] is True


def test_user_defined_tokens_of_sentencepiece(tmp_path):
    """llama.cpp looks for them in the text, so their spaces are spaces; it ends if two tokens are equal."""
    path, flags = base(tmp_path / "base"), dict(single_word=False, lstrip=False, rstrip=False)

    def change(described):
        _complete(described)
        size = len(described["model"]["vocab"])
        for index, content in enumerate(("▁▁one", "▁two", " two")):
            token = dict(id=size + index, content=content, normalized=False, special=False, **flags)
            described["added_tokens"].append(token)

    tokenizer(path, "llama", change)
    found = open_model(written(path, tmp_path / "out")).metadata
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(set(tokens)) == 512
    assert [text for text, kind in zip(tokens, types, strict=True) if kind == 4] == ["  one", "▁two", " two"]


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(), 'the step {"type": "Replace", "pattern": {"Regex"'),  # it removes spaces
        (dict(remove_extra_whitespaces=False, user_defined_symbols=["<extra>"]), '"Regex": "<extra>"'),
        (dict(model_type="unigram", vocab_size=400), "of type Unigram"),
        (dict(byte_fallback=False, vocab_size=200), "BPE without bytes"),
    ],
)
def test_sentencepiece_models_that_llama_cpp_does_not_have(tmp_path, options, words):
    path = base(tmp_path / "base")
    (path / "tokenizer.json").unlink()
    content = sentencepiece_model(**{"normalization_rule_name": "identity", **options})
    (path / "tokenizer.model").write_bytes(content)
    names = dict(tokenizer_class="TokenizersBackend", bos_token="<s>", eos_token="</s>")
    (path / "tokenizer_config.json").write_text(json.dumps(names))
    refused(tmp_path, path, words)


@pytest.mark.parametrize(
    "name, fields, words",
    [
        ("qwen3-bias", dict(attention_bias=True), "a qwen3 model with a bias on the attention's output"),
        ("smollm3", dict(no_rope_layer_interval=2), "layers without rope other than every 4th"),
        ("smollm3", dict(attention_bias=True), "a bias on the attention's output"),
        ("qwen2", dict(head_dim=16), "4 heads of 16 and hidden_size 32"),
    ],
)
def test_models_that_llama_cpp_does_not_compute(tmp_path, name, fields, words):
    refused(tmp_path, base(tmp_path / "base", name, **fields), words, "llama.cpp does not compute that")


def test_bad_input_is_found_before_anything_is_written(tmp_path, monkeypatch):
    path = base(tmp_path / "base")
    refused(tmp_path, path, "dtype should be one of auto, f32, f16, bf16, q8_0, got 'int4'", dtype="int4")
    with pytest.raises(UserError, match="format should be one of huggingface, gguf, got 'onnx'"):
        merge(path, None, tmp_path / "out", format="onnx")
    with pytest.raises(UserError, match="q8_0 is for format gguf"):
        merge(path, None, tmp_path / "out", dtype="q8_0")
    with monkeypatch.context() as patch:
        patch.setattr(disk, "free", lambda folder: 100_000)
        refused(tmp_path, path, "needs 2", "the disk has 100,000 free")
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(raw | dict(eos_token_id=None)))
    tokenizer(path, bos_token=None, eos_token=None)
    refused(tmp_path, path, "names no token that ends a text")
    tokenizer(path, "qwen2", _around(("<|endoftext|>", 0), (EOS, 2)))
    refused(tmp_path, path, "puts the tokens [0, 2] around each text; llama.cpp has only bos and eos")
    tokenizer(path, chat_template="\ud800")
    refused(tmp_path, path, "tokenizer.chat_template holds half a character")
    build(tmp_path / "small", vocab_size=300)
    tokenizer(tmp_path / "small")
    refused(tmp_path, tmp_path / "small", "the tokenizer has 395 tokens, the embedding 300 rows")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).unlink()
    refused(tmp_path, path, "has no tokenizer; a GGUF file needs one")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    tokenizer(path)
    with pytest.raises(UserError, match="exists and is not an empty directory"):
        written(path, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["mine"]


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"tokenizer.ggml.tokens": slice(500), "tokenizer.ggml.token_type": slice(500)},
            "the tokenizer has 500 tokens, the embedding 512 rows",
        ),
        ({"tokenizer.ggml.more": 1 << 40}, "tokenizer.ggml.more holds a number beyond 32 bits"),
        ({"tokenizer.ggml.more": 1e30}, "tokenizer.ggml.more holds a number beyond 32 bits"),
        ({"tokenizer.ggml.tokens": None}, "has no tokenizer; a GGUF file needs one"),
    ],
)
def test_ggufs_with_tokenizers_that_are_none(tmp_path, changes, words):
    first = written(base(tmp_path / "base"), tmp_path / "one")
    writer = gguf.GGUFWriter(tmp_path / "changed.gguf", "llama")
    reader, metadata = gguf.GGUFReader(first), open_model(first).metadata
    for key, change in changes.items():
        metadata[key] = metadata[key][change] if isinstance(change, slice) else change
    for key, value in metadata.items():
        if key != "general.architecture" and value is not None:
            kind = gguf.GGUFValueType.get_type(value)
            if type(value) is int:
                kind = gguf.GGUFValueType.UINT32 if value < 1 << 32 else gguf.GGUFValueType.UINT64
            writer.add_key_value(key, value, kind)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(tmp_path, tmp_path / "changed.gguf", words)


@pytest.mark.parametrize(
    "value, dtype, words",
    [
        (float("nan"), "f32", "down_proj.weight is not finite at [1, 2]"),
        (1e6, "f16", "down_proj.weight has a weight of 1e+06, which float16 cannot hold"),
        (1e9, "q8_0", "down_proj.weight has a weight that q8_0 cannot hold"),
        (3.4e38, "bf16", "which bfloat16 cannot hold"),
    ],
)
def test_weights_that_a_dtype_cannot_hold(tmp_path, value, dtype, words):
    path = base(tmp_path / "base")
    model = build(tmp_path / "damaged", vocab_size=512, hidden_size=32, intermediate_size=64)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[1, 2] = value
    model.save_pretrained(path)
    refused(tmp_path, path, words, dtype=dtype)
    if dtype != "q8_0":
        with pytest.raises(UserError, match=words.replace("[", r"\[").replace("+", r"\+")):
            merge(path, None, tmp_path / "out", dtype=dtype)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", faults.KINDS)
@pytest.mark.parametrize("there", [False, True], ids=["new", "empty"])
def test_a_fault_leaves_nothing_or_the_whole_file(tmp_path, kind, there):
    path = base(tmp_path / "base")
    wanted = Path(written(path, tmp_path / "out")).read_bytes()
    clean = faults.call(lambda: written(path, tmp_path / "clean" / "out"), kind, 0)
    assert clean.code == 0, clean.text
    for at in faults.places(clean.count, 10):
        out = tmp_path / f"n{at}" / "out"
        (out if there else out.parent).mkdir(parents=True)
        found = faults.call(lambda: written(path, out), kind, at)  # noqa: B023
        assert found.code in ((faults.KILLED,) if kind == "kill" else (0, faults.REFUSED)), found.text
        file = out / "model-f32.gguf"
        if not file.exists():
            shutil.rmtree(out, ignore_errors=True)  # killed while files moved into a directory that existed
            written(path, out)
        assert file.read_bytes() == wanted and os.listdir(out.parent) == ["out"]


def test_one_tensor_is_in_memory_at_a_time(smollm2, tmp_path):  # noqa: F811
    """The peak of the process that writes SmolLM2 in float32: 513 MiB, and the embedding is 108 of them."""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("this system has no /proc/self/status to read the peak from")
    script = """if True:
        import sys
        import gguf, numpy
        from longlora.files.merge import merge
        from longlora.files.open_model import open_model
        def peak(): return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) >> 10
        model = open_model(sys.argv[1])
        model.tokenizer()
        before = peak()
        merge(sys.argv[1], None, sys.argv[2], format="gguf", dtype="f32")
        print(peak() - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", script, str(smollm2), str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 200
    assert open_model(tmp_path / "out" / "model-f32.gguf").metadata["tokenizer.ggml.pre"] == "smollm"


def test_a_name_that_is_no_text(tmp_path):
    file = written(base(tmp_path / "base"), os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    assert open_model(file).metadata["general.name"] == "caf\\udce9"


def test_the_directory_of_a_gguf_names_the_file(tmp_path):
    file = written(base(tmp_path / "base"), tmp_path / "out")
    folder, plan = str(tmp_path / "out"), longlora.plan
    for look in (
        open_model,
        longlora.inspect,
        lambda path: plan(model=path),
        lambda path: plan(model=path, generate=True),
    ):
        with pytest.raises(UserError, match=f"out: has no config.json; give the file {file}"):
            look(folder)


def test_the_command(tmp_path, capsys):
    path = base(tmp_path / "base")
    flags = ["--model", str(path), "--output-dir", str(tmp_path / "out"), "--format", "gguf"]
    assert cli.main(["merge", *flags, "--dtype", "q8_0"]) == 0
    assert capsys.readouterr().out == f"saved {tmp_path / 'out' / 'model-q8_0.gguf'}\n"
    assert cli.main(["merge", *flags]) == 2
    assert "exists and is not an empty directory" in capsys.readouterr().err
    flags = ["--model", str(tmp_path / "out" / "model-q8_0.gguf"), "--output-dir", str(tmp_path / "plain")]
    assert cli.main(["merge", *flags]) == 0
    assert capsys.readouterr().out.startswith(f"saved {tmp_path / 'plain'}; its quantised weights are")
