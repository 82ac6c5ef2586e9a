"""The house rules of cuda/, and nvcc's report on it: no warning, no register spilled. Needs no GPU."""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from test_sources import stem

from longlora import _C

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(p for p in ROOT.glob("cuda/**/*") if p.suffix in (".cu", ".cuh", ".h"))
CODE = {path: re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.S) for path in FILES}
NVCC = shutil.which(os.environ.get("NVCC") or "nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
ARCHS = "sm_80", "sm_90a", "sm_100", "sm_120"  # the GPUs of setup.py
# Files whose kernels come close to spilling, and the GPUs that the suite compiles them for. .ci/run compiles
# every file for sm_90a as strictly. LONGLORA_WHOLE=1 compiles every file for every GPU, in minutes.
NEAR_SPILLING = {
    "s2_attention_forward.cu": ("sm_80",),
    "s2_attention_backward.cu": ("sm_80",),
    "lora_linear.cu": ("sm_80", "sm_100", "sm_120"),
}
WHOLE = os.environ.get("LONGLORA_WHOLE")


@pytest.mark.parametrize("op", _C.specs)
def test_one_op_one_stem(op):
    """Forward and backward share a file, cuda/<stem>.cu, or have one each, cuda/<op>.cu."""
    names = {f"{stem(op)}.cu", f"{op}.cu"}
    entry = f"int {op}_cuda(const void *args, const CudaCall *call)"
    (path,) = [path for path in FILES if entry in path.read_text()]
    assert path.parent.name == "cuda" and path.name in names
    assert sum((ROOT / "cuda" / name).exists() for name in names) == 1


def test_files_say_what_they_are():
    for path in FILES:
        assert path.read_text().startswith(f"/* {path.name} --- "), path
        if path.suffix == ".cu":
            assert f"`{path.name}`" in (ROOT / "cuda/README.md").read_text(), (
                f"cuda/README.md does not mention {path.name}"
            )


@pytest.mark.parametrize(
    "words, where",
    [
        (r"\b(asm|__asm|__asm__)\b", "common.cuh"),  # inline PTX has a name there
        (r"\b(__CUDA_ARCH\w*|LONGLORA_HOPPER)\b", "common.cuh"),  # choices by the GPU
        (r"\bsm\b", "common.cuh device.cu"),
        (r"<<<", "common.cuh"),  # launches have their stream and their check
        (r"\bcublasLt\w+\(", "cublaslt.h"),
        (r"\batomic\w+\(|(?<![\w.])(printf|puts|exit|abort|assert)\s*\(", ""),
        (r"\bcuda(Malloc|Free|DeviceSynchronize|StreamSynchronize|HostAlloc)\w*\(", "device.cu"),
        (r"\bcuda(GetDevice|DeviceGet|OccupancyMax)\w*\(", "device.cu"),  # ops ask their CudaCall
    ],
)
def test_some_words_have_one_place(words, where):
    for path, code in CODE.items():
        if path.name not in where.split():
            assert not re.search(words, code), f"{path.name}: {re.search(words, code)[0]}"


@pytest.mark.skipif(not shutil.which("readelf"), reason="readelf is not installed")
def test_neither_driver_nor_cublas_is_linked():
    """The extension contains the runtime. It opens the others when it needs them, so it loads without."""
    said = subprocess.run(["readelf", "-d", _C.__file__], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", said)
    assert needed and not [library for library in needed if re.search("cuda|cublas|nvidia", library)]


@pytest.mark.skipif(not NVCC, reason="nvcc is not installed")
def test_what_nvcc_says(tmp_path):
    """With the flags of setup.py, and warnings as errors. ptxas -v reports the registers of each kernel and
    remarks on wgmma that it runs one by one."""
    flags = (
        "-std=c++17 -O3 -DNDEBUG -Xcompiler "
        "-fPIC,-Wall,-Wextra,-Werror,-fvisibility=hidden,-fno-exceptions,-fno-rtti "
        "-Werror all-warnings -cubin -Xptxas -v"
    ).split()
    jobs = [
        (path, arch)
        for path in sorted(ROOT.glob("cuda/**/*.cu"), key=os.path.getsize, reverse=True)
        for arch in (ARCHS if WHOLE else NEAR_SPILLING.get(path.name, ()))
    ]

    def compile_(job):
        path, arch = job
        command = [NVCC, *flags, f"-arch={arch}", str(path), "-o", str(tmp_path / f"{path.stem}.{arch}")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        said = done.stdout + done.stderr
        assert done.returncode == 0, f"{path.name}: {said}"
        return [(path.name, arch, line) for line in said.splitlines()]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        lines = [line for part in pool.map(compile_, jobs) for line in part]
    spills = [
        (*where, re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line))
        for *where, line in lines
    ]
    spills = [(*where, m[0]) for *where, m in spills if m]
    near = {(path.name, arch) for path, arch in jobs if path.name in NEAR_SPILLING}
    assert {where[:2] for where in spills} >= near, "ptxas reported nothing"
    assert not [where for where in spills if where[2] != "0 bytes spill stores, 0 bytes spill loads"]
    assert not [line for line in lines if re.search("warning|wgmma|serializ", line[2])]
