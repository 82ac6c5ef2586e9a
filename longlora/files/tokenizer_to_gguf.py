"""A tokenizer as the metadata of a GGUF: the keys `tokenizer.*` that llama.cpp reads.

llama.cpp has two kinds of BPE: on bytes ("gpt2"), with a name for the way a text is split before, and that of
SentencePiece ("llama"), which merges by the score of the result. Any other tokenizer would give other ids,
and is refused.
"""

import json
from collections.abc import Mapping
from typing import Any

from longlora.decoder.config import ModelConfig
from longlora.errors import UserError
from longlora.files.model_file import some
from longlora.files.sentencepiece import SPACE
from longlora.files.tokenizer import Tokenizer
from longlora.files.tokenizer_class import LLAMA3, QWEN2, QWEN35, TEKKEN
from longlora.files.tokenizer_gguf import CONTROL, GPT4O, PREFIX, USER_DEFINED

Keys = dict[str, Any]
NORMAL, UNKNOWN, UNUSED, BYTE = 1, 2, 5, 6
GPT2, DIGITS = "", r"\p{N}"  # the expression that ByteLevel has built in; each digit by itself
# The expressions that split a text, one after the other, and ignore_merges -> llama.cpp's name for both.
NAMES = {
    ((GPT2,), False): "gpt-2",
    ((DIGITS, GPT2), False): "smollm",
    ((LLAMA3,), True): "llama-bpe",
    ((LLAMA3,), False): "smaug-bpe",
    ((QWEN2,), False): "qwen2",
    ((QWEN35,), False): "qwen35",
    ((TEKKEN,), True): "tekken",
    ((GPT4O,), False): "gpt-4o",
}
# Names of special tokens -> their keys. The spelling of the fourth is llama.cpp's.
SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",
    "pad_token": "padding_token_id",
    "mask_token": "mask_token_id",
}


def keys(tokenizer: Tokenizer, config: ModelConfig, generation: Mapping[str, Any] | None = None) -> Keys:
    """Give the keys for a model of `config`.

    generation: its generation_config.json. UserError for a tokenizer that llama.cpp does not have.
    """
    where = tokenizer.where
    described = json.loads(tokenizer.backend.to_str())
    core = described["model"]
    steps = _steps(described["pre_tokenizer"], "pretokenizers")
    if core["type"] != "BPE":
        raise UserError(f"{where}: a tokenizer of type {core['type']} cannot go into a GGUF file; BPE can")
    pairs = [tuple(pair) for pair in core["merges"]]
    if not pairs:
        raise UserError(f"{where}: a tokenizer without merges cannot go into a GGUF file")
    for part in ("continuing_subword_prefix", "end_of_word_suffix"):
        if core.get(part):
            raise UserError(f"{where}: llama.cpp's BPE does not have {part} {core[part]!r}")
    tokens, types = _tokens(tokenizer, config.vocab_size)
    found: Keys = {"merges": [f"{left} {right}" for left, right in pairs]}
    if any(step["type"] == "ByteLevel" for step in steps):
        found |= {"model": "gpt2", "pre": _name(core, steps, described["normalizer"], where)}
    elif core["byte_fallback"]:
        found |= {"model": "llama", "pre": "default"}
        found |= _sentence_piece(tokenizer, core, pairs, tokens, types)
        found["add_space_prefix"] = _prefix(_steps(described["normalizer"], "normalizers") + steps, where)
    else:
        raise UserError(f"{where}: BPE without bytes cannot go into a GGUF file: llama.cpp does not have it")
    found |= {"tokens": tokens, "token_type": types, **_special(tokenizer, config, generation or {})}
    result = {PREFIX + key: value for key, value in found.items()} | _templates(tokenizer)
    _check_text(result, where)
    return result


def _steps(part, name):
    """The steps of a normalizer or pre-tokenizer, which may be a sequence."""
    if part is None:
        return []
    return [step for inner in part[name] for step in _steps(inner, name)] if name in part else [part]


def _tokens(tokenizer, rows):
    """The text and the type of each id. Ids without a token are unused."""
    vocab = tokenizer.backend.get_vocab(with_added_tokens=True)
    added = tokenizer.backend.get_added_tokens_decoder()
    by_id = {index: text for text, index in vocab.items()}
    by_id |= {index: token.content for index, token in added.items()}  # an id may have two tokens
    seen, tokens, types = set(by_id.values()), [], []
    for index in range(rows):
        text, kind = by_id.get(index), NORMAL
        if text is None:
            text, kind = f"[PAD{index}]", UNUSED
            while text in seen:  # llama.cpp ends the program if two tokens are equal
                text += "_"
        elif index in added:
            kind = CONTROL if added[index].special else USER_DEFINED
        tokens.append(text)
        types.append(kind)
    return tokens, types


def _name(core, steps, normalizer, where):
    """llama.cpp's name for the way a text is split before byte-level BPE."""
    expressions: list[str] = []
    for step in steps:
        kind, pattern = step["type"], step.get("pattern")
        if kind == "Digits" and step["individual_digits"]:
            expressions.append(DIGITS)
        elif kind == "Split" and "Regex" in pattern and step["behavior"] == "Isolated" and not step["invert"]:
            expressions.append(pattern["Regex"])
        elif kind == "ByteLevel" and not step["add_prefix_space"]:
            expressions += [GPT2] if step["use_regex"] else []
        else:
            raise UserError(f"{where}: llama.cpp does not split texts by {json.dumps(step)}")
    for step in _steps(normalizer, "normalizers"):
        if step["type"] != "NFC":  # llama.cpp takes texts as they are, and nearly all texts are in NFC
            raise UserError(f"{where}: llama.cpp does not have the normalizer {json.dumps(step)}")
    name = NAMES.get((tuple(expressions), bool(core.get("ignore_merges"))))
    if name is None:
        raise UserError(
            f"{where}: llama.cpp has no name for texts split by {json.dumps(expressions)} "
            f"with ignore_merges {json.dumps(bool(core.get('ignore_merges')))}"
        )
    return name


