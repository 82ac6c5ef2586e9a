"""Inputs that are made to harm are refused at once, in one line that prints."""

import json
import os
import struct
import subprocess
import sys
import time

import pytest
import tiny

from longlora.disk import open_file, read_json
from longlora.errors import LONGEST, UserError
from longlora.files.open_model import open_model
from longlora.files.safetensors import SafetensorsFile


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("plain text: caf\u00e9 \u65e5\u672c \U0001f642", "plain text: caf\u00e9 \u65e5\u672c \U0001f642"),
        ("two\nlines\r\nand\u2028three", "two lines and three"),
        ("red \x1b[31m bell \x07 back \x08 null \x00", r"red \x1b[31m bell \x07 back \x08 null \x00"),
        ("c1 \x9b31m del \x7f", r"c1 \x9b31m del \x7f"),
        ("order \u202e zero \u200b mark \ufeff", r"order \u202e zero \u200b mark \ufeff"),
        ("half \ud83d byte \udce9", r"half \ud83d byte \udce9"),
        ("tag \U000e0041", r"tag \U000e0041"),
    ],
)
def test_characters_that_do_not_print_are_escaped(text, wanted):
    """The escapes are those of Python's string literals."""
    assert str(UserError(text)) == wanted
    assert str(UserError(text)).isprintable() and str(UserError(text)).encode()


def test_a_long_message_keeps_its_ends():
    text = str(UserError("begin " + "x" * 10**6 + " end"))
    assert len(text) < LONGEST + 10 and " ... " in text
    assert text.startswith("begin x") and text.endswith("x end")
    assert str(UserError("y" * LONGEST)) == "y" * LONGEST


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
)
@pytest.mark.parametrize("kind", ["pipe", "device", "directory", "socket"])
def test_pipes_devices_and_folders_in_place_of_files_are_refused(tmp_path, name, kind, monkeypatch):
    """Reading a pipe without a writer would wait, and reading /dev/zero would never end."""
    import socket

    base = tiny.model(tmp_path / "m")
    (base / name).unlink()
    monkeypatch.chdir(base)  # the name of a socket is at most 108 bytes long
    {
        "pipe": os.mkfifo,
        "device": lambda name: os.symlink("/dev/zero", name),
        "directory": os.mkdir,
        "socket": lambda name: socket.socket(socket.AF_UNIX).bind(name),
    }[kind](name)
    with pytest.raises(UserError) as caught:
        open_model(base).tokenizer()
    assert name in str(caught.value)
    if kind != "socket":  # no process can open a socket like a file
        assert f"is a {kind}" in str(caught.value) or "is a pipe, a socket or a device" in str(caught.value)


def test_a_pipe_in_place_of_a_gguf_is_refused(tmp_path):
    os.mkfifo(tmp_path / "m.gguf")
    with pytest.raises(UserError, match="m.gguf: is a pipe, a socket or a device; wanted a file"):
        open_model(tmp_path / "m.gguf")


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 5000])
def test_names_that_no_file_can_have_are_refused(tmp_path, name):
    with pytest.raises(UserError):
        open_file(tmp_path / name)


def test_a_message_shows_a_file_name_that_is_not_utf_8(tmp_path):
    """The name is caf\u00e9 in Latin-1. The message shows the byte and can be printed."""
    path = os.path.join(os.fsencode(tmp_path), b"caf\xe9.json")
    with open(path, "wb") as file:
        file.write(b"[]")
    with pytest.raises(UserError, match=r"caf\\udce9.json: should hold a JSON object, got list"):
        read_json(os.fsdecode(path))
    command = [sys.executable, "-m", "longlora", "inspect", path]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "LC_ALL": "C.UTF-8"})
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and b"caf\\udce9" in done.stderr


def header(path, text, data=b""):
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(shape, size):
    return {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}


@pytest.mark.parametrize(
    "text, message",
    [
        (json.dumps({"a": entry([(1 << 63) - 1] * 170_000, 0)}), "needs more than 2\\^63 bytes"),
        (json.dumps({"a": entry([2] * 500_000, 0)}), "needs more than 2\\^63 bytes"),
        (json.dumps({"a": entry([int("9" * 4000)] * 400, 0)}), "should be a list of integers from 0"),
        ('{"a": {"shape": [' + "9" * 1_700_000 + "]}}", "the header is not JSON"),
        ('{"__metadata__": [' + "1," * 500_000 + "1]}", "__metadata__ should be a JSON object"),
        ("{" + ", ".join(f'"{i}": 1' for i in range(100_000)) + ', "99999": 1}', "names '99999' twice"),
        ('{"a":' * 100_000, "the header is not JSON: it is nested too deeply"),
    ],
    ids=["large sizes", "many sizes", "large numbers", "one number", "metadata", "twice", "deep"],
)
def test_a_huge_header_is_refused_at_once(tmp_path, text, message):
    """Each header has one to four megabytes and takes at most 0.3 s. The limit allows for machines that are
    a hundred times slower. Multiplying all sizes of the first header would take 180 s."""
    path = header(tmp_path / "x.safetensors", text.encode())
    before = time.process_time()
    with pytest.raises(UserError, match=message) as caught:
        SafetensorsFile(path)
    assert time.process_time() - before < 30 and len(str(caught.value)) < LONGEST + 10


@pytest.mark.parametrize("shape", [[], [0], [0, 7], [3, 0, 1 << 20]])
def test_sizes_that_an_array_can_have_are_read(tmp_path, shape):
    from safetensors.numpy import load_file

    size = 0 if 0 in shape else 4
    path = header(tmp_path / "x.safetensors", json.dumps({"a": entry(shape, size)}).encode(), bytes(size))
    assert SafetensorsFile(path).array("a").shape == load_file(path)["a"].shape == tuple(shape)


@pytest.mark.parametrize("shape", [[0, 1 << 62], [1] * 1000], ids=["large", "axes"])
def test_sizes_that_no_array_can_have_are_refused(tmp_path, shape):
    size = 0 if 0 in shape else 4
    path = header(tmp_path / "x.safetensors", json.dumps({"a": entry(shape, size)}).encode(), bytes(size))
    with pytest.raises(UserError, match="x.safetensors: a: shape "):
        SafetensorsFile(path).array("a")
