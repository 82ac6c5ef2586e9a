"""longlora.plan for generation: its options, and the dtype with and without weights."""

import json

import gguf_small
import pytest
import tiny
from test_tools_inspect import saved

from longlora import job
from longlora.decoder import generation_plan
from longlora.errors import UserError
from longlora.files.open_model import open_model
from longlora.tools import plan


def choices(made):
    return made.context, made.rows, made.dtype, made.cache_dtype, made.device, made.memory


def test_the_plan_without_options(tmp_path, monkeypatch):
    """tiny.CONFIG is for 64 tokens."""
    monkeypatch.setattr(job, "memory", lambda own: 12345)  # what a process may take
    made = plan.plan(generate=True, model=tiny.config(tmp_path), device="cpu")
    assert choices(made) == (64, 1, "float32", "float32", "cpu", 12345)
    assert made.config.max_position_embeddings == 64 and made.config.hidden_size == 32


def test_the_choice_of_the_device_depends_on_max_memory(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(plan, "choose_to_plan", lambda *given: asked.append(given) or ("cpu", "a sentence"))
    plan.generation(tiny.config(tmp_path))
    assert plan.generation(tmp_path, device="cuda:1", max_memory=80).device == "cpu"
    assert asked == [("auto", None), ("cuda:1", 80)]


def test_every_option_changes_the_plan(tmp_path):
    how = dict(context=100, rows=3, dtype="float16", cache_dtype="bfloat16", device="cpu", max_memory=1.5)
    made = plan.generation(tiny.config(tmp_path), **how)
    assert choices(made) == (100, 3, "float16", "bfloat16", "cpu", 3 << 29)
    assert plan.generation(tmp_path, max_memory=0.5, device="cpu").memory == 1 << 29


@pytest.mark.parametrize("rows, chunk", [(1, 2048), (2, 512)])
def test_one_answer_is_planned_with_long_passes(tmp_path, rows, chunk):
    """As longlora.generate reads its prompt, and as a server does."""
    made = plan.generation(tiny.config(tmp_path), context=4096, rows=rows, device="cpu")
    assert made.parts == generation_plan.plan(made.config, context=4096, rows=rows, chunk=chunk).parts


@pytest.mark.parametrize("length, positions", [(None, 64), (256, 256)])
def test_the_context_is_that_of_the_adapter(tmp_path, length, positions):
    made = plan.generation(*saved(tmp_path, length), device="cpu")
    assert made.context == made.config.max_position_embeddings == positions


@pytest.mark.parametrize("wrong", [True, "8", 0, -1.0, float("inf"), float("nan")])
def test_max_memory_is_a_number_above_0(tmp_path, wrong):
    with pytest.raises(UserError, match="max_memory should be a number of GiB above 0, got"):
        plan.generation(tiny.config(tmp_path), max_memory=wrong)


def test_without_generate_a_training_run_is_planned(tmp_path, monkeypatch):
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
def test_without_weights_the_dtype_is_that_of_the_config(tmp_path, fields, dtype):
    assert plan.generation(tiny.config(tmp_path, **fields), device="cpu").dtype == dtype


@pytest.mark.parametrize("index", [False, True])
def test_the_dtype_is_that_of_the_weights(tmp_path, index):
    """config.json names another dtype. index: the weights are listed in an index file."""
    path = tiny.model(tmp_path)
    raw = json.loads((path / "config.json").read_text())
    assert open_model(path).dtype("model.embed_tokens.weight") == "float32"
    (path / "config.json").write_text(json.dumps({**raw, "dtype": "bfloat16", "torch_dtype": "bfloat16"}))
    if index:
        names = dict.fromkeys(open_model(path).names(), "part-1.safetensors")
        (path / "model.safetensors").rename(path / "part-1.safetensors")
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert plan.generation(path, device="cpu").dtype == "float32"


def test_a_plan_for_a_gguf_file(tmp_path):
    path = gguf_small.write(tmp_path / "m.gguf", kinds={"token_embd.weight": "F16"})
    made = plan.generation(path, device="cpu")
    assert made.dtype == "float16" and made.config.num_hidden_layers == 1
    with pytest.raises(UserError, match="has no config.json; give the file .*m.gguf"):
        plan.generation(tmp_path)
