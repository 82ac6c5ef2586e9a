"""A fault at an operation of the file system loses no checkpoint, and the run goes on to the same bits.

The suite tries some operations; LONGLORA_ALL_FAULTS=1 tries all.
"""

import os

import faults
import pytest
import tiny
from runs import equal, run, weights

from longlora.files import adapter
from longlora.files.merge import merge
from longlora.files.open_model import open_model
from longlora.training import resume

SOME = 16


@pytest.mark.parametrize("kind", ["kill", "fail"])
def test_train(tmp_path, kind):
    how = dict(max_steps=3, save_steps=1, save_total_limit=2, cache_dir=None)
    whole = run(tmp_path, **how, output_dir=str(tmp_path / "whole"))
    wanted = weights(whole.output_dir)
    code, count, text = faults.call(lambda: run(tmp_path, **how, output_dir=str(tmp_path / "n0")), kind, 0)
    assert code == 0, text
    for at in faults.places(count, SOME):
        out = tmp_path / f"n{at}"
        code, _, text = faults.call(lambda: run(tmp_path, **how, output_dir=str(out)), kind, at)  # noqa: B023
        assert code in ((faults.KILLED,) if kind == "kill" else (0, faults.REFUSED)), f"{at}: {text}"
        assert "\n" not in text, f"{at}: {text}"
        for path in resume.found(out):
            resume.load(path)
            adapter.load(path, open_model(tmp_path / "base"))
        goes_on = run(tmp_path, **how, output_dir=str(out), resume_from_checkpoint="latest")
        assert goes_on.step == 3
        equal(weights(out), wanted)
        left = [name for name in os.listdir(out) if name.endswith(".partial")]
        left += [name for name in os.listdir(out / "cache") if name.endswith(".partial")]
        assert not left, f"{at}: {left}"


@pytest.mark.parametrize("kind", ["kill", "fail"])
def test_merge(tmp_path, kind):
    made, base = run(tmp_path, max_steps=1), tmp_path / "base"
    merge(base, made.output_dir, tmp_path / "whole")
    wanted, before = weights(tmp_path / "whole"), tiny.listing(base)
    code, count, text = faults.call(lambda: merge(base, made.output_dir, tmp_path / "m0"), kind, 0)
    assert code == 0, text
    for at in faults.places(count, SOME):
        out = tmp_path / f"m{at}"
        code, _, text = faults.call(lambda: merge(base, made.output_dir, out), kind, at)  # noqa: B023
        assert code in ((faults.KILLED,) if kind == "kill" else (0, faults.REFUSED)), f"{at}: {text}"
        assert "\n" not in text, f"{at}: {text}"
        if out.exists():  # it is whole
            equal(weights(out), wanted)
        else:
            merge(base, made.output_dir, out)
            equal(weights(out), wanted)
        assert not [name for name in os.listdir(tmp_path) if name.endswith(".partial")], at
        assert tiny.listing(base) == before
