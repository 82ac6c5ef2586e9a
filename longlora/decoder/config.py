"""config.json -> ModelConfig. What a config asks for and the decoder does not compute is refused by name.

A field that changes the function computed is never ignored.
"""

import os
from dataclasses import dataclass, field
from typing import Any

from longlora.decoder import rope as rope_
from longlora.decoder.families import FAMILIES
from longlora.decoder.network import Network
from longlora.disk import read_json
from longlora.errors import UserError

# A size beyond these means a damaged file.
LIMITS = dict(
    vocab_size=1 << 24,
    hidden_size=1 << 20,
    intermediate_size=1 << 22,
    num_hidden_layers=1 << 12,
    num_attention_heads=1 << 14,
    num_key_value_heads=1 << 14,
    head_dim=1 << 12,
    max_position_embeddings=1 << 31,
)
MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
# Keys that, when set, ask for something that the decoder does not compute.
REFUSED = (
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "quantization_config",
    "num_local_experts",
    "num_experts",
)


@dataclass(frozen=True)
class ModelConfig:
    """One decoder. `raw` is the config.json as read; `rope` is what it says about positions."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    max_position_embeddings: int
    rope: rope_.Rope
    bos_token_id: int | None
    eos_token_id: int | None
    initializer_range: float
    raw: dict[str, Any] = field(repr=False, compare=False)
    # Names of the linears in the files. A fused linear holds the rows of its parts one after the other.
    qkv_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")  # or ("qkv_proj",)
    gate_up_modules: tuple[str, ...] = ("gate_proj", "up_proj")  # or ("gate_up_proj",)
    embedding_multiplier: float = 1.0  # scales the embedding's output
    residual_multiplier: float = 1.0  # scales what attention and MLP add to the residual stream
    attention_multiplier: float | None = None  # scales q k'; None: 1 / sqrt(head_dim)
    logits_scaling: float = 1.0  # divides the logits
    rope_layers: tuple[bool, ...] | None = None  # per layer, whether q and k are rotated; None: all are

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Give Hugging Face name -> shape of each tensor, in the order of the layers, without a tied head."""
        return Network(self).tensor_shapes()


def read_config(source: dict[str, Any] | str | os.PathLike[str], where: str = "config") -> ModelConfig:
    """Read the ModelConfig of a model directory, a config.json or its dict.

    where: the name of the dict in messages. UserError names the field that is missing, absurd or asks for
    something that is not supported.
    """
    if isinstance(source, dict):
        return _config(source, where)
    path = os.fspath(source)
    if os.path.isdir(path):
        path = os.path.join(path, "config.json")
    return _config(read_json(path), path)


class _Fields:
    """The values of a config, checked one by one; what the file leaves out has the family's default."""

    def __init__(self, raw, family, where):
        self.values, self.where = {**family.defaults, **raw}, where

    def get(self, name):
        return self.values.get(name)

    def size(self, name, default=None):
        value = self.values.get(name)
        if value is None:
            value = default
        if value is None:
            raise UserError(f"{self.where}: {name} is missing")
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LIMITS[name]:
            raise UserError(
                f"{self.where}: {name} should be an integer from 1 to {LIMITS[name]}, got {value!r}"
            )
        return value

    def number(self, name, default, low, high):
        value = self.values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value <= high:
            raise UserError(
                f"{self.where}: {name} should be a number above {low:g}, at most {high:g}, got {value!r}"
            )
        return float(value)

    def flag(self, name, default=False):
        value = self.values.get(name, default)
        if not isinstance(value, bool):
            raise UserError(f"{self.where}: {name} should be true or false, got {value!r}")
        return value

    def token(self, name):
        value = self.values.get(name)
        if isinstance(value, list):
            value = value[0] if value else None
        if isinstance(value, int) and value == -1:
            return None  # how some models say that they have no such token
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            found = self.values[name]
            raise UserError(
                f"{self.where}: {name} should be a token id, a list of them or null, got {found!r}"
            )
        return value

    def decided(self, rule):
        return self.flag(rule) if isinstance(rule, str) else rule


