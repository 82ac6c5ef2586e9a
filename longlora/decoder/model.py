"""A model that trains and evaluates. Its memory is one arena, for weights, masters, moments and a pass.

The network says what lies in the arena and computes. The model fills the arena, hands in batches and reads
losses.
"""

import math
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from longlora import _C
from longlora.decoder import rope as rope_
from longlora.decoder.config import ModelConfig
from longlora.decoder.lora import LoraConfig
from longlora.decoder.network import Batch, Network
from longlora.decoder.scores import score
from longlora.decoder.weights import DTYPES, KINDS
from longlora.device import CPU, Inputs, host, send
from longlora.errors import UserError
from longlora.memory.plan import Plan
from longlora.ops import BOUNDARIES, IGNORE, SHIFTS

BATCHES = 8  # shapes whose views are remembered: ragged lengths make many


class Model:
    """A decoder of `config` on `device`, "cpu" or "cuda:0".

    dtype: of weights and activations.
    lora: None is full fine-tuning.
    rope: the positions of this run, by default the config's.
    plan: of the same config, dtype and lora. The model trains on batches up to the plan's size. Without a
        plan it evaluates only.
    attention: dict(group_size, boundary, shift) of training; None is dense. Evaluation is always dense.

    load() or init_random() fills it. Both leave LoRA at its start: A random by `seed`, B zero. UserError for
    a dtype that does not exist or cannot be trained.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: str = "float32",
        lora: LoraConfig | None = None,
        rope: rope_.Rope | None = None,
        plan: Plan | None = None,
        attention: dict[str, Any] | None = None,
        seed: int = 0,
        device: str = CPU,
    ):
        if dtype not in DTYPES:
            raise UserError(f"dtype should be one of {', '.join(DTYPES)}, got {dtype!r}")
        if plan is not None and dtype == "float16":
            raise UserError("float16 cannot be trained without loss scaling; train in float32 or bfloat16")
        self.config, self.lora, self.rope, self.seed = config, lora, rope or config.rope, seed
        self.dtype: Any = dtype
        self.plan: Any = plan  # a Plan or None
        self.device = device
        self.network = Network(config, lora)
        self._attention = _scalars(attention)
        layout = self.network.lay_out(dtype, training=plan is not None)
        self._activations = size = layout.size
        if plan is not None:
            size += self._needs(plan.batch_size, plan.sequence_length).layout.size
        self.arena = _C.Tensor((size,), "uint8", device)
        self.network.bind(self.arena)
        self._places = {name: (w, rows) for w in self.network.weights() for name, rows in w.members.items()}
        self.parameters = self.network.parameters()
        self._batches: dict[tuple[int, int], Batch] = {}
        self._evaluation: Batch | None = None
        self._tables: list[Any] | None = None
        self._inputs = Inputs()
        self._init_lora()

    # ---- weights ---------------------------------------------------------------------------------

    @property
    def kinds(self) -> list[str]:
        """The kinds of what is trained, in the order of KINDS."""
        found = {p.kind for p in self.parameters}
        return [kind for kind in KINDS if kind in found]

    def names(self) -> list[str]:
        """The Hugging Face names of all tensors, LoRA's too."""
        return list(self._places)

    def tensor(self, name: str) -> _C.Tensor:
        """The Tensor of that name: the float32 master if it is trained, else what the ops read."""
        weight, rows = self._places[name]
        return (weight.data if weight.value is None else weight.value)[rows]

    def tensors(self) -> dict[str, _C.Tensor]:
        """The masters of what is trained, Hugging Face name -> float32 Tensor."""
        return {p.name: p.value for p in self.parameters}

    def refresh(self) -> None:
        """Write every working copy, after the masters (Parameter.value) have changed."""
        for p in self.parameters:
            p.publish()

    def load(self, source: Any) -> "Model":
        """Read every weight of `source`, which files.open_model gives -> self.

        The weights are copied even where the file has the run's dtype. Those of one product lie under each
        other here and not in the file, and a mapped file that somebody truncates or overwrites would end or
        change the run hours later. UserError if `source` is another model's, or a weight is not finite.
        """
        names, wanted = source.names(), self.network.tensor_shapes()
        if set(names) != set(wanted):
            odd = sorted(set(names) ^ set(wanted))
            raise UserError(f"{source.path}: does not fit the model's config: {odd[0]}")
        np.empty(16 << 20, np.uint8)  # freed at once; the C library then keeps the memory of smaller arrays
        # NumPy converts without the interpreter's lock.
        with ThreadPoolExecutor(_C.get_num_threads()) as pool:
            for _ in pool.map(lambda name: source.read(name, self.tensor(name)), names):
                pass
        self.refresh()
        return self

    def load_adapter(self, tensors: dict[str, np.ndarray], lora: LoraConfig | None = None) -> "Model":
        """Copy an adapter's float32 arrays, by Hugging Face name, into place -> self.

        UserError for a rank or scale in `lora`, or a tensor, that this model does not have.
        """
        if lora is not None and self.lora is not None:
            ours = self.lora
            if (lora.r, lora.scale) != (ours.r, ours.scale):
                raise UserError(
                    f"adapter: r and scale should be {ours.r} and {ours.scale:g}, "
                    f"got {lora.r} and {lora.scale:g}"
                )
        for name, array in tensors.items():
            if name not in self._places:
                raise UserError(f"adapter: the model has no {name}")
            shape = tuple(self.tensor(name).shape)
            if tuple(array.shape) != shape:
                raise UserError(f"adapter: {name} should have shape {list(shape)}, got {list(array.shape)}")
        for name, array in tensors.items():
            self.tensor(name).copy_(array)
        self.refresh()
        return self

    def init_random(self, seed: int | None = None) -> "Model":
        """Draw the weights as transformers does: normal(0, initializer_range), biases 0, norms 1 -> self.

        The seed and a tensor's name alone decide its values.
        """
        seed = self.seed if seed is None else seed
        for name in self.network.tensor_shapes():
            kind = self._places[name][0].kind
            if kind in ("norm", "bias"):
                self.tensor(name).fill(1 if kind == "norm" else 0)
            else:
                self.draw(name, seed, self.tensor(name), self.config.initializer_range, normal=True)
        self.refresh()
        return self

    def _init_lora(self):
        """As PEFT: A is kaiming-uniform with a = sqrt(5), which is uniform within 1/sqrt(features in).

        B stays zero.
        """
        for name, (weight, _) in self._places.items():
            if weight.kind == "lora_A":
                self.draw(name, self.seed, self.tensor(name), 1 / math.sqrt(weight.shape[1]))
        for p in self.parameters:
            if p.kind == "lora_A":
                p.publish()

    @staticmethod
    def draw(name: str, seed: int, out: _C.Tensor, width: float, normal: bool = False) -> None:
        """Fill `out` [N,C] with random numbers: normal(0, width), or uniform in -width .. width."""
        random = np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(name.encode())]))
        rows, columns = out.shape
        step = max(1, (1 << 18) // max(columns, 1))
        for start in range(0, rows, step):
            count = min(step, rows - start)
            if normal:
                part = random.standard_normal((count, columns), np.float32) * np.float32(width)
            else:
                part = random.random((count, columns), np.float32) * np.float32(2 * width) - np.float32(width)
            out[start : start + count].copy_(part)

    def zero_grad(self) -> None:
        """Set all gradients to 0. Every micro-batch adds to them."""
        self.network.gradients.fill(0)

    # ---- batches ---------------------------------------------------------------------------------

    def _needs(self, B, T):
        return self.network.activations(B, T, self.dtype, self.plan.checkpointing)

    def _batch(self, B, T):
        """The Batch of a training pass over [B,T] tokens, made once per shape."""
        found = self._batches.get((B, T))
        if found is None:
            needs = self._needs(B, T)
            if needs.layout.size > self.arena.shape[0] - self._activations:
                raise UserError(
                    f"a batch of {B} x {T} tokens is larger than the planned {self.plan.batch_size} x "
                    f"{self.plan.sequence_length}"
                )
            if len(self._batches) >= BATCHES:
                self._batches.clear()
            found = self._batches[B, T] = Batch(_C, self.network, needs, self.arena, self._activations)
        return found

    def _evaluation_batch(self, B, T):
        """The Batch of an evaluation, kept for the next. It borrows training's memory if that is enough."""
        found = self._evaluation
        if found is None or (found.B, found.T) != (B, T):
            self._evaluation = found = None  # its memory is free before the next is taken
            needs = self.network.activations(B, T, self.dtype, None)
            arena, start = self.arena, self._activations
            if needs.layout.size > arena.shape[0] - start:
                arena, start = _C.Tensor((needs.layout.size,), "uint8", self.device), 0
            found = self._evaluation = Batch(_C, self.network, needs, arena, start)
        return found

    def _rope_tables(self, length):
        """cos and sin of at least `length` positions."""
        if self._tables is None or self._tables[0].shape[0] < length:
            longest = max(length, self.plan.sequence_length if self.plan is not None else 0)
            tables = rope_.tables(self.rope, self.config.head_dim, longest)
            self._tables = [send(x, self.device) for x in tables]
        return self._tables

    def _fill(self, batch, ids, attention, positions, cu_seqlens):
        """Write ids [M] and say how they attend. attention: as Batch.attend takes it, None is dense.

        positions: [M], or None for those of the rows, or of the packed documents.
        """
        if cu_seqlens is not None and positions is None:
            positions = np.arange(batch.T) - np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens))
        longest = batch.T if positions is None else int(positions.max(initial=-1)) + 1
        batch.attend(
            attention or (max(batch.T, 1), BOUNDARIES["split"], SHIFTS["none"]),
            self._rope_tables(longest),
            positions is not None,
            None if cu_seqlens is None else len(cu_seqlens),
        )
        if positions is not None:
            self._inputs.put(batch.positions, positions.astype(np.int32).reshape(batch.B, batch.T))
        if cu_seqlens is not None:
            self._inputs.put(batch.cu_seqlens, cu_seqlens)
        self._inputs.put(batch.ids, ids)

    # ---- training --------------------------------------------------------------------------------

    def train_microbatch(
        self,
        ids: np.ndarray,
        targets: np.ndarray,
        loss_scale: float,
        read: bool = True,
        cu_seqlens: Any = None,
    ) -> float | None:
        """Add the gradients of loss_scale times the sum of the losses -> that sum.

        ids, targets: int32 [B,T]; a target of -100 is not scored.
        loss_scale: 1 over the target tokens of the whole optimizer step, so accumulation changes nothing.
        read: False does not wait for a GPU, and gives None.
        cu_seqlens: boundaries of packed documents, int32 [S] from 0 to B T over the tokens of all rows.
            Attention and positions restart in each document.

        UserError if the sum is not finite; the gradients are then useless. ValueError for boundaries that do
        not rise from 0 to B T.
        """
        if self.plan is None:
            raise UserError("this model was made without a plan, so it can only evaluate")
        network, batch = self.network, self._batch(*_rows(ids.shape, cu_seqlens))
        ids, targets = (np.ascontiguousarray(x, np.int32).reshape(-1) for x in (ids, targets))
        self._fill(batch, ids, self._attention, None, _boundaries(cu_seqlens, ids.size))
        network.forward(batch)
        self._inputs.put(batch.targets, targets)
        self._inputs.put(batch.dlosses, np.where(targets == IGNORE, np.float32(0), np.float32(loss_scale)))
        network.head_backward(batch)
        if network.embedding.learns:
            self._inputs.put(batch.order, np.argsort(ids, kind="stable").astype(np.int32))
        network.layers_backward(batch)
        if not read:
            return None
        total = float(host(batch.losses).sum(dtype=np.float64))
        if not math.isfinite(total):
            raise UserError(f"the loss is not finite: {total}")
        return total

    # ---- evaluation ------------------------------------------------------------------------------

    def _forward(self, ids, positions, cu_seqlens):
        """Run an evaluation up to the head -> its Batch, with the head's input in n."""
        batch = self._evaluation_batch(*_rows(ids.shape, cu_seqlens))
        if positions is not None:
            positions = np.ascontiguousarray(positions, np.int32).reshape(-1)
            if len(positions) != ids.size or positions.min(initial=0) < 0:
                raise ValueError("positions should be integers from 0, one for each id")
        ids = np.ascontiguousarray(ids, np.int32).reshape(-1)
        self._fill(batch, ids, None, positions, _boundaries(cu_seqlens, ids.size))
        self.network.forward(batch)
        return batch

    def losses(
        self, ids: np.ndarray, targets: np.ndarray, *, positions: Any = None, cu_seqlens: Any = None
    ) -> np.ndarray:
        """Compute each token's loss with dense attention -> float32 like ids, 0 where the target is -100.

        ids, targets: int32 [T] or [B,T].
        positions: for rope, int32 like ids. By default each row has 0 to T-1, and each packed document starts
            at 0.
        cu_seqlens: boundaries of packed documents, int32 [S] from 0 to B T over the tokens of all rows.

        ValueError for boundaries that do not rise from 0 to B T, and for negative positions.
        """
        shape = ids.shape
        batch = self._forward(ids, positions, cu_seqlens)
        self._inputs.put(batch.targets, np.ascontiguousarray(targets, np.int32).reshape(-1))
        self.network.losses(batch)
        return np.array(host(batch.losses)).reshape(shape)

    def scores(self, ids: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Score each target with dense attention, a few rows of logits at a time.

        ids, targets: int32 [T]; every target is a token.
        Returns their log-probabilities, float64 [T], and whether each is the likeliest token, bool [T].
        """
        batch = self._forward(ids, None, None)
        return score(self.network.head.data, batch.n, targets)

    def logits(self, ids: np.ndarray, *, positions: Any = None, cu_seqlens: Any = None) -> np.ndarray:
        """Compute all logits at once, for short texts -> float32 [T,V] or [B,T,V]. Arguments as in losses."""
        shape, V = ids.shape, self.config.vocab_size
        batch = self._forward(ids, positions, cu_seqlens)
        rows = _C.Tensor((batch.B * batch.T, V), self.dtype, self.device)
        out = _C.Tensor(rows.shape, "float32", self.device)
        self.network.logits(batch, rows)
        _C.cast(out, rows)
        return host(out).reshape(*shape, V)


def _rows(shape, cu_seqlens):
    """B and T of ids of `shape`, [T] or [B,T]. Packed documents lie in one row."""
    B, T = (1, *shape)[-2:]
    return (B, T) if cu_seqlens is None else (1, B * T)


def _boundaries(cu_seqlens, tokens):
    """cu_seqlens as an int32 ndarray; ValueError unless it rises from 0 to `tokens`."""
    if cu_seqlens is None:
        return None
    boundaries = np.ascontiguousarray(cu_seqlens, np.int32)
    rises = (
        boundaries.ndim == 1 and len(boundaries) and not boundaries[0] and (np.diff(boundaries) >= 0).all()
    )
    if not rises or boundaries[-1] != tokens:
        raise ValueError(f"cu_seqlens should rise from 0 to {tokens}, got {boundaries.tolist()[:8]}")
    return boundaries


def _scalars(attention):
    """(group_size, boundary, shift) as the op takes them; None where dense."""
    if attention is None:
        return None
    boundary, shift = attention.get("boundary", "split"), attention.get("shift", "half")
    return attention["group_size"], BOUNDARIES[boundary], SHIFTS[shift]
