"""Each command calls its function with what the line says, and with the function's own defaults else."""

import argparse
import ast
import contextlib
import inspect
import io
import json
import runpy
import sys
from types import SimpleNamespace

import pytest

import longlora
from longlora import cli
from longlora.decoder.sampling import Sampling
from longlora.evaluation import passkey, ppl, tasks, topics
from longlora.serving import chat, generate
from longlora.tools import doctor
from longlora.tools import inspect as inspect_
from longlora.training import driver

MODEL = "--adapter a --dtype float16 --cache-dtype bfloat16 --device cuda"
SAMPLING = (
    "--max-new-tokens 3 --temperature 0.5 --top-k 2 --top-p 0.25 --min-p 0.125 --repetition-penalty 1.5 "
    "--presence-penalty 0.75 --frequency-penalty 0.375"
)
GENERATION = (
    f"{MODEL} {SAMPLING} --context 9 --chat-template t --seed 7 --streaming --start-size 5 --recent-size 6 "
    "--prompt-cache c"
)
RETRIEVAL = f"{MODEL} --samples 3 --seed 7 --output-dir o"
SESSION = (longlora.Session, Sampling)
# A command with what it needs, its other flags, and the functions whose parameters they are.
CALLS = {
    "generate --model m": (
        f"{GENERATION} --prompt p --material x --question q --stop s",
        (generate.generate, *SESSION),
    ),
    "chat --model m": (f"{GENERATION} --system s", (chat.chat, *SESSION)),
    "serve --model m": (
        f"{MODEL} {SAMPLING} --context 9 --chat-template t --host h --port 1 --rows 2 --queue 3 --api-key k "
        "--cors-origin c --served-model-name n",
        (longlora.serve, Sampling),
    ),
    "ppl --model m --data d --lengths 8,16": (
        "--adapter a --stride 3 --rope-type yarn --target-length 9 --max-tokens 4 --protocol authors "
        "--bins 2 --dtype bfloat16",
        (ppl.run,),
    ),
    "eval passkey --model m --lengths 8,16": (f"{RETRIEVAL} --depths 0.5,random", (passkey.run,)),
    "eval topics --model m --lengths 8": (RETRIEVAL, (topics.run,)),
    "eval tasks --model m --tasks x,y": (
        f"{MODEL} --lengths 8,16 --context 9 --limit 3 --num-fewshot 2 --task-dir d --apply-chat-template "
        "--chat-template t",
        (tasks.run,),
    ),
}
LISTS = {
    "lengths": int,
    "depths": lambda x: x if x == "random" else float(x),
    "stop": str,
    "cors_origin": str,
}


def said(words):
    """The keywords that flags are: a flag without a value is True."""
    found = {}
    for word, value in zip(words, [*words[1:], "--"]):
        if word.startswith("--"):
            name = word[2:].replace("-", "_")
            if name in LISTS:
                found[name] = [LISTS[name](part) for part in value.split(",")]
            elif value.startswith("--"):
                found[name] = True
            else:
                with contextlib.suppress(ValueError):
                    value = ast.literal_eval(value)
                found[name] = value
    return found


@pytest.fixture
def called(monkeypatch):
    """What the functions of the commands are called with."""
    seen = []

    def answer(**given):
        seen.append(given)
        return {"results": []}

    for name in ("generate", "chat", "serve"):
        monkeypatch.setattr(longlora, name, answer)
    for module in (ppl, passkey, topics, tasks):
        monkeypatch.setattr(module, "run", answer)
        monkeypatch.setattr(module, "text", lambda found: "the text")
    monkeypatch.setattr(generate, "show", lambda answer: None)
    monkeypatch.setattr("longlora.device.choose", lambda wanted: (wanted, f"device: {wanted} is here"))
    return seen


@pytest.mark.parametrize("line", CALLS)
def test_flags_are_the_keywords_of_the_function(called, line):
    flags, functions = CALLS[line]
    defaults = {
        name: list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
        for function in reversed(functions)
        for name, parameter in inspect.signature(function).parameters.items()
    }
    if line.startswith("serve"):
        defaults["temperature"] = 1.0  # as OpenAI's
    required, others = said(line.split()), said(flags.split())
    assert cli.main(line.split()) == cli.main([*line.split(), *flags.split()]) == 0
    plain, full = ({name: x for name, x in given.items() if name != "say"} for given in called)
    assert plain == {name: defaults[name] for name in plain} | required
    assert full == plain | required | others and full.keys() == required.keys() | others.keys() | {"device"}


