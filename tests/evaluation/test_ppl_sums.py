"""Perplexity: sums over the losses of a fake model, arguments at their limits, the table."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import tiny

from longlora.data import text
from longlora.errors import UserError
from longlora.evaluation import ppl
from longlora.files.open_model import open_model

IGNORE = -100  # as in torch and transformers


class Fake:
    """A fake model. The loss of a target is the target itself; it is 99 where there is no target."""

    def __init__(self):
        self.windows = []

    def losses(self, window, targets):
        assert window.dtype == targets.dtype == np.int32 and len(window) == len(targets)
        self.windows.append((window.tolist(), targets.tolist()))
        return np.where(targets == IGNORE, 99, targets).astype(np.float32)

    def scores(self, window, targets):
        """Log-probabilities -target / 4; even targets are the likeliest."""
        assert len(window) == len(targets)
        self.windows.append((window.tolist(), targets.tolist()))
        return -targets / 4, targets % 2 == 0


def ids(*values):
    return np.array(values, np.int32)


# ---- windows -------------------------------------------------------------------------------------


def test_each_target_is_scored_in_one_window():
    assert ppl.windows(9, 4) == [(0, 4, 1), (4, 8, 5)]  # the last token has no target
    assert ppl.windows(10, 4) == [(0, 4, 1), (4, 8, 5), (8, 10, 9)]
    assert ppl.windows(9, 4, 2) == [(0, 4, 1), (2, 6, 4), (4, 8, 6), (6, 9, 8)]
    assert ppl.windows(8, 4, 4) == ppl.windows(8, 4)
    assert ppl.windows(1, 4) == ppl.windows(0, 4, 1) == []
    assert ppl.windows(2, 4, 1) == [(0, 2, 1)]


def test_each_target_is_summed_once():
    model, positions = Fake(), np.zeros((2, 4))
    assert ppl.score(model, ids(1, 2, 3, 4, 5, 6, 7), 4, 2, positions) == (6, 2 + 3 + 4 + 5 + 6 + 7)
    assert model.windows == [
        ([1, 2, 3, 4], [2, 3, 4, IGNORE]),
        ([3, 4, 5, 6], [IGNORE, 5, 6, IGNORE]),
        ([5, 6, 7], [IGNORE, 7, IGNORE]),
    ]
    assert positions.tolist() == [[2, 3 + 5 + 7, 4 + 6, 0], [1, 3, 2, 0]]
    model = Fake()
    assert ppl.score(model, ids(1, 2, 3, 4, 5, 6), 4) == (4, 2 + 3 + 4 + 6)
    assert model.windows == [([1, 2, 3, 4], [2, 3, 4, IGNORE]), ([5, 6], [6, IGNORE])]
    assert ppl.score(model, ids(), 4) == ppl.score(model, ids(5), 4, 1) == (0, 0.0)


def test_sums_are_exact_where_float32_is_not():
    """2^25 and three ones: float32 drops a one that is added to 2^25."""
    model = SimpleNamespace(losses=lambda window, targets: np.float32([1 << 25, 1, 1, 1, 0]))
    assert ppl.score(model, ids(1, 2, 3, 4, 5), 5) == (4, (1 << 25) + 3.0)


def test_the_perplexity_of_a_huge_loss_is_infinite():
    assert ppl.perplexity(2.0) == math.exp(2.0) and ppl.perplexity(0.0) == 1.0
    assert ppl.perplexity(1000.0) == math.inf


# ---- results -------------------------------------------------------------------------------------


def test_documents_are_averaged_over_their_tokens():
    """Two documents have the targets 2, 0 and 1. A document of one token has none."""
    parts = [ids(9, 2, 0), ids(7), ids(8, 1)]
    whole, halves = ppl.measure(Fake(), parts, [8, 2])
    assert whole == dict(length=8, tokens=3, loss=1.0, perplexity=math.e)
    assert halves == dict(length=2, tokens=2, loss=1.5, perplexity=math.exp(1.5))
    with pytest.raises(UserError, match="at least two tokens"):
        ppl.measure(Fake(), [ids(7), ids(8)], [8])


def test_bins_are_equal_parts_of_the_window():
    """A window of 10 tokens has 3 bins. No document has a target in the last."""
    (found,) = ppl.measure(Fake(), [ids(9, 1, 2, 3, 4), ids(9, 5)], [10], bins=3)
    assert found.pop("by_position") == [
        dict(first=0, last=3, tokens=4, loss=11 / 4, perplexity=math.exp(11 / 4)),
        dict(first=3, last=6, tokens=1, loss=4.0, perplexity=math.exp(4.0)),
    ]
    assert found == dict(length=10, tokens=5, loss=3.0, perplexity=math.exp(3.0))
    (found,) = ppl.measure(Fake(), [ids(9, 1, 2)], [3], stride=1, bins=100)
    assert [(b["first"], b["last"], b["loss"]) for b in found["by_position"]] == [(0, 1, 1.0), (1, 2, 2.0)]


def test_the_last_bin_ends_with_the_window():
    (found,) = ppl.measure(Fake(), [ids(*range(8))], [8], bins=2)
    assert [(b["first"], b["last"], b["tokens"]) for b in found["by_position"]] == [(0, 4, 4), (4, 8, 3)]


def test_the_authors_numbers_are_means_over_windows():
    """Windows of 4 begin at 0, 256 and 512 of 600 tokens. The authors leave out the last."""
    stream = np.arange(600, dtype=np.int32) % 7
    model = Fake()
    found = ppl.measure_authors(model, [stream[:100], stream[100:]], 4)
    wanted = [(stream[i : i + 4].tolist(), stream[i + 1 : i + 5].tolist()) for i in (0, 256)]
    assert model.windows == wanted
    # targets 1 2 3 | 4 and 5 6 0 | 1, as 256 is 4 modulo 7
    loss = ((1 + 2 + 3) / 12 + (5 + 6 + 0) / 12) / 2
    power = pytest.approx(2.71828**loss, rel=1e-15)
    assert found == dict(windows=2, loss=pytest.approx(loss), perplexity=power, accuracy=0.5)


def test_the_authors_perplexity_of_a_huge_loss_is_infinite():
    model = SimpleNamespace(scores=lambda window, targets: (np.full(4, -1000.0), np.zeros(4)))
    assert ppl.measure_authors(model, [np.zeros(300, np.int32)], 4)["perplexity"] == math.inf


def test_the_authors_windows_begin_every_256_tokens():
    assert list(ppl.authors_windows(1000, 100)) == [0, 256, 512]
    assert list(ppl.authors_windows(357, 100)) == [0]
    for parts in ([], [ids(1, 2)], [np.zeros(356, np.int32)]):
        count = sum(map(len, parts))
        with pytest.raises(UserError, match=f"at least 357 tokens for windows of 100, the data has {count}$"):
            ppl.measure_authors(Fake(), parts, 100)


# ---- a run ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.model(tmp_path_factory.mktemp("sums") / "base")


@pytest.fixture
def data(tmp_path):
    """Documents of 20, 1 and 4 tokens."""
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "context of the token"}\n{"text": "a"}\n{"text": "long"}\n')
    return path


@pytest.mark.parametrize(
    "most, sizes", [(None, [20, 1, 4]), (10, [10, 0, 0]), (20, [20, 0, 0]), (23, [20, 1, 2])]
)
def test_max_tokens_keeps_the_first_tokens_of_all_documents(base, data, most, sizes):
    opened, corpus = open_model(base), text.Corpus(str(data))
    parts = ppl.read_ids(corpus, opened.tokenizer(), opened.config, most)
    assert [len(part) for part in parts] == sizes
    assert bytes(parts[0].tolist()) == b"context of the token"[: sizes[0]]


def test_a_model_without_a_tokenizer_needs_token_ids(base, data, tmp_path):
    config = open_model(base).config
    with pytest.raises(UserError, match="t.jsonl: the model has no tokenizer; wanted a token .bin"):
        ppl.read_ids(text.Corpus(str(data)), None, config)
    np.array([5, 6, 7], "<u2").tofile(tmp_path / "t.bin")
    (part,) = ppl.read_ids(text.Corpus(str(tmp_path / "t.bin")), None, config)
    assert part.tolist() == [5, 6, 7]


def test_a_result_has_its_settings(base, data):
    found = ppl.run(base, data, 8, device="cpu")
    (result,) = found.pop("results")
    assert set(result) == {"length", "tokens", "loss", "perplexity"} and result["tokens"] == 20 - 3 + 3
    assert found == dict(
        model=str(base),
        adapter=None,
        data=str(data),
        left_out=None,
        longest_document=20,
        max_tokens=None,
        attention="dense",
        device="cpu",
        stride=None,
        rope=dict(type="default", factor=1.0),
    )


def test_arguments_at_their_limits_are_accepted(base, data):
    limit = dict(lengths=[2, 1 << 50], stride=1, max_tokens=2, device="cpu")
    two, all_of_it = ppl.run(base, data, **limit)["results"]
    assert two["tokens"] == all_of_it["tokens"] == 1
    (found,) = ppl.run(base, data, [8], stride=8, bins=1, max_tokens=1 << 50, device="cpu")["results"]
    assert [(b["first"], b["last"], b["tokens"]) for b in found["by_position"]] == [(0, 8, found["tokens"])]
    found = ppl.run(base, data, [65, 128], rope_type="linear", device="cpu")
    assert found["rope"] == dict(type="linear", factor=2.0)  # from 64 tokens to the longest length
    found = ppl.run(base, data, 8, rope_type="linear", target_length=256, device="cpu")
    assert found["rope"] == dict(type="linear", factor=4.0)


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(lengths=1), "lengths should be an integer of at least 2, got 1"),
        (dict(lengths=[]), "lengths should be an integer of at least 2, got None"),
        (dict(lengths=[8, None]), "lengths should be an integer of at least 2, got None"),
        (dict(lengths=[8, "x"]), "lengths should be an integer of at least 2, got 'x'"),
        (dict(lengths=[8.0]), "lengths should be an integer of at least 2, got 8.0"),
        (dict(lengths=(1 << 50) + 1), "lengths should be at most 1125899906842624, got 1125899906842625"),
        (dict(stride=0), "stride should be an integer of at least 1, got 0"),
        (dict(stride=True), "stride should be an integer of at least 1, got True"),
        (dict(lengths=[9, 8], stride=9), "stride should be at most the shortest length 8, got 9"),
        (
            dict(rope_type="linear", target_length=0),
            "target_length should be an integer of at least 1, got 0",
        ),
        (dict(max_tokens=1), "max_tokens should be an integer of at least 2, got 1"),
        (dict(bins=0), "bins should be an integer of at least 1, got 0"),
        (dict(protocol=""), "protocol should be authors, got ''"),
        (dict(protocol="ours"), "protocol should be authors, got 'ours'"),
        (dict(target_length=128), "target_length needs rope_type"),
    ],
)
def test_an_argument_out_of_range_is_an_error_before_anything_is_opened(monkeypatch, fields, words):
    monkeypatch.setattr(ppl, "choose", None)
    with pytest.raises(UserError, match=words):
        ppl.run("m", "t.txt", **dict(dict(lengths=8), **fields))


def test_a_target_length_of_one_is_not_taken_for_none(base, data):
    with pytest.raises(UserError, match="target length should be above the 64 tokens"):
        ppl.run(base, data, 8, rope_type="linear", target_length=1)


def test_a_text_too_short_for_the_authors_windows_is_an_error_before_it_is_scored(base, data, monkeypatch):
    monkeypatch.setattr(ppl, "measure_authors", None)
    with pytest.raises(UserError, match="at least 266 tokens for windows of 9, the data has 25"):
        ppl.run(base, data, [9, 8], protocol="authors")


def test_a_model_is_in_float32_on_the_cpu_by_default(base):
    made, opened = ppl.open_for_evaluation(base)
    assert (made.dtype, made.device) == ("float32", "cpu") and opened.config == made.config
    assert ppl.open_for_evaluation(base, dtype="bfloat16")[0].dtype == "bfloat16"
    with pytest.raises(UserError, match="rope_type needs target_length"):
        ppl.open_for_evaluation(base, rope_type="linear")


@pytest.mark.parametrize(
    "given, wanted", [({}, ("float32", "auto")), (dict(dtype="d", device="e"), ("d", "e"))]
)
def test_run_opens_the_model_with_its_arguments(data, monkeypatch, given, wanted):
    class Opened(Exception):
        pass

    def opened(*what):
        raise Opened(*what)

    monkeypatch.setattr(ppl, "choose", lambda device: (f"chosen {device}", ""))
    monkeypatch.setattr(ppl, "open_for_evaluation", opened)
    with pytest.raises(Opened) as caught:
        ppl.run("m", data, [8, 9], "a", rope_type="ntk", **given)
    assert caught.value.args == ("m", "a", "ntk", 9, wanted[0], f"chosen {wanted[1]}")


# ---- the table -----------------------------------------------------------------------------------


def test_the_table_has_a_line_for_each_length():
    rows = [(8, 1234, 1.5), (20, 56, 2.25), (21, 56, 2.25)]
    results = [dict(length=n, tokens=k, loss=x, perplexity=math.exp(x)) for n, k, x in rows]
    found = dict(results=results, longest_document=20, max_tokens=None, left_out=None)
    lines = [
        "  length     tokens     loss  perplexity",
        "       8      1,234   1.5000       4.482",
        "      20         56   2.2500       9.488",
        "      21          -        -           -",
    ]
    note = "no document has 21 tokens; the longest has 20"
    assert ppl.text(found).splitlines() == [*lines, note]
    assert ppl.text({**found, "max_tokens": 1020}).splitlines()[-1] == f"{note} (max_tokens is 1,020)"
    found = dict(found, results=results[:2], left_out="left out 1 hidden (x)")
    assert ppl.text(found).splitlines() == [*lines[:3], "left out 1 hidden (x)"]
    found["results"][0]["authors"] = dict(windows=1000, loss=0.5, perplexity=1.6487, accuracy=0.25)
    assert ppl.text(found).splitlines() == [
        *lines[:3],
        "",
        "by the authors' protocol:",
        "  length    windows     loss  perplexity  accuracy",
        "       8      1,000   0.5000       1.649    0.2500",
        "left out 1 hidden (x)",
    ]
