"""RMSNorm, alone and with a residual that is added first."""

import torch
from torch import Tensor

from longlora import _C
from longlora.torch.ops.layout import cast_gradient, dense, flat, new_floats, new_like, rows
from longlora.torch.ops.register import register


def _rms_norm_forward(x, weight, eps):
    out, rstd = new_like(x), new_floats(x, *x.shape[:-1])
    _C.rms_norm_forward(rows(out), flat(rstd), None, rows(x), None, dense(weight), eps)
    return out, rstd


def _add_rms_norm_forward(x, residual, weight, eps):
    out, rstd, total = new_like(x), new_floats(x, *x.shape[:-1]), new_like(x)
    _C.rms_norm_forward(rows(out), flat(rstd), rows(total), rows(x), rows(residual), dense(weight), eps)
    return out, rstd, total


def _rms_norm_backward(dout, x, rstd, weight, dresidual, train_weight):
    dx = new_like(x)
    dweight = torch.zeros_like(weight, dtype=torch.float32) if train_weight else None
    _C.rms_norm_backward(rows(dx), dweight, rows(dout), rows(x), flat(rstd), dense(weight), rows(dresidual))
    return dx, dweight if train_weight else new_floats(x, 0)


def _save_norm(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    x, weight = inputs[0], inputs[-2]
    ctx.save_for_backward(output[2] if len(output) > 2 else x, output[1], weight)


def _grad_norm(ctx, dout, drstd):
    if dout is None:
        return None, None, None
    x, rstd, weight = ctx.saved_tensors
    dx, dweight = rms_norm_backward(dout, x, rstd, weight, None, ctx.needs_input_grad[1])
    return dx, cast_gradient(ctx, 1, dweight, weight), None


def _grad_add_norm(ctx, dout, drstd, dtotal):
    x, rstd, weight = ctx.saved_tensors
    if dout is None:
        return dtotal, dtotal, None, None
    dx, dweight = rms_norm_backward(dout, x, rstd, weight, dtotal, ctx.needs_input_grad[2])
    return dx, dx, cast_gradient(ctx, 2, dweight, weight), None


def _rstd_of(x):
    return x.new_empty(x.shape[:-1], dtype=torch.float32)


rms_norm_forward = register(
    "rms_norm_forward(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    _rms_norm_forward,
    lambda x, weight, eps: (x.new_empty(x.shape), _rstd_of(x)),
    backward=_grad_norm,
    save=_save_norm,
    autocast=torch.float32,
)
add_rms_norm_forward = register(
    "add_rms_norm_forward(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
    _add_rms_norm_forward,
    lambda x, residual, weight, eps: (x.new_empty(x.shape), _rstd_of(x), x.new_empty(x.shape)),
    backward=_grad_add_norm,
    save=_save_norm,
    autocast=torch.float32,
)
rms_norm_backward = register(
    "rms_norm_backward(Tensor dout, Tensor x, Tensor rstd, Tensor weight, Tensor? dresidual, "
    "bool train_weight) -> (Tensor, Tensor)",
    _rms_norm_backward,
    lambda dout, x, rstd, weight, dresidual, train_weight: (
        x.new_empty(x.shape),
        x.new_empty(weight.shape if train_weight else (0,), dtype=torch.float32),
    ),
)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise x [...,C] -> x / sqrt(mean(x²) + eps) weight, of x's shape. RMSNorm, arXiv 1910.07467.

    weight [C]. With residual [...,C], x + residual is normalised -> out, x + residual. ValueError where the
    residual has another shape than x.
    """
    if residual is None:
        return rms_norm_forward(x, weight, eps)[0]
    if residual.shape != x.shape:
        raise ValueError(
            f"rms_norm: residual should have x's shape {list(x.shape)}, got {list(residual.shape)}"
        )
    out, _, total = add_rms_norm_forward(x, residual, weight, eps)
    return out, total
