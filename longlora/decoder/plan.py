"""The plan of a training run, from the config alone: the network's own needs, and its ops' in a dry run."""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from longlora import job
from longlora.decoder.config import ModelConfig
from longlora.decoder.layer import RECOMPUTE
from longlora.decoder.lora import LoraConfig
from longlora.decoder.network import Batch, Network
from longlora.decoder.weights import DTYPES
from longlora.device import CPU, free_memory
from longlora.errors import UserError
from longlora.memory.dry_run import Recorder, untouched
from longlora.memory.plan import GROWTH, Plan, choose, own_memory, what_would_fit
from longlora.ops import BOUNDARIES, SHIFTS


def plan(
    config: ModelConfig,
    *,
    dtype: str = "float32",
    batch_size: int = 1,
    sequence_length: int,
    group_size: int | None = None,
    lora: LoraConfig | None = None,
    checkpointing: str = "auto",
    memory: int | None = None,
    device: str = CPU,
    packed: bool = False,
) -> Plan:
    """Plan the memory of a training run. It reads no weight and takes less than a second.

    group_size: None is dense attention.
    lora: None is full fine-tuning.
    checkpointing: "auto" is the fastest of none, minimal and full that fits in `memory`.
    memory: bytes, by default what `device` has now.
    packed: batches come with the boundaries of packed documents.

    UserError for a choice that does not exist.
    """
    if checkpointing not in ("auto", *RECOMPUTE):
        raise UserError(f"checkpointing should be one of auto, {', '.join(RECOMPUTE)}, got {checkpointing!r}")
    if dtype not in DTYPES:
        raise UserError(f"dtype should be one of {', '.join(DTYPES)}, got {dtype!r}")
    for name, value in (("batch_size", batch_size), ("sequence_length", sequence_length)):
        if value < 1:
            raise UserError(f"{name} should be at least 1, got {value}")
    if memory is None:
        memory = job.memory(own_memory()) if device == CPU else free_memory(device)
    run = _Run(config, dtype, batch_size, sequence_length, group_size, lora, packed, device, RECOMPUTE[0])
    choices = RECOMPUTE if checkpointing == "auto" else (checkpointing,)
    run, parts = choose(((choice, _parts(choice)) for choice in map(run.with_recompute, choices)), memory)
    changes: tuple[str, ...] = ()
    if sum(parts.values()) > memory:
        changes = what_would_fit(lambda **c: sum(_parts(replace(run, **c)).values()), _steps(run), memory)
    return Plan(
        config=config,
        dtype=dtype,
        batch_size=batch_size,
        sequence_length=sequence_length,
        group_size=group_size,
        lora=lora,
        checkpointing=run.recompute,
        memory=memory,
        parts=parts,
        changes=changes,
        device=device,
    )


@dataclass(frozen=True)
class _Run:
    """The choices that decide how much memory a run takes."""

    config: ModelConfig
    dtype: str
    batch_size: int
    length: int
    group_size: int | None
    lora: LoraConfig | None
    packed: bool
    device: str
    recompute: str

    def with_recompute(self, choice: str) -> "_Run":
        return replace(self, recompute=choice)


def _steps(run: _Run) -> Iterator[tuple[str, str, Any]]:
    """The changes to consider, as what_would_fit takes them."""
    for choice in RECOMPUTE[RECOMPUTE.index(run.recompute) + 1 :]:
        yield f"--checkpointing {choice}", "recompute", choice
    if run.dtype == "float32":
        yield "--dtype bfloat16", "dtype", "bfloat16"
    if run.batch_size > 1:
        yield "--per-device-train-batch-size 1, the rest by gradient accumulation", "batch_size", 1
    if run.lora is None:
        yield "LoRA instead of --full", "lora", LoraConfig()
    elif {"embed_tokens", "lm_head"} & set(run.lora.modules_to_save):
        rest = tuple(name for name in run.lora.modules_to_save if name not in ("embed_tokens", "lm_head"))
        yield "no training of the embedding", "lora", replace(run.lora, modules_to_save=rest)
    for i in range(1, 8):
        if run.length >> i:
            yield f"--sequence-length {run.length >> i}", "length", run.length >> i


def _parts(run: _Run) -> dict[str, int]:
    """What the run takes, name -> bytes."""
    B, T = _rows(run)
    parts = dict(_weights(run.config, run.dtype, run.lora))
    parts |= Network(run.config, run.lora).activations(B, T, run.dtype, run.recompute).layout.parts
    parts["batch and tables"] += 2 * 4 * run.length * run.config.head_dim // 2
    ops = Recorder(run.device)
    _dry_run(run, ops)
    if run.device == CPU:
        parts["batch and tables"] += 4 * 4 * B * T  # NumPy's ids and targets, their order, dlosses
        parts["scratch of the ops"] = ops.bytes
        parts["runtime"] = own_memory() + GROWTH
    else:
        parts["workspace of the ops"] = ops.bytes
    return {name: size for name, size in parts.items() if size}


def _rows(run):
    """B, T of a batch. Packed documents lie in one row."""
    return (1, run.batch_size * run.length) if run.packed else (run.batch_size, run.length)


@functools.lru_cache(8)
def _weights(config, dtype, lora):
    """The parts of the weights: several alternatives of a plan share them."""
    return Network(config, lora).lay_out(dtype, training=True).parts


def _dry_run(run: _Run, ops: Recorder) -> None:
    """Run a training step of a few layers with `ops` in place of the ops.

    They are the lowest two layers of each kind, since the backward may end in the lowest.
    """
    (B, T), D = _rows(run), run.config.head_dim
    kinds = run.config.rope_layers or (True,) * run.config.num_hidden_layers
    layers = [i for i, kind in enumerate(kinds) if kinds[:i].count(kind) < 2]
    network = Network(run.config, run.lora, layers)
    weights = network.lay_out(run.dtype, training=True)
    needs = network.activations(B, T, run.dtype, run.recompute)
    arena = untouched(weights.size + needs.layout.size)
    network.bind(arena)
    batch = Batch(ops, network, needs, arena, weights.size)
    attention = run.group_size or T, BOUNDARIES["split"], SHIFTS["half" if run.group_size else "none"]
    table = untouched(4 * T * (D // 2)).view((T, D // 2), "float32")
    batch.attend(attention, (table, table), run.packed, 2 if run.packed else None)
    network.forward(batch)
    network.head_backward(batch)
    network.layers_backward(batch)
    squares = untouched(8).view((1,), "float64")
    for p in network.parameters():  # the optimizer's gradient norm
        ops.sum_squares(squares, p.grad.reshape((math.prod(p.shape),)))
