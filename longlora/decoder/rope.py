"""Rotary position embedding: read the frequencies that a config asks for, extend them, write them back.

Position interpolation (arXiv 2306.15595), NTK-aware theta, YaRN (arXiv 2309.00071) and Llama 3's rule each
give one table of inverse frequencies. transformers computes them in float32. Here they are float64 and only
the cosines and sines are rounded, so long positions lose no precision.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from longlora.decoder.families import FAMILIES, Family
from longlora.errors import UserError

TYPES = ("default", "linear", "ntk", "yarn", "llama3")
EXTENSIONS = TYPES[1:]
# The parameters of a type in a config, and the required ones among them, as transformers validates them.
PARAMETERS = {
    "linear": ("factor",),
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
REQUIRED = {"linear": ("factor",), "yarn": ("factor",), "llama3": PARAMETERS["llama3"]}


@dataclass(frozen=True)
class Rope:
    """The rotary embedding of a model. `original_length` is its length in pretraining, before any extension.

    "ntk" is "default" with a raised `theta`; `original_theta` is the theta of pretraining.
    """

    type: str
    theta: float
    original_length: int
    factor: float = 1.0
    original_theta: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None


def _number(found, name, where, low, high=1e9):
    value = found[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise UserError(f"{where}: {name} should be a number from {low:g} to {high:g}, got {value!r}")
    return value


def read(raw: dict[str, Any], family: Family, max_length: int, where: str) -> Rope:
    """Read the Rope of a config.json that is spelled for transformers 4 or 5.

    raw: the config; family: its row of FAMILIES; max_length: its max_position_embeddings; where: its name in
    messages. UserError names what is not supported.
    """
    for key in ("rope_scaling", "rope_parameters"):
        if raw.get(key) is not None and not isinstance(raw[key], dict):
            raise UserError(f"{where}: {key} should be an object, got {raw[key]!r}")
    # As in transformers 5, the old key wins over the new one. A parameter may also stand at the top level.
    found = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    nested = sorted(key for key, value in found.items() if isinstance(value, dict))
    if nested:
        raise UserError(
            f"{where}: rope differs by layer type ({', '.join(nested)}); supported is one rope for all layers"
        )
    kind = found.get("rope_type", found.get("type")) or "default"
    if kind not in family.rope_types:
        verb = "is" if len(family.rope_types) == 1 else "are"
        raise UserError(
            f"{where}: rope type {kind!r} is not supported; supported {verb} {', '.join(family.rope_types)}"
        )
    found["rope_theta"] = found.get("rope_theta", raw.get("rope_theta")) or family.theta
    partial = found.get("partial_rotary_factor", raw.get("partial_rotary_factor")) or 1.0
    if partial != 1:
        raise UserError(f"{where}: partial_rotary_factor {partial!r} is not supported; supported is 1")
    original = (
        raw.get("original_max_position_embeddings")
        or found.get("original_max_position_embeddings")
        or max_length
    )
    if isinstance(original, bool) or not isinstance(original, int) or not 1 <= original <= 1 << 31:
        raise UserError(
            f"{where}: original_max_position_embeddings should be an integer above 0, got {original!r}"
        )
    theta = float(_number(found, "rope_theta", where, 2.0, 1e12))
    if kind != "default":
        return _scaled(kind, found, theta, original, where)
    if raw.get("original_rope_theta") is None:
        return Rope("default", theta, max_length if family.states_original_length else original)
    before = float(_number(raw, "original_rope_theta", where, 2.0, 1e12))
    return Rope("ntk", theta, original, float(math.ceil(max_length / original)), original_theta=before)


def _scaled(kind, found, theta, original, where):
    """-> the Rope of a type that has parameters, from the dict `found` of them."""
    missing = [name for name in REQUIRED[kind] if found.get(name) is None]
    if missing:
        raise UserError(f"{where}: rope of type {kind} lacks {', '.join(missing)}")
    values = {name: found[name] for name in PARAMETERS[kind] if found.get(name) is not None}
    truncate = values.pop("truncate", None)
    if truncate is not None and not isinstance(truncate, bool):
        raise UserError(f"{where}: truncate should be true or false, got {truncate!r}")
    values = {name: float(_number(values, name, where, 1.0 if name == "factor" else 1e-3)) for name in values}
    if kind == "llama3" and not 0 < values["low_freq_factor"] < values["high_freq_factor"]:
        raise UserError(
            f"{where}: high_freq_factor should be above low_freq_factor, "
            f"got {values['high_freq_factor']:g} and {values['low_freq_factor']:g}"
        )
    return Rope(kind, theta, original, truncate=truncate, **values)


def inverse_frequencies(rope: Rope, head_dim: int) -> tuple[np.ndarray, float]:
    """Give float64 inverse frequencies [head_dim / 2] and the factor on cosines and sines (yarn: not 1)."""
    exponent = np.arange(0, head_dim, 2) / head_dim
    frequency = rope.theta**-exponent
    if rope.type in ("default", "ntk"):
        return frequency, 1.0
    if rope.type == "linear":
        return frequency / rope.factor, 1.0
    if rope.type == "llama3":
        return _llama3(rope, frequency), 1.0
    return _yarn(rope, head_dim, frequency)


def _llama3(rope, frequency):
    """Llama 3.1's rule: keep fast dimensions, interpolate slow ones, ramp between them."""
    turns = rope.original_length * frequency / (2 * math.pi)
    keep = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)
    return frequency * (keep + (1 - keep) / rope.factor)


