"""Where the time of a training step goes: calls, seconds, FLOPs, bytes and a floor for each op.

A Recorder replaces the ops of _C only while it is entered; otherwise profiling costs nothing. FLOPs are those
that the result needs: of matrix products and of the visible half of attention, 2 for a multiply-add; passes
over memory have none. Bytes count each argument once for reading and once for writing. The floor of an op is
the longer of two times: FLOPs at the measured peak of float32 multiply-adds, and bytes at the measured
bandwidth of a copy. bfloat16 products may be faster than this floor where the processor multiplies bfloat16
faster.
"""

import functools
import math
import re
import resource
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from longlora import _C
from longlora.errors import counted
from longlora.ops import BOUNDARIES, SHIFTS, shifted_heads


def pairs(T: int, H: int, G: int, boundary: str, shift: str) -> int:
    """The visible (query, key) pairs of all H heads in a sequence of T tokens with groups of G tokens."""

    def causal(n):
        return n * (n + 1) // 2

    def groups(n):
        return n // G * causal(G) + causal(n % G)

    half = G // 2
    shifted = causal(min(half, T)) + groups(max(T - half, 0)) + (half * half if boundary != "split" else 0)
    count = shifted_heads(H, shift)
    return (H - count) * groups(T) + count * shifted


def _attention(size, given):
    boundary, shift = (
        next(name for name, n in names.items() if n == given[key])
        for names, key in ((BOUNDARIES, "boundary"), (SHIFTS, "shift"))
    )
    lengths = (
        [size["T"]] * size["B"]
        if given["cu_seqlens"] is None
        else np.diff(np.asarray(given["cu_seqlens"])).tolist()
    )
    return size["D"] * sum(pairs(T, size["H"], int(given["group_size"]), boundary, shift) for T in lengths)


