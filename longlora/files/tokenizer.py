"""Text <-> token ids by the `tokenizers` library, from tokenizer.json or rebuilt from the metadata of a GGUF.

The ids are those of transformers 5's `AutoTokenizer.from_pretrained(...)(text).input_ids`, so a model trained
here gets the same tokens when transformers serves it. Where transformers departs from tokenizer.json, so does
this file.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from longlora.decoder.config import ModelConfig
from longlora.disk import read_json, write_text
from longlora.errors import UserError

# Everything transformers reads when it loads a tokenizer; copied unchanged to an adapter or merged model.
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
# tokenizer.ggml.pre -> how words are split before BPE. "smollm" isolates digits in SmolLM2's own
# tokenizer.json, but transformers splits it like GPT-2, and so do we. The ids differ only where spaces
# precede a digit.
SPLITS = {
    "gpt-2": None,
    "gpt2": None,
    "default": None,
    "smollm": None,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "llama-bpe": LLAMA3,
    "smaug-bpe": LLAMA3,
    "dbrx": LLAMA3,
    "qwen2": QWEN2,
    "deepseek-r1-qwen": QWEN2,
}
CONTROL, USER_DEFINED = 3, 4
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


class Tokenizer:
    """Text to ids and back, as transformers does it.

    backend: a tokenizers.Tokenizer; special: "bos_token" and so on -> the token's text; files: name -> its
    Path, or a function that returns its text.
    """

    def __init__(self, backend: Any, special: dict[str, str], files: Mapping[str, Path | Callable[[], str]]):
        self.backend, self.special, self._files = backend, special, files
        backend.no_truncation()
        backend.no_padding()

    @classmethod
    def from_directory(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Read tokenizer.json and tokenizer_config.json in the directory `path`, as transformers 5 does.

        UserError if there is none, or it is damaged.
        """
        file = os.path.join(path, "tokenizer.json")
        if not os.path.exists(file):
            raise UserError(f"{path}: has no tokenizer.json")
        config_file = os.path.join(path, "tokenizer_config.json")
        config = read_json(config_file) if os.path.exists(config_file) else {}
        described = read_json(file)
        _as_class(described, config)
        backend = _backend(described, file)
        special = {name: _text(config[name]) for name in NAMED if config.get(name) is not None}
        _add_tokens(backend, config, special)
        files = {name: Path(path, name) for name in FILES if os.path.exists(os.path.join(path, name))}
        return cls(backend, special, files)

    @classmethod
    def from_gguf(cls, metadata: dict[str, Any], path: str) -> "Tokenizer":
        """Rebuild it from the keys `tokenizer.ggml.*`: byte-level BPE ("gpt2") or SentencePiece ("llama").

        path: the file's name in messages. UserError for another kind or missing keys.
        """
        get = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}.get
        kind, tokens = get("model"), get("tokens")
        if kind not in ("gpt2", "llama"):
            raise UserError(
                f"{path}: tokenizer {kind!r} is not supported; supported are gpt2 (byte-level BPE) and llama"
            )
        if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
            raise UserError(f"{path}: tokenizer.ggml.tokens should be a list of strings")
        vocab = {token: index for index, token in enumerate(tokens)}
        build = _byte_level if kind == "gpt2" else _sentence_piece
        described = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "post_processor": None,
            "added_tokens": _added(tokens, get("token_type"), kind),
            **build(get, vocab, path),
        }
        backend = _backend(described, path)
        ids = {
            "bos_token": get("bos_token_id"),
            "eos_token": get("eos_token_id"),
            "unk_token": get("unknown_token_id"),
            "pad_token": get("padding_token_id"),
        }
        for name, index in ids.items():
            if index is not None and not (isinstance(index, int) and 0 <= index < len(tokens)):
                raise UserError(f"{path}: {name} has id {index!r}, the tokenizer has {len(tokens)} tokens")
        special = {name: tokens[index] for name, index in ids.items() if index is not None}
        _add_tokens(backend, {}, special)
        add_bos = get("add_bos_token", kind == "llama")
        _set_template(
            backend,
            special.get("bos_token") if add_bos else None,
            special.get("eos_token") if get("add_eos_token") else None,
        )
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **special,
        }
        if isinstance(metadata.get("tokenizer.chat_template"), str):
            config["chat_template"] = metadata["tokenizer.chat_template"]
        files = {
            "tokenizer.json": lambda: backend.to_str(pretty=True),
            "tokenizer_config.json": lambda: json.dumps(config, indent=2) + "\n",
        }
        return cls(backend, special, files)

    def check(self, config: ModelConfig, path: str) -> "Tokenizer":
        """Return self. UserError if a token has no row in the embedding of `config`; more rows are fine."""
        if self.vocab_size > config.vocab_size:
            raise UserError(
                f"{path}: the tokenizer has {self.vocab_size} tokens, the embedding {config.vocab_size} rows"
            )
        return self

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def eos_token_id(self) -> int | None:
        """Id of the token that ends a text, or None."""
        return self.backend.token_to_id(self.special["eos_token"]) if "eos_token" in self.special else None

    @property
    def bos_token_id(self) -> int | None:
        """Id of the token that starts a text, or None."""
        return self.backend.token_to_id(self.special["bos_token"]) if "bos_token" in self.special else None

    def encode(self, text: str) -> np.ndarray:
        """Give the ids of `text`, int32 [T], with the special tokens that transformers adds."""
        return np.array(self.backend.encode(text).ids, np.int32)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Give the text of `ids`."""
        return self.backend.decode([int(index) for index in ids], skip_special_tokens=skip_special_tokens)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the tokenizer's files into `directory` for transformers to load. UserError if that fails."""
        for name, content in self._files.items():
            write_text(
                os.path.join(directory, name),
                content.read_text("utf-8") if isinstance(content, Path) else content(),
            )

    def fingerprint(self) -> str:
        """Identify this tokenizer: two with equal fingerprints give equal ids for every text."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()


def _backend(described, where):
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_str(json.dumps(described))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{where}: not a tokenizer: {error}") from None


def _text(token):
    return token["content"] if isinstance(token, dict) else token


def _as_class(described, config):
    """Change `described` as transformers 5 does for the tokenizer classes that our families declare."""
    declared, model = str(config.get("tokenizer_class") or "").removesuffix("Fast"), described.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        return
    byte_level = "ByteLevel" in json.dumps([described.get("pre_tokenizer"), described.get("decoder")])
    if declared == "LlamaTokenizer" and not byte_level:
        space = config.get("add_prefix_space")
        _metaspace(described, True if space is None else space, config.get("legacy", False))
    elif declared == "GPT2Tokenizer":
        described["normalizer"], described["decoder"] = None, {**BYTE_LEVEL, "add_prefix_space": True}
        described["pre_tokenizer"] = {**BYTE_LEVEL, "add_prefix_space": bool(config.get("add_prefix_space"))}
        model.update(fuse_unk=False, byte_fallback=False, ignore_merges=False, unk_token=None)
    elif declared == "Qwen2Tokenizer":
        described["normalizer"], described["decoder"] = (
            {"type": "NFC"},
            {**BYTE_LEVEL, "add_prefix_space": True},
        )
        described["pre_tokenizer"] = _split(QWEN2, bool(config.get("add_prefix_space")))
        model.update(fuse_unk=False, byte_fallback=False, ignore_merges=False, unk_token=None)


def _metaspace(described, prefix_space, legacy):
    scheme = "never" if not prefix_space else "always" if legacy else "first"
    described["normalizer"] = None
    described["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": "▁",
        "prepend_scheme": scheme,
        "split": False,
    }
    steps = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix_space:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    described["decoder"] = {"type": "Sequence", "decoders": steps}
    described["model"].update(fuse_unk=True, byte_fallback=True, ignore_merges=False, unk_token=None)


def _split(pattern, prefix_space=False):
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {
        "type": "Sequence",
        "pretokenizers": [split, {**BYTE_LEVEL, "add_prefix_space": prefix_space, "use_regex": False}],
    }


def _add_tokens(backend, config, special):
    """Add the tokens that tokenizer_config.json names and tokenizer.json lacks, as transformers does."""
    from tokenizers import AddedToken

    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    extra = list(extra.values()) if isinstance(extra, dict) else extra
    named = [*special.values(), *map(_text, extra)]
    decoder = config.get("added_tokens_decoder") or {}
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    for _, token in sorted(decoder.items(), key=lambda item: int(item[0])):
        if token["content"] not in known:
            backend.add_tokens(
                [AddedToken(token["content"], **{flag: token[flag] for flag in flags if flag in token})]
            )
            known.add(token["content"])
    for token in named:
        if token not in known:
            backend.add_tokens([AddedToken(token, special=True)])
            known.add(token)


def _set_template(backend, bos, eos):
    from tokenizers import processors

    first, last = ([f"{token}:0"] if token else [] for token in (bos, eos))
    single = [*first, "$A:0", *last]
    pair = [*single, *([f"{bos}:1"] if bos else []), "$B:1", *([f"{eos}:1"] if eos else [])]
    backend.post_processor = processors.TemplateProcessing(
        single=single,
        pair=pair,
        special_tokens=[(token, backend.token_to_id(token)) for token in (bos, eos) if token],
    )


def _byte_alphabet():
    """GPT-2's letter for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(other)}


