"""How much work a piece of code does, told by the functions it calls.

The time that a test takes depends on the machine and on what else it does. The number of calls does not, so a
test can limit it.
"""

import contextlib
import os
import sys

# The beginning of a script for a process of its own that counts too.
IMPORT = f"import sys; sys.path.append({os.path.dirname(__file__)!r}); from effort import calls\n"


class Calls:
    """How many functions, of Python or of C, have been called so far: `count`."""

    def __init__(self, most):
        self.count, self.most = 0, most

    def __call__(self, frame, event, argument):
        self.count += event in ("call", "c_call")
        if self.count > self.most:  # at once, because the code under test may never end
            raise AssertionError(f"more than {self.most:,} calls")


@contextlib.contextmanager
def calls(most=float("inf")):
    """Count the calls of this thread in the body -> Calls. AssertionError above `most`."""
    counted, before = Calls(most), sys.getprofile()
    sys.setprofile(counted)
    try:
        yield counted
    finally:
        sys.setprofile(before)
    # Code that catches every exception has swallowed the one above.
    assert counted.count <= most, f"more than {most:,} calls"
