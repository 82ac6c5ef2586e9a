"""report_to: what tensorboard and wandb get, and that a reporter that fails loses nothing of a run."""

import re
import socket
import subprocess
import sys
import types

import pytest
import tiny
from runs import equal, failure, numbers, run, weights

from longlora.errors import UserError
from longlora.training import options, reporters
from longlora.training.driver import Driver

FIELDS = dict(max_steps=3, eval_fraction=0.1, eval_steps=2)


def written(history):
    """The rows of a run by transformers' names: name -> [(step, value)]."""
    found = {}
    for row in history:
        for name in row.keys() - {"step"}:
            scalar = f"eval/{name.removeprefix('eval_')}" if "eval_" in name else f"train/{name}"
            found.setdefault(scalar, []).append((row["step"], row[name]))
    return found


def check(found, history):
    wanted = written(history)
    assert found.keys() == wanted.keys()
    assert {"train/loss", "train/grad_norm", "train/learning_rate", "train/epoch", "eval/loss"} <= set(found)
    for name, values in wanted.items():
        assert [step for step, _ in found[name]] == [step for step, _ in values], name
        assert [x for _, x in found[name]] == pytest.approx([x for _, x in values], rel=1e-6), name


# ---- tensorboard ---------------------------------------------------------------------------------


def events(path):
    """What tensorboard's own reader finds below `path`, for each directory of events in order."""
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard reads its files"
    )
    found = []
    for directory in sorted({file.parent for file in path.rglob("*tfevents*")}):
        read = reader.EventAccumulator(str(directory)).Reload()
        tags = read.Tags()["scalars"]
        found.append({tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in tags})
    return found


def test_tensorboard_reads_the_metrics_of_a_run(tmp_path):
    pytest.importorskip("tensorboard")
    result = run(tmp_path, report_to=["tensorboard"], **FIELDS)
    (found,) = events(tmp_path / "out" / "runs")
    check(found, result.history)
    assert [step for step, _ in found["eval/loss"]] == [0, 2, 3]
    plain = run(tmp_path, output_dir=str(tmp_path / "plain"), **FIELDS)
    assert numbers(plain.history) == numbers(result.history)
    equal(weights(tmp_path / "out"), weights(tmp_path / "plain"))
    assert not (tmp_path / "plain" / "runs").exists()


def test_a_resumed_run_reports_its_own_steps(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    run(tmp_path, max_steps=2, report_to="tensorboard")
    (first,) = events(tmp_path / "events")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "later"))
    run(tmp_path, max_steps=4, report_to="tensorboard", resume_from_checkpoint="latest")
    (second,) = events(tmp_path / "later")
    assert [step for step, _ in first["train/loss"]] == [1, 2]
    assert [step for step, _ in second["train/loss"]] == [3, 4]
    assert not (tmp_path / "out" / "runs").exists()


def test_events_that_cannot_be_written_lose_nothing(tmp_path):
    pytest.importorskip("tensorboard")
    said = []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "runs").write_text("in the way")
    result = run(tmp_path, said, report_to=["tensorboard"], **FIELDS)
    (line,) = (line for line in said if line.startswith("tensorboard "))
    assert line.startswith("tensorboard fails, the run goes on without it: ") and "Not a directory" in line
    plain = run(tmp_path, output_dir=str(tmp_path / "plain"), **FIELDS)
    assert numbers(plain.history) == numbers(result.history)
    equal(weights(tmp_path / "out"), weights(tmp_path / "plain"))


def test_a_disk_that_fills_up_is_said_once(tmp_path):
    pytest.importorskip("tensorboard")

    class Full:
        def write(self, data):
            raise OSError(28, "No space left on device")

    said = []
    o = options.from_dict(tiny.options(tmp_path))
    reports = reporters.Reports(o, ["tensorboard"], said.append)
    reports.log(dict(step=1, loss=2.0))
    reports._open["tensorboard"]._records._writer = Full()
    for step in (2, 3):
        reports.log(dict(step=step, loss=1.0))
    reports.close()
    assert said == ["tensorboard fails, the run goes on without it: [Errno 28] No space left on device"]
    assert events(tmp_path / "out") == [{"train/loss": [(1, 2.0)]}]


def opened(tmp_path, name, said, **fields):
    """The Reports of a run with the reporter `name`."""
    o = options.from_dict(dict(model="m", data="d", output_dir=str(tmp_path / "out"), **fields))
    return reporters.Reports(o, [name], said.append)


