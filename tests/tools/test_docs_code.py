"""The Python in README.md and docs/*.md runs as it is printed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.stem}-{i}")
    for page in PAGES
    if page.exists()
    for i, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.S))
]
# A script for torchrun says so in its first line. It has these names from its reader, and here fewer ranks.
RANKS = re.compile(r"# torchrun --nproc-per-node (\d+) ")
GIVEN = """
import torch
from longlora.tools.demo import MODEL
G, batches = 32, torch.randint(2048, (2, 1, 128))
"""
FEWER = {"(2, 4)": "(1, 2)"}

pytestmark = pytest.mark.skipif(not BLOCKS, reason="these tests need the source tree")


def test_there_is_python_on_the_pages():
    assert {param.id.split("-")[0] for param in BLOCKS} >= {"python", "transformers", "context_parallel"}


@pytest.mark.parametrize("block", BLOCKS)
def test_runs(block, tmp_path):
    if "torch" in block:
        for peer in ("torch", "transformers", "peft"):
            pytest.importorskip(peer, reason="the page is about it")
    script, launcher = tmp_path / "page.py", []
    if RANKS.match(block):
        for wide, narrow in FEWER.items():
            assert wide in block
            block = block.replace(wide, narrow)
        block, launcher = (
            GIVEN + block,
            ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
        )
    script.write_text(block)
    done = subprocess.run(
        [sys.executable, *launcher, script],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if "longlora.merge" in block:
        assert (tmp_path / "merged" / "model.safetensors").exists() and "perplexity" in done.stdout
