"""The package itself: what the use of a name imports, and how the extension is loaded."""

import os
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from types import SimpleNamespace

import pytest

import longlora
from longlora import job

SETTINGS = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"}


def test_a_module_is_imported_at_its_first_use(monkeypatch):
    monkeypatch.setattr(longlora.importlib, "import_module", lambda *asked: asked)
    for name in ("cuda", "eval", "ops", "torch"):
        assert longlora.__getattr__(name) == (f".{name}", "longlora")


def test_a_tree_without_an_extension_takes_the_package_that_was_installed_from_it(monkeypatch, tmp_path):
    folders = [tmp_path / name / "longlora" for name in ("tree", "other", "installed")]
    tree, other, installed = folders
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("other" if folder == other else "equal")
        (folder / f"_C{EXTENSION_SUFFIXES[0]}").touch()
    monkeypatch.setattr(sys, "path", [str(folder.parent) for folder in folders])
    assert longlora._installed(str(tree)) == [str(tree)]
    (tree / f"_C{EXTENSION_SUFFIXES[0]}").unlink()
    assert longlora._installed(str(tree)) == [str(installed)]
    (installed / f"_C{EXTENSION_SUFFIXES[0]}").unlink()
    assert longlora._installed(str(tree)) == [str(tree)]


@pytest.mark.parametrize("given", [{}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}], ids=str)
@pytest.mark.parametrize("threads", [None, "2"])
def test_the_settings_of_openmp_while_the_extension_loads(monkeypatch, given, threads):
    """The user's settings win. Without a number of threads, the processors of the job limit it."""
    loaded, counts = [], []
    extension = SimpleNamespace(get_num_threads=lambda: 64, set_num_threads=counts.append)

    def load(name, package=None):
        loaded.append((name, {key: os.environ[key] for key in SETTINGS if key in os.environ}))
        return extension

    for key in (*SETTINGS, "OMP_NUM_THREADS"):
        monkeypatch.delenv(key, raising=False)
    for key, value in {**given, **({} if threads is None else {"OMP_NUM_THREADS": threads})}.items():
        monkeypatch.setenv(key, value)
    before = dict(os.environ)
    monkeypatch.delitem(sys.modules, "longlora._C")
    monkeypatch.setattr(longlora.importlib, "import_module", load)
    monkeypatch.setattr(job, "processors", lambda: 3)
    assert longlora._compiled() is extension
    assert loaded == [("numpy", given or SETTINGS), ("._C", given or SETTINGS)]
    assert dict(os.environ) == before
    assert counts == ([3] if threads is None else [])
