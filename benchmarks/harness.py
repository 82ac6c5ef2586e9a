"""Times calls in one way: warm up, run our call and the peer's in turn, take medians.

    def main(argv=None):
        bench = harness.Bench("rms_norm", argv)  # --json FILE, --threads N, --only TEXT, --seconds S
        x, w = bench.random(2048, 576), bench.random(576)  # float32 NumPy, never zeros
        ours, peer = lambda: ops.rms_norm_forward(x, w), lambda: torch_rms_norm(xt, wt)
        bench.row("forward 2048x576", ours, peer, bytes=2 * x.nbytes)
        bench.row("forward 2048x576", ours, peer, dtype="bfloat16", bytes=x.nbytes)

With `flops` a row is in GF/s, and `of_peak` is its share of the machine's float32 FMA peak. With `bytes`
(read plus written) it is in GB/s, and `of_peak` is its share of the copy bandwidth. With neither it is in
milliseconds. `peer` may be None. A `ratio` above 1 means that we are faster. torch and we use the same number
of threads. `bench.torch` is torch with its threads set, imported at first use.

With --device cuda the arrays are torch tensors on that GPU, products are in TF/s, `of_peak` is the share of
torch's bfloat16 product, and benchmarks/gpu.py times the calls. `target=(must, aim)` holds the figures that
the row should reach. --smoke is for machines without torch and for the emulation of a GPU: it runs our side
alone on small shapes, and its figures mean nothing.
"""

import argparse
import functools
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version

import numpy as np

import longlora
from longlora.training.profile import peaks

from . import gpu

COSTS = ("us", "ms", "s", "GiB", "%")


def machine():
    try:
        for line in open("/proc/cpuinfo"):
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit():
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=pathlib.Path(__file__).parent,
        text=True,
        capture_output=True,
    )
    return done.stdout.strip() or None


