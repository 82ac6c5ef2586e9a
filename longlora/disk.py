"""Files on disk. What is read is a regular file.

A file is written under another name, flushed and renamed: none is half there.
"""

import contextlib
import fcntl
import json
import mmap
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from longlora.errors import UserError

Path = str | os.PathLike[str]
ASIDE = ".partial"  # ends the names of what is being written


def open_file(path: Path) -> BinaryIO:
    """Open the file `path` for reading bytes. UserError if that fails, or if it is no regular file.

    Opening a pipe could wait for ever, and a device may have no end.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        kind = os.fstat(handle).st_mode
        if stat.S_ISREG(kind):
            return os.fdopen(handle, "rb")
        os.close(handle)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:  # a null byte in the name
        raise UserError(f"{path}: {error}") from None
    if stat.S_ISDIR(kind):
        raise UserError(f"{path}: is a directory; wanted a file")
    raise UserError(f"{path}: is a pipe, a socket or a device; wanted a file")


def read_bytes(path: Path) -> bytes:
    """Read the file `path`. UserError if that fails."""
    with open_file(path) as file:
        try:
            return file.read()
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or error}") from None


def map_file(path: Path, kind: str) -> mmap.mmap:
    """Map the file `path` for reading. kind: what it should be, for messages. UserError if that fails."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            raise UserError(f"{path}: truncated: {size} bytes are not {kind}")
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in the file `path`. UserError names the file if there is none."""
    return parse_json(read_bytes(path), path)


def parse_json(text: bytes, path: Path) -> dict[str, Any]:
    """Give the JSON object `text`, the content of the file `path`. UserError names the file if it is none."""
    try:
        found = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: should hold a JSON object, got {type(found).__name__}")
    return found


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[str]:
    """Give a temporary path beside `path` to write to. On success flush and rename it, on failure remove it.

    The old file at `path` stays untouched until the rename. An OSError (a full disk) becomes a UserError.
    """
    path = os.path.abspath(path)
    aside = None
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        handle, aside = tempfile.mkstemp(
            prefix=f".{os.path.basename(path)}.", suffix=ASIDE, dir=os.path.dirname(path)
        )
        with closing(handle):
            os.fchmod(handle, 0o666 & ~umask())
            lock(handle)  # `sweep` leaves it alone while it is written
            yield aside
            flush(aside)
            os.replace(aside, path)
            aside = None
        flush(os.path.dirname(path))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written: {error.strerror or error}; what was there is untouched"
        ) from None
    finally:
        if aside is not None:
            with contextlib.suppress(OSError):
                os.unlink(aside)


@contextlib.contextmanager
def closing(handle: int) -> Iterator[int]:
    """Close the file descriptor at the end."""
    try:
        yield handle
    finally:
        os.close(handle)


def umask() -> int:
    """The mode bits that the user does not want on new files."""
    with contextlib.suppress(OSError, StopIteration), open("/proc/self/status", encoding="ascii") as file:
        return int(next(line for line in file if line.startswith("Umask:")).split()[1], 8)
    return 0o022  # to ask otherwise means to change it for all threads


def lock(handle: int) -> bool:
    """Lock an open file or directory until it is closed or the process dies -> whether nobody else holds it.

    True also where the file system has no locks.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def sweep(directory: Path, pattern: str = r"\..+\.[a-z0-9_]{8}\.partial") -> None:
    """Remove what killed processes left half written in `directory`: names of this pattern.

    The default is what `replacing` and merge name their files. What a process is writing now is locked, and
    stays.
    """
    for name in os.listdir(directory):
        path = os.path.join(directory, name)
        if not re.fullmatch(pattern, name) or os.path.islink(path):
            continue
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDONLY)
            with closing(handle):
                if not lock(handle):
                    continue
                if os.path.isdir(path):
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    os.unlink(path)


def flush(path: Path) -> None:
    """fsync the file or directory at `path`."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path`. UserError if that fails; the old file is then untouched."""
    with replacing(path) as aside, open(aside, "wb") as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in UTF-8, as `write_bytes` does."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any, sort_keys: bool = False) -> None:
    """Write `value` to `path` as `json_text` gives it, as `write_text` does."""
    write_text(path, json_text(value, sort_keys))


def json_text(value: Any, sort_keys: bool = False) -> str:
    """Give `value` as indented JSON with a final newline.

    Lone surrogates, which UTF-8 cannot hold, are escaped: file names and foreign JSON may have them.
    """
    text = json.dumps(value, indent=2, sort_keys=sort_keys, ensure_ascii=False) + "\n"
    return re.sub("[\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)


def make_directory(path: Path) -> None:
    """Make the directory `path` and its parents unless they exist. UserError if that fails."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be made: {error.strerror or error}") from None
