"""Errors that the user can correct, and how messages write what they name. The command line prints such an
error in one line and exits with code 2."""

import difflib
import reprlib
from collections.abc import Iterable

LONGEST = 2000  # characters of a message; what a file holds may be longer than any screen


class UserError(ValueError):
    """An argument or a file is wrong. The message is one line: what was wanted and what was found.

    It may quote a file or its name, so it is made printable. The middle of a long message is left out.
    """

    def __init__(self, message: object) -> None:
        text = " ".join(str(message).splitlines())
        if len(text) > LONGEST:
            text = f"{text[: LONGEST * 3 // 4]} ... {text[-LONGEST // 4 :]}"
        super().__init__(printable(text))


def printable(text: str) -> str:
    """The text with an escape for each character that does not print.

    Control characters could move the terminal's cursor, and half a character cannot be encoded.
    """
    return "".join(letter if letter.isprintable() else _escaped(letter) for letter in text)


def _escaped(letter):
    return letter.encode("unicode_escape").decode("ascii")


def reason(error: Exception) -> str:
    """What a parser says about a file. "it is nested too deeply" for the RecursionError that ends some."""
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)


def counted(count: int, noun: str) -> str:
    """1 thread, 2 threads, 1,000 threads."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Give "; did you mean X?", where X is the known word most like `word`; "" if none is like it."""
    plain = {name.lstrip("-"): name for name in known}  # dashes would make all flags look alike
    near = difflib.get_close_matches(word[:64].lstrip("-"), plain, 1, cutoff=0.7)
    return f"; did you mean {plain[near[0]]}?" if near else ""


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxdict = 3, 5, 5, 5
        self.maxstring = self.maxother = self.maxlong = 300

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write out more than a few thousand digits.
        return (
            super().repr_int(x, level) if x.bit_length() < 10_000 else f"a number of {x.bit_length():,} bits"
        )


def shown(value: object) -> str:
    """The repr of a value that a file or a caller gave, cut short.

    A few lines of YAML can hold a list of a billion items.
    """
    return _Short().repr(value)
