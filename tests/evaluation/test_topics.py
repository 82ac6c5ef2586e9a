"""longlora eval topics: conversations, and how answers are judged."""

import json
import re

import pytest
import tiny
from prompt_cases import Words, fake_measure

import longlora
from longlora import cli
from longlora.errors import UserError
from longlora.evaluation import retrieval, topics
from longlora.evaluation.reader import Reader
from longlora.evaluation.topic_words import ASPECTS, EXCHANGES, SUBJECTS
from longlora.files.open_model import open_model

HOW = dict(device="cpu", say=lambda line: None)
OPENED = re.compile(r"^User: Let us talk about the (.*)\.$", re.M)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Its tokenizer has one token per byte."""
    return str(tiny.model(tmp_path_factory.mktemp("topics") / "base"))


def test_every_topic_is_there_once_and_no_name_is_part_of_another():
    _, names = topics.record("0")
    assert len(names) == len(set(names)) == len(SUBJECTS) * len(ASPECTS) == 768
    assert len({name.partition(" ")[0] for name in names}) > 1
    first = [next(subject for subject in SUBJECTS if name.endswith(subject)) for name in names[:64]]
    assert sorted(first) == sorted(SUBJECTS)  # each subject once before one comes again
    text = "\n".join(names)
    assert all(text.count(name) == 1 for name in names)


@pytest.mark.parametrize("length", [340, 2000, 5003])
def test_a_conversation_has_the_lines_that_fit(base, length):
    tokenizer = open_model(base).tokenizer()
    prompt = topics.make_prompt(tokenizer, length, "seed")
    text, (lines, names) = bytes(prompt.ids.tolist()).decode(), topics.record("seed")
    assert length - 250 < len(text) <= length
    head, record, question = text.split("\n\n")
    assert head == topics.HEAD and question == f"{topics.QUESTION}\n{topics.ANSWER}"
    count = record.count("\n") + 1
    assert record == "\n".join(lines[:count])
    assert len(text) + 1 + len(lines[count]) > length  # another line has no room
    opened = OPENED.findall(record)
    assert opened == names[: len(opened)] and prompt.expected == opened[0]
    assert prompt.details == {"topics": len(opened)}
    assert prompt.right(f" {opened[0]}.") and not prompt.right(f" {names[len(opened)]}.")
    assert prompt.count == max(len(name) for name in opened) + 2


def test_topics_are_plain_words():
    """A topic's name is part of a sentence, and answers repeat it."""
    assert all(re.fullmatch("[a-z]+( [a-z]+)*", words) for words in (*SUBJECTS, *ASPECTS))
    assert all(aspect.split()[-1] in ("of", "about", "for") for aspect in ASPECTS)


def test_each_topic_has_four_exchanges():
    lines, names = topics.record("1")
    text = "\n".join(lines[:10])
    found = [q for q, a in EXCHANGES if f"User: {q}\nAssistant: {a}".format(topic=names[0]) in text]
    assert len(lines) == 10 * len(names) and len(found) == 4 and OPENED.findall(text) == names[:1]
    assert topics.record("1") == (lines, names) and topics.record("2")[1][:5] != names[:5]


@pytest.mark.parametrize("count", [1, 2, 30, 768])
def test_a_length_that_whole_topics_fill_holds_them_all(count):
    """The search starts from a good guess, so it tokenises few conversations."""
    words, (lines, names) = Words(), topics.record("seed")
    length = len(topics.prompt_text(lines[: 10 * count]).split())
    prompt = topics.make_prompt(words, length, "seed")
    assert len(prompt.ids) == length and prompt.details == {"topics": count}
    assert prompt.expected == names[0]
    assert prompt.count == max(len(name.split()) for name in names[:count])
    assert words.calls - count < 14
    if count == 768:
        assert len(topics.make_prompt(words, 10 * length, "seed").ids) == length
    else:
        more = len(lines[10 * count].split())
        assert topics.make_prompt(words, length + more - 1, "seed").details == {"topics": count}
        assert topics.make_prompt(words, length + more, "seed").details == {"topics": count + 1}


def test_the_shortest_conversation_names_one_topic():
    lines, names = topics.record("seed")
    length = len(topics.prompt_text(lines[:1]).split())
    prompt = topics.make_prompt(Words(), length, "seed")
    assert len(prompt.ids) == length and prompt.details == {"topics": 1} and prompt.expected == names[0]
    words = f"length {length - 1} is too short: with the name of one topic the prompt has {length} tokens"
    with pytest.raises(UserError, match=words):
        topics.make_prompt(Words(), length - 1, "seed")


