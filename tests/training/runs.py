"""Runs of tiny models, and what they leave."""

import os

import numpy as np
import pytest
import tiny

from longlora.decoder import rope
from longlora.decoder.lora import LoraConfig
from longlora.errors import UserError
from longlora.files import adapter
from longlora.files.open_model import open_model
from longlora.training import driver, resume


def run(tmp_path, said=None, **fields):
    return driver.train(
        said.append if said is not None else lambda line: None, **tiny.options(tmp_path, **fields)
    )


def failure(tmp_path, **fields):
    with pytest.raises(UserError) as caught:
        run(tmp_path, **fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def numbers(rows):
    """What must be equal between equal runs: everything but times and memory."""
    return [
        {key: value for key, value in row.items() if key not in ("tokens_per_s", "peak_memory")}
        for row in rows
    ]


def weights(path):
    """The trained tensors of an adapter or of a whole model."""
    if os.path.exists(os.path.join(path, adapter.CONFIG)):
        return adapter.load(path)[1]
    found = open_model(path)
    return {name: found.read(name) for name in found.names()}


def equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], name)


def adapter_of(path, base, target_length=None, method="yarn", **fields):
    """Write an adapter filled with ones for the model at `base`. Returns the adapter's path.

    fields: those of LoraConfig. target_length: the adapter extends the model to it, with the
    positions of `method`.
    """
    base, lora = open_model(base), LoraConfig(**fields)
    tensors = {name: np.ones(shape, np.float32) for name, shape in lora.tensor_shapes(base.config).items()}
    raw = base.config.raw
    if target_length is not None:
        raw = rope.to_config(raw, rope.extend(base.config, method, target_length)[0], target_length)
    adapter.save(path, tensors, lora, base, raw)
    return path


def checkpoint_state(step, **more):
    """The state of a checkpoint that save_checkpoint writes."""
    found = dict(global_step=step, position=step, options={}, log_history=[], data="d", base="b")
    return found | dict(written=float(step)) | more


def save_checkpoint(path, step, limit=None, kept=None, write_model=lambda directory: None, **more):
    """Save a checkpoint of one tensor. Returns its path. more: further fields of its state."""
    tensors = {"m.x": np.full(3, step, np.float32)}
    return resume.save(str(path), checkpoint_state(step, **more), tensors, write_model, limit, kept)
