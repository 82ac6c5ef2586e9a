"""What the tasks with long prompts share: prompts, their answers, results on disk."""

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from longlora import disk
from longlora.decoder.generation_plan import MOST_TOKENS
from longlora.device import choose
from longlora.errors import UserError, shown
from longlora.evaluation.reader import Reader
from longlora.files.tokenizer import Tokenizer
from longlora.serving import prompt_cache
from longlora.serving.open import Opened, Prepared, prepare

Path = str | os.PathLike[str]
Cell = dict[str, Any]  # what the prompts of a cell have in common: their length, and what the task adds
Filled = tuple[Cell, list[dict[str, Any]]]  # a cell and its answers
RANDOM = "random"  # in a cell: each prompt draws the number
ANSWER = 64  # tokens of an answer at most
MOST = MOST_TOKENS - ANSWER  # tokens of a prompt at most
SIDE_BY_SIDE = 16  # prompts that are answered together at most: more make a step no faster


@dataclass(frozen=True)
class Prompt:
    """A prompt of a task.

    ids: int32 [N]. expected: what the answer should hold. count: the tokens of an answer.
    right: whether an answer is right. details: what else the results say about the prompt.
    """

    ids: np.ndarray
    expected: str
    count: int
    right: Callable[[str], bool]
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """A table of prompts.

    name: with the version of its prompts: results of another version do not mix with these.
    cells: in the order in which they run. prompt: makes sample number N of a cell.
    details: the names of the details of its prompts.
    """

    name: str
    cells: Sequence[Cell]
    prompt: Callable[[Tokenizer, Cell, int], Prompt]
    details: tuple[str, ...]


def integers(**named: Any) -> None:
    """UserError for a value that is not an integer of at least 1, or 0 for the seed. The names are shown."""
    for name, value in named.items():
        least = 0 if name == "seed" else 1
        for number in value if isinstance(value, (list, tuple)) and value else [value]:
            if type(number) is not int or not least <= number <= MOST:
                raise UserError(f"{name} should be an integer from {least} to {MOST}, got {shown(number)}")


def too_short(length: int, least: int, what: str) -> UserError:
    """The error about a length that has no room for the task."""
    return UserError(f"length {length} is too short: {what} the prompt has {least} tokens")


def longest(tokens: Callable[[int], int], length: int, guess: int, most: int) -> int:
    """The largest n from 0 to `most` with tokens(n) <= length, which holds for 0. tokens grows with n.

    The search begins at `guess`, because a call takes long.
    """
    low, high, step = 0, most + 1, 32
    n = guess
    while high - low > 1:
        n = min(max(n, low + 1), high - 1)
        fits = tokens(n) <= length
        low, high = (n, high) if fits else (low, n)
        if low > 0 and high <= most:
            n = (low + high) // 2
        else:
            n, step = (n + step if fits else n - step), 2 * step
    return low


def made_for(found: dict[str, Any]) -> str:
    """Say for how many tokens the model and its base are made."""
    now, before = found["context_length"], found["pretrained_length"]
    return f"the model is made for {now:,} tokens" + (f", its base for {before:,}" if before != now else "")


def span(numbers: Iterable[int]) -> str:
    """The least and the largest of the numbers, in words: 3 to 5, or 3 if all are equal."""
    ordered = sorted(numbers)
    return " to ".join(str(n) for n in dict.fromkeys((ordered[0], ordered[-1])))


def measure(
    task: Task,
    model: Path,
    adapter: Path | None,
    *,
    samples: int,
    seed: int,
    output_dir: Path | None,
    dtype: str,
    cache_dtype: str,
    device: str,
    say: Callable[[str], object],
) -> dict[str, Any]:
    """Answer `samples` prompts of each cell of the task -> what `passkey.run` describes.

    With output_dir the results are in a file there after every few prompts. What it holds already is not
    asked again. UserError as for serving.open.prepare, for a file with results of other settings, and for a
    length that is too short: before any weight is read.
    """
    with contextlib.ExitStack() as held:
        path = None
        if output_dir is not None:
            held.enter_context(disk.alone(os.fspath(output_dir)))
            path = os.path.join(output_dir, f"{task.name.split()[0]}.json")
            prompt_cache.rehearse(path)
        device, chosen = choose(device)
        say(chosen)
        context = max(cell["length"] for cell in task.cells) + ANSWER
        how = dict(rows=min(samples, SIDE_BY_SIDE), dtype=dtype, cache_dtype=cache_dtype, device=device)
        prepared = _prepare(model, adapter, context, how)
        settings = {"task": task.name, **prepared.identity, "seed": seed}
        found = _kept(path, settings, task)
        task.prompt(prepared.base.tokenizer(), min(task.cells, key=lambda cell: cell["length"]), 0)
        about = dict(
            model=os.fspath(model),
            adapter=None if adapter is None else os.fspath(adapter),
            device=device,
            context_length=prepared.config.max_position_embeddings,
            pretrained_length=prepared.base.config.max_position_embeddings,
            settings=settings,
        )

        def report() -> dict[str, Any]:
            return {**about, "results": [_summed(cell, answers) for cell, answers in found]}

        def keep() -> None:
            if path is not None:
                disk.write_json(path, report())

        _fill(task, found, prepared, samples, keep, say)
        return report()


