"""Trained tensors have the names and shapes that PEFT gives them, whatever a family calls its linears."""

import pytest

from longlora.decoder.config import read_config
from longlora.decoder.families import FAMILIES
from longlora.decoder.lora import LoraConfig
from longlora.errors import UserError

SIZES = dict(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    head_dim=8,
    pad_token_id=None,
    tie_word_embeddings=False,
)
FUSED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


def config(family):
    return read_config({**SIZES, "model_type": family, "sliding_window": None})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_names_and_shapes_equal_those_of_peft(family, targets):
    """PEFT gets names that the family has, or "all-linear". We get the default, or "all-linear"."""
    import peft
    import transformers

    name = FAMILIES[family].architecture
    theirs = getattr(transformers, name.replace("ForCausalLM", "Config"))(**{**SIZES, "sliding_window": None})
    attention = ["qkv_proj", "o_proj"] if family == "phi3" else ["q_proj", "k_proj", "v_proj", "o_proj"]
    ours = LoraConfig(r=3) if targets is None else LoraConfig(r=3, target_modules=targets)
    wanted = peft.get_peft_model(
        getattr(transformers, name)(theirs),
        peft.LoraConfig(
            r=3,
            target_modules=targets or attention,
            modules_to_save=list(ours.modules_to_save),
            task_type="CAUSAL_LM",
        ),
    )
    trained = {
        name.removeprefix("base_model.model.")
        .replace(".default", "")
        .replace("modules_to_save.", ""): parameter
        for name, parameter in wanted.named_parameters()
        if parameter.requires_grad
    }
    assert ours.tensor_shapes(config(family)) == {name: tuple(x.shape) for name, x in trained.items()}


def test_the_parts_of_a_fused_linear_name_it():
    def targets(*names):
        return LoraConfig(target_modules=names).for_model(config("phi3")).target_modules

    assert LoraConfig().for_model(config("phi3")).target_modules == ("qkv_proj", "o_proj")
    assert LoraConfig(target_modules="all-linear").for_model(config("phi3")).target_modules == FUSED
    assert targets("down_proj", "v_proj", "k_proj", "q_proj") == ("down_proj", "qkv_proj")
    assert targets("gate_proj", "up_proj", "gate_up_proj") == ("gate_up_proj",)
    assert targets("qkv_proj") == targets("q_proj", "k_proj", "v_proj") == ("qkv_proj",)
    assert LoraConfig().for_model(config("llama")) == LoraConfig()


@pytest.mark.parametrize(
    "family, names, message",
    [
        ("phi3", ("q_proj", "v_proj"), f"a phi3 model has no q_proj, v_proj; it has {', '.join(FUSED)}"),
        ("phi3", ("up_proj",), "a phi3 model has no up_proj; it has"),
        (
            "granite",
            ("qkv_proj", "o_proj"),
            "a granite model has no qkv_proj; "
            "it has q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj",
        ),
    ],
)
def test_a_linear_that_the_family_lacks_is_refused(family, names, message):
    lora = LoraConfig(target_modules=names)
    for refuses in (lora.for_model, lora.tensor_shapes):
        with pytest.raises(UserError, match=f"target_modules: {message}"):
            refuses(config(family))


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(r=0), "r should be an integer above 0, got 0"),
        (dict(r=True), "r should be an integer above 0, got True"),
        (dict(r=4.0), "r should be an integer above 0, got 4.0"),
        (dict(r=1 << 20), "r should be an integer above 0, got 1048576"),
        (dict(lora_alpha=0), "lora_alpha should be a number above 0, got 0"),
        (dict(lora_alpha=float("nan")), "lora_alpha should be a number above 0, got nan"),
        (dict(use_rslora=1), "use_rslora should be true or false, got 1"),
        (dict(target_modules=5), "target_modules should be a list of q_proj"),
        (dict(target_modules="q_proj"), "target_modules should be a list of q_proj"),
        (dict(modules_to_save=("norm", "conv")), "modules_to_save should be a list of embed_tokens"),
        (dict(lora_alpha="1"), "lora_alpha should be a number above 0, got '1'"),
        (
            dict(target_modules=("c_attn",)),
            "target_modules should be a list of q_proj, .*, gate_up_proj, got",
        ),
        (
            dict(modules_to_save="all-linear"),
            "modules_to_save should be a list of embed_tokens, .* got 'all-linear'",
        ),
    ],
)
def test_wrong_fields_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        LoraConfig(**fields)


def test_the_scale_follows_alpha_and_rank():
    assert LoraConfig().scale == 16 / 8  # of LongLoRA's code
    assert LoraConfig(r=4, lora_alpha=8).scale == 2
    assert LoraConfig(r=4, lora_alpha=8, use_rslora=True).scale == 4


def test_fields_may_be_lists_or_none():
    lora = LoraConfig(r=1, lora_alpha=0.5, target_modules=["q_proj"], modules_to_save=None)
    assert (lora.target_modules, lora.modules_to_save, lora.scale) == (("q_proj",), (), 0.5)
    assert list(lora.tensor_shapes(config("llama"))) == [
        f"model.layers.{i}.self_attn.q_proj.lora_{part}.weight" for i in range(2) for part in "AB"
    ]


def test_a_tied_head_is_the_embedding():
    """PEFT would train a copy of it. We train the tensor that both use."""
    lora = LoraConfig(target_modules=None, modules_to_save=["lm_head"])
    tied = read_config({**SIZES, "model_type": "llama", "tie_word_embeddings": True})
    assert lora.tensor_shapes(tied) == {"model.embed_tokens.weight": (50, 16)}
    assert lora.tensor_shapes(config("llama")) == {"lm_head.weight": (50, 16)}
    assert not LoraConfig(target_modules=None, modules_to_save=None).tensor_shapes(tied)


def test_norm_means_every_norm():
    lora = LoraConfig(target_modules=None, modules_to_save=["norm"])
    one = LoraConfig(target_modules=None, modules_to_save=["model.norm"])
    assert one.tensor_shapes(config("qwen3")) == {"model.norm.weight": (16,)}
    found = lora.tensor_shapes(config("qwen3"))
    assert found["model.layers.1.self_attn.q_norm.weight"] == (8,) and len(found) == 2 * 4 + 1
    both = LoraConfig(target_modules=None, modules_to_save=["q_norm", "k_norm"])
    assert sorted(both.tensor_shapes(config("qwen3"))) == [
        f"model.layers.{i}.self_attn.{name}_norm.weight" for i in range(2) for name in "kq"
    ]
