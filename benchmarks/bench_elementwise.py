"""The ops that move memory: their share of the measured copy bandwidth, and torch's version of each.

The bytes of a row are those that the op must read and write once.
"""

import numpy as np

from benchmarks.harness import Bench
from longlora import _C

M, C, F, V = 4096, 2048, 5504, 49152


def on_gpu(bench):
    """Sizes of Llama-2-7B, 8192 tokens, bfloat16; adamw on float32 masters with a bfloat16 copy."""
    gpu, dtype, size, target = bench.gpu, "bfloat16", 2, dict(target=(0.75, 0.92), judged="of_peak")
    m, c, f, v, n = gpu.size((8192, 4096, 11008, 32000, 1 << 27), (32, 64, 48, 100, 1000))

    def row(name, ours, bytes, dtype=dtype):
        bench.row(name, ours, dtype=dtype, bytes=bytes, **target)

    x, dout, w = (bench.random(*shape, dtype=dtype) for shape in ((m, c), (m, c), (c,)))
    out, rstd, dw = gpu.zeros((m, c), dtype), gpu.zeros((m,)), gpu.zeros((c,))
    row("rms_norm forward", lambda: _C.rms_norm_forward(out, rstd, None, x, None, w, 1e-6), 2 * m * c * size)
    row("rms_norm backward", lambda: _C.rms_norm_backward(out, dw, dout, x, rstd, w, None), 3 * m * c * size)
    heads = (1, m, c // 32, 32) if gpu.smoke else (1, m, c // 128, 128)
    x4, out4 = x.reshape(heads), out.reshape(heads)
    angle = np.arange(m)[:, None] * 1e4 ** -(np.arange(heads[3] // 2) / (heads[3] // 2))
    cos, sin = gpu.place(np.cos(angle).astype(np.float32)), gpu.place(np.sin(angle).astype(np.float32))
    row("rope", lambda: _C.rope_forward(out4, x4, cos, sin, None), 2 * m * c * size)
    g, u, d = (bench.random(m, f, dtype=dtype) for _ in range(3))
    dg, du = gpu.zeros((m, f), dtype), gpu.zeros((m, f), dtype)
    row("swiglu forward", lambda: _C.swiglu_forward(dg, g, u), 3 * m * f * size)
    row("swiglu backward", lambda: _C.swiglu_backward(dg, du, d, g, u), 5 * m * f * size)
    table, (ids, known) = bench.random(v, c, dtype=dtype), gpu.integers(v, m)
    order, dtable = gpu.place(np.argsort(known, kind="stable").astype(np.int32)), gpu.zeros((v, c))
    row(
        "embedding forward",
        lambda: _C.embedding_forward(out, table, ids),
        (m + len(np.unique(known))) * c * size,
    )
    row(
        "embedding backward",
        lambda: _C.embedding_backward(dtable, dout, ids, order),
        m * c * size + 2 * 4 * len(np.unique(known)) * c,
    )
    param, mean, square, grad = (bench.random(n) for _ in range(4))
    square, copy = gpu.zeros((n,)), gpu.zeros((n,), dtype)
    row(
        "adamw",
        lambda: _C.adamw(param, mean, square, copy, grad, 1e-4, 0.9, 0.95, 1e-8, 0.0, 5, 1.0),
        30 * n,
        "float32",
    )


def rms_norm(bench, dtype, size):
    functional = bench.torch.nn.functional
    x, dout, out, w = (bench.random(*shape, dtype=dtype) for shape in ((M, C), (M, C), (M, C), (C,)))
    rstd, dw = np.empty(M, np.float32), np.zeros(C, np.float32)
    xt, wt = (bench.to_torch(array).requires_grad_() for array in (x, w))
    dt, normed = bench.to_torch(dout), functional.rms_norm(xt, (C,), wt, 1e-6)
    bench.row(
        "rms_norm forward",
        lambda: _C.rms_norm_forward(out, rstd, None, x, None, w, 1e-6),
        lambda: functional.rms_norm(xt.detach(), (C,), wt.detach(), 1e-6),
        dtype=dtype,
        bytes=2 * M * C * size,
    )
    bench.row(
        "rms_norm backward",
        lambda: _C.rms_norm_backward(out, dw, dout, x, rstd, w, None),
        lambda: bench.torch.autograd.grad(normed, (xt, wt), dt, retain_graph=True),
        dtype=dtype,
        bytes=3 * M * C * size,
    )


def rope(bench, dtype, size):
    torch = bench.torch
    x, out = (bench.random(M, C, dtype=dtype).reshape(1, M, C // 64, 64) for _ in range(2))
    angle = np.arange(M)[:, None] * 1e4 ** -(np.arange(32) / 32)
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    xt = bench.to_torch(x)
    ct, st = (torch.cat([bench.to_torch(t)] * 2, -1)[None, :, None].to(xt.dtype) for t in (cos, sin))
    bench.row(
        "rope",
        lambda: _C.rope_forward(out, x, cos, sin, None),
        lambda: xt * ct + torch.cat([-xt[..., 32:], xt[..., :32]], -1) * st,
        dtype=dtype,
        bytes=2 * M * C * size,
    )


def swiglu(bench, dtype, size):
    functional = bench.torch.nn.functional
    g, u, f = (bench.random(M, F, dtype=dtype) for _ in range(3))
    dg, du = np.empty_like(g), np.empty_like(u)
    gt, ut, ft = bench.to_torch(g).requires_grad_(), bench.to_torch(u).requires_grad_(), bench.to_torch(f)
    made = functional.silu(gt) * ut
    bench.row(
        "swiglu forward",
        lambda: _C.swiglu_forward(dg, g, u),
        lambda: functional.silu(gt.detach()) * ut.detach(),
        dtype=dtype,
        bytes=3 * M * F * size,
    )
    bench.row(
        "swiglu backward",
        lambda: _C.swiglu_backward(dg, du, f, g, u),
        lambda: bench.torch.autograd.grad(made, (gt, ut), ft, retain_graph=True),
        dtype=dtype,
        bytes=5 * M * F * size,
    )


def embedding(bench, dtype, size):
    table = bench.random(V, 576, dtype=dtype)
    ids = np.random.default_rng(0).integers(0, V, M).astype(np.int32)
    rows, dtable = np.empty((M, 576), table.dtype), np.zeros((V, 576), np.float32)
    order = np.argsort(ids, kind="stable").astype(np.int32)
    tt, it = bench.to_torch(table), bench.torch.from_numpy(ids)
    bench.row(
        "embedding forward",
        lambda: _C.embedding_forward(rows, table, ids),
        lambda: bench.torch.nn.functional.embedding(it, tt),
        dtype=dtype,
        bytes=2 * M * 576 * size,
    )
    bench.row(
        "embedding backward",
        lambda: _C.embedding_backward(dtable, rows, ids, order),
        dtype=dtype,
        bytes=M * 576 * (size + 8),
    )


def adamw(bench):
    N = 1 << 24
    param, m, v, grad = bench.random(N), bench.random(N), bench.random(N) ** 2, bench.random(N)
    theirs = bench.torch.nn.Parameter(bench.to_torch(param))
    theirs.grad = bench.to_torch(grad)
    optimizer = bench.torch.optim.AdamW([theirs], lr=1e-4, fused=True)
    bench.row(
        "adamw",
        lambda: _C.adamw(param, m, v, None, grad, 1e-4, 0.9, 0.95, 1e-8, 0.0, 5, 1.0),
        optimizer.step,
        bytes=28 * N,
        peer_name="torch fused",
    )


def main(argv=None):
    bench = Bench("elementwise", argv)
    if bench.gpu is not None:
        return on_gpu(bench)
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        for op in (rms_norm, rope, swiglu, embedding):
            op(bench, dtype, size)
    adamw(bench)


if __name__ == "__main__":
    main()
