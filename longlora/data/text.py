"""Text files to documents. A .txt file is one document, a .jsonl file has one document a line."""

import json
import os
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from longlora.errors import UserError

BLOCK = 1 << 17  # bytes of a .txt file that are read, and tokenised on one core, at a time


def files_of(path: str) -> list[str]:
    """Return the files that `path` names: itself, or the .txt and .jsonl files under a directory, sorted.

    UserError if there are none, or if `path` is not .txt, .jsonl or .bin.
    """
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


def _decoded(data: bytes, path: str, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 at byte {offset + error.start}") from None


def _opened(path: str) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _blocks(path: str) -> Iterator[str]:
    """Yield the text of a .txt in pieces of about BLOCK bytes, cut after a line break or before a space."""
    left: bytes | None = b""
    offset, some = 0, False
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


def documents(path: str) -> Iterator[Iterable[str]]:
    """Yield the documents of a .txt or .jsonl file, each as an iterable of pieces of its text.

    UserError names the byte that is not UTF-8, or the line that is not {"text": "..."}.
    """
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
                why = getattr(error, "msg", error)
                raise UserError(f"{path}: line {number} is not JSON: {why}") from None
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                raise UserError(f'{path}: line {number} should be an object with a string "text"')
            if record["text"]:
                count += 1
                yield (record["text"],)
    if not count:
        raise UserError(f"{path}: holds no text")
