"""The limits of a rendering: what it counts, exact to one character, step or call."""

import json

import jinja2
import pytest

from longlora.data import chat_template, sandbox
from longlora.data.chat_template import ChatTemplate
from longlora.errors import UserError

NAMES = dict(
    s="y" * 10,
    two=[1, 2],
    words=["a", "bc"],
    lists=[[1], [2]],
    tuples=[(1,), (2,)],
    rows=[{"n": "a", "l": [1]}, {"n": "bc", "l": [2]}],
    long="y" * 1001,
    less="y" * 1000,
    ints=(1, 2),
    mixed=(5, 0.5),
    pair=("a", "b"),
    half=0.5,
    given={"a": "xy", "5": "z"},
)
# Name, expression, and the size that is counted before it is computed: characters of the result, steps, or
# bits of a product. A number or None counts 8. A list counts 8, and for each item 8 and the item's size.
FORESEEN = [
    ("*", "'ab' * 3", 6),
    ("*", "3 * 'ab'", 6),
    ("*", "two * 3", 6),
    ("*", "6 * 3", 5),  # bits
    ("*", "2 * half", 0),
    ("**", "2 ** 10", 20),
    ("**", "3 ** -9", 18),
    ("**", "16 ** half", 0),
    ("**", "half ** 9", 0),
    ("%", "'%5d' % 1", 5 + 8),
    ("%", "'%5.7f' % 1", 12 + 8),
    ("%", "'%d %d' % ints", 2 * (8 + 8)),
    ("%", "'%s' % 'xyz'", 3),
    ("%", "'%*d' % ints", 1 + 2 + (8 + 8)),
    ("%", "'%.*f' % mixed", 5 + (8 + 8)),
    ("%", "'%(a)5s%(a)s' % given", 5 + 2 * (2 + 1)),
    ("%", "'%5s' % two", 5 + (8 + 8)),
    ("%", "'' % ()", 0),
    ("format", "'%5s' | format('ab')", 5 + 2),
    ("format", "'%(a)5s' | format(a='ab')", 5 + 2),
    ("format", "'{:5}|{:.7}'.format('ab', 'c')", 5 + 7 + 2 * (2 + 1)),
    ("format", "'{a:5}'.format(a='xyz')", 5 + 3),
    ("format", "'{:{}}'.format('ab', 5)", 5 + (2 + 8)),
    ("format", "'{} {{9}}'.format('77')", 2),
    ("format_map", "'{a:50}'.format_map(given)", 50 + (2 + 1)),
    ("batch", "two | batch(9, 0)", 9),
    ("slice", "two | slice(9, 0)", 9),
    ("center", "'x' | center", 80),
    ("center", "'x' | center(9)", 9),
    ("center", "'x'.center(9, '.')", 9),
    ("ljust", "'x'.ljust(9)", 9),
    ("rjust", "'x'.rjust(9)", 9),
    ("zfill", "'x'.zfill(9)", 9),
    ("expandtabs", "'\\t\\t'.expandtabs()", 16),
    ("expandtabs", "'\\t\\t'.expandtabs(3)", 6),
    ("indent", "'a\\nb\\nc' | indent", 12),
    ("indent", "'a\\nb\\nc' | indent(5)", 15),
    ("indent", "'a\\nb\\nc' | indent('> ')", 6),
    ("int", "'99' | int", 0),
    ("int", "'99' | int(0, 10)", 0),
    ("int", "'fff' | int(0, 16)", 3**2),
    ("round", "half | round", 0),
    ("round", "half | round(-3, 'floor')", 12),  # bits, four a digit
    ("replace", "'aXbX' | replace('X', 'abc')", 6),
    ("replace", "'aXbX'.replace('X', 'abc', 2)", 6),
    ("striptags", "'abc' | striptags", 3**2),
    ("striptags", "('abc' | safe).striptags()", 3**2),
    ("urlize", "'abc' | urlize", 3**2),
    ("wordwrap", "'abc' | wordwrap(2)", 3**2),
    ("rfind", "long.rfind(long)", 1001),
    ("rindex", "long.rindex(long)", 1001),
    ("rpartition", "long.rpartition(long)", 1001),
    ("rsplit", "long.rsplit(long)", 1001),
    ("rsplit", "long.rsplit()", 0),
    ("rfind", "long.rfind(less)", 0),
    ("join", "words | join('---')", (1 + 2) + 2 * 3),
    ("join", "words | join", 1 + 2),
    ("join", "rows | join('---', 'n')", (1 + 2) + 2 * 3),
    ("join", "less.join(words)", (1 + 2) + 2 * 1000),
    ("sum", "lists | sum(start=two)", 2 * 2 * (8 + 8 + 8)),  # each step copies all items
    ("sum", "tuples | sum(start=pair)", 2 * 2 * (8 + 8 + 8)),
    ("sum", "rows | sum('l', two)", 2 * 2 * (8 + 8 + 8)),
    ("tojson", "two | tojson(indent=3)", 3000),  # up to a thousand levels deep
    ("tojson", "two | tojson(indent='abc')", 3000),
    ("tojson", "two | tojson", 0),
]