def _cached(size, given):
    """Pairs of query and key of one head."""
    lengths, S = np.asarray(given["lengths"], np.int64), size["S"]
    return int(lengths.sum()) * S + size["B"] * (S * (S + 1) // 2)


def _cache_bytes(given, name):
    """What is read of a cache."""
    cache, S = given[name], given["q"].shape[1]
    row = cache.nbytes // max(cache.shape[0] * cache.shape[1], 1)
    return row * int((np.asarray(given["lengths"], np.int64) + S).sum())


def _lora_linear_backward(size, given):
    M, N, C, R = (size.get(letter, 0) for letter in "MNCR")
    there = {name: value is not None for name, value in given.items()}
    du, u = there["dx"] or there["da"], there["db"] and not there["u"]
    products = (
        (there["dx"] + there["dweight"]) * N * C
        + (there["dx"] + there["da"] + u) * R * C
        + (du + there["db"]) * R * N
    )
    return 2 * M * products


# op -> FLOPs, from the letters of its spec and its arguments. Ops that are not here only move memory.
FLOPS: dict[str, Callable[[dict, dict], int]] = {
    "matmul": lambda size, given: 2 * size["M"] * size["N"] * size["C"],
    "lora_linear_forward": lambda size, given: (
        2 * size["M"] * (size["N"] * size["C"] + size.get("R", 0) * (size["N"] + size["C"]))
    ),
    "lora_linear_backward": _lora_linear_backward,
    "s2_attention_forward": lambda size, given: 4 * _attention(size, given),
    "s2_attention_backward": lambda size, given: 10 * _attention(size, given),
    "cached_attention": lambda size, given: 4 * size["H"] * size["D"] * _cached(size, given),
    "linear_cross_entropy_forward": lambda size, given: 2 * size["M"] * size["V"] * size["C"],
    "linear_cross_entropy_backward": lambda size, given: (
        2 * size["M"] * size["V"] * size["C"] * (2 if given["dweight"] is None else 3)
    ),
}
# (op, argument) -> bytes, where they differ from those of the argument: only some rows of a table are used,
# or the argument is not only written but also read.
BYTES: dict[tuple[str, str], Callable[[dict], int]] = {
    ("embedding_forward", "weight"): lambda given: given["out"].nbytes,
    ("embedding_backward", "dweight"): lambda given: (
        2 * 4 * len(np.unique(given["ids"])) * given["dweight"].shape[1]
    ),
    ("cached_attention", "k_cache"): lambda given: _cache_bytes(given, "k_cache"),
    ("cached_attention", "v_cache"): lambda given: _cache_bytes(given, "v_cache"),
    ("matmul", "out"): lambda given: given["out"].nbytes * (2 if given["beta"] else 1),
}


@functools.cache
def _spec(op):
    """The spec of an op -> [(argument, letters of its axes, flags)], [scalar]."""
    tensors, _, scalars = _C.specs[op].partition("|")
    found = re.findall(r"(\w+)\[([^\]]*)\](\S*)", tensors)
    return [(name, letters.split(","), flags) for name, letters, flags in found], [
        s.partition(":")[0] for s in scalars.split()
    ]


def work(op: str, args: tuple) -> tuple[dict[str, int], int, int]:
    """The work of the call _C.<op>(*args) -> sizes (letter -> size), FLOPs, bytes."""
    tensors, scalars = _spec(op)
    given = dict(zip([name for name, _, _ in tensors] + scalars, args))
    size: dict[str, int] = {}
    total = 0
    for name, letters, flags in tensors:
        if given[name] is None:
            continue
        size.update((letter, n) for letter, n in zip(letters, given[name].shape) if letter.isalpha())
        special = BYTES.get((op, name))
        total += special(given) if special else given[name].nbytes * (2 if "+" in flags else 1)
    return size, FLOPS[op](size, given) if op in FLOPS else 0, total


def _system():
    return resource.getrusage(resource.RUSAGE_SELF).ru_stime


class Recorder:
    """Enter it around each step to record the step's ops; `report` gives the means of all steps.

    It records the ops of every thread. peaks: (multiply-add GF/s, copy GB/s), as the function peaks returns
    them.
    """

    def __init__(self, peaks: tuple[float, float]):
        self.peaks, self.steps, self.seconds, self.system = peaks, 0, 0.0, 0.0
        self.rows: dict[tuple, list] = {}  # (op, sizes) -> [calls, seconds, system seconds, FLOPs, bytes]

    def __enter__(self):
        self._ops = {op: getattr(_C, op) for op in _C.specs}
        for op, function in self._ops.items():
            setattr(_C, op, functools.partial(self._call, op, function))
        self._began = time.perf_counter(), _system()
        return self

    def __exit__(self, kind, *unused):
        for op, function in self._ops.items():
            setattr(_C, op, function)
        if kind is None:
            self.steps += 1
            self.seconds += time.perf_counter() - self._began[0]
            self.system += _system() - self._began[1]

    def _call(self, op, function, *args):
        system, start = _system(), time.perf_counter()
        function(*args)
        seconds, system = time.perf_counter() - start, _system() - system
        size, flops, moved = work(op, args)
        row = self.rows.setdefault((op, *size.items()), [0, 0.0, 0.0, 0, 0])
        for i, n in enumerate((1, seconds, system, flops, moved)):
            row[i] += n

    def report(self) -> dict[str, Any]:
        """The means of a step as a dict for JSON: the slowest op first, with its calls by their sizes."""
        rate, bandwidth = self.peaks
        keys: tuple[str, ...] = ("calls", "seconds", "system_seconds", "flops", "bytes")
        ops: dict[str, list[dict]] = {}
        for (op, *size), sums in self.rows.items():
            row = {key: n / max(self.steps, 1) for key, n in zip(keys, sums)}
            row["floor_seconds"] = max(row["flops"] / rate, row["bytes"] / bandwidth) / 1e9
            ops.setdefault(op, []).append({"sizes": dict(size), **row})
        keys += ("floor_seconds",)
        found = [
            {
                "op": op,
                **{key: sum(row[key] for row in rows) for key in keys},
                "by_size": sorted(rows, key=lambda row: -row["seconds"]),
            }
            for op, rows in ops.items()
        ]
        found.sort(key=lambda row: -row["seconds"])
        seconds, system = self.seconds / max(self.steps, 1), self.system / max(self.steps, 1)
        return {
            "steps": self.steps,
            "threads": _C.get_num_threads(),
            "instruction_set": _C.isa_names[_C.get_isa()],
            "peak_gflops": rate,
            "copy_gbytes": bandwidth,
            "seconds": seconds,
            "system_seconds": system,
            "floor_seconds": sum(row["floor_seconds"] for row in found),
            "ops": found,
            "other": {
                "seconds": seconds - sum(row["seconds"] for row in found),
                "system_seconds": system - sum(row["system_seconds"] for row in found),
            },
        }


def text(found: dict[str, Any]) -> str:
    """The dict of Recorder.report as a table."""

    def seconds(row):
        share = row["seconds"] / found["seconds"]
        return f"{row['seconds']:9.4f} {share:6.1%} {row['system_seconds']:7.3f}"

    def floor(row, spent):
        return row["floor_seconds"] / spent

    lines = [
        f"a step takes {found['seconds']:.3f} s, the mean of {found['steps']}; "
        f"{counted(found['threads'], 'thread')}, {found['instruction_set']}; measured peaks: float32 "
        f"multiply-add {found['peak_gflops']:.0f} GF/s, copy {found['copy_gbytes']:.0f} GB/s",
        f"{'op':<30} {'calls':>6} {'seconds':>9} {'share':>6} {'system':>7} {'GFLOP':>9} {'GF/s':>7} "
        f"{'GB':>8} {'GB/s':>6} {'floor':>6}",
    ]
    for row in found["ops"]:
        spent = max(row["seconds"], 1e-9)
        flops = (
            f"{row['flops'] / 1e9:9.1f} {row['flops'] / spent / 1e9:7.1f}"
            if row["flops"]
            else f"{'-':>9} {'-':>7}"
        )
        moved = f"{row['bytes'] / 1e9:8.2f} {row['bytes'] / spent / 1e9:6.1f}"
        lines.append(
            f"{row['op']:<30} {row['calls']:6.0f} {seconds(row)} {flops} {moved} {floor(row, spent):6.0%}"
        )
    lines.append(f"{'Python and NumPy':<30} {'':>6} {seconds(found['other'])}")
    lines.append(f"{'all':<30} {'':>6} {seconds(found)}{floor(found, found['seconds']):>41.0%}")
    return "\n".join(lines)


def _in_threads(count, body):
    """Run body(i) for every i < count, each in a thread of its own -> seconds until all are done."""
    workers = [threading.Thread(target=body, args=(i,)) for i in range(count)]
    start = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return time.perf_counter() - start


@functools.cache
def peaks(threads: int) -> tuple[float, float]:
    """Measure this machine on `threads` threads, once -> multiply-add GF/s (float32), copy GB/s (both
    ways)."""
    size, flops = 64 << 20, [0.0] * threads
    froms, tos = ([np.ones(size, np.uint8) for _ in range(threads)] for _ in range(2))

    def spin(i):
        flops[i] = _C.peak(4_000_000)

    def copy(i):
        for _ in range(4):
            np.copyto(tos[i], froms[i])

    def best(body, done):
        return max(done() / seconds for seconds in (_in_threads(threads, body) for _ in range(7))) / 1e9

    return best(spin, lambda: math.fsum(flops)), best(copy, lambda: 8.0 * size * threads)
