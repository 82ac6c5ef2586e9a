"""The keys of a GGUF that a tokenizer of a few tokens becomes, key by key, under the names of gguf-py."""

import copy
import json
from types import SimpleNamespace

import pytest
import tiny
from gguf import TokenType
from gguf.constants import Keys
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS as SPLITS

from longlora.errors import UserError
from longlora.files.tokenizer import Tokenizer
from longlora.files.tokenizer_backend import build
from longlora.files.tokenizer_to_gguf import kept, keys

KEY = Keys.Tokenizer
LETTERS = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
FLAGS = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
BYTES = json.loads(tiny.tokenizer_json())
BYTES["model"]["vocab"]["ab"] = 257
BYTES["model"]["merges"] = [["a", "b"]]
END = "<|end|>"


def found(described, rows=258, special=None, files=None, generation=None, bos=None, eos=256):
    """The keys of a tokenizer.json. bos, eos: ids of the model's config."""
    tokenizer = Tokenizer(build(described, "here"), special or {}, files or {}, "here")
    config = SimpleNamespace(vocab_size=rows, bos_token_id=bos, eos_token_id=eos)
    return keys(tokenizer, config, generation)


def refused(described, message, **kwargs):
    with pytest.raises(UserError, match=f"^here: {message}"):
        found(described, **kwargs)


def added(index, content, special):
    return dict(id=index, content=content, special=special, **FLAGS)


def around(*tokens):
    """A post-processor: pairs of text and id, and None for the text itself."""
    steps = [
        {"SpecialToken": {"id": x[0], "type_id": 0}} if x else {"Sequence": {"id": "A", "type_id": 0}}
        for x in tokens
    ]
    ids = {x[0]: {"id": x[0], "ids": [x[1]], "tokens": [x[0]]} for x in tokens if x}
    return {"type": "TemplateProcessing", "single": steps, "pair": steps, "special_tokens": ids}


def test_keys_of_byte_level_bpe():
    """A row without a token is unused, and has a name that no other token has."""
    more = [added(258, "[PAD259]", False), added(260, "<x>", True)]
    described = {**BYTES, "added_tokens": [*BYTES["added_tokens"], *more]}
    got = found(described, rows=263, special=dict(eos_token=END))
    letters = {index: text for text, index in BYTES["model"]["vocab"].items()}
    end = ["[PAD259]", "[PAD259]_", "<x>", "[PAD261]", "[PAD262]"]
    # The library gives an added token the next free id.
    index = build(described, "x").token_to_id("<x>")
    assert index in (259, 260)
    if index == 259:
        end = ["[PAD259]", "<x>", "[PAD260]", "[PAD261]", "[PAD262]"]
    unused = [TokenType.UNUSED if text.startswith("[PAD") else TokenType.CONTROL for text in end[1:]]
    assert got == {
        KEY.MODEL: "gpt2",
        KEY.PRE: "gpt-2",
        KEY.LIST: [*(letters[i] for i in range(258)), *end],
        KEY.TOKEN_TYPE: [1] * 256 + [TokenType.CONTROL, 1, TokenType.USER_DEFINED, *unused],
        KEY.MERGES: ["a b"],
        KEY.EOS_ID: 256,
        KEY.ADD_BOS: False,
        KEY.ADD_EOS: False,
    }


def test_a_name_of_an_unused_row_is_no_other_tokens():
    vocab = {**BYTES["model"]["vocab"], "[PAD259]": 258, "[PAD259]_": 260, "[PAD261]": 262}
    got = found({**BYTES, "model": {**BYTES["model"], "vocab": vocab}}, rows=263)
    assert got[KEY.LIST][258:] == ["[PAD259]", "[PAD259]__", "[PAD259]_", "[PAD261]_", "[PAD261]"]
    assert got[KEY.TOKEN_TYPE][258:] == [1, 5, 1, 5, 1]


# ---- the way a text is split ---------------------------------------------------------------------

DIGITS = dict(type="Digits", individual_digits=True)


def by(pattern, **changes):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False} | changes


PLAIN = {**LETTERS, "use_regex": False}


