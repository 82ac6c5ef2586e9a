"""Text to sequences of token ids: read, checked, tokenised once to a mapped file, cut, and dealt out in a seeded order."""

import copy
import hashlib
import json
import os

import numpy as np

from longlora.disk import read_json, replacing, write_json
from longlora.errors import UserError
from longlora.memory.plan import available_memory

BLOCK = 1 << 17  # bytes of a .txt that are read, and tokenised on one core, at a time
AT_ONCE = 16  # blocks of text that are tokenised side by side
BYTES_PER_CHARACTER = 64  # what the tokenizers library needs while it works, measured on English text
NEIGHBOURS = 256  # characters on both sides of a cut that must tokenise as if it were not there


def files_of(path):
    """The files that `path` stands for, in a fixed order."""
    if os.path.isdir(path):
        found = sorted(
            os.path.join(root, name)
            for root, _, names in os.walk(path)
            for name in names
            if name.endswith((".txt", ".jsonl"))
        )
        if not found:
            raise UserError(f"{path}: holds no .txt and no .jsonl file")
        return found
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file or directory")
    if not path.endswith((".txt", ".jsonl", ".bin")):
        raise UserError(f"{path}: should be .txt, .jsonl or .bin, or a directory of .txt and .jsonl files")
    return [path]


def _decoded(data, path, offset):
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 at byte {offset + error.start}") from None


def _opened(path):
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _blocks(path):
    """The text of a .txt in pieces of about BLOCK bytes, cut after a line break, or else before a space."""
    left, offset, some = b"", 0, False
    with _opened(path) as file:
        while left is not None:
            data = file.read(BLOCK)
            cut = max((left + data).rfind(b"\n") + 1 or (left + data).rfind(b" "), 0) if data else len(left)
            block, left = (left + data)[:cut], (left + data)[cut:] if data else None
            text = _decoded(block, path, offset)
            if offset == 0:
                text = text.removeprefix("\ufeff")
            offset += cut
            some = some or bool(text.strip())
            if text:
                yield text
    if not some:
        raise UserError(f"{path}: holds no text")


def documents(path):
    """The documents of a .txt (one) or a .jsonl (one a line), each as an iterable of pieces of its text."""
    if path.endswith(".txt"):
        yield _blocks(path)
        return
    offset, count = 0, 0
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            text = _decoded(line, path, offset)
            offset += len(line)
            if not text.strip():
                continue
            try:
                record = json.loads(text.removeprefix("\ufeff") if number == 1 else text)
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{path}: line {number} is not JSON: {getattr(error, 'msg', error)}"
                ) from None
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                raise UserError(f'{path}: line {number} should be an object with a string "text"')
            if record["text"]:
                count += 1
                yield (record["text"],)
    if not count:
        raise UserError(f"{path}: holds no text")


def encode_documents(tokenizer, documents):
    """Of `documents`, each an iterable of pieces of its text, block by block: its ids, as if the whole were tokenised at once, and
    whether the document ends there. Blocks, also those of several documents, are tokenised side by side on all cores."""
    front, back = _affixes(tokenizer)
    nothing, waiting, size = front[:0], [], 0

    def encoded():
        done = tokenizer.backend.encode_batch_fast([text for text, _, _ in waiting], add_special_tokens=False)
        for (_, first, last), found in zip(waiting, done):
            ids = np.array(found.ids, np.int32)
            yield np.concatenate([front if first else nothing, ids, back if last else nothing]), last

    for pieces in documents:
        first = True
        for text, last in _parts(tokenizer, pieces):
            waiting.append((text, first, last))
            size, first = size + max(len(text), 64), False  # the shortest takes memory too
            if size >= AT_ONCE * BLOCK:
                yield from encoded()
                waiting, size = [], 0
    yield from encoded()


