"""How much work a piece of code does, told by the functions it calls.

How long a test takes depends on the machine and its load. The number of calls does not, so tests limit that.
"""

import contextlib
import os
import sys

# Put this before a script that runs in another process: it can then count its calls as well.
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
    # The code under test may catch the exception that ends the counting, so the count is checked again.
    assert counted.count <= most, f"more than {most:,} calls"
