"""How a kernel is judged: against the float64 reference, on the same rounded inputs, with at most twice the
error of the plain computation (the reference's formulas in float32, results rounded to the dtype), its
outputs NaN between guards before the call."""

import functools
import math

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


def fewer(n):
    """n, or a fifth of it where the GPU is emulated: examples, or a size that only blocks of the CPU need."""
    return -(-n // 5) if EMULATED else n


def random(shape, dtype="float32", seed=0, scale=1.0):
    """Normal numbers, rounded to dtype."""
    numbers = (kept_normal if math.prod(shape) <= 1 << 19 else normal)(tuple(shape), seed)
    return (numbers * scale).astype(DTYPES[dtype])


def normal(shape, seed):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


# Each dtype and each instruction set asks for the same numbers. Drawing them takes longer than many ops.
kept_normal = functools.lru_cache(maxsize=32)(normal)


def strided(x, pad=3):
    """The same values as rows of a wider array: every axis but the last has gaps of GUARD."""
    wide = np.full((*x.shape[:-1], x.shape[-1] + pad), GUARD, x.dtype)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def dense_and_strided(call, *arrays):
    """call on dense arrays, then on rows of wider ones -> what the dense ones gave, a tuple. The bits are the
    same: rows of whole vectors, which kernels may move 16 bytes at a time, and rows that are not."""
    dense = as_tuple(call(*arrays))
    apart = as_tuple(call(*[strided(x) if x is not None and x.ndim > 1 else x for x in arrays]))
    for a, b in zip(dense, apart):
        assert a.tobytes() == b.tobytes()
    return dense


class Outputs:
    """Stands in for arrays.empty: outputs full of NaN (integers: -7), strided, in the middle of a guarded
    buffer."""

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
    monkeypatch.setattr(ops, "empty_like", lambda x, *named: outputs.empty(x.shape, x.dtype, x))

    def zeros(shape, dtype, like):
        out = outputs.empty(shape, dtype, like)
        out[...] = 0
        return out

    monkeypatch.setattr(ops, "zeros", zeros)
    return outputs


def as_tuple(x):
    return x if isinstance(x, tuple) else (x,)


def walk(terms, squares):
    """The error that float32 sums of `terms` terms may have in any order. squares: the sums of their terms'
    squares.

    An addition rounds by at most u = 2^-24 of a partial sum, which grows like a random walk to about s, the
    root of the sum of squares. Independent roundings have a standard deviation of sqrt(terms / 6) u s in the
    worst order, one after the other: the limit is five of them. Roundings that all go one way (truncation)
    add up to terms u s, terms that are rounded to 16 bits to 2^-9 s: both stay visible.
    """
    return 2 * np.sqrt(terms) * 2.0**-24 * np.sqrt(np.max(squares, initial=0))


def _of_squares(name, terms):
    """For an op that sums products of its inputs: on squares, the op itself sums the squares of its terms."""

    def noise(*inputs, **kwargs):
        squares = [x if x is None or np.asarray(x).dtype.kind in "iu" else f64(x) ** 2 for x in inputs]
        found = as_tuple(getattr(reference, name)(*squares, **kwargs))
        return [x if x is None else walk(n, x) for n, x in zip(terms(*inputs), found)]

    return noise


def _norm_noise(dout, x, rstd, weight, dresidual=None):
    """dx is a difference. Where it cancels, its error is that of its terms: a sum of C and the products
    around it."""
    dout, x, rstd, weight = f64(dout), f64(x), f64(rstd)[:, None], f64(weight)
    C, g = x.shape[1], dout * weight
    squares = (rstd * g) ** 2 + (x * rstd**3) ** 2 * ((g * x) ** 2).sum(-1, keepdims=True) / max(C, 1) ** 2
    squares = squares + (0 if dresidual is None else f64(dresidual) ** 2)
    return [walk(C + 16, squares), walk(len(x), ((dout * x * rstd) ** 2).sum(0))]


def _rank(a):
    return 0 if a is None else len(a)


# By op: inputs -> the noise of each result. The functions count the terms of each result, and the terms of
# its terms.
NOISE = {
    "matmul": _of_squares("matmul", lambda a, b, *_: [a.shape[1]]),
    "lora_linear_forward": _of_squares(
        "lora_linear_forward",
        lambda x, weight, bias=None, a=None, *_: [x.shape[1] + _rank(a) + 2, x.shape[1]],
    ),
    "lora_linear_backward": _of_squares(
        "lora_linear_backward",
        lambda dout, x, weight, a=None, *_: [
            dout.shape[1] + _rank(a),
            len(x) + dout.shape[1],
            len(x) + x.shape[1],
            len(x),
            len(x),
        ],
    ),
    "embedding_backward": _of_squares(
        "embedding_backward", lambda dout, ids, *_: [np.bincount(ids, minlength=1).max()]
    ),
    "rms_norm_backward": _norm_noise,
}


def noise_of(name, *inputs, **kwargs):
    """-> functions, one a result, for compare's noise; None for an op that is not in NOISE."""
    if name not in NOISE:
        return None
    made = functools.lru_cache(lambda: NOISE[name](*inputs, **kwargs))
    return [functools.partial(lambda i: made()[i], i) for i in range(5)]


def compare(got, want, plain, name="", floor=2.0, noise=0.0):
    """The error of `got` against `want` is at most twice that of `plain`, plus `floor` roundings of the
    largest value or `noise`, whichever is more.

    The plain error of a few numbers, or of sums in a good order, may be next to nothing by chance, and values
    that cancel have little to round. `noise` depends on neither: it is what the terms of the sums round. It
    may be a function, which is called only where it decides.
    """
    got = np.asarray(got)
    assert got.shape == want.shape, f"{name}: shape {got.shape}, wanted {want.shape}"
    if not want.size:
        return
    ours = np.abs(got.astype(np.float64) - want)
    theirs = np.abs(plain.astype(got.dtype).astype(np.float64) - want)
    most, rounded = 2 * theirs.max() + floor * 2.0**-24 * 1e-3, floor * EPS[got.dtype] * np.abs(want).max()
    if callable(noise):
        noise = noise() if ours.max() > most + rounded else 0.0
    limit = most + max(rounded, noise)
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
    """longlora.ops.<name> against reference.<name> on the same inputs -> what the op returned. floor:
    compare's, or one a result; noise: compare's, one a result, by default noise_of's."""
    got, noise = as_tuple(getattr(ops, name)(*inputs, **kwargs)), noise or noise_of(name, *inputs, **kwargs)
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
