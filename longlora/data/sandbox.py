"""Jinja's sandbox with limits: no template runs without end or fills the memory.

All that the template makes is counted: the values of literals, slices, operators, calls and filters, and what
it writes. Where a result can be far larger than what it is made of, its size is computed first.
"""

import itertools
import json
import re
import string
import time
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from typing import Any

import jinja2
import jinja2.ext
import jinja2.filters
import jinja2.nodes
import jinja2.sandbox
import jinja2.utils
import jinja2.visitor
from jinja2.utils import _PassArg

MOST = 2_000_000  # rounds of loops, calls and filters in a rendering; characters or bits of a product
MOST_TEXT = 1 << 27  # characters that a rendering makes, in all; an item of a list counts as ITEM of them
MOST_SECONDS = 20.0  # of a processor
ITEM = 8
# Names that no template can use.
_COUNTED, _MADE, _WRITTEN, USED = "longlora counted", "longlora made", "longlora written", "longlora used"
# Methods of text and numbers whose time or result has no simple bound. No text needs them.
_REFUSED = {"encode", "from_bytes", "maketrans", "to_bytes", "translate"}
_NUMBER = re.compile(r"\d+")
_PERCENT = re.compile(r"%(?:\([^)]*\))?[-#0 +]*(\*|\d*)(?:\.(\*|\d*))?")


class Used:
    """What a rendering has used: rounds and calls, seconds, and characters that were made."""

    def __init__(self):
        self.rounds = self.text = 0
        self._since = time.thread_time()
        # Each list is measured once: n lists, each holding the one before twice, have 2^n items. Nothing in
        # the sandbox changes a list. The list is kept here, so that no other gets its id.
        self._sizes: dict[int, tuple[Any, int]] = {}

    def count(self) -> None:
        """Count a round, a call or a filter."""
        self.rounds += 1
        if self.rounds > MOST:
            raise jinja2.TemplateError(f"it makes more than {MOST:,} calls and rounds of loops")
        if time.thread_time() - self._since > MOST_SECONDS:
            raise jinja2.TemplateError(f"it takes more than {MOST_SECONDS:g} seconds")

    def add(self, size: int) -> None:
        self.text += size
        if self.text > MOST_TEXT:
            raise jinja2.TemplateError(f"it writes more than {MOST_TEXT:,} characters")

    def made(self, value: Any, size: int | None = None) -> Any:
        """Count `value`, which the template has made. size: what size() would find, or None."""
        if isinstance(value, str):
            self.add(len(value))
        elif isinstance(value, (list, tuple, dict)):
            self.add(ITEM * (len(value) + 1))  # it shares its items with other lists
            self.size(value, size)
        return value

    def size(self, value: Any, known: int | None = None) -> int:
        """About how many characters `value` is when it is written out. MOST_TEXT is the most."""
        if isinstance(value, str):
            return len(value)
        if isinstance(value, int):
            return ITEM + value.bit_length() // 8
        if not isinstance(value, (list, tuple, dict, KeysView, ValuesView, ItemsView)):
            return ITEM
        size = self._sizes[id(value)][1] if id(value) in self._sizes else known
        if size is None:
            values = value.values() if isinstance(value, dict) else ()
            size = ITEM * (len(value) + 1) + self.sizes(itertools.chain(value, values))
        if size > 32 * ITEM:  # small ones are soon measured again
            self._sizes[id(value)] = value, size
        if size > MOST_TEXT:
            raise jinja2.TemplateError(f"it makes a list of more than {MOST_TEXT:,} characters")
        return size

    def sizes(self, values: Iterable[Any]) -> int:
        """The size of all values together."""
        return sum(self.size(value) for value in values)


@jinja2.pass_context
def _counted(context: Any, items: Any) -> Iterator[Any]:
    """The items of a loop; each is counted."""
    for item in items:
        context[USED].count()
        yield item


@jinja2.pass_context
def _made(context: Any, value: Any) -> Any:
    return context[USED].made(value)


@jinja2.pass_context
def _written(context: Any, value: Any, beside: int = 0) -> Any:
    """`value`, which is written or joined with `beside` characters of the template's source."""
    context[USED].add(beside + context[USED].size(value))
    return value


