"""The command line. `longlora COMMAND` parses flags, calls the function of the same name, prints the result.

A command is one row of COMMANDS. A user's error is one line on stderr and exit code 2, never a traceback.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from longlora import cli_eval
from longlora.errors import UserError, did_you_mean
from longlora.flags import DTYPES, Command, Help, device_flag, json_flag, lengths, model_flags, show
from longlora.guard import guarded
from longlora.training import options

_GENERATION = ("context", "rows", "cache_dtype")  # options of plan --generate alone


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports wrong flags in one line, as every other error."""

    def __init__(self, **how: Any) -> None:
        super().__init__(**{"formatter_class": Help, **how})

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"longlora: error: {UserError(message)} (see {self.prog} --help)\n")


def _train(args: argparse.Namespace) -> int:
    from longlora.training import driver

    result = driver.run(options.from_flags(args))
    return 0 if result.stopped is None else 128 + result.stopped


def _flags(names: Iterable[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def _plan_flags(parser: argparse.ArgumentParser) -> None:
    options.add_flags(parser, options.PLANNED)
    add = parser.add_argument_group("generation").add_argument
    add("--generate", action="store_true", help="plan generation instead of a training run")
    add("--context", type=int, help="tokens of prompt and answer together (default: the model's)")
    add("--rows", type=int, help="answers that advance side by side (default: 1)")
    add(
        "--cache-dtype",
        choices=("auto", *DTYPES),
        help="dtype of keys and values (default: auto, the weights' own)",
    )
    json_flag(parser)


def _plan(args: argparse.Namespace) -> int:
    import longlora
    from longlora.device import choose_to_plan
    from longlora.training import driver

    given = {name: value for name, value in vars(args).items() if value is not None}
    if args.generate:
        takes = ("model", "adapter", "dtype", "device", "max_memory", *_GENERATION)
        given = {name: value for name, value in given.items() if name not in ("command", "generate", "json")}
        odd = [name for name in given if name not in takes]
        if odd:
            raise UserError(f"plan --generate takes {_flags(takes)}; it has no {_flags(odd)}")
        if "model" not in given:
            raise UserError("model is missing")
        given["device"], chosen = choose_to_plan(given.get("device", "auto"), given.get("max_memory"))
        plan = longlora.plan(generate=True, **given)
    else:
        odd = [name for name in _GENERATION if name in given]
        if odd:
            raise UserError(f"{_flags(odd)} needs --generate")
        o = options.from_flags(args, planning=True)
        o.device, chosen = choose_to_plan(o.device, o.max_memory)
        plan = driver.plan_of(o)
    return show(args, plan.to_json(), lambda _: f"{chosen}\n{plan.text()}")


def _ppl_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    rope_types = options.TrainOptions.__dataclass_fields__["rope_type"].metadata["choices"]
    add("--model", required=True, help="a Hugging Face directory or a .gguf file")
    add("--adapter", help="an adapter trained on that model")
    add("--data", required=True, help=".txt, .jsonl, a directory of them, or token .bin")
    add("--lengths", required=True, type=lengths, help="tokens of a window: 2048,4096,...")
    add("--stride", type=int, help="tokens between the starts of two windows (default: windows side by side)")
    add("--rope-type", choices=rope_types, help="interpolate the positions first, without training")
    add("--target-length", type=int, help="the length --rope-type extends to (default: the largest length)")
    add("--max-tokens", type=int, help="use only the first N tokens of the data")
    add("--protocol", choices=("authors",), help="also give what the eval.py of the authors computes")
    add("--bins", type=int, help="with --json: also report each length by position, in N equal parts")
    add(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="dtype of weights and activations"
    )
    device_flag(parser, "auto")
    json_flag(parser)


def _ppl(args: argparse.Namespace) -> int:
    from longlora.device import choose
    from longlora.evaluation import ppl

    device, chosen = choose(args.device)
    if not args.json:
        print(chosen)
    given = {name: value for name, value in vars(args).items() if name not in ("command", "json")}
    result = ppl.run(**{**given, "device": device})
    print(json.dumps(result) if args.json else ppl.text(result))
    return 0


def _model_flags(parser: argparse.ArgumentParser) -> None:
    model_flags(parser)
    parser.add_argument(
        "--context",
        type=int,
        help="tokens of prompt and answer together (default: what the model was made for)",
    )
    parser.add_argument("--chat-template", help="a file with a chat template (default: the model's own)")


def _sampling_flags(parser: argparse._ActionsContainer, temperature: float) -> None:
    add = parser.add_argument
    add(
        "--max-new-tokens",
        type=int,
        help="tokens of an answer at most (default: what the context has room for)",
    )
    add(
        "--temperature",
        type=float,
        default=temperature,
        help="how freely tokens are drawn; 0 takes the likeliest one",
    )
    add("--top-k", type=int, default=0, help="draw from the K likeliest tokens; 0 is all")
    add("--top-p", type=float, default=1.0, help="draw from the likeliest tokens that sum to P")
    add("--min-p", type=float, default=0.0, help="drop tokens below P times the likeliest one")
    add("--repetition-penalty", type=float, default=1.0, help="above 1 avoids tokens that were there")
    add("--presence-penalty", type=float, default=0.0, help="lowers tokens that are in the answer")
    add(
        "--frequency-penalty",
        type=float,
        default=0.0,
        help="lowers tokens by how often they are in the answer",
    )


def _generation_flags(parser: argparse.ArgumentParser) -> None:
    _model_flags(parser)
    _sampling_flags(parser, temperature=0.0)
    add = parser.add_argument
    add("--seed", type=int, help="equal seeds draw equal tokens (default: a random seed)")
    add(
        "--streaming",
        action="store_true",
        help="answers without end in memory of a fixed size: the model sees the first and the last tokens",
    )
    add("--start-size", type=int, default=4, help="with --streaming: the first tokens that are kept")
    add(
        "--recent-size",
        type=int,
        help="with --streaming: the last tokens that are kept (default: 8192, or what the model has)",
    )
    add("--prompt-cache", metavar="FILE", help="keep what was read in FILE: it is not read again")


def _generate_flags(parser: argparse.ArgumentParser) -> None:
    _generation_flags(parser)
    parser.add_argument("--prompt", help="a text to continue; - reads it from standard input")
    parser.add_argument("--prompt-file", help="a file or a pipe with the text to continue")
    parser.add_argument("--material", help="a .txt, .md or .pdf file, or a pipe of text, for --question")
    parser.add_argument("--question", help="a question, answered through the model's chat template")
    parser.add_argument("--stop", action="append", default=[], help="a text that ends the answer; repeatable")
    parser.add_argument("--json", action="store_true", help="print the answer, its tokens and times as JSON")


def _generate(args: argparse.Namespace) -> int:
    import longlora
    from longlora.serving import generate as command

    given = vars(args).copy()
    for name in ("command", "json", "prompt_file"):
        del given[name]
    if args.prompt_file is not None:
        if args.prompt is not None:
            raise UserError("--prompt and --prompt-file exclude each other")
        given["prompt"] = command.read_material(args.prompt_file)
    elif args.prompt == "-":
        given["prompt"] = _standard_input()
    answer = longlora.generate(**given)
    if not args.json:
        command.show(answer)
        return 0
    text = "".join(answer)
    found = dict(text=text, tokens=answer.tokens, reason=answer.reason, prompt_tokens=answer.prompt_tokens)
    found["reused_tokens"] = answer.reused
    print(json.dumps(found | dict(seconds=answer.seconds, seconds_to_first_token=answer.first)))
    return 0


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8 at byte {error.start}") from None
    except AttributeError:
        raise UserError("standard input is closed") from None


def _chat_flags(parser: argparse.ArgumentParser) -> None:
    _generation_flags(parser)
    parser.add_argument("--system", help="the system message that the conversation begins with")


def _chat(args: argparse.Namespace) -> int:
    import longlora

    given = {name: value for name, value in vars(args).items() if name != "command"}
    longlora.chat(**given)
    return 0


def _serve_flags(parser: argparse.ArgumentParser) -> None:
    _model_flags(parser)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="the address to listen at; 0.0.0.0 listens at all")
    add("--port", type=int, default=8000, help="the port; 0 takes a free one")
    add("--rows", type=int, default=4, help="answers that advance side by side")
    add("--queue", type=int, default=64, help="requests that may wait")
    add(
        "--api-key",
        help="the key that clients must give; LONGLORA_API_KEY in the environment hides it from other users",
    )
    add(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="a site whose pages may use the server, or *; repeatable",
    )
    add(
        "--served-model-name",
        metavar="NAME",
        help="the name that clients give (default: the last part of the path)",
    )
    group = parser.add_argument_group(
        "answers", "for requests that leave them out; --max-new-tokens limits all"
    )
    _sampling_flags(group, temperature=1.0)


def _serve(args: argparse.Namespace) -> int:
    import longlora

    longlora.serve(**{name: value for name, value in vars(args).items() if name != "command"})
    return 0


def _merge_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, help="the base model: a Hugging Face directory or a .gguf file"
    )
    parser.add_argument("--adapter", help="an adapter trained on that model (default: the base model alone)")
    parser.add_argument("--output-dir", required=True, help="a new directory for the merged model")
    parser.add_argument(
        "--format",
        default="huggingface",
        choices=("huggingface", "gguf"),
        help="a Hugging Face directory, or a .gguf file in it for llama.cpp",
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "f32", "f16", "bf16", "q8_0"),
        help="dtype of the weights; q8_0 only with --format gguf; auto is that of the base, float32 if it is "
        "quantised",
    )
    device_flag(parser, "cpu")


