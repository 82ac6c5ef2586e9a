"""The command line: `longlora train|plan|ppl|merge|inspect|doctor|demo`. Parses, calls the Python function of the same name,
prints. What is the user's to mend is one line and exit code 2, never a traceback."""

import argparse
import difflib
import json
import sys

from longlora.errors import UserError


def _lengths(text):
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"wanted integers with commas between, got {text!r}") from None


class Parser(argparse.ArgumentParser):
    """What is wrong with the flags is one line, as any other error is."""

    def error(self, message):
        self.exit(2, f"longlora: error: {message} (see {self.prog} --help)\n")


def parser():
    from longlora import __version__

    p = Parser(
        prog="longlora",
        description="Extend the context of a pretrained language model (LongLoRA).",
        allow_abbrev=False,
    )
    p.add_argument("--version", action="version", version=f"longlora {__version__}")
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, help):
        return commands.add_parser(name, help=help, description=help, allow_abbrev=False)

    def device(command, default):
        command.add_argument(
            "--device", default=default, metavar="auto|cpu|cuda|cuda:N", help=f"where to compute [{default}]"
        )

    from longlora.training import options

    options.add_flags(command("train", "extend a model: LoRA, S2-Attn, position interpolation"))
    c = command("plan", "memory of a run, from the config alone")
    options.add_flags(c)
    c.add_argument("--json", action="store_true", help="print JSON")
    c = command("ppl", "perplexity by length, dense attention")
    c.add_argument("--model", required=True, help="a Hugging Face directory or a .gguf file")
    c.add_argument("--adapter", help="an adapter for it")
    c.add_argument("--data", required=True, help=".txt, .jsonl, a directory of them, or token .bin")
    c.add_argument("--lengths", required=True, type=_lengths, help="tokens of a window: 2048,4096,...")
    c.add_argument(
        "--stride", type=int, help="sliding window: tokens between windows (default: windows side by side)"
    )
    c.add_argument(
        "--rope-type",
        choices=options.TrainOptions.__dataclass_fields__["rope_type"].metadata["choices"],
        help="interpolate first, without training",
    )
    c.add_argument(
        "--target-length", type=int, help="what --rope-type extends to (default: the largest length)"
    )
    c.add_argument(
        "--max-tokens", type=int, help="use no more of the data than so many tokens from its start"
    )
    c.add_argument(
        "--bins", type=int, help="each length also by position in the window, in so many parts (with --json)"
    )
    c.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="storage [float32]")
    device(c, "auto")
    c.add_argument("--json", action="store_true", help="print JSON")
    c = command("merge", "write base and adapter as one model that any server takes")
    c.add_argument("--model", required=True, help="the base model")
    c.add_argument("--adapter", required=True)
    c.add_argument("--output-dir", required=True)
    device(c, "cpu")
    c = command("inspect", "what is this model, adapter or checkpoint")
    c.add_argument("path")
    c.add_argument("--json", action="store_true", help="print JSON")
    c = command("doctor", "build, instruction set, threads, versions, CUDA and why not")
    c.add_argument("--json", action="store_true", help="print JSON")
    c = command(
        "demo", "extend a small model that ships with the package, and show by perplexity that it worked"
    )
    c.add_argument("--output-dir", default="longlora-demo", help="where its files go [longlora-demo]")
    c.add_argument("--steps", type=int, help="training steps")
    device(c, "auto")
    return p


def _train(args):
    from longlora.training import driver as train
    from longlora.training import options

    result = train.run(options.from_flags(args))
    return 0 if result.stopped is None else 128 + result.stopped


def _plan(args):
    from longlora.device import choose
    from longlora.training import driver as train
    from longlora.training import options

    o = options.from_flags(args, planning=True)
    o.device, chosen = choose(o.device)
    made = train.plan_of(o)
    print(json.dumps(made.to_json(), indent=2) if args.json else f"{chosen}\n{made.text()}")
    return 0


def _ppl(args):
    from longlora.device import choose
    from longlora.evaluation import ppl

    device, chosen = choose(args.device)
    if not args.json:
        print(chosen)
    result = ppl.run(
        args.model,
        args.data,
        args.lengths,
        adapter=args.adapter,
        stride=args.stride,
        rope_type=args.rope_type,
        target_length=args.target_length,
        dtype=args.dtype,
        max_tokens=args.max_tokens,
        bins=args.bins,
        device=device,
    )
    print(json.dumps(result) if args.json else ppl.text(result))
    return 0


def _merge(args):
    from longlora.device import CPU, choose
    from longlora.files.merge import merge

    device, chosen = choose(args.device)
    if args.device != CPU:
        print(chosen)
    merge(args.model, args.adapter, args.output_dir, device)
    print(f"saved {args.output_dir}")
    return 0


def _inspect(args):
    from longlora.tools import inspect

    found = inspect.describe(args.path)
    print(json.dumps(found, indent=2) if args.json else inspect.text(found))
    return 0


def _doctor(args):
    from longlora.tools import doctor

    found = doctor.examine()
    print(json.dumps(found, indent=2) if args.json else doctor.text(found))
    return 0


def _demo(args):
    from longlora.tools import demo

    demo.run(args.output_dir, steps=args.steps, device=args.device)
    return 0


def _parsed(argv):
    from longlora.training import options

    p = parser()
    args, unknown = p.parse_known_args(options.dashed(sys.argv[1:] if argv is None else argv))
    if unknown:
        commands = next(action.choices for action in p._actions if action.dest == "command")
        known = [flag for action in commands[args.command]._actions for flag in action.option_strings]
        near = difflib.get_close_matches(unknown[0].partition("=")[0], known, 1)
        p.error(
            f"{args.command}: unknown option {unknown[0]!r}" + (f"; did you mean {near[0]}?" if near else "")
        )
    return args


def main(argv=None):
    args = _parsed(argv)
    try:
        return {
            "train": _train,
            "plan": _plan,
            "ppl": _ppl,
            "merge": _merge,
            "inspect": _inspect,
            "doctor": _doctor,
            "demo": _demo,
        }[args.command](args)
    except UserError as error:
        print(f"longlora: error: {error}", file=sys.stderr)
        return 2
    except MemoryError:
        print(
            "longlora: error: out of memory; `longlora plan` says what would make a run fit", file=sys.stderr
        )
        return 2
    except BrokenPipeError:
        sys.stderr.close()  # the reader has gone; so do we, without another word
        return 141
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
