"""Shared by the tests of the border on a GPU: arrays, foreign arrays, streams, calls with a known result."""

import contextlib
import ctypes

import dlpack
import ml_dtypes
import numpy as np
import pytest

from longlora import _C, Tensor, cuda, ops

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
EMULATED = cuda.built_for() == "emulation"
needs_cuda = pytest.mark.skipif(not cuda.is_available(), reason=f"no CUDA: {cuda.reason()}")
needs_two = pytest.mark.skipif(cuda.device_count() < 2, reason="needs two CUDA devices")
needs_emulation = pytest.mark.skipif(not EMULATED, reason="sets what the emulated machine has")


def f32(*shape):
    return np.random.default_rng(list(shape)).standard_normal(shape).astype(np.float32)


def tensor(x, device="cuda", **kwargs):
    t = Tensor(x.shape, x.dtype.name, device, **kwargs)
    t.copy_(x)
    return t


def back(t):
    cuda.synchronize()
    return t.cpu().numpy()


class Borrowed:
    """A Tensor behind DLPack alone. It counts capsules and deletions, and records the streams of requests."""

    all = []  # keeps every producer alive, because a capsule may outlive it

    def __init__(self, t, old=False, **said):
        self.t, self.shape, self.dtype, self.old, self.said = t, t.shape, t.dtype, old, said
        self.streams, self.taken, self.deleted = [], 0, 0
        self.deleter = dlpack.Deleter(self._delete)
        self.name = b"dltensor" if old else b"dltensor_versioned"
        self.destructor = dlpack.CapsuleDestructor(
            lambda capsule: self.deleter(None) if dlpack.raw_is_valid(capsule, self.name) else None
        )
        self.all.append(self)

    def _delete(self, managed):
        self.deleted += 1

    def __dlpack__(self, stream=None, **keywords):
        if self.old and keywords:
            raise TypeError("__dlpack__() got an unexpected keyword argument")
        self.streams.append(stream)
        return dlpack.new_capsule(self.address(), self.name, self.destructor)

    def address(self):
        """The address of a new managed tensor."""
        self.taken += 1
        tensor = dlpack.tensor_of(self.t)
        for name, value in self.said.items():
            setattr(tensor, name, value)
        self.managed = (
            dlpack.Old(tensor, None, self.deleter)
            if self.old
            else dlpack.Versioned(1, 0, None, self.deleter, 0, tensor)
        )
        self.tensor = tensor  # owns the arrays that the copy in self.managed points to
        return ctypes.addressof(self.managed)

    def __dlpack_device__(self):
        kind, index = self.t.__dlpack_device__()
        return kind, self.said.get("device_id", index)


@contextlib.contextmanager
def new_stream(device=0, capture=0):
    """A stream's handle: on the emulation a struct (device, number of the capture), on a GPU torch's."""
    if EMULATED:
        made = (ctypes.c_int32 * 2)(device, capture)
        yield ctypes.addressof(made)
    else:
        torch = pytest.importorskip("torch")
        yield torch.cuda.Stream(device).cuda_stream


def swiglu_is_right(device="cuda"):
    x, y = f32(3, 8), f32(8, 3).reshape(3, 8)
    out = ops.swiglu_forward(tensor(x, device), tensor(y, device))
    np.testing.assert_allclose(back(out), ops.swiglu_forward(x, y), rtol=1e-5, atol=1e-6)


def matmul_is_right():
    a, b = f32(5, 7), f32(7, 3)
    out = Tensor((5, 3), "float32", "cuda")
    _C.matmul(out, tensor(a), tensor(b), 1.0, 0.0)
    np.testing.assert_allclose(back(out), a @ b, rtol=1e-5, atol=1e-5)
