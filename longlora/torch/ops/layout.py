"""Tensors in the layouts that the kernels read, and new tensors for their results."""

import torch


def dense(x):
    """x, or a contiguous copy where its last axis is not dense. None stays None."""
    return x if x is None or x.is_contiguous() or x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def rows(x):
    """View x [...,C] as the kernels read rows: two to four axes; all but the last lie in memory as one."""
    if x is None or 2 <= x.ndim <= 4 and x.is_contiguous():
        return x
    return dense(x if x.ndim == 2 else x.reshape(-1, x.shape[-1]))


def flat(x):
    """View the statistics x [...] of rows: one to four axes."""
    return x if 1 <= x.ndim <= 4 else x.reshape(-1)


def new_like(x):
    """A new contiguous tensor of x's shape and dtype."""
    if x.is_contiguous():  # torch takes longer over a memory format
        return torch.empty_like(x)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def new_floats(x, *shape):
    """A new float32 tensor on x's device; a scalar without sizes."""
    return x.new_empty(*shape or ((),), dtype=torch.float32)  # torch reads sizes faster than a tuple of them


def cast_gradient(ctx, index, grad, like):
    """A float32 gradient in the dtype of its parameter; None where input `index` wants no gradient."""
    return grad.to(like.dtype) if ctx.needs_input_grad[index] else None
