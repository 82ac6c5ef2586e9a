"""The special and added tokens that files of a directory name are those of transformers."""

import json

import pytest
import tiny
from test_tokenizer import Rows, auto
from test_tokenizer_matrix import added, typed, written
from tokenizers import AddedToken

from longlora.errors import UserError
from longlora.files.tokenizer import Tokenizer
from longlora.files.tokenizer_files import TokenizerFiles, token

BYTES = json.loads(tiny.tokenizer_json())
END = "<|end|>"
CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
FLAGGED = dict(content="<c>", lstrip=True)
CASES = {
    "additional": {"config": dict(additional_special_tokens=["<a>", typed("<b>", lstrip=False)])},
    "both lists": {"config": dict(additional_special_tokens=["<a>"], extra_special_tokens=["<b>"])},
    "an empty list": {"config": dict(additional_special_tokens=["<a>"], extra_special_tokens=[])},
    "null lists": {"config": dict(additional_special_tokens=None, extra_special_tokens=None)},
    "a dict of lists": {"config": dict(extra_special_tokens=dict(image_token="<i>", mine=typed("<m>")))},
    "names of its own": {
        "config": dict(image_token="<i>", video_token=typed("<v>"), x_token=added("<x>"), token_x="<y>", n=3)
    },
    "a name that is no text": {"config": dict(image_token=5, video_token=None, audio_token=["<a>"])},
    "order": {
        "config": dict(pad_token="<p>", bos_token="<b>", eos_token="<e>", extra_special_tokens=["<x>"])
    },
    "more names": {"config": dict(sep_token="<s>", cls_token="<c>", mask_token=typed("<m>"), unk_token="!")},
    "a token of the vocabulary": {"config": dict(eos_token="a", pad_token="b", extra_special_tokens=["c"])},
    "twice": {"config": dict(eos_token="<e>", pad_token="<e>", extra_special_tokens=["<e>", "<e>"])},
    "flags": {"config": dict(eos_token=typed("<e>", special=False), bos_token=typed(END, normalized=True))},
    "decoder": {
        "config": dict(
            added_tokens_decoder={"256": added(END), "400": added("<x>", special=False), "300": added("<y>")},
            eos_token="<x>",
            image_token="<x>",
            extra_special_tokens=["<y>", "<z>"],
        )
    },
    "an empty decoder": {"config": dict(added_tokens_decoder={}, eos_token=END), MAP: dict(pad_token="<p>")},
    "map": {"config": dict(eos_token="<c>"), MAP: dict(eos_token="<m>", pad_token=None)},
    "map with flags": {MAP: dict(eos_token=added("<m>", special=False), bos_token=added(END, lstrip=False))},
    "map of names": {MAP: dict(image_token="<i>", video_token=added("<v>", special=False))},
    "map of a name with flags": {
        "config": dict(image_token=typed("<i>"), video_token="<v>"),
        MAP: dict(image_token="<j>", video_token="<w>"),
    },
    "names in two places": {
        "config": dict(image_token=typed("<i>"), video_token="<v>")
        | dict(extra_special_tokens=dict(image_token="<j>", video_token="<w>"))
    },
    "map of extras": {
        "config": dict(extra_special_tokens=["<a>", "<b>"]),
        MAP: dict(extra_special_tokens=["<b>", FLAGGED, "<d>"]),
    },
    "map of extras alone": {MAP: dict(extra_special_tokens=["<b>", FLAGGED])},
    "map of a dict": {
        "config": dict(extra_special_tokens=["<a>"]),
        MAP: dict(extra_special_tokens=dict(image_token="<i>")),
    },
    "map of additional": {MAP: dict(additional_special_tokens=["<a>"])},
    "map of additional with flags": {MAP: dict(additional_special_tokens=[typed("<a>", special=False)])},
    "map of both": {MAP: dict(extra_special_tokens=["<a>"], additional_special_tokens=["<b>"])},
    "added": {"config": dict(eos_token="<e>"), ADDED: {"<e>": 257, "<x>": 258}},
    "added extras": {"config": dict(extra_special_tokens=["<e>"]), ADDED: {"<x>": 258, "<e>": 257}},
    "added and known": {ADDED: {END: 256, "<x>": 257}},
    "added with gaps": {ADDED: {"<x>": 500, "<y>": 300}, MAP: dict(pad_token="<y>")},
    "added with flags elsewhere": {"config": dict(eos_token=typed("<e>")), ADDED: {"<e>": 257}},
    "added beside a map": {ADDED: {"<x>": 257}, MAP: dict(eos_token=added("<x>", lstrip=False))},
}


