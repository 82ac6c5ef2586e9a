"""The mutation tools find gaps of tests, leave the tree as it was, and go on where they stopped."""

import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "mutation"))
import c  # noqa: E402
import operators  # noqa: E402
import results  # noqa: E402

TOOL = Path(__file__).with_name("mutation") / "python.py"
TOY = '''"""A toy."""


def clip(x, low=0):
    """The larger one."""
    if x < low:
        raise ValueError(f"{x} is too small")
    return x + 1
'''
TESTS = """from longlora.toy.clip import clip

def test_one_more():
    assert clip(3) == 4
"""


def run(tree, *options):
    command = [sys.executable, TOOL, "toy", "--count", "1000", *options]
    outside = {k: v for k, v in os.environ.items() if k not in ("PYTHONSAFEPATH", "PYTHONPATH")}
    outside["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # quicker, and there is nothing for plugins to do
    done = subprocess.run(command, cwd=tree, env=outside, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_gap_is_found_and_nothing_changes(tmp_path):
    package, tests = tmp_path / "longlora/toy", tmp_path / "tests/toy"
    first = "def test_it():\n    import longlora.toy.clip"  # it alone runs the line of `def`
    files = (package, "clip.py", TOY), (tests, "test_clip.py", TESTS), (tests, "test_a.py", first)
    for folder, name, text in files:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (tmp_path / "longlora/__init__.py").write_text("")  # it comes before an installed package
    out = run(tmp_path)
    survived = [line for line in out.splitlines() if line.startswith("survived:")]
    # A lower limit of 1, `<=` for `<` and no error at all: x = 3 tells nothing about them.
    assert [line.partition(" -> ")[2] for line in survived] == [
        "def clip(x, low=1):",
        "if (x <= low):",
        "pass",
    ]
    assert "3 noticed, 0 timeout, 3 survived, 0 no test of 6: 50.0 %" in out
    assert (package / "clip.py").read_text() == TOY
    (tests / "test_clip.py").write_text(
        "import pytest\n" + TESTS + "    assert clip(0) == 1\n"
        "    with pytest.raises(ValueError):\n        clip(-0.5)\n"
    )
    out = run(tmp_path, "--again")
    assert out.count(" s: longlora/") == 3 and "6 noticed, 0 timeout, 0 survived" in out


def changes(line):
    return {mutant.then for mutant in operators.mutants(f"def f():\n    {line}\n")}


def test_the_faults_of_a_line():
    assert changes("return a <= 2") == {"return (a < 2)", "return a <= 3", "return None"}
    assert changes("x = a and not b") == {"x = (a)", "x = (not b)", "x = a and (b)"}
    assert changes("f(a, key=True)") == {"(f(a))", "f(a, key=False)", "pass"}
    assert changes("x: int = 'é' + y") == {"x: int = 'é~' + y", "x: int = ('é' - y)"}
    assert changes("while f(): break") == {"while (not f()): break", "while f(): continue"}
    assert changes('"""Words."""') == set() and changes('raise E("words")') == {"pass"}


def test_equivalent_txt_lists_only_mutants_of_the_current_code(monkeypatch):
    monkeypatch.chdir(TOOL.parents[2])
    lines = results.EQUIVALENT.read_text().splitlines()
    assert lines == sorted(lines) and all(line.partition("  # ")[2] for line in lines)
    sources = [*Path("csrc").rglob("*.[ch]"), *Path("cuda").glob("*.cu*")]
    keys = {key for path in sources for key, _ in c.mutants(path)}
    for path in Path("longlora").rglob("*.py"):
        keys |= {f"{path}:{m.function}: {m.was} -> {m.then}" for m in operators.mutants(path.read_text())}
    assert {line.partition("  # ")[0] for line in lines} <= keys


def test_the_faults_of_c(tmp_path):
    """Comments, strings, directives, floats and names with digits stay."""
    path = tmp_path / "x.c"
    path.write_text('#if A < 1\n/* a < b\n   1 + 2 */\n    f32(x, 1.5, "3 - 4"); // 5\n    y[2] = a < *b;\n')
    found = [place for _, place in c.mutants(path)]
    assert [path.read_text()[begin:end] for _, begin, end, _ in found] == [
        'f32(x, 1.5, "3 - 4");',
        " < ",
        "2",
        "y[2] = a < *b;",
    ]
    assert [now for *_, now in found] == [";", " <= ", "3", ";"]


def test_a_header_costs_the_files_that_include_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = {"csrc/a.h": "", "csrc/in/b.h": '#include "../a.h"\n', "csrc/in/x.c": '#include "b.h"\n'}
    texts |= {"cuda/y.cu": '#include "c.cuh" /* why */\n#include "../csrc/a.h"\n', "csrc/z.c": "int a;\n"}
    for name, text in texts.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)
    users = {name: list(map(str, c.users(Path(name)))) for name in texts}
    assert users.pop("csrc/a.h") == ["csrc/in/x.c", "cuda/y.cu"]
    assert users.pop("csrc/in/b.h") == ["csrc/in/x.c"]
    assert all(by == [name] for name, by in users.items())
