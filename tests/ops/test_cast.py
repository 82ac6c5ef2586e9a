"""cast, accumulate, scale and the global norm."""

import sys

import checks
import ml_dtypes
import numpy as np
import pytest

from longlora import _C, ops


@pytest.mark.parametrize("to", list(checks.DTYPES))
def test_every_16_bit_value(to, isa):
    for source in (ml_dtypes.bfloat16, np.float16):
        x = np.arange(1 << 16, dtype=np.uint16).view(source).reshape(256, 256)
        with np.errstate(over="ignore", invalid="ignore"):
            got, want = ops.cast(x, to), x.astype(np.float32).astype(checks.DTYPES[to])
        np.testing.assert_array_equal(np.isnan(got.astype(np.float32)), np.isnan(want.astype(np.float32)))
        kept = ~np.isnan(want.astype(np.float32))
        np.testing.assert_array_equal(got[kept].astype(np.float32), want[kept].astype(np.float32))


def test_rounds_to_nearest_even(isa):
    bits = np.random.default_rng(0).integers(0, 1 << 32, 1 << 16, dtype=np.uint32)
    bits[:4096] = (bits[:4096] & 0xFFFF0000) | 0x8000  # ties
    x = np.concatenate(
        [bits.view(np.float32), np.float32([0, -0.0, np.inf, -np.inf, 1e-45, 65504, 65520, 3.4e38])]
    )[None]
    for to, kind in checks.DTYPES.items():
        with np.errstate(over="ignore", invalid="ignore"):
            want = x.astype(kind)
        got = ops.cast(x, to)
        kept = ~np.isnan(want.astype(np.float32))
        assert np.isnan(got.astype(np.float32))[~kept].all()
        np.testing.assert_array_equal(
            got[kept].view(np.uint32 if to == "float32" else np.uint16),
            want[kept].view(np.uint32 if to == "float32" else np.uint16),
        )


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (7, 123), (3, 5000)])
def test_accumulate(shape, dtype, isa):
    out, x = checks.strided(checks.random(shape, dtype)), checks.strided(checks.random(shape, "float32", 1))
    want, low = checks.reference.accumulate(out, x, 0.7), checks.plain("accumulate", out, x, 0.7)[0]
    checks.compare(ops.accumulate(out, x, 0.7), want, low)


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (7, 123), (3, 5000), (300, 8)])
def test_scale(shape, dtype, isa):
    """On strided rows, on dense rows, and in place."""
    x = checks.random(shape, dtype)
    checks.check("scale", checks.strided(x), 0.3)
    (got,) = checks.dense_and_strided(lambda x: checks.ops.scale(x, 0.3), x)
    _C.scale(x, x, 0.3)
    assert x.tobytes() == got.tobytes()


@pytest.mark.parametrize("to", list(checks.DTYPES))
@pytest.mark.parametrize("shape", [(1, 8), (3, 16), (300, 8), (5, 128), (70, 1032), (2, 9000)])
def test_dense_and_strided_rows(shape, to, dtype, isa):
    x, out = checks.random(shape, dtype), checks.random(shape, to, 1)
    (got,) = checks.dense_and_strided(lambda x: ops.cast(x, to), x)
    assert got.tobytes() == x.astype(out.dtype).tobytes()
    want, low = checks.reference.accumulate(out, x, 0.7), checks.plain("accumulate", out, x, 0.7)[0]
    wide = checks.strided(out)
    ops.accumulate(wide, checks.strided(x), 0.7)
    checks.compare(ops.accumulate(out, x, 0.7), want, low)
    assert wide.tobytes() == out.tobytes()


def test_global_norm_of_a_view_is_that_of_its_copy(dtype, isa):
    for N in (8, 4096, 70000, 600_001):
        x = checks.random((N + 1,), dtype)[1:]
        got, want = ops.global_norm([x]), checks.reference.global_norm([x])
        assert got == ops.global_norm([x.copy()]) and abs(got - want) <= 1e-12 * want


@pytest.mark.parametrize("N", [0, 1, 7, 4095, 4096, 4097, 100003])
def test_global_norm(N, dtype, isa, each_thread_count):
    x = checks.random((N,), dtype)
    results = each_thread_count(lambda: ops.global_norm([x, x]))
    assert results[0] == results[1] == results[2]
    want = checks.reference.global_norm([x, x])
    assert abs(results[0] - want) <= 1e-12 * max(want, 1)


def test_bfloat16_in_numpy_without_ml_dtypes(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)  # as if it were not installed
    with pytest.raises(TypeError, match="needs the package ml_dtypes: pip install ml_dtypes"):
        ops.cast(np.ones((2, 2), np.float32), "bfloat16")
