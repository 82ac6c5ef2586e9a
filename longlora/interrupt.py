"""Ctrl-C while a program begins and ends: exit code 130, and no traceback.

Between the two, `longlora.guard` lets Ctrl-C raise KeyboardInterrupt. This file imports next to nothing:
Ctrl-C may come while a file is imported.
"""

import os
import signal


def end(number: int, frame: object) -> None:
    """A handler of signals that ends the process at once."""
    os._exit(128 + number)


def end_quietly() -> None:
    """From now on Ctrl-C ends the process at once, unless it was started to ignore Ctrl-C."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end)
