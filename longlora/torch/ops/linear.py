"""The linear layer with LoRA, SwiGLU and the plain matrix product."""

import torch
from torch import Tensor

from longlora import _C, ops
from longlora.torch.ops.layout import cast_gradient, dense, new_floats, new_like, rows
from longlora.torch.ops.register import AUTOCAST_DTYPE, register

# ---- linear layer with LoRA


def _lora_linear_forward(x, weight, bias, a, b, scale):
    shape = x.shape[:-1]
    out = x.new_empty(*shape, weight.shape[0])
    u = None if a is None else new_floats(x, *shape, a.shape[0])
    _C.lora_linear_forward(
        rows(out), rows(u), rows(x), dense(weight), dense(bias), dense(a), dense(b), None, scale
    )
    return out, new_floats(x, 0) if u is None else u


def _lora_linear_backward(dout, x, weight, a, b, u, scale, wanted):
    """wanted: whether to compute dx, da, db, dweight, dbias; an empty tensor stands for the others."""
    dx = new_like(x) if wanted[0] else None
    da, db, dweight, dbias = (
        torch.zeros_like(of, dtype=torch.float32, memory_format=torch.contiguous_format)
        if want and of is not None
        else None
        for want, of in zip(wanted[1:], (a, b, weight, weight[:, 0] if wanted[4] else None))
    )
    u = None if a is None else rows(u)
    inputs = rows(dout), rows(x), dense(weight), dense(a), dense(b), u
    _C.lora_linear_backward(rows(dx), da, db, dweight, dbias, *inputs, scale)
    return tuple(x.new_empty(0) if grad is None else grad for grad in (dx, da, db, dweight, dbias))


def _shapes_lora_linear_backward(dout, x, weight, a, b, u, scale, wanted):
    parameters = (
        None if a is None else a.shape,
        None if b is None else b.shape,
        weight.shape,
        weight.shape[:1],
    )
    grads = [x.new_empty(x.shape if wanted[0] else 0)]
    for want, shape in zip(wanted[1:], parameters):
        known = want and shape is not None
        grads.append(x.new_empty(shape, dtype=torch.float32) if known else x.new_empty(0))
    return tuple(grads)


def _save_lora_linear(ctx, inputs, output):
    x, weight, bias, a, b, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight, a, b, output[1])


def _grad_lora_linear(ctx, dout, du):
    x, weight, a, b, u = ctx.saved_tensors
    need = ctx.needs_input_grad
    dx, da, db, dweight, dbias = lora_linear_backward(
        dout, x, weight, a, b, u, ctx.scale, [need[0], need[3], need[4], need[1], need[2]]
    )
    return (
        dx if need[0] else None,
        cast_gradient(ctx, 1, dweight, weight),
        dbias.to(ctx.bias_dtype) if need[2] else None,
        cast_gradient(ctx, 3, da, a),
        cast_gradient(ctx, 4, db, b),
        None,
    )


lora_linear_forward = register(
    "lora_linear_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? a, Tensor? b, float scale) "
    "-> (Tensor, Tensor)",
    _lora_linear_forward,
    lambda x, weight, bias, a, b, scale: (
        x.new_empty((*x.shape[:-1], weight.shape[0])),
        x.new_empty((0,) if a is None else (*x.shape[:-1], a.shape[0]), dtype=torch.float32),
    ),
    backward=_grad_lora_linear,
    save=_save_lora_linear,
    autocast=AUTOCAST_DTYPE,
)
lora_linear_backward = register(
    "lora_linear_backward(Tensor dout, Tensor x, Tensor weight, Tensor? a, Tensor? b, Tensor u, float scale, "
    "bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _lora_linear_backward,
    _shapes_lora_linear_backward,
)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Linear layer with LoRA -> x weight^T + bias + scale (x a^T) b^T [...,N]. LoRA, arXiv 2106.09685.

    x [...,C], weight [N,C], bias [N], a [R,C], b [N,R]. The gradients of weight and bias are computed only if
    they require one.
    """
    return lora_linear_forward(x, weight, bias, a, b, scale)[0]


# ---- SwiGLU


def _swiglu_forward(gate, up):
    out = new_like(gate)
    _C.swiglu_forward(rows(out), rows(gate), rows(up))
    return out


def _grad_swiglu(ctx, dout):
    return swiglu_backward(dout, *ctx.saved_tensors)


def _swiglu_backward(dout, gate, up):
    dgate, dup = new_like(gate), new_like(up)
    _C.swiglu_backward(rows(dgate), rows(dup), rows(dout), rows(gate), rows(up))
    return dgate, dup


swiglu_forward = register(
    "swiglu_forward(Tensor gate, Tensor up) -> Tensor",
    _swiglu_forward,
    lambda gate, up: gate.new_empty(gate.shape),
    backward=_grad_swiglu,
    save=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    autocast=AUTOCAST_DTYPE,
)
swiglu_backward = register(
    "swiglu_backward(Tensor dout, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    _swiglu_backward,
    lambda dout, gate, up: (gate.new_empty(gate.shape), up.new_empty(up.shape)),
)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up, element by element, for gate and up [...,F] -> [...,F]. SwiGLU, arXiv 2002.05202."""
    return swiglu_forward(gate, up)


# ---- matrix product


def _save_matmul(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])
    ctx.alpha = inputs[2]


def _grad_matmul(ctx, dout):
    a, b = ctx.saved_tensors
    need = ctx.needs_input_grad
    return (
        matmul(dout, b.t(), ctx.alpha) if need[0] else None,
        matmul(a.t(), dout, ctx.alpha) if need[1] else None,
        None,
    )


matmul = register(
    "matmul(Tensor a, Tensor b, float alpha) -> Tensor",
    lambda a, b, alpha: ops.matmul(a, b, alpha),
    lambda a, b, alpha: a.new_empty((a.shape[0], b.shape[1])),
    backward=_grad_matmul,
    save=_save_matmul,
    autocast=AUTOCAST_DTYPE,
)
