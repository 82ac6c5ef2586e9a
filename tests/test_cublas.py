"""cuBLAS as the CUDA kernels find it: what is said when it is missing, and that products are remembered in a table that ends."""
import os
import subprocess
import sys

import numpy as np
import pytest
from longlora import cuda, ops

pytestmark = pytest.mark.skipif(not cuda.is_available(), reason=f"no CUDA: {cuda.reason()}")

PRODUCT = """
import numpy as np
from longlora import Tensor, _C, cuda
a, b, out = (Tensor((4, 4), "float32", "cuda") for _ in range(3))
for x in (a, b):
    x.copy_(np.eye(4, dtype=np.float32))
for call in (lambda: _C.matmul(out, a, b, 1.0, 0.0), cuda.cublas):
    try:
        call()
        print("no error")
    except RuntimeError as error:
        print(error)
_C.swiglu_forward(out, a, b)
print(out.cpu().numpy().sum())
"""


def printed(**environment):
    run = subprocess.run([sys.executable, "-c", PRODUCT], env={**os.environ, **environment}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


@pytest.mark.parametrize("file,why", [("/nowhere/libcublasLt.so.13", "No such file"), ("libc.so.6", "libc.so.6 has no cublasLtGetVersion")])
def test_a_file_that_is_not_cublas(file, why):
    """Is named by the call that needs it and by doctor's question; other ops go on."""
    product, question, swiglu = printed(LONGLORA_CUBLAS=file)
    for message in (product, question):
        assert "cuBLAS was not found where LONGLORA_CUBLAS says" in message and why in message
    assert product.startswith("matmul: ")
    assert float(swiglu) == pytest.approx(4 / (1 + np.exp(-1)))


def test_the_file_that_is_named_is_used():
    file = cuda.cublas()[1]
    assert os.path.exists(file)
    assert printed(LONGLORA_CUBLAS=file)[:2] == ["no error", "no error"]


def test_more_products_than_are_remembered(cuda):
    """The table has 512 places: those used longest ago go, and come again."""
    for k in [*range(1, 700), *range(1, 9)]:
        a, b = np.ones((2, k), np.float32), np.ones((k, 3), np.float32)
        assert (ops.matmul(a, b) == k).all()
