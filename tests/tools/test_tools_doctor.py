"""longlora.doctor: what it finds on machines with and without a GPU, and how it prints that."""

import importlib.metadata
import platform
import re
import tomllib
from pathlib import Path

import pytest

import longlora
from longlora import _C, cuda, job
from longlora.tools import doctor

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
DEVICE = {"name": "H200", "sm": "90", "multiprocessors": 132, "bus": "0000:01:00.0"}
REST = {
    "longlora": "1.2.3",
    "python": "3.12.1",
    "platform": "Linux-6",
    "extension": "/lib/_C.so",
    "processor": "Some CPU",
    "instruction_set": "avx2",
    "instruction_sets": ["scalar", "avx2"],
    "forced_by": None,
    "threads": 2,
    "processors": 4,
    "memory_available": 3 << 29,
    "versions": {"numpy": "2.1", "torch": None, "peft": "0.18", "gguf": None},
}
NO_CUDA = {"available": False, "reason": "built without CUDA", "built_for": None}


@pytest.fixture
def gpus(monkeypatch):
    """A fake build for CUDA, on a machine with two GPUs. The second one is too old."""

    def memory(i):
        assert i == 0, "the memory of a refused GPU was queried"
        return 1 << 30, 4 << 30

    fakes = dict(
        versions=lambda: ("13.1", "13.0"),
        is_available=lambda: True,
        reason=lambda: None,
        built_for=lambda: "90a 100",
        device_count=lambda: 2,
        refusal=[None, "too old"].__getitem__,
        memory_info=memory,
        properties=lambda i: {**DEVICE, "name": ["H200", "K80"][i]},
        cublas=lambda: ("13.0.2", "/lib/libcublasLt.so"),
    )
    for name, fake in fakes.items():
        monkeypatch.setattr(cuda, name, fake)


def test_what_doctor_finds(monkeypatch):
    monkeypatch.setattr(job, "processor_name", lambda: "Some CPU")
    monkeypatch.setattr(job, "available_memory", lambda: 12345)
    monkeypatch.setattr(job, "processors", lambda: 7)
    monkeypatch.setenv("LONGLORA_ISA", "scalar")
    found = doctor.examine()
    versions, gpu = found.pop("versions"), found.pop("cuda")
    assert found == {
        "longlora": longlora.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "extension": _C.__file__,
        "processor": "Some CPU",
        "instruction_set": _C.isa_names[_C.get_isa()],
        "instruction_sets": [name for i, name in enumerate(_C.isa_names) if _C.isa_supported[i]],
        "forced_by": "scalar",
        "threads": longlora.get_num_threads(),
        "processors": 7,
        "memory_available": 12345,
    }
    assert gpu["available"] == cuda.is_available()
    assert versions["numpy"] == importlib.metadata.version("numpy")


def test_a_processor_without_a_name(monkeypatch):
    monkeypatch.setattr(job, "processor_name", lambda: "")
    for name, wanted in (("arm", "arm"), ("", "aarch64")):
        monkeypatch.setattr(doctor.platform, "processor", lambda name=name: name)
        monkeypatch.setattr(doctor.platform, "machine", lambda: "aarch64")
        assert doctor.examine()["processor"] == wanted


@pytest.mark.skipif(not PROJECT.exists(), reason="this test needs the source tree")
def test_doctor_lists_every_library_that_the_package_needs():
    project = tomllib.loads(PROJECT.read_text())["project"]
    needed = {re.match(r"[\w-]+", line)[0] for line in project["dependencies"]}
    assert set(doctor.examine()["versions"]) == needed | {"ml_dtypes", "torch", "transformers", "peft"}


def test_a_library_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(doctor, "LIBRARIES", ("numpy", "no-such-library"))
    version = importlib.metadata.version("numpy")
    assert doctor.examine()["versions"] == {"numpy": version, "no-such-library": None}


def test_a_machine_with_gpus(gpus):
    assert doctor.examine()["cuda"] == {
        "available": True,
        "reason": None,
        "built_for": "90a 100",
        "runtime": "13.0",
        "driver": "13.1",
        "devices": [
            {**DEVICE, "refused": None, "memory_free": 1 << 30, "memory_total": 4 << 30},
            {**DEVICE, "name": "K80", "refused": "too old", "memory_free": None, "memory_total": None},
        ],
        "cublas": {"version": "13.0.2", "file": "/lib/libcublasLt.so"},
        "cublas_missing": None,
    }


def test_a_build_without_cublas(gpus, monkeypatch):
    def missing():
        raise RuntimeError("cuBLAS was not found")

    monkeypatch.setattr(cuda, "cublas", missing)
    found = doctor.examine()["cuda"]
    assert found["cublas"] is None and found["cublas_missing"] == "cuBLAS was not found"
    assert doctor.text({**REST, "cuda": found}).splitlines()[10] == (
        "cuBLASLt         missing: cuBLAS was not found"
    )


def test_a_build_without_cuda(gpus, monkeypatch):
    """doctor does not look for cuBLAS."""
    monkeypatch.setattr(cuda, "built_for", lambda: None)
    monkeypatch.setattr(cuda, "device_count", lambda: 0)
    found = doctor.examine()["cuda"]
    assert found["built_for"] is found["cublas"] is found["cublas_missing"] is None and found["devices"] == []


def test_the_text_without_cuda():
    assert doctor.text({**REST, "cuda": NO_CUDA}).splitlines() == [
        "longlora         1.2.3, Python 3.12.1, Linux-6",
        "extension        /lib/_C.so",
        "processor        Some CPU",
        "instruction set  avx2 of scalar, avx2",
        "threads          2 of 4 processors",
        "memory           1.5 GiB available",
        "CUDA             not available: built without CUDA",
        "libraries        numpy 2.1, peft 0.18",
        "not installed    torch, gguf",
    ]


def test_the_text_of_a_forced_instruction_set_and_of_all_libraries():
    found = {**REST, "cuda": NO_CUDA, "forced_by": "avx2", "versions": {"numpy": "2.1"}}
    lines = doctor.text(found).splitlines()
    assert lines[3] == "instruction set  avx2 of scalar, avx2 (LONGLORA_ISA=avx2)"
    assert lines[-1] == "not installed    -"


def test_the_text_with_gpus(gpus):
    lines = doctor.text({**REST, "cuda": doctor.examine()["cuda"]}).splitlines()
    about = "sm_90, 132 multiprocessors, bus 0000:01:00.0"
    assert lines[6:-2] == [
        "CUDA             available",
        "CUDA build       CUDA 13.0 for sm 90a 100, driver for CUDA 13.1",
        f"cuda:0           H200, {about}, 1.0 of 4.0 GiB free",
        f"cuda:1           K80, {about}, not used: too old",
        "cuBLASLt         13.0.2, /lib/libcublasLt.so",
    ]


def test_the_text_without_a_driver(gpus, monkeypatch):
    monkeypatch.setattr(cuda, "versions", lambda: (None, "13.0"))
    monkeypatch.setattr(cuda, "is_available", lambda: False)
    monkeypatch.setattr(cuda, "reason", lambda: "no driver is loaded")
    monkeypatch.setattr(cuda, "device_count", lambda: 0)
    lines = doctor.text({**REST, "cuda": doctor.examine()["cuda"]}).splitlines()
    assert lines[6:8] == [
        "CUDA             not available: no driver is loaded",
        "CUDA build       CUDA 13.0 for sm 90a 100, no driver",
    ]