def _parts(tokenizer, pieces):
    """The joined pieces in parts that can be tokenised one by one, and whether a part is the last.

    A cut between two pieces is kept only where the text around it tokenises the same with and without it: the tokenizers of
    our families split text by a regular expression or byte by byte, so what is far from a cut cannot feel it. Where no such
    cut is found (a SentencePiece model that puts a space before a text's first word) the pieces are joined and memory
    bounds the document.
    """

    def bare(text):
        return tokenizer.backend.encode(text, add_special_tokens=False).ids

    def clean(left, right):
        left, right = left[-NEIGHBOURS:], right[:NEIGHBOURS]
        if (
            not left.strip() or not right[:2].strip()
        ):  # a long run of spaces can be cut in step with its own tokens
            return False
        return bare(left + right) == bare(left) + bare(right)

    held = ""
    for piece in pieces:
        at = _cut(held, piece, clean) if held else None
        if at is not None:
            yield held[:at], False
            held = held[at:]
        held += piece
        if len(held) * BYTES_PER_CHARACTER > available_memory():
            raise UserError(
                f"a document of more than {len(held):,} characters does not fit in memory while it is tokenised; "
                "cut it into several files, or one document a line of .jsonl"
            )
    yield held, True


def _cut(held, piece, clean):
    """Where to cut `held`, which `piece` follows: at the last line breaks that can be cut at, else None."""
    at = len(held)
    for _ in range(8):
        if at <= 0:
            return None
        if clean(held[:at], (held[at : at + NEIGHBOURS] + piece)[:NEIGHBOURS]):
            return at
        at = held.rfind("\n", 0, at - 1) + 1
    return None


def _affixes(tokenizer):
    """The special tokens that the tokenizer puts before and after a text."""
    bare = tokenizer.backend.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a").tolist()
    at = next(i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare)
    return np.array(whole[:at], np.int32), np.array(whole[at + len(bare) :], np.int32)


class Tokens:
    """Token ids of a corpus: `ids` [N], integers, mapped; `borders` int64 [documents + 1]; `fingerprint`, a hash of both."""

    def __init__(self, ids, borders, fingerprint):
        self.ids, self.borders, self.fingerprint = ids, borders, fingerprint

    def document(self, i):
        return self.ids[self.borders[i] : self.borders[i + 1]]

    def __len__(self):
        return len(self.borders) - 1


def read_bin(path, vocab_size):
    """Token .bin files: headerless little-endian uint16 (uint32 for vocabularies above 65536), or llm.c's with its header."""
    size = os.path.getsize(path)
    head = np.fromfile(path, np.int32, 3) if size >= 1024 else np.zeros(3, np.int32)
    dtype, start = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4"), 0
    if head[0] in (20240520, 20240801):
        dtype, start = np.dtype("<u2" if head[0] == 20240520 else "<u4"), 1024
        count = (size - start) // dtype.itemsize
        if count != head[2]:
            raise UserError(f"{path}: should hold {head[2]} tokens by its header, holds {count}")
    if size == start or (size - start) % dtype.itemsize:
        raise UserError(f"{path}: {size - start} bytes are no whole number of {dtype.name} tokens")
    ids, digest = np.memmap(path, dtype, "r", start), hashlib.sha256()
    for first in range(0, len(ids), 1 << 22):
        part = ids[first : first + (1 << 22)]
        if int(part.max()) >= vocab_size:
            at = first + int(np.argmax(part >= vocab_size))
            raise UserError(f"{path}: token {at} is {ids[at]}, the model has {vocab_size}")
        digest.update(part)
    return Tokens(ids, np.array([0, len(ids)], np.int64), digest.hexdigest())


def tokenise(path, tokenizer, vocab_size, cache_dir, say=print):
    """The Tokens of the text at `path`: from the cache if text and tokenizer are unchanged, else made and cached.

    Each document ends with the tokenizer's end-of-text token, if it has one. The cache is two files written aside and
    renamed; its key is the files' paths, sizes and times, and the tokenizer.
    """
    files = files_of(path)
    if files[0].endswith(".bin"):
        return read_bin(files[0], vocab_size)
    if tokenizer is None:
        raise UserError(f"{path}: the model has no tokenizer; wanted a token .bin")
    facts = [(os.path.abspath(f), os.path.getsize(f), os.stat(f).st_mtime_ns) for f in files]
    key = hashlib.sha256(json.dumps([facts, tokenizer.fingerprint()]).encode()).hexdigest()[:16]
    stem = os.path.join(cache_dir, f"tokens-{key}")
    if not os.path.exists(stem + ".json"):
        _tokenise(files, tokenizer, stem, say)
    found = read_json(stem + ".json")
    borders = np.array(found["borders"], np.int64)
    if not os.path.exists(stem + ".bin") or os.path.getsize(stem + ".bin") != 4 * int(borders[-1]):
        raise UserError(f"{stem}.bin: is damaged; remove it and {stem}.json")
    return Tokens(np.memmap(stem + ".bin", "<i4", "r"), borders, found["fingerprint"])


