"""The kernels as registered torch operators, `torch.ops.longlora.*`, with autograd, and the functions that people call.

One table: schema, kernel, shapes of the results (for torch.compile), backward, autocast. A kernel's results are new tensors of
torch's allocator; inputs are read where they lie, but one whose last axis is not dense is copied first. Gradients can be taken
once: no formula is given for the gradient of a gradient, and asking for it says so.

The dispatcher enters Python twice for an operator written in Python, which costs 7 us a call and 13 with a gradient, several
times what a tiny kernel takes. So the functions go to the same kernel and backward without it where it would decide nothing:
plain tensors, no compiler, no autocast, no mode and no transform looking on.
"""

import math
from types import SimpleNamespace

import torch
from torch._C import _is_any_autocast_enabled, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._functorch import peek_interpreter_stack
from torch.compiler import is_compiling

from longlora import _C, ops

_library = torch.library.Library("longlora", "DEF")
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
_OTHERS = frozenset((type(None), bool, int, float, str, list))  # of an operator's arguments
_contiguous = torch.contiguous_format
_call = SimpleNamespace()  # name of an operator -> the function that calls it


def _dense(x):
    return x if x is None or x.is_contiguous() or x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _rows(x):
    """x [...,C] as the kernels read rows: up to four axes, all but the last of them as one."""
    if x is None or 2 <= x.ndim <= 4 and x.is_contiguous():
        return x
    return _dense(x if x.ndim == 2 else x.reshape(-1, x.shape[-1]))


def _flat(x):
    return x if 1 <= x.ndim <= 4 else x.reshape(-1)


def _like(x):
    return torch.empty_like(x) if x.is_contiguous() else torch.empty_like(x, memory_format=_contiguous)


def _floats(x, *shape):
    return x.new_empty(*shape or ((),), dtype=torch.float32)  # sizes are read faster than a tuple of them


def _once(name):
    def refuse(ctx, *unused):
        raise RuntimeError(f"longlora::{name}: the gradient of a gradient is not available")

    return refuse


def _autocast(name, dtype):
    """Under autocast the floating tensors of the call become `dtype`, or autocast's own for None, as for torch's matmul."""

    def rule(device, key):
        def call(keyset, *args):
            to = dtype or torch.get_autocast_dtype(device)
            args = [
                x.to(to)
                if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype != torch.float64
                else x
                for x in args
            ]
            with torch._C._ExcludeDispatchKeyGuard(
                torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
            ):
                return getattr(torch.ops.longlora, name).default(*args)

        _library.impl(name, call, key, with_keyset=True)

    rule("cpu", "AutocastCPU")
    rule("cuda", "AutocastCUDA")


def _watched(x):
    """Whether the dispatcher might come to something else than the kernel of x's device."""
    return (
        is_compiling()
        or _is_any_autocast_enabled()
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or peek_interpreter_stack() is not None
        or not (x.is_cpu or x.is_cuda)
    )


def _register(schema, kernel, shapes, backward=None, save=None, autocast=()):
    """Register an operator, and put the function that calls it into _call.

    schema "name(...) -> ..."; shapes: the fake kernel; save(ctx, inputs, output) and backward(ctx, *grads): autograd's.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _library.impl(name, kernel, key)
    torch.library.register_fake(f"longlora::{name}", shapes, lib=_library)
    if autocast != ():
        _autocast(name, autocast)
    operator = getattr(torch.ops.longlora, name).default
    if "!" in schema:
        return
    backward = backward or _once(name)
    torch.library.register_autograd(f"longlora::{name}", backward, setup_context=save, lib=_library)

    def forward(ctx, *args):
        output = kernel(*args)
        if save is not None:
            save(ctx, args, output)
        return output

    function = type(
        name,
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(backward)},
    )
    apply = super(
        torch.autograd.Function, function
    ).apply  # without a look for transforms, which _watched did

    def call(*args):
        if _watched(args[0]):
            return operator(*args)
        differentiable = False
        for x in args:
            kind = type(x)
            if kind in _PLAIN:
                differentiable = differentiable or x.requires_grad
            elif kind not in _OTHERS:
                return operator(*args)
        if differentiable and torch.is_grad_enabled():
            return apply(*args)
        return kernel(*args)

    setattr(_call, name, call)


def _wanted(ctx, index, grad, like):
    """A float32 gradient of a parameter in the parameter's own dtype; None where none is wanted."""
    return grad.to(like.dtype) if ctx.needs_input_grad[index] else None


