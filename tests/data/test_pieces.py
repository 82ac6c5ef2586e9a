"""How text is read from files: in which pieces, and the errors for what cannot be read."""

import faults
import pytest
from test_corpus import texts
from test_data import failure, write

from longlora.data import text
from longlora.data.text import Corpus


@pytest.mark.parametrize(
    "block, content, pieces",
    [
        # after the last line break
        (8, "ab cd\nef gh ij", ["ab cd\n", "ef gh", " ij"]),
        (4, "\nabc\nd", ["\n", "abc\n", "d"]),
        # before the last space
        (4, "a bcd e", ["a", " bcd", " e"]),
        # before the last character
        (4, " abcdefghijkl", [" ab", "cdef", "ghij", "k", "l"]),
        (4, "a\u00e9\u6f22\U0001f642", ["a\u00e9", "\u6f22", "\U0001f642"]),
        (3, "\u6f22\u5b57", ["\u6f22", "\u5b57"]),
        (1, "\U0001f642\U0001f642", ["\U0001f642", "\U0001f642"]),
        # CRLF is never cut in two
        (4, "abc\r\ndef\r\n", ["abc", "\n", "def\n"]),
        # one byte order mark is removed, at the beginning
        (4, "\ufeffab\n\ufeffcd", ["ab\n", "\ufeffc", "d"]),
        (100, "\ufeff\ufeffa", ["\ufeff", "a"]),
    ],
)
def test_a_text_is_read_in_pieces(tmp_path, monkeypatch, block, content, pieces):
    monkeypatch.setattr(text, "BLOCK", block)
    found = Corpus(write(tmp_path / "a.txt", content))
    assert [list(document) for document in found.documents()] == [pieces]
    assert found.sentence() == ("CRLF became LF in 1 of 1 file" if "\r" in content else None)


@pytest.mark.parametrize("block", [1, 2, 5, 100])
@pytest.mark.parametrize(
    "content, at", [(b"\x80" * 11, 0), (b"ab\x80" * 3, 2), (b"a\n\xe6\xbcb", 2), (b"abc \xf0\x9f\x99", 4)]
)
def test_the_first_byte_that_is_not_utf_8_is_named(tmp_path, monkeypatch, block, content, at):
    monkeypatch.setattr(text, "BLOCK", block)
    path = write(tmp_path / "a.txt", content)
    assert failure(texts, Corpus(path)) == f"{path}: is not UTF-8 at byte {at}"


def test_a_text_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", "text")
    monkeypatch.setattr(text, "open_file", lambda path: faults.Unreadable())
    assert failure(texts, Corpus(path)) == f"{path}: cannot be read: Input/output error"


@pytest.mark.parametrize(
    "lines, words",
    [
        (['{"text": "a"}', '"text"'], 'line 2 should be an object with a string "text"'),
        (['["text"]'], 'line 1 should be an object with a string "text"'),
        (["{}"], 'line 1 should be an object with a string "text"'),
        (['{"text": null}'], 'line 1 should be an object with a string "text"'),
        (['{"text": ["a"]}'], 'line 1 should be an object with a string "text"'),
        (['{"text": "ab\\udc80c"}'], "line 1: its text holds half a character, '\\udc80' at 2"),
        (['{"text": "\\ud83d\\ude42 \\ud800"}'], "line 1: its text holds half a character, '\\ud800' at 2"),
        (['{"text": ""}', "", '{"text": ""}'], "holds no text"),
    ],
)
def test_a_record_with_a_wrong_text_is_named(tmp_path, lines, words):
    path = write(tmp_path / "a.jsonl", "\n".join(lines))
    message = failure(texts, Corpus(path))
    assert message.startswith(f"{path}: {words}")


def test_texts_of_records_are_not_changed(tmp_path):
    lines = ['{"text": "a\\r\\n"}', '{"text": ""}', '{"other": 1, "text": " "}', '{"text": "\\ud83d\\ude42"}']
    found = Corpus(write(tmp_path / "a.jsonl", "\n".join(lines)))
    assert texts(found) == ["a\r\n", " ", "\U0001f642"] and found.sentence() is None
