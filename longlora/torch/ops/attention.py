"""S²-Attn, attention over a cache, and the rotary embedding."""

import math

import torch
from torch import Tensor

from longlora import _C, ops
from longlora.torch.ops.layout import dense, new_floats, new_like
from longlora.torch.ops.register import AUTOCAST_DTYPE, register

# ---- S²-Attn


def _each(kernel, tensors, cu_seqlens, scalars):
    """Run the kernel on the whole batch, or on each sequence where each has its own document boundaries."""
    if cu_seqlens is None or cu_seqlens.ndim == 1:
        return kernel(*tensors, cu_seqlens, *scalars)
    if cu_seqlens.shape[0] != tensors[0].shape[0]:
        raise ValueError(
            f"s2_attention: cu_seqlens axis 0 should be B={tensors[0].shape[0]}, got {cu_seqlens.shape[0]}"
        )
    for b, boundaries in enumerate(cu_seqlens):
        kernel(*(x[b : b + 1] for x in tensors), boundaries, *scalars)


def _s2_attention_forward(q, k, v, cu_seqlens, group_size, boundary, shift, scale):
    q, k, v = dense(q), dense(k), dense(v)
    out, lse = new_like(q), new_floats(q, q.shape[0], q.shape[2], q.shape[1])
    scalars = ops.attention_scalars("s2_attention", q, group_size, boundary, shift, scale)
    _each(_C.s2_attention_forward, (out, lse, q, k, v), cu_seqlens, scalars)
    return out, lse


def _s2_attention_backward(dout, q, k, v, out, lse, cu_seqlens, group_size, boundary, shift, scale):
    dout, q, k, v = dense(dout), dense(q), dense(k), dense(v)
    grads = new_like(q), new_like(k), new_like(v)
    scalars = ops.attention_scalars("s2_attention", q, group_size, boundary, shift, scale)
    _each(_C.s2_attention_backward, (*grads, dout, q, k, v, out, lse), cu_seqlens, scalars)
    return grads


def _save_attention(ctx, inputs, output):
    q, k, v, cu_seqlens, *ctx.scalars = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)


def _grad_attention(ctx, dout, dlse):
    if dout is None:
        return (None,) * 8
    q, k, v, out, lse, cu_seqlens = ctx.saved_tensors
    grads = s2_attention_backward(dout.to(q.dtype), q, k, v, out, lse, cu_seqlens, *ctx.scalars)
    return *grads, None, None, None, None, None


s2_attention_forward = register(
    "s2_attention_forward(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, SymInt group_size, str boundary, "
    "str shift, float scale) -> (Tensor, Tensor)",
    _s2_attention_forward,
    lambda q, k, v, *unused: (
        q.new_empty(q.shape),
        q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32),
    ),
    backward=_grad_attention,
    save=_save_attention,
    autocast=AUTOCAST_DTYPE,
)
s2_attention_backward = register(
    "s2_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor? cu_seqlens, SymInt group_size, str boundary, str shift, float scale) "
    "-> (Tensor, Tensor, Tensor)",
    _s2_attention_backward,
    lambda dout, q, k, v, *unused: tuple(x.new_empty(x.shape) for x in (q, k, v)),
)


def s2_attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group_size: int,
    boundary: str = "split",
    shift: str = "half",
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """S²-Attn with the logarithm of each softmax's sum -> out [B,T,H,D], lse [B,H,T] float32.

    Arguments and errors as in s2_attention. lse has no gradient.
    """
    if scale is None:
        scale = 1 / math.sqrt(max(q.shape[-1], 1))
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(q.device)
    return s2_attention_forward(q, k, v, cu_seqlens, group_size, boundary, shift, scale)


def s2_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group_size: int,
    boundary: str = "split",
    shift: str = "half",
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Shifted sparse attention, causal -> out [B,T,H,D]. LongLoRA (arXiv 2309.12307) section 3.2.

    q [B,T,H,D], k and v [B,T,K,D]. group_size, boundary, shift and scale as in
    longlora.ops.s2_attention_forward. cu_seqlens: int32, the boundaries 0 ... T of packed documents: [S]
    with B = 1, or [B,S], where a row may repeat T at its end. ValueError for a wrong shape, group_size,
    boundary or shift; TypeError for a wrong dtype.
    """
    return s2_attention_with_lse(
        q, k, v, group_size=group_size, boundary=boundary, shift=shift, cu_seqlens=cu_seqlens, scale=scale
    )[0]


# ---- attention over a cache


def _cached_attention(q, k_cache, v_cache, lengths, k, v, rows, scale):
    q, k, v = dense(q), k if k is None else dense(k), v if v is None else dense(v)
    out, factor = new_like(q), 1 / math.sqrt(max(q.shape[-1], 1)) if scale is None else scale
    _C.cached_attention(out, k_cache, v_cache, q, k, v, rows, lengths, factor)
    return out


cached_attention_ = register(
    "cached_attention_(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor lengths, Tensor? k, "
    "Tensor? v, Tensor? rows, float? scale) -> Tensor",
    _cached_attention,
    lambda q, *others: q.new_empty(q.shape),
)


def cached_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rows: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of new tokens over a cache of keys and values, without a gradient -> out [B,S,H,D].

    The arguments are those of longlora.ops.cached_attention: k and v [B,S,K,D] are written to the caches
    [N,P,K,D] in place.
    """
    return cached_attention_(q, k_cache, v_cache, lengths, k, v, rows, scale)


# ---- rotary embedding


def _rope_forward(x, cos, sin, positions):
    out = new_like(x)
    _C.rope_forward(out, dense(x), dense(cos), dense(sin), positions)
    return out


def _rope_backward(dout, cos, sin, positions):
    dx = new_like(dout)
    _C.rope_backward(dx, dense(dout), dense(cos), dense(sin), positions)
    return dx


def _save_rope(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _grad_rope(ctx, dout):
    return rope_backward(dout, *ctx.saved_tensors), None, None, None


def _grad_rope_backward(ctx, ddx):
    return rope_forward(ddx, *ctx.saved_tensors), None, None, None


rope_forward = register(
    "rope_forward(Tensor x, Tensor cos, Tensor sin, Tensor? positions) -> Tensor",
    _rope_forward,
    lambda x, *tables: x.new_empty(x.shape),
    backward=_grad_rope,
    save=_save_rope,
    autocast=torch.float32,
)
rope_backward = register(
    "rope_backward(Tensor dout, Tensor cos, Tensor sin, Tensor? positions) -> Tensor",
    _rope_backward,
    lambda dout, *tables: dout.new_empty(dout.shape),
    backward=_grad_rope_backward,
    save=_save_rope,
)


def rope(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None) -> Tensor:
    """Rotate the heads of x [B,T,H,D] by position, in the rotate-half form -> out [B,T,H,D].

    cos and sin [P,D/2] are float32 tables; positions [B,T] int32 names their rows (default: 0..T-1).
    RoFormer, arXiv 2104.09864.
    """
    return rope_forward(x, cos, sin, positions)
