"""What users write: files of options, texts, command lines.

An input is taken with the right result, or refused by one line that prints and exit code 2. Anything else is
a failure: a fault of ours (exit code 1), another result, more than LIMIT seconds of processor time, HANG
seconds in all, or MEMORY bytes. The right results come from yaml.safe_load, json.loads and bytes.decode. The
inputs follow from the seed.

    python tests/fuzz/inputs.py --count 100000 --seed 1 [--kind yaml]

A failure prints the number of its input; `--first NUMBER --count 1` repeats it.
"""

import argparse
import collections
import contextlib
import io
import json
import os
import random
import resource
import signal
import sys
import tempfile
import traceback
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import tiny  # noqa: E402
import yaml  # noqa: E402

from longlora import cli  # noqa: E402
from longlora.data import text  # noqa: E402
from longlora.errors import UserError  # noqa: E402
from longlora.training import config_file, options  # noqa: E402

LIMIT, HANG, MEMORY = 60, 300, 4 << 30
NAMES = list(options.TrainOptions.__dataclass_fields__) + list(options.aliases())
SCALARS = """0 1 -1 2 8 16 64 1.5 -0.5 1e-4 1e400 .inf -.inf .nan 0x10 0x_ 0o17 1_000 1:30 2026-13-45
2026-11-29 ~ null true no 'x' "" "a\\0b" "\\ud83d" ~/base base text.txt q_proj none auto cpu cuda:0
cuda:99999999999999999999 split 4294967296 9223372036854775808 1180591620717411303424 !!int x !!bool
x !!str 3 !!binary aGk= !!python/none ~ *a &a 5 [] [q_proj] {} {a: 1} [[a]] [1, 2] | > % @ ` ! - ? :
, # "\\U00110000" <<""".split()
VALUES = [
    "0",
    "1",
    "-1",
    "2",
    "8",
    "64",
    "0.5",
    "-0.0",
    "1e-300",
    "1e300",
    "nan",
    "inf",
    "-inf",
    "",
    " ",
    "x",
    "\x1b[2J",
    "~",
]
VALUES += [str(2**n + d) for n in (31, 32, 63, 64, 70) for d in (-1, 0)] + [
    "9" * 5000,
    "\udce9",
    "é",
    "base",
    "text.txt",
    "\n",
]
PIECES = [
    "a",
    "the quick ",
    "\n",
    "\r\n",
    "\r",
    " ",
    "\ufeff",
    "é",
    "漢字",
    "🙂",
    "\u2028",
    "\0",
    "\x1b",
    '{"text": "',
]
PIECES += [
    '"}',
    '{"text": "ab"}',
    '{"text": ""}',
    '{"text": 1}',
    "[]",
    "null",
    "1e999",
    '"\\ud83d"',
    "\\n",
    ",",
    "[" * 50,
]


