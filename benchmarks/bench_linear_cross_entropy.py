"""The head and its loss, forward and backward, against torch's linear + cross_entropy.

The head is frozen in some rows and trained in others.
"""

import numpy as np

from benchmarks.harness import Bench
from longlora import _C

SHAPES = [(2048, 576, 49152), (512, 2048, 128256)]


def on_gpu(bench):
    """The frozen head for 8192 tokens, C = 4096, with gradients, and the extra memory that it needs."""
    gpu, dtype = bench.gpu, "bfloat16"
    m, c = gpu.size((8192, 4096), (32, 64))
    for v in gpu.size((32000, 128256), (100,)):
        name = f"frozen M={m} C={c} V={v}"
        if not bench.wants(name, dtype):
            continue
        x, weight = bench.random(m, c, dtype=dtype), bench.random(v, c, dtype=dtype, scale=c**-0.5)
        targets, known = gpu.integers(v, m)
        dlosses, losses, dx = (
            gpu.place(np.full(m, 1 / m, np.float32)),
            gpu.zeros((m,)),
            gpu.zeros((m, c), dtype),
        )
        args = losses, dx, None, x, weight, targets, dlosses, -100
        peer = None
        if gpu.torch is not None:
            torch, xt, tt = gpu.torch, x.detach().clone().requires_grad_(), gpu.place(known.astype(np.int64))

            def theirs():
                logits = torch.nn.functional.linear(xt, weight).float()
                torch.autograd.grad(torch.nn.functional.cross_entropy(logits, tt), xt)

            peer = gpu.can(theirs)
        bench.row(
            name,
            lambda: _C.linear_cross_entropy_backward(*args),
            peer,
            dtype=dtype,
            flops=4 * m * c * v,
            target=(600, 700),
            judged="ours",
        )
        bench.record(
            f"extra memory {name}",
            _C.workspace("linear_cross_entropy_backward", *args) / 2**30,
            None,
            "GiB",
            dtype=dtype,
            target=(0.5, 0.5),
            judged="ours",
        )


def main(argv=None):
    bench = Bench("linear_cross_entropy", argv)
    if bench.gpu is not None:
        return on_gpu(bench)
    for dtype in "float32", "bfloat16":
        for m, c, v in SHAPES:
            for trained in False, True:
                name = f"{'trained' if trained else 'frozen'} M={m} C={c} V={v}"
                if not bench.wants(name, dtype):
                    continue
                torch = bench.torch
                x, weight = bench.random(m, c, dtype=dtype), bench.random(v, c, dtype=dtype, scale=c**-0.5)
                targets = bench.rng.integers(0, v, m, dtype=np.int32)
                dlosses, losses, dx = np.full(m, 1 / m, np.float32), np.empty(m, np.float32), np.empty_like(x)
                dweight = np.zeros((v, c), np.float32) if trained else None
                xt, wt = bench.to_torch(x).requires_grad_(), bench.to_torch(weight).requires_grad_(trained)
                tt = torch.from_numpy(targets.astype(np.int64))

                def peer():
                    xt.grad = None
                    torch.nn.functional.cross_entropy(torch.nn.functional.linear(xt, wt), tt).backward()

                def ours():
                    _C.linear_cross_entropy_backward(losses, dx, dweight, x, weight, targets, dlosses, -100)

                bench.row(name, ours, peer, dtype=dtype, flops=(6 if trained else 4) * m * c * v)


if __name__ == "__main__":
    main()
