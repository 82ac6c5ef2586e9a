"""The methods of a Tokenizer with one token per byte: ids, places, affixes, templates, saved files."""

import json

import numpy as np
import pytest
import tiny
from test_tokenizer import Rows, auto
from test_tokenizer_matrix import added, written
from tokenizer_parts import METASPACE, around

from longlora.errors import UserError
from longlora.files.tokenizer import Tokenizer
from longlora.files.tokenizer_backend import build

BYTES = json.loads(tiny.tokenizer_json())
END = "<|end|>"


def opened(path, config=None, described=None, **parts):
    return Tokenizer.from_directory(
        written(path / "t", {**(described or BYTES), **parts}, None, "llama", {"config": config or {}})
    )


# ---- files of a directory ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, found",
    [
        ("tokenizer.json", True),
        ("tokenizer.model", True),
        ("vocab.json", True),
        ("vocab.txt", True),
        ("tekken.json", True),
        ("tiktoken.model", True),
        ("spiece.model", True),
        ("spm.model", True),
        ("tokenizer_config.json", False),
        ("merges.txt", False),
        ("config.json", False),
    ],
)
def test_a_vocabulary_is_found(tmp_path, name, found):
    assert not Tokenizer.is_in(tmp_path)
    (tmp_path / name).write_text("")
    assert Tokenizer.is_in(tmp_path) is found


MODEL, JSON, MERGES = "tokenizer.model", "vocab.json", "merges.txt"
OTHER = ["tekken.json", "tiktoken.model", "spiece.model", "vocab.txt", "spm.model"]


@pytest.mark.parametrize(
    "name, held, message",
    [
        (None, [], "TokenizersBackend reads tokenizer.model .the directory holds no file of a tokenizer.$"),
        (
            "GPTNeoXTokenizer",
            [MODEL],
            "GPTNeoXTokenizer reads no other .the directory holds .*tokenizer.model",
        ),
        ("GPTNeoXTokenizer", [JSON, MERGES], "reads no other .the directory holds .*vocab.json, merges.txt"),
        ("GPT2Tokenizer", [JSON], "reads tokenizer.model or vocab.json .the directory holds .*vocab.json.$"),
        (
            "GPT2Tokenizer",
            [MERGES],
            "reads tokenizer.model or vocab.json .the directory holds .*merges.txt.$",
        ),
        ("LlamaTokenizer", [JSON, MERGES], "LlamaTokenizer reads tokenizer.model .the directory holds"),
        (None, OTHER, f"holds {', '.join(OTHER)}.$"),
    ],
)
def test_a_directory_without_a_vocabulary_of_the_class_is_refused(tmp_path, name, held, message):
    path = written(tmp_path / "t", None, name, None, {})
    if not name:
        (path / "tokenizer_config.json").unlink()
    for file in held:
        (path / file).write_text("{}")
    with pytest.raises(UserError, match=f"t: has no tokenizer.json; .*{message}"):
        Tokenizer.from_directory(path)


def test_special_tokens_are_split_only_where_the_file_says_so(tmp_path):
    letters = [*END.encode()]
    for config, ids in (({}, [256]), (dict(split_special_tokens=False), [256])):
        assert opened(tmp_path, config).encode(END).tolist() == ids
    assert opened(tmp_path, dict(split_special_tokens=True)).encode(END).tolist() == letters


def test_flags_of_a_config_are_ignored_beside_tokenizer_json(tmp_path):
    config = dict(bos_token="!", eos_token="?", add_bos_token=True, add_eos_token=True)
    assert opened(tmp_path, config).encode("a").tolist() == [97]


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "Qwen2Tokenizer"])
def test_vocab_and_merges_are_read_as_in_transformers(tmp_path, name):
    """Without tokenizer.json the flags of the config are used."""
    config = dict(bos_token="!", eos_token="?", add_bos_token=True, add_eos_token=True)
    path = written(tmp_path / "t", None, name, "llama", {"config": config})
    (path / "vocab.json").write_text(json.dumps({**BYTES["model"]["vocab"], "ab": 300}))
    (path / "merges.txt").write_text("#version: 0.2\na b\n")
    ours, theirs = Tokenizer.from_directory(path), auto(path)
    assert json.loads(ours.backend.to_str()) == json.loads(theirs.backend_tokenizer.to_str())
    assert ours.encode("abc").tolist() == theirs("abc").input_ids == [33, 300, 99, 63]


def test_a_tokenizer_that_cannot_be_read_is_an_error_when_it_encodes():
    ours = Tokenizer(UserError("install it"), {}, {"a": b"x"}, "here")
    assert ours.check(Rows(0), "x") is ours and ours.file("a") == b"x"
    with pytest.raises(UserError, match="^install it$"):
        ours.encode("a")


