"""What a run leaves on disk: it is checked before the first step, and later surprises lose nothing of it."""

import errno
import fcntl
import json
import os
import shutil
import signal

import numpy as np
import pytest
import tiny
from runs import equal, failure, run, weights
from systems import on_linux

from longlora import disk, plots
from longlora.errors import UserError
from longlora.files import adapter, base_folder, merge
from longlora.files.open_model import open_model
from longlora.files.tokenizer import Tokenizer
from longlora.training import metrics, resume, stop


def names(path):
    return [os.path.basename(found) for found in resume.found(path)]


# ---- checkpoints ---------------------------------------------------------------------------------


def test_latest_is_what_was_written_last(tmp_path):
    """A run that went back goes on with what it wrote since, whatever a copy did to the times of files."""
    out = tmp_path / "out"
    run(tmp_path, max_steps=6, save_steps=2)
    run(tmp_path, max_steps=3, resume_from_checkpoint=str(out / "checkpoint-2"))
    assert names(out) == ["checkpoint-2", "checkpoint-3", "checkpoint-4", "checkpoint-6"]
    for i, name in enumerate(("checkpoint-3", "checkpoint-2", "checkpoint-6", "checkpoint-4")):
        os.utime(out / name / resume.STATE, (i * 60, i * 60))
    assert resume.resolve("latest", str(out)).endswith("checkpoint-3")
    result = run(tmp_path, max_steps=5, resume_from_checkpoint="latest", save_total_limit=3)
    assert result.step == 5 and names(out) == ["checkpoint-3", "checkpoint-5", "checkpoint-6"]


@pytest.mark.parametrize("replaced", [False, True])
def test_a_run_killed_while_it_replaced_a_checkpoint(tmp_path, replaced):
    """Between two renames there is none under the name: the next run puts the old one back."""
    out = tmp_path / "out"
    run(tmp_path, max_steps=2, save_steps=1)
    os.rename(out / "checkpoint-2", out / "checkpoint-2.replaced.partial")
    if replaced:
        run(tmp_path, max_steps=2, resume_from_checkpoint=str(out / "checkpoint-1"))
    resume.sweep(str(out))
    assert names(out) == ["checkpoint-1", "checkpoint-2"]
    assert resume.load(str(out / "checkpoint-2"))[0]["global_step"] == 2
    assert not [name for name in os.listdir(out) if name.endswith(".partial")]


