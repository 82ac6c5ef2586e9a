"""`python -m longlora.torch.authors DIR OUT`: import what the LongLoRA authors' scripts wrote as a PEFT
adapter.

Their get_trainable_weights.py writes embedding and norms beside the adapter, to trainable_params.bin: a
state dict by torch.save, with names that lack their first 17 characters, "base_model.model.". PEFT does not
read it, and neither file says how far the context was extended. OUT is one PEFT adapter with
modules_to_save, and a config.json that has the rope.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from longlora import cli
from longlora.decoder import rope
from longlora.decoder.config import read_config
from longlora.decoder.lora import LoraConfig
from longlora.errors import UserError
from longlora.files import adapter
from longlora.files.model_file import some, to_float32
from longlora.files.open_model import open_model
from longlora.files.safetensors import SafetensorsFile
from longlora.guard import guarded

PARAMETERS, WEIGHTS = "trainable_params.bin", ("adapter_model.bin", "adapter_model.safetensors")


def import_adapter(
    directory: str | Path,
    output_dir: str | Path,
    base: str | Path,
    target_length: int,
    cut_embedding: bool = False,
) -> list[str]:
    """Import the adapter that the authors' scripts wrote -> a list of lines that say what was done.

    directory: their files; output_dir: a new directory for the adapter; base: the model they trained.
    target_length: the tokens they trained to (their --model_max_length). cut_embedding: leave out rows of
    the embedding that the base does not have (fine-tune.py adds a [PAD] token and its row). UserError,
    before anything is written, names files and tensors that are missing, unknown, of another shape or not
    finite.
    """
    model = open_model(base)
    if model.config.rope.type != "default":
        raise UserError(
            f"{model.path}: was extended before (rope {model.config.rope.type}); the authors' script ignores "
            "that, so the positions that the adapter was trained for are unknown"
        )
    extended, sentence = rope.extend(model.config, "linear", target_length)
    raw = rope.to_config(model.config.raw, extended, target_length)
    described = adapter.read_lora(directory)
    if described.modules_to_save:
        raise UserError(
            f"{directory}: has {', '.join(described.modules_to_save)} in the adapter itself; PEFT reads it "
            "without an import"
        )
    whole_path, lora_path = os.path.join(directory, PARAMETERS), _weights(directory)
    if not os.path.exists(whole_path):
        raise UserError(
            f"{directory}: has no {PARAMETERS}; the authors' get_trainable_weights.py makes it from "
            "pytorch_model.bin"
        )
    parts, whole = _read(lora_path), _read(whole_path)
    foreign = [name for name in parts if not name.startswith(adapter.PREFIX) or ".lora_" not in name]
    if foreign:
        raise UserError(f"{lora_path}: {len(foreign)} tensors do not belong to a PEFT LoRA: {some(foreign)}")
    foreign = [name for name in whole if ".lora_" in name or name.startswith(adapter.PREFIX)]
    if foreign:
        raise UserError(
            f"{whole_path}: {len(foreign)} tensors do not belong to the base model: {some(foreign)}"
        )
    lines = [sentence, *_cut(whole, model, whole_path, cut_embedding)]
    config = read_config(raw)
    modules = _modules(whole)
    lora = LoraConfig(
        described.r, described.lora_alpha, described.target_modules, modules, described.use_rslora
    )
    wanted = lora.tensor_shapes(config)
    for path, found, where in (
        (lora_path, {name.removeprefix(adapter.PREFIX): x for name, x in parts.items()}, True),
        (whole_path, whole, False),
    ):
        adapter.check(
            found, {name: shape for name, shape in wanted.items() if (".lora_" in name) == where}, path
        )
    tensors = {**{name.removeprefix(adapter.PREFIX): x for name, x in parts.items()}, **whole}
    if os.path.exists(output_dir) and (not os.path.isdir(output_dir) or os.listdir(output_dir)):
        raise UserError(f"{output_dir}: exists and is not an empty directory")
    adapter.save(output_dir, tensors, lora, model, raw, model.tokenizer() if model.has_tokenizer() else None)
    return [
        *lines,
        f"LoRA r {lora.r} on {', '.join(lora.target_modules)}; whole: {', '.join(modules)}",
        f"saved {output_dir}",
    ]


def _weights(directory):
    found = [name for name in WEIGHTS if os.path.exists(os.path.join(directory, name))]
    if len(found) != 1:
        raise UserError(
            f"{directory}: wanted one of {' and '.join(WEIGHTS)}, found {'both' if found else 'neither'}"
        )
    return os.path.join(directory, found[0])


def _read(path):
    """Read a file of tensors -> dict of name -> float32 ndarray. Only tensors are unpickled."""
    if path.endswith(".safetensors"):
        file = SafetensorsFile(path)
        arrays = {name: to_float32(file.array(name), file.entries[name][0]) for name in file.entries}
    else:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # unpickling garbage can raise anything
            raise UserError(
                f"{path}: torch cannot load it as weights only: {type(error).__name__}: {error}"
            ) from None
        odd = (
            [
                name
                for name, x in found.items()
                if not isinstance(name, str) or not isinstance(x, torch.Tensor) or not x.is_floating_point()
            ]
            if isinstance(found, dict)
            else [type(found).__name__]
        )
        if odd:
            raise UserError(f"{path}: should be a dict of floating-point tensors, got {odd[0]!r}")
        arrays = {name: x.to(torch.float32).numpy() for name, x in found.items()}
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise UserError(f"{path}: {name} is not finite")
    return arrays


def _cut(whole, model, path, allowed):
    """Cut the embedding to the rows that the base has, in place -> lines that say what was done."""
    name = "model.embed_tokens.weight"
    rows, found = model.config.vocab_size, whole.get(name)
    if (
        found is None
        or found.ndim != 2
        or found.shape[1] != model.config.hidden_size
        or found.shape[0] <= rows
    ):
        return []
    extra = found.shape[0] - rows
    if not allowed:
        raise UserError(
            f"{path}: {name} has {found.shape[0]} rows, the base {rows}: the authors' scripts add a [PAD] "
            "token; --cut-embedding leaves its row out"
        )
    whole[name] = found[:rows]
    return [f"left out: the last {extra} rows of {name}, which the base does not have"]


def _modules(whole):
    """The modules_to_save of these tensors. The authors match "norm" in a name: all norms are there or
    none."""
    last = {name.removesuffix(".weight").rpartition(".")[2] for name in whole}
    norms = any(module.endswith("norm") for module in last)
    default = [
        module
        for module in LoraConfig().modules_to_save
        if (norms if module.endswith("norm") else module in last)
    ]
    return (*default, *sorted(module for module in last if not module.endswith(("norm", *default))))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line -> exit status."""
    parser = cli.Parser(
        prog="python -m longlora.torch.authors",
        description="Import the adapter that the LongLoRA authors' scripts wrote.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "directory", metavar="DIR", help=f"adapter_config.json, adapter_model.bin, {PARAMETERS}"
    )
    parser.add_argument("output_dir", metavar="OUT", help="the adapter, a new directory")
    parser.add_argument(
        "--model", required=True, help="the base model: a Hugging Face directory or a .gguf file"
    )
    parser.add_argument(
        "--target-length",
        required=True,
        type=int,
        help="the tokens that they trained to (their model_max_length)",
    )
    parser.add_argument(
        "--cut-embedding", action="store_true", help="leave out embedding rows that the base does not have"
    )

    def imported():
        args = parser.parse_args(argv)
        for line in import_adapter(
            args.directory, args.output_dir, args.model, args.target_length, args.cut_embedding
        ):
            print(line)
        return 0

    return guarded(imported)


if __name__ == "__main__":
    sys.exit(main())
