"""Runs every bench_*.py of this folder, or those named: python -m benchmarks [gemm s2_attention ...] [--json
FILE ...].
"""

import importlib
import pathlib
import sys

names = sorted(path.stem.removeprefix("bench_") for path in pathlib.Path(__file__).parent.glob("bench_*.py"))
wanted = []
while len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
    wanted.append(sys.argv.pop(1))
unknown = sorted(set(wanted) - set(names))
if unknown:
    sys.exit(f"benchmarks: no {', '.join(unknown)} here; there are {', '.join(names)}")
for name in wanted or names:
    importlib.import_module(f"benchmarks.bench_{name}").main(sys.argv[1:])