def _merge(args: argparse.Namespace) -> int:
    import longlora
    from longlora.device import CPU, choose
    from longlora.files.open_model import open_model

    device, chosen = choose(args.device)
    if args.device != CPU:
        print(chosen)
    given = (args.model, args.adapter, args.output_dir, device, args.format, args.dtype)
    path, expanded = longlora.merge(*given), ""
    if args.dtype == "auto":
        base = open_model(args.model)
        if any(base.storage(name) not in DTYPES for name in base.names()):
            expanded = "; its quantised weights are float32 now, --dtype chooses another"
    print(f"saved {path}{expanded}")
    return 0


def _inspect_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="a model, an adapter or a checkpoint")
    json_flag(parser)


def _inspect(args: argparse.Namespace) -> int:
    from longlora.tools import inspect

    return show(args, inspect.describe(args.path), inspect.text)


def _doctor(args: argparse.Namespace) -> int:
    from longlora.tools import doctor

    return show(args, doctor.examine(), doctor.text)


def _demo_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output-dir", default="longlora-demo", help="a directory for its files")
    parser.add_argument("--steps", type=int, help="training steps (default: 240)")
    device_flag(parser, "auto")


def _demo(args: argparse.Namespace) -> int:
    import longlora

    longlora.demo(args.output_dir, steps=args.steps, device=args.device)
    return 0


