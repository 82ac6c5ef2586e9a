"""Records of a file: the lines of a .jsonl or .jsonl.gz, the list of a .json, the rows of a .parquet.

A dataset of the Hugging Face Hub, "owner/name" or "owner/name:split", has rows too.
"""

import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from typing import Any

from longlora.disk import open_file, read_bytes
from longlora.errors import UserError, reason

KINDS = (".jsonl", ".jsonl.gz", ".json", ".parquet")
HUB = "dataset"  # the kind of a dataset's name
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]*\w(:[\w.-]+)?")
_LETTER = re.compile(r"\S")
_ROWS = 64  # of a .parquet that are in memory at a time


def kind(path: str) -> str:
    """The suffix of a file's name in lower case, or HUB for a dataset's name that is not a path."""
    name = path.lower()
    suffix = ".jsonl.gz" if name.endswith(".jsonl.gz") else os.path.splitext(name)[1]
    there = os.path.isdir(path.partition("/")[0])
    named = suffix not in (*KINDS, ".txt", ".bin") and _NAME.fullmatch(path)
    return HUB if named and not there else suffix


def read(path: str) -> Iterator[tuple[str, Any]]:
    """Yield the records, each with its place, such as "line 3".

    A record of JSON may be any value. UserError for what cannot be read, and for a missing library.
    """
    found = kind(path)
    if found == ".json":
        return _values(path)
    if found == ".parquet":
        return _rows(path)
    if found == HUB:
        return _dataset_rows(path)
    return _lines(path)


def decoded(data: bytes, path: str, offset: int) -> str:
    """The UTF-8 text of `data`, which begins at byte `offset` of the file."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 at byte {offset + error.start}") from None


def _lines(path):
    """The lines of a .jsonl, or .jsonl.gz, that are not empty."""
    offset = 0
    with open_file(path) as file:
        for number, line in enumerate(_split(file, path), 1):
            text = decoded(line, path, offset)
            text = text.removeprefix("\ufeff") if number == 1 else text
            offset += len(line)
            if not text.strip():
                continue
            try:
                yield f"line {number}", json.loads(text)
            except (ValueError, RecursionError) as error:
                why = getattr(error, "msg", reason(error))
                raise UserError(f"{path}: line {number} is not JSON: {why}") from None


def _split(file, path):
    try:
        yield from gzip.open(file) if kind(path) == ".jsonl.gz" else file
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _values(path):
    """The values of a .json: those of its list, or one after the other as in a .jsonl. One is held at a time.

    A large file is not parsed whole: its objects would take several times its size.
    """
    text, decoder = decoded(read_bytes(path), path, 0).removeprefix("\ufeff"), json.JSONDecoder()
    at = skip_spaces(text, 0)
    listed = text[at : at + 1] == "["
    at += listed
    number = 0
    while True:
        at = skip_spaces(text, at)
        if listed and number and text[at : at + 1] == ",":
            at = skip_spaces(text, at + 1)
        elif text[at : at + 1] in (("]",) if listed else ("",)):
            break
        elif listed and number:
            raise UserError(f"{path}: is not JSON after record {number}: wanted a comma or the list's end")
        number += 1
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            why = getattr(error, "msg", reason(error))
            raise UserError(f"{path}: record {number} is not JSON: {why}") from None
        yield f"record {number}", value
    if skip_spaces(text, at + 1) < len(text):
        raise UserError(f"{path}: is not JSON: there is more after the list")


def skip_spaces(text: str, at: int) -> int:
    """The place of the first character from `at` on that is not a space."""
    found = _LETTER.search(text, at)
    return found.start() if found else len(text)


def _rows(path):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: reading .parquet needs pip install 'longlora[parquet]'") from None
    with open_file(path) as file:
        try:
            number = 0
            for batch in pyarrow.parquet.ParquetFile(file).iter_batches(_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", _without_none(row)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from None


def dataset(path: str) -> Any:
    """The datasets.Dataset of that name; UserError if it cannot be loaded."""
    name, _, split = path.partition(":")
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{path}: no such file or directory; to load a dataset of that name: "
            "pip install 'longlora[datasets]'"
        ) from None
    try:
        return datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # of the network, the Hub, the files
        raise UserError(f"{path}: no such file, and it cannot be loaded as a dataset: {error}") from None


def _dataset_rows(path):
    for number, row in enumerate(dataset(path), 1):
        yield f"row {number}", _without_none(row)


def _without_none(value):
    """The value without the fields that other rows have and this one lacks."""
    if isinstance(value, dict):
        return {key: _without_none(x) for key, x in value.items() if x is not None}
    return [_without_none(x) for x in value] if isinstance(value, list) else value
