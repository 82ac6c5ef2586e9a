"""Puts one fault at a time into a file of C or CUDA, and runs tests/ops and tests/binding on the extension.

    python tests/mutation/c.py [--count N] [--seed S] [--again] [--only EXPRESSION] [--cuda]

It works on a copy of the working directory, which is built for portable instructions alone: one object is
compiled for each mutant, of a header those of all files that include it. A mutant with objects that are the
same to the byte computes the same. --cuda takes cuda/*.cu and *.cuh and csrc/workspace.*, compiled for the
emulated GPU, in place of csrc, and tests/cuda in place of tests/binding. The test files run once, to see how
long each test takes. A mutant costs the tests of its op, the quickest first, until one fails or five seconds
are over. --again tries only what survived, with all tests of all files that use it. Results:
build/mutation/c.jsonl and cuda.jsonl.
"""

import hashlib
import itertools
import json
import math
import os
import re
import runpy
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import python
import results

LIMIT = 900  # seconds of processor time for a test file
# Tests of other builds and of the reference; what begins the whole package.
LEFT_OUT = {"test_wide", "test_pool", "test_reference", "test_build_cuda", "test_cuda_emulation"}
LEFT_OUT |= {"test_cuda_generate", "test_cuda_train", "test_mirror", "test_sources_cuda"}
SWAPS = {
    **{" < ": " <= ", " <= ": " < ", " > ": " >= ", " >= ": " > ", " == ": " != ", " != ": " == "},
    **{" && ": " || ", " || ": " && ", " + ": " - ", " - ": " + ", " * ": " + ", " / ": " * ", " % ": " / "},
    **{" += ": " -= ", " -= ": " += ", " *= ": " += ", " << ": " >> ", " >> ": " << ", " & ": " | "},
    **{" | ": " & ", "break;": "continue;", "continue;": "break;", "MIN(": "MAX(", "MAX(": "MIN("},
}
SWAP = re.compile("|".join(map(re.escape, SWAPS)))
NUMBER = re.compile(r"(?<![\w.])\d+(?![\w.])")
STATEMENT = re.compile(r"(?<=    )[\w\[\]().>*-]+(?: [+*|-]?= .*|\(.*\));(?=\s*$)")
FUNCTION = re.compile(
    r"(?=\w)[^=;(]*?(?:(?:__attribute__\(\(\w+\)\)|__launch_bounds__\([^)]*\))[^=;(]*?)?"
    r"(?:CPU\()?(?<!\w)(\w+)\)?\("
)
TEXT = re.compile(r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"', re.DOTALL)
STAGE = re.compile("_(forward|backward)$")
INCLUDE = re.compile(r'^#include "(?:.*/)?(.*)"', re.MULTILINE)
Place = tuple[Path, int, int, str]  # bytes from begin to end of a file become these


def mutants(path: Path) -> Iterator[tuple[str, Place]]:
    """-> key, place."""
    source = path.read_text()
    at, function = 0, ""
    code = TEXT.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), source)
    for line in code.splitlines(keepends=True):
        if begins := FUNCTION.match(line):
            function = begins[1]
        if not line.startswith("#"):
            found = [(m.start(), m.end(), SWAPS[m[0]]) for m in SWAP.finditer(line)]
            found += [(m.start(), m.end(), str(int(m[0]) + 1)) for m in NUMBER.finditer(line)]
            found += [(m.start(), m.end(), ";") for m in STATEMENT.finditer(line)]
            for begin, end, now in found:
                was = source[at : at + len(line)]
                then = was[:begin] + now + was[end:]
                yield f"{path}:{function}: {was.strip()} -> {then.strip()}", (path, at + begin, at + end, now)
        at += len(line)


def users(path: Path) -> list[Path]:
    """The sources that are compiled again for a change of a file: itself, or all that include the header."""
    if path.suffix in (".c", ".cu"):
        return [path]
    files = [file for top in ("csrc", "cuda") for file in sorted(Path(top).rglob("*.*"))]
    includes = {file: INCLUDE.findall(file.read_text()) for file in files}  # no two headers have one name
    by = [file for file in files if path.name in includes[file]]
    return sorted({user for file in by for user in users(file)})


class Extension:
    """The copy's extension, built again for each mutant."""

    def __init__(self, cuda: bool):
        self._cuda, self._objects = cuda, python.ROOT / "build/mutation/objects"
        setup = Path("setup.py")
        when, text = setup.stat(), setup.read_text()
        one = re.sub("^X86 = .*", "X86 = False", text, flags=re.MULTILINE)
        assert one != text, "setup.py chooses its instruction sets in another way"
        setup.write_text(one)
        os.utime(setup, ns=(when.st_atime_ns, when.st_mtime_ns))
        for built in Path("longlora").glob("_C*.so"):
            built.unlink()

    def build(self) -> bool:
        def setup() -> int:
            os.environ["LONGLORA_CUDA"] = "emulation" if self._cuda else "0"
            sys.argv = ["setup.py", "-q", "build_ext", "--inplace", "--build-temp", str(self._objects)]
            runpy.run_path("setup.py", run_name="__main__")
            return 0

        return python.forked(setup, 600, Path("build.log")) == 0

    def try_mutant(self, place: Place, own: list[str], tests: python.Tests, most: float) -> str:
        """-> one of results.KINDS. most: seconds of tests, about."""
        path, begin, end, now = place
        text, when = path.read_text(), path.stat()
        made = [file for user in users(path) for file in self._objects.glob(f"*/{user.with_suffix('')}.*o")]
        objects = {file: file.read_bytes() for file in made}
        try:
            path.write_text(text[:begin] + now + text[end:])
            os.utime(path, ns=(when.st_atime_ns, when.st_mtime_ns))  # only what is removed is compiled
            for file in objects:
                file.unlink()
            if not self.build():
                return "not compiled"
            # Objects of builds with other flags lie beside them, and are not made again.
            if all(file.read_bytes() == data for file, data in objects.items() if file.exists()):
                return "equivalent"
            return run(own, tests, most)
        finally:
            path.write_text(text)
            os.utime(path, ns=(when.st_atime_ns, when.st_mtime_ns))
            for file, data in objects.items():
                file.write_bytes(data)


