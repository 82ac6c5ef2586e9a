"""Runs of longlora.torch.train and of the driver, and comparisons of what they leave."""

import numpy as np
import pytest
import tiny

from longlora.files import adapter


def run(train, tmp_path, output, said=None, **fields):
    """A run of a tiny model into tmp_path / output. train: driver.train or longlora.torch.train.train."""
    fields = tiny.options(tmp_path, output_dir=str(tmp_path / output), **fields)
    return train(said.append if said is not None else lambda line: None, **fields)


def trained(path):
    return adapter.load(path)[1]


def close(ours, theirs, limit=2e-3):
    """Adapters made the same steps. Whole tensors are compared, not elements.

    Adam's first steps have the size of the rate whatever the gradient is. Where a gradient is only rounding
    noise, so is the sign of the step.
    """
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].size and np.abs(ours[name]).max() > 0, name
        assert np.linalg.norm(ours[name] - theirs[name]) <= limit * np.linalg.norm(theirs[name]), name


def same_rows(ours, theirs, rel=1e-5):
    """Rows of metrics are equal, without times and memory."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert a.keys() == b.keys()
        for key in a.keys() - {"tokens_per_s", "peak_memory"}:
            assert a[key] == pytest.approx(b[key], rel=10 * rel if key == "grad_norm" else rel), (
                a["step"],
                key,
            )
