"""The profile with a fake clock: sums and means of the steps, floors, the table, the measured peaks."""

import threading
import time
import types

import numpy as np
import pytest

from longlora import _C
from longlora.training import profile


class Clock:
    """Stands in for the modules time and resource. `system` is the processor time of the system."""

    RUSAGE_SELF = 0

    def __init__(self):
        self.now, self.system = 100.0, 7.0

    def perf_counter(self):
        return self.now

    def getrusage(self, who):
        return types.SimpleNamespace(ru_stime=self.system)

    def spend(self, seconds, system=0.0):
        self.now += seconds
        self.system += system


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(profile, "time", made)
    monkeypatch.setattr(profile, "resource", made)
    monkeypatch.setattr(_C, "cast", lambda out, x: made.spend(len(out), 0.25))
    monkeypatch.setattr(_C, "matmul", lambda *args: made.spend(16.0, 0.5))
    return made


def f32(*shape):
    return np.ones(shape, np.float32)


def ops():
    """Casts take 2, 4 and 2 s, with 0.25 s of system time each; matmul takes 16 s, with 0.5 s."""
    for rows in (2, 4, 2):
        _C.cast(f32(rows, 3), f32(rows, 3))
    _C.matmul(f32(64, 64), f32(64, 64), f32(64, 64), 1.0, 0.0)


def test_the_report_holds_the_means_of_the_steps(clock):
    """A step spends 8 s in casts, 16 s in the product, and 1 or 3 s in Python.

    The product's floor is its 524,288 FLOPs at 100 GF/s, which take longer than its 49,152 bytes at 10 GB/s.
    Casts have only bytes, 8 for each element.
    """
    recorder = profile.Recorder((100.0, 10.0))
    for python in (1.0, 3.0):
        with recorder:
            ops()
            clock.spend(python, python / 4)
        clock.spend(50.0)  # between steps
    found = recorder.report()
    assert (found["steps"], found["seconds"], found["system_seconds"]) == (2, 26.0, 1.75)
    assert found["threads"] == _C.get_num_threads() and found["instruction_set"] in _C.isa_names
    assert (found["peak_gflops"], found["copy_gbytes"]) == (100.0, 10.0)
    assert found["other"] == {"seconds": 2.0, "system_seconds": 0.5}
    product, cast = found["ops"]  # the slowest first
    row = dict(calls=1, seconds=16, system_seconds=0.5, flops=2 * 64**3, bytes=3 * 4 * 64**2)
    row["floor_seconds"] = pytest.approx(2 * 64**3 / 100e9, rel=1e-12)
    sizes = dict(M=64, N=64, C=64)
    assert product == {"op": "matmul", **row, "by_size": [{"sizes": sizes, **row}]}
    few = dict(sizes=dict(M=2, N=3), calls=2, seconds=4, system_seconds=0.5, flops=0, bytes=2 * 8 * 6)
    many = dict(sizes=dict(M=4, N=3), calls=1, seconds=4, system_seconds=0.25, flops=0, bytes=8 * 12)
    for part in (few, many):
        part["floor_seconds"] = pytest.approx(part["bytes"] / 10e9, rel=1e-12)
    assert cast["by_size"] == [few, many]
    floor = pytest.approx((2 * 8 * 6 + 8 * 12) / 10e9, rel=1e-12)
    whole = dict(calls=3, seconds=8, system_seconds=0.75, flops=0, bytes=192, floor_seconds=floor)
    assert cast == {"op": "cast", **whole, "by_size": cast["by_size"]}
    total = product["floor_seconds"] + cast["floor_seconds"]
    assert found["floor_seconds"] == pytest.approx(total, rel=1e-12)


def test_the_sizes_of_an_op_are_sorted_by_time(clock):
    with profile.Recorder((100.0, 10.0)) as recorder:
        for rows in (2, 9, 5):
            _C.cast(f32(rows, 3), f32(rows, 3))
    found = recorder.report()
    assert [part["seconds"] for part in found["ops"][0]["by_size"]] == [9, 5, 2]
    assert (found["steps"], found["seconds"], found["system_seconds"]) == (1, 16.0, 0.75)


