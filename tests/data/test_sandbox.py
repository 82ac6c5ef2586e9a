"""No chat template runs without end or fills the memory. The rest renders as in Jinja's own sandbox."""

import math

import jinja2.sandbox
import pytest

from longlora.data import sandbox
from longlora.data.chat_template import ChatTemplate
from longlora.errors import UserError

# Each would take hours or fill the memory; "N" is a number whose result is not made.
LARGE = {
    "center": [
        "'x' | center(N)",
        "'x'.center(N)",
        "('x' | safe).center(N)",
        "['x'] | map('center', N) | list",
    ],
    "ljust": ["'x'.ljust(N)"],
    "rjust": ["'x'.rjust(N, 'y')"],
    "zfill": ["'x'.zfill(N)"],
    "expandtabs": ["'\\t'.expandtabs(N)", "('\\t' * 99999).expandtabs(99999)"],
    "join": [
        "range(99999) | join('x' * 99999)",
        "(messages * 9999) | join('x' * 99999, 'role')",
        "(messages * 9999) | join('x' * 99999, attribute='role')",
        "('x' * 99999).join(['y'] * 99999)",
        "('x' * 99999).join(range(9999) | map('string'))",
    ],
    "replace": [
        "('x' * 99999) | replace('x', 'y' * 99999)",
        "('x' * 99999).replace('x', 'y' * 99999)",
        "('x' * 99999).replace('', 'y' * 99999)",
    ],
    "indent": ["('x\\n' * 99999) | indent(99999)", "('x\\n' * 99999) | indent('x' * 99999)"],
    "%": [
        "'%1000000000d' % 1",
        "'%.1000000000f' % 1",
        "'%*d' % (N, 1)",
        "'%.*f' % (N, 1)",
        "'%(a)1000000000s' % {'a': 1}",
        "('%(a)s' * 99999) % {'a': 'x' * 99999}",
    ],
    "format": [
        "'%1000000000d' | format(1)",
        "'{:>1000000000}'.format(1)",
        "'{:.1000000000f}'.format(1)",
        "'{:>{}}'.format(1, N)",
        "'{:{w}}'.format(1, w='>1000000000')",
        "('{0}' * 99999).format('x' * 99999)",
    ],
    "format_map": ["'{a:>1000000000}'.format_map({'a': 1})"],
    "batch": ["[1] | batch(N, 0) | list"],
    "slice": ["[1] | slice(N) | list"],
    "round": ["1.5 | round(N, 'ceil')", "1 | round(-N)"],
    "**": ["(2 ** 500000) ** 500000"],
    "*": ["(2 ** 999999) * (2 ** 999999) * (2 ** 999999)"],
    "tojson": ["1 | tojson(indent=N)", "1 | tojson(indent='x' * 1000000)"],
    "int": ["('f' * 1999999) | int(0, 16)", "('z' * 1999999) | int(base=36)"],
    "sum": ["([[0]] * 9999) | sum(start=[])", "([{'a': [0]}] * 9999) | sum('a', [])"],
    # What looks at all of a text again and again.
    "wordwrap": ["('x' * 2000000) | wordwrap(1)"],
    "striptags": ["('<>' * 900000) | striptags", "(('<>' * 900000) | safe).striptags()"],
    "urlize": ["(')' * 900000 ~ 'x)') | urlize"],
    "rfind": ["('a' * 1999999).rfind('b' ~ 'a' * 999999)"],
    "rsplit": ["('a' * 1999999).rsplit('b' ~ 'a' * 999999)"],
}
# Each step makes a value with the one before in it twice.
TWICE = [
    "[ns.x, ns.x]",
    "(ns.x, ns.x)",
    "{'a': ns.x, 'b': ns.x}",
    "{'a': ns.x.items(), 'b': ns.x.items()}",
    "dict(a=ns.x, b=ns.x)",
    "[1] | batch(3, ns.x) | list",
    "[ns.x] * 2",
]
STEPS = "{%% set ns = namespace(x={'a': 1}) %%}{%% for i in range(60) %%}{%% set ns.x = %s %%}{%% endfor %%}"
USER = [{"role": "user", "content": "Hi"}]


@pytest.fixture(autouse=True)
def any_machine(monkeypatch):
    """A slow machine meets the other limits first, too."""
    monkeypatch.setattr(sandbox, "MOST_SECONDS", math.inf)


def render(source, **names):
    return ChatTemplate(source, {}, "here").render(USER, **names)