# ---- S2-Attn


def _each(kernel, arrays, cu_seqlens, how):
    """The kernel on a whole batch, or sequence by sequence when each has borders of its own."""
    if cu_seqlens is None or cu_seqlens.ndim == 1:
        return kernel(*arrays, cu_seqlens, *how)
    if cu_seqlens.shape[0] != arrays[0].shape[0]:
        raise ValueError(
            f"s2_attention: cu_seqlens axis 0 should be B={arrays[0].shape[0]}, got {cu_seqlens.shape[0]}"
        )
    for b, borders in enumerate(cu_seqlens):
        kernel(*(x[b : b + 1] for x in arrays), borders, *how)


def _s2_attention_forward(q, k, v, cu_seqlens, group_size, boundary, shift, scale):
    q, k, v = _dense(q), _dense(k), _dense(v)
    out, lse = _like(q), _floats(q, q.shape[0], q.shape[2], q.shape[1])
    _each(
        _C.s2_attention_forward,
        (out, lse, q, k, v),
        cu_seqlens,
        ops.attention_scalars("s2_attention", q, group_size, boundary, shift, scale),
    )
    return out, lse


def _s2_attention_backward(dout, q, k, v, out, lse, cu_seqlens, group_size, boundary, shift, scale):
    dout, q, k, v = _dense(dout), _dense(q), _dense(k), _dense(v)
    grads = _like(q), _like(k), _like(v)
    _each(
        _C.s2_attention_backward,
        (*grads, dout, q, k, v, out, lse),
        cu_seqlens,
        ops.attention_scalars("s2_attention", q, group_size, boundary, shift, scale),
    )
    return grads


def _save_attention(ctx, inputs, output):
    q, k, v, cu_seqlens, *ctx.how = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)


def _grad_attention(ctx, dout, dlse):
    if dout is None:
        return (None,) * 8
    q, k, v, out, lse, cu_seqlens = ctx.saved_tensors
    grads = _call.s2_attention_backward(dout.to(q.dtype), q, k, v, out, lse, cu_seqlens, *ctx.how)
    return *grads, None, None, None, None, None


_register(
    "s2_attention_forward(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, SymInt group_size, str boundary, str shift, "
    "float scale) -> (Tensor, Tensor)",
    _s2_attention_forward,
    lambda q, k, v, *how: (
        q.new_empty(q.shape),
        q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32),
    ),
    _grad_attention,
    _save_attention,
    None,
)
_register(
    "s2_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? cu_seqlens, "
    "SymInt group_size, str boundary, str shift, float scale) -> (Tensor, Tensor, Tensor)",
    _s2_attention_backward,
    lambda dout, q, k, v, *how: tuple(x.new_empty(x.shape) for x in (q, k, v)),
)


def s2_attention_with_lse(
    q, k, v, *, group_size, boundary="split", shift="half", cu_seqlens=None, scale=None
):
    """As s2_attention -> out [B,T,H,D], lse [B,H,T] float32, the logarithm of each softmax's sum; it has no gradient."""
    if scale is None:
        scale = 1 / math.sqrt(max(q.shape[-1], 1))
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(q.device)
    return _call.s2_attention_forward(q, k, v, cu_seqlens, group_size, boundary, shift, scale)


def s2_attention(q, k, v, *, group_size, boundary="split", shift="half", cu_seqlens=None, scale=None):
    """q [B,T,H,D], k and v [B,T,K,D], float32, bfloat16 or float16 -> out [B,T,H,D]. LongLoRA (arXiv 2309.12307) section 3.2.

    group_size, boundary and shift as in longlora.ops.s2_attention_forward. cu_seqlens, int32, packs documents: [S] for B = 1,
    or [B,S], rows 0, ..., T that may repeat T. ValueError names a wrong shape, TypeError a wrong dtype.
    """
    return s2_attention_with_lse(
        q, k, v, group_size=group_size, boundary=boundary, shift=shift, cu_seqlens=cu_seqlens, scale=scale
    )[0]


# ---- RMSNorm


def _rms_norm_forward(x, weight, eps):
    out, rstd = _like(x), _floats(x, *x.shape[:-1])
    _C.rms_norm_forward(_rows(out), _flat(rstd), None, _rows(x), None, _dense(weight), eps)
    return out, rstd


