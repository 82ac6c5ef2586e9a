"""Messages are one printable line of limited length."""

import pytest

from longlora import errors


@pytest.mark.parametrize(
    "message, said",
    [
        (5, "5"),
        ("two\nlines\r\nthree", "two lines three"),
        ("a\x1bb\tc\ud800\U000e0001é", r"a\x1bb\tc\ud800\U000e0001é"),
        ("a" * 2000, "a" * 2000),
        ("a" * 1500 + "b" * 2 + "c" * 500, "a" * 1500 + " ... " + "c" * 500),
        ("a" * 1500 + "b" * 9000 + "c" * 500, "a" * 1500 + " ... " + "c" * 500),
    ],
)
def test_a_message_is_one_line(message, said):
    error = errors.UserError(message)
    assert str(error) == said and isinstance(error, ValueError)


def test_numbers_with_their_noun():
    found = [errors.counted(n, "thread") for n in (0, 1, 2, 1000)]
    assert found == ["0 threads", "1 thread", "2 threads", "1,000 threads"]


def test_values_are_cut_short():
    assert errors.shown({"a": [1, "b", None]}) == "{'a': [1, 'b', None]}"
    for made in (list, tuple):
        assert errors.shown(made(range(5))) == repr(made(range(5)))
        assert errors.shown(made(range(6))) == repr(made(range(5)))[:-1] + ", ..." + repr(made())[-1]
    assert errors.shown({i: i for i in range(5)}).count(":") == 5
    assert errors.shown({i: i for i in range(6)}).endswith("4: 4, ...}")
    assert errors.shown([[[1]]]) == "[[[1]]]" and errors.shown([[[[1]]]]) == "[[[[...]]]]"
    thing = type("Thing", (), {"__repr__": lambda self: "t" * self.length})()
    for value in ("s" * 298, 10**299):
        assert errors.shown(value) == repr(value)
    thing.length = 300
    assert errors.shown(thing) == "t" * 300
    thing.length = 301
    for value in ("s" * 299, 10**300, thing):
        assert len(errors.shown(value)) == 300 and "..." in errors.shown(value)
    assert errors.shown(1 << 9998)[:100] == str(1 << 9998)[:100]
    assert errors.shown(1 << 9999) == "a number of 10,000 bits"
