"""How a kernel is judged: against the float64 reference, on the same rounded inputs, with at most twice the error of the plain
computation (the reference's formulas in float32, results rounded to the dtype), its outputs NaN between guards before the call."""

import ml_dtypes
import numpy as np
import reference

import longlora.cuda
import longlora.ops as ops

f64 = reference.f64
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
EPS = {
    np.dtype(np.float32): 2.0**-24,
    np.dtype(ml_dtypes.bfloat16): 2.0**-9,
    np.dtype(np.float16): 2.0**-12,
    np.dtype(np.float64): 2.0**-53,
}
GUARD = 12345.0
CUDA = longlora.cuda.is_available()
EMULATED = CUDA and longlora.cuda.built_for() == "emulation"  # a GPU that is a program: small work is enough


def examples(n):
    """Of hypothesis: a third of them where the GPU is emulated."""
    return n // 3 if EMULATED else n


def random(shape, dtype="float32", seed=0, scale=1.0):
    """Normal numbers, rounded to dtype."""
    return (np.random.default_rng([seed, *shape]).standard_normal(shape) * scale).astype(DTYPES[dtype])


def strided(x, pad=3):
    """The same values as rows of a wider array: every axis but the last has gaps of GUARD."""
    wide = np.full((*x.shape[:-1], x.shape[-1] + pad), GUARD, x.dtype)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def dense_and_strided(call, *arrays):
    """call on dense arrays, then on rows of wider ones -> what the dense ones gave, a tuple. The bits are the same: rows of whole
    vectors, which kernels may move 16 bytes at a time, and rows that are not."""
    dense = as_tuple(call(*arrays))
    apart = as_tuple(call(*[strided(x) if x is not None and x.ndim > 1 else x for x in arrays]))
    for a, b in zip(dense, apart):
        assert a.tobytes() == b.tobytes()
    return dense


class Outputs:
    """Stands in for arrays.empty: outputs full of NaN (integers: -7), strided, in the middle of a guarded buffer."""

    def __init__(self):
        self.given = []

    def empty(self, shape, dtype, like):
        dtype, shape = np.dtype(DTYPES.get(dtype, dtype)), tuple(shape)
        pitch = (shape[-1] + (3 if len(shape) > 1 else 0)) if shape else 1
        rows = int(np.prod(shape[:-1]))
        buffer = np.full(rows * pitch + 64, GUARD).astype(dtype)
        view = buffer[32 : 32 + rows * pitch].reshape(*shape[:-1], pitch)[..., : shape[-1] if shape else 1]
        view[...] = np.nan if dtype.kind in "fV" else -7
        self.given.append((buffer, view, pitch))
        return view

    def assert_guards(self):
        for buffer, view, pitch in self.given:
            touched = buffer.copy()
            inner = touched[32 : len(touched) - 32].reshape(*view.shape[:-1], pitch)
            inner[..., : view.shape[-1]] = GUARD
            assert (touched.astype(np.float64) == float(np.array(GUARD).astype(buffer.dtype))).all(), (
                "an op wrote outside its output"
            )


def poisoned(monkeypatch):
    """From here on every output of longlora.ops is poisoned and guarded -> Outputs."""
    outputs = Outputs()
    monkeypatch.setattr(ops, "empty", outputs.empty)
    monkeypatch.setattr(ops, "empty_like", lambda x: outputs.empty(x.shape, x.dtype, x))

    def zeros(shape, dtype, like):
        out = outputs.empty(shape, dtype, like)
        out[...] = 0
        return out

    monkeypatch.setattr(ops, "zeros", zeros)
    return outputs


def as_tuple(x):
    return x if isinstance(x, tuple) else (x,)


def compare(got, want, plain, name="", floor=2.0, noise=0.0):
    """Errors against `want` of what was got: at most twice the plain one's, plus `floor` roundings of the largest value, or `noise`
    where that is more: what sums that cancel have from their terms."""
    got = np.asarray(got)
    assert got.shape == want.shape, f"{name}: shape {got.shape}, wanted {want.shape}"
    if not want.size:
        return
    ours = np.abs(got.astype(np.float64) - want)
    theirs = np.abs(plain.astype(got.dtype).astype(np.float64) - want)
    limit = (
        2 * theirs.max() + max(floor * EPS[got.dtype] * np.abs(want).max(), noise) + floor * 2.0**-24 * 1e-3
    )
    assert ours.max() <= limit, (
        f"{name}: error {ours.max():.3g} is above {limit:.3g} (plain: {theirs.max():.3g})"
    )


def plain(name, *inputs, **kwargs):
    """The reference's formulas in float32."""
    reference.PRECISION = np.float32
    try:
        return as_tuple(getattr(reference, name)(*inputs, **kwargs))
    finally:
        reference.PRECISION = np.float64


def check(name, *inputs, floor=2.0, noise=None, **kwargs):
    """longlora.ops.<name> against reference.<name> on the same inputs -> what the op returned. floor: compare's, or one a result;
    noise: compare's, one a result."""
    got = as_tuple(getattr(ops, name)(*inputs, **kwargs))
    want, low = as_tuple(getattr(reference, name)(*inputs, **kwargs)), plain(name, *inputs, **kwargs)
    assert len(got) == len(want)
    for i, (g, w, p) in enumerate(zip(got, want, low)):
        assert (g is None) == (w is None), f"{name}[{i}]"
        if w is not None:
            compare(
                g,
                np.asarray(w, np.float64),
                np.asarray(p),
                f"{name}[{i}]",
                floor[i] if isinstance(floor, tuple) else floor,
                noise[i] if noise else 0.0,
            )
    return got if len(got) > 1 else got[0]