def _yarn(rope, head_dim, frequency):
    """arXiv 2309.00071 section 3.2: keep fast dimensions, interpolate slow ones, ramp between them."""

    def dimension(turns):
        return head_dim * math.log(rope.original_length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast or 32), dimension(rope.beta_slow or 1)
    if rope.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = np.clip((np.arange(head_dim // 2) - low) / ((high - low) or 0.001), 0, 1)
    factor = rope.attention_factor
    if factor is None:
        factor = yarn_attention(rope.factor)
        if rope.mscale and rope.mscale_all_dim:
            one, other = (yarn_attention(rope.factor, x) for x in (rope.mscale, rope.mscale_all_dim))
            factor = one / other
    return frequency * (1 - ramp + ramp / rope.factor), factor


def yarn_attention(factor: float, mscale: float = 1.0) -> float:
    """What yarn multiplies cosines and sines by, unless a config says otherwise."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def tables(rope: Rope, head_dim: int, length: int, first: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Give cos and sin, float32 [length, head_dim / 2], of positions from `first` on, rounded once."""
    frequency, factor = inverse_frequencies(rope, head_dim)
    cos, sin = np.empty((2, length, head_dim // 2), np.float32)
    for start in range(0, length, 8192):
        positions = first + np.arange(start, min(start + 8192, length))
        angle = positions[:, None] * frequency
        cos[start : start + 8192] = np.cos(angle) * factor
        sin[start : start + 8192] = np.sin(angle) * factor
    return cos, sin


def extend(config: Any, type: str, target_length: int) -> tuple[Rope, str]:
    """Give the rope that extends `config`, a ModelConfig, to `target_length` tokens, and how it was computed.

    Factors count from the length of pretraining, even when the base was extended before. linear and ntk use
    ceil(target / original), as upstream's LongLoRA does (which forgets an earlier extension). yarn uses
    target / original exactly, because transformers 4 recomputes it that way. A base whose own rope is llama3
    or yarn can only be extended by the same rule: llama3's factor grows by target / max_position_embeddings
    (Llama 3.1 has factor 8 for 131072 positions, not 16), and an explicit attention_factor of yarn is
    computed anew. UserError for an extension that the base's family does not have, or a target that is not
    above the base's length.
    """
    base, reach = config.rope, config.max_position_embeddings
    if type not in EXTENSIONS:
        raise UserError(f"rope type should be one of {', '.join(EXTENSIONS)}, got {type!r}")
    possible = [name for name in EXTENSIONS if _written(name) in FAMILIES[config.family].rope_types]
    if type not in possible:
        raise UserError(f"a {config.family} model can only be extended by {', '.join(possible)}, got {type}")
    original = reach if base.type == "llama3" else base.original_length
    if isinstance(target_length, bool) or not isinstance(target_length, int) or target_length <= original:
        raise UserError(
            f"target length should be above the {original} tokens of the base model, got {target_length!r}"
        )
    if base.type in ("llama3", "yarn") and type != base.type:
        raise UserError(
            f"the base model's rope is {base.type} (factor {base.factor:g}); it can only be extended by "
            f"{base.type}, got {type}"
        )
    if type == "ntk" and config.head_dim <= 2:
        raise UserError(
            "rope type should not be ntk for a model that rotates 2 dimensions: ntk spreads over more"
        )
    factor = float(math.ceil(target_length / original))
    before = (
        ""
        if base.type == "default"
        else f" (the base was extended before: {base.type}, factor {base.factor:g})"
    )
    theta = base.original_theta or base.theta
    if type == "linear":
        rope = Rope("linear", theta, original, factor)
        text = f"linear, factor ceil({target_length} / {original}) = {factor:g}"
    elif type == "ntk":
        raised = theta * factor ** (config.head_dim / (config.head_dim - 2))
        rope = Rope("ntk", raised, original, factor, original_theta=theta)
        text = f"ntk, factor ceil({target_length} / {original}) = {factor:g}, theta {theta:g} -> {raised:g}"
    elif type == "yarn":
        factor = target_length / original
        keep = replace(base, attention_factor=None) if base.type == "yarn" else Rope("yarn", theta, original)
        rope = replace(keep, factor=factor)
        text = f"yarn, factor {target_length} / {original} = {factor:g}"
    elif base.type == "llama3":
        factor = base.factor * target_length / original
        rope, before = replace(base, factor=factor), ""
        text = f"llama3, factor {base.factor:g} x {target_length} / {original} = {factor:g}"
    else:
        rope = Rope("llama3", theta, original, factor, low_freq_factor=1.0, high_freq_factor=4.0)
        text = f"llama3, factor ceil({target_length} / {original}) = {factor:g}"
    return rope, f"rope: {text}{before}"


def _written(type):
    """The name of a rope type in a config."""
    return "default" if type == "ntk" else type


def to_config(raw: dict[str, Any], rope: Rope, target_length: int) -> dict[str, Any]:
    """Copy the config `raw` with `rope` and `target_length` positions, in the keys of transformers 4 and 5.

    The length and theta of pretraining stand at the top level, where neither version warns about them.
    """
    parameters: dict[str, Any] = {"rope_type": _written(rope.type)}
    for name in PARAMETERS.get(rope.type, ()):
        if getattr(rope, name) is not None:
            parameters[name] = getattr(rope, name)
    if rope.type in ("yarn", "llama3"):
        parameters["original_max_position_embeddings"] = rope.original_length
    out = {**raw, "max_position_embeddings": target_length, "rope_theta": rope.theta}
    out["rope_scaling"] = (
        None if parameters["rope_type"] == "default" else {**parameters, "type": parameters["rope_type"]}
    )
    out["rope_parameters"] = {**parameters, "rope_theta": rope.theta}
    out.pop("original_max_position_embeddings", None)
    out.pop("original_rope_theta", None)
    if rope.original_length != target_length:
        out["original_max_position_embeddings"] = rope.original_length
    if rope.original_theta is not None:
        out["original_rope_theta"] = rope.original_theta
    return out
