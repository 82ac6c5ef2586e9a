"""Signals, and errors in the middle of a run: the steps so far are saved."""

import os
import signal
import subprocess
import sys
import threading
import types

import numpy as np
import pytest
import tiny
from runs import failure, run

from longlora.disk import sweep
from longlora.files import safetensors
from longlora.progress import Quiet, quietly
from longlora.training import metrics, resume, stop


class Hook:
    """Takes the lines of a run's report."""

    def __init__(self, say):
        self.append = say


def signalled(tmp_path, *numbers, wrap=()):
    """Run until step 3, send the signals at once -> exit code, standard output, standard error."""
    flags = tiny.flags(tiny.options(tmp_path, max_steps=20_000))
    before = {
        number: signal.signal(number, signal.SIG_DFL) for number in numbers
    }  # not ignored, as under nohup
    process = subprocess.Popen(
        [*wrap, sys.executable, "-m", "longlora", "train", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for number, handler in before.items():
        signal.signal(number, handler)
    for line in process.stdout:
        if line.startswith("step 3/"):
            break
    # A process that is stopped meets them together when it goes on. Else it may end between two of them.
    for number in (signal.SIGSTOP, *numbers, signal.SIGCONT):
        process.send_signal(number)
    output, errors = process.communicate(timeout=1200)
    return process.returncode, output, errors


@pytest.mark.parametrize(
    "numbers",
    [
        (signal.SIGHUP,),
        (signal.SIGUSR1,),
        (signal.SIGXCPU,),
        (signal.SIGTERM, signal.SIGINT),
        (signal.SIGINT, signal.SIGTERM, signal.SIGHUP),
    ],
    ids=str,
)
def test_every_signal_saves_and_several_at_once_are_one(tmp_path, numbers):
    code, output, errors = signalled(tmp_path, *numbers)
    assert code in {128 + number for number in numbers}, errors
    (path,) = resume.found(tmp_path / "out")
    assert path in output and "finishing and saving this step; a SIGINT or SIGTERM after" in errors


def test_a_hangup_that_is_ignored_stays_ignored(tmp_path):
    code, output, _ = signalled(tmp_path, signal.SIGHUP, signal.SIGTERM, wrap=("nohup",))
    assert code == 128 + signal.SIGTERM and "stopped by SIGTERM" in output


def test_a_later_signal_means_now(monkeypatch):
    monkeypatch.setattr(stop, "TOGETHER", 600.0)
    with stop.Stop() as s:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        assert s.signal == signal.SIGTERM
        monkeypatch.setattr(stop, "TOGETHER", -1.0)
        signal.raise_signal(signal.SIGUSR1)  # a warning never means now
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


@pytest.fixture
def default():
    """Give every signal its default handler, whatever started the tests. Returns the signals."""
    numbers = (*stop.ASK, *stop.WARN)
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    yield numbers
    for number, handler in before.items():
        signal.signal(number, handler)


def test_signals_of_one_second_are_one_request(default, monkeypatch, capfd):
    times = iter([100.0, 100.9, 101.0, 200.0, 101.1])
    monkeypatch.setattr(stop, "time", types.SimpleNamespace(monotonic=lambda: next(times)))
    with stop.Stop() as s:
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.raise_signal(number)
        assert s.signal == signal.SIGHUP
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    error = capfd.readouterr().err
    assert error.startswith("\nSIGHUP: finishing and saving this step; ") and " after 1 s ends" in error
    assert error.count("\n") == 2


def test_ignored_signals_stay_ignored_except_sigint_and_sigterm(default):
    ignored = (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1)
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    before = {number: signal.getsignal(number) for number in default}
    with stop.Stop() as s:
        caught = {number for number in default if signal.getsignal(number) == s._note}
        assert caught == {signal.SIGINT, signal.SIGTERM, signal.SIGXCPU}
        signal.raise_signal(signal.SIGHUP)
        assert s.signal is None
        signal.raise_signal(signal.SIGINT)
        assert s.signal == signal.SIGINT
    assert {number: signal.getsignal(number) for number in default} == before


def test_only_the_main_thread_handles_signals(default):
    found = []

    def work():
        with stop.Stop() as s:
            found.extend(signal.getsignal(number) for number in default)
            assert s.signal is None

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.SIG_DFL] * len(default)


@pytest.mark.parametrize("closed", [False, True])
def test_a_signal_without_a_standard_error(default, monkeypatch, closed):
    """Without one, descriptor 2 may be a file of the run: nothing is written. A closed one is no error."""
    written = []

    def write(handle, data):
        written.append((handle, data))
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(stop, "os", types.SimpleNamespace(write=write))
    if not closed:
        monkeypatch.setattr(sys, "__stderr__", None)
    with stop.Stop() as s:
        signal.raise_signal(signal.SIGTERM)
    assert s.signal == signal.SIGTERM and len(written) == closed


def test_the_checkpoint_just_written_is_kept(tmp_path):
    """Resumed from an older checkpoint, the newest has the smallest number."""
    run(tmp_path, max_steps=6, save_steps=2)
    first = str(tmp_path / "out" / "checkpoint-2")
    for i, path in enumerate(resume.found(tmp_path / "out")):  # written a minute apart
        os.utime(os.path.join(path, resume.STATE), (i * 60, i * 60))
    result = run(tmp_path, max_steps=3, resume_from_checkpoint=first, save_total_limit=1)
    assert result.step == 3
    assert [os.path.basename(path) for path in resume.found(tmp_path / "out")] == ["checkpoint-3"]


def test_another_runs_checkpoint_does_not_write_over_this_run(tmp_path):
    run(tmp_path, max_steps=2, output_dir=str(tmp_path / "a"))
    run(tmp_path, max_steps=2, seed=7)
    before = tiny.listing(tmp_path / "out")
    theirs = str(tmp_path / "a" / "checkpoint-2")
    message = failure(tmp_path, resume_from_checkpoint=theirs)
    assert "holds another run" in message and f"{theirs} belongs to another output_dir" in message
    assert tiny.listing(tmp_path / "out") == before
    found = run(tmp_path, max_steps=3, resume_from_checkpoint=theirs, output_dir=str(tmp_path / "empty"))
    assert found.step == 3


def test_data_that_is_truncated_while_it_is_read(tmp_path):
    """The steps before are saved, and the run goes on from there with the whole file."""
    data, whole = tmp_path / "s.bin", None
    np.random.default_rng(0).integers(0, 250, 40_000).astype("<u2").tofile(data)
    whole = data.read_bytes()

    def say(line):
        if line.startswith("step 3/"):
            os.truncate(data, 4096)

    message = failure(tmp_path, data=str(data), max_steps=50, said=Hook(say))
    assert "s.bin: has been truncated" in message and "the state after step" in message
    (path,) = resume.found(tmp_path / "out")
    assert path in message
    data.write_bytes(whole)
    step = resume.load(path)[0]["global_step"]
    assert run(tmp_path, data=str(data), max_steps=step + 1, resume_from_checkpoint="latest").step == step + 1


def test_an_error_of_any_kind_keeps_the_steps_so_far(tmp_path, monkeypatch):
    """The resumed run ends with the bits of one that met no error."""
    from longlora.training import driver

    real, calls = driver.batch, []

    def batch(*args):
        calls.append(args)
        if len(calls) == 4:
            raise MemoryError("no memory")
        return real(*args)

    monkeypatch.setattr(driver, "batch", batch)
    said = []
    with pytest.raises(MemoryError):
        run(tmp_path, max_steps=6, said=said)
    assert "stopped by an error after step 3; the state after step 3 is saved in" in said[-1]
    monkeypatch.setattr(driver, "batch", real)
    run(tmp_path, max_steps=6, resume_from_checkpoint="latest")
    run(tmp_path, max_steps=6, output_dir=str(tmp_path / "whole"))
    a, b = (
        safetensors.SafetensorsFile(str(tmp_path / name / "adapter_model.safetensors"))
        for name in ("out", "whole")
    )
    assert all(np.array_equal(a.array(name), b.array(name)) for name in b.entries)


def test_rows_behind_the_checkpoint_are_cut_from_the_metrics(tmp_path):
    run(tmp_path, max_steps=4, save_steps=2, lr_scheduler_type="constant")
    first = str(tmp_path / "out" / "checkpoint-2")
    run(tmp_path, max_steps=2, resume_from_checkpoint=first, lr_scheduler_type="constant")
    assert [row["step"] for row in metrics.read(tmp_path / "out")] == [1, 2]


class Broken:
    """A stream that fails as a full disk does."""

    encoding = "ascii"

    def write(self, text):
        raise OSError(28, "No space left on device")

    def flush(self):
        raise OSError(28, "No space left on device")


def test_output_that_fails_ends_no_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Broken())
    said = []

    def say(line):
        said.append(line)
        raise OSError(28, "No space left on device")

    assert run(tmp_path, max_steps=2, said=Hook(say)).step == 2 and said
    Quiet(Broken()).write("x")


def test_a_terminal_without_the_character_gets_its_code():
    said = []

    def say(line):
        line.encode("ascii")
        said.append(line)

    quietly(say)("caf\u00e9")
    assert said == ["caf\\xe9"]


def test_a_sweep_leaves_what_is_being_written(tmp_path):
    """A file of a living process is locked; that of a killed one goes."""
    script = (
        "import sys; from longlora.disk import replacing\n"
        "with replacing(sys.argv[1]) as aside: print(aside, flush=True); sys.stdin.read()"
    )
    command, pipe = [sys.executable, "-c", script, str(tmp_path / "tokens.bin")], subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
    aside = process.stdout.readline().strip()
    sweep(tmp_path)
    assert os.path.exists(aside)
    process.kill()
    process.communicate()
    sweep(tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_have_the_mode_that_the_user_wants(tmp_path, mask):
    script = (
        "import os, sys; os.umask(int(sys.argv[1])); from longlora import disk; disk.write_text('a', 'x')"
    )
    subprocess.run([sys.executable, "-c", script, str(mask)], check=True, cwd=tmp_path)
    assert os.stat(tmp_path / "a").st_mode & 0o777 == 0o666 & ~mask
