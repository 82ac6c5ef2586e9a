"""Text becomes sequences with the ids of the whole text. Lost tokens are counted, errors are named."""

import gc
import os
import resource
import subprocess
import sys
import warnings

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from systems import on_linux
from test_tokenizer import UGLY, trained

from longlora.data import text, tokens
from longlora.data.sequences import Order, Sequences, batch
from longlora.data.tokens import Tokens, encode_documents, tokenise
from longlora.errors import UserError
from longlora.files.tokenizer import Tokenizer


def tokenizer(kind, template=None):
    backend = trained(kind)
    if template:
        from tokenizers import processors

        backend.post_processor = processors.TemplateProcessing(
            single=template,
            special_tokens=[("<s>", backend.token_to_id("<s>")), ("</s>", backend.token_to_id("</s>"))],
        )
    eos = "</s>" if kind == "llama" else "<|endoftext|>"
    return Tokenizer(backend, {"eos_token": eos}, {}, kind)


KINDS = {
    "gpt2": tokenizer("gpt2"),
    "llama3": tokenizer("llama3"),
    "qwen2": tokenizer("qwen2"),
    "llama": tokenizer("llama"),
    "llama-bos": tokenizer("llama", "<s> $A"),
    "llama-both": tokenizer("llama", "<s> $A </s>"),
}


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def tokens_of(sizes):
    """Tokens of documents of these sizes. Their ids count up."""
    borders = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return Tokens(np.arange(borders[-1], dtype=np.int32), borders, "")


def failure(function, *arguments):
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@given(
    parts=st.lists(
        st.sampled_from(
            [*UGLY, " ", "\n", "\n\n", "the quick", "don't", "  x\n y", "12 34\n", ".\n", "é\r\n"]
        ),
        max_size=30,
    ),
    block=st.integers(1, 60),
)
@settings(max_examples=60)
def test_a_text_read_in_blocks_has_the_ids_of_the_whole(tmp_path_factory, kind, parts, block):
    whole = "".join(parts)
    if not whole.strip():
        return
    path, made = tmp_path_factory.getbasetemp() / f"{kind}.txt", KINDS[kind]
    write(path, whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "BLOCK", block)
        (pieces,) = map(list, text.Corpus(str(path)).documents())
        lines = whole.removeprefix("\ufeff").replace("\r\n", "\n")
        assert "".join(pieces) == lines
        ids, ends = zip(*encode_documents(made, [pieces, ["it"], pieces]))
    one, two = made.encode(lines), made.encode("it")
    np.testing.assert_array_equal(np.concatenate(ids), np.concatenate([one, two, one]))
    assert np.cumsum([len(part) for part in ids])[list(ends)].tolist() == [
        len(one),
        len(one) + len(two),
        2 * len(one) + len(two),
    ]


