"""Perplexity by length with dense attention: the number that shows whether a context was extended."""

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from longlora.data.text import Corpus, kind
from longlora.data.tokens import encode_documents, read_bin
from longlora.decoder.config import ModelConfig
from longlora.decoder.model import Model
from longlora.device import CPU, choose
from longlora.errors import UserError, shown
from longlora.files.tokenizer import Tokenizer
from longlora.ops import IGNORE

AUTHORS_STRIDE = 256  # tokens between the starts of two windows
AUTHORS_E = 2.71828  # which they raise to the power of the loss


def windows(count: int, length: int, stride: int | None = None) -> list[tuple[int, int, int]]:
    """Cut `count` tokens into windows of `length` -> [(first, last, index of the first scored target)].

    Without a stride the windows lie side by side, the last one may be shorter, and each is scored at all its
    targets. With a stride this is the usual sliding window: each window is scored only at the targets that no
    earlier window had.
    """
    out, first, scored = [], 0, 1
    while first < count - 1:
        last = min(first + length, count)
        out.append((first, last, (first + 1 if stride is None else max(scored, first + 1))))
        scored = last
        if last == count:
            break
        first += length if stride is None else stride
    return out


def score(
    model: Model, ids: np.ndarray, length: int, stride: int | None = None, positions: np.ndarray | None = None
) -> tuple[int, float]:
    """Score `ids` (int32 [N]) in windows of `length` tokens -> (tokens scored, sum of their losses in nats).

    The sums of losses and the counts by position in the window are added to `positions`, float64 [2,length],
    if given.
    """
    total, tokens = 0.0, 0
    for first, last, start in windows(len(ids), length, stride):
        window = np.ascontiguousarray(ids[first:last], np.int32)
        targets = np.append(window[1:], np.int32(IGNORE)).astype(np.int32)
        targets[: start - first - 1] = IGNORE
        losses = model.losses(window, targets)
        kept = targets != IGNORE
        total += float(losses[kept].astype(np.float64).sum())
        tokens += int(kept.sum())
        if positions is not None:
            positions[0, : len(window)] += np.where(kept, losses, 0)
            positions[1, : len(window)] += kept
    return tokens, total


def read_ids(
    corpus: Corpus, tokenizer: Tokenizer | None, config: ModelConfig, max_tokens: int | None = None
) -> list[np.ndarray]:
    """The token ids of the text, int32 [N] for each document.

    They equal those of transformers' tokenizer(text). Only the first `max_tokens` of all tokens are kept.
    UserError for text that cannot be read.
    """
    parts, document = [], []
    if kind(corpus.files[0]) == ".bin":
        parts.append(np.asarray(read_bin(corpus.path, config.vocab_size).ids, np.int32))
    elif tokenizer is None:
        raise UserError(f"{corpus.path}: the model has no tokenizer; wanted a token .bin")
    else:
        for ids, ends in encode_documents(tokenizer, corpus.documents()):
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


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats; infinity where a float cannot hold the result."""
    return math.exp(loss) if loss < 700 else math.inf


def measure(
    model: Model,
    parts: list[np.ndarray],
    lengths: Sequence[int],
    stride: int | None = None,
    bins: int | None = None,
) -> list[dict]:
    """Score documents (int32 [N] each) at each of `lengths` -> [{length, tokens, loss, perplexity}].

    The loss is in nats per token. With bins, each result also has by_position: [{first, last, tokens, loss,
    perplexity}] over `bins` equal parts of the window. UserError if no document holds two tokens.
    """
    results = []
    for length in lengths:
        positions = np.zeros((2, length)) if bins else None
        scores = [score(model, ids, length, stride, positions) for ids in parts]
        tokens, total = sum(tokens for tokens, _ in scores), sum(loss for _, loss in scores)
        if not tokens:
            raise UserError("the data should hold at least two tokens")
        result: dict[str, Any] = {
            "length": length,
            "tokens": tokens,
            "loss": total / tokens,
            "perplexity": perplexity(total / tokens),
        }
        if positions is not None and bins is not None:
            result["by_position"] = _binned(positions, length, min(bins, length))
        results.append(result)
    return results


def authors_windows(count: int, length: int) -> range:
    """Where the authors' windows begin in `count` tokens. UserError if there are none."""
    starts = range(0, count - length, AUTHORS_STRIDE)[:-1]
    if not starts:
        raise UserError(
            f"the authors' protocol needs at least {length + AUTHORS_STRIDE + 1} tokens for windows of "
            f"{length}, the data has {count}"
        )
    return starts


