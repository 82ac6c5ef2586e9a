"""Mutants of functions, each in a fork of one pytest session that has collected all tests.

A mutant replaces the code of its function in the running session. Nothing is imported or collected again,
so a mutant costs little more than its tests. A mutant outside of functions, or of a line that no test runs,
needs a new import: python.py tries it.
"""

import ast
import contextlib
import gc
import importlib
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest


def flat(code: CodeType) -> list[CodeType]:
    """A code object and those of its inner functions, in the order of the source."""
    inner = [flat(part) for part in code.co_consts if isinstance(part, CodeType)]
    return [code, *(x for part in inner for x in part)]


def outermost(node: Any, line: int) -> Any:
    """The outermost function with this line in its body; None if there is none."""
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and (
            child.body[0].lineno <= line <= (child.end_lineno or 0)
        ):
            return outermost(child, line) if isinstance(child, ast.ClassDef) else child
    return None


class Session:
    """A plugin of pytest. It calls `work` with itself after the tests are collected. `work` calls run()."""

    def __init__(self, paths: list[Path], work: Callable[["Session"], None]):
        self._paths, self._work, self.failed = {str(p.absolute()): p for p in paths}, work, False
        self._lives: dict[int, list[FunctionType]] = defaultdict(list)
        self._outer: dict[tuple[str, int], CodeType] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.session, self.items = session, {item.nodeid: item for item in session.items}
        for path in self._paths.values():
            with contextlib.suppress(Exception):  # a part whose extra is not installed
                importlib.import_module(".".join(path.with_suffix("").parts).removesuffix(".__init__"))
        for live in [f for f in gc.get_objects() if isinstance(f, FunctionType)]:
            code = live.__code__
            if code.co_filename in self._paths:
                self._lives[id(code)].append(live)
                self._outer[code.co_filename, code.co_firstlineno] = code
        gc.freeze()
        self._work(self)
        return True

    def changes(self, path: Path, line: int, source: bytes) -> list[tuple[FunctionType, CodeType]] | None:
        """The functions that a new text of the file changes, and their new code. None: it needs an import."""
        node = outermost(ast.parse(path.read_bytes()), line)
        if not node:
            return None
        first = min(part.lineno for part in (node, *node.decorator_list))
        old = self._outer.get((str(path.absolute()), first))
        new = [c for c in flat(compile(source, str(path), "exec")) if c.co_firstlineno == first]
        new = [c for c in new if old and c.co_qualname == old.co_qualname]
        if not old or not new:
            return None
        before, after = flat(old), flat(new[0])
        pairs = zip(before, after) if len(before) == len(after) else [(old, new[0])]
        found = [(live, b) for a, b in pairs for live in self._lives[id(a)]]
        return found if all(f.__code__.co_freevars == code.co_freevars for f, code in found) else None

    def run(self, order: list[str], changed: list[tuple[FunctionType, CodeType]]) -> int:
        """Run the tests of `order` with the changed code until one fails -> 1 if one did. In a fork."""
        for function, code in changed:
            function.__code__ = code
        items = [self.items[name] for name in order]
        for item, following in zip(items, [*items[1:], None]):
            self.session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if self.failed:
                return 1
        return 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed |= report.failed
