"""A run that trains an adapter further: the options that the adapter decides, and which adapter it is."""

from dataclasses import replace
from typing import Any

from longlora.decoder.config import ModelConfig, read_config
from longlora.decoder.lora import LoraConfig
from longlora.errors import UserError
from longlora.files import adapter
from longlora.training.options import TrainOptions


def take_over(o: TrainOptions, base: ModelConfig) -> tuple[LoraConfig, dict[str, Any] | None]:
    """Set the options that the adapter at o.adapter decides -> its LoraConfig, and its config's dict or None.

    base: the config of o.model. UserError for an adapter that does not fit it, and for an option that was
    given and differs.
    """
    assert o.adapter is not None
    lora, raw = adapter.describe(o.adapter, base, o.model)
    config = base if raw is None else read_config(raw)
    length = config.max_position_embeddings
    extended = (config.rope, length) != (base.rope, base.max_position_embeddings)
    decided: dict[str, Any] = {
        "r": lora.r,
        "lora_alpha": float(lora.lora_alpha),
        "target_modules": lora.target_modules,
        "modules_to_save": lora.modules_to_save,
        "target_length": length,
    }
    if extended:  # else there is no rope_type in the arithmetic of the run
        decided["rope_type"] = config.rope.type
    for name, value in decided.items():
        given = getattr(o, name)
        if name in o.given and not _same(name, given, value, lora, config):
            got, wanted = (" ".join(x) or "none" if isinstance(x, tuple) else x for x in (given, value))
            raise UserError(
                f"{name} should be {wanted}, as in the adapter {o.adapter}, got {got}; leave {name} out"
            )
        setattr(o, name, value)
    if not extended:
        o.target_length = None
    return lora, raw


def _same(name, given, value, lora, config):
    """Whether the option `name` means the same as `given` and as `value`, that of the adapter."""
    if name not in ("target_modules", "modules_to_save"):
        return given == value
    if given == ("all-linear",):
        given = "all-linear"
    return replace(lora, **{name: given}).tensor_shapes(config) == lora.tensor_shapes(config)
