"""Errors that are the user's to mend: the command line prints them as one line and exits with code 2."""


class UserError(ValueError):
    """Something given is wrong; the message says what was found and what was wanted, in one line whatever it quotes."""

    def __init__(self, message):
        super().__init__(" ".join(str(message).splitlines()))
