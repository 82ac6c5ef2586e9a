"""Text to sequences of token ids: read, checked, tokenised once to a mapped file, cut, and dealt out in a seeded order."""
import hashlib
import json
import os

import numpy as np

from .errors import UserError
from .safetensors_file import replacing, write_json

BLOCK = 1 << 20                        # characters of a .txt read at a time


def files_of(path):
    """The files that `path` stands for, in a fixed order."""
    if os.path.isdir(path):
        found = sorted(os.path.join(root, name) for root, _, names in os.walk(path) for name in names
                       if name.endswith((".txt", ".jsonl")))
        if not found:
            raise UserError(f"{path}: holds no .txt and no .jsonl file")
        return found
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file or directory")
    if not path.endswith((".txt", ".jsonl", ".bin")):
        raise UserError(f"{path}: should be .txt, .jsonl or .bin, or a directory of .txt and .jsonl files")
    return [path]


def read_text(path):
    """A whole UTF-8 file; UserError with the byte offset of what is not UTF-8."""
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except MemoryError:
        raise UserError(f"{path}: {os.path.getsize(path):,} bytes in one document do not fit in memory; cut it into several "
                        "files, or one document a line of .jsonl") from None
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 at byte {error.start}") from None


def documents(path):
    """The documents of a .txt (one) or a .jsonl (one a line), as text."""
    if path.endswith(".txt"):
        text = read_text(path)
        if not text.strip():
            raise UserError(f"{path}: holds no text")
        yield text
        return
    offset, count = 0, 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line.decode("utf-8")) if line.strip() else None
            except UnicodeDecodeError as error:
                raise UserError(f"{path}: is not UTF-8 at byte {offset + error.start}") from None
            except json.JSONDecodeError as error:
                raise UserError(f"{path}: line {number} is not JSON: {error.msg}") from None
            offset += len(line)
            if record is None:
                continue
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                raise UserError(f"{path}: line {number} should be an object with a string \"text\"")
            if record["text"]:
                count += 1
                yield record["text"]
    if not count:
        raise UserError(f"{path}: holds no text")


class Tokens:
    """Token ids of a corpus: `ids` int32 [N], mapped, and `borders` int64 [documents + 1]."""

    def __init__(self, ids, borders):
        self.ids, self.borders = ids, borders

    def document(self, i):
        return self.ids[self.borders[i]:self.borders[i + 1]]

    def __len__(self):
        return len(self.borders) - 1


def read_bin(path, vocab_size):
    """Token .bin files: headerless little-endian uint16 (uint32 for vocabularies above 65536), or llm.c's with its header."""
    size = os.path.getsize(path)
    head = np.fromfile(path, np.int32, 3) if size >= 1024 else np.zeros(3, np.int32)
    dtype, start = (np.uint16 if vocab_size <= 1 << 16 else np.uint32), 0
    if head[0] in (20240520, 20240801):
        dtype, start = (np.uint16 if head[0] == 20240520 else np.uint32), 1024
        if size - 1024 != int(head[2]) * np.dtype(dtype).itemsize:
            raise UserError(f"{path}: should hold {int(head[2])} tokens by its header, holds {(size - 1024) // np.dtype(dtype).itemsize}")
    if size == start or (size - start) % np.dtype(dtype).itemsize:
        raise UserError(f"{path}: {size} bytes are no whole number of {np.dtype(dtype).name} tokens")
    stored = np.memmap(path, dtype, "r", start)
    for first in range(0, len(stored), 1 << 24):
        part = stored[first:first + (1 << 24)]
        if int(part.max()) >= vocab_size:
            at = first + int(np.argmax(part >= vocab_size))
            raise UserError(f"{path}: token {at} is {int(stored[at])}, the model has {vocab_size}")
    return Tokens(stored, np.array([0, len(stored)], np.int64))


def tokenise(path, tokenizer, vocab_size, cache_dir, say=print):
    """The Tokens of the text at `path`: from the cache if text and tokenizer are unchanged, else made and cached.

    Each document ends with the tokenizer's end-of-text token, if it has one. The cache is two files written aside and
    renamed; its key is the files' paths, sizes and times, and the tokenizer.
    """
    files = files_of(path)
    if files[0].endswith(".bin"):
        return read_bin(files[0], vocab_size)
    facts = [(os.path.abspath(f), os.path.getsize(f), os.stat(f).st_mtime_ns) for f in files]
    key = hashlib.sha256(json.dumps([facts, tokenizer.fingerprint()]).encode()).hexdigest()[:16]
    stem = os.path.join(cache_dir, f"tokens-{key}")
    if not os.path.exists(stem + ".json"):
        _tokenise(files, tokenizer, stem, say)
    with open(stem + ".json", encoding="utf-8") as file:
        borders = np.array(json.load(file)["borders"], np.int64)
    if os.path.getsize(stem + ".bin") != 4 * int(borders[-1]):
        raise UserError(f"{stem}.bin: is damaged; remove it and {stem}.json")
    return Tokens(np.memmap(stem + ".bin", np.int32, "r"), borders)


