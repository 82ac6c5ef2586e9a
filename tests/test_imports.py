"""Imports inside the package point one way, from upper floors to lower ones, and make no circle."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "longlora"
# From the bottom up. A module imports from its own floor and those below. `torch` and `cli` are entry points.
FLOORS = (
    ("errors", "disk", "job", "linux", "macos", "progress"),
    ("_C", "arrays", "cuda", "device", "ops"),
    ("memory",),
    ("decoder",),
    ("files",),
    ("data", "plots"),
    ("serving",),
    ("evaluation",),
    ("training",),
    ("tools", "eval"),
    ("cli", "cli_eval", "flags", "guard", "interrupt", "__main__"),
    ("torch",),
)
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
    if path != PACKAGE / "__init__.py"
} | {"_C": PACKAGE / "_C.pyi"}

pytestmark = pytest.mark.skipif(not PACKAGE.exists(), reason="these tests need the source tree")


def imported(path: Path) -> set[str]:
    """The modules of the package that the file imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import; write `from longlora...`"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "longlora":
                candidates = [".".join(parts[1:end]) for end in range(len(parts), 1, -1)]
                found.update([next((module for module in candidates if module in MODULES), "_C")])
    return found


GRAPH = {module: imported(path) - {module} for module, path in MODULES.items()}


def floor(module: str) -> int:
    return FLOOR[module.partition(".")[0]]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_down(module):
    up = [name for name in GRAPH[module] if floor(name) > floor(module)]
    assert not up, f"longlora.{module} imports from a floor above: {up}"


def test_no_module_imports_itself_in_a_circle():
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(f"circular imports: {' -> '.join(error.args[1])}")


def test_only_one_folder_imports_torch():
    for module, path in MODULES.items():
        if not module.startswith("torch"):
            tops = {
                name.partition(".")[0]
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, (ast.Import, ast.ImportFrom))
                for name in (
                    [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                )
            }
            assert not tops & {"torch", "transformers", "peft", "accelerate"}, path
