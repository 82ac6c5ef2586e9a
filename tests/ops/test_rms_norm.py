"""rms_norm against the reference: shapes, dtypes, instruction sets, the fused residual, threads."""

import checks
import numpy as np
import pytest

from longlora import _C, ops

SHAPES = [(0, 8), (1, 1), (3, 7), (5, 123), (33, 64), (65, 576), (2, 0)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("residual", [False, True])
def test_forward_and_backward(shape, residual, dtype, isa, poison):
    x, weight = checks.strided(checks.random(shape, dtype)), checks.random(shape[1:], dtype, 1)
    extra = checks.random(shape, dtype, 2) if residual else None
    out, rstd, total = ops.rms_norm_forward(x, weight, 1e-5, extra)
    want, low = (
        checks.reference.rms_norm_forward(x, weight, 1e-5, extra),
        checks.plain("rms_norm_forward", x, weight, 1e-5, extra),
    )
    for name, got, w, p in zip(("out", "rstd", "sum"), (out, rstd, total), want, low, strict=True):
        if not (
            residual and dtype != "float32" and name != "sum"
        ):  # out and rstd belong to the stored sum, which is rounded
            checks.compare(got, w, p, name, floor=4)  # the mean, its root, the reciprocal, a product
    if residual:
        checks.compare(
            out,
            *(
                r("rms_norm_forward", total, weight, 1e-5)[0]
                for r in (lambda n, *a: getattr(checks.reference, n)(*a), checks.plain)
            ),
            "out from the stored sum",
            floor=4,
        )
    dout = checks.random(shape, dtype, 3)
    checks.check("rms_norm_backward", dout, total, np.asarray(rstd), weight, extra, floor=4)


def rows_of_any_length(M, C, dtype):
    """Sizes around those where the GPU kernel changes: part of a warp, a warp, a block, several blocks.

    The rounding error of a sequential sum of C squares grows like sqrt(C) / 3. rstd has half of it.
    """
    floor = 4 + C**0.5 / 6
    x, residual, dout, d = (checks.random((M, C), dtype, seed) for seed in range(4))
    weight = checks.random((C,), dtype, 4)
    out, _, total = checks.dense_and_strided(
        lambda x, r: ops.rms_norm_forward(x, weight, 1e-5, r), x, residual
    )
    assert total.tobytes() == (x.astype(np.float32) + residual.astype(np.float32)).astype(x.dtype).tobytes()
    checks.compare(
        out,
        checks.reference.rms_norm_forward(total, weight, 1e-5)[0],
        checks.plain("rms_norm_forward", total, weight, 1e-5)[0],
        floor=floor,
    )
    _, rstd, _ = checks.dense_and_strided(lambda x: ops.rms_norm_forward(x, weight, 1e-5), x)
    checks.check("rms_norm_forward", x, weight, 1e-5, floor=floor)
    for dresidual in (None, d):
        dx, dweight = checks.dense_and_strided(
            lambda *a: ops.rms_norm_backward(*a[:2], rstd, weight, a[2]), dout, x, dresidual
        )
        checks.check("rms_norm_backward", dout, x, rstd, weight, dresidual, floor=4)
    over, twice = dout.copy(), dweight.copy()
    _C.rms_norm_backward(over, twice, over, x, rstd, weight, d)
    assert over.tobytes() == dx.tobytes() and twice.tobytes() == (2 * dweight).tobytes()
    over = d.copy()
    _C.rms_norm_backward(over, None, dout, x, rstd, weight, over)
    assert over.tobytes() == dx.tobytes()


@pytest.mark.parametrize(
    "M,C",
    [(1, 8), (70, 16), (3, 24), (300, 64), (70, 128), (3, 136), (3, 256), (5, 520), (3, 1024), (70, 1032)],
)
def test_dense_and_strided_rows(M, C, dtype, isa):
    rows_of_any_length(M, C, dtype)


def test_long_rows(dtype, isa):
    for C in (4096, 16392, 33000):
        rows_of_any_length(3, C, dtype)


def test_the_stored_sum_is_rounded_to_nearest_even(dtype, isa):
    """Numbers of all kinds, infinities and NaN. They are few powers of two apart: many sums are ties."""
    kind, rng = np.dtype(checks.DTYPES[dtype]), np.random.default_rng(0)
    whole, fraction = {"float32": (np.uint32, 23), "bfloat16": (np.uint16, 7), "float16": (np.uint16, 10)}[
        dtype
    ]
    bits = rng.integers(0, np.iinfo(whole).max, (64, 1037), whole, endpoint=True)
    x, residual = (
        bits.view(kind),
        (bits - (rng.integers(0, 13, bits.shape, whole) << fraction).astype(whole)).view(kind),
    )
    with np.errstate(over="ignore", invalid="ignore"):
        want = (x.astype(np.float32) + residual.astype(np.float32)).astype(kind)
    _, _, total = ops.rms_norm_forward(x, np.ones(1037, kind), 1e-5, residual)
    kept = ~np.isnan(want.astype(np.float32))
    assert np.isnan(total.astype(np.float32))[~kept].all() and kept.any() and not kept.all()
    np.testing.assert_array_equal(total.view(whole)[kept], want.view(whole)[kept])


def test_more_rows_than_blocks_on_cuda(cuda):
    rows_of_any_length(600, 1032, "bfloat16")


def test_backward_in_place_and_accumulating(place):
    x, weight, dout = checks.random((9, 40)), checks.random((40,), seed=1), checks.random((9, 40), seed=2)
    _, rstd, _ = ops.rms_norm_forward(x, weight)
    want, dweight = ops.rms_norm_backward(dout, x, rstd, weight, dout)
    again, twice = dout.copy(), dweight.copy()
    _C.rms_norm_backward(again, twice, again, x, rstd, weight, again)
    np.testing.assert_array_equal(again, want)
    np.testing.assert_array_equal(twice, 2 * dweight)


def test_same_bits_for_any_number_of_threads(place, each_thread_count):
    x, weight, dout = checks.random((301, 96)), checks.random((96,), seed=1), checks.random((301, 96), seed=2)
    results = each_thread_count(
        lambda: ops.rms_norm_backward(dout, x, ops.rms_norm_forward(x, weight)[1], weight)
    )
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_residual_needs_a_sum(place):
    x, weight = checks.random((2, 4)), checks.random((4,))
    out = np.full((2, 4), np.nan, np.float32)
    with pytest.raises(ValueError, match="sum must be given"):
        _C.rms_norm_forward(out, np.empty(2, np.float32), None, x, x.copy(), weight, 1e-6)
    assert np.isnan(out).all()


def test_the_default_eps():
    """The mean square of zeros is 0: rstd is 1 / sqrt(1e-6)."""
    x, weight = np.zeros((1, 4), np.float32), np.ones(4, np.float32)
    assert ops.rms_norm_forward(x, weight)[1].tolist() == pytest.approx([1000.0])
