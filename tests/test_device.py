"""The choice of a device, its description, and what moves arrays to and from it, with a fake of the GPUs.

The GPUs of a test are numbered; why: number -> why it cannot be used, or None.
"""

import threading
from types import SimpleNamespace

import numpy as np
import pytest

from longlora import Tensor, cuda, device
from longlora.errors import UserError

GIB = 1 << 30


@pytest.fixture
def gpus(monkeypatch):
    """Sets the GPUs of the machine, and why cuBLAS is missing."""

    def put(why, cublas=None):
        def find():
            if cublas is not None:
                raise RuntimeError(cublas)

        monkeypatch.setattr(device._C, "cuda_refusal", lambda number: why.get(number, "no such GPU"))
        monkeypatch.setattr(cuda, "device_count", lambda: len(why))
        monkeypatch.setattr(cuda, "cublas", find)
        monkeypatch.setattr(cuda, "memory_info", lambda number: ((number + 1) * GIB // 4, 8 * GIB))
        monkeypatch.setattr(cuda, "properties", lambda number: {"name": f"GPU {number}"})

    return put


def test_names_of_devices():
    for name in ("auto", "cpu", "cuda", "cuda:0", "cuda:123456789"):
        device.check_device(name)
    for wrong in ("", "gpu", "cuda:", "cuda:x", "cuda:1234567890", "cuda0", None, 0):
        with pytest.raises(UserError, match="^device should be auto, .*, got "):
            device.check_device(wrong)


def test_the_device_of_a_run(gpus):
    cpu = f"device: cpu, {device.counted(device._C.get_num_threads(), 'thread')}, "
    cpu += device._C.isa_names[device._C.get_isa()]
    first = "cuda:0", "device: cuda:0, GPU 0, 0.2 of 8.0 GiB free"
    second = "cuda:1", "device: cuda:1, GPU 1, 0.5 of 8.0 GiB free"
    both, old, none = {0: None, 1: None}, {0: "it is too old", 1: None}, {}
    for why, wanted, found in (
        (both, "cpu", ("cpu", cpu)),
        (both, "auto", first),
        (both, "cuda", first),
        (both, "cuda:1", second),
        (old, "auto", second),
        ({0: "it is too old"}, "auto", ("cpu", f"{cpu}; no GPU: it is too old")),
        (none, "auto", ("cpu", f"{cpu}; no GPU: no such GPU")),
    ):
        gpus(why)
        assert device.choose(wanted) == found
        if wanted in ("auto", "cpu") or why.get(int(wanted[5:] or 0), "no") is None:
            assert device.choose_to_plan(wanted, None) == device.choose_to_plan(wanted, 2.5) == found
    gpus(old)
    assert device.free_memory("cuda:1") == GIB // 2
    for wanted, reason in (("cuda", "it is too old"), ("cuda:2", "no such GPU")):
        with pytest.raises(UserError, match=f"^device {wanted} cannot be used: {reason}$"):
            device.choose(wanted)
        with pytest.raises(UserError, match=f"^device {wanted} cannot be used: {reason}; with --max-memory"):
            device.choose_to_plan(wanted, None)
        name = "cuda:0" if wanted == "cuda" else wanted
        sentence = f"device: a GPU with 2.5 GiB for the run; none is used here: {reason}"
        assert device.choose_to_plan(wanted, 2.5) == (name, sentence)
    gpus(both, cublas="no cuBLAS")
    with pytest.raises(UserError, match="^device cuda cannot be used: no cuBLAS$"):
        device.choose("cuda")
    for choose in (device.choose, lambda wanted: device.choose_to_plan(wanted, 1.0)):
        with pytest.raises(UserError, match="^device should be"):
            choose("cuda:x")


# ---- arrays --------------------------------------------------------------------------------------


class Fake:
    """A Tensor on any device, with its content in `array`. log: the copies, as (from, to)."""

    log: list = []

    def __init__(self, shape, dtype, device="cpu", pinned=False, array=None):
        self.shape, self.dtype, self.device, self.pinned = tuple(shape), dtype, device, pinned
        self.array = np.zeros(shape, dtype) if array is None else array

    @property
    def nbytes(self):
        return self.array.nbytes

    def view(self, shape, dtype):
        part = self.array.reshape(-1).view(np.uint8)[: np.zeros(shape, dtype).nbytes]
        return Fake(shape, dtype, self.device, self.pinned, part.view(dtype).reshape(shape))

    def copy_(self, other):
        ours = isinstance(other, Fake)
        self.log.append((other.device if ours else "array", self.device))
        self.array[...] = other.array if ours else other

    def numpy(self):
        return self.array


@pytest.fixture
def fakes(monkeypatch):
    monkeypatch.setattr(device, "_C", SimpleNamespace(Tensor=Fake))
    monkeypatch.setattr(device, "_thread", threading.local())
    monkeypatch.setattr(Fake, "log", [])
    waited = []
    monkeypatch.setattr(cuda, "synchronize", waited.append)
    return waited


def test_arrays_to_a_device_and_back(fakes):
    x = np.arange(6, dtype=np.int32).reshape(2, 3)
    assert device.send(x, "cpu") is x and device.host(x) is x and device.waits() == 0
    there = device.send(x, "cuda:1")
    assert (there.device, there.dtype, there.shape) == ("cuda:1", "int32", (2, 3))
    for n in (1, 2):
        assert np.array_equal(device.host(there), x) and device.waits() == n
    assert Fake.log == [("array", "cuda:1")] + [("cuda:1", "cpu")] * 2
    here = Fake((2,), "float32")
    assert device.host(here) is here.array and device.waits() == 2
    counts = []
    thread = threading.Thread(target=lambda: counts.append(device.waits()))
    thread.start()
    thread.join()
    assert counts == [0]


def test_pinned_memory_is_used_again(fakes):
    first = device.staged(Fake((2, 3), "float32", "cuda:1"))
    assert first.pinned and (first.shape, first.dtype) == ((2, 3), "float32") and fakes == ["cuda:1"]
    for shape, same in (((6,), True), ((5,), True), ((7,), False), ((6,), False)):
        found = device.staged(Fake(shape, "float32", "cuda:0"))
        assert np.shares_memory(found.array, first.array) is same and found.shape == shape
    assert fakes == ["cuda:1"] + ["cuda:0"] * 4


def test_inputs_wait_for_their_last_copy(fakes):
    inputs = device.Inputs()
    here = Fake((3,), "int32")
    inputs.put(here, np.arange(3))
    assert here.array.tolist() == [0, 1, 2] and inputs._pieces == []
    there = Fake((3,), "int32", "cuda:0")
    device.host(there)  # copies that are queued before a wait are done after it
    for array, pieces in ((np.arange(3), 1), (np.arange(3) + 1, 2)):
        inputs.put(there, array)
        assert np.array_equal(there.array, array) and len(inputs._pieces) == pieces
    assert all(piece.pinned for piece, _ in inputs._pieces)
    device.host(there)
    for pieces in (2, 2, 3):
        inputs.put(there, np.arange(3))
        assert len(inputs._pieces) == pieces
    device.host(there)
    inputs.put(Fake((4,), "int32", "cuda:0"), np.arange(4))
    assert len(inputs._pieces) == 4


def test_a_tensor_of_the_cpu_shares_its_memory():
    x = Tensor((2,), "float32")
    device.host(x)[:] = 3
    assert x.numpy().tolist() == [3, 3]
