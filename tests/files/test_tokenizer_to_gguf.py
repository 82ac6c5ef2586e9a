"""The GGUF keys that a tokenizer becomes, under the names of gguf-py."""

import copy
import json
from types import SimpleNamespace

import pytest
import tiny
from gguf import TokenType
from gguf.constants import Keys
from tokenizer_parts import BYTE_LEVEL, METASPACE, around
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS as SPLITS

from longlora.errors import UserError
from longlora.files.tokenizer import Tokenizer
from longlora.files.tokenizer_backend import build
from longlora.files.tokenizer_to_gguf import kept, keys

KEY = Keys.Tokenizer
PLAIN = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
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
    return dict(id=index, content=content, special=special, **PLAIN)


def test_keys_of_byte_level_bpe():
    """A row without a token is unused, and has a name that no other token has."""
    more = [added(258, "[PAD260]", False), added(259, "<x>", True)]
    described = {**BYTES, "added_tokens": [*BYTES["added_tokens"], *more]}
    got = found(described, rows=263, special=dict(eos_token=END))
    letters = {index: text for text, index in BYTES["model"]["vocab"].items()}
    assert got == {
        KEY.MODEL: "gpt2",
        KEY.PRE: "gpt-2",
        KEY.LIST: [*(letters[i] for i in range(258)), "[PAD260]", "<x>", "[PAD260]_", "[PAD261]", "[PAD262]"],
        KEY.TOKEN_TYPE: [TokenType.NORMAL] * 256
        + [TokenType.CONTROL, TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.CONTROL]
        + [TokenType.UNUSED] * 3,
        KEY.MERGES: ["a b"],
        KEY.EOS_ID: 256,
        KEY.ADD_BOS: False,
        KEY.ADD_EOS: False,
    }


def test_an_id_of_an_added_and_a_plain_token_is_the_added_ones():
    """As in id_to_token. The vocabulary lacks an id, so the library gives <new> the id of another token."""
    vocab = {**BYTES["model"]["vocab"], "xy": 259}
    more = [*BYTES["added_tokens"], added(260, "<new>", False)]
    described = {**BYTES, "added_tokens": more, "model": {**BYTES["model"], "vocab": vocab}}
    backend = build(described, "x")
    assert backend.token_to_id("<new>") == 259 and backend.id_to_token(259) == "<new>"
    for _ in range(9):  # the order of the library's vocabulary is random
        got = found(described, rows=260)
        assert got[KEY.LIST][258:] == ["[PAD258]", "<new>"]
        assert got[KEY.TOKEN_TYPE][258:] == [TokenType.UNUSED, TokenType.USER_DEFINED]


def test_an_unused_row_has_a_name_that_no_token_has():
    vocab = {**BYTES["model"]["vocab"], "[PAD259]": 258, "[PAD259]_": 260, "[PAD261]": 262}
    got = found({**BYTES, "model": {**BYTES["model"], "vocab": vocab}}, rows=263)
    assert got[KEY.LIST][258:] == ["[PAD259]", "[PAD259]__", "[PAD259]_", "[PAD261]_", "[PAD261]"]
    assert got[KEY.TOKEN_TYPE][258:] == [1, 5, 1, 5, 1]


# ---- the way a text is split ---------------------------------------------------------------------

DIGITS = dict(type="Digits", individual_digits=True)


def by(pattern, **changes):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False} | changes


ALONE = {**BYTE_LEVEL, "use_regex": False}


