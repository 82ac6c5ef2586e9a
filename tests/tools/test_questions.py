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


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    path = tmp_path_factory.mktemp("questions") / "q.jsonl"
    run(DEMO / "make_questions.py", TEXT, path, "--count", 60, "--characters", 6000, "--seed", 5)
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_book_has_the_answer(asked):
    assert len(asked) == 60
    for record in asked:
        user, assistant = (message["content"] for message in record["messages"])
        read, _, question = user.rpartition("\n\n")
        words = re.search(r'"(.*)"', question).group(1)
        answer = assistant.rstrip(".")
        before, found, after = read.partition(words)
        assert found, question
        book = (TEXT / f"{record['book']}.txt").read_text()
        if record["kind"] == "chapter":
            headings = re.findall(
                r"^(?:CHAPTER|Chapter|Genesis|Exodus|Matthew|Luke) [\dIVXLC]+\.?$", before, re.M
            )
            assert headings[-1].rstrip(".") == answer, question
        elif record["kind"] == "speaker":
            assert re.match(rf'[,.!?]?" \w+ {answer}', after), question
        else:
            assert after.lstrip().startswith(assistant), question
        assert words in book and len(read) < 6500


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
    ask.main(MODEL, path, None, output, 256)
    assert capsys.readouterr().out.startswith("chapter     2 of 4 right\nall         2 of 4 right, ")
    assert [json.loads(line)["wanted"] for line in output.read_text().splitlines()] == wanted