class _Limits(jinja2.visitor.NodeTransformer):
    """Puts the filters above into a template."""

    def _through(self, filter, node, *more):
        arguments = [jinja2.nodes.Const(value) for value in more]
        return jinja2.nodes.Filter(node, filter, arguments, [], None, None, lineno=node.lineno)

    def visit_For(self, node: Any) -> Any:
        node = self.generic_visit(node)
        node.iter = self._through(_COUNTED, node.iter)
        return node

    def _visit_joined(self, node):
        node = self.generic_visit(node)
        is_source = [isinstance(x, jinja2.nodes.TemplateData) for x in node.nodes]
        source = sum(len(x.data) for x in itertools.compress(node.nodes, is_source))
        node.nodes = [
            x if plain else self._through(_WRITTEN, x) for x, plain in zip(node.nodes, is_source, strict=True)
        ]
        if source:
            nothing = jinja2.nodes.Const("", lineno=node.lineno)
            node.nodes.append(self._through(_WRITTEN, nothing, source))
        return node

    visit_Output = visit_Concat = _visit_joined

    def _visit_literal(self, node):
        node = self.generic_visit(node)
        return node if getattr(node, "ctx", "load") == "store" else self._through(_MADE, node)

    visit_List = visit_Tuple = visit_Dict = _visit_literal

    def visit_Getitem(self, node: Any) -> Any:
        node = self.generic_visit(node)
        return self._through(_MADE, node) if isinstance(node.arg, jinja2.nodes.Slice) else node


def _product(left, right):
    """The size of left * right: characters, items or bits."""
    if all(isinstance(x, int) for x in (left, right)):
        return left.bit_length() + right.bit_length()
    sizes = [len(x) if hasattr(x, "__len__") else x for x in (left, right)]
    return sizes[0] * sizes[1] if all(isinstance(x, int) for x in sizes) else 0


def _power(left, right):
    whole = isinstance(left, int) and isinstance(right, int)
    return left.bit_length() * abs(right) if whole else 0


def _width(value):
    """The characters of a width, which may be given as the text itself."""
    return len(value) if isinstance(value, str) else abs(value) if isinstance(value, int) else 0


def _fields(used, count, widths, values):
    """The size of a text with `count` fields: `widths`, and values that each field may write once more."""
    return sum(int(width) for width in widths if width) + count * used.sizes(values)


def _percent(used, text, values):
    """The size of text % values."""
    found = _PERCENT.findall(str(text))
    given = list(values.values()) if isinstance(values, Mapping) else values
    given = given if isinstance(given, (list, tuple)) else [given]
    asked = [_width(x) for x in given] if any("*" in pair for pair in found) else []
    widths = [x for pair in found for x in pair if x != "*"]
    return _fields(used, len(found), [*widths, *asked], list(given))


def _braces(used, text, *args, **kwargs):
    """The size of text.format(*args, **kwargs)."""
    found = [(name, spec or "") for _, name, spec, _ in string.Formatter().parse(text) if name is not None]
    if any(mark in name for name, _ in found for mark in ".["):
        raise jinja2.TemplateError("a format with attributes or items of its values is not known here")
    widths = [number for _, spec in found for number in _NUMBER.findall(spec)]
    values = [*args, *kwargs.values()]
    if any("{" in spec for _, spec in found):  # the values are specs, or parts of them
        widths += [number for value in values for number in _NUMBER.findall(str(value))]
    return _fields(used, len(found), widths, values)


def _replaced(used, text, old, new, count=None):
    return str(text).count(str(old)) * len(str(new))


def _joined(used, items, between):
    return used.sizes(items) + len(items) * len(str(between))


def _squared(used, text, *args, **kwargs):
    """For what may look at all of a text once for each character."""
    return len(str(text)) ** 2


def _sought(used, text, part=None, *args, **kwargs):
    """Python searches from the right by comparing `part` at each place."""
    return len(text) * max(0, len(part or "") - 1000)


def _digits(used, text, default=0, base=10):
    """Python refuses many digits of base 10 alone, and divides long numbers as by hand."""
    return 0 if base == 10 else _squared(used, text)


def _padded(used, text, width, *fill):
    return width


# The size of a result before it is made, or the steps that it takes. The functions take what the operator,
# the filter or the method takes.
OPERATORS: dict[str, Callable[..., int]] = {"*": _product, "**": _power}
FILTERS: dict[str, Callable[..., int]] = {
    "batch": lambda used, items, linecount, fill_with=None: linecount,
    "center": lambda used, text, width=80: width,
    "format": lambda used, text, *args, **kwargs: _percent(used, text, kwargs or args),
    "indent": lambda used, text, width=4, *how, **named: len(str(text).splitlines()) * _width(width),
    "int": _digits,
    "replace": _replaced,
    "round": lambda used, number, precision=0, method="common": 4 * abs(precision),
    "slice": lambda used, items, slices, fill_with=None: slices,
    "striptags": _squared,
    "urlize": _squared,
    "wordwrap": _squared,
}
METHODS: dict[str, Callable[..., int]] = {
    "center": _padded,
    "expandtabs": lambda used, text, tabsize=8: text.count("\t") * tabsize,
    "format": _braces,
    "format_map": lambda used, text, values: _braces(used, text, **values),
    "join": lambda used, between, items: _joined(used, items, between),
    "ljust": _padded,
    "replace": _replaced,
    "rfind": _sought,
    "rindex": _sought,
    "rjust": _padded,
    "rpartition": _sought,
    "rsplit": _sought,
    "striptags": _squared,
    "zfill": _padded,
}


