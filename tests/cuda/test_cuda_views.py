"""Each array of each op as a difficult view. Rows lie more than 2^31 elements apart, run backwards, or begin
one element after a vector's boundary.

One array of a call is a view, the others are dense. The results must be those of the call with dense arrays.
Kernels that move vectors of 16 bytes may do so only where all arrays allow it.
"""

import math
import sys
from pathlib import Path

import dlpack
import mirror
import numpy as np
import pytest
from checks import CUDA, DTYPES, EMULATED

from longlora import _C, Tensor, cuda

if not CUDA:
    pytest.skip(f"no GPU and no emulation of one: {cuda.reason()}", allow_module_level=True)

TOLERANCE = {
    "float32": 1e-4,
    "bfloat16": 3e-2,
}  # relative to the largest value: cuBLAS may choose another algorithm


def calls():
    """(op, arguments): the calls of benchmarks/gpu_small.py, and the ops that it calls separately."""
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    try:
        from benchmarks.gpu_small import calls, random
    finally:
        sys.path.pop()
    yield from calls()

    def some(n):
        return random(n), "out", "float32"

    yield "cast", ((random(37, 72), "out", "common"), random(37, 72))
    yield "accumulate", ((random(37, 72), "out", "common"), random(37, 72), 0.5)
    yield "scale", ((random(37, 72), "out", "common"), random(37, 72), 0.3)
    yield (
        "adamw",
        (
            some(1000),
            some(1000),
            (np.abs(random(1000)), "out", "float32"),
            (random(1000), "out", "common"),
            (random(1000), "float32"),
            1e-2,
            0.9,
            0.95,
            1e-8,
            0.1,
            1,
            0.5,
        ),
    )
    yield "sum_squares", ((np.ones(1, np.float32), "out", "float64"), random(1000))


class Laid:
    """x in device memory: "dense", or the rows of its first axis longer than 1 laid out as `how` says."""

    def __init__(self, x, dtype, how):
        self.x = x = x.astype(np.int32 if x.dtype == np.int32 else DTYPES.get(dtype, dtype))
        axis = next((i for i, size in enumerate(x.shape) if size > 1), 0)
        whole = how == "dense" or axis == x.ndim - 1
        self.rows, self.row = (1, x.size) if whole else (x.shape[axis], math.prod(x.shape[axis + 1 :]))
        apart = self.row
        if how == "far":
            apart = -(-(2**31 + 1) // (self.rows - 1) // 64) * 64
        size, self.first = (self.rows - 1) * apart + self.row, 0
        if how == "odd":
            self.first, size = 1, size + 1
        if how == "backwards":
            self.first, apart = size - self.row, -apart
        self.apart = apart
        if how == "far" and EMULATED:  # memory is committed only where it is touched
            self.memory = np.zeros(size, x.dtype)
            start, like = mirror.address(self.memory), dlpack.tensor_of(Tensor(1, "uint8", "cuda"))
        else:
            self.memory = Tensor(size, x.dtype.name, "cuda")
            like = dlpack.tensor_of(self.memory)
            start = like.data
        for i, values in enumerate(x.reshape(self.rows, self.row)):
            piece = self.piece(i)
            piece.copy_(values) if isinstance(piece, Tensor) else np.copyto(piece, values)
        self.view = mirror.View(x, start + self.first * x.itemsize, like)
        if self.rows > 1:
            self.view.strides[axis] = apart

    def piece(self, i):
        at = self.first + i * self.apart
        return self.memory[at : at + self.row]

    def values(self):
        found = [
            piece.cpu().numpy() if isinstance(piece, Tensor) else piece
            for piece in map(self.piece, range(self.rows))
        ]
        return np.concatenate(found).reshape(self.x.shape).astype(np.float64)


def run(op, args, dtype, which=None, how="dense"):
    """The outputs of the op with argument `which` laid out like that."""
    given, outputs = [], []
    for i, arg in enumerate(args):
        array, *said = arg if isinstance(arg, tuple) else (arg,)
        if isinstance(array, np.ndarray):
            own = said[-1] if said and said[-1] != "common" else dtype
            array = Laid(array, own, how if i == which else "dense")
            outputs += [array] if "out" in said else []
        given.append(array)
    getattr(_C, op)(*(x.view if isinstance(x, Laid) else x for x in given))
    return [x.values() for x in outputs]


@pytest.mark.parametrize("how", ["far", "backwards", "odd"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_an_array_of_a_call_as_a_view(dtype, how):
    tried = set()
    for op, args in calls():
        want = run(op, args, dtype)
        for i, arg in enumerate(args):
            array = arg[0] if isinstance(arg, tuple) else arg
            if not isinstance(array, np.ndarray) or (how != "odd" and math.prod(array.shape[:-1]) < 2):
                continue
            if how == "far" and not EMULATED and cuda.memory_info()[0] < 10 << 30:
                pytest.skip(
                    f"rows 2^31 elements apart need 8 GiB, {cuda.memory_info()[0] / 2**30:.1f} are free"
                )
            for got, x in zip(run(op, args, dtype, i, how), want, strict=True):
                assert np.abs(got - x).max() <= TOLERANCE[dtype] * max(np.abs(x).max(), 1e-3), (
                    f"{op}: argument {i}"
                )
            tried.add(op)
    assert tried >= set(_C.specs) - ({"adamw", "sum_squares"} if how != "odd" else set())


def test_a_view_with_a_reversed_last_axis_is_refused():
    x = Laid(np.ones((3, 8), np.float32), "float32", "dense")
    back = mirror.View(x.x, dlpack.tensor_of(x.view).data + 7 * 4, dlpack.tensor_of(x.view))
    back.strides[1] = -1
    out = Tensor((3, 8), "float32", "cuda")
    with pytest.raises(
        ValueError, match=r"^swiglu_forward: gate axis 1 should be dense \(stride 1\), got stride -1$"
    ):
        _C.swiglu_forward(out, back, x.view)
    assert (out.cpu().numpy() == 0).all()
    _C.swiglu_forward(out, x.view, x.view)
    assert out.cpu().numpy() == pytest.approx(1 / (1 + math.exp(-1)))
