"""The metrics of a run: metrics.jsonl, one JSON object a line."""

import json
import os
from collections.abc import Iterable
from typing import Any

from longlora.disk import flush, write_text
from longlora.errors import UserError

FILE = "metrics.jsonl"


def read(output_dir: str | os.PathLike) -> list[dict]:
    """The rows of a run's metrics.jsonl, in order, without a last line that a killed run left half written.

    UserError if the file cannot be read or is damaged.
    """
    path = os.path.join(output_dir, FILE)
    try:
        with open(path, encoding="utf-8") as file:
            *lines, _ = file.read().split("\n")
        return [json.loads(line) for line in lines]
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: is damaged: {error}") from None


class Log:
    """The metrics.jsonl of a run.

    It starts with `rows`, those up to the checkpoint that is resumed, and grows by lines.

    With writes=False it only keeps the rows: in a group of processes one of them writes the file.
    """

    def __init__(self, output_dir: str, rows: Iterable[dict] = (), writes: bool = True):
        self.path, self.rows, self.writes = os.path.join(output_dir, FILE), list(rows), writes
        if writes:
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def add(self, **row: Any) -> None:
        """Add a row. UserError if the file cannot be written."""
        self.rows.append(row)
        if not self.writes:
            return
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from None

    def sync(self) -> None:
        """Flush the rows to disk, so that no checkpoint is newer than they are. UserError if that fails."""
        try:
            flush(self.path)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from None
