"""The border: what ops take, what they refuse and how they say it, who owns what."""
import ctypes
import gc
import sys
import types

import ml_dtypes
import numpy as np
import pytest

import longlora
from longlora import Tensor, _C, ops

torch = pytest.importorskip("torch", reason="torch is one of the libraries whose arrays are taken")


def rows(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# ---- kinds of arrays ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_kind_gives_the_same_and_gets_its_own_kind(dtype):
    x, w = rows(5, 24), rows(24, seed=1)
    x, w = (a.astype(getattr(ml_dtypes, dtype, dtype)) for a in (x, w))
    want, rstd, _ = ops.rms_norm_forward(x, w)
    assert want.dtype == x.dtype and isinstance(want, np.ndarray)
    bits = np.uint32 if dtype == "float32" else np.uint16

    def as_torch(a):
        return torch.from_numpy(a.view(np.int32 if dtype == "float32" else np.int16)).view(getattr(torch, dtype))
    out, r, _ = ops.rms_norm_forward(as_torch(x), as_torch(w))
    assert isinstance(out, torch.Tensor) and str(out.dtype) == f"torch.{dtype}" and isinstance(r, torch.Tensor)
    np.testing.assert_array_equal(out.view(torch.int32 if dtype == "float32" else torch.int16).numpy().view(bits), want.view(bits))

    tx, tw = Tensor(x.shape, dtype), Tensor(w.shape, dtype)
    tx.copy_(x)
    tw.copy_(w)
    out, r, _ = ops.rms_norm_forward(tx, tw)
    assert isinstance(out, Tensor) and out.dtype == dtype
    np.testing.assert_array_equal(out.numpy().view(bits), want.view(bits))
    np.testing.assert_array_equal(r.numpy(), rstd)


def test_torch_parameters_and_capsules_give_the_same():
    class NoExchange(torch.Tensor):
        __dlpack_c_exchange_api__ = None
    x, w = torch.tensor(rows(4, 8)), torch.nn.Parameter(torch.tensor(rows(8, seed=1)))
    want = ops.rms_norm_forward(x, w)[0]
    got = ops.rms_norm_forward(x.as_subclass(NoExchange), w.detach())[0]
    assert torch.equal(torch.as_tensor(got), want)


def test_another_library_gets_its_own_arrays_back():
    """A stand-in for JAX or CuPy: immutable arrays that speak DLPack, and a from_dlpack."""
    class Array:
        def __init__(self, data):
            self.data, self.shape, self.dtype = data, data.shape, data.dtype

        def __dlpack__(self, **kwargs):
            return self.data.__dlpack__(**kwargs)

        def __array_namespace__(self):
            return types.SimpleNamespace(from_dlpack=lambda t: Array(np.from_dlpack(t)))
    gate, up = rows(3, 5), rows(3, 5, seed=1)
    out = ops.swiglu_forward(Array(gate), Array(up))
    assert isinstance(out, Array)
    np.testing.assert_array_equal(out.data, ops.swiglu_forward(gate, up))


def test_jax():
    jax = pytest.importorskip("jax", reason="JAX is not among the test dependencies; where it is installed, it is tested")
    x = jax.numpy.asarray(rows(3, 5))
    out = ops.swiglu_forward(x, x)
    assert isinstance(out, jax.Array)


# ---- layouts --------------------------------------------------------------------------------------------------------

def test_strides():
    wide, w = rows(6, 40), rows(16, seed=1)
    want = ops.rms_norm_forward(np.ascontiguousarray(wide[:, 8:24]), w)[0]
    for x in (wide[:, 8:24], wide[::-1][::-1, 8:24], torch.tensor(wide)[:, 8:24]):
        np.testing.assert_array_equal(np.asarray(ops.rms_norm_forward(x, w if isinstance(x, np.ndarray) else torch.tensor(w))[0]), want)
    flipped = ops.rms_norm_forward(wide[::-1, 8:24], w)[0]
    np.testing.assert_array_equal(flipped, want[::-1])
    broadcast = np.broadcast_to(wide[:1, :16], (6, 16))
    np.testing.assert_array_equal(ops.rms_norm_forward(broadcast, w)[0][5], ops.rms_norm_forward(wide[:1, :16], w)[0][0])
    one = np.lib.stride_tricks.as_strided(rows(1, 1), (3, 1), (4, 4096))             # a stride of an axis of size 1 means nothing
    with pytest.raises(ValueError):
        ops.rms_norm_forward(wide[:, ::2][:, :16], w)
    assert ops.rms_norm_forward(np.ascontiguousarray(one[:1]), w[:1])[0].shape == (1, 1)


def test_misaligned_memory_is_refused():
    memory = np.zeros(4 * 12 + 1, np.uint8)[1:].view(np.float32).reshape(3, 4)
    if memory.ctypes.data % 4 == 0:
        pytest.skip("this allocator gave memory that is aligned again")
    with pytest.raises(ValueError, match="x is not aligned"):
        ops.rms_norm_forward(memory, rows(4))


BIG = np.zeros((3, 4), ">f4")
BAD = [
    (lambda o, x: (o, x[:2]), ValueError, r"cast: out axis 0 should be M=2, got 3"),
    (lambda o, x: (o, x[0]), ValueError, r"cast: x should have 2 axes, got 1"),
    (lambda o, x: (o, x.T), ValueError, r"x axis 1 should be dense \(stride 1\), got stride 4"),
    (lambda o, x: (o, x.astype(int)), TypeError, r"cast: x should be float32, bfloat16 or float16, got int64"),
    (lambda o, x: (o, x.astype(complex)), TypeError, r"cast: x has dtype complex128"),
    (lambda o, x: (o, BIG), TypeError, r"byte order"),
    (lambda o, x: (o, None), TypeError, r"cast: x must be an array, got None"),
    (lambda o, x: (o, [1.0]), TypeError, r"cast: x must be an array \(NumPy or DLPack\), got <class 'list'>"),
    (lambda o, x: (o,), TypeError, r"cast: takes 2 arguments"),
    (lambda o, x: (o, o), ValueError, r"cast: output out overlaps x"),
    (lambda o, x: (o, np.zeros((1, 1, 1, 1, 1), np.float32)), ValueError, r"x should have 2 axes, got 5"),
    (lambda o, x: (o, torch.zeros(3, 4, device="meta")), (BufferError, RuntimeError, TypeError, ValueError, NotImplementedError), None),
    (lambda o, x: (o, torch.zeros(3, 4).to_sparse()), (BufferError, RuntimeError, TypeError, ValueError), None),
]


@pytest.mark.parametrize("make,error,message", BAD, ids=range(len(BAD)))
def test_what_is_wrong_is_named_before_anything_is_written(make, error, message):
    out, x = np.full((3, 4), np.nan, np.float32), rows(3, 4)
    with pytest.raises(error, match=message):
        _C.cast(*make(out, x))
    assert np.isnan(out).all()


def test_outputs_that_cannot_be_written():
    x, out = rows(3, 4), rows(3, 4)
    out.flags.writeable = False
    for locked in (out, Tensor.wrap(bytes(48), (3, 4), "float32")):
        with pytest.raises(ValueError, match="output out is read-only"):
            _C.cast(locked, x)
    class Locked:
        __dlpack__ = out.__dlpack__
    with pytest.raises((ValueError, BufferError), match="read"):
        _C.cast(Locked(), x)


def test_overlaps():
    both = rows(4, 12)
    g, u = both[:, :6], both[:, 6:]
    _C.swiglu_backward(g, u, rows(4, 6), g, u)                         # columns of one matrix do not touch
    with pytest.raises(ValueError, match="output dgate overlaps dup"):
        _C.swiglu_backward(both[:, :6], both[:, 5:11], rows(4, 6), rows(4, 6), rows(4, 6))
    with pytest.raises(ValueError, match="overlaps"):                  # shifted by a row: not the very same memory
        _C.rms_norm_backward(both[:3], None, rows(3, 12), both[1:], rows(3), rows(12), None)


@pytest.mark.parametrize("value", [1.5, float("nan"), float("inf"), "8", None])
def test_integers_are_integers(value):
    q = rows(1, 8, 2, 4).reshape(1, 8, 2, 4)
    with pytest.raises(TypeError, match="group_size should be an integer"):
        ops.s2_attention_forward(q, q, q, group_size=value)


def test_mixed_dtypes_are_refused():
    with pytest.raises(TypeError, match="rms_norm_forward: weight should be float32 as out is, got float16"):
        ops.rms_norm_forward(rows(2, 4), rows(4).astype(np.float16))


# ---- Tensor ---------------------------------------------------------------------------------------------------------

def test_tensor_views():
    arena = Tensor((4096,), "uint8")
    t = arena.view((4, 6), "float32", 64)
    t.copy_(rows(4, 6))
    np.testing.assert_array_equal(t[1:3, 2:5].numpy(), rows(4, 6)[1:3, 2:5])
    np.testing.assert_array_equal(t[-1].numpy(), rows(4, 6)[-1])
    assert t[1, 2].numpy() == rows(4, 6)[1, 2] and t[4:].shape == (0, 6)
    np.testing.assert_array_equal(t.reshape((3, 8)).numpy().reshape(4, 6), rows(4, 6))
    assert (t.nbytes, t.ndim, t.device, t.dtype) == (96, 2, "cpu", "float32")
    del arena
    gc.collect()
    np.testing.assert_array_equal(t.numpy(), rows(4, 6))               # the view keeps the memory


@pytest.mark.parametrize("make,error", [
    (lambda t: t.view((100,)), ValueError), (lambda t: t.view((1,), offset=2), ValueError), (lambda t: t.view((1,), offset=-4), ValueError),
    (lambda t: t[:, 1:].view((2,)), ValueError), (lambda t: t[:, 1:].reshape((4, 5)), ValueError), (lambda t: t[::2], IndexError),
    (lambda t: t[4], IndexError), (lambda t: t[0, 0, 0], IndexError), (lambda t: t["a"], TypeError), (lambda t: Tensor((-1,)), ValueError),
    (lambda t: Tensor((1 << 40, 1 << 40)), ValueError), (lambda t: Tensor((1, 1, 1, 1, 1)), ValueError), (lambda t: Tensor((2,), "int8"), TypeError),
    (lambda t: t.copy_(rows(4, 5)), ValueError), (lambda t: t.copy_(np.zeros((4, 6), int)), TypeError),
    (lambda t: Tensor.wrap(bytes(10), (3,), "float32"), ValueError), (lambda t: Tensor.wrap(bytes(16), (1,), "float32", 13), ValueError),
    (lambda t: Tensor((1 << 45,)), MemoryError),
])
def test_what_a_tensor_refuses(make, error):
    with pytest.raises(error):
        make(Tensor((4, 6)))


def test_tensor_out_and_in():
    t = Tensor((3, 4))
    t.copy_(rows(3, 4))
    for view in (np.asarray(t), np.from_dlpack(t), torch.from_dlpack(t).numpy(), np.array(memoryview(t))):
        np.testing.assert_array_equal(view, rows(3, 4))
    np.from_dlpack(t)[0, 0] = 7                                        # the same memory, and writable
    assert t.numpy()[0, 0] == 7
    np.testing.assert_array_equal(np.asarray(t[:, 1:3]), t.numpy()[:, 1:3])
    t.copy_(rows(4, 3).T)
    np.testing.assert_array_equal(t.numpy(), rows(4, 3).T)
    half = Tensor((3, 4), "bfloat16")
    half.copy_(t)
    assert torch.from_dlpack(half).dtype == torch.bfloat16
    with pytest.raises(BufferError, match="bfloat16"):
        memoryview(half)
    locked = Tensor.wrap(np.arange(6, dtype=np.float32).tobytes(), (2, 3), "float32")
    assert not np.asarray(locked).flags.writeable and not np.from_dlpack(locked).flags.writeable
    with pytest.raises(BufferError):
        locked.__dlpack__()
    for bad in (dict(stream=1), dict(dl_device=(2, 0))):
        with pytest.raises(BufferError):
            t.__dlpack__(**bad)
    assert t.__dlpack_device__() == (1, 0)


# ---- ownership ------------------------------------------------------------------------------------------------------

class DLTensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("device", ctypes.c_int32 * 2), ("ndim", ctypes.c_int32), ("dtype", ctypes.c_uint8 * 4),
                ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)), ("offset", ctypes.c_uint64)]


