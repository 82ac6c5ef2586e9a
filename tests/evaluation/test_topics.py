"""longlora eval topics: conversations, and how answers are judged."""

import json
import re

import pytest
import tiny

import longlora
from longlora import cli
from longlora.evaluation import topics
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


def test_each_topic_has_four_exchanges():
    lines, names = topics.record("1")
    text = "\n".join(lines[:10])
    found = [q for q, a in EXCHANGES if f"User: {q}\nAssistant: {a}".format(topic=names[0]) in text]
    assert len(lines) == 10 * len(names) and len(found) == 4 and OPENED.findall(text) == names[:1]
    assert topics.record("1") == (lines, names) and topics.record("2")[1][:5] != names[:5]


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