def _add_rms_norm_forward(x, residual, weight, eps):
    out, rstd, total = _like(x), _floats(x, *x.shape[:-1]), _like(x)
    _C.rms_norm_forward(_rows(out), _flat(rstd), _rows(total), _rows(x), _rows(residual), _dense(weight), eps)
    return out, rstd, total


def _rms_norm_backward(dout, x, rstd, weight, dresidual, train_weight):
    dx, dweight = _like(x), torch.zeros_like(weight, dtype=torch.float32) if train_weight else _floats(x, 0)
    _C.rms_norm_backward(
        _rows(dx),
        dweight if train_weight else None,
        _rows(dout),
        _rows(x),
        _flat(rstd),
        _dense(weight),
        _rows(dresidual),
    )
    return dx, dweight


def _save_norm(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    x, weight = inputs[0], inputs[-2]
    ctx.save_for_backward(output[2] if len(output) > 2 else x, output[1], weight)


def _grad_norm(ctx, dout, drstd):
    if dout is None:
        return None, None, None
    x, rstd, weight = ctx.saved_tensors
    dx, dweight = _call.rms_norm_backward(dout, x, rstd, weight, None, ctx.needs_input_grad[1])
    return dx, _wanted(ctx, 1, dweight, weight), None


def _grad_add_norm(ctx, dout, drstd, dsum):
    x, rstd, weight = ctx.saved_tensors
    if dout is None:
        return dsum, dsum, None, None
    dx, dweight = _call.rms_norm_backward(dout, x, rstd, weight, dsum, ctx.needs_input_grad[2])
    return dx, dx, _wanted(ctx, 2, dweight, weight), None


def _rstd_of(x):
    return x.new_empty(x.shape[:-1], dtype=torch.float32)


_register(
    "rms_norm_forward(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    _rms_norm_forward,
    lambda x, weight, eps: (x.new_empty(x.shape), _rstd_of(x)),
    _grad_norm,
    _save_norm,
    torch.float32,
)
_register(
    "add_rms_norm_forward(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
    _add_rms_norm_forward,
    lambda x, residual, weight, eps: (x.new_empty(x.shape), _rstd_of(x), x.new_empty(x.shape)),
    _grad_add_norm,
    _save_norm,
    torch.float32,
)
_register(
    "rms_norm_backward(Tensor dout, Tensor x, Tensor rstd, Tensor weight, Tensor? dresidual, bool train_weight) -> "
    "(Tensor, Tensor)",
    _rms_norm_backward,
    lambda dout, x, rstd, weight, dresidual, train_weight: (
        x.new_empty(x.shape),
        x.new_empty(weight.shape if train_weight else (0,), dtype=torch.float32),
    ),
)


def rms_norm(x, weight, eps=1e-6, residual=None):
    """x [...,C], weight [C] -> x / sqrt(mean(x^2) + eps) weight; with residual [...,C] of x + residual, and that sum as well."""
    if residual is None:
        return _call.rms_norm_forward(x, weight, eps)[0]
    if residual.shape != x.shape:
        raise ValueError(
            f"rms_norm: residual should have x's shape {list(x.shape)}, got {list(residual.shape)}"
        )
    out, _, total = _call.add_rms_norm_forward(x, residual, weight, eps)
    return out, total


# ---- rotary embedding


def _rope_forward(x, cos, sin, positions):
    out = _like(x)
    _C.rope_forward(out, _dense(x), _dense(cos), _dense(sin), positions)
    return out


def _rope_backward(dout, cos, sin, positions):
    dx = _like(dout)
    _C.rope_backward(dx, _dense(dout), _dense(cos), _dense(sin), positions)
    return dx


def _save_rope(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


_register(
    "rope_forward(Tensor x, Tensor cos, Tensor sin, Tensor? positions) -> Tensor",
    _rope_forward,
    lambda x, *tables: x.new_empty(x.shape),
    lambda ctx, dout: (_call.rope_backward(dout, *ctx.saved_tensors), None, None, None),
    _save_rope,
    torch.float32,
)
_register(
    "rope_backward(Tensor dout, Tensor cos, Tensor sin, Tensor? positions) -> Tensor",
    _rope_backward,
    lambda dout, *tables: dout.new_empty(dout.shape),
    lambda ctx, ddx: (_call.rope_forward(ddx, *ctx.saved_tensors), None, None, None),
    _save_rope,
)


def rope(x, cos, sin, positions=None):
    """x [B,T,H,D], cos and sin [P,D/2] float32, positions [B,T] int32 or None (0..T-1) -> out [B,T,H,D]. Rotate-half form."""
    return _call.rope_forward(x, cos, sin, positions)


# ---- linear with LoRA


def _lora_linear_forward(x, weight, bias, a, b, scale):
    shape = x.shape[:-1]
    out = x.new_empty(*shape, weight.shape[0])
    u = _floats(x, 0) if a is None else _floats(x, *shape, a.shape[0])
    _C.lora_linear_forward(
        _rows(out),
        None if a is None else _rows(u),
        _rows(x),
        _dense(weight),
        _dense(bias),
        _dense(a),
        _dense(b),
        None,
        scale,
    )
    return out, u


def _lora_linear_backward(dout, x, weight, a, b, u, scale, wanted):
    dx = _like(x) if wanted[0] else None
    da, db, dweight, dbias = (
        torch.zeros_like(of, dtype=torch.float32, memory_format=_contiguous)
        if want and of is not None
        else None
        for want, of in zip(wanted[1:], (a, b, weight, weight[:, 0] if wanted[4] else None))
    )
    _C.lora_linear_backward(
        _rows(dx),
        da,
        db,
        dweight,
        dbias,
        _rows(dout),
        _rows(x),
        _dense(weight),
        _dense(a),
        _dense(b),
        None if a is None else _rows(u),
        scale,
        0,
    )
    return tuple(x.new_empty(0) if grad is None else grad for grad in (dx, da, db, dweight, dbias))


def _shapes_lora_linear_backward(dout, x, weight, a, b, u, scale, wanted):
    shapes = (
        x.shape,
        None if a is None else a.shape,
        None if b is None else b.shape,
        weight.shape,
        weight.shape[:1],
    )
    return tuple(
        x.new_empty(0)
        if not want or shape is None
        else x.new_empty(shape, dtype=None if i == 0 else torch.float32)
        for i, (want, shape) in enumerate(zip(wanted, shapes))
    )


def _save_lora_linear(ctx, inputs, output):
    x, weight, bias, a, b, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.bias = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight, a, b, output[1])


def _grad_lora_linear(ctx, dout, du):
    x, weight, a, b, u = ctx.saved_tensors
    need = ctx.needs_input_grad
    dx, da, db, dweight, dbias = _call.lora_linear_backward(
        dout, x, weight, a, b, u, ctx.scale, [need[0], need[3], need[4], need[1], need[2]]
    )
    return (
        dx if need[0] else None,
        _wanted(ctx, 1, dweight, weight),
        dbias.to(ctx.bias) if need[2] else None,
        _wanted(ctx, 3, da, a),
        _wanted(ctx, 4, db, b),
        None,
    )


_register(
    "lora_linear_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? a, Tensor? b, float scale) -> (Tensor, Tensor)",
    _lora_linear_forward,
    lambda x, weight, bias, a, b, scale: (
        x.new_empty((*x.shape[:-1], weight.shape[0])),
        x.new_empty((0,) if a is None else (*x.shape[:-1], a.shape[0]), dtype=torch.float32),
    ),
    _grad_lora_linear,
    _save_lora_linear,
    None,
)
_register(
    "lora_linear_backward(Tensor dout, Tensor x, Tensor weight, Tensor? a, Tensor? b, Tensor u, float scale, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _lora_linear_backward,
    _shapes_lora_linear_backward,
)


def lora_linear(x, weight, bias=None, a=None, b=None, scale=1.0):
    """x [...,C], weight [N,C], bias [N], a [R,C], b [N,R] -> x weight^T + bias + scale (x a^T) b^T [...,N] (arXiv 2106.09685).

    Of weight and bias a gradient is computed only when they require one.
    """
    return _call.lora_linear_forward(x, weight, bias, a, b, scale)[0]


# ---- SwiGLU


def _swiglu_forward(gate, up):
    out = _like(gate)
    _C.swiglu_forward(_rows(out), _rows(gate), _rows(up))
    return out


def _swiglu_backward(dout, gate, up):
    dgate, dup = _like(gate), _like(up)
    _C.swiglu_backward(_rows(dgate), _rows(dup), _rows(dout), _rows(gate), _rows(up))
    return dgate, dup


_register(
    "swiglu_forward(Tensor gate, Tensor up) -> Tensor",
    _swiglu_forward,
    lambda gate, up: gate.new_empty(gate.shape),
    lambda ctx, dout: _call.swiglu_backward(dout, *ctx.saved_tensors),
    lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    None,
)
_register(
    "swiglu_backward(Tensor dout, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    _swiglu_backward,
    lambda dout, gate, up: (gate.new_empty(gate.shape), up.new_empty(up.shape)),
)


def swiglu(gate, up):
    """gate and up [...,F] -> silu(gate) up."""
    return _call.swiglu_forward(gate, up)


# ---- linear layer and cross entropy


def _loss_forward(x, weight, targets, ignore_index):
    return ops.linear_cross_entropy_forward(_dense(x), _dense(weight), targets, ignore_index)


def _loss_backward(x, weight, targets, dlosses, ignore_index, train_weight):
    x, weight, dlosses = _dense(x), _dense(weight), _dense(dlosses)
    losses, dx = _floats(x, x.shape[0]), _like(x)
    dweight = x.new_zeros(weight.shape if train_weight else 0, dtype=torch.float32)
    _C.linear_cross_entropy_backward(
        losses, dx, dweight if train_weight else None, x, weight, targets, dlosses, ignore_index
    )
    return losses, dx, dweight


def _loss_and_gradients(x, weight, targets, ignore_index, mean, train_weight):
    counted = targets != ignore_index
    scale = 1 / counted.sum() if mean else torch.ones((), device=x.device)
    losses, dx, dweight = _loss_backward(
        x, weight, targets, (counted * scale).float(), ignore_index, train_weight
    )
    return (losses.double().sum() * scale).float(), dx, dweight


def _save_losses(ctx, inputs, output):
    x, weight, targets, ctx.ignore_index = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, targets)


