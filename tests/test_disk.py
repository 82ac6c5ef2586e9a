"""What is read is a regular file. What is written is there whole, or not at all."""

import errno
import fcntl
import os
import re
import socket
import stat
import threading

import pytest

from longlora import disk
from longlora.errors import UserError

FAILED = OSError(errno.EIO, "Input/output error")


def fails(*unused, **more):
    raise FAILED


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with one thing of each kind, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_bytes(b"0123456789")
    (tmp_path / "short").write_bytes(b"0123456")
    (tmp_path / "folder").mkdir()
    os.mkfifo("pipe")
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind("socket")
        yield tmp_path


# ---- reading -------------------------------------------------------------------------------------


def test_only_regular_files_are_read(here):
    for read in (disk.read_bytes, disk.read_once, lambda path: disk.map_file(path, "a thing")[:]):
        assert read("file") == read(here / "file") == b"0123456789"
        for path, words in (
            ("missing", "No such file or directory"),
            ("folder", "is a directory; wanted a file"),
            ("socket", ""),
            ("/dev/null", "wanted a file"),
            ("a\0b", "embedded null byte"),
        ):
            with pytest.raises(
                UserError, match=rf"^{re.escape(path.replace(chr(0), chr(92) + 'x00'))}: .*{words}"
            ):
                read(path)
    with pytest.raises(UserError, match="^pipe: is a pipe, a socket or a device; wanted a file$"):
        disk.read_bytes("pipe")
    with pytest.raises(UserError, match="^short: truncated: 7 bytes are not a thing$"):
        disk.map_file("short", "a thing")
    (here / "short").write_bytes(b"01234567")
    assert disk.map_file("short", "a thing")[:] == b"01234567"
    with disk.open_file("file") as file:
        assert not os.get_inheritable(file.fileno())


def test_a_pipe_is_read_to_its_end(here, monkeypatch):
    with pytest.raises(UserError, match="^pipe: is an empty pipe, and nobody writes to it$"):
        disk.read_once("pipe")
    (here / "short").write_bytes(b"")
    assert disk.read_once("short") == b""
    real = os.set_blocking
    for first in (b"", b"abc"):
        found, begun = [], threading.Event()
        monkeypatch.setattr(os, "set_blocking", lambda *given, begun=begun: begun.set() or real(*given))
        reader = os.open("pipe", os.O_RDONLY | os.O_NONBLOCK)
        writer = os.open("pipe", os.O_WRONLY)
        os.write(writer, first)
        thread = threading.Thread(target=lambda found=found: found.append(disk.read_once("pipe")))
        thread.start()
        assert begun.wait(60)  # it has read what was there
        os.write(writer, b"def")
        os.close(writer)
        thread.join()
        os.close(reader)
        assert found == [first + b"def"]


def test_a_read_that_fails(here, monkeypatch):
    class Bad:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        read = fails
        fileno = fails

    monkeypatch.setattr(disk, "_open", lambda *unused: Bad())
    for read in (disk.read_bytes, disk.read_once):
        with pytest.raises(UserError, match="^x: Input/output error$"):
            read("x")
    monkeypatch.undo()
    monkeypatch.setattr(disk.mmap, "mmap", fails)
    with pytest.raises(UserError, match=": Input/output error$"):
        disk.map_file(here / "file", "a thing")


def test_json_objects(here):
    (here / "file").write_text('{"a": "é"}', "utf-8")
    assert disk.read_json("file") == {"a": "é"}
    for text, words in (
        (b"{", "not JSON: "),
        (b'{"a": "\xe9"}', "not JSON: .*utf-8"),
        (b"[" * 100_000, "not JSON: it is nested too deeply"),
        (b"[]", "should hold a JSON object, got list"),
    ):
        with pytest.raises(UserError, match=f"^a.json: {words}"):
            disk.parse_json(text, "a.json")


# ---- writing -------------------------------------------------------------------------------------


def test_a_file_is_replaced_whole(here, monkeypatch):
    did = []
    for name in ("flush", "flush_names"):
        monkeypatch.setattr(disk, name, lambda path, name=name: did.append((name, os.path.basename(path))))
    real = os.replace
    monkeypatch.setattr(
        os, "replace", lambda a, b: did.append(("replace", os.path.basename(b))) or real(a, b)
    )
    os.makedirs("a/b")
    for path in ("a/b/x", here / "a" / "c" / "x"):
        did.clear()
        with disk.replacing(path) as aside:
            assert os.path.dirname(aside) == os.path.dirname(os.path.abspath(path))
            assert re.fullmatch(r"\.x\.[0-9a-f]{8}\.partial", os.path.basename(aside))
            (here / aside).write_text("new")
        last = os.path.basename(os.path.dirname(path))
        assert did == [("flush", os.path.basename(aside)), ("replace", "x"), ("flush_names", last)]
        assert os.listdir(os.path.dirname(path)) == ["x"] and open(path).read() == "new"
    for error in (FAILED, KeyError("mine")):
        with pytest.raises(UserError if error is FAILED else KeyError) as caught, disk.replacing("a/b/x"):
            raise error
        assert os.listdir("a/b") == ["x"] and open("a/b/x").read() == "new"
        if error is FAILED:
            assert str(caught.value) == (
                f"{here}/a/b/x: cannot be written: Input/output error; what was there is untouched"
            )
    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(UserError):
        disk.write_text("a/b/x", "newer")
    assert os.listdir("a/b") == ["x"] and open("a/b/x").read() == "new"
    with pytest.raises(UserError, match="file/x: cannot be written: "):
        disk.write_text("file/x", "")


