"""Text files to documents. A .txt file is one document, a .jsonl file has one document a line.

Other files of records (data/records.py) have one document a record.

A directory stands for its .txt and .jsonl files, in subfolders and behind links too, with suffixes of either
case: each file once, in the order of the paths. Everything else is left out, and `Corpus.sentence` says so:
hidden files and folders (.ipynb_checkpoints, macOS's ._book.txt), files of another kind, files without text,
and text files that are part of a run or a model (OWN).

In a .txt file CRLF becomes LF. The strings of a .jsonl file stay as they are.
"""

import itertools
import os
import re
from collections.abc import Iterable, Iterator

from longlora.data import records
from longlora.data.records import decoded, kind
from longlora.disk import open_file
from longlora.errors import UserError, counted, printable

BLOCK = 1 << 17  # bytes of a .txt file that are read, and tokenised on one core, at a time
KINDS = (".txt", ".jsonl")
# Files are not data if one of these lies beside them.
OWN = {
    "metrics.jsonl": ("options.yaml",),
    "merges.txt": ("config.json", "tokenizer_config.json", "vocab.json"),
    "vocab.txt": ("config.json", "tokenizer_config.json"),
}
HIDDEN, OTHER, PART = "hidden", "of another kind", "part of a run or a model"
AGAIN, EMPTY = "linked again", "without text"


class Corpus:
    """The text at `path`: a .txt or .bin file, one of records, a directory, or a dataset's name.

    files     the paths of the files, sorted
    left_out  why -> the paths of what a directory holds besides
    crlf      the files in which CRLF became LF, after `documents` has read them

    UserError if `path` is none of these, or a directory without .txt and .jsonl files.
    """

    def __init__(self, path: str):
        self.path, self.files = path, [path]
        self.left_out: dict[str, list[str]] = {}
        self.crlf: list[str] = []
        if os.path.isdir(path):
            self.files = self._walk()
            if not self.files:
                raise UserError("; ".join([f"{path}: holds no .txt and no .jsonl file", *self._sentences()]))
        elif kind(path) != records.HUB and not os.path.lexists(path):
            raise UserError(f"{path}: no such file or directory")
        elif kind(path) not in (".txt", ".bin", *records.KINDS, records.HUB):
            raise UserError(
                f"{path}: should be .txt, .jsonl or .bin, .jsonl.gz, .json or .parquet, or a directory of "
                ".txt and .jsonl files"
            )

    def leave_out(self, why: str, *paths: str) -> None:
        """Note that `paths` are left out."""
        self.left_out.setdefault(why, []).extend(paths)

    def _walk(self):
        """The files of the directory. Links come last: a file that has a path without links keeps it."""
        found: dict[str, str] = {}  # path without links -> path
        seen: set[str] = set()  # folders, without links
        waiting, links = [self.path], list[str]()
        while waiting or links:
            path = waiting.pop() if waiting else links.pop()
            real = os.path.realpath(path)
            if real in seen or real in found:
                self.leave_out(AGAIN, path)
            elif os.path.isdir(path):
                seen.add(real)
                for name in _names(path):
                    inside = os.path.join(path, name)
                    why = _why_not(path, name)
                    if why is not None:
                        self.leave_out(why, inside)
                    else:
                        (links if os.path.islink(inside) else waiting).append(inside)
            else:
                found[real] = path
        return sorted(found.values())

    def documents(self) -> Iterator[Iterable[str]]:
        """Yield the documents, each as an iterable of pieces of text: read one before you ask for the next.

        UserError names the byte that is not UTF-8, or the line that is not {"text": "..."}. A file without
        text is left out; UserError if none has any.
        """
        some = False
        for path in self.files:
            empty = True
            for document in self._texts(path) if kind(path) == ".txt" else _records(path):
                empty = False
                yield document
            if empty:
                self.leave_out(EMPTY, path)
            some = some or not empty
        if not some:
            raise UserError(f"{self.path}: holds no text")

    def _texts(self, path):
        """The document of a .txt file, if it holds any text."""
        pieces = _blocks(path, lambda: self.crlf.append(path))
        start = []
        for piece in pieces:
            start.append(piece)
            if piece.strip():
                yield itertools.chain(start, pieces)
                return

    def sentence(self) -> str | None:
        """What was left out or changed, by counts and examples; None if nothing."""
        return "; ".join(self._sentences()) or None

    def _sentences(self):
        parts = []
        for why in (HIDDEN, OTHER, PART, AGAIN, EMPTY):
            paths = self.left_out.get(why, [])
            if paths:
                example = os.path.relpath(min(paths), self.path)
                parts.append(f"{len(paths):,} {why} ({printable(example)}{', ...' if paths[1:] else ''})")
        if parts:
            yield "left out " + ", ".join(parts)
        if self.crlf:
            yield f"CRLF became LF in {len(self.crlf):,} of {counted(len(self.files), 'file')}"


def _names(folder):
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error.strerror}") from None


def _why_not(folder, name):
    """Why this entry of a folder is left out, or None."""
    if name.startswith("."):
        return HIDDEN
    if os.path.isdir(os.path.join(folder, name)):
        return None
    if kind(name) not in KINDS:
        return OTHER
    beside = OWN.get(name, ())
    return PART if any(os.path.exists(os.path.join(folder, other)) for other in beside) else None


# ---- reading -------------------------------------------------------------------------------------


def _blocks(path, crlf):
    """Yield the text of a .txt in pieces of about BLOCK bytes; call crlf() if CRLF was in it."""
    left: bytes | None = b""
    offset, changed = 0, False
    with open_file(path) as file:
        while left is not None:
            data = _read(file, path)
            block = left + data
            cut = _cut(block) if data else len(block)
            text = decoded(block[:cut], path, offset)
            if offset == 0:
                text = text.removeprefix("\ufeff")
            if "\r\n" in text:
                text, changed = text.replace("\r\n", "\n"), True
            offset, left = offset + cut, block[cut:] if data else None
            if text:
                yield text
    if changed:
        crlf()


def _read(file, path):
    try:
        return file.read(BLOCK)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _cut(block: bytes) -> int:
    """Where to cut a piece of a text: after its last line break, before its last space, or before its last
    character."""
    cut = block.rfind(b"\n") + 1 or block.rfind(b" ")
    if cut > 0:
        return cut
    last = len(block) - 1
    while last > max(0, len(block) - 4) and block[last] & 0xC0 == 0x80:  # a byte inside a character
        last -= 1
    return max(last, 0)


def _records(path):
    """Yield the documents of a file of records."""
    for place, record in records.read(path):
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise UserError(f'{path}: {place} should be an object with a string "text"')
        whole(record["text"], path, place)
        if record["text"]:
            yield (record["text"],)


def whole(text: str, path: str, place: str) -> None:
    """UserError if the text of a record holds half a character."""
    half = re.search("[\ud800-\udfff]", text)
    if half:
        raise UserError(
            f"{path}: {place}: its text holds half a character, {half[0]!r} at {half.start()}; "
            "it was cut inside an emoji or the like"
        )
