"""Frequencies equal transformers'. Factors count from the original length. Saved configs suit v4 and v5."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longlora.decoder import rope as rope_
from longlora.decoder.config import read_config
from longlora.decoder.rope import Rope
from longlora.errors import UserError

RAW = dict(
    model_type="llama",
    vocab_size=64,
    hidden_size=128,
    intermediate_size=96,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=2048,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
)
SCALINGS = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "linear, old key": {"type": "linear", "factor": 2.5},
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 1024},
    "yarn, all keys": {
        "rope_type": "yarn",
        "factor": 3.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 20,
        "beta_slow": 2,
        "attention_factor": 1.3,
    },
    "yarn, mscale": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
        "truncate": False,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
}
# RAW extended from 2048 to 16384 positions, computed by hand. NTK-aware: theta grows by factor^(D / (D - 2))
# with D = 32.
BY_HAND = {
    "linear": Rope("linear", 10000.0, 2048, 8.0),
    "ntk": Rope("ntk", 10000.0 * 8 ** (32 / 30), 2048, 8.0, original_theta=10000.0),
    "yarn": Rope("yarn", 10000.0, 2048, 8.0),
    "llama3": Rope("llama3", 10000.0, 2048, 8.0, low_freq_factor=1.0, high_freq_factor=4.0),
}


def theirs(raw):
    """The inverse frequencies and the attention factor of transformers 5."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    layer = LlamaRotaryEmbedding(LlamaConfig(**json.loads(json.dumps(raw))))
    return layer.inv_freq.double().numpy(), layer.attention_scaling


def same(raw, head_dim=32):
    config = read_config(raw)
    frequency, factor = rope_.inverse_frequencies(config.rope, head_dim)
    wanted, wanted_factor = theirs(raw)
    assert frequency.dtype == np.float64
    np.testing.assert_allclose(frequency, wanted, rtol=2e-6)
    assert math.isclose(factor, wanted_factor, rel_tol=1e-6)
    return config


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("spelling", [4, 5])
def test_frequencies_equal_those_of_transformers(name, spelling):
    raw, scaling = dict(RAW), SCALINGS[name]
    if spelling == 4:
        raw["rope_scaling"] = scaling
    else:
        del raw["rope_theta"]
        raw["rope_parameters"] = {"rope_type": "default", **(scaling or {}), "rope_theta": 500000.0}
    assert same(raw).rope.theta == (10000.0 if spelling == 4 else 500000.0)


def test_the_old_key_wins_as_in_transformers():
    raw = {
        **RAW,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0},
    }
    assert same(raw).rope.factor == 4


@given(st.sampled_from(rope_.EXTENSIONS), st.integers(2049, 1 << 20))
@settings(max_examples=60)
def test_we_and_transformers_read_an_extended_config_alike(kind, target):
    rope, text = rope_.extend(read_config(RAW), kind, target)
    raw = json.loads(json.dumps(rope_.to_config(RAW, rope, target)))
    config = same(raw)
    assert config.rope == rope and config.max_position_embeddings == target
    assert kind in text and str(target) in text and "2048" in text
    # Each version reads only its own keys (transformers 4 does not know rope_parameters).
    v4 = {key: value for key, value in raw.items() if key != "rope_parameters"}
    v5 = {key: value for key, value in raw.items() if key not in ("rope_scaling", "rope_theta")}
    assert same(v4).rope == same(v5).rope == rope


def test_transformers_reads_the_saved_config_without_a_warning(caplog):
    import logging

    from transformers import LlamaConfig
    from transformers import logging as theirs_

    theirs_.enable_propagation()
    with caplog.at_level(logging.WARNING):
        for kind in rope_.EXTENSIONS:
            rope, _ = rope_.extend(read_config(RAW), kind, 8192)
            LlamaConfig(**rope_.to_config(RAW, rope, 8192))
    theirs_.disable_propagation()
    assert not caplog.records


@pytest.mark.parametrize("family", ["granite", "smollm3"])
@pytest.mark.parametrize("kind", rope_.EXTENSIONS)
def test_other_families_are_extended_like_llama(family, kind):
    raw = {**RAW, "model_type": family}
    rope, _ = rope_.extend(read_config(raw), kind, 8192)
    config = same(rope_.to_config(raw, rope, 8192))
    assert config.rope == rope == rope_.extend(read_config(RAW), kind, 8192)[0]


