"""Memory, planned: which buffers a run has, how large each is and where it lies, from the config alone.

One table, the layout, is both the figure that `longlora plan` prints and the arena that Model carves up: a run cannot
allocate what was not planned. The buffers are those of one pass over a layer:

  kept per layer     none: everything the backward reads but n1 and the MLP's a; minimal: the layer's input, the attention's
                     output and its statistics; full: the layer's input
  the layer in hand  shared by all layers; the MLP goes through it in tiles of TILE tokens, and its buffers and those of the
                     attention's backward take turns in the same memory

The plan of a run on a GPU is of that GPU's memory: the arena, the tables and the ops' workspace, which is one for all calls.
What the CUDA driver and cuBLAS take for themselves is not in it: how much that is has not been measured yet.

B, T, M = B T, C, H, K, D, F, R, V as in csrc/ops.h; Q = H D, P = K D, S = Q + 2 P. Sizes are bytes.
"""

from dataclasses import dataclass, field, replace
from itertools import zip_longest

from longlora import device as device_
from longlora.errors import UserError

CHECKPOINTING = ("none", "minimal", "full")  # fastest first
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
TILE = 2048  # tokens that the MLP handles at a time
ALIGN = 64
RUNTIME = 4 << 20  # threads, Python objects

# The products of a layer: group -> (prefix of the modules' names, modules whose outputs lie side by side).
GROUPS = {
    "qkv": ("self_attn.", ("q_proj", "k_proj", "v_proj")),
    "o": ("self_attn.", ("o_proj",)),
    "gate_up": ("mlp.", ("gate_proj", "up_proj")),
    "down": ("mlp.", ("down_proj",)),
}
# How a tensor is trained: these have a learning rate and a choice of weight decay of their own.
KINDS = ("lora_A", "lora_B", "embedding", "head", "norm", "linear", "bias")


@dataclass(frozen=True)
class Buffer:
    """A piece of the arena: offset in bytes, shape, dtype."""

    offset: int
    shape: tuple
    dtype: str


@dataclass(frozen=True)
class Stored:
    """A parameter as stored: tensors of one product lie under each other; members (Hugging Face name, first row, last)."""

    key: str
    kind: str
    shape: tuple
    members: tuple


