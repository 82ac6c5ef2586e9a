"""Operators without a function of their own: conversion, sums and the optimizer's step."""

import torch

from longlora import _C, ops
from longlora.torch.ops.layout import dense
from longlora.torch.ops.register import register


def _save_dtype(ctx, inputs, output):
    ctx.dtype = inputs[0].dtype


def _save_factor(ctx, inputs, output):
    ctx.factor = inputs[1]


def _grad_scale(ctx, dout):
    return scale(dout, ctx.factor), None


def _grad_cast(ctx, dout):
    return cast(dout, ctx.dtype), None


def _sum_squares(x):
    total = torch.zeros(1, dtype=torch.float64, device=x.device)
    _C.sum_squares(total, x)
    return total


cast = register(
    "cast(Tensor x, ScalarType dtype) -> Tensor",
    lambda x, dtype: ops.cast(dense(x), str(dtype).removeprefix("torch.")),
    lambda x, dtype: x.new_empty(x.shape, dtype=dtype),
    backward=_grad_cast,
    save=_save_dtype,
)
scale = register(
    "scale(Tensor x, float scale) -> Tensor",
    lambda x, factor: ops.scale(dense(x), factor),
    lambda x, factor: x.new_empty(x.shape),
    backward=_grad_scale,
    save=_save_factor,
)
accumulate_ = register(
    "accumulate_(Tensor(a!) out, Tensor x, float scale) -> ()",
    lambda out, x, scale: _C.accumulate(out, dense(x), scale),
    lambda out, x, scale: None,
)
adamw_ = register(
    "adamw_(Tensor(a!) param, Tensor(b!) m, Tensor(c!) v, Tensor grad, float lr, float beta1, float beta2, "
    "float eps, float weight_decay, SymInt step, float grad_scale) -> ()",
    lambda param, m, v, grad, *scalars: _C.adamw(param, m, v, None, grad, *scalars),
    lambda *unused: None,
)
sum_squares = register(
    "sum_squares(Tensor x) -> Tensor", _sum_squares, lambda x: x.new_empty(1, dtype=torch.float64)
)