COMMANDS = (
    Command("train", "extend a model: LoRA, S2-Attn, position interpolation", options.add_flags, _train),
    Command(
        "plan", "show the memory that training or generation takes, from the config alone", _plan_flags, _plan
    ),
    Command("ppl", "measure perplexity by length, with dense attention", _ppl_flags, _ppl),
    Command("eval", "test what a model does with a long text", cli_eval.add_flags, cli_eval.run),
    Command("generate", "continue a text, or answer a question about one", _generate_flags, _generate),
    Command("chat", "talk to a model at the terminal", _chat_flags, _chat),
    Command("serve", "serve a model by OpenAI's API, with a page to chat", _serve_flags, _serve),
    Command("merge", "write base model and adapter as one model for other programs", _merge_flags, _merge),
    Command("inspect", "describe a model, an adapter or a checkpoint", _inspect_flags, _inspect),
    Command(
        "doctor", "show the build, the processor, versions, and why CUDA is unavailable", json_flag, _doctor
    ),
    Command(
        "demo", "extend a small model that ships with the package, and show that it works", _demo_flags, _demo
    ),
)


def parser() -> Parser:
    """The parser of the whole command line, one subparser for each row of COMMANDS."""
    from longlora import __version__

    p = Parser(
        prog="longlora",
        description="Extend the context of a pretrained language model (LongLoRA).",
        epilog="Begin with: longlora demo. The options of a command: longlora COMMAND --help",
        allow_abbrev=False,
    )
    p.add_argument("--version", action="version", version=f"longlora {__version__}")
    subparsers = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_flags(
            subparsers.add_parser(
                command.name, help=command.help, description=command.help, allow_abbrev=False
            )
        )
    return p


def _below(chosen: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of the commands below a parser."""
    found = [action for action in chosen._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(found[0].choices) if found else {}


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    p, argv = parser(), options.dashed(sys.argv[1:] if argv is None else argv)
    chosen: argparse.ArgumentParser = p
    words: list[str] = []
    for word in argv:
        if word in _below(chosen):
            chosen = _below(chosen)[word]
            words.append(word)
    if words == argv and _below(chosen):  # a command is missing: the help has them all
        chosen.print_help(sys.stderr)
        chosen.exit(2)
    args, unknown = p.parse_known_args(argv)
    if unknown:
        known = [flag for action in chosen._actions for flag in action.option_strings]
        hint = did_you_mean(unknown[0].partition("=")[0], known)
        chosen.error(f"{' '.join(words)}: unknown option {unknown[0]!r}{hint}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: that of the process) -> the exit code."""

    def run():
        args = _parsed(argv)
        return next(command.run for command in COMMANDS if command.name == args.command)(args)

    return guarded(run)


if __name__ == "__main__":
    sys.exit(main())
