"""Our own pool of threads, which macOS has in place of OpenMP, tested on this machine.

The suite tests what concerns threads. LONGLORA_WHOLE=1 runs all op tests on it.
"""

import os

import pytest
from built import OPS, ROOT, build, run_tests

# Whatever threads work on, these ask for memory or for settings that are not the pool's matter.
OTHERS = {
    "test_how_threads_wait",
    "test_large_scratch_is_not_faulted_in_anew",
    "test_scratch_that_is_kept_is_bounded",
}
LEAST = 9  # tests that must have run

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="these tests need the source tree")


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    return build(tmp_path_factory.mktemp("pool"), POOL="1", LONGLORA_CUDA="0")


def test_threads_of_our_own(package, tmp_path):
    assert b"GOMP_parallel" not in (package / "longlora/_C.abi3.so").read_bytes()
    others = " or ".join(sorted(OTHERS))
    tests = run_tests(package, tmp_path / "pool.xml", ["tests/ops/test_threads.py"], "-k", f"not ({others})")
    assert len(tests) >= LEAST and not any(tests.values())


@pytest.mark.skipif(not os.environ.get("LONGLORA_WHOLE"), reason="minutes; LONGLORA_WHOLE=1 runs it")
def test_all_ops(package, tmp_path):
    assert len(run_tests(package, tmp_path / "ops.xml", [f"tests/ops/test_{name}.py" for name in OPS])) > 700
