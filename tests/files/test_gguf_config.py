"""The metadata of a GGUF file becomes the config that transformers makes of it."""

import math

import numpy as np
import pytest
from gguf_small import SIZES, arrays, divisors, heads, refused, stored, write

from longlora.decoder.rope import Rope
from longlora.errors import UserError
from longlora.files import gguf
from longlora.files.open_model import open_model

NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"
# What all families have in common where transformers reads a file with gguf_small.KEYS and IDS.
COMMON = dict(
    **SIZES,
    hidden_act="silu",
    initializer_range=0.02,
    use_cache=True,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    rope_theta=10000.0,
    rope_scaling=None,
)
IDS = {f"tokenizer.ggml.{name}_token_id": i for i, name in enumerate(("padding", "bos", "eos"))}
MULTIPLIERS = {
    "embedding_scale": 12.0,
    "residual_scale": 0.22,
    "attention.scale": 0.0078125,
    "logit_scale": 8.0,
}


def raw(path, family="llama", keys=None, tensors=None):
    return open_model(write(path / "m.gguf", family, keys, tensors)).config.raw


@pytest.mark.parametrize(
    "family, name, more",
    [
        ("llama", "LlamaForCausalLM", dict(attention_bias=False)),
        ("qwen2", "Qwen2ForCausalLM", {}),
        ("qwen3", "Qwen3ForCausalLM", dict(attention_bias=False)),
        ("phi3", "Phi3ForCausalLM", {}),
        (
            "granite",
            "GraniteForCausalLM",
            dict(
                attention_bias=False,
                embedding_multiplier=12.0,
                residual_multiplier=0.22,
                attention_multiplier=0.0078125,
                logits_scaling=8.0,
            ),
        ),
        ("smollm3", "SmolLM3ForCausalLM", dict(attention_bias=False, no_rope_layer_interval=4)),
    ],
)
def test_each_family_has_the_config_of_transformers(tmp_path, family, name, more):
    keys = {**IDS, **(MULTIPLIERS if family == "granite" else {})}
    wanted = dict(COMMON, architectures=[name], model_type=family, **more)
    assert raw(tmp_path, family, keys) == wanted


@pytest.mark.parametrize("family", ["llama", "granite", "smollm3", "qwen3"])
def test_a_file_with_biases_has_attention_bias(tmp_path, family):
    tensors = stored(arrays(family, attention_bias=True), family)
    assert raw(tmp_path, family, tensors=tensors)["attention_bias"] is True


def test_defaults_of_what_a_file_lacks(tmp_path):
    """Without a head the embedding is tied. llama.cpp takes as many key heads as heads, and theta 10000."""
    tensors = stored(arrays(tie_word_embeddings=True, num_key_value_heads=4), kv_heads=4)
    found = raw(tmp_path, keys={"attention.head_count_kv": None, "rope.freq_base": None}, tensors=tensors)
    assert found["tie_word_embeddings"] is True and found["num_key_value_heads"] == 4
    assert found["rope_theta"] == 10000.0
    assert (found["bos_token_id"], found["eos_token_id"], found["pad_token_id"]) == (None, None, None)


@pytest.mark.parametrize(
    "key",
    [
        "embedding_length",
        "feed_forward_length",
        "block_count",
        "attention.head_count",
        "context_length",
        "attention.layer_norm_rms_epsilon",
    ],
)
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_missing_key_is_named(tmp_path, family, key):
    assert refused(tmp_path, family, {key: None}) == f"the metadata lacks {family}.{key}"


@pytest.mark.parametrize("value, shortest", [(1e-6, 1e-6), (1e-5, 1e-5), (0.1, 0.1), (1 / 3, 0.33333334)])
def test_numbers_are_the_shortest_decimals_of_a_float32(tmp_path, value, shortest):
    """The file holds 9.99999974737875e-06 for the 1e-05 of a config.json."""
    found = raw(tmp_path, keys={"attention.layer_norm_rms_epsilon": value, "rope.freq_base": 100000.1})
    assert (found["rms_norm_eps"], found["rope_theta"]) == (shortest, 100000.1)


@pytest.mark.filterwarnings("error")
def test_a_number_beyond_float32_is_refused_without_a_warning(tmp_path):
    found = refused(tmp_path, keys={"attention.layer_norm_rms_epsilon": np.float64(1e300)})
    assert found == "rms_norm_eps should be a number above 0, at most 1, got inf"


