"""Fixtures of the op tests: every dtype, every instruction set that this processor has and the GPU, poisoned outputs."""
import os

import checks
import mirror
import pytest

import longlora
from longlora import _C

# Processes that tests start import the very package that is under test, not the sources of the folder they are started in.
os.environ["PYTHONSAFEPATH"] = "1"
os.environ["PYTHONPATH"] = os.path.dirname(os.path.dirname(os.path.abspath(longlora.__file__)))


@pytest.fixture(params=list(checks.DTYPES))
def dtype(request):
    return request.param


ISAS = [name for name, there in zip(_C.isa_names, _C.isa_supported) if there]
CUDA = ["cuda"] if checks.CUDA else []


@pytest.fixture(params=ISAS + CUDA)
def isa(request, monkeypatch):
    """Each instruction set, then CUDA, where the ops' NumPy arrays are mirrored to the device."""
    before = _C.get_isa()
    if request.param == "cuda":
        mirror.install(monkeypatch, "cuda:0")
    else:
        _C.set_isa(_C.isa_names.index(request.param))
    yield request.param
    _C.set_isa(before)


@pytest.fixture(params=["cpu"] + CUDA)
def place(request, monkeypatch):
    """For tests that the instruction sets need not each see: the one in use, then CUDA."""
    if request.param == "cuda":
        mirror.install(monkeypatch, "cuda:0")
    return request.param


@pytest.fixture(params=CUDA or [pytest.param("cuda", marks=pytest.mark.skip(reason="no CUDA device"))])
def cuda(request, monkeypatch):
    """Only CUDA: what it does otherwise than the CPU."""
    mirror.install(monkeypatch, "cuda:0")


@pytest.fixture(autouse=True)
def _threads_as_before():
    """A run's num_threads is the process's: the next test has its own again."""
    before = _C.get_num_threads()
    yield
    _C.set_num_threads(before)


@pytest.fixture
def poison(monkeypatch):
    outputs = checks.poisoned(monkeypatch)
    yield outputs
    outputs.assert_guards()


@pytest.fixture
def each_thread_count():
    """Calls a function with 1, 2 and 3 threads, which all take part however small the work -> list of what came back."""
    before, grain = _C.get_num_threads(), _C.get_grain()
    _C.set_grain(0)

    def call(function):
        results = []
        for n in (1, 2, 3):
            _C.set_num_threads(n)
            results.append(function())
        return results
    yield call
    _C.set_num_threads(before)
    _C.set_grain(grain)
