"""What a run trains beside or instead of the base's weights, in PEFT's words."""

import math
from dataclasses import dataclass, replace

from longlora.decoder.config import ModelConfig
from longlora.errors import UserError

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
# Modules that can be trained whole.
SAVED = (
    "embed_tokens",
    "lm_head",
    "input_layernorm",
    "post_attention_layernorm",
    "norm",
    "q_norm",
    "k_norm",
    "model.norm",
)


@dataclass(frozen=True)
class LoraConfig:
    """What is trained. The defaults are LongLoRA's (section 3.3): LoRA on attention; embedding, norms whole.

    Fields are those of PEFT's LoraConfig. target_modules and modules_to_save may be given as a list or None,
    target_modules as "all-linear". UserError for a value out of range and for an unknown module.
    """

    r: int = 8
    lora_alpha: float = 16
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    modules_to_save: tuple[str, ...] = ("embed_tokens", "input_layernorm", "post_attention_layernorm", "norm")
    use_rslora: bool = False

    def __post_init__(self):
        def number(value, kinds):
            return isinstance(value, kinds) and not isinstance(value, bool) and 0 < value < 1 << 20

        if not number(self.r, int):
            raise UserError(f"r should be an integer above 0, got {self.r!r}")
        if not number(self.lora_alpha, (int, float)):
            raise UserError(f"lora_alpha should be a number above 0, got {self.lora_alpha!r}")
        if not isinstance(self.use_rslora, bool):
            raise UserError(f"use_rslora should be true or false, got {self.use_rslora!r}")
        for field, known in (("target_modules", (*ALL_LINEAR, *FUSED)), ("modules_to_save", SAVED)):
            value = getattr(self, field)
            if value is None:
                value = ()
            elif value == "all-linear" and field == "target_modules":
                value = ALL_LINEAR
            if not isinstance(value, (list, tuple, set)) or any(name not in known for name in value):
                raise UserError(f"{field} should be a list of {', '.join(known)}, got {value!r}")
            object.__setattr__(self, field, tuple(value))

    @property
    def scale(self) -> float:
        """The factor on B A: alpha / r, or alpha / sqrt(r) with rsLoRA."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def for_model(self, config: ModelConfig) -> "LoraConfig":
        """The same with target_modules as a model of `config` names them.

        All parts of a fused linear together name it: q_proj, k_proj and v_proj are Phi-3's qkv_proj.
        UserError for a linear that the family does not have.
        """
        has = (*config.qkv_modules, "o_proj", *config.gate_up_modules, "down_proj")
        named = self.target_modules
        for fused, parts in FUSED.items():
            if fused in has and set(parts) <= set(named):
                named = tuple(dict.fromkeys(fused if name in parts else name for name in named))
        missing = [name for name in named if name not in has]
        if missing:
            raise UserError(
                f"target_modules: a {config.family} model has no {', '.join(missing)}; "
                f"it has {', '.join(has)}"
            )
        return self if named == self.target_modules else replace(self, target_modules=named)

    def tensor_shapes(self, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Give name -> shape of each tensor trained in a model of `config`. UserError as in `for_model`.

        As in PEFT, an entry of modules_to_save means each module whose name ends in it: "norm" means all
        norms.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        targets = self.for_model(config).target_modules
        for name, shape in config.tensor_shapes().items():
            module, _, kind = name.rpartition(".")
            if kind != "weight":
                continue
            if module.rpartition(".")[2] in targets:
                shapes[f"{module}.lora_A.weight"] = (self.r, shape[1])
                shapes[f"{module}.lora_B.weight"] = (shape[0], self.r)
            elif module.endswith(self.modules_to_save):
                shapes[name] = shape
        if config.tie_word_embeddings and "lm_head" in self.modules_to_save:
            shapes["model.embed_tokens.weight"] = (config.vocab_size, config.hidden_size)
        return shapes
