"""tests/mirror.py, which runs the NumPy tests on a device, with other CPU memory as the device."""

import ctypes

import checks
import dlpack
import mirror
import numpy as np
import pytest

from longlora import _C, ops


@pytest.fixture
def mirrored(monkeypatch):
    mirror.install(monkeypatch, None)


def test_results_gaps_and_guards(mirrored, poison, dtype):
    x, weight = checks.strided(checks.random((5, 33), dtype)), checks.random((33,), dtype, 1)
    checks.check("rms_norm_forward", x, weight, floor=4)
    assert (x.base[:, 33:].astype(np.float32) == np.array(checks.GUARD, x.dtype).astype(np.float32)).all()


def test_strides_of_every_kind(mirrored):
    a, b = checks.random((6, 5)), checks.random((5, 7), seed=1)
    want = a @ b
    np.testing.assert_allclose(ops.matmul(a[::-1, ::-1], b[::-1]), want[::-1], rtol=1e-5)
    np.testing.assert_allclose(
        ops.matmul(a[::2, 1::3], b[1::3, 3:]), a[::2, 1::3] @ b[1::3, 3:], rtol=1e-5, atol=1e-6
    )
    row = np.broadcast_to(a[:1], (4, 5))
    np.testing.assert_allclose(ops.matmul(row, b), row @ b, rtol=1e-5, atol=1e-6)
    far = np.lib.stride_tricks.as_strided(a[1:], (3, 5), (a.strides[0] * 2, 4))[:2]
    np.testing.assert_allclose(ops.matmul(far, b), far @ b, rtol=1e-5, atol=1e-6)
    assert ops.matmul(np.empty((0, 5), np.float32), b).shape == (0, 7)


def test_arrays_that_share_memory_share_it_there(mirrored):
    both, dout = checks.random((5, 66)), checks.random((5, 33), seed=1)
    gate, up = both[:, :33], both[:, 33:]
    want = checks.reference.swiglu_backward(dout, gate, up)
    _C.swiglu_backward(gate, up, dout, gate, up)
    np.testing.assert_allclose(gate, want[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(up, want[1], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="overlaps"):
        _C.swiglu_forward(both[:, 1:34], gate, up)


def test_alignment_is_kept(mirrored):
    raw = np.zeros(64, np.uint8)
    odd = raw[1:41].view(np.float32).reshape(2, 5)
    with pytest.raises(ValueError, match="not aligned"):
        _C.cast(np.empty((2, 5), np.float32), odd)


def test_read_only_is_kept(mirrored):
    out, x = np.full((2, 5), 7, np.float32), checks.random((2, 5))
    out.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        _C.cast(out, x)
    assert (out == 7).all()


def test_what_was_written_outside_is_seen(monkeypatch):
    """A stand-in for an op with two faults: it writes behind its output and into its input."""

    def faulty(out, x):
        for producer, at in ((out, 10), (x, 0))[:faults]:
            ctypes.c_float.from_address(dlpack.tensor_of(producer).data + 4 * at).value = 99

    monkeypatch.setattr(_C, "cast", mirror.mirrored("cast", faulty, None))
    outputs, x = checks.Outputs(), checks.random((2, 5))
    out, faults = outputs.empty((2, 2), "float32", x), 1
    _C.cast(out, x)
    with pytest.raises(AssertionError, match="outside its output"):
        outputs.assert_guards()
    faults = 2
    with pytest.raises(AssertionError, match="wrote to an input"):
        _C.cast(out, x)
