"""The faults that python.py puts into a source file, one at a time.

mutmut and cosmic-ray both run a whole test command for each fault. This package needs an extension that is
built, its tests load libraries for seconds, and some of them take minutes. So only their operators are here:
python.py chooses the tests that run a line, and runs them in a process that has loaded everything.
"""

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

OTHER: dict[type, Any] = {
    **{
        ast.Lt: ast.LtE,
        ast.LtE: ast.Lt,
        ast.Gt: ast.GtE,
        ast.GtE: ast.Gt,
        ast.Eq: ast.NotEq,
        ast.NotEq: ast.Eq,
    },
    **{ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Mod: ast.Mult},
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult},
    **{ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift, ast.RShift: ast.LShift},
    **{ast.Pow: ast.Mult, ast.BitXor: ast.BitOr, ast.MatMult: ast.Add},
}
# Annotations change nothing at run time. The words of messages, also other strings of three words, are free.
LEFT_OUT = {"annotation", "returns", "decorator_list", "type_params"}
GUARDS = {"strict"}  # keywords that only detect our own bugs
MESSAGES = {"warn", "print", "write", "UserError"}


@dataclass(frozen=True)
class Mutant:
    """Bytes `begin` to `end` of a file become `now`. `was` and `then` are the line before and after."""

    line: int
    begin: int
    end: int
    now: str
    function: str
    was: str
    then: str


def faults(node: Any) -> Iterator[ast.AST]:
    """The node with one thing changed, in each of its ways."""

    def with_(**changes: object) -> ast.AST:
        new = copy.copy(node)
        for name, value in changes.items():
            setattr(new, name, value)
        return new

    match node:
        case ast.Compare(ops=ops):
            for i, op in enumerate(ops):
                yield with_(ops=[*ops[:i], OTHER[type(op)](), *ops[i + 1 :]])
        case ast.BinOp(op=op) | ast.AugAssign(op=op) if type(op) in OTHER:
            yield with_(op=OTHER[type(op)]())
        case ast.BoolOp(values=values):
            for i in range(len(values)):
                rest = [*values[:i], *values[i + 1 :]]
                yield with_(values=rest) if len(rest) > 1 else rest[0]
        case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.Invert(), operand=operand):
            yield operand
        case ast.Constant(value=bool() as value):
            yield with_(value=not value)
        case ast.Constant(value=int() | float() as value):
            yield with_(value=value + 1)
        case ast.Constant(value=str() as value) if len(value.split()) < 3:
            yield with_(value=value + "~")
        case ast.Constant(value=bytes() as value):
            yield with_(value=value + b"~")
        case ast.If() | ast.While() | ast.IfExp() if not isinstance(node.test, ast.Compare):
            yield ast.UnaryOp(ast.Not(), node.test)
        case ast.Return(value=ast.expr() as value) if not isinstance(value, ast.Constant):
            yield with_(value=ast.Constant(None))
        case ast.Call(keywords=[_, *_] as keywords):
            for i in range(len(keywords)):
                if keywords[i].arg not in GUARDS:
                    yield with_(keywords=[*keywords[:i], *keywords[i + 1 :]])
        case ast.Break():
            yield ast.Continue()
        case ast.Continue():
            yield ast.Break()
    match node:
        case ast.Raise() | ast.AugAssign() | ast.Delete() | ast.Expr(value=ast.Call() | ast.Yield()):
            yield ast.Pass()


def places(node: Any, function: str = "") -> Iterator[tuple[Any, str]]:
    """All nodes that may change, with the function they are in."""
    called = getattr(node, "func", None)
    if isinstance(node, ast.keyword) and node.arg in GUARDS:
        return
    if isinstance(node, ast.Raise | ast.JoinedStr) or (
        isinstance(node, ast.Call) and (getattr(called, "id", "") or getattr(called, "attr", "")) in MESSAGES
    ):
        yield node, function
        return
    if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
        function = f"{function}.{node.name}".lstrip(".")
    yield node, function
    for name, field in ast.iter_fields(node):
        for child in field if isinstance(field, list) else [field]:
            docstring = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
            if isinstance(child, ast.AST) and name not in LEFT_OUT and not docstring:
                yield from places(child, function)


def mutants(source: str) -> list[Mutant]:
    """All mutants of a file, in the order of its lines."""
    data = source.encode()
    found: dict[tuple[str, str, str], Mutant] = {}
    starts = [0]
    for line in data.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    for node, function in places(ast.parse(source)):
        for new in faults(node):
            # The test of an if or while changes alone, not the statement.
            old: Any = node.test if isinstance(node, ast.If | ast.While | ast.IfExp) else node
            begin = starts[old.lineno - 1] + old.col_offset
            end = starts[old.end_lineno - 1] + old.end_col_offset
            now = ast.unparse(ast.fix_missing_locations(new))
            if isinstance(new, ast.expr) and not isinstance(new, ast.Constant):
                now = f"({now})"
            first, last = starts[old.lineno - 1], starts[old.end_lineno]
            was = " ".join(data[first:last].decode().split())
            then = " ".join((data[first:begin].decode() + now + data[end:last].decode()).split())
            found.setdefault((was, then, function), Mutant(old.lineno, begin, end, now, function, was, then))
    return sorted(found.values(), key=lambda m: (m.begin, m.end, m.now))
