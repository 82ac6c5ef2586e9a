"""The tokenizer of a GGUF has the ids that AutoTokenizer gives for the same file."""

import itertools

import pytest
from test_tokenizer import UGLY, auto, gguf_file, trained
from test_tokenizer_matrix import TEXTS, part

from longlora.disk import map_file
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
