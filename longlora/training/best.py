"""The best checkpoint of a run, as load_best_model_at_end of TrainingArguments means it."""

import math
import os
from dataclasses import dataclass

# Keys of trainer_state.json: transformers' names, and the held-out sequences that the metric belongs to.
METRIC, STEP, PATH, HELD_OUT = "best_metric", "best_global_step", "best_model_checkpoint", "held_out"


@dataclass(frozen=True)
class Best:
    """The checkpoint at `path`, of `step` steps, with the lowest held-out `loss` in nats per token so far."""

    step: int
    loss: float
    path: str


def better(best: Best | None, step: int, loss: float | None, path: str) -> Best | None:
    """The better one of `best` and the checkpoint at `path`; loss: its held-out loss, None if unknown.

    The older one wins a draw. A checkpoint without a finite loss is never the best.
    """
    if loss is None or not math.isfinite(loss) or best is not None and loss >= best.loss:
        return best
    return Best(step, loss, path)


def to_state(best: Best | None, held_out: str) -> dict:
    """What a checkpoint keeps of `best`; held_out identifies the sequences that the losses belong to."""
    if best is None:
        return {METRIC: None, STEP: None, PATH: None, HELD_OUT: held_out}
    return {METRIC: best.loss, STEP: best.step, PATH: best.path, HELD_OUT: held_out}


def from_state(state: dict, checkpoint: str, held_out: str) -> tuple[Best | None, str | None]:
    """The best checkpoint that the state of `checkpoint` knows, and why it is forgotten, in words, or None.

    Beside `checkpoint` it is looked for first, since a directory may have moved.
    """
    step, loss, path = state.get(STEP), state.get(METRIC), state.get(PATH)
    if type(step) is not int or not isinstance(loss, float) or not isinstance(path, str):
        return None, None
    if state.get(HELD_OUT) != held_out:
        return None, "other sequences are held out now"
    beside = os.path.join(os.path.dirname(os.path.abspath(checkpoint)), os.path.basename(path))
    for place in (beside, path):
        if os.path.isdir(place):
            return Best(step, loss, place), None
    return None, f"{path} is gone"
