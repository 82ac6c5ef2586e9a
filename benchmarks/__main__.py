"""Runs the benchmarks of this folder: all of them, or those that are named.

    python -m benchmarks [NAME ...] [OPTION ...]

Each benchmark takes the same options; `python -m benchmarks NAME --help` lists them.
"""

import importlib
import pathlib
import sys

names = sorted(path.stem.removeprefix("bench_") for path in pathlib.Path(__file__).parent.glob("bench_*.py"))
wanted = []
while len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
    wanted.append(sys.argv.pop(1))
if not wanted and {"-h", "--help"} & set(sys.argv):
    print(f"{__doc__}\nBenchmarks: {', '.join(names)}")
    sys.exit()
unknown = sorted(set(wanted) - set(names))
if unknown:
    sys.exit(f"benchmarks: unknown {', '.join(unknown)}; known are {', '.join(names)}")
for name in wanted or names:
    importlib.import_module(f"benchmarks.bench_{name}").main(sys.argv[1:])
