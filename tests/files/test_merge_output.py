"""merge writes to a new directory, or to an empty one, which stays the same directory."""

import os

import pytest
import tiny

from longlora.errors import UserError
from longlora.files.merge import merge
from longlora.files.open_model import open_model
from longlora.training import driver


@pytest.fixture
def adapter(tmp_path):
    driver.train(lambda line: None, **tiny.options(tmp_path, max_steps=1))
    return tmp_path / "out"


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
