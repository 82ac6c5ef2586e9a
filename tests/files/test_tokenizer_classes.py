"""The tokenizer classes, and the choice of one, are those of transformers."""

import json
from types import SimpleNamespace

import pytest
import tiny
import transformers
from test_tokenizer import auto
from test_tokenizer_matrix import FAMILIES, written
from tokenizer_parts import TRIMMING
from tokenizers import AddedToken
from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer

from longlora.errors import UserError
from longlora.files.tokenizer import Tokenizer
from longlora.files.tokenizer_backend import add_tokens, build, post_process
from longlora.files.tokenizer_class import BACKEND, CLASSES, as_class, choose
from longlora.files.tokenizer_files import NamedTokens, TokenizerFiles

VOCAB = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4, "ab": 5, "▁": 6, "<|endoftext|>": 7}
FLAGS = [
    {},
    dict(add_prefix_space=False),
    dict(add_prefix_space=True),
    dict(add_prefix_space=None),
    dict(legacy=True),
    dict(legacy=False, add_prefix_space=False),
    dict(legacy=True, add_prefix_space=False),
    dict(unk_token="b"),
    dict(add_bos_token=True, add_eos_token=True, bos_token="a", eos_token="b"),
    dict(add_bos_token=False, add_eos_token=False, bos_token="a"),
    dict(add_eos_token=True, eos_token="b", pad_token="new"),
    dict(eos_token=AddedToken("b", lstrip=True), extra_special_tokens=[AddedToken("new", rstrip=True)]),
    dict(unk_token=AddedToken("ab", normalized=True), pad_token=None),
]
# Classes that build a tokenizer -> the vocabularies, beside tokenizer.json, that they read in transformers.
BUILT = {
    "LlamaTokenizer": {"tokenizer.model"},
    "CodeLlamaTokenizer": {"tokenizer.model"},
    "GPT2Tokenizer": {"tokenizer.model", "vocab.json"},
    "GPTNeoXTokenizer": set(),
    "Qwen2Tokenizer": {"tokenizer.model", "vocab.json"},
    "Qwen3_5Tokenizer": set(),
    "GemmaTokenizer": set(),
}


def theirs(name):
    return Qwen3_5Tokenizer if name == "Qwen3_5Tokenizer" else getattr(transformers, name)


def files(**config):
    """A fake of TokenizerFiles with this tokenizer_config.json."""
    return SimpleNamespace(config=config, model={}, bytes={}, name=lambda name: f"here/{name}")


@pytest.mark.parametrize("name", BUILT)
def test_a_class_builds_what_transformers_builds(name):
    """Without tokenizer.json the class sets the special tokens, the steps and the post-processor."""
    for flags in FLAGS:
        if flags == dict(add_prefix_space=None) and name.startswith("GPT"):
            continue  # transformers fails
        wanted = theirs(name)(vocab=dict(VOCAB), merges=[("a", "b")], **flags)
        chosen, named = CLASSES[name], NamedTokens(dict(flags), extra=flags.get("extra_special_tokens", []))
        model = {"vocab": VOCAB, "merges": [["a", "b"]]}
        backend = build(as_class(files(**flags), chosen, model), "here")
        special, _ = add_tokens(backend, chosen, named)
        post_process(backend, chosen, named.init, special)
        assert json.loads(backend.to_str()) == json.loads(wanted.backend_tokenizer.to_str()), flags
        assert special == {key: str(value) for key, value in wanted.special_tokens_map.items()}, flags
    assert set(chosen.vocabulary) == BUILT[name]


def test_no_class_is_forgotten():
    assert [*CLASSES] == [BACKEND.name, *BUILT] and choose(files()) is BACKEND
    assert BACKEND.build is None and BACKEND.vocabulary == ("tokenizer.model",)


def test_a_vocabulary_may_have_no_merges():
    """A vocabulary of Unigram is a list of tokens with their scores, and has no merges."""
    tokens = [["<unk>", 0.0], ["a", -1.0], "b"]
    for model in ({"vocab": tokens}, {"vocab": tokens, "merges": None}):
        made = build(as_class(files(), CLASSES["LlamaTokenizer"], model), "here")
        assert made.get_vocab() == {"<unk>": 0, "a": 1, "b": 2} and made.encode("ab").ids == [1, 2]
    made = as_class(files(), CLASSES["LlamaTokenizer"], {"vocab": VOCAB, "merges": [["a", "b"]]}, TRIMMING)
    assert json.loads(build(made, "here").to_str())["post_processor"] == TRIMMING


@pytest.mark.parametrize("vocab", [[3], [[]], [["a", 1.0], [3, 1.0]], [None]])
def test_a_vocabulary_without_tokens_is_refused(vocab):
    with pytest.raises(UserError, match="^here/tokenizer.json: vocab should be tokens with their scores$"):
        as_class(files(), CLASSES["LlamaTokenizer"], {"vocab": vocab})


