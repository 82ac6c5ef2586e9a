"""The suite runs side by side. Fixtures of the op tests: dtypes, instruction sets, the GPU, poisoned
outputs.
"""

import os

import checks
import mirror
import pytest

import longlora
from longlora import _C

# Processes started by tests import the package under test, not the sources of their working directory.
os.environ["PYTHONSAFEPATH"] = "1"
os.environ["PYTHONPATH"] = os.path.dirname(os.path.dirname(os.path.abspath(longlora.__file__)))

# The files that take longest. The processes start with them; `pytest -m quick` leaves them out.
LONGEST = [
    "test_cuda_emulation.py",
    "test_smollm2.py",
    "test_demo.py",
    "test_sources_cuda.py",
    "test_plan.py",
    "test_torch_oldest.py",
    "test_wide.py",
    "test_context_parallel.py",
    "test_notebooks.py",
    "test_torch_train.py",
    "test_torch_groups.py",
    "test_examples.py",
]


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Without named files, run the suite in one process for each processor, at most four, file by file.

    Named files run in this process. So does everything on a GPU, whose free memory the tests count, and
    everything where pytest-xdist is not installed.
    """
    option, processors = config.option, len(os.sched_getaffinity(0))
    whole = config.args_source == config.ArgsSource.TESTPATHS and not option.usepdb and not option.collectonly
    free = (
        config.pluginmanager.hasplugin("xdist")
        and option.numprocesses is None
        and "PYTEST_XDIST_WORKER" not in os.environ
    )
    if whole and free and processors > 1 and not checks.CUDA:
        option.numprocesses, option.dist, option.loadscopereorder = min(processors, 4), "loadfile", False
        # Each has its share of the processors, two at least, so that threads are tested; threads that wait
        # let others run.
        share = {
            "OMP_NUM_THREADS": str(max(2, processors // 4)),
            "OMP_WAIT_POLICY": "passive",
            "OPENBLAS_NUM_THREADS": "1",
        }
        os.environ.update({name: value for name, value in share.items() if name not in os.environ})


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    rank = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(LONGEST)))
    for item in items:
        if item.path.name not in rank:
            item.add_marker(pytest.mark.quick)


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
    """Calls a function with 1, 2 and 3 threads, which all take part however small the work -> list of what
    came back.
    """
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


@pytest.fixture
def one_thread():
    """Ops use one thread."""
    before = longlora.get_num_threads()
    longlora.set_num_threads(1)
    yield
    longlora.set_num_threads(before)
