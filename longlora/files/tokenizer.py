"""Text <-> token ids by the `tokenizers` library, from the files of a directory or the metadata of a GGUF.

The ids are those of transformers 5's `AutoTokenizer.from_pretrained(...)(text).input_ids`, so a model trained
here gets the same tokens when transformers serves it. Where transformers departs from tokenizer.json, so does
this file.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from longlora.decoder.config import ModelConfig
from longlora.disk import json_text, parse_json, write_bytes
from longlora.errors import UserError
from longlora.files import sentencepiece, tokenizer_gguf
from longlora.files.tokenizer_backend import add_tokens, build, guarded, post_process, probe, repair, silent
from longlora.files.tokenizer_class import as_class, choose
from longlora.files.tokenizer_files import (
    CHAT_TEMPLATE,
    CONFIG,
    JSON,
    MERGES,
    OTHER,
    SENTENCEPIECE,
    TEMPLATES,
    VOCAB,
    Path,
    TokenizerFiles,
)


class Tokenizer:
    """Text to ids and back, as transformers does it.

    backend: a tokenizers.Tokenizer, or the UserError for using one that can only be copied; special:
    "bos_token" and so on -> the token's text; files: name -> its content, or a function that gives it; where:
    its name in messages; spare: texts of added tokens that a model may have no rows for.
    """

    def __init__(
        self,
        backend: Any,
        special: dict[str, str],
        files: Mapping[str, bytes | Callable[[], bytes]],
        where: str,
        spare: Iterable[str] = (),
    ):
        self._backend, self.special, self._files = backend, special, files
        self.where, self._spare = where, set(spare)
        self._plain: Any = None

    @property
    def backend(self) -> Any:
        """The tokenizers.Tokenizer. UserError if the library that reads its files is not installed."""
        if isinstance(self._backend, UserError):
            raise self._backend
        return self._backend

    @staticmethod
    def is_in(path: Path) -> bool:
        """Whether the directory `path` holds a vocabulary, of whatever kind."""
        return any(os.path.exists(os.path.join(path, name)) for name in (JSON, SENTENCEPIECE, VOCAB, *OTHER))

    @classmethod
    def from_directory(cls, path: Path) -> "Tokenizer":
        """Read the tokenizer in the directory `path`, as transformers 5 does.

        UserError if there is none, it is damaged or of a kind that is not supported.
        """
        files = TokenizerFiles(path)
        chosen, named = choose(files), files.tokens()
        splits = files.config.get("split_special_tokens", False)
        if not isinstance(splits, bool):
            raise UserError(
                f"{files.name(CONFIG)}: split_special_tokens should be true or false, got {splits!r}"
            )
        with silent(), guarded(files.path):
            try:
                make = _from_vocabulary if files.json is None else _from_json
                backend = make(files, chosen, named)
            except sentencepiece.Missing as error:
                return cls(error, {}, files.bytes, files.path)
            special, spare = add_tokens(backend, chosen, named)
            repair(backend, files)
            # With a tokenizer.json, add_bos_token and add_eos_token do not count.
            post_process(backend, chosen, named.init if files.json is None else {}, special)
            backend.encode_special_tokens = splits
            probe(backend)
        return cls(backend, special, files.bytes, files.path, spare)

    @classmethod
    def from_gguf(cls, metadata: dict[str, Any], path: str) -> "Tokenizer":
        """Rebuild it from the keys `tokenizer.ggml.*`: byte-level BPE ("gpt2") or SentencePiece ("llama").

        path: the file's name in messages. UserError for another kind or missing keys.
        """
        backend, special, files, spare = tokenizer_gguf.read(metadata, path)
        return cls(backend, special, files, path, spare)

    def check(self, config: ModelConfig, path: Path) -> "Tokenizer":
        """Return self. UserError if a token has no row in the embedding of `config`; more rows are fine.

        A token for padding, say, without a row becomes text like any other: transformers would give it an id
        that the model does not have.
        """
        if isinstance(self._backend, UserError):
            return self
        rows = config.vocab_size
        vocab = self.backend.get_vocab(with_added_tokens=True)
        size = max((index for text, index in vocab.items() if text not in self._spare), default=-1) + 1
        if size > rows:
            raise UserError(f"{path}: the tokenizer has {size} tokens, the embedding {rows} rows")
        beyond = {text for text in self._spare if vocab.get(text, 0) >= rows}
        if beyond:
            self._forget(beyond)
        used = [index for index in self.encode("") if index >= rows]
        if used:
            raise UserError(
                f"{path}: the tokenizer puts token {used[0]} around each text, the embedding has {rows} rows"
            )
        return self

    def _forget(self, texts):
        """Take back added tokens that the model has no row for."""
        kept = [
            added
            for added in json.loads(self.backend.to_str())["added_tokens"]
            if added["content"] not in texts
        ]
        self._backend = self._copy({"added_tokens": kept})
        self.special = {name: text for name, text in self.special.items() if text not in texts}

    def _copy(self, changes):
        """A copy of this backend with `changes` made in its tokenizer.json."""
        made = build({**json.loads(self.backend.to_str()), **changes}, self.where)
        made.encode_special_tokens = self.backend.encode_special_tokens
        return made

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
        with self._encoding([text]) as backend:
            return np.array(backend.encode(text).ids, np.int32)

    def encode_parts(self, parts: list[str]) -> list[np.ndarray]:
        """Give the ids of each part of a text, int32 [T], without special tokens, on all cores."""
        with self._encoding(parts) as backend:
            done = backend.encode_batch_fast(parts, add_special_tokens=False)
        return [np.array(found.ids, np.int32) for found in done]

    def affixes(self) -> tuple[np.ndarray, np.ndarray]:
        """The special tokens that are put before and after a text."""
        bare = self.encode_parts(["a"])[0].tolist()
        whole = self.encode("a").tolist()
        at = next(i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare)
        return np.array(whole[:at], np.int32), np.array(whole[at + len(bare) :], np.int32)

    def encode_places(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Encode texts without special tokens -> for each its ids, int32 [T], and the characters of each id.

        Token i is made of the characters first[i] .. last[i] - 1 of its text; two tokens share a character
        whose bytes they share. An added token may strip spaces beside it: they are not among its characters.
        """
        with self._encoding(texts):
            if self._plain is None:  # a post-processor may take the spaces of a token off its characters
                self._plain = self._copy({"post_processor": None})
            done = self._plain.encode_batch(texts)
            added = np.array(sorted(self.backend.get_added_tokens_decoder()), np.int64)
        found = []
        for text, encoding in zip(texts, done, strict=True):
            ids = np.array(encoding.ids, np.int32)
            places = np.array(encoding.offsets, np.int64).reshape(-1, 2)
            for i in np.flatnonzero(np.isin(ids, added)).tolist():
                first, last = places[i].tolist()
                own = text[first:last]
                if own.strip():
                    places[i] = last - len(own.lstrip()), first + len(own.rstrip())
            found.append((ids, places[:, 0], places[:, 1]))
        return found

    @contextlib.contextmanager
    def _encoding(self, texts):
        """Name what is wrong if the library cannot encode one of `texts`."""
        backend = self.backend
        try:
            with guarded(self.where):
                yield backend
        except UserError:
            for text in texts:
                half = re.search("[\ud800-\udfff]", text)
                if half:
                    raise UserError(f"a text holds half a character, {half[0]!r} at {half.start()}") from None
            raise

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Give the text of `ids`."""
        with guarded(self.where):
            return self.backend.decode([int(index) for index in ids], skip_special_tokens=skip_special_tokens)

    def names(self) -> list[str]:
        """The names of its files."""
        return list(self._files)

    def file(self, name: str) -> bytes:
        """The content of its file `name`, which is one of `names()`."""
        content = self._files[name]
        return content() if callable(content) else content

    def save(self, directory: Path, length: int | None = None) -> None:
        """Write the tokenizer's files into `directory` for transformers to load. UserError if that fails.

        length: the positions of the model that they go with. A smaller model_max_length is raised to it.
        """
        for name in self._files:
            content = self.file(name)
            if name == CONFIG and length is not None:
                content = _longer(content, length)
            write_bytes(os.path.join(directory, name), content)

    def chat_templates(self) -> dict[str, tuple[str, str]]:
        """The chat templates: name, "default" for the usual one -> text, and the file that holds it.

        As in transformers, files of their own come before tokenizer_config.json. UserError for a file that is
        not UTF-8, and for a chat_template in the config that is neither a text nor a list of named ones.
        """
        found: dict[str, tuple[str, str]] = {}
        for name in self._files:
            folder, base = os.path.split(name)
            if name == CHAT_TEMPLATE or folder == TEMPLATES:
                try:
                    text = self.file(name).decode("utf-8").replace("\r\n", "\n")
                except UnicodeDecodeError:
                    raise UserError(f"{self._place(name)}: the chat template is not UTF-8") from None
                found["default" if not folder else base.removesuffix(".jinja")] = text, self._place(name)
        if found or CONFIG not in self._files:
            return found
        told, where = parse_json(self.file(CONFIG), CONFIG).get("chat_template"), self._place(CONFIG)
        if isinstance(told, list):
            told = {x.get("name"): x.get("template") for x in told if isinstance(x, dict)}
        elif isinstance(told, str):
            told = {"default": told}
        elif told is not None:
            raise UserError(f"{where}: chat_template should be a text, or a list with one named default")
        texts = (told or {}).items()
        return {k: (x, where) for k, x in texts if isinstance(k, str) and isinstance(x, str)}

    def _place(self, name):
        """Its file `name`, for messages; a GGUF is one file."""
        return os.path.join(self.where, name) if os.path.isdir(self.where) else self.where

    def put(self, name: str, content: bytes) -> None:
        """Let `save` write the file `name` with this content."""
        self._files = {**self._files, name: content}

    def fingerprint(self) -> str:
        """Identify this tokenizer: two with equal fingerprints give equal ids for every text."""
        described = self.backend.to_str() + ("split" if self.backend.encode_special_tokens else "")
        return hashlib.sha256(described.encode()).hexdigest()


def _longer(content, length):
    """The text of a tokenizer_config.json with a model_max_length of at least `length`."""
    config = json.loads(content)
    known = config.get("model_max_length")
    if isinstance(known, bool) or not isinstance(known, (int, float)) or known >= length:
        return content
    config["model_max_length"] = length
    return json_text(config).encode("utf-8")


def _from_json(files, chosen, named):
    """The backend of a directory with tokenizer.json."""
    if chosen.build is None:
        return build(files.bytes[JSON], files.name(JSON))
    model = files.json.get("model")
    if not isinstance(model, dict):
        raise UserError(f"{files.name(JSON)}: not a tokenizer: model should be an object, got {model!r}")
    return build(as_class(files, chosen, model, files.json.get("post_processor")), files.name(JSON))


def _from_vocabulary(files, chosen, named):
    """The backend of a directory without tokenizer.json."""
    if SENTENCEPIECE in files.bytes and SENTENCEPIECE in chosen.vocabulary:
        return build(sentencepiece.described(files, chosen, named), files.name(SENTENCEPIECE))
    if VOCAB in files.bytes and MERGES in files.bytes and VOCAB in chosen.vocabulary:
        from tokenizers import models

        with guarded(files.path):
            vocab, merges = models.BPE.read_file(files.name(VOCAB), files.name(MERGES))
        described = as_class(files, chosen, {"vocab": vocab, "merges": list(map(list, merges))})
        return build(described, files.name(VOCAB))
    held = [name for name in (*files.bytes, *OTHER) if os.path.exists(files.name(name))]
    raise UserError(
        f"{files.path}: has no {JSON}; {chosen.name} reads {' or '.join(chosen.vocabulary) or 'no other'} "
        f"(the directory holds {', '.join(held) or 'no file of a tokenizer'})"
    )