def test_events_are_on_disk_after_each_step(tmp_path, monkeypatch):
    """They lie in a directory named after time and host, or in TENSORBOARD_LOGGING_DIR if it is set."""
    pytest.importorskip("tensorboard")
    said = []
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    reports = opened(tmp_path, "tensorboard", said)
    (path,) = (tmp_path / "out" / "runs").iterdir()
    time = path.name.removesuffix(f"_{socket.gethostname()}")
    assert re.fullmatch(r"[A-Z][a-z]{2}\d\d_\d\d-\d\d-\d\d", time)
    (file,) = path.iterdir()
    assert file.name.startswith("events.out.tfevents.")
    assert b"\x1a\x0dbrain.Event:2" in file.read_bytes()  # field 3 of the first Event: 13 bytes of version
    reports.log(dict(step=3, loss=2.5, eval_loss=1))
    assert events(tmp_path / "out") == [{"train/loss": [(3, 2.5)], "eval/loss": [(3, 1.0)]}]
    stream = reports._open["tensorboard"]._file
    reports.close()
    assert stream.closed and said == []
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "~/mine")
    for _ in range(2):  # the second time the directory exists
        opened(tmp_path, "tensorboard", said).close()
    assert len(list((tmp_path / "mine").iterdir())) == 2 and said == []


# ---- wandb ---------------------------------------------------------------------------------------


class Run:
    """A run of wandb that keeps what it gets; `fails` is the call that raises."""

    def __init__(self, fails=None):
        self.fails, self.config, self.rows, self.codes, self.metrics = fails, {}, [], [], []

    def call(self, name):
        if name == self.fails:
            raise RuntimeError(f"no network\nfor {name}")

    def log(self, row):
        self.call("log")
        self.rows.append(row)

    def define_metric(self, *names, **how):
        self.metrics.append((*names, how))

    def finish(self, exit_code):
        self.call("finish")
        self.codes.append(exit_code)


@pytest.fixture
def wandb(monkeypatch):
    """A module in the place of wandb."""
    module = types.ModuleType("wandb")
    module.run, module.begun, module.fails = None, [], None

    def init(**how):
        module.begun.append(how)
        module.made = Run(module.fails)
        module.made.call("init")
        module.made.config = Config()
        return module.made

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return module


class Config(dict):
    def update(self, values, allow_val_change):
        assert allow_val_change
        super().update(values)


@pytest.mark.parametrize("project, name", [(None, "short"), ("books", None)])
def test_a_run_of_wandb_begins_and_ends(tmp_path, wandb, monkeypatch, project, name):
    if project:
        monkeypatch.setenv("WANDB_PROJECT", project)
    said = []
    reports = opened(tmp_path, "wandb", said, run_name=name, r=4)
    assert wandb.begun == [dict(project=project or "longlora", name=name)]
    assert wandb.made.config["r"] == 4 and wandb.made.config["data"] == "d"
    step = "train/global_step"
    assert wandb.made.metrics == [(step, {}), ("*", dict(step_metric=step, step_sync=True))]
    reports.log(dict(step=3, loss=2, eval_loss=1.0, note="words"))
    assert wandb.made.rows == [{step: 3, "train/loss": 2.0, "eval/loss": 1.0}]
    for _ in range(2):
        reports.close()
    assert wandb.made.codes == [0] and said == []


def test_an_error_ends_the_run_of_wandb_and_an_interrupt_does_not(tmp_path, wandb):
    with opened(tmp_path, "wandb", []) as reports:
        assert isinstance(reports, reporters.Reports)
    assert wandb.made.codes == []
    for error, codes in ((ValueError, [1]), (KeyboardInterrupt, [])):
        with pytest.raises(error), opened(tmp_path, "wandb", []):
            raise error
        assert wandb.made.codes == codes


def test_an_open_run_of_wandb_is_used_and_stays_open(tmp_path, wandb):
    wandb.run = Run()
    wandb.run.config = Config()
    reports = opened(tmp_path, "wandb", [], r=4)
    reports.log(dict(step=1, loss=2.0))
    reports.close()
    assert not wandb.begun and not wandb.run.codes and wandb.run.config["r"] == 4
    assert wandb.run.rows == [{"train/global_step": 1, "train/loss": 2.0}]


@pytest.mark.parametrize(
    "error, words", [(RuntimeError("no\nroom"), "no room"), (ValueError(), "ValueError")]
)
def test_a_reporter_that_fails_is_named_once(tmp_path, wandb, error, words):
    def fail(row):
        raise error

    said = []
    reports = opened(tmp_path, "wandb", said)
    wandb.made.log = fail
    for step in (1, 2):
        reports.log(dict(step=step, loss=1.0))
    reports.close()
    assert said == [f"wandb fails, the run goes on without it: {words}"] and wandb.made.codes == []


