"""Tiny random models of many families of transformers, and what their tests share."""

import numpy as np
import pytest
import torch
import transformers
from devices import put

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
SMALL = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
FAMILIES = {
    "llama": {},
    "mistral": dict(sliding_window=None),
    "qwen2": {},
    "qwen3": dict(head_dim=8),
    "phi3": dict(original_max_position_embeddings=128),
    "olmo2": {},
    "olmo": {},
    "gpt_neox": dict(num_key_value_heads=None),
    "smollm3": dict(no_rope_layers=[1, 0]),
    "granite": dict(attention_multiplier=0.3),
    "starcoder2": dict(sliding_window=None),
    "cohere": {},
    "gemma": dict(head_dim=8),
    "glm": dict(head_dim=8),
    "stablelm": {},
    "helium": dict(head_dim=8),
}
G = 6


def tiny(family, implementation, **changes):
    """A model of the family; the same weights for every implementation."""
    given = {**SMALL, **FAMILIES.get(family, {}), **changes}
    config = transformers.AutoConfig.for_model(
        family, **{key: value for key, value in given.items() if value is not None or key == "sliding_window"}
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    with torch.no_grad():
        for p in model.parameters():  # far enough from uniform that attention matters
            p.mul_(3 if p.ndim > 1 else 1)
    return put(model).eval()


def ids_of(B, T, seed=0):
    return put(np.random.default_rng(seed).integers(3, SMALL["vocab_size"], (B, T)))


def close(a, b, factor=1.0):
    torch.testing.assert_close(a, b, rtol=2e-4 * factor, atol=2e-5 * factor * b.abs().max().item())


def without_interface(family):
    if family == "stablelm" and VERSION < (5, 0):
        pytest.skip("StableLM of transformers 4.53 does not use the attention interface")
