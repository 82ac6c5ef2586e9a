"""Every notebook runs from the first cell to the last, made short by SMOKE=1."""

import os
from pathlib import Path

import pytest

import longlora

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, tmp_path, monkeypatch):
    import nbclient
    import nbformat

    monkeypatch.setenv("SMOKE", "1")
    # The kernel runs in its own process and must import the package under test, and benchmarks from the tree.
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONPATH", str(Path(longlora.__file__).parent.parent), prepend=os.pathsep)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    notebook = nbformat.read(path, as_version=4)
    committed = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert committed, "notebooks are committed with their outputs"
    assert path.stat().st_size < 1 << 20
    assert not any(output.output_type == "error" for output in committed)
    nbclient.NotebookClient(
        notebook, timeout=3600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
