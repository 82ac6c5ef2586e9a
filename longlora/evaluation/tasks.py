"""The tasks of lm-evaluation-harness (lm-eval) with our model: `longlora eval tasks`."""

import difflib
import os
import random
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from longlora.data.chat_template import find_template
from longlora.device import choose
from longlora.errors import UserError, shown
from longlora.serving.open import Prepared, prepare

SIDE_BY_SIDE = 16  # rows of the cache at most
SEED, SAMPLES = 1234, 0  # of the few-shot examples and NumPy, and of random, as lm-eval sets them
KINDS = ("loglikelihood", "loglikelihood_rolling", "generate_until", "multiple_choice")
Path = str | os.PathLike[str]


def run(
    model: Path,
    tasks: str | Sequence[str],
    adapter: Path | None = None,
    *,
    lengths: int | Sequence[int] | None = None,
    context: int | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    task_dir: Path | None = None,
    apply_chat_template: bool = False,
    chat_template: Path | None = None,
    dtype: str = "auto",
    cache_dtype: str = "auto",
    device: str = "auto",
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Run lm-eval's tasks with the model at path `model`, with an adapter merged in if given.

    Needs `pip install 'longlora[eval]'`. Returns what lm-eval gives, {"results": {task: {"metric,filter":
    value, ...}}, "groups", "group_subtasks", "n-shot", "n-samples", "versions", "higher_is_better"}, and
    "cut": how many requests were longer than the context and lost their beginnings. A group has a value for
    each of `lengths` too, the mean over its tasks.

    tasks                names of lm-eval's tasks, groups and tags, with * and ?, or files of tasks
    lengths              tokens of a prompt with its answer, for tasks that make their texts, such as RULER
    context              tokens that the model reads at most, by default what it was made for
    limit                use only this many samples of each task
    num_fewshot          examples before each question, by default what the task says
    task_dir             a directory with tasks of your own
    apply_chat_template  make each prompt a message to an assistant
    chat_template        a file with a template, by default the adapter's or the model's own
    dtype, cache_dtype   of weights, and of keys and values; auto is that of the files
    device               auto, cpu, cuda, cuda:1, ...
    say                  is called with the line that names the device

    UserError names what is wrong: unknown tasks, an adapter of another model, lengths that model or memory
    have no room for, data that cannot be loaded. All of it is found before the weights are read.
    """
    names = [name.strip() for name in tasks.split(",")] if isinstance(tasks, str) else list(tasks)
    sizes = [lengths] if isinstance(lengths, int) else list(lengths or ())
    _check(names, sizes, limit=limit, num_fewshot=num_fewshot)
    if chat_template is not None and not apply_chat_template:
        raise UserError("chat_template needs apply_chat_template")
    harness = _harness()
    # A task that makes texts of a length counts tokens by transformers, which reads a directory.
    with tempfile.TemporaryDirectory() as folder:
        whole = os.path.isdir(model)
        manager = _manager(names, task_dir, sizes, os.fspath(model) if whole else folder)
        device, chosen = choose(device)
        say(chosen)
        how: dict[str, Any] = dict(dtype=dtype, cache_dtype=cache_dtype, device=device)
        prepared = prepare(model, adapter, context=context, rows=SIDE_BY_SIDE, fewest_rows=1, **how)
        _check_lengths(sizes, prepared)
        tokenizer, template = prepared.base.tokenizer(), None
        if not whole:
            tokenizer.save(folder)
        if apply_chat_template:
            template = find_template(tokenizer, chat_template, adapter)
        loaded = _load(manager, names)
    with_model = harness.HarnessModel(prepared, template)
    found = _evaluate(with_model, loaded, limit, num_fewshot, apply_chat_template)
    _aggregate_lengths(found, sizes)
    about = dict(model=os.fspath(model), adapter=None if adapter is None else os.fspath(adapter))
    return {**found, "cut": with_model.cut, **about, "context": with_model.max_length, "device": device}


def _check(names, lengths, **counts):
    if not names or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"tasks should be names of tasks, got {shown(names)}")
    given = [("lengths", length, 1) for length in lengths]
    given += [(name, value, int(name == "limit")) for name, value in counts.items() if value is not None]
    for name, value, low in given:
        if type(value) is not int or value < low:
            raise UserError(f"{name} should be an integer of at least {low}, got {shown(value)}")


def _harness() -> Any:
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise UserError("eval tasks needs lm-eval: pip install 'longlora[eval]'") from None
    from longlora.evaluation import harness

    return harness


def _manager(names, task_dir, lengths, tokenizer):
    """lm-eval's index of tasks: that of task_dir alone if it has all names, for lm-eval's own has 14,000.

    lengths and tokenizer: for tasks that make their own texts. UserError for names that no index has.
    """
    from lm_eval.tasks import TaskManager

    metadata = {"tokenizer": tokenizer} | ({"max_seq_lengths": lengths} if lengths else {})
    if task_dir is not None:
        if not os.path.isdir(task_dir):
            raise UserError(f"{os.fspath(task_dir)}: no such directory")
        task_dir = os.fspath(task_dir)
        manager = TaskManager(include_path=task_dir, include_defaults=False, metadata=metadata)
        if all(_matches(manager, name) for name in names):
            return manager
    manager = TaskManager(include_path=task_dir, metadata=metadata)
    for name in names:
        if not _matches(manager, name):
            near = ", ".join(difflib.get_close_matches(name, manager.all_tasks, 3))
            raise UserError(f"lm-eval has no task {shown(name)}" + (near and f"; near: {near}"))
    return manager


def _matches(manager, name):
    """The names, or the file of a task, that a name with * and ? stands for."""
    return manager.match_tasks([name]) or ([name] if os.path.isfile(name) else [])


def _check_lengths(lengths, prepared: Prepared):
    made_for = prepared.planned.context
    if lengths and max(lengths) > made_for:
        raise UserError(
            f"length {max(lengths)} is more than the {made_for} tokens of the model's context; "
            f"--context {max(lengths)} makes it read them anyway"
        )


def _load(manager, names):
    """Load the tasks with their data -> lm-eval's TaskDict. UserError for one that cannot be run."""
    items: list[Any] = []
    for name in dict.fromkeys(found for wanted in names for found in _matches(manager, wanted)):
        try:
            loaded = manager.load([name])
        except Exception as error:  # a task is a program, and data of others
            raise UserError(f"task {name} {_reason(error)}") from None
        children = {child for members in loaded["group_map"].values() for child in members}
        items += [
            item for kind in ("groups", "tasks") for key, item in loaded[kind].items() if key not in children
        ]
    try:
        loaded = manager.load(items)
    except ValueError as error:
        raise UserError(f"tasks: {error}") from None
    for name, task in loaded["tasks"].items():
        if task.OUTPUT_TYPE not in KINDS or getattr(task, "MULTIMODAL", False):
            raise UserError(
                f"task {name} needs {task.OUTPUT_TYPE} or more than text, which longlora does not compute"
            )
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(f"task {name} runs code that the model writes, which longlora does not do")
    return loaded


def _reason(error):
    """Why a task cannot be loaded, in a line."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip(" *")), "")
    if isinstance(error, ImportError):
        return f"needs a library that is not installed: {said}"
    if isinstance(error, (OSError, LookupError)):
        return f"has data that cannot be loaded: {said}"
    return f"cannot be loaded: {type(error).__name__}: {said}"


def _evaluate(model, loaded, limit, num_fewshot, chats):
    """Ask the model, with the settings of lm_eval.simple_evaluate -> its results that JSON can hold."""
    from lm_eval.evaluator import evaluate

    random.seed(SAMPLES)
    np.random.seed(SEED)
    for task in loaded["tasks"].values():
        shots = task.get_config("num_fewshot")
        if shots is None or (num_fewshot is not None and shots != 0):  # a task's own 0 is never changed
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=SEED)
    how = dict(apply_chat_template=chats, fewshot_as_multiturn=chats, log_samples=False)
    try:
        found: dict[str, Any] = evaluate(lm=model, task_dict=loaded, limit=limit, **how)
    except ValueError as error:
        if "larger than population" not in str(error):
            raise
        raise UserError(f"num_fewshot: a task has fewer than {num_fewshot} other examples") from None
    kept = ("results", "groups", "group_subtasks", "versions", "n-shot", "higher_is_better", "n-samples")
    return {name: _plain(found[name]) for name in kept if name in found}


def _plain(x):
    """The same value in Python's own types."""
    if isinstance(x, dict):
        return {str(key): _plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_plain(value) for value in x]
    return x.item() if isinstance(x, np.generic) else x


def _aggregate_lengths(found, lengths):
    """Give each group the mean of its tasks at each length; lm-eval does so for 4096 alone.

    Tasks such as RULER's have a metric for each length.
    """
    for name in found.get("groups", {}):
        members = [found["results"][one] for one in found["group_subtasks"][name]]
        for length in map(str, lengths):
            key = f"{length},none"
            values = [member[key] for member in members if key in member]
            if len(values) == len(members):
                for place in ("groups", "results"):
                    found[place][name][key] = sum(values) / len(values)


def _number(value):
    if not isinstance(value, (int, float)):
        return str(value)
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.4g}"


