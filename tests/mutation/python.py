"""Puts one fault at a time into longlora/FOLDER, and runs the tests of tests/FOLDER that run its line.

    python tests/mutation/python.py FOLDER [--count N] [--seed S] [--again] [--only WORDS] [--tests WORDS]

FOLDER can be `.` for the files of longlora/ itself: the tests are then those of all folders.

It works on a copy of the working directory. First it runs each test file once, and notes the lines that each
test runs and how long it takes: the map. Each mutant then costs a fork of a process that has loaded all
libraries: the tests that run the line, the quickest first, until one fails. --again tries only what
survived, with all tests of the line.
Results are appended to build/mutation/FOLDER.jsonl, and a run that was stopped goes on from there.
equivalent.txt lists mutants that compute the same, with the reason; they are not tried.
"""

import ast
import compileall
import contextlib
import gc
import hashlib
import importlib
import itertools
import json
import math
import os
import py_compile
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import operators
import patched
import pytest
import results

WHOLE = {"training", "data", "files"}
# The most processor time, in seconds and with tracing, of one test and of all tests for a mutant. Quick tests
# should notice.
LONGEST, TOGETHER = 10.0, 5.0
MAP_LIMIT = 900  # seconds of processor time for a test file
MEMORY = 6 << 30  # bytes of a mutant at most
ROOT = Path.cwd()
# A fork waits for ever in OpenMP if the process before it has used more than one thread.
os.environ["OMP_NUM_THREADS"] = "1"
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "build", "__pycache__", ".*_cache", ".hypothesis")
Tests = dict[str, dict[str, Any]]


class Map:
    """A plugin of pytest. tests: name -> its lines, its processor time, whether it starts processes."""

    def __init__(self, files: set[str]):
        self.tests: Tests = {}
        self._files, self._started = files, False
        self._sink: set[tuple[str, int]] = set()
        self._of_fixture: dict[object, set[tuple[str, int]]] = defaultdict(set)
        sys.addaudithook(self._audit)
        threading.settrace(self._trace)

    def _audit(self, event: str, _: object) -> None:
        self._started |= event in ("subprocess.Popen", "os.fork", "os.posix_spawn")

    def _trace(self, frame: Any, event: str, _: object) -> Any:
        return self._line if frame.f_code.co_filename in self._files else None

    def _line(self, frame: Any, event: str, _: object) -> Any:
        self._sink.add((frame.f_code.co_filename, frame.f_lineno))
        return self._line

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Any:
        """Lines that a shared fixture runs count for every test that uses the fixture."""
        before = self._sink
        if fixturedef.scope != "function":
            self._sink = self._of_fixture[fixturedef]
        try:
            return (yield)
        finally:
            self._sink = before

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Any:
        self._sink, self._started, start = set(), False, sum(os.times()[:4])
        sys.settrace(self._trace)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            lines, seconds = self._sink.copy(), sum(os.times()[:4]) - start
            for definition in itertools.chain(*item._fixtureinfo.name2fixturedefs.values()):
                lines |= self._of_fixture[definition]
            named = sorted((os.path.relpath(name), line) for name, line in lines)
            self.tests[item.nodeid] = dict(lines=named, seconds=seconds, starts=self._started)


class Chosen:
    """A plugin of pytest: runs the tests of `order` only, in that order."""

    def __init__(self, order: list[str]):
        self.rank = {name: i for i, name in enumerate(order)}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = sorted((i for i in items if i.nodeid in self.rank), key=lambda i: self.rank[i.nodeid])


