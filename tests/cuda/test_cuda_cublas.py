"""How the CUDA kernels find and use cuBLAS: the order of places, errors without it, products that it refuses,
and the table of plans, which has a fixed size."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import checks
import numpy as np
import pytest

from longlora import _C, Tensor, cuda, ops

ROOT = Path(__file__).resolve().parents[2]
CC = os.environ.get("CC") or "cc"
needs_cuda = pytest.mark.skipif(not cuda.is_available(), reason=f"no CUDA: {cuda.reason()}")
needs_emulation = pytest.mark.skipif(not checks.EMULATED, reason="sets how the emulated cuBLAS answers")

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
    run = subprocess.run(
        [sys.executable, "-c", PRODUCT], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


@needs_cuda
@pytest.mark.parametrize(
    "file,why",
    [("/nowhere/libcublasLt.so.13", "No such file"), ("libc.so.6", "libc.so.6 has no cublasLtGetVersion")],
)
def test_a_file_that_is_not_cublas(file, why):
    """The call that needs it and doctor report it. Other ops work."""
    product, question, swiglu = printed(LONGLORA_CUBLAS=file)
    for message in (product, question):
        assert "cuBLAS was not found at LONGLORA_CUBLAS" in message and why in message
    assert product.startswith("matmul: ")
    assert float(swiglu) == pytest.approx(4 / (1 + np.exp(-1)))


@needs_cuda
def test_the_file_that_is_named_is_used():
    file = cuda.cublas()[1]
    assert os.path.exists(file)
    assert printed(LONGLORA_CUBLAS=file)[:2] == ["no error", "no error"]


@needs_cuda
def test_more_products_than_are_remembered(cuda):
    """The table has 512 places. The plans that were not used for longest are replaced and made again."""
    for k in [*range(1, 700), *range(1, 9)]:
        a, b = np.ones((2, k), np.float32), np.ones((k, 3), np.float32)
        assert (ops.matmul(a, b) == k).all()


@needs_emulation
@pytest.mark.parametrize("answer", ["refuses", "none"])
def test_what_cublas_has_no_algorithm_for(answer, dtype, cuda, poison, monkeypatch):
    """The plain kernel does it: any layout, bias, another matrix added, and an alpha in device memory."""
    monkeypatch.setenv("LONGLORA_EMULATION_CUBLAS", answer)
    K = {"refuses": 171, "none": 173}[answer]  # shapes that no other test uses, because answers are kept
    a, b, bias = (
        checks.random((70, K), dtype),
        checks.random((66, K), dtype, 1),
        checks.random((66,), dtype, 2),
    )
    checks.check("matmul", a, b.T)
    checks.check("matmul", np.ascontiguousarray(a.T).T, np.ascontiguousarray(b.T))
    down, up, residual = (
        checks.random((8, K), dtype, 3),
        checks.random((66, 8), dtype, 4),
        checks.random((70, 66), dtype, 5),
    )
    checks.check("lora_linear_forward", a, b, bias, down, up, 0.5, residual, floor=8)
    targets, dlosses = np.arange(70, dtype=np.int32) % 66, np.full(70, 2.0**-20, np.float32)
    _, dx, dweight = ops.linear_cross_entropy_backward(a, b, targets, dlosses, train_weight=True)
    want = checks.reference.linear_cross_entropy_backward(a, b, targets, dlosses, train_weight=True)
    for got, x in ((dx, want[1]), (dweight, want[2])):
        limit = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-2}[
            dtype
        ]  # the smallest steps of float16 are 1 % of dx here
        assert np.abs(got.astype(np.float64) - x).max() <= limit * np.abs(x).max()


@needs_emulation
def test_which_products_cublas_does(cuda, monkeypatch):
    """Those of one dtype with a dense axis each, into that or float32. A cuBLAS that fails tells which."""
    monkeypatch.setenv("LONGLORA_EMULATION_CUBLAS", "fails")

    def does(call, *args):
        try:
            call(*args)
        except RuntimeError as error:
            assert str(error).endswith("cuBLAS: product: error")
            return True
        return False

    def multiplies(a, b, dtype="float32"):
        return does(_C.matmul, np.empty((len(a), b.shape[1]), checks.DTYPES[dtype]), a, b, 1.0, 0.0)

    K = 179  # shapes that no other test uses, because plans are kept
    long, wide, tall = (checks.random(shape) for shape in ((14, 2 * K), (K, 9), (2 * K, 10)))
    a, b = np.ascontiguousarray(long[:7, :K]), np.ascontiguousarray(tall[:K, :5])
    for x in (a, a.T.copy().T, long[:7, :K], long[::2, :K], wide[:, :7].T):
        for y in (b, b.T.copy().T, tall[:K, :5], tall[::2, :5], long[:5, :K].T):
            assert multiplies(x, y)
    assert does(_C.matmul, np.empty((7, 9), np.float32)[:, :5], a, b, 1.0, 0.0)
    # An axis of one element may have any step.
    for x, y in ((long[:1, ::2], b), (a, tall[::2, :1]), (long[::2, :1], b[:1]), (a[:, :1], tall[:1, ::2])):
        assert multiplies(x, y)
    odd_a, odd_b = (np.append(0, x).astype(x.dtype)[1:].reshape(x.shape) for x in (a, b))
    assert multiplies(odd_a, b) and multiplies(a, odd_b) and multiplies(odd_a, odd_b)
    for x in (long[:7, ::2], a[::-1], np.broadcast_to(a[:1], (7, K))):
        assert not multiplies(x, b) and not multiplies(a, tall[:K, ::2]) and not multiplies(x[:, :0], b[:0])
    for dtype in ("bfloat16", "float16"):
        x, y = a.astype(checks.DTYPES[dtype]), b.astype(checks.DTYPES[dtype])
        assert multiplies(x, y) and multiplies(x, y, dtype)
        assert not multiplies(x, b) and not multiplies(a, y) and not multiplies(a, b, dtype)
    bias, weight = checks.random((8,), seed=2), np.ascontiguousarray(b.T)
    for first in range(3):  # it may read the bias in vectors of 16 bytes
        assert does(ops.lora_linear_forward, a, weight, bias[first:][:5]) == (first == 0)


@needs_emulation
def test_a_product_that_fails(monkeypatch):
    a, out = Tensor((5, 177), "float32", "cuda"), Tensor((5, 5), "float32", "cuda")
    a.fill(1)
    monkeypatch.setenv("LONGLORA_EMULATION_CUBLAS", "fails")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="^matmul: cuBLAS: product: error$"):
            _C.matmul(out, a, a.reshape((177, 5)), 1.0, 0.0)
    monkeypatch.delenv("LONGLORA_EMULATION_CUBLAS")
    _C.matmul(out, a, a.reshape((177, 5)), 1.0, 0.0)
    assert (out.cpu().numpy() == 177).all()


# ---- the order of places, with libraries that have the names only --------------------------------


def stand_in(file, version, without=()):
    """A library with the functions of cuda/cublaslt.h except `without`. Its version identifies it."""
    names = re.findall(r"X\(\w+, (cublasLt\w+)", (ROOT / "cuda/cublaslt.h").read_text())
    source = "".join(
        f"unsigned long {name}(void) {{ return {version}; }}\n" for name in names if name not in without
    )
    file.parent.mkdir(parents=True)
    subprocess.run(
        [CC, "-shared", "-fPIC", "-x", "c", "-", f"-Wl,-soname,{file.name}", "-o", str(file)],
        input=source,
        text=True,
        check=True,
    )
    return file


@pytest.mark.skipif(
    not shutil.which(CC) or not (ROOT / "cuda").exists(), reason="no C compiler, or not in the source tree"
)
@pytest.mark.skipif(
    cuda.versions()[0] is not None or cuda._cublas_files() != (), reason="there is a driver, or a cuBLAS"
)
@pytest.mark.skipif(cuda.built_for() in (None, "emulation"), reason="this build opens no cuBLAS")
def test_where_it_is_looked_for(tmp_path):
    """The process, the pip packages of CUDA 13, then 12, the system. A file without a function is skipped."""
    there = {
        "process": stand_in(tmp_path / "torch/libcublasLt.so.12", 120001),
        "pip 13": stand_in(tmp_path / "a/nvidia/cu13/lib/libcublasLt.so.13", 130002),
        "pip 12": stand_in(tmp_path / "a/nvidia/cublas/lib/libcublasLt.so.12", 120003),
        "system": stand_in(tmp_path / "system/libcublasLt.so.12", 120004),
    }
    script = (
        "import ctypes, sys; [ctypes.CDLL(file) for file in sys.argv[1:]]\nfrom longlora import cuda\n"
        "try: print(*cuda.cublas())\nexcept RuntimeError as error: print(error)"
    )

    def found(process=False, pip=False, system=False):
        environment = {name: value for name, value in os.environ.items() if name != "LONGLORA_CUBLAS"}
        environment["PYTHONPATH"] = os.pathsep.join(
            [environment["PYTHONPATH"], str(tmp_path / "a")][: 1 + pip]
        )
        if system:
            environment["LD_LIBRARY_PATH"] = str(there["system"].parent)
        command = [sys.executable, "-c", script, *[str(there["process"])] * process]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True
        ).stdout.strip()

    assert found(process=True, pip=True, system=True) == f"12.0.1 {there['process']}"
    assert found(pip=True, system=True) == f"13.0.2 {there['pip 13']}"
    there["pip 13"].unlink()
    there["pip 13"].parent.rmdir()
    stand_in(there["pip 13"], 130005, without=["cublasLtMatmulAlgoGetHeuristic"])
    assert found(pip=True, system=True) == f"12.0.3 {there['pip 12']}"
    assert found(system=True) == f"12.0.4 {there['system']}"
    assert found().startswith("cuBLAS was not found in the process, in a pip package")
