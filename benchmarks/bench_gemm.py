"""matmul against torch.mm.

The shapes are the products of a SmolLM2 step (forward NT, dx NN, dW TN), big squares, narrow and odd ones.
"""

import functools
import math

from benchmarks.harness import Bench
from longlora import _C, ops

LAYER = [(2048, 576, 576), (2048, 192, 576), (2048, 1536, 576), (2048, 576, 1536)]
NT = LAYER + [
    (2048, 49152, 576),
    (2048, 2048, 2048),
    (4096, 4096, 4096),
    (2048, 8, 576),
    (2048, 576, 8),
    (1, 2048, 2048),
    (7, 576, 576),
    (100, 576, 576),
    (2048, 577, 576),
    (2047, 575, 577),
]
ODD = [
    ((7, 576, 576), (8, 576, 576)),
    ((100, 576, 576), (96, 576, 576)),
    ((2048, 577, 576), (2048, 576, 576)),
    ((2047, 575, 577), (2048, 576, 576)),
]
SHAPES = [("NT", shape) for shape in NT] + [
    (kind, shape) for kind in ("NN", "TN") for shape in LAYER + [(2048, 2048, 2048)]
]


def on_gpu(bench):
    """The products of a layer of Llama-2-7B, 8192 tokens. Both sides call cuBLAS: this times our overhead."""
    gpu, dtype = bench.gpu, "bfloat16"
    shapes = [(8192, 12288, 4096), (8192, 4096, 4096), (2048, 22016, 4096), (2048, 4096, 11008)]
    for m, n, k in gpu.size(shapes, [(32, 48, 64)]):
        a, b, out = bench.random(m, k, dtype=dtype), bench.random(n, k, dtype=dtype), gpu.zeros((m, n), dtype)
        peer = None
        if gpu.torch is not None:
            made = gpu.zeros((m, n), dtype)
            peer = functools.partial(gpu.torch.mm, a, b.T, out=made)
        bench.row(
            f"NT M={m} N={n} K={k}",
            lambda: _C.lora_linear_forward(out, None, a, b, None, None, None, None, 1.0),
            peer,
            dtype=dtype,
            flops=2 * m * n * k,
        )


def main(argv=None):
    bench = Bench("gemm", argv)
    if bench.gpu is not None:
        return on_gpu(bench)
    for dtype in "float32", "bfloat16":
        for kind, (m, n, k) in SHAPES:
            name = f"{kind} M={m} N={n} K={k}"
            if not bench.wants(name, dtype):
                continue
            a = bench.random(m, k, dtype=dtype) if kind[0] == "N" else bench.random(k, m, dtype=dtype).T
            b = bench.random(k, n, dtype=dtype) if kind[1] == "N" else bench.random(n, k, dtype=dtype).T
            at = bench.to_torch(a) if kind[0] == "N" else bench.to_torch(a.T).T
            bt = bench.to_torch(b) if kind[1] == "N" else bench.to_torch(b.T).T
            out, out_torch = bench.random(m, n, dtype=dtype), bench.torch.empty((m, n), dtype=at.dtype)
            bench.row(
                name,
                lambda: ops._C.matmul(out, a, b, 1.0, 0.0),
                lambda: bench.torch.mm(at, bt, out=out_torch),
                dtype=dtype,
                flops=2 * m * n * k,
            )
        for odd, near in ODD:
            calls = []
            for m, n, k in (odd, near):
                a, b, out = (bench.random(*shape, dtype=dtype) for shape in ((m, k), (n, k), (m, n)))
                calls.append(lambda out=out, a=a, b=b: ops._C.matmul(out, a, b.T, 1.0, 0.0))
            name = "NT M={} N={} K={}"
            bench.neighbour(
                f"odd {name.format(*odd)}",
                *calls,
                2 * math.prod(odd),
                2 * math.prod(near),
                name.format(*near),
                dtype=dtype,
            )


if __name__ == "__main__":
    main()
