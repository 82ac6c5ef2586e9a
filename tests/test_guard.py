"""What a command line does with what it did not expect: one line, the right exit code, never a traceback."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

import longlora
from longlora import cli, guard
from longlora.errors import UserError


def raising(error):
    def run():
        raise error

    return run


class Panic(BaseException):
    """As pyo3's PanicException, which is no Exception."""


@pytest.mark.parametrize(
    "error", [ValueError("odd\x1b[2J"), Panic("index out of bounds"), OSError(5, "bad disk")]
)
def test_a_fault_of_ours_is_one_line_and_a_file(capsys, tmp_path, monkeypatch, error):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert guard.guarded(raising(error)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    found = re.fullmatch(
        r"longlora: error: this is a fault of longlora, please report it: (.*); .* (\S+)", line
    )
    assert found and "\x1b" not in line and found[1].startswith(f"{type(error).__name__}: ")
    details = Path(found[2]).read_text()
    assert "Traceback" in details and "in run" in details and longlora.__version__ in details
    assert os.path.dirname(found[2]) == str(tmp_path) and os.stat(found[2]).st_mode & 0o77 == 0


def test_details_go_to_stderr_if_no_file_can_be_made(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    assert guard.guarded(raising(ValueError("odd"))) == 1
    *trace, line = capsys.readouterr().err.splitlines()
    assert trace[0].startswith("Traceback") and "No such file" in line and "please report" in line


@pytest.mark.parametrize(
    "error, code, words",
    [
        (UserError("wrong"), 2, "longlora: error: wrong"),
        (MemoryError(), 2, "longlora: error: out of memory"),
        (ImportError("No module named 'x'"), 2, "longlora: error: No module named 'x'"),
        (KeyboardInterrupt(), 130, None),
        (BrokenPipeError(), 141, None),
    ],
)
def test_the_code_says_whose_error_it_is(capsys, error, code, words):
    assert guard.guarded(raising(error)) == code
    lines = capsys.readouterr().err.splitlines()
    assert [line[: len(words)] for line in lines] == [words] if words else lines == []


def test_one_process_of_a_group_tells_a_users_error_and_each_its_own_fault(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert guard.guarded(raising(UserError("wrong")), speaks=False) == 2
    assert capsys.readouterr().err == ""
    assert guard.guarded(raising(ValueError("odd")), speaks=False) == 1
    assert "please report" in capsys.readouterr().err
    (details,) = tmp_path.iterdir()
    assert details.match("longlora-error-*.txt")


class Stream:
    """Standard output that fails: at a write, or not before it is flushed."""

    def __init__(self, error, at):
        self.error, self.at, self.closed = error, at, False

    def write(self, text):
        if self.at == "write":
            raise self.error
        return len(text)

    def flush(self):
        if self.at == "flush":
            raise self.error

    def fileno(self):
        raise ValueError("it has none")


@pytest.mark.parametrize("at", ["write", "flush", "never"])
def test_output_that_fails_in_the_process(capsys, monkeypatch, tmp_path, at):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    full = "longlora: error: standard output cannot be written: No space left on device\n"
    for error, failed in (
        (OSError(28, "No space left on device"), (2, full)),
        (BrokenPipeError(), (141, "")),
    ):
        stream = Stream(error, at)
        monkeypatch.setattr(sys, "stdout", stream)
        assert guard.guarded(lambda: print("text") or 0) == (failed[0] if at != "never" else 0)
        assert sys.stdout is stream and capsys.readouterr().err == (failed[1] if at != "never" else "")

        def swallows():
            with contextlib.suppress(OSError):
                print("text")
            return 7

        # A command that has failed by itself keeps its code; a reader that has gone is one all the same.
        code = 141 if at != "never" and isinstance(error, BrokenPipeError) else 7
        assert guard.guarded(swallows) == code and capsys.readouterr().err == ""
    monkeypatch.setattr(sys, "stdout", Stream(ValueError("closed"), at if at == "flush" else "never"))
    assert guard.guarded(lambda: 0) == 0  # one that is closed has nothing left to say


def test_the_first_error_of_the_output_counts(capsys, monkeypatch):
    """A reader that has gone is no error, even if the disk is full afterwards."""
    stream = Stream(BrokenPipeError(), "write")
    stream.flush = raising(OSError(28, "No space left on device"))
    monkeypatch.setattr(sys, "stdout", stream)

    def swallows():
        with contextlib.suppress(OSError):
            print("text")
        return 0

    assert guard.guarded(swallows) == 141 and capsys.readouterr().err == ""


def test_streams_that_the_process_lacks_are_opened(monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    guard._open_standard_streams()
    with sys.stdin as source, sys.stdout as output, sys.stderr as errors:
        assert source.read() == "" and output.write("text") == errors.write("text") == 4


def shell(line, **environment):
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", line.replace("longlora", f"{sys.executable} -m longlora")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


@pytest.mark.parametrize("command", ["longlora doctor", "longlora --help", "longlora inspect $MODEL --json"])
def test_output_that_cannot_be_written(tmp_path, command):
    """A full disk is an error, also for the shell; a reader that has gone is not one to tell."""
    model = str(tiny.model(tmp_path / "base"))
    done = shell(f"{command} > /dev/full", MODEL=model)
    assert done.returncode == 2
    assert done.stderr == "longlora: error: standard output cannot be written: No space left on device\n"
    done = shell(f"{command} | true", MODEL=model)
    assert done.returncode in (0, 141) and done.stderr == ""
    done = shell(f"{command} >&-", MODEL=model)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    done = shell(f"{command} 2>&-", MODEL=model)
    assert done.returncode == 0 and done.stdout
    assert shell("longlora inspect nothing 2> /dev/full").returncode == 2


def test_closed_streams_do_not_end_an_answer(tmp_path):
    flags = f"--model {tiny.model(tmp_path / 'base')} --max-new-tokens 3 --device cpu"
    done = shell(f"longlora generate {flags} --prompt a >&-")
    assert done.returncode == 0 and done.stderr == ""
    done = shell(f"longlora chat {flags} <&-")
    assert done.returncode == 0 and "/help" in done.stderr
    done = shell(f"echo /help | longlora chat {flags} 2>&-")
    assert done.returncode == 0 and done.stdout == ""


def test_a_run_whose_report_cannot_be_written_is_a_run(tmp_path):
    """On a full disk for its report the model is there, and the code says that output is missing."""
    flags = " ".join(f"'{flag}'" for flag in tiny.flags(tiny.options(tmp_path, max_steps=1)))
    done = shell(f"longlora train {flags} > /dev/full")
    assert "Traceback" not in done.stderr and (tmp_path / "out" / "adapter_config.json").exists()


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_a_terminal_without_letters_gets_their_codes(tmp_path, environment):
    model = tiny.model(tmp_path / "mod\u00e8le")
    done = shell(f"longlora inspect '{model}'", **environment)
    assert done.returncode == 0 and done.stderr == ""
    assert "mod\\xe8le" in done.stdout or "modèle" in done.stdout or "mod\\udcc3\\udca8le" in done.stdout
    done = shell(f"longlora inspect '{model}x'", **environment)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


def test_a_wrong_flag_is_printable_and_short(capsys):
    for words in (["plan", "--seed", "9" * 5000], ["plan", "--seed", "\x1b[2J"], ["plan", "--\udce9"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(words)
        (line,) = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and line.isprintable() and len(line) < 2200


def test_a_tree_that_was_not_built_uses_the_package_that_was_installed_from_it(tmp_path):
    """In a clone, after `pip install .`: -m imports the tree of the current folder first."""
    source = Path(longlora.__path__[0])
    tree, site = tmp_path / "tree/longlora", tmp_path / "site"
    tree.mkdir(parents=True)
    site.mkdir()
    os.symlink(source, site / "longlora")
    shutil.copy(source / "__init__.py", tree)
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONSAFEPATH": ""}
    show = "import longlora; from longlora import ops; print(longlora.__file__, ops.__file__)"
    for words in (["-c", show], ["-m", "longlora", "inspect", tmp_path / "nothing"]):
        command = [sys.executable, *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tree.parent, env=environment)
        if words[0] == "-c":
            assert done.stdout.split() == [str(tree / "__init__.py"), str(site / "longlora/ops.py")]
        else:
            assert done.returncode == 2 and "nothing" in done.stderr


@pytest.mark.skipif(
    any("__editable___longlora" in str(finder) for finder in sys.meta_path),
    reason="with `pip install -e` every tree finds the extension",
)
def test_a_tree_that_was_not_built_says_so(tmp_path):
    """python -m benchmarks there, and longlora itself. The help of both needs no build."""
    source = Path(longlora.__file__).parent
    root = Path(__file__).resolve().parents[1]
    (tmp_path / "longlora").mkdir()
    for path in source.rglob("*.py"):
        if "torch" not in path.relative_to(source).parts:
            copy = tmp_path / "longlora" / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(path.read_bytes())
    with open(tmp_path / "longlora/__init__.py", "a") as file:
        file.write("# no installed package is of this source\n")
    os.symlink(root / "benchmarks", tmp_path / "benchmarks")
    for module, words in (("longlora", ["doctor"]), ("benchmarks", ["gemm"])):
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        command = [sys.executable, "-m", module]
        done = subprocess.run(
            [*command, *words], capture_output=True, text=True, cwd=tmp_path, env=environment
        )
        (line,) = done.stderr.splitlines()
        assert done.returncode == 2 and line.startswith(f"{module}: error: longlora was not built in ")
        done = subprocess.run(
            [*command, "--help"], capture_output=True, text=True, cwd=tmp_path, env=environment
        )
        assert done.returncode == 0 and done.stdout and not done.stderr
