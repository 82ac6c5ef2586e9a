"""matmul against the reference: any strides, mixed dtypes, alpha and beta."""
import checks
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longlora import _C, ops

SHAPES = [(0, 3, 4), (3, 0, 4), (1, 1, 1), (7, 123, 5), (15, 33, 49), (129, 300, 97), (64, 1025, 8), (8, 2000, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("transposed", ["NN", "NT", "TN", "TT"])
def test_every_layout(shape, transposed, dtype, isa, poison):
    M, C, N = shape
    a = checks.random((M, C), dtype) if transposed[0] == "N" else checks.random((C, M), dtype).T
    b = checks.random((C, N), dtype, 1) if transposed[1] == "N" else checks.random((N, C), dtype, 1).T
    checks.check("matmul", a, b, 0.5, floor=4)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 90), st.integers(0, 90), st.integers(0, 90), st.sampled_from(list(checks.DTYPES)), st.sampled_from(list(checks.DTYPES)),
       st.sampled_from(list(checks.DTYPES)))
def test_any_shape_and_dtypes(M, C, N, a, b, out):
    a, b = checks.strided(checks.random((M, C), a)), checks.strided(checks.random((C, N), b, 1))
    checks.compare(ops.matmul(a, b, dtype=out), checks.reference.matmul(a, b), checks.plain("matmul", a, b)[0], floor=4)


def test_beta():
    a, b, out = checks.random((5, 6)), checks.random((6, 7), seed=1), checks.random((5, 7), seed=2)
    want = 2 * a.astype(float) @ b + 0.5 * out
    _C.matmul(out, a, b, 2.0, 0.5)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
    out[...] = np.nan
    _C.matmul(out, a, b, 2.0, 0.0)
    np.testing.assert_allclose(out, 2 * a.astype(float) @ b, rtol=1e-5, atol=1e-5)


def test_same_bits_for_any_number_of_threads(each_thread_count, dtype):
    a, b = checks.random((123, 700), dtype), checks.random((700, 31), dtype, 1)
    results = each_thread_count(lambda: ops.matmul(a, b))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])
