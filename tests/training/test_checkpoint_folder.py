"""The checkpoints in the directory of a run: which are found, kept, removed or refused."""

import json
import os

import pytest
import tiny
from runs import checkpoint_state as state
from runs import save_checkpoint as save

from longlora import disk
from longlora.errors import UserError
from longlora.training import resume


def names(path):
    return [os.path.basename(found) for found in resume.found(str(path))]


# ---- what is found -------------------------------------------------------------------------------


def test_checkpoints_are_found_by_number(tmp_path):
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-0", "checkpoint-3.partial", "checkpoint-"):
        (tmp_path / name).mkdir()
    for name in ("checkpoint-4b", "xcheckpoint-5", "checkpoint"):
        (tmp_path / name).mkdir()
    assert resume.found(str(tmp_path)) == [str(tmp_path / f"checkpoint-{step}") for step in (0, 9, 10)]
    assert resume.path_of(str(tmp_path), 9) == str(tmp_path / "checkpoint-9")
    (tmp_path / "file").write_text("x")
    assert resume.found(str(tmp_path / "none")) == resume.found(str(tmp_path / "file")) == []


def test_the_latest_is_the_one_that_was_written_last(tmp_path):
    """The time in the state counts, or else the time of the file. An unreadable checkpoint is the oldest."""
    assert resume.resolve("latest", str(tmp_path)) is None
    for step, written in ((1, 70.5), (2, 90), (3, 80.0)):
        save(tmp_path, step, written=written)
    assert resume.resolve("latest", str(tmp_path)) == str(tmp_path / "checkpoint-2")
    for step, written, seconds in ((4, None, 85), (5, "1e9", 75)):
        save(tmp_path, step, written=written)
        os.utime(tmp_path / f"checkpoint-{step}" / "trainer_state.json", (seconds, seconds))
    (tmp_path / "checkpoint-6").mkdir()
    found = [os.path.basename(path) for path in resume.by_age(str(tmp_path))]
    assert found == [f"checkpoint-{step}" for step in (6, 1, 5, 3, 4, 2)]


# ---- where a run may write -----------------------------------------------------------------------

MODEL = ["adapter_config.json", "config.json", "adapter_model.safetensors", "model.safetensors"]
MODEL += ["model.safetensors.index.json", "longlora_base", "tokenizer.json", "README.md"]


def refusal(output_dir, resumes=None):
    """The error for a directory, or None."""
    try:
        resume.refuse_taken(str(output_dir), resumes)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", [*MODEL, "metrics.jsonl", "options.yaml"])
def test_a_run_or_a_model_is_not_overwritten(tmp_path, name):
    (tmp_path / name).symlink_to("nowhere")
    words = (
        f"{tmp_path}: holds another run or a model ({name}); resume it (resume_from_checkpoint latest) or "
    )
    words += "choose another output_dir"
    assert refusal(tmp_path) == words
    latest = f"{tmp_path}: holds {name} and no checkpoint; choose another output_dir"
    assert refusal(tmp_path, "latest") == (latest if name in MODEL else None)
    assert refusal(tmp_path, str(tmp_path / "checkpoint-1")) is None  # load reports that it is no checkpoint
    other = tmp_path / "other" / "checkpoint-1"
    other.mkdir(parents=True)
    assert refusal(tmp_path, str(other)) is None
    (other / "trainer_state.json").write_text("{}")
    assert refusal(tmp_path, str(other)) == f"{words}; {other} belongs to another output_dir"


def test_only_a_resumed_run_may_use_a_directory_with_checkpoints(tmp_path):
    out = tmp_path / "out"
    save(out, 3)
    (out / "config.json").write_text("{}")
    assert "holds another run or a model (config.json)" in refusal(out)
    assert refusal(out, "latest") is None and refusal(out, str(out / "checkpoint-3")) is None
    (tmp_path / "link").symlink_to(out)
    assert refusal(out, str(tmp_path / "link" / "checkpoint-3")) is None
    (out / "config.json").unlink()
    assert "holds another run or a model (checkpoint-3)" in refusal(out)


def test_a_directory_without_results_is_accepted(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("x")
    (tmp_path / "file").write_text("x")
    for resumes in (None, "latest"):
        assert refusal(tmp_path / "out", resumes) is None and refusal(tmp_path / "none", resumes) is None
        assert refusal(tmp_path / "file", resumes) == f"{tmp_path / 'file'}: is not a directory"


# ---- what stays ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "limit, kept, stay",
    [
        (None, None, [1, 2, 3, 4]),
        (1, None, [4]),
        (3, None, [2, 3, 4]),
        (4, None, [1, 2, 3, 4]),
        (9, None, [1, 2, 3, 4]),
        (1, "checkpoint-1", [1, 4]),
        (2, "checkpoint-1", [1, 4]),
        (3, "checkpoint-1", [1, 3, 4]),
        (2, "checkpoint-4", [3, 4]),
        (2, "../out/checkpoint-2", [2, 4]),
        (2, "../else/checkpoint-2", [3, 4]),
    ],
)
def test_the_newest_checkpoints_and_the_protected_one_stay(tmp_path, limit, kept, stay):
    out = tmp_path / "out"
    for step in (1, 2, 3):
        save(out, step)
    path = save(out, 4, limit, kept and str(out / kept))
    assert path == str(out / "checkpoint-4") and names(out) == [f"checkpoint-{step}" for step in stay]
    assert len(os.listdir(out)) == len(stay)


