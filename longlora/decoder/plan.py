"""The plan of a training run: what the network declares and what its ops take in a dry run, added up, from the config alone."""

import functools
import math
from dataclasses import replace

import numpy as np

from longlora.decoder.layer import RECOMPUTE
from longlora.decoder.lora import LoraConfig
from longlora.decoder.network import Batch, Network
from longlora.decoder.weights import DTYPES
from longlora.device import CPU, free_memory
from longlora.errors import UserError
from longlora.memory.dry_run import Recorder, untouched
from longlora.memory.plan import GROWTH, Plan, available_memory, choose, own_memory, what_would_fit
from longlora.ops import BOUNDARIES, SHIFTS


def plan(
    config,
    *,
    dtype="float32",
    batch_size=1,
    sequence_length,
    group_size=None,
    lora=None,
    checkpointing="auto",
    memory=None,
    device=CPU,
    packed=False,
):
    """What training of `config` (a ModelConfig) takes -> Plan. It reads no weight and takes less than a second.

    lora: a LoraConfig; None is full fine-tuning. group_size: None is dense attention. checkpointing: "auto" is the fastest of
    none, minimal and full that fits in `memory`. memory: bytes, by default what `device` has now. packed: documents are packed. UserError for a choice that does not exist.
    """
    if checkpointing not in ("auto", *RECOMPUTE):
        raise UserError(f"checkpointing should be one of auto, {', '.join(RECOMPUTE)}, got {checkpointing!r}")
    if dtype not in DTYPES:
        raise UserError(f"dtype should be one of {', '.join(DTYPES)}, got {dtype!r}")
    for name, value in (("batch_size", batch_size), ("sequence_length", sequence_length)):
        if value < 1:
            raise UserError(f"{name} should be at least 1, got {value}")
    if memory is None:
        memory = own_memory() + available_memory() if device == CPU else free_memory(device)
    given = dict(
        dtype=dtype,
        batch_size=batch_size,
        length=sequence_length,
        group_size=group_size,
        lora=lora,
        packed=packed,
        device=device,
    )

    def parts(**changed):
        return _parts(config, **{**given, **changed})

    choices = RECOMPUTE if checkpointing == "auto" else (checkpointing,)
    chosen, found = choose(((choice, parts(recompute=choice)) for choice in choices), memory)
    changes = ()
    if sum(found.values()) > memory:
        steps = _steps(chosen, dtype, batch_size, sequence_length, lora)
        given["recompute"] = chosen
        changes = what_would_fit(lambda **changed: sum(parts(**changed).values()), steps, memory)
    return Plan(
        config, dtype, batch_size, sequence_length, group_size, lora, chosen, memory, found, changes, device
    )


def _steps(recompute, dtype, batch_size, length, lora):
    """The changes to consider: those that cost time, then precision, batch, what is trained, length."""
    for choice in RECOMPUTE[RECOMPUTE.index(recompute) + 1 :]:
        yield f"--checkpointing {choice}", "recompute", choice
    if dtype == "float32":
        yield "--dtype bfloat16", "dtype", "bfloat16"
    if batch_size > 1:
        yield "--per-device-train-batch-size 1, the rest by gradient accumulation", "batch_size", 1
    if lora is None:
        yield "LoRA instead of --full", "lora", LoraConfig()
    elif {"embed_tokens", "lm_head"} & set(lora.modules_to_save):
        rest = tuple(name for name in lora.modules_to_save if name not in ("embed_tokens", "lm_head"))
        yield "no training of the embedding", "lora", replace(lora, modules_to_save=rest)
    for i in range(1, 8):
        if length >> i:
            yield f"--sequence-length {length >> i}", "length", length >> i


def _parts(config, *, dtype, batch_size, length, group_size, lora, packed, recompute, device):
    """-> dict of what the run takes, name -> bytes."""
    parts = dict(_weights(config, dtype, lora))
    parts |= Network(config, lora).activations(batch_size, length, dtype, recompute).layout.parts
    parts["batch and tables"] += 2 * 4 * length * config.head_dim // 2
    ops = Recorder(device)
    B, T = (1, batch_size * length) if packed else (batch_size, length)
    _dry_run(ops, config, dtype, B, T, group_size, lora, recompute, packed)
    if device == CPU:
        parts["batch and tables"] += (
            4 * (6 if packed else 4) * B * T
        )  # NumPy's ids, targets, order, positions
        parts["scratch of the ops"] = ops.bytes
        parts["runtime"] = own_memory() + GROWTH
    else:
        parts["workspace of the ops"] = ops.bytes
    return {name: size for name, size in parts.items() if size}


@functools.lru_cache(8)
def _weights(config, dtype, lora):
    """The parts of the weights, which most alternatives of a plan share."""
    return Network(config, lora).lay_out(dtype, training=True).parts


def _dry_run(ops, config, dtype, B, T, group_size, lora, recompute, packed):
    """Runs a training step of a network of a few layers with `ops` in place of the ops.

    It has the lowest two layers of each kind, since the backward may end in the lowest.
    """
    kinds = config.rope_layers or (True,) * config.num_hidden_layers
    layers = [i for i, kind in enumerate(kinds) if kinds[:i].count(kind) < 2]
    network = Network(config, lora, layers)
    weights = network.lay_out(dtype, training=True)
    needs = network.activations(B, T, dtype, recompute)
    arena = untouched(weights.size + needs.layout.size)
    network.bind(arena)
    batch = Batch(ops, network, needs, arena, weights.size)
    batch.attention = group_size or T, BOUNDARIES["split"], SHIFTS["half" if group_size else "none"]
    tables = (T, config.head_dim // 2)
    batch.cos = batch.sin = untouched(4 * math.prod(tables)).view(tables, "float32")
    if packed:
        batch.positions, batch.cu_seqlens = batch.positions_room, batch.cu_seqlens_room[:2]
        batch.cu_seqlens.copy_(np.array([0, T], np.int32))
    network.forward(batch)
    network.head_backward(batch)
    network.layers_backward(batch)
    squares = untouched(8).view((1,), "float64")
    for p in network.parameters():  # the optimizer's gradient norm
        ops.sum_squares(squares, p.grad.reshape((math.prod(p.shape),)))
