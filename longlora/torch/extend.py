"""extend: a transformers model becomes a PeftModel that trains to a longer context. load: read back its
files."""

import contextlib
import copy
import functools
import os
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, PeftModelForCausalLM
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.peft import PeftAdapterMixin
from transformers.utils import cached_file

from longlora.disk import read_json, write_json, write_text
from longlora.errors import UserError
from longlora.files import adapter as adapters
from longlora.files import base_folder
from longlora.torch.attention import NAME, base_of, configure
from longlora.torch.masters import raise_trained
from longlora.torch.positions import same, set_rope

# The arguments of from_pretrained that say where a config is.
HUB = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "trust_remote_code")


class ExtendedModel(PeftModelForCausalLM):
    """A PeftModel whose files state its positions: see longlora.files.base_folder.

    What trains is float32, whatever the dtype of the base: see longlora.torch.masters.
    """

    def __init__(self, model: torch.nn.Module, peft_config: LoraConfig, **kwargs: Any):
        super().__init__(model, peft_config, **kwargs)
        raise_trained(self)
        self._note_base()

    def _note_base(self):
        """Note where the base comes from while its path, if it is relative, still leads there."""
        config = self.get_base_model().config
        self._base = config._name_or_path or None  # None for a model that comes from no file
        self._base_directory = _directory(self._base, getattr(config, "_commit_hash", None))

    def save_pretrained(
        self, save_directory: str | Path, *args: Any, is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """As PEFT's, with the positions. AutoPeftModelForCausalLM and `load` read what it writes."""
        super().save_pretrained(save_directory, *args, is_main_process=is_main_process, **kwargs)
        if not is_main_process:
            return
        config = copy.deepcopy(self.get_base_model().config)
        _store_as(config, _stored(self._base_directory))
        config.save_pretrained(base_folder.make(save_directory, self._base_directory))
        for name in kwargs.get("selected_adapters") or self.peft_config:
            place = save_directory if name == "default" else os.path.join(save_directory, name)
            path = os.path.join(place, adapters.CONFIG)
            described = read_json(path) | base_folder.fields(save_directory, self._base)
            write_json(path, described, sort_keys=True)

    def create_or_update_model_card(self, output_dir: str) -> None:
        """As PEFT's, with the way to load the positions."""
        super().create_or_update_model_card(output_dir)
        path = os.path.join(output_dir, "README.md")
        card = Path(path).read_text("utf-8")
        if base_folder.NOTE.strip() not in card:
            write_text(path, f"{card.rstrip()}\n\n{base_folder.NOTE}")

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


def _directory(base, revision=None):
    """The directory with the files of the base model `base`, a path or a name on the Hub, or None."""
    if base is None or os.path.isdir(base):
        return base and os.path.abspath(base)
    with contextlib.suppress(OSError, ValueError):
        return os.path.dirname(
            cached_file(base, base_folder.CONFIG, revision=revision, local_files_only=True)
        )
    return None


def _stored(directory):
    """The quantization_config of the weights in a directory, or None."""
    path = os.path.join(directory or "", base_folder.CONFIG)
    return read_json(path).get("quantization_config") if os.path.exists(path) else None


def _store_as(config, stored):
    """Let `config` describe weights as the files of the base store them, whatever they were in training."""
    if stored is not None:
        config.quantization_config = stored
    elif hasattr(config, "quantization_config"):
        del config.quantization_config


def lora_config(model: Any, **changes: Any) -> LoraConfig:
    """The paper's LoRA+ for `model`: r 8 and alpha 16 on the attention's linears; embedding and norms train
    whole.

    changes: arguments of peft.LoraConfig that replace these. ValueError where the model has no module whose
    class name says Attention or Norm.
    """
    inside, linears, norms = _decoder(model), set(), set()
    for name, module in model.named_modules():
        if not name.startswith(inside) or ".indexer." in name:  # what chooses keys has no gradient
            continue
        if type(module).__name__.endswith(("Attention", "MLA")):
            parts = module.named_children()
            linears |= {f"{name}.{child}" for child, part in parts if isinstance(part, torch.nn.Linear)}
        elif "Norm" in type(module).__name__ and not any(True for _ in module.children()):
            norms.add(name)
    if any(name.endswith(".gate_up_proj") for name, _ in model.named_parameters()):
        # PEFT takes every gate_proj for a part of these experts, also that of an attention.
        linears = {name for name in linears if not name.endswith(".gate_proj")}
    embedding = {name for name, part in model.named_modules() if part is model.get_input_embeddings()}
    if not linears or not norms:
        raise UserError(
            f"extend: no attention linears or no norms in {type(model).__name__}; give lora=LoraConfig(...)"
        )
    arguments: dict[str, Any] = dict(
        r=8,
        lora_alpha=16,
        lora_dropout=0.0,
        target_modules=_names(model, linears, "."),
        task_type="CAUSAL_LM",
        modules_to_save=[*_names(model, embedding, ""), *_names(model, norms, "")],
    )
    if getattr(model.config, "tie_word_embeddings", False):
        arguments["ensure_weight_tying"] = True
    return LoraConfig(**{**arguments, **changes})


def _decoder(model):
    """The prefix of the names of the modules that read text. A tower for other input has another one."""
    found = model.get_decoder() if hasattr(model, "get_decoder") else None
    embedding = model.get_input_embeddings()
    if found is None or not any(part is embedding for part in found.modules()):
        return ""
    return next(name for name, module in model.named_modules() if module is found)


def _names(model, wanted, dot):
    """The modules at the paths `wanted` in the words of PEFT.

    Their last names, which PEFT finds in every layer, or the whole paths where it would find other modules
    too. It looks for names that end in dot + last.
    """
    paths: dict[str, list[str]] = {}
    for name in sorted(wanted):
        paths.setdefault(name.rpartition(".")[2], []).append(name)
    names = []
    for last, group in sorted(paths.items()):
        found = {name for name, _ in model.named_modules() if f".{name}".endswith(dot + last)}
        names += [last] if found <= wanted else group
    return names


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
    `configure`). lora: what trains, by default `lora_config`, the paper's LoRA+; it is float32 whatever the
    dtype of the model. The result works in transformers.Trainer, TRL's SFTTrainer and your own loop. `load`
    reads what its save_pretrained writes; merge_and_unload() gives a plain transformers model, with the
    positions in its config. ValueError for an argument out of range or a model that is not supported.
    """
    _check(model, lora)
    lora = lora_config(model) if lora is None else lora
    configure(model, group_size, boundary, shift)
    set_rope(model, rope, target_length)
    return ExtendedModel(model, lora)


def _check(model, lora):
    """UserError for what cannot be extended."""
    if isinstance(model, PeftModel) or any(isinstance(part, BaseTunerLayer) for part in _modules(model)):
        raise UserError(
            "extend: this model has an adapter already; give the base model, and its LoRA as "
            "lora=LoraConfig(...)"
        )
    if not isinstance(model, PreTrainedModel):
        raise UserError(f"extend: model should be an AutoModelForCausalLM, got {type(model).__name__}")
    if model.get_output_embeddings() is None:
        raise UserError(
            f"extend: {type(model).__name__} has no language model head; load it as AutoModelForCausalLM"
        )
    if lora is not None and not isinstance(lora, LoraConfig):
        raise UserError(f"extend: lora should be a peft.LoraConfig, got {type(lora).__name__}")
    if lora is not None and lora.task_type not in (None, "CAUSAL_LM"):
        raise UserError(f"extend: lora.task_type should be CAUSAL_LM, got {lora.task_type}")


def _modules(model):
    return model.modules() if isinstance(model, torch.nn.Module) else ()


def opened(base: str | Path) -> tuple[str, dict[str, Any]]:
    """What from_pretrained takes for the model at `base`, which may be a .gguf file -> (path, keywords)."""
    path = os.fspath(base)
    if not os.path.isfile(path):
        return path, {}
    directory, file = os.path.split(os.path.abspath(path))
    how: dict[str, Any] = {"gguf_file": file}
    # Without this the weights may stay packed, and Trainer assumes that they do.
    if hasattr(transformers, "GgufConfig"):
        how["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return directory, how


def load(adapter: str | Path, base: str | Path, is_trainable: bool = False, **kwargs: Any) -> ExtendedModel:
    """Load an adapter that an extended model or `longlora train` has saved, on the model `base` -> PeftModel.

    base: the path of a directory or of a .gguf file, or a name on the Hub. The config of the adapter decides
    the positions. is_trainable: whether its parameters require gradients. kwargs go to
    AutoModelForCausalLM.from_pretrained. UserError, a ValueError, if there is no adapter at `adapter`.
    """
    if not os.path.isfile(os.path.join(adapter, adapters.CONFIG)):
        raise UserError(f"load: {adapter} is not the directory of an adapter: it has no {adapters.CONFIG}")
    place, how = opened(base)
    how |= kwargs
    kind, config = AutoModelForCausalLM, positions(adapter, place, how)
    if config is not None:
        how["config"] = config
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and config.architectures:
            # A model that also takes images or sound: AutoModelForCausalLM does not know it.
            kind = getattr(transformers, config.architectures[0], kind)
    model = kind.from_pretrained(place, attn_implementation=NAME, **how)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f".*{base_folder.KEY}")  # it is where it should be
        made = PeftModel.from_pretrained(model, adapter, is_trainable=is_trainable)
        made.__class__ = ExtendedModel
        made._note_base()
        if is_trainable:
            raise_trained(made)
            made.load_adapter(adapter, "default", is_trainable=True)  # again, without the base's rounding
    return made


def positions(adapter: str | Path, place: str, how: dict[str, Any]) -> Any:
    """The config that gives the base at `place` the adapter's positions; None if its own config has them.

    how: keywords of from_pretrained.
    """
    folder = base_folder.find(adapter)
    if folder is None:
        return None
    config = AutoConfig.from_pretrained(folder, trust_remote_code=how.get("trust_remote_code"))
    found = {name: how[name] for name in HUB if name in how}
    stored = None if "gguf_file" in how else AutoConfig.from_pretrained(place, **found)
    _store_as(config, getattr(stored, "quantization_config", None))
    return config


def _guarded(original):
    """PEFT's or transformers' load_adapter, which refuses one of ours on a model with other positions.

    Neither looks at the base that an adapter names when it is given a model.
    """

    @functools.wraps(original)
    def load_adapter(self, *args, **kwargs):
        given = args[0] if args else kwargs.get("model_id", kwargs.get("peft_model_id"))
        folder = os.path.join(given, base_folder.FOLDER) if isinstance(given, str | Path) else ""
        if os.path.isfile(os.path.join(folder, base_folder.CONFIG)):
            wanted = AutoConfig.from_pretrained(folder)
            if not same(base_of(self).config, wanted):
                raise UserError(
                    f"{given}: was trained with longer positions than this model has; load it by "
                    f"longlora.torch.load or AutoPeftModelForCausalLM, or on the model at {folder}"
                )
        return original(self, *args, **kwargs)

    return load_adapter


for _loader in (PeftModel, PeftAdapterMixin):
    _loader.load_adapter = _guarded(_loader.load_adapter)
