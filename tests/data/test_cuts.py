"""Where a long text is cut, with 4 characters compared on each side of a cut instead of 256."""

import re

import numpy as np
import pytest
from test_data import failure
from test_parts import made

from longlora.data import parts
from longlora.data.parts import Parts


class Words:
    """A tokenizer whose tokens are the matches of a regular expression."""

    backend = None

    def __init__(self, pattern):
        self.pattern, self.ids = re.compile(pattern, re.S), {}

    def encode_parts(self, texts):
        return [
            np.array([self.ids.setdefault(word, len(self.ids)) for word in self.pattern.findall(text)])
            for text in texts
        ]


@pytest.fixture
def few(monkeypatch):
    """Compare 4 characters on each side of a cut, and try 2 places in a text without spaces."""
    monkeypatch.setattr(parts, "NEIGHBOURS", 4)
    monkeypatch.setattr(parts, "TRIES", 2)


def cut(tokenizer, pieces):
    """The parts of the text that is read in these pieces."""
    found = list(Parts(tokenizer).of(pieces))
    assert [last for _, last in found] == [False] * (len(found) - 1) + [True]
    return [part for part, _ in found]


@pytest.mark.parametrize(
    "pieces, wanted",
    [
        ([], [""]),
        (["", "ab"], ["ab"]),
        (["ab", "cd"], ["abcd"]),
        # after a line break or before a space, between two pieces
        (["ab\n", "cd\n", "ef"], ["ab\n", "cd\n", "ef"]),
        (["ab", " cd", " ef"], ["ab", " cd", " ef"]),
        (["a", " b"], ["a", " b"]),
        (["a\nb", " c"], ["a\nb", " c"]),
        # after the last line break of the text so far, not of the next piece
        (["ab\ncd", "ef\ngh", "ij"], ["ab\n", "cdef\n", "ghij"]),
        (["a\nb\ncd", "e"], ["a\nb\n", "cde"]),
        (["ab", "cd\nef"], ["abcd\nef"]),
        (["ab\nc", "", "d"], ["ab\n", "cd"]),
        # not where one side has only spaces
        (["ab", "  cd"], ["ab  cd"]),
        (["ab\n", "\n cd"], ["ab\n\n cd"]),
        (["  \n", "ab"], ["  \nab"]),
        (["ab\n", " cd"], ["ab\n", " cd"]),
        (["ab\ncd\n", "  ef"], ["ab\n", "cd\n  ef"]),
        # in text that came after the last search
        (["abcdefgh", "ij\nk", "lm"], ["abcdefghij\n", "klm"]),
        (["abcdefgh", "ijkl", " mn"], ["abcdefghijkl", " mn"]),
        (["abcdefg", "\n", "hi"], ["abcdefg\n", "hi"]),
    ],
)
def test_a_text_is_cut_at_line_breaks_and_spaces(few, pieces, wanted):
    assert cut(Words("."), pieces) == wanted


@pytest.mark.parametrize(
    "pattern, pieces, wanted",
    [
        ("\nx|.", ["ab\n", "xy"], ["ab\nxy"]),
        ("\nx|.", ["ab\nc\n", "xy"], ["ab\n", "c\nxy"]),
        ("\nx|.", ["a\n\n", "xy"], ["a\n", "\nxy"]),
        ("b |.", ["ab", " cd", " ef"], ["ab cd", " ef"]),
        ("cde\nfghi|.", ["abcde\n", "fghij"], ["abcde\nfghij"]),  # all 4 characters count
    ],
)
def test_a_text_is_not_cut_where_the_tokens_change(few, pattern, pieces, wanted):
    assert cut(Words(pattern), pieces) == wanted


PLAIN = ("plain", "xyz")
BYTES = ("bytes", "")


