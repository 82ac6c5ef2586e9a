"""Signals that end a run after its current step, with everything saved."""

import contextlib
import os
import signal
import sys
import threading
import time
from typing import Any

# Those that ask for an end, and those by which batch systems warn before they end a job.
ASK = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
WARN = (signal.SIGUSR1, signal.SIGXCPU)
NOW = (signal.SIGINT, signal.SIGTERM)
# `timeout`, batch systems and launchers send one request as several signals. What comes within this many
# seconds of the first one belongs to it.
TOGETHER = 1.0


class Stop:
    """Remembers the first signal while it is entered, so that the step ends and is saved before the run.

    A SIGINT or SIGTERM that comes more than TOGETHER seconds later means now: KeyboardInterrupt. SIGHUP under
    nohup stays ignored. `signal` is the first one's number, or None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            for number in (*ASK, *WARN):
                before = signal.getsignal(number)
                # None: a library has a handler of its own there, which Python could not restore.
                if before is not None and (number in NOW or before != signal.SIG_IGN):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number, frame):
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._since = number, now
            text = (
                f"\n{signal.Signals(number).name}: finishing and saving this step; a SIGINT or SIGTERM after "
                f"{TOGETHER:g} s ends the run at once and loses what is not saved\n"
            )
            # The signal may have interrupted print, and standard error may be closed. Without a standard
            # error, descriptor 2 is a file of the run.
            if sys.__stderr__ is not None:
                with contextlib.suppress(OSError):
                    os.write(2, text.encode())
        elif number in NOW and now - self._since > TOGETHER:
            raise KeyboardInterrupt

    def __exit__(self, *unused: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