@pytest.mark.parametrize("name", ["llama-bpe", "smaug-bpe", "qwen2", "qwen35", "tekken", "gpt-4o"])
def test_a_regular_expression_has_a_name_in_llama_cpp(name):
    """For two of the names llama.cpp does not apply merges to a word that is a token."""
    described, ignores = copy.deepcopy(BYTES), name in ("llama-bpe", "tekken")
    described["pre_tokenizer"] = dict(type="Sequence", pretokenizers=[by(SPLITS[name]), ALONE])
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
        (BYTE_LEVEL, "gpt-2"),
        (in_turn(BYTE_LEVEL), "gpt-2"),
        (in_turn(DIGITS, BYTE_LEVEL), "smollm"),
        (in_turn(DIGITS, in_turn(BYTE_LEVEL)), "smollm"),
        (in_turn(by(r"\p{N}"), BYTE_LEVEL), "smollm"),
        (in_turn(BYTE_LEVEL, DIGITS), "llama.cpp has no name for texts split by"),
        (in_turn({**DIGITS, "individual_digits": False}, BYTE_LEVEL), "llama.cpp does not split texts by"),
        (in_turn(by(SPLITS["qwen2"], invert=True), ALONE), "llama.cpp does not split texts by .*Split"),
        (
            in_turn(by(SPLITS["qwen2"], behavior="Removed"), ALONE),
            "llama.cpp does not split texts by .*Split",
        ),
        (in_turn({**by(""), "pattern": {"String": " "}}, ALONE), "llama.cpp does not split texts by .*Split"),
        (in_turn(dict(type="WhitespaceSplit"), ALONE), "llama.cpp does not split texts by .*WhitespaceSplit"),
        ({**BYTE_LEVEL, "add_prefix_space": True}, "llama.cpp does not split texts by .*ByteLevel"),
        (ALONE, "llama.cpp has no name for texts split by"),
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
def test_nfc_is_the_only_normalizer_that_is_ignored(normalizer, message):
    described = {**BYTES, "normalizer": normalizer}
    if message:
        refused(described, message)
    else:
        assert found(described) == found(BYTES)


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


def pieces(merges=MERGES, more=(), **parts):
    model = dict(type="BPE", unk_token="<unk>", fuse_unk=True, byte_fallback=True, merges=merges)
    model["vocab"] = {piece: index for index, piece in enumerate(PIECES)}
    tokens = [added(0, "<unk>", True), added(1, "<s>", True), added(2, "</s>", True), *more]
    described = dict(version="1.0", added_tokens=tokens, normalizer=None, pre_tokenizer=METASPACE)
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
        # In added tokens ▁ becomes a space, unless another token has that text.
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
def test_merges_that_sentencepiece_would_not_make_are_refused(merges, message):
    refused(pieces(merges), message, rows=13, eos=2)


def test_only_plain_tokens_are_merged():
    """An added token has no merge, though its parts are tokens."""
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
        (None, METASPACE, True),
        (None, {**METASPACE, "prepend_scheme": "always"}, True),
        (None, {**METASPACE, "prepend_scheme": "never"}, False),
        (None, in_turn(METASPACE), True),
        (None, None, False),
        (norm(PREPEND, put()), None, True),
        (PREPEND, None, True),
        (put(), GEMMA, False),
        (norm(put(), put(pattern={"Regex": r"\A▁"}, content="▁▁")), METASPACE, True),
        (norm(put(pattern={"Regex": r"\A▁"}, content="▁")), METASPACE, None),
        (norm(put(pattern={"Regex": " {2,}"}, content="▁▁")), METASPACE, None),
        (put(content="_"), None, None),
        (put(pattern={"String": "a"}), None, None),
        (dict(type="Prepend", prepend="_"), None, None),
        (dict(type="NFC"), None, None),
        (None, {**METASPACE, "replacement": "_"}, None),
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
def test_ids_of_the_config_are_used_where_the_tokenizer_names_no_token(special, bos, eos, wanted):
    """Ids beyond the embedding are left out."""
    got = found(BYTES, special=special, bos=bos, eos=eos)
    assert (got.get(KEY.BOS_ID), got.get(KEY.EOS_ID)) == wanted


@pytest.mark.parametrize("eos", [None, 258])
def test_a_tokenizer_without_an_end_token_is_refused(eos):
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
def test_only_bos_and_eos_may_be_put_around_a_text(post, special, wanted):
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
def test_further_end_tokens_of_a_generation_config_have_keys(generation, wanted):
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


def test_the_tokenizer_keys_of_a_gguf_are_kept():
    """Only keys of the tokenizer, and no empty list, which GGUF cannot hold."""
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
