"""Scratch on the CPU: _C.scratch predicts what a call takes."""

import gc

import checks
import numpy as np
import pytest
from test_threads import work

from longlora import _C, ops

SHAPES = [(1, 8, 5, 2), (37, 100, 50, 8), (600, 300, 1000, 24), (300, 1500, 700, 16), (900, 64, 576, 64)]


@pytest.fixture(autouse=True)
def two_threads():
    """scratch counts a block of attention for each thread, as if all of them had tasks."""
    before = _C.get_num_threads()
    _C.set_num_threads(2)
    yield
    _C.set_num_threads(before)


def empty(shape, dtype="float32"):
    return checks.random(shape, dtype)


def matmul(M, C, N, R, dtype):
    for a in (empty((M, C), dtype), empty((C, M), dtype).T):
        for b in (empty((C, N), dtype), empty((N, C), dtype).T):
            for out in ("float32", dtype):
                yield "matmul", empty((M, N), out), a, b, 1.0, 0.0


def lora_linear(M, C, N, R, dtype):
    x, weight, out = empty((M, C), dtype), empty((N, C), dtype), empty((M, N), dtype)
    a, b, u = empty((R, C), dtype), empty((N, R), dtype), empty((M, R))
    for lora in ((a, b), (None, None)):
        for kept in (u, None) if lora[0] is not None else (None,):
            yield "lora_linear_forward", out, kept, x, weight, None, *lora, None, 1.0
    dx, da, db, dweight = empty((M, C), dtype), empty((R, C)), empty((N, R)), empty((N, C))
    for given in ((dx, da, db, None), (dx, da, db, dweight), (None, None, db, None), (None, da, None, None)):
        for kept in (u, None):
            yield "lora_linear_backward", *given, None, out, x, weight, a, b, kept, 1.0


def head(M, C, V, R, dtype):
    x, weight, of_row = empty((M, C), dtype), empty((V, C), dtype), empty((M,))
    targets = np.arange(M, dtype=np.int32) % V
    yield "linear_cross_entropy_forward", of_row, empty((M,)), x, weight, targets, -100
    for dweight in (empty((V, C)), None):
        args = of_row, empty((M, C), dtype), dweight, x, weight, targets, empty((M,)), -100
        yield "linear_cross_entropy_backward", *args


def others(M, C, N, R, dtype):
    x = empty((M, C), dtype)
    yield "rms_norm_backward", empty((M, C), dtype), empty((C,)), x, x, empty((M,)), empty((C,), dtype), None
    yield "sum_squares", np.zeros(1), empty((M * C,), dtype)


def taken(op, *args):
    """The bytes of scratch that the call takes.

    Tensors come from the same store and do not count. Without the collector, none of them is freed meanwhile.
    """
    gc.disable()
    try:
        _C.scratch_peak()
        held = _C.scratch_peak()
        getattr(_C, op)(*args)
        return _C.scratch_peak() - held
    finally:
        gc.enable()


def agree(op, said, there):
    """Whether prediction and call agree exactly. Two ops may differ slightly.

    Attention does not count its lists of segments and tasks, and the head counts whole units of 16 rows.
    """
    if op.startswith("s2_attention"):
        return said <= there <= 1.02 * said
    if op.startswith("linear_cross_entropy"):
        return 0.98 * said <= there <= said
    return said == there


@pytest.mark.parametrize("calls", [matmul, lora_linear, head, others], ids=lambda calls: calls.__name__)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_said_is_taken(calls, shape, dtype, isa):
    if isa == "cuda":
        pytest.skip("a GPU uses workspace instead")
    for op, *args in calls(*shape, dtype):
        assert agree(op, sum(_C.scratch(op, *args)), taken(op, *args)), op


@pytest.mark.parametrize("heads,group,T", [((4, 2), 256, 1024), ((8, 1), 64, 300)], ids=str)
def test_attention(heads, group, T, dtype, isa):
    if isa == "cuda":
        pytest.skip("a GPU uses workspace instead")
    H, K = heads
    q, k, lse = empty((1, T, H, 64), dtype), empty((1, T, K, 64), dtype), empty((1, H, T))
    rest = None, group, 0, 0, 0.125
    for op, args in (
        ("s2_attention_forward", (empty(q.shape, dtype), lse, q, k, k, *rest)),
        ("s2_attention_backward", (*(empty(t.shape, dtype) for t in (q, k, k)), q, q, k, k, q, lse, *rest)),
    ):
        assert agree(op, sum(_C.scratch(op, *args)), taken(op, *args)), op


class Watched:
    """Stands in for _C: each op records (op, predicted bytes, taken bytes)."""

    def __init__(self):
        self.seen = []

    def __getattr__(self, name):
        if name not in _C.specs:
            return getattr(_C, name)
        return lambda *args: self.seen.append((name, sum(_C.scratch(name, *args)), taken(name, *args)))


def test_every_op(monkeypatch):
    """Ops without a prediction take nothing."""
    watched = Watched()
    monkeypatch.setattr(ops, "_C", watched)
    work()
    assert {name for name, _, _ in watched.seen} == set(_C.specs)
    for op, said, there in watched.seen:
        assert agree(op, said, there), op


def test_tensors_of_others_do_not_count():
    held = _C.Tensor((1000,), "float32")
    x = empty((37, 8))
    assert taken("swiglu_forward", np.empty_like(x), x, x) == 0 and held.nbytes == 4000


def test_wrong_questions():
    with pytest.raises(TypeError, match="scratch: takes the name of an op and its arguments"):
        _C.scratch()
    with pytest.raises(ValueError, match="scratch: there is no op 'product'"):
        _C.scratch("product")
    with pytest.raises(ValueError, match="swiglu_forward: up axis 1 should be F=8, got 9"):
        _C.scratch("swiglu_forward", empty((3, 8)), empty((3, 8)), empty((3, 9)))