def test_texts_and_json_on_disk(here):
    disk.write_text("x", "é")
    assert (here / "x").read_bytes() == b"\xc3\xa9"
    disk.write_json("x", {"b": 1, "a": ["é\ud800"]})
    assert (here / "x").read_bytes().decode() == '{\n  "b": 1,\n  "a": [\n    "é\\ud800"\n  ]\n}\n'
    disk.write_json("x", {"b": 1, "a": 2}, sort_keys=True)
    assert (here / "x").read_text() == '{\n  "a": 2,\n  "b": 1\n}\n'


def test_what_is_made_aside_is_locked_and_goes(here):
    handle, path = disk.make_aside("folder", "x")
    assert stat.S_ISREG(os.stat(path).st_mode) and os.path.samestat(os.fstat(handle), os.stat(path))
    disk.sweep("folder")
    assert os.path.exists(path)
    os.close(handle)
    other = f"folder/.y.{'0' * 8}.partial"
    for name in (other, "folder/.x.0000000.partial", f"folder/.x.{'0' * 8}.partial.bin", "folder/.partial"):
        (here / name).write_text("")
    os.makedirs(f"folder/.x.{'1' * 8}.partial/inner")
    os.symlink(here / "file", f"folder/.x.{'2' * 8}.partial")
    disk.sweep("folder", "x|z")
    assert sorted(os.listdir("folder")) == [
        ".partial",
        ".x.0000000.partial",
        f".x.{'0' * 8}.partial.bin",
        f".x.{'2' * 8}.partial",
        os.path.basename(other),
    ]
    disk.sweep("folder")
    assert not os.path.exists(other) and len(os.listdir("folder")) == 4
    with disk.passing("folder", "x") as path:
        assert os.path.isdir(path) and path.startswith("folder/.x.")
        (here / path / "inner").write_text("")
    assert len(os.listdir("folder")) == 4
    with (
        pytest.raises(UserError, match="^missing: cannot be written: No such file"),
        disk.passing("missing", "x"),
    ):
        pass


def test_locks(here, monkeypatch):
    with disk.closing(os.open("file", os.O_RDONLY)) as one, disk.closing(os.open("file", os.O_RDONLY)) as two:
        assert disk.lock(one) is True and disk.lock(two) is False
        monkeypatch.setattr(fcntl, "flock", fails)
        assert disk.lock(one) is None
        with disk.alone("a/b"):
            assert os.path.isdir("a/b")
        monkeypatch.undo()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(one)
    with disk.alone(here / "a"):
        with pytest.raises(UserError, match="a: another run is writing there now$"), disk.alone(here / "a"):
            pass
    with disk.alone(here / "a"):  # it is free again
        pass
    for path, words in ((here / "file", "File exists"), (f"{here}/\0", "embedded null byte")):
        with pytest.raises(UserError, match=f": cannot be made: {words}"), disk.alone(path):
            pass


def test_the_room_of_a_disk(here, monkeypatch):
    assert disk.free("missing") is None
    for blocks, wanted in ((10, 21), (0, None)):
        found = os.statvfs_result((5, 3, blocks, 8, 7, 0, 0, 0, 0, 255))  # f_bsize, f_frsize, f_blocks, ...
        monkeypatch.setattr(os, "statvfs", lambda path, found=found: found)
        assert disk.free("folder") == wanted


def test_removing(here, monkeypatch):
    (here / "folder" / "inner").mkdir()
    os.symlink("folder", "link")
    for name in ("link", "file", "missing", "folder"):
        disk.remove(name)
        assert not os.path.lexists(name)
        assert os.path.exists("folder/inner") or name == "folder"
    disk.unlink("short")
    with pytest.raises(UserError, match="^short: cannot be removed: No such file"):
        disk.unlink("short")
    disk.make_directory("a/b")
    disk.make_directory("a/b")
    with pytest.raises(UserError, match="^pipe: cannot be made: File exists$"):
        disk.make_directory("pipe")
    monkeypatch.setattr(os, "fsync", fails)
    disk.flush_names("a")  # some file systems cannot do it
    with pytest.raises(OSError):
        disk.flush("a")
