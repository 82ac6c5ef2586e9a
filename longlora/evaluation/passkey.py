"""Passkey retrieval, the authors' task: a number hides in a long filler, and the model has to repeat it.

The prompt is that of the LongLoRA paper, appendix A.2, which is that of Mohtashami and Jaggi,
arXiv 2305.16300.
"""

import os
import random
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from longlora import progress
from longlora.device import choose
from longlora.errors import UserError, shown
from longlora.evaluation.reader import Reader
from longlora.files.tokenizer import Tokenizer
from longlora.serving.open import open_engine

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
KEY = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"
LARGEST = 50_000  # keys are 1 to this
SIDE_BY_SIDE = 16  # prompts that are answered together at most
Depth = float | str


def prompt_text(key: int, before: int, after: int) -> str:
    """The prompt with so many characters of filler before and after the line with the key."""
    stream = FILLER * (max(before, after) // len(FILLER) + 1)
    return "\n".join([TASK, stream[:before], KEY.format(key=key), stream[:after], QUESTION])


def make_prompt(tokenizer: Tokenizer, length: int, depth: float, key: int) -> tuple[np.ndarray, str]:
    """The longest prompt of at most `length` tokens with the key at `depth` -> its ids, int32 [N], its text.

    depth: the part of the filler that stands before the key, from 0 to 1. The filler ends in the middle of a
    sentence where that fills the prompt, as in the authors' script.
    UserError if the prompt has more tokens without any filler.
    """

    def prompt(filler: int) -> tuple[np.ndarray, str]:
        before = round(filler * depth)
        text = prompt_text(key, before, filler - before)
        return tokenizer.encode(text), text

    shortest = len(prompt(0)[0])
    if shortest > length:
        raise UserError(
            f"length {length} is too short for the task, which has {shortest} tokens without filler"
        )
    low, high = 0, len(FILLER)
    while len(prompt(high)[0]) <= length:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if len(prompt(middle)[0]) <= length else (low, middle)
    return prompt(low)


def draw(seed: int, length: int, depth: Depth, sample: int) -> tuple[float, int]:
    """The depth and the key of a sample. They follow from the arguments alone."""
    generator = random.Random(f"{seed} {length} {depth} {sample}")
    where, key = generator.random(), generator.randint(1, LARGEST)
    return (where if isinstance(depth, str) else depth), key


def right(answer: str, key: int) -> bool:
    """Whether the first number in the answer is the key, digit by digit."""
    found = re.search(r"[0-9]+", answer)
    return found is not None and found[0] == str(key)


def run(
    model: str | os.PathLike,
    adapter: str | os.PathLike | None = None,
    *,
    lengths: int | Sequence[int],
    depths: float | str | Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    samples: int = 10,
    seed: int = 0,
    output_dir: str | os.PathLike | None = None,
    dtype: str = "auto",
    cache_dtype: str = "auto",
    device: str = "auto",
) -> dict[str, Any]:
    """Ask the model at path `model`, with an adapter if given, for a number that a long text hides."""
    lengths = [lengths] if isinstance(lengths, int) else list(lengths)
    chosen: list[Depth] = [depths] if isinstance(depths, (int, float, str)) else [*depths]
    for depth in chosen:
        if depth != "random" and not (isinstance(depth, (int, float)) and 0 <= depth <= 1):
            raise UserError(f"a depth should be a number from 0 to 1, or random, got {shown(depth)}")
    device, _ = choose(device)
    opened = open_engine(
        model,
        adapter,
        context=max(lengths) + 16,
        rows=min(samples, SIDE_BY_SIDE),
        fewest_rows=1,
        dtype=dtype,
        cache_dtype=cache_dtype,
        device=device,
    )
    reader = Reader(opened.engine.generator)
    results = []
    cells = [(length, depth) for length in sorted(lengths) for depth in sorted(chosen, reverse=True)]
    for length, depth in progress.bar(iterable=cells, desc="passkey", leave=False, disable=None):
        drawn = [draw(seed, length, depth, i) for i in range(samples)]
        prompts = [make_prompt(opened.tokenizer, length, *one)[0] for one in drawn]
        count = max(len(opened.tokenizer.encode_parts([f" {key}."])[0]) for _, key in drawn)
        answers = [opened.tokenizer.decode(ids) for ids in reader.answers(prompts, count, opened.end)]
        hits = sum(right(answer, key) for answer, (_, key) in zip(answers, drawn, strict=True))
        results.append(dict(length=length, depth=depth, right=hits, samples=samples, accuracy=hits / samples))
    return {"results": results, "model": os.fspath(model)}


def text(results: dict[str, Any]) -> str:
    """The result of `run` as a table."""
    cells = {(r["length"], r["depth"]): r["accuracy"] for r in results["results"]}
    lengths, depths = (sorted({cell[i] for cell in cells}) for i in (0, 1))
    lines = [f"{'length':>8}" + "".join(f"{depth:>9}" for depth in depths)]
    for length in lengths:
        row = (cells[length, depth] for depth in depths)
        lines.append(f"{length:>8}" + "".join(f"{100 * accuracy:>8.0f}%" for accuracy in row))
    return "\n".join(lines)
