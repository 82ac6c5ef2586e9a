"""Streams, workspace and two devices, wherever longlora.cuda.is_available(): see test_cuda_binding.py."""

import ctypes
import os
import subprocess
import sys
import threading

import dlpack
import numpy as np
import pytest
from cuda_border import (
    DTYPES,
    Borrowed,
    back,
    f32,
    matmul_is_right,
    needs_cuda,
    needs_emulation,
    needs_two,
    new_stream,
    swiglu_is_right,
    tensor,
)

from longlora import _C, Tensor, cuda, ops

# ---- streams -------------------------------------------------------------------------------------


@needs_cuda
def test_streams_of_a_thread():
    class Theirs:
        def __cuda_stream__(self):
            return 0, 2

    with new_stream() as handle:
        assert cuda.current_stream() == 0
        with cuda.stream(handle):
            assert cuda.current_stream() == handle
            with cuda.stream(None):
                assert cuda.current_stream() == 0
            with cuda.stream(Theirs()), pytest.raises(KeyError):
                assert cuda.current_stream() == 2
                with cuda.stream(type("Torch", (), {"cuda_stream": 1})()):
                    assert cuda.current_stream() == 1
                    raise KeyError
            seen = []
            other = threading.Thread(target=lambda: seen.append(cuda.current_stream()))
            other.start()
            other.join()
            assert cuda.current_stream() == handle and seen == [0]
            x = Borrowed(tensor(f32(3, 8)))
            ops.swiglu_forward(x, x)
            assert x.streams == [handle, handle]
            swiglu_is_right()
            assert '"dltensor"' in repr(x.t.__dlpack__(stream=1))
        assert cuda.current_stream() == 0
        with cuda.stream(type("CuPy", (), {"ptr": handle})()):
            assert cuda.current_stream() == handle
    for wrong in ("1", 1.5, object()):
        with pytest.raises(TypeError, match="stream should be a handle, None, or have __cuda_stream__"):
            cuda.stream(wrong)


@needs_cuda
@pytest.mark.parametrize("library", ["cupy", "torch"])
def test_the_stream_of_the_arguments_library(library, monkeypatch):
    """CuPy's current stream, and that of a torch without the C exchange API. A module stands in for both."""

    class Stream:
        ptr = cuda_stream = 2

    class Fake:
        ndarray = Tensor = Borrowed

        class cuda:
            @staticmethod
            def get_current_stream(device):
                assert device == 0
                return Stream

            current_stream = get_current_stream

    monkeypatch.setitem(sys.modules, library, Fake)
    x, out = Borrowed(tensor(f32(3, 8))), Tensor((3, 8), "float32", "cuda")
    _C.swiglu_forward(Borrowed(out), x, x)
    assert x.streams == [2, 2]
    np.testing.assert_array_equal(back(out), back(ops.swiglu_forward(x.t, x.t)))


class ExchangeAPI(ctypes.Structure):
    Managed = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(ctypes.c_void_p))
    Stream = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int32, ctypes.POINTER(ctypes.c_void_p))
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("older", ctypes.c_void_p),
        ("allocate", ctypes.c_void_p),
        ("managed", Managed),
        ("back", ctypes.c_void_p),
        ("tensor", ctypes.c_void_p),
        ("stream", Stream),
    ]


