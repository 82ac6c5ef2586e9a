"""Ids equal AutoTokenizer's for every kind of tokenizer file, class, family and form of special tokens.

A part of the matrix runs with the other tests. LONGLORA_WHOLE=1 runs the whole of it, in some minutes.
"""

import itertools
import json
import os
import random
import shutil

import pytest
from test_tokenizer import TRAIN, UGLY, auto, trained

from longlora.decoder.families import FAMILIES as DECODERS
from longlora.errors import UserError
from longlora.files.tokenizer import Tokenizer
from longlora.files.tokenizer_class import CLASSES, OF_FAMILY, OTHER_NAMES, OVERRULED, REFUSED

WHOLE = bool(os.environ.get("LONGLORA_WHOLE"))
BOS, EOS, PAD = "<|endoftext|>", "<|im_end|>", "<|im_start|>"
FAMILIES = (None, "llama", "mistral", "qwen2", "qwen3", "phi3", "granite", "smollm3")
NAMES = (
    None,
    "PreTrainedTokenizerFast",
    "PreTrainedTokenizer",
    "TokenizersBackend",
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "CodeLlamaTokenizer",
    "GPT2TokenizerFast",
    "GPTNeoXTokenizerFast",
    "Qwen2Tokenizer",
    "Qwen2TokenizerFast",
    "Qwen3_5Tokenizer",
    "GemmaTokenizerFast",
    "TokenizerOfNobody",
)


def texts():
    """UGLY, the special tokens in all surroundings, and text of random characters."""
    names = (
        BOS,
        EOS,
        PAD,
        "<s>",
        "</s>",
        "<unk>",
        "<extra>",
        "<image>",
        "brown",
        "▁<PRE>",
        "[UNK]",
        "<0x0A>",
    )
    around = [
        f"{a}{name}{b}" for name in names for a, b in ((" ", " "), ("x", "y"), ("  \n", "\t "), ("", ""))
    ]
    rng, found = random.Random(0), []
    blocks = (
        (32, 127),
        (0, 32),
        (0xA0, 0x250),
        (0x300, 0x370),
        (0x900, 0xA00),
        (0x2000, 0x2070),
        (0x4E00, 0x4E80),
    )
    for _ in range(60):
        low, high = rng.choice(blocks)
        found.append(
            "".join(chr(rng.randrange(low, high)) for _ in range(rng.randrange(1, 12))) + rng.choice(names)
        )
    return [*UGLY, *around, *found, " ".join(names), "".join(names), "".join(f"{name} " for name in names)]


TEXTS = texts()


def unigram(fallback):
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tok = Tokenizer(models.Unigram())
    tok.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" ", "▁")])
    tok.pre_tokenizer = pre_tokenizers.Metaspace()
    tok.decoder = decoders.Metaspace()
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)] if fallback else []
    special = ["<unk>", "<s>", "</s>", *bytes_]
    trainer = trainers.UnigramTrainer(
        vocab_size=420, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tok.train_from_iterator(TRAIN, trainer)
    described = json.loads(tok.to_str())
    described["added_tokens"] = described["added_tokens"][:3]
    described["model"]["byte_fallback"] = fallback
    return described


def word_piece():
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tok = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tok.normalizer, tok.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tok.decoder = decoders.WordPiece()
    special = ["[UNK]", "[CLS]", "[SEP]", BOS]
    tok.train_from_iterator(
        TRAIN, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    )
    pair = [("[CLS]", 1), ("[SEP]", 2)]
    tok.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="$A $B", special_tokens=pair
    )
    return json.loads(tok.to_str())


def word_level():
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tok = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=["<unk>", "<s>", "</s>", EOS], show_progress=False)
    tok.train_from_iterator(TRAIN, trainer)
    return json.loads(tok.to_str())


def bytes_with(split="gpt2", **model):
    described = json.loads(trained(split).to_str())
    described["model"].update(model)
    return described


def sentences(style):
    """A SentencePiece BPE: "legacy" has a normalizer, "metaspace" a pre-tokenizer, "gemma" no first space."""
    described = json.loads(trained("llama").to_str())
    if style == "legacy":
        return described
    described["normalizer"] = None
    described["pre_tokenizer"] = dict(type="Metaspace", replacement="▁", prepend_scheme="first", split=False)
    if style == "gemma":
        described["pre_tokenizer"] = None
        described["normalizer"] = dict(type="Replace", pattern=dict(String=" "), content="▁")
    piece = dict(SpecialToken=dict(id="<s>", type_id=0)), dict(Sequence=dict(id="A", type_id=0))
    table = {"<s>": dict(id="<s>", ids=[1], tokens=["<s>"])}
    described["post_processor"] = dict(
        type="TemplateProcessing", single=list(piece), pair=list(piece), special_tokens=table
    )
    return described


