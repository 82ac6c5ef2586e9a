"""A few thousand random capsules, the same ones in each run. capsules.py says how to run more."""

import ast
import subprocess
import sys
from pathlib import Path

COUNT = 20_000


def test_random_capsules():
    """In a process of its own, which a wrong access would end."""
    program = Path(__file__).with_name("capsules.py")
    done = subprocess.run(
        [sys.executable, program, "--count", str(COUNT)], capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr}"
    outcomes = ast.literal_eval(done.stdout)
    assert sum(outcomes.values()) == COUNT
    assert min(outcomes["accepted"], outcomes["refused"]) > COUNT / 4, outcomes
