"""The CUDA kernels without a GPU: cuda/*.cu compiled as C++ against tests/emulation, and the op tests on it.

This tests index arithmetic, barriers, masks and guard zones, and that results do not depend on the order of
threads and blocks. It does not test speed, or the code that nvcc generates.
"""

import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from built import OPS, ROOT, build, run, run_tests
from systems import on_linux

CXX = os.environ.get("CXX") or "c++"
TESTS = [OPS[:1], OPS[1:]]  # two runs in parallel, of about equal length
LEAST = 700  # at least this number of tests must run
ORDERS = ["forward", "reversed", "shuffled"]

pytestmark = [
    on_linux,
    pytest.mark.skipif(
        not (ROOT / "cuda").exists(), reason="the CUDA sources are not here: these tests need the source tree"
    ),
    pytest.mark.skipif(not shutil.which(CXX), reason=f"no C++ compiler: {CXX} is not installed"),
    pytest.mark.skipif("ASAN_OPTIONS" in os.environ, reason="the sanitizers do not know fibers"),
]


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The package built for the emulation."""
    return build(tmp_path_factory.mktemp("emulated"), LONGLORA_CUDA="emulation")


def test_the_emulation_itself(tmp_path):
    """Kernels with known results, and wrong kernels that must be detected. Compiles without warnings."""
    program = tmp_path / "test_emulation"
    run(
        [
            CXX,
            *"-std=c++17 -O2 -Wall -Wextra -Werror -Wno-unknown-pragmas -fno-exceptions -fno-rtti "
            "-fsanitize=alignment,bounds,shift -DLONGLORA_EMULATION "
            "-Icuda -Itests/emulation -pthread -x c++".split(),
            "tests/emulation/test_emulation.cu",
            "tests/emulation/emulation.cpp",
            "tests/emulation/runtime.cpp",
            "-o",
            program,
        ]
    )
    print(run([program]))


def test_every_op(package, tmp_path):
    """The op tests, unchanged, on CUDA: all must run, none may fail."""

    def part(names):
        return run_tests(
            package,
            tmp_path / f"{names[0]}.xml",
            [f"tests/ops/test_{name}.py" for name in names],
            "-k",
            "cuda",
        )

    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(part, TESTS))
    assert not [name for tests in parts for name, skipped in tests.items() if skipped or "cuda" not in name]
    assert sum(map(len, parts)) >= LEAST


def test_the_border_and_the_driver(package, tmp_path):
    """The other tests of CUDA. Those that need two devices run in a process that has them."""
    files = sorted(ROOT.glob("tests/cuda/test_cuda_*.py"))
    files.remove(Path(__file__).resolve())
    tests = run_tests(package, tmp_path / "others.xml", files)
    assert {why for why in tests.values() if why} <= {
        "there is a GPU",
        "needs two CUDA devices",
        "this build opens no cuBLAS",
    }


def test_results_do_not_depend_on_the_order_of_threads_and_blocks(package):
    """Bit for bit; a missing barrier shows as a difference between two orders."""

    def digests(order):
        return run(
            [sys.executable, "tests/cuda/cuda_digests.py"],
            LONGLORA_EMULATION_ORDER=order,
            PYTHONPATH=os.pathsep.join([str(package), "tests"]),
        )

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(digests, ORDERS))
    print(len(results[0].splitlines()), "results in", *ORDERS, "order")
    for result in results[1:]:
        assert result.splitlines() == results[0].splitlines()