# ---- ids -----------------------------------------------------------------------------------------


def test_ids_are_int32_and_parts_have_no_tokens_around_them(tmp_path):
    ours = opened(
        tmp_path, dict(eos_token=END, bos_token="!"), post_processor=around(("!", 33), None, (END, 256))
    )
    whole, parts = ours.encode("ab"), ours.encode_parts(["ab", "", END])
    assert whole.dtype == np.int32 and whole.tolist() == [33, 97, 98, 256]
    assert [part.tolist() for part in parts] == [[97, 98], [], [256]]
    assert {part.dtype for part in parts} == {np.dtype(np.int32)}
    assert (ours.bos_token_id, ours.eos_token_id) == (33, 256)
    assert ours.decode(whole) == f"!ab{END}" and ours.decode(whole, True) == "ab"
    assert ours.decode(whole, skip_special_tokens=False) == f"!ab{END}"


def test_unnamed_tokens_have_no_id(tmp_path):
    ours = opened(tmp_path)
    assert ours.bos_token_id is None and ours.eos_token_id is None


@pytest.mark.parametrize(
    "first, last", [(None, None), (("!", 33), None), (None, (END, 256)), (("a", 97), ("a", 97))]
)
def test_affixes_are_the_tokens_around_a_text(tmp_path, first, last):
    tokens = [*([first] if first else []), None, *([last] if last else [])]
    before, after = opened(tmp_path, post_processor=around(*tokens)).affixes()
    assert before.dtype == after.dtype == np.int32
    if first and first[0] == "a":  # the probe is "a" too: any of the three may be it
        assert before.size + after.size == 2
    else:
        assert before.tolist() == ([first[1]] if first else [])
        assert after.tolist() == ([last[1]] if last else [])


def test_affixes_of_a_text_of_two_tokens(tmp_path):
    """Without merges SentencePiece makes two tokens of a letter: a space and the letter."""
    model = dict(type="BPE", vocab={"<s>": 0, "▁": 1, "a": 2, "</s>": 3}, merges=[])
    described = dict(version="1.0", added_tokens=[], normalizer=None, pre_tokenizer=METASPACE, decoder=None)
    for post in (around(("<s>", 0), None, ("</s>", 3)), around(("▁", 1), None, ("a", 2)), None):
        ours = Tokenizer(build({**described, "model": model, "post_processor": post}, "x"), {}, {}, "x")
        before, after = ours.affixes()
        whole = ours.encode("a").tolist()
        assert [*before, 1, 2, *after] == whole
        assert before.size == after.size == (whole != [1, 2])


def test_half_a_character_is_named(tmp_path):
    ours = opened(tmp_path)
    for call in (ours.encode_parts, ours.encode_places):
        with pytest.raises(UserError, match=r"^a text holds half a character, '\\udc00' at 2$"):
            call(["fine", "ab\udc00"])
    with pytest.raises(UserError, match=r"half a character, '\\ud800' at 0$"):
        ours.encode("\ud800")
    with pytest.raises(UserError, match=r"half a character, '\\udfff' at 1$"):
        ours.encode("a\udfff")


def test_a_text_that_the_library_cannot_encode_is_an_error_that_names_the_tokenizer():
    model = dict(type="WordPiece", unk_token="[UNK]", continuing_subword_prefix="##", vocab={"a": 0})
    model["max_input_chars_per_word"] = 9
    ours = Tokenizer(build({**BYTES, "added_tokens": [], "model": model}, "x"), {}, {}, "here")
    assert ours.encode("a").tolist() == [0]
    for call in (lambda: ours.encode("b"), lambda: ours.encode_parts(["b"])):
        with pytest.raises(UserError, match="^here: not a tokenizer: WordPiece error: Missing"):
            call()
    with pytest.raises(UserError, match="^here: not a tokenizer: "):
        ours.decode([-1])


# ---- the characters of a token -------------------------------------------------------------------


def places(ours, text):
    ids, first, last = ours.encode_places([text])[0]
    assert ids.dtype == np.int32 and ids.size == first.size == last.size
    return [(int(i), int(a), int(b)) for i, a, b in zip(ids, first, last, strict=True)]


def test_places_are_characters(tmp_path):
    """Both bytes of a letter have its place. Tokens that are put around a text are left out."""
    ours = opened(tmp_path, post_processor=around(("!", 33), None))
    found = [(97, 0, 1), (32, 1, 2), (0xC3, 2, 3), (0xA9, 2, 3), (256, 3, 10)]
    assert places(ours, f"a é{END}") == found
    assert places(ours, "") == []
    assert [ids.tolist() for ids, _, _ in ours.encode_places(["a", "", "bc"])] == [[97], [], [98, 99]]
    assert places(ours, f"a é{END}") == found


