"""Documents to token ids: tokenised once into a memory-mapped cache, or read from a token .bin file."""

import hashlib
import json
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from longlora import progress
from longlora.data import text
from longlora.data.chat import Instructions
from longlora.data.parts import Parts
from longlora.data.records import HUB, dataset, kind
from longlora.disk import open_file, read_json, replacing, write_json
from longlora.errors import UserError, counted
from longlora.files.tokenizer import Tokenizer

AT_ONCE = 16  # blocks of text that are tokenised in parallel
CACHED = r"tokens-[0-9a-f]{16}\.(bin|mask|json)"  # the names of the files in a cache
VERSION = 2  # of the rules by which files become ids; older caches are not used


def encode_documents(
    tokenizer: Tokenizer, documents: Iterable[Iterable[str]]
) -> Iterator[tuple[np.ndarray, bool]]:
    """Tokenise `documents`, each an iterable of pieces of its text.

    Yields, block by block, int32 ids and whether the document ends there. The ids equal those of the whole
    document tokenised at once. Blocks are tokenised in parallel on all cores, also across documents.
    """
    front, back = tokenizer.affixes()
    nothing, size, parts = front[:0], 0, Parts(tokenizer)
    waiting: list[tuple[str, bool, bool]] = []

    def encoded():
        done = tokenizer.encode_parts([part for part, _, _ in waiting])
        for (_, first, last), ids in zip(waiting, done, strict=True):
            yield np.concatenate([front if first else nothing, ids, back if last else nothing]), last

    for pieces in documents:
        first = True
        for part, last in parts.of(pieces):
            waiting.append((part, first, last))
            size, first = size + max(len(part), 64), False  # even the shortest part takes memory
            if size >= AT_ONCE * text.BLOCK:
                yield from encoded()
                waiting, size = [], 0
    yield from encoded()


class FileIds:
    """The ids in a file, integers [N], read where they are asked for: ids[a:b] is an ndarray.

    They are not mapped: a mapped file that somebody truncates ends the process. UserError says so instead.
    """

    def __init__(self, path: str, dtype: Any, start: int = 0):
        self.path, self.dtype, self._start = path, np.dtype(dtype), start
        with open_file(path) as file:
            self._descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor)
        self._count = (os.fstat(self._descriptor).st_size - start) // self.dtype.itemsize

    def __len__(self) -> int:
        return self._count

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)

    def __getitem__(self, part: slice) -> np.ndarray:
        first, last, _ = part.indices(self._count)
        out = np.empty(max(last - first, 0), self.dtype)
        view, at = memoryview(out).cast("B") if len(out) else memoryview(b""), 0
        while at < len(view):
            try:
                place = self._start + first * self.dtype.itemsize + at
                got = os.preadv(self._descriptor, [view[at:]], place)
            except OSError as error:
                raise UserError(f"{self.path}: cannot be read: {error.strerror}") from None
            if not got:
                raise UserError(f"{self.path}: has been truncated since it was opened")
            at += got
        return out


class Tokens:
    """Token ids of a corpus: `ids` [N], integers, an ndarray or FileIds; `borders` int64 [documents + 1],
    where each document begins in `ids`, and N; `learned` [N], 1 for the tokens of answers, or None if every
    token is to be learned; `fingerprint`, a hash of all."""

    def __init__(self, ids: Any, borders: np.ndarray, fingerprint: str, learned: Any = None):
        self.ids, self.borders, self.fingerprint, self.learned = ids, borders, fingerprint, learned

    def document(self, i: int) -> np.ndarray:
        """The ids of document i."""
        return self.ids[self.borders[i] : self.borders[i + 1]]

    def __len__(self) -> int:
        """The number of documents."""
        return len(self.borders) - 1


