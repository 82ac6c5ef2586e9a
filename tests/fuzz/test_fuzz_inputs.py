"""A few thousand files of options, texts and command lines. inputs.py says how to run more."""

import ast
import subprocess
import sys
from pathlib import Path


def fuzz(*arguments):
    program = Path(__file__).with_name("inputs.py")
    command = [sys.executable, program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=1200)


def test_what_users_write_is_taken_or_refused_in_one_line():
    done = fuzz("--count", 2000)
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr}"
    outcomes = ast.literal_eval(done.stdout)
    assert sum(outcomes.values()) == 2000
    for kind in ("yaml", "txt", "jsonl", "flags"):
        assert outcomes[f"{kind} refused"] > 100 and outcomes[f"{kind} accepted"] > 50, outcomes
    assert outcomes["eval refused"] > 50 and outcomes["eval accepted"] > 2, outcomes


def test_a_failure_is_told_with_its_number():
    """A wrong result, a fault and a hang."""
    text = """if True:
        import sys
        sys.path.insert(0, sys.argv[1])
        import inputs
        def broken(rng):
            at = int(rng.random() * 3)
            inputs.check(at != 0, "another text")
            if at == 1: raise KeyError("a key")
            while True: pass
        inputs.KINDS["txt"], inputs.LIMIT = broken, 0.2
        sys.argv = ["inputs.py", "--count", "12", "--kind", "txt"]
        sys.exit(inputs.main())
    """
    command = [sys.executable, "-c", text, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 1 and ast.literal_eval(done.stdout) == {"failed": 12}
    for words in ("input 0 (txt)", "another text", "KeyError: 'a key'", "more than 0.2 seconds"):
        assert words in done.stderr
