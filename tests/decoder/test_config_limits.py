"""Values of a config are read up to their limits. Values beyond them are refused by name."""

import dataclasses

import pytest
import transformers
from test_config import RAW
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from longlora.decoder.config import ModelConfig, read_config
from longlora.decoder.families import FAMILIES
from longlora.errors import UserError


def defaults_of_transformers(family):
    """A config of transformers without any field. A Qwen config has sliding_window only if it is used."""
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family].replace("ForCausalLM", "Config")
    return getattr(transformers, name)(**{"use_sliding_window": True} if "qwen" in family else {})


LIMITS = dict(
    vocab_size=16_777_216,
    hidden_size=1_048_576,
    intermediate_size=4_194_304,
    num_hidden_layers=4096,
    num_attention_heads=16_384,
    num_key_value_heads=16_384,
    head_dim=4096,
    max_position_embeddings=2_147_483_648,
)


def read(family="llama", **fields):
    return read_config({**RAW, "sliding_window": None, "model_type": family, **fields})


def refused(message, family="llama", **fields):
    with pytest.raises(UserError, match=message):
        read(family, **fields)


@pytest.mark.parametrize("name, most", LIMITS.items())
def test_a_size_has_limits(name, most):
    others = dict(head_dim=8, num_attention_heads=most if "heads" in name else 4)
    assert getattr(read(**{**others, name: most}), name) == most
    for wrong in (most + 1, 0, True, 2.0, "2"):
        refused(f"^config: {name} should be an integer from 1 to {most}, got {wrong!r}$", **{name: wrong})


def test_the_smallest_model_is_read():
    names = [name for name in LIMITS if name != "head_dim"]
    one = read(head_dim=4, **dict.fromkeys(names, 1))
    assert [getattr(one, name) for name in names] == [1] * 7 and one.head_dim == 4
    refused("head_dim should be even and at least 4, got 2", head_dim=2)
    refused("head_dim should be even and at least 4, got 5", head_dim=5)
    refused("head_dim should be even and at least 4, got 9", head_dim=9)
    assert read(head_dim=6).head_dim == 6


NUMBERS = [
    ("llama", "rms_norm_eps", 1, 1e-6),
    ("llama", "initializer_range", 10, 0.02),
    ("granite", "embedding_multiplier", 10**6, 1.0),
    ("granite", "residual_multiplier", 10**6, 1.0),
    ("granite", "attention_multiplier", 10**6, 1.0),
    ("granite", "logits_scaling", 10**6, 1.0),
]


@pytest.mark.parametrize("family, name, most, default", NUMBERS)
def test_a_number_has_limits_and_the_default_of_transformers(family, name, most, default):
    raw = {key: value for key, value in RAW.items() if key != name}
    found = getattr(read_config({**raw, "model_type": family}), name)
    assert found == default == getattr(defaults_of_transformers(family), name)
    for value in (most, 1e-9, 0.5):
        found = getattr(read(family, **{name: value}), name)
        assert found == value and type(found) is float
    for wrong in (0, 0.0, -1, most + 0.5, most + 1, True, "1", None, [1.0]):
        with pytest.raises(UserError) as caught:
            read(family, **{name: wrong})
        assert f"{name} should be a number above 0, at most {most:g}, got {wrong!r}" in str(caught.value)


@pytest.mark.parametrize("name", ["bos_token_id", "eos_token_id"])
def test_a_token_id_is_a_number_or_the_first_of_a_list(name):
    """A model without such a token has null, -1 or an empty list."""
    for value, token in (
        (None, None),
        (0, 0),
        (1, 1),
        ([3, 4], 3),
        ([0], 0),
        (-1, None),
        ([-1], None),
        ([], None),
    ):
        assert getattr(read(**{name: value}), name) == token
    assert getattr(read(), name) is None
    for wrong in (-2, -3, True, False, 1.0, -1.0, "1", [True], {"a": 1}, ["1"]):
        refused(f"{name} should be a token id, a list of them or null, got ", **{name: wrong})


@pytest.mark.parametrize(
    "name",
    [
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "quantization_config",
        "num_local_experts",
        "num_experts",
    ],
)
def test_models_other_than_plain_dense_decoders_are_refused(name):
    for nothing in (None, 0, {}, False):
        assert read(**{name: nothing}) == read()
    refused(f"^config: {name} 4 is not supported; supported is a plain dense decoder without it", **{name: 4})


