"""Wheels: what the workflows call is there, and a wheel for macOS, made here, has all its symbols.

LONGLORA_WHOLE=1 builds this machine's wheel and tries it on each Python that is found.
"""

import ctypes
import os
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path for path in (ROOT / ".ci").glob("*") if path.is_file() and os.access(path, os.X_OK))

pytestmark = pytest.mark.skipif(not SCRIPTS, reason="these tests need the source tree")


def test_workflows_call_scripts_that_are_there():
    called = set()
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        text = path.read_text()
        assert yaml.safe_load(text)["jobs"]
        called |= set(re.findall(r"\.ci/[\w-]+", text))
    assert {".ci/run", ".ci/docs", ".ci/wheel", ".ci/wheels", ".ci/try-wheel"} == called
    assert called <= {str(path.relative_to(ROOT)) for path in SCRIPTS}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash(path):
    subprocess.run(["bash", "-n", path], check=True)


# ---- macOS -------------------------------------------------------------------------------------------------

SYMTAB, LOAD_DYLIB, BUILD_VERSION = 0x2, 0xC, 0x32  # load commands of mach-o/loader.h
MAGIC, ARM64 = 0xFEEDFACF, 0x0100000C
EXTERNAL, KIND, UNDEFINED = 0x01, 0x0E, 0  # n_type of mach-o/nlist.h


class MachO:
    """A library of macOS: its processor, the libraries that it loads, what it defines and what it wants."""

    def __init__(self, data):
        magic, self.processor, _, _, count = struct.unpack_from("<5I", data)
        assert magic == MAGIC
        self.libraries, self.defines, self.wants, place = [], set(), set(), 32
        for _ in range(count):
            command, size = struct.unpack_from("<2I", data, place)
            if command == LOAD_DYLIB:
                name = place + struct.unpack_from("<I", data, place + 8)[0]
                self.libraries.append(data[name : data.index(b"\0", name)].decode())
            if command == BUILD_VERSION:
                self.oldest = struct.unpack_from("<2I", data, place + 8)  # platform, X.Y.Z as bytes
            if command == SYMTAB:
                symbols, number, strings, _ = struct.unpack_from("<4I", data, place + 8)
                for i in range(number):
                    name, kind = struct.unpack_from("<IB", data, symbols + 16 * i)
                    text = data[strings + name : data.index(b"\0", strings + name)].decode()
                    if kind & EXTERNAL:
                        (self.wants if kind & KIND == UNDEFINED else self.defines).add(text)
            place += size


def test_a_wheel_for_macos(tmp_path):
    """Cross-compiled without optimisation, as only its symbols matter here. It has not run."""
    ziglang = pytest.importorskip("ziglang", reason="zig compiles for macOS: pip install ziglang")
    download = (
        "pip download -q --no-deps --only-binary :all: --platform macosx_14_0_arm64 --python-version 3.11"
    )
    command = [sys.executable, "-m", *download.split(), "--dest", tmp_path / "numpy", "numpy"]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("NumPy's wheel for macOS cannot be downloaded here")
    (numpy,) = (tmp_path / "numpy").iterdir()
    zipfile.ZipFile(numpy).extractall(tmp_path / "numpy")
    environment = {
        **os.environ,
        "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
        "NUMPY_INCLUDE": str(tmp_path / "numpy/numpy/_core/include"),
        "DEBUG": "1",
    }
    subprocess.run([ROOT / ".ci/cross", "arm64-macos", tmp_path], check=True, env=environment)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-cp311-abi3-macosx_11_0_arm64.whl")
    with zipfile.ZipFile(wheel) as files:
        assert {"longlora/macos.py", "longlora/assets/model/model.safetensors"} <= set(files.namelist())
        library = MachO(files.read("longlora/_C.abi3.so"))
    assert library.processor == ARM64 and library.oldest == (1, 11 << 16)
    assert library.libraries == ["/usr/lib/libSystem.B.dylib"], "no OpenMP and nothing else that a Mac lacks"
    assert "_PyInit__C" in library.defines
    python = {name for name in library.wants if name.startswith(("_Py", "__Py"))}
    assert python and all(hasattr(ctypes.pythonapi, name[1:]) for name in python)
    stub = Path(ziglang.__file__).with_name("lib") / "libc/darwin/libSystem.tbd"
    of_system = set(re.findall(r"[\w$.]+", stub.read_text()))
    assert {"_pthread_create", "_mmap"} <= library.wants
    assert not library.wants - python - of_system


# ---- this machine ------------------------------------------------------------------------------------------


@pytest.mark.skipif(not os.environ.get("LONGLORA_WHOLE"), reason="minutes; LONGLORA_WHOLE=1 runs it")
def test_this_machines_wheel_on_each_python(tmp_path):
    pytest.importorskip("build", reason="needs pip install '.[wheel]'")
    environment = {**os.environ, "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    subprocess.run([ROOT / ".ci/wheel", tmp_path], check=True, env=environment)
    (wheel,) = tmp_path.glob("*.whl")
    done = subprocess.run([ROOT / ".ci/try-wheel", wheel], text=True, capture_output=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{wheel.name} works with: " in done.stdout
