"""Makes questions with answers from the books of get_text.py: instruction data for `longlora train`.

    python demo/make_questions.py BOOKS OUT.jsonl --count 240 --questions 6 --characters 16000 --seed 1

BOOKS holds .txt files. Each record has messages, the book and the kind of its first question. The user's
first message is a passage of consecutive chapters, up to --characters long, and a question. The answer and up
to --questions - 1 further questions with their answers follow. The kinds of questions take turns:

    chapter   Which chapter has these words? The answer is the chapter's heading.
    speaker   Who says these words? Only where the book names the speaker right after the quotation.
    next      Which sentence follows this one?
"""

import argparse
import json
import random
import re
from pathlib import Path
from typing import NamedTuple

TITLES = r"(?:Mr\.|Mrs\.|Miss|Lady|Sir|Captain|Admiral|Dr\.)"
NAME = rf"(?:{TITLES} )?[A-Z][a-z]+"
SPOKEN = re.compile(
    rf'"([^"\n]{{30,200}}?)[,.!?]?" (?:said|cried|replied|answered|added) ({NAME})\b(?! [A-Z])'
)
HEADING = re.compile(r"^(?:CHAPTER [IVXLC]+\.?|Chapter \d+|[1-3]? ?[A-Z][A-Za-z ]+ \d+)$", re.MULTILINE)
SENTENCE = re.compile(  # the full stop of a title ends none
    r"(?:^|(?<=[.!?] )(?<!Mr\. )(?<!Mrs\. )(?<!Dr\. ))"
    r"[A-Z][^.!?;\n\"]{30,160}(?<!\bMr)(?<!\bMrs)(?<!\bDr)[.!?](?=\s)",
    re.MULTILINE,
)


class Chapter(NamedTuple):
    """heading: as the book prints it. text: without the heading."""

    heading: str
    text: str


def chapters(book: str) -> list[Chapter]:
    """The chapters of a book. Text before the first heading is left out."""
    found = list(HEADING.finditer(book))
    ends = [match.start() for match in found[1:]] + [len(book)]
    texts = [book[a.end() : b].strip() for a, b in zip(found, ends, strict=True)]
    return [Chapter(match.group(), text) for match, text in zip(found, texts, strict=True) if text]


def passage(chosen: random.Random, book: list[Chapter], characters: int) -> list[Chapter]:
    """Consecutive chapters that begin with a random one, between half of `characters` and all of them long.

    A single chapter that is longer is cut at the end of a paragraph.
    """
    room = chosen.randint(characters // 2, characters)
    first = chosen.randrange(len(book))
    taken: list[Chapter] = []
    for heading, text in book[first:]:
        if len(text) > room:
            text = text[:room].rpartition("\n")[0].rstrip()
            if taken or not text:
                break
        taken.append(Chapter(heading, text))
        room -= len(text) + len(heading)
        if room < 500:
            break
    return taken


def ask_chapter(chosen: random.Random, read: list[Chapter]) -> tuple[str, str] | None:
    here = chosen.choice(read)
    words = _only(chosen, here.text, read)
    if len(read) < 2 or words is None:
        return None
    return f'Which chapter has the words "{words}"?', f"{here.heading}."


def ask_speaker(chosen: random.Random, read: list[Chapter]) -> tuple[str, str] | None:
    found = [match.groups() for chapter in read for match in SPOKEN.finditer(chapter.text)]
    if not found:
        return None
    words, name = chosen.choice(found)
    return f'Who says "{words}"?', f"{name}."


def ask_next(chosen: random.Random, read: list[Chapter]) -> tuple[str, str] | None:
    here = chosen.choice(read)
    words = _only(chosen, here.text, read)
    if words is None:
        return None
    after = here.text.index(words) + len(words) + 1
    found = SENTENCE.match(here.text, after)
    return None if found is None else (f'Which sentence follows "{words}"?', found.group())


def _only(chosen, text, read):
    """A sentence of `text` that stands once in all that is read."""
    everything = "\n".join(chapter.text for chapter in read)
    sentences = [s for s in SENTENCE.findall(text) if everything.count(s) == 1]
    return chosen.choice(sentences) if sentences else None


KINDS = {"chapter": ask_chapter, "speaker": ask_speaker, "next": ask_next}


def ask(chosen: random.Random, read: list[Chapter], first: int, questions: int) -> dict[str, str]:
    """Up to `questions` different questions with their answers. The kinds take turns, from number `first` on.

    Empty if the first kind finds no question in the passage. Later ones are tried ten times each.
    """
    kinds, asked = list(KINDS.values()), {}
    for number in range(first, first + 10 * questions):
        found = kinds[number % len(kinds)](chosen, read)
        if found is not None:
            asked.setdefault(*found)
        if not asked or len(asked) == questions:
            break
    return asked


def messages(read: list[Chapter], asked: dict[str, str]) -> list[dict[str, str]]:
    """The conversation about a passage. The passage stands before the first question."""
    text = "\n\n".join(f"{chapter.heading}\n\n{chapter.text}" for chapter in read)
    said = []
    for question, answer in asked.items():
        said.append({"role": "user", "content": question if said else f"{text}\n\n{question}"})
        said.append({"role": "assistant", "content": answer})
    return said


def records(folder: Path, count: int, questions: int, characters: int, seed: int) -> list[dict]:
    """`count` records. Equal arguments give equal records."""
    books = {path.stem: chapters(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.txt"))}
    books = {name: book for name, book in books.items() if book}
    if not books:
        raise SystemExit(f"{folder}: has no .txt file with chapters")
    chosen, made, failed = random.Random(seed), [], 0
    names = sorted(books)
    weights = [sum(len(chapter.text) for chapter in books[name]) for name in names]
    while len(made) < count:
        first = len(made) % len(KINDS)
        name = chosen.choices(names, weights)[0]
        read = passage(chosen, books[name], characters)
        asked = ask(chosen, read, first, questions) if read else {}
        if asked:
            made.append({"messages": messages(read, asked), "book": name, "kind": list(KINDS)[first]})
            continue
        failed += 1
        if failed > 1000 * count:
            raise SystemExit(
                f"{folder}: no passage of {characters} characters gives a question of the kind "
                f"{list(KINDS)[first]}"
            )
    return made


def main(books: str, out: str, count: int, questions: int, characters: int, seed: int) -> None:
    made = records(Path(books), count, questions, characters, seed)
    Path(out).write_text("".join(json.dumps(record) + "\n" for record in made), encoding="utf-8")
    print(f"{out}: {sum(len(record['messages']) for record in made) // 2} questions about {count} passages")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("books", metavar="BOOKS")
    parser.add_argument("out", metavar="OUT.jsonl")
    parser.add_argument("--count", type=int, default=240, help="records, each about one passage")
    parser.add_argument("--questions", type=int, default=1, help="questions about each passage, at most")
    parser.add_argument("--characters", type=int, default=16000)
    parser.add_argument("--seed", type=int, default=1)
    main(**vars(parser.parse_args()))
