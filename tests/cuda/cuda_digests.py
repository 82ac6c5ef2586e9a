"""A digest of every result of every op on CUDA, in every dtype, with shapes that fill no tile.

test_cuda_emulation.py compares the digests between orders of threads. Two runs on a GPU must agree.
"""

import hashlib
import itertools

import checks
import mirror
import numpy as np
import pytest

import longlora
from longlora import _C, ops


def results(dtype, M):
    """(name, result) of every op, with M rows."""

    def random(*shape, seed=0, kind=dtype):
        return checks.random(shape, kind, seed)

    x, y, w = random(M, 136), random(M, 136, seed=1), random(200, 136, seed=2)
    a, b, dout = random(8, 136), random(200, 8), random(M, 200)
    ids = (np.arange(M) * 7 % 50).astype(np.int32)
    order = np.argsort(ids, kind="stable").astype(np.int32)
    cos, sin = random(150, 32, kind="float32"), random(150, 32, seed=1, kind="float32")
    losses = random(M, kind="float32")
    param, m, v = (random(1000, seed=seed, kind="float32") for seed in range(3))
    copy = np.empty(1000, checks.DTYPES[dtype])
    yield "cast", ops.cast(x, "float16")
    yield "accumulate", ops.accumulate(x.copy(), y, 0.5)
    yield "scale", ops.scale(x, 0.3)
    yield "global_norm", np.array(ops.global_norm([random(1000 * M + 1), x.ravel()]))
    yield "matmul", ops.matmul(x, w.T)
    yield "matmul, strides", ops.matmul(x[:, ::2], w.T[::2])
    yield "embedding_forward", ops.embedding_forward(w, ids)
    yield "embedding_backward", ops.embedding_backward(x, ids, order, 200)
    for tokens, C in ((M, 1032), (70_000, 16)):  # more columns, or more tokens, than a block takes at once
        few = np.arange(tokens, dtype=np.int32) // 97 % 5
        where = np.argsort(few, kind="stable").astype(np.int32)
        yield "embedding_backward, long runs", ops.embedding_backward(random(tokens, C), few, where, 5)
    yield "rms_norm_forward", ops.rms_norm_forward(x, w[0], residual=y)
    yield "rms_norm_backward", ops.rms_norm_backward(x, y, losses, w[0], x)
    yield "lora_linear_forward", ops.lora_linear_forward(x, w, random(200), a, b, 2.0, dout)
    yield (
        "lora_linear_backward",
        ops.lora_linear_backward(dout, x, w, a, b, 2.0, train_weight=True, train_bias=True),
    )
    yield "swiglu_forward", ops.swiglu_forward(x, y)
    yield "swiglu_backward", ops.swiglu_backward(x, y, y)
    yield "linear_cross_entropy_forward", ops.linear_cross_entropy_forward(x, w, ids)
    yield (
        "linear_cross_entropy_backward",
        ops.linear_cross_entropy_backward(x, w, ids, losses, train_weight=True),
    )
    head = random(60007, 8)  # a row has more logits than fit into shared memory
    rows = x[:5, :8], head, np.arange(5, dtype=np.int32) * 15000
    yield (
        "linear_cross_entropy_backward, large V",
        ops.linear_cross_entropy_backward(*rows, losses[:5], train_weight=True),
    )
    ops.adamw(param, m, np.abs(v), param.copy(), lr=1e-3, step=2, copy=copy)
    yield "adamw", (param, m, copy)
    for D, G, boundary, shift in (
        (64, 48, "split", "half"),
        (16, 37, "wrap", "all"),
        (80, 37, "swap", "half"),
        (128, 200, "split", "none"),
    ):
        q, k, v, d = (random(1, 148, heads, D, seed=seed) for seed, heads in enumerate((3, 1, 1, 3)))
        kwargs = dict(
            group_size=G, boundary=boundary, shift=shift, scale=-0.1 if boundary == "wrap" else None
        )
        out, lse = ops.s2_attention_forward(q, k, v, **kwargs)
        yield (
            f"s2_attention {D} {boundary}",
            (out, lse, *ops.s2_attention_backward(d, q, k, v, out, lse, **kwargs)),
        )
        for S, length in ((1, 130), (2, 600), (70, 3)):
            cache = [random(1, 700, 1, D, seed=seed) for seed in range(2)]
            new = ops.cached_attention(q[:, :S], *cache, np.array([length], np.int32), k=k[:, :S], v=v[:, :S])
            yield f"cached_attention {D} {S}", (new, *cache)
        if D == 64:
            yield "rope_forward", ops.rope_forward(q, cos, sin)
            yield "rope_backward", ops.rope_backward(q, cos, sin)


if __name__ == "__main__":
    assert longlora.cuda.is_available(), longlora.cuda.reason()
    with pytest.MonkeyPatch.context() as patch:
        mirror.install(patch, "cuda:0")
        before = _C.calls()
        for dtype in checks.DTYPES:
            for name, result in itertools.chain(results(dtype, 70), results(dtype, 301)):
                arrays = [x for x in checks.as_tuple(result) if x is not None]
                assert all(np.isfinite(x.astype(np.float64)).all() for x in arrays), name
                digest = hashlib.sha256(
                    b"".join(np.ascontiguousarray(x).tobytes() for x in arrays)
                ).hexdigest()[:16]
                print(dtype, name, *(x.shape for x in arrays), digest)
        assert not [op for op, n in _C.calls().items() if n == before[op]], "an op that was not called"
