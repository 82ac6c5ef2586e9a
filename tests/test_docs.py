"""docs/architecture.md describes each module, and the documents name only files that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, ARCHITECTURE = ROOT / "longlora", ROOT / "docs/architecture.md"

pytestmark = pytest.mark.skipif(not ARCHITECTURE.exists(), reason="these tests need the source tree")


def described():
    """The files in the tables of docs/architecture.md, relative to the package."""
    for section in ARCHITECTURE.read_text().split("\n### ")[1:]:
        heading, _, body = section.partition("\n")
        folders = re.findall(r"`longlora/(.*?)`", heading)
        for cell in re.findall(r"^\| (`.*?) \|", body, re.M) if folders else []:
            for name in re.findall("`(.*?)`", cell):
                yield name if len(folders) > 1 else folders[0] + name


def test_the_architecture_describes_every_module():
    modules = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")}
    modules = {name for name in modules if not name.endswith(("__init__.py", "__main__.py"))}
    assert modules - set(described()) == set()


def test_the_architecture_describes_only_what_there_is():
    names = list(described())
    assert len(names) == len(set(names))
    assert [name for name in names if not (PACKAGE / name).exists()] == []


def test_links_of_documents_lead_somewhere():
    """Paths from the root in backticks; `<...>` and `*` match any name."""
    for path in (ARCHITECTURE, ROOT / "CONTRIBUTING.md"):
        for name in re.findall(r"`((?:csrc|cuda|docs|tests|benchmarks|longlora)/[^` ]*)`", path.read_text()):
            made = {"softcap", "versions"} & set(re.split(r"\W|test_", name))
            assert made or "<" in name or list(ROOT.glob(name.rstrip("/"))), f"{path.name}: {name}"
