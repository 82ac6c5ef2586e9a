"""What a step costs: floating-point operations by part, as a model, and measured time and planned memory.

The model counts two operations for a multiplication and an addition, as the paper's Table 11 does.
"""

import functools

import numpy as np

from longlora.decoder.config import read_config
from longlora.decoder.lora import LoraConfig
from longlora.decoder.model import Model
from longlora.decoder.plan import plan
from longlora.files.open_model import open_model
from longlora.tools.demo import MODEL
from longlora.training.optimizer import AdamW

from .harness import interleaved
from .paper_stats import MISSING

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
# Forward and backward against the forward alone. The backward of attention makes five products for two.
# Frozen weights have no gradient of their own; the head, tied to the embedding, has.
STEP = {"attention": 3.5, "projections": 2, "MLP": 2, "head": 3}


def pairs(length, group):
    """Pairs of query and key in causal groups of `group` tokens."""
    whole, rest = divmod(length, group)
    return whole * group * (group + 1) // 2 + rest * (rest + 1) // 2


def forward(config, length, seen):
    """Operations of a forward pass over `length` tokens by part. seen: pairs that attention computes."""
    heads, D = config.num_attention_heads, config.head_dim
    both = 2 * (heads + config.num_key_value_heads) * D
    layers, C = config.num_hidden_layers, config.hidden_size
    return {
        "attention": 4 * seen * heads * D * layers,
        "projections": 2 * length * C * both * layers,
        "MLP": 6 * length * C * config.intermediate_size * layers,
        "head": 2 * length * C * config.vocab_size,
    }


def step(config, length, seen):
    """Operations of a training step by part."""
    return {name: count * STEP[name] for name, count in forward(config, length, seen).items()}


def expected(config, length):
    """Operations of a step with S2-Attn over those with dense attention."""
    s2, dense = (sum(step(config, length, pairs(length, g)).values()) for g in (length // 4, length))
    return s2 / dense


def table(stats, runs):
    """The rows of the table: operations by part beside what was measured. runs: {length: run}."""
    config = demo()
    rows = [["", *map(str, runs)]]

    def line(name, of):
        rows.append([name, *(of(length) for length in runs)])

    def giga(group_share, part):
        def of(length):
            return f"{forward(config, length, pairs(length, length // group_share))[part] / 1e9:.2f}"

        return of

    line("attention, dense (10⁹ operations, forward)", giga(1, "attention"))
    line("attention, S²-Attn", giga(4, "attention"))
    for part in ("projections", "MLP", "head"):
        line(part, giga(1, part))
    line("a step, S²-Attn : dense, by operations", lambda T: f"{expected(config, T):.2f}")
    for name, what, form in (
        ("a step, dense (s)", ("dense_seconds",), "{:.3f}"),
        ("a step, S²-Attn (s)", ("s2_seconds",), "{:.3f}"),
        ("a step, S²-Attn : dense, measured", ("s2_seconds", "dense_seconds"), "{:.2f}"),
        ("memory, dense (GiB)", ("dense_gib",), "{:.3f}"),
        ("memory, S²-Attn (GiB)", ("s2_gib",), "{:.3f}"),
    ):
        line(name, lambda T: _shown(stats, runs[T], what, form))
    return rows


def _shown(stats, run, what, form):
    """A figure of the run's first row, or the ratio of two."""
    rows = list(stats.found(run).values())
    if not rows:
        return MISSING
    one, *other = (rows[0][name] for name in what)
    return form.format(one / other[0] if other else one)


def busy(stats, runs):
    """A sentence about the machine that measured, where other programs ran beside it."""
    rows = [row for run in runs.values() for row in stats.found(run).values()]
    loads = [row["load"] for row in rows]
    if not rows or max(loads) <= rows[0]["threads"]:
        return ""
    return (
        f"Measured while other programs ran (a load of {max(loads):.0f} on "
        f"{rows[0]['threads']} cores): read the ratios, not the seconds."
    )


def measure(length, seconds=3.0):
    """Time a training step of the demo's model, dense and S2-Attn in turn -> seconds and GiB of each."""
    base, row, steps = open_model(MODEL), {}, []
    for name, group in (("dense", None), ("s2", length // 4)):
        call, about = _step(base, length, group)
        row[f"{name}_gib"] = about.total / 2**30
        steps.append(call)
    for name, time in zip(("dense", "s2"), interleaved(steps, seconds, least=3)):
        row[f"{name}_seconds"] = time
    return row


def _step(base, length, group):
    about = plan(base.config, sequence_length=length, group_size=group, lora=LoraConfig())
    attention = None if group is None else {"group_size": group}
    model = Model(base.config, lora=LoraConfig(), plan=about, attention=attention).load(base)
    optimizer = AdamW(model.parameters)
    rates = dict.fromkeys(model.kinds, 1e-5)
    ids = np.random.default_rng(0).integers(0, base.config.vocab_size, length + 1).astype(np.int32)

    def call():
        model.zero_grad()
        model.train_microbatch(ids[None, :-1], ids[None, 1:], 1 / length)
        optimizer.step(rates)

    return call, about


@functools.cache
def demo():
    return read_config(MODEL)
