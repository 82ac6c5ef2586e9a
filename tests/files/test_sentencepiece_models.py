"""SentencePiece models of a few pieces are converted as in transformers."""

import json

import pytest
from sentencepiece import SentencePieceNormalizer, SentencePieceProcessor
from sentencepiece import sentencepiece_model_pb2 as protobuf
from test_tokenizer import auto
from test_tokenizer_matrix import added, written
from transformers.tokenization_utils_base import generate_merges

from longlora.errors import UserError
from longlora.files import sentencepiece as reader
from longlora.files.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
UNIGRAM, BPE = 1, 2
START = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
BYTES = [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
WORDS = [("ab", -3.0), ("▁a", -1.0), ("▁ab", -2.0), ("aa", -2.0), ("▁▁", -5.0), ("▁", -9.0), ("a", -8.0)]
WORDS = [(text, score, NORMAL) for text, score in [*WORDS, ("b", -7.0), ("c", -7.0), (".", -7.0)]]
OWN = [
    ("a.c", 0.0, USER_DEFINED),
    ("a.", 0.0, USER_DEFINED),
    ("<x>", 0.0, CONTROL),
    ("cab", 0.0, USER_DEFINED),
]


def model(pieces, trainer=(), normalizer=()):
    """The bytes of a SentencePiece model. pieces: text, score and type. The others: fields of its specs."""
    made = protobuf.ModelProto()
    for text, score, kind in pieces:
        made.pieces.add(piece=text, score=score, type=kind)
    fields = dict(model_type=BPE, byte_fallback=True, unk_id=0, bos_id=1, eos_id=2) | dict(trainer)
    for name, value in fields.items():
        setattr(made.trainer_spec, name, value)
    for name, value in (dict(remove_extra_whitespaces=False) | dict(normalizer)).items():
        setattr(made.normalizer_spec, name, value)
    return made.SerializeToString()


MODELS = {
    "bytes": ([*START, *BYTES, *WORDS], {}, {}),
    "no bytes": ([*START, *WORDS], dict(byte_fallback=False), {}),
    "no prefix": ([*START, *BYTES, *WORDS], {}, dict(add_dummy_prefix=False)),
    "neither": ([*START, *WORDS], dict(byte_fallback=False), dict(add_dummy_prefix=False)),
    "spaces": ([*START, *BYTES, *WORDS], {}, dict(remove_extra_whitespaces=True)),
    "not escaped": ([*START, *BYTES, *WORDS, (" ", -3.0, NORMAL)], {}, dict(escape_whitespaces=False)),
    "own": ([*START, *BYTES, *WORDS, *OWN], {}, {}),
    "own without prefix": ([*START, *BYTES, *WORDS, *OWN], {}, dict(add_dummy_prefix=False)),
    "unigram": ([*START, *BYTES, *WORDS], dict(model_type=UNIGRAM), {}),
    "unigram with own": ([*START, *WORDS, *OWN], dict(model_type=UNIGRAM, byte_fallback=False), {}),
    "other names": (
        [("<a>", 0.0, CONTROL), ("<b>", 0.0, UNKNOWN), ("<c>", 0.0, CONTROL), *WORDS],
        dict(unk_id=1, bos_id=0, eos_id=2, unk_piece="<b>", bos_piece="<a>", eos_piece="<c>"),
        {},
    ),
    "empty names": (
        [*START, *WORDS],
        dict(bos_piece="", eos_piece="", unk_piece="", byte_fallback=False),
        {},
    ),
    "twice": ([*START, *WORDS, WORDS[0], *OWN, OWN[0]], dict(byte_fallback=False), {}),
    "no ends": ([*START, *WORDS], dict(bos_id=-1, eos_id=-1), {}),
}
FILES = {
    "nothing": {},
    "legacy": dict(legacy=True, add_bos_token=True, bos_token="<s>", eos_token=None),
    "new": dict(legacy=False, extra_special_tokens=["<new>"], unk_token="a"),
    "decoder": dict(
        legacy=False,
        added_tokens_decoder={
            "1": added("<s>"),
            "9": added("<renamed>"),
            "260": added("<too>"),
            "60": added("<new>", special=False),
        },
    ),
    "normalized": dict(added_tokens_decoder={"1": added("<s>", normalized=True)}),
    "swap": dict(added_tokens_decoder={"1": added("</s>"), "2": added("<s>"), "0": added("ab")}),
}


def opened(path, content, name=None, **config):
    path = written(path / "t", None, name, "llama", {"config": config})
    (path / "tokenizer.model").write_bytes(content)
    return Tokenizer.from_directory(path)


def alike(path, content, name, config):
    """Check that our tokenizer.json and special tokens are those of transformers -> our tokenizer."""
    ours, theirs = opened(path, content, name, **config), auto(path / "t")
    assert json.loads(ours.backend.to_str()) == json.loads(theirs.backend_tokenizer.to_str()), config
    assert ours.special == {key: str(value) for key, value in theirs.special_tokens_map.items()}, config
    return ours


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", [None, "LlamaTokenizer"])
def test_a_model_is_converted_as_in_transformers(tmp_path, kind, name):
    for config in FILES.values():
        alike(tmp_path, model(*MODELS[kind]), name, config)


def test_characters_are_replaced_as_in_transformers(tmp_path):
    """The model holds the table of replacements."""
    rules = SentencePieceNormalizer(rule_name="nfkc").serialized_model_proto()
    table = protobuf.ModelProto.FromString(rules).normalizer_spec.precompiled_charsmap
    content = model(*MODELS["bytes"][:2], dict(precompiled_charsmap=table))
    ours = alike(tmp_path, content, None, {})
    assert ours.encode("ａｂ").tolist() == ours.encode("ab").tolist()


def test_ids_are_those_of_sentencepiece(tmp_path):
    """No text holds a special token, which the library would not recognise."""
    content = model(*MODELS["bytes"])
    theirs, ours = SentencePieceProcessor(model_proto=content), opened(tmp_path, content)
    for text in ("", " ", "ab", "a  b", " ab aaa", "ab\n!é", "aaaa ab.c", "▁a", "abba"):
        assert ours.encode(text).tolist() == theirs.encode(text), text
        assert ours.decode(theirs.encode(text)) == theirs.decode(theirs.encode(text))


def test_the_longest_user_defined_symbol_is_matched(tmp_path):
    """A user-defined symbol is matched whole and literally: its dot matches only a dot."""
    ours = opened(tmp_path, model(*MODELS["own without prefix"]))
    index = {piece[0]: i for i, piece in enumerate(MODELS["own without prefix"][0])}
    wanted = [index[text] for text in ("a.c", "a.", "b", "cab", "ab", "c")]
    assert ours.encode("a.ca.bcababc").tolist() == wanted


@pytest.mark.parametrize(
    "content, message",
    [
        (b"\x0a\x05a", "tokenizer.model: is not a SentencePiece model$"),
        (model([]), "tokenizer.model: is not a SentencePiece model of kind Unigram or BPE$"),
    ],
)
def test_bytes_without_a_model_are_an_error(content, message):
    with pytest.raises(UserError, match=message):
        reader.read(content, "here/tokenizer.model")


@pytest.mark.parametrize("scores", [None, dict(ab=-3.0, aba=-1.0, ba=-3.0, b=-9.0, abab=-1.0)])
def test_merges_are_those_of_transformers(scores):
    """Of merges with one id the one with the shorter first part comes first; with one score, the longer."""
    vocab = {text: index for index, text in enumerate(("abab", "b", "ba", "a", "aba", "ab", "bab"))}
    wanted = generate_merges(vocab, scores)
    assert reader.merges_of(vocab, scores) == [[*pair] for pair in wanted] and len(wanted) > 5
