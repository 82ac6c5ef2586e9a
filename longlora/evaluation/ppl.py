"""Perplexity by length, dense attention: the number that says whether a context was extended."""

import math
import os

import numpy as np

from longlora.data import text as data
from longlora.device import CPU, choose
from longlora.errors import UserError


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
        targets[: start - first - 1] = -100
        losses = model.losses(window, targets)
        kept = targets != -100
        total += float(losses[kept].astype(np.float64).sum())
        tokens += int(kept.sum())
        if positions is not None:
            positions[0, : len(window)] += np.where(kept, losses, 0)
            positions[1, : len(window)] += kept
    return tokens, total


def read_ids(path, tokenizer, config, max_tokens=None):
    """The token ids of the text at `path`, each document of its own, as transformers' tokenizer(text) gives them."""
    parts = []
    for file in data.files_of(path):
        if file.endswith(".bin"):
            parts.append(np.asarray(data.read_bin(file, config.vocab_size).ids, np.int32))
        elif tokenizer is None:
            raise UserError(f"{file}: the model has no tokenizer; wanted a token .bin")
        else:
            document = []
            for ids, ends in data.encode_documents(tokenizer, data.documents(file)):
                document.append(ids)
                if ends:
                    parts.append(np.concatenate(document))
                    document = []
    if max_tokens is not None:
        room = max_tokens
        for i, ids in enumerate(parts):
            parts[i] = ids[: max(0, room)]
            room -= len(ids)
    return parts


def perplexity(loss):
    """exp of a mean loss in nats; infinity where that is above what a float holds."""
    return math.exp(loss) if loss < 700 else math.inf


def measure(model, parts, lengths, stride=None, bins=None):
    """parts: list of int32 ids [N], the documents -> one dict(length, tokens, loss, perplexity) for each length.

    bins: also by_position, a list of dict(first, last, tokens, loss, perplexity) over so many equal parts of the window.
    """
    results = []
    for length in lengths:
        positions = np.zeros((2, length)) if bins else None
        tokens, total = map(sum, zip(*(score(model, ids, length, stride, positions) for ids in parts)))
        if not tokens:
            raise UserError("the data should hold at least two tokens")
        result = {
            "length": length,
            "tokens": tokens,
            "loss": total / tokens,
            "perplexity": perplexity(total / tokens),
        }
        if bins:
            result["by_position"] = _binned(positions, length, min(bins, length))
        results.append(result)
    return results


def _binned(positions, length, bins):
    edges = [length * i // bins for i in range(bins + 1)]
    found = []
    for first, last in zip(edges, edges[1:]):
        total, count = positions[:, first:last].sum(1)
        if count:
            found.append(
                {
                    "first": first,
                    "last": last,
                    "tokens": int(count),
                    "loss": total / count,
                    "perplexity": perplexity(total / count),
                }
            )
    return found


def open_for_evaluation(model, adapter=None, rope_type=None, target_length=None, dtype="float32", device=CPU):
    """A Model that evaluates only, on `device` -> (Model, ModelFile). With rope_type: interpolated to target_length, untrained."""
    from longlora.decoder import rope
    from longlora.decoder.config import read_config
    from longlora.decoder.model import Model
    from longlora.files import adapter as adapter_
    from longlora.files.open_model import open_model

    base = open_model(model)
    config, lora, tensors = base.config, None, None
    if adapter is not None:
        lora, tensors, raw = adapter_.load(adapter, base)
        config = read_config(raw) if raw is not None else config
    if rope_type is not None:
        extended, _ = rope.extend(config, rope_type, target_length)
        config = read_config(rope.to_config(config.raw, extended, target_length))
    made = Model(config, dtype=dtype, lora=lora, device=device).load(base)
    return (made if tensors is None else made.load_adapter(tensors, lora)), base


def run(
    model,
    data,
    lengths,
    adapter=None,
    stride=None,
    rope_type=None,
    target_length=None,
    dtype="float32",
    max_tokens=None,
    bins=None,
    device="auto",
):
    """Perplexity of the model at path `model` (with an adapter) on the text at `data`, in windows of each of `lengths` tokens.

    -> {"results": [{"length", "tokens", "loss", "perplexity"}, ...]}, loss in nats per token. Dense attention; memory does not
    grow with the vocabulary. stride: sliding window. rope_type and target_length: interpolate first, without training.
    max_tokens: of the data, from its start. bins: each result also by_position, in so many parts. device: cpu, cuda, cuda:1, ...;
    auto is the first GPU where there is one, else the cpu.
    """
    lengths = [lengths] if isinstance(lengths, int) else list(lengths)
    for name, values, low in (
        ("lengths", lengths or [None], 2),
        ("stride", [stride], 1),
        ("target_length", [target_length], 1),
        ("max_tokens", [max_tokens], 2),
        ("bins", [bins], 1),
    ):
        for value in values:
            if (value is not None or name == "lengths") and (type(value) is not int or value < low):
                raise UserError(f"{name} should be an integer of at least {low}, got {value!r}")
    if stride is not None and stride > min(lengths):
        raise UserError(f"stride should be at most the shortest length {min(lengths)}, got {stride}")
    if rope_type is None and target_length is not None:
        raise UserError("target_length needs rope_type: it interpolates the model before it is measured")
    if rope_type is not None and target_length is None:
        target_length = max(lengths)
    device, _ = choose(device)
    made, base = open_for_evaluation(model, adapter, rope_type, target_length, dtype, device)
    parts = read_ids(
        os.fspath(data), base.tokenizer() if base.has_tokenizer() else None, base.config, max_tokens
    )
    return {
        "results": measure(made, parts, lengths, stride, bins),
        "model": os.fspath(model),
        "adapter": None if adapter is None else os.fspath(adapter),
        "data": os.fspath(data),
        "attention": "dense",
        "device": device,
        "stride": stride,
        "rope": {"type": made.config.rope.type, "factor": made.config.rope.factor},
    }


def text(results):
    """`run`'s dict as a table."""
    lines = [f"{'length':>8} {'tokens':>10} {'loss':>8} {'perplexity':>11}"]
    for r in results["results"]:
        lines.append(f"{r['length']:>8} {r['tokens']:>10,} {r['loss']:>8.4f} {r['perplexity']:>11.3f}")
    return "\n".join(lines)
