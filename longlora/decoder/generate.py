"""Passes over a model with a cache: prompts in chunks, and one new token of several sequences at a time."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from longlora import _C
from longlora.decoder import rope
from longlora.decoder.cache import Cache
from longlora.decoder.model import Model
from longlora.decoder.network import Batch
from longlora.decoder.scores import score
from longlora.device import CPU, Inputs, host, send

# Tokens of a prompt in one pass: the activations of a pass are bounded, whatever the prompt. A long pass
# packs the weights less often. After a short one others advance, and prompts share what they begin with.
CHUNK, LONG_CHUNK = 512, 2048
# Sequences of a pass with one token each. Up to 16 rows, a product computes each row as it does alone.
TOGETHER = 16
BATCHES = 8  # shapes whose views are remembered


class RecordedOps:
    """Has a method for every op, which notes the call. `run` makes the noted calls in their order.

    The arrays are Tensors on the CPU. See csrc/python/record.c for why.
    """

    def __init__(self) -> None:
        self._recording = _C.Recording()
        self.run = self._recording.run

    def __getattr__(self, op: str) -> Callable[..., None]:
        return functools.partial(self._recording.add, op)


class Generator:
    """Continues the sequences in `cache`, a Cache, by `model`, a Model without LoRA.

    Attention is dense and exact. A sequence's logits depend on its own tokens and on how they were cut into
    calls, not on other sequences.
    """

    def __init__(self, model: Model, cache: Cache, chunk: int = CHUNK):
        self.model, self.cache, self.chunk = model, cache, min(chunk, cache.longest)
        network, V = model.network, model.config.vocab_size
        shapes = (1, self.chunk), (min(TOGETHER, cache.rows), 1)
        size = max(network.activations(*shape, model.dtype, None).layout.size for shape in shapes)
        self._arena = _C.Tensor((size,), "uint8", model.device)
        self._logits = _C.Tensor((min(TOGETHER, cache.rows), V), "float32", model.device)
        D = model.config.head_dim
        places = cache.limit or self.chunk  # without a limit, the tables are written before each pass
        self._tables = [_C.Tensor((places, D // 2), "float32", model.device) for _ in range(2)]
        if cache.limit is not None:
            for table, values in zip(self._tables, rope.tables(model.rope, D, cache.limit)):
                table.copy_(values)
        self._head = network.head.data
        self._batches: dict[tuple[int, int], Batch] = {}
        self._inputs = Inputs()

    def extend(
        self, row: int, ids: np.ndarray, score: Callable[[np.ndarray], None] | None = None
    ) -> np.ndarray:
        """Add the tokens `ids`, int32 [S] with S >= 1, to the sequence of `row` -> logits of the next, [V].

        score: is called with the logits after each token, float32 [N,V], a few tokens at a time.
        Tokens go through the model in chunks, so memory does not grow with S. ValueError if they do not fit
        in the cache.
        """
        ids = np.ascontiguousarray(ids, np.int32)
        for start in range(0, len(ids), self.chunk):
            part = ids[start : start + self.chunk]
            batch = self._pass([row], part[None])
            if score is not None:
                together = self._logits.shape[0]
                for first in range(0, len(part), together):
                    score(self._next(batch, first, min(together, len(part) - first)))
        return self._next(batch, len(part) - 1, 1)[0]

    def step(self, rows: Sequence[int], ids: Sequence[int]) -> np.ndarray:
        """Add one token to each of several sequences -> logits of the next, float32 [B,V].

        rows: their rows of the cache, all different. ids: their tokens. ValueError if one does not fit.
        """
        found = []
        for start in range(0, len(ids), TOGETHER):
            part = np.asarray(ids[start : start + TOGETHER], np.int32)
            batch = self._pass(rows[start : start + TOGETHER], part[:, None])
            found.append(self._next(batch, 0, len(part)))
        return np.concatenate(found)

    def score(
        self, rows: Sequence[int], ids: np.ndarray, places: np.ndarray, targets: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Add tokens to several sequences, and score what may come after some of them.

        rows: their rows of the cache, all different. ids: int32 [B,S], at most `chunk` tokens together.
        places: int [N], tokens of ids.reshape(-1). targets: int [N], a token that may come after each.
        Returns the log-probability of each target, float64 [N], and whether it is the likeliest token. No
        other logits are computed. ValueError if the tokens do not fit in the cache.
        """
        batch = self._pass(rows, ids)
        n = _C.Tensor((len(places), batch.n.shape[1]), batch.n.dtype, self.model.device)
        _C.embedding_forward(n, batch.n, send(np.asarray(places, np.int32), self.model.device))
        return score(self._head, n, targets)

    def _pass(self, rows, ids):
        """Run ids [B,S] through the layers -> the Batch, with the head's input in n."""
        (B, S), cache = ids.shape, self.cache
        rows = np.asarray(rows, np.int32)
        lengths = cache.make_room(rows, S)
        positions, put = cache.lengths[rows][:, None] + np.arange(S), self._inputs.put
        if cache.limit is None:
            first = int(positions.min())
            for table, values in zip(
                self._tables, rope.tables(self.model.rope, self.model.config.head_dim, S, first)
            ):
                put(table[:S], values)
            positions -= first
        batch = self._batches.get((B, S))
        if batch is None:
            if len(self._batches) >= BATCHES:
                self._batches.clear()
            network = self.model.network
            needs = network.activations(B, S, self.model.dtype, None)
            if needs.layout.size > self._arena.shape[0]:  # more rows take a little more than one of a chunk
                self._batches.clear()
                self._arena = _C.Tensor((needs.layout.size,), "uint8", self.model.device)
            batch = self._batches[B, S] = Batch(_C, network, needs, self._arena, 0)
        batch.attend_to_cache(cache.layers, self._tables)
        put(batch.rows, rows)
        put(batch.lengths, lengths)
        put(batch.positions, positions.astype(np.int32))
        put(batch.ids, ids.reshape(-1))
        self._forward(batch)
        cache.add(rows, S)
        return batch

    def _forward(self, batch):
        """Run the layers. On the CPU the first pass of a batch records the calls of its ops, and later passes
        replay the recording. A streaming cache that has moved its window needs a new recording."""
        if self.model.device != CPU:
            return self.model.network.forward(batch)
        if batch.recorded is not batch.cache:
            batch.ops, batch.recorded = RecordedOps(), None
            self.model.network.forward(batch)
            batch.recorded = batch.cache  # last: Ctrl-C may end the recording half way
        batch.ops.run()

    def _next(self, batch: Any, first: int, count: int) -> np.ndarray:
        """Logits, float32 [count,V], after `count` tokens of a pass from token `first` on."""
        out = self._logits[:count]
        _C.matmul(out, batch.n[first : first + count], self._head.T, 1.0, 0.0)
        return host(out).copy()
