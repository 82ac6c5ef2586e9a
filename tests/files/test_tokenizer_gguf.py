"""The tokenizer of a GGUF has the ids that AutoTokenizer gives for the same file."""

import itertools

import pytest
from test_tokenizer import UGLY, auto, gguf_file, trained
from test_tokenizer_matrix import TEXTS, part

from longlora.disk import map_file
from longlora.errors import UserError
from longlora.files.gguf import ARCHITECTURES
from longlora.files.gguf_header import read_header
from longlora.files.tokenizer import Tokenizer
from longlora.files.tokenizer_class import OF_FAMILY
from longlora.files.tokenizer_gguf import CLASS_OF, SPLITS

# transformers reads no GGUF of granite and smollm3. Their tokenizers have the class of llama's.
READ = ("llama", "qwen2", "qwen3", "phi3")
IDS = dict(bos_token_id=1, eos_token_id=2, unknown_token_id=0)
KEYS = {
    "none": {},
    "ids": IDS,
    "begin": {**IDS, "add_bos_token": True, "add_eos_token": False},
    "end": {**IDS, "add_bos_token": False, "add_eos_token": True, "padding_token_id": 40},
    "both": {**IDS, "add_bos_token": True, "add_eos_token": True},
    "no ids": dict(add_bos_token=True, add_eos_token=True),
    "no space": {**IDS, "add_space_prefix": False},
    "space": {**IDS, "add_space_prefix": True, "add_bos_token": False},
    "plain names": dict(bos_token_id=300, eos_token_id=301, padding_token_id=302),
}
TYPES = {
    "as they are": {},
    "user-defined": {"<extra>": 4, "the": 4, "brown fox": 4, "  ": 4, "<image>": 3, "x y": 3},
    "accents": {"é": 3, "日本": 4, "<|im_end|>": 1, "</s>": 4},
}


def metadata_of(path):
    return read_header(map_file(path, "a GGUF file"))[0]


def same(path, where, texts):
    ours = Tokenizer.from_gguf(metadata_of(path), path)
    theirs = auto(path.parent, gguf_file=path.name)
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id), where
    for text in texts:
        ids = theirs(text).input_ids
        assert ours.encode(text).tolist() == ids, (where, text)
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False), (where, text)
    return ours


@pytest.mark.parametrize("architecture", READ)
@pytest.mark.parametrize("model", ["gpt2", "llama", "llama with merges"])
def test_keys_and_types_give_the_ids_of_transformers(tmp_path, architecture, model):
    tok = trained("llama" if model.startswith("llama") else "gpt2")
    for keys, types in part([*itertools.product(KEYS, TYPES)], 5):
        more = dict(with_merges=True) if "merges" in model else {}
        path = gguf_file(
            tmp_path / "m.gguf", tok, model[:5].strip(), architecture, TYPES[types], **KEYS[keys], **more
        )
        same(path, (architecture, model, keys, types), TEXTS)


@pytest.mark.parametrize("pre", SPLITS)
def test_splits_give_the_ids_of_transformers(tmp_path, pre):
    path = gguf_file(tmp_path / "m.gguf", trained("gpt2"), "gpt2", pre=pre, **IDS)
    same(path, pre, TEXTS)


def test_every_split_of_transformers_is_here():
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    assert {pre: split for pre, split in SPLITS.items() if split is not None} == GGUF_PRE_TOKENIZER_SPLITS


def test_an_architecture_has_the_class_of_its_family():
    assert set(READ) < set(ARCHITECTURES) and set(CLASS_OF) <= set(ARCHITECTURES)
    assert CLASS_OF == {name: kind for name, kind in OF_FAMILY.items() if kind == "Qwen2Tokenizer"}


def test_a_line_break_gets_a_space_before_it(tmp_path):
    """Without add_space_prefix llama.cpp puts no space before a text. transformers does, and so do we."""
    path = gguf_file(tmp_path / "m.gguf", trained("llama"), "llama", add_space_prefix=False, **IDS)
    ours = same(path, "line break", ["\n", *UGLY])
    assert ours.decode(ours.encode("\n")[1:]) == "\n" and ours.encode("\n").size == 3


def test_a_token_of_the_class_alone_may_lack_a_row(tmp_path):
    """GPT2Tokenizer has <|endoftext|>. Without a row of the embedding it is text like any other."""
    tok = trained("gpt2")
    path = gguf_file(tmp_path / "m.gguf", tok, "gpt2", types={"more": 1}, **IDS)
    metadata = metadata_of(path)
    tokens = ["other" if token == "<|endoftext|>" else token for token in metadata["tokenizer.ggml.tokens"]]
    ours = Tokenizer.from_gguf({**metadata, "tokenizer.ggml.tokens": tokens}, path)
    rows = len(tokens)
    assert ours.encode("a<|endoftext|>")[-1] == rows

    class Config:
        vocab_size = rows

    assert ours.check(Config, path).encode("a<|endoftext|>").max() < rows
    Config.vocab_size = rows - 1
    with pytest.raises(UserError, match=f"the tokenizer has {rows} tokens, the embedding {rows - 1} rows"):
        ours.check(Config, path)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("pre", ["", ""], "ggml.pre should be of type str, got \\['', ''\\]"),
        ("model", 7, "ggml.model should be of type str, got 7"),
        ("tokens", [1, 2], "ggml.tokens should be a list of str, got \\[1, 2\\]"),
        ("tokens", None, "the metadata lacks tokenizer.ggml.tokens"),
        ("merges", [["a", "b"]], "ggml.merges should be a list of str"),
        ("token_type", 4294967295, "ggml.token_type should be a list of int, got 4294967295"),
        ("token_type", ["a"], "ggml.token_type should be a list of int"),
        ("bos_token_id", "<s>", "ggml.bos_token_id should be of type int, got '<s>'"),
        ("bos_token_id", True, "ggml.bos_token_id should be of type int, got True"),
        ("eos_token_id", -1, "eos_token has id -1, the tokenizer has"),
        ("padding_token_id", 1.0, "ggml.padding_token_id should be of type int"),
        ("add_bos_token", 1, "ggml.add_bos_token should be of type bool, got 1"),
        ("add_eos_token", [], "ggml.add_eos_token should be of type bool"),
    ],
)
def test_wrong_keys_are_named(tmp_path, key, value, message):
    path = gguf_file(tmp_path / "m.gguf", trained("gpt2"), "gpt2", **IDS)
    with pytest.raises(UserError, match=f"m.gguf: .*{message}"):
        Tokenizer.from_gguf({**metadata_of(path), f"tokenizer.ggml.{key}": value}, path)


@pytest.mark.parametrize("scores", [None, [1.0], ["a"] * 500, [1] * 500, 3.0])
def test_wrong_scores_are_named(tmp_path, scores):
    path = gguf_file(tmp_path / "m.gguf", trained("llama"), "llama", **IDS)
    with pytest.raises(UserError, match="m.gguf: .*(score for each token|scores should be a list of float)"):
        Tokenizer.from_gguf({**metadata_of(path), "tokenizer.ggml.scores": scores}, path)