def _tokenise(files, tokenizer, stem, say):
    from tqdm import tqdm

    eos, borders, digest = tokenizer.eos_token_id, [0], hashlib.sha256()
    total = sum(os.path.getsize(f) for f in files)
    # The .json goes last: with it the cache is complete.
    with (
        replacing(stem + ".bin") as aside,
        open(aside, "wb") as out,
        tqdm(total=total, unit="B", unit_scale=True, desc="tokenising", leave=False, disable=None) as bar,
    ):

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
        for ids, ends in encode_documents(
            tokenizer, (counted(pieces) for path in files for pieces in documents(path))
        ):
            size += put(ids)
            final = int(ids[-1]) if len(ids) else final
            if not ends:
                continue
            if eos is not None and final != eos:
                size += put(np.array([eos]))
            borders.append(borders[-1] + size)
            size, final = 0, None
    digest.update(np.array(borders))
    write_json(stem + ".json", {"files": files, "fingerprint": digest.hexdigest(), "borders": borders})
    say(
        f"tokenised {len(borders) - 1:,} documents, {borders[-1]:,} tokens, {total / max(borders[-1], 1):.2f} bytes each"
    )


class Sequences:
    """Pieces of documents, each at most `length` tokens and at least 2: what a training step is made of.

    long_documents says what becomes of longer ones; nothing happens to a document without being counted in `sentence`.
    Documents shorter than a sequence are packed: joined to the next until the sequence is full. A single token that is left
    at the very end has no target and makes no sequence.
    """

    def __init__(self, tokens, length, long_documents="split", where="data"):
        self.tokens, self.length = tokens, length
        sizes = np.diff(tokens.borders)
        long = int((sizes > length).sum())
        if long and long_documents == "refuse":
            i = int(np.argmax(sizes > length))
            raise UserError(
                f"{where}: document {i} has {int(sizes[i]):,} tokens, the sequence {length:,} ({long} such); "
                "long_documents can be split, truncate or drop"
            )
        self.pieces = []  # lists of (first, last) in tokens.ids
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
        done = {
            "split": "split",
            "truncate": f"truncated, {lost:,} tokens lost",
            "drop": f"dropped, {lost:,} tokens lost",
        }
        self.sentence = (
            f"{len(tokens):,} documents, {int(sizes.sum()):,} tokens (shortest {int(sizes.min()):,}, median "
            f"{int(np.median(sizes)):,}, longest {int(sizes.max()):,}) -> {len(self.pieces):,} sequences of "
            f"{length:,}" + (f"; {long:,} longer documents {done.get(long_documents)}" if long else "")
        )

    def __len__(self):
        return len(self.pieces)

    def hold_out(self, fraction):
        """Take the last share of the sequences, at least one, away -> Sequences of their own."""
        count = max(1, round(fraction * len(self.pieces)))
        if count >= len(self.pieces):
            raise UserError(
                f"eval_fraction {fraction:g} of {len(self.pieces)} sequences leaves none to train on"
            )
        other = copy.copy(self)
        self.pieces, other.pieces = self.pieces[:-count], self.pieces[-count:]
        return other

    def get(self, i):
        """int32 ids [n], n <= length."""
        return np.concatenate([np.asarray(self.tokens.ids[a:b], np.int32) for a, b in self.pieces[i]])


def batch(sequences, indices, multiple=1):
    """ids and targets [B,T] int32: targets are the next token, -100 where there is none.

    T is the longest row's, rounded up to `multiple`: the rest of a document costs what it is long. Shorter rows end in padding.
    """
    rows = [sequences.get(i) for i in indices]
    length = -(-max(map(len, rows)) // multiple) * multiple
    ids, targets = np.zeros((len(rows), length), np.int32), np.full((len(rows), length), -100, np.int32)
    for row, found in enumerate(rows):
        ids[row, : len(found)] = found
        targets[row, : len(found) - 1] = found[1:]
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
                self._epoch, self._places = (
                    epoch,
                    np.random.default_rng([self.seed, epoch]).permutation(self.n),
                )
            out.append(int(self._places[place]))
            self.position += 1
        return out
