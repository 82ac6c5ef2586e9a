"""longlora.cuda with a fake of the extension: names of devices, streams, versions, workspace, cuBLAS' files.

tests/cuda tests it on GPUs, and on an emulated one.
"""

import sys
import threading
from types import SimpleNamespace

import pytest

from longlora import cuda


@pytest.fixture
def fake(monkeypatch):
    """The extension with two GPUs; the calls that name a device return it."""
    made = SimpleNamespace(
        cuda_devices=lambda: (2, None),
        cuda_refusal=lambda i: [None, "it is too old"][i],
        cuda_versions=lambda: (13010, 12080),
        cuda_built_for="80 90a",
        cublas_version=lambda: (120304, "the file"),
        **{
            name: lambda i, name=name: (name, i)
            for name in ("cuda_synchronize", "cuda_memory", "cuda_properties")
        },
    )
    monkeypatch.setattr(cuda, "_C", made)
    return made


def test_why_no_gpu_can_be_used(fake):
    assert cuda.reason() is None and cuda.is_available() and cuda.device_count() == 2
    for count, refusals, reason in (
        (0, [], "no driver"),
        (2, ["old", "new"], "old"),
        (2, ["old", None], None),
    ):
        fake.cuda_devices = lambda count=count: (count, None if count else "no driver")
        fake.cuda_refusal = refusals.__getitem__
        assert cuda.reason() == reason and cuda.is_available() is (reason is None)
        assert cuda.device_count() == count


def test_devices_by_name(fake):
    for device, index in ((0, 0), (1, 1), ("cuda", 0), ("cuda:1", 1), (SimpleNamespace(), None)):
        if index is None:
            device = type("Device", (), {"__str__": lambda self: "cuda:1"})()  # torch's
            index = 1
        assert cuda.refusal(device) == [None, "it is too old"][index]
        assert cuda.memory_info(device) == ("cuda_memory", index)
        assert cuda.properties(device) == ("cuda_properties", index)
        cuda.synchronize(device)
    assert cuda.memory_info() == ("cuda_memory", 0) and cuda.properties() == ("cuda_properties", 0)
    seen = []
    fake.cuda_synchronize = seen.append
    cuda.synchronize()
    cuda.synchronize("cuda:1")
    assert seen == [0, 1]
    for wrong in ("cpu", "cuda:", "cuda:x", None):
        with pytest.raises(ValueError, match="device should be cuda, cuda:N or N, got"):
            cuda.refusal(wrong)


def test_versions(fake):
    assert cuda.versions() == ("13.1", "12.8") and cuda.built_for() == "80 90a"
    assert cuda.cublas() == ("12.3.4", "the file")
    fake.cuda_versions, fake.cuda_built_for = lambda: (0, 0), ""
    assert cuda.versions() == (None, None) and cuda.built_for() is None


def test_streams(fake):
    now = [0]

    def put(handle):
        before, now[0] = now[0], handle
        return before, None

    fake.cuda_set_stream, fake.cuda_get_stream = put, lambda: (now[0], None)
    for given, handle in (
        (None, 0),
        (5, 5),
        (type("Any", (), {"__cuda_stream__": lambda self: (0, 6)})(), 6),
        (SimpleNamespace(cuda_stream=7), 7),
        (SimpleNamespace(cuda_stream="x", ptr=8), 8),
    ):
        inner = cuda.stream(given)
        with cuda.stream(3) as outer, inner:
            assert cuda.current_stream() == handle and isinstance(outer, cuda.stream)
            with inner:  # again
                pass
            assert cuda.current_stream() == handle
        assert cuda.current_stream() == 0
    for wrong in ("1", 1.5, SimpleNamespace(ptr="x")):
        with pytest.raises(TypeError, match="stream should be a handle, None, or have __cuda_stream__"):
            cuda.stream(wrong)


def test_workspace(fake, monkeypatch):
    class Piece:
        def __init__(self, size, dtype, device):
            self.nbytes, self.dtype, self.device = size, dtype, device

    fake.Tensor = Piece
    monkeypatch.setattr(cuda, "_arenas", threading.local())
    monkeypatch.setattr(cuda, "_graphs", [])
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    first = cuda._workspace((1 << 20) + 1, 1, 0, None, 0)
    assert (first.nbytes, first.dtype, first.device) == (2 << 20, "uint8", "cuda:1")
    assert cuda._workspace(1 << 20, 1, 0, None, 0) is cuda._workspace(2 << 20, 1, 0, None, 0) is first
    larger = cuda._workspace((2 << 20) + 1, 1, 0, None, 0)
    assert larger.nbytes == 3 << 20 and cuda._workspace(1, 1, 0, None, 0) is larger and cuda._graphs == []
    for key in ((0, 0, None, 0), (1, 9, None, 0), (1, 0, None, 4)):
        assert cuda._workspace(1, *key) is not larger
        assert cuda._workspace(1, *key).nbytes == 1 << 20
    assert cuda._graphs == [cuda._workspace(1, 1, 0, None, 4)]

    class Array:
        device = "meta"

    torch = SimpleNamespace(Tensor=Array, uint8="uint8", empty=lambda *size, **how: (*size, how))
    torch.cuda = SimpleNamespace(current_stream=lambda i: SimpleNamespace(cuda_stream=10 + i))
    cupy = SimpleNamespace(ndarray=Piece)
    cupy.cuda = SimpleNamespace(get_current_stream=lambda i: SimpleNamespace(ptr=20 + i))
    assert cuda._stream(Array(), 1) is None
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    assert cuda._workspace(5, 1, 0, Array(), 0) == (5, dict(dtype="uint8", device="meta"))
    assert isinstance(cuda._workspace(5, 1, 0, None, 0), Piece)
    assert [cuda._stream(like, 1) for like in (Array(), larger, None)] == [11, 21, None]


def test_where_cublas_is_looked_for(fake, monkeypatch, tmp_path):
    """pip packages of CUDA 13, then of 12, then conda's. A driver runs versions up to its own."""
    monkeypatch.setattr(sys, "path", [str(tmp_path / "a"), str(tmp_path / "b")])
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "conda"))
    wanted = []
    for name in (
        "a/nvidia/cu13/lib/libcublasLt.so.13",
        "b/nvidia/cu13/lib/libcublasLt.so.13",
        "b/nvidia/cublas/lib/libcublasLt.so.12",
        "conda/lib/libcublasLt.so.13",
        "conda/lib/libcublasLt.so.12",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
        wanted.append(str(tmp_path / name))
    for driver, found in ((13010, wanted), (0, wanted), (12080, wanted[2:3] + wanted[4:]), (11080, [])):
        fake.cuda_versions = lambda driver=driver: (driver, 13000)
        assert cuda._cublas_files() == tuple(found)
