"""checkpoint-N: everything a run needs to go on as if it had never stopped, in one directory that is whole or not there.

adapter_* (or, with --full, the whole model), optimizer.safetensors (float32 masters and moments), trainer_state.json (step, data
position, history), written to a directory beside, flushed file by file, renamed.
"""
import json
import os
import re
import shutil

from .errors import UserError
from .safetensors_file import SafetensorsFile, flush, save as save_tensors, write_json

STATE, OPTIMIZER = "trainer_state.json", "optimizer.safetensors"
ASIDE = ".partial"


def found(output_dir):
    """The complete checkpoints of a run, oldest first: [(step, path)]."""
    if not os.path.isdir(output_dir):
        return []
    names = [(int(m.group(1)), name) for name in os.listdir(output_dir) if (m := re.fullmatch(r"checkpoint-(\d+)", name))]
    return [(step, os.path.join(output_dir, name)) for step, name in sorted(names)]


def save(output_dir, step, state, optimizer, write_model, limit=None):
    """Write checkpoint-`step`: write_model(directory) puts the adapter or model there, optimizer is name -> float32 array.

    A killed run leaves a *.partial directory that the next save removes; what was complete stays so. With `limit` the
    oldest are removed, after the new one is in place.
    """
    final = os.path.join(output_dir, f"checkpoint-{step}")
    aside = final + ASIDE
    try:
        sweep(output_dir)
        os.makedirs(aside)
        write_model(aside)
        save_tensors(os.path.join(aside, OPTIMIZER), optimizer)
        write_json(os.path.join(aside, STATE), state)
        for root, _, names in os.walk(aside):
            for name in names:
                flush(os.path.join(root, name))
            flush(root)
        if os.path.exists(final):
            shutil.rmtree(final)
        os.rename(aside, final)
        flush(output_dir)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(f"{final}: cannot be written: {error.strerror or error}; earlier checkpoints are untouched") from None
    except UserError:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    for _, old in found(output_dir)[:-limit] if limit else []:
        shutil.rmtree(old)
    return final


def sweep(output_dir):
    """Remove what a killed run left half written."""
    for name in os.listdir(output_dir) if os.path.isdir(output_dir) else []:
        if name.startswith("checkpoint-") and name.endswith(ASIDE):
            shutil.rmtree(os.path.join(output_dir, name), ignore_errors=True)


def load(path):
    """A checkpoint -> (state dict, optimizer dict of name -> float32 array, mapped). UserError if a part is missing."""
    for name in (STATE, OPTIMIZER):
        if not os.path.exists(os.path.join(path, name)):
            raise UserError(f"{path}: is not a checkpoint: it has no {name}")
    try:
        with open(os.path.join(path, STATE), encoding="utf-8") as file:
            state = json.load(file)
    except ValueError:
        raise UserError(f"{path}: {STATE} is damaged") from None
    tensors = SafetensorsFile(os.path.join(path, OPTIMIZER))
    return state, {name: tensors.array(name) for name in tensors.entries}


def resolve(resume, output_dir):
    """What resume_from_checkpoint means: a path, or 'latest' of output_dir."""
    if resume != "latest":
        return resume
    complete = found(output_dir)
    if not complete:
        raise UserError(f"{output_dir}: holds no checkpoint to resume from")
    return complete[-1][1]
