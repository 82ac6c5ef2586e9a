"""Results in the caller's own kind: NumPy in, NumPy out; torch in, torch out; imports none of the others."""
import numpy as np

DTYPES = ("float32", "bfloat16", "float16", "float64", "int32", "int64", "uint8")


def dtype_name(x):
    """The name of x's dtype in our words, whatever library x comes from."""
    return str(x.dtype).rpartition(".")[2]


def empty(shape, dtype, like):
    """An uninitialised array of `shape`, of the kind and on the device of `like`; dtype a name of DTYPES."""
    if isinstance(like, np.ndarray):
        if dtype == "bfloat16":
            import ml_dtypes
            return np.empty(shape, ml_dtypes.bfloat16)
        return np.empty(shape, dtype)
    raise TypeError(f"wanted an array of NumPy, torch, CuPy, JAX or longlora.Tensor, got {type(like).__name__}")


def zeros(shape, dtype, like):
    out = empty(shape, dtype, like)
    out[...] = 0
    return out


def empty_like(x):
    return empty(tuple(x.shape), dtype_name(x), x)
