"""benchmarks/bench_generate.py: our side runs on a tiny model, and the floors are right."""

import os
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest

from longlora.decoder.config import read_config

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").exists(), reason="these tests need the source tree")


@pytest.fixture
def generate(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([os.environ["PYTHONPATH"], str(ROOT)]))
    from benchmarks import bench_generate

    return bench_generate


def test_a_round_of_our_side(generate):
    bench = SimpleNamespace(benchmark="generate", options=SimpleNamespace(threads=1, seconds=0.1, smoke=True))
    found = generate.measured(bench, ["machine", "ours"], 32, "bfloat16")
    assert list(found) == ["machine", "ours"]
    assert all(prefill > 0 and decode > 0 for prefill, decode in found.values())


def test_the_machine_does_the_work_of_the_floor(generate, monkeypatch):
    """Its threads do all multiply-adds of the prompt, and its arrays are what a token reads."""
    flops, bytes = generate.floors(read_config(generate.CONFIG), 512, "float16")
    each, rounds = generate._C.peak(1), []
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    tracemalloc.start()
    read, step = generate.machine(False, 512, "float16")
    assert tracemalloc.get_traced_memory()[0] == pytest.approx(bytes, rel=1e-3)
    tracemalloc.stop()
    monkeypatch.setattr(generate._C, "peak", rounds.append)
    read(None)
    assert len(rounds) == 2 * generate.PIECES and each * sum(rounds) == pytest.approx(flops, rel=1e-3)
    assert step(None) == [1, 1]


def test_the_floors_are_the_sums_by_pencil(generate):
    """SMALL: 2 layers, hidden 32, 4 and 2 heads of 8, inner 48, 260 words."""
    flops, bytes = generate.floors(read_config(generate.SMALL), 10, "float16")
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48
    assert flops == 2 * 2 * layer * 10 + 2 * 4 * 4 * 8 * 55 + 2 * 32 * 260
    assert bytes == 2 * (2 * layer + 32 * 260 + 2 * 2 * 2 * 8 * 18)