KINDS = {
    "bytes": lambda: bytes_with("gpt2"),
    "llama3": lambda: bytes_with("llama-bpe", ignore_merges=True),
    "qwen2": lambda: bytes_with("qwen2"),
    "legacy": lambda: sentences("legacy"),
    "metaspace": lambda: sentences("metaspace"),
    "gemma": lambda: sentences("gemma"),
    "unigram": lambda: unigram(False),
    "unigram+bytes": lambda: unigram(True),
    "wordpiece": word_piece,
    "wordlevel": word_level,
}
FLAGS = dict(lstrip=True, rstrip=True, normalized=False, single_word=False, special=True)


def added(content, **flags):
    return {"content": content, **FLAGS, **flags}


def typed(content, **flags):
    return {"__type": "AddedToken", **added(content, **flags)}


# Special tokens as tokenizer_config.json and other files declare them.
SPECIAL = {
    "nothing": {},
    "names": {"config": dict(bos_token=BOS, eos_token=EOS, pad_token=None, add_bos_token=True)},
    "flags": {
        "config": dict(eos_token=typed(EOS), bos_token="<s>", pad_token=typed("brown"), model_max_length=10)
    },
    "decoder": {
        "config": dict(
            eos_token=EOS,
            unk_token="<unk>",
            added_tokens_decoder={
                "0": added(BOS),
                "2": added(EOS, lstrip=False, special=False),
                "500": added("<x>"),
            },
            extra_special_tokens=["<extra>", typed("fox", rstrip=False)],
        ),
        "special_tokens_map.json": dict(eos_token="fox"),
    },
    "map": {
        "config": dict(eos_token=EOS, additional_special_tokens=["<extra>"]),
        "special_tokens_map.json": dict(
            eos_token=BOS,
            bos_token=added("<s>", single_word=True),
            additional_special_tokens=["brown"],
            image_token="<image>",
        ),
    },
    "map of extras": {
        "config": dict(extra_special_tokens=["<extra>"]),
        "special_tokens_map.json": dict(
            extra_special_tokens=["<extra>", added("dog"), "fox"], pad_token="<pad>"
        ),
    },
    "added": {
        "config": dict(eos_token=EOS, bos_token=BOS),
        "added_tokens.json": {EOS: 600, "<extra>": 601, "quick": 602},
    },
    "named extras": {
        "config": dict(
            extra_special_tokens=dict(image_token="<image>", boi="dog"), video_token="fox", eos_token="</s>"
        )
    },
    "splits": {"config": dict(split_special_tokens=True, eos_token=EOS, bos_token="<s>")},
    "spaces": {"config": dict(add_prefix_space=True, legacy=True, eos_token=EOS)},
    "no space": {"config": dict(add_prefix_space=False, legacy=False, unk_token=None, bos_token="<s>")},
    "space": {"config": dict(add_prefix_space=None, legacy=None, clean_up_tokenization_spaces=True)},
}


def written(path, described, name, family, special, **model):
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    if described is not None:
        (path / "tokenizer.json").write_text(json.dumps(described))
    config = special.get("config", {}) | ({} if name is None else {"tokenizer_class": name})
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    for file, content in special.items():
        if file != "config":
            (path / file).write_text(json.dumps(content))
    if family is not None:
        (path / "config.json").write_text(json.dumps({"model_type": family, "vocab_size": 700, **model}))
    return path


def tried(call, errors=Exception):
    """What `call` returns, or None if it fails."""
    try:
        return call()
    except errors:
        return None


def same(path, where):
    """Our ids, special tokens and texts are those of AutoTokenizer -> whether it reads the directory.

    Where it fails, for the whole directory or for one text, we refuse in one line.
    """
    theirs = tried(lambda: auto(path))
    ours = tried(lambda: Tokenizer.from_directory(path), UserError)
    assert ours is not None or theirs is None, where
    if theirs is None or ours is None:
        return False
    assert ours.eos_token_id == theirs.eos_token_id and ours.bos_token_id == theirs.bos_token_id, where
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1, where
    for text in TEXTS:
        ids = tried(lambda text=text: theirs(text).input_ids)
        got = tried(lambda text=text: ours.encode(text).tolist(), UserError)
        assert got == ids, (where, text)
        for skip in (False, True) if ids is not None else ():
            wanted = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert ours.decode(ids, skip) == wanted, (where, text, skip)
    return True


def part(cases, every):
    """All cases, or every n-th of them."""
    return cases if WHOLE else cases[::every]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_has_the_ids_of_transformers(tmp_path, kind):
    described, equal = KINDS[kind](), 0
    cases = [*itertools.product(NAMES, FAMILIES, SPECIAL)]
    for name, family, special in part(cases, 97):
        path = written(tmp_path / "t", described, name, family, SPECIAL[special])
        equal += same(path, (kind, name, family, special))
    assert equal > len(part(cases, 97)) / 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["bytes", "legacy"])
