"""Checkpoints: everything a run needs to continue as if it had never stopped, in one directory, checkpoint-N.

It holds the adapter (or, with `full`, the whole model), optimizer.safetensors (float32 masters and moments)
and trainer_state.json (step, position in the data, options, history). The directory is written under another
name, flushed file by file and then renamed, so a checkpoint is complete or absent. A killed run leaves at
most a *.partial, which the next run removes, or puts back where it was a checkpoint to be replaced.
"""

import contextlib
import os
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from longlora import disk
from longlora.disk import ASIDE, flush_names, read_json, write_json
from longlora.errors import UserError
from longlora.files import adapter, base_folder
from longlora.files.huggingface import INDEX, SINGLE
from longlora.files.safetensors import SafetensorsFile
from longlora.files.safetensors import save as save_tensors
from longlora.training import metrics, report

STATE, OPTIMIZER = "trainer_state.json", "optimizer.safetensors"
# What the state of a checkpoint has at least.
FIELDS = {"global_step": int, "position": int, "options": dict, "log_history": list, "data": str, "base": str}
# Ends the names of a checkpoint that a new one is about to replace, and of one that is being removed.
REPLACED, OLD = ".replaced" + ASIDE, ".old" + ASIDE

# What the end of a run writes. A directory that holds one of TAKEN holds a run or a model, and is never
# overwritten.
MODEL = (
    adapter.CONFIG,
    "config.json",
    adapter.WEIGHTS,
    SINGLE,
    INDEX,
    base_folder.FOLDER,
    "tokenizer.json",
    "README.md",
)
TAKEN = (metrics.FILE, report.OPTIONS, *MODEL)


def path_of(output_dir: str, step: int) -> str:
    """The directory of the checkpoint after `step` steps."""
    return os.path.join(output_dir, f"checkpoint-{step}")


def found(output_dir: str) -> list[str]:
    """The directories of a run's complete checkpoints, by number."""
    if not os.path.isdir(output_dir):
        return []
    matches = (re.fullmatch(r"checkpoint-(\d+)", name) for name in os.listdir(output_dir))
    return [path_of(output_dir, step) for step in sorted(int(match[1]) for match in matches if match)]


def belongs_to(checkpoint: str, output_dir: str) -> bool:
    """Whether the checkpoint lies in the run's own directory, or is none, which `load` says."""
    own = os.path.dirname(os.path.realpath(checkpoint)) == os.path.realpath(output_dir)
    return own or not os.path.exists(os.path.join(checkpoint, STATE))


def refuse_taken(output_dir: str, resumes: str | None) -> None:
    """UserError if output_dir holds what a run would overwrite; resumes: its checkpoint, "latest" or None."""
    if os.path.exists(output_dir) and not os.path.isdir(output_dir):
        raise UserError(f"{output_dir}: is not a directory")
    checkpoints, latest = found(output_dir), resumes == "latest"
    if latest and checkpoints or resumes and not latest and belongs_to(resumes, output_dir):
        return
    # A run that was killed before its first checkpoint has left no model.
    names = (*(MODEL if latest else TAKEN), *map(os.path.basename, checkpoints))
    taken = next((name for name in names if os.path.lexists(os.path.join(output_dir, name))), None)
    if taken is None:
        return
    if latest:
        raise UserError(f"{output_dir}: holds {taken} and no checkpoint; choose another output_dir")
    raise UserError(
        f"{output_dir}: holds another run or a model ({taken}); resume it (resume_from_checkpoint latest) "
        "or choose another output_dir" + (f"; {resumes} belongs to another output_dir" if resumes else "")
    )


def by_age(output_dir: str) -> list[str]:
    """The directories of a run's complete checkpoints in the order in which they were written.

    A run that went back to an earlier checkpoint writes smaller numbers later.
    """
    return sorted(found(output_dir), key=_written)


def _written(path: str) -> float:
    """When the checkpoint was written, in seconds, as it says itself: a copied file has another time."""
    state = os.path.join(path, STATE)
    with contextlib.suppress(UserError, OSError):
        said = read_json(state).get("written")
        return said if isinstance(said, (int, float)) else os.stat(state).st_mtime
    return 0.0


