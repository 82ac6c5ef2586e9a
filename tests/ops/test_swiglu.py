"""swiglu against the reference, also with outputs that overwrite inputs."""

import checks
import numpy as np
import pytest

from longlora import _C


@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (2, 7), (5, 123), (3, 2049), (9, 64)])
def test_forward_and_backward(shape, dtype, isa, poison):
    gate, up, dout = (checks.strided(checks.random(shape, dtype, seed, 3.0)) for seed in range(3))
    checks.check("swiglu_forward", gate, up, floor=8)
    checks.check("swiglu_backward", dout, gate, up, floor=8)


@pytest.mark.parametrize("shape", [(1, 8), (3, 16), (300, 8), (5, 128), (70, 1032), (2, 9000)])
def test_dense_and_strided_rows(shape, dtype, isa):
    gate, up, dout = (checks.random(shape, dtype, seed, 3.0) for seed in range(3))
    checks.dense_and_strided(checks.ops.swiglu_forward, gate, up)
    dgate, dup = checks.dense_and_strided(checks.ops.swiglu_backward, dout, gate, up)
    checks.check("swiglu_forward", gate, up, floor=8)
    checks.check("swiglu_backward", dout, gate, up, floor=8)
    both = np.concatenate([gate, up], 1)
    gate, up = both[:, : shape[1]], both[:, shape[1] :]
    _C.swiglu_backward(gate, up, dout, gate, up)
    assert gate.tobytes() == dgate.tobytes() and up.tobytes() == dup.tobytes()


def test_large_arguments_are_finite(isa):
    gate = np.array([[-1e4, -100, -88, 0, 88, 100, 1e4]], np.float32)
    checks.check("swiglu_forward", gate, np.ones_like(gate))
    checks.check("swiglu_backward", np.ones_like(gate), gate, np.ones_like(gate), floor=4)


def test_backward_over_its_inputs(place):
    both = checks.random((5, 2 * 33))
    gate, up, dout = both[:, :33], both[:, 33:], checks.random((5, 33), seed=1)
    want = checks.ops.swiglu_backward(dout, gate.copy(), up.copy())
    _C.swiglu_backward(gate, up, dout, gate, up)
    np.testing.assert_array_equal(gate, want[0])
    np.testing.assert_array_equal(up, want[1])
