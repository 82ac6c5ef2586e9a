"""The plan of generation, from the config alone: weights, the cache, and a pass in a dry run."""

from dataclasses import replace
from typing import Any

from longlora import job
from longlora.decoder.cache import layout_of
from longlora.decoder.config import ModelConfig
from longlora.decoder.generate import CHUNK, TOGETHER
from longlora.decoder.network import Batch, Network
from longlora.decoder.streaming import Window
from longlora.decoder.weights import DTYPES
from longlora.device import CPU, free_memory
from longlora.errors import UserError
from longlora.memory.dry_run import Recorder, untouched
from longlora.memory.plan import GROWTH, GenerationPlan, Parts, own_memory, what_would_fit

MOST_TOKENS, MOST_ROWS = 1 << 24, 1 << 12


def plan(
    config: ModelConfig,
    *,
    context: int | Window,
    rows: int = 1,
    dtype: str = "float32",
    cache_dtype: str | None = None,
    chunk: int = CHUNK,
    device: str = CPU,
    memory: int | None = None,
) -> GenerationPlan:
    """Plan the memory of generation with `rows` sequences of up to `context` tokens. It reads no weight.

    context: or the Window of a sequence without end.
    cache_dtype: of keys and values, by default dtype. chunk: tokens of a pass, unless there is a Window.
    memory: bytes, by default what `device` has now.
    UserError for a choice that does not exist.
    """
    for name, value in (("dtype", dtype), ("cache_dtype", cache_dtype or dtype)):
        if value not in DTYPES:
            raise UserError(f"{name} should be one of {', '.join(DTYPES)}, got {value!r}")
    tokens = context.size if isinstance(context, Window) else context
    for name, number, most in (("context", tokens, MOST_TOKENS), ("rows", rows, MOST_ROWS)):
        if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= most:
            raise UserError(f"{name} should be an integer from 1 to {most}, got {number!r}")
    if memory is None:
        memory = job.memory(own_memory()) if device == CPU else free_memory(device)
    asked: dict[str, Any] = dict(context=context, rows=rows, dtype=dtype, cache_dtype=cache_dtype)

    def parts_of(**changes: Any) -> Parts:
        changed = {**asked, **changes}
        changed["cache_dtype"] = changed["cache_dtype"] or changed["dtype"]
        return _parts(config, chunk=chunk, device=device, **changed)

    parts = parts_of()
    changes: tuple[str, ...] = ()
    cache_dtype = cache_dtype or dtype
    if sum(parts.values()) > memory:
        steps: list[tuple[str, str, Any]] = []
        if cache_dtype == "float32":
            steps.append(("--cache-dtype bfloat16", "cache_dtype", "bfloat16"))
        if dtype == "float32":
            steps.append(("--dtype bfloat16", "dtype", "bfloat16"))
        steps += [(f"{rows >> i} rows", "rows", rows >> i) for i in range(1, 6) if rows >> i]
        for size in (tokens >> i for i in range(1, 10)):
            if size and not isinstance(context, Window):
                steps.append((f"--context {size}", "context", size))
            elif isinstance(context, Window) and size > context.start:
                smaller = replace(context, recent=size - context.start)
                steps.append((f"--recent-size {smaller.recent}", "context", smaller))
        changes = what_would_fit(lambda **c: sum(parts_of(**c).values()), steps, memory)
    return GenerationPlan(config, dtype, cache_dtype, tokens, rows, device, memory, parts, changes)


def _parts(config, *, context, rows, dtype, cache_dtype, chunk, device):
    parts = dict(Network(config).lay_out(dtype, training=False).parts)
    if isinstance(context, Window):
        places, chunk, table_rows, sinks = context.places, context.chunk, context.chunk, context.start
    else:
        places, chunk, table_rows, sinks = context, min(chunk, context), context, 0
    shapes = (1, chunk), (min(TOGETHER, rows), 1)
    network = Network(config, layers=range(min(2, config.num_hidden_layers)))
    weights = network.lay_out(dtype, training=False)
    layout, buffers, _ = layout_of(config, rows, places, cache_dtype, sinks)
    parts |= layout.parts
    ops, size, half = Recorder(device), 0, config.head_dim // 2
    for B, S in shapes:
        size = max(size, Network(config).activations(B, S, dtype, None).layout.size)
        needs = network.activations(B, S, dtype, None)
        arena = untouched(weights.size + needs.layout.size)
        network.bind(arena)
        batch = Batch(ops, network, needs, arena, weights.size)
        cache = untouched(layout.size)
        table = untouched(4 * table_rows * half).view((table_rows, half), "float32")
        batch.attend_to_cache([(k.view(cache), v.view(cache)) for k, v in buffers], (table, table))
        network.forward(batch)
        logits = untouched(4 * B * config.vocab_size).view((B, config.vocab_size), "float32")
        ops.matmul(logits, batch.n[:B], network.head.data.T, 1.0, 0.0)
    parts["a pass"] = size + 4 * min(TOGETHER, rows) * config.vocab_size
    parts["tables"] = 2 * 4 * table_rows * half
    parts["scratch of the ops" if device == CPU else "workspace of the ops"] = ops.bytes
    if device == CPU:
        parts["runtime"] = own_memory() + GROWTH
    return {name: size for name, size in parts.items() if size}