def test_the_oldest_by_time_is_removed_whatever_its_number(tmp_path):
    for step, written in ((5, 1.0), (9, 2.0), (6, 3.0)):
        save(tmp_path, step, written=written)
    save(tmp_path, 7, 3, written=4.0)
    assert names(tmp_path) == ["checkpoint-6", "checkpoint-7", "checkpoint-9"]


def test_keep_only_removes_the_others_if_its_checkpoint_exists(tmp_path):
    out = tmp_path / "out"
    for step in (1, 2, 3):
        save(out, step)
    resume.keep_only(str(out), str(tmp_path / "else" / "checkpoint-2"))
    assert names(out) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    resume.keep_only(str(out), str(out / ".." / "out" / "checkpoint-2"))
    assert os.listdir(out) == ["checkpoint-2"]


# ---- unfinished writes ---------------------------------------------------------------------------


def test_a_checkpoint_is_written_into_an_empty_directory(tmp_path):
    for name in ("checkpoint-2.partial", "checkpoint-1.old.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "left").write_text("x")
    there = []
    save(tmp_path, 1)
    save(tmp_path, 2, 1, write_model=lambda directory: there.extend(os.scandir(directory)))
    assert not there and os.listdir(tmp_path) == ["checkpoint-2"]
    assert sorted(os.listdir(tmp_path / "checkpoint-2")) == ["optimizer.safetensors", "trainer_state.json"]


def test_a_checkpoint_of_the_same_step_replaces_the_old_one(tmp_path):
    save(tmp_path, 1, data="old")
    save(tmp_path, 1, data="new")
    assert os.listdir(tmp_path) == ["checkpoint-1"]
    assert resume.load(str(tmp_path / "checkpoint-1"))[0]["data"] == "new"


@pytest.mark.parametrize(
    "error, words", [(OSError(5, "Input/output error"), "Input/output error"), (OSError("odd"), "odd")]
)
def test_a_failed_write_names_the_checkpoint_and_changes_nothing(tmp_path, error, words):
    save(tmp_path, 1)
    before = tiny.listing(tmp_path)

    def fail(directory):
        raise error

    words = f"^{tmp_path / 'checkpoint-1'}: cannot be written: {words}; older checkpoints are untouched$"
    with pytest.raises(UserError, match=words):
        save(tmp_path, 1, 1, write_model=fail)
    assert tiny.listing(tmp_path) == before and os.listdir(tmp_path) == ["checkpoint-1"]


def test_a_sweep_removes_or_restores_what_a_killed_run_left_and_nothing_else(tmp_path):
    """A replaced checkpoint is removed if the new one exists, and restored if not."""
    left = {
        "checkpoint-1": "stays",
        "checkpoint-2": "stays",
        "checkpoint-2.replaced.partial": "old",
        "checkpoint-3.replaced.partial": "comes back",
        "checkpoint-4.partial": "half",
        "checkpoint-5.old.partial": "old",
        "checkpoint-6.replaced.partial.old.partial": "old",
        "my-checkpoint-7.partial": "mine",
    }
    files = (".metrics.jsonl.abc_d3fg.partial", "my.partial", "metrics.jsonl")
    for name in files:
        (tmp_path / name).write_text("x")
    for name, text in left.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(text)
    resume.sweep(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        "metrics.jsonl",
        "my.partial",
    ]
    found = {path.parent.name: path.read_text() for path in tmp_path.glob("*/file")}
    wanted = {"checkpoint-1": "stays", "checkpoint-2": "stays", "checkpoint-3": "comes back"}
    assert found == wanted | {"my-checkpoint-7.partial": "mine"}


@pytest.mark.parametrize("again", [False, True], ids=["removed", "replaced"])
def test_a_sweep_finishes_an_interrupted_removal(tmp_path, monkeypatch, again):
    save(tmp_path, 1)
    save(tmp_path, 2)
    with monkeypatch.context() as killed:
        killed.setattr(disk, "remove", lambda path: None)
        if again:
            save(tmp_path, 1)
        else:
            resume.keep_only(str(tmp_path), str(tmp_path / "checkpoint-2"))
    assert len(os.listdir(tmp_path)) == 2 + again
    resume.sweep(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-1", "checkpoint-2"][1 - again :]


# ---- what is read --------------------------------------------------------------------------------

KINDS = dict(global_step="int", position="int", options="dict", log_history="list", data="str", base="str")


def load_error(tmp_path, change):
    """The error of load, without the path, after `change` has edited the state."""
    path = save(tmp_path, 1)
    found = state(1)
    change(found)
    (tmp_path / "checkpoint-1" / "trainer_state.json").write_text(json.dumps(found))
    with pytest.raises(UserError) as caught:
        resume.load(path)
    where = f"{path}/trainer_state.json: "
    assert str(caught.value).startswith(where)
    return str(caught.value).removeprefix(where)


@pytest.mark.parametrize("name, kind", KINDS.items())
def test_every_field_of_a_state_is_required_and_has_a_type(tmp_path, name, kind):
    assert load_error(tmp_path, lambda found: found.pop(name)) == f"lacks {name}"
    wrong = 1.5 if kind != "int" else True
    words = f"{name} should be a {kind}, got {wrong!r}"
    assert load_error(tmp_path, lambda found: found.update({name: wrong})) == words


def test_missing_fields_are_named_in_order_and_rows_are_objects(tmp_path):
    assert load_error(tmp_path, lambda found: [found.pop(n) for n in ("position", "base")]) == (
        "lacks base, position"
    )
    rows = "log_history should be a list of objects"
    assert load_error(tmp_path, lambda found: found.update(log_history=[{"step": 1}, 2])) == rows
