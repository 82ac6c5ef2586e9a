"""longlora.Tensor: views, the buffer protocol, wrap, copies, DLPack, and the lifetime of its memory."""

import ctypes
import gc
import hashlib
import mmap
import os
import re
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from dlpack import capsule_pointer, python_api

from longlora import _C, Tensor, arrays, ops

BF16 = ml_dtypes.bfloat16


def f32(*shape):
    return np.random.default_rng(list(shape)).standard_normal(shape).astype(np.float32)


def tensor(array):
    t = Tensor(array.shape, array.dtype.name)
    t.copy_(array)
    return t


def test_tensor_and_numpy_share_memory():
    t = Tensor((3, 4), "float32")
    assert (t.shape, t.dtype, t.device, t.ndim, t.nbytes) == ((3, 4), "float32", "cpu", 2, 48)
    assert repr(t) == "longlora.Tensor(shape=(3, 4), dtype='float32')"
    t.fill(2)
    for x in (t.numpy(), np.asarray(t), np.from_dlpack(t), memoryview(t)):
        assert x.shape == (3, 4)
        x[1, 2] += 1
    assert t.numpy()[1, 2] == 6 and t.numpy().ctypes.data % 64 == 0
    assert torch.from_dlpack(t)[1, 2] == 6
    for dtype in arrays.DTYPES:
        t = Tensor((2, 3), dtype)
        t.fill(3)
        assert np.asarray(t).dtype.name == dtype and (np.asarray(t) == 3).all()
        assert str(torch.from_dlpack(t).dtype) == "torch." + dtype
    with pytest.raises(BufferError, match="no bfloat16"):
        memoryview(Tensor(3, "bfloat16"))
    for shape in ((), 0, 5, (0, 7), (2, 1, 0, 3)):
        assert Tensor(shape).numpy().shape == Tensor(shape).shape
        assert np.from_dlpack(Tensor(shape)).shape == Tensor(shape).shape


def test_tensor_views():
    arena = Tensor(1 << 12, "uint8")
    a, b = arena.view((4, 8), "float32", 64), arena.view((3, 5), "bfloat16", 1024)
    a.copy_(f32(4, 8))
    b.fill(-1)
    assert (
        a.numpy().base is not None
        and (arena.numpy()[64:192].view(np.float32).reshape(4, 8) == f32(4, 8)).all()
    )
    np.testing.assert_array_equal(a[1:3, 2:].numpy(), f32(4, 8)[1:3, 2:])
    np.testing.assert_array_equal(a[-1].numpy(), f32(4, 8)[-1])
    np.testing.assert_array_equal(a[:, 3].numpy(), f32(4, 8)[:, 3])
    np.testing.assert_array_equal(
        a.reshape((2, 2, 8))[1, :, 1:].numpy(), f32(4, 8).reshape(2, 2, 8)[1, :, 1:]
    )
    np.testing.assert_array_equal(np.asarray(a[:, 2:4]), f32(4, 8)[:, 2:4])
    np.testing.assert_array_equal(torch.from_dlpack(a[:, 2:4]).numpy(), f32(4, 8)[:, 2:4])
    for view in (
        lambda: arena.view(8, "float32", 2),
        lambda: arena.view(8, "float32", -4),
        lambda: arena.view(1025, "float32"),
        lambda: a[:, 1:].view(3),
        lambda: a[:, 1:].reshape(28),
        lambda: a.reshape(31),
        lambda: Tensor((-1,)),
        lambda: Tensor((1 << 40, 1 << 40)),
        lambda: Tensor((1,) * 5),
    ):
        with pytest.raises(ValueError, match="^Tensor"):
            view()
    for index in (4, -5, (0, 8), (0, 0, 0), slice(0, 4, 2)):
        with pytest.raises(IndexError, match="^Tensor"):
            a[index]
    with pytest.raises(TypeError, match="index should be an integer or a slice, got 'rows'"):
        a["rows"]
    for dtype in ("float8", "f4"):
        with pytest.raises(TypeError, match="dtype should be float32, .* got"):
            Tensor(3, dtype)
    with pytest.raises(MemoryError, match="cannot allocate 36028797018963968 bytes"):
        Tensor(1 << 55, "uint8")


