"""Perplexity by length, dense attention: the number that says whether a context was extended."""
import math
import os

import numpy as np

from . import data
from .errors import UserError


def windows(count, length, stride=None):
    """(first, last, scored from) over `count` tokens: windows of `length`, each scored at all its targets, a shorter last one
    too; with a stride the usual sliding window, each scored at the targets that no window before it had."""
    out, first, scored = [], 0, 1
    while first < count - 1:
        last = min(first + length, count)
        out.append((first, last, (first + 1 if stride is None else max(scored, first + 1))))
        scored = last
        if last == count:
            break
        first += length if stride is None else stride
    return out


def score(model, ids, length, stride=None, positions=None):
    """Mean loss of `ids` (int32 [N]) in windows of `length` tokens -> (tokens scored, sum of losses in nats).

    positions, float64 [2, length]: sums of losses and counts by position in the window are added to it.
    """
    total, tokens = 0.0, 0
    for first, last, start in windows(len(ids), length, stride):
        window = np.ascontiguousarray(ids[first:last], np.int32)
        targets = np.append(window[1:], np.int32(-100)).astype(np.int32)
        targets[:start - first - 1] = -100
        losses = model.losses(window, targets)
        kept = targets != -100
        total += float(losses[kept].astype(np.float64).sum())
        tokens += int(kept.sum())
        if positions is not None:
            positions[0, :len(window)] += np.where(kept, losses, 0)
            positions[1, :len(window)] += kept
    return tokens, total


def read_ids(path, tokenizer, config):
    """The token ids of a file, as the tokenizer gives them: each document of its own, nothing put between."""
    parts = []
    for file in data.files_of(path):
        if file.endswith(".bin"):
            return [np.asarray(data.read_bin(file, config.vocab_size).ids, np.int32)]
        parts += [tokenizer.encode(text) for text in data.documents(file)]
    return parts


def measure(model, parts, lengths, stride=None):
    """-> one dict(length, tokens, loss, perplexity) for each length."""
    results = []
    for length in lengths:
        tokens, total = map(sum, zip(*(score(model, ids, length, stride) for ids in parts)))
        if not tokens:
            raise UserError("the data holds no two tokens to score")
        loss = total / tokens
        results.append({"length": length, "tokens": tokens, "loss": loss,
                        "perplexity": math.exp(loss) if loss < 700 else math.inf})
    return results


def open_for_evaluation(model, adapter=None, rope_type=None, target_length=None, dtype="float32"):
    """A Model with no training in it -> (Model, Checkpoint). With rope_type: interpolated to target_length, untrained."""
    from . import adapter as adapter_
    from . import rope
    from .config import read_config
    from .model import Model
    from .weights import open_model
    base = open_model(model)
    config, lora, tensors = base.config, None, None
    if adapter is not None:
        lora, tensors, raw = adapter_.load(adapter, base)
        config = read_config(raw) if raw is not None else config
    if rope_type is not None:
        new, _ = rope.extend(config, rope_type, target_length)
        config = read_config(rope.to_config(config.raw, new, target_length))
    made = Model(config, dtype=dtype, lora=lora)
    made.load(base)
    if tensors is not None:
        made.load_adapter(tensors)
    return made, base


def run(model, data, lengths, adapter=None, stride=None, rope_type=None, target_length=None, dtype="float32"):
    """Perplexity of the model at path `model` (with an adapter) on the text at `data`, in windows of each of `lengths` tokens.

    Dense attention; memory does not grow with the vocabulary. -> {"results": [{"length", "tokens", "loss", "perplexity"}, ...]};
    loss in nats per token. stride: sliding window. rope_type and target_length: interpolate first, without training.
    """
    lengths = [lengths] if isinstance(lengths, int) else list(lengths)
    for length in lengths:
        if isinstance(length, bool) or not isinstance(length, int) or length < 2:
            raise UserError(f"lengths should be integers of at least 2, got {length!r}")
    if stride is not None and not 1 <= stride <= min(lengths):
        raise UserError(f"stride should be from 1 to the length, got {stride}")
    if rope_type is not None and target_length is None:
        target_length = max(lengths)
    made, base = open_for_evaluation(model, adapter, rope_type, target_length, dtype)
    parts = read_ids(os.fspath(data), base.tokenizer(), base.config)
    return {"results": measure(made, parts, lengths, stride), "model": os.fspath(model), "adapter": adapter and os.fspath(adapter),
            "attention": "dense", "stride": stride}


def text(results):
    lines = [f"{'length':>8} {'tokens':>10} {'loss':>8} {'perplexity':>11}"]
    for r in results["results"]:
        lines.append(f"{r['length']:>8} {r['tokens']:>10,} {r['loss']:>8.4f} {r['perplexity']:>11.3f}")
    return "\n".join(lines)
