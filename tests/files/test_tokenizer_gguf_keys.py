"""The tokenizer that the keys of a GGUF describe: steps, flags, special tokens, saved files."""

import json

import pytest
import tiny
from test_tokenizer import Rows, auto, gguf_file, trained
from test_tokenizer_gguf import metadata_of
from tokenizer_parts import BYTE_LEVEL, METASPACE
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.tokenization_utils_base import generate_merges

from longlora.errors import UserError
from longlora.files.tokenizer import Tokenizer
from longlora.files.tokenizer_gguf import byte_alphabet

CONTROL, USER_DEFINED = 3, 4
END = "<|endoftext|>"
LETTERS = [*json.loads(tiny.tokenizer_json())["model"]["vocab"]][:256]
PIECES = ["<unk>", "<s>", "</s>", "<0x0A>", "▁", "a", "b", "ab", "▁a", "▁ab", "<x>"]
SCORES = [0.0, 0.0, 0.0, 0.0, -9.0, -9.0, -9.0, -2.0, -1.0, -3.0, 0.0]
PLAIN = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)


def bytes_of(more=(), types=(), **keys):
    """The metadata of byte-level BPE: a token for each byte, "ab", and `more`. types: id -> its type."""
    tokens = [*LETTERS, "ab", *more]
    named = {index: 1 for index in range(len(tokens))} | dict(types)
    keys = dict(model="gpt2", tokens=tokens, merges=["a b"], token_type=[*named.values()]) | keys
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}


def pieces_of(**keys):
    """The metadata of a SentencePiece vocabulary."""
    keys = dict(model="llama", tokens=PIECES, scores=SCORES, unknown_token_id=0) | keys
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}


def opened(metadata, architecture="llama", **more):
    return Tokenizer.from_gguf({"general.architecture": architecture, **metadata, **more}, "m.gguf")


def described(metadata, *arguments, **more):
    return json.loads(opened(metadata, *arguments, **more).backend.to_str())


def refused(metadata, message):
    with pytest.raises(UserError, match=f"^m.gguf: {message}"):
        opened(metadata)


# ---- byte-level BPE ------------------------------------------------------------------------------


def test_the_letters_of_bytes_are_those_of_gpt2():
    assert byte_alphabet() == bytes_to_unicode()


@pytest.mark.parametrize("pre", [*GGUF_PRE_TOKENIZER_SPLITS, "gpt-2", "gpt2", "default", "smollm", None])
def test_the_name_of_a_split_stands_for_an_expression(pre):
    got = described(bytes_of(pre=pre))
    if pre in GGUF_PRE_TOKENIZER_SPLITS:
        by, letters = got["pre_tokenizer"]["pretokenizers"]
        assert by["pattern"] == {"Regex": GGUF_PRE_TOKENIZER_SPLITS[pre]}
        assert (by["behavior"], by["invert"]) == ("Isolated", False)
        assert letters == {**BYTE_LEVEL, "use_regex": False}
    else:
        assert got["pre_tokenizer"] == BYTE_LEVEL
    assert got["normalizer"] is None and got["decoder"]["type"] == "ByteLevel"
    assert got["post_processor"]["special_tokens"] == {}


def test_an_unknown_name_of_a_split_is_refused():
    refused(
        bytes_of(pre="bert"),
        "pre-tokenizer 'bert' is not supported; supported are dbrx, deepseek-r1-qwen, de",
    )


def test_bytes_and_merges_have_their_ids():
    ours = opened(bytes_of(["日"]))
    assert ours.encode("abé").tolist() == [256, 0xC3, 0xA9]
    assert ours.decode([256, 0xC3, 0xA9]) == "abé"
    assert ours.backend.id_to_token(257) == "æĹ¥"  # spelt in GPT-2's letters
    assert ours.special == {} and ours.bos_token_id is None


def test_tokens_that_are_matched_before_bpe():
    """Control tokens become special tokens. One that is not written in GPT-2's byte letters is left out: the
    program that wrote the file made a mistake."""
    more = ["<c>", "<日>", "<u>", "<語>", "<n>"]
    types = {257: CONTROL, 258: CONTROL, 259: USER_DEFINED, 260: USER_DEFINED}
    got = described(bytes_of(more, types))["added_tokens"]
    wanted = [("<c>", 257, True), ("<u>", 259, False), (END, 262, True)]
    assert [(token["content"], token["id"], token["special"]) for token in got] == wanted
    assert all({key: token[key] for key in PLAIN} == PLAIN for token in got[:2])


