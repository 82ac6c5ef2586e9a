"""An adapter with any field of PEFT's LoraConfig computes here what PEFT computes, or is refused."""

import dataclasses
import json

import numpy as np
import peft
import pytest
import torch
from test_adapter import logits
from test_weights import build

from longlora.errors import UserError
from longlora.files import adapter, merge
from longlora.files.open_model import open_model

pytestmark = pytest.mark.filterwarnings("ignore")
# Field -> values that are not the default.
READ = {
    "r": [dict(r=4)],
    "lora_alpha": [dict(lora_alpha=3), dict(lora_alpha=7.5)],
    "use_rslora": [dict(use_rslora=True)],
    "target_modules": [dict(target_modules="all-linear"), dict(target_modules=["down_proj"])],
    "modules_to_save": [dict(modules_to_save=["embed_tokens", "norm"])],
    "lora_dropout": [dict(lora_dropout=0.3)],
    "task_type": [dict(task_type=None)],
    "inference_mode": [dict(inference_mode=True)],
    "revision": [dict(revision="main")],
    "init_lora_weights": [
        dict(init_lora_weights=value) for value in (False, "gaussian", "orthogonal", "mica")
    ],
    "qalora_group_size": [dict(qalora_group_size=4)],
    "megatron_core": [dict(megatron_core="other")],
    "runtime_config": [dict(runtime_config=peft.LoraRuntimeConfig(ephemeral_gpu_offload=True))],
    "ensure_weight_tying": [dict(ensure_weight_tying=True)],
}
REFUSED = {
    "init_lora_weights": [dict(init_lora_weights=value) for value in ("pissa", "pissa_niter_4", "olora")],
    "exclude_modules": [dict(exclude_modules=["model.layers.0.self_attn.q_proj"])],
    "bias": [dict(bias="all"), dict(bias="lora_only")],
    "layers_to_transform": [dict(layers_to_transform=[1]), dict(layers_to_transform=0)],
    "rank_pattern": [dict(rank_pattern={"q_proj": 2}), dict(rank_pattern={r".*\.0\..*q_proj": 2})],
    "alpha_pattern": [dict(alpha_pattern={"q_proj": 2})],
    "trainable_token_indices": [
        dict(trainable_token_indices=[3, 4]),
        dict(trainable_token_indices={"embed_tokens": [3]}),
    ],
    "use_dora": [dict(use_dora=True)],
    "layer_replication": [dict(layer_replication=[(0, 2), (1, 2)])],
    "lora_bias": [dict(lora_bias=True)],
    "alora_invocation_tokens": [dict(alora_invocation_tokens=[3])],
    "use_bdlora": [
        dict(use_bdlora=peft.tuners.lora.config.BdLoraConfig(target_modules_bd_a=["q_proj", "v_proj"]))
    ],
    "velora_config": [dict(velora_config=peft.tuners.lora.config.VeloraConfig())],
    "kasa_config": [dict(kasa_config=peft.tuners.lora.config.KasaConfig())],
    "monteclora_config": [dict(monteclora_config=peft.tuners.lora.config.MontecloraConfig())],
}
# Fields whose values PEFT cannot save for such a model, or that only go with another field. They are written
# into a plain adapter's adapter_config.json.
WRITTEN = {
    "fan_in_fan_out": True,
    "layers_pattern": "layers",
    "megatron_config": {"a": 1},
    "use_qalora": True,
    "arrow_config": {"top_k": 2},
    "target_parameters": ["q_proj.weight"],
    "a_field_of_next_year": {"a": 1},
    "a_number_of_next_year": 0.5,
}
# What the errors say of the adapter, or of its initialisation.
SAID = ("peft_type", "peft_version", "auto_mapping", "base_model_name_or_path")
INITIAL = ("loftq_config", "eva_config", "corda_config", "lora_ga_config")


def test_every_field_of_peft_is_here():
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    fields -= {"peft_type"}
    known = {*READ, *REFUSED, *WRITTEN, *SAID, *INITIAL}
    assert fields - known == set() and known - fields <= {"peft_type", *WRITTEN}


def made(path, attention_bias=False, **fields):
    """Save a base, and an adapter of these fields with random weights."""
    base = build(path / "base", attention_bias=attention_bias)
    given = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], "r": 8, **fields}
    model = peft.get_peft_model(base, peft.LoraConfig(**given))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name or "trainable_tokens" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(path / "adapter")


