"""What every command line of the package does with errors: one line on stderr and an exit code, no traceback.

0 is success. 1 is a fault of ours, whose details are kept in a file. 2 is an error that the user can mend,
also where standard output cannot be written. 130 and 141 are what a shell reports for Ctrl-C and for a reader
that has gone.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from longlora import interrupt
from longlora.errors import UserError


def guarded(run: Callable[[], int], program: str = "longlora", speaks: bool = True) -> int:
    """Call run() -> its exit code, or that of what it raises. A SystemExit is raised again.

    program: begins the line. speaks: whether a user's error is told; in a group of processes one does it.
    """
    _open_standard_streams()
    output = sys.stdout
    code, raised, watched = 0, None, _Watched(output)
    sys.stdout = watched
    quiet = signal.getsignal(signal.SIGINT) is interrupt.end
    try:
        try:
            if quiet:
                signal.signal(signal.SIGINT, signal.default_int_handler)
            code = run()
        finally:
            if quiet:
                signal.signal(signal.SIGINT, interrupt.end)
    except BaseException as error:  # a panic of a library in Rust is no Exception
        raised = error
    finally:
        sys.stdout = output
    code, line = _outcome(code, raised, watched.ended(), program)
    if line is not None and (speaks or code == 1):
        with contextlib.suppress(OSError, ValueError):
            print(f"{program}: error: {UserError(line)}", file=sys.stderr)
    if isinstance(raised, SystemExit):
        raise SystemExit(code)
    return code


def _open_standard_streams() -> None:
    """Open the standard streams that the process was started without. Python has None for them."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))


def _outcome(
    code: int, raised: BaseException | None, unwritten: OSError | None, program: str
) -> tuple[int, str | None]:
    """The exit code of a command and the line about it, if any.

    code: what it returned, or raised: what it raised. unwritten: what kept its output from being written.
    """
    if isinstance(raised, BrokenPipeError) or isinstance(unwritten, BrokenPipeError):
        return 141, None
    if isinstance(raised, SystemExit):  # of argparse: --help, or a wrong flag, which has been told
        code, raised = raised.code if isinstance(raised.code, int) else 1, None
    if unwritten is not None and code == 0 and (raised is None or isinstance(raised, OSError)):
        return 2, f"standard output cannot be written: {unwritten.strerror}"
    if raised is None:
        return code, None
    if isinstance(raised, KeyboardInterrupt):
        return 130, None
    if isinstance(raised, UserError):
        return 2, str(raised)
    if isinstance(raised, ImportError):  # a library, or our own extension
        return 2, str(raised)
    if isinstance(raised, MemoryError):
        return 2, "out of memory; `longlora plan` shows what makes a run fit"
    return 1, f"this is a fault of {program}, please report it: {_kept(raised)}"


class _Watched:
    """Standard output that keeps the error of a failed write. argparse, for one, drops that error."""

    def __init__(self, stream: Any):
        self._stream = stream
        self.failure: OSError | None = None
        if hasattr(stream, "reconfigure"):  # a terminal that lacks a character gets its code
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._noting():
            return self._stream.write(text)

    def flush(self) -> None:
        with self._noting():
            self._stream.flush()

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failure = self.failure or error
            raise

    def ended(self) -> OSError | None:
        """Flush -> what kept something from being written, or None.

        What cannot be written is dropped: Python would report it once more when it ends.
        """
        try:
            self.flush()
        except OSError:
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
                self._stream.flush()
        except ValueError:  # it is closed
            pass
        return self.failure


def _kept(error: BaseException) -> str:
    """Write the details of `error` to a file -> a sentence with its first line and the file."""
    import tempfile
    import traceback

    said = f"{type(error).__name__}: {error}"
    try:
        handle, path = tempfile.mkstemp(prefix="longlora-error-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{sys.argv}\n{_versions()}\n")
            traceback.print_exception(error, file=file)
    except OSError as why:
        with contextlib.suppress(OSError, ValueError):
            traceback.print_exception(error)
        return f"{said} (the details cannot be kept in a file: {why.strerror})"
    return f"{said}; the details are in {path}"


def _versions() -> str:
    import platform

    from longlora import __version__

    loaded = {
        name: getattr(sys.modules.get(name), "__version__", None)
        for name in ("numpy", "torch", "transformers")
    }
    known = [f"{name} {version}" for name, version in loaded.items() if version]
    return ", ".join(
        [f"longlora {__version__}", f"Python {sys.version.split()[0]}", *known, platform.platform()]
    )