@pytest.mark.parametrize(
    "tokenizer, pieces, wanted",
    [
        # 9 characters: 4 after the cut, more than 4 before it
        (BYTES, ["abcdefgh", "i", "j"], ["abcde", "fghij"]),
        (BYTES, ["abcdefgh", "i"], ["abcdefghi"]),
        (PLAIN, ["xyzxyzxyz", "x"], ["xyzxy", "zxyzx"]),
        ((*BYTES, [("x", "y")]), ["z" * 9, "z"], ["z" * 5, "z" * 5]),
        # a search that fails at 9 characters is repeated at twice as many
        (BYTES, ["1"] * 9 + ["a"] * 20, ["1" * 9 + "a" * 6, "a" * 5, "a" * 9]),
        # at the second of the 2 places
        (BYTES, ["aaaaa11111", "1"], ["aaaaa", "111111"]),
        (BYTES, ["aaaaaa1111", "1"], ["aaaaaa", "11111"]),
        (BYTES, ["aaaa111111", "1"], ["aaaa1111111"]),
        # NFC joins an e and the accent after it
        ((*BYTES, [], "NFC"), ["e\u0301" * 5 + "e", "\u0301"], ["e\u0301" * 3, "e\u0301" * 3]),
        # a token of the vocabulary could lie across each place
        ((*BYTES, [("a", "a")]), ["a" * 9, "a", "a"], ["a" * 11]),
        ((*BYTES, [("1", "a"), ("a", "1a")]), ["a1" * 5, "a1"], ["a1" * 6]),
        # a token of 4 characters, as many as are compared, and a longer one
        ((*BYTES, [("a", "b"), ("c", "d"), ("ab", "cd")]), ["z" * 9, "z"], ["z" * 5, "z" * 5]),
        ((*BYTES, [("a", "b"), ("c", "d"), ("ab", "cd"), ("abcd", "a")]), ["z" * 9, "z"], ["z" * 10]),
    ],
)
def test_a_text_without_spaces_is_cut_where_no_token_can_lie_across(few, tokenizer, pieces, wanted):
    assert cut(made(*tokenizer), pieces) == wanted


def test_an_added_token_may_lie_across_a_cut(few):
    tokenizer = made("bytes", "")
    tokenizer.backend.add_tokens(["<|end|>"])
    assert cut(tokenizer, ["z" * 9, "z"]) == ["z" * 10]


def test_only_bpe_tokenizers_allow_cuts_without_spaces(few):
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    from longlora.files.tokenizer import Tokenizer

    unigram = Backend(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("aa", -1.5)], 0))
    assert cut(Tokenizer(unigram, {}, {}, "here"), ["a" * 9, "a"]) == ["a" * 10]


@pytest.mark.parametrize(
    "left, right, allowed",
    [
        *[(left, right, True) for left, right in ("ab", "\u6f22\u5b57", "a1", "1a", "a.", ".a", ".1", "1.")],
        *[(left, right, False) for left, right in ("11", "1\u00b2", "..", "-=")],
        # before a space, but beside no other white space
        *[(left, " ", True) for left in "a1."],
        *[
            (left, right, False)
            for left, right in (" a", " 1", " .", "  ", "a\n", "1\n", ".\n", "\na", "\n ")
        ],
    ],
)
def test_runs_that_a_regular_expression_may_count_are_not_cut(left, right, allowed):
    assert parts._classes_allow(left, right) is allowed


def test_memory_limits_a_document_that_cannot_be_cut(monkeypatch):
    """Only documents of more than LARGE bytes can be refused."""
    monkeypatch.setattr(parts, "available_memory", lambda: 0)
    assert cut(Words("."), ["a text"]) == ["a text"]
    monkeypatch.setattr(parts, "LARGE", 1000)
    asked = 1001 * parts.BYTES_PER_BYTE
    for words, memory in (
        ("\u00e9" * 500, 0),
        ("x" * 1000, 0),
        ("x" * 1001, asked),
        ("\u00e9" * 600, 2 * asked),
    ):
        monkeypatch.setattr(parts, "available_memory", lambda memory=memory: memory)
        assert cut(Words("."), [words]) == [words]
        assert cut(Words("."), [words[:1], words[1:]]) == [words]
    for words, memory in (("x" * 1001, asked - 1), ("x" * 1001, 0), ("\u00e9" * 501, asked)):
        monkeypatch.setattr(parts, "available_memory", lambda memory=memory: memory)
        for pieces in ([words], [words[:400], words[400:]]):
            message = failure(cut, Words("."), pieces)
            assert message.startswith(f"{len(words):,} characters of a document cannot be tokenised part by ")
            assert (
                "do not fit in memory; split it into several files, or into the lines of a .jsonl" in message
            )
    monkeypatch.setattr(parts, "available_memory", lambda: 0)
    lines = ["x" * 600 + "\n"] * 4  # it can be cut at its line breaks
    assert cut(Words("."), lines) == lines