class Layout:
    """Buffers, handed out one after another; `parts` says what they are for."""

    def __init__(self, start=0):
        self.start = self.size = start
        self.buffers, self.parts = {}, {}

    def add(self, name, shape, dtype):
        bytes_ = DTYPES.get(dtype, 4)
        for n in shape:
            bytes_ *= n
        self.buffers[name] = Buffer(self.size, tuple(shape), dtype)
        self.size += -(-bytes_ // ALIGN) * ALIGN

    def end_part(self, part):
        """What was added since the last part was ended is `part`."""
        self.parts[part] = self.parts.get(part, 0) + self.size - self.start - sum(self.parts.values())

    def overlay(self, *alternatives):
        """Lists of (name, shape, dtype) of which only one is in use at a time: they take the same memory."""
        start, end = self.size, self.size
        for buffers in alternatives:
            self.size = start
            for buffer in buffers:
                self.add(*buffer)
            end = max(end, self.size)
        self.size = end


def widths(config):
    """-> group -> (features in, features out of each module)."""
    C, F, D = config.hidden_size, config.intermediate_size, config.head_dim
    Q, P = config.num_attention_heads * D, config.num_key_value_heads * D
    return {"qkv": (C, (Q, P, P)), "o": (Q, (C,)), "gate_up": (C, (F, F)), "down": (F, (C,))}


def adapted(group, lora):
    """The modules of `group` that have LoRA."""
    return tuple(name for name in GROUPS[group][1] if lora is not None and name in lora.target_modules)


def stored(config, lora):
    """Every parameter of the model, in the order of the layers. LoRA's A are stacked per group, its B stand alone."""
    C, D = config.hidden_size, config.head_dim
    embed = "model.embed_tokens.weight"
    yield Stored("embedding", "embedding", (config.vocab_size, C), ((embed, 0, config.vocab_size),))
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}."
        for key, name, size in (
            ("w1", "input_layernorm", C),
            ("w2", "post_attention_layernorm", C),
            ("q_norm", "self_attn.q_norm", D),
            ("k_norm", "self_attn.k_norm", D),
        ):
            if size == C or config.qk_norm:
                yield Stored(f"{key}.{i}", "norm", (size,), ((f"{layer}{name}.weight", 0, size),))
        for group, (features, outs) in widths(config).items():
            prefix, modules = GROUPS[group]
            starts = [sum(outs[:j]) for j in range(len(outs) + 1)]
            rows = [(layer + prefix + name, starts[j], starts[j + 1]) for j, name in enumerate(modules)]
            weights = tuple((f"{name}.weight", a, b) for name, a, b in rows)
            yield Stored(f"{group}.weight.{i}", "linear", (starts[-1], features), weights)
            if {"qkv": config.qkv_bias, "o": config.o_bias}.get(group):
                biases = tuple((f"{name}.bias", a, b) for name, a, b in rows)
                yield Stored(f"{group}.bias.{i}", "bias", (starts[-1],), biases)
            found = adapted(group, lora)
            if not found:
                continue
            R = lora.r
            stack = tuple(
                (f"{layer}{prefix}{name}.lora_A.weight", j * R, (j + 1) * R) for j, name in enumerate(found)
            )
            yield Stored(f"{group}.A.{i}", "lora_A", (len(found) * R, features), stack)
            for name in found:
                out = outs[modules.index(name)]
                yield Stored(
                    f"{group}.B.{name}.{i}",
                    "lora_B",
                    (out, R),
                    ((f"{layer}{prefix}{name}.lora_B.weight", 0, out),),
                )
    yield Stored("norm", "norm", (C,), (("model.norm.weight", 0, C),))
    if not config.tie_word_embeddings:
        yield Stored("head", "head", (config.vocab_size, C), (("lm_head.weight", 0, config.vocab_size),))


def trained(config, lora, training):
    """The names of what is trained: by `lora` its own and modules_to_save, without one everything."""
    if not training:
        return frozenset()
    return frozenset(config.tensor_shapes() if lora is None else lora.tensor_shapes(config))