def jsons():
    """A tokenizer.json with two more added tokens, which strip spaces."""
    more = [{**added("<l>", rstrip=False), "id": 257}, {**added("a b", special=False), "id": 258}]
    return {**BYTES, "added_tokens": [*BYTES["added_tokens"], *more]}


def described(found):
    return json.loads(found.to_str())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("more", [False, True], ids=["one added token", "more"])
def test_tokens_are_those_of_transformers(tmp_path, name, more):
    """So are their ids, flags and names."""
    path = written(tmp_path / "t", jsons() if more else BYTES, None, "llama", CASES[name])
    ours, theirs = Tokenizer.from_directory(path), auto(path)
    assert described(ours.backend) == described(theirs.backend_tokenizer)
    assert ours.special == {key: str(value) for key, value in theirs.special_tokens_map.items()}


def test_an_added_tokens_decoder_of_null_is_ignored(tmp_path):
    config = dict(eos_token=END, added_tokens_decoder=None)
    found = TokenizerFiles(written(tmp_path / "t", BYTES, None, None, {"config": config, ADDED: {"<x>": 9}}))
    assert {index: str(value) for index, value in found.tokens().decoder.items()} == {9: "<x>", 256: END}


@pytest.mark.parametrize(
    "files, rows, kept",
    [
        ({ADDED: {"<x>": 257}}, 257, True),
        ({ADDED: {"<x>": 257, END: 256}}, 257, True),
        ({ADDED: {END: 256}}, 256, False),
        ({"config": dict(added_tokens_decoder={"257": added("<x>")})}, 257, False),
        ({"config": dict(pad_token="<x>")}, 257, True),
        ({"config": dict(pad_token="<x>", eos_token="<x>")}, 257, True),
        ({"config": dict(bos_token="<x>")}, 257, False),
        ({"config": dict(pad_token="<x>"), "json": "<x>"}, 257, True),
        ({"json": "<x>"}, 257, False),
        ({"json": "<x>", ADDED: {"<x>": 257}}, 257, False),
        ({"config": dict(extra_special_tokens=["<x>"])}, 257, False),
    ],
)
def test_tokens_that_may_lack_a_row(tmp_path, files, rows, kept):
    """They are those that only added_tokens.json has, and the padding token."""
    more = [{**added(text), "id": 257} for name, text in files.items() if name == "json"]
    described = {**BYTES, "added_tokens": [*BYTES["added_tokens"], *more]}
    files = {name: content for name, content in files.items() if name != "json"}
    path = written(tmp_path / "t", described, None, "llama", files)
    ours = Tokenizer.from_directory(path)
    if kept:
        assert ours.check(Rows(rows), path).encode("<x>").tolist() == [*b"<x>"]
    else:
        with pytest.raises(
            UserError, match=f"the tokenizer has {rows + 1} tokens, the embedding {rows} rows"
        ):
            ours.check(Rows(rows), path)


@pytest.mark.parametrize(
    "index, wanted",
    [
        ("0", 0),
        ("007", 7),
        ("999999999", 999999999),
        (0, 0),
        (2**31 - 1, 2**31 - 1),
        (2**31, None),
        ("1000000000", None),
        (-1, None),
        ("-1", None),
        ("", None),
        ("٣", None),
        ("²", None),
        ("1_0", None),
        (True, None),
        (1.0, None),
        (None, None),
    ],
)
def test_an_id_is_a_number_that_is_not_too_large(tmp_path, index, wanted):
    path = written(tmp_path / "t", BYTES, None, None, {ADDED: {"<x>": index}})
    files = TokenizerFiles(path)
    if wanted is None:
        with pytest.raises(
            UserError, match=f"{ADDED}: an added token's id should be an integer from 0, got {index!r}"
        ):
            files.tokens()
    else:
        assert [str(found) for i, found in files.tokens().decoder.items() if i == wanted] == ["<x>"]


@pytest.mark.parametrize(
    "value, wanted",
    [
        ("a", "a"),
        (AddedToken("a", lstrip=True), dict(content="a", lstrip=True)),
        (dict(content="a"), dict(content="a")),
        (dict(content="a", __type="AddedToken", rstrip=True), dict(content="a", rstrip=True)),
        (typed("a"), added("a")),
        (added("a", single_word=True, normalized=True), added("a", single_word=True, normalized=True)),
    ],
)
def test_a_token_is_a_text_or_an_object_with_flags(value, wanted):
    found = token(value, "here")
    assert type(found) is (str if isinstance(wanted, str) else AddedToken)
    if not isinstance(wanted, str):
        assert found.__getstate__() == AddedToken(**wanted).__getstate__()


