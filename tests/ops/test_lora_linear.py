"""lora_linear against the reference: every optional part, ugly shapes, dtypes, instruction sets, threads."""

import checks
import numpy as np
import pytest

from longlora import _C, ops

SHAPES = [
    (0, 4, 3, 2),
    (1, 1, 1, 1),
    (3, 7, 5, 2),
    (17, 123, 33, 8),
    (64, 64, 96, 16),
    (70, 300, 129, 7),
    (5, 0, 3, 2),
    (129, 576, 50, 24),
]


def parts(M, C, N, R, dtype):
    return [
        checks.random(shape, dtype, seed)
        for seed, shape in enumerate(((M, C), (N, C), (N,), (R, C), (N, R), (M, N), (M, N)))
    ]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward(shape, dtype, isa, poison):
    x, w, bias, a, b, residual, dout = parts(*shape, dtype)
    x, w, dout = map(checks.strided, (x, w, dout))
    checks.check("lora_linear_forward", x, w, floor=4)
    checks.check("lora_linear_forward", x, w, bias, floor=4)
    checks.check("lora_linear_forward", x, w, None, a, b, 2.0, floor=4)
    _, u = checks.check("lora_linear_forward", x, w, bias, a, b, 0.5, residual, floor=4)
    checks.check("lora_linear_backward", dout, x, w, floor=4)
    checks.check("lora_linear_backward", dout, x, w, a, b, 2.0, floor=4)
    checks.check(
        "lora_linear_backward",
        dout,
        x,
        w,
        a,
        b,
        2.0,
        np.asarray(u),
        train_weight=True,
        train_bias=True,
        floor=4,
    )


# Rows are aligned to 16 bytes. A GPU sums over rows in parts, for a block of ranks at a time. Some shapes
# have more rows than a part or more ranks than a block; others have one rank, or one more than half a block.
@pytest.mark.parametrize(
    "shape",
    [
        (300, 136, 264, 72),
        (257, 64, 40, 8),
        (33, 512, 256, 64),
        (600, 40, 24, 1),
        (40, 24, 16, 17),
        (40, 24, 16, 9),
    ],
    ids=str,
)
def test_dense_rows(shape, dtype, isa):
    x, w, bias, a, b, residual, dout = parts(*shape, dtype)
    _, u = checks.check("lora_linear_forward", x, w, bias, a, b, 0.5, residual, floor=4)
    checks.check("lora_linear_forward", x, w, bias, None, None, 1.0, residual, floor=4)
    checks.check(
        "lora_linear_backward",
        dout,
        x,
        w,
        a,
        b,
        2.0,
        np.asarray(u),
        train_weight=True,
        train_bias=True,
        floor=4,
    )


# With few rows, a block of the sum over K + R has at most 108 steps. A step has two products for bfloat16.
# In each shape a block ends between K and K + R; in the last shape this holds for bfloat16 too.
@pytest.mark.parametrize("shape", [(33, 64, 40, 72), (60, 40, 48, 80), (60, 80, 48, 160)], ids=str)
def test_a_block_of_the_sum_that_ends_within_the_ranks(shape, dtype, isa):
    x, w, _, a, b, _, dout = parts(*shape, dtype)
    checks.check("lora_linear_forward", x, w, None, a, b, 2.0, floor=4)
    checks.check("lora_linear_backward", dout, x, w, a, b, 2.0, floor=4)


def test_a_residual_is_added_once(dtype, isa):
    """The sum over k is packed in two parts, and the output is not a multiple of a tile."""
    x, w, _, _, _, residual, _ = parts(133, 2600, 21, 0, dtype)
    checks.check("lora_linear_forward", x, w, None, None, None, 1.0, residual, floor=4)


def test_a_bias_at_any_address(dtype, isa):
    x, w, bias, a, b, residual, _ = parts(33, 40, 72, 8, dtype)
    bias = np.concatenate([bias[:1], bias])[1:]
    checks.check("lora_linear_forward", x, w, bias, a, b, 0.5, residual, floor=4)


def test_u_may_be_beyond_float16(isa):
    """u is float32 for any dtype of the other arrays."""
    x, w, _, a, b, _, _ = parts(40, 64, 72, 8, "float16")
    a, b = a * np.float16(9000), b * np.float16(2**-10)
    out, u = checks.check("lora_linear_forward", x, w, None, a, b, 2.0**-7, floor=4)
    assert np.abs(u).max() > 65504 and np.isfinite(out.astype(np.float32)).all()


@pytest.mark.parametrize("shape", [(33, 40, 50, 8), (150, 1500, 70, 24), (200, 2048, 40, 8)], ids=str)
def test_u_may_be_kept_or_made_again(shape, place):
    x, w, _, a, b, _, dout = parts(*shape, "float32")
    _, u = ops.lora_linear_forward(x, w, None, a, b, 2.0)
    for kept, again in zip(
        ops.lora_linear_backward(dout, x, w, a, b, 2.0, u), ops.lora_linear_backward(dout, x, w, a, b, 2.0)
    ):
        if kept is not None:
            np.testing.assert_array_equal(kept, again)


