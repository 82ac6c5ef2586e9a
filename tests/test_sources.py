"""House rules that a machine can check: places of an op, includes, warnings, import, sizes of files."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from concurrent.futures import ThreadPoolExecutor
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import effort
import numpy
import pytest
import reference

from longlora import _C, ops

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(ROOT.glob("csrc/**/*.[ch]"))
OPS_H = (ROOT / "csrc/ops.h").read_text()
# Ops that longlora.ops renames, and small ops that share a file.
PYTHON_NAME = {"sum_squares": "global_norm"}
STEM = {"accumulate": "cast", "scale": "cast", "sum_squares": "cast"}


def stem(op):
    return STEM.get(op, re.sub("_(forward|backward)$", "", op))


@pytest.mark.parametrize("op", _C.specs)
def test_one_op_one_stem(op):
    """An op is declared in ops.h, implemented in csrc/cpu, callable, in the reference, and tested."""
    assert f"DECLARE_OP({op})" in OPS_H
    code = (ROOT / f"csrc/cpu/{stem(op)}.c").read_text()
    assert f"CPU({op})(" in code
    name = PYTHON_NAME.get(op, op)
    assert len(getattr(ops, name).__doc__) > 20
    assert hasattr(reference, name) or hasattr(reference, op)
    tests = [
        p
        for p in ROOT.glob("tests/**/test_*.py")
        if p.name not in ("test_sources.py", "test_threads.py") and p.parent.name != "binding"
    ]
    assert any(re.search(rf"\b({name}|{op}|{stem(op)})\b", p.read_text()) for p in tests), (
        f"no test file has {name}"
    )
    differences = ROOT / "tests/ops/test_reference.py"
    assert not op.endswith("_backward") or f"reference.{op}(" in differences.read_text(), (
        f"{differences.name} does not compare reference.{op} with finite differences"
    )


def test_every_declared_op_is_in_the_table():
    assert sorted(re.findall(r"^DECLARE_OP\((\w+)\)", OPS_H, re.M)) == sorted(_C.specs)


def test_every_struct_has_a_comment():
    """A comment above the structs of an op, or of its forward and backward, says what the op computes."""
    struct = r"typedef struct \{\n(?:    .*\n)+\} \w+;\n"
    found = re.findall(rf"(.*)\n((?:{struct})+)((?:DECLARE_\w+\(.*\)\n)+)", OPS_H)
    declared = re.findall(r"DECLARE_OP\((\w+)\)", "".join(lines for _, _, lines in found))
    assert sorted(declared) == sorted(_C.specs)
    for before, structs, _ in found:
        assert before.rstrip().endswith("*/"), f"structs of ops.h without a comment: {structs}"


def test_only_the_binding_knows_python():
    """Only binding.h includes Python.h, and only the files of csrc/python include binding.h."""
    included = {p.name: re.findall(r"#include *[<\"]([^>\"]*)", p.read_text()) for p in SOURCES}
    assert [name for name, headers in included.items() if "Python.h" in headers] == ["binding.h"]
    binding = [p.name for p in SOURCES if p.parent.name == "python" and p.suffix == ".c"]
    assert [name for name, headers in included.items() if "binding.h" in headers] == binding


def functions_and_calls(path):
    """-> the functions of a C file that other files may call, all that it defines, all that it calls."""
    left_out = r'(?s:/\*.*?\*/)|"(?:\\.|[^"\\\n])*"|^#(?:.*\\\n)*.*'  # comments, strings, directives
    text = re.sub(r"\bCPU\((\w+)\)", r"\1", re.sub(left_out, "", path.read_text(), flags=re.M))
    defined = re.findall(r"^(\w[^;={}()]*?)\b(\w+)\([^;{}]*\)\s*\{", text, re.M)
    public = {name for kind, name in defined if "static" not in kind and "INLINE" not in kind}
    return public, {name for _, name in defined}, set(re.findall(r"(?<![\w.>])(\w+)\(", text))


@pytest.mark.parametrize("pattern", ["csrc/**/*.c", "cuda/**/*.cu"])
def test_no_c_files_call_each_other_in_a_circle(pattern):
    files = {str(path.relative_to(ROOT)): functions_and_calls(path) for path in ROOT.glob(pattern)}
    graph = {
        name: {other for other, (public, _, _) in files.items() if other != name and public & (calls - own)}
        for name, (_, own, calls) in files.items()
    }
    assert sum(map(len, graph.values())) > 3, "the calls were not found"
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"calls in a circle: {' -> '.join(error.args[1])}")


def test_nothing_below_the_binding_prints_or_ends_the_process():
    for path in SOURCES:
        if path.name != "dlpack.h":
            assert not re.search(r"(?<![\w.])(printf|puts|exit|abort|assert)\s*\(", path.read_text()), path


def test_files_say_what_they_are():
    for path in SOURCES:
        if path.name != "dlpack.h":
            assert path.read_text().startswith(f"/* {path.name} --- "), path
    for path in ROOT.glob("longlora/**/*.py"):
        if path.name != "__main__.py":
            assert path.read_text().startswith('"""'), path


