"""Asks a model the questions of make_questions.py and counts the right answers.

    python demo/ask.py MODEL QUESTIONS.jsonl [--adapter A] [--dtype bfloat16] [--output-file ANSWERS.jsonl]

An answer is right if its first line equals the expected answer. The comparison ignores quotation marks, extra
spaces and a full stop at the end. Answers are greedy. The table has one row for each kind of question.
ANSWERS.jsonl keeps the question, the expected answer and the answer.
"""

import argparse
import collections
import json
import time
from pathlib import Path

import longlora


def plain(text: str) -> str:
    """The first line of an answer, without the characters that the comparison ignores."""
    return " ".join(text.strip().partition("\n")[0].replace('"', "").split()).rstrip(".")


def main(
    model: str,
    questions: str,
    adapter: str | None = None,
    output_file: str | None = None,
    context: int | None = None,
    dtype: str = "auto",
) -> None:
    records = [json.loads(line) for line in Path(questions).read_text(encoding="utf-8").splitlines()]
    session = longlora.Session(model, adapter, context=context, dtype=dtype)
    began, asked, right, written = time.perf_counter(), collections.Counter(), collections.Counter(), []
    for record in records:
        *messages, wanted = record["messages"]
        answer = "".join(session.chat(messages, max_new_tokens=60))
        kind, question = record["kind"], messages[-1]["content"].rpartition("\n")[2]
        asked[kind] += 1
        right[kind] += plain(answer) == plain(wanted["content"])
        written.append(dict(kind=kind, question=question, wanted=wanted["content"], answer=answer))
        if output_file is not None:
            lines = "".join(json.dumps(row) + "\n" for row in written)
            Path(output_file).write_text(lines, encoding="utf-8")
    for kind in asked:
        print(f"{kind:<8} {right[kind]:>4} of {asked[kind]} right")
    print(f"all      {right.total():>4} of {asked.total()} right, {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("questions", metavar="QUESTIONS.jsonl")
    parser.add_argument("--adapter")
    parser.add_argument("--output-file", metavar="ANSWERS.jsonl")
    parser.add_argument("--context", type=int, help="tokens of passage and answer together")
    parser.add_argument(
        "--dtype", default="auto", help="of the weights and the cache (default: that of the files)"
    )
    main(**vars(parser.parse_args()))
