"""setup.py with compilers that only record their calls: for which GPUs it compiles each CUDA source, and when
it compiles one again."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from systems import on_linux

ROOT = Path(__file__).resolve().parents[2]
EVERY_GPU = ["80:sm_80", "90a:sm_90a", "100:sm_100", "120:sm_120", "120:compute_120"]
# Tells its release, writes its arguments to $RECORD and makes its output, so that setup.py goes on. If BROKEN
# is set, it fails as nvcc does with a host compiler that is too new.
RECORDER = """#!/bin/sh
[ "$1" != --version ] || { echo "Cuda compilation tools, release ${RELEASE:-13.0}, V1"; exit; }
echo "$@" >> "$RECORD"
[ -z "$BROKEN" ] || { echo 'host_config.h:132:2: error: #error -- unsupported GNU version!'; exit 1; }
while [ $# -gt 0 ]; do
    [ "$1" != -o ] || : > "$2"
    shift
done
"""
NVIDIA_SMI = """#!/bin/sh
[ -n "$GPUS" ] || { echo "NVIDIA-SMI has failed because it could not communicate with the driver."; exit 9; }
[ "$*" = "--query-gpu=compute_cap --format=csv,noheader" ] && printf '%s\\n' $GPUS
"""

pytestmark = [pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree"), on_linux]


class Tree:
    """A copy of the sources with a file in cuda/hopper/, and compilers that record."""

    def __init__(self, folder):
        self.root, self.record = folder / "tree", folder / "record"
        for name in ("csrc", "cuda", "tests/emulation"):
            shutil.copytree(ROOT / name, self.root / name)
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy2(ROOT / name, self.root / name)
        package = self.root / "longlora/__init__.py"
        package.parent.mkdir()
        shutil.copy2(ROOT / "longlora/__init__.py", package)
        self.hopper = self.root / "cuda/hopper/attention.cu"
        self.hopper.parent.mkdir(exist_ok=True)
        self.hopper.write_text('#include "../common.cuh"\n')
        for name in ("nvcc", "cc"):
            script = RECORDER if name == "nvcc" else RECORDER.replace("$RECORD", "$RECORD.cc")
            (folder / name).write_text(script.replace("$BROKEN", "$BROKEN" if name == "nvcc" else ""))
            (folder / name).chmod(0o755)
        (folder / "nvidia-smi").write_text(NVIDIA_SMI)
        (folder / "nvidia-smi").chmod(0o755)
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("LONGLORA_CUDA")},
            "PATH": f"{folder}:{os.environ['PATH']}",
            "GPUS": "",
            "CC": str(folder / "cc"),
            "NVCC": str(folder / "nvcc"),
            "RECORD": str(self.record),
            "LONGLORA_CUDA": "1",
            "WIDE": "1",  # kernels of one instruction set only
        }
        self.past()

    def past(self):
        """All files are an hour old, so that whatever is made or changed from now on is newer."""
        for path in self.root.rglob("*"):
            os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 3600))

    def run(self, **switches):
        """Build, with these environment variables -> the finished process."""
        self.record.unlink(missing_ok=True)
        command = [
            sys.executable,
            "setup.py",
            "-q",
            "build_ext",
            "--build-lib",
            "built",
            "--build-temp",
            "made",
        ]
        environment = self.environment | switches
        return subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True)

    def build(self, **switches):
        """-> {source: the GPUs in nvcc's call}, {source: the macros in it}, of compiled sources."""
        done = self.run(**switches)
        assert done.returncode == 0, done.stdout + done.stderr
        self.said = done.stderr
        calls = self.record.read_text().splitlines() if self.record.exists() else []
        gpus, macros = {}, {}
        for call in calls:
            source = re.search(r" -c (\S+) ", call)
            if source:
                gpus[source[1]] = [
                    f"{arch}:{code}"
                    for arch, code in re.findall(r"-gencode arch=compute_(\w+),code=(\w+)", call)
                ]
                macros[source[1]] = re.findall(r"-D(LONGLORA_\w+)", call)
        tried = [source for source in gpus if not source.startswith("cuda/")]
        assert [Path(source).name for source in tried] == ["empty.cu"], "setup.py tries the compiler once"
        del gpus[tried[0]], macros[tried[0]]
        return gpus, macros

    def chosen(self, **switches):
        """What is said, and the call of nvcc for an ordinary source. The C compiler fails, to save time."""
        done = self.run(**{"LONGLORA_CUDA": "auto", "POOL": "1", "CC": "false", "MAX_JOBS": "1", **switches})
        said = [line for line in done.stderr.splitlines() if line.startswith("longlora: ")]
        calls = self.record.read_text().splitlines() if self.record.exists() else []
        return "\n".join(said), "".join(call for call in calls if " -c cuda/swiglu.cu " in call)


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)


def ordinary():
    return {str(path.relative_to(ROOT)) for path in ROOT.glob("cuda/*.cu")}


def test_a_file_of_hopper_is_compiled_for_sm_90a_only(tree):
    gpus, macros = tree.build()
    assert gpus.pop("cuda/hopper/attention.cu") == ["90a:sm_90a"]
    assert set(gpus) == ordinary() and all(of == EVERY_GPU for of in gpus.values())
    assert all("LONGLORA_HOPPER" in of for of in macros.values()), "the choice of a kernel must know of it"


def test_a_build_for_other_gpus_leaves_hopper_out(tree):
    gpus, macros = tree.build(LONGLORA_CUDA_ARCH="80 90")
    assert set(gpus) == ordinary()
    assert all(of == ["80:sm_80", "90:sm_90", "90:compute_90"] for of in gpus.values())
    assert not any("LONGLORA_HOPPER" in of for of in macros.values())
    tree.hopper.unlink()
    gpus, macros = tree.build()
    assert set(gpus) == ordinary() and not any("LONGLORA_HOPPER" in of for of in macros.values())


def test_what_is_newer_than_its_object_is_compiled_again(tree):
    everything = set(tree.build()[0])
    assert not tree.build()[0]
    for changed, again in (
        ("cuda/hopper/attention.cu", {"cuda/hopper/attention.cu"}),
        ("cuda/swiglu.cu", {"cuda/swiglu.cu"}),
        ("cuda/hopper/wgmma.cuh", everything),
        ("cuda/common.cuh", everything),
        ("csrc/longlora.h", everything),
        ("csrc/cpu/cpu.h", set()),
        ("setup.py", everything),
    ):
        (tree.root / changed).touch()
        assert set(tree.build()[0]) == again, changed
        tree.past()
    assert set(tree.build(LONGLORA_CUDA_ARCH="90a")[0]) == everything, "other flags, other objects"
    assert not tree.build()[0], "the former objects are still there"


@pytest.mark.parametrize("release", ["11.8", "12.4"])
def test_an_older_toolkit_builds_for_the_gpus_it_knows(tree, release):
    gpus, _ = tree.build(RELEASE=release, LONGLORA_CUDA="auto")
    assert set(gpus) == ordinary()
    assert all(of == ["80:sm_80", "90:sm_90", "90:compute_90"] for of in gpus.values())
    (line,) = tree.said.splitlines()
    assert line.startswith("longlora: building CUDA kernels for sm 80 90, ")
    assert f"the nvcc of CUDA {release} knows no GPU later than sm_90" in line
    assert tree.build(RELEASE=release, LONGLORA_CUDA_ARCH="90a")[0].keys() > ordinary(), "as told"


def test_a_toolkit_of_12_8_builds_for_all(tree):
    gpus, _ = tree.build(RELEASE="12.8", LONGLORA_CUDA="auto")
    gpus.pop("cuda/hopper/attention.cu")
    assert all(of == EVERY_GPU for of in gpus.values())
    assert tree.said == (
        "longlora: building CUDA kernels for sm 80 90a 100 120, as nvidia-smi finds no GPU here that is "
        "supported. LONGLORA_CUDA_ARCH chooses others; with LONGLORA_CUDA=0 there are none\n"
    )


@pytest.mark.parametrize(
    "gpus, release, archs",
    [
        ("9.0 9.0", "13.0", "90a"),
        ("12.0 8.6", "12.8", "80 120"),  # code for 8.0 runs on every 8.x
        ("11.0", "13.0", "100"),  # by the PTX of an earlier one
        ("12.0", "12.4", "90"),
        ("7.5 9.0", "13.0", "90a"),  # 7.5 is not supported
        ("[N/A]", "13.0", "80 90a 100 120"),
    ],
)
def test_the_gpus_that_are_there(tree, gpus, release, archs):
    line, compiled = tree.chosen(GPUS=gpus, RELEASE=release)
    assert line.startswith(f"longlora: building CUDA kernels for sm {archs}, ")
    assert line.endswith(". LONGLORA_CUDA_ARCH chooses others; with LONGLORA_CUDA=0 there are none")
    assert ("for the GPUs of this machine" in line) == (len(archs) < 14)
    assert re.findall(r"code=sm_(\w+)", compiled) == archs.split()
    assert f"code=compute_{archs.split()[-1]}" in compiled


def test_what_is_told_goes_before_what_is_there(tree):
    line, compiled = tree.chosen(GPUS="9.0", LONGLORA_CUDA_ARCH="80 100")
    assert "for sm 80 100, as LONGLORA_CUDA_ARCH says. " in line
    assert re.findall(r"code=sm_(\w+)", compiled) == ["80", "100"]
    assert tree.chosen(GPUS="9.0", LONGLORA_CUDA="0") == ("", "")


@pytest.mark.parametrize(
    "switches, why",
    [
        (dict(RELEASE="11.7"), "comes with CUDA 11.7, which is older than 11.8"),
        (dict(RELEASE="unknown"), "--version did not tell its release"),
        (dict(BROKEN="1"), "error: #error -- unsupported GNU version!"),
        (
            dict(NVCC="/nowhere", PATH="/usr/bin:/bin"),
            "there was no nvcc in NVCC, CUDA_HOME, CUDA_PATH, PATH",
        ),
    ],
)
def test_without_a_toolkit_that_can_the_cpu_alone_is_built(tree, switches, why):
    if "NVCC" in switches and shutil.which("/usr/local/cuda/bin/nvcc"):
        pytest.skip("there is an nvcc where it is looked for last")
    done = tree.run(LONGLORA_CUDA="auto", **switches)
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("longlora: ") and why in line and line.endswith(": building for the CPU alone")
    compiled = Path(f"{tree.record}.cc").read_text()
    assert " -DLONGLORA_CUDA=1 " not in compiled and " -DLONGLORA_WITHOUT_CUDA=" in compiled
    assert "-lcudart_static" not in compiled and "csrc/cpu/swiglu.c" in compiled
    calls = tree.record.read_text().splitlines() if tree.record.exists() else []
    assert not [call for call in calls if " cuda/" in call]
    done = tree.run(LONGLORA_CUDA="1", **switches)
    assert done.returncode == 1 and done.stderr.startswith("LONGLORA_CUDA=1, but ") and why in done.stderr
