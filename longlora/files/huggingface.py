"""Reads a model from a Hugging Face directory."""

import glob
import os

import numpy as np

from longlora.decoder.config import read_config
from longlora.disk import parse_json, read_bytes, read_json
from longlora.errors import UserError
from longlora.files.model_file import CHUNK, ModelFile, to_float32
from longlora.files.safetensors import SafetensorsFile, release
from longlora.files.tokenizer import Tokenizer

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# transformers reads such files of a distributed run, and nothing beside them.
RANK = "shard-[0-9]*-model-[0-9]*-of-[0-9]*.safetensors"
GENERATION = "generation_config.json"
# Buffers that old files contain. We compute them.
IGNORED = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class HuggingFace(ModelFile):
    """A directory with config.json, weights in safetensors and optionally a tokenizer's files.

    The weights that count are those that transformers 5 loads: the file that config.json names as
    transformers_weights, else model.safetensors, else the shards of the index.
    """

    kind = "huggingface"

    def __init__(self, path: str | os.PathLike[str]):
        self.path = os.fspath(path)
        if os.path.exists(os.path.join(path, "adapter_config.json")):
            raise UserError(
                f"{self.path}: is an adapter; wanted the model it was trained on, or a merged model"
            )
        self.config = read_config(path)
        weights = os.path.join(self.path, self._weights())
        if weights.endswith(".json"):
            files, listed = self._sharded(weights)
        else:
            files = [SafetensorsFile(weights)]
            listed = set(files[0].entries)
        # A shard may hold more than its index lists; that is read only if the model needs it.
        needed = {*listed, *self.config.tensor_shapes(), HEAD}
        # name -> the file that holds the tensor, and its name there. A later shard wins, as in transformers.
        self._places = {
            name: (file, name)
            for file in files
            for name in file.entries
            if name in needed and not name.endswith(IGNORED)
        }
        self._tie()
        self._shapes = {name: file.entries[stored][1] for name, (file, stored) in self._places.items()}
        self._check()

    def _weights(self):
        """The name of the safetensors file or index to read."""
        named = self.config.raw.get("transformers_weights")
        if named is not None:
            if (
                not isinstance(named, str)
                or not _is_beside(named)
                or not named.endswith((".safetensors", ".safetensors.index.json"))
            ):
                raise UserError(
                    f"{self.path}: transformers_weights should name a .safetensors file or its index beside "
                    f"config.json, got {named!r}"
                )
            return named
        ranks = sorted(glob.glob(RANK, root_dir=self.path))
        if ranks:
            raise UserError(f"{self.path}: {ranks[0]} is one rank's part of a model; wanted a whole model")
        found = [name for name in (SINGLE, INDEX) if os.path.exists(os.path.join(self.path, name))]
        if not found:
            raise UserError(
                f"{self.path}: has neither {SINGLE} nor {INDEX}; only safetensors weights are read"
            )
        return found[0]

    def _sharded(self, index):
        """-> the files that the index names, sorted by name, and the tensors that it lists."""
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
            raise UserError(f"{index}: weight_map should be an object that maps tensor names to file names")
        outside = [place for place in places.values() if not _is_beside(place)]
        if outside:
            raise UserError(f"{index}: weight_map should name files beside it, got {outside[0]!r}")
        files = {
            place: SafetensorsFile(os.path.join(self.path, place)) for place in sorted(set(places.values()))
        }
        held = {name for file in files.values() for name in file.entries}
        for name, place in places.items():
            if name not in held:
                raise UserError(f"{index}: {name} should be in {place}, which does not have it")
        return list(files.values()), set(places)

    def _tie(self):
        """Decide whether head and embedding are one tensor, whatever the config says, as transformers does.

        If the config ties them and both are there, they are one if they are equal. One alone is both.
        """
        if not self.config.tie_word_embeddings or HEAD not in self._places:
            return
        if EMBEDDING not in self._places:
            self._places[EMBEDDING] = self._places.pop(HEAD)
        elif not self._equal(HEAD, EMBEDDING):
            raw = {**self.config.raw, "tie_word_embeddings": False}
            self.config = read_config(raw, os.path.join(self.path, "config.json"))

    def _equal(self, one, other):
        """Whether two tensors hold the same numbers. Their shapes are checked later, by _check."""
        places, dtypes = (self._places[one], self._places[other]), (self.dtype(one), self.dtype(other))
        arrays = [file.array(stored).reshape(-1) for file, stored in places]

        def piece(i, start):
            return to_float32(arrays[i][start : start + CHUNK], dtypes[i])

        equal = all(np.array_equal(piece(0, n), piece(1, n)) for n in range(0, arrays[0].size, CHUNK))
        for name in (one, other):
            release(*self._span(name))
        return equal

    def dtype(self, name: str) -> str:
        file, stored = self._places[name]
        return file.entries[stored][0]

    def _part(self, name, start, stop):
        file, stored = self._places[name]
        return file.array(stored)[start:stop], self.dtype(name)

    def _span(self, name):
        file, stored = self._places[name]
        dtype, _, start, end = file.entries[stored]
        if dtype not in ("float32", "bfloat16", "float16", "float64"):
            raise UserError(
                f"{self.path}: {name} has dtype {dtype}; supported are float32, bfloat16, float16 and float64"
            )
        return file.buffer, start, end

    def beside(self) -> dict[str, bytes]:
        path = os.path.join(self.path, GENERATION)
        if not os.path.exists(path):
            return {}
        content = read_bytes(path)
        parse_json(content, path)
        return {GENERATION: content}

    def has_tokenizer(self) -> bool:
        return Tokenizer.is_in(self.path)

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_directory(self.path).check(self.config, self.path)


def _is_beside(name):
    """Whether `name` is that of a file, without a path."""
    return os.path.basename(name) == name and name not in ("", ".", "..")
