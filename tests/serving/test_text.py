"""Text of an answer as it comes: whole characters, and stop strings that span tokens."""

import pytest
import tiny
from tokenizers import Tokenizer as Backend

from longlora.serving.text import TextStream


class Bytes:
    """One token for each byte."""

    backend = Backend.from_str(tiny.tokenizer_json())


def pieces(text, stop=()):
    stream = TextStream(Bytes, stop)
    found = [stream.add(byte) for byte in text.encode()]
    return [*found, stream.finish()], stream.stopped


@pytest.mark.parametrize(
    "text", ["plain", "caf\u00e9 \u65e5\u672c\u8a9e", "\U0001f600 and \U0001f468\u200d\U0001f469", ""]
)
def test_no_piece_ends_inside_a_character(text):
    found, stopped = pieces(text)
    assert "".join(found) == text and not stopped
    assert all("\ufffd" not in piece for piece in found)


def test_a_stop_string_ends_the_text_and_is_not_part_of_it():
    found, stopped = pieces("one two END three", ["END"])
    assert "".join(found) == "one two " and stopped
    found, stopped = pieces("aab", ["ab", "b"])
    assert "".join(found) == "a" and stopped  # the first to begin wins


def test_what_might_begin_a_stop_string_is_held_back():
    found, stopped = pieces("x EN y E", ["END"])
    assert "".join(found) == "x EN y E" and not stopped
    assert found[:4] == ["x", " ", "", ""] and found[4] == "EN "  # certain only with the space
    assert found[-1] == "E"


def test_special_tokens_have_no_text():
    stream = TextStream(Bytes)
    assert stream.add(ord("a")) == "a" and stream.add(256) == "" and stream.add(ord("b")) == "b"
