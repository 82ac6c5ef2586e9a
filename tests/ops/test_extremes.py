"""Numbers near the ends of float32: what float64 says, also where squares, exponentials or their inverses
leave float32's range."""

import checks
import ml_dtypes
import numpy as np
import pytest
import reference

from longlora import _C, ops

WIDE_RANGE = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # float16 ends at 65504
ROUNDING = {"float32": 1e-6, "bfloat16": 2.0**-8, "float16": 2.0**-10}


def close(got, want, dtype, floor=0.0):
    """Each element within a few roundings, or within `floor`."""
    got = np.asarray(got).astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        want = np.asarray(want).astype(checks.DTYPES[dtype]).astype(np.float64)  # the range of the dtype
        right = (np.abs(got - want) <= 4 * ROUNDING[dtype] * np.abs(want) + floor) | (got == want)
    assert (right | (np.isnan(got) & np.isnan(want))).all(), f"{got[~right]}, wanted {want[~right]}"


@pytest.mark.filterwarnings("ignore:.*encountered")
@pytest.mark.parametrize("up", [1.0, -3e4, 1e38])
def test_swiglu_of_any_gate(up, dtype, isa):
    gate = np.array([0, 1, -1, -80, -87, -88, -95, -100, -110, -1e4, -6e4, -1e20, -3e38, -np.inf, np.nan])
    gate = np.tile(gate, 5)[None].astype(checks.DTYPES[dtype])  # vectors, and a shorter one at the end
    if dtype == "float16" and up > 1e5:
        up = 65504.0
    up, dout = (np.full_like(gate, x) for x in (up, 2.0))
    finite = np.where(gate == -np.inf, -1e5, gate.astype(np.float64))  # silu(-inf), the limit, is 0
    # sigmoid(-100) is subnormal: an error of half its last bit, times the gate
    floor = 2.0**-150 * 110 * float(abs(up).max()) * 2 + 1e-300
    close(ops.swiglu_forward(gate, up), reference.swiglu_forward(finite, up), dtype, floor)
    for got, want in zip(ops.swiglu_backward(dout, gate, up), reference.swiglu_backward(dout, finite, up)):
        close(got, want, dtype, 2 * floor)


@pytest.mark.parametrize("C", [7, 64, 576, 1032, 20000])
@pytest.mark.parametrize("large", [1e20, 1e30, 3e38])
@WIDE_RANGE
def test_rms_norm_of_large_rows(large, C, dtype, isa):
    """Other rows keep their bits."""
    x, dout, d = (checks.random((5, C), dtype, seed) for seed in range(3))
    weight, row = checks.random((C,), dtype, 3), x[2].astype(np.float64)
    x[2] = row / abs(row).max() * large
    for residual in (None, np.zeros_like(x)):
        out, rstd, total = ops.rms_norm_forward(x, weight, 1e-5, residual)
        want, want_rstd, _ = reference.rms_norm_forward(x, weight, 1e-5)
        assert total.tobytes() == x.tobytes()
        close(out[2], want[2], dtype, floor=1e-6 * abs(want[2]).max())
        close(rstd[2], want_rstd[2], "float32", floor=2.0**-149)
    dx, dweight = ops.rms_norm_backward(dout, x, rstd, weight)
    want, want_dweight = reference.rms_norm_backward(dout, x, rstd, weight)
    close(dx[2], want[2], dtype, floor=1e-6 * abs(want[2]).max() + 2.0**-133)
    close(dweight, want_dweight, "float32", floor=1e-5 * abs(want_dweight).max())
    apart = np.delete(x, 2, 0), np.delete(dout, 2, 0)
    others, statistic, _ = ops.rms_norm_forward(apart[0], weight, 1e-5)
    assert others.tobytes() == np.delete(out, 2, 0).tobytes()
    same = ops.rms_norm_backward(apart[1], apart[0], statistic, weight)[0]
    assert same.tobytes() == np.delete(dx, 2, 0).tobytes()
    over = dout.copy()
    _C.rms_norm_backward(over, None, over, x, rstd, weight, d)
    assert over.tobytes() == ops.rms_norm_backward(dout, x, rstd, weight, d)[0].tobytes()


@WIDE_RANGE
def test_rms_norm_of_small_rows_without_eps(dtype, isa):
    x, dout, weight = (
        checks.random((3, 130), dtype),
        checks.random((3, 130), dtype, 1),
        checks.random((130,), dtype),
    )
    x[1] = x[1].astype(np.float64) * 1e-30
    out, rstd, _ = ops.rms_norm_forward(x, weight, 0.0)
    want, want_rstd, _ = reference.rms_norm_forward(x, weight, 0.0)
    close(rstd, want_rstd, "float32")
    for got, right in zip(out, want):
        close(got, right, dtype, floor=1e-6 * abs(right).max())
    for got, right in zip(
        ops.rms_norm_backward(dout, x, rstd, weight)[0], reference.rms_norm_backward(dout, x, rstd, weight)[0]
    ):
        close(got, right, dtype, floor=1e-6 * abs(right).max())


def test_adamw_of_large_gradients(isa):
    """v holds (1 - beta2) g^2 where it does not hold g^2."""
    grad = np.array([1.0, 1e18, 2e19, -1e20, 3e20, 1e-30, 0.0] * 5, np.float32)
    param, m, v = (np.zeros_like(grad) for _ in range(3))
    want = reference.adamw(param, m, v, grad, lr=0.1, step=1)
    ops.adamw(param, m, v, grad, lr=0.1, step=1)
    for got, right in zip((param, m, v), want):
        close(got, right, "float32", floor=2.0**-149)


