"""Tiny models, texts and runs for the tests of the driver. They take milliseconds and need no torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from longlora.decoder.config import read_config
from longlora.files.merge import save_merged
from longlora.files.safetensors import save as save_tensors

CONFIG = dict(
    model_type="llama",
    vocab_size=260,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    initializer_range=0.02,
    hidden_act="silu",
    rope_theta=1000.0,
    bos_token_id=None,
    eos_token_id=256,
    tie_word_embeddings=True,
)
ALPHABET = [*range(33, 127), *range(161, 173), *range(174, 256)]


def tokens(*shape, seed=0):
    """Random tokens of CONFIG's vocabulary, int32."""
    return np.random.default_rng(seed).integers(0, CONFIG["vocab_size"], shape).astype(np.int32)


def tokenizer_json():
    """A byte-level tokenizer without merges: one token per byte, and <|end|>."""
    other = [byte for byte in range(256) if byte not in ALPHABET]
    letters = {byte: chr(byte) for byte in ALPHABET} | {byte: chr(256 + i) for i, byte in enumerate(other)}
    end = dict(
        id=256,
        content="<|end|>",
        single_word=False,
        lstrip=False,
        rstrip=False,
        normalized=False,
        special=True,
    )
    plain = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    vocab = {letters[byte]: byte for byte in range(256)} | {"<|end|>": 256}
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": [end],
            "normalizer": None,
            "pre_tokenizer": plain,
            "post_processor": None,
            "decoder": plain,
            "model": {"type": "BPE", "vocab": vocab, "merges": []},
        }
    )


def config(path, **fields):
    """Make a directory with config.json and a tokenizer -> its path."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({**CONFIG, **fields}))
    (path / "tokenizer.json").write_text(tokenizer_json())
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    return path


def model(path, seed=0, change=None, **fields):
    """Make a model directory with random weights, which change(name, array) may damage -> its path."""
    path = config(path, **fields)
    raw = json.loads((path / "config.json").read_text())
    random = np.random.default_rng(seed)
    tensors = {
        name: random.standard_normal(shape).astype(np.float32) * np.float32(0.2) + np.float32(len(shape) == 1)
        for name, shape in read_config(raw).tensor_shapes().items()
    }
    save_merged(path, tensors.__getitem__, raw)
    if change:
        for name, array in tensors.items():
            change(name, array)
        save_tensors(path / "model.safetensors", tensors)  # which takes numbers that save_merged refuses
    return path


def text(path, words=3000, seed=0):
    """Make a text that a model can learn, lines of words from a small vocabulary -> its path."""
    random = np.random.default_rng(seed)
    words = random.choice(["shift", "group", "long", "context", "token", "of", "the", "attention"], words)
    Path(path).write_text("".join(word + ("\n" if i % 9 == 8 else " ") for i, word in enumerate(words)))
    return Path(path)


def documents(path, sizes, seed=0):
    """Write documents of these sizes in tokens to a .jsonl file -> their ids, with the end token of a run."""
    random = np.random.default_rng(seed)
    texts = ["".join(random.choice(list("shift group"), size - 1)) for size in sizes]
    Path(path).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return [np.array([*text.encode(), CONFIG["eos_token_id"]]) for text in texts]


def options(tmp_path, **fields):
    """Keywords of a short run on the CPU. Base and text are made in tmp_path if they are missing."""
    base, data = tmp_path / "base", tmp_path / "text.txt"
    if not base.exists():
        model(base)
    if not data.exists():
        text(data)
    return {
        **dict(
            model=str(base),
            data=str(data),
            output_dir=str(tmp_path / "out"),
            target_length=128,
            max_steps=4,
            learning_rate=1e-2,
            num_threads=1,
            device="cpu",
            cache_dir=str(tmp_path / "cache"),
        ),
        **fields,
    }


def flags(keywords):
    """Turn keywords into flags of the command line."""
    out = []
    for name, value in keywords.items():
        values = [] if value is True else value if isinstance(value, (list, tuple)) else [value]
        out += [f"--{name}", *map(str, values)]
    return out


def command(*arguments, **kwargs):
    """Run the command line in its own process, with one thread: a second one slows such small models down."""
    return subprocess.run(
        [sys.executable, "-m", "longlora", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=1200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **kwargs,
    )


def listing(path):
    """Every file under `path` -> its bytes."""
    return {
        os.path.join(root, name): Path(root, name).read_bytes()
        for root, _, names in os.walk(path)
        for name in names
    }


def refused(done, *words):
    """The command ended with code 2 and one line that holds all of `words`."""
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("longlora: error: ") and "Traceback" not in line
    for word in words:
        assert word in line, line