def _tokenise(files, tokenizer, stem, say):
    from tqdm import tqdm
    eos, borders = tokenizer.eos_token_id, [0]
    total = sum(os.path.getsize(f) for f in files)
    with replacing(stem + ".bin") as aside, open(aside, "wb") as out, \
            tqdm(total=total, unit="B", unit_scale=True, desc="tokenising", leave=False, disable=None) as bar:
        for path in files:
            for text in documents(path):
                ids = tokenizer.encode(text)
                if eos is not None:
                    ids = np.append(ids, np.int32(eos))
                ids.astype("<i4").tofile(out)
                borders.append(borders[-1] + len(ids))
                bar.update(len(text.encode()))
    if borders[-1] == 0:
        raise UserError(f"{files[0]}: gave no tokens")
    write_json(stem + ".json", {"borders": borders, "files": files})
    say(f"tokenised {len(borders) - 1:,} documents, {borders[-1]:,} tokens, {total / max(borders[-1], 1):.2f} bytes each")


class Sequences:
    """Pieces of documents, each at most `length` tokens and at least 2: what a training step is made of.

    long_documents says what becomes of longer ones; nothing happens to a document without being counted in `sentence`.
    Documents shorter than a sequence are packed: joined to the next until the sequence is full.
    """

    def __init__(self, tokens, length, long_documents="split", where="data"):
        self.tokens, self.length = tokens, length
        sizes = np.diff(tokens.borders)
        long = int((sizes > length).sum())
        if long and long_documents == "refuse":
            i = int(np.argmax(sizes > length))
            raise UserError(f"{where}: document {i} has {int(sizes[i]):,} tokens, the sequence {length:,} ({long} such); "
                            "long_documents can be split, truncate or drop")
        self.pieces = []               # lists of (first, last) in tokens.ids
        open_, room, lost = [], length, 0
        for first, size in zip(tokens.borders[:-1].tolist(), sizes.tolist()):
            if size > length and long_documents == "drop":
                lost += size
                continue
            if size > length and long_documents == "truncate":
                lost += size - length
                size = length
            while size:
                take = min(size, room)
                open_.append((first, first + take))
                first, size, room = first + take, size - take, room - take
                if room == 0:
                    self.pieces.append(open_)
                    open_, room = [], length
        if open_ and length - room >= 2:
            self.pieces.append(open_)
        if not self.pieces:
            raise UserError(f"{where}: leaves no sequence of {length} tokens")
        done = {"split": "split", "truncate": f"truncated, {lost:,} tokens lost", "drop": f"dropped, {lost:,} tokens lost"}
        self.sentence = (f"{len(tokens):,} documents, {int(sizes.sum()):,} tokens (shortest {int(sizes.min()):,}, median "
                         f"{int(np.median(sizes)):,}, longest {int(sizes.max()):,}) -> {len(self.pieces):,} sequences of "
                         f"{length:,}" + (f"; {long:,} longer documents {done.get(long_documents)}" if long else ""))

    def __len__(self):
        return len(self.pieces)

    def get(self, i):
        """int32 ids [n], n <= length."""
        return np.concatenate([np.asarray(self.tokens.ids[a:b], np.int32) for a, b in self.pieces[i]])


def batch(sequences, indices, length):
    """ids and targets [B, length] int32: targets are the next token, -100 where there is none. Short rows end in padding."""
    ids, targets = np.zeros((len(indices), length), np.int32), np.full((len(indices), length), -100, np.int32)
    for row, i in enumerate(indices):
        found = sequences.get(i)
        ids[row, :len(found)] = found
        targets[row, :len(found) - 1] = found[1:]
    return ids, targets


class Order:
    """Endless seeded permutations of 0..n-1; `position` alone says where it stands, so that resuming is exact."""

    def __init__(self, n, seed, position=0):
        self.n, self.seed, self.position, self._epoch = n, seed, position, -1

    def take(self, count):
        out = []
        for _ in range(count):
            epoch, place = divmod(self.position, self.n)
            if epoch != self._epoch:
                self._epoch, self._places = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.n)
            out.append(int(self._places[place]))
            self.position += 1
        return out