def _grad_losses(ctx, dlosses, dlse):
    x, weight, targets = ctx.saved_tensors
    _, dx, dweight = _call.linear_cross_entropy_backward(
        x, weight, targets, dlosses, ctx.ignore_index, ctx.needs_input_grad[1]
    )
    return dx, _wanted(ctx, 1, dweight, weight), None, None


def _save_loss(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])
    ctx.dtype = inputs[1].dtype


def _grad_loss(ctx, dloss, *unused):
    dx, dweight = ctx.saved_tensors
    return (
        (dx * dloss).to(dx.dtype),
        (dweight * dloss).to(ctx.dtype) if ctx.needs_input_grad[1] else None,
        None,
        None,
        None,
        None,
    )


def _weight_shape(weight, train_weight):
    return weight.new_empty(weight.shape if train_weight else (0,), dtype=torch.float32)


_register(
    "linear_cross_entropy_forward(Tensor x, Tensor weight, Tensor targets, SymInt ignore_index) -> (Tensor, Tensor)",
    _loss_forward,
    lambda x, weight, targets, ignore_index: (_rstd_of(x), _rstd_of(x)),
    _grad_losses,
    _save_losses,
    None,
)
_register(
    "linear_cross_entropy_backward(Tensor x, Tensor weight, Tensor targets, Tensor dlosses, SymInt ignore_index, "
    "bool train_weight) -> (Tensor, Tensor, Tensor)",
    _loss_backward,
    lambda x, weight, targets, dlosses, ignore_index, train_weight: (
        _rstd_of(x),
        x.new_empty(x.shape),
        _weight_shape(weight, train_weight),
    ),
)
_register(
    "linear_cross_entropy_step(Tensor x, Tensor weight, Tensor targets, SymInt ignore_index, bool mean, bool train_weight) "
    "-> (Tensor, Tensor, Tensor)",
    _loss_and_gradients,
    lambda x, weight, targets, ignore_index, mean, train_weight: (
        x.new_empty((), dtype=torch.float32),
        x.new_empty(x.shape),
        _weight_shape(weight, train_weight),
    ),
    _grad_loss,
    _save_loss,
    None,
)


