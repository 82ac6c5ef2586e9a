"""setup.py with compilers that only record their calls: for which GPUs it compiles each CUDA source, and when
it compiles one again."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EVERY_GPU = ["80:sm_80", "90a:sm_90a", "100:sm_100", "120:sm_120", "120:compute_120"]
# Writes its arguments to $RECORD and makes its output, so that setup.py goes on.
RECORDER = """#!/bin/sh
[ -z "$RECORD" ] || echo "$@" >> "$RECORD"
while [ $# -gt 0 ]; do
    [ "$1" != -o ] || : > "$2"
    shift
done
"""

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")


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
            (folder / name).write_text(
                RECORDER.replace("$RECORD", "$RECORD" if name == "nvcc" else "$NO_RECORD")
            )
            (folder / name).chmod(0o755)
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("LONGLORA_CUDA")},
            "CC": str(folder / "cc"),
            "NVCC": str(folder / "nvcc"),
            "RECORD": str(self.record),
            "LONGLORA_CUDA": "1",
        }
        self.past()

    def past(self):
        """All files are an hour old, so that whatever is made or changed from now on is newer."""
        for path in self.root.rglob("*"):
            os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 3600))

    def build(self, **switches):
        """-> {source: the GPUs in nvcc's call}, {source: the macros in it}, of compiled sources."""
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
        done = subprocess.run(
            command, cwd=self.root, env=self.environment | switches, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
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
        gpus.pop("x.cu", None)  # setup.py's question where nvcc's libraries are
        return gpus, macros


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
