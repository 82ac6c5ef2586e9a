"""What became of each mutant: lines of JSON in build/mutation, and the table of a run."""

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path

EQUIVALENT = Path(__file__).with_name("equivalent.txt")
KINDS = ("noticed", "timeout", "survived", "no test")
MISSED = ("survived", "no test")


def parser(description: str) -> argparse.ArgumentParser:
    """The options of both programs."""
    made = argparse.ArgumentParser(description=description.splitlines()[0])
    made.add_argument("--count", type=int, help="a random sample of this size")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--again", action="store_true", help="try only what survived, with all its tests")
    made.add_argument("--only", default="", metavar="WORDS", help="files whose name has these words")
    return made


def sample(keys: set[str], count: int | None, seed: int) -> list[str]:
    """The mutants to try: those that compute the same are left out."""
    equivalent = {line.partition("  # ")[0] for line in EQUIVALENT.read_text().splitlines()}
    left = sorted(keys - equivalent)
    print(f"{len(keys)} mutants, {len(keys & equivalent)} of them equivalent", flush=True)
    return random.Random(seed).sample(left, min(count or len(left), len(left)))


def read(log: Path) -> dict[str, str]:
    """The results in `log`: key -> one of KINDS, from the last attempt."""
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return {row["key"]: row["result"] for row in rows}


def to_try(log: Path, wanted: list[str], again: bool) -> list[str]:
    """The mutants that are not in `log`; with `again`, those in it that no test noticed."""
    known = read(log)
    return [key for key in wanted if (known.get(key) in MISSED if again else key not in known)]


def try_all(log: Path, wanted: list[str], attempt: Callable[[str], str]) -> list[str]:
    """Try each mutant and append the result to `log` -> the mutants that were not tried.

    attempt: returns one of KINDS, or "" if it cannot try the mutant. A key: file:function: was -> then.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    untried = []
    with log.open("a") as out:
        for i, key in enumerate(wanted):
            start = time.monotonic()
            result = attempt(key)
            if not result:
                untried.append(key)
            else:
                seconds = round(time.monotonic() - start, 2)
                out.write(json.dumps(dict(key=key, result=result, seconds=seconds)) + "\n")
                out.flush()
                print(f"{i + 1}/{len(wanted)} {result} in {seconds} s: {key}", flush=True)
    return untried


def show(log: Path, wanted: list[str]) -> None:
    """Print the mutants that no test noticed, and the counts."""
    all_known = read(log)
    known = {key: all_known[key] for key in sorted(wanted) if key in all_known}
    print("\nNot noticed:")
    for key, result in known.items():
        if result in MISSED:
            print(f"{result}: {key}")
    counts = {kind: sum(result == kind for result in known.values()) for kind in KINDS}
    total = sum(counts.values())  # without the equivalent ones
    share = 100 * (counts["noticed"] + counts["timeout"]) / max(total, 1)
    print(", ".join(f"{count} {kind}" for kind, count in counts.items()), f"of {total}: {share:.1f} %")
