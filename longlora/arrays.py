"""Results in the caller's own kind: NumPy in, NumPy out; torch in, torch out; imports none of the others."""

import functools
import sys

import numpy as np

from longlora import Tensor

DTYPES = ("float32", "bfloat16", "float16", "float64", "int32", "int64", "uint8")


@functools.cache
def _name(dtype):
    return str(dtype).rpartition(".")[2]


def dtype_name(x):
    """The name of x's dtype in our words, whatever library x comes from."""
    return _name(x.dtype)


def _is_torch(x):
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def _is_cupy(x):
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(x, cupy.ndarray)


def empty(shape, dtype, like):
    """An uninitialised array of `shape` that ops can write to, of the kind and on the device of `like`; dtype a name of DTYPES.

    A Tensor for kinds other than NumPy, torch and CuPy, whose arrays may be immutable (JAX): `give_back` makes it theirs.
    """
    if isinstance(like, np.ndarray):
        if dtype == "bfloat16":
            import ml_dtypes

            return np.empty(shape, ml_dtypes.bfloat16)
        return np.empty(shape, dtype)
    if _is_torch(like):
        torch = sys.modules["torch"]
        return torch.empty(shape, dtype=getattr(torch, dtype), device=like.device)
    if isinstance(like, Tensor):
        return Tensor(shape, dtype, like.device)
    if _is_cupy(like) and dtype != "bfloat16":  # which CuPy has not
        cupy = sys.modules["cupy"]
        with like.device:
            return cupy.empty(shape, dtype)
    if hasattr(like, "__dlpack__"):
        kind, index = like.__dlpack_device__() if hasattr(like, "__dlpack_device__") else (1, 0)
        return Tensor(shape, dtype, f"cuda:{index}" if kind == 2 else "cpu")
    raise TypeError(
        f"wanted an array (NumPy, torch, longlora.Tensor or another that speaks DLPack), got {type(like).__name__}"
    )


def zeros(shape, dtype, like):
    out = empty(shape, dtype, like)
    if isinstance(out, Tensor):
        out.fill(0)
    else:
        out[...] = 0
    return out


def empty_like(x):
    if type(x) is np.ndarray:
        return np.empty(x.shape, x.dtype)
    return empty(tuple(x.shape), dtype_name(x), x)


def give_back(like, *results):
    """The results, each None or made by `empty(..., like)`, as arrays of like's own kind, without a copy; one alone as itself.

    The way back is from_dlpack of the array API that `like` belongs to; without one the results stay Tensors.
    """
    if (
        not isinstance(like, (np.ndarray, Tensor))
        and not _is_torch(like)
        and hasattr(like, "__array_namespace__")
    ):
        library = like.__array_namespace__()
        results = tuple(library.from_dlpack(x) if isinstance(x, Tensor) else x for x in results)
    return results if len(results) > 1 else results[0]
