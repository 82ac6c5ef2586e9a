"""Prints the rows of the benchmarks as a Markdown table: python -m benchmarks.table FILE.json.

A ratio above 1 means that we are better. Less time and memory are better. Each row of a GPU has its own line,
with the figure that it must reach and the one that it aims at.
"""

import argparse
import json


def cell(row):
    """For example '243 GF/s, **1.02x** of 238, 95% of peak'."""
    text = f"{row['ours']:.3g} {row['unit']}"
    if row["ratio"] is not None:
        text += f", **{row['ratio']:.2f}x** of {row['peer']:.3g}"
    return text + (f", {row['of_peak']:.0%} of peak" if row["of_peak"] else "")


def targets(rows):
    """A line for each row of a GPU: its figure, its targets, and the target that it reaches."""
    yield "| benchmark | case | dtype | against | measured | must | aim | reaches |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in rows:
        must, aim, reached = row.get("must"), row.get("aim"), ""
        if must is not None:
            value, sign = row[row["judged"]], -1 if row["less_is_better"] else 1
            if row["smoke"] or value is None:
                reached = "a smoke run" if row["smoke"] else "not measured"
            else:
                reached = next(
                    (word for word, bar in (("aim", aim), ("must", must)) if sign * value >= sign * bar),
                    "**neither**",
                )
        bars = ("" if bar is None else f"{bar:.4g}" for bar in (must, aim))
        peer = row["peer_name"] or ""
        cells = (row["benchmark"], row["name"], row["dtype"], peer, cell(row), *bars, reached)
        yield f"| {' | '.join(cells)} |"


def table(rows):
    """A line for each benchmark, name and peer, with a column for each dtype."""
    lines = {}
    for row in rows:
        lines.setdefault((row["benchmark"], row["name"], row["peer_name"] or ""), {})[row["dtype"]] = cell(
            row
        )
    yield "| benchmark | case | against | float32 | bfloat16 |"
    yield "|---|---|---|---|---|"
    for (benchmark, name, peer), cells in lines.items():
        yield f"| {benchmark} | {name} | {peer} | {cells.get('float32', '')} | {cells.get('bfloat16', '')} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", help="rows that `python -m benchmarks --json FILE` wrote")
    with open(parser.parse_args().file) as file:
        found = [json.loads(line) for line in file]
    about = found[0]
    commits = ", ".join(dict.fromkeys(row["commit"] or "unknown" for row in found))
    print(
        f"{about['machine']}, {about['threads']} threads, commit {commits}, "
        + ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        + "\n"
    )
    print("\n".join((targets if "gpu" in about else table)(found)))
