"""What passkey and topics share: checks of numbers, the search for the longest prompt, and results."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import tiny

from longlora import disk
from longlora.errors import UserError
from longlora.evaluation import retrieval

MOST = 16_777_216 - 64  # the tokens that a cache holds, less those of an answer


# ---- numbers -------------------------------------------------------------------------------------


def test_numbers_at_their_limits_are_accepted():
    retrieval.integers(lengths=[1, MOST], samples=1, seed=0)
    retrieval.integers(lengths=(300,), samples=MOST, seed=MOST)
    retrieval.integers(lengths=MOST)


@pytest.mark.parametrize(
    "given, words",
    [
        (dict(samples=0), "samples should be an integer from 1 to 16777152, got 0$"),
        (dict(seed=-1), "seed should be an integer from 0 to 16777152, got -1$"),
        (dict(lengths=MOST + 1), "lengths should be an integer from 1 to 16777152, got 16777153$"),
        (dict(lengths=[300, 0]), "lengths .* got 0$"),
        (dict(lengths=[300, 2.0]), "lengths .* got 2.0$"),
        (dict(samples=2, lengths=(1, True)), "lengths .* got True$"),
        (dict(lengths=[]), r"lengths .* got \[\]$"),
    ],
)
def test_a_number_out_of_range_is_an_error(given, words):
    with pytest.raises(UserError, match=words):
        retrieval.integers(**given)


# ---- the search ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer, guess, most",
    [(0, 500, 1000), (1, 0, 9), (1, 9, 9), (2, 9, 9), (9, 0, 9), (9, 4, 9), (8, 50, 9), (0, 0, 0), (3, -7, 5)]
    + [(900_010, 900_000, 5_000_000), (899_990, 900_000, 5_000_000), (100_000, 90, 5_000_000)]
    + [(100_000, 200_000, 5_000_000), (4_999_990, 4_900_000, 5_000_000)],
)
def test_the_search_finds_the_largest_in_few_calls(answer, guess, most):
    """Steps of 32, 64, ... lead from the guess past the answer. Then the last step is bisected."""
    calls = []

    def tokens(n):
        calls.append(n)
        assert len(calls) < 60
        return 10 * n

    assert retrieval.longest(tokens, 10 * answer, guess, most) == answer
    assert all(0 < n <= most for n in calls)
    steps = math.ceil(math.log2(abs(answer - guess) / 32 + 1)) + 1
    assert len(calls) <= 1 + steps + 4 + steps


# ---- words ---------------------------------------------------------------------------------------


def test_ranges_and_lengths_have_words():
    assert [retrieval.span(x) for x in ([3], [3, 3, 3], [4, 3, 9, 5], iter([2, 1]))] == [
        "3",
        "3",
        "3 to 9",
        "1 to 2",
    ]
    about = dict(context_length=4096, pretrained_length=2048)
    assert retrieval.made_for(about) == "the model is made for 4,096 tokens, its base for 2,048"
    assert retrieval.made_for({**about, "pretrained_length": 4096}) == "the model is made for 4,096 tokens"
    wanted = "length 5 is too short: with nothing the prompt has 7 tokens"
    assert str(retrieval.too_short(5, 7, "with nothing")) == wanted


# ---- answers -------------------------------------------------------------------------------------


def test_answers_have_the_tokens_that_their_prompts_ask_for_but_at_most_64():
    asked = []

    def answers(ids, count, end):
        asked.append(([x.tolist() for x in ids], count, end))
        return [list(b"abcdefgh")] * len(ids)

    def prompt(size, count, wanted):
        ids = np.arange(size, dtype=np.int32)
        return retrieval.Prompt(ids, wanted, count, lambda text: text == wanted, dict(depth=size / 10))

    opened = SimpleNamespace(
        end=frozenset([7]), tokenizer=SimpleNamespace(decode=lambda x: bytes(x).decode())
    )
    reader = SimpleNamespace(answers=answers)
    found = retrieval._answers(opened, reader, [prompt(2, 3, "abc"), prompt(1, 5, "abc")])
    assert asked == [([[0, 1], [0]], 5, frozenset([7]))]
    assert found == [
        dict(depth=0.2, tokens=2, expected="abc", answer="abc", right=True),
        dict(depth=0.1, tokens=1, expected="abc", answer="abcde", right=False),
    ]
    plain = retrieval.Prompt(np.arange(3, dtype=np.int32), "x", 99, lambda text: False)
    (answer,) = retrieval._answers(opened, reader, [plain])
    assert answer == dict(tokens=3, expected="x", answer="abcdefgh", right=False)
    assert asked[1][1] == 64


def test_cells_are_filled_in_batches_of_as_many_prompts_as_there_are_rows(monkeypatch):
    """The second cell already has an answer. The model is loaded once, and each cell has a line of output."""
    cells, loaded, asked, said, kept = [dict(length=3, depth=0.5), dict(length=4, depth=1.0)], [], [], [], []
    rows = SimpleNamespace(rows=2)

    def load():
        loaded.append(1)
        engine = SimpleNamespace(cache=rows, generator=SimpleNamespace(cache=rows))
        return SimpleNamespace(engine=engine, tokenizer="tokenizer")

    def answer(opened, reader, prompts):
        assert prompts and len(asked) < 9
        asked.append(prompts)
        return [dict(right=number == 1) for _, _, number in prompts]

    monkeypatch.setattr(retrieval, "_answers", answer)
    task = retrieval.Task("test 1", cells, lambda *what: what, ())
    found = [(cells[1], [dict(right=True)])]
    prepared = SimpleNamespace(load=load)
    retrieval._fill(task, found, prepared, 3, lambda: kept.append([len(x) for _, x in found]), said.append)
    assert asked == [
        [("tokenizer", cells[0], 0), ("tokenizer", cells[0], 1)],
        [("tokenizer", cells[0], 2)],
        [("tokenizer", cells[1], 1), ("tokenizer", cells[1], 2)],
    ]
    assert kept == [[1, 2], [1, 3], [3, 3]] and loaded == [1]
    assert [cell for cell, _ in found] == [cells[1], cells[0]]
    assert said == [
        "length 3, depth 0.5: 1 of 3 right (1 of 2 cells)",
        "length 4, depth 1.0: 2 of 3 right (2 of 2 cells)",
    ]
    retrieval._fill(task, found, SimpleNamespace(load=None), 2, None, said.append)
    assert said[2:] == said[:2]


def test_the_accuracy_of_a_cell_is_its_share_of_right_answers():
    answers = [dict(right=right) for right in (True, False, False, False)]
    found = retrieval._summed(dict(length=7), answers)
    assert found == dict(length=7, samples=4, right=1, accuracy=0.25, answers=answers)


# ---- a measurement -------------------------------------------------------------------------------


def test_advice_for_a_model_that_does_not_fit_names_the_option_lengths(monkeypatch):
    def refuse(*_, **__):
        raise UserError("too large; what would make it fit: --context 364: 1 GB, --dtype bfloat16")

    monkeypatch.setattr(retrieval, "prepare", refuse)
    with pytest.raises(UserError, match="^too large; what would make it fit: --lengths 300: 1 GB, --dtype"):
        retrieval._prepare("m", None, 9999, {})


def measured(monkeypatch, tmp_path, samples=2, **changes):
    """Call measure on a tiny model, with fake answers -> its result, the calls of prepare and prompt."""
    asked, filled = [], []
    prepare = retrieval.prepare

    def prepared(model, adapter, **how):
        asked.append((model, adapter, how))
        return prepare(model, None, **how)  # the adapter does not exist

    def prompt(tokenizer, cell, sample):
        asked.append((cell, sample))

    def fill(task, found, prepared, samples, keep, say):
        filled.append(samples)
        found += [(cell, [dict(right=True)]) for cell in task.cells]
        keep()

    monkeypatch.setattr(retrieval, "prepare", prepared)
    monkeypatch.setattr(retrieval, "_fill", fill)
    base = tiny.model(tmp_path / "base", max_position_embeddings=512)
    task = retrieval.Task("test 3", [dict(length=length) for length in (300, 200, 400)], prompt, ())
    said = []
    how = dict(samples=samples, seed=5, output_dir=None, dtype="auto", cache_dtype="bfloat16", device="cpu")
    found = retrieval.measure(task, base, "adapter", **{**how, **changes}, say=said.append)
    assert filled == [samples] and len(said) == 1
    return found, asked


@pytest.mark.parametrize("samples, rows", [(2, 2), (16, 16), (40, 16)])
def test_a_measurement_has_its_settings(monkeypatch, tmp_path, samples, rows):
    """A prompt of the shortest length is made before the weights are read: that length may be too short."""
    found, asked = measured(monkeypatch, tmp_path, samples)
    how = dict(context=464, rows=rows, dtype="auto", cache_dtype="bfloat16", device="cpu")
    base = tmp_path / "base"
    assert asked == [(base, "adapter", dict(how, fewest_rows=1, warns=False)), (dict(length=200), 0)]
    settings = found.pop("settings")
    assert settings["task"] == "test 3" and settings["seed"] == 5
    assert (settings["dtype"], settings["cache_dtype"]) == ("float32", "bfloat16")
    rows = [
        dict(length=length, samples=1, right=1, accuracy=1.0, answers=[dict(right=True)])
        for length in (300, 200, 400)
    ]
    about = dict(model=str(base), adapter="adapter", device="cpu")
    assert found == about | dict(context_length=512, pretrained_length=512, results=rows)


def test_the_file_of_results_has_the_name_of_the_task(monkeypatch, tmp_path):
    found, _ = measured(monkeypatch, tmp_path, output_dir=tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["test.json"]
    assert json.loads((tmp_path / "out/test.json").read_text()) == found


def test_a_file_that_cannot_be_written_is_an_error_before_the_model_is_opened(monkeypatch, tmp_path):
    def refuse(path):
        raise UserError(f"{path}: the disk is full")

    monkeypatch.setattr(retrieval.prompt_cache, "rehearse", refuse)
    monkeypatch.setattr(retrieval, "choose", None)
    with pytest.raises(UserError, match=r"out/test\.json: the disk is full"):
        measured(monkeypatch, tmp_path, output_dir=tmp_path / "out")


def test_two_runs_do_not_write_to_one_directory(monkeypatch, tmp_path):
    with disk.alone(str(tmp_path / "out")), pytest.raises(UserError, match="another run is writing there"):
        measured(monkeypatch, tmp_path, output_dir=tmp_path / "out")


# ---- the file of results -------------------------------------------------------------------------

TASK = retrieval.Task("test 1", [dict(length=300, depth=0.5)], None, ("where",))
ANSWER = dict(where=1, tokens=300, expected="1", answer="2", right=False)
ROW = dict(length=300, depth="random", samples=1, answers=[ANSWER])


def kept(path, value, **settings):
    path.write_text(json.dumps(value))
    return retrieval._kept(str(path), settings, TASK)


def test_a_file_of_results_is_read_as_cells_with_their_answers(tmp_path):
    path = tmp_path / "test.json"
    assert retrieval._kept(None, {}, TASK) == retrieval._kept(str(path), {}, TASK) == []
    other = dict(ROW, length=7, depth=1, answers=[ANSWER, dict(ANSWER, right=True, more=1)])
    found = kept(path, dict(settings=dict(seed=1, other=2), results=[ROW, other]), seed=1)
    cells = [dict(length=300, depth="random"), dict(length=7, depth=1)]
    assert found == [(cells[0], [ANSWER]), (cells[1], other["answers"])]
    assert kept(path, dict(settings={}, results=[])) == []


@pytest.mark.parametrize("settings", [None, [], "seed"])
def test_a_file_without_settings_holds_no_results(tmp_path, settings):
    with pytest.raises(UserError, match=r"test\.json: holds no results of longlora eval"):
        kept(tmp_path / "test.json", dict(settings=settings, results=[ROW]))


def test_a_file_of_other_settings_is_an_error(tmp_path):
    words = "holds results of another cache dtype: 'float32', wanted 'float16'; give another output_dir"
    with pytest.raises(UserError, match=words):
        kept(
            tmp_path / "t.json", dict(settings=dict(cache_dtype="float32"), results=[]), cache_dtype="float16"
        )


@pytest.mark.parametrize(
    "results",
    [
        None,
        dict(ROW),
        [ROW, 3],
        [dict(ROW, answers=[])],
        [dict(ROW, answers=3)],
        [dict(ROW, answers=dict(a=ANSWER))],
        [dict(length=300, depth=1)],
        [dict(ROW, length="300")],
        [dict(ROW, length=True)],
        [dict(ROW, depth=None)],
        [dict(ROW, depth="middle")],
        [dict(depth=0.5, answers=[ANSWER])],
        [dict(ROW, answers=[ANSWER, 3])],
        [dict(ROW, answers=[dict(ANSWER, right=1)])],
        *([dict(ROW, answers=[{k: v for k, v in ANSWER.items() if k != name}])] for name in ANSWER),
    ],
)
def test_a_damaged_file_is_an_error(tmp_path, results):
    with pytest.raises(UserError, match=r"test\.json: is damaged; remove it, or give another output_dir"):
        kept(tmp_path / "test.json", dict(settings={}, results=results))