# A task for lm-eval.
TASK = {
    "tiny.yaml": """\
task: tiny
test_split: test
fewshot_split: test
custom_dataset: !function tiny_task.make
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: ["a", "b"]
doc_to_target: 0
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
    "tiny_task.py": """\
import datasets

def make(**other):
    return {"test": datasets.Dataset.from_list([{"q": "the "}, {"q": "of "}])}
""",
}
GOOD = {
    "r": "4",
    "lora_alpha": "7.5",
    "learning_rate": "1e-4",
    "full": "false",
    "rope_type": "yarn",
    "target_length": "128",
    "seed": "0x1F",
    "target_modules": "[q_proj, v_proj]",
    "modules_to_save": "none",
    "warmup_steps": "0.1",
    "max_memory": "2",
    "data": "~/text.txt",
    "resume_from_checkpoint": "true",
    "eval_fraction": ".25",
    "group_size": "!!int 16",
    "output_dir": "~",
    "max_steps": "+1_0",
}


class Wrong(Exception):
    """A result that differs from the right one."""


def check(same, *facts):
    if not same:
        raise Wrong(*facts)


def damaged(rng, data):
    """Bytes with a few of them changed, cut out or repeated."""
    data = bytearray(data)
    for _ in range(rng.choice((0, 0, 1, 1, 3))):
        at, count = rng.randrange(len(data) + 1), rng.choice((1, 2, 9))
        part = rng.choice((rng.randbytes(count), data[at : at + count] * 2, b""))
        data[at : at + count] = part
    return bytes(data)


# ---- one function for each kind: it takes the input, or raises UserError --------------------------


def of_yaml(rng):
    lines = ["model: base"] * (rng.random() < 0.9)
    for name, value in rng.sample(sorted(GOOD.items()), rng.randrange(len(GOOD))):
        lines.append(f"{name}: {value}")
    for _ in range(rng.choice((0, 0, 1, 5))):
        key = rng.choice(NAMES) if rng.random() < 0.9 else rng.choice(SCALARS)
        value = " ".join(rng.choices(SCALARS, k=rng.choice((1, 1, 1, 2))))
        lines.append(f"{key}: {value}" if rng.random() < 0.9 else f"{key}:\n - {value}\n - {value}")
    if rng.random() < 0.1:
        lines.append(
            "seed:\n - &b0 [x, x, x]\n" + "".join(f" - &b{i} [{f'*b{i - 1}, ' * 9}]\n" for i in range(1, 30))
        )
    Path("c.yaml").write_bytes(damaged(rng, "\n".join(lines).encode()))
    found, wanted = config_file.read("c.yaml"), None
    with contextlib.suppress(Exception):  # no option has a name that YAML cannot read
        wanted = yaml.safe_load(Path("c.yaml").read_text("utf-8"))
    o = options.from_flags(argparse.Namespace(config="c.yaml"), planning=True)
    check(found == wanted, wanted, found)
    Path("again.yaml").write_text(yaml.safe_dump(o.to_dict()))
    check(options.from_flags(argparse.Namespace(config="again.yaml"), planning=True) == o, o)


def pieces(rng):
    return damaged(rng, "".join(rng.choices(PIECES, k=rng.choice((1, 5, 40)))).encode())


def read(name, rng):
    text.BLOCK = rng.choice((1, 3, 16, 1 << 17))
    return ["".join(parts) for parts in text.Corpus(name).documents()]


def of_txt(rng):
    data = pieces(rng)
    Path("t.txt").write_bytes(data)
    wanted = data.decode().removeprefix("\ufeff").replace("\r\n", "\n") if decodes(data) else ""
    try:
        check(read("t.txt", rng) == [wanted], data)
    except UserError:
        check(not wanted.strip(), data)
        raise


def decodes(data):
    with contextlib.suppress(UnicodeDecodeError):
        data.decode()
        return True
    return False


def of_jsonl(rng):
    data = b"".join(
        rng.choice((b'{"text": "ab\\r\\n"}\n', b"\n", pieces(rng) + b"\n")) for _ in range(rng.randrange(5))
    )
    Path("t.jsonl").write_bytes(data)
    wanted = []
    try:
        for number, line in enumerate(data.split(b"\n")):
            line = line.decode().removeprefix("\ufeff" if not number else "")
            if line.strip():
                wanted.append(json.loads(line)["text"])
                wanted[-1].encode()
        wanted = list(filter(None, wanted))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        wanted = []
    try:
        check(read("t.jsonl", rng) == wanted, data)
    except UserError:
        check(not wanted, data, wanted)
        raise


def of_flags(rng):
    """A command line of one of the quick commands, in its whole."""
    command = rng.choice(("plan", "plan", "train", "ppl", "inspect", "merge", "doctor", "--version", "no"))
    given = {
        "plan": ["--model", "base"],
        "train": ["--model", "base", "--data", "text.txt", "--output-dir", "out", "--num-threads", "1"],
        "ppl": ["--model", "base", "--data", "text.txt", "--lengths", "8"],
        "inspect": ["base"],
        "merge": ["--model", "base", "--adapter", "adapter", "--output-dir", "merged"],
    }.get(command, [])
    names = {"plan": NAMES, "train": NAMES}.get(
        command, ["lengths", "stride", "max_tokens", "bins", "json", "device"]
    )
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        name, value = rng.choice(names).replace("_", "-"), rng.choice(VALUES)
        given += rng.choice(([f"--{name}={value}"], [f"--{name}", value], [f"--{name}"], [value]))
    if command == "train":  # a quick run
        given += [
            "--max-steps",
            "1",
            "--gradient-accumulation-steps",
            "1",
            "--max-memory",
            "1",
            "--output-dir",
            "out",
        ]
    ran([command, *given])


def ran(words):
    """Run a command line -> what it says. UserError if it is refused as it should be."""
    said, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
        try:
            code = cli.main(words)
        except SystemExit as stop:
            code = stop.code
    lines = errors.getvalue()
    check(code in (0, 2), words, code, lines)
    if code == 2:
        *before, line = lines.splitlines()
        check(line.isprintable() and line.startswith("longlora: error: "), words, lines)
        # There --json tells the device, and lm-eval what it does.
        check(not before or "--json" in words or words[:2] == ["eval", "tasks"], words, lines)
        raise UserError(line)
    return said.getvalue()


# ---- evaluations: what must be refused, for each flag --------------------------------------------

NO_NUMBER = ["", " ", "x", "nan", "inf", "-1", "0.5", "1e3", "0x10", "9" * 5000, "True", "\udce9"]
NO_COUNT = ["0", *NO_NUMBER]
NO_FILE = ["", "missing", "fifo", "empty", "missing/x", "text.txt/x", "x" * 5000, "\0", "/dev/zero"]
NO_MODEL = [*NO_FILE, "text.txt"]
NO_LENGTHS = [*NO_COUNT, "300,", ",300", "300,,300", "300 300", "300,-1", "300,0", str(10**15), str(2**64)]
NO_MODEL_FLAGS = {
    "model": NO_MODEL,
    "adapter": [*NO_MODEL, "base"],
    "dtype": ["", "x", "float64", "FLOAT32", "0"],
    "device": ["", "x", "gpu", "cuda:-1", "cuda:x", "cpu:0", "cuda:" + "9" * 99],
}
NO_RETRIEVAL_FLAGS = {
    **NO_MODEL_FLAGS,
    "cache-dtype": ["", "x", "float64", "0"],
    "lengths": [*NO_LENGTHS, "1", "60"],
    "samples": [*NO_COUNT, str(2**63)],
    "seed": [*NO_NUMBER, str(2**63)],
    "output-dir": ["", "fifo", "text.txt", "text.txt/x", "x" * 5000, "\0", "/dev/zero"],
}
MODEL = ["--model", "base", "--device", "cpu"]
RETRIEVAL = [*MODEL, "--lengths", "400", "--samples", "1"]
EVALUATIONS = {
    "eval passkey": (
        [*RETRIEVAL, "--depths", "0.5"],
        {**NO_RETRIEVAL_FLAGS, "depths": ["", "x", "nan", "inf", "-0.1", "1.1", "0.5,", "random,x", "1e300"]},
    ),
    "eval topics": (RETRIEVAL, NO_RETRIEVAL_FLAGS),
    "eval tasks": (
        [*MODEL, "--tasks", "tiny", "--task-dir", "tasks"],
        {
            **NO_MODEL_FLAGS,
            "cache-dtype": ["", "x", "float64", "0"],
            "tasks": ["", ",", "tiny,", "nothing_of_this_name", "missing.yaml", "fifo", "tasks/../fifo"],
            "lengths": [*NO_LENGTHS, str(10**6)],
            "context": [*NO_COUNT, str(2**63)],
            "limit": NO_COUNT,
            "num-fewshot": [*NO_NUMBER, "9"],
            "task-dir": ["", "missing", "fifo", "text.txt", "x" * 5000, "\0", "/dev/zero"],
            "chat-template": ["text.txt"],  # without --apply-chat-template
            "apply-chat-template --chat-template": NO_FILE,
        },
    ),
    "ppl": (
        [*MODEL, "--data", "text.txt", "--lengths", "8", "--protocol", "authors"],
        {
            **NO_MODEL_FLAGS,
            "data": NO_FILE,
            "lengths": [*NO_LENGTHS, "1", str(2**20)],
            "stride": [*NO_COUNT, "9", str(2**63)],
            "target-length": ["64"],  # without --rope-type
            "rope-type": ["", "x"],
            "max-tokens": [*NO_COUNT, "1", "9", str(2**63)],
            "bins": [*NO_COUNT, str(2**63)],
            "protocol": ["", "x", "AUTHORS", "0"],
        },
    ),
}


def of_eval(rng):
    """Run an evaluation command with one invalid flag, or with arbitrary values."""
    command = rng.choice(list(EVALUATIONS))
    given, wrong = EVALUATIONS[command]
    given, must = list(given), rng.random() < 0.8
    for _ in range(1 if must else rng.choice((0, 1, 2))):
        flag = rng.choice(list(wrong))
        value = rng.choice(wrong[flag] if must else [*VALUES, "1,2", "400", "random"])
        *switches, flag = flag.split(" --")
        given += [f"--{switch}" for switch in switches] + [f"--{flag}={value}"]
    given += ["--json"] * (rng.random() < 0.5)
    said = ran([*command.split(), *given])
    check(not must, "is taken", command, given)
    if "--json" in given:
        json.loads(said)


KINDS = {"yaml": of_yaml, "txt": of_txt, "jsonl": of_jsonl, "flags": of_flags, "eval": of_eval}


def one(number, seed, chosen):
    """Try an input -> its kind and the outcome; a failure is told."""
    # An evaluation takes as long as a hundred others.
    kind = chosen or ("eval" if number % 20 == 0 else list(KINDS)[number % 4])
    signal.setitimer(signal.ITIMER_PROF, LIMIT)
    signal.setitimer(signal.ITIMER_REAL, HANG)
    try:
        KINDS[kind](random.Random(f"{seed} {number}"))
        return f"{kind} accepted"
    except UserError as error:
        if str(error).isprintable():
            return f"{kind} refused"
        print(f"input {number} ({kind}): does not print: {error!r}", file=sys.stderr)
    except BaseException:
        print(f"input {number} ({kind}): {traceback.format_exc()}", file=sys.stderr)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    return "failed"


class Late(BaseException):
    """An input took too long. A TimeoutError is an OSError, which would be told as an error of a file."""


def late(number, frame):
    if number == signal.SIGPROF:
        raise Late(f"more than {LIMIT} seconds of processor time")
    raise Late(f"more than {HANG} seconds")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS)
    o = parser.parse_args()
    signal.signal(signal.SIGPROF, late)
    signal.signal(signal.SIGALRM, late)
    if "ASAN_OPTIONS" not in os.environ:  # that sanitizer reserves terabytes of addresses
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    outcomes = collections.Counter()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        tempfile.tempdir = os.environ["HOME"] = folder
        os.environ |= dict(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HOME=folder)
        tiny.model("base")
        tiny.text("text.txt", 100)
        os.mkfifo("fifo")
        for name in ("empty", "tasks"):
            os.mkdir(name)
        for name, text in TASK.items():
            Path("tasks", name).write_text(text)
        for number in range(o.first, o.first + o.count):
            outcomes[one(number, o.seed, o.kind)] += 1
            tempdirs = ("out", "merged", *(p.name for p in Path().glob("longlora-error-*")))
            clean(*tempdirs)
    print(dict(outcomes))
    return 1 if outcomes["failed"] else 0


def clean(*paths):
    """Remove what an input left, so that the next one begins as the first."""
    import shutil

    for path in map(Path, paths):
        shutil.rmtree(path, ignore_errors=True)
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