def test_phi3_is_extended_by_ntk_only(caplog):
    """transformers refuses other types in a Phi-3 config, and always writes 4096 as the original length."""
    import logging

    from transformers import Phi3Config
    from transformers import logging as theirs_
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    raw = {**RAW, "model_type": "phi3", "original_max_position_embeddings": 4096}
    base = read_config(raw)
    assert base.rope == Rope("default", 10000.0, 2048)
    rope, text = rope_.extend(base, "ntk", 8192)
    assert text.startswith("rope: ntk, factor ceil(8192 / 2048) = 4, theta 10000 -> ")
    extended = rope_.to_config(raw, rope, 8192)
    assert read_config(extended).rope == rope
    assert rope_.extend(read_config(extended), "ntk", 16384)[0] == rope_.extend(base, "ntk", 16384)[0]
    theirs_.enable_propagation()
    with caplog.at_level(logging.WARNING):
        config = Phi3Config(**{**extended, "pad_token_id": None, "eos_token_id": 2})
    theirs_.disable_propagation()
    assert not caplog.records and config.max_position_embeddings == 8192
    frequency, _ = rope_.inverse_frequencies(rope, 32)
    np.testing.assert_allclose(frequency, Phi3RotaryEmbedding(config).inv_freq.double().numpy(), rtol=2e-6)
    for kind in ("linear", "yarn", "llama3"):
        with pytest.raises(UserError, match=f"a phi3 model can only be extended by ntk, got {kind}"):
            rope_.extend(base, kind, 8192)
        with pytest.raises(Exception, match="longrope"):
            Phi3Config(
                **rope_.to_config(
                    raw, Rope(kind, 10000.0, 2048, 4.0, low_freq_factor=1.0, high_freq_factor=4.0), 8192
                )
            )


@pytest.mark.parametrize("target, factor", [(2049, 2), (4096, 2), (4097, 3), (8192, 4), (100000, 49)])
def test_the_linear_factor_is_rounded_up(target, factor):
    rope, text = rope_.extend(read_config(RAW), "linear", target)
    assert rope.factor == factor and rope.original_length == 2048
    assert text == f"rope: linear, factor ceil({target} / 2048) = {factor}"


@pytest.mark.parametrize("kind", rope_.EXTENSIONS)
def test_extending_once_gives_the_rope_computed_by_hand(kind):
    assert rope_.extend(read_config(RAW), kind, 16384)[0] == BY_HAND[kind]


@pytest.mark.parametrize("first", ["linear", "ntk"])
@pytest.mark.parametrize("second", rope_.EXTENSIONS)
def test_extending_twice_equals_extending_once(first, second):
    """The authors' scripts give a factor of 2 in place of 8 when they extend 4096 by 4, then to 32768."""
    half, _ = rope_.extend(read_config(RAW), first, 8192)
    twice, text = rope_.extend(read_config(rope_.to_config(RAW, half, 8192)), second, 16384)
    assert twice == BY_HAND[second] and "extended before" in text


@pytest.mark.parametrize("kind", ["yarn", "llama3"])
def test_yarn_and_llama3_are_extended_again_by_their_own_rule(kind):
    half, _ = rope_.extend(read_config(RAW), kind, 8192)
    extended = read_config(rope_.to_config(RAW, half, 8192))
    assert rope_.extend(extended, kind, 16384)[0] == BY_HAND[kind]
    with pytest.raises(UserError, match=f"rope is {kind} .* can only be extended by {kind}, got linear"):
        rope_.extend(extended, "linear", 16384)


def test_yarn_keeps_its_ramp_and_gets_a_new_attention_factor():
    """The attention_factor of the base belongs to its factor. The paper's rule gives 0.1 ln 8 + 1 for a
    factor of 8."""
    base = read_config({**RAW, "rope_scaling": SCALINGS["yarn, all keys"]})
    rope, _ = rope_.extend(base, "yarn", 32768)
    assert rope == Rope("yarn", 10000.0, 4096, 8.0, beta_fast=20.0, beta_slow=2.0)
    assert math.isclose(rope_.inverse_frequencies(rope, 32)[1], 1.2079441541679836, rel_tol=1e-12)
    same(rope_.to_config(RAW, rope, 32768))