def test_tokens_without_types_are_plain():
    for types in (None, [1]):
        got = described(bytes_of(["<c>"], token_type=types))
        assert [token["content"] for token in got["added_tokens"]] == [END]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_the_class_of_the_family_adds_its_tokens_again(tmp_path, architecture):
    """Qwen2Tokenizer thus makes a user-defined token special."""
    path = gguf_file(
        tmp_path / "m.gguf",
        trained("gpt2"),
        "gpt2",
        architecture,
        {"<|im_end|>": USER_DEFINED},
        eos_token_id=2,
    )
    ours = Tokenizer.from_gguf(metadata_of(path), path)
    theirs = auto(tmp_path, gguf_file="m.gguf")
    found, wanted = (
        {x["content"]: x["special"] for x in json.loads(text)["added_tokens"]}
        for text in (ours.backend.to_str(), theirs.backend_tokenizer.to_str())
    )
    assert found == wanted and found["<|im_end|>"] == architecture.startswith("qwen")


# ---- SentencePiece -------------------------------------------------------------------------------


def test_merges_come_from_scores_or_from_the_file():
    """Of two merges that apply, the one with the better score comes first."""
    ours = opened(pieces_of())
    vocab = {piece: index for index, piece in enumerate(PIECES)}
    wanted = generate_merges(vocab, dict(zip(PIECES, SCORES, strict=True)))
    assert json.loads(ours.backend.to_str())["model"]["merges"] == [[*pair] for pair in wanted]
    assert wanted[0] == ("▁", "a") and len(wanted) == 4
    assert ours.encode("ab").tolist() == [9]
    got = described(pieces_of(merges=["a b"], scores=None))["model"]
    assert got["merges"] == [["a", "b"]] and got["fuse_unk"] and got["byte_fallback"]


@pytest.mark.parametrize("scores", [None, SCORES[:-1], [*SCORES, 0.0], []])
def test_without_merges_each_token_needs_a_score(scores):
    refused(
        pieces_of(scores=scores), "the metadata has neither tokenizer.ggml.merges nor a score for each tok"
    )


@pytest.mark.parametrize("scores", [["a"] * len(PIECES), [1] * len(PIECES), 3.0])
def test_scores_are_floats(scores):
    refused(pieces_of(scores=scores), "tokenizer.ggml.scores should be a list of float, got ")


def test_steps_of_sentencepiece():
    """transformers ignores add_space_prefix. Only phi3 has a normalizer, as Llama once had."""
    prepend = dict(type="Prepend", prepend="▁")
    replace = dict(type="Replace", pattern={"String": " "}, content="▁")
    for keys in ({}, dict(add_space_prefix=False)):
        got = described(pieces_of(**keys))
        assert (got["normalizer"], got["pre_tokenizer"]) == (None, METASPACE)
    got = described(pieces_of(), "phi3")
    assert got["normalizer"] == dict(type="Sequence", normalizers=[prepend, replace])
    assert got["pre_tokenizer"] is None
    assert [step["type"] for step in got["decoder"]["decoders"]] == [
        "Replace",
        "ByteFallback",
        "Fuse",
        "Strip",
    ]


def test_any_piece_of_sentencepiece_may_be_a_control_token():
    types = [2, CONTROL, CONTROL, 6, 1, 1, 1, 1, CONTROL, 1, USER_DEFINED]
    got = {x["content"]: x["special"] for x in described(pieces_of(token_type=types))["added_tokens"]}
    assert got == {"<unk>": True, "<s>": True, "</s>": True, "▁a": True, "<x>": False}


# ---- special tokens ------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [bytes_of, pieces_of])
@pytest.mark.parametrize("bos", [True, False, None])
@pytest.mark.parametrize("eos", [True, False, None])
def test_bos_and_eos_are_put_around_a_text(make, bos, eos):
    """By default SentencePiece puts BOS before a text, and no tokenizer puts EOS after it."""
    ours = opened(make(bos_token_id=1, eos_token_id=2, add_bos_token=bos, add_eos_token=eos))
    first = make is pieces_of if bos is None else bos
    assert ours.encode("").tolist() == [1] * first + [2] * bool(eos)
    assert (ours.bos_token_id, ours.eos_token_id) == (1, 2)


def test_tokens_without_an_id_are_not_put_around_a_text():
    assert opened(bytes_of(add_bos_token=True, add_eos_token=True)).encode("").size == 0


def test_special_tokens_have_ids():
    keys = dict(bos_token_id=0, eos_token_id=256, unknown_token_id=98, padding_token_id=99)
    ours = opened(bytes_of(**keys))
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    assert ours.special == dict(zip(names, (LETTERS[0], "ab", "b", "c"), strict=True))


