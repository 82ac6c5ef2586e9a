"""The positions of a transformers model, extended in place.

The config is the only place that says how far a model reaches: files keep nothing else. So an extension is
accepted only if the config's class takes it, reads it back from JSON, and gives rotary embeddings that
differ from the old ones. What else depends on these lines of the config is taken over too: some families
scale their scores by them.
"""

import copy
import tempfile
from types import SimpleNamespace
from typing import Any

import torch

from longlora.decoder import rope as rope_
from longlora.decoder.families import FAMILIES
from longlora.errors import UserError

ORIGINAL = "original_max_position_embeddings"
# The attributes of a config that say where its positions reach.
LINES = (
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "rotary_emb_base",  # GPT-NeoX's rope_theta before transformers 5
    "max_position_embeddings",
    ORIGINAL,
    "original_rope_theta",
)
KNOWN = {"rope_type", "type", "rope_theta", ORIGINAL, "partial_rotary_factor"}
KNOWN |= {name for names in rope_.PARAMETERS.values() for name in names}


def set_rope(model: Any, type: str, target_length: int) -> str:
    """Extend the positions of `model` in place to `target_length` tokens -> one sentence with the arithmetic.

    type: "linear", "ntk", "yarn" or "llama3". Factors count from the length of pretraining, even when the
    model was extended before (longlora.decoder.rope.extend). UserError, a ValueError, for an extension that
    is not possible, or a model that does not follow its config; the model is then as it was.
    """
    config = model.config.get_text_config(decoder=True)
    rotary = _rotary(model, config)
    new, sentence = _extended(config, rotary[0][1], type, target_length)
    try:
        again = _read_back(new)
    except Exception as error:  # each family's config class has its own checks
        again, sentence = _in_other_words(new, rotary[0][1], type, sentence, error)
    replaced = {name: _follower(module, again, type) for name, module in rotary}
    for name, module in rotary:
        if _equal(module, replaced[name]):
            raise UserError(
                f"extend: {name} of {_class(model)} does not change with its config (rope type {type}), so "
                "its positions cannot be extended"
            )
    numbers = _numbers(model, config, new)
    write(new, config)
    for name, module in replaced.items():
        parent, _, child = name.rpartition(".")
        module.config = config
        setattr(model.get_submodule(parent), child, module)
    for name, key, value in numbers:
        setattr(model.get_submodule(name), key, value)
    return sentence


def write(source: Any, target: Any) -> None:
    """Give the config `target` the positions of the config `source`."""
    for name in LINES:
        if name in vars(source) or name in source.attribute_map:
            setattr(target, name, copy.deepcopy(getattr(source, name)))


def same(a: Any, b: Any) -> bool:
    """Whether the two configs have the same positions."""
    a, b = (config.get_text_config(decoder=True) for config in (a, b))
    return all(getattr(a, name, None) == getattr(b, name, None) for name in LINES)


def _class(model):
    return type(model).__name__


def _first_line(error):
    return str(error).strip().splitlines()[-1].strip()