def test_max_positions_are_the_original_length_of_a_linear_base_without_one():
    """The authors' own models are like this: max_position_embeddings 4096, factor 8."""
    config = read_config({**RAW, "rope_scaling": {"type": "linear", "factor": 8.0}})
    assert rope_.extend(config, "linear", 32768)[0].factor == 16


def test_llama_3_1_is_extended_from_its_original_length():
    scaling = {**SCALINGS["llama3"], "original_max_position_embeddings": 8192}
    config = read_config({**RAW, "max_position_embeddings": 131072, "rope_scaling": scaling})
    assert rope_.extend(config, "llama3", 262144)[0].factor == 16
    with pytest.raises(UserError, match="target length should be above the 131072 tokens"):
        rope_.extend(config, "llama3", 65536)


@pytest.mark.parametrize("target", [2048, 1, 0, -5, True, 4096.0, "4096"])
def test_a_target_that_is_not_longer_is_refused(target):
    with pytest.raises(
        UserError, match="target length should be above the 2048 tokens of the base model, got"
    ):
        rope_.extend(read_config(RAW), "linear", target)


@pytest.mark.parametrize("kind", ["default", "dynamic", "longrope", None])
def test_an_unknown_extension_is_refused(kind):
    with pytest.raises(UserError, match="rope type should be one of linear, ntk, yarn, llama3"):
        rope_.extend(read_config(RAW), kind, 4096)


@pytest.mark.parametrize("name", SCALINGS)
def test_tables_hold_cosines_and_sines(name):
    rope = read_config({**RAW, "rope_scaling": SCALINGS[name]}).rope
    frequency, factor = rope_.inverse_frequencies(rope, 32)
    cos, sin = rope_.tables(rope, 32, 131072)
    assert cos.dtype == sin.dtype == np.float32 and cos.shape == sin.shape == (131072, 16)
    for position in (0, 1, 8191, 8192, 15962, 131071):
        np.testing.assert_allclose(cos[position], factor * np.cos(position * frequency), rtol=0, atol=1e-7)
        np.testing.assert_allclose(sin[position], factor * np.sin(position * frequency), rtol=0, atol=1e-7)
    assert rope_.tables(rope, 32, 0)[0].shape == (0, 16)
    for got, whole in zip(rope_.tables(rope, 32, 9000, first=100), (cos, sin)):
        np.testing.assert_array_equal(got, whole[100:9100])


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "rope type 'dynamic' is not supported; supported are default",
        ),
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1], "long_factor": [1]}},
            "rope type 'longrope' is not",
        ),
        ({"rope_scaling": {"rope_type": "ntk", "factor": 2.0}}, "rope type 'ntk' is not supported"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, "rope type \\['linear'\\] is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope of type linear lacks factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_factor, high_freq_factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor should be a number from 1 to"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": "4"}},
            "factor should be a number from 1 to 1e\\+09, got '4'",
        ),
        ({"rope_scaling": {"rope_type": "linear", "factor": float("nan")}}, "factor should be a number"),
        (
            {"rope_scaling": {**SCALINGS["llama3"], "high_freq_factor": 1.0}},
            "high_freq_factor should be above low_freq_factor",
        ),
        ({"rope_scaling": {**SCALINGS["yarn"], "truncate": 1}}, "truncate should be true or false"),
        (
            {"rope_scaling": {**SCALINGS["yarn"], "original_max_position_embeddings": 1.5}},
            "original_max_position_embeddings should be",
        ),
        ({"rope_scaling": "linear"}, "rope_scaling should be an object"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}, "sliding_attention": {}}},
            "rope differs by layer type",
        ),
        ({"rope_theta": -1}, "rope_theta should be a number from 2"),
        ({"rope_theta": "10000"}, "rope_theta should be a number"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported; supported is 1"),
    ],
)
def test_absurd_ropes_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        read_config({**RAW, **fields})