def test_every_class_has_the_ids_of_transformers(tmp_path, kind, family):
    """The class may stand in tokenizer_config.json, in config.json or in neither."""
    described = KINDS[kind]()
    cases = [*itertools.product(NAMES, (None, "GPT2Tokenizer", "LlamaTokenizer"))]
    for name, in_model in part(cases, 5):
        model = {} if in_model is None else {"tokenizer_class": in_model}
        path = written(tmp_path / "t", described, name, family, SPECIAL["names"], **model)
        assert same(path, (kind, family, name, in_model))


def test_every_class_of_transformers_is_here():
    """Each class that transformers finds by its name is one of ours, takes tokenizer.json or is refused."""
    import inspect

    import transformers
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    names = {name for name in TOKENIZER_MAPPING_NAMES.values() if name and name.endswith("Tokenizer")}
    names |= {name for name in dir(transformers) if name.endswith(("Tokenizer", "TokenizerFast"))}
    for name in names:
        found = tokenizer_class_from_name(name)
        if not inspect.isclass(found) or not issubclass(found, PreTrainedTokenizerBase):
            continue
        known = name.removesuffix("Fast")
        assert known in CLASSES or known in OTHER_NAMES or known.removesuffix("Tokenizer") in REFUSED, name
        if known in OTHER_NAMES or known == "TokenizersBackend":
            letter = ("TokenizersBackend", "PythonBackend")
            assert found.__name__ in letter or "__init__" not in found.__dict__, name
    theirs = {family: TOKENIZER_MAPPING_NAMES.get(family) for family in DECODERS}
    backends = ("TokenizersBackend", "MistralCommonBackend")
    ours = {family: "TokenizersBackend" if name in backends else name for family, name in theirs.items()}
    assert ours == {family: OF_FAMILY.get(family) for family in DECODERS}


def test_transformers_overrules_the_class_of_the_same_families():
    from transformers.models.auto.tokenization_auto import MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS

    assert set(OVERRULED) == set(DECODERS) & MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
    assert set(FAMILIES) == {None, *DECODERS}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_other_classes_are_refused(tmp_path, name):
    for suffix in ("", "Fast"):
        path = written(tmp_path / "t", KINDS["bytes"](), f"{name}Tokenizer{suffix}", "llama", {})
        with pytest.raises(
            UserError, match=f"tokenizer_class {name}Tokenizer is not supported; supported are Tok"
        ):
            Tokenizer.from_directory(path)
    path = written(tmp_path / "t", KINDS["bytes"](), f"{name}Tokenizer", "mistral", {})
    assert Tokenizer.from_directory(path).encode("a").size == 1  # transformers takes tokenizer.json as it is


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["GPT2Tokenizer", "LlamaTokenizer", "TokenizerOfNobody", None])
@pytest.mark.parametrize("place", ["list", "object", "other"])
def test_code_of_the_authors_never_runs(tmp_path, family, name, place, monkeypatch):
    """transformers takes its own class where it has one for the model."""
    monkeypatch.setattr("transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE", 0)
    code = ["tok.Slow", "tok.Fast"]
    auto_map = {"list": code, "object": {"AutoTokenizer": code}, "other": {"AutoConfig": "c.C"}}[place]
    described = {"config": {"auto_map": auto_map, "eos_token": EOS}}
    path = written(tmp_path / "t", KINDS["bytes"](), name, family, described)
    if not same(path, (family, name, place)) and family is not None:
        with pytest.raises(UserError, match="auto_map asks for the model authors' Python code"):
            Tokenizer.from_directory(path)


def test_the_split_of_mistral_is_repaired_as_in_transformers(tmp_path):
    """transformers repairs vocabularies of more than 100,000 tokens that old versions saved."""
    described = KINDS["llama3"]()
    vocab = described["model"]["vocab"]
    vocab.update({f"token{i}": len(vocab) + i for i in range(100_100)})
    cases = [
        ("mistral", "4.50.0", True),
        ("mistral", None, True),
        ("mistral", "4.50.0", False),
        ("llama", "4.50.0", True),
        ("mistral", "5.1.0", True),
    ]
    for family, version, asked in part(cases, 2):
        model = {} if version is None else {"transformers_version": version}
        special = {"config": {"fix_mistral_regex": asked, "eos_token": EOS}}
        path = written(tmp_path / "t", described, "LlamaTokenizerFast", family, special, **model)
        assert same(path, (family, version, asked))
    described["pre_tokenizer"] = dict(type="Metaspace", replacement="▁", prepend_scheme="first", split=False)
    path = written(tmp_path / "t", described, None, "mistral", {"config": {"fix_mistral_regex": True}})
    assert same(path, "metaspace")
