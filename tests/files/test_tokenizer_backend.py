"""The library's tokenizers are changed as in transformers. Its failures are errors of one line."""

import json
import os
import sys
from types import SimpleNamespace

import pytest
import tiny
from test_tokenizer import auto
from test_tokenizer_matrix import added, written
from tokenizer_parts import TRIMMING
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from longlora.errors import UserError
from longlora.files import tokenizer
from longlora.files.tokenizer_backend import (
    add_tokens,
    build,
    guarded,
    post_process,
    probe,
    repair,
    set_template,
    silent,
)
from longlora.files.tokenizer_class import BACKEND, CLASSES
from longlora.files.tokenizer_files import NamedTokens

BYTES = json.loads(tiny.tokenizer_json())


class PanicException(BaseException):  # noqa: N818 (the name of the library's)
    pass


@pytest.mark.parametrize(
    "raised, caught, message",
    [
        (UserError("as it is"), UserError, "^as it is$"),
        (ValueError("wrong"), UserError, "^here: not a tokenizer: wrong$"),
        (Exception("wrong"), UserError, "^here: not a tokenizer: wrong$"),
        (PanicException("at 3"), UserError, "^here: the tokenizers library fails on it: at 3$"),
        (KeyboardInterrupt("stop"), KeyboardInterrupt, "^stop$"),
        (SystemExit("stop"), SystemExit, "^stop$"),
    ],
)
def test_failures_of_the_library_are_named(raised, caught, message):
    with pytest.raises(caught, match=message), guarded("here"):
        raise raised


def free():
    """The next free file descriptors."""
    numbers = [os.dup(2) for _ in range(3)]
    for number in numbers:
        os.close(number)
    return numbers


def test_nothing_is_written_to_stderr_while_it_is_silent(capfd):
    before = free()
    with silent():
        os.write(2, b"a panic")
    os.write(2, b"after")
    assert capfd.readouterr().err == "after"
    assert free() == before, "a file stays open"


def test_stderr_comes_back_after_an_error(capfd):
    with pytest.raises(UserError), silent():
        raise UserError("x")
    os.write(2, b"after")
    assert capfd.readouterr().err == "after"


class Closed:
    def flush(self):
        raise ValueError("I/O operation on closed file")


@pytest.mark.parametrize("stderr", [None, Closed()])
def test_silent_works_without_a_stderr_that_can_be_flushed(monkeypatch, stderr):
    monkeypatch.setattr(sys, "stderr", stderr)
    ran = []
    with silent():
        ran.append(1)
    assert ran == [1]


def test_stderr_is_flushed_before_it_is_silenced(monkeypatch):
    flushed = []
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(flush=lambda: flushed.append(1)))
    with silent():
        assert flushed == [1]


def test_truncation_and_padding_of_a_file_are_ignored(tmp_path):
    """transformers sets its own, which are off."""
    cut = dict(direction="Right", max_length=3, strategy="LongestFirst", stride=0)
    fill = dict(strategy={"Fixed": 9}, direction="Left", pad_to_multiple_of=None)
    fill |= dict(pad_id=1, pad_type_id=0, pad_token="!")
    for part in (dict(truncation=cut), dict(padding=fill)):
        path = written(tmp_path / "t", {**BYTES, **part}, None, "llama", {})
        for text in ("a longer text", "a"):
            assert tokenizer.Tokenizer.from_directory(path).encode(text).tolist() == [*text.encode()]
            assert auto(path)(text).input_ids == [*text.encode()]


def test_a_text_that_the_library_cannot_encode_does_not_stop_the_probe():
    words = Tokenizer(models.WordPiece({"a": 0}, unk_token="[UNK]"))
    with pytest.raises(Exception, match="WordPiece error"):
        words.encode("b")
    probe(words)


