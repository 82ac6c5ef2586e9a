"""Fixtures of the op tests: every dtype, every instruction set that this processor has, poisoned outputs."""
import os

import checks
import pytest

import longlora
from longlora import _C

# Processes that tests start import the very package that is under test, not the sources of the folder they are started in.
os.environ["PYTHONSAFEPATH"] = "1"
os.environ["PYTHONPATH"] = os.path.dirname(os.path.dirname(os.path.abspath(longlora.__file__)))


@pytest.fixture(params=list(checks.DTYPES))
def dtype(request):
    return request.param


@pytest.fixture(params=[i for i, there in enumerate(_C.isa_supported) if there], ids=lambda i: _C.isa_names[i])
def isa(request):
    before = _C.get_isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


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
