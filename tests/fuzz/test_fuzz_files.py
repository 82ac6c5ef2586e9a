"""A few thousand damaged files, the same ones in each run. files.py says how to run more."""

import ast
import subprocess
import sys
from pathlib import Path

COUNT = 3500
KINDS = ("safetensors", "gguf", "config", "index", "adapters", "adapter_weights", "tokenizer")


def fuzz(*arguments):
    program = Path(__file__).with_name("files.py")
    command = [sys.executable, program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=1200)


def test_damaged_files():
    done = fuzz("--count", COUNT)
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr}"
    outcomes = ast.literal_eval(done.stdout)
    assert sum(outcomes.values()) == COUNT
    for kind in KINDS:  # damage that is refused, and damage that does not matter
        assert outcomes[f"{kind} refused"] > COUNT / 20 and outcomes[f"{kind} accepted"] > 5, outcomes


def test_the_same_number_is_the_same_input():
    """Also in a process that did not read the inputs before it."""
    both = fuzz("--count", 28, "--first", 70).stdout
    parts = [ast.literal_eval(fuzz("--count", 14, "--first", first).stdout) for first in (70, 84)]
    total = {kind: sum(part.get(kind, 0) for part in parts) for kind in {*parts[0], *parts[1]}}
    assert ast.literal_eval(both) == total


def test_a_failure_is_reported_with_its_number(tmp_path):
    """The reader of safetensors is replaced by one that fails, crashes and hangs."""
    program = Path(__file__).with_name("files.py")
    text = """if True:
        import os, runpy, sys
        sys.path.insert(0, sys.argv[1])
        import files, corpus
        def broken(self, rng):
            at = int.from_bytes(rng.randbytes(1), "little") % 4
            if at == 0: raise KeyError("a key")
            if at == 1: os.kill(os.getpid(), 11)
            if at == 2:
                while True: pass
        files.Kinds.safetensors, files.LIMIT = broken, 0.3
        sys.argv = ["files.py", "--count", "12", "--kind", "safetensors"]
        sys.exit(files.main())
    """
    command = [sys.executable, "-c", text, str(program.parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 1 and "KeyError: 'a key'" in done.stderr
    assert "ended by SIGSEGV" in done.stderr and "ended by SIGPROF" in done.stderr
    assert ast.literal_eval(done.stdout)["failed"] > 3