def read_bin(path: str, vocab_size: int) -> Tokens:
    """Read a token .bin file as one document, without copying it.

    The file is headerless little-endian uint16 (uint32 if vocab_size is above 65536), or llm.c's format with
    its 1024-byte header. UserError if its size does not fit or an id is not below vocab_size.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        head = np.fromfile(file, np.int32, 3) if size >= 1024 else np.zeros(3, np.int32)
    dtype, start = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4"), 0
    if head[0] in (20240520, 20240801):
        dtype, start = np.dtype("<u2" if head[0] == 20240520 else "<u4"), 1024
        count = (size - start) // dtype.itemsize
        if count != head[2]:
            raise UserError(f"{path}: should hold {head[2]} tokens by its header, holds {count}")
    if size == start or (size - start) % dtype.itemsize:
        raise UserError(f"{path}: {size - start} bytes are not a whole number of {dtype.name} tokens")
    ids, digest = FileIds(path, dtype, start), hashlib.sha256()
    for first in range(0, len(ids), 1 << 22):
        part = ids[first : first + (1 << 22)]
        if int(part.max()) >= vocab_size:
            at = int(np.argmax(part >= vocab_size))
            raise UserError(f"{path}: token {first + at} is {part[at]}, the model has {vocab_size} tokens")
        digest.update(part)
    return Tokens(ids, np.array([0, len(ids)], np.int64), digest.hexdigest())


def tokenise(
    path: str,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    cache_dir: str,
    say: Callable[[str], object] = print,
    instructions: Instructions | None = None,
) -> Tokens:
    """Return the Tokens of the text at `path`, from the cache if text and tokenizer are unchanged.

    instructions: how the records at `path` become tokens, if they are not text.

    Each document of text ends with the tokenizer's end-of-text token, if it has one. The cache consists of
    two files, or three with instructions, each written aside and renamed. Its key covers the files' paths,
    sizes and times, the tokenizer and the instructions. `say` receives a sentence when the text is tokenised
    anew, and one when a directory holds more than its text. UserError for text that cannot be read and for a
    damaged cache.
    """
    corpus = text.Corpus(path)
    if kind(corpus.files[0]) == ".bin":
        return read_bin(path, vocab_size)
    if tokenizer is None:
        raise UserError(f"{path}: the model has no tokenizer; wanted a token .bin")
    facts = [_facts(file) for file in corpus.files]
    rules = [VERSION, facts, tokenizer.fingerprint(), *(instructions.key() if instructions else ())]
    key = hashlib.sha256(json.dumps(rules).encode()).hexdigest()[:16]
    stem = os.path.join(cache_dir, f"tokens-{key}")
    if os.path.exists(stem + ".json"):
        found = read_json(stem + ".json")
        corpus.left_out |= {text.EMPTY: found["empty"]} if found["empty"] else {}
        if corpus.sentence():
            say(f"{path}: {corpus.sentence()}")
    elif instructions:
        found = _tokenise_samples(corpus, tokenizer, stem, say, instructions)
    else:
        found = _tokenise(corpus, tokenizer, stem, say)
    borders = np.array(found["borders"], np.int64)
    for name, size in ((".bin", 4), (".mask", 1)) if instructions else ((".bin", 4),):
        if not os.path.exists(stem + name) or os.path.getsize(stem + name) != size * int(borders[-1]):
            raise UserError(f"{stem}{name}: is damaged; remove it and {stem}.json")
    learned = FileIds(stem + ".mask", "u1") if instructions else None
    return Tokens(FileIds(stem + ".bin", "<i4"), borders, found["fingerprint"], learned)


def _facts(file):
    """What changes when a file's content does."""
    if kind(file) == HUB:
        return [file, dataset(file)._fingerprint]
    try:
        found = os.stat(file)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    return os.path.abspath(file), found.st_size, found.st_mtime_ns


def _tokenise(
    corpus: text.Corpus, tokenizer: Tokenizer, stem: str, say: Callable[[str], object]
) -> dict[str, Any]:
    eos, borders, digest = tokenizer.eos_token_id, [0], hashlib.sha256()
    with replacing(stem + ".bin") as aside, open(aside, "wb") as out, _bar(corpus) as bar:

        def put(ids):
            ids = ids.astype("<i4", copy=False)
            digest.update(ids)
            out.write(ids)
            return len(ids)

        def counted(pieces):
            for piece in pieces:
                yield piece
                bar.update(len(piece.encode()))

        size, final = 0, None
        for ids, ends in encode_documents(tokenizer, map(counted, corpus.documents())):
            size += put(ids)
            final = int(ids[-1]) if len(ids) else final
            if not ends:
                continue
            if eos is not None and final != eos:
                size += put(np.array([eos]))
            borders.append(borders[-1] + size)
            size, final = 0, None
    digest.update(np.array(borders))
    found = _write_found(stem, corpus, borders, digest)
    say("; ".join(filter(None, [_tokenised(corpus, "document", borders), corpus.sentence()])))
    return found


def _tokenise_samples(
    corpus: text.Corpus,
    tokenizer: Tokenizer,
    stem: str,
    say: Callable[[str], object],
    instructions: Instructions,
) -> dict[str, Any]:
    borders, digest = [0], hashlib.sha256()
    with (
        replacing(stem + ".bin") as aside,
        replacing(stem + ".mask") as beside,
        open(aside, "wb") as out,
        open(beside, "wb") as mask,
        _bar(corpus) as bar,
    ):
        for ids, learned, size in instructions.encode(corpus.files, tokenizer):
            for file, array in ((out, ids.astype("<i4", copy=False)), (mask, learned.astype("u1"))):
                digest.update(array)
                file.write(array)
            borders.append(borders[-1] + len(ids))
            bar.update(size)
    digest.update(np.array(borders))
    found = _write_found(stem, corpus, borders, digest)
    say("; ".join(filter(None, [_tokenised(corpus, "sample", borders), corpus.sentence()])))
    return found


def _size(corpus):
    """The bytes of the corpus, 0 where they are not known."""
    return sum(os.path.getsize(file) for file in corpus.files if os.path.exists(file))


def _bar(corpus):
    total = _size(corpus) or None
    return progress.bar(total=total, unit="B", unit_scale=True, desc="tokenising", leave=False, disable=None)


def _tokenised(corpus, what, borders):
    count, size = len(borders) - 1, _size(corpus)
    sentence = f"tokenised {counted(count, what)}, {counted(borders[-1], 'token')}"
    return sentence + (f", {size / max(borders[-1], 1):.2f} bytes each" if size else "")


def _write_found(stem, corpus, borders, digest):
    """Write what the cache holds -> it. This file is the last: it marks the cache as complete."""
    found = {
        "files": corpus.files,
        "empty": corpus.left_out.get(text.EMPTY, []),
        "fingerprint": digest.hexdigest(),
        "borders": borders,
    }
    write_json(stem + ".json", found)
    return found
