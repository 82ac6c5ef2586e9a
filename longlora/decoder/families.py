"""The model families: one row of data for each, with what distinguishes it in transformers' modeling files.

To add a family that differs in data only, add a row here and, if llama.cpp knows it, a row in files/gguf.py.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """One row of FAMILIES. A `bool | str` field is a constant, or the config key that holds the value."""

    architecture: str
    # What transformers' config class assumes for a key that the file leaves out. None under
    # num_key_value_heads stands for num_attention_heads. A size without a default must be in the file.
    defaults: dict[str, Any] = field(default_factory=dict)
    theta: float = 10000.0  # of the rope, when the file has none
    rope_types: tuple[str, ...] = ("default", "linear", "yarn", "llama3")
    # The file states original_max_position_embeddings even when its rope is not extended.
    states_original_length: bool = False
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    qk_norm: bool = False
    # When the config's sliding_window is active: None is never, "given" is unless it is null,
    # "flagged" is when use_sliding_window says so.
    sliding_window: str | None = None
    qkv_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    gate_up_modules: tuple[str, ...] = ("gate_proj", "up_proj")
    multipliers: bool = False  # embedding, residual and attention multiplier, logits scaling
    no_rope_layers: bool = False  # some layers do not rotate q and k


FAMILIES: dict[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        defaults=dict(num_key_value_heads=None),
        qkv_bias="attention_bias",
        o_bias="attention_bias",
    ),
    "mistral": Family(
        architecture="MistralForCausalLM", defaults=dict(sliding_window=4096), sliding_window="given"
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        defaults=dict(sliding_window=4096, max_window_layers=28),
        qkv_bias=True,
        sliding_window="flagged",
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        defaults=dict(sliding_window=4096, max_window_layers=28),
        head_dim=128,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm=True,
        sliding_window="flagged",
    ),
    "phi3": Family(
        architecture="Phi3ForCausalLM",
        defaults=dict(
            vocab_size=32064,
            hidden_size=3072,
            intermediate_size=8192,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=None,
            max_position_embeddings=4096,
            rms_norm_eps=1e-5,
            bos_token_id=1,
            eos_token_id=32000,
        ),
        rope_types=("default",),
        states_original_length=True,
        sliding_window="given",
        qkv_modules=("qkv_proj",),
        gate_up_modules=("gate_up_proj",),
    ),
    "granite": Family(
        architecture="GraniteForCausalLM",
        defaults=dict(
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=None,
            max_position_embeddings=2048,
            bos_token_id=1,
            eos_token_id=2,
        ),
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        multipliers=True,
    ),
    "smollm3": Family(
        architecture="SmolLM3ForCausalLM",
        defaults=dict(
            vocab_size=128256,
            hidden_size=2048,
            intermediate_size=11008,
            num_hidden_layers=36,
            num_attention_heads=16,
            num_key_value_heads=4,
            max_position_embeddings=32768,
            tie_word_embeddings=True,
            bos_token_id=128000,
            eos_token_id=128001,
            no_rope_layer_interval=4,
        ),
        theta=2000000.0,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        sliding_window="flagged",
        no_rope_layers=True,
    ),
}
