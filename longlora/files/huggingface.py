"""Reads a model from a Hugging Face directory."""

import os

from longlora.decoder.config import read_config
from longlora.disk import read_json
from longlora.errors import UserError
from longlora.files.model_file import ModelFile, some
from longlora.files.safetensors import SafetensorsFile
from longlora.files.tokenizer import Tokenizer

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# Buffers that old files contain. We compute them.
IGNORED = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")


class HuggingFace(ModelFile):
    """A directory with config.json, model.safetensors (or shards and an index), optionally tokenizer.json."""

    kind = "huggingface"

    def __init__(self, path: str | os.PathLike[str]):
        self.path = os.fspath(path)
        if os.path.exists(os.path.join(path, "adapter_config.json")):
            raise UserError(
                f"{self.path}: is an adapter; wanted the model it was trained on, or a merged model"
            )
        self.config = read_config(path)
        index = os.path.join(path, INDEX)
        if os.path.exists(index):
            self._files = self._sharded(index)
        elif os.path.exists(os.path.join(path, SINGLE)):
            file = SafetensorsFile(os.path.join(path, SINGLE))
            self._files = dict.fromkeys(file.entries, file)
        else:
            raise UserError(
                f"{self.path}: has neither {SINGLE} nor {INDEX}; only safetensors weights are read"
            )
        self._files = {name: file for name, file in self._files.items() if not name.endswith(IGNORED)}
        self._shapes = {name: file.entries[name][1] for name, file in self._files.items()}
        self._check()

    def _sharded(self, index):
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
            raise UserError(f"{index}: weight_map should be an object that maps tensor names to file names")
        outside = [
            place for place in places.values() if os.path.basename(place) != place or place in ("", ".", "..")
        ]
        if outside:
            raise UserError(f"{index}: weight_map should name files beside it, got {outside[0]!r}")
        files = {
            place: SafetensorsFile(os.path.join(self.path, place)) for place in sorted(set(places.values()))
        }
        for name, place in places.items():
            if name not in files[place].entries:
                raise UserError(f"{index}: {name} should be in {place}, which does not have it")
        for place, file in files.items():
            extra = [name for name in file.entries if places.get(name) != place]
            if extra:
                raise UserError(f"{file.path}: {len(extra)} tensors are not in the index: {some(extra)}")
        return {name: files[place] for name, place in places.items()}

    def dtype(self, name: str) -> str:
        return self._files[name].entries[name][0]

    def _part(self, name, start, stop):
        return self._files[name].array(name)[start:stop], self.dtype(name)

    def _span(self, name):
        dtype, _, start, end = self._files[name].entries[name]
        if dtype not in ("float32", "bfloat16", "float16", "float64"):
            raise UserError(
                f"{self.path}: {name} has dtype {dtype}; supported are float32, bfloat16, float16 and float64"
            )
        return self._files[name].buffer, start, end

    def has_tokenizer(self) -> bool:
        return os.path.exists(os.path.join(self.path, "tokenizer.json"))

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_directory(self.path).check(self.config, self.path)