def test_a_checkpoint_that_cannot_be_put_in_place_leaves_the_one_it_replaces(tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(tmp_path, max_steps=2, save_steps=1)
    before = tiny.listing(out / "checkpoint-2")
    real = os.rename

    def rename(a, b):
        if str(a).endswith("checkpoint-2.partial"):
            raise OSError(errno.EIO, "Input/output error")
        real(a, b)

    monkeypatch.setattr(os, "rename", rename)
    message = failure(tmp_path, max_steps=2, resume_from_checkpoint=str(out / "checkpoint-1"))
    assert "checkpoint-2: cannot be written: Input/output error; older checkpoints are untouched" in message
    assert tiny.listing(out / "checkpoint-2") == before and names(out) == ["checkpoint-1", "checkpoint-2"]


def test_a_checkpoint_that_cannot_be_removed_ends_no_run(tmp_path, monkeypatch):
    real = os.rename

    def rename(a, b):
        if str(b).endswith(".old.partial"):
            raise OSError(errno.EBUSY, "Device or resource busy")
        real(a, b)

    monkeypatch.setattr(os, "rename", rename)
    assert run(tmp_path, max_steps=3, save_steps=1, save_total_limit=1).step == 3
    assert names(tmp_path / "out") == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


@on_linux
def test_metrics_are_on_disk_before_their_checkpoint(tmp_path, monkeypatch):
    events, flushed, renamed = [], os.fsync, os.rename

    def fsync(handle):
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        flushed(handle)

    def rename(a, b):
        events.append(os.path.basename(b))
        renamed(a, b)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    run(tmp_path, max_steps=2, save_steps=1)
    for step in (1, 2):
        before = events[: events.index(f"checkpoint-{step}")]
        assert before.count(metrics.FILE) == step


# ---- where a run may write -----------------------------------------------------------------------


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("options.yaml", "metrics.jsonl"):
        (tmp_path / "out" / name).write_text("")
    assert run(tmp_path, max_steps=1, resume_from_checkpoint="latest").step == 1


# ---- before the first step -----------------------------------------------------------------------


def test_a_copy_of_a_run_whose_links_were_followed(tmp_path):
    """Its last write would meet files that it does not know."""
    run(tmp_path, max_steps=1)
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    said, how = [], dict(output_dir=str(tmp_path / "copy"), resume_from_checkpoint="latest")
    assert f"{base_folder.FOLDER}/" in failure(tmp_path, said=said, **how)
    assert not [line for line in said if line.startswith("step ")]
    shutil.rmtree(tmp_path / "copy" / base_folder.FOLDER)
    assert run(tmp_path, **how).step == 4


def test_a_run_killed_while_it_wrote_the_folder_of_its_positions(tmp_path):
    run(tmp_path, max_steps=1)
    left = tmp_path / "out" / base_folder.FOLDER / ".config.json.01234567.partial"
    left.write_text("{")
    assert run(tmp_path, max_steps=2, resume_from_checkpoint="latest").step == 2
    assert not left.exists()


@pytest.mark.parametrize("full", [False, True])
def test_what_could_only_fail_at_saving_fails_before_the_first_step(tmp_path, monkeypatch, full):
    def save(self, directory, length=None):
        raise UserError("tokenizer.json: cannot be written: no")

    monkeypatch.setattr(Tokenizer, "save", save)
    said = []
    assert failure(tmp_path, full=full, said=said) == "tokenizer.json: cannot be written: no"
    assert not [line for line in said if line.startswith("step ")]
    assert not [name for name in os.listdir(tmp_path / "out") if name.endswith(".partial")]


def test_a_disk_without_room_for_a_checkpoint(tmp_path, monkeypatch):
    """Float32 value, m and v of 2 x (4 x 8 x 32 + 8 x (32 + 16 + 16 + 32)) numbers of LoRA, 260 x 32 of the
    embedding and 5 x 32 of the norms."""
    least = 12 * (3584 + 8320 + 160)
    monkeypatch.setattr(disk, "free", lambda folder: least - 1)
    assert "a checkpoint takes more than 0.1 MiB, its disk has 0.1 MiB free" in failure(tmp_path)
    monkeypatch.setattr(disk, "free", lambda folder: least)
    assert run(tmp_path, max_steps=1, resume_from_checkpoint="latest").step == 1


def test_half_characters_of_a_config_are_kept(tmp_path):
    tiny.model(tmp_path / "base", _name_or_path="x\ud800")
    run(tmp_path, max_steps=1)
    raw = json.loads((tmp_path / "out" / base_folder.FOLDER / "config.json").read_text())
    assert raw["_name_or_path"] == "x\ud800"


def test_names_that_are_not_unicode(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    tiny.options(tmp_path)
    os.rename(tmp_path / "text.txt", tmp_path / f"{name}.txt")
    os.rename(tmp_path / "base", tmp_path / name)
    out = str(tmp_path / f"{name}-out")
    run(tmp_path, max_steps=1, data=str(tmp_path / f"{name}.txt"), model=str(tmp_path / name), output_dir=out)
    assert adapter.load(out, open_model(tmp_path / name))[1]


# ---- later surprises -----------------------------------------------------------------------------


def test_a_base_that_changes_while_the_run_trains(tmp_path):
    """The weights are in memory: nothing of the base is read again, and it keeps its fingerprint."""
    tiny.options(tmp_path)
    wanted = open_model(tmp_path / "base").fingerprint()

    class Say(list):
        def append(self, line):
            if line.startswith("step 1/"):
                os.truncate(tmp_path / "base" / "model.safetensors", 10)
                os.unlink(tmp_path / "base" / "tokenizer.json")

    run(tmp_path, Say(), save_steps=1)
    file = adapter.SafetensorsFile(tmp_path / "out" / adapter.WEIGHTS)
    assert file.metadata["longlora_base"] == wanted
    assert (tmp_path / "out" / "tokenizer.json").read_text() == tiny.tokenizer_json()


def test_a_picture_that_fails_ends_no_run(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no fonts")

    monkeypatch.setattr(plots, "loss", fail)
    said = []
    run(tmp_path, said, max_steps=1)
    assert "loss.png could not be drawn: no fonts" in said and said[-1].startswith("saved ")
    assert (tmp_path / "out" / adapter.WEIGHTS).exists()


@pytest.mark.parametrize("full, name", [(False, "model.safetensors"), (True, "model.safetensors.index.json")])
def test_an_old_file_that_cannot_be_removed_at_the_end(tmp_path, monkeypatch, full, name):
    """A run that goes on replaces the links of the positions' folder, and a whole model has no old index."""
    run(tmp_path, max_steps=1, full=full)
    if full:
        (tmp_path / "out" / name).write_text("{}")
    real = os.unlink

    def unlink(path, *rest, **how):
        if os.path.basename(path) == name and os.path.dirname(path).endswith(("out", base_folder.FOLDER)):
            raise OSError(errno.EIO, "Input/output error")
        real(path, *rest, **how)

    monkeypatch.setattr(os, "unlink", unlink)
    message = failure(tmp_path, max_steps=2, full=full, resume_from_checkpoint="latest")
    last = tmp_path / "out" / "checkpoint-2"
    assert f"{name}: cannot be removed: Input/output error; the last checkpoint is {last}" in message


def test_a_model_that_cannot_be_written_at_the_end_names_the_checkpoint(tmp_path, monkeypatch):
    real = adapter.save

    def save(directory, values, *rest):
        if values is not None and os.path.basename(directory) == "out":
            raise UserError("adapter: cannot be written")
        real(directory, values, *rest)

    monkeypatch.setattr(adapter, "save", save)
    last = tmp_path / "out" / "checkpoint-2"
    assert failure(tmp_path, max_steps=2) == f"adapter: cannot be written; the last checkpoint is {last}"
    monkeypatch.setattr(adapter, "save", real)
    assert run(tmp_path, max_steps=2, resume_from_checkpoint="latest").step == 2
    equal(weights(tmp_path / "out"), weights(last))


def test_an_evaluation_that_fails_after_a_step(tmp_path):
    """The step is saved, and the run goes on to the bits of one that met no error."""
    held = tmp_path / "held.bin"
    np.random.default_rng(0).integers(0, 250, 4000).astype("<u2").tofile(held)
    whole, fields = held.read_bytes(), dict(max_steps=4, eval_data=str(held), eval_steps=2)

    class Say(list):
        def append(self, line):
            if line.startswith("step 1/"):
                os.truncate(held, 100)

    message = failure(tmp_path, said=Say(), **fields)
    assert "held.bin: has been truncated" in message and "the state after step 2 is saved in" in message
    held.write_bytes(whole)
    rest = run(tmp_path, resume_from_checkpoint="latest", **fields)
    assert [row["step"] for row in rest.history] == [0, 1, 2, 3, 4]
    run(tmp_path, output_dir=str(tmp_path / "whole"), **fields)
    equal(weights(tmp_path / "out"), weights(tmp_path / "whole"))


def test_a_run_that_is_ended_at_once_says_what_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(stop, "TOGETHER", -1.0)
    said = []

    class Say(list):
        def append(self, line):
            said.append(line)
            if line.startswith("step 2/"):
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Say(), max_steps=4, save_steps=1)
    last = tmp_path / "out" / "checkpoint-1"
    assert said[-1] == f"ended at once after step 2; the last checkpoint is {last}"


def test_a_handler_that_python_cannot_restore_is_left_alone(monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    with stop.Stop() as found:
        assert not found._before


# ---- files aside ---------------------------------------------------------------------------------


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    """Nobody knows whether a file is being written: it stays. A run goes on without a lock."""

    def flock(handle, what):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    left = tmp_path / ".x.json.01234567.partial"
    left.write_text("x")
    monkeypatch.setattr(fcntl, "flock", flock)
    disk.sweep(tmp_path)
    assert left.exists()
    assert run(tmp_path, max_steps=1).step == 1


@on_linux
def test_a_file_that_is_swept_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    real, gone = disk.lock, []

    def lock(handle):
        if not gone:
            gone.append(os.readlink(f"/proc/self/fd/{handle}"))
            os.unlink(gone[0])
        return real(handle)

    monkeypatch.setattr(disk, "lock", lock)
    disk.write_text(tmp_path / "a", "x")
    assert gone and os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "x"


def test_a_cache_loses_only_what_is_ours(tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    for name in (".tokens-0123456789abcdef.bin.01234567.partial", ".mine.bin.01234567.partial"):
        (cache / name).write_text("x")
    run(tmp_path, max_steps=1)
    assert sorted(name for name in os.listdir(cache) if name.endswith(".partial")) == [
        ".mine.bin.01234567.partial"
    ]


def test_a_new_directory_has_the_mode_that_the_user_wants(tmp_path):
    made = run(tmp_path, max_steps=1)
    before = os.umask(0o027)
    try:
        merge.merge(tmp_path / "base", made.output_dir, tmp_path / "merged")
    finally:
        os.umask(before)
    assert (tmp_path / "merged").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "merged" / "config.json").stat().st_mode & 0o777 == 0o640