def resident(pid: int) -> int:
    """The bytes of memory that a child uses. Limits of the system would count what tests never touch."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


def forked(function: Callable[[], int], limit: float, log: Path | None, waits: float = 20) -> int | None:
    """Call the function in a fork, with its output in `log` -> its result.

    None if it took more memory than MEMORY, more than `limit` seconds of processor time, or `waits` times as
    long by the clock.
    """
    code: int | None = 3
    pid = os.fork()
    if not pid:
        try:
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if limit < math.inf:
                resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(limit), math.ceil(limit)))
            if log:
                out = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
                os.dup2(out, 1), os.dup2(out, 2)
            code = int(function())
            sys.stdout.flush()
        finally:
            os._exit(code or 0)
    end, code, pause = time.monotonic() + waits * limit, None, 0.001
    try:
        while code is None and time.monotonic() < end and resident(pid) < MEMORY:
            time.sleep(pause)
            pause = min(0.1, 1.2 * pause)
            done, status = os.waitpid(pid, os.WNOHANG)
            code = os.waitstatus_to_exitcode(status) if done else None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # with what the tests started
        if code is None:
            os.waitpid(pid, 0)
    return None if code == -signal.SIGKILL else code


def run_tests(files: list[str], plugin: object | None, *options: str) -> int:
    command = ["-q", "-p", "no:cacheprovider", "-p", "no:faulthandler", "--basetemp=temp.pytest", *options]
    return pytest.main([*command, *files], plugins=[plugin] if plugin else [])


def sources_of(folder: str) -> list[Path]:
    return sorted(Path("longlora", folder).glob("*.py" if folder == "." else "**/*.py"))


def make_map(folder: str, words: str, store: Path) -> tuple[Tests, list[str]]:
    """-> the tests of the folder, and the modules that they load. Files that did not change: from `store`."""
    paths = sources_of(folder)
    sources = b"".join(path.read_bytes() for path in paths)
    known = json.loads(store.read_text()) if store.exists() else {}
    tests: Tests = {}
    loaded: dict[str, None] = {}
    files = sorted(Path("tests", folder).glob("**/test_*.py" if folder == "." else "test_*.py"))
    for path in [str(p) for p in files if any(word in str(p) for word in words.split(","))]:
        key = hashlib.sha256(sources + Path(path).read_bytes()).hexdigest()
        if known.get(path, {}).get("key") != key:
            print(f"runs {path}", flush=True)

            def trace(path: str = path, key: str = key) -> int:
                plugin = Map({os.path.abspath(source) for source in paths})
                code = run_tests([path], plugin)
                found = dict(key=key, tests=plugin.tests, loaded=list(sys.modules))
                Path("map.json").write_text(json.dumps(found))
                return code

            if forked(trace, MAP_LIMIT, Path("map.log")) not in (0, 5):
                raise SystemExit(f"{path} fails without a fault:\n{Path('map.log').read_text()[-4000:]}")
            known[path] = json.loads(Path("map.json").read_text())
            store.parent.mkdir(parents=True, exist_ok=True)
            store.write_text(json.dumps(known))
        tests |= known[path]["tests"]
        loaded |= dict.fromkeys(known[path]["loaded"])
    return tests, list(loaded)


def load(modules: list[str]) -> None:
    """Import the libraries of the tests, once for all mutants."""
    own = {path.stem for path in Path("tests").rglob("*.py")} | {"longlora", "__main__"}
    for name in modules:
        if name.partition(".")[0] not in own:
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    gc.freeze()  # forks share its memory


def choose(tests: Tests, file: str, line: int, most: float) -> list[str]:
    """The tests that may notice a fault in a line, the quickest first, up to about `most` seconds."""
    quick = {name: test for name, test in tests.items() if test["seconds"] < LONGEST}
    # The first test that imports a module runs the lines outside of functions. It tells little about them.
    inside = patched.outermost(ast.parse(Path(file).read_bytes()), line)
    runs = {name for name, test in quick.items() if inside and [file, line] in test["lines"]}
    if not runs:  # a constant of the module, a default, a line that only other processes run
        runs = {name for name, test in quick.items() if any(there == file for there, _ in test["lines"])}
        runs = runs or set(quick)  # a file of names, which only an import runs
        runs |= {name for name, test in quick.items() if test["starts"]}
    order = sorted(runs, key=lambda name: quick[name]["seconds"])
    total = itertools.accumulate((quick[name]["seconds"] for name in order), initial=0.0)
    return [name for name, before in zip(order, total) if before < most]


def try_mutant(path: Path, mutant: operators.Mutant, tests: Tests, most: float) -> str:
    """-> one of results.KINDS. most: seconds of tests, about."""
    order = choose(tests, str(path), mutant.line, most)
    if not order:
        return "no test"
    with written(path, mutant):
        files = sorted({name.partition("::")[0] for name in order})
        return verdict(lambda: run_tests(files, Chosen(order), "-x", "--assert=plain"), tests, order)


def verdict(function: Callable[[], int], tests: Tests, order: list[str]) -> str:
    limit = 10 + 3 * sum(tests[name]["seconds"] for name in order)
    code = forked(function, limit, Path("mutant.log"))
    return "timeout" if code is None else "survived" if code == 0 else "noticed"


def replaced(path: Path, mutant: operators.Mutant) -> bytes:
    """The content of the file with the mutant."""
    data = path.read_bytes()
    return data[: mutant.begin] + mutant.now.encode() + data[mutant.end :]


@contextlib.contextmanager
def written(path: Path, mutant: operators.Mutant) -> Iterator[None]:
    """Write the mutant into the file, also for processes that tests start. Restore it afterwards."""
    data = path.read_bytes()
    try:
        path.write_bytes(replaced(path, mutant))
        yield
    finally:
        path.write_bytes(data)


def try_functions(
    keys: dict[str, tuple[Path, operators.Mutant]], tests: Tests, most: float, log: Path
) -> list[str]:
    """Try the mutants inside functions, all in one session -> the mutants that need a new import."""
    left = Path("left.json")

    def attempt(session: patched.Session, path: Path, mutant: operators.Mutant) -> str:
        if not any([str(path), mutant.line] in test["lines"] for test in tests.values()):
            return ""
        order = choose(tests, str(path), mutant.line, most)
        changed = session.changes(path, mutant.line, replaced(path, mutant))
        if changed is None or not order:
            return ""
        with written(path, mutant):
            return verdict(lambda: session.run(order, changed), tests, order)

    def work(session: patched.Session) -> None:
        quick = [name for name, test in tests.items() if test["seconds"] < LONGEST]
        if verdict(lambda: session.run(quick, []), tests, quick) != "survived":
            raise SystemExit(f"tests fail without a fault:\n{Path('mutant.log').read_text()[-4000:]}")
        untried = results.try_all(log, list(keys), lambda key: attempt(session, *keys[key]))
        left.write_text(json.dumps(untried))

    paths = sorted({path for path, _ in keys.values()})
    files = sorted({name.partition("::")[0] for name in tests})
    code = forked(
        lambda: run_tests(files, patched.Session(paths, work), "-s", "--assert=plain"), math.inf, None
    )
    if code != 0:
        raise SystemExit(code or f"pytest took more than {MEMORY >> 30} GiB")
    return json.loads(left.read_text())


@contextlib.contextmanager
def scratch() -> Iterator[None]:
    """Work in a copy of the tree."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT, f"{folder}/tree", symlinks=True, ignore=LEFT_OUT)
        os.chdir(f"{folder}/tree")
        sys.path.insert(0, os.getcwd())
        # Times of files do not tell two mutants of one second apart.
        mode = py_compile.PycInvalidationMode.CHECKED_HASH
        compileall.compile_dir("longlora", quiet=2, invalidation_mode=mode)
        try:
            yield
        finally:
            os.chdir(ROOT)


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument("folder", help="training, data and files are tried whole, 100 mutants of the others")
    parser.add_argument("--tests", default="", metavar="WORDS", help="test files whose path has one of these")
    args = parser.parse_args()
    folder, store = args.folder, ROOT / "build/mutation"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends with the copy removed
    with scratch():
        paths = [path for path in sources_of(folder) if args.only in path.name]
        found = [(path, mutant) for path in paths for mutant in operators.mutants(path.read_text())]
        keys = {f"{path}:{m.function}: {m.was} -> {m.then}": (path, m) for path, m in found}
        count = args.count or (None if folder in WHOLE else 100)
        wanted = results.sample(set(keys), count, args.seed)
        tests, modules = make_map(folder, args.tests, store / f"{folder}.map.json")
        load(modules)
        path = paths[0]
        nothing = operators.Mutant(0, 0, 0, "", "", "", "")
        if try_mutant(path, nothing, tests, TOGETHER) == "noticed":
            raise SystemExit(f"tests fail without a fault:\n{Path('mutant.log').read_text()[-4000:]}")
        log, most = store / f"{folder}.jsonl", math.inf if args.again else TOGETHER
        todo = results.to_try(log, wanted, args.again)
        todo = try_functions({key: keys[key] for key in todo}, tests, most, log)
        results.try_all(log, todo, lambda key: try_mutant(*keys[key], tests, most))
        results.show(log, wanted)


if __name__ == "__main__":
    main()