def with_peft(path):
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(path / "base")
    return logits(peft.PeftModel.from_pretrained(base, path / "adapter").eval(), 40)


def merged(path):
    from transformers import AutoModelForCausalLM

    merge.merge(path / "base", path / "adapter", path / "merged")
    return logits(AutoModelForCausalLM.from_pretrained(path / "merged").eval(), 40)


def cases(table):
    return [
        pytest.param(name, fields, id=f"{name}-{i}")
        for name, rows in table.items()
        for i, fields in enumerate(rows)
    ]


@pytest.mark.parametrize("name, fields", cases(READ))
def test_a_field_that_we_know_is_read_as_peft_reads_it(tmp_path, name, fields):
    made(tmp_path, **fields)
    wanted = with_peft(tmp_path)
    np.testing.assert_allclose(merged(tmp_path), wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("name, fields", cases(REFUSED))
def test_a_field_that_we_do_not_compute_is_refused(tmp_path, name, fields):
    made(tmp_path, attention_bias=name in ("bias", "lora_bias"), **fields)
    with pytest.raises(UserError, match=f"adapter_config.json: {name} "):
        adapter.load(tmp_path / "adapter", open_model(tmp_path / "base"))


@pytest.mark.parametrize("name", WRITTEN)
def test_a_field_written_by_hand_is_refused(tmp_path, name):
    made(tmp_path)
    write(tmp_path, **{name: WRITTEN[name]})
    with pytest.raises(UserError, match=f"adapter_config.json: {name} .* is not supported"):
        adapter.load(tmp_path / "adapter", open_model(tmp_path / "base"))


def write(path, **fields):
    file = path / "adapter" / "adapter_config.json"
    found = {**json.loads(file.read_text()), **fields}
    file.write_text(json.dumps({name: value for name, value in found.items() if value is not ...}))


@pytest.mark.parametrize("init", ["corda", "lora_ga", "loftq", "next_year"])
def test_an_initialisation_that_changes_the_base_is_refused(tmp_path, init):
    made(tmp_path)
    write(tmp_path, init_lora_weights=init)
    with pytest.raises(UserError, match=f"init_lora_weights '{init}' changes the base model's weights"):
        adapter.load(tmp_path / "adapter", open_model(tmp_path / "base"))


def test_eva_is_read_because_it_leaves_the_base_alone(tmp_path):
    made(tmp_path)
    write(tmp_path, init_lora_weights="eva", eva_config=dataclasses.asdict(peft.EvaConfig()))
    wanted = with_peft(tmp_path)
    np.testing.assert_allclose(merged(tmp_path), wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


def test_a_converted_pissa_adapter_is_read(tmp_path):
    """The message advises this: PEFT writes a plain adapter of twice the rank for the original base."""
    base = build(tmp_path / "base")
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4, init_lora_weights="pissa")
    model = peft.get_peft_model(base, lora)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    wanted = logits(model.eval(), 40)
    model.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=tmp_path / "start")
    np.testing.assert_allclose(merged(tmp_path), wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


def test_missing_fields_have_the_defaults_of_peft(tmp_path):
    made(tmp_path, lora_alpha=8)
    write(tmp_path, r=..., lora_alpha=..., use_rslora=..., modules_to_save=..., init_lora_weights=...)
    wanted = with_peft(tmp_path)
    np.testing.assert_allclose(merged(tmp_path), wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("method", ["gguf", "bitsandbytes"])
def test_the_storage_of_the_base_in_training_does_not_matter(tmp_path, method):
    """transformers writes a base's quantization_config into the config.json beside the adapter."""
    made(tmp_path)
    raw = json.loads((tmp_path / "base" / "config.json").read_text())
    raw = {**raw, "quantization_config": {"quant_method": method, "load_in_4bit": True}}
    (tmp_path / "adapter" / "config.json").write_text(json.dumps(raw))
    wanted = with_peft(tmp_path)
    np.testing.assert_allclose(merged(tmp_path), wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


def test_tensors_of_integers_are_refused(tmp_path):
    from safetensors.numpy import load_file, save_file

    made(tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: array.astype(np.int32) for name, array in load_file(file).items()}, file)
    with pytest.raises(UserError, match="has dtype int32; supported are floating-point numbers"):
        adapter.load(tmp_path / "adapter", open_model(tmp_path / "base"))
