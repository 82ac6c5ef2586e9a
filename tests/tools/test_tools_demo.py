"""The steps of `longlora demo`. Fakes replace train, merge, ppl, Session and plots, so they take no time."""

import io
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from longlora.errors import UserError
from longlora.tools import demo, demo_answers

PAGE = Path(__file__).parents[2] / "docs/demo.md"
# Perplexities, losses, and sizes of prompts with their answers, as docs/demo.md shows them.
FIGURES = {
    None: (34.7, 41.9, 55.6, 68.0),
    "linear": (79.9, 79.7, 79.1, 79.0),
    "adapter": (39.3, 38.8, 38.8, 40.9),
}
LOSS = [(10, 3.9930), (240, 3.1119)]
SAID = {
    ("adapter", "And"): (1803, ", and I was not at least to be in the house"),
    ("adapter", "The"): (1658, "to be with you, and ye shall be with you."),
    ("taught", "And"): (1803, "Jane Austen."),
    ("taught", "The"): (1658, "It is from the Bible."),
}


class Answer(list):
    """A fake of Session.chat's answer: pieces of text, and the size of the prompt."""

    prompt_tokens = 0


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """Replace the slow parts of the demo by fakes, in tmp_path. Returns their calls: (name, arguments...)."""
    found = []

    def ppl(model, data, lengths, **options):
        found.append(("ppl", model, data, lengths, options))
        figures = FIGURES["adapter" if "adapter" in options else options.get("rope_type")]
        return {
            "results": [
                {
                    "length": n,
                    "perplexity": p,
                    "by_position": [{"first": n, "last": n + 7, "perplexity": 2 * p}],
                }
                for n, p in zip(lengths, figures, strict=True)
            ]
        }

    def train(say, **options):
        found.append(("train", options))
        say("a step")
        return SimpleNamespace(stopped=None, history=[{"step": n, "loss": x, "lr": 1} for n, x in LOSS])

    def session(model, adapter, device):
        found.append(("session", model, adapter, device))

        def chat(messages, **how):
            found.append(("chat", messages, how))
            ((role, text),) = ((message["role"], message["content"]) for message in messages)
            assert role == "user"
            words = "The" if "Theophilus" in text else "And"
            tokens, said = SAID[adapter.name, words]
            answer = Answer([said[:5], said[5:], " \n"])
            answer.prompt_tokens = tokens
            return answer

        return SimpleNamespace(chat=chat)

    def note(name):
        return lambda *args, **options: found.append((name, *args, options))

    monkeypatch.setattr(demo.ppl, "run", ppl)
    monkeypatch.setattr(demo, "train", train)
    monkeypatch.setattr(demo_answers, "train", train)
    monkeypatch.setattr(demo_answers, "Session", session)
    monkeypatch.setattr(demo, "merge", note("merge"))
    for name in ("loss", "perplexity", "attention"):
        monkeypatch.setattr(demo.plots, name, note(name))
    clock = itertools.count(1000.0, 45.04)
    monkeypatch.setattr(demo, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.chdir(tmp_path)
    return found


@pytest.mark.skipif(not PAGE.exists(), reason="this test needs the source tree")
def test_the_demo_prints_what_its_page_shows(calls, capsys):
    demo.run()
    page = PAGE.read_text(encoding="utf-8")
    block = page[page.index("    A model of") : page.index("The picture shows")].rstrip()
    shown = [line.removeprefix("    ") for line in block.splitlines()]
    steps = ("   step ", "   attention:", "   ...")
    wanted = [line for line in shown if not line.startswith(steps)]
    printed = capsys.readouterr().out.replace("   a step\n", "")
    assert printed == "\n".join([*wanted, "", demo.NEXT, ""])


def test_the_reports_of_training_are_indented(calls):
    lines = []
    demo.run(say=lines.append)
    assert lines.count("   a step") == 2


def test_the_settings_of_the_extension(calls):
    """docs/demo.md shows the results of these settings."""
    demo.run()
    out = Path("longlora-demo")
    lengths, device = (256, 512, 1024, 2048), {"device": "auto"}
    before, interpolated, extend, merge, after, *plots = calls[:8]
    for call, options in (
        (before, {}),
        (interpolated, {"rope_type": "linear", "target_length": 2048}),
        (after, {"adapter": out / "adapter"}),
    ):
        name, *given, used = call
        assert (name, given) == ("ppl", [demo.MODEL, demo.HELD_OUT, lengths])
        assert used.pop("bins") > 1 and used == {**options, **device}
    assert extend == (
        "train",
        {
            **dict(model=demo.MODEL, data=demo.TEXT, output_dir=out / "adapter", max_steps=240, **device),
            **dict(target_length=2048, group_size=512, learning_rate=1e-3, embedding_learning_rate=2e-3),
            **dict(lr_scheduler_type="cosine", warmup_steps=10, logging_steps=10),
        },
    )
    assert merge == ("merge", demo.MODEL, out / "adapter", out / "merged", {})
    assert [(name, path) for name, path, *_ in plots] == [
        (name, out / f"{name}.png") for name in ("loss", "perplexity", "attention")
    ]
    assert [row["step"] for row in plots[0][2]] == [10, 240]
    # The middle of 2048 to 2055, and twice the last figure.
    assert plots[1][2:] == (
        {
            "before": ([2051.5], [136.0]),
            "interpolated, untrained": ([2051.5], [158.0]),
            "after": ([2051.5], [pytest.approx(81.8)]),
        },
        {"native": 256},
    )
    assert plots[2][2:] == (2048, 512, {})


def test_the_settings_of_the_questions(calls):
    """docs/demo.md shows the results of these settings."""
    demo.run(device="cuda:3")
    out = Path("longlora-demo")
    teach, *asked = calls[8:]
    assert teach == (
        "train",
        {
            **dict(model=demo.MODEL, adapter=out / "adapter", data=out / "questions.jsonl", max_steps=40),
            **dict(output_dir=out / "taught", device="cuda:3", learning_rate=2e-3),
            **dict(embedding_learning_rate=2e-3, lr_scheduler_type="cosine", logging_steps=10),
        },
    )
    assert [call[1:] for call in asked if call[0] == "session"] == [
        (demo.MODEL, out / name, "cuda:3") for name in ("adapter", "taught")
    ]
    books = [
        (demo.HELD_OUT / name).read_text(encoding="utf-8")
        for name in ("austen-persuasion.txt", "kjv-44-acts.txt")
    ]
    chats = [call[1:] for call in asked if call[0] == "chat"]
    assert len(chats) == 4
    for book, (messages, how) in zip([*books, *books], chats):
        (message,) = messages
        text, question = message["content"].rsplit("\n\n", 1)
        assert question == "Who wrote this?" and how == {"max_new_tokens": 12}
        assert text in book[:5500] and len(text) > 5400 and book.index(text) == len(book.split(" ")[0]) + 1


def test_the_report(calls):
    report = demo.run("here")
    assert json.loads(Path("here/report.json").read_text()) == report
    assert report.pop("answers") == [
        {"asked": asked, "book": book, "tokens": SAID[name, words][0], "answer": SAID[name, words][1]}
        for name, asked in (("adapter", "extended"), ("taught", "taught"))
        for book, words in (("austen-persuasion", "And"), ("kjv-44-acts", "The"))
    ]
    assert report == {
        "lengths": [256, 512, 1024, 2048],
        "before": list(FIGURES[None]),
        "interpolated": list(FIGURES["linear"]),
        "after": list(FIGURES["adapter"]),
        "native_length": 256,
        "steps": 240,
        "tokens_trained": 240 * 2048,
        "loss": [list(pair) for pair in LOSS],
        "seconds": 45.0,
    }


def test_one_step_is_enough(calls):
    assert demo.run(steps=1)["steps"] == 1 and calls[2][1]["max_steps"] == 1


@pytest.mark.parametrize("module, last", [(demo, "ppl"), (demo_answers, "attention")])
def test_a_run_that_is_stopped_stops_the_demo(calls, monkeypatch, module, last):
    """Nothing runs after a training that was stopped. The next demo may replace its files."""
    stopped = SimpleNamespace(stopped=2, history=[])
    with monkeypatch.context() as patch:
        patch.setattr(module, "train", lambda **options: stopped)
        with pytest.raises(KeyboardInterrupt):
            demo.run()
    assert calls[-1][0] == last
    assert json.loads(Path("longlora-demo/report.json").read_text()) == {"lengths": [256, 512, 1024, 2048]}
    demo.run()


def test_the_demo_writes_only_to_a_new_or_empty_directory(calls, tmp_path):
    (tmp_path / "empty").mkdir()
    for path in ("empty", "new/below"):
        assert demo._prepared(tmp_path / path) == tmp_path / path
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file: exists and holds no earlier demo"):
        demo.run(tmp_path / "file")
    with pytest.raises(UserError, match="below: cannot be written: Not a directory"):
        demo.run(tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine" and not calls


def test_a_passage_has_whole_words():
    assert demo_answers.passage("one two three four", 2, 12) == "two three"
    assert demo_answers.passage("one two\nthree four", 0, 17) == "two\nthree"


@pytest.fixture
def ascii_locale(monkeypatch):
    """Files that are opened without an encoding are ASCII."""
    monkeypatch.setattr(io, "text_encoding", lambda encoding, *_: encoding or "ascii")


def test_questions_about_both_kinds_of_books_in_turn(tmp_path, ascii_locale):
    """Each book has its own word, which is not ASCII, and is little longer than the longest passage."""
    letters = {"austen-a": "éa", "austen-b": "éb", "kjv-1": "éc", "kjv-2": "éd", "other": "ée"}
    books = {name: f"{word * 4} " * 700 for name, word in letters.items()}
    for name, book in books.items():
        (tmp_path / f"{name}.txt").write_text(book, encoding="utf-8")
    (tmp_path / "kjv-3.md").write_text("no book")
    found = demo_answers.records(tmp_path)
    assert len(found) == 60
    used, sizes = set(), []
    for i, record in enumerate(found):
        assert record.keys() == {"messages"}
        asked, answer = record["messages"]
        kind, said = ("kjv", "It is from the Bible.") if i % 2 else ("austen", "Jane Austen.")
        assert answer == {"role": "assistant", "content": said} and asked["role"] == "user"
        text, question = asked["content"].split("\n\n")
        assert asked.keys() == {"role", "content"} and question == "Who wrote this?"
        (name,) = (name for name in books if letters[name] * 4 == text.split()[0])
        assert name.startswith(kind) and text in books[name]
        used.add(name)
        sizes.append(len(text))
    assert used == {"austen-a", "austen-b", "kjv-1", "kjv-2"}
    assert 280 < min(sizes) < 1500 and 4000 < max(sizes) <= 5500
    assert demo_answers.records(tmp_path) == found


def test_books_to_ask_about_are_utf_8(calls, tmp_path, ascii_locale):
    (tmp_path / "book.txt").write_text("Title été dans And", encoding="utf-8")
    (tmp_path / "page.html").write_text("no book")
    found = demo_answers.ask(demo.MODEL, {"now": tmp_path / "taught"}, tmp_path, print, "cpu")
    assert found == [{"book": "book", "asked": "now", "tokens": 1803, "answer": "Jane Austen."}]
    (message,) = calls[-1][1]
    assert message["content"] == "été dans\n\nWho wrote this?"


@pytest.mark.parametrize("stopped", [None, 15])
def test_the_questions_are_written_for_the_training(tmp_path, monkeypatch, stopped):
    monkeypatch.setattr(demo_answers, "train", lambda **options: SimpleNamespace(stopped=stopped))
    args = (demo.MODEL, tmp_path / "adapter", demo.TEXT, tmp_path, print, "cpu")
    assert demo_answers.teach(*args) is stopped
    lines = (tmp_path / "questions.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == demo_answers.records(demo.TEXT)
