"""Every example runs unchanged, made short by STEPS. Examples on arrays compare their results themselves."""

import ast
import runpy
import sys
import tempfile
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
def test_runs(path, tmp_path, monkeypatch, capsys):
    source = path.read_text()
    assert ast.get_docstring(ast.parse(source)), "an example begins with what it shows"
    assert 10 <= len(source.splitlines()) <= 30
    for peer in PEERS:
        if peer in needed(source):
            pytest.importorskip(peer, reason=f"the example uses {peer}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STEPS", "3")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.strip(), "an example prints what it found"
