"""untouched(): Tensors that cost no memory, with made-up addresses where the system refuses the memory."""

import itertools
import mmap
from types import SimpleNamespace

import pytest

from longlora import _C, job
from longlora.errors import UserError
from longlora.memory import dry_run
from longlora.memory.dry_run import untouched

PROCESS = 1 << 57  # above all addresses of a process: they have up to 57 bits on x86-64, 56 on arm64


@pytest.fixture
def asked(monkeypatch):
    """Let mmap fail as under `ulimit -v`. Returns the arguments of its calls."""
    found = []

    def fails(*args, **options):
        found.append((args, options))
        raise OSError(12, "Cannot allocate memory")

    fake = SimpleNamespace(mmap=fails, MAP_PRIVATE=mmap.MAP_PRIVATE, MAP_ANONYMOUS=mmap.MAP_ANONYMOUS)
    monkeypatch.setattr(dry_run, "mmap", fake)
    return found


def address(tensor):
    return tensor.numpy().__array_interface__["data"][0]


def test_memory_is_requested_without_reserving_it(asked):
    untouched(100)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | job.NORESERVE
    assert asked == [((-1, 100), {"flags": flags})]


def test_made_up_addresses_are_outside_every_process_and_apart(asked):
    """Ops refuse outputs that overlap."""
    tensors = [untouched(1 << 40) for _ in range(5)]
    assert {(tensor.shape, tensor.dtype) for tensor in tensors} == {((1 << 40,), "uint8")}
    places = sorted(map(address, tensors))
    assert places[0] > PROCESS and places[-1] < 1 << 63
    assert all(after - before >= 1 << 40 for before, after in itertools.pairwise(places))
    rows = tensors[0].view((1 << 20, 4), "float32", 1 << 30)
    assert address(rows) == address(tensors[0]) + (1 << 30)


def test_made_up_addresses_have_a_largest_size(asked):
    most = 1 << 46  # bytes, more than any machine has
    assert untouched(most).shape == (most,)
    first, second = sorted(map(address, (untouched(most), untouched(most))))
    assert second - first >= most
    with pytest.raises(UserError, match=f"needs {most + 1} bytes of address space, though no memory: Cannot"):
        untouched(most + 1)


def test_a_tensor_of_size_0_has_one_byte():
    assert untouched(0).shape == (1,) and untouched(1).shape == (1,) and untouched(2).shape == (2,)


def test_a_recorder_has_a_method_for_each_op_and_no_other(monkeypatch):
    noted = []
    monkeypatch.setattr(_C, "workspace", lambda op, *args: noted.append((op, args)) or 5)
    gpu = dry_run.Recorder("cuda:0")
    assert gpu.bytes == 0 and gpu.rms_norm_forward(1, 2) is None
    assert noted == [("rms_norm_forward", (1, 2))] and gpu.bytes == 5
    with pytest.raises(AttributeError, match="there is no op 'shape'"):
        gpu.shape  # noqa: B018
