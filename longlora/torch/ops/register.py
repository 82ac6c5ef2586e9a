"""Register a kernel as a torch operator, `torch.ops.longlora.NAME`, and make the function that calls it.

A gradient can be taken once: the gradient of a gradient raises RuntimeError.

The dispatcher enters Python twice for an operator that is written in Python. That costs 7 us a call, 13 us
with a gradient, and a tiny kernel takes far less. So the function runs kernel and backward itself wherever
the dispatcher would change nothing: plain tensors, no compiler, no autocast, no mode and no transform of
torch.func.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch._C import _is_any_autocast_enabled, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._functorch import peek_interpreter_stack
from torch.compiler import is_compiling

AUTOCAST_DTYPE = "autocast's own"  # the dtype that torch's matmul takes under autocast

_library = torch.library.Library("longlora", "DEF")
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
_OTHERS = frozenset((type(None), bool, int, float, str, list))  # the arguments that are not tensors


def register(
    schema: str,
    kernel: Callable[..., Any],
    shapes: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    save: Callable[..., None] | None = None,
    autocast: torch.dtype | str | None = None,
) -> Callable[..., Any]:
    """Register an operator -> the function that calls it.

    schema: "name(...) -> ...", as torch.library has it. shapes: makes empty results of the right shapes and
    dtypes, for torch.compile. save(ctx, inputs, output) and backward(ctx, *grads) are autograd's; operators
    that write to an argument have neither. autocast: the dtype that floating tensors get under autocast,
    AUTOCAST_DTYPE, or None to leave them as they are.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _library.impl(name, kernel, key)
    torch.library.register_fake(f"longlora::{name}", shapes, lib=_library)
    if autocast is not None:
        for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
            _library.impl(name, _autocast(name, autocast, device, key), key, with_keyset=True)
    operator = getattr(torch.ops.longlora, name).default
    if "!" in schema:
        return operator
    backward = backward or _once(name)
    torch.library.register_autograd(f"longlora::{name}", backward, setup_context=save, lib=_library)
    return _caller(operator, kernel, _function(name, kernel, backward, save))


def _autocast(name, dtype, device, key):
    """Cast the floating tensors of a call, as torch's matmul does under autocast. float64 stays."""

    def call(keyset, *args):
        to = torch.get_autocast_dtype(device) if dtype == AUTOCAST_DTYPE else dtype
        cast = [
            x.to(to)
            if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype != torch.float64
            else x
            for x in args
        ]
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))):
            return getattr(torch.ops.longlora, name).default(*cast)

    return call


def _once(name):
    def refuse(ctx, *unused):
        raise RuntimeError(f"longlora::{name}: the gradient of a gradient is not available")

    return refuse


def _function(name, kernel, backward, save):
    """The autograd function of kernel and backward -> its apply."""

    def forward(ctx, *args):
        output = kernel(*args)
        if save is not None:
            save(ctx, args, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function = type(name, (torch.autograd.Function,), methods)
    # The apply of the base class does not look for transforms of torch.func; _watched did.
    return super(torch.autograd.Function, function).apply


def _caller(operator, kernel, apply):
    """The function that calls the kernel: alone, with autograd, or through the dispatcher."""

    def call(*args):
        if _watched(args[0]):
            return operator(*args)
        differentiable = False
        for x in args:
            kind = type(x)
            if kind in _PLAIN:
                if x.is_neg():  # the dispatcher gives kernels what such a view stands for
                    return operator(*args)
                differentiable = differentiable or x.requires_grad
            elif kind not in _OTHERS:
                return operator(*args)
        if differentiable and torch.is_grad_enabled():
            return apply(*args)
        return kernel(*args)

    return call


def _watched(x):
    """Whether the dispatcher might run something else than the kernel of x's device."""
    return (
        is_compiling()
        or _is_any_autocast_enabled()
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or peek_interpreter_stack() is not None
        or not (x.is_cpu or x.is_cuda)
    )