@pytest.mark.parametrize(
    "described, message",
    [(b"\xff", "here: not a tokenizer: 'utf-8'"), (b"{", "here: not a tokenizer"), ({}, "here: not a tok")],
)
def test_bytes_without_a_tokenizer_are_an_error(described, message):
    with pytest.raises(UserError, match=message):
        build(described, "here")


def test_bytes_and_their_dict_build_the_same():
    assert build(tiny.tokenizer_json().encode(), "x").to_str() == build(BYTES, "x").to_str()


@pytest.mark.parametrize("bos", [None, "!"])
@pytest.mark.parametrize("eos", [None, "?"])
def test_a_pair_of_texts_has_the_ids_and_types_of_transformers(tmp_path, bos, eos):
    path = written(tmp_path / "t", BYTES, None, "llama", {"config": dict(bos_token="!", eos_token="?")})
    theirs = auto(path)
    theirs.add_bos_token, theirs.add_eos_token = bool(bos), bool(eos)
    theirs.update_post_processor()
    backend = build(BYTES, "here")
    set_template(backend, bos, eos)
    for texts in (("a",), ("a", "b")):
        ours, wanted = backend.encode(*texts), theirs(*texts, return_token_type_ids=True)
        assert (ours.ids, ours.type_ids) == (wanted.input_ids, wanted.token_type_ids)


SPECIAL = dict(bos_token="!", eos_token="?")


@pytest.mark.parametrize(
    "name, own, init, ids",
    [
        # None: the post-processor of tokenizer.json stays
        ("TokenizersBackend", True, {}, None),
        ("TokenizersBackend", True, dict(add_bos_token=True), [33, 97]),
        ("TokenizersBackend", True, dict(add_eos_token=True), [97, 63]),
        ("TokenizersBackend", True, dict(add_bos_token=False), [97]),
        ("TokenizersBackend", False, {}, [97]),
        ("TokenizersBackend", False, dict(add_bos_token=True, add_eos_token=True), [33, 97, 63]),
        ("CodeLlamaTokenizer", True, {}, [33, 97]),
        ("CodeLlamaTokenizer", True, dict(add_bos_token=False), [97]),
        ("GPTNeoXTokenizer", True, {}, [97]),
        ("GPTNeoXTokenizer", True, dict(add_bos_token=True), [33, 97]),
    ],
)
def test_the_tokens_around_a_text(name, own, init, ids):
    backend = build({**BYTES, "post_processor": TRIMMING if own else None}, "here")
    post_process(backend, CLASSES[name], init, SPECIAL)
    if ids is None:
        assert json.loads(backend.to_str())["post_processor"] == TRIMMING
    else:
        assert json.loads(backend.to_str())["post_processor"] != TRIMMING
        assert backend.encode("a").ids == ids


def test_a_token_that_has_no_name_is_not_put_around_a_text():
    backend = build(BYTES, "here")
    post_process(backend, BACKEND, dict(add_bos_token=True, add_eos_token=True), {})
    assert backend.encode("a").ids == [97]


def test_tokens_that_a_model_may_lack():
    """Those that only the class has, those that only added_tokens.json has, and the padding token."""
    named = NamedTokens(dict(pad_token="<pad>", eos_token="<|end|>", bos_token="<first>"))
    named.add(300, AddedToken("<loose>", special=False))
    named.add(301, AddedToken("<kept>", special=False))
    named.loose = {"<loose>"}
    special, spare = add_tokens(build(BYTES, "here"), CLASSES["CodeLlamaTokenizer"], named)
    own = ["<FILL_ME>", "▁<EOT>", "▁<MID>", "▁<PRE>", "▁<SUF>"]
    assert spare == sorted(["<unk>", "<pad>", "<loose>", *own])
    assert special["eos_token"] == "<|end|>" and special["unk_token"] == "<unk>"
    named = NamedTokens(dict(pad_token="a"))
    assert add_tokens(build(BYTES, "here"), BACKEND, named) == ({"pad_token": "a"}, [])


