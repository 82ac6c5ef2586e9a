"""A long text is tokenised in parts and has the ids of the whole, whatever its characters."""

import effort
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data import KINDS, failure, write

from longlora.data import parts, text
from longlora.data.parts import Parts
from longlora.data.text import Corpus
from longlora.data.tokens import encode_documents, tokenise
from longlora.files.tokenizer import Tokenizer


def made(kind, letters, merges=(), normalizer=None):
    """A BPE tokenizer. Its vocabulary is `letters` and the results of `merges`, each "a b" -> "ab"."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, normalizers, pre_tokenizers

    if kind == "bytes":
        letters = pre_tokenizers.ByteLevel.alphabet()
    tokens = [*sorted(letters), *("".join(pair) for pair in merges)]
    backend = Backend(models.BPE({token: i for i, token in enumerate(tokens)}, list(merges)))
    if kind == "bytes":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif kind == "metaspace":  # transformers builds LlamaTokenizer like this
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    if normalizer:
        backend.normalizer = getattr(normalizers, normalizer)()
    return Tokenizer(backend, {}, {}, kind)


DOUBLING = [("a", "a"), ("aa", "aa"), ("aaaa", "aaaa")]
MADE = {
    **KINDS,
    "doubling": made("bytes", "", DOUBLING),
    "pairs": made("bytes", "", [("a", "b"), ("b", "a"), ("ab", "ab"), ("b", "c"), ("1", "2")]),
    "metaspace": made("metaspace", "▁abcdef 1.é", [("a", "b"), ("▁", "a"), ("▁", "▁"), ("▁▁", "▁▁")]),
    "nfc": made("bytes", "", [("a", "b")], "NFC"),
}


def together(tokenizer, whole, size):
    """The ids of a text that is read in pieces of `size` characters, and the number of its parts."""
    pieces = [whole[i : i + size] for i in range(0, len(whole), size)]
    found = [part for part, _ in Parts(tokenizer).of(pieces)]
    assert "".join(found) == whole
    return np.concatenate([ids for ids, _ in encode_documents(tokenizer, [pieces])]), len(found)


@pytest.mark.parametrize("kind", MADE)
@given(
    runs=st.lists(
        st.tuples(
            st.sampled_from(
                [
                    "a",
                    "ab",
                    "abc",
                    "1",
                    "12",
                    ".",
                    "é",
                    "e\u0301",
                    "\u1100\u1161",
                    "漢字",
                    "仮",
                    "x'll",
                    "-a",
                    " ",
                    " b",
                    "\n",
                    "b\n",
                    "a1",
                    "🙂",
                    "Ab",
                    "<|endoftext|>",
                    "</s>",
                ]
            ),
            st.integers(1, 90),
        ),
        min_size=1,
        max_size=5,
    ),
    size=st.integers(20, 120),
)
@settings(max_examples=150)
def test_runs_without_spaces_have_the_ids_of_the_whole(kind, runs, size):
    """The search looks at few characters, so runs are longer than that."""
    whole = "".join(unit * count for unit, count in runs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "NEIGHBOURS", 24)
        ids, _ = together(MADE[kind], whole, size)
    np.testing.assert_array_equal(ids, MADE[kind].encode(whole))


@pytest.mark.parametrize(
    "kind, unit, cut",
    [
        ("gpt2", "the quick brown fox\n", True),
        ("gpt2", "the quick brown fox ", True),
        ("llama", "the quick brown fox\n", False),  # it puts a space before a text's first word
        ("metaspace", "abc def ", True),
        ("metaspace", "abcdef", False),
        ("gpt2", "漢字仮名", True),
        ("llama3", "漢字。仮名、", True),
        ("qwen2", "QWxhZGRpbjpvcGVu", True),
        ("gpt2", "1234,", True),
        ("doubling", "a", False),  # a token may begin at each a
        ("doubling", "b", True),
        ("gpt2", "1", False),  # llama3's regular expression counts digits by three
        ("gpt2", "=", False),
        ("gpt2", " ", False),
    ],
)
def test_texts_are_cut_where_the_tokenizer_allows_it(kind, unit, cut):
    whole = unit * (20_000 // len(unit)) + "x"
    ids, count = together(MADE[kind], whole, 1000)
    assert count >= 15 if cut else count == 1
    np.testing.assert_array_equal(ids, MADE[kind].encode(whole))


def test_a_cut_inside_a_run_of_letters_keeps_the_ids():
    """The tokens of a run of a depend on its beginning: 8 8 2 1, not 8 2 1 8. Near a cut they agree."""
    tokenizer = MADE["doubling"]
    assert list(map(len, tokenizer.backend.encode("a" * 19).tokens)) == [8, 8, 2, 1]
    ids, count = together(tokenizer, "a" * 5003, 1000)
    np.testing.assert_array_equal(ids, tokenizer.encode("a" * 5003))


def test_the_work_for_text_without_spaces_grows_with_its_length(tmp_path, monkeypatch):
    """Twice as many blocks take twice the work: calls, characters that are tokenised, memory for a part."""
    monkeypatch.setattr(text, "BLOCK", 1 << 10)
    tokenizer, found = MADE["gpt2"], []
    encode, seen = tokenizer.encode_parts, []
    monkeypatch.setattr(tokenizer, "encode_parts", lambda texts: seen.extend(texts) or encode(texts))
    for count in (1 << 15, 1 << 16):
        path = write(tmp_path / "long.txt", "漢字仮名" * count)
        blocks = list(text._blocks(path, list))
        assert len(blocks) > count // 100 and "".join(blocks) == "漢字仮名" * count
        seen.clear()
        with effort.calls() as counted:
            documents = list(encode_documents(tokenizer, Corpus(path).documents()))
        assert len(documents) > count // 100 and max(map(len, seen)) < 3 * text.BLOCK
        found.append([counted.count, sum(map(len, seen))])
    (calls, characters), twice = found
    assert twice[0] < 2.2 * calls and twice[1] < 2.2 * characters, found


def test_a_document_that_cannot_be_cut_and_does_not_fit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "BLOCK", 1000)
    monkeypatch.setattr(parts, "LARGE", 1000)
    monkeypatch.setattr(parts, "available_memory", lambda: 1_000_000)
    path, cache = write(tmp_path / "long.txt", "the quick brown fox\n" * 500), tmp_path / "cache"
    message = failure(tokenise, path, KINDS["llama"], 500, str(cache))
    assert "do not fit in memory" in message and "jsonl" in message
    assert not tiny.listing(cache)
    assert len(tokenise(path, KINDS["gpt2"], 400, str(cache), str))