@pytest.mark.parametrize(
    "name, key",
    [
        ("LlamaTokenizer", "legacy"),
        ("LlamaTokenizer", "add_prefix_space"),
        ("CodeLlamaTokenizer", "add_prefix_space"),
        ("GPTNeoXTokenizer", "add_prefix_space"),
        ("Qwen3_5Tokenizer", "add_prefix_space"),
    ],
)
def test_a_wrong_flag_is_named(name, key):
    with pytest.raises(
        UserError, match=f"^here/tokenizer_config.json: {key} should be true or false, got 'yes'$"
    ):
        as_class(files(**{key: "yes"}), CLASSES[name], {"vocab": VOCAB})


@pytest.mark.parametrize("name", BUILT)
def test_the_post_processor_of_tokenizer_json_stays_where_transformers_keeps_it(tmp_path, name):
    described = {**json.loads(tiny.tokenizer_json()), "post_processor": TRIMMING}
    path = written(tmp_path / "t", described, name, None, {})
    ours, wanted = Tokenizer.from_directory(path), auto(path)
    assert ours.special == wanted.special_tokens_map
    found = json.loads(ours.backend.to_str())["post_processor"]
    assert found == json.loads(wanted.backend_tokenizer.to_str())["post_processor"]
    assert (found == TRIMMING) == (name not in ("CodeLlamaTokenizer", "GPTNeoXTokenizer"))


@pytest.mark.parametrize("place", ["config", "model"])
def test_a_class_that_is_not_a_name_is_an_error(place):
    found = SimpleNamespace(config={}, model={}, bytes={}, name=lambda name: name)
    setattr(found, place, {"tokenizer_class": 5})
    with pytest.raises(UserError, match="^tokenizer_config.json: tokenizer_class should be a name, got 5$"):
        choose(found)


CODE = ["their.Slow", "their.Fast"]


@pytest.mark.parametrize("family", [None, "llama", "smollm3", ["qwen2"]])
@pytest.mark.parametrize(
    "name, wanted",
    [
        ("LlamaTokenizer", "LlamaTokenizer"),
        ("GPT2TokenizerFast", "GPT2Tokenizer"),
        ("PreTrainedTokenizerFast", "TokenizersBackend"),
        ("PythonBackend", "TokenizersBackend"),
        ("BloomTokenizer", "TokenizersBackend"),
        ("ParakeetTokenizerFast", "TokenizersBackend"),
        (
            "BertTokenizer",
            "tokenizer_class BertTokenizer is not supported; supported are TokenizersBackend, LlamaT",
        ),
        ("OfNobody", "auto_map asks for the model authors' Python code, which longlora does not run"),
        (None, "auto_map asks for the model authors' Python code, which longlora does not run"),
    ],
)
@pytest.mark.parametrize("code", [CODE, {"AutoTokenizer": CODE}, {"AutoConfig": "their.Config"}, None])
def test_auto_map_is_an_error_where_no_class_is_known(family, name, wanted, code):
    """transformers takes a class of its own where it has one. Otherwise it runs the authors' code."""
    named = {} if name is None else {"tokenizer_class": name}
    found = SimpleNamespace(
        config={**named, "auto_map": code}, model={"model_type": family}, bytes={}, name=lambda name: name
    )
    if code not in (CODE, {"AutoTokenizer": CODE}) and "auto_map" in wanted:
        wanted = "TokenizersBackend"
    if " " in wanted:
        with pytest.raises(UserError, match=f"^tokenizer_config.json: {wanted}"):
            choose(found)
    else:
        assert choose(found).name == wanted


@pytest.mark.parametrize("name", ["OfNobody", None])
def test_auto_map_is_ignored_for_a_family_with_a_class(name):
    config = {"auto_map": CODE, "tokenizer_class": name}
    for family, wanted in (("qwen3", "Qwen2Tokenizer"), ("mistral", "TokenizersBackend")):
        model = {"model_type": family}
        found = SimpleNamespace(config=config, model=model, bytes={}, name=lambda name: name)
        assert choose(found).name == (wanted if name is None else "TokenizersBackend")


@pytest.mark.parametrize(
    "name, wanted",
    [("Bert", "TokenizersBackend"), ("BertTokenizerSlow", "TokenizersBackend"), ("", "TokenizersBackend")],
)
def test_other_names_leave_tokenizer_json_as_it_is(name, wanted):
    """The names of classes end in Tokenizer or TokenizerFast; these do not."""
    assert choose(files(tokenizer_class=name)).name == wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_the_class_is_the_one_that_transformers_chooses(tmp_path, family):
    """It depends on both configs, the family, and whether tokenizer.json is byte-level."""
    spelt = json.loads(tiny.tokenizer_json())
    other = {**spelt, "pre_tokenizer": {"type": "Whitespace"}, "decoder": None}
    llama, gpt2, neox = "LlamaTokenizer", "GPT2TokenizerFast", "GPTNeoXTokenizer"
    for described, name, in_model in (
        (spelt, llama, None),
        (other, llama, None),
        (other, None, llama),
        (spelt, None, llama),
        (spelt, gpt2, neox),
        (other, "OfNobody", None),
        (spelt, None, None),
    ):
        model = {"tokenizer_class": in_model} if in_model and family else {}
        path = written(tmp_path / "t", described, name, family, {}, **model)
        wanted = type(auto(path)).__name__
        assert choose(TokenizerFiles(path)).name == wanted, (name, in_model)