@pytest.mark.parametrize(
    "given, how, lengths",
    [
        (dict(lengths=300), dict(samples=10, seed=0, output_dir=None), [300]),
        (
            dict(lengths=[500, 300, 500], samples=3, seed=7, output_dir="o", dtype="d", cache_dtype="c"),
            dict(samples=3, seed=7, output_dir="o", dtype="d", cache_dtype="c"),
            [300, 500],
        ),
    ],
)
def test_run_measures_a_cell_for_each_length(monkeypatch, given, how, lengths):
    calls = fake_measure(monkeypatch, [dict(length=length) for length in (5, 9, 7)])
    found = topics.run("m", "a", **given, device="cpu", say=len)
    assert found == dict(results=[dict(length=length) for length in (5, 7, 9)])
    ((task, model, passed),) = calls
    assert (task.name, task.details, model) == ("topics 1", ("topics",), ("m", "a"))
    assert task.cells == [dict(length=length) for length in lengths]
    assert passed == dict(dict(dtype="auto", cache_dtype="auto"), **how, device="cpu", say=len)
    one, two = (task.prompt(Words(), task.cells[0], number) for number in (1, 2))
    assert one.expected == topics.record(f"{how['seed']} 300 1")[1][0] and 250 < len(one.ids) <= 300
    assert two.expected == topics.record(f"{how['seed']} 300 2")[1][0]
    calls.clear()
    topics.run("m", lengths=9)
    ((_, model, passed),) = calls
    assert passed["device"] == "auto" and passed["say"] is print and model == ("m", None)


@pytest.mark.parametrize("given", [dict(lengths=0), dict(lengths=9, samples=0), dict(lengths=9, seed=-1)])
def test_a_number_out_of_range_is_an_error(monkeypatch, given):
    monkeypatch.setattr(retrieval, "measure", None)
    with pytest.raises(UserError, match=f"{list(given)[-1]} should be an integer from"):
        topics.run("m", **given)


def test_the_table_has_a_line_for_each_length():
    def row(length, right, *counts):
        return dict(length=length, right=right, samples=len(counts), answers=[dict(topics=n) for n in counts])

    found = dict(results=[row(300, 1, 2, 2), row(70000, 0, 5, 4, 6)])
    found |= dict(context_length=8192, pretrained_length=4096)
    assert topics.text(found).splitlines() == [
        "  length    topics     right",
        "     300         2    1 of 2",
        "   70000    4 to 6    0 of 3",
        "first topics named; the model is made for 8,192 tokens, its base for 4,096",
    ]


@pytest.mark.parametrize(
    "answer, hit",
    [
        (" history of tea.", True),
        (" History of Tea\nUser:", True),
        (" topic history of tea, then the cost of bread", True),
        (" cost of bread, after the history of tea", False),
        (" cost of bread", False),
        (" history of", False),
        ("", False),
        ("history of tea", True),
        ("cost of bread, history of tea", False),
        ("history of tea, cost of bread", True),
    ],
)
def test_the_first_topic_that_the_answer_names_counts(answer, hit):
    assert topics.right(answer, ["history of tea", "cost of bread"]) is hit


def test_the_command_and_the_function_agree(base, capsys, monkeypatch):
    """The replaced answers are what follows the opening of the first topic in each prompt."""

    def answers(self, prompts, count, end):
        texts = [bytes(prompt.tolist()).decode() for prompt in prompts]
        return [list(f" {OPENED.findall(text)[0]} and more".encode()) for text in texts]

    found = longlora.eval.topics(base, lengths=[500, 400], samples=2, **HOW)
    rows = [(row["length"], row["samples"], row["right"]) for row in found["results"]]
    assert rows == [(400, 2, 0), (500, 2, 0)]
    monkeypatch.setattr(Reader, "answers", answers)
    words = "--lengths 400,2500 --samples 3 --device cpu".split()
    assert cli.main(["eval", "topics", "--model", base, *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == longlora.eval.topics(base, lengths=[400, 2500], samples=3, **HOW)
    assert [row["accuracy"] for row in found["results"]] == [1.0, 1.0]
    assert cli.main(["eval", "topics", "--model", base, *words]) == 0
    table = capsys.readouterr().out.splitlines()[-4:]
    assert table[1].split() == ["400", "1", "3", "of", "3"]
    assert cli.main(["eval", "topics", "--model", base, "--lengths", "200"]) == 2
    assert "length 200 is too short: with the name of one topic" in capsys.readouterr().err
