"""What the files of the command line share: a row of a table of commands, and flags of several commands."""

import argparse
import json
from collections.abc import Callable
from typing import Any, NamedTuple

DTYPES = ("float32", "bfloat16", "float16")


class Command(NamedTuple):
    """A row of the table: add_flags puts the flags on a parser, run takes them and returns the exit code."""

    name: str
    help: str
    add_flags: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


class Help(argparse.HelpFormatter):
    """Shows the default of each flag, also 0, and N or X where a number goes.

    A default of None means that the text says in words what happens. Flags of a run bring their own defaults.
    """

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if action.nargs == 0 or default is None or default == argparse.SUPPRESS or default == []:
            return action.help
        values = default if isinstance(default, list) else [default]
        shown = ",".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
        return f"{action.help} [{shown.replace('%', '%%')}]"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        kinds: dict[Any, str] = {int: "N", float: "X"}
        return kinds.get(action.type) or super()._get_default_metavar_for_optional(action)


def lengths(text: str) -> list[int]:
    """The type of a flag with integers separated by commas."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected integers separated by commas, got {text!r}") from None


def device_flag(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--device", default=default, metavar="auto|cpu|cuda|cuda:N", help="where to compute")


def json_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def model_flags(parser: argparse.ArgumentParser) -> None:
    """The model to use, its adapter, its dtypes and its device."""
    add = parser.add_argument
    add("--model", required=True, help="a Hugging Face directory or a .gguf file")
    add("--adapter", help="an adapter trained on that model")
    add(
        "--dtype",
        default="auto",
        choices=("auto", *DTYPES),
        help="dtype of the weights; auto is that of the files",
    )
    add(
        "--cache-dtype",
        default="auto",
        choices=("auto", *DTYPES),
        help="dtype of keys and values; auto is the weights' own",
    )
    device_flag(parser, "auto")


def show(args: argparse.Namespace, found: dict, text: Callable[[dict], str]) -> int:
    """Print what was found, as JSON if the user asks for it."""
    print(json.dumps(found, indent=2) if args.json else text(found))
    return 0
