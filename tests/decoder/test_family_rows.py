"""The rows of the table of families, field by field, against transformers' config classes."""

import importlib.util
import sys

import pytest
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from longlora.decoder import families

SPLIT = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
ALL = ("default", "linear", "yarn", "llama3")
SIZES = {
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
}
THEIRS = {
    name: getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name].replace("ForCausalLM", "Config"))
    for name in families.FAMILIES
}
# The keys that a file may leave out; biases of q, k and v, and of o; norms of heads; when a window is active.
ROWS = {
    "llama": ({"num_key_value_heads"}, "attention_bias", "attention_bias", False, None),
    "mistral": ({"sliding_window"}, False, False, False, "given"),
    "qwen2": ({"sliding_window", "max_window_layers"}, True, False, False, "flagged"),
    "qwen3": ({"sliding_window", "max_window_layers"}, "attention_bias", "attention_bias", True, "flagged"),
    "phi3": (SIZES | {"rms_norm_eps"}, False, False, False, "given"),
    "granite": (SIZES, "attention_bias", "attention_bias", False, None),
    "smollm3": (
        SIZES | {"tie_word_embeddings", "no_rope_layer_interval"},
        "attention_bias",
        "attention_bias",
        False,
        "flagged",
    ),
}


@pytest.fixture(scope="module")
def table():
    """The table, made anew from its file: no other test may have changed it."""
    spec = importlib.util.spec_from_file_location("families_made_anew", families.__file__)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module


def test_the_table_has_these_families(table):
    assert list(table.FAMILIES) == list(ROWS) == list(families.FAMILIES)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_what_transformers_computes(table, name):
    row, (keys, qkv_bias, o_bias, qk_norm, window) = table.FAMILIES[name], ROWS[name]
    assert row.architecture == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]
    assert (row.qkv_bias, row.o_bias, row.qk_norm, row.sliding_window) == (qkv_bias, o_bias, qk_norm, window)
    assert set(row.defaults) == keys
    assert row.multipliers is (name == "granite") and row.no_rope_layers is (name == "smollm3")
    assert row.states_original_length is (name == "phi3")
    assert row.head_dim == (128 if name == "qwen3" else None)
    fused = name == "phi3"
    assert (row.qkv_modules, row.gate_up_modules) == ((("qkv_proj",), ("gate_up_proj",)) if fused else SPLIT)
    assert row.rope_types == (("default",) if fused else ALL)


@pytest.mark.parametrize("name", ROWS)
def test_the_defaults_of_a_row_are_those_of_transformers(table, name):
    """transformers puts the number of heads where num_key_value_heads is None."""
    row = table.FAMILIES[name]
    config = THEIRS[name]
    theirs = config(use_sliding_window=True) if name.startswith("qwen") else config()
    for key, value in row.defaults.items():
        if key == "num_key_value_heads" and value is None:
            value = theirs.num_attention_heads
        assert getattr(theirs, key) == value, key
        assert type(getattr(theirs, key)) is type(value), key
    assert theirs.rope_parameters["rope_theta"] == row.theta


def test_a_row_without_fields_is_a_plain_decoder(table):
    row = table.Family("X")
    assert row.defaults == {} and row.defaults is not table.Family("Y").defaults
    assert (row.theta, row.rope_types, row.states_original_length, row.head_dim) == (10000, ALL, False, None)
    assert (row.qkv_bias, row.o_bias, row.qk_norm, row.sliding_window) == (False, False, False, None)
    assert (row.qkv_modules, row.gate_up_modules) == SPLIT
    assert (row.multipliers, row.no_rope_layers) == (False, False)
