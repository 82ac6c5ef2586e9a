"""Faults of the file system: the n-th operation that changes it fails, or the process is killed there.

`call` runs a function in a fork with such a fault. The kinds:

    kill   the process ends before the operation, or in the middle of a write
    fail   the operation fails, a write in its middle; everything after it works
    full   the disk is full from there on: nothing is made or written any more, names can still change
"""

import builtins
import errno
import io
import json
import os
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

KINDS = ("kill", "fail", "full")
NAMES = ("replace", "rename", "unlink", "rmdir")
GROWING = ("mkdir", "fsync", "symlink", "truncate")  # these fail on a full disk
KILLED, REFUSED, CRASHED = 9, 2, 3  # exit codes of the fork, besides 0


class Unreadable(io.BytesIO):
    """A file that can be opened, but not read."""

    def read(self, *_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    read1 = read


class Faults:
    """Counts operations and meets number `at`, from 1, with a fault. `met` is called before the fault."""

    def __init__(self, kind: str, at: int, met: Callable[[], object]):
        self.kind, self.at, self.met, self.count = kind, at, met, 0
        self.quiet = False

    def step(self, grows: bool = True, half: Callable[[], object] = lambda: None) -> None:
        """Count an operation. grows: it takes space on the disk; half: does half of it."""
        if self.quiet:
            return
        self.count += 1
        first = self.count == self.at
        if first:
            self.quiet = True
            self.met()
            self.quiet = False
        if first and self.kind == "kill":
            half()
            os._exit(KILLED)
        if first and self.kind == "fail" or 0 < self.at <= self.count and self.kind == "full" and grows:
            half()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def install(self) -> None:
        """Count from here on, in this process."""
        for name in (*NAMES, *GROWING):
            setattr(os, name, self._counted(getattr(os, name), name in GROWING))
        before, faults = builtins.open, self

        def opened(file, mode="r", *args, **kwargs):
            if not set("wax+") & set(mode) or str(file).startswith(("/dev/null", "/proc/")):
                return before(file, mode, *args, **kwargs)
            faults.step()
            return Written(before(file, mode, *args, **kwargs), faults)

        builtins.open = io.open = opened
        create = os.open

        def made(path, flags, *args, **kwargs):
            if flags & os.O_CREAT:
                faults.step()
            return create(path, flags, *args, **kwargs)

        os.open = made

    def _counted(self, function, grows):
        def call(*args, **kwargs):
            self.step(grows)
            return function(*args, **kwargs)

        return call


class Written:
    """A file whose writes are counted."""

    def __init__(self, file, faults):
        self._file, self._faults = file, faults

    def write(self, data):
        def half():
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        self._faults.step(half=half)
        return self._file.write(data)

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __iter__(self):
        return iter(self._file)

    def __enter__(self):
        self._file.__enter__()
        return self

    def __exit__(self, *error):
        return self._file.__exit__(*error)


class Outcome(NamedTuple):
    """code: of the fork; count: its operations; text: of its error; seen: what `look` gave at the fault."""

    code: int
    count: int
    text: str
    seen: Any


def call(function: Callable[[], object], kind: str, at: int, look: Callable[[], Any] = dict) -> Outcome:
    """Run the function in a fork with a fault. A UserError is REFUSED, any other exception CRASHED.

    look: called where the fault happens; gives something that JSON holds.
    """
    from longlora.errors import UserError

    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(read)
        code, text = CRASHED, ""
        faults = Faults(kind, at, lambda: os.write(write, json.dumps({"seen": look()}).encode() + b"\n"))
        try:
            faults.install()
            function()
            code = 0
        except UserError as error:
            code, text = REFUSED, str(error)
        except BaseException:
            text = traceback.format_exc()[-30_000:]
        finally:
            os.write(write, json.dumps({"count": faults.count, "text": text}).encode() + b"\n")
            os._exit(code)
    os.close(write)
    told: dict[str, Any] = {"count": 0, "text": "", "seen": None}
    with os.fdopen(read, encoding="utf-8") as pipe:
        for line in pipe:
            told.update(json.loads(line))
    _, status = os.waitpid(pid, 0)
    return Outcome(os.waitstatus_to_exitcode(status), told["count"], told["text"], told["seen"])


def places(count: int, some: int) -> list[int]:
    """Which operations of `count` are tried: all with LONGLORA_ALL_FAULTS=1, else `some` across the run."""
    if os.environ.get("LONGLORA_ALL_FAULTS"):
        return list(range(1, count + 1))
    return sorted({1 + i * (count - 1) // max(some - 1, 1) for i in range(some)})