def parameters(config, dtype, lora, training):
    """-> Layout of all parameters. Buffers: key (as the ops read it, in `dtype`), and for what is trained value.key, grad.key,
    m.key, v.key in float32. With dtype float32 the working copy of a trained parameter is its master.

    B of several adapted modules is one block-diagonal matrix, group.B.i, so that a group stays one product.
    """
    layout, names = Layout(), trained(config, lora, training)
    all_ = list(stored(config, lora))
    learned = [s for s in all_ if s.members[0][0] in names]
    held = set(s.key for s in learned)
    for s in all_:
        if s.key not in held and s.kind != "lora_B":
            layout.add(s.key, s.shape, dtype)
    layout.end_part("frozen weights")
    for s in learned:
        layout.add("value." + s.key, s.shape, "float32")
        if dtype == "float32" and s.kind != "lora_B":
            layout.buffers[s.key] = layout.buffers["value." + s.key]
    layout.end_part("trained parameters, float32")
    for s in learned:
        if dtype != "float32" and s.kind != "lora_B":
            layout.add(s.key, s.shape, dtype)
    for group, (_, outs) in widths(config).items():
        found = adapted(group, lora)
        for i in range(config.num_hidden_layers if found else 0):
            master = f"value.{group}.B.{found[0]}.{i}"
            if dtype == "float32" and len(outs) == 1 and master in layout.buffers:
                layout.buffers[f"{group}.B.{i}"] = layout.buffers[master]
            else:
                layout.add(f"{group}.B.{i}", (sum(outs), len(found) * lora.r), dtype)
    layout.end_part("trained parameters, working copies")
    for what, part in (("grad", "gradients"), ("m", "moments"), ("v", "moments")):
        start = layout.size
        for s in learned:
            layout.add(f"{what}.{s.key}", s.shape, "float32")
        if learned:
            layout.buffers[what] = Buffer(start, ((layout.size - start) // 4,), "float32")
        layout.end_part(part)
    return layout


def _rank(group, lora):
    return len(adapted(group, lora)) * lora.r if lora is not None else 0


def activations(config, dtype, batch_size, length, lora, checkpointing, start=0):
    """-> Layout of what a training pass over [batch_size, length] tokens needs, from byte `start` on.

    Kept buffers are called name.layer, those of the layer in hand name.
    """
    B, T, C, F, L = batch_size, length, config.hidden_size, config.intermediate_size, config.num_hidden_layers
    H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    M, S, Q, f32 = B * T, (H + 2 * K) * D, H * D, "float32"
    tile = min(M, TILE)
    # u = x A' of each product with LoRA but the last, whose x is computed again anyway
    us = [
        (f"u.{group}", (M, _rank(group, lora)), f32)
        for group in GROUPS
        if group != "down" and _rank(group, lora)
    ]
    attention = [("o", (M, Q), dtype), ("lse", (B, H, T), f32)]
    kept = {
        "none": [
            ("qkv", (M, S), dtype),
            *attention,
            ("h", (M, C), dtype),
            ("rstd2", (M,), f32),
            ("gp", (M, 2 * F), dtype),
            *us,
        ],
        "minimal": attention,
        "full": [],
    }[checkpointing]
    layout = Layout(start)
    for i in range(L):
        for name, shape, kind in [("x", (M, C), dtype), *kept]:
            layout.add(f"{name}.{i}", shape, kind)
    layout.end_part("kept activations")
    names = {name for name, _, _ in kept}
    again = [b for b in [("qkv", (M, S), dtype), *attention, *us] if b[0] not in names]
    for buffer in [
        ("d", (M, C), dtype),
        ("dn", (M, C), dtype),
        ("n", (M, C), dtype),
        ("rstd", (M,), f32),
        *again,
    ]:
        layout.add(*buffer)
    if config.qk_norm:
        layout.add("qk", (M, (H + K) * D), dtype)
        layout.add("qk_rstd", (H + K, M), f32)
    mlp = [("n2", (tile, C), dtype), ("f", (tile, F), dtype)]
    if checkpointing != "none":
        mlp += [("h", (M, C), dtype), ("gp", (tile, 2 * F), dtype), ("rstd2", (M,), f32)]
    layout.overlay(mlp, [("do", (M, Q), dtype), ("dqkv", (M, S), dtype)])
    layout.end_part("layer in hand")
    for name, kind in (
        ("losses", f32),
        ("dlosses", f32),
        ("ids", "int32"),
        ("targets", "int32"),
        ("order", "int32"),
    ):
        layout.add(name, (M,), kind)
    layout.end_part("batch and tables")
    return layout


def evaluation(config, dtype, length, lora, start=0):
    """-> Layout of a forward pass without gradients over [1, length] tokens: the residual stream is one buffer."""
    T, C, F = length, config.hidden_size, config.intermediate_size
    H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    f32, tile = "float32", min(length, TILE)
    layout = Layout(start)
    layout.add("x", (T, C), dtype)
    layout.add("qkv", (T, (H + 2 * K) * D), dtype)
    layout.overlay([("n", (T, C), dtype)], [("o", (T, H * D), dtype)])
    layout.add("rstd", (T,), f32)
    layout.add("rstd2", (T,), f32)
    layout.add("lse", (1, H, T), f32)
    for group in GROUPS:
        if group != "down" and _rank(group, lora):
            layout.add(f"u.{group}", (T, _rank(group, lora)), f32)
    if config.qk_norm:
        layout.add("qk", (T, (H + K) * D), dtype)
        layout.add("qk_rstd", (H + K, T), f32)
    for name, width in (("n2", C), ("f", F), ("gp", 2 * F)):
        layout.add(name, (tile, width), dtype)
    for name, kind in (("losses", f32), ("head_lse", f32), ("ids", "int32"), ("targets", "int32")):
        layout.add(name, (T,), kind)
    layout.end_part("evaluation")
    return layout


def _head(config):
    return "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"


def _scratch(calls):
    """What the ops take on the CPU while they run. They keep large blocks for the next call, so a run holds, for each rank, the
    largest block of this rank in any call."""
    from longlora import _C

    blocks = [sorted(_C.scratch(op, *args), reverse=True) for op, args in calls]
    return sum(map(max, zip_longest(*blocks, fillvalue=0)))


def _workspace(calls):
    """What the ops take on a GPU while they run: the largest of the calls."""
    from longlora import _C

    return max(_C.workspace(op, *args) for op, args in calls)


def _calls(config, dtype, batch_size, length, group_size, lora):
    """-> [(op, arguments)] of a step, as far as they take memory of their own. The arrays have the shapes of the real ones; of
    large ones nothing is touched, so that they cost no memory."""
    from longlora import _C
    from longlora.ops import BOUNDARIES, SHIFTS

    B, T, M, f32 = batch_size, length, batch_size * length, "float32"
    H, K, D, C, V = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.hidden_size,
        config.vocab_size,
    )
    whole, names = lora is None, trained(config, lora, True)
    calls = []

    def new(*shape, kind=dtype):
        return _C.Tensor(shape, kind)

    def ask(op, *args):
        calls.append((op, args))

    for group, (features, outs) in widths(config).items():
        m, N, R = M if group in ("qkv", "o") else min(M, TILE), sum(outs), _rank(group, lora)
        x, weight, out = new(m, features), new(N, features), new(m, N)
        a, b, u, da = (
            (new(R, features), new(N, R), new(m, R, kind=f32), new(R, features, kind=f32))
            if R
            else (None,) * 4
        )
        bias = {"qkv": config.qkv_bias, "o": config.o_bias}.get(group)
        alone = R and len(outs) == 1
        ask("lora_linear_forward", out, u, x, weight, new(N) if bias else None, a, b, None, 1.0)
        ask(
            "lora_linear_backward",
            x,
            da,
            new(N, R, kind=f32) if alone else None,
            new(N, features, kind=f32) if whole else None,
            new(N, kind=f32) if bias and whole else None,
            out,
            x,
            weight,
            a,
            b,
            u,
            1.0,
            0,
        )
        for name in () if alone else adapted(group, lora):
            n = outs[GROUPS[group][1].index(name)]
            ask(
                "lora_linear_backward",
                None,
                None,
                new(n, lora.r, kind=f32),
                None,
                None,
                out[:, :n],
                None,
                weight[:n],
                a[: lora.r],
                b[:n, : lora.r],
                u[:, : lora.r],
                1.0,
                0,
            )
    for rows, columns in ((M, C), (M, D)) if config.qk_norm else ((M, C),):
        x = new(rows, columns)
        ask("rms_norm_backward", x, new(columns, kind=f32), x, x, new(rows, kind=f32), new(columns), x)
    heads = new(M, (H + 2 * K) * D).reshape((B, T, H + 2 * K, D))
    q, k, v, o = heads[:, :, :H], heads[:, :, H : H + K], heads[:, :, H + K :], new(B, T, H, D)
    ask(
        "s2_attention_backward",
        q,
        k,
        v,
        o,
        q,
        k,
        v,
        o,
        new(B, H, T, kind=f32),
        None,
        group_size or T,
        BOUNDARIES["split"],
        SHIFTS["half" if group_size else "none"],
        1.0,
    )
    of_row = new(M, kind=f32)
    ask(
        "linear_cross_entropy_backward",
        of_row,
        new(M, C),
        new(V, C, kind=f32) if _head(config) in names else None,
        new(M, C),
        new(V, C),
        new(M, kind="int32"),
        of_row,
        -100,
    )
    if "model.embed_tokens.weight" in names:
        ids = new(M, kind="int32")
        ask("embedding_backward", new(V, C, kind=f32), new(M, C), ids, ids)
    largest = max(
        s.shape[0] * (s.shape[1] if len(s.shape) > 1 else 1)
        for s in stored(config, lora)
        if s.members[0][0] in names
    )
    ask("sum_squares", new(1, kind="float64"), new(largest, kind=f32))
    return calls


@dataclass(frozen=True)
class Plan:
    """What a run takes: parts (name -> bytes, in order), and what they follow from. `memory` is what `device` has, in bytes."""

    config: object = field(repr=False)
    dtype: str
    batch_size: int
    sequence_length: int
    group_size: int | None
    lora: object
    checkpointing: str
    memory: int
    parts: dict
    changes: tuple = ()
    device: str = device_.CPU

    @property
    def total(self):
        return sum(self.parts.values())

    @property
    def fits(self):
        return self.total <= self.memory

    def activations(self, batch_size, length):
        """The Layout of a pass over [batch_size, length] tokens by this plan's choices."""
        return activations(self.config, self.dtype, batch_size, length, self.lora, self.checkpointing)

    def to_json(self):
        """A dict for json.dumps; sizes in bytes."""
        return {
            "dtype": self.dtype,
            "batch_size": self.batch_size,
            "sequence_length": self.sequence_length,
            "group_size": self.group_size,
            "training": "full" if self.lora is None else "lora",
            "checkpointing": self.checkpointing,
            "device": self.device,
            "parts": dict(self.parts),
            "total": self.total,
            "memory": self.memory,
            "fits": self.fits,
            "changes": list(self.changes),
        }

    def text(self):
        """A table in GiB, the verdict, and what would make it fit."""
        width = max(len(name) for name in (*self.parts, "total")) + 2
        lines = [
            f"{name:<{width}}{size / 2**30:9.3f} GiB"
            for name, size in (*self.parts.items(), ("total", self.total))
        ]
        there = f"{self.memory / 2**30:.3f} GiB are available" + (
            f" on {self.device}" if self.device != device_.CPU else ""
        )
        lines.append(
            f"checkpointing {self.checkpointing}: {'fits' if self.fits else 'does not fit'}; {there}"
        )
        return "\n".join([*lines, *(f"  {change}" for change in self.changes)])


def available_memory():
    """Bytes that a new process can have: MemAvailable, or less where a control group says so."""
    with open("/proc/meminfo") as file:
        found = {line.split(":")[0]: int(line.split()[1]) << 10 for line in file}
    limits = [found["MemAvailable"]]
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            with open(limit) as a, open(used) as b:
                limits.append(max(0, int(a.read()) - int(b.read())))
        except (OSError, ValueError):  # no such group, or "max"
            pass
    return min(limits)


def _parts(config, dtype, batch_size, length, group_size, lora, checkpointing, device):
    passes = activations(config, dtype, batch_size, length, lora, checkpointing)
    parts = parameters(config, dtype, lora, True).parts
    parts.update(passes.parts)
    M, D = batch_size * length, config.head_dim
    parts["batch and tables"] += 2 * 4 * length * D // 2
    if device == device_.CPU:
        parts["batch and tables"] += 4 * 4 * M  # NumPy's ids, targets and their order
        parts["scratch of the ops"] = _scratch(_calls(config, dtype, batch_size, length, group_size, lora))
        parts["runtime"] = RUNTIME
    else:
        parts["workspace of the ops"] = _workspace(
            _calls(config, dtype, batch_size, length, group_size, lora)
        )
    return {name: size for name, size in parts.items() if size}


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
    device=device_.CPU,
):
    """What training of `config` takes, from the config alone -> Plan.

    lora None means full fine-tuning, group_size None dense attention. checkpointing "auto" is the fastest of none, minimal and
    full that fits in `memory` (bytes; default: what `device` has available now). Where nothing fits, .changes has the cheapest
    changes.
    """
    if checkpointing not in ("auto", *CHECKPOINTING):
        raise UserError(
            f"checkpointing should be one of auto, {', '.join(CHECKPOINTING)}, got {checkpointing!r}"
        )
    if dtype not in DTYPES:
        raise UserError(f"dtype should be one of {', '.join(DTYPES)}, got {dtype!r}")
    for name, value in (("batch_size", batch_size), ("sequence_length", sequence_length)):
        if value < 1:
            raise UserError(f"{name} should be at least 1, got {value}")
    if memory is None:
        memory = available_memory() if device == device_.CPU else device_.free_memory(device)

    def parts(**changed):
        given = dict(
            dtype=dtype,
            batch_size=batch_size,
            length=sequence_length,
            group_size=group_size,
            lora=lora,
            checkpointing=checkpointing,
            device=device,
        )
        return _parts(config, **{**given, **changed})

    if checkpointing == "auto":
        for checkpointing in CHECKPOINTING:
            found = parts(checkpointing=checkpointing)
            if sum(found.values()) <= memory:
                break
    else:
        found = parts()
    changes = ()
    if sum(found.values()) > memory:
        changes = _changes(parts, checkpointing, dtype, batch_size, sequence_length, lora, memory)
    return Plan(
        config,
        dtype,
        batch_size,
        sequence_length,
        group_size,
        lora,
        checkpointing,
        memory,
        found,
        changes,
        device,
    )


