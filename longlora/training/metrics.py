"""What a run reports: metrics.jsonl, one JSON object a line."""

import json
import os
import resource

from longlora.disk import write_text
from longlora.errors import UserError

FILE = "metrics.jsonl"


def peak_memory():
    """The largest resident size of this program so far, in bytes. Where there is no /proc it is what getrusage says, which may be
    that of the program that started this one."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            return int(next(line for line in file if line.startswith("VmHWM:")).split()[1]) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def read(output_dir):
    """The rows of a run's metrics.jsonl, in order; a line that was being written when the run was killed is left out."""
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
    """metrics.jsonl of a run: it starts with `rows`, those up to the checkpoint that is resumed, and grows a line at a time."""

    def __init__(self, output_dir, rows=()):
        self.path, self.rows = os.path.join(output_dir, FILE), list(rows)
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def add(self, **row):
        self.rows.append(row)
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from None
