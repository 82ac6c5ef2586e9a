"""Rope fields of a config and their limits, edge cases of yarn and llama3, and the texts of an extension."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from test_rope import RAW, SCALINGS, same

from longlora.decoder import rope as rope_
from longlora.decoder.config import read_config
from longlora.decoder.rope import Rope
from longlora.errors import UserError


def read(scaling=None, **fields):
    return read_config({**RAW, "rope_scaling": scaling, **fields}).rope


def refused(message, scaling=None, **fields):
    with pytest.raises(UserError, match=message):
        read(scaling, **fields)


@pytest.mark.parametrize("name, field", [("rope_theta", "theta"), ("original_rope_theta", "original_theta")])
def test_theta_has_limits(name, field):
    for value in (2, 2.0, 2.5, 10**12):
        found = getattr(read(**{name: value}), field)
        assert found == value and type(found) is float
    for wrong in (1.999, 1, 10**12 + 0.5, True, "3", [3], float("nan")):
        with pytest.raises(UserError) as caught:
            read(**{name: wrong})
        assert f"config: {name} should be a number from 2 to 1e+12, got {wrong!r}" == str(caught.value)


FACTORS = [
    ("linear", "factor", 1, 10**9),
    ("yarn", "factor", 1, 10**9),
    ("llama3", "factor", 1, 10**9),
    ("yarn", "attention_factor", 1e-3, 10**9),
    ("yarn", "beta_fast", 1e-3, 10**9),
    ("yarn", "beta_slow", 1e-3, 10**9),
    ("yarn", "mscale", 1e-3, 10**9),
    ("yarn", "mscale_all_dim", 1e-3, 10**9),
    ("llama3", "low_freq_factor", 1e-3, 3.999),  # high_freq_factor is 4
    ("llama3", "high_freq_factor", 1.001, 10**9),  # low_freq_factor is 1
]


@pytest.mark.parametrize("kind, name, least, most", FACTORS)
def test_factors_have_limits(kind, name, least, most):
    scaling = SCALINGS[kind]
    for value in (least, 1.5, most):
        found = getattr(read({**scaling, name: value}), name)
        assert found == value and type(found) is float
    lowest = "1" if name == "factor" else "0.001"
    for wrong in (0, 0.0009, 10**9 + 0.5, True, "4", float("nan"), [2]):
        message = f"config: {name} should be a number from {lowest} to 1e\\+09, got "
        refused(message, {**scaling, name: wrong})


def test_original_max_position_embeddings_has_limits():
    for value in (1, 2, 1 << 31):
        assert read(original_max_position_embeddings=value).original_length == value
        assert read({**SCALINGS["yarn"], "original_max_position_embeddings": value}).original_length == value
    for wrong in (-1, (1 << 31) + 1, True, 4.0, "4"):
        message = f"original_max_position_embeddings should be an integer above 0, got {wrong!r}$"
        refused(message, original_max_position_embeddings=wrong)
    assert read(original_max_position_embeddings=512).original_length == 512


def test_the_original_length_is_the_top_level_one_or_that_of_the_rope_or_the_whole_length():
    both = {**SCALINGS["yarn"], "original_max_position_embeddings": 256}
    assert read(both, original_max_position_embeddings=512).original_length == 512
    assert read(both).original_length == 256 and read().original_length == 2048
    assert read({"type": "linear", "factor": 2}).original_length == 2048


def test_a_rope_with_another_theta_of_pretraining_is_ntk():
    raw = dict(original_max_position_embeddings=600, original_rope_theta=500)
    assert read(**raw) == Rope("ntk", 10000.0, 600, 4.0, original_theta=500.0)  # ceil(2048 / 600)
    assert read({"rope_type": "linear", "factor": 2}, **raw) == Rope("linear", 10000.0, 600, 2.0)


def test_theta_is_that_of_rope_parameters_or_the_top_level_or_the_default():
    """transformers 5 writes it to rope_parameters, transformers 4 to the top level."""
    plain = {key: value for key, value in RAW.items() if key != "rope_theta"}
    assert read_config(plain).rope.theta == 10000
    assert read_config({**plain, "rope_theta": 777}).rope.theta == 777
    parameters = {"rope_type": "default", "rope_theta": 555.0}
    assert read_config({**RAW, "rope_parameters": parameters}).rope.theta == 555
    assert read_config({**RAW, "rope_theta": None}).rope.theta == 10000


@pytest.mark.parametrize("nothing", [None, {}, {"rope_type": "default"}, {"type": "default"}, {"type": None}])
def test_a_rope_without_a_type_is_default(nothing):
    assert read(nothing) == read_config({**RAW, "rope_parameters": nothing}).rope
    assert read(nothing) == Rope("default", 10000.0, 2048)


def test_wrong_rope_fields_are_named():
    refused("^config: rope_scaling should be an object, got 'x'$", "x")
    refused(r"^config: rope_parameters should be an object, got \[1\]$", None, rope_parameters=[1])
    nested = {"b": {"rope_type": "default"}, "a": {}, "factor": 2}
    refused(r"differs by layer type \(a, b\); supported is one rope for all layers", nested)
    refused("'dynamic' is not supported; supported are default, linear, yarn, llama3$", {"type": "dynamic"})
    for place in ({"partial_rotary_factor": 0.5}, {"rope_parameters": {"partial_rotary_factor": 0.5}}):
        refused("^config: partial_rotary_factor 0.5 is not supported; supported is 1$", **place)
    for one in (1, 1.0, None):
        assert read(partial_rotary_factor=one) == read()
    refused("^config: rope of type yarn lacks factor$", {"type": "yarn"})
    refused("lacks factor, low_freq_factor, high_freq_factor$", {"type": "llama3"})
    refused("truncate should be true or false, got 0", {**SCALINGS["yarn"], "truncate": 0})
    for flag in (True, False, None):
        assert read({**SCALINGS["yarn"], "truncate": flag}).truncate is flag
    for low in (4.0, 4.5):
        message = f"high_freq_factor should be above low_freq_factor, got 4 and {low:g}$"
        refused(message, {**SCALINGS["llama3"], "low_freq_factor": low})


YARNS = {
    "low below 0": dict(original_max_position_embeddings=64),
    "high above the last": dict(rope_theta=10.0, original_max_position_embeddings=1024),
    "low above high": dict(rope_theta=2.0, original_max_position_embeddings=1 << 20),
    "low is high": dict(beta_fast=8, beta_slow=8, truncate=False, original_max_position_embeddings=4096),
    "not truncated": dict(truncate=False, original_max_position_embeddings=4096),
    "truncated": dict(truncate=True, original_max_position_embeddings=4096),
    "mscale alone": dict(mscale=0.8, original_max_position_embeddings=4096),
    "mscale_all_dim alone": dict(mscale_all_dim=0.8, original_max_position_embeddings=4096),
    "factor 1": dict(factor=1.0, original_max_position_embeddings=4096),
    "factor 1.5": dict(factor=1.5, original_max_position_embeddings=4096),
}


@pytest.mark.parametrize("name", YARNS)
def test_edge_cases_of_yarn_equal_transformers(name):
    fields = dict(YARNS[name])
    theta = fields.pop("rope_theta", 10000.0)
    same({**RAW, "rope_theta": theta, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, **fields}})


@pytest.mark.parametrize("low, high, original", [(1.0, 4.0, 64), (2.0, 2.5, 4096), (0.01, 100.0, 1 << 20)])
def test_edge_cases_of_llama3_equal_transformers(low, high, original):
    scaling = dict(rope_type="llama3", factor=3.0, low_freq_factor=low, high_freq_factor=high)
    same({**RAW, "rope_scaling": {**scaling, "original_max_position_embeddings": original}})


def test_the_attention_factor_of_yarn():
    """arXiv 2309.00071: 0.1 ln s + 1 for a factor s above 1. mscale m makes it 0.1 m ln s + 1."""
    assert [rope_.yarn_attention(s) for s in (0.5, 1)] == [1, 1]
    assert rope_.yarn_attention(math.e) == pytest.approx(1.1)
    assert rope_.yarn_attention(math.e**2, 0.5) == pytest.approx(1.1)
    assert rope_.yarn_attention(1.5) == pytest.approx(1.0405465)


def test_the_inverse_frequencies_of_four_pairs():
    frequency, factor = rope_.inverse_frequencies(Rope("default", 10000.0, 64), 8)
    np.testing.assert_allclose(frequency, [1, 0.1, 0.01, 0.001], rtol=1e-12)
    assert factor == 1
    frequency, factor = rope_.inverse_frequencies(Rope("linear", 10000.0, 64, 4.0), 8)
    np.testing.assert_allclose(frequency, [0.25, 0.025, 0.0025, 0.00025], rtol=1e-12)
    assert factor == 1


@pytest.mark.parametrize("first, length", [(0, 0), (0, 1), (5, 3), (0, 8192), (0, 8193), (1 << 30, 4)])
def test_tables_have_cosines_and_sines_of_positions_from_first_on(first, length):
    cos, sin = rope_.tables(Rope("default", 10000.0, 64), 4, length, first)
    angle = (first + np.arange(length))[:, None] * np.array([1, 0.01])
    assert cos.shape == sin.shape == (length, 2) and cos.dtype == sin.dtype == np.float32
    np.testing.assert_allclose(cos, np.cos(angle), rtol=0, atol=6e-8)
    np.testing.assert_allclose(sin, np.sin(angle), rtol=0, atol=6e-8)


BASES = {
    "default": {},
    "linear": dict(rope_scaling=SCALINGS["linear"], original_max_position_embeddings=512),
    "yarn": dict(rope_scaling=SCALINGS["yarn"]),
    "llama3": dict(rope_scaling=SCALINGS["llama3"]),
}


@pytest.mark.parametrize(
    "base, kind, target, text",
    [
        ("default", "linear", 8192, "rope: linear, factor ceil(8192 / 2048) = 4"),
        ("default", "yarn", 5120, "rope: yarn, factor 5120 / 2048 = 2.5"),
        ("default", "llama3", 5120, "rope: llama3, factor ceil(5120 / 2048) = 3"),
        ("default", "ntk", 8192, "rope: ntk, factor ceil(8192 / 2048) = 4, theta 10000 -> 43873"),
        (
            "linear",
            "linear",
            4096,
            "rope: linear, factor ceil(4096 / 512) = 8 (the base was extended before: linear, factor 4)",
        ),
        (
            "yarn",
            "yarn",
            16384,
            "rope: yarn, factor 16384 / 1024 = 16 (the base was extended before: yarn, factor 8)",
        ),
        ("llama3", "llama3", 3072, "rope: llama3, factor 8 x 3072 / 2048 = 12"),
    ],
)
def test_the_text_of_an_extension(base, kind, target, text):
    """The theta of ntk is 10000 x 4^(32 / 30) = 43873."""
    assert rope_.extend(read_config({**RAW, **BASES[base]}), kind, target)[1] == text


@pytest.mark.parametrize("base", ["yarn", "llama3"])
@pytest.mark.parametrize("kind", rope_.EXTENSIONS)
def test_a_yarn_or_llama3_base_is_extended_by_its_own_rule_only(base, kind):
    config = read_config({**RAW, **BASES[base]})
    if kind == base:
        assert rope_.extend(config, kind, 4096)[0].type == kind
    else:
        words = (
            rf"^the base model's rope is {base} \(factor 8\); it can only be extended by {base}, got {kind}$"
        )
        with pytest.raises(UserError, match=words):
            rope_.extend(config, kind, 4096)


def test_a_target_is_longer_than_the_original_length_or_llama3s_whole_length():
    """In Llama 3.1 the whole length is not factor times the original length."""
    config = read_config({**RAW, **BASES["llama3"]})
    for target in (2048, 100):
        with pytest.raises(
            UserError, match=f"should be above the 2048 tokens of the base model, got {target}"
        ):
            rope_.extend(config, "llama3", target)
    again = read_config({**RAW, **BASES["linear"]})
    assert rope_.extend(again, "linear", 513)[0] == Rope("linear", 10000.0, 512, 2.0)
    with pytest.raises(UserError, match="should be above the 512 tokens of the base model, got 512"):
        rope_.extend(again, "linear", 512)


def test_ntk_needs_more_than_one_pair_of_dimensions():
    """Such heads are those of a model of transformers that rotates a part of them."""
    rope = Rope("default", 1e4, 64)
    base = SimpleNamespace(family="llama", rope=rope, max_position_embeddings=64, head_dim=2)
    with pytest.raises(UserError, match="should not be ntk for a model that rotates 2 dimensions"):
        rope_.extend(base, "ntk", 128)
    assert rope_.extend(base, "linear", 128)[0] == Rope("linear", 1e4, 64, 2.0)
    base.head_dim = 4
    assert rope_.extend(base, "ntk", 128)[0].theta == 4e4  # 2 to the power 4 / 2


def test_a_saved_config_has_the_rope_keys_of_transformers_4_and_5_only():
    raw = {**RAW, "original_rope_theta": 3.0, "original_max_position_embeddings": 7}
    keys = {"rope_type": "linear", "factor": 4.0}
    assert rope_.to_config(raw, Rope("linear", 500.0, 2048, 4.0), 8192) == {
        **RAW,
        "rope_theta": 500.0,
        "max_position_embeddings": 8192,
        "rope_scaling": {**keys, "type": "linear"},
        "rope_parameters": {**keys, "rope_theta": 500.0},
        "original_max_position_embeddings": 2048,
    }
    plain = {"rope_type": "default", "rope_theta": 500.0}
    assert rope_.to_config(raw, Rope("default", 500.0, 2048), 2048) == {
        **RAW,
        "rope_theta": 500.0,
        "rope_scaling": None,
        "rope_parameters": plain,
    }
    assert rope_.to_config(raw, Rope("ntk", 500.0, 64, 2.0, original_theta=9.0), 128) == {
        **RAW,
        "rope_theta": 500.0,
        "max_position_embeddings": 128,
        "rope_scaling": None,
        "rope_parameters": plain,
        "original_max_position_embeddings": 64,
        "original_rope_theta": 9.0,
    }
    yarn = rope_.to_config(RAW, Rope("yarn", 500.0, 64, 2.0, beta_fast=5.0, truncate=False), 128)
    assert yarn["rope_parameters"] == {
        "rope_type": "yarn",
        "factor": 2.0,
        "beta_fast": 5.0,
        "truncate": False,
        "original_max_position_embeddings": 64,
        "rope_theta": 500.0,
    }
    assert raw["original_rope_theta"] == 3  # the argument is not changed
