"""Progress bars and lines of a report. Output that cannot be written ends nothing: the disk may be full."""

import contextlib
import sys
from collections.abc import Callable
from typing import Any


def bar(**how: Any) -> Any:
    """Make a tqdm bar on standard error; `how` is tqdm's."""
    from tqdm import tqdm

    return tqdm(**how, file=Quiet(sys.stderr))


class Quiet:
    """A stream for progress: what cannot be written to `file`, a stream or None, is dropped."""

    def __init__(self, file: Any):
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def isatty(self) -> bool:
        """Whether a person looks at it."""
        with contextlib.suppress(AttributeError, OSError, ValueError):
            return bool(self._file.isatty())
        return False

    def write(self, text: str) -> int:
        with contextlib.suppress(AttributeError, OSError, ValueError):
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(AttributeError, OSError, ValueError):
            self._file.flush()


def quietly(say: Callable[[str], object]) -> Callable[[str], None]:
    """`say`, but a line that cannot be written ends no run: the disk is full, or nobody reads any more.

    A terminal that lacks a character gets its code.
    """

    def speak(line):
        try:
            say(line)
        except UnicodeEncodeError as error:
            with contextlib.suppress(OSError, ValueError):
                say(line.encode(error.encoding, "backslashreplace").decode(error.encoding))
        except OSError:
            pass

    return speak
