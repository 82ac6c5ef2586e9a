"""extend: a model of transformers becomes a PeftModel that is trained to a longer context; load: the way back from its files."""

from types import SimpleNamespace

import torch
from peft import LoraConfig, PeftModel, PeftModelForCausalLM
from transformers import AutoConfig, AutoModelForCausalLM

from longlora.decoder import rope as rope_
from longlora.decoder.families import FAMILIES
from longlora.torch.attention import NAME, configure


class ExtendedModel(PeftModelForCausalLM):
    """A PeftModel whose files say what the positions are: config.json, with the rope, stands beside adapter_config.json."""

    def save_pretrained(self, save_directory, *args, is_main_process=True, **kwargs):
        super().save_pretrained(save_directory, *args, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            self.get_base_model().config.save_pretrained(save_directory)

    def tie_weights(self, *args, **kwargs):
        """As transformers has it, also where PEFT wraps embedding and head: their frozen weights, and their trained ones.

        accelerate calls it after it moved the parameters.
        """
        base = self.get_base_model()
        embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
        if not (hasattr(embedding, "modules_to_save") and hasattr(head, "modules_to_save")):
            base.tie_weights(*args, **kwargs)
        elif base.config.tie_word_embeddings:
            head.original_module.weight = embedding.original_module.weight
            for name, module in head.modules_to_save.items():
                module.weight = embedding.modules_to_save[name].weight


def set_rope(model, type, target_length):
    """Extend the positions of `model` in place to `target_length` tokens -> one sentence with the arithmetic.

    type "linear", "ntk", "yarn" or "llama3", counted from the length of pretraining, also when the model was extended before
    (longlora.decoder.rope.extend). errors.UserError, a ValueError, says what cannot be extended.
    """
    config = model.config
    before = config.to_dict()
    raw = {
        **before,
        **{
            key: dict(before[key])
            for key in ("rope_scaling", "rope_parameters")
            if isinstance(before.get(key), dict)
        },
    }
    dim = before.get("head_dim") or config.hidden_size // config.num_attention_heads
    partial = next(
        (
            found["partial_rotary_factor"]
            for found in (raw.get("rope_parameters") or {}, raw)
            if found.get("partial_rotary_factor") is not None
        ),
        1.0,
    )
    for found in (raw, raw.get("rope_parameters") or {}, raw.get("rope_scaling") or {}):
        found.pop(
            "partial_rotary_factor", None
        )  # no rule asks for it but by the number of rotated dimensions
    # In transformers every family takes every type of rope, as llama does in the driver.
    family = "llama"
    base = SimpleNamespace(
        family=family,
        rope=rope_.read(
            raw, FAMILIES[family], config.max_position_embeddings, f"{config.model_type}'s config"
        ),
        max_position_embeddings=config.max_position_embeddings,
        head_dim=int(dim * partial),
    )
    new, sentence = rope_.extend(base, type, target_length)
    after = rope_.to_config(raw, new, target_length)
    if "rope_parameters" in before:  # transformers 5
        config.rope_parameters = after["rope_parameters"] | (
            {"partial_rotary_factor": partial} if partial != 1 else {}
        )
    else:
        config.rope_theta, config.rope_scaling = after["rope_theta"], after["rope_scaling"]
    config.max_position_embeddings = target_length
    for name in ("original_max_position_embeddings", "original_rope_theta"):
        if name in after:
            setattr(config, name, after[name])
    made = 0
    for name, module in list(model.named_modules()):
        if hasattr(module, "inv_freq") and hasattr(module, "config"):
            parent, _, child = name.rpartition(".")
            module.config = config
            with torch.device(module.inv_freq.device):
                setattr(model.get_submodule(parent), child, module.__class__(config=config))
            made += 1
    if not made:
        raise ValueError(f"extend: {module_name(model)} has no rotary embedding that its config decides")
    return sentence


def module_name(model):
    return type(model).__name__


def lora_config(model, **changes):
    """The paper's LoRA+ for `model`: r 8, alpha 16 on the linears of the attention, embedding and norms trained whole.

    changes are LoraConfig's own words.
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
            f"extend: found no attention linears or norms in {module_name(model)}; give lora=LoraConfig(...)"
        )
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    return LoraConfig(
        **{
            **dict(
                r=8,
                lora_alpha=16,
                lora_dropout=0.0,
                target_modules=sorted(linears),
                task_type="CAUSAL_LM",
                modules_to_save=[embedding, *sorted(norms)],
            ),
            **({"ensure_weight_tying": True} if tied else {}),
            **changes,
        }
    )


def extend(model, target_length, rope="linear", group_size=None, boundary="split", shift="half", lora=None):
    """Make `model`, an AutoModelForCausalLM, ready to be trained to `target_length` tokens -> PeftModel. arXiv 2309.12307.

    Positions are interpolated (rope: "linear", "ntk", "yarn", "llama3"), S2-Attn is on in training (group_size in tokens, by
    default a quarter of each sequence), LoRA is on the attention's linears, embedding and norms are trained whole; `lora`, a
    peft.LoraConfig, says otherwise. For transformers.Trainer, TRL's SFTTrainer or a loop of your own. What it saves `load`
    brings back; merge_and_unload() gives a plain model of transformers, with the positions in its config.
    ValueError says what is out of range or not supported.
    """
    lora = lora_config(model) if lora is None else lora
    if lora.task_type not in (None, "CAUSAL_LM"):
        raise ValueError(f"extend: lora.task_type should be CAUSAL_LM, got {lora.task_type}")
    configure(model, group_size, boundary, shift)
    set_rope(model, rope, target_length)
    return ExtendedModel(model, lora)


def load(adapter, base, is_trainable=False, **kwargs):
    """The files that an extended model's save_pretrained wrote, or `longlora train`, on the model `base` -> PeftModel.

    The config beside the adapter decides the positions. kwargs go to AutoModelForCausalLM.from_pretrained.
    """
    config = AutoConfig.from_pretrained(adapter)
    model = AutoModelForCausalLM.from_pretrained(base, config=config, attn_implementation=NAME, **kwargs)
    made = PeftModel.from_pretrained(model, adapter, is_trainable=is_trainable)
    made.__class__ = ExtendedModel
    return made