def _changes(parts, checkpointing, dtype, batch_size, length, lora, memory):
    """The changes that would make it fit, cheapest first: those that cost time, then precision, batch, what is trained, length.

    Each alone where one is enough; else one after the other, all together, until it fits."""
    steps = [
        (f"--checkpointing {c}", dict(checkpointing=c))
        for c in CHECKPOINTING[CHECKPOINTING.index(checkpointing) + 1 :]
    ]
    if dtype == "float32":
        steps.append(("--dtype bfloat16", dict(dtype="bfloat16")))
    if batch_size > 1:
        steps.append(
            ("--per-device-train-batch-size 1, the rest by gradient accumulation", dict(batch_size=1))
        )
    if lora is None:
        from longlora.files.adapter import LoraConfig

        steps.append(("LoRA instead of --full", dict(lora=LoraConfig())))
    elif {"embed_tokens", "lm_head"} & set(lora.modules_to_save):
        rest = tuple(name for name in lora.modules_to_save if name not in ("embed_tokens", "lm_head"))
        steps.append(("no training of the embedding", dict(lora=replace(lora, modules_to_save=rest))))
    shorter = [
        (f"--sequence-length {length >> i}", dict(length=length >> i))
        for i in range(1, 8)
        if length >> i >= 1
    ]
    alone = [(text, sum(parts(**change).values())) for text, change in steps + shorter]
    fitting = [(text, total) for text, total in alone if total <= memory]
    lengths = [found for found in fitting if found[0].startswith("--sequence-length")]
    if fitting:
        return tuple(
            f"{text}: {total / 2**30:.3f} GiB" for text, total in fitting if (text, total) not in lengths[1:]
        )
    sofar, done = {}, {}
    for text, change in steps + shorter:  # a later choice of the same thing takes the place of the earlier
        sofar.update(change)
        done[next(iter(change))] = text
        total = sum(parts(**sofar).values())
        if total <= memory:
            return (f"{' and '.join(done.values())}: {total / 2**30:.3f} GiB",)
    return (f"nothing: {' and '.join(done.values())} still need {total / 2**30:.3f} GiB",)
