"""Errors that the user can correct. The command line prints them in one line and exits with code 2."""


class UserError(ValueError):
    """An argument or a file is wrong. The message is one line that says what was found and what was expected."""

    def __init__(self, message: object) -> None:
        super().__init__(" ".join(str(message).splitlines()))
