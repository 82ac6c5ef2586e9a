"""Allocates results as arrays of the caller's library: NumPy in, NumPy out; torch in, torch out."""

import functools
import sys
from typing import Any

import numpy as np

from longlora import Tensor

DTYPES = ("float32", "bfloat16", "float16", "float64", "int32", "int64", "uint8")


@functools.cache
def _name(dtype: Any) -> str:
    return str(dtype).rpartition(".")[2]


def no_array(x: Any) -> TypeError:
    """The error for an argument that is not an array."""
    return TypeError(
        "wanted an array (NumPy, torch, longlora.Tensor or another that supports DLPack), "
        f"got {type(x).__name__}"
    )


def dtype_name(x: Any) -> str:
    """The name of x's dtype, one of DTYPES, for an array of any library. TypeError if x is not an array."""
    if not hasattr(x, "dtype"):
        raise no_array(x)
    return _name(x.dtype)


def shape(x: Any, name: str, axes: int = 0) -> tuple[int, ...]:
    """The shape of the argument `name`. TypeError if it is not an array, ValueError below `axes` axes."""
    if not hasattr(x, "shape"):
        raise TypeError(f"{name}: {no_array(x)}")
    if len(x.shape) < axes:
        wanted = "1 axis" if axes == 1 else f"{axes} axes"
        raise ValueError(f"{name} should have at least {wanted}, got {len(x.shape)}")
    return tuple(x.shape)


def _is_torch(x: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def _is_cupy(x: Any) -> bool:
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(x, cupy.ndarray)


def empty(shape: tuple[int, ...], dtype: str, like: Any) -> Any:
    """Allocate an uninitialised array for ops to write to, in the library and on the device of `like`.

    dtype is one of DTYPES. Arrays of libraries other than NumPy, torch and CuPy may be immutable (JAX's are).
    For these the result is a Tensor, which `give_back` converts. TypeError if `like` is not an array, and for
    bfloat16 in NumPy without ml_dtypes.
    """
    if isinstance(like, np.ndarray):
        if dtype == "bfloat16":
            try:
                import ml_dtypes
            except ModuleNotFoundError:
                raise TypeError(
                    "bfloat16 in NumPy needs the package ml_dtypes: pip install ml_dtypes"
                ) from None
            return np.empty(shape, ml_dtypes.bfloat16)
        return np.empty(shape, dtype)
    if _is_torch(like):
        torch = sys.modules["torch"]
        return torch.empty(shape, dtype=getattr(torch, dtype), device=like.device)
    if isinstance(like, Tensor):
        return Tensor(shape, dtype, like.device)
    if _is_cupy(like) and dtype != "bfloat16":  # CuPy has no bfloat16
        cupy = sys.modules["cupy"]
        with like.device:
            return cupy.empty(shape, dtype)
    if hasattr(like, "__dlpack__"):
        kind, index = like.__dlpack_device__() if hasattr(like, "__dlpack_device__") else (1, 0)
        return Tensor(shape, dtype, f"cuda:{index}" if kind == 2 else "cpu")
    raise no_array(like)


def zeros(shape: tuple[int, ...], dtype: str, like: Any) -> Any:
    """Like `empty`, but filled with 0."""
    out = empty(shape, dtype, like)
    if isinstance(out, Tensor):
        out.fill(0)
    else:
        out[...] = 0
    return out


def empty_like(x: Any, name: str, axes: int = 0) -> Any:
    """Like `empty`, with the shape and dtype of x, the argument `name`. Errors as for `shape`."""
    found = shape(x, name, axes)
    return np.empty(found, x.dtype) if type(x) is np.ndarray else empty(found, dtype_name(x), x)


def give_back(like: Any, *results: Any) -> Any:
    """Return the results as arrays of like's library, without a copy. A single result is returned by itself.

    Each result is None or was made by `empty(..., like)`. The from_dlpack of like's array API converts
    Tensors; if `like` has no array API, they stay Tensors.
    """
    if (
        not isinstance(like, (np.ndarray, Tensor))
        and not _is_torch(like)
        and hasattr(like, "__array_namespace__")
    ):
        library = like.__array_namespace__()
        results = tuple(library.from_dlpack(x) if isinstance(x, Tensor) else x for x in results)
    return results if len(results) > 1 else results[0]