def test_a_file_larger_than_memory_is_tokenised_in_it(tmp_path):
    size = 6 << 20
    path = write(tmp_path / "large.txt", b"the quick brown fox jumps over the lazy dog 0123\n" * (size // 49))
    tiny.config(tmp_path / "model")
    script = f"""
import resource
from longlora.data import text, tokens
from longlora.files.tokenizer import Tokenizer
text.BLOCK = 1 << 11                  # AT_ONCE of them are in memory
made = Tokenizer.from_directory({str(tmp_path / "model")!r})
made.encode("warm")
def tokenise(name):
    return tokens.tokenise(name, made, 257, {str(tmp_path / "cache")!r}, str)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
count = len(tokenise({path!r}).ids)
print(count, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=1200)
    count, growth = map(int, done.stdout.split())
    assert count == os.path.getsize(path) + 1
    # the ids alone take 4 bytes for each byte of this text
    assert growth < size


@pytest.mark.parametrize("block", [7, 1 << 20])
@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.txt", "fine line\n" * 50 + "x", []),
        ("bad.txt", b"fine line\n" * 50 + b"oh \xff no", ["not UTF-8 at byte 503"]),
        ("cut.txt", "naïve".encode()[:3], ["not UTF-8 at byte 2"]),
        ("empty.txt", "", ["holds no text"]),
        ("blank.txt", " \n\t \n", ["holds no text"]),
        ("empty.jsonl", "\n\n", ["holds no text"]),
        ("nothing.jsonl", '{"text": ""}\n', ["holds no text"]),
        ("marked.jsonl", '\ufeff\n{"text": "a"}\n', []),
        ("bad.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', ["not UTF-8 at byte 24"]),
        ("broken.jsonl", '{"text": "a"}\n\n{"text": \n', ["line 3 is not JSON"]),
        ("deep.jsonl", "[" * 100_000 + "\n", ["line 1 is not JSON"]),
        ("other.jsonl", '{"content": "a"}\n', ['line 1 should be an object with a string "text"']),
        ("half.jsonl", '{"text": "a"}\n{"text": "so \\ud83d"}\n', ["line 2", "'\\ud83d' at 3", "emoji"]),
        ("number.jsonl", '{"text": 3}\n', ["line 1 should be"]),
        ("list.jsonl", '["a"]\n', ["line 1 should be"]),
        ("text.csv", "a,b\n", ["should be .txt, .jsonl or .bin"]),
    ],
)
def test_errors_say_what_is_wrong_with_a_text(tmp_path, monkeypatch, block, name, content, words):
    monkeypatch.setattr(text, "BLOCK", block)
    path, cache = write(tmp_path / name, content), tmp_path / "cache"
    if not words:
        assert len(tokenise(path, KINDS["gpt2"], 400, str(cache), str).ids)
        return
    message = failure(tokenise, path, KINDS["gpt2"], 400, str(cache))
    assert path in message and all(word in message for word in words), message
    assert not cache.exists() or not tiny.listing(cache)


def test_documents_end_in_one_end_token_and_the_cache_is_used(tmp_path, monkeypatch):
    made, cache, data = KINDS["llama-both"], str(tmp_path / "cache"), tmp_path / "data"
    data.mkdir()
    write(data / "a.txt", "hello world")
    write(data / "b.jsonl", '{"text": "one"}\n\n{"text": "two"}\n')
    said = []
    found = tokenise(str(data), made, 500, cache, said.append)
    wanted = [made.encode(words) for words in ("hello world", "one", "two")]
    assert len(found) == 3 and said and "3 documents" in said[0]
    for i, ids in enumerate(wanted):  # the template adds </s> itself
        np.testing.assert_array_equal(found.document(i), ids)
    plain = tokenise(str(data), KINDS["llama"], 500, cache, said.append)
    assert all(plain.document(i)[-1] == KINDS["llama"].eos_token_id for i in range(3))
    assert plain.fingerprint != found.fingerprint and len(said) == 2
    monkeypatch.setattr(tokens, "_tokenise", None)
    again = tokenise(str(data), made, 500, cache, said.append)
    np.testing.assert_array_equal(again.ids, found.ids)
    assert again.fingerprint == found.fingerprint and len(said) == 2


def test_changed_text_is_tokenised_anew_and_a_damaged_cache_is_named(tmp_path):
    path, cache = write(tmp_path / "a.txt", "one"), tmp_path / "cache"
    first = tokenise(path, KINDS["gpt2"], 400, str(cache), str)
    write(tmp_path / "a.txt", "three")
    os.utime(path, (1, 1))
    second = tokenise(path, KINDS["gpt2"], 400, str(cache), str)
    assert first.fingerprint != second.fingerprint and len(first.ids) != len(second.ids)
    for file in cache.glob("*.bin"):
        file.write_bytes(b"")
    assert "damaged" in failure(tokenise, path, KINDS["gpt2"], 400, str(cache))


@pytest.mark.parametrize(
    "name, content, time",
    [("a.txt", "two", 2), ("a.txt", "three", 1), ("b.txt", "two", 1)],
    ids=["time", "size", "path"],
)
def test_text_of_another_time_size_or_path_is_tokenised_anew(tmp_path, name, content, time):
    """The cache notices a change of any of the three. The tokens are those of this text alone."""
    cache, made = tmp_path / "cache", KINDS["gpt2"]
    for file, words, seconds in (("a.txt", "one", 1), (name, content, time)):
        path = write(tmp_path / file, words)
        os.utime(path, (seconds, seconds))
        found = tokenise(path, made, 400, str(cache), str)
        assert made.backend.decode(found.ids[:-1].tolist()) == words
        assert found.ids[-1:] == made.eos_token_id
    assert len(list(cache.glob("*.bin"))) == 2


def test_a_tokenisation_that_fails_leaves_nothing(tmp_path, monkeypatch):
    path, cache = write(tmp_path / "a.txt", "some text\n" * 2000), tmp_path / "cache"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))  # a full disk
    try:
        message = failure(tokenise, path, KINDS["gpt2"], 400, str(cache))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "cannot be written" in message and not tiny.listing(cache)


# ---- sequences -----------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=30),
    length=st.integers(2, 17),
    rule=st.sampled_from(["split", "truncate", "drop"]),
)
@settings(max_examples=200)
def test_every_token_is_in_one_sequence_or_counted_as_lost(sizes, length, rule):
    kept = {
        "split": sizes,
        "truncate": [min(n, length) for n in sizes],
        "drop": [n for n in sizes if n <= length],
    }[rule]
    total = sum(kept)
    if total < 2:
        assert "leaves no sequence" in failure(Sequences, tokens_of(sizes), length, rule)
        return
    found = Sequences(tokens_of(sizes), length, rule)
    pieces = [found.get(i) for i in range(len(found))]
    assert all(len(p) == length for p in pieces[:-1]) and 2 <= len(pieces[-1]) <= length
    ids = np.concatenate(pieces)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    wanted = [
        np.arange(a, a + (min(n, length) if rule == "truncate" else n))
        for a, n in zip(starts, sizes)
        if rule != "drop" or n <= length
    ]
    wanted = np.concatenate(wanted)
    assert len(wanted) - len(ids) == (total % length == 1)  # a single token has no target
    np.testing.assert_array_equal(ids, wanted[: len(ids)])
    long = sum(n > length for n in sizes)
    assert (f"{long} longer document{'s'[: long != 1]} " in found.sentence) is bool(long)
    if rule != "split" and long:
        lost = sum(sizes) - total
        assert f"{lost:,} token{'s'[: lost != 1]} lost" in found.sentence


@pytest.mark.parametrize(
    "rule, sequences, end",
    [
        ("split", "7 sequences", "2 longer documents split"),
        ("truncate", "3 sequences", "2 longer documents truncated, 38 tokens lost"),
        ("drop", "1 sequence", "2 longer documents dropped, 58 tokens lost"),
    ],
)
def test_a_sentence_says_in_numbers_what_becomes_of_documents(rule, sequences, end):
    """Documents of 20, 5 and 38 tokens fill sequences of 10."""
    found = Sequences(tokens_of([20, 5, 38]), 10, rule)
    assert len(found) == int(sequences.split()[0]) and found.sentence == (
        f"3 documents, 63 tokens (shortest 5, median 20, longest 38) -> {sequences} of 10; {end}"
    )


def test_a_batch_has_the_next_tokens_as_targets_and_no_target_in_padding():
    found = Sequences(tokens_of([17]), 10)
    ids, targets, cu_seqlens = batch(found, [1, 0])
    assert cu_seqlens is None
    assert ids.dtype == targets.dtype == np.int32 and ids.shape == targets.shape == (2, 10)
    np.testing.assert_array_equal(targets[1], [*range(1, 10), -100])
    np.testing.assert_array_equal(ids[0], [*range(10, 17), 0, 0, 0])
    np.testing.assert_array_equal(targets[0], [*range(11, 17), -100, -100, -100, -100])
    assert batch(found, [1])[0].shape == (1, 7) and batch(found, [1], 5)[0].shape == (1, 10)


def test_documents_that_do_not_see_each_other_are_packed_whole():
    """Two documents leave room for one token. It would have no target, so the sequence ends before it.

    Documents of a single token are left out.
    """
    found = Sequences(tokens_of([3, 4, 1, 6]), 8, packing_boundaries="document")
    assert found.pieces == [[(0, 3), (3, 7)], [(8, 14)]]
    assert "documents do not see each other, 1 single token left out" in found.sentence
    ids, targets, cu_seqlens = batch(found, [1, 0])
    none = -100
    assert ids.tolist() == [[8, 9, 10, 11, 12, 13, 0], [0, 1, 2, 3, 4, 5, 6]]
    assert targets.tolist() == [[9, 10, 11, 12, 13, none, none], [1, 2, none, 4, 5, 6, none]]
    assert cu_seqlens.tolist() == [0, 6, 7, 10, 14] and cu_seqlens.dtype == np.int32
    assert [text.tolist() for text in found.texts(0)] == [[0, 1, 2], [3, 4, 5, 6]]
    joined = Sequences(tokens_of([3, 4, 1, 6]), 8)
    assert [text.tolist() for text in joined.texts(0)] == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert "leaves no sequence" in failure(Sequences, tokens_of([1, 1, 1]), 8, "split", "data", "document")


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=30),
    length=st.integers(2, 17),
    rule=st.sampled_from(["split", "truncate", "drop"]),
    boundaries=st.sampled_from(["none", "document"]),
)
@settings(max_examples=200)
def test_a_target_is_the_next_token_of_the_same_text(sizes, length, rule, boundaries):
    tokens = tokens_of(sizes)
    try:
        found = Sequences(tokens, length, rule, packing_boundaries=boundaries)
    except UserError:
        return
    document = np.repeat(np.arange(len(sizes)), sizes)
    used = []
    for i in range(len(found)):
        ids, targets, cu_seqlens = batch(found, [i, 0])
        assert (targets[0] >= 0).sum() == found.targets(i) > 0
        scored = targets >= 0
        if boundaries == "none":
            assert cu_seqlens is None
        else:
            assert (targets[scored] == ids[scored] + 1).all()
            assert (document[ids[scored]] == document[targets[scored]]).all()
            assert cu_seqlens[0] == 0 and cu_seqlens[-1] == ids.size and (np.diff(cu_seqlens) > 0).all()
            ends = cu_seqlens[1:] - 1
            assert not scored.ravel()[ends].any()  # the last token of a text has no target
            filled = np.array([[len(found.get(i))], [len(found.get(0))]])
            padding = np.flatnonzero(np.arange(ids.shape[1]) >= filled)
            others = np.setdiff1d(np.arange(ids.size), np.concatenate([ends, padding]))
            assert scored.ravel()[others].all()
        used += found.get(i).tolist()
    assert len(used) == len(set(used)) and used == sorted(used)
    if boundaries == "document" and rule == "split":
        left = sum(sizes) - len(used)
        assert left == 0 or f"{left:,} single token{'s'[: left != 1]} left out" in found.sentence


@given(
    n=st.integers(1, 20),
    seed=st.integers(0, 5),
    takes=st.lists(st.integers(0, 9), max_size=12),
    stop=st.integers(0, 12),
)
def test_the_order_is_a_permutation_in_each_epoch_and_can_be_resumed(n, seed, takes, stop):
    whole = Order(n, seed)
    taken = [whole.take(count) for count in takes]
    order = [i for part in taken for i in part]
    for start in range(0, len(order) - n + 1, n):
        assert sorted(order[start : start + n]) == list(range(n))
    resumed = Order(n, seed, sum(takes[:stop]))
    assert [resumed.take(count) for count in takes[stop:]] == taken[stop:]


@on_linux
def test_a_file_of_ids_is_closed_with_its_object(tmp_path):
    np.arange(4, dtype="<i4").tofile(tmp_path / "ids.bin")
    gc.collect()  # what earlier tests left open closes now
    before = set(os.listdir("/proc/self/fd"))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        ids = tokens.FileIds(str(tmp_path / "ids.bin"), "<i4")
        assert ids[1:3].tolist() == [1, 2] and set(os.listdir("/proc/self/fd")) != before
        del ids
        gc.collect()
    assert set(os.listdir("/proc/self/fd")) <= before
    assert not [str(warning.message) for warning in seen if warning.category is ResourceWarning]