def test_the_rows_of_the_embedding_override_vocab_size(tmp_path):
    assert raw(tmp_path, keys={"vocab_size": 7})["vocab_size"] == 6
    tensors = stored(arrays())
    del tensors["token_embd.weight"]
    found = refused(tmp_path, keys={"vocab_size": 6}, tensors=tensors)
    assert found == f"1 tensors of the config are missing: {EMBEDDING}"
    assert refused(tmp_path, tensors=tensors) == "vocab_size is missing"


@pytest.mark.parametrize(
    "key",
    [
        "expert_count",
        "attention.sliding_window",
        "attention.clamp_kqv",
        "attention.max_alibi_bias",
        "attention.scale",
        "logit_scale",
        "embedding_scale",
        "residual_scale",
        "attn_logit_softcapping",
        "final_logit_softcapping",
    ],
)
def test_keys_that_change_what_a_model_computes_are_refused(tmp_path, key):
    """A key of 0 is ignored. Granite computes its own scales."""
    assert refused(tmp_path, keys={key: 2}) == f"llama.{key} 2 is not supported"
    assert raw(tmp_path, keys={key: 0}) == raw(tmp_path)
    assert refused(tmp_path, "phi3", {key: 2}) == f"phi3.{key} 2 is not supported"
    if key in MULTIPLIERS:
        assert 2.0 in raw(tmp_path, "granite", {key: 2.0}).values()
    else:
        assert refused(tmp_path, "granite", {key: 2}) == f"granite.{key} 2 is not supported"


@pytest.mark.parametrize("name", ["rope_factors_long.weight", "rope_factors_short.weight"])
def test_longrope_is_refused(tmp_path, name):
    tensors = stored(arrays("phi3"), "phi3") | {name: np.ones(4, np.float32)}
    assert refused(tmp_path, "phi3", tensors=tensors) == f"{name} asks for longrope, which is not supported"


@pytest.mark.parametrize("value", [3, 3.0, True, ["llama"], None, "gemma2", "mistral", ""])
def test_an_architecture_that_is_not_supported_is_named(tmp_path, value, monkeypatch):
    original = gguf.open_files

    def changed(path):
        files = original(path)
        files[0].metadata["general.architecture"] = value
        return files

    monkeypatch.setattr(gguf, "open_files", changed)
    assert refused(tmp_path) == (
        f"architecture {value!r} is not supported; supported are llama, qwen2, qwen3, phi3, granite, smollm3"
    )


# ---- heads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, sizes, head_dim",
    [
        ("llama", (None, None, None), None),
        ("llama", (8, None, None), 8),
        ("llama", (8, 8, None), 8),
        ("llama", (8, None, 8), 8),
        ("llama", (None, None, 8), 8),
        ("phi3", (None, None, None), 8),
        ("phi3", (None, None, 8), 8),
        ("phi3", (8, 8, 8), 8),
    ],
)
def test_any_of_three_keys_gives_the_head_size(tmp_path, family, sizes, head_dim):
    """Without any of them it is hidden size / heads, as in llama.cpp and transformers."""
    model = open_model(write(tmp_path / "m.gguf", family, heads(*sizes)))
    assert model.config.raw.get("head_dim") == head_dim and model.config.head_dim == 8


def test_the_head_size_may_differ_from_hidden_size_divided_by_heads(tmp_path):
    tensors = stored(arrays("qwen3", head_dim=16), "qwen3")
    for sizes in ((16, 16, 16), (16, None, None), (None, None, 16)):
        assert raw(tmp_path, "qwen3", heads(*sizes), tensors)["head_dim"] == 16


def test_one_head_has_the_hidden_size(tmp_path):
    tensors = stored(arrays("phi3", num_attention_heads=1, num_key_value_heads=1, head_dim=32), "phi3")
    keys = {"attention.head_count": 1, "attention.head_count_kv": 1, **heads(None, None, 32)}
    assert raw(tmp_path, "phi3", keys, tensors)["head_dim"] == 32


