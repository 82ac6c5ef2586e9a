"""Fixtures of the op tests: every dtype, every instruction set that this processor has, poisoned outputs."""
import os

import checks
import pytest

import longlora
from longlora import _C

if not os.path.isdir(os.path.join(os.path.dirname(longlora.__file__), "assets")):
    collect_ignore = ["test_demo.py", "test_notebooks.py"]             # the demo's model is not in this build


@pytest.fixture(params=list(checks.DTYPES))
def dtype(request):
    return request.param


@pytest.fixture(params=[i for i, there in enumerate(_C.isa_supported) if there], ids=lambda i: _C.isa_names[i])
def isa(request):
    before = _C.get_isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture
def poison(monkeypatch):
    outputs = checks.poisoned(monkeypatch)
    yield outputs
    outputs.assert_guards()


@pytest.fixture
def each_thread_count():
    """Calls a function with 1, 2 and 3 threads -> list of what came back."""
    before = _C.get_num_threads()

    def call(function):
        results = []
        for n in (1, 2, 3):
            _C.set_num_threads(n)
            results.append(function())
        return results
    yield call
    _C.set_num_threads(before)