def _added(tokens, types, kind):
    """The tokens matched before BPE: control tokens (special) and user-defined tokens."""
    letters = set(_byte_alphabet().values())
    added = []
    for index, (token, type_) in enumerate(zip(tokens, types or (), strict=False)):
        # In a byte-level vocabulary the converter may label other tokens as control tokens by mistake.
        if type_ == USER_DEFINED or type_ == CONTROL and (kind != "gpt2" or set(token) <= letters):
            added.append(
                {
                    "id": index,
                    "content": token,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": type_ == CONTROL,
                }
            )
    return added


def _byte_level(get, vocab, path):
    pre, merges = get("pre", "default"), get("merges")
    if pre not in SPLITS:
        raise UserError(
            f"{path}: pre-tokenizer {pre!r} is not supported; supported are {', '.join(sorted(SPLITS))}"
        )
    if not isinstance(merges, list):
        raise UserError(f"{path}: the metadata lacks tokenizer.ggml.merges")
    letters = _byte_alphabet()
    alphabet = set(letters.values())
    spelled = {
        token if set(token) <= alphabet else "".join(letters[byte] for byte in token.encode()): index
        for token, index in vocab.items()
    }
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": spelled,
        "merges": merges,
    }
    split = SPLITS[pre]
    return {
        "normalizer": None,
        "pre_tokenizer": BYTE_LEVEL if split is None else _split(split),
        "decoder": {**BYTE_LEVEL, "add_prefix_space": True},
        "model": model,
    }


def _sentence_piece(get, vocab, path):
    merges = get("merges")
    if merges is None:
        scores = get("scores")
        if not isinstance(scores, list) or len(scores) != len(vocab):
            raise UserError(
                f"{path}: the metadata has neither tokenizer.ggml.merges nor a score for each token"
            )
        merges = _merges(vocab, scores)
    model = {
        "type": "BPE",
        "dropout": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "vocab": vocab,
        "merges": merges,
    }
    described = {"model": model}
    _metaspace(described, bool(get("add_space_prefix", True)), False)
    return described


def _merges(vocab, scores):
    """The merges that a SentencePiece vocabulary implies: each token's splits into two, best score first."""
    found = []
    for token, score in zip(vocab, scores, strict=True):
        splits = ((token[:i], token[i:]) for i in range(1, len(token)))
        pairs = [(left, right, score) for left, right in splits if left in vocab and right in vocab]
        found += sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    found.sort(key=lambda pair: (pair[2], len(pair[0]), len(pair[1])), reverse=True)
    return [[left, right] for left, right, _ in found]
