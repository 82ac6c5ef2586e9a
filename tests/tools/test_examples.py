"""Every example runs unchanged, made short by STEPS. Examples on arrays compare their results themselves."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
PEERS = ("torch", "transformers", "peft")
# Packages that our modules need for the functions that examples call.
NEEDS = {"longlora.torch": {"torch", "transformers", "peft"}, "longlora.torch.ops": {"torch"}}


def needed(source):
    """The packages that the script imports, directly or through our modules."""
    modules = [
        name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
    ]
    return {name.partition(".")[0] for name in modules}.union(*(NEEDS.get(name, ()) for name in modules))


def test_there_are_examples():
    assert EXAMPLES


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_runs(path, tmp_path):
    source = path.read_text()
    assert ast.get_docstring(ast.parse(source)), "an example begins with what it shows"
    assert 10 <= len(source.splitlines()) <= 30
    for peer in PEERS:
        if peer in needed(source):
            pytest.importorskip(peer, reason=f"the example uses {peer}")
    done = subprocess.run(
        [sys.executable, path],
        cwd=tmp_path,
        env={**os.environ, "STEPS": "3", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip(), "an example prints what it found"
