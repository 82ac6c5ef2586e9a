"""Tests the block sizes of AVX-512, with its tiles of bfloat16 pairs, on processors that lack them.

The op tests run on a build of portable C with vectors of that width (WIDE in setup.py). This does not test
the instructions of AVX-512.
"""

import pytest
from built import OPS, ROOT, build, run_tests

from longlora import _C

LEAST = 700  # tests that must have run

pytestmark = [
    pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="these tests need the source tree"),
    pytest.mark.skipif(
        _C.isa_supported[_C.isa_names.index("avx512_bf16")],
        reason="this processor runs the kernels themselves",
    ),
]


def test_the_sizes_of_avx512(tmp_path):
    package = build(tmp_path / "package", WIDE="1", LONGLORA_CUDA="0")
    files = [f"tests/ops/test_{name}.py" for name in OPS]
    tests = run_tests(package, tmp_path / "wide.xml", files, "-k", "portable or avx2")
    assert not [
        name for name, skipped in tests.items() if skipped or "avx2" in name
    ]  # this build has no avx2
    assert len(tests) >= LEAST
