"""The command line: its help and its commands. An error prints one line, exits with code 2 and touches no
file.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import effort
import numpy as np
import pytest
import tiny

import longlora
from longlora import _C, cli, cli_eval, cuda, job
from longlora.device import choose
from longlora.evaluation import ppl
from longlora.training import driver, options

# ---- help ----------------------------------------------------------------------------------------


def test_every_option_is_in_the_help(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    shown = capsys.readouterr().out
    for name in options.TrainOptions.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in shown


def leaves(parser):
    """The parsers of all commands, and of the tasks of those that have some."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [leaf for action in below for inner in action.choices.values() for leaf in leaves(inner)] or [
        parser
    ]


@pytest.mark.parametrize("words, name", [([], "inspect"), (["eval"], "passkey")])
def test_a_line_without_a_command_gets_the_help(words, name, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and out == "" and f"\n    {name} " in err


def test_help_shows_every_default_also_0_and_once():
    parsers = leaves(cli.parser())
    assert len(parsers) >= len(cli.COMMANDS)
    shown = 0
    for parser in parsers:
        formatter = parser._get_formatter()
        for action in parser._actions:
            if not action.option_strings or action.nargs == 0 or action.default in (None, argparse.SUPPRESS):
                continue
            text = formatter._expand_help(action)
            plain = action.default if isinstance(action.default, list) else [action.default]
            wanted = ",".join(str(value).removesuffix(".0") for value in plain)
            assert re.findall(r"\[(.*?)\]", text) == ([wanted] if wanted else []), text
            shown += bool(wanted)
    assert shown > 40


def test_help_lists_what_the_command_takes_and_every_default(capsys):
    """plan accepts the other flags of a run, but lists only those that it depends on."""
    with pytest.raises(SystemExit):
        cli.main(["plan", "--help"])
    shown = set(re.findall(r"^  --([a-z0-9-]+)", capsys.readouterr().out, re.M))
    generation = {"generate", "context", "rows", "cache-dtype"}
    assert shown - {"config", "json"} - generation == {name.replace("_", "-") for name in options.PLANNED}
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    flags = re.split(r" (?=--[a-z])", " ".join(capsys.readouterr().out.split()))
    described = {flag.split()[0]: flag for flag in flags}  # the later descriptions replace the usage
    for name, default in (
        ("warmup-steps", "0"),
        ("weight-decay", "0.0"),
        ("eval-steps", "0"),
        ("no-full", "false"),
        ("no-profile", "false"),
        ("max-steps", "-1"),
        ("no-train-on-inputs", "false"),
        ("target-modules", "q_proj k_proj v_proj o_proj"),
    ):
        assert f"[{default}]" in described[f"--{name}"], name
    for name, f in options.TrainOptions.__dataclass_fields__.items():
        if f.default is None and name not in ("model", "init", "data", "output_dir"):
            assert "(default: " in f.metadata["help"], name


# ---- bad input, from the command line ------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(group_size=0), ["group_size", "at least 2"]),
        (dict(group_size=7), ["group_size", "even"]),
        (dict(group_size=130), ["group_size should be at most sequence_length 128, got 130"]),
        (dict(target_length=64), ["target length should be above the 64 tokens"]),
        (dict(target_length=32), ["above the 64 tokens"]),
        (dict(sequence_length=300), ["sequence_length should be at most target_length 128"]),
        (dict(boundary="wrap", group_size=48), ["wrap needs sequence_length to be a multiple of group_size"]),
        (dict(max_steps="many"), ["--max-steps", "invalid int value: 'many'"]),
        (dict(typo=1), ["unknown option '--typo'", "(see longlora train --help)"]),
        (dict(use_dora=1), ["unknown option '--use-dora' (see"]),
        (dict(targetlength=1), ["did you mean --target"]),
        (dict(rope_type="x"), ["rope_type should be one of"]),
        (dict(model="missing"), ["missing: no such file"]),
        (dict(model="owner/missing"), ["hf download owner/missing --local-dir missing"]),
        (dict(data="missing.txt"), ["missing.txt: no such file"]),
        (dict(data="empty.txt"), ["empty.txt: holds no text"]),
        (dict(data="latin.txt"), ["latin.txt: is not UTF-8 at byte 3"]),
        (dict(data="short.txt", long_documents="drop"), ["leaves no sequence of 128 tokens"]),
        (dict(long_documents="refuse"), ["long_documents can be split, truncate or drop"]),
        (dict(target_modules="attention"), ["target_modules should be a list of"]),
        (dict(model="hollow"), ["hollow/config.json"]),
        (dict(config="missing.yaml"), ["missing.yaml: No such file or directory"]),
        (dict(config="bad.yaml"), ["bad.yaml: is not YAML"]),
        (dict(config="list.yaml"), ["should be a mapping of options"]),
        (dict(config="typo.yaml"), ["did you mean learning_rate?"]),
        (dict(max_memory=1e-5), ["this run needs", "what would make it fit"]),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_bad_input_is_one_line_and_touches_nothing(tmp_path, monkeypatch, capsys, fields, words):
    monkeypatch.chdir(tmp_path)
    given = tiny.options(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "short.txt").write_text("x" * 200)
    (tmp_path / "bad.yaml").write_text("a: [1")
    (tmp_path / "list.yaml").write_text("- a")
    (tmp_path / "typo.yaml").write_text("learning_rat: 1")
    (tmp_path / "hollow").mkdir()
    before = tiny.listing(tmp_path)
    try:
        code = cli.main(["train", *tiny.flags({**given, **fields})])
    except SystemExit as stop:
        code = stop.code
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and line.startswith("longlora: error: ")
    assert all(word in line for word in words), line
    after = tiny.listing(tmp_path)
    # the text may have been tokenised; no other file is new, and none has changed
    assert {name for name in after if "/cache/" not in name} == set(before)
    assert all(after[name] == content for name, content in before.items())


def test_an_adapter_for_another_base_is_refused(tmp_path):
    driver.train(lambda line: None, **tiny.options(tmp_path, max_steps=1))
    other = tiny.model(tmp_path / "other", seed=9)
    before = tiny.listing(tmp_path)
    both = ["--model", other, "--adapter", tmp_path / "out"]
    for arguments in (
        ["ppl", "--data", tmp_path / "text.txt", "--lengths", "64"],
        ["merge", "--output-dir", tmp_path / "merged"],
    ):
        tiny.refused(tiny.command(*arguments, *both), "an adapter for a base model other than")
    assert tiny.listing(tmp_path) == before


def test_a_gpu_that_cannot_be_used_is_said_with_the_reason(tmp_path):
    given, why = tiny.options(tmp_path, device="cuda:63"), _C.cuda_refusal(63)
    assert len(why) > 10  # words
    before = tiny.listing(tmp_path)
    base = ["--model", tmp_path / "base"]
    for arguments in (
        ["train", *tiny.flags(given)],
        ["plan", *base, "--device", "cuda:63"],
        ["ppl", *base, "--data", given["data"], "--lengths", 64, "--device", "cuda:63"],
        ["merge", *base, "--adapter", tmp_path, "--output-dir", tmp_path / "merged", "--device", "cuda:63"],
    ):
        tiny.refused(tiny.command(*arguments), f"device cuda:63 cannot be used: {why}")
    assert tiny.listing(tmp_path) == before


def test_what_auto_chose_is_said(tmp_path):
    """The first GPU that can be used, or the CPU and why."""
    device, sentence = choose("auto")
    assert sentence.startswith("device: ") and (device != "cpu" or cuda.reason() in sentence)
    fields = tiny.options(tmp_path, max_steps=1)
    done = tiny.command(
        "ppl", "--model", fields["model"], "--data", fields["data"], "--lengths", 8, "--max-tokens", 9
    )
    assert f"device: {device}" in done.stdout.splitlines()[0]
    said = []
    driver.train(said.append, **fields)
    assert said[0].startswith("device: cpu, 1 thread,") and "no GPU" not in said[0]  # as asked for


def test_the_process_says_it_in_one_line_too(tmp_path):
    """Once as users see it: in its own process, with exit code and standard error."""
    tiny.refused(
        tiny.command("train", *tiny.flags(tiny.options(tmp_path, group_size=5))), "group_size should be even"
    )
    tiny.refused(tiny.command("ppl", "--model", "x"), "--data")
    tiny.refused(tiny.command("tarin"), "tarin")
    tiny.refused(tiny.command("inspect", tmp_path), "is neither a model")


# ---- commands ------------------------------------------------------------------------------------


def test_train_merge_inspect_from_the_command_line(tmp_path):
    done = tiny.command("train", *tiny.flags(tiny.options(tmp_path)))
    assert done.returncode == 0 and "step 4/4" in done.stdout and done.stderr == ""
    merged = tmp_path / "merged"
    done = tiny.command(
        "merge", "--model", tmp_path / "base", "--adapter", tmp_path / "out", "--output-dir", merged
    )
    assert done.returncode == 0 and str(merged) in done.stdout
    losses = []
    for how in (["--model", merged], ["--model", tmp_path / "base", "--adapter", tmp_path / "out"]):
        done = tiny.command("ppl", *how, "--data", tmp_path / "text.txt", "--lengths", "100", "--json")
        losses.append(json.loads(done.stdout)["results"][0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for path, kind in (
        (merged, "model"),
        (tmp_path / "out", "adapter"),
        (tmp_path / "out" / "checkpoint-4", "checkpoint"),
    ):
        assert json.loads(tiny.command("inspect", path, "--json").stdout)["kind"] == kind


@pytest.mark.parametrize(
    "flags, keywords",
    [
        ("--stride 16", dict(stride=16)),
        ("--bins 2", dict(bins=2)),
        ("--protocol authors", dict(protocol="authors")),
        ("--max-tokens 50", dict(max_tokens=50)),
        ("--dtype bfloat16", dict(dtype="bfloat16")),
        ("--rope-type yarn", dict(rope_type="yarn")),
        ("--rope-type linear --target-length 256", dict(rope_type="linear", target_length=256)),
        ("--adapter out", dict(adapter="out")),
    ],
)
def test_every_flag_of_ppl_is_passed_on(tmp_path, monkeypatch, capsys, flags, keywords):
    """The result equals that of the keyword, and differs from the result without it."""
    monkeypatch.chdir(tmp_path)
    driver.train(lambda line: None, **tiny.options(tmp_path, max_steps=1))
    tiny.text(tmp_path / "held.txt", 80)  # the protocol of the authors takes 357 tokens
    always = "ppl --model base --data held.txt --lengths 32,100 --device cpu --json"
    assert cli.main([*always.split(), *flags.split()]) == 0
    found, given = json.loads(capsys.readouterr().out), dict(lengths=[32, 100], device="cpu")
    assert found == ppl.run("base", "held.txt", **given, **keywords)
    assert found["results"] != ppl.run("base", "held.txt", **given)["results"]


def test_the_parts_of_a_window_hold_their_targets(tmp_path, monkeypatch, capsys):
    """100 tokens are windows of 32, 32, 32 and 4. The first half has 3 x 16 targets and the 3 of the last."""
    monkeypatch.chdir(tmp_path)
    tiny.model(tmp_path / "base")
    (tmp_path / "text.txt").write_text("a" * 100)
    assert cli.main("ppl --model base --data text.txt --lengths 32 --bins 2 --device cpu --json".split()) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    found = [(part["first"], part["last"], part["tokens"]) for part in result["by_position"]]
    assert found == [(0, 16, 51), (16, 32, 45)]


def test_too_little_memory_is_one_line_and_code_2(tmp_path, monkeypatch, capsys):
    """The sums by position of a window of 10^15 tokens take 16 PB, which no machine can address."""
    monkeypatch.chdir(tmp_path)
    tiny.model(tmp_path / "base")
    tiny.text(tmp_path / "text.txt")
    code = cli.main(f"ppl --model base --data text.txt --lengths {10**15} --bins 2 --device cpu".split())
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 2 and line.startswith("longlora: error: out of memory; `longlora plan` shows")


def test_plan_needs_a_config_only_and_is_quick(tmp_path):
    tiny.config(
        tmp_path / "model",
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        vocab_size=32000,
        max_position_embeddings=4096,
    )
    script = effort.IMPORT + (
        "with calls() as counted:\n    from longlora.cli import main\n    main(sys.argv[1:])\n"
        "heavy = {'torch', 'matplotlib', 'tokenizers', 'gguf', 'tqdm', 'yaml', 'safetensors'}\n"
        "print(counted.count, *heavy & set(sys.modules), file=sys.stderr)"
    )
    flags = ["--model", tmp_path / "model", "--target-length", "32768", "--json"]
    done = subprocess.run([sys.executable, "-c", script, "plan", *flags], capture_output=True, text=True)
    assert int(done.stderr) < 1_000_000  # calls, and no heavy module; 370,000 take 0.2 s
    found = json.loads(done.stdout)
    assert sum(found["parts"].values()) == found["total"] > 25 << 30 and isinstance(found["fits"], bool)
    text = tiny.command(
        "plan", "--model", tmp_path / "model", "--target-length", "32768", "--max-memory", "20"
    ).stdout
    assert text.startswith("device: ") and "does not fit" in text and "20.000 GiB are available" in text


def test_doctor_names_what_is_in_use():
    found = json.loads(tiny.command("doctor", "--json").stdout)
    assert found["instruction_set"] in found["instruction_sets"] and found["cuda"]["reason"]
    assert found["threads"] == 1  # OMP_NUM_THREADS
    assert found["processors"] == job.processors()
    assert found["versions"]["numpy"] == np.__version__
    assert sys.version.startswith(found["python"] + " ")
    text = tiny.command("doctor").stdout
    assert found["instruction_set"] in text and "CUDA" in text and "numpy" in text


def test_every_command_is_a_function_of_the_package():
    names = [command.name for command in cli.COMMANDS if command.name != "eval"]
    tasks = [task.name for task in cli_eval.TASKS]
    assert names == list(longlora._COMMANDS) and tasks == longlora.eval.__all__
    for place, name in [*((longlora, name) for name in names), *((longlora.eval, name) for name in tasks)]:
        function = getattr(place, name)
        assert function.__doc__ and "return" in function.__annotations__, name
    typed = Path(longlora.__file__).read_text().partition("if TYPE_CHECKING:")[2].partition("__version__")[0]
    assert set(names) <= set(re.findall(r"(\w+)(?:,|$)", typed, re.M)), "for editors and mypy"


def test_help_is_quick_and_imports_little():
    script = effort.IMPORT + (
        "before = set(sys.modules)\n"
        "with calls() as counted:\n    from longlora.cli import main\n"
        "    try:\n        main(['--help'])\n    except SystemExit:\n        pass\n"
        "others = {name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names\n"
        "print('others', others - {'longlora'}, file=sys.stderr)\n"
        "ours = sorted(name for name in sys.modules if name.partition('.')[0] == 'longlora')\n"
        "print('ours', ours, file=sys.stderr)\n"
        "print(counted.count, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "train" in done.stdout and "others set()" in done.stderr
    names = ["", ".cli", ".cli_eval", ".errors", ".flags", ".guard", ".interrupt", ".training"]
    names.append(".training.options")
    assert f"ours {[f'longlora{name}' for name in names]}" in done.stderr
    assert int(done.stderr.splitlines()[-1]) < 300_000  # calls; 60,000 take 0.04 s


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    done = subprocess.run(
        f"{sys.executable} -m longlora doctor | true", shell=True, capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr
