"""A fault at an operation of the file system loses no checkpoint, and the run goes on to the same bits.

The suite tries some operations; LONGLORA_ALL_FAULTS=1 tries all.
"""

import os
import re
import shutil

import faults
import pytest
import tiny
from runs import equal, run, weights

from longlora import disk, plots
from longlora.errors import UserError
from longlora.files import adapter
from longlora.files.merge import merge
from longlora.files.open_model import open_model
from longlora.training import metrics, resume

SOME = 10


@pytest.fixture(autouse=True)
def picture(monkeypatch):
    """loss.png is a file like any other; drawing it would take half of the time of these tests."""

    def draw(path, rows):
        with disk.replacing(path) as aside, open(aside, "wb") as file:
            file.write(b"\x89PNG")

    monkeypatch.setattr(plots, "loss", draw)


def ended(found, kind):
    """The command ended as it should: with a line about what went wrong, if it has met a fault at all."""
    assert found.code in ((faults.KILLED,) if kind == "kill" else (0, faults.REFUSED)), found.text
    assert "\n" not in found.text and "Errno" not in found.text, found.text


def left_behind(*directories):
    """What is still half written."""
    return [name for path in directories for name in os.listdir(path) if name.endswith(".partial")]


class Trained:
    """Runs of one kind with faults, against a run that met none."""

    def __init__(self, tmp_path, **how):
        self.path, self.how = tmp_path, dict(max_steps=3, save_steps=1, cache_dir=None, **how)
        self.whole = tmp_path / "whole"
        self.run(self.whole, save_total_limit=None)
        self.wanted = weights(self.whole)
        self.states = {path: resume.load(path)[1] for path in resume.found(self.whole)}

    def run(self, out, **more):
        return run(self.path, **{**self.how, "output_dir": str(out), **more})

    def checkpoints(self, out):
        """The complete checkpoints at this moment, with one that is about to be replaced."""
        there = os.listdir(out) if os.path.isdir(out) else []
        found = (re.fullmatch(r"(checkpoint-\d+)(\.replaced\.partial)?", name) for name in there)
        return sorted({match[1] for match in found if match})

    def try_one(self, out, kind, at, keeps, **more):
        """Meet one fault. keeps: checkpoints are never removed."""
        outcome = faults.call(lambda: self.run(out, **more), kind, at, lambda: self.checkpoints(out))
        ended(outcome, kind)
        if outcome.seen is not None and os.path.isdir(out):
            resume.sweep(str(out))
            after = self.checkpoints(out)
            if keeps or kind == "kill":
                assert set(outcome.seen) <= set(after), (outcome, after)
            assert not outcome.seen or max(outcome.seen) in after or len(after) > 1, (outcome, after)
        for path in resume.found(out):
            state, tensors = resume.load(path)
            assert path.endswith(f"checkpoint-{state['global_step']}")
            equal(tensors, self.states[str(self.whole / os.path.basename(path))])
            adapter.load(path, open_model(self.path / "base")) if "full" not in self.how else weights(path)
        assert self.run(out, resume_from_checkpoint="latest").step == 3
        equal(weights(out), self.wanted)
        assert [row["step"] for row in metrics.read(out)] == [1, 2, 3]
        assert not left_behind(out, out / "cache"), at
        shutil.rmtree(out)
        return outcome


@pytest.mark.parametrize("kind", faults.KINDS)
@pytest.mark.parametrize("how", [dict(save_total_limit=2), dict(full=True)], ids=["lora", "full"])
def test_train(tmp_path, kind, how):
    runs = Trained(tmp_path, **how)
    clean = faults.call(lambda: runs.run(tmp_path / "n0"), kind, 0)
    assert clean.code == 0 and clean.count > 100, clean.text
    for at in faults.places(clean.count, SOME):
        runs.try_one(tmp_path / f"n{at}", kind, at, keeps="save_total_limit" not in how)


@pytest.mark.parametrize("kind", faults.KINDS)
def test_a_run_that_goes_back(tmp_path, kind):
    """It replaces the checkpoints 2 and 3, which are there at any time, or put back by the next run."""
    runs = Trained(tmp_path)
    back = dict(resume_from_checkpoint=str(tmp_path / "n0" / "checkpoint-1"))
    shutil.copytree(runs.whole, tmp_path / "n0", symlinks=True)
    clean = faults.call(lambda: runs.run(tmp_path / "n0", **back), kind, 0)
    assert clean.code == 0, clean.text
    for at in faults.places(clean.count, SOME):
        out = tmp_path / f"n{at}"
        shutil.copytree(runs.whole, out, symlinks=True)
        found = runs.try_one(out, kind, at, True, resume_from_checkpoint=str(out / "checkpoint-1"))
        assert found.seen == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


@pytest.mark.parametrize("kind", faults.KINDS)
@pytest.mark.parametrize("there", [False, True], ids=["new", "empty"])
def test_merge(tmp_path, kind, there):
    made, base = run(tmp_path, max_steps=1), tmp_path / "base"
    merge(base, made.output_dir, tmp_path / "whole")
    wanted, before = weights(tmp_path / "whole"), tiny.listing(base)

    def output(name):
        if there:
            (tmp_path / name).mkdir()
        return tmp_path / name

    first = output("m0")
    clean = faults.call(lambda: merge(base, made.output_dir, first), kind, 0)
    assert clean.code == 0, clean.text
    for at in faults.places(clean.count, SOME):
        out = output(f"m{at}")
        found = faults.call(lambda: merge(base, made.output_dir, out), kind, at)  # noqa: B023
        ended(found, kind)
        if there and found.code and not all(name.startswith(".") for name in os.listdir(out)):
            # It was killed while files moved in: no reader takes it for a model before config.json is there.
            assert kind == "kill"
            with pytest.raises(UserError, match="exists and is not an empty directory"):
                merge(base, made.output_dir, out)
            if not (out / "config.json").exists():
                shutil.rmtree(out)
        if not (out / "config.json").exists():
            merge(base, made.output_dir, out)
        equal(weights(out), wanted)
        assert not left_behind(tmp_path, out), at
        assert tiny.listing(base) == before
        shutil.rmtree(out)


def test_the_faults_happen(tmp_path):
    """Each kind does to a file what it says."""

    def write():
        with open(tmp_path / "a", "w") as file:
            file.write("abcd")
        os.rename(tmp_path / "a", tmp_path / "b")
        with open(tmp_path / "c", "w") as file:
            file.write("abcd")

    def files():
        found = {path.name: path.read_text() for path in tmp_path.iterdir()}
        for path in tmp_path.iterdir():
            path.unlink()
        return found

    clean = faults.call(write, "kill", 0)
    assert clean == (0, 5, "", None) and files() == {"b": "abcd", "c": "abcd"}
    for kind, at, code, left in (
        ("kill", 2, faults.KILLED, {"a": "ab"}),
        ("kill", 3, faults.KILLED, {"a": "abcd"}),
        ("fail", 4, faults.CRASHED, {"b": "abcd"}),
        ("fail", 5, faults.CRASHED, {"b": "abcd", "c": "ab"}),
        ("full", 3, faults.CRASHED, {"b": "abcd"}),
    ):
        found = faults.call(write, kind, at, lambda: sorted(os.listdir(tmp_path)))
        assert found.code == code and files() == left
        assert found.seen == (["a"] if at < 4 else ["b"] if at == 4 else ["b", "c"])
        assert ("No space left" in found.text) == (code == faults.CRASHED)
