"""Errors that the user can correct. The command line prints them in one line and exits with code 2."""

LONGEST = 2000  # characters of a message; what a file holds may be longer than any screen


class UserError(ValueError):
    """An argument or a file is wrong. The message is one line: what was wanted and what was found.

    It may quote a file or its name, so control characters and other characters that do not print are escaped:
    they could move the terminal's cursor, or fail to be encoded. The middle of a long message is left out.
    """

    def __init__(self, message: object) -> None:
        text = " ".join(str(message).splitlines())
        if len(text) > LONGEST:
            text = f"{text[: LONGEST * 3 // 4]} ... {text[-LONGEST // 4 :]}"
        super().__init__("".join(letter if letter.isprintable() else _escaped(letter) for letter in text))


def _escaped(letter):
    return letter.encode("unicode_escape").decode("ascii")