def test_a_failed_step_is_not_counted(clock):
    recorder = profile.Recorder((100.0, 10.0))
    with pytest.raises(KeyError), recorder:
        _C.cast(f32(2, 3), f32(2, 3))
        raise KeyError
    found = recorder.report()
    assert (found["steps"], found["seconds"], found["system_seconds"]) == (0, 0.0, 0.0)
    assert found["ops"][0]["seconds"] == 2 and found["ops"][0]["calls"] == 1


def test_the_table_has_shares_rates_and_floors(clock):
    """The product computes 4e9 FLOPs and moves 1e9 bytes in 0.5 s of a step of 2 s; its floor is 0.1 s."""
    rows = [
        dict(
            op="matmul", calls=3, seconds=0.5, system_seconds=0.125, flops=4e9, bytes=1e9, floor_seconds=0.1
        ),
        dict(op="cast", calls=40, seconds=0.25, system_seconds=0.0, flops=0, bytes=5e8, floor_seconds=0.05),
        dict(
            op="rope_forward", calls=1, seconds=0.0, system_seconds=0.0, flops=0, bytes=0, floor_seconds=0.0
        ),
    ]
    found = dict(steps=5, threads=1, instruction_set="avx2", peak_gflops=40.0, copy_gbytes=10.0, seconds=2.0)
    found |= dict(system_seconds=0.25, floor_seconds=0.15, ops=rows)
    found |= dict(other=dict(seconds=1.25, system_seconds=0.0625))
    first, names, *lines = profile.text(found).split("\n")
    assert first == (
        "a step takes 2.000 s, the mean of 5; 1 thread, avx2; measured peaks: float32 multiply-add 40 GF/s, "
        "copy 10 GB/s"
    )
    assert names.split() == "op calls seconds share system GFLOP GF/s GB GB/s floor".split()
    assert [line.split() for line in lines] == [
        ["matmul", "3", "0.5000", "25.0%", "0.125", "4.0", "8.0", "1.00", "2.0", "20%"],
        ["cast", "40", "0.2500", "12.5%", "0.000", "-", "-", "0.50", "2.0", "20%"],
        ["rope_forward", "1", "0.0000", "0.0%", "0.000", "-", "-", "0.00", "0.0", "0%"],
        ["Python", "and", "NumPy", "1.2500", "62.5%", "0.062"],
        ["all", "2.0000", "100.0%", "0.250", "8%"],
    ]
    assert {len(line) for line in lines[:3]} == {len(names)} == {len(lines[4])}  # columns


def test_threads_get_their_numbers_and_are_joined(monkeypatch):
    times, done = iter([10.0, 12.5]), []
    monkeypatch.setattr(profile, "time", types.SimpleNamespace(perf_counter=lambda: next(times)))

    def body(i):
        time.sleep(0.02)
        done.append((i, threading.current_thread()))

    assert profile._in_threads(3, body) == 2.5
    assert sorted(i for i, _ in done) == [0, 1, 2]
    assert len({thread for _, thread in done} - {threading.main_thread()}) == 3


def test_peaks_are_the_best_of_several_runs(monkeypatch):
    """Two threads compute 6e9 and 4e9 FLOPs; a copy reads and writes each byte; the best run takes 0.5 s."""
    seconds, copied = [], []

    def in_threads(count, body):
        for i in range(count):
            body(i)
        seconds.append(4.0 if len(seconds) % 3 else 0.5)
        return seconds[-1]

    class Numpy:
        uint8 = np.uint8

        def ones(self, size, dtype):
            return np.broadcast_to(np.ones(1, dtype), size)  # takes no memory

        def copyto(self, out, x):
            assert out is not x
            copied.append(2 * x.nbytes)

    flops = iter([6e9, 4e9] * 99)
    monkeypatch.setattr(profile, "_in_threads", in_threads)
    monkeypatch.setattr(profile, "np", Numpy())
    monkeypatch.setattr(_C, "peak", lambda rounds: next(flops))
    multiply, copy = profile.peaks.__wrapped__(2)
    runs = len(seconds) // 2
    assert runs > 2 and multiply == 20.0 and min(copied) >= 2 * 2**26  # far more than a cache holds
    assert copy == sum(copied) / runs / 0.5 / 1e9