def _sentence_piece(tokenizer, core, pairs, tokens, types):
    """Give the scores. Types of `types` that only SentencePiece has are put in.

    The score of a token is minus the rank of the first merge that gives it. It orders merges as their ranks
    do if the merges of a token stand side by side and are all its splits, as SentencePiece's are.
    """
    first: dict[str, int] = {}
    for rank, (left, right) in enumerate(pairs):
        first.setdefault(left + right, rank)
    ranks = [first[left + right] for left, right in pairs]
    held, known = set(pairs), {text for text, kind in zip(tokens, types, strict=True) if kind == NORMAL}
    missing = [
        text
        for text in known
        for at in range(1, len(text))
        if text[:at] in known and text[at:] in known and (text[:at], text[at:]) not in held
    ]
    if missing or ranks != sorted(ranks):
        raise UserError(
            f"{tokenizer.where}: its merges are not those of SentencePiece, which llama.cpp would apply "
            f"({some(missing) if missing else 'those of one token stand apart'})"
        )
    for index, text in enumerate(tokens):
        if text == core["unk_token"]:
            types[index] = UNKNOWN
        elif len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            types[index] = BYTE
        elif types[index] == USER_DEFINED and text.replace(SPACE, " ") not in tokens:
            tokens[index] = text.replace(SPACE, " ")  # llama.cpp looks for it in the text as it is
    last = float(-len(pairs))
    scores = [
        float(-first[text]) if text in first else last if kind == NORMAL else 0.0
        for text, kind in zip(tokens, types, strict=True)
    ]
    return {"scores": scores}


def _prefix(steps, where):
    """Whether SentencePiece puts a space before a text."""
    prefix = False
    for step in steps:
        kind, pattern = step["type"], step.get("pattern")
        if kind == "Metaspace" and step["replacement"] == SPACE:
            prefix = step["prepend_scheme"] != "never"
        elif kind == "Prepend" and step["prepend"] == SPACE:
            prefix = True
        elif kind == "Replace" and (pattern, step["content"]) == ({"Regex": rf"\A{SPACE}"}, SPACE * 2):
            pass  # Metaspace puts no space before a space; llama.cpp does, as this step
        elif pattern != {"String": " "} or kind == "Replace" and step["content"] != SPACE:
            raise UserError(f"{where}: llama.cpp's SentencePiece does not have the step {json.dumps(step)}")
    return prefix


def _special(tokenizer, config, generation):
    """The ids of special tokens, and whether a text gets them."""
    rows, found = config.vocab_size, {}
    for name, key in SPECIAL.items():
        index = tokenizer.backend.token_to_id(tokenizer.special.get(name, ""))
        if index is None and name in ("bos_token", "eos_token"):
            index = getattr(config, f"{name}_id")
        if index is not None and index < rows:
            found[key] = index
    bos, eos = found.get("bos_token_id"), found.get("eos_token_id")
    if eos is None:
        raise UserError(f"{tokenizer.where}: names no token that ends a text; llama.cpp would use token 11")
    around = [int(index) for index in tokenizer.encode("")]
    if around not in ([], [bos], [eos], [bos, eos]):
        raise UserError(
            f"{tokenizer.where}: puts the tokens {around} around each text; llama.cpp has only bos and eos"
        )
    found["add_bos_token"] = around[:1] == [bos]
    found["add_eos_token"] = len(around) == 2 or around == [eos] != [bos]
    ends = generation.get("eos_token_id")
    more = (
        [x for x in ends if type(x) is int and 0 <= x < rows and x != eos] if isinstance(ends, list) else []
    )
    return found | dict(zip(("eot_token_id", "eom_token_id"), more, strict=False))


def _templates(tokenizer):
    """The chat templates, by the keys that llama.cpp reads."""
    named = {name: text for name, (text, _) in tokenizer.chat_templates().items()}
    found: Keys = {}
    if "default" in named:
        found["tokenizer.chat_template"] = named.pop("default")
    if named:
        found["tokenizer.chat_templates"] = sorted(named)
        found |= {f"tokenizer.chat_template.{name}": text for name, text in sorted(named.items())}
    return found


def _check_text(found, where):
    for key, value in found.items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and not text.isascii():
                try:
                    text.encode("utf-8")
                except UnicodeEncodeError:
                    raise UserError(f"{where}: {key} holds half a character") from None


def kept(metadata: Mapping[str, Any], where: str) -> Keys:
    """Give the keys of another GGUF file's tokenizer and sampling, unchanged. where: its name in messages.

    UserError for numbers that no tokenizer has: they are written with 32 bits.
    """
    ours = ("tokenizer.", "general.sampling.")
    found = {key: value for key, value in metadata.items() if key.startswith(ours) and value != []}
    for key, value in found.items():
        numbers = [x for x in (value if isinstance(value, list) else [value]) if isinstance(x, (int, float))]
        if any(-(2**31) > x or x >= 2**31 for x in numbers):
            raise UserError(f"{where}: {key} holds a number beyond 32 bits")
    return found
