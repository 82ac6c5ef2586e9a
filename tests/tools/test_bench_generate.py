"""benchmarks/bench_generate.py: our side runs on a tiny model, and the floors are right."""

import os
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
    ((side, (prefill, decode)),) = generate.measured(bench, ["ours"], 32, "bfloat16").items()
    assert side == "ours" and prefill > 0 and decode > 0


def test_the_floors_are_the_sums_by_pencil(generate):
    """SMALL: 2 layers, hidden 32, 4 and 2 heads of 8, inner 48, 260 words."""
    flops, bytes = generate.floors(read_config(generate.SMALL), 10, "float16")
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48
    assert flops == 2 * 2 * layer * 10 + 2 * 4 * 4 * 8 * 55 + 2 * 32 * 260
    assert bytes == 2 * (2 * layer + 32 * 260 + 2 * 2 * 2 * 8 * 18)
