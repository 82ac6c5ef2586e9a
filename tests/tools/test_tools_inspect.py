"""longlora.inspect: what it says about models, adapters and checkpoints, and its text."""

import json
import re

import gguf_small
import pytest
import tiny
from runs import adapter_of

from longlora.decoder.lora import LoraConfig
from longlora.errors import UserError
from longlora.files.open_model import open_model
from longlora.tools import inspect

# tiny.CONFIG: 2 layers, hidden 32, 4 and 2 heads of 8, inner 48, 260 words, tied.
LAYER = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48 + 2 * 32
SIZES = {
    "family": "llama",
    "layers": 2,
    "hidden_size": 32,
    "heads": 4,
    "key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 260,
    "tied_embeddings": True,
    "positions": 64,
    "rope": "default, theta 1000",
}
# Rank 8 on q, k, v and o, whose inputs are 32 wide and whose outputs 32, 16, 16 and 32.
LORA = 2 * 8 * (64 + 48 + 48 + 64)
NORMS = (2 * 2 + 1) * 32


def saved(tmp_path, length=256, tied=True, **fields):
    """Write a tiny model, and an adapter that extends it to `length` tokens, if any -> their paths."""
    base = tiny.model(tmp_path / "base", tie_word_embeddings=tied)
    return base, adapter_of(tmp_path / "adapter", base, length, "linear", **fields)


def test_a_model(tmp_path):
    path = tiny.model(tmp_path)
    assert inspect.describe(path) == {
        "kind": "model",
        "path": str(tmp_path),
        "format": "huggingface",
        **SIZES,
        "parameters": 260 * 32 + 2 * LAYER + 32,
        "dtypes": ["float32"],
        "bytes": (tmp_path / "model.safetensors").stat().st_size,
        "fingerprint": open_model(tmp_path).fingerprint(),
    }


def test_bytes_are_those_of_all_weights(tmp_path):
    path = tiny.model(tmp_path)
    before = inspect.describe(path)["bytes"]
    (tmp_path / "more.safetensors").write_bytes(bytes(1000))
    assert inspect.describe(path)["bytes"] == before + 1000


def test_a_gguf_file(tmp_path):
    path = gguf_small.write(tmp_path / "m.gguf", kinds={"token_embd.weight": "F16"})
    found = inspect.describe(path)
    assert (found["kind"], found["format"], found["bytes"]) == ("model", "gguf", path.stat().st_size)
    assert found["dtypes"] == ["float16", "float32"]
    with pytest.raises(UserError, match=f"has no config.json; give the file {re.escape(str(path))}"):
        inspect.describe(tmp_path)


@pytest.mark.parametrize(
    "tied, modules, whole",
    [
        (True, LoraConfig().modules_to_save, {"embedding": 260 * 32, "norm": NORMS}),
        (False, ("embed_tokens", "lm_head"), {"embedding": 260 * 32, "head": 260 * 32}),
    ],
    ids=["tied", "untied"],
)
def test_an_adapter(tmp_path, tied, modules, whole):
    base, path = saved(tmp_path, tied=tied, lora_alpha=24.0, modules_to_save=modules)
    found = inspect.describe(path)
    assert found == {
        "kind": "adapter",
        "path": str(path),
        "format": "peft",
        "base": str(base),
        **SIZES,
        "tied_embeddings": tied,
        "positions": 256,
        "rope": "linear, theta 1000, factor 4, pretrained at 64",
        "r": 8,
        "lora_alpha": 24.0,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "modules_to_save": [*modules, *(["lm_head"] if tied else [])],  # PEFT names both of the tied ones
        "trained": {"lora": LORA, **whole},
        "bytes": (path / "adapter_model.safetensors").stat().st_size,
        "base_fingerprint": open_model(base).fingerprint(),
    }
    assert json.loads(json.dumps(found)) == found


def test_an_adapter_with_the_positions_of_its_base(tmp_path):
    """Such an adapter has no config.json. PEFT's key names the base."""
    base, path = saved(tmp_path, None)
    found = inspect.describe(path)
    assert found["kind"] == "adapter" and found["base"] == str(base) and "family" not in found
    assert found["trained"]["lora"] == LORA and found["trained"]["head"] == 260 * 32


@pytest.mark.parametrize("key", ["global_step", "step"], ids=["now", "0.1.0"])
def test_a_checkpoint_has_a_step(tmp_path, key):
    for path in saved(tmp_path):
        (path / "trainer_state.json").write_text(json.dumps({key: 70}))
        found = inspect.describe(path)
        assert (found["kind"], found["step"]) == ("checkpoint", 70)
        (weights,) = path.glob("*.safetensors")
        assert found["bytes"] == weights.stat().st_size


def test_a_folder_that_is_none_of_the_three_is_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"is neither a model \(config.json\) nor an adapter \(adapter_config"
    ):
        inspect.describe(tmp_path)
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(UserError, match=r"nor an adapter .*; a run was stopped here, .*/checkpoint-3$"):
        inspect.describe(tmp_path)
    with pytest.raises(UserError, match="no such file or directory"):
        inspect.describe(tmp_path / "none")


def test_the_text_is_a_table():
    found = {
        "path": "a\x1bb",
        "step": None,
        "tied_embeddings": True,
        "parameters": 1234567,
        "lora_alpha": 16.0,
        "dtypes": ["bfloat16", "q4\n1"],
        "trained": {"lora": 10240, "norm": 32},
    }
    assert inspect.text(found).splitlines() == [
        r"path             a\x1bb",
        "tied embeddings  True",
        "parameters       1,234,567",
        "lora alpha       16.0",
        r"dtypes           bfloat16, q4\n1",
        "trained          lora 10,240, norm 32",
    ]