def measure_authors(model: Model, parts: list[np.ndarray], length: int) -> dict:
    """Score documents (int32 [N] each) as eval.py of LongLoRA's authors does with a batch of one.

    The documents are one stream of tokens. A window of `length` begins every 256 tokens, as long as a whole
    one and the token after it are there. The last window is left out.
    Returns {windows, loss, perplexity, accuracy}. The loss of a window is the mean over all its targets, the
    second token to the last. Its accuracy is the share of its tokens after which the next token, also the one
    after the window, is the likeliest. Both are then means over the windows.
    UserError if the stream has no window.
    """
    ids = np.concatenate([*parts, np.zeros(0, np.int32)]).astype(np.int32)
    starts, found = authors_windows(len(ids), length), []
    for first in starts:
        logs, best = model.scores(ids[first : first + length], ids[first + 1 : first + length + 1])
        found.append((-logs[:-1].mean(), best.mean()))
    loss, accuracy = np.mean(found, 0).tolist()
    power = AUTHORS_E**loss if loss < 700 else math.inf
    return {"windows": len(starts), "loss": loss, "perplexity": power, "accuracy": accuracy}


def _binned(positions: np.ndarray, length: int, bins: int) -> list[dict]:
    edges = [length * i // bins for i in range(bins + 1)]
    found = []
    for first, last in zip(edges, edges[1:], strict=False):
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


def open_for_evaluation(
    model: str | os.PathLike,
    adapter: str | os.PathLike | None = None,
    rope_type: str | None = None,
    target_length: int | None = None,
    dtype: str = "float32",
    device: str = CPU,
):
    """Open the model at path `model`, with an adapter if given, for evaluation only.

    Returns the Model and the opened base model. With rope_type the positions are interpolated to
    target_length, without training. UserError for files that cannot be read or do not belong together.
    """
    from longlora.decoder import rope
    from longlora.decoder.config import read_config
    from longlora.files import adapter as adapters
    from longlora.files.open_model import open_model

    base = open_model(model)
    config, lora, tensors = base.config, None, None
    if adapter is not None:
        lora, tensors, raw = adapters.load(adapter, base)
        config = read_config(raw) if raw is not None else config
    if rope_type is not None:
        if target_length is None:
            raise UserError("rope_type needs target_length")
        extended, _ = rope.extend(config, rope_type, target_length)
        config = read_config(rope.to_config(config.raw, extended, target_length))
    made = Model(config, dtype=dtype, lora=lora, device=device).load(base)
    return (made if tensors is None else made.load_adapter(tensors, lora)), base


def run(
    model: str | os.PathLike,
    data: str | os.PathLike,
    lengths: int | Sequence[int],
    adapter: str | os.PathLike | None = None,
    stride: int | None = None,
    rope_type: str | None = None,
    target_length: int | None = None,
    dtype: str = "float32",
    max_tokens: int | None = None,
    bins: int | None = None,
    protocol: str | None = None,
    device: str = "auto",
) -> dict:
    """Perplexity of the model at path `model`, with an adapter if given, on the text at `data`.

    Attention is dense. Memory does not grow with the vocabulary. Returns {"results": [{"length", "tokens",
    "loss", "perplexity"}, ...], ...}, one result for each of `lengths`, loss in nats per token. Its
    "longest_document" counts tokens: windows beyond it hold no more text.

    lengths        tokens of a window
    stride         tokens between the starts of two windows; by default windows lie side by side
    rope_type      interpolate the positions first, without training
    target_length  the length to interpolate to; by default the longest window
    max_tokens     use only this many tokens from the start of the data
    bins           give each result by_position too, in this many parts of the window
    protocol       "authors" gives each result authors too, what eval.py of LongLoRA's authors computes:
                   {"windows", "loss", "perplexity", "accuracy"}; stride, bins and documents do not change it
    device         auto, cpu, cuda, cuda:1, ...; auto is the first usable GPU, or else the CPU

    UserError names an argument that is out of range and files that cannot be read.
    """
    lengths = [lengths] if isinstance(lengths, int) else list(lengths)
    given: tuple[tuple[str, Sequence, int], ...] = (
        ("lengths", lengths or [None], 2),
        ("stride", [stride], 1),
        ("target_length", [target_length], 1),
        ("max_tokens", [max_tokens], 2),
        ("bins", [bins], 1),
    )
    for name, values, low in given:
        for value in values:
            if (value is not None or name == "lengths") and (type(value) is not int or value < low):
                raise UserError(f"{name} should be an integer of at least {low}, got {shown(value)}")
            if value is not None and value > 1 << 50:
                raise UserError(f"{name} should be at most {1 << 50}, got {shown(value)}")
    if protocol not in (None, "authors"):
        raise UserError(f"protocol should be authors, got {shown(protocol)}")
    if stride is not None and stride > min(lengths):
        raise UserError(f"stride should be at most the shortest length {min(lengths)}, got {stride}")
    if rope_type is None and target_length is not None:
        raise UserError("target_length needs rope_type: it interpolates the model before the measurement")
    if rope_type is not None and target_length is None:
        target_length = max(lengths)
    device, _ = choose(device)
    corpus = Corpus(os.fspath(data))
    made, base = open_for_evaluation(model, adapter, rope_type, target_length, dtype, device)
    tokenizer = base.tokenizer() if base.has_tokenizer() else None
    parts = read_ids(corpus, tokenizer, base.config, max_tokens)
    if protocol:
        authors_windows(sum(map(len, parts)), max(lengths))
    theirs = [measure_authors(made, parts, length) for length in lengths] if protocol else []
    results = measure(made, parts, lengths, stride, bins)
    for result, authors in zip(results, theirs, strict=False):
        result["authors"] = authors
    return {
        "results": results,
        "model": os.fspath(model),
        "adapter": None if adapter is None else os.fspath(adapter),
        "data": os.fspath(data),
        "left_out": corpus.sentence(),
        "longest_document": max(map(len, parts)),
        "max_tokens": max_tokens,
        "attention": "dense",
        "device": device,
        "stride": stride,
        "rope": {"type": made.config.rope.type, "factor": made.config.rope.factor},
    }


def text(results: dict) -> str:
    """The result of `run` as a table. A length that no document has gets no number."""
    lines = [f"{'length':>8} {'tokens':>10} {'loss':>8} {'perplexity':>11}"]
    longest = results["longest_document"]
    for r in results["results"]:
        if r["length"] > longest:
            lines.append(f"{r['length']:>8} {'-':>10} {'-':>8} {'-':>11}")
        else:
            lines.append(f"{r['length']:>8} {r['tokens']:>10,} {r['loss']:>8.4f} {r['perplexity']:>11.3f}")
    if "authors" in results["results"][0]:
        lines.append("\nby the authors' protocol:")
        lines.append(f"{'length':>8} {'windows':>10} {'loss':>8} {'perplexity':>11} {'accuracy':>9}")
    for r in results["results"]:
        if a := r.get("authors"):
            lines.append(
                f"{r['length']:>8} {a['windows']:>10,} {a['loss']:>8.4f} {a['perplexity']:>11.3f} "
                f"{a['accuracy']:>9.4f}"
            )
    beyond = [f"{r['length']:,}" for r in results["results"] if r["length"] > longest]
    short = f"no document has {', '.join(beyond)} tokens; the longest has {longest:,}" if beyond else None
    if short and results["max_tokens"] is not None:
        short += f" (max_tokens is {results['max_tokens']:,})"
    return "\n".join([*lines, *filter(None, [results["left_out"], short])])
