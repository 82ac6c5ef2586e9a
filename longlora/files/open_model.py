"""Opens a model of any supported format."""

import os
import re

from longlora.errors import UserError
from longlora.files.gguf import Gguf
from longlora.files.huggingface import HuggingFace
from longlora.files.model_file import ModelFile


def open_model(path: str | os.PathLike[str]) -> ModelFile:
    """Open the model at `path`, a Hugging Face directory or a .gguf file. UserError says what is wrong."""
    if os.path.isdir(path):
        refuse_folder_of_gguf(path)
        return HuggingFace(path)
    if not os.path.exists(path):
        raise UserError(
            f"{path}: no such file or directory; wanted a model directory with config.json, or a .gguf file"
            + _download(os.fspath(path))
        )
    return Gguf(path)


def _download(path):
    """How to get a model whose name on the Hugging Face Hub was given as a path, or "" for another path."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) or os.path.exists(path.partition("/")[0]):
        return ""
    name = path.partition("/")[2]
    return f"; to fetch it from the Hugging Face Hub: hf download {path} --local-dir {name}"


def refuse_folder_of_gguf(path: str | os.PathLike[str]) -> None:
    """UserError that names the file, if `path` is a directory with a .gguf file and without config.json."""
    files = sorted(name for name in os.listdir(path) if name.endswith(".gguf")) if os.path.isdir(path) else []
    if files and not os.path.exists(os.path.join(path, "config.json")):
        raise UserError(f"{path}: has no config.json; give the file {os.path.join(path, files[0])}")