@pytest.mark.parametrize(
    "value, message",
    [
        (None, "here should be a token: a string, or an object with its content, got None"),
        ({}, "here should be a token: .* got None"),
        (dict(content=3), "here should be a token: .* got 3"),
        (
            dict(content="a", id=3),
            "here: a token's flags .single_word, lstrip, rstrip, normalized, special. ",
        ),
        (
            dict(content="a", special=1),
            "here: a token's flags .* should each be true or false, got {'content'",
        ),
        (dict(content="a", special=None), "here: a token's flags .* should each be true or false"),
        (dict(content="a\ud800"), r"here: 'a\\ud800' holds half a character"),
        ("\udfff", r"here: '\\udfff' holds half a character"),
    ],
)
def test_a_value_that_is_no_token_is_an_error(value, message):
    with pytest.raises(UserError, match=f"^{message}"):
        token(value, "here")


@pytest.mark.parametrize(
    "name, content, at",
    [
        ("chat_template.jinja", b"ab\xff", 2),
        ("additional_chat_templates/x.jinja", b"\xff", 0),
        ("merges.txt", b"a b\n\x80", 4),
    ],
)
def test_texts_that_are_not_utf_8_are_named(tmp_path, name, content, at):
    path = written(tmp_path / "t", BYTES, None, None, {})
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"t/{name}: is not UTF-8 at byte {at}"):
        TokenizerFiles(path)


def test_all_files_of_a_tokenizer_are_held(tmp_path):
    """Their order is fixed. Other files are not held."""
    path = written(tmp_path / "t", BYTES, None, "llama", {MAP: {}, ADDED: {}})
    names = ["tokenizer.json", CONFIG, MAP, ADDED, "chat_template.jinja", "tokenizer.model", "vocab.json"]
    names += ["merges.txt", "additional_chat_templates/a.jinja", "additional_chat_templates/b.jinja"]
    (path / "additional_chat_templates").mkdir()
    for name in (*reversed(names), "additional_chat_templates/c.txt", "vocab.txt"):
        if not (path / name).exists():
            (path / name).write_text(f"in {name}")
    files = TokenizerFiles(path)
    assert [*files.bytes] == names
    assert files.bytes["merges.txt"] == b"in merges.txt" and files.path == str(path)
    assert files.json == BYTES and files.config == {} and files.model["model_type"] == "llama"


def test_a_missing_file_is_an_empty_object(tmp_path):
    files = TokenizerFiles(tmp_path)
    assert (files.bytes, files.config, files.model, files.json) == ({}, {}, {}, None)


@pytest.mark.parametrize("value", [None, [], ["tokenizer.json"], "absent"])
def test_a_list_without_other_versions_of_tokenizer_json_is_accepted(tmp_path, value):
    config = {} if value == "absent" else {"fast_tokenizer_files": value}
    path = written(tmp_path / "t", BYTES, None, None, {"config": config})
    assert TokenizerFiles(path).config == config


@pytest.mark.parametrize("value", [["tokenizer.4.json"], ["tokenizer.json", "tokenizer.4.json"], "x", {}])
def test_other_versions_of_tokenizer_json_are_refused(tmp_path, value):
    path = written(tmp_path / "t", BYTES, None, None, {"config": {"fast_tokenizer_files": value}})
    with pytest.raises(UserError, match=f"t/{CONFIG}: fast_tokenizer_files .* is not supported"):
        TokenizerFiles(path)


@pytest.mark.parametrize(
    "listed, message",
    [
        ({}, None),
        (None, None),
        ([], None),
        (5, "added_tokens should be a list of objects"),
        ({"a": 1}, "added_tokens should be a list of objects"),
        (["a"], "added_tokens should be a list of objects"),
        ([added("<x>")], "added_tokens: an added token's id should be an integer from 0, got None"),
        ([{**added("<x>"), "id": 3, "more": True}], "added_tokens: a token's flags"),
        ([{"id": 3}], "added_tokens should be a token"),
    ],
)
def test_added_tokens_of_tokenizer_json(tmp_path, listed, message):
    path = written(tmp_path / "t", {**BYTES, "added_tokens": listed}, None, None, {ADDED: {"<l>": 9}})
    if message is None:
        found = TokenizerFiles(path).tokens()
        assert [*found.decoder] == [9] and found.loose == {"<l>"}
    else:
        with pytest.raises(UserError, match=f"t/tokenizer.json: {message}"):
            TokenizerFiles(path).tokens()
