"""The tokenizer in the metadata of a GGUF, as transformers 5 builds it from the keys `tokenizer.ggml.*`."""

import json
from collections.abc import Callable
from typing import Any

from longlora.errors import UserError
from longlora.files.sentencepiece import SPACE, merges_of
from longlora.files.tokenizer_backend import add_tokens, build, guarded, probe, set_template, silent
from longlora.files.tokenizer_class import (
    BYTE_LEVEL,
    CLASSES,
    LLAMA3,
    QWEN2,
    QWEN35,
    TEKKEN,
    byte_level,
    metaspace,
    split,
)
from longlora.files.tokenizer_files import NamedTokens

GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre -> how words are split before BPE. "smollm" isolates digits in SmolLM2's own
# tokenizer.json, but transformers splits it like GPT-2, and so do we. The ids differ only where spaces
# precede a digit.
SPLITS = {
    **dict.fromkeys(("gpt-2", "gpt2", "default", "smollm")),
    **dict.fromkeys(
        (
            "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2",
            "jina-v5-nano", "dbrx", "smaug-bpe",
        ),
        LLAMA3,
    ),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez"), QWEN2),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"), GPT4O),
    "qwen35": QWEN35,
    "tekken": TEKKEN,
}  # fmt: skip
CONTROL, USER_DEFINED = 3, 4
PREFIX = "tokenizer.ggml."
CLASS_OF = {"qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer"}  # other architectures: TokenizersBackend


def read(
    metadata: dict[str, Any], path: str
) -> tuple[Any, dict[str, str], dict[str, Callable[[], bytes]], list[str]]:
    """Build it: byte-level BPE ("gpt2") or SentencePiece ("llama") -> the arguments of Tokenizer.

    path: the file's name in messages. UserError for another kind, and for missing or wrong keys.
    """
    get = _Keys(metadata, path)
    kind, architecture = get("model", str), str(metadata.get("general.architecture"))
    if kind not in ("gpt2", "llama"):
        raise UserError(
            f"{path}: tokenizer {kind!r} is not supported; supported are gpt2 (byte-level BPE) and llama"
        )
    tokens = get.listed("tokens", str)
    if tokens is None:
        raise UserError(f"{path}: the metadata lacks tokenizer.ggml.tokens")
    inner = CLASSES["GPT2Tokenizer" if kind == "gpt2" else "LlamaTokenizer"]
    vocab, parts = (_byte_level if kind == "gpt2" else _sentence_piece)(get, tokens, architecture)
    model = {"type": "BPE", **parts.pop("model"), "vocab": vocab}
    described = {"version": "1.0", "post_processor": None, "added_tokens": [], **parts, "model": model}
    named = NamedTokens(_special(get, tokens))
    with silent(), guarded(path):
        backend = build(described, path)
        _, spare = add_tokens(backend, inner, NamedTokens({}))
        _add_typed(backend, get, tokens, kind)
        outer = CLASSES[CLASS_OF.get(architecture, "TokenizersBackend")]
        special, _ = add_tokens(backend, outer, named)
        add_bos = get("add_bos_token", bool, kind == "llama") and special.get("bos_token")
        add_eos = get("add_eos_token", bool) and special.get("eos_token")
        set_template(backend, add_bos, add_eos)
        probe(backend)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
    if isinstance(metadata.get("tokenizer.chat_template"), str):
        config["chat_template"] = metadata["tokenizer.chat_template"]
    files = {
        "tokenizer.json": lambda: backend.to_str(pretty=True).encode("utf-8"),
        "tokenizer_config.json": lambda: (json.dumps(config, indent=2) + "\n").encode("utf-8"),
    }
    return backend, special, files, [text for text in spare if text not in special.values()]


class _Keys:
    """The values of the keys `tokenizer.ggml.*`, each of the right type or absent."""

    def __init__(self, metadata, path):
        self.metadata, self.path = metadata, path

    def __call__(self, key, kind, default=None):
        value = self.metadata.get(PREFIX + key)
        if value is not None and type(value) is not kind:
            raise UserError(f"{self.path}: {PREFIX}{key} should be of type {kind.__name__}, got {value!r}")
        return default if value is None else value

    def listed(self, key, kind):
        value = self.metadata.get(PREFIX + key)
        if value is None or isinstance(value, list) and {type(entry) for entry in value} <= {kind}:
            return value
        raise UserError(f"{self.path}: {PREFIX}{key} should be a list of {kind.__name__}, got {value!r}")


def _special(get, tokens):
    """ "bos_token" and so on -> the token's text, or None."""
    found = {}
    for name, key in (
        ("bos_token", "bos_token_id"),
        ("eos_token", "eos_token_id"),
        ("unk_token", "unknown_token_id"),
        ("pad_token", "padding_token_id"),
    ):
        index = get(key, int)
        if index is not None and not 0 <= index < len(tokens):
            raise UserError(f"{get.path}: {name} has id {index!r}, the tokenizer has {len(tokens)} tokens")
        found[name] = None if index is None else tokens[index]
    return found


def byte_alphabet() -> dict[int, str]:
    """GPT-2's letter for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(other)}


def _add_typed(backend, get, tokens, kind):
    """Add the tokens that are matched before BPE: control tokens (special) and user-defined tokens."""
    from tokenizers import AddedToken

    typed = list(zip(tokens, get.listed("token_type", int) or (), strict=False))
    # In a byte-level vocabulary the converter may label other tokens as control tokens by mistake.
    letters = set(byte_alphabet().values()) if kind == "gpt2" else None
    control = [
        token for token, type_ in typed if type_ == CONTROL and (letters is None or letters.issuperset(token))
    ]
    backend.add_special_tokens(control)
    vocab = backend.get_vocab(with_added_tokens=True)
    backend.add_tokens(
        [
            AddedToken(token, normalized=False)
            for token, type_ in typed
            if type_ == USER_DEFINED and token in vocab
        ]
    )


def _byte_level(get, tokens, architecture):
    pre, merges = get("pre", str, "default"), get.listed("merges", str)
    if pre not in SPLITS:
        raise UserError(
            f"{get.path}: pre-tokenizer {pre!r} is not supported; supported are {', '.join(sorted(SPLITS))}"
        )
    if merges is None:
        raise UserError(f"{get.path}: the metadata lacks tokenizer.ggml.merges")
    letters = byte_alphabet()
    alphabet = set(letters.values())
    vocab = {
        token if alphabet.issuperset(token) else "".join(letters[byte] for byte in token.encode()): index
        for index, token in enumerate(tokens)
    }
    pattern = SPLITS[pre]
    parts = byte_level(BYTE_LEVEL if pattern is None else split(pattern))
    parts["model"]["merges"] = merges
    return vocab, parts


def _sentence_piece(get, tokens, architecture):
    vocab = {token: index for index, token in enumerate(tokens)}
    merges: Any = get.listed("merges", str)
    if merges is None:
        scores = get.listed("scores", float)
        if scores is None or len(scores) != len(tokens):
            raise UserError(
                f"{get.path}: the metadata has neither tokenizer.ggml.merges nor a score for each token"
            )
        merges = merges_of(vocab, dict(zip(tokens, scores, strict=True)))
    # As in transformers, tokenizer.ggml.add_space_prefix does not count.
    parts = metaspace(True, legacy=False)
    if architecture == "phi3":
        prepend = {"type": "Prepend", "prepend": SPACE}
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
        parts["normalizer"] = {"type": "Sequence", "normalizers": [prepend, replace]}
        parts["pre_tokenizer"] = None
    parts["model"]["merges"] = merges
    return vocab, parts