def test_views_keep_their_memory_and_nothing_else():
    t = Tensor(1 << 20)
    t.fill(7)
    view = t[5:10]
    for _ in range(100_000):  # if each view held the one before, this would be a long chain
        view = view[:]
    array, capsule = view.numpy(), np.from_dlpack(view)
    before = sys.getrefcount(t)
    other = t[:4]
    assert sys.getrefcount(t) == before + 1
    del t, view, other
    gc.collect()
    assert (array == 7).all() and (capsule == 7).all()


def test_tensor_buffer_requests():
    t = tensor(f32(4, 6))
    assert (
        bytes(t) == f32(4, 6).tobytes() and memoryview(t).format == "f" and memoryview(t).strides == (24, 4)
    )
    assert memoryview(t[:, 2:]).tolist() == f32(4, 6)[:, 2:].tolist()
    with pytest.raises(BufferError, match="not contiguous"):  # it asks for contiguous bytes
        hashlib.sha256(t[:, 2:])
    flags = dict(nd=0x8, c=0x20 | 0x18, f=0x40 | 0x18, any=0x80 | 0x18)
    get = python_api("PyObject_GetBuffer", ctypes.c_int, ctypes.py_object, ctypes.c_void_p, ctypes.c_int)
    release = python_api("PyBuffer_Release", None, ctypes.c_void_p)
    view = ctypes.create_string_buffer(256)
    for name, flag in flags.items():
        with pytest.raises(BufferError):
            get(t[:, 2:], view, flag)
        if name != "f":  # rows, not columns
            get(t, view, flag)
            release(view)
    with pytest.raises(BufferError):
        get(t, view, flags["f"])


def test_tensor_wrap(tmp_path):
    x = f32(8, 8)
    (tmp_path / "file").write_bytes(b"head" + x.tobytes())
    with open(tmp_path / "file", "rb") as file:
        buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    t = Tensor.wrap(buffer, (8, 8), "float32", offset=4)
    np.testing.assert_array_equal(ops.cast(t, "float32").numpy(), x)
    with pytest.raises(BufferError):
        buffer.close()  # the Tensor still needs it
    for view in (t, t[1:], t.view(4), t.reshape((4, 16)), t.reshape(64)[3:]):
        assert not view.numpy().flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            view.fill(0)
        with pytest.raises(ValueError, match="read-only"):
            view.copy_(np.zeros(view.shape, np.float32))
    with pytest.raises(ValueError, match="cast: out is an output and read-only"):
        _C.cast(t, x)
    with pytest.raises(BufferError, match="read-only tensor needs max_version"):
        t.__dlpack__()
    assert not np.from_dlpack(t).flags.writeable and np.from_dlpack(t, copy=True).flags.writeable
    for offset, shape in ((5, (8, 8)), (8, (8, 8)), (-4, (8, 8)), (1 << 40, 1)):
        with pytest.raises(ValueError, match="^Tensor.wrap: .* offset|^Tensor.wrap: offset"):
            Tensor.wrap(buffer, shape, "float32", offset)
    with pytest.raises(TypeError):
        Tensor.wrap(7, 1, "uint8")
    del t, view
    buffer.close()
    array = bytearray(8)
    Tensor.wrap(array, 2, "float32").fill(1)
    assert array == np.ones(2, np.float32).tobytes()


