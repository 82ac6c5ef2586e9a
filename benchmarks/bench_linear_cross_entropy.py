"""The head and its loss, forward and backward, against torch's linear + cross_entropy; head frozen and trained."""
import numpy as np

from benchmarks.harness import Bench
from longlora import _C

SHAPES = [(2048, 576, 49152), (512, 2048, 128256)]


def main(argv=None):
    bench = Bench("linear_cross_entropy", argv)
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