def _rotary(model, config):
    """The rotary embeddings that follow `config`: [(name, module)]. UserError where there are none."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if hasattr(module, "inv_freq") and getattr(module, "config", None) is config
    ]
    length = getattr(config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        if any(key.endswith("_inv_freq") and key != "original_inv_freq" for key in module._buffers):
            raise UserError(
                f"extend: {name} of {_class(model)} has positions for each kind of layer; supported is one "
                "kind of positions for all layers"
            )
    if not found or not isinstance(length, int) or getattr(config, "alibi", False):
        raise UserError(
            f"extend: {_class(model)} has no rotary embedding that follows its config, so its positions "
            "cannot be extended"
        )
    return found


def _extended(config, rotary, type, target_length):
    """A copy of `config` with the positions -> the copy, the sentence."""
    before = config.to_dict()
    raw, partial = _without_partial(before)
    family = "llama"  # transformers extends every family by every rule, as the driver does llama
    base = SimpleNamespace(
        family=family,
        rope=rope_.read(
            raw, FAMILIES[family], config.max_position_embeddings, f"{config.model_type}'s config"
        ),
        max_position_embeddings=config.max_position_embeddings,
        head_dim=2 * rotary.inv_freq.shape[-1],
    )
    new, sentence = rope_.extend(base, type, target_length)
    after = rope_.to_config(raw, new, target_length)
    extended = copy.deepcopy(config)
    if "rope_parameters" in before:  # transformers 5
        own = before["rope_parameters"] or {}
        kept = {key: value for key, value in own.items() if key not in KNOWN}
        if ORIGINAL in own:  # some families scale their queries by it
            after["rope_parameters"].setdefault(ORIGINAL, own[ORIGINAL])
        if partial is not None:
            kept["partial_rotary_factor"] = partial
        extended.rope_parameters = after["rope_parameters"] | kept
    else:
        extended.rope_theta, extended.rope_scaling = after["rope_theta"], after["rope_scaling"]
        if hasattr(config, "rotary_emb_base"):
            extended.rotary_emb_base = after["rope_theta"]
    extended.max_position_embeddings = target_length
    for name in (ORIGINAL, "original_rope_theta"):
        if name in after:
            setattr(extended, name, after[name])
    return extended, sentence


def _without_partial(config):
    """Copy a config without partial_rotary_factor -> the copy, the factor or None.

    The rules of extension need only the number of rotated dimensions.
    """
    raw = dict(config)
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(raw.get(key), dict):
            raw[key] = dict(raw[key])
    places = [raw.get("rope_parameters") or {}, raw, raw.get("rope_scaling") or {}]
    factors = [found.pop("partial_rotary_factor", None) for found in places]
    return raw, next((factor for factor in factors[:2] if factor is not None), None)


def _in_other_words(new, rotary, type, sentence, error):
    """Say linear interpolation as the config class of `new` wants it, in `new` -> the config as read back,
    the sentence. UserError with `error`, the refusal of the usual words, if there are no such words.

    Before transformers 5 some classes want exactly two keys. Phi-3's takes LongRoPE alone: with equal factors
    it is linear interpolation that also scales cos and sin, by a rule that every reader of such files knows
    and few can be told to leave out; so it stays, and is said.
    """
    for words in _linear_words(new, rotary.inv_freq.shape[-1]) if type == "linear" else ():
        for name, value in words.items():
            setattr(new, name, value)
        try:
            again = _read_back(new)
        except Exception:
            continue
        scale = _follower(rotary, again, type).attention_scaling
        return (
            again,
            f"{sentence}; as longrope, which scales cos and sin by {scale:.4g}" if scale != 1 else sentence,
        )
    raise UserError(
        f"extend: a {new.model_type} config does not take rope type {type} ({_first_line(error)}); ntk "
        "changes rope_theta alone"
    )


def _linear_words(config, pairs):
    """What to set in a config for linear interpolation of `pairs` frequencies: one dict for each way."""
    old = not hasattr(config, "rope_parameters")
    usual = config.rope_scaling if old else config.rope_parameters
    factors = [usual["factor"]] * pairs
    if old:
        yield {"rope_scaling": {"type": "linear", "factor": usual["factor"]}}
        yield {"rope_scaling": {"type": "longrope", "short_factor": factors, "long_factor": factors}}
    else:
        kept = {key: value for key, value in usual.items() if key != "factor"}
        long = dict(rope_type="longrope", short_factor=factors, long_factor=factors)
        yield {"rope_parameters": kept | long | {ORIGINAL: getattr(config, ORIGINAL)}}


def _read_back(config):
    """The config as a reader of its file sees it."""
    with tempfile.TemporaryDirectory() as directory:
        config.save_pretrained(directory)
        return type(config).from_pretrained(directory)


def _follower(rotary, config, rope):
    """A rotary embedding of the same kind that follows `config`, on the same device."""
    try:
        with torch.device(rotary.inv_freq.device):
            return type(rotary)(config=config)
    except (ValueError, KeyError) as error:
        raise UserError(f"extend: rope type {rope} is not possible here: {_first_line(error)}") from None


def _equal(a, b):
    same = a.inv_freq.shape == b.inv_freq.shape and torch.equal(a.inv_freq, b.inv_freq)
    return same and getattr(a, "attention_scaling", 1.0) == getattr(b, "attention_scaling", 1.0)


def _numbers(model, config, new):
    """The numbers that modules of `model` take from the lines that differ in `new`: [(name, key, value)].

    UserError where a tensor has another shape with it: positions that are not a rotary embedding.
    """
    whole = copy.deepcopy(model.config)
    before = _bare(model, whole)
    text = whole.get_text_config(decoder=True)
    write(new, text)
    after = _bare(model, whole)
    shapes = {name: x.shape for name, x in _tensors(before)}
    for name, x in _tensors(after):
        if "inv_freq" not in name and x.shape != shapes.get(name):
            raise UserError(
                f"extend: {name} of {_class(model)} has a row for each position, so its positions cannot be "
                "extended"
            )
    found, modules = [], dict(before.named_modules())
    for name, module in after.named_modules():
        old = vars(modules[name])
        if "inv_freq" in module._buffers:
            continue
        for key, value in vars(module).items():
            if type(value) in (int, float) and old.get(key) != value:
                found.append((name, key, value))
    return found


def _bare(model, config):
    with torch.device("meta"):
        return type(model)(copy.deepcopy(config))


def _tensors(model):
    return [*model.named_parameters(), *model.named_buffers()]
