"""Without tokenizer.json a SentencePiece model, or vocab.json with merges.txt, has AutoTokenizer's ids."""

import io
import itertools
import json

import pytest
import sentencepiece
from test_tokenizer import TRAIN, auto, trained
from test_tokenizer_matrix import EOS, SPECIAL, added, part, same, written

from longlora.errors import UserError
from longlora.files import sentencepiece as reader
from longlora.files.tokenizer import Tokenizer


def model(**options):
    """Train a small SentencePiece model -> the bytes of its file."""
    out = io.BytesIO()
    options = {"model_type": "bpe", "vocab_size": 420, "byte_fallback": True, "minloglevel": 2, **options}
    sentences = iter([*TRAIN, "naïve café ½ ﬁ Å", "  two  spaces "])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences, model_writer=out, hard_vocab_limit=False, **options
    )
    return out.getvalue()


MODELS = {
    "llama": dict(normalization_rule_name="identity", remove_extra_whitespaces=False),
    "nmt": dict(),
    "no prefix": dict(add_dummy_prefix=False, remove_extra_whitespaces=False),
    "no bytes": dict(byte_fallback=False, vocab_size=200),
    "symbols": dict(user_defined_symbols=["<extra>", "quick", "▁brown"], control_symbols=["<image>", EOS]),
    "unigram": dict(model_type="unigram", vocab_size=400),
    "unigram without bytes": dict(model_type="unigram", byte_fallback=False, vocab_size=120),
    "unigram with symbols": dict(
        model_type="unigram", vocab_size=400, user_defined_symbols=["<extra>", "fox"]
    ),
    "other ids": dict(unk_id=3, bos_id=-1, eos_id=0, pad_id=1, unk_piece="[UNK]", eos_piece="<end>"),
    "phrases": dict(split_by_whitespace=False),
}
FILES = {
    **{
        name: SPECIAL[name]
        for name in ("nothing", "names", "flags", "map", "added", "named extras", "splits")
    },
    "legacy": {
        "config": dict(legacy=True, add_bos_token=True, add_eos_token=True, eos_token="</s>", bos_token="<s>")
    },
    "new": {"config": dict(legacy=False, add_bos_token=True, bos_token="<s>", eos_token=None)},
    "null": {"config": dict(legacy=None, add_bos_token=False, add_prefix_space=None)},
    "no space": {"config": dict(legacy=False, add_prefix_space=False)},
    "decoder": {
        "config": dict(
            legacy=False,
            added_tokens_decoder={
                "1": added("<s>"),
                "5": added("<renamed>"),
                "600": added("<new>", special=False),
            },
        )
    },
    "swap": {
        "config": dict(added_tokens_decoder={"1": added("</s>"), "2": added("<s>"), "0": added("brown")})
    },
}
CLASSES = (
    ("llama", None),
    ("llama", "LlamaTokenizer"),
    ("mistral", "LlamaTokenizer"),
    ("llama", "CodeLlamaTokenizer"),
)


@pytest.mark.parametrize("kind", MODELS)
def test_a_sentencepiece_model_has_the_ids_of_transformers(tmp_path, kind):
    content, read = model(**MODELS[kind]), 0
    cases = part([*itertools.product(CLASSES, FILES)], 7)
    for (family, name), files in cases:
        path = written(tmp_path / "t", None, name, family, FILES[files])
        (path / "tokenizer.model").write_bytes(content)
        read += same(path, (kind, family, name, files))
    assert read > len(cases) / 2


@pytest.mark.parametrize(
    "name, family",
    [
        ("GPT2Tokenizer", "llama"),
        ("Qwen2Tokenizer", "qwen3"),
        (None, "qwen2"),
        ("Qwen2TokenizerFast", "smollm3"),
    ],
)
def test_vocab_and_merges_have_the_ids_of_transformers(tmp_path, name, family):
    for files in ("nothing", "names", "flags", "decoder", "map", "added", "spaces", "no space"):
        path = written(tmp_path / "t", None, name, family, SPECIAL[files])
        described = json.loads(trained("gpt2").to_str())["model"]
        (path / "vocab.json").write_text(json.dumps(described["vocab"]))
        merges = [" ".join(merge) for merge in described["merges"]]
        (path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
        assert same(path, (name, family, files))


def test_tokenizer_json_wins(tmp_path):
    path = written(tmp_path / "t", json.loads(trained("llama").to_str()), "LlamaTokenizer", "llama", {})
    (path / "tokenizer.model").write_bytes(model(**MODELS["symbols"]))
    assert same(path, "both")
    (path / "tokenizer.model").write_bytes(b"spm\n")  # it is not read
    assert same(path, "both")


@pytest.mark.parametrize(
    "content", [b"spm\n", b"", b"\x0a\x03\x0a\x01", bytes(range(256)), b"IQ== 0\nIg== 1\n"]
)
def test_files_without_a_model_are_refused(tmp_path, content):
    path = written(tmp_path / "t", None, None, "llama", {})
    (path / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match="tokenizer.model: is not a SentencePiece model"):
        Tokenizer.from_directory(path)


@pytest.mark.parametrize("kind", ["word", "char"])
def test_models_of_words_and_characters_are_refused(tmp_path, kind):
    path = written(tmp_path / "t", None, None, "llama", {})
    (path / "tokenizer.model").write_bytes(model(model_type=kind, byte_fallback=False, vocab_size=60))
    with pytest.raises(UserError, match="is not a SentencePiece model of kind Unigram or BPE"):
        Tokenizer.from_directory(path)


def test_a_model_without_its_library_is_copied_and_not_read(tmp_path, monkeypatch):
    """The files are still copied. A call that needs ids says what to install."""
    path = written(tmp_path / "t", None, "LlamaTokenizer", "llama", {})
    (path / "tokenizer.model").write_bytes(model(**MODELS["llama"]))
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
    tokenizer = Tokenizer.from_directory(path)

    class Config:
        vocab_size = 3

    assert tokenizer.check(Config, path) is tokenizer and tokenizer.where == str(path)
    assert tokenizer.special == {} and tokenizer.eos_token_id is None
    tokenizer.save(tmp_path / "copy")
    assert (tmp_path / "copy" / "tokenizer.model").read_bytes() == (path / "tokenizer.model").read_bytes()
    for use in (lambda: tokenizer.encode("a"), tokenizer.fingerprint, lambda: tokenizer.encode_parts(["a"])):
        message = f"^{path}/tokenizer.model: is read by the library sentencepiece, which is not installed: "
        with pytest.raises(reader.Missing, match=message + r"pip install 'longlora\[sentencepiece\]'"):
            use()


def test_a_saved_tokenizer_is_read_again(tmp_path):
    path = written(tmp_path / "t", None, "LlamaTokenizer", "llama", FILES["legacy"])
    (path / "tokenizer.model").write_bytes(model(**MODELS["llama"]))
    ours = Tokenizer.from_directory(path)
    ours.save(tmp_path / "copy")
    assert Tokenizer.from_directory(tmp_path / "copy").fingerprint() == ours.fingerprint()
    assert auto(tmp_path / "copy")("a b").input_ids == ours.encode("a b").tolist()