def steps(kind):
    split = pre_tokenizers.Split(" ", "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)
    space = pre_tokenizers.Metaspace()
    return dict(sequence=pre_tokenizers.Sequence([split, letters]), bytes=letters, metaspace=space)[kind]


def state(found):
    return found.pre_tokenizer.__getstate__()


@pytest.mark.parametrize("kind", ["sequence", "bytes", "metaspace"])
@pytest.mark.parametrize(
    "config, model",
    [
        (True, dict(model_type="mistral")),
        (True, dict(model_type="mistral", transformers_version="4.57.1")),
        (True, dict(model_type="mistral", transformers_version="3.0.0")),
        (True, dict(model_type="mistral", transformers_version="2.11.0")),
        (True, dict(model_type="mistral", transformers_version="1.2.0")),
        (True, dict(model_type="mistral", transformers_version="0.6.2")),
        (True, dict(model_type="mistral", transformers_version="5.0.0")),
        (True, dict(model_type="mistral", transformers_version="40.0.0")),
        (True, dict(vocab_size=7)),
        (True, dict(model_type="llama")),
        (False, dict(model_type="mistral")),
        (None, dict(model_type="mistral")),
    ],
)
def test_the_split_of_mistral_is_repaired_where_transformers_does(tmp_path, kind, config, model):
    from transformers import TokenizersBackend

    (tmp_path / "config.json").write_text(json.dumps(model))
    ours, theirs = (SimpleNamespace(pre_tokenizer=steps(kind)) for _ in range(2))
    asked = {} if config is None else {"fix_mistral_regex": config}
    TokenizersBackend._patch_mistral_regex(theirs, str(tmp_path), is_local=True, init_kwargs=asked)
    ours.get_vocab_size = lambda: 100_001
    repair(ours, SimpleNamespace(model=model, config=asked))
    assert state(ours) == state(theirs)


def test_small_vocabularies_and_models_without_config_are_not_repaired():
    model, asked = dict(model_type="mistral"), {"fix_mistral_regex": True}
    for size, found in ((100_000, model), (100_001, {})):
        backend = SimpleNamespace(pre_tokenizer=steps("bytes"), get_vocab_size=lambda size=size: size)
        repair(backend, SimpleNamespace(model=found, config=asked))
        assert state(backend) == steps("bytes").__getstate__()
    backend = SimpleNamespace(pre_tokenizer=None, get_vocab_size=lambda: 100_001)
    repair(backend, SimpleNamespace(model=model, config=asked))
    assert backend.pre_tokenizer is None


def test_a_directory_is_repaired(tmp_path, monkeypatch):
    """The size is faked: a vocabulary that is large enough takes a second to build."""
    monkeypatch.setattr(Tokenizer, "get_vocab_size", lambda self: 100_001)
    path = written(tmp_path / "t", BYTES, None, "mistral", {"config": {"fix_mistral_regex": True}})
    by = json.loads(state(tokenizer.Tokenizer.from_directory(path).backend))["pretokenizers"][0]
    assert by["pattern"] == {"Regex": GGUF_PRE_TOKENIZER_SPLITS["tekken"]} and by["behavior"] == "Isolated"


def test_an_added_token_that_a_name_stands_for_is_special(tmp_path):
    decoder = {"300": added("<x>", special=False), "301": added("<y>", special=False), "302": added("a b")}
    config = dict(eos_token="<x>", added_tokens_decoder=decoder, extra_special_tokens=["<z>", "<y>"])
    path = written(tmp_path / "t", BYTES, None, "llama", {"config": config})
    ours, theirs = tokenizer.Tokenizer.from_directory(path), auto(path)
    assert json.loads(ours.backend.to_str()) == json.loads(theirs.backend_tokenizer.to_str())
    found = {x["content"]: x["special"] for x in json.loads(ours.backend.to_str())["added_tokens"]}
    assert found["<x>"] and found["<z>"] and not found["<y>"]
