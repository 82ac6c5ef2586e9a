"""One function per op: allocate the results in the caller's kind of array, call the kernel, return them.

Shapes in the vocabulary of csrc/ops.h. dtypes float32, bfloat16 or float16 (one per call), arithmetic in float32,
statistics and gradients of parameters in float32. Equal inputs give equal bits, for any number of threads.
M, the rows, may be several axes that lie as one: [B,T,C] for [M,C], and then [B,T] for [M], in arguments and results.
All raise TypeError for a wrong dtype or object and ValueError for a wrong shape, before anything is written.
"""

import math

from longlora import _C
from longlora.arrays import dtype_name, empty, empty_like, give_back, zeros

BOUNDARIES = {"split": 0, "wrap": 1, "swap": 2}
SHIFTS = {"half": 0, "none": 1, "all": 2}
IGNORE = -100  # the target of a token that is not scored, as in torch.nn.functional.cross_entropy


def shifted_heads(heads, shift="half"):
    """How many of the query heads are shifted; they are the last ones. LongLoRA section 3.2."""
    return {"half": heads - heads // 2, "none": 0, "all": heads}[shift]


def quarter_group(length):
    """The default group_size in tokens for sequences of `length` tokens: a quarter of them, even. LongLoRA section 3.2."""
    return max(2, length // 8 * 2)


def _choice(op, name, value, choices):
    if value not in choices:
        raise ValueError(f"{op}: {name} should be one of {', '.join(choices)}, got {value!r}")
    return choices[value]


def cast(x, dtype):
    """x [M,N] -> out [M,N] of `dtype` ("float32", "bfloat16", "float16"), rounded to nearest even."""
    out = empty(tuple(x.shape), dtype, x)
    _C.cast(out, x)
    return give_back(x, out)


def accumulate(out, x, scale=1.0):
    """out [M,N] += scale x [M,N], in place; any float dtypes."""
    _C.accumulate(out, x, scale)
    return out


def matmul(a, b, alpha=1.0, dtype=None):
    """a [M,C], b [C,N], any strides and float dtypes -> alpha a b [M,N], of dtype (by default a's)."""
    if len(a.shape) < 2 or len(b.shape) != 2:
        raise ValueError(
            f"matmul: a should have 2 axes or more and b 2, got {len(a.shape)} and {len(b.shape)}"
        )
    out = empty((*a.shape[:-1], b.shape[1]), dtype or dtype_name(a), a)
    _C.matmul(out, a, b, alpha, 0.0)
    return give_back(a, out)


def embedding_forward(weight, ids):
    """weight [V,C], ids [M] int32 -> out [M,C]. ValueError for an id outside 0..V-1."""
    out = empty((*ids.shape, weight.shape[1]), dtype_name(weight), weight)
    _C.embedding_forward(out, weight, ids)
    return give_back(weight, out)


def embedding_backward(dout, ids, order, rows):
    """dout [M,C], ids [M] int32, order [M] int32 = argsort(ids), stable -> dweight [rows,C] float32."""
    dweight = zeros((rows, dout.shape[-1]), "float32", dout)
    _C.embedding_backward(dweight, dout, ids, order)
    return give_back(dout, dweight)


def rms_norm_forward(x, weight, eps=1e-6, residual=None):
    """x [M,C], weight [C], residual [M,C] or None -> out [M,C], rstd [M] float32, sum [M,C] (x itself without residual).

    sum = x + residual; rstd = 1/sqrt(mean(sum^2) + eps); out = sum rstd weight.
    """
    out, rstd = empty_like(x), empty(tuple(x.shape[:-1]), "float32", x)
    total = None if residual is None else empty_like(x)
    _C.rms_norm_forward(out, rstd, total, x, residual, weight, eps)
    return give_back(x, out, rstd, x if total is None else total)


def rms_norm_backward(dout, x, rstd, weight, dresidual=None):
    """dout [M,C], x [M,C] (the forward's sum), rstd [M], dresidual [M,C] or None -> dx [M,C], dweight [C] float32."""
    dx, dweight = empty_like(x), zeros(tuple(weight.shape), "float32", x)
    _C.rms_norm_backward(dx, dweight, dout, x, rstd, weight, dresidual)
    return give_back(x, dx, dweight)


def rope_forward(x, cos, sin, positions=None):
    """x [B,T,H,D], cos and sin [P,D/2] float32, positions [B,T] int32 or None (0..T-1) -> out [B,T,H,D]. Rotate-half form."""
    out = empty_like(x)
    _C.rope_forward(out, x, cos, sin, positions)
    return give_back(x, out)


def rope_backward(dout, cos, sin, positions=None):
    """dout [B,T,H,D] -> dx [B,T,H,D], the inverse rotation."""
    dx = empty_like(dout)
    _C.rope_backward(dx, dout, cos, sin, positions)
    return give_back(dout, dx)


def lora_linear_forward(x, weight, bias=None, a=None, b=None, scale=1.0, residual=None):
    """x [M,C], weight [N,C], bias [N], a [R,C], b [N,R], residual [M,N] -> out [M,N], u [M,R] float32 (None without a).

    u = x a^T; out = x weight^T + bias + scale u b^T + residual. LoRA, arXiv 2106.09685 section 4.1.
    """
    out = empty((*x.shape[:-1], weight.shape[0]), dtype_name(x), x)
    u = None if a is None else empty((*x.shape[:-1], a.shape[0]), "float32", x)
    _C.lora_linear_forward(out, u, x, weight, bias, a, b, residual, scale)
    return give_back(x, out, u)


def lora_linear_backward(
    dout, x, weight, a=None, b=None, scale=1.0, u=None, train_weight=False, train_bias=False
):
    """dout [M,N] and the forward's inputs -> dx [M,C], da [R,C], db [N,R], dweight [N,C], dbias [N]; None where not asked.

    Gradients of parameters are float32. The frozen weight gets none (train_weight=False).
    """
    dx = empty_like(x)
    da = None if a is None else zeros(tuple(a.shape), "float32", x)
    db = None if b is None else zeros(tuple(b.shape), "float32", x)
    dweight = zeros(tuple(weight.shape), "float32", x) if train_weight else None
    dbias = zeros((weight.shape[0],), "float32", x) if train_bias else None
    _C.lora_linear_backward(dx, da, db, dweight, dbias, dout, x, weight, a, b, u, scale, 0)
    return give_back(x, dx, da, db, dweight, dbias)


def s2_attention_forward(q, k, v, *, group_size, boundary="split", shift="half", cu_seqlens=None, scale=None):
    """q [B,T,H,D], k and v [B,T,K,D] -> out [B,T,H,D], lse [B,H,T] float32. LongLoRA section 3.2; exact rule in csrc/ops.h.

    group_size G >= 1 tokens; boundary "split" (no leak), "wrap" (the paper's Algorithm 1: the first G/2 tokens of shifted
    heads see the last G/2, so the future leaks), "swap" (Variant 3); shift "half" of the query heads, "none" or "all".
    group_size >= T with shift="none" is dense causal attention. cu_seqlens [S] int32 packs documents (B = 1).
    scale multiplies q k^T, by default 1/sqrt(D). lse is over the scaled scores.
    """
    if len(q.shape) != 4:
        raise ValueError(f"s2_attention_forward: q should have 4 axes, got {len(q.shape)}")
    out, lse = empty_like(q), empty((q.shape[0], q.shape[2], q.shape[1]), "float32", q)
    _C.s2_attention_forward(
        out,
        lse,
        q,
        k,
        v,
        cu_seqlens,
        *attention_scalars("s2_attention_forward", q, group_size, boundary, shift, scale),
    )
    return give_back(q, out, lse)


def s2_attention_backward(
    dout, q, k, v, out, lse, *, group_size, boundary="split", shift="half", cu_seqlens=None, scale=None
):
    """dout [B,T,H,D], the forward's inputs and results -> dq [B,T,H,D], dk and dv [B,T,K,D]."""
    dq, dk, dv = empty_like(q), empty_like(k), empty_like(v)
    _C.s2_attention_backward(
        dq,
        dk,
        dv,
        dout,
        q,
        k,
        v,
        out,
        lse,
        cu_seqlens,
        *attention_scalars("s2_attention_backward", q, group_size, boundary, shift, scale),
    )
    return give_back(q, dq, dk, dv)


def attention_scalars(op, q, group_size, boundary, shift, scale):
    return (
        group_size,
        _choice(op, "boundary", boundary, BOUNDARIES),
        _choice(op, "shift", shift, SHIFTS),
        1 / math.sqrt(max(q.shape[-1], 1)) if scale is None else scale,
    )


def swiglu_forward(gate, up):
    """gate and up [M,F] -> silu(gate) up [M,F]."""
    out = empty_like(gate)
    _C.swiglu_forward(out, gate, up)
    return give_back(gate, out)


def swiglu_backward(dout, gate, up):
    """dout, gate, up [M,F] -> dgate, dup [M,F]."""
    dgate, dup = empty_like(gate), empty_like(up)
    _C.swiglu_backward(dgate, dup, dout, gate, up)
    return give_back(gate, dgate, dup)


def linear_cross_entropy_forward(x, weight, targets, ignore_index=IGNORE):
    """x [M,C], weight [V,C], targets [M] int32 -> losses [M], lse [M] float32; the logits never exist whole.

    losses = lse - logit of the target, natural logarithm; 0 where the target is ignore_index.
    """
    losses, lse = empty(tuple(x.shape[:-1]), "float32", x), empty(tuple(x.shape[:-1]), "float32", x)
    _C.linear_cross_entropy_forward(losses, lse, x, weight, targets, ignore_index)
    return give_back(x, losses, lse)


def linear_cross_entropy_backward(x, weight, targets, dlosses, ignore_index=IGNORE, train_weight=False):
    """As forward, and dlosses [M] float32, the gradient of each row's loss -> losses [M], dx [M,C], dweight [V,C] or None.

    The losses come with it: a training step calls this alone.
    """
    losses, dx = empty(tuple(x.shape[:-1]), "float32", x), empty_like(x)
    dweight = zeros(tuple(weight.shape), "float32", x) if train_weight else None
    _C.linear_cross_entropy_backward(losses, dx, dweight, x, weight, targets, dlosses, ignore_index)
    return give_back(x, losses, dx, dweight)


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
    """One step in place on float32 param, m, v [N]; copy [N], if given, takes the new value in its own dtype.

    AdamW, arXiv 1711.05101 algorithm 2, as torch.optim.AdamW has it. step counts from 1.
    """
    _C.adamw(param, m, v, copy, grad, lr, beta1, beta2, eps, weight_decay, step, grad_scale)


def global_norm(arrays):
    """The 2-norm of all elements of all arrays [N], summed in float64 in a fixed order where they are. A Python float."""
    total = None
    for x in arrays:
        total = zeros((1,), "float64", x) if total is None else total
        _C.sum_squares(total, x)
    if isinstance(total, _C.Tensor):
        total = total.cpu().numpy()
    return 0.0 if total is None else math.sqrt(total[0])