def test_the_norm_of_large_gradients(place):
    assert ops.global_norm([np.full(100, 1e30, np.float32)]) == pytest.approx(1e31, rel=1e-6)
    assert ops.global_norm([np.full(100, 1e-30, np.float32)]) == pytest.approx(1e-29, rel=1e-6)


@pytest.mark.parametrize("V", [5, 5000])
def test_cross_entropy_without_a_finite_logit_in_a_stretch(V, isa):
    """All logits but two are -6e38, which is -inf in float32."""
    x, targets = np.full((3, 1), 2.0, np.float32), np.array([V - 1, V - 2, 0], np.int32)
    weight = np.full((V, 1), -3e38, np.float32)
    weight[-2:, 0] = 0.5, 1
    dlosses = np.ones(3, np.float32)
    want, want_lse = reference.linear_cross_entropy_forward(x, weight, targets)
    losses, lse = ops.linear_cross_entropy_forward(x, weight, targets)
    close(losses, want, "float32")
    close(lse, want_lse, "float32")
    losses, dx, _ = ops.linear_cross_entropy_backward(x, weight, targets, dlosses)
    close(losses, want, "float32")
    close(dx, reference.linear_cross_entropy_backward(x, weight, targets, dlosses)[1], "float32", floor=1e-6)


def test_cross_entropy_of_large_logits(isa):
    x, weight = np.array([[1e18], [-1e18], [3.0]], np.float32), np.array([[-1e19], [1e19]], np.float32)
    targets, dlosses = np.array([1, 1, 0], np.int32), np.ones(3, np.float32)
    want, want_lse = reference.linear_cross_entropy_forward(x, weight, targets)
    losses, lse = ops.linear_cross_entropy_forward(x, weight, targets)
    close(losses, want, "float32")
    close(lse, want_lse, "float32")
    got = ops.linear_cross_entropy_backward(x, weight, targets, dlosses, train_weight=True)
    exact = reference.linear_cross_entropy_backward(x, weight, targets, dlosses, train_weight=True)
    for a, b in zip(got, exact):
        close(a, b, "float32")


@pytest.mark.parametrize("size", [1e2, 1e5, 1e15])
def test_attention_where_one_score_is_far_above_all(size, dtype, isa):
    """Every query gives all its weight to one key, whose value it gets; gradients of scores are 0."""
    if dtype == "float16" and size > 1e4:
        size = 6e4
    T, D = 70, 16
    rng = np.random.default_rng(0)
    q = np.full((1, T, 2, D), size)
    k = rng.permutation(np.linspace(0.5, 1, T))[None, :, None, None] * size * np.ones((1, 1, 1, D))
    q, k = (x.astype(checks.DTYPES[dtype]) for x in (q, k))
    v, dout = checks.random((1, T, 1, D), dtype), checks.random((1, T, 2, D), dtype, 1)
    out, lse = ops.s2_attention_forward(q, k, v, group_size=32)
    want, want_lse = reference.s2_attention_forward(q, k, v, group_size=32)
    close(out, want, dtype, floor=1e-6)
    close(lse, want_lse, "float32")
    if isa == "cuda" and dtype != "float32" and size > 1e2:
        return  # there the backward needs lse to an absolute precision, which float32 does not have
    got = ops.s2_attention_backward(dout, q, k, v, out, lse, group_size=32)
    exact = reference.s2_attention_backward(dout, q, k, v, want, want_lse, group_size=32)
    close(got[2], exact[2], dtype, floor=1e-5)


# A matrix unit cuts the second product along C. It computes the transpose of the last one.
@pytest.mark.filterwarnings("ignore:.*encountered")
@pytest.mark.parametrize("shape", [(520, 100, 70), (520, 1000, 40), (70, 100, 130)], ids=str)
@pytest.mark.parametrize("transposed", ["NT", "NN", "TN"])
def test_products_with_infinities(shape, transposed, dtype, isa):
    """Sums with an infinity, a NaN or the largest numbers are what float64 says. Others keep their error."""
    M, C, N = shape
    a, b = checks.random((M, C), dtype), checks.random((C, N), dtype, 1)
    most = float(ml_dtypes.finfo(checks.DTYPES[dtype]).max)
    a[3, 5], a[33, 0], a[41, C - 1], b[9, 11], b[50] = np.inf, -np.inf, np.nan, np.inf, 0.0
    a[20, 50] = np.inf  # times 0
    a[60], b[70] = 0.0, 0.25
    a[60, 70] = most
    out = np.zeros((M, N), np.float32)
    stored_a = np.ascontiguousarray(a.T).T if transposed[0] == "T" else a
    stored_b = np.ascontiguousarray(b.T).T if transposed[1] == "T" else b
    _C.matmul(out, stored_a, stored_b, 1.0, 0.0)
    a, b = a.astype(np.float64), b.astype(np.float64)
    want = a @ b
    terms = np.abs(np.where(np.isfinite(a), a, 0)) @ np.abs(np.where(np.isfinite(b), b, 0))
    close(out, want, "float32", floor=1e-6 * np.where(np.isfinite(want), terms, 0))
    assert (~np.isfinite(want)).any(axis=1).sum() >= 5 and np.isfinite(want[:, 0]).sum() >= M - 4


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20, 1e30])
def test_products_of_small_and_of_large_numbers(size, isa):
    """They keep all of float32's bits."""
    a, b = checks.random((96, 100)), checks.random((100, 64), seed=1)
    out = np.zeros((96, 64), np.float32)
    _C.matmul(out, (a.astype(np.float64) * size).astype(np.float32), b, 1.0, 0.0)
    want = (a.astype(np.float64) * size).astype(np.float32).astype(np.float64) @ b.astype(np.float64)
    assert np.abs(out - want).max() < 3e-7 * size * np.abs(a).sum(axis=1).max()