@pytest.mark.parametrize(
    "family, sizes",
    [
        ("llama", (None, 8, None)),
        ("llama", (None, 8, 8)),
        ("llama", (8, 4, 8)),
        ("llama", (8, 8, 4)),
        ("llama", (8, 8, 16)),
        ("phi3", (None, None, 6)),
        ("phi3", (8, 8, 6)),
    ],
)
def test_heads_with_different_sizes_are_refused(tmp_path, family, sizes):
    key, value, turned = sizes
    assert refused(tmp_path, family, heads(*sizes)) == (
        f"heads with key_length {key}, value_length {value}, rope.dimension_count {turned} are not "
        "supported; each should be the head size or absent"
    )


@pytest.mark.parametrize("name", ["attention.key_length", "attention.value_length", "rope.dimension_count"])
@pytest.mark.parametrize("value", [0, -8, True, 8.0, "8", [8]])
def test_a_head_size_must_be_an_integer_above_0(tmp_path, name, value):
    found = refused(tmp_path, keys={name: value})
    assert found == f"llama.{name} should be an integer above 0, got {value!r}"


def test_a_head_size_of_1_is_refused_as_in_a_config(tmp_path):
    message = "head_dim should be even and at least 4, got 1"
    assert refused(tmp_path, keys=heads(1, 1, 1)) == message
    assert refused(tmp_path, "phi3", {"attention.head_count": 32, **heads(None, None, 1)}) == message


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"attention.head_count": 0}, "num_attention_heads should be an integer from 1 to 16384, got 0"),
        ({"attention.head_count": "4"}, "num_attention_heads should be an integer from 1 to 16384, got '4'"),
        ({"embedding_length": "x"}, "hidden_size should be an integer from 1 to 1048576, got 'x'"),
        ({"embedding_length": True}, "hidden_size should be an integer from 1 to 1048576, got True"),
        ({"attention.head_count": 32}, "head_dim should be even and at least 4, got 1"),
        (
            {"attention.head_count": 64},
            "hidden_size 32 should be a multiple of num_attention_heads 64, or head_dim given",
        ),
    ],
)
@pytest.mark.parametrize("family", ["phi3", "granite"])
def test_sizes_that_do_not_give_a_head_size_are_named(tmp_path, family, changes, message):
    changes = {**heads(None, None, None), "attention.head_count_kv": 1, **changes}
    assert refused(tmp_path, family, changes) == message


@pytest.mark.parametrize("sizes, size", [((16, 16, 16), 16), ((None, None, None), 8)])
def test_granite_without_scales_has_those_of_llama_cpp(tmp_path, sizes, size):
    """They are 1, but 1 / sqrt(head size) for the attention. A scale of 0 counts as missing."""
    tensors = stored(arrays("granite", head_dim=size), "granite")
    for scales in ({}, dict.fromkeys(MULTIPLIERS, 0.0)):
        found = raw(tmp_path, "granite", {**heads(*sizes), **scales}, tensors)
        assert [found[f"{name}_multiplier"] for name in ("embedding", "residual")] == [1.0, 1.0]
        assert found["logits_scaling"] == 1.0
        assert found["attention_multiplier"] == pytest.approx(1 / math.sqrt(size), rel=1e-12)


