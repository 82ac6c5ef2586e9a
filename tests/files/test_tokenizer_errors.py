"""An error in a tokenizer's files is one line that names the file and the key."""

import json

import pytest
import tiny
from test_tokenizer import trained
from test_tokenizer_matrix import added, typed, written

from longlora.errors import UserError
from longlora.files.open_model import open_model
from longlora.files.tokenizer import Tokenizer

CONFIG, MAP = "tokenizer_config.json", "special_tokens_map.json"


def refused(path, message):
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer.from_directory(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "config, message",
    [
        (dict(eos_token=5), "eos_token should be a token: a string, or an object with its content, got 5"),
        (
            dict(eos_token={"a": 1}),
            "eos_token: a token's flags .single_word, lstrip, .* should each be true or false, got {'a': 1}",
        ),
        (dict(eos_token=added("x", lstrip=1)), "eos_token: a token's flags .* should each be true or false"),
        (dict(eos_token={"special": True}), "eos_token should be a token: .*, got None"),
        (dict(eos_token=["a"]), "eos_token should be a token"),
        (dict(pad_token="cut \ud83d"), r"pad_token: 'cut \\ud83d' holds half a character"),
        (dict(image_token=typed(3)), "image_token should be a token"),
        (dict(extra_special_tokens=5), "extra_special_tokens should be a list or an object, got 5"),
        (dict(extra_special_tokens=[5]), "extra_special_tokens should be a token"),
        (dict(extra_special_tokens={"a": 5}), "extra_special_tokens: a should be a token"),
        (dict(additional_special_tokens="x"), "extra_special_tokens should be a list or an object, got 'x'"),
        (
            dict(added_tokens_decoder=[1]),
            r"added_tokens_decoder should be an object of tokens by id, got \[1\]",
        ),
        (dict(added_tokens_decoder={"x": added("q")}), "id should be an integer from 0, got 'x'"),
        (dict(added_tokens_decoder={"-1": added("q")}), "id should be an integer from 0, got '-1'"),
        (dict(added_tokens_decoder={"9" * 30: added("q")}), "id should be an integer from 0"),
        (dict(added_tokens_decoder={"1": 3}), r"added_tokens_decoder\[1\] should be a token"),
        (
            dict(added_tokens_decoder={"1": {**added("q"), "x": 1}}),
            r"added_tokens_decoder\[1\]: a token's flags",
        ),
        (dict(tokenizer_class=5), "tokenizer_class should be a name, got 5"),
        (dict(split_special_tokens="yes"), "split_special_tokens should be true or false, got 'yes'"),
        (dict(split_special_tokens=1), "split_special_tokens should be true or false, got 1"),
        (dict(split_special_tokens=None), "split_special_tokens should be true or false, got None"),
        (dict(tokenizer_class="LlamaTokenizer", legacy="no"), "legacy should be true or false, got 'no'"),
        (
            dict(tokenizer_class="GPT2Tokenizer", add_prefix_space=1),
            "add_prefix_space should be true or false",
        ),
        (
            dict(tokenizer_class="BertTokenizer"),
            "tokenizer_class BertTokenizer is not supported; supported are",
        ),
        (dict(fast_tokenizer_files=["tokenizer.4.0.json"]), "fast_tokenizer_files .* is not supported"),
    ],
)
def test_errors_of_tokenizer_config_are_named(tmp_path, config, message):
    described = json.loads(trained("llama" if "legacy" in config else "gpt2").to_str())
    refused(written(tmp_path / "t", described, None, "llama", {"config": config}), f"{CONFIG}: .*{message}")


@pytest.mark.parametrize(
    "file, content, message",
    [
        (MAP, dict(eos_token=5), "eos_token should be a token"),
        (MAP, dict(eos_token={"content": 5}), "special_tokens_map.json: eos_token should be a token"),
        (
            MAP,
            dict(extra_special_tokens=True),
            "special_tokens_map.json: extra_special_tokens should be a list or an object, got True",
        ),
        (
            MAP,
            dict(extra_special_tokens={"a": 3}),
            "special_tokens_map.json: extra_special_tokens: a should be a token",
        ),
        (MAP, [], "special_tokens_map.json: should hold a JSON object, got list"),
        ("added_tokens.json", {"a": "b"}, "added_tokens.json: an added token's id .*, got 'b'"),
        (
            "added_tokens.json",
            {"a\ud800": 3},
            r"added_tokens.json: a\\ud800: 'a\\ud800' holds half a character",
        ),
        (CONFIG, 3, "tokenizer_config.json: should hold a JSON object, got int"),
        ("config.json", "x", "config.json: should hold a JSON object, got str"),
    ],
)
def test_errors_of_other_files_are_named(tmp_path, file, content, message):
    path = written(tmp_path / "t", json.loads(trained("gpt2").to_str()), None, "llama", {})
    (path / file).write_text(json.dumps(content))
    refused(path, message)


