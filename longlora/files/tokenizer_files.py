"""The files of a tokenizer's directory, and the special and added tokens in them, as transformers 5 has them.

Four files may name a token or its flags, and they may disagree: tokenizer_config.json, added_tokens.json,
special_tokens_map.json and tokenizer.json. The rules are those of `PreTrainedTokenizerBase._from_pretrained`.
"""

import glob
import os
from dataclasses import dataclass, field
from typing import Any

from longlora.disk import parse_json, read_bytes
from longlora.errors import UserError

Path = str | os.PathLike[str]
JSON, CONFIG = "tokenizer.json", "tokenizer_config.json"
SPECIAL_MAP, ADDED = "special_tokens_map.json", "added_tokens.json"
SENTENCEPIECE, VOCAB, MERGES = "tokenizer.model", "vocab.json", "merges.txt"
CHAT_TEMPLATE = "chat_template.jinja"
# Everything transformers and llama.cpp read of a tokenizer; copied unchanged to an adapter or merged model.
FILES = (JSON, CONFIG, SPECIAL_MAP, ADDED, CHAT_TEMPLATE, SENTENCEPIECE, VOCAB, MERGES)
TEMPLATES = "additional_chat_templates"
# Vocabularies of other tokenizers, which we do not read.
OTHER = ("tekken.json", "tiktoken.model", "spiece.model", "vocab.txt", "spm.model")
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


class TokenizerFiles:
    """What a directory holds of a tokenizer: `bytes` is file name -> its content, all of it read and checked.

    config and json are tokenizer_config.json and tokenizer.json as dicts, model is the model's config.json;
    {} stands for a missing file, None for a missing tokenizer.json. UserError for a damaged file.
    """

    def __init__(self, path: Path):
        self.path = os.fspath(path)
        names = [name for name in FILES if os.path.exists(os.path.join(path, name))]
        names += sorted(glob.glob(os.path.join(glob.escape(TEMPLATES), "*.jinja"), root_dir=self.path))
        self.bytes = {name: read_bytes(self.name(name)) for name in names}
        for name in names:
            if name.endswith((".jinja", ".txt")):
                try:
                    self.bytes[name].decode("utf-8")
                except UnicodeDecodeError as error:
                    raise UserError(f"{self.name(name)}: is not UTF-8 at byte {error.start}") from None
        self.config = self._parsed(CONFIG) or {}
        self.json = self._parsed(JSON)
        versions = self.config.get("fast_tokenizer_files")
        if versions not in (None, [], [JSON]):
            raise UserError(f"{self.name(CONFIG)}: fast_tokenizer_files {versions!r} is not supported")
        model = self.name("config.json")
        self.model = parse_json(read_bytes(model), model) if os.path.exists(model) else {}

    def name(self, file: str) -> str:
        """The path of `file` in this directory, for messages."""
        return os.path.join(self.path, file)

    def _parsed(self, name: str) -> dict[str, Any] | None:
        return parse_json(self.bytes[name], self.name(name)) if name in self.bytes else None

    def tokens(self) -> "NamedTokens":
        """Read the special and added tokens of all files. UserError for a token that is none."""
        found = NamedTokens(dict(self.config))
        where, init = self.name(CONFIG), found.init
        if "additional_special_tokens" in init and not init.get("extra_special_tokens"):
            init["extra_special_tokens"] = init.pop("additional_special_tokens")
        # Tokens with flags stay in `init`, where special_tokens_map.json may replace them. They come before
        # these in `specific`.
        for key in [k for k, value in init.items() if isinstance(value, str) and _is_specific(k, value)]:
            found.specific[key] = token(init.pop(key), f"{where}: {key}")
        found.take_specific(where)
        _extra(init, where)
        if init.get("added_tokens_decoder") is not None:
            decoder = init["added_tokens_decoder"]
            if not isinstance(decoder, dict):
                raise UserError(
                    f"{where}: added_tokens_decoder should be an object of tokens by id, got {decoder!r}"
                )
            for index, value in decoder.items():
                found.add(_index(index, where), token(value, f"{where}: added_tokens_decoder[{index}]"))
        else:
            self._special_map(found)
            self._added(found)
            self._json(found)
        found.extra = [token(value, f"{where}: extra_special_tokens") for value in _extra(init, where)]
        auto = {key: value for key, value in init.items() if _is_specific(key, value)}
        found.specific = {
            key: token(value, f"{where}: {key}") for key, value in auto.items()
        } | found.specific
        for key in NAMED:
            if init.get(key) is not None:
                value = token(init[key], f"{where}: {key}")
                init[key] = found.by_content.get(str(value), value)
        return found

    def _special_map(self, found):
        where = self.name(SPECIAL_MAP)
        for key, value in (self._parsed(SPECIAL_MAP) or {}).items():
            if key == "extra_special_tokens" and isinstance(value, list):
                known = found.init.get("extra_special_tokens") or []
                value = [{**entry, "special": True} if isinstance(entry, dict) else entry for entry in value]
                value = known + [entry for entry in value if entry not in known]
            elif isinstance(value, dict) and key != "extra_special_tokens":
                value = token({**value, "special": True}, f"{where}: {key}")
            found.init[key] = value
        found.take_specific(where)
        _extra(found.init, where)

    def _added(self, found):
        special = {str(found.init[key]) for key in NAMED if found.init.get(key)}
        special |= set(map(str, found.init.get("extra_special_tokens") or ()))
        for content, index in (self._parsed(ADDED) or {}).items():
            known = content in special
            flags = {"content": content, "normalized": not known, "special": known}
            found.loose.add(content)
            found.add(_index(index, self.name(ADDED)), token(flags, f"{self.name(ADDED)}: {content}"))

    def _json(self, found):
        where, listed = self.name(JSON), (self.json or {}).get("added_tokens") or []
        if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
            raise UserError(f"{where}: added_tokens should be a list of objects")
        for entry in listed:
            index = _index(entry.get("id"), f"{where}: added_tokens")
            flags = {key: value for key, value in entry.items() if key != "id"}
            found.add(index, token(flags, f"{where}: added_tokens"))
            found.loose.discard(entry["content"])


