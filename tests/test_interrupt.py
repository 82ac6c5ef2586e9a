"""Ctrl-C ends every command and benchmark with 130 and no traceback.

Also while it is imported, and when it has ended.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from longlora import guard, interrupt

ROOT = Path(__file__).resolve().parent.parent

# Ctrl-C comes when Python looks for the module {module}.
WHILE_IMPORTED = """
import os, signal, sys
class Finder:
    def find_spec(name, *rest):
        if name == "{module}":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder)
"""
# Ctrl-C comes when {function} of {place} is called.
WHEN_CALLED = """
import importlib, os, signal, sys
place = importlib.import_module("{place}")
name, *rest = "{function}".split(".")
owner, name = (getattr(place, name), rest[0]) if rest else (place, name)
before = getattr(owner, name)
def interrupted(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGINT)
    return before(*args, **kwargs)
setattr(owner, name, interrupted)
"""
# Ctrl-C comes when the command has returned, and Python ends.
AT_THE_END = """
import atexit, os, signal, sys
atexit.register(os.kill, os.getpid(), signal.SIGINT)
"""
RUN = """
sys.argv[0] = "longlora"
from longlora.__main__ import main
sys.exit(main())
"""


def run(program, *words, **how):
    """Run the console script after `program` -> what it did."""
    command = [sys.executable, "-c", program + RUN, *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1200, **how)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.model(tmp_path_factory.mktemp("interrupt") / "base")


IMPORTED = ("longlora.cli", "longlora.guard", "argparse", "longlora.tools.doctor", "numpy", "longlora._C")


@pytest.mark.parametrize("module", IMPORTED)
def test_ctrl_c_while_it_is_imported(module):
    done = run(WHILE_IMPORTED.format(module=module), "doctor")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_ctrl_c_when_the_command_has_ended(base):
    for words in (["inspect", base], ["inspect", "nothing"], ["--help"], ["no"]):
        done = run(AT_THE_END, *words)
        assert done.returncode == 130 and "Traceback" not in done.stderr
        assert done.stdout or len(done.stderr.splitlines()) == 1  # what it said is there


MOMENTS = {
    "generate": [
        ("longlora.decoder.model", "Model.load"),
        ("longlora.serving.engine", "Engine.tick"),
        ("longlora.guard", "_outcome"),
    ],
    "chat": [("longlora.decoder.model", "Model.load"), ("longlora.serving.chat", "prompt_lines")],
    "serve": [
        ("longlora.serving.listen", "bind"),
        ("longlora.decoder.model", "Model.load"),
        ("longlora.serving.worker", "Worker.start"),
        ("longlora.serving.listen", "Server.run"),
        ("longlora.serving.listen", "Server.serve"),
    ],
    "eval passkey": [
        ("longlora.decoder.model", "Model.load"),
        ("longlora.decoder.generate", "Generator.extend"),
    ],
    "merge": [("longlora.files.safetensors", "write"), ("longlora.files.merge", "merge")],
    "ppl": [("longlora.decoder.model", "Model.load")],
    "plan": [("longlora.training.driver", "plan_of")],
}


@pytest.mark.parametrize(
    "command, place, function", [(name, *moment) for name, moments in MOMENTS.items() for moment in moments]
)
def test_ctrl_c_while_it_runs(base, tmp_path, command, place, function):
    text = tiny.text(tmp_path / "text.txt", 200)
    words = {
        "generate": ["--prompt", "a", "--max-new-tokens", "3"],
        "serve": ["--port", "0"],
        "eval passkey": ["--lengths", "300", "--samples", "1"],
        "merge": ["--output-dir", tmp_path / "merged"],
        "ppl": ["--data", text, "--lengths", "16"],
    }.get(command, [])
    given = [*command.split(), "--model", base, *words, *(["--device", "cpu"] if command != "plan" else [])]
    program = WHEN_CALLED.format(place=place, function=function)
    done = run(program, *given, input="hello\n", cwd=tmp_path)
    assert done.returncode == 130 and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "merged").exists()


# As `python -m {name}` does it.
MODULE = """
import runpy, sys
sys.argv[0] = "-m"
{before}
runpy.run_module("{name}", run_name="__main__", alter_sys=True)
"""


@pytest.mark.skipif(not (ROOT / "benchmarks").exists(), reason="the benchmarks are in the source tree only")
@pytest.mark.parametrize(
    "before, name, words",
    [
        (WHILE_IMPORTED.format(module="numpy"), "benchmarks.paper", ["--report"]),
        (WHILE_IMPORTED.format(module="benchmarks.harness"), "benchmarks.bench_gemm", ["--smoke"]),
        (WHEN_CALLED.format(place="benchmarks.bench_gemm", function="main"), "benchmarks", ["gemm"]),
        (
            WHEN_CALLED.format(place="subprocess", function="Popen"),
            "benchmarks.stress_server",
            ["--model", "a"],
        ),
    ],
)
def test_ctrl_c_ends_the_benchmarks(before, name, words):
    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT)])
    program = MODULE.format(before=before, name=name)
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_program_that_ignores_ctrl_c_is_not_changed():
    """As nohup does, or a shell for a job in the background."""
    ignored = "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    done = run(ignored + WHILE_IMPORTED.format(module="longlora.cli"), "--version")
    assert done.returncode == 0 and done.stdout.startswith("longlora ")


def test_the_handler_of_another_program_stays():
    """cli.main and guarded() are called by programs that have handlers of their own, and by threads."""
    before = signal.getsignal(signal.SIGINT)
    assert guard.guarded(lambda: 0) == 0 and signal.getsignal(signal.SIGINT) is before
    seen = []
    signal.signal(signal.SIGINT, interrupt.end)
    try:
        assert guard.guarded(lambda: seen.append(signal.getsignal(signal.SIGINT)) or 3) == 3
        assert seen == [signal.default_int_handler]
        assert signal.getsignal(signal.SIGINT) is interrupt.end
    finally:
        signal.signal(signal.SIGINT, before)
