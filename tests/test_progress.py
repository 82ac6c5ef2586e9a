"""Progress goes to a stream that may fail."""

import io
import sys

import pytest

from longlora import progress


class Failing:
    """A stream on which every call raises the error."""

    def __init__(self, error):
        self.isatty = self.write = self.flush = lambda *text: self.fails(error)

    def fails(self, error):
        raise error


@pytest.mark.parametrize("file", [None, *map(Failing, (OSError(28, "full"), ValueError("closed")))])
def test_a_stream_that_fails_is_silent(file):
    quiet = progress.Quiet(file)
    assert quiet.write("four") == 4 and quiet.flush() is None and quiet.isatty() is False


def test_a_stream_that_works_is_used():
    class Terminal(io.StringIO):
        encoding = "ascii"
        flushed = 0

        def isatty(self):
            return 1

        def flush(self):
            self.flushed += 1

    file = Terminal()
    quiet = progress.Quiet(file)
    assert quiet.write("four") == 4 and quiet.isatty() is True and quiet.encoding == "ascii"
    quiet.flush()
    assert file.getvalue() == "four" and file.flushed == 1


def test_a_bar_is_on_standard_error(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress.bar(total=7, desc="reads") as bar:
        bar.update(7)
    assert "reads" in sys.stderr.getvalue() and "7/7" in sys.stderr.getvalue()


@pytest.mark.parametrize(
    "error, tried",
    [
        (OSError(28, "full"), ["é"]),
        (UnicodeEncodeError("ascii", "é", 0, 1, "no"), ["é", r"\xe9"]),
        (UnicodeEncodeError("latin-1", "é", 0, 1, "no"), ["é", "é"]),
    ],
)
def test_lines_that_cannot_be_written_end_nothing(error, tried):
    said = []

    def say(line):
        said.append(line)
        raise error

    progress.quietly(say)("é")
    assert said == tried
    for other in (ValueError("closed"), KeyError()):
        error = other
        with pytest.raises(type(other)):
            progress.quietly(say)("a fault of ours")
