"""longlora.plan: the arguments of generation reach its plan, and the dtype is that of the weights."""

import json

import gguf_small
import pytest
import tiny

from longlora.decoder import generation_plan, rope
from longlora.decoder.lora import LoraConfig
from longlora.errors import UserError
from longlora.files import adapter
from longlora.files.open_model import open_model
from longlora.tools import plan


@pytest.fixture
def asked(monkeypatch):
    """The arguments of generation_plan.plan, which is not run."""
    found = {}

    def noted(config, **keywords):
        found.clear()
        found.update(keywords, config=config)
        return "a plan"

    monkeypatch.setattr(generation_plan, "plan", noted)
    return found


def test_what_is_planned_by_default(tmp_path, asked):
    """tiny.CONFIG is made for 64 tokens."""
    assert plan.plan(generate=True, model=tiny.config(tmp_path), device="cpu") == "a plan"
    config = asked.pop("config")
    assert config.max_position_embeddings == 64 and config.hidden_size == 32
    wanted = dict(context=64, rows=1, dtype="float32", cache_dtype=None, device="cpu", memory=None)
    assert asked == wanted


def test_the_device_is_chosen_with_the_memory(tmp_path, asked, monkeypatch):
    monkeypatch.setattr(plan, "choose_to_plan", lambda *given: (given, "what it says"))
    plan.generation(tiny.config(tmp_path))
    assert asked["device"] == ("auto", None)
    plan.generation(tmp_path, device="cuda:1", max_memory=80)
    assert asked["device"] == ("cuda:1", 80)


def test_every_argument_reaches_the_plan(tmp_path, asked):
    how = dict(context=100, rows=3, dtype="float16", cache_dtype="bfloat16", device="cpu")
    plan.generation(tiny.config(tmp_path), **how, max_memory=1.5)
    del asked["config"]
    assert asked == {**how, "memory": 3 << 29}
    plan.generation(tiny.config(tmp_path), max_memory=0.5, device="cpu")
    assert asked["memory"] == 1 << 29


def test_the_positions_are_those_of_the_adapter(tmp_path, asked):
    base = open_model(tiny.model(tmp_path / "base"))
    for name, positions in (("plain", 64), ("longer", 256)):
        raw = base.config.raw
        if positions > 64:
            raw = rope.to_config(raw, rope.extend(base.config, "linear", positions)[0], positions)
        adapter.save(tmp_path / name, None, LoraConfig(), base, raw)
        plan.generation(base.path, tmp_path / name, device="cpu")
        assert asked["context"] == asked["config"].max_position_embeddings == positions


@pytest.mark.parametrize("wrong", [True, "8", 0, -1.0, float("inf"), float("nan")])
def test_max_memory_is_a_number_above_0(tmp_path, wrong):
    with pytest.raises(UserError, match="max_memory should be a number of GiB above 0, got"):
        plan.generation(tiny.config(tmp_path), max_memory=wrong)


def test_without_generate_it_is_a_training_run(tmp_path, monkeypatch):
    monkeypatch.setattr(plan.driver, "plan", lambda **keywords: keywords)
    assert plan.plan(model="m", target_length=9) == dict(model="m", target_length=9)
    assert plan.plan(generate=False, r=4) == dict(r=4)


@pytest.mark.parametrize(
    "fields, dtype",
    [
        (dict(dtype="bfloat16"), "bfloat16"),
        (dict(torch_dtype="bfloat16"), "bfloat16"),
        (dict(dtype="float16"), "float16"),
        (dict(dtype="float16", torch_dtype="bfloat16"), "float16"),
        (dict(dtype="float32"), "float32"),
        (dict(torch_dtype="float64"), "float32"),
        ({}, "float32"),
    ],
)
def test_without_weights_the_dtype_is_that_of_the_config(tmp_path, asked, fields, dtype):
    plan.generation(tiny.config(tmp_path, **fields), device="cpu")
    assert asked["dtype"] == dtype


@pytest.mark.parametrize("index", [False, True])
def test_the_dtype_is_that_of_the_weights(tmp_path, asked, index):
    """Whatever config.json says, and if the weights have several files."""
    path = tiny.model(tmp_path)
    raw = json.loads((path / "config.json").read_text())
    assert open_model(path).dtype("model.embed_tokens.weight") == "float32"
    (path / "config.json").write_text(json.dumps({**raw, "dtype": "bfloat16", "torch_dtype": "bfloat16"}))
    if index:
        names = dict.fromkeys(open_model(path).names(), "part-1.safetensors")
        (path / "model.safetensors").rename(path / "part-1.safetensors")
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    plan.generation(path, device="cpu")
    assert asked["dtype"] == "float32"


def test_a_gguf_file(tmp_path, asked):
    path = gguf_small.write(tmp_path / "m.gguf", kinds={"token_embd.weight": "F16"})
    plan.generation(path, device="cpu")
    assert asked["dtype"] == "float16" and asked["config"].num_hidden_layers == 1
    with pytest.raises(UserError, match="has no config.json; give the file .*m.gguf"):
        plan.generation(tmp_path)