class Managed(ctypes.Structure):
    pass


Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(Managed))
Managed._fields_ = [("t", DLTensor), ("context", ctypes.c_void_p), ("deleter", Deleter)]


class Producer:
    """An old producer, by hand: no strides, a byte offset, a device and a count of deletions."""

    def __init__(self, shape, device=(1, 0), dtype=(2, 32, 1), versions=False):
        self.memory = np.arange(2 + np.prod(shape), dtype=np.float32)
        self.size, self.deleted = (ctypes.c_int64 * len(shape))(*shape), 0
        self.deleter = Deleter(self._delete)
        self.m = Managed(DLTensor(self.memory.ctypes.data, (ctypes.c_int32 * 2)(*device), len(shape), (ctypes.c_uint8 * 4)(*dtype[:2], dtype[2], 0),
                                  self.size, None, 8), None, self.deleter)

    def _delete(self, pointer):
        self.deleted += 1

    def __dlpack__(self):
        destroy = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._destroy)
        self.keep = destroy
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return new(ctypes.addressof(self.m), b"dltensor", ctypes.cast(destroy, ctypes.c_void_p))

    def _destroy(self, capsule):
        self.deleter(ctypes.pointer(self.m))                           # the capsule was given back under the name it came with


def test_a_borrowed_capsule_is_given_back_once():
    producer, out = Producer((2, 3)), np.empty((2, 3), np.float32)
    _C.cast(out, producer)
    np.testing.assert_array_equal(out, np.arange(2, 8).reshape(2, 3))
    assert producer.deleted == 1
    for bad, error in ((Producer((2, 3), device=(2, 0)), BufferError), (Producer((2, 3), dtype=(2, 32, 4)), TypeError),
                       (Producer((3, 3)), ValueError), (Producer((2, 3), dtype=(5, 64, 1)), TypeError)):
        with pytest.raises(error):
            _C.cast(out, bad)
        assert bad.deleted == 1


