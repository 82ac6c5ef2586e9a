"""The text of an answer comes in whole characters, and stop strings may span tokens."""

import pytest
from served import Bytes
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from longlora.serving.text import Spelling, TextStream


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
    assert "".join(found) == "a" and stopped  # the one that begins first wins


def test_the_beginning_of_a_stop_string_is_held_back():
    found, stopped = pieces("x EN y E", ["END"])
    assert "".join(found) == "x EN y E" and not stopped
    assert found[:4] == ["x", " ", "", ""] and found[4] == "EN "  # only the space makes it certain
    assert found[-1] == "E"


def test_special_tokens_have_no_text():
    stream = TextStream(Bytes)
    assert stream.add(ord("a")) == "a" and stream.add(256) == "" and stream.add(ord("b")) == "b"


PIECES = "\u2581the \u2581caf\u00e9 s \u2581a\u2581b <0xE6> <0x97> <0xA5> <0x0a> x<0x41>".split()


class Pieces:
    """Tokens as SentencePiece writes them: with marks for spaces and single bytes. Two are added tokens."""

    backend = Backend(models.BPE({piece: i for i, piece in enumerate(PIECES)}, []))
    backend.decoder = decoders.ByteFallback()
    backend.add_special_tokens(["<s>"])
    backend.add_tokens(["\u00e9\u2581"])


def test_tokens_have_bytes_and_widths():
    """In a byte-level vocabulary and in SentencePiece's, whose mark U+2581 is a space."""
    spelling = Spelling(Bytes)
    assert [spelling.bytes(i) for i in range(256)] == [bytes([i]) for i in range(256)]
    assert [spelling.width(i) for i in (0x41, 0x7F, 0x80, 0xBF, 0xC3, 0xE6, 0xF0)] == [1, 1, 0, 0, 1, 1, 1]
    assert (spelling.bytes(256), spelling.width(256)) == (b"<|end|>", 0)
    assert (spelling.bytes(300), spelling.width(300)) == (b"", 0)

    spelling = Spelling(Pieces)
    assert [spelling.bytes(i) for i in range(11)] == [
        *(b" the", " caf\u00e9".encode(), b"s", b" a b", b"\xe6", b"\x97", b"\xa5", b"\n", b"x<0x41>"),
        *(b"<s>", "\u00e9\u2581".encode()),
    ]
    assert [spelling.width(i) for i in range(11)] == [4, 5, 1, 4, 1, 0, 0, 1, 7, 0, 2]


def test_the_end_of_a_long_token_is_held_back():
    stream = TextStream(Pieces, ["exy"])
    assert [stream.add(0), stream.add(2), stream.add(0)] == ["\u2581th", "es", "\u2581th"]
    assert [stream.finish(), stream.finish()] == ["e", ""]


def test_a_tokenizer_without_a_decoder():
    class Bare:
        backend = Backend(models.BPE({"a": 0, "\u2581b": 1}, []))

    assert [Spelling(Bare).bytes(i) for i in range(2)] == [b"a", b" b"]


@pytest.mark.parametrize(
    "text, stop, found",
    [
        ("ENDx", ["END"], ""),
        ("aENDbEND", ["END"], "a"),
        ("xabcy", ["bc", "abc"], "x"),
        ("xabcy", ["abc", "bc"], "x"),
        ("aab", ["aab", "ab"], ""),
        ("ab", [""], "ab"),
        ("ab", ["", "b"], "a"),
        ("ababac", ["abac"], "ab"),
    ],
)
def test_where_a_text_stops(text, stop, found):
    """The stop string that is complete first ends the text. Of two that end together, the longer one does."""
    said, stopped = pieces(text, stop)
    assert "".join(said) == found and stopped is (found != text)


def test_nothing_is_said_after_a_stop_string():
    stream = TextStream(Bytes, ["b"])
    assert [stream.add(ord(letter)) for letter in "abcd"] == ["a", "", "", ""] and stream.finish() == ""
    fresh = TextStream(Bytes)
    assert not fresh.stopped and fresh.finish() == ""


@pytest.mark.parametrize("stopped", [True, False])
def test_a_stop_string_changes_the_reason_of_the_engine(stopped):
    """The engine then says that the request was cancelled, or that it reached its limit."""
    stream = TextStream(Bytes, ["b"])
    stream.add(ord("b" if stopped else "a"))
    found = [stream.reason(reason) for reason in ("cancelled", "length", "error", "refused", "stop")]
    assert found[:2] == (["stop"] * 2 if stopped else ["cancelled", "length"])
    assert found[2:] == ["error", "refused", "stop"]


def test_special_tokens_have_a_text_if_they_are_not_skipped():
    stream = TextStream(Bytes, skip_special_tokens=False)
    assert stream.add(256) == "<|end|>"
    assert TextStream(Bytes, ["<|end|>"]).add(256) == ""


def test_letters_that_stand_for_no_byte_are_left_out():
    """A byte-level vocabulary writes each byte as a letter. Token 0 has a letter too many, 2 is no token."""

    class Letters:
        backend = Backend(models.BPE({"a\u65e5": 0, "\u0120b": 1}, []))
        backend.decoder = decoders.ByteLevel()

    assert [Spelling(Letters).bytes(i) for i in range(3)] == [b"a", b" b", b""]