@needs_cuda
def test_the_stream_of_the_exchange_api():
    """The C functions of torch's arrays, and its current stream, which the call's Tensors use too."""
    asked = []

    def managed(x, out):
        out[0] = x.address()
        return 0

    def stream(kind, index, out):
        asked.append((kind, index))
        out[0] = 2
        return 0

    api = ExchangeAPI(1, 3, None, None, ExchangeAPI.Managed(managed), None, None, ExchangeAPI.Stream(stream))

    class Exchanged(Borrowed):
        __dlpack_c_exchange_api__ = dlpack.new_capsule(ctypes.addressof(api), b"dlpack_exchange_api", None)

    x, out, third = (
        Exchanged(tensor(f32(3, 8))),
        Tensor((3, 8), "float32", "cuda"),
        Borrowed(tensor(f32(3, 8))),
    )
    _C.swiglu_forward(out, third, x)
    np.testing.assert_array_equal(back(out), back(ops.swiglu_forward(x.t, x.t)))
    assert asked == [(2, 0)] and third.streams == [2] and x.deleted == 1
    out.copy_(x)
    np.testing.assert_array_equal(back(out), f32(3, 8))
    assert x.deleted == 2
    given = []
    a, b = Exchanged(tensor(f32(5, 7))), tensor(f32(7, 3))
    hooks = cuda._workspace, cuda._stream

    def workspace(nbytes, device, stream, like, capture):
        given.append((device, stream, like, capture))
        return hooks[0](nbytes, device, stream, None, capture)

    _C.cuda_hooks(workspace, hooks[1])
    try:
        _C.matmul(Tensor((5, 3), "float32", "cuda"), a, b, 1.0, 0.0)
    finally:
        _C.cuda_hooks(*hooks)
    assert given == [(0, 2, a, 0)]


# ---- workspace -----------------------------------------------------------------------------------


@needs_cuda
def test_workspace_is_kept_for_the_thread_and_stream():
    matmul_is_right()
    pieces = cuda._arenas.pieces
    piece = pieces[0, 0, 0]
    matmul_is_right()
    assert cuda._arenas.pieces[0, 0, 0] is piece and cuda._workspace(piece.nbytes, 0, 0, None, 0) is piece
    assert cuda._workspace(piece.nbytes + 1, 0, 0, None, 0).nbytes > piece.nbytes
    with new_stream() as handle, cuda.stream(handle):
        matmul_is_right()
        assert pieces[0, handle, 0] is not pieces[0, 0, 0]
        del pieces[0, handle, 0]
    mine = []
    other = threading.Thread(target=lambda: (matmul_is_right(), mine.append(cuda._arenas.pieces[0, 0, 0])))
    other.start()
    other.join()
    assert len(mine) == 1 and mine[0] is not pieces[0, 0, 0]


@needs_emulation
def test_a_captured_graph_keeps_its_workspace(monkeypatch):
    """Nothing tells when a graph runs or is deleted, so its workspace is kept and no other call gets it."""
    monkeypatch.setattr(cuda, "_graphs", [])
    with new_stream(capture=7) as handle, cuda.stream(handle):
        matmul_is_right()
        (piece,) = cuda._graphs
        matmul_is_right()
        assert cuda._graphs == [piece] and cuda._arenas.pieces[0, handle, 7] is piece
        larger = cuda._workspace(piece.nbytes + 1, 0, handle, None, 7)
        assert cuda._graphs == [piece, larger] and cuda._arenas.pieces[0, handle, 7] is larger
    with new_stream() as handle, cuda.stream(handle):
        matmul_is_right()
        assert len(cuda._graphs) == 2 and cuda._arenas.pieces[0, handle, 0] not in cuda._graphs


@needs_emulation
def test_capsules_of_a_capture_are_given_back_at_once():
    """Marks on a captured stream cannot be queried. No call tries, and none leaves an error behind."""
    x, out = Borrowed(tensor(f32(3, 8))), Tensor((3, 8), "float32", "cuda")
    with new_stream(capture=3) as handle, cuda.stream(handle):
        for n in range(1, 4):
            _C.swiglu_forward(out, x, x)
            assert x.deleted == x.taken == 2 * n
    swiglu_is_right()