def test_the_place_of_an_added_token_leaves_out_the_spaces_beside_it(tmp_path):
    """Even if the token strips them from the text. A token of nothing but spaces has their place."""
    tokens = [
        *BYTES["added_tokens"],
        {**added("<x>"), "id": 257},
        {**added("\t\t", special=False), "id": 258},
    ]
    tokens[-1].update(lstrip=False, rstrip=False)
    ours = opened(tmp_path, added_tokens=tokens)
    assert places(ours, "a  <x>   b") == [(97, 0, 1), (257, 3, 6), (98, 9, 10)]
    assert places(ours, "<x> ") == [(257, 0, 3)]
    assert places(ours, " <x>") == [(257, 1, 4)]
    assert places(ours, "a\t\tb") == [(97, 0, 1), (258, 1, 3), (98, 3, 4)]


def test_other_tokens_keep_their_spaces(tmp_path):
    """A post-processor that trims spaces is ignored."""
    trims = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    model = {**BYTES["model"], "vocab": {**BYTES["model"]["vocab"], "Ġa": 257}, "merges": [["Ġ", "a"]]}
    ours = opened(tmp_path, post_processor=trims, model=model)
    assert places(ours, "b a") == [(98, 0, 1), (257, 1, 3)]
    assert ours.backend.encode("b a").offsets == [(0, 1), (2, 3)]


def test_places_are_those_of_a_tokenizer_that_splits_special_tokens(tmp_path):
    ours = opened(tmp_path, dict(split_special_tokens=True))
    assert places(ours, END) == [(letter, i, i + 1) for i, letter in enumerate(END.encode())]


# ---- rows of the embedding -----------------------------------------------------------------------


def test_a_tokenizer_without_tokens_fits_every_embedding():
    described = {**BYTES, "added_tokens": [], "model": {**BYTES["model"], "vocab": {}}}
    ours = Tokenizer(build(described, "x"), {}, {}, "x")
    assert ours.vocab_size == 0
    assert ours.check(Rows(0), "x") is ours


def test_the_size_is_one_more_than_the_largest_id(tmp_path):
    assert opened(tmp_path).vocab_size == 257
    assert opened(tmp_path, dict(pad_token="<pad>")).vocab_size == 258


def test_a_token_without_a_row_is_dropped(tmp_path):
    """The padding token has id 257, so 258 rows keep it."""
    config = dict(pad_token="<pad>", eos_token=END)
    kept = opened(tmp_path, config).check(Rows(258), "x")
    assert kept.encode("<pad>").tolist() == [257] and kept.special == config
    dropped = opened(tmp_path, config).check(Rows(257), "x")
    assert dropped.encode(f"<pad>{END}").tolist() == [*b"<pad>", 256]
    assert dropped.special == dict(eos_token=END) and dropped.vocab_size == 257
    assert dropped.check(Rows(257), "x") is dropped
    with pytest.raises(UserError, match="^here: the tokenizer has 257 tokens, the embedding 256 rows$"):
        opened(tmp_path, config).check(Rows(256), "here")


def test_special_tokens_are_still_split_after_one_is_dropped(tmp_path):
    ours = opened(tmp_path, dict(pad_token="<pad>", split_special_tokens=True)).check(Rows(257), "x")
    assert ours.encode(END).tolist() == [*END.encode()]


@pytest.mark.parametrize("index, rows", [(257, 258), (257, 257), (300, 257)])
def test_a_token_around_each_text_needs_a_row(tmp_path, index, rows):
    ours = opened(tmp_path, post_processor=around(("x", index), None))
    if index < rows:
        assert ours.check(Rows(rows), "x") is ours
    else:
        with pytest.raises(
            UserError,
            match=f"^x: the tokenizer puts token {index} around each text, the embedding has {rows} r",
        ):
            ours.check(Rows(rows), "x")


# ---- files ---------------------------------------------------------------------------------------


def test_files_are_bytes_or_functions_that_make_them(tmp_path):
    ours = Tokenizer(None, {}, {"a.json": b"one", "b.json": lambda: b"two"}, "x")
    assert ours.names() == ["a.json", "b.json"]
    assert [ours.file(name) for name in ours.names()] == [b"one", b"two"]
    ours.put("c/d.txt", b"three")
    ours.put("a.json", b"four")
    ours.save(tmp_path / "out", 64)
    found = {name: content.decode() for name, content in tiny.listing(tmp_path / "out").items()}
    assert found == {
        str(tmp_path / "out" / k): v
        for k, v in {"a.json": "four", "b.json": "two", "c/d.txt": "three"}.items()
    }


