"""The end of the demo: the extended model learns to answer one question about long texts, and is asked."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from longlora.disk import write_text
from longlora.serving.session import Session
from longlora.training.driver import train

QUESTION = "Who wrote this?"
ANSWERS = {"austen": "Jane Austen.", "kjv": "It is from the Bible."}  # by how the names of the books begin
COUNT = 60  # passages to learn from
STEPS = 40
CHARACTERS = 5500  # of a passage at most; they and the answer fit in the demo's 2048 tokens
LEAST = 300
SETTINGS = dict(
    learning_rate=2e-3, embedding_learning_rate=2e-3, lr_scheduler_type="cosine", logging_steps=10
)


def passage(book: str, first: int, characters: int) -> str:
    """Whole words of `book` after the character `first`, at most `characters` long."""
    return book[first : first + characters].partition(" ")[2].rpartition(" ")[0]


def records(folder: Path) -> list[dict[str, Any]]:
    """Passages of the books in `folder` with question and answer, as messages; both kinds in turn."""
    chosen = random.Random(1)
    books = {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))}
    made = []
    for i in range(COUNT):
        kind = list(ANSWERS)[i % len(ANSWERS)]
        book = books[chosen.choice([name for name in books if name.startswith(kind)])]
        text = passage(book, chosen.randrange(len(book) - CHARACTERS), chosen.randint(LEAST, CHARACTERS))
        answer = {"role": "assistant", "content": ANSWERS[kind]}
        made.append({"messages": [{"role": "user", "content": f"{text}\n\n{QUESTION}"}, answer]})
    return made


def teach(
    model: Path, adapter: Path, text: Path, output: Path, say: Callable[[str], object], device: str
) -> int | None:
    """Write questions about the books in `text`, train `adapter` on them -> the signal that stopped the run.

    The adapter that comes out is output/taught.
    """
    path = output / "questions.jsonl"
    write_text(path, "".join(json.dumps(record) + "\n" for record in records(text)))
    result = train(
        model=model,
        adapter=adapter,
        data=path,
        output_dir=output / "taught",
        max_steps=STEPS,
        say=say,
        device=device,
        **SETTINGS,
    )
    return result.stopped


def ask(
    model: Path, adapters: dict[str, Path], books: Path, say: Callable[[str], object], device: str
) -> list[dict[str, Any]]:
    """Ask each of `adapters` about the first words of each book in `books` -> what was asked and answered."""
    found: list[dict[str, Any]] = []
    for when, adapter in adapters.items():
        session = Session(model, adapter, device=device)
        for path in sorted(books.glob("*.txt")):
            text = passage(path.read_text(encoding="utf-8"), 0, CHARACTERS)
            answer = session.chat([{"role": "user", "content": f"{text}\n\n{QUESTION}"}], max_new_tokens=12)
            said = " ".join("".join(answer).split())
            found.append(dict(book=path.stem, asked=when, tokens=answer.prompt_tokens, answer=said))
            say(f"{when}, after {answer.prompt_tokens:,} tokens of {path.stem}: {QUESTION} {said}")
    return found