def test_merge_and_demo_are_called_with_their_flags(called, monkeypatch, capsys):
    base = SimpleNamespace(names=lambda: [])
    monkeypatch.setattr("longlora.files.open_model.open_model", lambda path: base)
    monkeypatch.setattr(longlora, "merge", lambda *given: called.append(given) or "the result")
    monkeypatch.setattr(longlora, "demo", lambda *given, **more: called.append((*given, more)))
    assert cli.main("merge --model m --output-dir o".split()) == 0
    assert capsys.readouterr().out == "saved the result\n"
    line = "merge --model m --adapter a --output-dir o --format gguf --dtype q8_0 --device cuda"
    assert cli.main(line.split()) == 0
    assert capsys.readouterr().out == "device: cuda is here\nsaved the result\n"
    assert cli.main(["demo"]) == cli.main("demo --output-dir o --steps 3 --device cpu".split()) == 0
    assert called == [
        ("m", None, "o", "cpu", "huggingface", "auto"),
        ("m", "a", "o", "cuda", "gguf", "q8_0"),
        ("longlora-demo", dict(steps=None, device="auto")),
        ("o", dict(steps=3, device="cpu")),
    ]


@pytest.mark.parametrize("stopped, code", [(None, 0), (15, 143)])
def test_the_code_of_a_run_is_that_of_its_signal(monkeypatch, stopped, code):
    runs = []
    monkeypatch.setattr(driver, "run", lambda o: runs.append(o) or SimpleNamespace(stopped=stopped))
    assert cli.main("train --model m --data d --output-dir o --max-steps 3".split()) == code
    assert (runs[0].model, runs[0].max_steps) == ("m", 3)
    monkeypatch.setattr("sys.argv", "longlora train --model m --data d --output_dir o --max_steps 4".split())
    assert cli.main() == code and runs[1].max_steps == 4


def test_names_of_the_package():
    names = {"Tensor", "get_num_threads", "set_num_threads", "Session", "cuda", "ops"}
    assert set(longlora.__all__) == names | {command.name for command in cli.COMMANDS} - {"eval"}
    assert set(longlora.__all__) <= set(dir(longlora))
    for name in (*longlora.__all__, "eval", "_C"):
        assert longlora.__getattr__(name) is getattr(longlora, name)
    with pytest.raises(AttributeError, match="module 'longlora' has no attribute 'missing'"):
        longlora.missing  # noqa: B018


