"""Topic retrieval: which topic did a long conversation begin with?

The task is that of the LongLoRA paper, section 4.3, which has it from LongChat (Li et al. 2023). The words
and the topics are our own.
"""

import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from longlora.evaluation import retrieval
from longlora.evaluation.topic_words import ASPECTS, EACH, EXCHANGES, SUBJECTS
from longlora.files.tokenizer import Tokenizer

NAME = "topics 1"
HEAD = (
    "This is the record of a conversation about many topics, one after the other. The user opens each topic "
    'with the words "Let us talk about" and its name.'
)
OPENING = "User: Let us talk about the {topic}."
REPLY = "Assistant: Gladly. What would you like to know about the {topic}?"
QUESTION = "User: Which topic did we talk about first? Give its name only."
ANSWER = "Assistant: The first topic was the"


def names(generator: random.Random) -> Iterator[str]:
    """All topics in random order. Each subject comes once before one comes again, with another aspect."""
    first = {subject: generator.randrange(len(ASPECTS)) for subject in SUBJECTS}
    for step in range(len(ASPECTS)):
        for subject in generator.sample(SUBJECTS, len(SUBJECTS)):
            yield f"{ASPECTS[(first[subject] + step) % len(ASPECTS)]} {subject}"


def record(seed: str) -> tuple[list[str], list[str]]:
    """The lines of the longest conversation that `seed` makes, and its topics in their order."""
    generator = random.Random(seed)
    lines, topics = [], []
    for topic in names(generator):
        topics.append(topic)
        lines += [OPENING.format(topic=topic), REPLY.format(topic=topic)]
        for question, answer in generator.sample(EXCHANGES, EACH):
            lines += [f"User: {question.format(topic=topic)}", f"Assistant: {answer.format(topic=topic)}"]
    return lines, topics


def prompt_text(lines: Sequence[str]) -> str:
    """The prompt with these lines of the conversation."""
    return "\n".join([HEAD, "", *lines, "", QUESTION, ANSWER])


def right(answer: str, topics: Sequence[str]) -> bool:
    """Whether the answer names the first of the topics, and no other one before it, in any case."""
    found = answer.lower()
    places = {topic: found.find(topic.lower()) for topic in topics}
    first = places[topics[0]]
    return first >= 0 and all(place < 0 or place >= first for place in places.values())


def make_prompt(tokenizer: Tokenizer, length: int, seed: str) -> retrieval.Prompt:
    """The longest conversation of whole lines that makes a prompt of at most `length` tokens."""
    lines, topics = record(seed)
    size = 2 + 2 * EACH  # lines of a topic

    def tokens(count: int) -> int:
        return len(tokenizer.encode(prompt_text(lines[: count + 1])))

    if tokens(0) > length:
        raise retrieval.too_short(length, tokens(0), "with the name of one topic")
    each = len(tokenizer.encode_parts(["\n".join(lines[:size])])[0]) / size
    count = 1 + retrieval.longest(tokens, length, int((length - tokens(0)) / each), len(lines) - 1)
    kept = topics[: -(-count // size)]
    ids = tokenizer.encode(prompt_text(lines[:count]))
    longest = max(len(tokenizer.encode_parts([f" {topic}."])[0]) for topic in kept)
    return retrieval.Prompt(ids, kept[0], longest, lambda answer: right(answer, kept), dict(topics=len(kept)))


def run(
    model: str | os.PathLike,
    adapter: str | os.PathLike | None = None,
    *,
    lengths: int | Sequence[int],
    samples: int = 10,
    seed: int = 0,
    output_dir: str | os.PathLike | None = None,
    dtype: str = "auto",
    cache_dtype: str = "auto",
    device: str = "auto",
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Ask the model at path `model`, with an adapter if given, for the first topic of a long conversation.

    Returns {"results": [{"length", "samples", "right", "accuracy", "answers": [{"topics", "tokens",
    "expected", "answer", "right"}]}, ...], "context_length", "pretrained_length", "settings", ...}, one
    result for each length.

    lengths      tokens of a prompt. It has the most whole lines of a conversation that fit into them
    samples      conversations for each length
    seed, output_dir, dtype, cache_dtype, device, say: as in eval.passkey; the file is topics.json

    UserError as eval.passkey.
    """
    lengths = list(lengths) if isinstance(lengths, Iterable) else [lengths]
    retrieval.integers(lengths=lengths, samples=samples, seed=seed)

    def prompt(tokenizer: Tokenizer, cell: retrieval.Cell, sample: int) -> retrieval.Prompt:
        return make_prompt(tokenizer, cell["length"], f"{seed} {cell['length']} {sample}")

    cells = [dict(length=length) for length in sorted(set(lengths))]
    found = retrieval.measure(
        retrieval.Task(NAME, cells, prompt, ("topics",)),
        model,
        adapter,
        samples=samples,
        seed=seed,
        output_dir=output_dir,
        dtype=dtype,
        cache_dtype=cache_dtype,
        device=device,
        say=say,
    )
    found["results"].sort(key=lambda row: row["length"])
    return found


def text(found: dict[str, Any]) -> str:
    """The result of `run` as a table."""
    lines = [f"{'length':>8} {'topics':>9} {'right':>9}"]
    for row in found["results"]:
        topics = retrieval.span(answer["topics"] for answer in row["answers"])
        hits = f"{row['right']} of {row['samples']}"
        lines.append(f"{row['length']:>8} {topics:>9} {hits:>9}")
    return "\n".join([*lines, f"first topics named; {retrieval.made_for(found)}"])