def refusal(monkeypatch, source, most, calls=9):
    """Render with a limit of `most` characters and max(most, calls) steps -> the error, or ""."""
    monkeypatch.setattr(sandbox, "MOST", max(most, calls))
    monkeypatch.setattr(sandbox, "MOST_TEXT", most)
    try:
        ChatTemplate(source, {}, "here").render([], **NAMES)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name, source, size", FORESEEN)
def test_a_result_that_is_too_large_is_refused_before_it_is_computed(monkeypatch, name, source, size):
    """A limit of exactly its size allows it, and a limit of one less does not. Operators are no calls."""
    source, calls = "{% set x = " + source + " %}", 0 if "*" in name else 1
    message = refusal(monkeypatch, source, size, calls)
    assert "a result of" not in message and "fails" not in message
    if size:
        message = refusal(monkeypatch, source, size - 1, calls)
        assert message == (f"here: the chat template refuses these messages: a result of {name} is too large")


# Source, the characters that it makes and writes, and the number of calls, filters and rounds of loops.
USED = [
    ("", 0, 0),
    ("abc", 3, 0),
    ("abc{{ s }}d", 10 + 4, 0),
    ("{{ 1 }}", 8, 0),
    ("{{ s ~ 'ab' }}", 12 + 12, 0),  # joined, then written
    ("{% set x = [s, s] %}", 3 * 8, 0),
    ("{% set x = (s, s) %}", 3 * 8, 0),
    ("{% set x = {'a': s} %}", 2 * 8, 0),
    ("{% set x = two[:1] %}", 2 * 8, 0),
    ("{% set x = s[1:] %}", 9, 0),
    ("{% set x = s[0] %}", 0, 0),
    ("{% set x = two + two %}", 5 * 8, 0),
    ("{% set x = s + 'a' %}", 11, 0),
    ("{% set x = s * 2 %}", 20, 0),
    ("{% set x = two * 2 %}", 5 * 8, 0),
    ("{% set x = '%s!' % s %}", 11, 0),
    ("{% set x = 7 % 2 + 1 %}", 0, 0),
    ("{% set x = s.upper() %}", 10, 1),
    ("{% set x = s.strip() %}", 0, 1),  # the same text
    ("{% set x = s.split('z') %}", 2 * 8 + 10, 1),
    ("{% set x = s.partition('z') %}", 4 * 8 + 10, 1),
    ("{% set x = s.find('z') %}", 0, 1),
    ("{% set x = s | upper %}", 10, 1),
    ("{% set x = s | string %}", 0, 1),  # the same text
    ("{% set x = two | list %}", 3 * 8, 1),
    ("{% set x = two | tojson %}", 6 + 6, 1),  # the pieces, and the text
    ("{% set x = two | sum %}", 0, 1),
    ("{% set x = dict(a=1) %}", 2 * 8, 1),
    ("{% for a, b in [pair] %}{{ a }}{% endfor %}", 2 * 8 + 1, 1),
    ("{% for i in range(3) %}{% endfor %}", 0, 1 + 3),
    ("{% macro m() %}{{ s }}{% endmacro %}{% set x = m() %}", 10 + 10, 1),
]


