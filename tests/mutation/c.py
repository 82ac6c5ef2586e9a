"""Puts one fault at a time into a file of C or CUDA, and runs tests/ops and tests/binding on the extension.

    python tests/mutation/c.py [--count N] [--seed S] [--again] [--only WORDS] [--cuda]

It works on a copy of the working directory, which is built for portable instructions alone: one object is
compiled for each mutant. --cuda takes cuda/*.cu instead of csrc, compiled for the emulated GPU. A mutant with
an object that is the same to the byte computes the same. Results: build/mutation/c.jsonl and cuda.jsonl.
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import python
import results

LIMIT = 900  # seconds for the tests of a mutant
SWAPS = {
    **{" < ": " <= ", " <= ": " < ", " > ": " >= ", " >= ": " > ", " == ": " != ", " != ": " == "},
    **{" && ": " || ", " || ": " && ", " + ": " - ", " - ": " + ", " * ": " + ", " / ": " * ", " % ": " / "},
    **{" += ": " -= ", " -= ": " += ", " *= ": " += ", " << ": " >> ", " >> ": " << ", " & ": " | "},
    **{" | ": " & ", "break;": "continue;", "continue;": "break;", "MIN(": "MAX(", "MAX(": "MIN("},
}
SWAP = re.compile("|".join(map(re.escape, SWAPS)))
NUMBER = re.compile(r"(?<![\w.])\d+(?![\w.])")
STATEMENT = re.compile(r"(?<=    )[\w\[\]().>*-]+(?: [+*|-]?= .*|\(.*\));(?=\s*$)")
FUNCTION = re.compile(r"\w[^=;(]*?(?:__attribute__\(\(\w+\)\)[^=;(]*?)?(?:CPU\()?(\w+)\)?\(")
TEXT = re.compile(r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"', re.DOTALL)
STAGE = re.compile("_(forward|backward)$")
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
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--build-temp"]
        wanted = os.environ | {"LONGLORA_CUDA": "emulation" if self._cuda else "0"}
        return not subprocess.run([*command, self._objects], env=wanted, capture_output=True).returncode

    def try_mutant(self, place: Place, tests: list[str]) -> str:
        """-> one of results.KINDS."""
        path, begin, end, now = place
        text, when = path.read_text(), path.stat()
        objects = {made: made.read_bytes() for made in self._objects.rglob(f"{path.stem}.*o")}
        try:
            path.write_text(text[:begin] + now + text[end:])
            if not self.build():
                return "not compiled"
            if all(made.read_bytes() == data for made, data in objects.items()):
                return "equivalent"
            return self.run(tests)
        finally:
            path.write_text(text)
            os.utime(path, ns=(when.st_atime_ns, when.st_mtime_ns))
            for made, data in objects.items():
                made.write_bytes(data)

    def run(self, tests: list[str]) -> str:
        chosen = ["-x", "-k", "cuda"] if self._cuda else ["-x"]
        log = Path("mutant.log")
        code = python.forked(lambda: python.run_tests(tests, None, *chosen), LIMIT, log, waits=1)
        return "timeout" if code is None else "survived" if code == 0 else "noticed"


def tests_of(path: Path, cuda: bool) -> list[str]:
    """The test files of an op, its own first; of the binding; or all of both for what serves all ops."""
    ops, binding = (sorted(Path("tests", folder).glob("test_*.py")) for folder in ("ops", "binding"))
    ops = [file for file in ops if file.name not in ("test_wide.py", "test_reference.py")]
    if path.parent.name == "python":
        return list(map(str, binding))
    words = "matmul|lora_linear|linear_cross_entropy" if "gemm" in str(path) else STAGE.sub("", path.stem)
    own = [file for file in ops if re.search(words, file.name)]
    others = [file for file in ops if file not in own and (not own or re.search(words, file.read_text()))]
    return list(map(str, own + others + ([] if own or cuda else binding)))


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--cuda", action="store_true", help="cuda/*.cu, emulated")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with python.scratch():
        pattern = "cuda/*.cu" if args.cuda else "csrc/**/*.c"
        paths = [path for path in sorted(Path().glob(pattern)) if args.only in str(path)]
        keys = dict(found for path in paths for found in mutants(path))
        wanted = results.sample(set(keys), args.count, args.seed)
        extension = Extension(args.cuda)
        if not extension.build():
            raise SystemExit("the extension cannot be built")
        python.load(["numpy", "hypothesis", "torch", "jax"])
        tests = {keys[key][0]: tests_of(keys[key][0], args.cuda) for key in wanted}
        for files in {tuple(files) for files in tests.values()}:
            if extension.run(list(files)) != "survived":
                raise SystemExit(f"tests fail without a fault:\n{Path('mutant.log').read_text()[-4000:]}")
        log = python.ROOT / f"build/mutation/{'cuda' if args.cuda else 'c'}.jsonl"
        results.try_all(
            log,
            results.to_try(log, wanted, args.again),
            lambda key: extension.try_mutant(keys[key], tests[keys[key][0]]),
        )
        results.show(log, wanted)


if __name__ == "__main__":
    main()