def test_the_process_returns_the_code_of_its_command(monkeypatch):
    from longlora import __main__, interrupt

    did = []
    monkeypatch.setattr(__main__, "end_quietly", lambda: did.append("quiet"))
    monkeypatch.setattr(cli, "main", lambda: did.append("ran") or 5)
    assert __main__.main() == 5 and did == ["quiet", "ran"]
    monkeypatch.setattr(sys, "argv", ["longlora", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(cli.__file__, run_name="__main__")
    assert ended.value.code == 0
    monkeypatch.setattr(interrupt.os, "_exit", did.append)
    interrupt.end(2, None)
    assert did[2:] == [130]


# ---- what is printed -----------------------------------------------------------------------------


def test_json_on_request(called, monkeypatch, capsys):
    answer = SimpleNamespace(tokens=[1, 2], reason="stop", prompt_tokens=5, reused=3, seconds=2.5, first=0.5)
    made = type("Made", (), {"__iter__": lambda self: iter("ab"), **vars(answer)})()
    monkeypatch.setattr(longlora, "generate", lambda **given: made)
    shown = []
    monkeypatch.setattr(generate, "show", shown.append)
    assert cli.main("generate --model m --prompt p".split()) == 0 and shown == [made]
    assert cli.main("generate --model m --prompt p --json".split()) == 0 and shown == [made]
    assert json.loads(capsys.readouterr().out) == dict(
        text="ab",
        tokens=[1, 2],
        reason="stop",
        prompt_tokens=5,
        reused_tokens=3,
        seconds=2.5,
        seconds_to_first_token=0.5,
    )
    for module, name in ((inspect_, "describe"), (doctor, "examine")):
        monkeypatch.setattr(module, name, lambda *path: {"found": list(path)})
        monkeypatch.setattr(module, "text", lambda found: f"text of {found}")
    for words, found in ((["inspect", "p"], ["p"]), (["doctor"], [])):
        assert cli.main(words) == 0 and capsys.readouterr().out == f"text of {{'found': {found}}}\n"
        assert cli.main([*words, "--json"]) == 0 and json.loads(capsys.readouterr().out) == {"found": found}
    line = "ppl --model m --data d --lengths 8".split()
    assert cli.main(line) == 0 and capsys.readouterr().out == "device: auto is here\nthe text\n"
    assert cli.main([*line, "--json"]) == 0 and json.loads(capsys.readouterr().out) == {"results": []}


def test_a_task_speaks_beside_its_json(called, capsys):
    line = "eval topics --model m --lengths 8".split()
    assert cli.main(line) == cli.main([*line, "--json"]) == 0
    assert capsys.readouterr().out == 'the text\n{\n  "results": []\n}\n'
    called[0]["say"]("a line")
    assert capsys.readouterr() == ("a line\n", "")
    called[1]["say"]("a line")
    assert capsys.readouterr() == ("", "a line\n")


# ---- prompts -------------------------------------------------------------------------------------


def test_where_a_prompt_comes_from(called, monkeypatch, tmp_path, capsys):
    def prompt(*words):
        called.clear()
        code = cli.main(["generate", "--model", "m", *words])
        return called[0]["prompt"] if code == 0 else capsys.readouterr().err

    (tmp_path / "file.txt").write_text("from a file")
    assert prompt("--prompt-file", str(tmp_path / "file.txt")) == "from a file"
    assert "exclude each other" in prompt("--prompt-file", str(tmp_path / "file.txt"), "--prompt", "p")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("é!".encode())))
    assert prompt("--prompt", "-") == "é!"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff")))
    assert "standard input is not UTF-8 at byte 2" in prompt("--prompt", "-")
    monkeypatch.setattr(sys, "stdin", object())
    assert "standard input is closed" in prompt("--prompt", "-")


# ---- plan ----------------------------------------------------------------------------------------


def test_plan_takes_the_flags_of_its_kind(monkeypatch, capsys):
    made = SimpleNamespace(to_json=lambda: {"a": 1}, text=lambda: "the plan")
    asked = []
    monkeypatch.setattr(longlora, "plan", lambda **given: asked.append(given) or made)
    monkeypatch.setattr(driver, "plan_of", lambda o: asked.append((o.model, o.device)) or made)
    monkeypatch.setattr("longlora.device.choose_to_plan", lambda *given: ("cuda:9", f"device: {given}"))

    def answer(line):
        asked.clear()
        code = cli.main(["plan", *line.split()])
        return capsys.readouterr()[0 if code == 0 else 1], *asked

    assert answer("--generate --model m") == (
        "device: ('auto', None)\nthe plan\n",
        dict(generate=True, model="m", device="cuda:9"),
    )
    line = "--generate --model m --adapter a --dtype float16 --device cuda --max-memory 2"
    text, given = answer(f"{line} --context 9 --rows 2 --cache-dtype bfloat16")
    assert text.startswith("device: ('cuda', 2.0)\n")
    assert given == dict(
        generate=True,
        model="m",
        adapter="a",
        dtype="float16",
        device="cuda:9",
        max_memory=2.0,
        context=9,
        rows=2,
        cache_dtype="bfloat16",
    )
    for line, words in (
        ("--generate", "model is missing"),
        ("--generate --model m --seed 1 --full", "it has no --seed, --full"),
        ("--model m --rows 2 --cache-dtype float16", "--rows, --cache-dtype needs --generate"),
    ):
        text, *given = answer(line)
        assert words in text and given == []
    assert answer("--model m --max-memory 3") == ("device: ('auto', 3.0)\nthe plan\n", ("m", "cuda:9"))
    assert answer("--model m --json") == ('{\n  "a": 1\n}\n', ("m", "cuda:9"))


# ---- wrong lines, and help -----------------------------------------------------------------------