def run(own: list[str], tests: python.Tests, most: float) -> str:
    """Run the tests of the file's own test files, the quickest first, then the others in the same way."""
    rank = [test for test, facts in sorted(tests.items(), key=lambda pair: pair[1]["seconds"])]
    rank.sort(key=lambda test: test.partition("::")[0] not in own)
    before = itertools.accumulate((tests[test]["seconds"] for test in rank), initial=0.0)
    order = [test for test, seconds in zip(rank, before) if seconds < most]
    chosen = python.Chosen(order)
    limit = 10 + 3 * sum(tests[test]["seconds"] for test in order)
    command = (sorted({test.partition("::")[0] for test in order}), chosen, "-x", "--assert=plain")
    code = python.forked(lambda: python.run_tests(*command), limit, Path("mutant.log"), waits=5)
    return "timeout" if code is None else "survived" if code == 0 else "noticed"


def times(files: list[str], cuda: bool, store: Path) -> python.Tests:
    """-> the tests of the files, and how long each takes. Files that did not change: from `store`."""
    known = json.loads(store.read_text()) if store.exists() else {}
    for path in files:
        key = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        if known.get(path, {}).get("key") != key:
            print(f"runs {path}", flush=True)

            def measure(path: str = path, key: str = key) -> int:
                plugin = python.Map("none of the lines")
                code = python.run_tests([path], plugin, *["-k", "cuda"] * (cuda and "/ops/" in path))
                Path("times.json").write_text(json.dumps(dict(key=key, tests=plugin.tests)))
                return code

            if python.forked(measure, LIMIT, Path("times.log")) not in (0, 5):
                raise SystemExit(f"{path} fails without a fault:\n{Path('times.log').read_text()[-4000:]}")
            known[path] = json.loads(Path("times.json").read_text())
            store.parent.mkdir(parents=True, exist_ok=True)
            store.write_text(json.dumps(known))
    return {test: facts for path in files for test, facts in known[path]["tests"].items()}


def tests_of(path: Path, cuda: bool) -> tuple[list[str], list[str]]:
    """The test files that try a file itself, or the files that include it, and others that use it."""
    if path.suffix in (".h", ".cuh"):
        found = [tests_of(user, cuda) for user in users(path)]
        own, others = (sorted({test for pair in found for test in pair[i]}) for i in range(2))
        return own, [test for test in others if test not in own]
    folders = ("ops", "cuda") if cuda else ("ops", "binding")
    ops, others = (sorted(Path("tests", folder).glob("test_*.py")) for folder in folders)
    ops = [file for file in ops if file.stem not in LEFT_OUT]
    others = [file for file in others if file.stem not in LEFT_OUT]
    gemm = "matmul|lora_linear|linear_cross_entropy|cublas"
    words = gemm if "gemm" in str(path) else STAGE.sub("", path.stem)
    own = [file for file in ops + others * cuda if re.search(words, file.name)]
    ops, others = ([file for file in files if file not in own] for files in (ops, others))
    ops = [file for file in ops if not own or re.search(words, file.read_text())]
    if cuda and not own or path.parent.name == "python":
        own, ops, others = others, ops * cuda, []
    return list(map(str, own)), list(map(str, ops + others * (cuda or not own)))


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--cuda", action="store_true", help="the files of a GPU, emulated")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    # Threads that wait cost processor time; plugins have nothing to do.
    os.environ |= {"OMP_WAIT_POLICY": "passive", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    name, store = "cuda" if args.cuda else "c", python.ROOT / "build/mutation"
    with python.scratch():
        gpu = sorted([*Path("cuda").glob("*.cu*"), *Path("csrc").glob("workspace.*")])
        paths = gpu if args.cuda else sorted({*Path("csrc").rglob("*.[ch]")}.difference(gpu))
        paths = [path for path in paths if re.search(args.only, str(path))]
        keys = dict(found for path in paths for found in mutants(path))
        wanted = results.sample(set(keys), args.count, args.seed)
        python.load(["numpy", "hypothesis", "torch", "jax", "setuptools.command.build_ext"])
        extension = Extension(args.cuda)
        if not extension.build():
            raise SystemExit("the extension cannot be built")
        log, most = store / f"{name}.jsonl", math.inf if args.again else python.TOGETHER
        todo, known = results.to_try(log, wanted, args.again), store / f"{name}.times.json"
        chosen = {}
        for path in {keys[key][0] for key in todo}:
            own, others = tests_of(path, args.cuda)
            chosen[path] = own, times(own + others * (args.again or not own), args.cuda, known)
        results.try_all(log, todo, lambda key: extension.try_mutant(keys[key], *chosen[keys[key][0]], most))
        results.show(log, wanted)


if __name__ == "__main__":
    main()
