"""matmul against the reference: any strides, mixed dtypes, alpha and beta."""

import checks
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longlora import _C, ops

SHAPES = [
    (0, 3, 4),
    (3, 0, 4),
    (1, 1, 1),
    (7, 123, 5),
    (15, 33, 49),
    (129, 300, 97),
    (64, 1025, 8),
    (8, 2000, 3),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("transposed", ["NN", "NT", "TN", "TT"])
def test_every_layout(shape, transposed, dtype, isa, poison):
    M, C, N = shape
    a = checks.random((M, C), dtype) if transposed[0] == "N" else checks.random((C, M), dtype).T
    b = checks.random((C, N), dtype, 1) if transposed[1] == "N" else checks.random((N, C), dtype, 1).T
    checks.check("matmul", a, b, 0.5, floor=4)


# k above the depth of a block (1280 floats, 2560 bfloat16), more rows than a task has, more columns than are
# packed at once, few rows of output with a long k, 16 columns and fewer, four vectors of columns; one row,
# one column, rows at distances of a multiple of 2 KiB, very short sums.
BIG = [
    ("NT", 500, 2700, 70),
    ("NN", 501, 1300, 100),
    ("TN", 490, 2700, 130),
    ("NT", 20, 2700, 300),
    ("NT", 9, 700, 5000),
    ("TN", 6, 3000, 130),
    ("TN", 130, 3000, 6),
    ("TN", 300, 1400, 250),
    ("NT", 300, 1301, 13),
    ("NN", 40, 300, 61),
    ("NN", 70, 1300, 4000),
    ("NT", 1, 300, 333),
    ("NT", 1, 7, 90),
    ("NN", 1, 300, 333),
    ("NT", 333, 300, 1),
    ("TN", 9, 300, 400),
    ("TN", 12, 300, 401),
    ("NT", 50, 1024, 130),
    ("NN", 131, 1536, 90),
    ("NT", 300, 8, 200),
    ("NN", 301, 1, 100),
    ("NT", 260, 16, 97),
    ("TN", 490, 2700, 900),
]


@pytest.mark.parametrize("transposed,M,C,N", BIG, ids=str)
def test_more_than_one_block(transposed, M, C, N, dtype, isa, poison):
    M, C, N = map(checks.fewer, (M, C, N))
    a = checks.random((M, C), dtype) if transposed[0] == "N" else checks.random((C, M), dtype).T
    b = checks.random((C, N), dtype, 1) if transposed[1] == "N" else checks.random((N, C), dtype, 1).T
    checks.check("matmul", a, b, floor=4)
    out = ops.zeros((M, N), "float32", a)
    _C.matmul(out, a, b, 1.0, 0.0)
    _C.matmul(out, a, b, 2.0, 1.0)
    noise = checks.noise_of("matmul", a, b)[0]
    checks.compare(
        out,
        3 * checks.reference.matmul(a, b),
        3 * checks.plain("matmul", a, b)[0],
        floor=4,
        noise=lambda: 3 * noise(),
    )


@settings(max_examples=checks.fewer(60))
@given(
    M=st.integers(0, 90),
    C=st.integers(0, 90),
    N=st.integers(0, 90),
    a=st.sampled_from(list(checks.DTYPES)),
    b=st.sampled_from(list(checks.DTYPES)),
    out=st.sampled_from(list(checks.DTYPES)),
)
def test_any_shape_and_dtypes(place, M, C, N, a, b, out):
    a, b = checks.strided(checks.random((M, C), a)), checks.strided(checks.random((C, N), b, 1))
    checks.compare(
        ops.matmul(a, b, dtype=out),
        checks.reference.matmul(a, b),
        checks.plain("matmul", a, b)[0],
        floor=4,
        noise=checks.noise_of("matmul", a, b)[0],
    )


def test_any_strides(isa):
    a, b = checks.random((40, 60)), checks.random((60, 50), seed=1)
    for x, y in [
        (a[::-1], b),
        (a[:, ::-1], b[::-1]),
        (a[::2, ::3], b[::3, ::2]),
        (np.broadcast_to(a[:1], (7, 60)), b),
        (a, np.broadcast_to(b[:, :1], (60, 9))),
        (a[:1, ::2], b[::2]),
        (a[:, :1], b[:1, ::3]),
    ]:
        checks.check("matmul", x, y, floor=4)


def test_beta(place):
    a, b, out = checks.random((5, 6)), checks.random((6, 7), seed=1), checks.random((5, 7), seed=2)
    want = 2 * a.astype(float) @ b + 0.5 * out
    _C.matmul(out, a, b, 2.0, 0.5)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
    out[...] = np.nan
    _C.matmul(out, a, b, 2.0, 0.0)
    np.testing.assert_allclose(out, 2 * a.astype(float) @ b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "M,C,N",
    [(123, 700, 31), (1, 700, 310), (300, 700, 8), (300, 8, 130), (200, 1024, 100), (9, 700, 200)],
    ids=str,
)
def test_same_bits_for_any_number_of_threads(each_thread_count, dtype, isa, M, C, N):
    a, b = checks.random((M, C), dtype), checks.random((N, C), dtype, 1).T
    results = each_thread_count(lambda: ops.matmul(a, b))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])