@needs_cuda
@pytest.mark.parametrize(
    "answer, error, words",
    [
        (lambda: None, TypeError, "matmul: workspace must be an array, got None"),
        (
            lambda: Tensor(1 << 26, "uint8"),
            SystemError,
            "matmul: workspace should be .* bytes on cuda:0, aligned to 256",
        ),
        (lambda: Tensor(1, "uint8", "cuda"), SystemError, "matmul: workspace should be .* bytes on cuda:0"),
        (lambda: 1 // 0, ZeroDivisionError, "division"),
    ],
)
def test_a_wrong_workspace_is_refused(answer, error, words):
    hooks = cuda._workspace, cuda._stream
    _C.cuda_hooks(lambda *call: answer(), hooks[1])
    try:
        with pytest.raises(error, match=words):
            matmul_is_right()
    finally:
        _C.cuda_hooks(*hooks)
    matmul_is_right()


# ---- two devices ---------------------------------------------------------------------------------


@needs_emulation
@pytest.mark.skipif(cuda.device_count() > 1, reason="there are two devices")
def test_again_with_two_devices():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "two_devices and not again",
        __file__,
    ]
    environment = {**os.environ, "LONGLORA_EMULATION_DEVICES": "2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "skipped" not in done.stdout.splitlines()[-1], done.stdout + done.stderr


@needs_two
def test_two_devices_are_not_mixed():
    x = f32(3, 8)
    a, b = tensor(x, "cuda:0"), tensor(x, "cuda:1")
    assert (a.device, b.device, b.__dlpack_device__()) == ("cuda:0", "cuda:1", (2, 1))
    with pytest.raises(ValueError, match="^swiglu_forward: up should be on cuda:0 like out, got cuda:1$"):
        _C.swiglu_forward(a, a, b)
    assert (
        ops.swiglu_forward(b, b).device == "cuda:1" and ops.swiglu_forward(Borrowed(b), b).device == "cuda:1"
    )
    swiglu_is_right("cuda:0")
    swiglu_is_right("cuda:1")
    free = [cuda.memory_info(i)[0] for i in (0, 1)]
    c = Tensor(1 << 24, "uint8", "cuda:1")
    assert cuda.memory_info("cuda:0")[0] == free[0] and cuda.memory_info(1)[0] <= free[1] - (1 << 24)
    del c


@needs_two
def test_copies_between_two_devices():
    x = f32(6, 5, 9)
    for given in DTYPES:
        for wanted in DTYPES:
            a = tensor(x.astype(DTYPES[given]), "cuda:0")
            b = Tensor((7, 5, 12), wanted, "cuda:1")
            b[:6, :, 2:11].copy_(a)
            want = x.astype(DTYPES[given]).astype(DTYPES[wanted])
            np.testing.assert_array_equal(back(b)[:6, :, 2:11], want)
            c = Tensor((6, 5, 9), wanted, "cuda:0")
            c.copy_(b[:6, :, 2:11])
            np.testing.assert_array_equal(back(c), want)
            moved = dlpack.tensor_of(c)
            assert moved.device_id == 0


@needs_two
def test_a_stream_of_the_other_of_two_devices():
    a, b = tensor(f32(3, 8), "cuda:0"), tensor(f32(3, 8), "cuda:1")
    with new_stream(1) as handle:
        with cuda.stream(handle):
            assert ops.swiglu_forward(b, b).device == "cuda:1"
            words = "the stream set by longlora.cuda.stream belongs to cuda:1, the call is on cuda:0"
            with pytest.raises(ValueError, match=f"swiglu_forward: out cannot be used: {words}"):
                ops.swiglu_forward(a, a)
            for refused in (lambda: a.fill(0), lambda: a.copy_(b), a.cpu, a.__dlpack__):
                with pytest.raises(ValueError, match=words):
                    refused()
        with pytest.raises(BufferError, match="stream belongs to cuda:1, the tensor is on cuda:0"):
            a.__dlpack__(stream=handle)
        assert '"dltensor"' in repr(b.__dlpack__(stream=handle))
    np.testing.assert_array_equal(back(a), f32(3, 8))
    swiglu_is_right("cuda:0")
