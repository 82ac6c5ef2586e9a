"""The tests with transformers run again on its oldest supported version, which is installed beside the
newest."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="these tests extend models of transformers")
pytest.importorskip("peft", reason="extend makes a PeftModel")
OLDEST = "4.53.3"
FILES = [
    "test_torch_transformers.py",
    "test_torch_extend.py",
    "test_torch_swap.py",
    "test_torch_swap_peft.py",
    "test_torch_forms.py",
]


def test_on_the_oldest_transformers(tmp_path):
    cache = (
        Path(os.environ.get("LONGLORA_TEST_CACHE") or Path.home() / ".cache" / "longlora-tests")
        / f"transformers-{OLDEST}"
    )
    if not (cache / "complete").exists():
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--no-deps",
                "--upgrade",
                "--target",
                cache,
                f"transformers=={OLDEST}",
                "tokenizers==0.21.4",
                "huggingface_hub==0.36.0",
            ],
            capture_output=True,
            text=True,
            timeout=3600,
        )
        if done.returncode:
            reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
            pytest.skip(f"transformers {OLDEST} cannot be installed: {reason}")
        (cache / "complete").touch()
    paths = os.pathsep.join([str(cache), os.environ["PYTHONPATH"]])
    here = Path(__file__).parent
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--basetemp",
            tmp_path / "old",
            "--rootdir",
            here.parents[1],
            "-k",
            "not compile",  # that is torch's part
            *(here / name for name in FILES),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=3600,
        env={**os.environ, "PYTHONPATH": paths, "LONGLORA_TRANSFORMERS": OLDEST},
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
