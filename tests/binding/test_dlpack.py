"""Arrays of other libraries through DLPack: capsules, old and new, torch's exchange API, and leaks."""

import ctypes
import itertools
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from dlpack import CapsuleDestructor, Deleter, DLTensor, Old, Versioned, new_capsule, raw_is_valid

from longlora import _C, Tensor, job, ops

BF16 = ml_dtypes.bfloat16


def f32(*shape):
    return np.random.default_rng(list(shape)).standard_normal(shape).astype(np.float32)


def int64s(*numbers):
    return (ctypes.c_int64 * len(numbers))(*numbers)


# ---- capsules from a producer in ctypes that counts deletions ------------------------------------


class Producer:
    """A float32 array behind DLPack. If `old`, it takes no keywords. Other arguments change the capsule."""

    def __init__(self, array, old=False, flags=0, major=1, byte_offset=0, null_strides=False, **tensor):
        self.array, self.old, self.flags, self.major = np.ascontiguousarray(array), old, flags, major
        self.shape, self.dtype = array.shape, array.dtype
        self.deleted = self.capsules = 0
        n = array.ndim
        self.c_shape = (ctypes.c_int64 * n)(*array.shape)
        self.c_strides = (ctypes.c_int64 * n)(*[s // array.itemsize for s in self.array.strides])
        said = dict(
            data=self.array.ctypes.data - byte_offset,
            device_type=1,
            device_id=0,
            ndim=n,
            code=2,
            bits=32,
            lanes=1,
            shape=self.c_shape,
            strides=None if null_strides else self.c_strides,
            byte_offset=byte_offset,
        )
        self.tensor = DLTensor(**{**said, **tensor})
        self.deleter = Deleter(self._delete)
        self.name = b"dltensor" if old else b"dltensor_versioned"
        self.destructor = CapsuleDestructor(
            lambda capsule: self.deleter(None) if raw_is_valid(capsule, self.name) else None
        )

    def _delete(self, managed):
        self.deleted += 1

    def __dlpack__(self, **keywords):
        if self.old and keywords:
            raise TypeError("__dlpack__() got an unexpected keyword argument 'max_version'")
        self.capsules += 1
        self.managed = (
            Old(self.tensor, None, self.deleter)
            if self.old
            else Versioned(self.major, 0, None, self.deleter, self.flags, self.tensor)
        )
        return new_capsule(ctypes.addressof(self.managed), self.name, self.destructor)

    def __array_namespace__(self):
        return np


@pytest.mark.parametrize("old", [False, True])
def test_capsules_are_borrowed_and_deleted_once(old):
    x = f32(5, 7)
    for kwargs in ({}, {"null_strides": True}, {"byte_offset": 64}):
        p, out = Producer(x, old=old, **kwargs), np.empty((5, 7), np.float32)
        _C.cast(out, p)
        np.testing.assert_array_equal(out, x)
        assert (p.capsules, p.deleted) == (1, 1)
    p = Producer(x, old=old)
    with pytest.raises(ValueError, match=r"cast: out axis 0 should be M=5, got 4"):
        _C.cast(np.empty((4, 7), np.float32), p)
    assert (p.capsules, p.deleted) == (1, 1), "deleted after an exception too"


def test_versioned_output_is_written():
    p, x = Producer(np.zeros((2, 3), np.float32)), f32(2, 3)
    _C.cast(p, x)
    np.testing.assert_array_equal(p.array, x)
    assert p.deleted == 1


@pytest.mark.parametrize(
    "kwargs, as_output, error, words",
    [
        (dict(flags=1), True, ValueError, "out is an output and read-only"),
        (dict(old=True), True, BufferError, "out is an output and needs DLPack 1"),
        (
            dict(device_type=4),
            False,
            BufferError,
            "x should be on the CPU or a CUDA device, got DLPack device type 4",
        ),
        (dict(lanes=2), False, TypeError, r"x has DLPack dtype \(2, 32, 2\)"),
        (dict(code=5, bits=64), False, TypeError, r"x has DLPack dtype \(5, 64, 1\)"),
        (dict(major=2), False, BufferError, "x uses DLPack version 2, expected 1"),
        (dict(ndim=9), False, ValueError, "x should have 2 axes, got 9"),
        (dict(byte_offset=2, data=16), False, ValueError, "x is not aligned"),
        (dict(data=None), False, BufferError, "x has no memory of its own"),
        (dict(data=None, byte_offset=64), False, BufferError, "x has no memory of its own"),
        (dict(shape=None), False, BufferError, "x has no sizes in its capsule"),
        (dict(shape=int64s(2, -3)), False, BufferError, "x has a negative size in its capsule"),
        (dict(shape=int64s(2**32, 2**32)), False, ValueError, "x has axes or strides that reach farther"),
        (dict(shape=int64s(2**62, 0)), False, ValueError, "x has axes or strides that reach farther"),
        (dict(strides=int64s(2**62, 1)), False, ValueError, "x has axes or strides that reach farther"),
        (dict(strides=int64s(-(2**63), 1)), False, ValueError, "x has axes or strides that reach farther"),
    ],
)
def test_capsules_that_must_be_refused(kwargs, as_output, error, words):
    p, other = Producer(f32(2, 3), **kwargs), np.full((2, 3), np.nan, np.float32)
    with pytest.raises(error, match="^cast: .*" + words):
        _C.cast(*((p, f32(2, 3)) if as_output else (other, p)))
    assert np.isnan(other).all() and p.deleted == 1


@pytest.mark.parametrize(
    "device, error, words",
    [
        ([1, 0], TypeError, r"x returned \[1, 0\] as its __dlpack_device__, not two integers"),
        ((1,), TypeError, r"x returned \(1,\) as its __dlpack_device__"),
        (("cpu", 0), TypeError, r"x returned \('cpu', 0\) as its __dlpack_device__"),
        ((2**40, 0), TypeError, r"x returned \(1099511627776, 0\) as its __dlpack_device__"),
        (None, TypeError, "x returned None as its __dlpack_device__"),
        ((2, 70), BufferError, "x is on cuda:70, which cannot be used: "),
        (RuntimeError("lost"), BufferError, "x cannot be borrowed: lost"),
    ],
)
def test_devices_that_must_be_refused(device, error, words):
    class Lost(Producer):
        def __dlpack_device__(self):
            if isinstance(device, Exception):
                raise device
            return device

    with pytest.raises(error, match="^cast: " + words):
        _C.cast(np.empty((2, 3), np.float32), Lost(f32(2, 3)))


def test_numbers_that_must_be_refused():
    """Also where the conversion raised an exception of its own."""
    x = f32(2, 3)
    for number in (np.array([1.0, 2.0]), "1", None, 10**400):
        with pytest.raises(TypeError, match="^accumulate: scale should be a number, got "):
            _C.accumulate(x, x.copy(), number)


def test_empty_arrays_need_no_memory():
    for shape in ((0, 3), (2, 0)):
        empty = np.empty(shape, np.float32)
        for old in (False, True):
            _C.cast(empty, Producer(empty, old=old, data=None, byte_offset=64))
    lse, none = np.empty((1, 2, 0), np.float32), Producer(np.empty((1, 0, 2, 8), np.float32), data=None)
    _C.s2_attention_forward(np.empty((1, 0, 2, 8), np.float32), lse, none, none, none, None, 4, 0, 0, 1.0)
    t = Tensor((0, 3))
    t.copy_(Producer(np.empty((0, 3), np.float32), data=None))
    with pytest.raises(BufferError, match=r"^Tensor.copy_: source has no memory of its own"):
        Tensor((2, 3)).copy_(Producer(f32(2, 3), data=None))


def test_producer_that_fails():
    class Failing:
        dtype, shape = "float32", (2, 3)

        def __dlpack__(self, max_version=None):
            raise RuntimeError("on strike")

    class Wrong(Failing):
        def __dlpack__(self, max_version=None):
            return 7

    with pytest.raises(BufferError, match="cast: x cannot be borrowed: on strike"):
        ops.cast(Failing(), "float32")
    with pytest.raises(TypeError, match="cast: x returned 7 instead of a DLPack capsule"):
        ops.cast(Wrong(), "float32")
    with pytest.raises(TypeError, match=r"cast: x must be an array \(NumPy or DLPack\), got <class 'list'>"):
        _C.cast(np.empty((1, 1), np.float32), [[1.0]])


def test_other_libraries_get_their_own_arrays_back():
    """Results for libraries with immutable arrays (JAX) are made by from_dlpack. NumPy stands in for one."""
    out, rstd, total = ops.rms_norm_forward(Producer(f32(3, 8)), f32(8))
    assert type(out) is type(rstd) is np.ndarray and isinstance(total, Producer)
    want = ops.rms_norm_forward(f32(3, 8), f32(8))[0]
    np.testing.assert_array_equal(out, want)


# ---- torch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_torch_in_torch_out(dtype):
    x, w = torch.from_numpy(f32(6, 16)).to(dtype), torch.ones(16, dtype=dtype)
    out, rstd, total = ops.rms_norm_forward(x, w)
    assert out.dtype == dtype and rstd.dtype == torch.float32 and total is x
    bits = ops.rms_norm_forward(as_numpy(x), as_numpy(w))[0]
    np.testing.assert_array_equal(as_numpy(out).view(np.uint8), bits.view(np.uint8))
    parameter = torch.nn.Parameter(x.clone())  # borrowed unchanged: the caller handles gradients
    assert torch.equal(ops.rms_norm_forward(parameter, w)[0], out)
    strided = torch.empty(6, 40, dtype=dtype)[:, 3:19].copy_(x)
    assert torch.equal(ops.rms_norm_forward(strided, w)[0], out)
    dx, dweight = ops.rms_norm_backward(x, x, rstd, w)
    assert dweight.dtype == torch.float32 and dx.dtype == dtype
    assert ops.embedding_backward(
        x, torch.zeros(6, dtype=torch.int32), torch.arange(6, dtype=torch.int32), 3
    ).shape == (3, 16)


def as_numpy(t):
    return t.view(torch.int16).numpy().view(BF16) if t.dtype == torch.bfloat16 else t.numpy()


def test_torch_exchange_api_and_capsules_agree():
    class Behind:
        """A torch tensor without the C exchange API."""

        def __init__(self, t):
            self.t, self.shape, self.dtype = t, t.shape, t.dtype

        def __dlpack__(self, **keywords):
            return self.t.__dlpack__(**keywords)

    assert hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
    for t in (
        torch.from_numpy(f32(4, 6)),
        torch.from_numpy(f32(6, 4)).T,
        torch.from_numpy(f32(8, 12))[::2, ::2],
        torch.tensor([[2.0]]).expand(4, 6),
        torch.empty(0, 6),
        torch.from_numpy(f32(4, 6)).to(torch.bfloat16),
    ):
        a, b = torch.from_numpy(f32(6, t.shape[0])), torch.empty(2, 6, t.shape[1])
        _C.matmul(b[0], a, t, 1.0, 0.0)
        _C.matmul(b[1], a, Behind(t), 1.0, 0.0)
        assert torch.equal(b[0], b[1]) and torch.allclose(b[0], a @ t.float(), atol=1e-5)
    with pytest.raises(BufferError, match="cast: x cannot be borrowed: .*requires? grad"):
        ops.cast(Behind(torch.ones(2, 2, requires_grad=True)), "float32")
    with pytest.raises(TypeError, match="cast: x has DLPack dtype"):
        _C.cast(torch.empty(2, 2), torch.zeros(2, 2, dtype=torch.complex64))
    for unusual in (torch.zeros(2, 2, device="meta"), torch.zeros(2, 2).to_sparse()):
        with pytest.raises((BufferError, TypeError), match="^cast: x"):
            _C.cast(torch.empty(2, 2), unusual)


def test_a_lazily_negated_view_is_refused():
    """torch keeps the sign of z.conj().imag beside its memory, which holds the other one."""
    negated = torch.tensor([[1 + 2j]]).conj().imag
    assert negated.is_neg() and negated.item() == -2

    class Behind:
        def __init__(self, t):
            self.t = t

        def __dlpack__(self, **keywords):
            return self.t.__dlpack__(**keywords)

        def is_neg(self):
            return self.t.is_neg()

    out = torch.zeros(1, 1)
    for x in (negated, Behind(negated)):
        with pytest.raises(BufferError, match=r"^cast: x is a lazily negated view; give x.resolve_neg\(\)"):
            _C.cast(out, x)
    with pytest.raises(BufferError, match="^cast: out is a lazily negated view"):
        _C.cast(negated, out)
    with pytest.raises(BufferError, match="lazily negated view"):
        Tensor((1, 1)).copy_(negated)
    assert out.item() == 0 and negated.item() == -2
    assert ops.cast(negated.resolve_neg(), "float32").item() == -2


@pytest.mark.parametrize(
    "make",
    [
        """
from torch._subclasses.fake_tensor import FakeTensorMode
with FakeTensorMode():
    x = torch.randn(4, 64)
""",
        """
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
x = distribute_tensor(torch.ones(4, 64), init_device_mesh("cpu", (1,)), [Shard(0)])
""",
    ],
    ids=["fake", "distributed"],
)
def test_tensors_without_memory(make):
    """In a process of its own, which an access would end."""
    script = f"""
import torch
from longlora import _C
{make}
for arguments in ((torch.empty(4, 64), x), (x, torch.empty(4, 64))):
    try:
        _C.cast(*arguments)
    except BufferError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and lines[0].startswith("cast: x ") and lines[1].startswith("cast: out "), lines


# ---- leaks ---------------------------------------------------------------------------------------


def test_calls_leak_nothing():
    x, t, u, out = f32(8, 8), Tensor((8, 8)), torch.from_numpy(f32(8, 8)), np.empty((8, 8), np.float16)
    producers = Producer(x), Producer(x, old=True)

    def rounds(count, *arrays):
        """Make good and bad calls and exports, with and without a consumer -> resident bytes."""
        for _ in range(count):
            for a in arrays:
                for arguments in ((out, a), (x[:3], a), (a, None), (a, x[:3])):
                    try:
                        _C.cast(*arguments)
                    except (ValueError, TypeError, BufferError):
                        pass
            np.from_dlpack(t, copy=True)
            memoryview(t), t[1:, 2:].numpy(), t.__dlpack__(), torch.from_dlpack(t)
        return job.resident_memory()

    before = [sys.getrefcount(p) for p in producers]
    rounds(50, *producers)
    assert [sys.getrefcount(p) for p in producers] == before and all(
        p.deleted == p.capsules for p in producers
    )
    count, threads = 3000, _C.get_num_threads()
    _C.set_num_threads(1)  # waking other threads would take most of the time
    held = [rounds(count, x, t, u) for _ in range(5)][1:]
    _C.set_num_threads(threads)
    grown = min(b - a for a, b in itertools.pairwise(held))  # allocators grow at first; leaks grow every time
    assert grown < count * 32, f"{grown} bytes more after {count} rounds: each leaks an object"