def test_references_are_given_back():
    things = [rows(3, 4), torch.tensor(rows(3, 4)), Tensor((3, 4)), np.empty((3, 4), np.float32)]
    before = [sys.getrefcount(x) for x in things]
    for _ in range(100):
        for x in things[:3]:
            _C.cast(things[3], x)
            with pytest.raises((TypeError, ValueError)):
                _C.cast(things[3], x, 1)
            with pytest.raises((TypeError, ValueError)):
                _C.cast(things[3][:2], x)
        np.from_dlpack(things[2]), torch.from_dlpack(things[2]), memoryview(things[2]), things[2][0], things[2].numpy()
        things[2].__dlpack__(), things[2].__dlpack__(max_version=(1, 0))
    del x
    gc.collect()
    assert [sys.getrefcount(x) for x in things] == before


def test_memory_is_returned():
    import resource
    def churn():
        for _ in range(50):
            t = Tensor((1 << 20,))
            t.fill(1)
            np.asarray(t[5:10]), t.view((1,))
    churn()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    churn()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000


def test_calls_are_counted():
    before = _C.calls()["cast"]
    _C.cast(np.empty((1, 1), np.float32), rows(1, 1))
    assert _C.calls()["cast"] == before + 1


def test_specs_are_there_for_every_op():
    assert set(_C.calls()) == set(_C.specs)
    assert longlora.ops.swiglu_forward.__doc__.startswith("gate and up [M,F]")
