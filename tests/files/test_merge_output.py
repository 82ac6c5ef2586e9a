"""merge writes to a new directory, or to an empty one, which stays the same directory."""

import os

import pytest
import tiny
from adapter_small import written

from longlora import disk
from longlora.errors import UserError
from longlora.files.merge import merge
from longlora.files.open_model import open_model


@pytest.fixture
def adapter(tmp_path):
    tiny.model(tmp_path / "base")
    return written(tmp_path / "out")


@pytest.mark.parametrize("kind", ["empty", "link", "here"])
def test_an_empty_directory_stays_the_same_directory(tmp_path, adapter, monkeypatch, kind):
    """It may be a mount, the end of a link, or where the shell is."""
    there, base = tmp_path / "there", tmp_path / "base"
    there.mkdir()
    (tmp_path / "link").symlink_to(there)
    before = os.stat(there).st_ino
    monkeypatch.chdir(there)
    merge(base, adapter, {"empty": there, "link": tmp_path / "link", "here": "."}[kind])
    assert os.stat(there).st_ino == before
    assert set(os.listdir(there)) == {"README.md", "config.json", "model.safetensors"} | {
        name for name in os.listdir(there) if "token" in name
    }
    assert open_model(there).names() == open_model(base).names()


def test_the_parent_of_an_empty_directory_may_be_read_only(tmp_path, adapter):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    parent = tmp_path / "parent"
    (parent / "out").mkdir(parents=True)
    parent.chmod(0o555)
    merge(tmp_path / "base", adapter, parent / "out")
    assert (parent / "out" / "config.json").exists()
    with pytest.raises(UserError, match="new: cannot be written: Permission denied"):
        merge(tmp_path / "base", adapter, parent / "new")


def test_the_next_merge_removes_what_a_killed_one_left(tmp_path, adapter):
    left = tmp_path / ".merged.abcdefgh.partial"
    left.mkdir()
    (left / "model.safetensors").write_text("x")
    (tmp_path / ".mine.partial").mkdir()
    merge(tmp_path / "base", adapter, tmp_path / "merged")
    assert not left.exists() and (tmp_path / ".mine.partial").exists()


def test_a_link_may_lead_to_a_directory_that_does_not_exist_yet(tmp_path, adapter):
    (tmp_path / "link").symlink_to(tmp_path / "there")
    merge(tmp_path / "base", adapter, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there" / "config.json").exists()


def test_a_fresh_disk_counts_as_empty(tmp_path, adapter):
    """ext4 puts lost+found into it."""
    (tmp_path / "disk" / "lost+found").mkdir(parents=True)
    merge(tmp_path / "base", adapter, tmp_path / "disk")
    assert (tmp_path / "disk" / "config.json").exists()


def test_the_next_merge_clears_an_existing_directory_of_a_killed_one(tmp_path, adapter):
    left = tmp_path / "there" / ".there.01234567.partial"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_text("x")
    merge(tmp_path / "base", adapter, tmp_path / "there")
    assert not left.exists() and (tmp_path / "there" / "config.json").exists()


def test_a_move_that_fails_leaves_the_directory_empty(tmp_path, adapter, monkeypatch):
    real = os.rename

    def rename(a, b):
        if str(b).endswith("tokenizer.json") and ".partial" not in str(b):
            raise OSError(5, "Input/output error")
        real(a, b)

    (tmp_path / "there").mkdir()
    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(UserError, match="there: cannot be written: Input/output error"):
        merge(tmp_path / "base", adapter, tmp_path / "there")
    assert os.listdir(tmp_path / "there") == []


# Bytes of the float32 weights of tiny.model: embedding, 2 layers of attention, MLP and norms, last norm.
BYTES = 4 * (260 * 32 + 2 * ((32 + 16 + 16 + 32) * 32 + 3 * 48 * 32 + 2 * 32) + 32)


@pytest.mark.parametrize("dtype, size", [("f32", BYTES), ("bf16", BYTES // 2), ("f16", BYTES // 2)])
def test_a_disk_without_room_is_found_before_anything_is_written(tmp_path, monkeypatch, dtype, size):
    base, asked = tiny.model(tmp_path / "base"), []

    def free(folder):
        asked.append(folder)
        return size - 1

    monkeypatch.setattr(disk, "free", free)
    said = f"out: needs {size:,} bytes, the disk has {size - 1:,} free$"
    with pytest.raises(UserError, match=said):
        merge(base, None, tmp_path / "out", dtype=dtype)
    assert asked == [str(tmp_path)] and os.listdir(tmp_path) == ["base"]
    for enough in (size, None):
        monkeypatch.setattr(disk, "free", lambda folder, enough=enough: enough)
        found = open_model(merge(base, None, tmp_path / str(enough), dtype=dtype))
        assert found.names() == open_model(base).names()


def test_parents_are_made_and_the_new_name_is_flushed_last(tmp_path, monkeypatch):
    base, out, seen = tiny.model(tmp_path / "base"), tmp_path / "a" / "b" / "out", []
    real = disk.flush_names
    monkeypatch.setattr(disk, "flush_names", lambda path: seen.append((path, out.exists())) or real(path))
    assert merge(base, None, out) == str(out)
    assert seen[-1] == (str(out.parent), True) and os.listdir(out.parent) == ["out"]


@pytest.mark.parametrize("kind", ["file", "full", "lost+found and more"])
def test_existing_files_are_not_overwritten(tmp_path, kind):
    base, out = tiny.model(tmp_path / "base"), tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    else:
        (out / ("lost+found" if kind != "full" else "x")).mkdir(parents=True)
        (out / "mine").write_text("mine")
    before = tiny.listing(tmp_path)
    with pytest.raises(UserError, match=f"^{out}: exists and is not an empty directory$"):
        merge(base, None, out)
    assert tiny.listing(tmp_path) == before and len(os.listdir(tmp_path)) == 2


def test_config_json_is_moved_last_into_an_existing_directory(tmp_path, monkeypatch):
    """Readers look for it first."""
    base, out, moved = tiny.model(tmp_path / "base"), tmp_path / "out", []
    out.mkdir()
    real = os.rename
    monkeypatch.setattr(os, "rename", lambda a, b: moved.append(os.path.relpath(b, out)) or real(a, b))
    merge(base, None, out)
    names = ["README.md", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json"]
    assert moved == names and sorted(os.listdir(out)) == sorted(names)


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError("odd"), KeyError("fault")])
def test_a_failed_merge_leaves_no_files(tmp_path, monkeypatch, there, error):
    """An OSError without a number has no strerror."""
    base, out = tiny.model(tmp_path / "base"), tmp_path / "out"
    if there:
        out.mkdir()
    before = tiny.listing(tmp_path)

    def rename(a, b):
        if os.path.basename(b) in ("out", "config.json") and os.path.dirname(b) in (str(out), str(tmp_path)):
            raise error
        real(a, b)

    real = os.rename
    monkeypatch.setattr(os, "rename", rename)
    said = f"^{out}: cannot be written: {error.strerror or error}$" if isinstance(error, OSError) else "fault"
    with pytest.raises(UserError if isinstance(error, OSError) else KeyError, match=said):
        merge(base, None, out)
    assert tiny.listing(tmp_path) == before and out.exists() is there
    assert set(os.listdir(tmp_path)) == {"base"} | ({"out"} if there else set())
