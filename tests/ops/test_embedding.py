"""embedding against the reference; its gradient rows are summed in the order of the tokens."""

import checks
import numpy as np
import pytest

from longlora import _C, ops


def ids_of(M, V, seed=0):
    ids = np.random.default_rng(seed).integers(0, V, M).astype(np.int32)
    return ids, np.argsort(ids, kind="stable").astype(np.int32)


@pytest.mark.parametrize(
    "M,V,C", [(0, 3, 4), (1, 1, 1), (7, 3, 5), (123, 2, 33), (100, 1, 17), (65, 1000, 64)]
)
def test_forward_and_backward(M, V, C, dtype, isa, poison):
    ids, order = ids_of(M, V)
    checks.check("embedding_forward", checks.random((V, C), dtype), ids, floor=0)
    checks.check("embedding_backward", checks.strided(checks.random((M, C), dtype, 1)), ids, order, V)


def dense_rows(M, C, kind, dtype):
    V = {"few": 5, "one": 3, "all": 2 * M, "skewed": 1000}[kind]
    ids = {
        "few": np.arange(M) * 7 % 5,
        "one": np.full(M, 2),
        "all": np.arange(M) * 7919 % M * 2,
        "skewed": np.random.default_rng(0).pareto(1, M).clip(0, 999),
    }[kind].astype(np.int32)
    order = np.argsort(ids, kind="stable").astype(np.int32)
    weight, dout = checks.random((V, C), dtype), checks.random((M, C), dtype, 1)
    (out,) = checks.dense_and_strided(lambda w: ops.embedding_forward(w, ids), weight)
    assert out.tobytes() == weight[ids].tobytes()
    (dweight,) = checks.dense_and_strided(lambda d: ops.embedding_backward(d, ids, order, V), dout)
    want, low = (
        checks.reference.embedding_backward(dout, ids, order, V),
        checks.plain("embedding_backward", dout, ids, order, V)[0],
    )
    noise = checks.noise_of("embedding_backward", dout, ids, order, V)[0]
    checks.compare(dweight, want, low, noise=noise)
    wide = checks.strided(dweight)
    _C.embedding_backward(wide, dout, ids, order)
    _C.embedding_backward(dweight, dout, ids, order)
    checks.compare(dweight, 2 * want, 2 * low, noise=lambda: 2 * noise())
    assert wide.tobytes() == dweight.tobytes()


KINDS = ["few", "one", "all", "skewed"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("M,C", [(1, 4), (31, 8), (33, 132), (300, 1032)])
def test_dense_and_strided_rows(M, C, kind, dtype, isa):
    dense_rows(M, C, kind, dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("M,C", [(4000, 16), (66000, 4)])
def test_runs_over_many_pieces(M, C, kind, dtype, isa):
    dense_rows(M, C, kind, dtype)


def test_same_bits_for_any_number_of_threads(place, each_thread_count):
    ids, order = ids_of(500, 7)
    dout = checks.random((500, 40))
    results = each_thread_count(lambda: ops.embedding_backward(dout, ids, order, 7))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_bad_ids_and_orders_are_named():
    weight = checks.random((5, 4))
    with pytest.raises(ValueError, match=r"ids\[1\] should be in 0..4, got 5"):
        ops.embedding_forward(weight, np.array([0, 5], np.int32))
    with pytest.raises(ValueError, match=r"ids\[0\] should be in 0..4, got -1"):
        ops.embedding_forward(weight, np.array([-1], np.int32))
    for ids, order, message in (
        ([0, 7], [0, 1], r"ids\[1\] should be in 0..4, got 7"),
        ([3, -1], [1, 0], r"ids\[1\] should be in 0..4, got -1"),
    ):
        with pytest.raises(ValueError, match="embedding_backward: " + message):
            ops.embedding_backward(checks.random((2, 4)), np.int32(ids), np.int32(order), 5)
    dout, ids = checks.random((3, 4)), np.array([2, 0, 2], np.int32)
    for order in ([0, 1, 2], [1, 2, 0], [1, 0, 0], [1, 0, 7]):
        with pytest.raises(ValueError, match="order"):
            ops.embedding_backward(dout, ids, np.array(order, np.int32), 5)


def test_bad_ids_on_cuda_give_nan_and_no_gradient(cuda, poison):
    weight, ids = checks.random((5, 40)), np.array([0, 5, 4, -1, 2**31 - 1, -(2**31), 3], np.int32)
    out, good = ops.embedding_forward(weight, ids), (ids >= 0) & (ids < 5)
    assert np.isnan(out[~good]).all()
    np.testing.assert_array_equal(out[good], weight[ids[good]])
    dout, order = checks.random((7, 40), seed=1), np.argsort(ids, kind="stable").astype(np.int32)
    want = np.zeros((5, 40), np.float32)
    want[ids[good]] = dout[good]
    np.testing.assert_array_equal(ops.embedding_backward(dout, ids, order, 5), want)


@pytest.mark.parametrize("order", [[0, 1, 2], [1, 2, 0], [1, 0, 0], [1, 0, 7], [-1, -(2**31), 2**31 - 1]])
def test_bad_orders_on_cuda_touch_nothing_else(order, cuda, poison):
    """The results are undefined, but nothing else is written, which `poison` checks."""
    ops.embedding_backward(checks.random((3, 4)), np.array([2, 0, 2], np.int32), np.array(order, np.int32), 5)
