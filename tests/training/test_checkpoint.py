"""A checkpoint is whole or not there: whenever a run is killed, whatever fails while it is written."""

import os
import random
import subprocess
import sys

import numpy as np
import pytest
import tiny
from runs import checkpoint_state as state
from runs import save_checkpoint as save
from test_weights import disk_calls

from longlora.disk import write_text
from longlora.errors import UserError
from longlora.files import adapter
from longlora.files.open_model import open_model
from longlora.tools import inspect
from longlora.training import driver, resume


def test_saved_is_what_is_loaded_and_the_oldest_go_last(tmp_path):
    for step in (5, 10, 100):
        path = save(
            tmp_path,
            step,
            limit=2,
            write_model=lambda directory: write_text(os.path.join(directory, "model"), "x"),
        )
        found, tensors = resume.load(path)
        assert found == state(step) and tensors["m.x"].tolist() == [step] * 3
        assert sorted(os.listdir(path)) == ["model", "optimizer.safetensors", "trainer_state.json"]
    assert [os.path.basename(path) for path in resume.found(str(tmp_path))] == [
        "checkpoint-10",
        "checkpoint-100",
    ]
    assert resume.resolve("latest", str(tmp_path)).endswith("checkpoint-100")
    assert resume.resolve("some/where", str(tmp_path)) == "some/where"


def test_a_checkpoint_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Each file is flushed and renamed, then its directory is flushed, which gets its own name last."""
    calls = disk_calls(monkeypatch)
    path = save(tmp_path, 1, write_model=lambda directory: write_text(os.path.join(directory, "model"), "x"))
    files = ["model", "optimizer.safetensors", "trainer_state.json"]
    names = {os.stat(os.path.join(path, name)).st_ino: name for name in files}
    names |= {os.stat(path).st_ino: "checkpoint", os.stat(tmp_path).st_ino: "output_dir"}
    assert [(call, names[inode]) for call, inode, _ in calls] == [
        *(step for name in files for step in (("fsync", name), ("rename", name), ("fsync", "checkpoint"))),
        ("rename", "checkpoint"),
        ("fsync", "output_dir"),
    ]


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        UserError("x: cannot be written: disk full"),
        KeyboardInterrupt(),
    ],
)
def test_what_fails_in_the_middle_leaves_the_older_ones(tmp_path, error):
    save(tmp_path, 1, limit=1)
    before = tiny.listing(tmp_path)

    def fail(directory):
        write_text(os.path.join(directory, "model"), "half")
        raise error

    with pytest.raises((UserError, KeyboardInterrupt), match="cannot be written: |^$"):
        save(tmp_path, 2, limit=1, write_model=fail)
    assert tiny.listing(tmp_path) == before and os.listdir(tmp_path) == ["checkpoint-1"]


@pytest.mark.parametrize(
    "damage, words",
    [
        (
            lambda path: os.unlink(path / "optimizer.safetensors"),
            ": is not a checkpoint: it has no optimizer.safetensors$",
        ),
        (
            lambda path: os.unlink(path / "trainer_state.json"),
            ": is not a checkpoint: it has no trainer_state.json$",
        ),
        (
            lambda path: (path / "trainer_state.json").write_text('{"global_step": 1}'),
            "lacks base, data, log_history",
        ),
        (lambda path: (path / "trainer_state.json").write_text("{"), "not JSON"),
        (lambda path: (path / "optimizer.safetensors").write_bytes(b"x" * 30), "optimizer.safetensors"),
    ],
)
def test_a_damaged_checkpoint_is_named(tmp_path, damage, words):
    path = save(tmp_path, 1)
    damage(tmp_path / "checkpoint-1")
    with pytest.raises(UserError, match=words) as caught:
        resume.load(path)
    assert str(caught.value).startswith(path)


def test_a_checkpoint_is_an_adapter_of_its_own(tmp_path):
    driver.train(lambda line: None, **tiny.options(tmp_path, max_steps=1))
    path = tmp_path / "out" / "checkpoint-1"
    assert inspect.describe(path)["kind"] == "checkpoint" and inspect.describe(path)["step"] == 1
    lora, tensors, raw = adapter.load(path, open_model(tmp_path / "base"))
    assert lora.r == 8 and raw["max_position_embeddings"] == 128
    # the optimizer continues from what it holds
    for name, array in resume.load(path)[1].items():
        if name.startswith("value."):
            np.testing.assert_array_equal(array, tensors[name.removeprefix("value.")])


@pytest.mark.parametrize("full", [False, True])
def test_a_run_killed_at_any_moment_goes_on_from_its_newest_checkpoint(tmp_path, full):
    """kill -9 again and again at random moments; in the end the bits are those of a run that nobody
    touched."""
    steps, moments = 200, random.Random(7 + full)
    fields = tiny.options(
        tmp_path,
        max_steps=steps,
        save_steps=1,
        save_total_limit=2,
        full=full,
        resume_from_checkpoint="latest",
    )
    # The file system outlives the process, so nothing has to reach the disk. Most of the time would go there.
    script = "import os, sys; os.fsync = os.fstat; from longlora.cli import main; sys.exit(main())"
    flags = tiny.flags({k: v for k, v in fields.items() if v is not False})
    arguments = [sys.executable, "-c", script, "train", *flags]
    out, kills = tmp_path / "out", 0
    for _ in range(8):
        # The pipe holds 45 lines, one a step, and the process waits when it is full. So the run does not end
        # before it is killed three times, however late this process wakes up.
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, pipesize=4096)
        process = subprocess.Popen(arguments, **pipes)
        for line in process.stdout:  # wait until it is at work, then for a random while
            if line.startswith(b"step "):
                break
        try:
            process.wait(moments.uniform(0, 0.12))
        except subprocess.TimeoutExpired:
            process.kill()
            kills += 1
        _, errors = process.communicate()
        assert process.returncode in (0, -9), errors
        complete = resume.found(str(out))
        assert len(complete) <= 3
        for path in complete:
            found, tensors = resume.load(path)
            assert path.endswith(f"checkpoint-{found['global_step']}") and all(
                np.isfinite(t).all() for t in tensors.values()
            )
            assert inspect.describe(path)["step"] == found["global_step"]
        if process.returncode == 0:
            break
    assert kills >= 3
    if process.returncode:
        subprocess.run(arguments, check=True, capture_output=True)
    assert not [name for name in tiny.listing(out) if "partial" in name]
    changes = dict(output_dir=str(tmp_path / "whole"), resume_from_checkpoint=None, save_steps=steps)
    driver.train(lambda line: None, **{**fields, **changes})
    ours, theirs = (resume.load(str(path / f"checkpoint-{steps}")) for path in (out, tmp_path / "whole"))
    for name in theirs[1]:
        np.testing.assert_array_equal(ours[1][name], theirs[1][name], name)
    assert [row["loss"] for row in ours[0]["log_history"]] == [
        row["loss"] for row in theirs[0]["log_history"]
    ]
