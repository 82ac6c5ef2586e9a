"""How likely given tokens are after given rows of a pass: a few rows of logits at a time."""

from typing import Any

import numpy as np

from longlora import _C
from longlora.device import host

BLOCK = 16 << 20  # bytes of logits that are in memory at a time


def score(head: Any, n: Any, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Score `targets`, int [M], by n, the head's input [M,C].

    head: the weight of the head, [V,C].
    Returns the log-probability of each target, float64 [M], and whether it is the likeliest token, bool [M].
    Among equal logits the first token is the likeliest. A logit that is NaN makes the log-probability NaN.
    """
    count, vocab = len(targets), head.shape[0]
    rows = max(1, min(count, BLOCK // (4 * vocab)))
    out = _C.Tensor((rows, vocab), "float32", n.device)
    logs, best = np.empty(count), np.empty(count, bool)
    for first in range(0, count, rows):
        part = slice(first, min(first + rows, count))
        view = out[: part.stop - first]
        _C.matmul(view, n[part], head.T, 1.0, 0.0)
        x, there = host(view), np.arange(part.stop - first)
        best[part] = x.argmax(-1) == targets[part]
        # Terms are float32: each is 1e-7 off at most. Their sum is float64.
        chosen, high = x[there, targets[part]], x.max(-1)
        sums = np.exp(x - high[:, None]).sum(-1, dtype=np.float64)
        logs[part] = chosen.astype(np.float64) - high - np.log(sums)
    return logs, best