def test_nothing_is_left_to_do():
    files = [p for p in SOURCES if p.name != "dlpack.h"]
    for folder in ("longlora", "tests", "benchmarks", "demo"):
        files += ROOT.glob(f"{folder}/**/*.py")
    for path in [*files, ROOT / "setup.py"]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert not re.search(r"\b(TO" r"DO|FIX" r"ME|X" r"XX)\b", line), (
                f"{path.relative_to(ROOT)}:{number}"
            )


# ---- the import ----------------------------------------------------------------------------------


def test_import_is_light():
    script = (
        "import sys, numpy; before = set(sys.modules); import longlora; print(*set(sys.modules) - before)"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    ).stdout.split()
    outside = {m.partition(".")[0] for m in loaded} - sys.stdlib_module_names - {"longlora"}
    assert not outside, f"import longlora also imports {outside}"


def test_the_extension_is_imported_by_one_way_only():
    """From the package, which first sets how the threads of OpenMP wait."""
    for path in ROOT.glob("longlora/**/*.py"):
        if path != ROOT / "longlora/__init__.py":
            assert not re.search(
                r"(?<!torch\.)\b_C import|import .*longlora\._C|import_module\(.*_C", path.read_text()
            ), path


def test_import_is_quick():
    """1,000 calls; the import of NumPy takes 145,000, and a tenth of a second."""
    script = effort.IMPORT + "with calls() as counted:\n    import longlora\nprint(counted.count)"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 20_000


# ---- the compilers -------------------------------------------------------------------------------


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_no_warning(compiler):
    """Both compilers compile every file with -Wall -Wextra. They read the kernels with AVX-512, too."""
    if not shutil.which(compiler):
        pytest.skip(f"{compiler} is not installed")
    include = sysconfig.get_paths()["include"]
    if not os.path.exists(os.path.join(include, "Python.h")):
        pytest.skip("Python's headers are not installed")
    x86 = os.uname().machine == "x86_64"
    avx512 = "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq".split()
    common = [
        compiler,
        *"-std=c11 -Wall -Wextra -Werror -O1 -fPIC -fopenmp -Icsrc -S -o -".split(),
        *["-DLONGLORA_X86"] * x86,
    ]
    jobs = []
    for source in [*ROOT.glob("csrc/*.c"), *ROOT.glob("csrc/python/*.c")]:
        jobs.append([source, "-DPy_LIMITED_API=0x030b0000", "-I" + include, "-I" + numpy.get_include()])
    for source in ROOT.glob("csrc/cpu/**/*.c"):
        jobs.append([source, "-DISA=portable"])
        if x86 and source.name != "parallel.c":
            jobs.append([source, "-DISA=avx512", "-fsyntax-only", *avx512])

    def compile_(job):
        source, *flags = job
        command = [*common, *flags, str(source)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        return done.stderr if done.returncode else ""

    probe = [compiler, "-fopenmp", "-fsyntax-only", "-x", "c", "-"]
    if subprocess.run(probe, input="#include <omp.h>\n", capture_output=True, text=True).returncode:
        pytest.skip(f"{compiler} has no omp.h here (clang's is in the package libomp-dev)")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        assert "".join(pool.map(compile_, jobs)) == ""


LONGEST_FILE, LONGEST_FUNCTION = 600, 80  # lines


def functions_of(path):
    """(name, lines) of each function. In C it begins at the left margin and ends with a brace there."""
    lines = path.read_text().splitlines()
    if path.suffix == ".py":
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield node.name, node.end_lineno - node.lineno + 1
        return
    first = None
    for number, line in enumerate(lines):
        if re.match(r"[A-Za-z_].*[({,]$", line) and "#" not in line and first is None:
            first = number
        if line.startswith("}") and first is not None:
            yield lines[first], number - first + 1
        if line.startswith("}") or line.endswith(";") and not line.startswith(" "):
            first = None


@pytest.mark.parametrize(
    "place", ["csrc", "cuda", "longlora", "tests", "benchmarks", "examples", "demo", "setup.py"]
)
def test_files_and_functions_are_short(place):
    files = [
        p
        for p in [ROOT / place, *(ROOT / place).rglob("*")]
        if p.suffix in (".py", ".c", ".h", ".cu", ".cuh", ".cpp")
    ]
    assert files
    for path in files:
        if path.name == "dlpack.h":  # vendored
            continue
        lines = len(path.read_text().splitlines())
        assert lines <= LONGEST_FILE, f"{path.relative_to(ROOT)} has {lines} lines, above {LONGEST_FILE}"
        long = {name: count for name, count in functions_of(path) if count > LONGEST_FUNCTION}
        assert not long, f"{path.relative_to(ROOT)}: functions above {LONGEST_FUNCTION} lines: {long}"


def test_every_file_of_the_package_is_shipped():
    """What is no Python file, such as the server's page, is in the wheel if a pattern names it."""
    package = ROOT / "longlora"
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    shipped = {path for pattern in table["package-data"]["longlora"] for path in package.glob(pattern)}
    others = {
        path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc", ".so")
    }
    assert package / "serving/page.html" in others <= shipped
