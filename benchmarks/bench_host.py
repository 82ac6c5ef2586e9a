"""What a call of an op costs the host. The arrays are so small that nothing else counts. torch's rms_norm is
the peer.

On a GPU this is the time until the call has queued its work. It should be shorter than the work itself.
"""

import time

from benchmarks.harness import Bench
from longlora import _C, cuda, ops


def per_call(call, gpu, calls):
    """Microseconds per call, the smallest of ten rounds. `calls` must not fill the queue of a GPU."""
    best = float("inf")
    for _ in range(10):
        if gpu is not None:
            cuda.synchronize(gpu.index)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, time.perf_counter() - start)
    return best / calls * 1e6


def main(argv=None):
    bench = Bench("host", argv)
    gpu = bench.gpu
    torch = bench.torch if gpu is None else gpu.torch
    dtype, calls = ("float32", 2000) if gpu is None else ("bfloat16", gpu.size(100, 2))
    target = dict(target=(10, 4), judged="ours") if gpu is not None else {}

    def new(*shape, dtype=dtype):
        return bench.random(*shape, dtype=dtype)

    x, w, rstd = new(2, 64), new(64), new(2, dtype="float32")
    out, weight, a, b, u = new(2, 64), new(64, 64), new(8, 64), new(64, 8), new(2, 8, dtype="float32")
    q, k, v, o = (new(1, 16, heads, 64) for heads in (2, 1, 1, 2))
    lse = new(1, 2, 16, dtype="float32")
    rows = {
        "rms_norm_forward": lambda: _C.rms_norm_forward(out, rstd, None, x, None, w, 1e-6),
        "swiglu_forward": lambda: _C.swiglu_forward(out, x, x),
        "lora_linear_forward": lambda: _C.lora_linear_forward(out, u, x, weight, None, a, b, None, 1.0),
        "s2_attention_forward": lambda: _C.s2_attention_forward(o, lse, q, k, v, None, 8, 0, 0, 0.125),
        "ops.rms_norm_forward, which allocates": lambda: ops.rms_norm_forward(x, w),
    }
    peer = None
    if torch is not None:
        xt, wt = (x, w) if gpu is not None else (bench.to_torch(x), bench.to_torch(w))
        peer = per_call(lambda: torch.nn.functional.rms_norm(xt, (64,), wt), gpu, calls)
    for name, call in rows.items():
        if bench.wants(name, dtype):
            bench.record(
                name,
                per_call(call, gpu, calls),
                peer if "rms_norm" in name else None,
                "us",
                dtype=dtype,
                **target,
            )


if __name__ == "__main__":
    main()