def _fill(
    task: Task,
    found: list[Filled],
    prepared: Prepared,
    samples: int,
    keep: Callable[[], None],
    say: Callable[[str], object],
) -> None:
    """Answer what `found` lacks of the cells of the task; keep() is called after every few prompts."""
    opened: Any = None
    for number, cell in enumerate(task.cells, 1):
        answers = next((answers for other, answers in found if other == cell), [])
        while len(answers) < samples:
            if opened is None:
                opened = prepared.load()
                reader = Reader(opened.engine.generator)
            numbers = range(len(answers), min(samples, len(answers) + opened.engine.cache.rows))
            more = _answers(opened, reader, [task.prompt(opened.tokenizer, cell, i) for i in numbers])
            if not answers:
                found.append((cell, answers))
            answers += more
            keep()
        right = sum(answer["right"] for answer in answers)
        words = ", ".join(f"{name} {value}" for name, value in cell.items())
        say(f"{words}: {right} of {len(answers)} right ({number} of {len(task.cells)} cells)")


def _prepare(model: Path, adapter: Path | None, context: int, how: dict[str, Any]) -> Prepared:
    """Plan a model for prompts and answers of `context` tokens, with as many rows as fit into memory."""
    try:
        return prepare(model, adapter, context=context, fewest_rows=1, warns=False, **how)
    except UserError as error:  # what would make it fit, in the words of our options
        shorter = re.sub(r"--context (\d+)", lambda found: f"--lengths {int(found[1]) - ANSWER}", str(error))
        raise UserError(shorter) from None


def _answers(opened: Opened, reader: Reader, prompts: list[Prompt]) -> list[dict[str, Any]]:
    """Answer prompts side by side -> a dict for each, as the results hold it."""
    count = min(ANSWER, max(prompt.count for prompt in prompts))
    found = []
    for prompt, ids in zip(prompts, reader.answers([p.ids for p in prompts], count, opened.end), strict=True):
        text = opened.tokenizer.decode(ids[: prompt.count])
        about = dict(tokens=len(prompt.ids), expected=prompt.expected, answer=text, right=prompt.right(text))
        found.append(prompt.details | about)
    return found


def _summed(cell: Cell, answers: list[dict[str, Any]]) -> dict[str, Any]:
    right = sum(answer["right"] for answer in answers)
    return {
        **cell,
        "samples": len(answers),
        "right": right,
        "accuracy": right / len(answers),
        "answers": answers,
    }


def _kept(path: str | None, settings: dict[str, Any], task: Task) -> list[Filled]:
    """The cells that the file of an earlier run holds, with their answers. UserError for other settings."""
    if path is None or not os.path.exists(path):
        return []
    stored = disk.read_json(path)
    theirs = stored.get("settings")
    if not isinstance(theirs, dict):
        raise UserError(f"{path}: holds no results of longlora eval")
    for name, ours in settings.items():
        if theirs.get(name) != ours:
            raise UserError(
                f"{path}: holds results of another {name.replace('_', ' ')}: {shown(theirs.get(name))}, "
                f"wanted {shown(ours)}; give another output_dir"
            )
    rows = stored.get("results")
    if not isinstance(rows, list) or not all(_is_row(row, task) for row in rows):
        raise UserError(f"{path}: is damaged; remove it, or give another output_dir")
    return [({name: row[name] for name in task.cells[0]}, row["answers"]) for row in rows]


def _is_row(row: Any, task: Task) -> bool:
    """Whether a value from a file is a cell of the task with its answers."""
    if not isinstance(row, dict) or not isinstance(row.get("answers"), list) or not row["answers"]:
        return False
    numbers = [row.get(name) for name in task.cells[0]]
    needed = {"tokens", "expected", "answer", "right", *task.details}
    return all(type(x) in (int, float) or x == RANDOM for x in numbers) and all(
        isinstance(answer, dict) and needed <= answer.keys() and isinstance(answer["right"], bool)
        for answer in row["answers"]
    )
