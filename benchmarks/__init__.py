"""Compares our speed with that of peers, one file per op. `python -m benchmarks` runs all of them."""

import sys

from longlora.interrupt import end_quietly

if sys.argv[0] == "-m":  # Python begins a program of this folder: Ctrl-C ends it without a traceback
    end_quietly()