@dataclass
class NamedTokens:
    """The tokens that the files name. A token is its text, or an AddedToken where a file gives its flags.

    init: tokenizer_config.json with what other files add to it; decoder: id -> added token; by_content: text
    -> added token; specific: names beside NAMED -> token; extra: special tokens without a name; loose: texts
    of tokens that only added_tokens.json has.
    """

    init: dict[str, Any]
    decoder: dict[int, Any] = field(default_factory=dict)
    by_content: dict[str, Any] = field(default_factory=dict)
    specific: dict[str, Any] = field(default_factory=dict)
    extra: list[Any] = field(default_factory=list)
    loose: set[str] = field(default_factory=set)

    def add(self, index: int, added: Any) -> None:
        """Note that a file gives `added` the id `index`."""
        from tokenizers import AddedToken

        added = AddedToken(added) if isinstance(added, str) else added
        self.decoder[index] = self.by_content[str(added)] = added

    def take_specific(self, where: str) -> None:
        """Move the tokens with names of a model's own out of extra_special_tokens."""
        if isinstance(self.init.get("extra_special_tokens"), dict):
            for key, value in self.init.pop("extra_special_tokens").items():
                self.specific[key] = token(value, f"{where}: extra_special_tokens: {key}")


def _extra(init, where):
    """The special tokens that `init` lists without a name, in the order of the list."""
    listed = init.get("extra_special_tokens", init.get("additional_special_tokens"))
    if not isinstance(listed, list | None):
        raise UserError(f"{where}: extra_special_tokens should be a list or an object, got {listed!r}")
    return listed or []


def token(value: Any, where: str) -> Any:
    """Give the token that a JSON value stands for: a str, or an AddedToken. UserError names `where`."""
    from tokenizers import AddedToken

    if isinstance(value, AddedToken):
        return value
    if not isinstance(value, dict):
        return _text(value, where)
    flags = {key: given for key, given in value.items() if key not in ("content", "__type")}
    wrong = [key for key, given in flags.items() if key not in FLAGS or not isinstance(given, bool)]
    if wrong:
        raise UserError(
            f"{where}: a token's flags ({', '.join(FLAGS)}) should each be true or false, got {value!r}"
        )
    return AddedToken(_text(value.get("content"), where), **flags)


def _text(value, where):
    if not isinstance(value, str):
        raise UserError(f"{where} should be a token: a string, or an object with its content, got {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: {value!r} holds half a character") from None
    return value


def _is_specific(key, value):
    """Whether a key of a config is a special token of the model's own, such as image_token."""
    from tokenizers import AddedToken

    is_token = isinstance(value, (str, AddedToken)) or isinstance(value, dict) and "__type" in value
    return key.endswith("_token") and key not in NAMED and is_token


def _index(value, where):
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 10:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 31:
        raise UserError(f"{where}: an added token's id should be an integer from 0, got {value!r}")
    return value