@pytest.mark.parametrize("name, source", [(name, source) for name, all in LARGE.items() for source in all])
def test_a_result_that_is_too_large_is_not_made(name, source):
    with pytest.raises(UserError) as found:
        render("{{ " + source.replace("N", "10 ** 9") + " }}")
    assert str(found.value) == (
        f"here: the chat template refuses these messages: a result of {name} is too large"
    )


def test_a_filter_with_constants_is_not_computed_before_it_renders():
    """Jinja computes 'x' | upper when it compiles, but for these it asks first."""
    assert ChatTemplate("{% if no %}{{ 'x' | center(1000000000) }}{% endif %}", {}, "here").render([]) == ""
    assert ChatTemplate("{% if no %}{{ '%1000000000d' % 1 }}{% endif %}", {}, "here").render([]) == ""


@pytest.mark.parametrize("value", TWICE)
def test_lists_that_hold_one_another_twice_are_refused(value):
    """60 steps make a tree of 2^60 items in the memory of 60. To write or to compare it would not end."""
    with pytest.raises(UserError, match="here: .* it makes a list of more than 134,217,728 characters$"):
        render(STEPS % value)


def test_long_numbers_count_with_their_digits():
    with pytest.raises(UserError, match="here: .* it makes a list of more than 134,217,728 characters$"):
        render("{{ ([2 ** 900000] * 1999) | sum }}")
    assert render("{{ ([2 ** 900] * 19) | sum == 19 * 2 ** 900 }}{{ 'ff' | int(0, 16) }}") == "True255"


@pytest.mark.parametrize("held, again", [("varargs", "varargs, varargs"), ("kwargs", "a=kwargs, b=kwargs")])
def test_arguments_of_macros_cannot_hold_one_another_twice(held, again):
    macro = f"{{% macro m(n) %}}{{{{ m(n - 1, {again}) if n else {held} | length }}}}{{% endmacro %}}"
    assert render(macro + "{{ m(3) }}") == "2"
    with pytest.raises(UserError, match="here: .* it makes a list of more than"):
        render(macro + "{{ m(40) }}")


def test_a_namespace_does_not_write_what_it_holds():
    assert render(STEPS % "namespace(a=ns.x, b=ns.x)" + "{{ ns.x }}") == "<Namespace>"


@pytest.mark.parametrize(
    "made",
    [
        "x | upper",
        "x.upper()",
        "x[1:]",
        "x.split('y')",
        "[x] * 50",
        "[1] * 50",
        "(x, x, x)",
        "[0, 0, 0, 0, 0, 0, 0, 0, 0, 0]",
        "messages | list",
        "messages[:]",
        "'%s' % x",
        "[x] | tojson",
        "m()",
    ],
)
def test_all_that_a_template_makes_is_counted(monkeypatch, made):
    """A loop keeps what it makes. It can keep as many values of each kind as fit, and no more."""
    loop = "{% set x = 'xx' * 40 %}{% macro m() %}{{ x }}{% endmacro %}{% for i in range(n) %}"
    template = ChatTemplate(loop + "{% set y = " + made + " %}{% endfor %}", {}, "here")
    monkeypatch.setattr(sandbox, "MOST_TEXT", 5000)
    assert template.render(USER, n=2) == ""
    with pytest.raises(UserError, match="here: .* it writes more than 5,000 characters"):
        template.render(USER, n=500)


def test_the_source_of_a_template_is_counted_each_time_that_it_is_written(monkeypatch):
    monkeypatch.setattr(sandbox, "MOST_TEXT", 5000)
    for source in ("{% for i in range(n) %}" + "x" * 99, "{% for i in range(n) %}{{ i }}" + "x" * 99):
        template = ChatTemplate(source + "{% endfor %}", {}, "here")
        assert len(template.render([], n=40)) >= 40 * 99
        with pytest.raises(UserError, match="here: .* it writes more than 5,000 characters"):
            template.render([], n=60)


def test_pieces_of_json_are_counted_before_they_are_joined():
    """Here they have 10^10 characters in all."""
    with pytest.raises(UserError, match="here: .* it writes more than 134,217,728 characters"):
        render("{{ ([1] * 99999) | tojson(separators=('x' * 99999, ':')) }}")


