"""A GPU for the benchmarks: its description, arrays on it, and the timing of calls.

Calls are timed between CUDA events, ours and the peer's in turn. A wait is queued before each call, so the
host is always ahead and only the GPU is measured. Then the L2 cache is overwritten. bench_host measures the
host's time per call.
"""

import statistics
import subprocess
import time

import numpy as np

from longlora import _C, cuda
from longlora.device import choose, send

FLUSH = 256 << 20  # bytes, above any L2
QUERY = {
    "driver": "driver_version",
    "gpu_uuid": "uuid",
    "sm_clock": "clocks.sm",
    "memory_clock": "clocks.mem",
    "sm_clock_max": "clocks.max.sm",
    "power_limit": "power.limit",
    "temperature": "temperature.gpu",
}


def smi(index=0):
    """What nvidia-smi reports about a GPU -> a dict, empty without nvidia-smi."""
    command = [
        "nvidia-smi",
        f"--id={index}",
        f"--query-gpu={','.join(QUERY.values())}",
        "--format=csv,noheader",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(QUERY, values)) if done.returncode == 0 and len(values) == len(QUERY) else {}


def torch_of(device):
    """torch with `device` as its current one; None if torch is not installed or has no CUDA."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    torch.cuda.set_device(device)
    return torch


class Gpu:
    """In a smoke run `torch` is None: arrays are ours, peers do not run, and times are wall time."""

    def __init__(self, device, smoke=False):
        self.device, _ = choose(device)
        self.smoke, self.index = smoke, int(self.device.partition(":")[2])
        self.torch = None if smoke else torch_of(self.device)
        if self.torch is None and not smoke:
            raise SystemExit(
                "the benchmarks on a GPU need torch with CUDA, for random data, timing and the peers"
            )
        self.about = {"machine": cuda.properties(self.index)["name"], "gpu": smi(self.index), "smoke": smoke}
        self.rng = np.random.default_rng(0)
        if self.torch is not None:
            self.torch.manual_seed(0)
            self.flush = self.torch.empty(FLUSH, dtype=self.torch.uint8, device=self.device)

    def size(self, real, small):
        """`small` in a smoke run, else `real`."""
        return small if self.smoke else real

    def random(self, shape, dtype="float32", scale=1.0):
        """A normally distributed array on the GPU."""
        if self.torch is not None:
            return (self.torch.randn(shape, device=self.device) * scale).to(getattr(self.torch, dtype))
        x = send(self.rng.standard_normal(shape, np.float32) * np.float32(scale), self.device)
        out = _C.Tensor(shape, dtype, self.device)
        out.copy_(x)
        return out

    def zeros(self, shape, dtype="float32"):
        if self.torch is not None:
            return self.torch.zeros(shape, dtype=getattr(self.torch, dtype), device=self.device)
        return _C.Tensor(shape, dtype, self.device)

    def integers(self, high, count):
        """Random int32 in 0 .. high - 1 -> the array on the GPU, and the same in NumPy."""
        x = self.rng.integers(0, high, count, dtype=np.int32)
        return self.place(x), x

    def place(self, x):
        """A copy of an ndarray on the GPU."""
        return send(x, self.device) if self.torch is None else self.torch.from_numpy(x).to(self.device)

    def can(self, call):
        """Return `call`, or print why this GPU or this torch cannot run it and return None."""
        try:
            call()
            return call
        except Exception as error:
            print(
                f"  the peer cannot run here: {type(error).__name__}: {str(error).splitlines()[0][:200]}",
                flush=True,
            )
            return None

    def peaks(self):
        """GF/s of torch's 8192^3 product in bfloat16, and GB/s, read plus written, of its copy of 1 GiB.

        Both are None in a smoke run.
        """
        if self.torch is None:
            return None, None
        a, b = (self.random((8192, 8192), "bfloat16") for _ in range(2))
        x, y = (self.torch.empty(1 << 30, dtype=self.torch.uint8, device=self.device) for _ in range(2))
        product, copy = self.timed([lambda: self.torch.mm(a, b), lambda: y.copy_(x)], 0.3)
        return 2 * 8192**3 / product / 1e9, (2 << 30) / copy / 1e9

    def timed(self, calls, seconds, least=5):
        """Median seconds of each call. The calls run in turn, at least `least` times, for about `seconds`."""
        if self.torch is None:
            return [self._wall(call) for call in calls]
        for call in calls:
            call()
        self.torch.cuda.synchronize()
        samples, end = [[] for _ in calls], time.perf_counter() + seconds
        while len(samples[0]) < least or time.perf_counter() < end:
            marks = []
            for call in calls:
                first, last = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
                self.torch.cuda._sleep(1_000_000)  # cycles, half a millisecond: the host gets ahead
                self.flush.zero_()
                first.record()
                call()
                last.record()
                marks.append((first, last))
            self.torch.cuda.synchronize()
            for found, (first, last) in zip(samples, marks):
                found.append(first.elapsed_time(last) / 1e3)
        return [statistics.median(found) for found in samples]

    def _wall(self, call):
        cuda.synchronize(self.index)
        start = time.perf_counter()
        call()
        cuda.synchronize(self.index)
        return time.perf_counter() - start