def _config(raw, where):
    name = raw.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(f"{where}: model_type {name!r} is not supported; supported are {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    fields = _Fields(raw, family, where)
    _refuse(raw, family, where)
    layers = fields.size("num_hidden_layers")
    heads, kv_heads, head_dim = _heads(fields, family, where)
    rope_layers = _rope_layers(fields, layers, where) if family.no_rope_layers else None
    _refuse_window(fields, family, layers, rope_layers, where)
    length = fields.size("max_position_embeddings")
    return ModelConfig(
        family=name,
        vocab_size=fields.size("vocab_size"),
        hidden_size=fields.size("hidden_size"),
        intermediate_size=fields.size("intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6, 0.0, 1.0),
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        qkv_bias=fields.decided(family.qkv_bias),
        o_bias=fields.decided(family.o_bias),
        qk_norm=family.qk_norm,
        max_position_embeddings=length,
        rope=rope_.read(raw, family, length, where),
        bos_token_id=fields.token("bos_token_id"),
        eos_token_id=fields.token("eos_token_id"),
        initializer_range=fields.number("initializer_range", 0.02, 0.0, 10.0),
        raw=raw,
        qkv_modules=family.qkv_modules,
        gate_up_modules=family.gate_up_modules,
        rope_layers=rope_layers,
        **({name: fields.number(name, 1.0, 0.0, 1e6) for name in MULTIPLIERS} if family.multipliers else {}),
    )


def _heads(fields, family, where):
    """-> number of query heads, of key and value heads, size of a head."""
    heads, hidden = fields.size("num_attention_heads"), fields.size("hidden_size")
    kv_heads = fields.size("num_key_value_heads", heads if "num_key_value_heads" in fields.values else None)
    if heads % kv_heads:
        raise UserError(
            f"{where}: num_attention_heads {heads} should be a multiple of num_key_value_heads {kv_heads}"
        )
    if fields.get("head_dim") is None and family.head_dim is None and hidden % heads:
        raise UserError(
            f"{where}: hidden_size {hidden} should be a multiple of num_attention_heads {heads}, "
            "or head_dim given"
        )
    head_dim = fields.size("head_dim", family.head_dim or hidden // heads)
    if head_dim % 2 or head_dim < 4:
        raise UserError(f"{where}: head_dim should be even and at least 4, got {head_dim}")
    return heads, kv_heads, head_dim


def _rope_layers(fields, layers, where):
    """-> per layer whether it rotates q and k, or None if all do. A 1 in no_rope_layers says that it does."""
    listed = fields.get("no_rope_layers")
    if listed is None:
        interval = fields.get("no_rope_layer_interval")
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
            raise UserError(f"{where}: no_rope_layer_interval should be an integer above 0, got {interval!r}")
        listed = [(i + 1) % interval != 0 for i in range(layers)]
    if not isinstance(listed, list) or len(listed) < layers or any(flag not in (0, 1) for flag in listed):
        raise UserError(
            f"{where}: no_rope_layers should be a list of 0 or 1 for each of {layers} layers, got {listed!r}"
        )
    rotated = tuple(bool(flag) for flag in listed[:layers])
    return None if all(rotated) else rotated


def _refuse(raw, family, where):
    """Stop at what the decoder does not compute, whatever the family."""
    found = raw.get("architectures")
    if found not in (None, [], [family.architecture]):
        raise UserError(
            f"{where}: architectures {found!r} is not supported; supported is {family.architecture}"
        )
    act = raw.get("hidden_act", "silu")
    if act not in ("silu", "swish"):
        raise UserError(f"{where}: hidden_act {act!r} is not supported; supported is silu")
    if raw.get("mlp_bias"):
        raise UserError(f"{where}: mlp_bias {raw['mlp_bias']!r} is not supported; supported is false")
    for name in REFUSED:
        if raw.get(name):
            raise UserError(
                f"{where}: {name} {raw[name]!r} is not supported; "
                "supported is a plain dense decoder without it"
            )


def _refuse_window(fields, family, layers, rope_layers, where):
    """Stop at a sliding window that is active by transformers' rule for the family."""
    types = fields.get("layer_types") or []
    if not isinstance(types, list) or any(kind != "full_attention" for kind in types):
        other = (
            sorted({str(kind) for kind in types if kind != "full_attention"})
            if isinstance(types, list)
            else [repr(types)]
        )
        raise UserError(
            f"{where}: layer_types has {', '.join(other)}; supported is full_attention in all layers"
        )
    if family.sliding_window == "flagged":
        first = fields.get("max_window_layers")  # the first layer with a window, in Qwen's families
        spared = rope_layers is None if family.no_rope_layers else isinstance(first, int) and first >= layers
        active = bool(fields.get("use_sliding_window")) and not types and not spared
    else:
        active = family.sliding_window == "given"
    window = fields.get("sliding_window")
    if active and window is not None:
        raise UserError(
            f"{where}: an active sliding_window of {window!r} is not supported; supported is full attention "
            "(sliding_window null)"
        )
