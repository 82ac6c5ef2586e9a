"""The torch operators with autograd: inputs, a call and the float64 reference of each."""

import checks
import devices
import numpy as np
import reference
import torch
from devices import put

from longlora.torch import ops

B, T, H, K, D, C, N, R, F, V = 2, 13, 4, 2, 8, 12, 10, 3, 9, 21
M = B * T
TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TARGETS = np.where(np.arange(M) % 5 == 0, -100, np.arange(M) * 7 % V)
IDS = np.arange(M).reshape(B, T) * 5 % V
COS, SIN = (f(np.arange(T)[:, None] * 0.7 ** np.arange(D // 2)).astype(np.float32) for f in (np.cos, np.sin))
PATTERN = dict(group_size=4, boundary="split", shift="half")
BOUNDARIES = np.array([[0, 5, 13, 13], [0, 1, 9, 13]], np.int32)


def attention_reference(dout, q, k, v, **how):
    out, lse = reference.s2_attention_forward(q, k, v, **how)
    return out, reference.s2_attention_backward(dout, q, k, v, out, lse, **how)


def packed_reference(dout, q, k, v):
    parts = [
        attention_reference(
            dout[b : b + 1], q[b : b + 1], k[b : b + 1], v[b : b + 1], cu_seqlens=BOUNDARIES[b], **PATTERN
        )
        for b in range(B)
    ]
    return (
        np.concatenate([out for out, _ in parts]),
        [np.concatenate(x) for x in zip(*(grads for _, grads in parts))],
    )


def norm_reference(dout, x, weight, residual=None):
    out, rstd, total = reference.rms_norm_forward(x, weight, 1e-6, residual)
    dx, dweight = reference.rms_norm_backward(dout, total, rstd, weight, None if residual is None else dout)
    return (out if residual is None else out + total), (
        [dx, dweight] if residual is None else [dx, dweight, dx]
    )


def linear_reference(dout, x, weight, bias, a, b):
    out, u = reference.lora_linear_forward(x, weight, bias, a, b, 0.5)
    dx, da, db, dweight, dbias = reference.lora_linear_backward(dout, x, weight, a, b, 0.5, u, True, True)
    return out, [dx, dweight, dbias, da, db]


def loss_reference(reduction):
    def call(dout, x, weight):
        kept = TARGETS != -100
        scale = {"mean": 1 / kept.sum(), "sum": 1.0, "none": 1.0}[reduction]
        dlosses = dout * scale * np.ones(M)
        losses, dx, dweight = reference.linear_cross_entropy_backward(
            x, weight, TARGETS, dlosses, train_weight=True
        )
        return losses if reduction == "none" else np.array(losses.sum() * scale), [dx, dweight]

    return call


def embedding_reference(dout, weight):
    return reference.embedding_forward(weight, IDS.ravel()), [
        reference.embedding_backward(dout, IDS.ravel(), None, V)
    ]


def rope_reference(dout, x):
    return reference.rope_forward(x, COS, SIN), [reference.rope_backward(dout, COS, SIN)]


CONSTANTS = {}


def constant(array):
    """The array on the device of the test, copied there once: a graph cannot capture the copy."""
    key = id(array), devices.current()
    if key not in CONSTANTS:
        CONSTANTS[key] = put(array)
    return CONSTANTS[key]


def summed(pair):
    return pair[0] + pair[1]


QKV = [(B, T, H, D), (B, T, K, D), (B, T, K, D)]
# name: shapes of the differentiable inputs, the call, its reference
CASES = {
    "s2_attention": (
        QKV,
        lambda q, k, v: ops.s2_attention(q, k, v, **PATTERN),
        lambda *x: attention_reference(*x, **PATTERN),
    ),
    "packed": (
        QKV,
        lambda q, k, v: ops.s2_attention(q, k, v, cu_seqlens=constant(BOUNDARIES), **PATTERN),
        packed_reference,
    ),
    "rms_norm": ([(M, C), (C,)], ops.rms_norm, norm_reference),
    "add_rms_norm": (
        [(M, C), (C,), (M, C)],
        lambda x, weight, residual: summed(ops.rms_norm(x, weight, 1e-6, residual)),
        norm_reference,
    ),
    "rope": ([(B, T, H, D)], lambda x: ops.rope(x, constant(COS), constant(SIN)), rope_reference),
    "lora_linear": (
        [(M, C), (N, C), (N,), (R, C), (N, R)],
        lambda *x: ops.lora_linear(*x, 0.5),
        linear_reference,
    ),
    "swiglu": (
        [(M, F), (M, F)],
        ops.swiglu,
        lambda dout, *x: (reference.swiglu_forward(*x), reference.swiglu_backward(dout, *x)),
    ),
    **{
        f"loss_{reduction}": (
            [(M, C), (V, C)],
            lambda x, weight, r=reduction: ops.linear_cross_entropy(
                x, weight, constant(TARGETS), reduction=r
            ),
            loss_reference(reduction),
        )
        for reduction in ("mean", "sum", "none")
    },
    "embedding": (
        [(V, C)],
        lambda weight: ops.embedding(weight, constant(IDS)).view(M, C),
        embedding_reference,
    ),
    "matmul": (
        [(M, C), (C, N)],
        lambda a, b: torch.ops.longlora.matmul(a, b, 0.5),
        lambda dout, a, b: (
            0.5 * reference.matmul(a, b),
            [0.5 * reference.f64(dout) @ reference.f64(b).T, 0.5 * reference.f64(a).T @ dout],
        ),
    ),
    "cast": (
        [(M, C)],
        lambda x: torch.ops.longlora.cast(x, torch.float32),
        lambda dout, x: (reference.f64(x), [dout]),
    ),
    "scale": (
        [(M, C)],
        lambda x: torch.ops.longlora.scale(x, 0.3),
        lambda dout, x: (reference.scale(x, 0.3), [reference.scale(dout, 0.3)]),
    ),
}


def given(name, dtype="float32"):
    """Inputs as NumPy arrays rounded to dtype, and the tensors of the same values."""
    arrays = [checks.random(shape, dtype, seed) for seed, shape in enumerate(CASES[name][0])]
    return arrays, [put(x.astype(np.float32)).to(TORCH[dtype]) for x in arrays]