@pytest.mark.parametrize("key, name", [("bos_token_id", "bos"), ("padding_token_id", "pad")])
@pytest.mark.parametrize("index", [-1, 257])
def test_an_id_of_no_token_is_named(key, name, index):
    refused(bytes_of(**{key: index}), f"{name}_token has id {index}, the tokenizer has 257 tokens$")


@pytest.mark.parametrize(
    "keys, message",
    [
        (
            dict(model="bert"),
            "tokenizer 'bert' is not supported; supported are gpt2 .byte-level BPE. and llama",
        ),
        (dict(model=None), "tokenizer None is not supported"),
        (dict(model=["gpt2"]), r"tokenizer.ggml.model should be of type str, got \['gpt2'\]"),
        (dict(model=7), "tokenizer.ggml.model should be of type str, got 7"),
        (dict(tokens=None), "the metadata lacks tokenizer.ggml.tokens"),
        (dict(tokens=7), "tokenizer.ggml.tokens should be a list of str, got 7"),
        (dict(tokens="ab"), "tokenizer.ggml.tokens should be a list of str, got 'ab'"),
        (dict(tokens=["a", 3]), r"tokenizer.ggml.tokens should be a list of str, got \['a', 3\]"),
        (dict(merges=None), "the metadata lacks tokenizer.ggml.merges"),
        (dict(merges=["a c"]), "not a tokenizer: "),
        (dict(merges=["a b c"]), "not a tokenizer: "),
        (dict(merges=[["a", "b"]]), "tokenizer.ggml.merges should be a list of str"),
        (dict(pre=3), "tokenizer.ggml.pre should be of type str, got 3"),
        (dict(pre=["", ""]), r"tokenizer.ggml.pre should be of type str, got \['', ''\]"),
        (dict(bos_token_id="<s>"), "tokenizer.ggml.bos_token_id should be of type int, got '<s>'"),
        (dict(bos_token_id=True), "tokenizer.ggml.bos_token_id should be of type int, got True"),
        (dict(padding_token_id=1.0), "tokenizer.ggml.padding_token_id should be of type int, got 1.0"),
        (dict(eos_token_id=-1), "eos_token has id -1, the tokenizer has 257 tokens$"),
        (dict(token_type=4294967295), "tokenizer.ggml.token_type should be a list of int, got 4294967295"),
        (dict(token_type=["a"]), "tokenizer.ggml.token_type should be a list of int"),
        (dict(token_type=[1.0]), r"tokenizer.ggml.token_type should be a list of int, got \[1.0\]"),
        (dict(token_type=[True]), "tokenizer.ggml.token_type should be a list of int"),
        (dict(add_bos_token=1), "tokenizer.ggml.add_bos_token should be of type bool, got 1"),
        (dict(add_eos_token=[]), "tokenizer.ggml.add_eos_token should be of type bool"),
        (dict(add_eos_token="no"), "tokenizer.ggml.add_eos_token should be of type bool, got 'no'"),
    ],
)
def test_wrong_keys_are_named(keys, message):
    refused(bytes_of(**keys), message)


# ---- saved files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["{{ 1 }}", None, ["x"]])
def test_files_give_transformers_the_same_tokenizer(tmp_path, template):
    more = {} if template is None else {"tokenizer.chat_template": template}
    keys = dict(bos_token_id=1, eos_token_id=256, add_bos_token=True)
    ours = opened(bytes_of(["<c>"], {257: CONTROL}, **keys), **more)
    assert ours.names() == ["tokenizer.json", "tokenizer_config.json"] and ours.where == "m.gguf"
    ours.save(tmp_path)
    theirs = auto(tmp_path)
    assert json.loads(theirs.backend_tokenizer.to_str()) == json.loads(ours.backend.to_str())
    assert theirs.special_tokens_map == ours.special
    assert theirs.chat_template == (template if isinstance(template, str) else None)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["clean_up_tokenization_spaces"] is False
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert ("chat_template" in config) == isinstance(template, str)


def test_tokens_that_only_the_class_has_may_lack_a_row():
    ours = opened(bytes_of())
    assert ours.vocab_size == 258 and ours.encode(END).tolist() == [257]
    with pytest.raises(UserError, match="^x: the tokenizer has 257 tokens, the embedding 256 rows$"):
        ours.check(Rows(256), "x")
    assert ours.check(Rows(257), "x").encode(f"a{END}").max() < 257
    named = opened(bytes_of([END], eos_token_id=257))
    with pytest.raises(UserError, match="^x: the tokenizer has 258 tokens, the embedding 257 rows$"):
        named.check(Rows(257), "x")
