"""longlora plan --generate: from a config without weights, checked by pencil."""

import json
from types import SimpleNamespace

import pytest
import tiny

import longlora
from longlora import cli
from longlora.decoder import generation_plan
from longlora.decoder.config import read_config
from longlora.decoder.lora import LoraConfig
from longlora.files import adapter


def test_plan_of_generation(tmp_path, capsys, monkeypatch):
    """From a config without weights; the cache by pencil; what would make it fit; flags of the other plan."""
    monkeypatch.setattr(generation_plan, "own_memory", lambda: 1 << 28)  # whatever ran in this process before
    fields = dict(num_hidden_layers=3, torch_dtype="bfloat16", max_position_embeddings=500)
    flags = [
        "plan",
        "--generate",
        "--model",
        str(tiny.config(tmp_path / "model", **fields)),
        "--device",
        "cpu",
    ]
    assert cli.main([*flags, "--rows", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    each = 2 * 3 * 2 * 8 * 2  # keys and values, layers, heads, head size, bytes
    assert found["parts"]["cache of keys and values"] == pytest.approx(4 * 500 * each, rel=0.01)
    assert (found["dtype"], found["cache_dtype"], found["context"], found["rows"]) == ("bfloat16",) * 2 + (
        500,
        4,
    )
    assert found["fits"] and not found["changes"] and sum(found["parts"].values()) == found["total"]
    tight = [*flags, "--dtype", "float32", "--context", "16777216", "--max-memory", "3"]
    assert cli.main(tight) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("device: cpu") and "does not fit; 3.000 GiB are available" in shown
    assert "  --context 4194304: " in shown
    assert (
        longlora.plan(generate=True, model=flags[3], device="cpu", rows=4).to_json()["parts"].keys()
        == found["parts"].keys()
    )
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    opened = SimpleNamespace(path=str(tmp_path / "model"), config=read_config(config), fingerprint=lambda: "")
    longer = dict(max_position_embeddings=2000, rope_scaling=dict(rope_type="linear", factor=4.0))
    adapter.save(tmp_path / "adapter", None, LoraConfig(), opened, config | longer)
    assert cli.main([*flags, "--adapter", str(tmp_path / "adapter"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["context"] == 2000
    for wrong, words in (
        ([*flags, "--target-length", "9"], "plan --generate takes --model, --adapter, --dtype"),
        ([*flags, "--context", "0"], "context should be an integer from 1 to 16777216, got 0"),
        ([*flags, "--max-memory", "nan"], "max_memory should be a number of GiB above 0"),
        ([*flags, "--dtype", "int8"], "dtype should be one of float32, bfloat16, float16, got 'int8'"),
        ([flags[0], *flags[2:], "--rows", "2"], "--rows needs --generate"),
        (["plan", "--generate"], "model is missing"),
    ):
        assert cli.main(wrong) == 2
        assert words in capsys.readouterr().err
