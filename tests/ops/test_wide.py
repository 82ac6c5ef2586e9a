"""Tests the sizes of AVX-512, its tiles of bfloat16 pairs, and what uses AMX, where processors lack them.

The op tests run on builds of portable C with vectors of that width (WIDE in setup.py). This does not test the
instructions.
"""

import pytest
from built import OPS, ROOT, build, run_tests

from longlora import _C

LEAST = 700  # tests that must have run

pytestmark = [pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="these tests need the source tree")]


@pytest.mark.parametrize("wide, isa", [("1", "avx512_bf16"), ("2", "amx")])
def test_the_sizes_of_avx512(wide, isa, tmp_path):
    if _C.isa_supported[_C.isa_names.index(isa)]:
        pytest.skip("this processor runs the kernels themselves")
    package = build(tmp_path / "package", WIDE=wide, LONGLORA_CUDA="0")
    files = [f"tests/ops/test_{name}.py" for name in OPS]
    tests = run_tests(package, tmp_path / "wide.xml", files, "-k", "portable or avx2")
    assert not [
        name for name, skipped in tests.items() if skipped or "avx2" in name
    ]  # this build has no avx2
    assert len(tests) >= LEAST