def text(found: dict[str, Any]) -> str:
    """The result of `run` as a table."""
    lines = [f"{'task':<32} {'shots':>5} {'samples':>7}  {'metric':<24} {'value':>10}   standard error"]
    children = {child for members in found["group_subtasks"].values() for child in members}

    def add(name, depth):
        row = found["results"][name]
        samples = found["n-samples"].get(name, {}).get("effective", "")
        head = f"{'  ' * depth + name:<32} {found['n-shot'].get(name, ''):>5} {samples:>7}"
        for key, value in row.items():
            metric, _, filter = key.partition(",")
            # RULER gives -1 for lengths that nobody asked for.
            if not filter or metric.endswith("_stderr") or (metric.isdigit() and value == -1):
                continue
            error = row.get(f"{metric}_stderr,{filter}")
            shown_error = f"   {error:.4f}" if isinstance(error, float) else ""
            label = metric if filter == "none" else f"{metric}, {filter}"
            lines.append(f"{head}  {label:<24} {_number(value):>10}{shown_error}")
            head = " " * len(head)
        for child in found["group_subtasks"].get(name, ()):
            add(child, depth + 1)

    for name in found["results"]:
        if name not in children:
            add(name, 0)
    if found["cut"]:
        lines.append(
            f"{found['cut']} requests were longer than the context of {found['context']} tokens; their "
            "beginnings were left out"
        )
    return "\n".join(lines)
