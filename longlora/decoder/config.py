"""config.json -> ModelConfig. The families are data; whatever else a config asks for stops here, by name.

A field that would change the function computed and that we do not compute is never passed over.
"""

import json
import os
from dataclasses import dataclass, field

from longlora.decoder import rope as rope_
from longlora.errors import UserError

# What tells the families apart, as transformers' modeling files have it. A string names the config key that decides.
FAMILIES = {
    "llama": dict(
        architecture="LlamaForCausalLM",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm=False,
        head_dim=None,
        sliding_window=None,
    ),
    "mistral": dict(
        architecture="MistralForCausalLM",
        qkv_bias=False,
        o_bias=False,
        qk_norm=False,
        head_dim=None,
        sliding_window=4096,
    ),
    "qwen2": dict(
        architecture="Qwen2ForCausalLM",
        qkv_bias=True,
        o_bias=False,
        qk_norm=False,
        head_dim=None,
        sliding_window="use_sliding_window",
    ),
    "qwen3": dict(
        architecture="Qwen3ForCausalLM",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm=True,
        head_dim=128,
        sliding_window="use_sliding_window",
    ),
}
# Sizes beyond these are a damaged file, not a model.
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
# Keys that, when set, ask for something the decoder does not do.
REFUSED = (
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "quantization_config",
    "num_local_experts",
    "num_experts",
)


@dataclass(frozen=True)
class ModelConfig:
    """One decoder. `raw` is the config.json as it was read; `rope` is what it says about positions."""

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
    mlp_bias: bool
    qk_norm: bool
    max_position_embeddings: int
    rope: rope_.Rope
    bos_token_id: int | None
    eos_token_id: int | None
    initializer_range: float
    raw: dict = field(repr=False, compare=False)

    def tensor_shapes(self):
        """-> dict of the model's tensors, Hugging Face name -> shape, in the order of the file. There is no tied head."""
        from longlora.decoder.network import Network

        return Network(self).tensor_shapes()


def read_json(path):
    """The JSON object in the file `path`; UserError names the file otherwise."""
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: should hold a JSON object, got {type(found).__name__}")
    return found


def read_config(source, where="config"):
    """`source`: a model directory, a config.json or its dict (then `where` says whose it is) -> ModelConfig.

    UserError names the field that is missing, absurd or asks for something that is not supported.
    """
    if isinstance(source, dict):
        return _config(source, where)
    path = os.fspath(source)
    if os.path.isdir(path):
        path = os.path.join(path, "config.json")
    return _config(read_json(path), path)


def _config(raw, where):
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise UserError(
            f"{where}: model_type {family!r} is not supported; supported are {', '.join(FAMILIES)}"
        )
    known = FAMILIES[family]

    def size(name, default=None):
        value = raw.get(name)
        if value is None:
            value = default
        if value is None:
            raise UserError(f"{where}: {name} is missing")
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LIMITS[name]:
            raise UserError(f"{where}: {name} should be an integer from 1 to {LIMITS[name]}, got {value!r}")
        return value

    def number(name, default, low, high):
        value = raw.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value <= high:
            raise UserError(
                f"{where}: {name} should be a number above {low:g}, at most {high:g}, got {value!r}"
            )
        return float(value)

    def flag(name, default=False):
        value = raw.get(name, default)
        if not isinstance(value, bool):
            raise UserError(f"{where}: {name} should be true or false, got {value!r}")
        return value

    def token(name):
        value = raw.get(name)
        if isinstance(value, list):
            value = value[0] if value else None
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise UserError(
                f"{where}: {name} should be a token id, a list of them or null, got {raw[name]!r}"
            )
        return value

    def decided(rule):
        return flag(rule) if isinstance(rule, str) else rule

    _refuse(raw, known, where)
    heads, hidden, layers = size("num_attention_heads"), size("hidden_size"), size("num_hidden_layers")
    kv_heads = size(
        "num_key_value_heads", heads if family == "llama" or "num_key_value_heads" in raw else None
    )
    if heads % kv_heads:
        raise UserError(
            f"{where}: num_attention_heads {heads} should be a multiple of num_key_value_heads {kv_heads}"
        )
    head_dim = raw.get("head_dim") or known["head_dim"]
    if head_dim is None and hidden % heads:
        raise UserError(
            f"{where}: hidden_size {hidden} should be a multiple of num_attention_heads {heads}, or head_dim given"
        )
    head_dim = (
        size("head_dim", head_dim or hidden // heads)
        if raw.get("head_dim") is not None
        else head_dim or hidden // heads
    )
    if head_dim % 2 or head_dim < 4:
        raise UserError(f"{where}: head_dim should be even and at least 4, got {head_dim}")
    _refuse_window(raw, known, layers, where)
    length = size("max_position_embeddings")
    return ModelConfig(
        family=family,
        vocab_size=size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=size("intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=number("rms_norm_eps", 1e-6, 0.0, 1.0),
        tie_word_embeddings=flag("tie_word_embeddings"),
        qkv_bias=decided(known["qkv_bias"]),
        o_bias=decided(known["o_bias"]),
        mlp_bias=False,
        qk_norm=known["qk_norm"],
        max_position_embeddings=length,
        rope=rope_.read(raw, length, where),
        bos_token_id=token("bos_token_id"),
        eos_token_id=token("eos_token_id"),
        initializer_range=number("initializer_range", 0.02, 0.0, 10.0),
        raw=raw,
    )


def _refuse(raw, known, where):
    found = raw.get("architectures")
    if found not in (None, [], [known["architecture"]]):
        raise UserError(
            f"{where}: architectures {found!r} is not supported; supported is {known['architecture']}"
        )
    act = raw.get("hidden_act", "silu")
    if act not in ("silu", "swish"):
        raise UserError(f"{where}: hidden_act {act!r} is not supported; supported is silu")
    if raw.get("mlp_bias"):
        raise UserError(f"{where}: mlp_bias {raw['mlp_bias']!r} is not supported; supported is false")
    for name in REFUSED:
        if raw.get(name):
            raise UserError(
                f"{where}: {name} {raw[name]!r} is not supported; supported is a plain dense decoder without it"
            )


def _refuse_window(raw, known, layers, where):
    """Stop at an active sliding window, by the rules of transformers: Mistral's is active unless null, Qwen's by its flag."""
    types = raw.get("layer_types") or []
    if not isinstance(types, list) or any(kind != "full_attention" for kind in types):
        other = (
            sorted({str(kind) for kind in types if kind != "full_attention"})
            if isinstance(types, list)
            else [repr(types)]
        )
        raise UserError(
            f"{where}: layer_types has {', '.join(other)}; supported is full_attention in all layers"
        )
    rule = known["sliding_window"]
    if rule is None or types and rule == "use_sliding_window":
        return
    window, first = raw.get("sliding_window", 4096), raw.get("max_window_layers", 28)
    if rule == "use_sliding_window" and (not raw.get(rule) or isinstance(first, int) and first >= layers):
        return
    if window is not None:
        raise UserError(
            f"{where}: an active sliding_window of {window!r} is not supported; supported is full attention "
            "(sliding_window null)"
        )