def linear_cross_entropy(x, weight, targets, ignore_index=ops.IGNORE, reduction="mean"):
    """Cross entropy of the logits x weight^T, which never exist whole. x [...,C], weight [V,C], targets [...] integers.

    reduction "mean" over the targets that are not ignored, "sum", or "none" ([...] float32). float32. With "mean" and "sum"
    the gradients are computed together with the loss, which saves one of four matrix products.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(
            f"linear_cross_entropy: reduction should be one of mean, sum, none, got {reduction!r}"
        )
    rows, flat = x.reshape(-1, x.shape[-1]), targets.reshape(-1).to(torch.int32)
    if (
        reduction != "none"
        and x.dtype != torch.float16  # whose gradients want the loss scale first
        and torch.is_grad_enabled()
        and (x.requires_grad or weight.requires_grad)
    ):
        return _call.linear_cross_entropy_step(
            rows, weight, flat, ignore_index, reduction == "mean", weight.requires_grad
        )[0]
    losses = _call.linear_cross_entropy_forward(rows, weight, flat, ignore_index)[0]
    if reduction == "none":
        return losses.view(targets.shape)
    return losses.sum() / (flat != ignore_index).sum() if reduction == "mean" else losses.sum()


# ---- embedding


def _save_embedding(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])
    ctx.rows, ctx.dtype = inputs[0].shape[0], inputs[0].dtype


def _grad_embedding(ctx, dout):
    (ids,) = ctx.saved_tensors
    return _call.embedding_backward(dout, ids, ctx.rows).to(ctx.dtype), None


_register(
    "embedding_forward(Tensor weight, Tensor ids) -> Tensor",
    lambda weight, ids: ops.embedding_forward(_dense(weight), ids),
    lambda weight, ids: weight.new_empty((ids.shape[0], weight.shape[1])),
    _grad_embedding,
    _save_embedding,
)
_register(
    "embedding_backward(Tensor dout, Tensor ids, SymInt rows) -> Tensor",
    lambda dout, ids, rows: ops.embedding_backward(
        _dense(dout), ids, torch.argsort(ids, stable=True).to(torch.int32), rows
    ),
    lambda dout, ids, rows: dout.new_empty((rows, dout.shape[1]), dtype=torch.float32),
)


def embedding(weight, ids):
    """weight [V,C], ids [...] integers -> rows [...,C]. The gradient adds the rows of one id in a fixed order."""
    return _call.embedding_forward(weight, ids.reshape(-1).to(torch.int32)).view(*ids.shape, weight.shape[1])


# ---- matrix product, conversion, sums, the optimizer


def _save_matmul(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])
    ctx.alpha = inputs[2]


def _grad_matmul(ctx, dout):
    a, b = ctx.saved_tensors
    need = ctx.needs_input_grad
    return (
        _call.matmul(dout, b.t(), ctx.alpha) if need[0] else None,
        _call.matmul(a.t(), dout, ctx.alpha) if need[1] else None,
        None,
    )


def _save_dtype(ctx, inputs, output):
    ctx.dtype = inputs[0].dtype


def _name(dtype):
    return str(dtype).removeprefix("torch.")


_register(
    "matmul(Tensor a, Tensor b, float alpha) -> Tensor",
    lambda a, b, alpha: ops.matmul(a, b, alpha),
    lambda a, b, alpha: a.new_empty((a.shape[0], b.shape[1])),
    _grad_matmul,
    _save_matmul,
    None,
)
_register(
    "cast(Tensor x, ScalarType dtype) -> Tensor",
    lambda x, dtype: ops.cast(_dense(x), _name(dtype)),
    lambda x, dtype: x.new_empty(x.shape, dtype=dtype),
    lambda ctx, dout: (_call.cast(dout, ctx.dtype), None),
    _save_dtype,
)
_register(
    "accumulate_(Tensor(a!) out, Tensor x, float scale) -> ()",
    lambda out, x, scale: _C.accumulate(out, _dense(x), scale),
    lambda out, x, scale: None,
)
_register(
    "adamw_(Tensor(a!) param, Tensor(b!) m, Tensor(c!) v, Tensor grad, float lr, float beta1, float beta2, float eps, "
    "float weight_decay, SymInt step, float grad_scale) -> ()",
    lambda param, m, v, grad, *scalars: _C.adamw(param, m, v, None, grad, *scalars),
    lambda *unused: None,
)


def _sum_squares(x):
    total = torch.zeros(1, dtype=torch.float64, device=x.device)
    _C.sum_squares(total, x)
    return total


_register("sum_squares(Tensor x) -> Tensor", _sum_squares, lambda x: x.new_empty(1, dtype=torch.float64))
