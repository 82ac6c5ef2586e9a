"""What a run reports: metrics.jsonl, one JSON object a line, and the memory it takes."""
import json
import os

from .errors import UserError
from .safetensors_file import replacing

FILE = "metrics.jsonl"


def _proc(path, key):
    """The figure of a line "key: n kB" of a /proc file, in bytes; None where there is none."""
    try:
        with open(path, encoding="ascii") as file:
            for line in file:
                if line.startswith(key + ":"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return None


def available_memory():
    """Bytes that can be had without swapping, at most what resource limits leave; a large number where nobody says."""
    import resource
    found = _proc("/proc/meminfo", "MemAvailable") or 1 << 62
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        found = min(found, soft - (_proc("/proc/self/status", "VmSize") or 0))
    return found


def peak_memory():
    """The most bytes this process has held so far."""
    import resource
    return _proc("/proc/self/status", "VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def read(output_dir):
    """The rows of a run's metrics.jsonl, in order; a line that was being written when the run was killed is left out."""
    path = os.path.join(output_dir, FILE)
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().split("\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    rows = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise UserError(f"{path}: line {number} is not JSON") from None
    return rows


class Log:
    """metrics.jsonl of a run: starts with `rows` (those up to the checkpoint that is resumed), grows a line at a time."""

    def __init__(self, output_dir, rows=()):
        self.path, self.rows = os.path.join(output_dir, FILE), list(rows)
        with replacing(self.path) as aside, open(aside, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in self.rows)
        self._file = open(self.path, "a", encoding="utf-8")

    def add(self, **row):
        self.rows.append(row)
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from None

    def close(self):
        self._file.close()
