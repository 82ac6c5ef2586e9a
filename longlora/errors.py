"""Errors that the user can correct. The command line prints them in one line and exits with code 2."""


class UserError(ValueError):
    """An argument or a file is wrong. The message is one line: what was wanted and what was found."""

    def __init__(self, message: object) -> None:
        super().__init__(" ".join(str(message).splitlines()))