def test_gradients_of_parameters_accumulate_and_dx_is_set(place):
    x, w, _, a, b, _, dout = parts(9, 12, 10, 4, "float32")
    dx, da, db, dw, dbias = ops.lora_linear_backward(
        dout, x, w, a, b, 2.0, train_weight=True, train_bias=True
    )
    out = [g.copy() for g in (dx, da, db, dw, dbias)]
    out[0][:] = np.nan
    _C.lora_linear_backward(*out, dout, x, w, a, b, None, 2.0)
    np.testing.assert_allclose(out[0], dx, rtol=1e-5, atol=1e-5)
    for twice, once in zip(out[1:], (da, db, dw, dbias), strict=True):
        np.testing.assert_allclose(twice, 2 * once, rtol=1e-5, atol=1e-5)


def test_each_gradient_alone(dtype, place):
    """What is not wanted is not computed, and changes nothing else."""
    x, w, _, a, b, _, _ = parts(37, 40, 48, 8, dtype)
    shapes = (37, 40), (8, 40), (48, 8), (48, 40), (48,)
    for i, shape in enumerate(shapes):
        dout, out = checks.random((37, 48), dtype, 10 + i), [None] * 5  # another one: nothing old will do
        out[i] = np.full(shape, np.nan, x.dtype) if i == 0 else np.zeros(shape, np.float32)
        _C.lora_linear_backward(*out, dout, x, w, a, b, None, 2.0)
        want = ops.lora_linear_backward(dout, x, w, a, b, 2.0, train_weight=True, train_bias=True)[i]
        checks.compare(out[i], want.astype(np.float64), want, floor=4)


def test_residual_may_be_the_output(place):
    x, w, bias, a, b, residual, _ = parts(9, 12, 10, 4, "float32")
    want, _ = ops.lora_linear_forward(x, w, bias, a, b, 2.0, residual)
    _C.lora_linear_forward(residual, None, x, w, bias, a, b, residual, 2.0)
    np.testing.assert_array_equal(residual, want)


def test_u_is_written_between_columns_of_others(dtype, isa):
    for M, R in (33, 8), (500, 8), (500, 24):
        x, w, _, a, b, _, _ = parts(M, 72, 200, R, dtype)
        wide, out = np.full((M, R + 5), np.nan, np.float32), np.full((M, 200), np.nan, x.dtype)
        _C.lora_linear_forward(out, wide[:, 2 : 2 + R], x, w, None, a, b, None, 2.0)
        for got, want in zip(
            (out, wide[:, 2 : 2 + R]), checks.check("lora_linear_forward", x, w, None, a, b, 2.0, floor=4)
        ):
            np.testing.assert_array_equal(got, want)
        assert np.isnan(wide[:, :2]).all() and np.isnan(wide[:, 2 + R :]).all()


def test_more_columns_than_are_packed_at_once(isa):
    """Rows half a page apart are packed, once for both slices of columns."""
    x, w, bias, a, b, residual, _ = parts(483, 1024, 1200, 24, "float32")
    checks.check("lora_linear_forward", x, w, bias, a, b, 2.0, residual, floor=4)


# One shape for each way to compute u: tasks of rows, tasks of columns, several slices of a sum, and tiles (R
# above 16).
@pytest.mark.parametrize(
    "shape", [(301, 200, 150, 8), (1000, 96, 72, 8), (1000, 1500, 40, 24), (500, 512, 96, 8)], ids=str
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_same_bits_for_any_number_of_threads(dtype, shape, place, each_thread_count):
    M, C, N, R = shape
    x, w, bias, a, b, residual, dout = parts(checks.fewer(M), checks.fewer(C), N, R, dtype)

    def once():
        return (
            *ops.lora_linear_forward(x, w, bias, a, b, 2.0, residual),
            *ops.lora_linear_backward(dout, x, w, a, b, 2.0, train_weight=True, train_bias=True),
        )

    results = each_thread_count(once)
    for result in results[1:]:
        for got, want in zip(result, results[0]):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    "change,message",
    [(dict(a=None), "a"), (dict(b=None), "b"), (dict(x=None, da=1), "x"), (dict(x=None, dweight=1), "x")],
)
def test_what_is_missing_is_named_before_anything_is_written(change, message, place):
    x, w, _, a, b, _, dout = parts(5, 6, 7, 2, "float32")
    given = dict(x=x, a=a, b=b) | {k: v for k, v in change.items() if k in "xab"}
    dx, da, dw = (
        np.full((5, 6), np.nan, np.float32),
        np.zeros((2, 6), np.float32),
        np.zeros((7, 6), np.float32),
    )
    with pytest.raises(ValueError, match=f"lora_linear_backward: .*{message}"):
        _C.lora_linear_backward(
            dx,
            da if given["a"] is not None else None,
            None,
            dw if "dweight" in change else None,
            None,
            dout,
            given["x"],
            w,
            given["a"],
            given["b"],
            None,
            1.0,
        )
    assert np.isnan(dx).all()


@pytest.mark.parametrize("C,N", [(576, 300), (2048, 40), (100, 1000)])
def test_up_to_sixteen_rows_are_what_each_is_alone(C, N, dtype):
    """On a CPU. Generation relies on it: a sequence's tokens do not depend on those beside it."""
    x, w, before = checks.random((16, C), dtype), checks.random((N, C), dtype, 1), _C.get_isa()
    for isa in np.flatnonzero(_C.isa_supported):
        _C.set_isa(int(isa))
        whole, logits = ops.lora_linear_forward(x, w)[0], ops.matmul(x, w.T, dtype="float32")
        for M in (1, 2, 3, 7, 15):
            np.testing.assert_array_equal(ops.lora_linear_forward(x[:M], w)[0], whole[:M])
            np.testing.assert_array_equal(ops.matmul(x[:M], w.T, dtype="float32"), logits[:M])
    _C.set_isa(before)
