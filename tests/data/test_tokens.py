"""Tokenising, token files and the cache. Each byte of a text is a token here, and 256 ends a text."""

import contextlib
import hashlib
import json
import os
import re
import sys

import numpy as np
import pytest
import tiny
from test_data import failure, write
from test_records import Library

from longlora import progress
from longlora.data import text, tokens
from longlora.data.chat import Instructions, form_of
from longlora.data.tokens import FileIds, encode_documents, read_bin, tokenise
from longlora.errors import UserError
from longlora.files.tokenizer import Tokenizer

END = 256


def made(template=None, eos="<|end|>"):
    """The tokenizer of tiny models. template: where special tokens go around a text, $A."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import processors

    backend = Backend.from_str(tiny.tokenizer_json())
    if template:
        special = [("<|end|>", END)]
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return Tokenizer(backend, {"eos_token": eos} if eos else {}, {}, "here")


def texts(path, *contents):
    return write(path, "".join(json.dumps({"text": content}) + "\n" for content in contents))


def array(ids, kind="<i4"):
    return np.array(ids, kind).tobytes()


# ---- tokenising ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "template, front, back", [(None, [], []), ("<|end|> $A", [END], []), ("<|end|> $A <|end|>", [END], [END])]
)
def test_special_tokens_stand_around_a_document_and_not_between_its_parts(template, front, back):
    pieces = ["the quick brown fox\n" * 30] * 5
    found = list(encode_documents(made(template), [pieces, ["it"]]))
    ends = [i for i, (_, end) in enumerate(found) if end]
    assert len(ends) == 2 and ends[0] >= 3 and ends[1] == ends[0] + 1 == len(found) - 1
    whole = np.concatenate([ids for ids, _ in found[: ends[0] + 1]])
    assert whole.tolist() == [*front, *"".join(pieces).encode(), *back]
    assert found[-1][0].tolist() == [*front, *b"it", *back] and found[-1][0].dtype == np.int32


@pytest.mark.parametrize(
    "at_once, block, size, counts",
    [
        (4, 64, 1, [4, 4, 2]),  # a short text counts as 64 characters
        (1, 129, 1, [3, 3, 3, 1]),
        (1, 128, 64, [2, 2, 2, 2, 2]),
        (3, 100, 100, [3, 3, 3, 1]),
    ],
)
def test_texts_are_tokenised_in_groups_up_to_a_size(monkeypatch, at_once, block, size, counts):
    monkeypatch.setattr(tokens, "AT_ONCE", at_once)
    monkeypatch.setattr(text, "BLOCK", block)
    tokenizer, seen = made(), []
    encode = tokenizer.encode_parts
    monkeypatch.setattr(tokenizer, "encode_parts", lambda parts: seen.append(len(parts)) or encode(parts))
    found = list(encode_documents(tokenizer, [["x" * size]] * 10))
    assert [ids.tolist() for ids, _ in found] == [[ord("x")] * size] * 10
    assert [count for count in seen[1:] if count] == counts  # the first call asks for the special tokens


# ---- files of ids --------------------------------------------------------------------------------


def test_a_file_of_ids_is_read_like_an_array(tmp_path):
    wanted = np.arange(7, dtype="<i4") * 70_000
    path = write(tmp_path / "a.bin", b"12" + wanted.tobytes())
    ids = FileIds(path, "<i4", 2)
    assert len(ids) == 7
    for part in (slice(None), slice(2, 5), slice(-2, None), slice(5, 100), slice(3, 3), slice(5, 2)):
        assert ids[part].tolist() == wanted[part].tolist() and ids[part].dtype == np.int32
    assert np.asarray(ids).tolist() == wanted.tolist() and np.asarray(ids).dtype == np.int32
    assert ids.__array__(np.int64).dtype == np.int64
    assert FileIds(write(tmp_path / "b.bin", array([1, 2])), "<i4")[:].tolist() == [1, 2]


def test_a_short_read_is_continued(tmp_path, monkeypatch):
    """Linux returns at most 2 GiB at once, and less after a signal."""
    ids = FileIds(write(tmp_path / "a.bin", array(range(10))), "<i4")
    preadv, sizes = os.preadv, []

    def less(handle, views, place):
        sizes.append(preadv(handle, [views[0][:3]], place))
        return sizes[-1]

    monkeypatch.setattr(os, "preadv", less)
    assert ids[2:6].tolist() == [2, 3, 4, 5]
    assert sizes == [3, 3, 3, 3, 3, 1]


def test_a_file_of_ids_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "a.bin", array(range(10)))
    ids = FileIds(path, "<i4")
    os.truncate(path, 24)
    assert ids[:6].tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(UserError, match=re.escape(f"{path}: has been truncated since it was opened")):
        ids[4:8]

    def broken(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(UserError, match=re.escape(f"{path}: cannot be read: Input/output error")):
        ids[:1]


# ---- token files ---------------------------------------------------------------------------------


def headed(version, count, ids, kind):
    """A token file of llm.c. Its header has 256 int32: a magic number, a version, the number of tokens."""
    magic = {"<u2": 20240520, "<u4": 20240801}[kind]
    return array([magic, version, count, *[0] * 253]) + array(ids, kind)


@pytest.mark.parametrize(
    "vocab_size, kind", [(256, "<u2"), (65_536, "<u2"), (65_537, "<u4"), (131_072, "<u4"), (200_000, "<u4")]
)
def test_without_a_header_the_vocabulary_decides_the_size_of_a_token(tmp_path, vocab_size, kind):
    ids = [0, 255, vocab_size - 1]
    found = read_bin(write(tmp_path / "a.bin", array(ids, kind)), vocab_size)
    assert found.ids[:].tolist() == found.document(0).tolist() == ids
    assert found.borders.tolist() == [0, 3] and len(found) == 1 and found.learned is None


@pytest.mark.parametrize("kind", ["<u2", "<u4"])
def test_a_header_decides_the_size_of_a_token(tmp_path, kind):
    ids = [7, 8, 9]
    for vocab_size in (100, 100_000):
        found = read_bin(write(tmp_path / "a.bin", headed(1, 3, ids, kind)), vocab_size)
        assert found.ids[:].tolist() == ids and found.borders.tolist() == [0, 3]
        assert found.fingerprint == hashlib.sha256(array(ids, kind)).hexdigest()


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "0 bytes are not a whole number of uint16 tokens"),
        (b"abc", "3 bytes are not a whole number of uint16 tokens"),
        (headed(1, 0, [], "<u2"), "0 bytes are not a whole number of uint16 tokens"),
        (headed(1, 5, [], "<u2"), "should hold 5 tokens by its header, holds 0"),
        (headed(1, 3, [1, 2], "<u4"), "should hold 3 tokens by its header, holds 2"),
        (headed(1, 2, [1, 2], "<u4") + b"ab", "10 bytes are not a whole number of uint32 tokens"),
        (array([1, 100, 101], "<u2"), "token 1 is 100, the model has 100 tokens"),
        (array([100], "<u2"), "token 0 is 100, the model has 100 tokens"),
        (headed(1, 2, [1, 70_000], "<u4"), "token 1 is 70000, the model has 100 tokens"),
    ],
)
def test_a_wrong_token_file_is_refused(tmp_path, content, words):
    path = write(tmp_path / "a.bin", content)
    assert failure(read_bin, path, 100) == f"{path}: {words}"


def test_a_large_token_file_is_read_in_parts(tmp_path):
    """The last part is checked too. A resumed run compares the fingerprint, so it must never change."""
    size = (1 << 22) + 3
    path = write(tmp_path / "a.bin", array([1, 2, 3], "<u2"))
    os.truncate(path, 2 * size)
    found = read_bin(path, 100)
    assert len(found.ids) == size
    assert found.fingerprint == hashlib.sha256((tmp_path / "a.bin").read_bytes()).hexdigest()
    with open(path, "r+b") as file:
        file.seek(2 * (size - 1))
        file.write(array([100], "<u2"))
    assert failure(read_bin, path, 100) == f"{path}: token {size - 1} is 100, the model has 100 tokens"


def test_a_token_file_needs_no_tokenizer_and_no_cache(tmp_path):
    path, cache = write(tmp_path / "a.bin", array([1, 2], "<u2")), tmp_path / "cache"
    assert tokenise(path, None, 100, str(cache)).ids[:].tolist() == [1, 2]
    assert "token 1 is 2" in failure(tokenise, path, None, 2, str(cache))
    path = write(tmp_path / "a.txt", "text")
    message = failure(tokenise, path, None, 100, str(cache))
    assert message == f"{path}: the model has no tokenizer; wanted a token .bin"
    assert not cache.exists()


# ---- the cache -----------------------------------------------------------------------------------


def test_the_cache_holds_the_documents_and_their_borders(tmp_path):
    """A resumed run compares the fingerprint, so it must never change."""
    path, cache, said = texts(tmp_path / "a.jsonl", "ab", "", "c"), tmp_path / "cache", []
    ids, borders = [*b"ab", END, *b"c", END], [0, 3, 5]
    for _ in range(2):
        found = tokenise(path, made(), 257, str(cache), said.append)
        assert found.ids[:].tolist() == ids and found.ids.dtype == np.int32 and found.learned is None
        assert found.borders.tolist() == borders and found.borders.dtype == np.int64
        assert [found.document(i).tolist() for i in range(len(found))] == [ids[:3], ids[3:]]
        assert found.fingerprint == hashlib.sha256(array(ids) + array(borders, "<i8")).hexdigest()
    size = os.path.getsize(path)
    assert said == [f"tokenised 2 documents, 5 tokens, {size / 5:.2f} bytes each"]
    names = [os.path.basename(name) for name in tiny.listing(cache)]
    assert len(names) == 2 and all(re.fullmatch(tokens.CACHED, name) for name in names)
    (described,) = cache.glob("*.json")
    assert json.loads(described.read_text())["files"] == [path]


def test_the_cache_holds_a_long_document_in_one_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "BLOCK", 1000)
    words = ["the quick brown fox\n" * 200, "it\n"]
    for name, content in zip(("a.txt", "b.txt"), words):
        write(tmp_path / name, content)
    found = tokenise(str(tmp_path), made(), 257, str(tmp_path / "cache"), str)
    assert len(list(encode_documents(made(), text.Corpus(str(tmp_path)).documents()))) > 4
    assert found.ids[:].tolist() == [*words[0].encode(), END, *words[1].encode(), END]
    assert found.borders.tolist() == [0, 4001, 4005]


@pytest.mark.parametrize(
    "what, row", [("document", {"text": "abc"}), ("sample", {"prompt": "ab", "completion": "c"})]
)
def test_files_that_are_left_out_of_a_folder_are_reported(tmp_path, what, row):
    data, said = tmp_path / "data", []
    data.mkdir()
    path = write(data / "a.jsonl", json.dumps(row) + "\n")
    write(data / "b.md", "")
    form, besides, size = form_of(path), "left out 1 of another kind (b.md)", os.path.getsize(path)
    if form is None:
        size += os.path.getsize(write(data / "c.txt", "\n"))
        besides += ", 1 without text (c.txt)"
    how = form and Instructions(form, None)
    for _ in range(2):
        tokenise(str(data), made(), 257, str(tmp_path / "cache"), said.append, how)
    assert said[0] == f"tokenised 1 {what}, 4 tokens, {size / 4:.2f} bytes each; {besides}"
    assert said[1:] == [f"{data}: {besides}"]


def test_the_cache_holds_which_tokens_are_learned(tmp_path):
    rows = [{"prompt": "ab", "completion": "c"}, {"prompt": "d", "completion": "e"}]
    path = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    cache, said = tmp_path / "cache", []
    ids, learned, borders = [*b"abc", END, *b"de", END], [0, 0, 1, 1, 0, 1, 1], [0, 4, 7]
    parts = array(ids[:4]), array(learned[:4], "u1"), array(ids[4:]), array(learned[4:], "u1")
    for _ in range(2):
        how = Instructions(form_of(path), None)
        found = tokenise(path, made(), 257, str(cache), said.append, how)
        assert found.ids[:].tolist() == ids and found.learned[:].tolist() == learned
        assert found.borders.tolist() == borders
        assert found.fingerprint == hashlib.sha256(b"".join(parts) + array(borders, "<i8")).hexdigest()
    assert said == [f"tokenised 2 samples, 7 tokens, {os.path.getsize(path) / 7:.2f} bytes each"]
    names = [os.path.basename(name) for name in tiny.listing(cache)]
    assert len(names) == 3 and all(re.fullmatch(tokens.CACHED, name) for name in names)


@pytest.mark.parametrize("suffix", [".bin", ".mask"])
@pytest.mark.parametrize("change", [os.unlink, lambda path: os.truncate(path, os.path.getsize(path) - 1)])
def test_a_cache_with_a_lost_or_short_file_is_refused(tmp_path, suffix, change):
    path = write(tmp_path / "a.jsonl", json.dumps({"prompt": "ab", "completion": "c"}) + "\n")
    arguments = path, made(), 257, str(tmp_path / "cache"), str, Instructions(form_of(path), None)
    tokenise(*arguments)
    (file,) = (tmp_path / "cache").glob(f"*{suffix}")
    change(file)
    assert failure(tokenise, *arguments) == f"{file}: is damaged; remove it and {file.with_suffix('.json')}"


def test_documents_need_no_end_token(tmp_path):
    path = texts(tmp_path / "a.jsonl", "ab", "c")
    found = tokenise(path, made(eos=None), 257, str(tmp_path / "cache"), str)
    assert found.ids[:].tolist() == [*b"abc"] and found.borders.tolist() == [0, 2, 3]


def test_a_document_that_ends_in_the_end_token_gets_no_second_one(tmp_path):
    path = texts(tmp_path / "a.jsonl", "ab<|end|>", "<|end|>c", "<|end|>")
    found = tokenise(path, made(), 257, str(tmp_path / "cache"), str)
    assert found.ids[:].tolist() == [*b"ab", END, END, *b"c", END, END]
    assert found.borders.tolist() == [0, 3, 6, 7]


def test_a_link_to_nothing_is_named(tmp_path):
    path = str(tmp_path / "lost.txt")
    os.symlink("nowhere", path)
    message = failure(tokenise, path, made(), 257, str(tmp_path / "cache"))
    assert message == f"{path}: No such file or directory"


class Rows(list):
    """A fake of datasets.Dataset."""

    def __init__(self, *words):
        super().__init__({"text": word} for word in words)
        self._fingerprint = repr(words)


def test_a_dataset_that_changed_is_tokenised_anew(tmp_path, monkeypatch):
    said = []
    for words in ("ab", "c", "ab"):
        monkeypatch.setitem(sys.modules, "datasets", Library(Rows(words)))
        found = tokenise("someone/texts", made(), 257, str(tmp_path / "cache"), said.append)
        assert found.ids[:].tolist() == [*words.encode(), END]
    assert said == ["tokenised 1 document, 3 tokens", "tokenised 1 document, 2 tokens"]


class Bar:
    """A fake progress bar. It adds up its updates."""

    def __init__(self, total, **_):
        self.total, self.count = total, 0

    def update(self, count):
        self.count += count


def test_without_a_terminal_there_is_no_progress_bar(tmp_path, capsys):
    tokenise(write(tmp_path / "a.txt", "text"), made(), 257, str(tmp_path / "cache"), str)
    assert capsys.readouterr() == ("", "")


def test_the_progress_bar_counts_the_text(tmp_path, monkeypatch):
    bars = []

    def bar(**how):
        bars.append(Bar(**how))
        return contextlib.nullcontext(bars[-1])

    monkeypatch.setattr(progress, "bar", bar)
    path = write(tmp_path / "a.txt", "caf\u00e9 " * 9)
    tokenise(path, made(), 257, str(tmp_path / "cache"), str)
    assert [(bar.total, bar.count) for bar in bars] == [(54, 54)]
    path = write(tmp_path / "a.jsonl", json.dumps({"prompt": "ab", "completion": "c"}) + "\n")
    tokenise(path, made(), 257, str(tmp_path / "cache"), str, Instructions(form_of(path), None))
    assert bars[1].total == os.path.getsize(path) and bars[1].count == 3
    monkeypatch.setitem(sys.modules, "datasets", Library(Rows("ab")))
    tokenise("someone/texts", made(), 257, str(tmp_path / "cache"), str)
    assert bars[2].total is None  # the size of a dataset is not known
