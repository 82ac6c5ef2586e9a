"""Builds this tree with other switches and runs tests on it, for test_cuda_emulation.py and test_wide.py."""

import os
import subprocess
import sys
import time
import xml.etree.ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOT_OPS = {"pool", "reference", "scratch", "threads", "wide"}
# The files tests/ops/test_NAME.py that test an op on its own. The first is as long as all others.
OPS = sorted({path.stem.removeprefix("test_") for path in ROOT.glob("tests/ops/test_*.py")} - NOT_OPS)
OPS.sort(key=lambda name: name != "s2_attention")


def run(command, **environment):
    """Run a command -> its output. AssertionError with the output if it fails."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env=os.environ | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout[-20000:]
    return done.stdout


def build(folder, **switches):
    """Build the package into `folder` -> folder. Objects of earlier builds with the same flags are reused."""
    run([sys.executable, "setup.py", "-q", "build", "--build-lib", folder], **switches)
    return folder


def run_tests(package, report, files, *options):
    """Run test files on the package; none may fail -> {test: why it was skipped, None if it passed}."""
    start = time.monotonic()
    run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            f"--junitxml={report}",
            *options,
            *files,
        ],
        PYTHONPATH=str(package),
    )
    cases = list(xml.etree.ElementTree.parse(report).getroot().iter("testcase"))
    skipped = {f"{case.get('classname')}::{case.get('name')}": case.find("skipped") for case in cases}
    print(f"{len(cases)} tests in {time.monotonic() - start:.0f} s:", *files)
    return {name: None if why is None else why.get("message") for name, why in skipped.items()}
