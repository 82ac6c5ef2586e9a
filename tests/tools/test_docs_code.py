"""The commands and the Python of README.md and docs/*.md run as printed, on small files: see pages.py."""

import os
import subprocess
import sys

import forked
import pages
import pytest

TESTS = os.path.dirname(pages.__file__)
RUN = [page for page in pages.PAGES if page.exists() and pages.runs(page)]

pytestmark = pytest.mark.skipif(not RUN, reason="these tests need the source tree")


def test_there_is_something_to_run_on_the_pages():
    assert {page.stem for page in RUN} >= {
        "README",
        "guide",
        "python",
        "server",
        "transformers",
        "context_parallel",
    }


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run(page, tmp_path):
    for name in sorted(pages.needs(page)):
        pytest.importorskip(name, reason="the page is about it: pip install '.[test]'")
    env = {"PYTHONPATH": os.pathsep.join([os.environ["PYTHONPATH"], TESTS]), "OMP_NUM_THREADS": "1"}
    if "transformers" in pages.needs(page):
        done = forked.run([pages.__file__, page], env=env, cwd=tmp_path, timeout=3600)
    else:
        done = subprocess.run(
            [sys.executable, pages.__file__, page],
            cwd=tmp_path,
            env={**os.environ, **env},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=3600,
        )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert done.stdout.endswith("---- all blocks have run\n")


def test_no_command_hides_in_a_block_that_does_not_run():
    for page in pages.PAGES:
        for block in pages.blocks(page):
            if block.kind == "text" and page.stem != "architecture":  # whose drawing begins with one
                hidden = [line for line in block.text.splitlines() if line.strip().startswith("longlora ")]
                assert not hidden, page.name
