"""Passkey: prompts whose tokens are words, the arguments of a run, the table and the picture."""

import random

import pytest
from prompt_cases import Words, fake_measure

from longlora import plots
from longlora.errors import UserError
from longlora.evaluation import passkey


def test_a_prompt_has_the_given_numbers_of_characters_of_filler():
    lines = passkey.prompt_text(7, 3, 95).split("\n")
    assert lines[0].endswith("quiz you about the important information there.")
    assert lines[1:] == [
        "The",
        "The pass key is 7. Remember it. 7 is the pass key.",
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. The g",
        "What is the pass key? The pass key is",
    ]
    lines = passkey.prompt_text(7, 180, 0).split("\n")
    assert len(lines[1]) == 180 and lines[1][90:] == lines[1][:90] and lines[3] == ""


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("more", [0, 1, 40, 3000])
def test_a_prompt_of_words_has_exactly_the_length(depth, more):
    """The filler has 4.7 characters per word. The search starts from a good guess, so it makes few calls."""
    words, shortest = Words(), len(passkey.prompt_text(12, 0, 0).split())
    ids, text = passkey.make_prompt(words, shortest + more, depth, 12)
    assert len(ids) == shortest + more == len(text.split()) and words.calls < 15
    *_, before, _, after, _ = text.split("\n")
    # A cut in the middle of a word makes two words of it.
    assert abs(len(before.split()) - depth * more) <= 1 and len(after.split()) == more - len(before.split())


def test_a_length_below_the_shortest_prompt_is_an_error():
    shortest = len(passkey.prompt_text(12, 0, 0).split())
    words = f"length {shortest - 1} is too short: without filler the prompt has {shortest} tokens"
    with pytest.raises(UserError, match=words):
        passkey.make_prompt(Words(), shortest - 1, 0.5, 12)


def test_keys_have_the_range_of_the_authors_script(monkeypatch):
    """Their script calls random.randint(1, 50000)."""
    monkeypatch.setattr(random.Random, "randint", lambda self, low, high: (low, high))
    assert passkey.sample_of(0, 1, 0.5, 0) == (0.5, (1, 50000))


# ---- arguments -----------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """A list that records the calls of measure, whose results are out of order."""
    cells = [(9, "random"), (5, 1.0), (9, 0.5), (5, 0.25)]
    return fake_measure(monkeypatch, [dict(length=length, depth=depth) for length, depth in cells])


DEFAULTS = dict(samples=10, seed=0, output_dir=None, dtype="auto", cache_dtype="auto", device="auto")


def test_the_default_depths_are_even_and_the_deepest_comes_first(asked):
    found = passkey.run("m", lengths=300)
    ((task, model, how),) = asked
    assert (task.name, task.details, model) == ("passkey 1", ("depth",), ("m", None))
    assert task.cells == [dict(length=300, depth=depth) for depth in (1.0, 0.75, 0.5, 0.25, 0.0)]
    assert how == dict(DEFAULTS, say=print)
    cells = [(row["length"], row["depth"]) for row in found["results"]]
    assert cells == [(5, 0.25), (5, 1.0), (9, 0.5), (9, "random")]


def test_run_passes_its_arguments_on(asked, monkeypatch):
    drawn = []
    monkeypatch.setattr(passkey, "draw", lambda *what: drawn.append(what))
    how = dict(samples=3, seed=4, output_dir="out", dtype="d", cache_dtype="c", device="x", say=len)
    found = passkey.run("m", "a", lengths=(400, 300, 400), depths=[0, "random", 1, 0.5, 0.0], **how)
    ((task, model, passed),) = asked
    assert passed == how and model == ("m", "a") and drawn == [("out/passkey.png", found, len)]
    depths = ("random", 1.0, 0.5, 0.0)
    assert task.cells == [dict(length=length, depth=depth) for length in (300, 400) for depth in depths]
    assert all(type(cell["depth"]) is float for cell in task.cells[1:4])


@pytest.mark.parametrize("depths, wanted", [("random", "random"), (1, 1.0), (0, 0.0), (0.5, 0.5)])
def test_a_single_depth_is_one_cell(asked, depths, wanted):
    passkey.run("m", lengths=300, depths=depths)
    assert asked[0][0].cells == [dict(length=300, depth=wanted)]


@pytest.mark.parametrize(
    "given, words",
    [
        (dict(lengths=0), "lengths should be an integer from 1"),
        (dict(samples=0), "samples should be an integer from 1"),
        (dict(seed=-1), "seed should be an integer from 0"),
        (dict(depths=[]), "depths should be numbers from 0 to 1, or random, got None"),
        (dict(depths=-0.1), "depths .* got -0.1"),
        (dict(depths=[0.5, 1.01]), "depths .* got 1.01"),
        (dict(depths=[True]), "depths .* got True"),
        (dict(depths=[None]), "depths .* got None"),
        (dict(depths="middle"), "depths .* got 'middle'"),
        (dict(depths=["0.5"]), "depths .* got '0.5'"),
    ],
)
def test_a_wrong_argument_is_an_error(asked, given, words):
    with pytest.raises(UserError, match=words):
        passkey.run("m", **dict(dict(lengths=300), **given))
    assert not asked


def test_a_prompt_is_determined_by_its_cell(asked):
    """The seed, the length, the depth and the sample's number determine the key. A dot ends an answer."""
    passkey.run("m", lengths=300, depths="random", seed=6)
    prompt = asked[0][0].prompt(Words(), dict(length=300, depth="random"), 8)
    depth, key = passkey.sample_of(6, 300, "random", 8)
    assert prompt.details == dict(depth=depth) and prompt.expected == str(key) and prompt.count == 1
    assert len(prompt.ids) == 300
    assert prompt.right(f" {key}.") and not prompt.right(f" {key + 1}.")


# ---- output --------------------------------------------------------------------------------------


def test_cells_without_a_result_are_empty_in_the_table():
    rows = [(70000, "random", 1 / 3, 3), (300, 0.5, 1.0, 10), (300, 0.0, 0.0, 10), (300, "random", 0.5, 4)]
    found = [dict(length=a, depth=b, accuracy=c, samples=d) for a, b, c, d in rows]
    about = dict(context_length=8192, pretrained_length=8192)
    assert passkey.text(dict(results=found, **about)).splitlines() == [
        "  length      0.0      0.5   random",
        "     300       0%     100%      50%",
        "   70000                        33%",
        "keys found, of 3 to 10 prompts in a cell; the model is made for 8,192 tokens",
    ]


def test_a_picture_has_the_results_and_both_contexts(monkeypatch):
    drawn, said = [], []
    monkeypatch.setattr(plots, "passkey", lambda *what: drawn.append(what))
    passkey.draw("x.png", dict(results=[1], context_length=2, pretrained_length=3), said.append)
    assert drawn == [("x.png", [1], 2, 3)] and said == ["saved x.png"]


def test_an_error_of_the_picture_does_not_end_the_run(monkeypatch):
    said = []

    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr(plots, "passkey", fail)
    passkey.draw("x.png", dict(results=[], context_length=2, pretrained_length=3), said.append)
    assert said == ["x.png could not be drawn: no space"]