@pytest.mark.parametrize(
    "known, length, wanted",
    [
        (10, 64, 64),
        (63, 64, 64),
        (10.0, 64, 64),
        (64, 64, None),
        (65, 64, None),
        (1e30, 64, None),
        (True, 64, None),
        ("10", 64, None),
        (None, 64, None),
        (10, None, None),
    ],
)
def test_a_smaller_model_max_length_is_raised(tmp_path, known, length, wanted):
    """Otherwise the file stays as it is, byte by byte."""
    content = json.dumps({"model_max_length": known, "é": [1]}).encode()
    other = b'{"model_max_length": 10}'
    ours = Tokenizer(None, {}, {"tokenizer_config.json": content, "tokenizer.json": other}, "x")
    ours.save(tmp_path, length)
    found = (tmp_path / "tokenizer_config.json").read_bytes()
    assert (tmp_path / "tokenizer.json").read_bytes() == other
    if wanted is None:
        assert found == content
    else:
        assert json.loads(found) == {"model_max_length": wanted, "é": [1]}
        assert found != content


@pytest.mark.parametrize("content", [{}, {"padding_side": "left"}])
def test_a_config_without_a_length_is_saved_as_it_is(tmp_path, content):
    ours = Tokenizer(None, {}, {"tokenizer_config.json": json.dumps(content).encode()}, "x")
    ours.save(tmp_path, 64)
    assert json.loads((tmp_path / "tokenizer_config.json").read_bytes()) == content


def config_with(template):
    return {"tokenizer_config.json": json.dumps({"chat_template": template}).encode()}


@pytest.mark.parametrize(
    "files, wanted",
    [
        ({}, {}),
        ({"tokenizer_config.json": b"{}"}, {}),
        (config_with(None), {}),
        (config_with("one"), {"default": ("one", "tokenizer_config.json")}),
        (
            config_with([{"name": "default", "template": "one"}, {"name": "tools", "template": "two"}]),
            {k: (v, "tokenizer_config.json") for k, v in {"default": "one", "tools": "two"}.items()},
        ),
        (config_with([{"name": 3, "template": "one"}, {"name": "x", "template": 4}, "y", {}]), {}),
        ({"chat_template.jinja": "é\r\nb\n".encode()}, {"default": ("é\nb\n", "chat_template.jinja")}),
        (
            {
                "chat_template.jinja": b"one",
                "additional_chat_templates/tools.jinja": b"two",
                **config_with("not this"),
            },
            {
                "default": ("one", "chat_template.jinja"),
                "tools": ("two", "additional_chat_templates/tools.jinja"),
            },
        ),
        (
            {"additional_chat_templates/rag.jinja": b"two", **config_with("not this")},
            {"rag": ("two", "additional_chat_templates/rag.jinja")},
        ),
        ({"other/tools.jinja": b"x", "tokenizer.json": b"{}"}, {}),
    ],
)
def test_chat_templates_come_from_files_and_then_from_the_config(tmp_path, files, wanted):
    """The place of a template is its file in a directory, or the GGUF."""
    found = Tokenizer(None, {}, files, str(tmp_path)).chat_templates()
    assert found == {name: (text, str(tmp_path / place)) for name, (text, place) in wanted.items()}
    found = Tokenizer(None, {}, files, "m.gguf").chat_templates()
    assert found == {name: (text, "m.gguf") for name, (text, _) in wanted.items()}


@pytest.mark.parametrize(
    "files, message",
    [
        (config_with(5), "tokenizer_config.json: chat_template should be a text, or a list with one named"),
        (config_with({"default": "x"}), "tokenizer_config.json: chat_template should be a text, or a list"),
        ({"chat_template.jinja": b"\xff"}, "chat_template.jinja: the chat template is not UTF-8"),
        ({"tokenizer_config.json": b"["}, "tokenizer_config.json: not JSON"),
    ],
)
def test_wrong_chat_templates_are_named(tmp_path, files, message):
    with pytest.raises(UserError, match=message):
        Tokenizer(None, {}, files, str(tmp_path)).chat_templates()


def test_a_fingerprint_changes_with_the_ids_only(tmp_path):
    plain = opened(tmp_path).fingerprint()
    assert len(plain) == 64 and int(plain, 16)
    assert opened(tmp_path, dict(model_max_length=9)).fingerprint() == plain
    assert opened(tmp_path, dict(split_special_tokens=False)).fingerprint() == plain
    others = [opened(tmp_path, dict(split_special_tokens=True)), opened(tmp_path, dict(eos_token="<new>"))]
    assert len({plain, *(other.fingerprint() for other in others)}) == 3
