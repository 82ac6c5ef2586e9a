"""`longlora eval TASK`. A task is one row of TASKS, and a function of the same name in longlora.eval."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

from longlora.flags import Command, json_flag, lengths, model_flags, show

NOT_KEYWORDS = ("command", "task", "json")  # what a parser adds to the keywords of a function


def _keywords(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(args).items() if name not in NOT_KEYWORDS}


def _depths(text: str) -> list[float | str]:
    try:
        return [part if part == "random" else float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected random, or numbers from 0 to 1, got {text!r}") from None


def _retrieval_flags(parser: argparse.ArgumentParser, lengths_of: str) -> None:
    """Flags of the tasks that ask for something in a long text."""
    model_flags(parser)
    add = parser.add_argument
    add("--lengths", required=True, type=lengths, help=lengths_of)
    add("--samples", type=int, default=10, help="prompts for each cell of the table")
    add("--seed", type=int, default=0, help="equal seeds make equal prompts")
    add("--output-dir", help="keep results and a figure here; a run that was stopped continues")
    json_flag(parser)


def _passkey_flags(parser: argparse.ArgumentParser) -> None:
    _retrieval_flags(parser, "tokens of a prompt: 4096,8192,...")
    parser.add_argument(
        "--depths",
        type=_depths,
        default=[0.0, 0.25, 0.5, 0.75, 1.0],
        help="where the key is, from 0 (begin) to 1 (end), or random",
    )


def _passkey(args: argparse.Namespace) -> int:
    from longlora.evaluation import passkey

    return _run(args, passkey.run, passkey.text)


def _topics_flags(parser: argparse.ArgumentParser) -> None:
    _retrieval_flags(parser, "tokens of a conversation at most: 4096,8192,...")


def _topics(args: argparse.Namespace) -> int:
    from longlora.evaluation import topics

    return _run(args, topics.run, topics.text)


def _tasks_flags(parser: argparse.ArgumentParser) -> None:
    model_flags(parser)
    add = parser.add_argument
    add("--tasks", required=True, metavar="TASK,TASK,...", help="tasks, groups and tags of lm-eval")
    add("--lengths", type=lengths, help="tokens of a prompt with its answer, for tasks such as RULER's")
    add("--context", type=int, help="tokens that are read at most (default: what the model was made for)")
    add("--limit", type=int, help="use only the first N samples of each task")
    add("--num-fewshot", type=int, help="examples before each question (default: the task's)")
    add("--task-dir", metavar="DIR", help="a directory with tasks of your own")
    add("--apply-chat-template", action="store_true", help="make each prompt a message to an assistant")
    add("--chat-template", metavar="FILE", help="a chat template (default: the model's own)")
    json_flag(parser)


def _tasks(args: argparse.Namespace) -> int:
    from longlora.evaluation import tasks

    return _run(args, tasks.run, tasks.text)


def _run(
    args: argparse.Namespace, function: Callable[..., dict[str, Any]], text: Callable[[dict], str]
) -> int:
    """Run a task; with --json standard output holds nothing else."""
    from longlora.progress import quietly

    say = quietly(lambda line: print(line, file=sys.stderr if args.json else sys.stdout, flush=True))
    return show(args, function(**_keywords(args), say=say), text)


TASKS = (
    Command("passkey", "find a number in a long text, by length and depth", _passkey_flags, _passkey),
    Command("topics", "name the first topic of a long conversation", _topics_flags, _topics),
    Command("tasks", "run tasks of lm-eval: RULER, LongBench, HellaSwag, ...", _tasks_flags, _tasks),
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """A subparser for each row of TASKS."""
    subparsers = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    for task in TASKS:
        task.add_flags(
            subparsers.add_parser(task.name, help=task.help, description=task.help, allow_abbrev=False)
        )


def run(args: argparse.Namespace) -> int:
    """Run the task -> the exit code."""
    return next(task.run for task in TASKS if task.name == args.task)(args)
