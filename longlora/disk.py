"""Files on disk. What is read is a regular file; only a text that is read once may be a pipe.

A file is written under another name, flushed and renamed: none is half there.
"""

import contextlib
import fcntl
import json
import mmap
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from longlora.errors import UserError, reason

Path = str | os.PathLike[str]
ASIDE = ".partial"  # ends the names of what is being written


def open_file(path: Path) -> BinaryIO:
    """Open the file `path` for reading bytes. UserError if that fails, or if it is not a regular file.

    A pipe can be read only once, and only while somebody writes to it. A device may have no end.
    """
    return _open(path, stat.S_ISREG, "is a pipe, a socket or a device; wanted a file")


def read_once(path: Path) -> bytes:
    """Read the file `path`, or a pipe such as `<(command)` of a shell. UserError if that fails.

    A pipe is read to its end. One that nobody writes to is refused: reading it could wait for ever.
    """
    other = "is a socket or a device; wanted a file or a pipe"
    with _open(path, lambda kind: stat.S_ISREG(kind) or stat.S_ISFIFO(kind), other) as file:
        try:
            start = file.read(1)  # None: there is a writer, but it has written nothing yet
            if start == b"" and stat.S_ISFIFO(os.fstat(file.fileno()).st_mode):
                raise UserError(f"{path}: is an empty pipe, and nobody writes to it")
            os.set_blocking(file.fileno(), True)
            return (start or b"") + file.read()
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or error}") from None


def _open(path: Path, wanted: Callable[[int], bool], other: str) -> BinaryIO:
    """Open `path`, without waiting, if `wanted` takes its mode; `other` is said of other kinds."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        kind = os.fstat(handle).st_mode
        if wanted(kind):
            return os.fdopen(handle, "rb")
        os.close(handle)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:  # a null byte in the name
        raise UserError(f"{path}: {error}") from None
    if stat.S_ISDIR(kind):
        raise UserError(f"{path}: is a directory; wanted a file")
    raise UserError(f"{path}: {other}")


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
        raise UserError(f"{path}: not JSON: {reason(error)}") from None
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
        handle, aside = make_aside(os.path.dirname(path), os.path.basename(path))
        with closing(handle):
            yield aside
            flush(aside)
            os.replace(aside, path)
            aside = None
        flush_names(os.path.dirname(path))
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


def make_aside(folder: Path, name: str, directory: bool = False) -> tuple[int, str]:
    """Make a file, or a directory, in `folder`, to be renamed to `name` -> its open handle, its path.

    It has the mode of any new file. `sweep` leaves it alone as long as the handle is open.
    """
    while True:
        aside = os.path.join(folder, f".{name}.{secrets.token_hex(4)}{ASIDE}")
        if directory:
            os.mkdir(aside)
        else:
            os.close(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
        with contextlib.suppress(FileNotFoundError):  # another process swept it before it was locked
            handle = os.open(aside, os.O_RDONLY)
            if lock(handle) is not False and os.path.exists(aside):
                return handle, aside
            os.close(handle)


@contextlib.contextmanager
def passing(folder: Path, name: str) -> Iterator[str]:
    """Give a directory in `folder` that is removed at the end. UserError if it cannot be made."""
    try:
        handle, aside = make_aside(folder, name, directory=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from None
    with closing(handle):
        try:
            yield aside
        finally:
            remove(aside)


def free(folder: Path) -> int | None:
    """The bytes that the disk of `folder` has free for this user; None if it does not say."""
    with contextlib.suppress(OSError):
        found = os.statvfs(folder)
        return found.f_bavail * found.f_frsize if found.f_blocks else None
    return None


def lock(handle: int) -> bool | None:
    """Lock an open file or directory until it is closed or the process dies.

    False if another holds it, None where the file system has no locks.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextlib.contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Create `directory` if need be and lock it; UserError if another run holds it.

    The lock belongs to the process, so a killed run leaves none.
    """
    try:
        os.makedirs(directory, exist_ok=True)
        handle = os.open(directory, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{directory}: cannot be made: {error.strerror}") from None
    except ValueError as error:  # a null byte in the name
        raise UserError(f"{directory}: cannot be made: {error}") from None
    with closing(handle):
        if lock(handle) is False:
            raise UserError(f"{directory}: another run is writing there now")
        yield


def sweep(directory: Path, name: str = ".+") -> None:
    """Remove what killed processes left in `directory` of what `make_aside` made for files of this name.

    name: a regular expression. What a process is writing now is locked, and stays. Where the file system has
    no locks everything stays.
    """
    for found in os.listdir(directory):
        path = os.path.join(directory, found)
        if not re.fullmatch(rf"\.({name})\.[0-9a-z_]{{8}}{re.escape(ASIDE)}", found) or os.path.islink(path):
            continue
        with contextlib.suppress(OSError), closing(os.open(path, os.O_RDONLY)) as handle:
            if lock(handle):
                remove(path)


def unlink(path: Path) -> None:
    """Remove the file or link `path`. UserError if that fails."""
    try:
        os.unlink(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be removed: {error.strerror or error}") from None


def remove(path: Path) -> None:
    """Remove a file or a directory as far as that is possible."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.unlink(path)


def flush(path: Path) -> None:
    """fsync the file at `path`."""
    with closing(os.open(path, os.O_RDONLY)) as handle:
        os.fsync(handle)


def flush_names(directory: Path) -> None:
    """fsync a directory, so that its names outlive a crash of the machine; some file systems cannot do it."""
    with contextlib.suppress(OSError):
        flush(directory)


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