# ---- rope ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys, scaling",
    [
        ({}, None),
        ({"scale_linear": 4.0}, dict(rope_type="linear", factor=4.0)),
        ({"scaling.factor": 4.0}, dict(rope_type="linear", factor=4.0)),
        ({"scaling.factor": 4.0, "scale_linear": 2.0}, dict(rope_type="linear", factor=4.0)),
        ({"scaling.factor": 0.0, "scale_linear": 2.0}, dict(rope_type="linear", factor=2.0)),
        ({"scaling.type": "linear", "scaling.factor": 2.0}, dict(rope_type="linear", factor=2.0)),
        ({"scaling.type": "linear", "scaling.factor": 1.1}, dict(rope_type="linear", factor=1.1)),
        ({"scaling.type": "linear", "scaling.factor": 1.0}, None),
        ({"scaling.type": "linear", "scale_linear": 0.0}, None),
        ({"scaling.type": "linear"}, None),
        ({"scale_linear": 0.0}, None),
        ({"scale_linear": 1.0}, None),
        ({"scaling.type": "none", "scaling.factor": 2.0}, None),
        ({"scaling.type": "none", "scaling.attn_factor": 2.0}, None),
        (
            {"scaling.factor": 4.0, "scaling.original_context_length": 16, "scaling.finetuned": True},
            dict(rope_type="linear", factor=4.0, original_max_position_embeddings=16),
        ),
        ({"scaling.factor": 4.0, "scaling.original_context_length": 0}, dict(rope_type="linear", factor=4.0)),
        ({"scaling.type": "yarn", "scaling.factor": 4.0}, dict(rope_type="yarn", factor=4.0)),
        ({"scaling.type": "yarn", "scaling.factor": 1.0}, dict(rope_type="yarn", factor=1.0)),
        (
            {
                "scaling.type": "yarn",
                "scaling.factor": 4.0,
                "scaling.finetuned": False,
                "scaling.original_context_length": 16,
                "scaling.yarn_beta_fast": 16.0,
                "scaling.yarn_beta_slow": 2.1,
            },
            dict(
                rope_type="yarn",
                factor=4.0,
                original_max_position_embeddings=16,
                beta_fast=16.0,
                beta_slow=2.1,
            ),
        ),
        (
            {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.attn_factor": 0.5},
            dict(rope_type="yarn", factor=4.0, attention_factor=0.5 * (1 + 0.1 * math.log(4))),
        ),
    ],
)
def test_rope_scaling(tmp_path, keys, scaling):
    """llama.cpp multiplies yarn's own factor by attn_factor. A config's attention_factor is the product."""
    assert (
        raw(tmp_path, keys={f"rope.{key}": value for key, value in keys.items()})["rope_scaling"] == scaling
    )


@pytest.mark.parametrize(
    "keys, message",
    [
        (
            {"type": "linear", "factor": 2.0, "attn_factor": 2.0},
            "rope scaling with attn_factor is not supported",
        ),
        ({"type": "yarn", "factor": 2.0, "attn_factor": 2}, "rope scaling with attn_factor is not supported"),
        ({"type": "yarn", "attn_factor": 2.0}, "rope scaling with attn_factor is not supported"),
        (
            {"type": "yarn", "factor": [2.0], "attn_factor": 2.0},
            "rope scaling with attn_factor is not supported",
        ),
        (
            {"type": "yarn", "factor": 2.0, "yarn_log_multiplier": 0.1, "a": 1},
            "rope scaling with a, yarn_log_multiplier is not supported",
        ),
        ({"type": "yarn"}, "rope of type yarn lacks factor"),
        ({"type": "longrope", "factor": 2.0}, "rope type 'longrope' is not supported"),
        ({"type": "linear", "factor": [2.0]}, "factor should be a number from 1 to 1e+09, got [2.0]"),
        ({"type": "linear", "factor": "2"}, "factor should be a number from 1 to 1e+09, got '2'"),
    ],
)
def test_rope_scaling_that_is_not_supported_is_refused(tmp_path, keys, message):
    found = refused(tmp_path, keys={f"rope.scaling.{key}": value for key, value in keys.items()})
    assert found.startswith(message)


def with_freqs(path, freqs, keys=None):
    """The config of a file with rope_freqs.weight and heads of 64."""
    tensors = stored(arrays(head_dim=64)) | {"rope_freqs.weight": np.asarray(freqs, np.float32)}
    return open_model(write(path / "m.gguf", "llama", {**heads(64, 64, 64), **(keys or {})}, tensors)).config


@pytest.mark.parametrize("length", [512, 8192, 1 << 16, 1 << 17])
@pytest.mark.parametrize("factor", [1.5, 2.6, 8.0, 32.0])
def test_llama3_scaling_is_recovered_from_its_divisors(tmp_path, length, factor):
    """With the two longest lengths, no frequency is divided by the whole factor."""
    config = with_freqs(tmp_path, divisors(10000.0, 64, length, factor))
    found = config.raw["rope_scaling"]
    assert found["factor"] == (factor if factor.is_integer() else pytest.approx(factor, rel=1e-4))
    assert found == dict(
        rope_type="llama3",
        factor=found["factor"],
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=length,
    )
    assert config.rope.type == "llama3" and config.rope.original_length == length


