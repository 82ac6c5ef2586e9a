"""The rope op against the reference (test_rope.py tests the frequencies)."""

import checks
import numpy as np
import pytest

from longlora import _C, ops
from longlora.decoder.rope import Rope, tables


@pytest.mark.parametrize("shape", [(0, 3, 1, 2), (1, 1, 1, 2), (2, 7, 3, 10), (1, 123, 2, 64), (2, 9, 5, 96)])
def test_forward_and_backward(shape, dtype, isa, poison):
    cos, sin = tables(Rope("default", 1e4, 2048), shape[3], 200)
    x = checks.strided(checks.random(shape, dtype))
    positions = np.random.default_rng(0).integers(0, 200, shape[:2]).astype(np.int32)
    for where in (None, positions):
        checks.check("rope_forward", x, cos, sin, where)
        checks.check("rope_backward", x, cos, sin, where)


@pytest.mark.parametrize(
    "shape",
    [
        (1, 3, 1, 16),
        (2, 5, 3, 64),
        (1, 2, 4, 72),
        (1, 3, 9, 80),
        (2, 2, 32, 128),
        (1, 1, 70, 256),
        (1, 1, 2, 4160),
    ],
)
@pytest.mark.parametrize("name", ["rope_forward", "rope_backward"])
def test_dense_and_strided_rows_and_in_place(name, shape, dtype, isa):
    cos, sin, x = (
        checks.random((20, shape[3] // 2)),
        checks.random((20, shape[3] // 2), seed=1),
        checks.random(shape, dtype),
    )
    positions = np.random.default_rng(0).integers(0, 20, shape[:2]).astype(np.int32)
    (got,) = checks.dense_and_strided(
        lambda x, cos, sin: getattr(ops, name)(x, cos, sin, positions), x, cos, sin
    )
    checks.check(name, x, cos, sin, positions)
    getattr(_C, name)(x, x, cos, sin, positions)
    assert x.tobytes() == got.tobytes()


def test_backward_undoes_forward(place):
    cos, sin = tables(Rope("default", 1e4, 2048), 64, 50)
    x = checks.random((2, 50, 3, 64))
    np.testing.assert_allclose(ops.rope_backward(ops.rope_forward(x, cos, sin), cos, sin), x, atol=1e-6)


def test_far_positions_are_exact(place):
    D, far = 64, np.array([[15962, 131071, 1 << 20]], np.int32)
    frequency = 1e4 ** -(np.arange(0, D, 2) / D)
    angle = far[0][:, None] * frequency
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    x = checks.random((1, 3, 2, D))
    got = ops.rope_forward(x, cos, sin)
    first, second = x[..., : D // 2].astype(np.float64), x[..., D // 2 :].astype(np.float64)
    c, s = np.cos(angle)[None, :, None], np.sin(angle)[None, :, None]
    np.testing.assert_allclose(
        got, np.concatenate([first * c - second * s, second * c + first * s], -1), atol=3e-7
    )


def test_what_does_not_fit_is_named(place):
    cos, sin = tables(Rope("default", 1e4, 2048), 8, 5)
    with pytest.raises(ValueError, match="cos axis 0 should be at least T=6, got 5"):
        ops.rope_forward(checks.random((1, 6, 1, 8)), cos, sin)
    with pytest.raises(ValueError, match="D/2"):
        ops.rope_forward(checks.random((1, 3, 1, 9)), cos, sin)


def test_positions_outside_the_tables_are_named():
    cos, sin = tables(Rope("default", 1e4, 2048), 8, 5)
    with pytest.raises(ValueError, match=r"positions\[0,1\] should be in 0..4, got 9"):
        ops.rope_forward(checks.random((1, 2, 1, 8)), cos, sin, np.array([[0, 9]], np.int32))


def test_positions_outside_the_tables_give_nan_on_cuda(cuda, poison):
    cos, sin = tables(Rope("default", 1e4, 2048), 8, 5)
    x, positions = checks.random((2, 3, 2, 8)), np.array([[0, 5, 4], [-1, 2**31 - 1, -(2**31)]], np.int32)
    good = (positions >= 0) & (positions < 5)
    want = ops.rope_forward(x, cos, sin, np.where(good, positions, 0).astype(np.int32))
    for op in (ops.rope_forward, ops.rope_backward):
        out = op(x, cos, sin, positions)
        assert np.isnan(out[~good]).all() and np.isfinite(out[good]).all()
    np.testing.assert_array_equal(ops.rope_forward(x, cos, sin, positions)[good], want[good])
