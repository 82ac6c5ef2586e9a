"""checkpoint-N: everything a run needs to go on as if it had never stopped, in one directory that is whole or not there.

The adapter (or, with --full, the whole model), optimizer.safetensors (float32 masters and moments), trainer_state.json (step,
position in the data, options, history): written to a directory beside, flushed file by file, renamed. A killed run leaves at
most a *.partial, which the next one removes.
"""

import contextlib
import fcntl
import os
import re
import shutil

from longlora.disk import flush, read_json, write_json
from longlora.errors import UserError
from longlora.files.safetensors import SafetensorsFile
from longlora.files.safetensors import save as save_tensors

STATE, OPTIMIZER = "trainer_state.json", "optimizer.safetensors"
ASIDE = ".partial"


def found(output_dir):
    """The complete checkpoints of a run, oldest first: [path]."""
    if not os.path.isdir(output_dir):
        return []
    steps = sorted(
        int(match[1]) for name in os.listdir(output_dir) if (match := re.fullmatch(r"checkpoint-(\d+)", name))
    )
    return [os.path.join(output_dir, f"checkpoint-{step}") for step in steps]


def save(output_dir, state, optimizer, write_model, limit=None):
    """Write checkpoint-N, N = state["global_step"] -> its path. UserError when it cannot be written; older ones are untouched.

    write_model(directory) puts the adapter or model there; optimizer is name -> float32 array. With `limit` the oldest are
    removed, once the new one is in place.
    """
    final = os.path.join(output_dir, f"checkpoint-{state['global_step']}")
    aside = final + ASIDE
    try:
        os.makedirs(aside)
        write_model(aside)  # every file is flushed by its writer
        save_tensors(os.path.join(aside, OPTIMIZER), optimizer)
        write_json(os.path.join(aside, STATE), state)
        _remove(final)  # an equal one, of a run that was resumed from before it
        os.rename(aside, final)
        flush(output_dir)
        for old in found(output_dir)[:-limit] if limit else []:
            _remove(old)
    except OSError as error:
        raise UserError(
            f"{final}: cannot be written: {error.strerror or error}; older checkpoints are untouched"
        ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return final


def _remove(path):
    """Remove a checkpoint so that at no time half of it is left under its name."""
    if os.path.exists(path):
        os.rename(path, path + ".old" + ASIDE)
        shutil.rmtree(path + ".old" + ASIDE)


def sweep(directory):
    """Remove what a killed run left half written."""
    for name in os.listdir(directory):
        path = os.path.join(directory, name)
        if name.endswith(ASIDE) and name.startswith("checkpoint-"):
            shutil.rmtree(path, ignore_errors=True)
        elif name.endswith(ASIDE) and name.startswith(".") and os.path.isfile(path):
            os.unlink(path)


@contextlib.contextmanager
def alone(directory):
    """Hold `directory`, making it if need be, against other runs. The lock is the process's: a killed run leaves none."""
    try:
        os.makedirs(directory, exist_ok=True)
        handle = os.open(directory, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{directory}: cannot be made: {error.strerror}") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{directory}: another run is writing there now") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)


def load(path):
    """A checkpoint -> (state dict, dict of name -> float32 array, mapped). UserError if a part is missing or damaged."""
    for name in (STATE, OPTIMIZER):
        if not os.path.exists(os.path.join(path, name)):
            raise UserError(f"{path}: is not a checkpoint: it has no {name}")
    state = read_json(os.path.join(path, STATE))
    missing = {"global_step", "position", "options", "log_history", "data", "base"} - set(state)
    if missing:
        raise UserError(f"{os.path.join(path, STATE)}: lacks {', '.join(sorted(missing))}")
    tensors = SafetensorsFile(os.path.join(path, OPTIMIZER))
    return state, {name: tensors.array(name) for name in tensors.entries}


def resolve(resume, output_dir):
    """What resume_from_checkpoint means -> a checkpoint's path, or None: 'latest' of a run that has written none yet."""
    if resume == "latest":
        return found(output_dir)[-1] if found(output_dir) else None
    return resume
