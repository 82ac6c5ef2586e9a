"""Results in the caller's own kind: NumPy in, NumPy out; torch in, torch out. Imports none of the other libraries.

Arrays that cannot be written to (JAX) or that we do not allocate (CuPy and whatever else speaks DLPack) get longlora.Tensors
for outputs, which `returned` hands over without a copy.
"""
import functools
import sys

import numpy as np

from ._C import Tensor


def dtype_name(x):
    """The name of x's dtype in our words, whatever library x comes from."""
    return str(x.dtype).rpartition(".")[2]


def empty(shape, dtype, like):
    """An uninitialised array of `shape`, of the kind and on the device of `like`; dtype is a name: "float32", "bfloat16", ..."""
    if isinstance(like, np.ndarray):
        if dtype == "bfloat16":
            import ml_dtypes
            return np.empty(shape, ml_dtypes.bfloat16)
        return np.empty(shape, dtype)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(like, torch.Tensor):
        return torch.empty(tuple(shape), dtype=getattr(torch, dtype), device=like.device)
    if isinstance(like, Tensor) or hasattr(like, "__dlpack__"):
        return Tensor(tuple(shape), dtype)
    raise TypeError(f"wanted an array of NumPy, torch, longlora.Tensor or another library with DLPack, got {type(like).__name__}")


def zeros(shape, dtype, like):
    """As empty, filled with 0."""
    out = empty(shape, dtype, like)
    if isinstance(out, np.ndarray):
        out.fill(0)
    elif isinstance(out, Tensor):
        out.fill(0)
    else:
        out.zero_()
    return out


def empty_like(x):
    return empty(tuple(x.shape), dtype_name(x), x)


def returned(op):
    """Decorates an op: Tensors made on behalf of another library's array come back as that library's, by its from_dlpack."""
    @functools.wraps(op)
    def call(first, *args, **kwargs):
        out = op(first, *args, **kwargs)
        if isinstance(first, (np.ndarray, Tensor)):
            return out
        return tuple(_handed_over(x, first) for x in out) if isinstance(out, tuple) else _handed_over(out, first)
    return call


def _handed_over(x, like):
    if not isinstance(x, Tensor):
        return x
    library = type(like).__module__.partition(".")[0]
    library = {"jaxlib": "jax"}.get(library, library)
    module = sys.modules.get("jax.numpy" if library == "jax" else library)
    return module.from_dlpack(x) if hasattr(module, "from_dlpack") else x
