"""The folder longlora_base of an adapter has a config.json and links to the other files of the base."""

import os
from pathlib import Path

import pytest

from longlora.errors import UserError
from longlora.files import base_folder

FOLDER = "longlora_base"


def base(path, *names):
    """Make a directory of files that contain their own names. Returns its path."""
    path.mkdir()
    for name in names:
        (path / name).write_text(name)
    return path


def content(path):
    """The files of a directory: name -> content."""
    return {entry.name: entry.read_text() for entry in path.iterdir()}


def test_the_fields_name_the_folder_and_the_base(tmp_path, monkeypatch):
    """Users have adapters with this key, and PEFT shows it in a warning."""
    monkeypatch.chdir(tmp_path)
    for given, named in ((Path("b"), "b"), ("org/model", "org/model"), (None, None)):
        assert base_folder.fields("adapter", given) == {
            "base_model_name_or_path": str(tmp_path / "adapter" / FOLDER),
            "needs_the_positions_in_its_folder_longlora_base": named,
        }


def test_the_config_in_the_folder_comes_before_that_of_the_adapter(tmp_path):
    assert base_folder.find(tmp_path) is None
    (tmp_path / FOLDER / "config.json").mkdir(parents=True)
    assert base_folder.find(tmp_path) is None
    (tmp_path / "config.json").write_text("{}")
    assert base_folder.find(tmp_path) == str(tmp_path)
    (tmp_path / FOLDER / "config.json").rmdir()
    (tmp_path / FOLDER / "config.json").write_text("{}")
    assert base_folder.find(tmp_path) == str(tmp_path / FOLDER)


def test_the_folder_links_to_the_files_of_the_base(tmp_path, monkeypatch):
    """Not to config.json and .gguf files, whose positions transformers would read, nor to hidden files."""
    names = ["config.json", "model.safetensors", "tokenizer.json", ".lock", "m.gguf"]
    (base(tmp_path / "base", *names) / "onnx").mkdir()
    monkeypatch.chdir(tmp_path)
    folder = base_folder.make("adapter", "base")
    assert folder == os.path.join("adapter", FOLDER)
    assert content(tmp_path / folder) == {name: name for name in ("model.safetensors", "tokenizer.json")}
    assert os.readlink(tmp_path / folder / "tokenizer.json") == str(tmp_path / "base" / "tokenizer.json")


def test_links_to_an_earlier_base_are_removed(tmp_path):
    """config.json stays until it is written again."""
    one = base(tmp_path / "one", "config.json", "a.safetensors", "tokenizer.json")
    other = base(tmp_path / "other", "config.json", "b.safetensors")
    folder = Path(base_folder.make(tmp_path / "adapter", one))
    (folder / "config.json").write_text("long")
    base_folder.make(tmp_path / "adapter", other)
    assert content(folder) == {"config.json": "long", "b.safetensors": "b.safetensors"}
    base_folder.make(tmp_path / "adapter", None)
    assert content(folder) == {"config.json": "long"}


@pytest.mark.parametrize("kind", ["none", "a .gguf file", "no config.json"])
def test_only_a_directory_with_a_config_gets_links(tmp_path, monkeypatch, kind):
    """The working directory is no base, though it has a config.json."""
    monkeypatch.chdir(base(tmp_path / "here", "config.json", "model.safetensors"))
    (tmp_path / "m.gguf").write_text("GGUF")
    given = {"none": None, "a .gguf file": tmp_path / "m.gguf", "no config.json": base(tmp_path / "x", "y")}
    assert content(Path(base_folder.make(tmp_path / "adapter", given[kind]))) == {}


def test_a_file_system_without_links_is_no_error(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "symlink", refuse)
    model = base(tmp_path / "base", "config.json", "model.safetensors")
    assert content(Path(base_folder.make(tmp_path / "adapter", model))) == {}


def test_a_file_of_the_user_in_the_folder_is_refused(tmp_path):
    """Links and config.json may be there. Partial files of killed processes are removed."""
    base_folder.check(tmp_path / "adapter")
    folder = base(tmp_path / "adapter", "other.bin") / FOLDER
    base_folder.check(tmp_path / "adapter")
    left = base(folder, "config.json", ".config.json.01234567.partial") / ".config.json.01234567.partial"
    (folder / "model.safetensors").symlink_to(tmp_path / "gone")
    base_folder.check(tmp_path / "adapter")
    assert not left.exists() and sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    (folder / "weights.bin").write_text("mine")
    for call in (base_folder.check, lambda path: base_folder.make(path, None)):
        with pytest.raises(UserError, match="longlora_base/weights.bin: is in the way"):
            call(tmp_path / "adapter")
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors", "weights.bin"]
