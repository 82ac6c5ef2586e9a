"""What every command line of the package does with errors: one line on stderr and an exit code, no traceback.

0 is success. 1 is a fault of ours, whose details are kept in a file. 2 is an error that the user can mend,
also where standard output cannot be written. 130 and 141 are what a shell reports for Ctrl-C and for a reader
that has gone.
"""

import contextlib
import os
import sys
from collections.abc import Callable

from longlora.errors import UserError


def guarded(run: Callable[[], int], program: str = "longlora", speaks: bool = True) -> int:
    """Call run() -> its exit code, or that of what it raises. A SystemExit is raised again.

    program: begins the line. speaks: whether a user's error is told; in a group of processes one does it.
    """
    if hasattr(sys.stdout, "reconfigure"):  # a terminal that lacks a character gets its code
        sys.stdout.reconfigure(errors="backslashreplace")
    code, raised = 0, None
    try:
        code = run()
    except BaseException as error:  # a panic of a library in Rust is no Exception
        raised = error
    code, line = _outcome(code, raised, _unwritten(), program)
    if line is not None and sys.stderr is not None and (speaks or code == 1):
        with contextlib.suppress(OSError, ValueError):
            print(f"{program}: error: {UserError(line)}", file=sys.stderr)
    if isinstance(raised, SystemExit):
        raise SystemExit(code)
    return code


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
    if isinstance(raised, MemoryError):
        return 2, "out of memory; `longlora plan` shows what makes a run fit"
    return 1, f"this is a fault of {program}, please report it: {_kept(raised)}"


def _unwritten() -> OSError | None:
    """Flush standard output -> what prevents that, or None.

    What cannot be written is dropped: Python would report it once more when it ends.
    """
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.stdout.flush()
        return error
    except ValueError:  # it is closed
        pass
    return None


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