def test_tensor_copy_and_fill():
    x = f32(5, 6)
    for dtype in ("float32", "bfloat16", "float16"):
        t = Tensor((5, 6), dtype)
        for source in (
            x,
            np.asfortranarray(x),
            x[:, ::-1][:, ::-1],
            torch.from_numpy(x),
            x.astype(BF16),
            tensor(x),
        ):
            t.copy_(source)
            np.testing.assert_array_equal(t.numpy(), np.asarray(source).astype(t.numpy().dtype))
        Tensor((5, 9), dtype)[:, 1:7].copy_(x)
        long, rows = Tensor((2, 2500), dtype), f32(2, 2500)  # converted in pieces of 1024
        long.copy_(rows)
        np.testing.assert_array_equal(long.numpy(), rows.astype(t.numpy().dtype))
    for dtype in ("uint8", "float16", "float32", "int64"):
        large = Tensor((3, 87383), dtype)  # 262,149 elements: 2**18 and a rest
        for number in (7, 0, 2):
            large.fill(number)
            assert (large.numpy() == number).all()
    column = Tensor((6, 5))
    column[:, 1].fill(3)
    assert (column.numpy()[:, 1] == 3).all()
    Tensor(()).copy_(np.array(2, np.float32))
    for source, error, words in (
        (x[:4], ValueError, "source axis 0 should be 5, got 4"),
        (x[0], ValueError, "source should have 2 axes, got 1"),
        (x.astype(int), TypeError, "source should be float16, got int64"),
        (t[:], ValueError, "source overlaps"),
        (None, TypeError, "source must be an array, got None"),
        ([1], TypeError, "source must be an array"),
    ):
        with pytest.raises(error, match="Tensor.copy_: " + words):
            t.copy_(source)
    for dtype, number in (
        ("uint8", 256),
        ("uint8", -1),
        ("int32", 0.5),
        ("int32", 2**31),
        ("int64", float("nan")),
    ):
        with pytest.raises(
            ValueError, match=rf"Tensor.fill: {re.escape(str(number))} is not a valid {dtype}"
        ):
            Tensor(3, dtype).fill(number)


def test_tensor_dlpack_keywords():
    t = tensor(f32(2, 3))
    assert t.__dlpack_device__() == (1, 0)
    assert '"dltensor"' in repr(t.__dlpack__()) and '"dltensor_versioned"' in repr(
        t.__dlpack__(max_version=(1, 0))
    )
    assert '"dltensor"' in repr(t.__dlpack__(max_version=(0, 8)))
    copy = np.from_dlpack(t, copy=True)
    copy[...] = 0
    assert (t.numpy() == f32(2, 3)).all()
    pointer = capsule_pointer(t[:, 1:].__dlpack__(max_version=(1, 0), copy=True), b"dltensor_versioned")
    assert pointer
    for keywords, error in (
        (dict(stream=1), BufferError),
        (dict(dl_device=(2, 99)), BufferError),
        (dict(dl_device=1), TypeError),
        (dict(max_version="1"), TypeError),
        (dict(colour=1), TypeError),
    ):
        with pytest.raises(error):
            t.__dlpack__(**keywords)
    before = sys.getrefcount(t)
    for keywords in ({}, dict(max_version=(1, 0))):
        capsule = t.__dlpack__(**keywords)
        assert sys.getrefcount(t) == before + 1
        del capsule  # without a consumer
        assert sys.getrefcount(t) == before
        taken = torch.from_dlpack(t)
        del taken
        assert sys.getrefcount(t) == before


@pytest.mark.skipif("ASAN_OPTIONS" in os.environ, reason="the sanitizer has its own allocator")
def test_memory_of_a_large_tensor_is_committed_late_and_returned():
    script = """
import longlora.ops
from longlora.job import resident_memory as resident
before = resident()
t = longlora.Tensor(256 << 20, "uint8")
assert resident() - before < 16 << 20
t[:128 << 20].fill(1)
assert resident() - before > 100 << 20
view = t[:10]
del t
assert resident() - before > 100 << 20
del view
assert resident() - before < 16 << 20
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_an_export_outlives_the_interpreter():
    script = (
        "import longlora, numpy as np, sys; sys.modules['keep'] = np.from_dlpack(longlora.Tensor((4, 4)))"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