@pytest.mark.parametrize("name", ["llama-bpe", "smaug-bpe", "qwen2", "qwen35", "tekken", "gpt-4o"])
def test_a_regular_expression_has_a_name(name):
    """llama.cpp ignores merges for two of the names: then a whole word that is a token is not split."""
    described, ignores = copy.deepcopy(BYTES), name in ("llama-bpe", "tekken")
    described["pre_tokenizer"] = dict(type="Sequence", pretokenizers=[by(SPLITS[name]), PLAIN])
    described["model"]["ignore_merges"] = ignores
    assert found(described)[KEY.PRE] == name
    described["model"]["ignore_merges"] = not ignores
    other = {"llama-bpe": "smaug-bpe", "smaug-bpe": "llama-bpe"}.get(name)
    if other:
        assert found(described)[KEY.PRE] == other
    else:
        flag = str(not ignores).lower()
        refused(described, f"llama.cpp has no name for texts split by .* with ignore_merges {flag}$")


def in_turn(*steps):
    return dict(type="Sequence", pretokenizers=[*steps])


@pytest.mark.parametrize(
    "pre, name",
    [
        (LETTERS, "gpt-2"),
        (in_turn(LETTERS), "gpt-2"),
        (in_turn(DIGITS, LETTERS), "smollm"),
        (in_turn(DIGITS, in_turn(LETTERS)), "smollm"),
        (in_turn(by(r"\p{N}"), LETTERS), "smollm"),
        (in_turn(LETTERS, DIGITS), "llama.cpp has no name for texts split by"),
        (in_turn({**DIGITS, "individual_digits": False}, LETTERS), "llama.cpp does not split texts by"),
        (in_turn(by(SPLITS["qwen2"], invert=True), PLAIN), "llama.cpp does not split texts by .*Split"),
        (
            in_turn(by(SPLITS["qwen2"], behavior="Removed"), PLAIN),
            "llama.cpp does not split texts by .*Split",
        ),
        (in_turn({**by(""), "pattern": {"String": " "}}, PLAIN), "llama.cpp does not split texts by .*Split"),
        (in_turn(dict(type="WhitespaceSplit"), PLAIN), "llama.cpp does not split texts by .*WhitespaceSplit"),
        ({**LETTERS, "add_prefix_space": True}, "llama.cpp does not split texts by .*ByteLevel"),
        (PLAIN, "llama.cpp has no name for texts split by"),
        (dict(type="Whitespace"), "BPE without bytes cannot go into a GGUF file: llama.cpp does not have it"),
        (None, "BPE without bytes cannot go into a GGUF file"),
    ],
)
def test_the_way_a_text_is_split_has_a_name(pre, name):
    described = {**BYTES, "pre_tokenizer": pre}
    if " " in name:
        refused(described, name)
    else:
        assert found(described)[KEY.PRE] == name


@pytest.mark.parametrize(
    "normalizer, message",
    [
        (None, None),
        (dict(type="NFC"), None),
        (dict(type="Sequence", normalizers=[dict(type="NFC"), dict(type="NFC")]), None),
        (dict(type="NFKC"), 'llama.cpp does not have the normalizer {"type": "NFKC"}'),
        (
            dict(type="Sequence", normalizers=[dict(type="NFC"), dict(type="Lowercase")]),
            "llama.cpp .*Lowercase",
        ),
    ],
)
def test_only_nfc_is_left_out(normalizer, message):
    described = {**BYTES, "normalizer": normalizer}
    refused(described, message) if message else found(described)


@pytest.mark.parametrize(
    "model, message",
    [
        (dict(merges=[]), "a tokenizer without merges cannot go into a GGUF file"),
        (dict(continuing_subword_prefix="#"), "llama.cpp's BPE does not have continuing_subword_prefix '#'"),
        (dict(end_of_word_suffix="</w>"), "llama.cpp's BPE does not have end_of_word_suffix '</w>'"),
    ],
)
def test_models_that_llama_cpp_does_not_have(model, message):
    described = copy.deepcopy(BYTES)
    described["model"].update(model)
    if "continuing_subword_prefix" in model:
        described["model"]["merges"] = [["a", "#b"]]
        described["model"]["vocab"].update({"#b": 258})
    refused(described, message)


