"""benchmarks/gpu_check.py and the benchmarks: without a GPU every part says so, on a GPU and on the emulation
each runs on small shapes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from longlora import cuda

ROOT = Path(__file__).resolve().parents[2]
ENV = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([os.environ["PYTHONPATH"], str(ROOT)]),
    "OMP_NUM_THREADS": "1",
}
BENCHMARKS = [
    "elementwise",
    "host",
    "gemm",
    "lora_linear",
    "s2_attention",
    "linear_cross_entropy",
    "train_step",
]


def check(out, *arguments):
    """The finished process, and its rows."""
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/gpu_check.py", "--installed", "--out", out, *arguments],
        env=ENV,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    return done, [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


@pytest.mark.skipif(cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_every_part_says_so(tmp_path):
    done, rows = check(tmp_path, "--skip", "build")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["part"] for row in rows] == [
        "tests",
        "memcheck",
        "racecheck",
        "training",
        "torch",
        *BENCHMARKS,
    ]
    assert all((row["result"], row["words"]) == ("skipped", f"no GPU: {cuda.reason()}"[:300]) for row in rows)
    report = (tmp_path / "report.md").read_text()
    assert (
        report.startswith("# no GPU: ")
        and all(f"| {name} | skipped |" in report for name in BENCHMARKS)
        and report in done.stdout
    )


def test_a_part_that_fails_or_takes_too_long_keeps_the_others(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.gpu_check import Check

    options = SimpleNamespace(out=tmp_path, limit=60, parts=["build", "tests", "memcheck", "training"])
    made = Check(options)
    assert made.part("build", 30, [sys.executable, "-c", "print('first'); print('last word')"])
    assert not made.part("tests", 30, [sys.executable, "-c", "raise SystemExit(3)"])
    assert not made.part(
        "memcheck", 0.5, [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"]
    )
    assert not made.part("racecheck", 30, ["never asked for"])
    made.deadline = 0
    assert not made.part("training", 30, ["never run"])
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["part"], row["result"]) for row in rows] == [
        ("build", "ok"),
        ("tests", "failed"),
        ("memcheck", "out of time"),
        ("training", "skipped"),
    ]
    assert [row["words"] for row in rows[::3]] == ["last word", "the 60 seconds of --limit are over"]
    assert "| memcheck | out of time |" in (tmp_path / "report.md").read_text()


def test_every_kernel_is_tested(monkeypatch):
    """A .cu file of an op has a test file of the op's name, and the check runs it."""
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.gpu_check import OP_TESTS

    stems = {path.stem for path in (ROOT / "cuda").glob("*.cu")} - {"copy", "device", "gemm"}
    ops = {{"rope": "rope_op"}.get(stem, stem.removesuffix("_forward")) for stem in stems}
    assert ops - {"s2_attention_backward"} == {name for name in OP_TESTS if not name.startswith("cuda_")}


def test_what_the_tests_came_to(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import gpu_check

    assert gpu_check.told("....s [100%]\n\n4 passed, 1 skipped in 0.52s\n") == "4 passed, 1 skipped in 0.52s"
    assert gpu_check.told("......F. [ 50%]\n..s") == "ended after 11 tests"
    assert gpu_check.told("Error: no tests\nno module named x\n") == "no module named x"
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_check.sanitizer() in (None, "/usr/local/cuda/bin/compute-sanitizer")
    tool = tmp_path / "toolkit/bin/compute-sanitizer"
    tool.parent.mkdir(parents=True)
    tool.touch(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    assert gpu_check.sanitizer() == str(tool)


@pytest.mark.skipif(cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_without_a_gpu_says_so(name):
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.bench_{name}", "--device", "cuda"],
        env=ENV,
        capture_output=True,
        text=True,
    )
    assert done.returncode and f"device cuda cannot be used: {cuda.reason()}" in done.stderr


@pytest.mark.skipif(not cuda.is_available(), reason=f"no GPU and no emulation of one: {cuda.reason()}")
def test_small_shapes_go_through_it_all(tmp_path):
    done, rows = check(tmp_path, "--smoke", "--skip", "build", "tests", "memcheck", "racecheck")
    parts, measured = ([row for row in rows if key in row] for key in ("part", "benchmark"))
    assert [row["part"] for row in parts] == ["training", "torch", *BENCHMARKS]
    torch = parts.pop(1)
    if cuda.built_for() == "emulation":
        assert torch["result"] == "skipped" and torch["words"] in (
            "torch sees no GPU",
            "torch is not installed",
        )
    else:
        assert torch["result"] == "ok", done.stdout
    assert [row["result"] for row in parts] == ["ok"] * (1 + len(BENCHMARKS)), done.stdout
    assert {row["benchmark"] for row in measured} == set(BENCHMARKS)
    assert all(row["ours"] >= 0 and row["smoke"] for row in measured)
    assert {row["judged"] for row in measured if "must" in row} == {"ratio", "of_peak", "ours"}
    assert "| a smoke run |" in (tmp_path / "report.md").read_text()


@pytest.mark.skipif(not cuda.is_available(), reason=f"no GPU and no emulation of one: {cuda.reason()}")
def test_each_op_beside_the_cpus():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_small"], env=ENV, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.endswith("every op agrees with the CPU's\n"), (
        done.stdout + done.stderr
    )