def leaves(parser, *words):
    """(words, parser) of each command and each task."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [(words, parser)] + [
        leaf
        for action in below
        for name, inner in action.choices.items()
        for leaf in leaves(inner, *words, name)
    ]


def refusal(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        cli.main(list(words))
    assert ended.value.code == 2
    return capsys.readouterr().err


MERGE = "merge --model m --output-dir o"


@pytest.mark.parametrize("line", [*CALLS, MERGE, "train", "plan", "demo", "inspect p", "doctor"])
def test_flags_are_not_abbreviated(line, capsys):
    command = line.partition(" --")[0].removesuffix(" p")
    flag = "--json" if command in ("inspect", "doctor") else "--device"
    text = refusal(capsys, *line.split(), f"{flag[:-1]}=1")
    said = f"{command}: unknown option '{flag[:-1]}=1'; did you mean {flag}?"
    assert text == f"longlora: error: {said} (see longlora {command} --help)\n"


@pytest.mark.parametrize("line", [*CALLS, MERGE])
def test_flags_that_a_command_needs(line, capsys):
    words = line.split()
    for i in [i for i, word in enumerate(words) if word.startswith("--")]:
        assert words[i] in refusal(capsys, *words[:i], *words[i + 2 :])


@pytest.mark.parametrize(
    "line, words",
    [
        ("--versio", "the following arguments are required: COMMAND"),
        ("doctor --xyzzy", "unknown option '--xyzzy' (see"),
        ("eval topics --model m --lengths 8,x", "expected integers separated by commas, got '8,x'"),
        (
            "eval passkey --model m --lengths 8 --depths 0,y",
            "expected random, or numbers from 0 to 1, got '0,y'",
        ),
        (f"{MERGE} --format x", "invalid choice: 'x'"),
        (f"{MERGE} --dtype float32", "invalid choice: 'float32'"),
        ("ppl --model m --data d --lengths 8 --rope-type x", "invalid choice: 'x'"),
        ("ppl --model m --data d --lengths 8 --protocol x", "invalid choice: 'x'"),
        ("ppl --model m --data d --lengths 8 --dtype float16", "invalid choice: 'float16'"),
        ("generate --model m --dtype float64", "invalid choice: 'float64'"),
        ("generate --model m --cache-dtype float64", "invalid choice: 'float64'"),
        ("plan --model m --cache-dtype float64", "invalid choice: 'float64'"),
    ],
)
def test_wrong_lines(line, words, capsys):
    assert words in refusal(capsys, *line.split())


def test_help_says_what_each_flag_takes(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "10000")
    usage = {" ".join(words): parser.format_usage() for words, parser in leaves(cli.parser())}
    for words, parser in leaves(cli.parser()):
        help = parser.format_help()
        assert words == () or parser.description
        for action in parser._actions:
            assert action.help or action.choices, action.option_strings
            for flag in action.option_strings[-1:]:
                kind = {int: "N", float: "X"}.get(action.type)
                if kind and action.help != argparse.SUPPRESS:
                    assert f"[{flag} {kind}]" in usage[" ".join(words)]
        for command in (*cli.COMMANDS, *cli.cli_eval.TASKS) if words in ((), ("eval",)) else ():
            if command.name in parser._subparsers._group_actions[0].choices:
                assert f"{command.name} " in help and command.help in help
    for words, wanted in {
        "": "usage: longlora [-h] [--version] COMMAND ...",
        "eval": "usage: longlora eval [-h] TASK ...",
        "generate": "[--prompt-cache FILE]",
        "chat": "[--dtype {auto,float32,bfloat16,float16}] [--cache-dtype {auto,float32,bfloat16,float16}]",
        "serve": "[--cors-origin ORIGIN] [--served-model-name NAME]",
        "merge": "[--format {huggingface,gguf}] [--dtype {auto,f32,f16,bf16,q8_0}]",
        "demo": "[--device auto|cpu|cuda|cuda:N]",
        "eval tasks": "--tasks TASK,TASK,... ",
        "train": "[--config FILE]",
    }.items():
        assert wanted in usage[words]
    assert "[--task-dir DIR]" in usage["eval tasks"] and "[--chat-template FILE]" in usage["eval tasks"]
    text = cli.parser().format_help()
    assert "Extend the context of a pretrained" in text and "longlora COMMAND --help" in text
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"longlora {longlora.__version__}\n"
