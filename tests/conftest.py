"""Runs the suite in parallel. Has the fixtures of op tests: dtypes, instruction sets, GPU, outputs."""

import os
import signal

import checks
import mirror
import pytest
from hypothesis import HealthCheck, settings

import longlora
from longlora import _C, job

# Processes started by tests import the package under test, not the sources of their working directory.
os.environ["PYTHONSAFEPATH"] = "1"
os.environ["PYTHONPATH"] = os.path.dirname(os.path.dirname(os.path.abspath(longlora.__file__)))

# A shell starts background commands with Ctrl-C ignored, and what they start ignores it too. Tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A disk takes milliseconds to flush, and a run flushes often. No test looks at what outlives a crash of the
# machine; those of the order of flushes and names see the calls all the same.
os.fsync = os.fstat

# Each run draws the same examples, however slow the machine is. `--hypothesis-profile default` draws others.
settings.register_profile(
    "same",
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("same")

# The files that take longest. The processes start with them.
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
    "test_torch_swap.py",
    "test_families.py",
    "test_examples.py",
    "test_docs_code.py",
    "test_checkpoint.py",
    "test_faults.py",
]
# `pytest -m quick` leaves out the longest files, those of tests/torch, and these.
NOT_QUICK = {
    *LONGEST,
    "test_adapter.py",
    "test_adapter_fields.py",
    "test_best.py",
    "test_build_cuda.py",
    "test_changed_indices.py",
    "test_chat.py",
    "test_cli.py",
    "test_corpus.py",
    "test_cuda_check.py",
    "test_data.py",
    "test_dlpack.py",
    "test_end_card.py",
    "test_eval_tasks.py",
    "test_failures.py",
    "test_from_adapter.py",
    "test_fuzz_files.py",
    "test_fuzz_inputs.py",
    "test_gguf.py",
    "test_gguf_writer.py",
    "test_guard.py",
    "test_instructions.py",
    "test_interrupt.py",
    "test_linear_cross_entropy.py",
    "test_mutation.py",
    "test_page.py",
    "test_paper.py",
    "test_parts.py",
    "test_passkey.py",
    "test_pool.py",
    "test_ppl.py",
    "test_questions.py",
    "test_reporters.py",
    "test_resume.py",
    "test_saved.py",
    "test_scratch.py",
    "test_sentencepiece.py",
    "test_serve_command.py",
    "test_server.py",
    "test_sources.py",
    "test_stop.py",
    "test_threads.py",
    "test_tokenizer.py",
    "test_tokenizer_gguf.py",
    "test_tokenizer_matrix.py",
    "test_train.py",
    "test_weights.py",
}


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Without named files, run the suite in one process for each processor, at most four, file by file.

    Named files run in this process. Everything runs in this process if pytest-xdist is missing, or on a GPU,
    because tests count its free memory.
    """
    option, processors = config.option, job.processors()
    whole = config.args_source == config.ArgsSource.TESTPATHS and not option.usepdb and not option.collectonly
    free = (
        config.pluginmanager.hasplugin("xdist")
        and option.numprocesses is None
        and "PYTEST_XDIST_WORKER" not in os.environ
    )
    if whole and free and processors > 1 and not checks.CUDA:
        option.numprocesses, option.dist, option.loadscopereorder = min(processors, 4), "loadfile", False
        # Each process has its share of the processors, but two threads at least, because threads are tested.
        # Waiting threads yield to others.
        share = {
            "OMP_NUM_THREADS": str(max(2, processors // 4)),
            "OMP_WAIT_POLICY": "passive",
            "OPENBLAS_NUM_THREADS": "1",
        }
        os.environ.update({name: value for name, value in share.items() if name not in os.environ})


def is_quick(path):
    return path.name not in NOT_QUICK and path.parent.name != "torch"


def pytest_ignore_collect(collection_path, config):
    """`pytest -m quick` does not import the files that it leaves out."""
    left_out = config.option.markexpr == "quick" and collection_path.suffix == ".py"
    return True if left_out and not is_quick(collection_path) else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    rank = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(LONGEST)))
    for item in items:
        if is_quick(item.path):
            item.add_marker(pytest.mark.quick)


@pytest.fixture(params=list(checks.DTYPES))
def dtype(request):
    return request.param


ISAS = [name for name, there in zip(_C.isa_names, _C.isa_supported) if there]
CUDA = ["cuda"] if checks.CUDA else []


def on(name, monkeypatch):
    """Run ops with an instruction set, or on CUDA, for as long as a fixture lasts."""
    before = _C.get_isa()
    if name == "cuda":
        mirror.install(monkeypatch, "cuda:0")
    else:
        _C.set_isa(_C.isa_names.index(name))
    yield name
    _C.set_isa(before)


@pytest.fixture(params=ISAS + CUDA)
def isa(request, monkeypatch):
    """Each instruction set, then CUDA, which mirrors the NumPy arrays of ops to the device."""
    yield from on(request.param, monkeypatch)


@pytest.fixture(params=ISAS)
def cpu_isa(request, monkeypatch):
    """Each instruction set, for what a GPU does not have, such as blocks that fit a cache."""
    yield from on(request.param, monkeypatch)


@pytest.fixture(params=["cpu"] + CUDA)
def place(request, monkeypatch):
    """The instruction set in use, then CUDA: for tests that do not depend on the instruction set."""
    if request.param == "cuda":
        mirror.install(monkeypatch, "cuda:0")
    return request.param


@pytest.fixture(params=CUDA or [pytest.param("cuda", marks=pytest.mark.skip(reason="no CUDA device"))])
def cuda(request, monkeypatch):
    """CUDA only, for what differs from the CPU."""
    mirror.install(monkeypatch, "cuda:0")


@pytest.fixture(autouse=True)
def _threads_as_before():
    """A run sets the number of threads of the process. This restores it for the next test."""
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
    """Returns a function that calls another one with 1, 2 and 3 threads and returns all results."""
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
    """Run ops on one thread."""
    before = longlora.get_num_threads()
    longlora.set_num_threads(1)
    yield
    longlora.set_num_threads(before)