def test_fields_that_name_what_llama_does_anyway_change_nothing():
    plain = read()
    for fields in (
        dict(architectures=None),
        dict(architectures=[]),
        dict(architectures=["LlamaForCausalLM"]),
        dict(hidden_act="silu"),
        dict(hidden_act="swish"),
        dict(mlp_bias=False),
        dict(layer_types=None),
        dict(layer_types=["full_attention"] * 3),
    ):
        assert read(**fields) == plain
    refused("architectures 'LlamaForCausalLM' is not supported", architectures="LlamaForCausalLM")
    refused("hidden_act None is not supported", hidden_act=None)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_architecture_is_that_of_transformers(family):
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    assert FAMILIES[family].architecture == name
    assert read(family, architectures=[name]).family == family
    refused(f"supported is {name}$", family, architectures=["MambaForCausalLM"])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_defaults_of_a_family_are_those_of_transformers(family):
    """transformers puts the number of heads where num_key_value_heads is None."""
    row, theirs = FAMILIES[family], defaults_of_transformers(family)
    for key, value in row.defaults.items():
        if key == "num_key_value_heads" and value is None:
            value = theirs.num_attention_heads
        assert getattr(theirs, key) == value, key
        assert type(getattr(theirs, key)) is type(value), key
    assert theirs.rope_parameters["rope_theta"] == row.theta


def test_flags_are_true_or_false():
    for name in ("tie_word_embeddings", "attention_bias"):
        for wrong in (0, 1, None, "true"):
            refused(f"{name} should be true or false, got {wrong!r}", **{name: wrong})
    assert read(tie_word_embeddings=True).tie_word_embeddings is True
    assert read("granite", attention_bias=True).qkv_bias is True
    assert read("qwen2").qkv_bias is True and read("qwen2").o_bias is False


def test_heads_share_keys_and_values_evenly():
    assert read(num_attention_heads=6, num_key_value_heads=3, head_dim=8).num_key_value_heads == 3
    refused("num_attention_heads 4 should be a multiple of num_key_value_heads 3", num_key_value_heads=3)
    refused("num_attention_heads 2 should be a multiple", num_attention_heads=2, num_key_value_heads=4)


def test_a_missing_head_dim_is_hidden_size_over_heads():
    assert read(hidden_size=64).head_dim == 16
    assert read(hidden_size=33, head_dim=8).head_dim == 8
    assert read("qwen3", hidden_size=33).head_dim == 128 and read("qwen3", head_dim=16).head_dim == 16
    refused("hidden_size 33 should be a multiple of num_attention_heads 4", hidden_size=33)


@pytest.mark.parametrize("wrong", [True, 0, -1, 2.0, "2", None])
def test_a_wrong_no_rope_layer_interval_is_refused(wrong):
    message = f"no_rope_layer_interval should be an integer above 0, got {wrong!r}"
    refused(message, "smollm3", no_rope_layer_interval=wrong)


def test_no_rope_layers_has_a_flag_for_each_layer():
    for listed in ([1, 0], [1, 0, 2], [1, 0, -1], [1, 0, None], "101", (1, 0, 1), {}, 1):
        refused(
            "no_rope_layers should be a list of 0 or 1 for each of 3 layers", "smollm3", no_rope_layers=listed
        )
    assert read("smollm3", no_rope_layers=[True, False, 1]).rope_layers == (True, False, True)


def test_wrong_layer_types_are_named_once_and_sorted():
    types = ["sliding_attention", "full_attention", "chunked_attention", "sliding_attention"]
    refused("layer_types has chunked_attention, sliding_attention; supported is full_", layer_types=types)
    refused("layer_types has 'full_attention'; supported is", layer_types="full_attention")


def test_equality_hash_and_repr_leave_out_the_raw_file():
    one, other = read(), read(torch_dtype="bfloat16")
    assert one == other and "raw" not in repr(one) and "torch_dtype" not in repr(other)
    assert other.raw["torch_dtype"] == "bfloat16" and hash(one) == hash(other)
    assert one != read(vocab_size=101)


def test_the_defaults_of_a_model_config_make_a_llama():
    llama = read()
    required = [f.name for f in dataclasses.fields(llama) if f.default is dataclasses.MISSING]
    assert ModelConfig(**{name: getattr(llama, name) for name in required}) == llama


def test_a_message_begins_with_the_source_of_the_config():
    with pytest.raises(UserError, match="^base.gguf: vocab_size is missing$"):
        read_config({**RAW, "vocab_size": None}, "base.gguf")
    with pytest.raises(UserError, match="^config: vocab_size is missing$"):
        read_config({**RAW, "vocab_size": None})
