"""Every op of longlora.ops in NumPy float64, forward and backward, written from the formulas.

This is the specification that every kernel is compared with. Names and signatures are those of longlora.ops.
Inputs may have any float dtype. Nothing here is fast.
"""

import math

import numpy as np

PRECISION = np.float64  # checks.py sets float32 for the plain computation
BETWEEN = None  # the dtype to which attention weights and gradients of scores are rounded, if any


def f64(x):
    return None if x is None else np.asarray(x).astype(PRECISION)


def cast(x, dtype):
    return f64(x)


def accumulate(out, x, scale=1.0):
    return f64(out) + scale * f64(x)


def scale(x, scale):
    return scale * f64(x)


def matmul(a, b, alpha=1.0, dtype=None):
    return alpha * f64(a) @ f64(b)


def embedding_forward(weight, ids):
    return f64(weight)[ids]


def embedding_backward(dout, ids, order, rows):
    dweight = np.zeros((rows, dout.shape[1]), PRECISION)
    np.add.at(dweight, ids, f64(dout))
    return dweight


def rms_norm_forward(x, weight, eps=1e-6, residual=None):
    total = f64(x) if residual is None else f64(x) + f64(residual)
    rstd = (
        1 / np.sqrt((total**2).mean(-1) + eps)
        if total.shape[-1]
        else np.full(total.shape[:-1], 1 / math.sqrt(eps))
    )
    return total * rstd[:, None] * f64(weight), rstd, total


def rms_norm_backward(dout, x, rstd, weight, dresidual=None):
    """out_i = x_i r w_i, r = (mean x^2 + eps)^-1/2, dr/dx_j = -r^3 x_j / C."""
    dout, x, rstd, weight = f64(dout), f64(x), f64(rstd)[:, None], f64(weight)
    g = dout * weight
    dx = rstd * g - x * rstd**3 * (g * x).sum(-1, keepdims=True) / max(x.shape[-1], 1)
    return dx + (0 if dresidual is None else f64(dresidual)), (dout * x * rstd).sum(0)


