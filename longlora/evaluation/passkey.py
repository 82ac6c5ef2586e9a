"""Passkey retrieval: a number hides in a long filler, and the model has to repeat it.

The prompt is that of the LongLoRA paper, appendix A.2, which has it from Mohtashami and Jaggi,
arXiv 2305.16300.
"""

import os
import random
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from longlora.errors import UserError, shown
from longlora.evaluation import retrieval
from longlora.evaluation.retrieval import RANDOM
from longlora.files.tokenizer import Tokenizer

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
KEY = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"
LARGEST = 50_000  # keys are 1 to this
NAME = "passkey 1"


def prompt_text(key: int, before: int, after: int) -> str:
    """The prompt: the line with the key, and numbers of characters of filler before and after it."""
    stream = FILLER * (max(before, after) // len(FILLER) + 1)
    return "\n".join([TASK, stream[:before], KEY.format(key=key), stream[:after], QUESTION])


def make_prompt(tokenizer: Tokenizer, length: int, depth: float, key: int) -> tuple[np.ndarray, str]:
    """The longest prompt of at most `length` tokens with the key at `depth` -> its ids, int32 [N], its text.

    depth: the part of the filler that stands before the key, from 0 to 1. The filler ends in the middle of a
    word where that fills the prompt, as in the authors' script.
    UserError if the prompt has more tokens without any filler.
    """

    def of(filler: int) -> str:
        before = round(filler * depth)
        return prompt_text(key, before, filler - before)

    def tokens(filler: int) -> int:
        return len(tokenizer.encode(of(filler)))

    shortest = tokens(0)
    if shortest > length:
        raise retrieval.too_short(length, shortest, "without filler")
    each = len(FILLER) / len(tokenizer.encode_parts([FILLER])[0])
    filler = retrieval.longest(tokens, length, int((length - shortest) * each), 64 * length)
    text = of(filler)
    return tokenizer.encode(text), text


def sample_of(seed: int, length: int, depth: float | str, sample: int) -> tuple[float, int]:
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
    depths: float | str | Sequence[float | str] = (0.0, 0.25, 0.5, 0.75, 1.0),
    samples: int = 10,
    seed: int = 0,
    output_dir: str | os.PathLike | None = None,
    dtype: str = "auto",
    cache_dtype: str = "auto",
    device: str = "auto",
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Ask the model at path `model`, with an adapter if given, for a number that a long text hides.

    Returns {"results": [{"length", "depth", "samples", "right", "accuracy", "answers": [{"depth", "tokens",
    "expected", "answer", "right"}]}, ...], "context_length", "pretrained_length", "settings", ...}, one
    result for each length and depth.

    lengths      tokens of a prompt. It has exactly that many, or the most below that the filler allows
    depths       the part of the filler before the key, from 0 to 1; "random" draws it for each prompt
    samples      prompts for each length and depth, each with a key of its own
    seed         equal seeds make equal prompts
    output_dir   keeps passkey.json and the heat map passkey.png. A later call with this directory continues:
                 cells that are in the file are not run again, more samples are added to them, and the result
                 holds all cells of the file
    dtype, cache_dtype, device: as in Session. say: receives a line for each cell

    UserError names an argument that is out of range, files that do not belong together or hold results of
    other settings, and a length that does not fit in memory: before any weight is read.
    """
    lengths = list(lengths) if isinstance(lengths, Iterable) else [lengths]
    chosen: list[Any] = (
        [depths] if isinstance(depths, str) or not isinstance(depths, Iterable) else list(depths)
    )
    retrieval.integers(lengths=lengths, samples=samples, seed=seed)
    for depth in chosen or [None]:
        number = isinstance(depth, (int, float)) and not isinstance(depth, bool) and 0 <= depth <= 1
        if not number and depth != RANDOM:
            raise UserError(f"depths should be numbers from 0 to 1, or {RANDOM}, got {shown(depth)}")

    def prompt(tokenizer: Tokenizer, cell: retrieval.Cell, sample: int) -> retrieval.Prompt:
        depth, key = sample_of(seed, cell["length"], cell["depth"], sample)
        ids, _ = make_prompt(tokenizer, cell["length"], depth, key)
        count = len(tokenizer.encode_parts([f" {key}."])[0])  # the dot shows where the number ends
        return retrieval.Prompt(ids, str(key), count, lambda answer: right(answer, key), dict(depth=depth))

    # The deepest key first: the prompts of the other depths begin as this one does, up to their keys.
    ordered = sorted({x if isinstance(x, str) else float(x) for x in chosen}, key=_place, reverse=True)
    cells = [dict(length=length, depth=depth) for length in sorted(set(lengths)) for depth in ordered]
    found = retrieval.measure(
        retrieval.Task(NAME, cells, prompt, ("depth",)),
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
    found["results"].sort(key=lambda row: (row["length"], _place(row["depth"])))
    if output_dir is not None:
        draw(os.path.join(output_dir, "passkey.png"), found, say)
    return found


def _place(depth: float | str) -> float:
    """Where a depth stands among the others."""
    return 2.0 if isinstance(depth, str) else depth


def draw(path: str, found: dict[str, Any], say: Callable[[str], object]) -> None:
    """Draw the heat map. A picture that fails is said, and loses no result."""
    try:
        from longlora import plots

        plots.passkey(path, found["results"], found["context_length"], found["pretrained_length"])
        say(f"saved {path}")
    except Exception as error:
        say(f"{path} could not be drawn: {error}")


def text(found: dict[str, Any]) -> str:
    """The result of `run` as a table of per cent."""
    cells = {(r["length"], r["depth"]): r for r in found["results"]}
    lengths = sorted({length for length, _ in cells})
    depths = sorted({depth for _, depth in cells}, key=_place)
    lines = [f"{'length':>8}" + "".join(f"{depth:>9}" for depth in depths)]
    for length in lengths:
        row = (cells.get((length, depth)) for depth in depths)
        shares = (f"{100 * cell['accuracy']:.0f}%" if cell else "" for cell in row)
        lines.append(f"{length:>8}" + "".join(f"{share:>9}" for share in shares))
    prompts = retrieval.span(r["samples"] for r in found["results"])
    return "\n".join([*lines, f"keys found, of {prompts} prompts in a cell; {retrieval.made_for(found)}"])
