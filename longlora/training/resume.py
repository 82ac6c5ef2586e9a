"""Checkpoints: everything a run needs to continue as if it had never stopped, in one directory, checkpoint-N.

It holds the adapter (or, with `full`, the whole model), optimizer.safetensors (float32 masters and moments)
and trainer_state.json (step, position in the data, options, history). The directory is written under another
name, flushed file by file and then renamed, so a checkpoint is complete or absent. A killed run leaves at
most a *.partial, which the next run removes.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from longlora import disk
from longlora.disk import ASIDE, flush, read_json, write_json
from longlora.errors import UserError
from longlora.files.safetensors import SafetensorsFile
from longlora.files.safetensors import save as save_tensors

STATE, OPTIMIZER = "trainer_state.json", "optimizer.safetensors"


def path_of(output_dir: str, step: int) -> str:
    """The directory of the checkpoint after `step` steps."""
    return os.path.join(output_dir, f"checkpoint-{step}")


def found(output_dir: str) -> list[str]:
    """The directories of a run's complete checkpoints, oldest first."""
    if not os.path.isdir(output_dir):
        return []
    matches = (re.fullmatch(r"checkpoint-(\d+)", name) for name in os.listdir(output_dir))
    return [path_of(output_dir, step) for step in sorted(int(match[1]) for match in matches if match)]


def belongs_to(checkpoint: str, output_dir: str) -> bool:
    """Whether the checkpoint lies in the run's own directory, or is none, which `load` says."""
    own = os.path.dirname(os.path.realpath(checkpoint)) == os.path.realpath(output_dir)
    return own or not os.path.exists(os.path.join(checkpoint, STATE))


def by_age(output_dir: str) -> list[str]:
    """The directories of a run's complete checkpoints in the order in which they were written."""

    def written(path):
        with contextlib.suppress(OSError):
            return os.stat(os.path.join(path, STATE)).st_mtime_ns
        return 0

    return sorted(found(output_dir), key=written)


def save(
    output_dir: str,
    state: dict,
    optimizer: dict[str, Any],
    write_model: Callable[[str], object],
    limit: int | None = None,
) -> str:
    """Write checkpoint-N, N = state["global_step"] -> its path.

    write_model(directory) writes the adapter or the model; optimizer is name -> float32 array. With `limit`,
    only that many checkpoints stay: those written first are removed once the new one is in place. UserError
    if it cannot be written; the older checkpoints are then untouched.
    """
    final = path_of(output_dir, state["global_step"])
    aside = final + ASIDE
    try:
        os.makedirs(aside)
        write_model(aside)  # each writer flushes its files
        save_tensors(os.path.join(aside, OPTIMIZER), optimizer)
        write_json(os.path.join(aside, STATE), state)
        _remove(final)  # it exists if the run resumed from an earlier checkpoint
        os.rename(aside, final)
        flush(output_dir)
        others = [path for path in by_age(output_dir) if path != final]
        for old in others[: len(others) + 1 - limit] if limit else []:
            _remove(old)
    except OSError as error:
        raise UserError(
            f"{final}: cannot be written: {error.strerror or error}; older checkpoints are untouched"
        ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return final


def _remove(path: str) -> None:
    """Remove a checkpoint. At no time is half of it left under its name."""
    if os.path.exists(path):
        os.rename(path, path + ".old" + ASIDE)
        shutil.rmtree(path + ".old" + ASIDE)


def sweep(directory: str) -> None:
    """Remove what killed runs left half written in a run's directory or in its cache."""
    disk.sweep(directory)
    disk.sweep(directory, r"checkpoint-\d+(\.old)?\.partial")  # no run writes here now: see `alone`


@contextlib.contextmanager
def alone(directory: str) -> Iterator[None]:
    """Create `directory` if need be and lock it; UserError if another run holds it.

    The lock belongs to the process, so a killed run leaves none.
    """
    try:
        os.makedirs(directory, exist_ok=True)
        handle = os.open(directory, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{directory}: cannot be made: {error.strerror}") from None
    with disk.closing(handle):
        if not disk.lock(handle):
            raise UserError(f"{directory}: another run is writing there now")
        yield


def load(path: str) -> tuple[dict, dict[str, np.ndarray]]:
    """Read a checkpoint -> (state, optimizer state as name -> float32 array, memory-mapped).

    UserError if a part is missing or damaged.
    """
    for name in (STATE, OPTIMIZER):
        if not os.path.exists(os.path.join(path, name)):
            raise UserError(f"{path}: is not a checkpoint: it has no {name}")
    state = read_json(os.path.join(path, STATE))
    missing = {"global_step", "position", "options", "log_history", "data", "base"} - set(state)
    if missing:
        raise UserError(f"{os.path.join(path, STATE)}: lacks {', '.join(sorted(missing))}")
    tensors = SafetensorsFile(os.path.join(path, OPTIMIZER))
    return state, {name: tensors.array(name) for name in tensors.entries}


def resolve(resume_from_checkpoint: str, output_dir: str) -> str | None:
    """The checkpoint that the option names; "latest" is the newest in output_dir, or None without any."""
    if resume_from_checkpoint == "latest":
        return found(output_dir)[-1] if found(output_dir) else None
    return resume_from_checkpoint