@pytest.mark.parametrize("theta, length", [(500000.0, 8192), (1e12, 1 << 20), (2.0, 512), (1000000, 8192)])
def test_llama3_scaling_is_recovered_for_any_theta(tmp_path, theta, length):
    """With theta 2 the longest wave has 12 tokens, too few for all lengths that are tried."""
    given = 16 if theta == 2 else None
    keys = {"rope.freq_base": theta, "rope.scaling.original_context_length": given}
    config = with_freqs(tmp_path, divisors(theta, 64, given or length, 8.0), keys)
    assert config.rope == Rope(
        "llama3", theta, given or length, 8.0, low_freq_factor=1.0, high_freq_factor=4.0
    )


@pytest.mark.parametrize("length", [256, 1 << 21])
def test_a_length_below_512_or_above_2_to_the_20_must_be_in_the_file(tmp_path, length):
    """Without original_context_length, the powers of 2 between these are tried."""
    theta, freqs = 1e9, divisors(1e9, 64, length, 8.0)
    with pytest.raises(UserError, match="rope_freqs.weight does not follow Llama 3's rule, the only one"):
        with_freqs(tmp_path, freqs, {"rope.freq_base": theta})
    keys = {"rope.freq_base": theta, "rope.scaling.original_context_length": length}
    assert with_freqs(tmp_path, freqs, keys).rope.original_length == length


@pytest.mark.parametrize("stated", [3000, 1, (1 << 31) - 1, 1 << 31])
def test_a_stated_length_is_taken(tmp_path, stated):
    keys = {"rope.freq_base": 1e12, "rope.scaling.original_context_length": stated}
    config = with_freqs(tmp_path, divisors(1e12, 64, stated, 8.0), keys)
    assert (config.rope.original_length, config.rope.factor) == (stated, 8.0)


@pytest.mark.parametrize("stated", [0, -8192, (1 << 31) + 1, 1 << 40, 8192.0, "8192", [8192]])
def test_an_invalid_stated_length_is_ignored(tmp_path, stated):
    freqs = divisors(10000.0, 64, 8192, 8.0)
    config = with_freqs(tmp_path, freqs, {"rope.scaling.original_context_length": stated})
    assert config.rope.original_length == 8192 and type(config.raw["rope_scaling"]) is dict


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "change",
    [lambda freqs: freqs * 1.001, lambda freqs: freqs[::-1], lambda freqs: freqs + np.arange(32)],
    ids=["scaled", "reversed", "added"],
)
def test_other_divisors_are_refused_without_a_warning(tmp_path, change):
    with pytest.raises(UserError, match="m.gguf: rope_freqs.weight does not follow Llama 3's rule"):
        with_freqs(tmp_path, change(divisors(10000.0, 64, 8192, 8.0)))


def test_divisors_may_be_rounded(tmp_path):
    found = with_freqs(tmp_path, divisors(10000.0, 64, 8192, 8.0) * 1.00005)
    assert (found.rope.factor, found.rope.original_length) == (8.0, 8192)


def test_divisors_of_1_change_nothing(tmp_path):
    assert with_freqs(tmp_path, np.ones(32)).raw["rope_scaling"] is None


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [0, -1, np.nan, np.inf, -np.inf])
def test_divisors_must_be_a_list_of_numbers_above_0(tmp_path, value):
    freqs = divisors(10000.0, 64, 8192, 8.0)
    freqs[5] = value
    for wrong in (freqs, np.ones((4, 8)), freqs.reshape(1, 32)):
        with pytest.raises(UserError, match="m.gguf: rope_freqs.weight should be a list of numbers above 0"):
            with_freqs(tmp_path, wrong)


def test_there_must_be_half_as_many_divisors_as_numbers_in_a_head(tmp_path):
    for count in (31, 33, 21, 64, 128):
        message = f"m.gguf: rope_freqs.weight has {count} numbers, heads of 64 rotate by 32"
        with pytest.raises(UserError, match=message):
            with_freqs(tmp_path, np.ones(count))


@pytest.mark.parametrize("theta", ["x", True, 1.5, 1e13, 10**12 + 1, -1.0, [10000.0]])
def test_a_wrong_theta_is_named_before_the_divisors(tmp_path, theta):
    with pytest.raises(UserError, match="m.gguf: rope_theta should be a number from 2 to 1e"):
        with_freqs(tmp_path, np.arange(1, 33), {"rope.freq_base": theta})