def test_wandb_gets_the_metrics_and_the_options_of_a_run(tmp_path, wandb):
    result = run(tmp_path, report_to=["wandb"], run_name="short", **FIELDS)
    assert wandb.begun == [dict(project="longlora", name="short")]
    found = {}
    for row in wandb.made.rows:
        step = row.pop("train/global_step")
        for name, value in row.items():
            found.setdefault(name, []).append((step, value))
    check(found, result.history)
    assert wandb.made.config["learning_rate"] == 1e-2 and wandb.made.config["group_size"] == 32
    step = "train/global_step"
    assert wandb.made.metrics == [(step, {}), ("*", dict(step_metric=step, step_sync=True))]
    assert wandb.made.codes == [0]


def test_a_run_that_fails_ends_its_run_of_wandb_with_1(tmp_path, wandb, monkeypatch):
    monkeypatch.setattr(Driver, "_step", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, report_to=["wandb"])
    assert wandb.made.codes == [1]


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_wandb_without_a_network_loses_nothing(tmp_path, wandb, fails):
    wandb.fails, said = fails, []
    result = run(tmp_path, said, report_to=["wandb"], **FIELDS)
    (line,) = (line for line in said if line.startswith("wandb "))
    assert line == f"wandb fails, the run goes on without it: no network for {fails}"
    plain = run(tmp_path, output_dir=str(tmp_path / "plain"), **FIELDS)
    assert numbers(plain.history) == numbers(result.history)
    equal(weights(tmp_path / "out"), weights(tmp_path / "plain"))


def test_one_reporter_that_fails_leaves_the_other(tmp_path, wandb):
    pytest.importorskip("tensorboard")
    wandb.fails = "log"
    result = run(tmp_path, report_to=["wandb", "tensorboard"], **FIELDS)
    (found,) = events(tmp_path / "out" / "runs")
    check(found, result.history)


def test_wandb_itself_takes_a_run_offline(tmp_path):
    pytest.importorskip("wandb", reason="wandb is an extra")
    given = tiny.flags(tiny.options(tmp_path, report_to=["wandb"], run_name="short", **FIELDS))
    where = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    code = "import os, sys; os.environ.update({}); from longlora.cli import main; sys.exit(main({}))"
    done = subprocess.run(
        [sys.executable, "-c", code.format(where, ["train", *given])],
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0 and "fails" not in done.stdout, done.stderr
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"train/loss" in file.read_bytes() and b"eval/perplexity" in file.read_bytes()


# ---- which -----------------------------------------------------------------------------------------


def absent(monkeypatch, *names):
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)  # import raises ImportError


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_package_that_is_not_installed_is_one_line(tmp_path, monkeypatch, name):
    absent(monkeypatch, name)
    message = failure(tmp_path, report_to=[name])
    assert message == f"report_to {name} needs the package {name}: pip install 'longlora[{name}]'"
    assert not (tmp_path / "out").exists()


def test_a_folder_of_the_packages_name_is_not_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    with pytest.raises(UserError, match="needs the package wandb"):
        reporters.chosen(["wandb"])


def test_a_package_that_cannot_be_imported_is_refused_with_the_reason(monkeypatch):
    def fail(name):
        raise TypeError("Descriptors cannot be created")

    monkeypatch.setattr(reporters.importlib, "import_module", fail)
    with pytest.raises(UserError) as caught:
        reporters.chosen(["wandb"])
    assert str(caught.value) == (
        "report_to wandb needs the package wandb: pip install 'longlora[wandb]' "
        "(Descriptors cannot be created)"
    )
    assert reporters.chosen(["all"]) == []


def test_a_reporter_that_is_named_twice_reports_once(wandb):
    assert reporters.chosen(["wandb", "wandb"]) == ["wandb"]


def test_all_means_those_that_are_installed(monkeypatch, wandb):
    absent(monkeypatch, "tensorboard")
    assert reporters.chosen(("all",)) == ["wandb"]
    absent(monkeypatch, "wandb")
    assert reporters.chosen(("all",)) == [] == reporters.chosen(())


@pytest.mark.parametrize(
    "given, wanted",
    [("none", ()), ("wandb", ("wandb",)), (["tensorboard", "wandb"], ("tensorboard", "wandb"))],
)
def test_the_words_are_those_of_training_arguments(tmp_path, given, wanted):
    assert options.from_dict(tiny.options(tmp_path, report_to=given)).report_to == wanted
    with pytest.raises(UserError, match="one of tensorboard, wandb, all, none, got 'mlflow'"):
        options.from_dict(tiny.options(tmp_path, report_to=["wandb", "mlflow"]))
