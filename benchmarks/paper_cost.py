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