def versions(*names):
    found = {"longlora": longlora.__version__, "python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            pass
    return found


def interleaved(calls, seconds=1.0, least=5):
    """Median seconds of each call. The calls run in turn, so a change of the machine's speed affects all.

    They run at least `least` times, for about `seconds`.
    """
    repeats = []
    for call in calls:
        call()
        start = time.perf_counter()
        call()
        repeats.append(max(1, int(0.005 / max(time.perf_counter() - start, 1e-7))))
    times = [[] for _ in calls]
    end = time.perf_counter() + seconds
    while len(times[0]) < least or time.perf_counter() < end:
        for call, repeat, samples in zip(calls, repeats, times):
            start = time.perf_counter()
            for _ in range(repeat):
                call()
            samples.append((time.perf_counter() - start) / repeat)
    return [statistics.median(samples) for samples in times]


def in_turn(bench, sides, words, rounds, pause):
    """Run each side of a benchmark in its own process, their rounds in turn -> side -> numbers of each round.

    A process gets `words` after its side. It says "ready", and answers each line with the numbers of a round.
    The first round is not counted. pause: seconds before a round.
    """
    running, environment = {}, os.environ | {"OMP_NUM_THREADS": str(bench.options.threads)}
    for side in sides:
        command = [sys.executable, "-m", "benchmarks", bench.benchmark, "--side", side, *words]
        command += ["--smoke"] * bench.options.smoke
        running[side] = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        if running[side].stdout.readline() != "ready\n":
            raise SystemExit(f"{side} failed")
    found = {side: [] for side in sides}
    for _ in range(1 + rounds):
        for side, process in running.items():
            time.sleep(0 if bench.options.smoke else pause)
            print(file=process.stdin, flush=True)
            found[side].append([float(word) for word in process.stdout.readline().split()])
    for process in running.values():
        process.communicate()
    return {side: numbers[1:] for side, numbers in found.items()}


class Bench:
    """The rows of one benchmark."""

    def __init__(self, benchmark, argv=None):
        parser = argparse.ArgumentParser(prog=f"python -m benchmarks.bench_{benchmark}")
        parser.add_argument(
            "--json", metavar="FILE", help="append the rows to FILE, one JSON object per line"
        )
        parser.add_argument(
            "--threads", type=int, default=os.cpu_count(), help="threads of both sides (default: %(default)s)"
        )
        parser.add_argument("--only", default="", help="only rows whose name or dtype contains this text")
        parser.add_argument(
            "--seconds", type=float, default=1.0, help="seconds per row (default: %(default)s)"
        )
        parser.add_argument(
            "--device",
            default="cpu",
            metavar="cpu|cuda|cuda:N",
            help="device of the arrays (default: %(default)s)",
        )
        parser.add_argument(
            "--smoke", action="store_true", help="on a GPU: only check that everything runs, on small shapes"
        )
        self.options = parser.parse_args(argv)
        self.benchmark, self.rng, self.gpu = benchmark, np.random.default_rng(0), None
        longlora.set_num_threads(self.options.threads)
        self.about = {
            "machine": machine(),
            "threads": self.options.threads,
            "commit": commit(),
            "versions": versions("numpy", "torch", "transformers", "peft"),
        }
        if self.options.device != "cpu":
            self.gpu = gpu.Gpu(self.options.device, self.options.smoke)
            self.about.update(self.gpu.about)
            self.flops_peak, self.copy_peak = self.gpu.peaks()
            what = (
                f"product {self.flops_peak / 1e3:.0f} TF/s, copy {self.copy_peak:.0f} GB/s"
                if self.copy_peak
                else "smoke"
            )
            print(f"{benchmark}: {self.about['machine']}, {what}")
            return
        self.flops_peak, self.copy_peak = peaks(self.options.threads)
        print(
            f"{benchmark}: {self.about['machine']}, {self.options.threads} threads, "
            f"FMA {self.flops_peak:.0f} GF/s, copy {self.copy_peak:.0f} GB/s"
        )

    @functools.cached_property
    def torch(self):
        import torch

        torch.set_num_threads(self.options.threads)
        return torch

    def random(self, *shape, dtype="float32", scale=1.0):
        """A normally distributed array: NumPy's (bfloat16 by ml_dtypes), or Gpu.random's on a GPU."""
        if self.gpu is not None:
            return self.gpu.random(shape, dtype, scale)
        x = self.rng.standard_normal(shape, np.float32) * scale
        if dtype == "bfloat16":
            import ml_dtypes

            return x.astype(ml_dtypes.bfloat16)
        return x.astype(dtype)

    def to_torch(self, x):
        """A torch tensor with the values of a NumPy array, which may be bfloat16."""
        if x.dtype.name == "bfloat16":
            return self.torch.from_numpy(x.view(np.uint16).copy()).view(self.torch.bfloat16)
        return self.torch.from_numpy(x.copy())

    def wants(self, name, dtype="float32"):
        """Whether --only selects this row. Callers ask before they make large inputs."""
        return self.options.only in f"{name} {dtype}"

    def row(
        self,
        name,
        ours,
        peer=None,
        *,
        dtype="float32",
        flops=None,
        bytes=None,
        peer_name="torch",
        target=None,
        judged=None,
    ):
        """Time ours() and peer(), print and record the row -> peer time / our time, None without a peer."""
        if not self.wants(name, dtype):
            return None
        timed = interleaved if self.gpu is None else self.gpu.timed
        times = timed([ours] if peer is None else [ours, peer], self.options.seconds)
        work, unit, peak = (
            (flops, "GF/s", self.flops_peak)
            if flops
            else (bytes, "GB/s", self.copy_peak)
            if bytes
            else (None, "ms", None)
        )
        figures = [work / t / 1e9 if work else t * 1e3 for t in times]
        if unit == "GF/s" and self.gpu is not None:
            figures, unit, peak = [figure / 1e3 for figure in figures], "TF/s", peak and peak / 1e3
        return self.record(
            name,
            figures[0],
            figures[1] if peer else None,
            unit,
            dtype=dtype,
            peer_name=peer_name,
            ratio=times[1] / times[0] if peer else None,
            peak=peak,
            target=target,
            judged=judged,
        )

    def neighbour(self, name, odd, near, flops, near_flops, near_name, *, dtype="float32"):
        """Record the rate of our op on an odd shape against its rate on the round neighbour."""
        if self.wants(name, dtype):
            times = interleaved([odd, near], self.options.seconds)
            rates = flops / times[0] / 1e9, near_flops / times[1] / 1e9
            self.record(name, *rates, "GF/s", dtype=dtype, peer_name=near_name, ratio=rates[0] / rates[1])

    def record(
        self,
        name,
        ours,
        peer,
        unit,
        *,
        dtype="float32",
        peer_name="torch",
        ratio=None,
        peak=None,
        target=None,
        judged=None,
    ):
        """Print and record a row that was measured elsewhere -> ratio, which defaults to peer / ours.

        target: (must, aim) for the figure that `judged` names, "ratio", "of_peak" or "ours". Less is better
        for "ours" in a unit of COSTS.
        """
        if peer is not None and ratio is None:
            ratio = peer / ours
        row = {
            "benchmark": self.benchmark,
            "name": name,
            "dtype": dtype,
            "ours": ours,
            "peer": peer,
            "peer_name": peer_name if peer is not None else None,
            "unit": unit,
            "ratio": ratio,
            "of_peak": ours / peak if peak else None,
            **self.about,
        }
        figure = ".1f" if ours >= 10 or self.gpu is None else ".3f"
        line = f"  {name:<44} {dtype:<9} {ours:9{figure}} {unit:<5}"
        if peer is not None:
            line += f" {peer_name} {peer:9{figure}}  ratio {ratio:5.2f}"
        if peak:
            line += f"  {row['of_peak']:4.0%} of peak"
        if target is not None:
            row.update(
                must=target[0],
                aim=target[1],
                judged=judged,
                less_is_better=judged == "ours" and unit in COSTS,
            )
            line += f"  must {target[0]:.3g}, aim {target[1]:.3g}"
        print(line, flush=True)
        if self.options.json:
            with open(self.options.json, "a") as file:
                file.write(json.dumps(row) + "\n")
        return ratio