def _rotate(x, cos, sin, positions, sign):
    x, cos, sin = f64(x), f64(cos), f64(sin) * sign
    B, T, _, D = x.shape
    positions = np.broadcast_to(np.arange(T), (B, T)) if positions is None else np.asarray(positions)
    c, s, first, second = (
        cos[positions][:, :, None],
        sin[positions][:, :, None],
        x[..., : D // 2],
        x[..., D // 2 :],
    )
    return np.concatenate([first * c - second * s, second * c + first * s], -1)


def rope_forward(x, cos, sin, positions=None):
    return _rotate(x, cos, sin, positions, 1)


def rope_backward(dout, cos, sin, positions=None):
    return _rotate(dout, cos, sin, positions, -1)


def lora_linear_forward(x, weight, bias=None, a=None, b=None, scale=1.0, residual=None):
    x = f64(x)
    out, u = x @ f64(weight).T, None
    if bias is not None:
        out = out + f64(bias)
    if a is not None:
        u = x @ f64(a).T
        out = out + scale * u @ f64(b).T
    return out + (0 if residual is None else f64(residual)), u


def lora_linear_backward(
    dout, x, weight, a=None, b=None, scale=1.0, u=None, train_weight=False, train_bias=False
):
    dout, x = f64(dout), f64(x)
    dx, da, db = dout @ f64(weight), None, None
    if a is not None:
        du = scale * dout @ f64(b)
        dx, da, db = dx + du @ f64(a), du.T @ x, scale * dout.T @ (x @ f64(a).T)
    return dx, da, db, dout.T @ x if train_weight else None, dout.sum(0) if train_bias else None


def attention_mask(T, H, group_size, boundary="split", shift="half", cu_seqlens=None):
    """bool [H,T,T]: query t of head h sees key j. The rule of csrc/ops.h, for each document."""
    mask, G, half = np.zeros((H, T, T), bool), int(group_size), int(group_size) // 2
    borders = [0, T] if cu_seqlens is None else [int(i) for i in cu_seqlens]
    for first, last in zip(borders, borders[1:]):
        t = np.arange(last - first)
        q, k, L = t[:, None], t[None], last - first
        plain = (k >= q // G * G) & (k <= q)
        start = np.where(t < half, 0, half + (t - half) // G * G)[:, None]
        shifted = (k >= start) & (k <= q)
        if boundary != "split" and L % G:
            raise ValueError(f"{boundary} needs L % G == 0, got L={L}, G={G}")
        if boundary == "wrap":
            shifted |= (q < half) & (k >= L - half)
        if boundary == "swap":
            shifted |= (q >= L - half) & (k < half)
        for h in range(H):
            is_shifted = {"half": h >= H // 2, "none": False, "all": True}[shift]
            mask[h, first:last, first:last] = shifted if is_shifted else plain
    return mask


def _heads(x, repeat=1):
    """x[B,T,H,D] -> [B,H,T,D] in PRECISION, each head `repeat` times in a row."""
    return np.repeat(np.swapaxes(f64(x), 1, 2), repeat, 1)


def _t(x):
    return np.swapaxes(x, -1, -2)


def _scores(q, k, scale, *pattern):
    """q, k [B,H,T,D] -> scores [B,H,T,T], -inf if the query does not see the key.

    pattern: the arguments of attention_mask from group_size on.
    """
    return np.where(attention_mask(q.shape[2], q.shape[1], *pattern), q @ _t(k) * scale, -np.inf)


def s2_attention_forward(q, k, v, *, group_size, boundary="split", shift="half", cu_seqlens=None, scale=None):
    (B, T, H, D), K = q.shape, k.shape[2]
    scale = 1 / math.sqrt(max(D, 1)) if scale is None else scale
    if 0 in (B, T, H):
        return np.zeros(q.shape), np.zeros((B, H, T))
    q, k, v = _heads(q), _heads(k, H // K), _heads(v, H // K)
    s = _scores(q, k, scale, group_size, boundary, shift, cu_seqlens)
    top = s.max(-1, keepdims=True)
    e = np.exp(s - top)
    total = e.sum(-1, keepdims=True)
    return np.swapaxes(e / total @ v, 1, 2), (top + np.log(total))[..., 0]


def s2_attention_backward(
    dout, q, k, v, out, lse, *, group_size, boundary="split", shift="half", cu_seqlens=None, scale=None
):
    """P = exp(S - lse); dV = P^T dO; dS = P (dO V^T - rowsum(dO O)); dQ = scale dS K; dK = scale dS^T Q."""
    (B, T, H, D), K = q.shape, k.shape[2]
    scale = 1 / math.sqrt(max(D, 1)) if scale is None else scale
    if 0 in (B, T, H):
        return np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    q, k, v, dout, out = _heads(q), _heads(k, H // K), _heads(v, H // K), _heads(dout), _heads(out)
    p = np.exp(_scores(q, k, scale, group_size, boundary, shift, cu_seqlens) - f64(lse)[..., None])
    ds = p * (dout @ _t(v) - (dout * out).sum(-1, keepdims=True))
    if BETWEEN is not None:
        p, ds = (f64(x.astype(BETWEEN)) for x in (p, ds))
    dk, dv = (x.reshape(B, K, H // K, T, D).sum(2) for x in (scale * _t(ds) @ q, _t(p) @ dout))
    return tuple(np.swapaxes(x, 1, 2) for x in (scale * ds @ k, dk, dv))


def cached_attention(q, k_cache, v_cache, lengths, *, k=None, v=None, rows=None, scale=None):
    """Row by row: query s of sequence b sees places 0 .. lengths[b] + s of its row, where k and v may be new.

    The cache is not written.
    """
    (B, S, H, D), K = q.shape, k_cache.shape[2]
    scale = 1 / math.sqrt(max(D, 1)) if scale is None else scale
    out = np.zeros(q.shape, PRECISION)
    for b, h in np.ndindex(B, H):
        row, first = b if rows is None else int(rows[b]), int(lengths[b])
        keys, values = (f64(x[row, : first + S, h // (H // K)]) for x in (k_cache, v_cache))
        if k is not None:
            # The cache rounds what is written to its own dtype.
            keys[first:] = f64(k[b, :, h // (H // K)].astype(k_cache.dtype))
            values[first:] = f64(v[b, :, h // (H // K)].astype(v_cache.dtype))
        for s in range(S):
            scores = keys[: first + s + 1] @ f64(q[b, s, h]) * scale
            e = np.exp(scores - scores.max())
            out[b, s, h] = e / e.sum() @ values[: first + s + 1]
    return out


def swiglu_forward(gate, up):
    gate = f64(gate)
    return gate * sigmoid(gate) * f64(up)


def swiglu_backward(dout, gate, up):
    dout, gate, up = f64(dout), f64(gate), f64(up)
    s = sigmoid(gate)
    return dout * up * s * (1 + gate * (1 - s)), dout * gate * s


def sigmoid(x):
    return np.where(x >= 0, 1 / (1 + np.exp(-np.abs(x))), np.exp(-np.abs(x)) / (1 + np.exp(-np.abs(x))))


def linear_cross_entropy_forward(x, weight, targets, ignore_index=-100):
    logits = f64(x) @ f64(weight).T
    top = logits.max(-1, keepdims=True)
    lse = (top + np.log(np.exp(logits - top).sum(-1, keepdims=True)))[:, 0]
    kept = targets != ignore_index
    return np.where(kept, lse - logits[np.arange(len(lse)), np.where(kept, targets, 0)], 0), lse


def linear_cross_entropy_backward(x, weight, targets, dlosses, ignore_index=-100, train_weight=False):
    losses, lse = linear_cross_entropy_forward(x, weight, targets, ignore_index)
    kept = targets != ignore_index
    d = np.exp(f64(x) @ f64(weight).T - lse[:, None])
    d[np.arange(len(lse)), np.where(kept, targets, 0)] -= 1
    d *= np.where(kept, f64(dlosses), 0)[:, None]
    return losses, d @ f64(weight), d.T @ f64(x) if train_weight else None


def adamw(
    param,
    m,
    v,
    grad,
    *,
    lr,
    step,
    beta1=0.9,
    beta2=0.999,
    eps=1e-8,
    weight_decay=0.0,
    grad_scale=1.0,
    copy=None,
):
    """Returns the new param, m, v: the op works in place."""
    param, m, v, grad = f64(param), f64(m), f64(v), f64(grad) * grad_scale
    m, v = beta1 * m + (1 - beta1) * grad, beta2 * v + (1 - beta2) * grad**2
    update = (m / (1 - beta1**step)) / (np.sqrt(v / (1 - beta2**step)) + eps)
    return param * (1 - lr * weight_decay) - lr * update, m, v


def global_norm(arrays):
    return math.sqrt(sum(float((f64(x) ** 2).sum()) for x in arrays))