@pytest.mark.parametrize("source, text, rounds", USED)
def test_a_rendering_counts_everything_once(monkeypatch, source, text, rounds):
    used = sandbox.Used()
    monkeypatch.setattr(chat_template, "Used", lambda: used)
    ChatTemplate(source, {}, "here").render([], **NAMES)
    assert (used.text, used.rounds) == (text, rounds)


@pytest.mark.parametrize(
    "source, most, words",
    [
        ("{{ s }}", 10, "it writes more than 10 characters"),
        ("{% set x = [long, long] %}", 24 + 2 * 1001, "it makes a list of more than 2,026 characters"),
        # the sum of two lists counts the items of both
        ("{% set x = [less] + [less] %}", 2 * (16 + 1000), "it makes a list of more than 2,032 characters"),
    ],
)
def test_a_rendering_may_reach_its_limit_but_not_exceed_it(monkeypatch, source, most, words):
    assert refusal(monkeypatch, source, most) == ""
    message = refusal(monkeypatch, source, most - 1)
    assert message.endswith(words.replace(f"{most:,}", f"{most - 1:,}"))


@pytest.mark.parametrize(
    "value, size",
    [
        ("abc", 3),
        (1, 8),
        (-(2**79), 8 + 10),  # a number of 80 bits
        (0.5, 8),
        (None, 8),
        ([], 8),
        ([1, "ab"], 8 + (8 + 8) + (8 + 2)),
        ((1, "ab"), 8 + (8 + 8) + (8 + 2)),
        ({"ab": "cde"}, 8 + (8 + 2 + 3)),
        ({"ab": "cde"}.keys(), 8 + (8 + 2)),
        ({"ab": "cde"}.values(), 8 + (8 + 3)),
        ({"ab": "cde"}.items(), 8 + 8 + (8 + (8 + 2) + (8 + 3))),
        ([["abc"] * 99] * 2, 8 + 2 * (8 + (8 + 99 * (8 + 3)))),
    ],
)
def test_the_size_of_a_value_includes_all_that_it_holds(value, size):
    used = sandbox.Used()
    assert used.size(value) == used.size(value) == used.sizes([value]) == size
    assert used.sizes([value, value]) == 2 * size


def test_a_list_is_measured_once():
    """Each of 200 lists holds the one before. Measuring all of them for each would take 20,000 steps."""
    used, value, seen = sandbox.Used(), ["x" * 300], 0
    measure = used.size

    def size(value, known=None):
        nonlocal seen
        seen += 1
        return measure(value, known)

    used.size = size
    for _ in range(200):
        value = [value]
        used.made(value)
    assert used.size(value) == 200 * 16 + 16 + 300
    assert seen < 1000


def test_the_time_of_a_rendering_counts_from_its_start(monkeypatch):
    now = iter([100.0, 107.0, 107.5])
    monkeypatch.setattr(sandbox, "MOST_SECONDS", 7.0)
    monkeypatch.setattr(sandbox.time, "thread_time", lambda: next(now))
    used = sandbox.Used()
    used.count()
    with pytest.raises(jinja2.TemplateError, match="^it takes more than 7 seconds$"):
        used.count()


def test_a_rendering_may_make_two_million_calls_and_rounds():
    used = sandbox.Used()
    used.rounds = 1_999_999
    used.count()
    with pytest.raises(
        jinja2.TemplateError, match="^it makes more than 2,000,000 calls and rounds of loops$"
    ):
        used.count()


@pytest.mark.parametrize(
    "arguments, how",
    [
        ("", {"ensure_ascii": False}),
        ("(true)", {"ensure_ascii": True}),
        ("(indent=2)", {"ensure_ascii": False, "indent": 2}),
        ("(separators=(',', ':'))", {"ensure_ascii": False, "separators": (",", ":")}),
        ("(sort_keys=true)", {"ensure_ascii": False, "sort_keys": True}),
    ],
)
def test_json_is_written_as_python_does(arguments, how):
    value = {"b": ["\u00e9", 1.5], "a": None}
    text = ChatTemplate("{{ value | tojson" + arguments + " }}", {}, "here").render([], value=value)
    assert text == json.dumps(value, **how)
