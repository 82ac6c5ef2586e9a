"""Shifted sparse attention on NumPy arrays, forward and backward, against dense attention group by group."""

import numpy as np

from longlora import ops

B, T, H, D, G = 1, 64, 4, 16, 16
q, k, v, dout = (np.random.default_rng(i).standard_normal((B, T, H, D)).astype(np.float32) for i in range(4))
out, lse = ops.s2_attention_forward(q, k, v, group_size=G)
gradients = ops.s2_attention_backward(dout, q, k, v, out, lse, group_size=G)


def dense(q, k, v, dout):
    """Causal attention of one head in one group, [tokens,D] each -> out, dq, dk, dv."""
    scores = np.where(np.tri(len(q)), q @ k.T / np.sqrt(D), -np.inf)
    p = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    dp = dout @ v.T
    ds = p * (dp - (dp * p).sum(1, keepdims=True)) / np.sqrt(D)
    return p @ v, ds @ k, ds.T @ q, p.T @ dout


for head in range(H):
    # Groups begin at 0, G, 2 G, ... in the first half of the heads, and G/2 later in the second half.
    boundaries = [0, *range(G if head < H // 2 else G // 2, T, G), T]
    for first, last in zip(boundaries, boundaries[1:]):
        group = (0, slice(first, last), head)
        wanted = dense(*(x[group].astype(np.float64) for x in (q, k, v, dout)))
        for got, want in zip((out, *gradients), wanted):
            np.testing.assert_allclose(got[group], want, rtol=1e-4, atol=1e-5)
print("out, dq, dk and dv of every group equal dense attention in that group")
