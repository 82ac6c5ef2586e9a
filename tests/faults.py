"""Faults of the file system: the n-th operation that changes it fails, or the process is killed there.

`call` runs a function in a fork with such a fault.
"""

import builtins
import errno
import io
import os
import traceback
from collections.abc import Callable

NAMES = ("replace", "rename", "unlink", "mkdir", "rmdir", "fsync", "symlink", "truncate")
KILLED, REFUSED, CRASHED = 9, 2, 3  # exit codes of the fork, besides 0


class Faults:
    """Counts operations. At number `at`, from 1, it kills the process or raises: kind is kill or fail."""

    def __init__(self, kind: str, at: int):
        self.kind, self.at, self.count = kind, at, 0

    def step(self) -> None:
        self.count += 1
        if self.count != self.at:
            return
        if self.kind == "kill":
            os._exit(KILLED)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def install(self) -> None:
        """Count from here on, in this process."""
        for name in NAMES:
            setattr(os, name, self._counted(getattr(os, name)))
        before, faults = builtins.open, self

        def opened(file, mode="r", *args, **kwargs):
            if not set("wax+") & set(mode) or str(file).startswith(("/dev/", "/proc/")):
                return before(file, mode, *args, **kwargs)
            faults.step()
            found = before(file, mode, *args, **kwargs)
            return Written(found, faults)

        builtins.open = io.open = opened
        create = os.open

        def made(path, flags, *args, **kwargs):
            if flags & os.O_CREAT:
                faults.step()
            return create(path, flags, *args, **kwargs)

        os.open = made

    def _counted(self, function):
        def call(*args, **kwargs):
            self.step()
            return function(*args, **kwargs)

        return call


class Written:
    """A file whose writes are counted."""

    def __init__(self, file, faults):
        self._file, self._faults = file, faults

    def write(self, data):
        self._faults.step()
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


def call(function: Callable[[], object], kind: str, at: int) -> tuple[int, int, str]:
    """Run the function in a fork with a fault -> exit code, operations counted, the error's text.

    A UserError is REFUSED, any other exception CRASHED.
    """
    from longlora.errors import UserError

    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(read)
        code, text, faults = CRASHED, "", Faults(kind, at)
        try:
            faults.install()
            function()
            code = 0
        except UserError as error:
            code, text = REFUSED, str(error)
        except BaseException:
            text = traceback.format_exc()
        finally:
            os.write(write, f"{faults.count}\n{text}"[:60_000].encode("utf-8", "replace"))
            os._exit(code)
    os.close(write)
    with os.fdopen(read, encoding="utf-8") as pipe:
        count, _, text = pipe.read().partition("\n")
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), int(count or 0), text


def places(count: int, some: int) -> list[int]:
    """Which operations of `count` are tried: all with LONGLORA_ALL_FAULTS=1, else `some` across the run."""
    if os.environ.get("LONGLORA_ALL_FAULTS"):
        return list(range(1, count + 1))
    return sorted({1 + i * (count - 1) // max(some - 1, 1) for i in range(some)})
