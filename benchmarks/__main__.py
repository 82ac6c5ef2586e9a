"""Runs the benchmarks of this folder: all of them, or those that are named.

    python -m benchmarks [NAME ...] [OPTION ...]

Each benchmark takes the same options; `python -m benchmarks NAME --help` lists them. The tables of the paper
are a program of their own: `python -m benchmarks.paper`.
"""

import importlib
import pathlib
import sys

from longlora.guard import guarded


def main() -> int:
    """Run the benchmarks that the command line names."""
    folder, arguments = pathlib.Path(__file__).parent, sys.argv[1:]
    names = sorted(path.stem.removeprefix("bench_") for path in folder.glob("bench_*.py"))
    count = next((i for i, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    wanted, rest = arguments[:count], arguments[count:]
    if not wanted and {"-h", "--help"} & set(rest):
        print(f"{__doc__}\nBenchmarks: {', '.join(names)}")
        return 0
    unknown = sorted(set(wanted) - set(names))
    if unknown:
        sys.exit(f"benchmarks: unknown {', '.join(unknown)}; known are {', '.join(names)}")
    for name in wanted or names:
        importlib.import_module(f"benchmarks.bench_{name}").main(rest)
    return 0


sys.exit(guarded(main, "benchmarks"))