def _foresee(name, most, size):
    if size > most:
        raise jinja2.TemplateError(f"a result of {name} is too large")


def _join(context, items, d="", attribute=None):
    if attribute is not None:
        items = map(jinja2.filters.make_attrgetter(context.environment, attribute), items)
    items = list(items)
    _foresee("join", MOST_TEXT, _joined(context[USED], items, d))
    return jinja2.filters.do_join(context.eval_ctx, items, d)


def _sum(context, items, attribute=None, start=0):
    if attribute is not None:
        items = map(jinja2.filters.make_attrgetter(context.environment, attribute), items)
    items = list(items)
    if isinstance(start, (list, tuple)):  # each step copies what there is so far
        _foresee("sum", MOST_TEXT, len(items) * context[USED].sizes(items))
    return sum(items, start)


def _to_json(context, x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """As json.dumps. It counts the pieces: lists that hold each other twice, and indents, can be endless."""
    _foresee("tojson", MOST, 1000 * _width(indent))
    how: dict[str, Any] = dict(indent=indent, separators=separators, sort_keys=sort_keys)
    pieces, found = json.JSONEncoder(ensure_ascii=ensure_ascii, **how).iterencode(x), []
    for piece in pieces:
        context[USED].add(len(piece))
        found.append(piece)
    return "".join(found)


def _bounded(name: str, filter: Callable[..., Any], takes: Any) -> Callable[..., Any]:
    """The filter, counted, and refused before it makes too large a result. takes: its first argument."""

    @jinja2.pass_context
    def bounded(context, value, *args, **kwargs):
        used = context[USED]
        used.count()
        if name in FILTERS:
            _foresee(name, MOST_TEXT, FILTERS[name](used, value, *args, **kwargs))
        first = {
            None: (),
            _PassArg.context: (context,),
            _PassArg.eval_context: (context.eval_ctx,),
            _PassArg.environment: (context.environment,),
        }[takes]
        result = filter(*first, value, *args, **kwargs)
        return result if result is value else used.made(result)

    return bounded


class _Namespace(jinja2.utils.Namespace):
    """Jinja's, whose repr does not show what it holds: that may be other namespaces, each of them twice."""

    def __repr__(self) -> str:
        return "<Namespace>"


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox with the limits. What it renders has a Used under the name USED."""

    intercepted_binops = frozenset(["*", "**", "+", "%"])

    def __init__(self, **how: Any) -> None:
        super().__init__(**how)
        ours = {"join": _join, "sum": _sum, "tojson": _to_json}
        self.filters = {
            name: _bounded(name, filter, _PassArg.from_obj(filter)) for name, filter in self.filters.items()
        }
        self.filters |= {name: _bounded(name, filter, _PassArg.context) for name, filter in ours.items()}
        self.filters |= {_COUNTED: _counted, _MADE: _made, _WRITTEN: _written}
        self.globals["namespace"] = _Namespace
        del self.globals["lipsum"]  # texts of any length, by chance

    def compiled(self, source: str) -> jinja2.Template:
        """The template of a source, with the limits in it."""
        code = self.compile(_Limits().visit(self.parse(source)))
        return self.template_class.from_code(self, code, self.make_globals(None))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        refused = isinstance(obj, (str, int)) and attr in _REFUSED
        return not refused and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        used = context[USED]
        if operator in OPERATORS:
            _foresee(operator, MOST, OPERATORS[operator](left, right))
        elif operator == "%" and isinstance(left, str):
            _foresee(operator, MOST_TEXT, _percent(used, left, right))
        result = super().call_binop(context, operator, left, right)
        lists = operator == "+" and isinstance(result, (list, tuple))
        return used.made(result, used.size(left) + used.size(right) if lists else None)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        used = __context[USED]
        used.count()
        used.sizes([*args, *kwargs.values()])
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", None)
        if not isinstance(owner, str):
            return used.made(super().call(__context, __obj, *args, **kwargs))
        if name == "join":
            args = tuple(list(items) for items in args)
        if name in METHODS:
            _foresee(name, MOST_TEXT, METHODS[name](used, owner, *args, **kwargs))
        result = super().call(__context, __obj, *args, **kwargs)
        if isinstance(result, (list, tuple)):  # its parts are new
            used.add(len(owner))
        return result if result is owner else used.made(result)
