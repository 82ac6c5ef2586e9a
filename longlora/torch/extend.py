"""extend: a transformers model becomes a PeftModel that trains to a longer context. load: read back its
files."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, PeftModel, PeftModelForCausalLM
from transformers import AutoConfig, AutoModelForCausalLM

from longlora.decoder import rope as rope_
from longlora.decoder.families import FAMILIES
from longlora.torch.attention import NAME, configure


class ExtendedModel(PeftModelForCausalLM):
    """A PeftModel whose files state its positions: config.json lies beside adapter_config.json."""

    def save_pretrained(
        self, save_directory: str | Path, *args: Any, is_main_process: bool = True, **kwargs: Any
    ) -> None:
        super().save_pretrained(save_directory, *args, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            self.get_base_model().config.save_pretrained(save_directory)

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Tie embedding and head as transformers does, also where PEFT wraps them: the frozen and the
        trained ones.

        accelerate calls this after it has moved the parameters.
        """
        base = self.get_base_model()
        embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
        if not (hasattr(embedding, "modules_to_save") and hasattr(head, "modules_to_save")):
            base.tie_weights(*args, **kwargs)
        elif base.config.tie_word_embeddings:
            head.original_module.weight = embedding.original_module.weight
            for name, module in head.modules_to_save.items():
                module.weight = embedding.modules_to_save[name].weight


def set_rope(model: Any, type: str, target_length: int) -> str:
    """Extend the positions of `model` in place to `target_length` tokens -> one sentence with the arithmetic.

    type: "linear", "ntk", "yarn" or "llama3". Factors count from the length of pretraining, even when the
    model was extended before (longlora.decoder.rope.extend). UserError, a ValueError, for an extension that
    is not possible; ValueError for a model without a rotary embedding that follows its config.
    """
    config = model.config
    before = config.to_dict()
    raw, partial = _without_partial(before)
    family = "llama"  # transformers extends every family by every rule, as the driver does llama
    where = f"{config.model_type}'s config"
    head_dim = before.get("head_dim") or config.hidden_size // config.num_attention_heads
    base = SimpleNamespace(
        family=family,
        rope=rope_.read(raw, FAMILIES[family], config.max_position_embeddings, where),
        max_position_embeddings=config.max_position_embeddings,
        head_dim=int(head_dim * partial),
    )
    new, sentence = rope_.extend(base, type, target_length)
    after = rope_.to_config(raw, new, target_length)
    if "rope_parameters" in before:  # transformers 5
        share = {"partial_rotary_factor": partial} if partial != 1 else {}
        config.rope_parameters = after["rope_parameters"] | share
    else:
        config.rope_theta, config.rope_scaling = after["rope_theta"], after["rope_scaling"]
    config.max_position_embeddings = target_length
    for name in ("original_max_position_embeddings", "original_rope_theta"):
        if name in after:
            setattr(config, name, after[name])
    _rebuild_rotary(model)
    return sentence


def _without_partial(config):
    """Copy a config without partial_rotary_factor -> the copy, the factor.

    The rules of extension need only the number of rotated dimensions.
    """
    raw = dict(config)
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(raw.get(key), dict):
            raw[key] = dict(raw[key])
    places = [raw.get("rope_parameters") or {}, raw, raw.get("rope_scaling") or {}]
    factors = [found.pop("partial_rotary_factor", None) for found in places]
    return raw, next((factor for factor in factors[:2] if factor is not None), 1.0)


def _rebuild_rotary(model):
    """Make the rotary embeddings of the model again, from its changed config."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if hasattr(module, "inv_freq") and hasattr(module, "config")
    ]
    if not found:
        raise ValueError(f"extend: {type(model).__name__} has no rotary embedding that follows its config")
    for name, module in found:
        parent, _, child = name.rpartition(".")
        module.config = model.config
        with torch.device(module.inv_freq.device):
            setattr(model.get_submodule(parent), child, module.__class__(config=model.config))


def lora_config(model: Any, **changes: Any) -> LoraConfig:
    """The paper's LoRA+ for `model`: r 8 and alpha 16 on the attention's linears; embedding and norms train
    whole.

    changes: arguments of peft.LoraConfig that replace these. ValueError where the model has no module whose
    class name says Attention or Norm.
    """
    linears, norms = set(), set()
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if type(module).__name__.endswith("Attention"):
            linears |= {child for child, part in module.named_children() if isinstance(part, torch.nn.Linear)}
        elif "Norm" in type(module).__name__:
            norms.add(last)
    embedding = next(
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if module is model.get_input_embeddings()
    )
    if not linears or not norms:
        raise ValueError(
            f"extend: no attention linears or no norms in {type(model).__name__}; give lora=LoraConfig(...)"
        )
    arguments: dict[str, Any] = dict(
        r=8,
        lora_alpha=16,
        lora_dropout=0.0,
        target_modules=sorted(linears),
        task_type="CAUSAL_LM",
        modules_to_save=[embedding, *sorted(norms)],
    )
    if getattr(model.config, "tie_word_embeddings", False):
        arguments["ensure_weight_tying"] = True
    return LoraConfig(**{**arguments, **changes})


def extend(
    model: Any,
    target_length: int,
    rope: str = "linear",
    group_size: int | None = None,
    boundary: str = "split",
    shift: str = "half",
    lora: LoraConfig | None = None,
) -> ExtendedModel:
    """Prepare `model`, an AutoModelForCausalLM, to train to `target_length` tokens -> PeftModel. arXiv
    2309.12307.

    Its positions are interpolated (rope: "linear", "ntk", "yarn" or "llama3"). In training it attends by
    S²-Attn (group_size in tokens, by default a quarter of each sequence; boundary and shift as in
    `configure`). lora: what trains, by default `lora_config`, the paper's LoRA+. The result works in
    transformers.Trainer, TRL's SFTTrainer and your own loop. `load` reads what its save_pretrained writes;
    merge_and_unload() gives a plain transformers model, with the positions in its config. ValueError for an
    argument out of range or a model that is not supported.
    """
    lora = lora_config(model) if lora is None else lora
    if lora.task_type not in (None, "CAUSAL_LM"):
        raise ValueError(f"extend: lora.task_type should be CAUSAL_LM, got {lora.task_type}")
    configure(model, group_size, boundary, shift)
    set_rope(model, rope, target_length)
    return ExtendedModel(model, lora)


def load(adapter: str | Path, base: str | Path, is_trainable: bool = False, **kwargs: Any) -> ExtendedModel:
    """Load an adapter that an extended model or `longlora train` has saved, on the model `base` -> PeftModel.

    The config beside the adapter decides the positions. is_trainable: whether its parameters require
    gradients. kwargs go to AutoModelForCausalLM.from_pretrained.
    """
    config = AutoConfig.from_pretrained(adapter)
    model = AutoModelForCausalLM.from_pretrained(base, config=config, attn_implementation=NAME, **kwargs)
    made = PeftModel.from_pretrained(model, adapter, is_trainable=is_trainable)
    made.__class__ = ExtendedModel
    return made