def test_another_kind_of_model_is_named():
    words = dict(type="WordLevel", vocab={"a": 0}, unk_token="a")
    refused({**BYTES, "model": words}, "a tokenizer of type WordLevel cannot go into a GGUF file; BPE can")


# ---- SentencePiece -------------------------------------------------------------------------------

PIECES = ("<unk>", "<s>", "</s>", "<0x0A>", "<0x123>", "[0x0B>", "<0x0C)", "▁", "a", "b", "ab", "▁a", "▁ab")
MERGES = [["a", "b"], ["▁", "a"], ["▁", "ab"], ["▁a", "b"]]
SPACES = dict(type="Metaspace", replacement="▁", prepend_scheme="first", split=False)


def pieces(merges=MERGES, more=(), **parts):
    model = dict(type="BPE", unk_token="<unk>", fuse_unk=True, byte_fallback=True, merges=merges)
    model["vocab"] = {piece: index for index, piece in enumerate(PIECES)}
    tokens = [added(0, "<unk>", True), added(1, "<s>", True), added(2, "</s>", True), *more]
    described = dict(version="1.0", added_tokens=tokens, normalizer=None, pre_tokenizer=SPACES)
    return described | dict(post_processor=None, decoder=None, model=model) | parts


def test_keys_of_sentencepiece():
    """A token's score is minus the rank of its first merge; tokens without one are merged last."""
    more = [
        added(13, "▁x", False),
        added(14, "a▁x", False),
        added(15, "ab x", False),
        added(16, "ab▁x", False),
    ]
    described = pieces(more=more, post_processor=around(("<s>", 1), None))
    got = found(described, rows=18, special=dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>"))
    assert got == {
        KEY.MODEL: "llama",
        KEY.PRE: "default",
        # Their spaces are spaces, unless that is a second token.
        KEY.LIST: [*PIECES, " x", "a x", "ab x", "ab▁x", "[PAD17]"],
        KEY.TOKEN_TYPE: [2, 3, 3, 6, 1, 1, 1, 1, 1, 1, 1, 1, 1, 4, 4, 4, 4, 5],
        KEY.SCORES: [0.0] * 4 + [-4.0] * 6 + [0.0, -1.0, -2.0] + [0.0] * 5,
        KEY.MERGES: ["a b", "▁ a", "▁ ab", "▁a b"],
        KEY.ADD_PREFIX: True,
        KEY.BOS_ID: 1,
        KEY.EOS_ID: 2,
        KEY.UNK_ID: 0,
        KEY.ADD_BOS: True,
        KEY.ADD_EOS: False,
    }


@pytest.mark.parametrize(
    "merges, message",
    [
        (MERGES[:3], r"its merges are not those of SentencePiece, which llama.cpp would apply \(▁ab\)$"),
        (
            [MERGES[0], MERGES[2], MERGES[1], MERGES[3]],
            "its merges .* apply .those of one token stand apart.$",
        ),
        ([MERGES[1], MERGES[2], MERGES[3]], "its merges are not those of SentencePiece, .* .ab.$"),
    ],
)
def test_merges_that_sentencepiece_would_not_have_are_refused(merges, message):
    refused(pieces(merges), message, rows=13, eos=2)


def test_only_plain_tokens_are_merged():
    """The parts of an added token are not its merges."""
    got = found(pieces(more=[added(13, "aa", False), added(14, "bb", True)]), rows=15, eos=2)
    assert got[KEY.TOKEN_TYPE][13:] == [4, 3] and got[KEY.SCORES][13:] == [0.0, 0.0]


def test_a_part_that_is_no_token_is_no_merge():
    described = pieces()
    described["model"]["vocab"].update({"zab": 13, "abz": 14})
    got = found(described, rows=15, eos=2)
    assert got[KEY.MERGES] == ["a b", "▁ a", "▁ ab", "▁a b"] and got[KEY.SCORES][13:] == [-4.0, -4.0]


def put(**changes):
    return dict(type="Replace", pattern={"String": " "}, content="▁") | changes


def norm(*steps):
    return dict(type="Sequence", normalizers=[*steps])


PREPEND = dict(type="Prepend", prepend="▁")
GEMMA = dict(type="Split", pattern={"String": " "}, behavior="MergedWithPrevious", invert=False)


@pytest.mark.parametrize(
    "normalizer, pre, prefix",
    [
        (None, SPACES, True),
        (None, {**SPACES, "prepend_scheme": "always"}, True),
        (None, {**SPACES, "prepend_scheme": "never"}, False),
        (None, in_turn(SPACES), True),
        (None, None, False),
        (norm(PREPEND, put()), None, True),
        (PREPEND, None, True),
        (put(), GEMMA, False),
        (norm(put(), put(pattern={"Regex": r"\A▁"}, content="▁▁")), SPACES, True),
        (norm(put(pattern={"Regex": r"\A▁"}, content="▁")), SPACES, None),
        (norm(put(pattern={"Regex": " {2,}"}, content="▁▁")), SPACES, None),
        (put(content="_"), None, None),
        (put(pattern={"String": "a"}), None, None),
        (dict(type="Prepend", prepend="_"), None, None),
        (dict(type="NFC"), None, None),
        (None, {**SPACES, "replacement": "_"}, None),
        (None, dict(type="Whitespace"), None),
    ],
)
def test_whether_a_space_comes_before_a_text(normalizer, pre, prefix):
    described = pieces(normalizer=normalizer, pre_tokenizer=pre)
    if prefix is None:
        refused(described, "llama.cpp's SentencePiece does not have the step {", rows=13, eos=2)
    else:
        assert found(described, rows=13, eos=2)[KEY.ADD_PREFIX] is prefix


# ---- special tokens ------------------------------------------------------------------------------

ALL = dict(bos_token="a", eos_token=END, unk_token="b", sep_token="c", pad_token="d", mask_token="e")
BOS, EOS = ("a", 97), (END, 256)


def test_special_tokens_have_their_keys():
    got = found(BYTES, special={**ALL, "cls_token": "f", "image_token": "g"})
    ids = {KEY.BOS_ID: 97, KEY.EOS_ID: 256, KEY.UNK_ID: 98, KEY.SEP_ID: 99, KEY.PAD_ID: 100, KEY.MASK_ID: 101}
    assert {key: value for key, value in got.items() if key.endswith("_id")} == ids


@pytest.mark.parametrize(
    "special, bos, eos, wanted",
    [
        ({}, None, 256, (None, 256)),
        ({}, 0, 0, (0, 0)),
        ({}, 7, 257, (7, 257)),
        ({}, 258, 257, (None, 257)),
        (dict(bos_token="a", eos_token="b"), 7, 8, (97, 98)),
        (dict(bos_token="none such", eos_token="none such"), 7, 8, (7, 8)),
    ],
)
def test_ids_of_the_config_count_where_the_tokenizer_has_none(special, bos, eos, wanted):
    """And those beyond the embedding do not."""
    got = found(BYTES, special=special, bos=bos, eos=eos)
    assert (got.get(KEY.BOS_ID), got.get(KEY.EOS_ID)) == wanted


@pytest.mark.parametrize("eos", [None, 258])
def test_a_token_must_end_a_text(eos):
    refused(BYTES, "names no token that ends a text; llama.cpp would use token 11$", bos=3, eos=eos)


@pytest.mark.parametrize(
    "post, special, wanted",
    [
        (None, ALL, (False, False)),
        (around(BOS, None), ALL, (True, False)),
        (around(None, EOS), ALL, (False, True)),
        (around(BOS, None, EOS), ALL, (True, True)),
        (around(EOS, None), dict(bos_token=END, eos_token=END), (True, False)),
        (around(EOS, None, EOS), dict(bos_token=END, eos_token=END), (True, True)),
        (around(None, EOS), dict(eos_token=END), (False, True)),
        (around(EOS, None, BOS), ALL, r"\[256, 97\]"),
        (around(BOS, None, BOS), ALL, r"\[97, 97\]"),
        (around(BOS, None), dict(eos_token=END), r"\[97\]"),
        (around(("b", 98), None), ALL, r"\[98\]"),
    ],
)
def test_what_is_put_around_a_text(post, special, wanted):
    described = {**BYTES, "post_processor": post}
    if isinstance(wanted, str):
        message = f"puts the tokens {wanted} around each text; llama.cpp has only bos and eos$"
        refused(described, message, special=special)
    else:
        got = found(described, special=special)
        assert (got[KEY.ADD_BOS], got[KEY.ADD_EOS]) == wanted


@pytest.mark.parametrize(
    "generation, wanted",
    [
        (None, []),
        ({}, []),
        (dict(eos_token_id=7), []),
        (dict(eos_token_id=[256]), []),
        (dict(eos_token_id=[256, 7]), [7]),
        (dict(eos_token_id=[0, 256, 257, 7]), [0, 257]),
        (dict(eos_token_id=[True, -1, 258, "7", 1.0, 257]), [257]),
    ],
)
def test_more_tokens_that_end_a_text(generation, wanted):
    got = found(BYTES, special=ALL, generation=generation)
    assert [got[key] for key in (KEY.EOT_ID, KEY.EOM_ID) if key in got] == wanted
    assert (KEY.EOM_ID in got) == (len(wanted) == 2)


# ---- chat templates, and keys as they are --------------------------------------------------------


def files(templates):
    listed = [{"name": name, "template": text} for name, text in templates.items()]
    return {"tokenizer_config.json": json.dumps({"chat_template": listed}).encode()}


@pytest.mark.parametrize(
    "templates, wanted",
    [
        ({}, {}),
        (dict(default="one"), {KEY.CHAT_TEMPLATE: "one"}),
        (
            dict(tools="t", default="é", rag="r"),
            {
                KEY.CHAT_TEMPLATE: "é",
                KEY.CHAT_TEMPLATES: ["rag", "tools"],
                KEY.CHAT_TEMPLATE_N.format(name="rag"): "r",
                KEY.CHAT_TEMPLATE_N.format(name="tools"): "t",
            },
        ),
        (dict(tools="t"), {KEY.CHAT_TEMPLATES: ["tools"], KEY.CHAT_TEMPLATE_N.format(name="tools"): "t"}),
    ],
)
def test_chat_templates_have_their_keys(templates, wanted):
    got = found(BYTES, special=ALL, files=files(templates))
    assert {key: value for key, value in got.items() if "chat" in key} == wanted


@pytest.mark.parametrize(
    "templates, key",
    [(dict(default="\ud800"), "tokenizer.chat_template"), ({"\udfff": "x"}, "tokenizer.chat_templates")],
)
def test_half_a_character_is_named(templates, key):
    refused(BYTES, f"{key} holds half a character$", special=ALL, files=files(templates))


def test_keys_of_another_file_are_kept():
    """Not an empty list, which GGUF cannot hold, nor what is not of the tokenizer."""
    metadata = {
        "tokenizer.ggml.tokens": ["a", "b"],
        "tokenizer.ggml.scores": [-1.5, 2.0**31 - 1],
        "tokenizer.ggml.token_type": [1, -(2**31)],
        "tokenizer.ggml.other": 2**31 - 1,
        "tokenizer.ggml.empty": "",
        "tokenizer.none": [],
        "general.name": "x",
        "llama.block_count": 2**40,
    }
    wanted = [*metadata][:5]
    assert kept(metadata, "m.gguf") == {key: metadata[key] for key in wanted}


@pytest.mark.parametrize("value", [2**31, -(2**31) - 1, [1, 2**31], [0, -(2**31) - 1], 1e30, [float("inf")]])
def test_numbers_beyond_32_bits_are_named(value):
    with pytest.raises(UserError, match="^m.gguf: tokenizer.ggml.x holds a number beyond 32 bits$"):
        kept({"tokenizer.ggml.ok": 1, "tokenizer.ggml.x": value}, "m.gguf")
