"""The tables of the LongLoRA paper, small: the demo's model, real text, three seeds, verdicts.

    python -m benchmarks.paper [TABLE ...] [OPTION ...]

Tables are 1, 2, 3 (with 14 and Figure 4), 5 (Figure 5), 6, 6-longer, 7, 8 and cost (11 to 13). Without a name
all of them run, in about an hour on two cores that do nothing else. Every run is one line of the results,
written when the run ends. A run whose line is there is not made again, so a stopped command goes on where it
was. --report prints the tables and the verdicts of the results and runs nothing; --docs writes them and the
charts into docs/paper.md.
"""

import argparse
import gc
import json
import os
import sys
import time
from pathlib import Path

import longlora
from longlora.guard import guarded

from . import harness, paper_report
from .paper_stats import Stats, key
from .paper_tables import TABLES

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/paper.jsonl"


def read(path):
    """The rows of a results file. A last line that was cut off, and so has no end, is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def write(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    aside = path.with_suffix(".new")
    aside.write_text(text)
    os.replace(aside, path)


def wanted(tables):
    """The runs of the tables, each once with its seed: all with the first seed come before the second."""
    found = {}
    for seed in sorted({seed for table in tables.values() for seed in table.seeds}):
        for name, table in tables.items():
            for label, one in table.runs.items():
                if seed in table.seeds:
                    one = one | {"seed": seed}
                    found.setdefault(key(one), (name, label, one))
    return list(found.values())


def perform(one):
    """Make a run -> what it found."""
    if "time" in one:
        from .paper_cost import measure

        return measure(one["time"])
    from .paper_run import perform

    return perform(one)


def make(tables, results, again=False, say=print):
    """Make the runs that have no row in `results`; with `again` those of the tables that have one too."""
    rows, runs = read(results), wanted(tables)
    if again:
        drop = {key(one) for _, _, one in runs}
        rows = [row for row in rows if key(row["run"]) not in drop]
    results.parent.mkdir(parents=True, exist_ok=True)
    write(results, rows)  # without a line that was cut off
    there = {key(row["run"]) for row in rows}
    left = [run for run in runs if key(run[2]) not in there]
    about = {
        "machine": harness.machine(),
        "threads": longlora.get_num_threads(),
        "commit": harness.commit(),
        "versions": harness.versions("numpy"),
    }
    say(f"{len(runs)} runs, {len(left)} of them left to make")
    started = time.perf_counter()
    for number, (name, label, one) in enumerate(left, 1):
        load = os.getloadavg()[0]
        gc.collect()  # the model of the run before lies in a cycle of references
        row = {"run": one} | perform(one) | {"load": round(load, 1)} | about
        with open(results, "a") as file:
            file.write(json.dumps(row) + "\n")
        each = (time.perf_counter() - started) / number
        found = (f"{value:.4g} at {length}" for length, value in row.get("dense", {}).items())
        minutes = each * (len(left) - number) / 60
        say(f"table {name}, {label}, seed {one['seed']}: {', '.join(found)}; {minutes:.0f} minutes left")


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"one of {', '.join(TABLES)}")
    parser.add_argument(
        "--json", type=Path, default=RESULTS, metavar="FILE", help="the results (default: %(default)s)"
    )
    parser.add_argument("--again", action="store_true", help="make the runs of the named tables again")
    parser.add_argument("--report", action="store_true", help="print tables and verdicts, and run nothing")
    parser.add_argument(
        "--docs", action="store_true", help="write docs/paper.md and its charts, and run nothing"
    )
    o = parser.parse_args(argv)
    unknown = sorted(set(o.tables) - set(TABLES))
    if unknown:
        parser.error(f"unknown {', '.join(unknown)}; known are {', '.join(TABLES)}")
    tables = {name: TABLES[name]() for name in o.tables or TABLES}
    if not (o.report or o.docs):
        make(tables, o.json, o.again, lambda line: print(line, flush=True))
    stats = Stats(read(o.json))
    if o.docs:
        from . import paper_charts

        paper_report.write_page(ROOT / "docs/paper.md", stats, tables)
        paper_charts.write(ROOT / "docs", stats)
    else:
        print(paper_report.text(stats, tables))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main, "benchmarks.paper"))
