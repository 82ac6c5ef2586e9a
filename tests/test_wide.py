"""The sizes that the kernels have with AVX-512, tiles of bfloat16 pairs included, on a processor that lacks it: the op tests on a
build of portable C with vectors as wide (WIDE in setup.py). AVX-512's own instructions are not seen here."""
import pytest
from built import ROOT, build, run_tests
from longlora import _C

# The files whose kernels have sizes of their own for each width, and the least number of tests of them.
FILES, LEAST = ["matmul", "lora_linear", "linear_cross_entropy", "s2_attention", "rms_norm", "cast"], 300

pytestmark = [
    pytest.mark.skipif(all(_C.isa_supported), reason="this processor has AVX-512 itself, and the op tests use it"),
    pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="the sources are not here: these tests need the source tree"),
]


def test_the_sizes_of_avx512(tmp_path):
    package = build(tmp_path / "package", WIDE="1", LONGLORA_CUDA="0")
    tests = run_tests(package, tmp_path / "wide.xml", [f"tests/test_{name}.py" for name in FILES], "-k", "portable")
    assert len(tests) >= LEAST and not [name for name, skipped in tests.items() if skipped]