SPECIAL = {"SpecialToken": {"id": "x", "type_id": 0}}


def template(single, ids):
    known = {"x": {"id": "x", "ids": ids, "tokens": ["x"] * len(ids)}}
    return dict(type="TemplateProcessing", single=single, pair=[], special_tokens=known)


@pytest.mark.parametrize(
    "part, message",
    [
        (dict(added_tokens=5), "tokenizer.json: added_tokens should be a list of objects"),
        (dict(added_tokens=[{**added("a"), "id": "x"}]), "tokenizer.json: added_tokens: an added token's id"),
        (dict(added_tokens=[{"id": 3, "content": 4}]), "tokenizer.json: added_tokens should be a token"),
        (dict(model=None), "tokenizer.json: not a tokenizer"),
        (dict(model={"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}), "not a tokenizer"),
        (dict(normalizer={"type": "Prepend", "prepend": ""}), "the tokenizers library fails on it"),
        (dict(normalizer={"type": "Precompiled", "precompiled_charsmap": ""}), "not a tokenizer|fails on it"),
        (dict(pre_tokenizer={"type": "FixedLength", "length": 0}), "the tokenizers library fails on it"),
        (dict(pre_tokenizer={"type": "Nothing"}), "not a tokenizer"),
        (dict(decoder={"type": "Strip", "content": "a", "start": 99, "stop": 99}), "library fails on it"),
        (
            dict(post_processor=template([{"Sequence": {"id": "B", "type_id": 0}}], [1])),
            "library fails on it",
        ),
    ],
)
def test_errors_of_tokenizer_json_are_named(tmp_path, capfd, part, message):
    """A panic of the library prints nothing."""
    described = json.loads(tiny.tokenizer_json())
    refused(written(tmp_path / "t", {**described, **part}, None, "llama", {}), message)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "model, message",
    [
        (5, "not a tokenizer: model should be an object, got 5"),
        (None, "not a tokenizer: model should be an object, got None"),
        ({"vocab": [3]}, "vocab should be tokens"),
    ],
)
def test_a_class_refuses_models_that_it_cannot_build_from(tmp_path, model, message):
    described = {**json.loads(trained("llama").to_str()), "model": model}
    refused(written(tmp_path / "t", described, "LlamaTokenizer", "llama", {}), f"tokenizer.json: .*{message}")


def test_a_template_with_a_token_without_a_row_is_refused(tmp_path):
    base = tiny.model(tmp_path / "m")
    described = json.loads(tiny.tokenizer_json())
    post = template([SPECIAL, {"Sequence": {"id": "A", "type_id": 0}}], [99999])
    (base / "tokenizer.json").write_text(json.dumps({**described, "post_processor": post}))
    with pytest.raises(UserError, match="puts token 99999 around each text, the embedding has 260 rows"):
        open_model(base).tokenizer()


def test_the_command_line_says_it_in_one_line(tmp_path):
    base = tiny.model(tmp_path / "m")
    tiny.text(tmp_path / "t.txt", 100)
    described = json.loads(tiny.tokenizer_json())
    described["normalizer"] = {"type": "Prepend", "prepend": ""}
    (base / "tokenizer.json").write_text(json.dumps(described))
    done = tiny.command("ppl", "--model", base, "--data", tmp_path / "t.txt", "--lengths", 64)
    tiny.refused(done, "the tokenizers library fails on it")
    (base / "tokenizer_config.json").write_text('{"eos_token": {"a": 1}}')
    done = tiny.command("ppl", "--model", base, "--data", tmp_path / "t.txt", "--lengths", 64)
    tiny.refused(done, "tokenizer_config.json: eos_token")