def save(
    output_dir: str,
    state: dict,
    optimizer: dict[str, Any],
    write_model: Callable[[str], object],
    limit: int | None = None,
    kept: str | None = None,
) -> str:
    """Write checkpoint-N, N = state["global_step"] -> its path.

    write_model(directory) writes the adapter or the model; optimizer is name -> float32 array. With `limit`,
    only that many checkpoints stay: those written first are removed once the new one is in place, but never
    `kept`. UserError if it cannot be written; the older checkpoints are then untouched.
    """
    final = path_of(output_dir, state["global_step"])
    aside = final + ASIDE
    try:
        disk.remove(aside)
        os.makedirs(aside)
        write_model(aside)  # each writer flushes its files
        save_tensors(os.path.join(aside, OPTIMIZER), optimizer)
        write_json(os.path.join(aside, STATE), state)
        if os.path.exists(final):  # the run has resumed from an earlier checkpoint
            os.rename(final, final + REPLACED)
        os.rename(aside, final)
        flush_names(output_dir)
    except OSError as error:
        raise UserError(
            f"{final}: cannot be written: {error.strerror or error}; older checkpoints are untouched"
        ) from None
    finally:
        disk.remove(aside)
        _settle(output_dir)
    if limit:
        stay = {os.path.realpath(path) for path in (final, kept) if path is not None}
        paths = by_age(output_dir)
        others = [path for path in paths if os.path.realpath(path) not in stay]
        room = max(limit - (len(paths) - len(others)), 0)
        for old in others[: max(len(others) - room, 0)]:
            _discard(old)
    return final


def keep_only(output_dir: str, checkpoint: str) -> None:
    """Remove every other checkpoint of output_dir, if `checkpoint` is one of them."""
    paths, path = found(output_dir), os.path.realpath(checkpoint)
    if path in map(os.path.realpath, paths):
        for other in paths:
            if os.path.realpath(other) != path:
                _discard(other)


def _settle(output_dir: str) -> None:
    """Put back each checkpoint that was to be replaced and was not; remove those that were."""
    with contextlib.suppress(OSError):
        for name in os.listdir(output_dir):
            path = os.path.join(output_dir, name)
            if re.fullmatch(rf"checkpoint-\d+{re.escape(REPLACED)}", name):
                if os.path.exists(path.removesuffix(REPLACED)):
                    _discard(path)
                else:
                    os.rename(path, path.removesuffix(REPLACED))


def _discard(path: str) -> None:
    """Remove a checkpoint, or leave it whole. At no time is half of it left under its name."""
    disk.remove(path + OLD)
    with contextlib.suppress(OSError):
        os.rename(path, path + OLD)
        disk.remove(path + OLD)


def sweep(output_dir: str) -> None:
    """Remove what killed runs left half written in a run's directory. The caller has it `alone`."""
    disk.sweep(output_dir)
    _settle(output_dir)
    for name in os.listdir(output_dir):
        if re.fullmatch(rf"checkpoint-\d+({re.escape(REPLACED)})?(\.old)?{re.escape(ASIDE)}", name):
            disk.remove(os.path.join(output_dir, name))


def load(path: str) -> tuple[dict, dict[str, np.ndarray]]:
    """Read a checkpoint -> (state, optimizer state as name -> float32 array, memory-mapped).

    UserError if a part is missing or damaged.
    """
    for name in (STATE, OPTIMIZER):
        if not os.path.exists(os.path.join(path, name)):
            raise UserError(f"{path}: is not a checkpoint: it has no {name}")
    where = os.path.join(path, STATE)
    state = read_json(where)
    missing = set(FIELDS) - set(state)
    if missing:
        raise UserError(f"{where}: lacks {', '.join(sorted(missing))}")
    for name, kind in FIELDS.items():
        if type(state[name]) is not kind:
            raise UserError(f"{where}: {name} should be a {kind.__name__}, got {state[name]!r}")
    if not all(isinstance(row, dict) for row in state["log_history"]):
        raise UserError(f"{where}: log_history should be a list of objects")
    tensors = SafetensorsFile(os.path.join(path, OPTIMIZER))
    return state, {name: tensors.array(name) for name in tensors.entries}


def resolve(resume_from_checkpoint: str, output_dir: str) -> str | None:
    """The checkpoint that the option names; "latest" is what output_dir got last, or None without any."""
    if resume_from_checkpoint == "latest":
        return next(reversed(by_age(output_dir)), None)
    return resume_from_checkpoint
