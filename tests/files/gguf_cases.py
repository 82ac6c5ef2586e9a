"""Tiny models with tokenizers, for tests of the GGUF files that we write, and the logits of both sides."""

import json

import numpy as np
from test_tokenizer import trained
from test_weights import build

from longlora.decoder import rope as rope_
from longlora.decoder.model import Model
from longlora.files.open_model import open_model

BOS, EOS = "<|im_start|>", "<|im_end|>"
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
# Each family that llama.cpp has. q8_0 needs rows of 32 numbers, smollm3 a layer without rope.
CASES = {
    "llama": dict(family="llama"),
    "llama-bias": dict(family="llama", attention_bias=True, tie_word_embeddings=True, head_dim=16),
    "mistral": dict(family="mistral", head_dim=16),
    "qwen2": dict(family="qwen2"),
    "qwen2-tied": dict(family="qwen2", tie_word_embeddings=True),
    "qwen3": dict(family="qwen3", head_dim=16),
    "qwen3-bias": dict(family="qwen3"),
    "phi3": dict(family="phi3"),
    "granite": dict(family="granite", attention_bias=True, tie_word_embeddings=True),
    "smollm3": dict(family="smollm3", num_hidden_layers=5, no_rope_layer_interval=4),
}
# The types of rope that llama.cpp computes for the family.
ROPES = {
    "llama": ("linear", "ntk", "yarn", "llama3"),
    "mistral": ("linear",),
    "qwen2": ("linear", "yarn"),
    "qwen3": ("linear", "yarn"),
    "phi3": ("ntk",),
    "granite": ("yarn", "llama3"),
    "smollm3": ("linear", "yarn"),
}
LONGER = 256  # the extended length, from 64


def tokenizer(path, kind="qwen2", change=None, **config):
    """Write a trained tokenizer to the directory `path`; change(described) may damage its tokenizer.json."""
    described = json.loads(trained(kind).to_str())
    if change:
        change(described)
    (path / "tokenizer.json").write_text(json.dumps(described))
    names = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>") if kind == "llama" else {}
    names = names or dict(bos_token=BOS, eos_token=EOS, chat_template=TEMPLATE)
    config = dict(tokenizer_class="PreTrainedTokenizerFast", **names) | config
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def base(path, name="llama", kind="qwen2", extend=None, **fields):
    """Make a directory with a random model of CASES and a tokenizer -> its path. extend: its type of rope."""
    build(path, **{**dict(vocab_size=512, hidden_size=32, intermediate_size=64), **CASES[name], **fields})
    tokenizer(path, kind)
    if extend is not None:
        config = open_model(path).config
        raw = rope_.to_config(config.raw, rope_.extend(config, extend, LONGER)[0], LONGER)
        (path / "config.json").write_text(json.dumps(raw))
    return path


def logits(path, ids):
    """Our logits of the model at `path`, float32 [T,V]."""
    model = open_model(path)
    return Model(model.config).load(model).logits(np.asarray(ids, np.int32))
