"""The two ends of a model: the embedding, and the head's matrix product with the cross entropy."""

import torch
from torch import Tensor

from longlora import _C, ops
from longlora.torch.ops.layout import cast_gradient, dense, new_floats, new_like
from longlora.torch.ops.register import AUTOCAST_DTYPE, register

REDUCTIONS = ("mean", "sum", "none")

# ---- linear layer and cross entropy


def _loss_forward(x, weight, targets, ignore_index):
    return ops.linear_cross_entropy_forward(dense(x), dense(weight), targets, ignore_index)


def _loss_backward(x, weight, targets, dlosses, ignore_index, train_weight):
    x, weight, dlosses = dense(x), dense(weight), dense(dlosses)
    losses, dx = new_floats(x, x.shape[0]), new_like(x)
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
    _, dx, dweight = linear_cross_entropy_backward(
        x, weight, targets, dlosses, ctx.ignore_index, ctx.needs_input_grad[1]
    )
    return dx, cast_gradient(ctx, 1, dweight, weight), None, None


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


def _floats_of_rows(x):
    return x.new_empty(x.shape[:-1], dtype=torch.float32)


def _weight_gradient(weight, train_weight):
    return weight.new_empty(weight.shape if train_weight else (0,), dtype=torch.float32)


linear_cross_entropy_forward = register(
    "linear_cross_entropy_forward(Tensor x, Tensor weight, Tensor targets, SymInt ignore_index) "
    "-> (Tensor, Tensor)",
    _loss_forward,
    lambda x, weight, targets, ignore_index: (_floats_of_rows(x), _floats_of_rows(x)),
    backward=_grad_losses,
    save=_save_losses,
    autocast=AUTOCAST_DTYPE,
)
linear_cross_entropy_backward = register(
    "linear_cross_entropy_backward(Tensor x, Tensor weight, Tensor targets, Tensor dlosses, "
    "SymInt ignore_index, bool train_weight) -> (Tensor, Tensor, Tensor)",
    _loss_backward,
    lambda x, weight, targets, dlosses, ignore_index, train_weight: (
        _floats_of_rows(x),
        x.new_empty(x.shape),
        _weight_gradient(weight, train_weight),
    ),
)
linear_cross_entropy_step = register(
    "linear_cross_entropy_step(Tensor x, Tensor weight, Tensor targets, SymInt ignore_index, bool mean, "
    "bool train_weight) -> (Tensor, Tensor, Tensor)",
    _loss_and_gradients,
    lambda x, weight, targets, ignore_index, mean, train_weight: (
        x.new_empty((), dtype=torch.float32),
        x.new_empty(x.shape),
        _weight_gradient(weight, train_weight),
    ),
    backward=_grad_loss,
    save=_save_loss,
    autocast=AUTOCAST_DTYPE,
)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = ops.IGNORE, reduction: str = "mean"
) -> Tensor:
    """Cross entropy of the logits x weight^T, in nats -> float32. The logits never exist whole.

    x [...,C], weight [V,C], targets [...] integers; targets equal to ignore_index do not count. reduction:
    "mean" over the targets that count, "sum", or "none" -> [...]. ValueError for another reduction. With
    "mean" and "sum" the gradients are computed together with the loss, which saves one of four matrix
    products.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"linear_cross_entropy: reduction should be one of {', '.join(REDUCTIONS)}, got {reduction!r}"
        )
    rows, flat = x.reshape(-1, x.shape[-1]), targets.reshape(-1).to(torch.int32)
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if (
        reduction != "none"
        and dtype != torch.float16  # its gradients need the scale of the loss first
        and torch.is_grad_enabled()
        and (x.requires_grad or weight.requires_grad)
    ):
        return linear_cross_entropy_step(
            rows, weight, flat, ignore_index, reduction == "mean", weight.requires_grad
        )[0]
    losses = linear_cross_entropy_forward(rows, weight, flat, ignore_index)[0]
    if reduction == "none":
        return losses.view(targets.shape)
    return losses.sum() / (flat != ignore_index).sum() if reduction == "mean" else losses.sum()


# ---- embedding


def _save_embedding(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])
    ctx.rows, ctx.dtype = inputs[0].shape[0], inputs[0].dtype


def _grad_embedding(ctx, dout):
    (ids,) = ctx.saved_tensors
    return embedding_backward(dout, ids, ctx.rows).to(ctx.dtype), None


embedding_forward = register(
    "embedding_forward(Tensor weight, Tensor ids) -> Tensor",
    lambda weight, ids: ops.embedding_forward(dense(weight), ids),
    lambda weight, ids: weight.new_empty((ids.shape[0], weight.shape[1])),
    backward=_grad_embedding,
    save=_save_embedding,
)
embedding_backward = register(
    "embedding_backward(Tensor dout, Tensor ids, SymInt rows) -> Tensor",
    lambda dout, ids, rows: ops.embedding_backward(
        dense(dout), ids, torch.argsort(ids, stable=True).to(torch.int32), rows
    ),
    lambda dout, ids, rows: dout.new_empty((rows, dout.shape[1]), dtype=torch.float32),
)


def embedding(weight: Tensor, ids: Tensor) -> Tensor:
    """Gather the rows ids [...], integers, of weight [V,C] -> [...,C]. ValueError for an id outside 0..V-1.

    The gradient sums the rows of one id in a fixed order.
    """
    return embedding_forward(weight, ids.reshape(-1).to(torch.int32)).view(*ids.shape, weight.shape[1])
