"""The border on a GPU: Tensors, copies between devices, DLPack, and how wrong arguments are refused.

Runs wherever longlora.cuda.is_available(): on a GPU, and, by test_cuda_emulation.py, on a build against
tests/emulation, where variables set what a machine may lack.
"""

import contextlib
import itertools
import os
import re
import subprocess
import sys

import dlpack
import ml_dtypes
import numpy as np
import pytest
from cuda_border import (
    DTYPES,
    EMULATED,
    Borrowed,
    back,
    f32,
    matmul_is_right,
    needs_cuda,
    needs_emulation,
    swiglu_is_right,
    tensor,
)

from longlora import _C, Tensor, arrays, cuda, ops

# ---- without a GPU -------------------------------------------------------------------------------


@pytest.mark.skipif(cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_everything_says_why():
    why = cuda.reason()
    assert not cuda.is_available() and len(why) > 10 and cuda.device_count() == 0
    for refused in (
        lambda: Tensor(3, "float32", "cuda"),
        lambda: Tensor(3, device="cuda:1"),
        lambda: Tensor(3, pinned=True),
        cuda.synchronize,
        cuda.memory_info,
        lambda: cuda.stream(0).__enter__(),
    ):
        with pytest.raises(RuntimeError, match=re.escape(why)):
            refused()
    borrowed = Borrowed(tensor(f32(2, 2), "cpu"), device_type=2)
    with pytest.raises(BufferError, match=f"cast: x is on cuda:0, which cannot be used: {re.escape(why)}"):
        _C.cast(np.empty((2, 2), np.float32), borrowed)
    assert borrowed.deleted == borrowed.taken
    assert cuda.refusal(0) == why


def test_devices_are_named():
    for device in ("gpu", "cuda:", "cuda:x", "cuda:1x", "cuda:-1", "CUDA", ""):
        with pytest.raises(ValueError, match=f"Tensor: device should be cpu, cuda or cuda:N, got {device!r}"):
            Tensor(3, "float32", device)
        with pytest.raises(ValueError, match="device should be cuda, cuda:N or N, got"):
            cuda.memory_info(device)
    with pytest.raises(RuntimeError, match="Tensor: cuda:63 cannot be used: "):
        Tensor(3, "float32", "cuda:63")
    assert (
        Tensor(3, "float32", "cpu").device == "cpu"
        and not Tensor(3).pinned
        and repr(Tensor(3)).count("device") == 0
    )


@needs_emulation
@pytest.mark.parametrize(
    "variables, words",
    [
        (dict(DEVICES="0"), "the NVIDIA driver shows no GPU"),
        (dict(DRIVER="0"), "there is no NVIDIA driver"),
        (
            dict(DRIVER="12020"),
            "the NVIDIA driver is too old: it supports CUDA 12.2, this build needs CUDA 13.0",
        ),
        (dict(SM="75"), "the GPU is an sm_75, the oldest supported one is sm_80"),
        (dict(LOST="1"), "CUDA: an illegal memory access was encountered"),
    ],
)
def test_what_a_machine_may_lack(variables, words):
    script = """
import numpy as np, longlora, longlora.ops, longlora.tools.doctor
print(longlora.cuda.is_available(), longlora.cuda.reason())
try:
    longlora.Tensor(3, "float32", "cuda")
except RuntimeError as error:
    print(error)
longlora.ops.cast(np.ones((2, 2), np.float32), "float16")
print(longlora.tools.doctor.text(longlora.tools.doctor.examine()))
"""
    environment = {**os.environ, **{f"LONGLORA_EMULATION_{name}": value for name, value in variables.items()}}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert (
        f"False {words}\nTensor: cuda cannot be used: {words}\n" in done and f"not available: {words}" in done
    )


@needs_emulation
def test_the_oldest_gpu_is_supported():
    code = "from longlora import cuda; assert cuda.is_available(), cuda.reason()"
    environment = {**os.environ, "LONGLORA_EMULATION_SM": "80"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


# ---- Tensors -------------------------------------------------------------------------------------


@needs_cuda
def test_a_tensor_on_a_gpu():
    t = Tensor((3, 4), "float32", "cuda")
    assert (t.shape, t.dtype, t.device, t.nbytes, t.pinned) == ((3, 4), "float32", "cuda:0", 48, False)
    assert repr(t) == "longlora.Tensor(shape=(3, 4), dtype='float32', device='cuda:0')"
    assert (back(t) == 0).all() and t.cpu().device == "cpu"
    on_cpu = t.cpu()
    assert on_cpu.cpu() is on_cpu
    for dtype in arrays.DTYPES:
        t = Tensor((2, 3), dtype, "cuda:0")
        t.fill(3)
        assert back(t).dtype.name == dtype and (back(t) == 3).all()
    for shape in ((), 0, 5, (0, 7), (2, 1, 0, 3)):
        t = Tensor(shape, "float32", "cuda")
        t.fill(1)
        assert (back(t) == 1).all() and back(t).shape == t.shape
    for refused in (t.numpy, lambda: np.asarray(t), lambda: t.__array__()):
        with pytest.raises(TypeError, match=r"the tensor is on cuda:0; use cpu\(\).numpy\(\)"):
            refused()
    with pytest.raises(BufferError, match="on a GPU, .* use cpu()"):
        memoryview(t)


@needs_cuda
def test_the_number_of_devices_is_named():
    count = cuda.device_count()
    words = f"there {'is' if count == 1 else 'are'} {count} CUDA device{'s' * (count > 1)}$"
    for index in count, count + 1:
        with pytest.raises(RuntimeError, match=f"Tensor: cuda:{index} cannot be used: {words}"):
            Tensor(3, "float32", f"cuda:{index}")


@needs_cuda
def test_views_share_memory_on_a_gpu():
    arena = Tensor(1 << 12, "uint8", "cuda")
    a, b = arena.view((4, 8), "float32", 64), arena.view((3, 5), "bfloat16", 1024)
    a.copy_(f32(4, 8))
    b.fill(-1)
    assert {x.device for x in (a, b, a[1], a.reshape((2, 16)), a[:, 2:])} == {"cuda:0"}
    np.testing.assert_array_equal(back(arena)[64:192].view(np.float32).reshape(4, 8), f32(4, 8))
    for index in ((slice(1, 3), slice(2, None)), (-1,), (slice(None), 3), (slice(2, 2),)):
        np.testing.assert_array_equal(back(a[index]), f32(4, 8)[index])
    a[:, 3].fill(5)
    want = f32(4, 8)
    want[:, 3] = 5
    np.testing.assert_array_equal(back(a), want)
    free = cuda.memory_info()[0]
    last = a[1:]
    del arena, a, b
    assert cuda.memory_info()[0] == free
    del last
    assert cuda.memory_info()[0] > free or not EMULATED  # a GPU's allocator may keep a page


@needs_cuda
@pytest.mark.parametrize("to", ["cpu", "pinned", "cuda"])
@pytest.mark.parametrize("source", ["numpy", "cpu", "pinned", "cuda", "borrowed"])
def test_copies_between_devices(source, to):
    def place(shape, dtype, where):
        return Tensor(
            shape, dtype, "cuda" if where in ("cuda", "borrowed") else "cpu", pinned=where == "pinned"
        )

    wide = f32(6, 5, 9)
    for given in DTYPES:
        x = wide.astype(DTYPES[given])
        whole = x if source == "numpy" else place(x.shape, given, source)
        if source != "numpy":
            whole.copy_(x)
        for wanted in DTYPES:
            target = place((7, 6, 12), wanted, to)
            for index, into in (
                ((), (slice(1, 7), slice(0, 5), slice(2, 11))),
                ((2,), (3, slice(0, 5), slice(0, 9))),
                ((slice(0, 4), slice(1, 3), slice(2, 8)), (slice(0, 4), slice(0, 2), slice(0, 6))),
                ((1, slice(None), 4), (slice(0, 5), 2, 3)),
                ((0, 0, 0), (6, 5, 11)),
            ):
                want = np.full((7, 6, 12), 2, DTYPES[wanted])
                want[into] = x[index].astype(DTYPES[wanted])
                target.fill(2)
                view = (np.asarray(whole[index]) if source == "numpy" else whole[index]) if index else whole
                target[into].copy_(Borrowed(view) if source == "borrowed" else view)
                np.testing.assert_array_equal(back(target).astype(np.float32), want.astype(np.float32))
            dense = place(x.shape, wanted, to)
            dense.copy_(whole)
            np.testing.assert_array_equal(back(dense), x.astype(DTYPES[wanted]))
    for dtype in ("float64", "int32", "int64", "uint8"):
        x = (wide * 9).astype(dtype)
        y = tensor(x)
        z = Tensor((9, 5, 9), dtype)
        z[1:7].copy_(y)
        np.testing.assert_array_equal(z.numpy()[1:7], x)


@needs_cuda
def test_copies_of_a_column():
    """Its elements lie apart in one of the two tensors."""
    x, column = f32(7, 2), Tensor(7, "float32", "cuda")
    wide = tensor(x)
    column.copy_(wide[:, 1])
    np.testing.assert_array_equal(back(column), x[:, 1])
    wide[:, 0].copy_(column)
    np.testing.assert_array_equal(back(wide), x[:, [1, 1]])


@needs_cuda
def test_copies_of_half_of_each_matrix():
    """The rows of a half follow each other, its matrices do not."""
    x, half = f32(4, 6, 5), Tensor((4, 3, 5), "float32", "cuda")
    wide, want = tensor(x), x.copy()
    half.copy_(wide[:, :3])
    np.testing.assert_array_equal(back(half), x[:, :3])
    wide[:, 3:].copy_(half)
    wide[:, 1:3].fill(7)
    want[:, 3:], want[:, 1:3] = x[:, :3], 7
    np.testing.assert_array_equal(back(wide), want)


@needs_cuda
def test_large_copies_in_pieces():
    """Strided and converted copies pass through pinned memory; these need more than one piece of it."""
    x = f32(3, 1100, 1001)
    half = Tensor((3, 1100, 1001), "float16", "cuda")
    half.copy_(x)
    np.testing.assert_array_equal(half.cpu().numpy(), x.astype(np.float16))
    wide = Tensor((3, 1100, 1003), "float32", "cuda")
    wide[:, :, 1:1002].copy_(x)
    np.testing.assert_array_equal(wide.cpu().numpy()[:, :, 1:1002], x)
    np.testing.assert_array_equal(wide[:, :, 1:1002].cpu().numpy(), x)
    flat = Tensor(x.size, "bfloat16", "cuda")
    flat.copy_(x.reshape(-1))
    again = Tensor(x.size, "float32")
    again.copy_(flat)
    np.testing.assert_array_equal(again.numpy(), x.reshape(-1).astype(ml_dtypes.bfloat16).astype(np.float32))


@needs_cuda
def test_copies_that_are_refused():
    t = tensor(f32(4, 5))
    for source, error, words in (
        (f32(4, 4), ValueError, "source axis 1 should be 5, got 4"),
        (f32(5), ValueError, "source should have 2 axes"),
        (f32(4, 5).astype(np.int32), TypeError, "source should be float32, got int32"),
        (t[:], ValueError, "source overlaps"),
        (None, TypeError, "source must be an array"),
        (Borrowed(t, byte_offset=2), ValueError, "source is not aligned"),
    ):
        with pytest.raises(error, match="Tensor.copy_: " + words):
            t.copy_(source)
    np.testing.assert_array_equal(back(t), f32(4, 5))
    with pytest.raises(ValueError, match="Tensor.fill: 0.5 is not a valid int32"):
        Tensor(3, "int32", "cuda").fill(0.5)


@needs_cuda
def test_pinned_memory():
    t = Tensor((4, 5), "float32", pinned=True)
    assert (
        t.pinned
        and t.device == "cpu"
        and (t.numpy() == 0).all()
        and t[1:].pinned
        and t.__dlpack_device__() == (1, 0)
    )
    x = np.asarray(t)
    x[...] = f32(4, 5)
    device = Tensor((4, 5), "float32", "cuda")
    device.copy_(t)
    cuda.synchronize()
    t.fill(0)
    t.copy_(device)
    cuda.synchronize()
    np.testing.assert_array_equal(x, f32(4, 5))
    with pytest.raises(ValueError, match="pinned memory is on the CPU, got device 'cuda'"):
        Tensor(3, "float32", "cuda", pinned=True)
    with pytest.raises(MemoryError, match="Tensor: out of memory"):
        Tensor(1 << 55, "uint8", pinned=True)
    np.testing.assert_array_equal(ops.cast(t, "float32").numpy(), f32(4, 5))


# ---- calls ---------------------------------------------------------------------------------------


@needs_cuda
def test_results_are_on_the_same_device():
    out = ops.swiglu_forward(tensor(f32(3, 8)), tensor(f32(3, 8)))
    assert isinstance(out, Tensor) and out.device == "cuda:0"
    swiglu_is_right()
    for dtype in arrays.DTYPES:
        assert (arrays.empty((2, 2), dtype, out).device, arrays.empty((2, 2), dtype, out).dtype) == (
            "cuda:0",
            dtype,
        )
        assert arrays.empty((2, 2), dtype, Borrowed(out)).device == "cuda:0"
    assert (back(arrays.zeros((2, 2), "float32", out)) == 0).all()


@needs_cuda
@pytest.mark.parametrize(
    "place",
    [lambda x: x, lambda x: tensor(x, "cpu"), lambda x: Tensor(x.shape, pinned=True)],
    ids=["numpy", "cpu", "pinned"],
)
def test_mixed_devices_are_refused(place):
    x = f32(3, 8)
    out = tensor(x)
    for gate, up, name in ((place(x), tensor(x), "gate"), (tensor(x), place(x), "up")):
        with pytest.raises(
            ValueError, match=f"^swiglu_forward: {name} should be on cuda:0 like out, got cpu$"
        ):
            _C.swiglu_forward(out, gate, up)
    with pytest.raises(ValueError, match="^swiglu_forward: gate should be on cpu like out, got cuda:0$"):
        _C.swiglu_forward(x.copy(), tensor(x), tensor(x))
    np.testing.assert_array_equal(back(out), x)
    swiglu_is_right()


@needs_cuda
def test_checks_are_those_of_the_cpu():
    x = tensor(f32(4, 8))
    for arguments, error, words in (
        ((x, x, tensor(f32(4, 7))), ValueError, "up axis 1 should be F=8, got 7"),
        ((x, x, x[0]), ValueError, "up should have 2 axes, got 1"),
        (
            (x, x, tensor(f32(4, 8).astype(np.float16))),
            TypeError,
            "up should be float32 like out, got float16",
        ),
        ((x, Borrowed(x, byte_offset=2), x), ValueError, "gate is not aligned"),
        ((x, Borrowed(x, lanes=2), x), TypeError, "gate has DLPack dtype"),
        (
            (x, Borrowed(x, device_id=7), x),
            BufferError,
            "gate is on cuda:7, which cannot be used: there (is|are) . CUDA",
        ),
        (
            (x, Borrowed(x, device_type=10), x),
            BufferError,
            "gate should be on the CPU or a CUDA device, got DLPack device",
        ),
        ((x[:, :6], x[:, 2:], x[:, :6]), ValueError, "out is an output and overlaps gate"),
        ((Borrowed(x, old=True), x, x), BufferError, "out is an output and needs DLPack 1"),
        ((x, x, None), TypeError, "up must be an array, got None"),
    ):
        with pytest.raises(error, match="^swiglu_forward: " + words):
            _C.swiglu_forward(*arguments)
    np.testing.assert_array_equal(back(x), f32(4, 8))
    swiglu_is_right()


@needs_cuda
def test_kernels_refuse_scalars_as_value_errors():
    p = tensor(f32(8))
    with pytest.raises(ValueError, match="^adamw: step"):
        _C.adamw(p, tensor(f32(8)), tensor(f32(8)), None, tensor(f32(8)), 1e-3, 0.9, 0.999, 1e-8, 0.0, 0, 1.0)
    np.testing.assert_array_equal(back(p), f32(8))
    swiglu_is_right()


@needs_cuda
@pytest.mark.parametrize("old", [False, True])
def test_capsules_are_borrowed_with_the_stream_and_given_back(old):
    x = tensor(f32(3, 8))
    out, gate = Tensor((3, 8), "float32", "cuda"), Borrowed(x, old=old)
    _C.swiglu_forward(out, gate, Borrowed(x))
    np.testing.assert_array_equal(back(out), back(ops.swiglu_forward(x, x)))
    assert gate.streams == [1] and gate.taken == 1
    cuda.synchronize()
    assert gate.deleted == 1, "memory goes back when the work has run"
    before = sys.getrefcount(x)
    for _ in range(200):  # more than are held at a time
        _C.swiglu_forward(out, gate, x)
        with pytest.raises(ValueError):
            _C.swiglu_forward(out, gate, x[:2])
    cuda.synchronize()
    assert gate.deleted == gate.taken == 401 and sys.getrefcount(x) == before


@needs_cuda
def test_results_become_what_the_arguments_were():
    class Library:
        @staticmethod
        def from_dlpack(x):
            return "theirs", x

    x = Borrowed(tensor(f32(3, 8)))
    x.__class__.__array_namespace__ = lambda self: Library
    try:
        name, out = ops.swiglu_forward(x, x)
    finally:
        del x.__class__.__array_namespace__
    assert name == "theirs" and out.device == "cuda:0"


# ---- DLPack out ----------------------------------------------------------------------------------


@needs_cuda
def test_dlpack_of_a_tensor_on_a_gpu():
    t = tensor(f32(2, 3))
    assert t.__dlpack_device__() == (2, 0)
    pointer = dlpack.tensor_of(t[:, 1:])
    assert (pointer.device_type, pointer.device_id, pointer.strides[0], pointer.shape[1]) == (2, 0, 3, 2)
    for stream in (None, 1, 2, -1):
        assert '"dltensor_versioned"' in repr(t.__dlpack__(stream=stream, max_version=(1, 0)))
        assert '"dltensor_versioned"' in repr(
            t.__dlpack__(stream=stream, max_version=(1, 0), dl_device=(2, 0), copy=True)
        )
    for keywords, error in (
        (dict(stream=0), BufferError),
        (dict(stream=-2), BufferError),
        (dict(stream="x"), BufferError),
        (dict(dl_device=(2, 9)), BufferError),
        (dict(dl_device=(1, 1)), BufferError),
        (dict(dl_device=(1, 0), copy=False), BufferError),
        (dict(dl_device=(1, 0), stream=1), BufferError),
    ):
        with pytest.raises(error):
            t.__dlpack__(**keywords)
    np.testing.assert_array_equal(np.from_dlpack(t, device="cpu"), f32(2, 3))
    with pytest.raises((BufferError, RuntimeError, ValueError)):
        np.from_dlpack(t)
    moved = tensor(f32(2, 3), "cpu").__dlpack__(dl_device=(2, 0), max_version=(1, 0))
    there = dlpack.Versioned.from_address(dlpack.capsule_pointer(moved, b"dltensor_versioned"))
    assert (there.tensor.device_type, there.tensor.device_id, there.flags) == (2, 0, 2)  # 2: it is a copy
    before = sys.getrefcount(t)
    capsule = t.__dlpack__(max_version=(1, 0))
    assert sys.getrefcount(t) == before + 1
    del capsule
    assert sys.getrefcount(t) == before


# ---- errors --------------------------------------------------------------------------------------


@needs_cuda
def test_out_of_memory():
    free = cuda.memory_info()[0]
    for _ in range(3):
        with pytest.raises(
            MemoryError, match="Tensor: out of memory: cannot allocate 1125899906842624 bytes"
        ):
            Tensor(1 << 50, "uint8", "cuda")
        swiglu_is_right()
    assert cuda.memory_info()[0] == free or not EMULATED


@needs_emulation
def test_out_of_memory_in_a_call(monkeypatch):
    cuda._arenas.__dict__.clear()
    out, a, b = Tensor((5, 3), "float32", "cuda"), tensor(f32(5, 7)), tensor(f32(7, 3))
    free, total = cuda.memory_info()
    monkeypatch.setenv("LONGLORA_EMULATION_MEMORY", str(total - free + (1 << 20)))
    for _ in range(2):
        with pytest.raises(MemoryError, match="out of memory"):
            _C.matmul(out, a, b, 1.0, 0.0)
    swiglu_is_right()
    monkeypatch.delenv("LONGLORA_EMULATION_MEMORY")
    matmul_is_right()


@needs_emulation
def test_a_lost_device_is_named(monkeypatch):
    t, x = tensor(f32(4, 5)), Tensor((4, 5))
    monkeypatch.setenv("LONGLORA_EMULATION_LOST", "1")
    words = (
        "Tensor.copy_: CUDA: an illegal memory access was encountered. After this error, in this call or in "
        "work queued before it, the process cannot use cuda:0 any more: start it again"
    )
    with pytest.raises(RuntimeError, match=f"^{words}$"):
        x.copy_(t)
    ops.swiglu_forward(f32(2, 2), f32(2, 2))  # the CPU is still there
    monkeypatch.delenv("LONGLORA_EMULATION_LOST")
    swiglu_is_right()


@needs_cuda
def test_calls_on_a_gpu_leak_nothing():
    x = tensor(f32(8, 8))
    host, half, borrowed = f32(8, 8), Tensor((8, 8), "float16", "cuda"), Borrowed(x)

    def rounds(count):
        for _ in range(count):
            for arguments in ((half, x), (x[:3], x), (x, None), (x, host), (half, borrowed)):
                with contextlib.suppress(ValueError, TypeError, BufferError):
                    _C.cast(*arguments)
            x.cpu(), x[1:, 2:].cpu(), half.copy_(host), x.__dlpack__(), np.from_dlpack(x, device="cpu")
            Tensor(9, "uint8", "cuda"), Tensor(9, "uint8", pinned=True)
            with contextlib.suppress(ValueError):
                x.copy_(host[:3])
        cuda.synchronize()
        return int(open("/proc/self/statm").read().split()[1]) * 4096

    rounds(300)
    before, free = sys.getrefcount(x), cuda.memory_info()[0]
    held = [rounds(300) for _ in range(4)]
    assert sys.getrefcount(x) == before and cuda.memory_info()[0] == free
    grown = min(b - a for a, b in itertools.pairwise(held))
    assert grown < 300 * 64, f"{grown} bytes more after 300 rounds"
