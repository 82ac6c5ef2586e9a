"""The questions of demo/make_questions.py have the answers of the books; demo/ask.py counts right answers."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import longlora
from longlora.tools.demo import HELD_OUT, MODEL, TEXT

DEMO = Path(__file__).parents[2] / "demo"


def run(*arguments):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, check=True
    ).stdout


def answered(record):
    """The passage of a record, and its questions with their answers."""
    read, _, first = record["messages"][0]["content"].rpartition("\n\n")
    texts = [first, *(message["content"] for message in record["messages"][1:])]
    return read, list(zip(texts[::2], texts[1::2], strict=True))


@pytest.fixture(scope="module", params=[1, 4])
def asked(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("questions") / "q.jsonl"
    run(
        DEMO / "make_questions.py",
        *(TEXT, path, "--count", 60, "--questions", request.param, "--characters", 6000, "--seed", 5),
    )
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(records) == 60 and len({record["kind"] for record in records}) == 3
    each = [len(answered(record)[1]) for record in records]
    assert max(each) == request.param and sum(each) > 0.8 * 60 * request.param
    return records


def test_the_book_has_the_answer(asked):
    for record in asked:
        read, pairs = answered(record)
        book = (TEXT / f"{record['book']}.txt").read_text()
        assert len(read) < 6500 and len(dict(pairs)) == len(pairs)
        for question, answer in pairs:
            words = re.search(r'"(.*)"', question).group(1)
            before, found, after = read.partition(words)
            assert found and words in book, question
            if question.startswith("Which chapter"):
                headings = re.findall(
                    r"^(?:CHAPTER|Chapter|Genesis|Exodus|Matthew|Luke) [\dIVXLC]+\.?$", before, re.M
                )
                assert headings[-1].rstrip(".") == answer.rstrip("."), question
            elif question.startswith("Who"):
                assert re.match(rf'[,.!?]?" \w+ {answer.rstrip(".")}', after), question
            else:
                assert after.lstrip().startswith(answer), question
                assert not re.search(r"\b(Mr|Mrs|Dr)\.$", words), question


def test_equal_arguments_give_equal_questions(tmp_path):
    made = []
    for name in ("a", "b"):
        run(DEMO / "make_questions.py", HELD_OUT, tmp_path / name, "--count", 9)
        made.append((tmp_path / name).read_bytes())
    assert made[0] == made[1]


def test_right_answers_are_counted(tmp_path, capsys):
    """Two of the wanted answers are what the model says, apart from quotation marks and a full stop."""
    spec = importlib.util.spec_from_file_location("ask", DEMO / "ask.py")
    ask = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ask)
    question = [{"role": "user", "content": "And the LORD spake unto Moses"}]
    answer = ask.plain("".join(longlora.Session(MODEL, context=256).chat(question, max_new_tokens=60)))
    assert len(answer) > 8
    wanted = [answer, f'"{answer}".', f"{answer} no", "Acts 16."]
    path, output = tmp_path / "q.jsonl", tmp_path / "answers.jsonl"
    records = [
        {"messages": [*question, {"role": "assistant", "content": text}], "kind": "chapter"}
        for text in wanted
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    ask.main(MODEL, path, output_file=output, context=256)
    assert capsys.readouterr().out.startswith("chapter     2 of 4 right\nall         2 of 4 right, ")
    assert [json.loads(line)["wanted"] for line in output.read_text().splitlines()] == wanted