def test_the_time_of_a_rendering_is_limited(monkeypatch):
    loop = "{% for i in range(3) %}{{ i }}{% endfor %}"
    assert render(loop) == "012"
    monkeypatch.setattr(sandbox, "MOST_SECONDS", -1.0)
    for source in (loop, "{{ 1 | string }}", "{{ 'x'.upper() }}"):
        with pytest.raises(UserError, match="here: .* it takes more than -1 seconds"):
            render(source)


@pytest.mark.parametrize(
    "source, words",
    [
        ("'x'.encode('punycode')", "access to attribute 'encode' of 'str' object is unsafe"),
        ("'x'.maketrans('x', 'y')", "access to attribute 'maketrans' of 'str' object is unsafe"),
        ("'x'.translate({120: 'y'})", "access to attribute 'translate' of 'str' object is unsafe"),
        ("(1).to_bytes(9, 'big')", "access to attribute 'to_bytes' of 'int' object is unsafe"),
        ("(1).from_bytes([1], 'big')", "access to attribute 'from_bytes' of 'int' object is unsafe"),
        ("'{0.real}'.format(1)", "a format with attributes or items of its values is not known here"),
        ("lipsum(9)", "'lipsum' is undefined"),
        ("strftime_now('x' * 1001)", "the format of a date is too long"),
    ],
)
def test_what_has_no_bound_and_no_use_is_refused(source, words):
    with pytest.raises(UserError, match=f"^here: the chat template refuses these messages: {words}"):
        render("{{ " + source + " }}")


@pytest.mark.parametrize(
    "source",
    [
        "'x' | center(9)",
        "'x'.center(9) ~ 'x'.ljust(3, '.') ~ 'x'.rjust(3) ~ '7'.zfill(3) ~ 'a\tb'.expandtabs(4)",
        "messages | join(',', 'role') ~ messages | map(attribute='content') | join('|') ~ 'abc' | join('-')",
        "', '.join(messages | map(attribute='role')) ~ '-'.join({'a': 1, 'b': 2})",
        "'a-b-a' | replace('a', 'xyz') ~ 'a-b-a'.replace('a', 'q', 1) ~ 'aaa' | replace('a', 'b', 2)",
        "'a\n\nb' | indent ~ 'a\nb' | indent(2, true) ~ 'a\nb' | indent('> ', blank=true)",
        "'%5d|%-5s|%.2f|%%|%(a)s' | replace('%(a)s', '') ",
        "'%5d|%-5s|%.2f|%%|%*d' % (1, 'x', 2, 4, 5) ~ '%(a)s' % {'a': messages} ~ '%s' % 'x' ~ 7 % 4",
        "'%s, %s' | format('a', 1) ~ '%(a)3d' | format(a=1)",
        "'{:>5}|{:{}}|{}|{!r}|{{}}'.format(1, 'x', 4, messages, 'y') ~ '{a}'.format_map({'a': 1})",
        "[1, 2, 3] | batch(2, 0) | list ~ [1, 2, 3] | slice(2, 0) | list",
        "2.345 | round(2) ~ 2.345 | round(1, 'ceil') ~ 1234 | round(-2)",
        "[1, 2] | sum ~ [[1], [2]] | sum(start=[]) ~ messages | sum('n', 3) if messages[0].n else 4",
        "('a b <c> http://x.y' | urlize) ~ ('a <b>c</b>' | striptags) ~ ('a b c' | wordwrap(2))",
        "'%1000000000d' + 'x' ~ 'a b'.rsplit() ~ 'a b'.rsplit(sep='b')",
        "namespace(encode='x').encode ~ '{~}'.format_map({'~': 1}) ~ 'x'.format(1)",
        "'a b'.rsplit(' ', 1) ~ 'a b'.rfind('b') ~ 'a b'.rpartition(' ')",
        "messages[0:1] ~ 'abc'[::-1] ~ [1, (2, {'a': [3]})] ~ (1, 2)[0]",
        "dict(a=1).items() | list ~ messages | groupby('role') ~ messages[0] | dictsort",
        "messages | map('upper') | list ~ [3, 1, 2] | sort ~ [1, 1] | unique | list ~ 'x' | default('y')",
        "nothing ~ nothing | default('y') ~ [nothing] | length ~ messages | length ~ messages | first",
    ],
)
def test_what_a_template_may_do_is_what_jinja_does(source):
    plain = jinja2.sandbox.ImmutableSandboxedEnvironment()
    source = "{{ " + source + " }}"
    assert render(source) == plain.from_string(source).render(messages=USER)
