"""We read configs as transformers 5 does, with its defaults. We refuse what the decoder does not compute."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longlora.decoder.config import ModelConfig, read_config
from longlora.decoder.families import FAMILIES
from longlora.decoder.rope import Rope
from longlora.errors import UserError

SIZES = dict(
    vocab_size=100,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
RAW = dict(SIZES, model_type="llama", rms_norm_eps=1e-5)


def theirs(family, **fields):
    import transformers

    name = FAMILIES[family].architecture.removesuffix("ForCausalLM")
    if family == "mistral":
        fields.setdefault("sliding_window", None)
    return getattr(transformers, f"{name}Config")(**{**SIZES, "pad_token_id": None, **fields})


def model(config):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_tensors_have_the_names_and_shapes_of_transformers(tmp_path, family, tied, bias):
    row = FAMILIES[family]
    fields = {rule: bias for rule in (row.qkv_bias, row.o_bias) if isinstance(rule, str)}
    config = theirs(family, tie_word_embeddings=tied, head_dim=16, **fields)
    config.save_pretrained(tmp_path)
    ours = read_config(tmp_path)
    wanted = {name: tuple(tensor.shape) for name, tensor in model(config).state_dict().items()}
    if tied:
        del wanted["lm_head.weight"]
    assert ours.tensor_shapes() == wanted
    assert ours.family == family and ours.tie_word_embeddings is tied
    assert (ours.head_dim, ours.num_key_value_heads, ours.rms_norm_eps) == (16, 2, config.rms_norm_eps)
    assert ours.rope == Rope("default", row.theta, 64)


@pytest.mark.parametrize("family", ["phi3", "granite", "smollm3"])  # every size of theirs has a default
@pytest.mark.parametrize("given", [{}, SIZES, dict(num_key_value_heads=None), dict(num_hidden_layers=9)])
def test_a_missing_key_has_the_default_of_transformers(family, given):
    import transformers

    ours = read_config({"model_type": family, **given})
    config = getattr(transformers, f"{FAMILIES[family].architecture.removesuffix('ForCausalLM')}Config")(
        **given
    )
    for name in (
        *SIZES,
        "rms_norm_eps",
        "tie_word_embeddings",
        "bos_token_id",
        "eos_token_id",
        "initializer_range",
        "hidden_size",
    ):
        assert getattr(ours, name) == getattr(config, name), name
    plain = config.hidden_size // config.num_attention_heads
    assert ours.head_dim == (getattr(config, "head_dim", None) or plain)
    assert ours.rope.theta == config.rope_parameters["rope_theta"] and ours.rope.type == "default"
    for name in ("qkv_bias", "o_bias"):
        rule = getattr(FAMILIES[family], name)
        assert getattr(ours, name) is (getattr(config, rule) if isinstance(rule, str) else rule)
    rotated = tuple(map(bool, getattr(config, "no_rope_layers", [1])))
    assert ours.rope_layers == (None if all(rotated) else rotated)
    for name in ("embedding_multiplier", "residual_multiplier", "logits_scaling"):
        assert getattr(ours, name) == getattr(config, name, 1.0)
    assert ours.attention_multiplier == getattr(config, "attention_multiplier", None)


def test_granite_reads_its_multipliers():
    fields = dict(
        embedding_multiplier=12, residual_multiplier=0.22, attention_multiplier=0.015625, logits_scaling=8.0
    )
    granite = read_config({**RAW, "model_type": "granite", **fields})
    assert {name: getattr(granite, name) for name in fields} == fields
    # transformers' Llama does not know these keys, nor does ours
    assert read_config({**RAW, **fields}) == read_config(RAW)
    assert read_config(RAW).attention_multiplier is None


@pytest.mark.parametrize(
    "fields, rotated",
    [
        ({}, (True, True, True, False, True, True)),
        (dict(no_rope_layer_interval=2), (True, False) * 3),
        (dict(no_rope_layer_interval=1), (False,) * 6),
        (dict(no_rope_layer_interval=7), None),
        (dict(no_rope_layers=[0, 1, 1, 0, 1, 1, 0, 0]), (False, True, True, False, True, True)),
        (dict(no_rope_layers=[1] * 6, no_rope_layer_interval=2), None),
    ],
)
def test_smollm3_rotates_the_layers_that_transformers_rotates(fields, rotated):
    config = theirs("smollm3", **{**fields, "num_hidden_layers": 6})
    decided = tuple(bool(layer.self_attn.use_rope) for layer in model(config).model.layers)
    raw = {**RAW, "model_type": "smollm3", "num_hidden_layers": 6, **fields}
    assert read_config(raw).rope_layers == rotated and decided == (rotated or (True,) * 6)
    assert read_config({**raw, "model_type": "llama"}).rope_layers is None


def test_a_config_comes_from_a_folder_a_file_or_a_dict(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(RAW))
    assert (
        read_config(tmp_path)
        == read_config(str(tmp_path))
        == read_config(tmp_path / "config.json")
        == read_config(RAW)
    )
    assert read_config(RAW).raw == RAW


def test_missing_keys_have_defaults():
    few = {key: value for key, value in RAW.items() if key != "num_key_value_heads"}
    config = read_config(few)
    assert config.num_key_value_heads == 4 and config.head_dim == 8 and config.eos_token_id is None
    assert not (config.tie_word_embeddings or config.qkv_bias or config.o_bias or config.qk_norm)
    assert read_config({**RAW, "model_type": "qwen3", "num_key_value_heads": None}).head_dim == 128
    assert (
        read_config({**RAW, "model_type": "qwen2"}).qkv_bias
        and not read_config({**RAW, "model_type": "qwen2"}).o_bias
    )


WINDOWS = [
    ("mistral", dict(sliding_window=None), None),
    ("mistral", dict(sliding_window=16), 16),
    ("mistral", {}, 4096),
    ("mistral", dict(sliding_window=16, layer_types=["full_attention"] * 3), 16),
    ("qwen2", dict(use_sliding_window=False, sliding_window=16), None),
    ("qwen2", dict(sliding_window=16), None),
    ("qwen2", dict(use_sliding_window=True, sliding_window=16, max_window_layers=3), None),
    ("qwen2", dict(use_sliding_window=True, sliding_window=16, max_window_layers=2), 16),
    ("qwen2", dict(use_sliding_window=True, sliding_window=9, max_window_layers=4), None),
    ("qwen2", dict(use_sliding_window=True, sliding_window=9, max_window_layers=None), 9),
    ("qwen2", dict(use_sliding_window=True, sliding_window=0, max_window_layers=0), 0),
    ("qwen2", dict(use_sliding_window=True, num_hidden_layers=28), None),  # max_window_layers is 28
    ("qwen2", dict(use_sliding_window=True, num_hidden_layers=29), 4096),
    ("qwen3", dict(use_sliding_window=True, num_hidden_layers=28), None),
    ("qwen3", dict(use_sliding_window=True, num_hidden_layers=29), 4096),
    ("qwen3", dict(use_sliding_window=True, max_window_layers=0), 4096),
    ("qwen3", dict(use_sliding_window=True, sliding_window=None, max_window_layers=0), None),
    (
        "qwen2",
        dict(
            use_sliding_window=True,
            sliding_window=16,
            max_window_layers=0,
            layer_types=["full_attention"] * 3,
        ),
        None,
    ),
    ("llama", dict(sliding_window=16), None),
    ("phi3", {}, None),
    ("phi3", dict(sliding_window=None), None),
    ("phi3", dict(sliding_window=2047), 2047),
    ("granite", dict(sliding_window=16), None),
    ("smollm3", dict(sliding_window=16), None),
    ("smollm3", dict(use_sliding_window=True), None),
    ("smollm3", dict(use_sliding_window=True, sliding_window=16, no_rope_layers=[1, 1, 0]), 16),
    ("smollm3", dict(use_sliding_window=True, sliding_window=16), None),  # 3 layers: all rotate
    (
        "smollm3",
        dict(
            use_sliding_window=True,
            sliding_window=16,
            no_rope_layers=[1, 0, 1],
            layer_types=["full_attention"] * 3,
        ),
        None,
    ),
]


@pytest.mark.parametrize(
    "family, fields, window", WINDOWS, ids=[f"{case[0]}-{i}" for i, case in enumerate(WINDOWS)]
)
def test_a_sliding_window_is_active_by_the_rules_of_transformers(family, fields, window):
    raw = {**RAW, "model_type": family, **fields}
    if window is None:
        assert read_config(raw).num_hidden_layers == raw["num_hidden_layers"]
    else:
        with pytest.raises(
            UserError,
            match=f"active sliding_window of {window} is not supported; supported is full attention",
        ):
            read_config(raw)


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"model_type": "mixtral"},
            "model_type 'mixtral' is not supported; supported are llama, mistral, qwen2, qwen3, phi3, "
            "granite, smollm3",
        ),
        ({"model_type": None}, "model_type None is not supported"),
        ({"model_type": ["llama"]}, "model_type \\['llama'\\] is not supported"),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            "architectures .* is not supported; supported is LlamaForCausalLM",
        ),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; supported is silu"),
        ({"mlp_bias": True}, "mlp_bias True is not supported"),
        ({"num_local_experts": 8}, "num_local_experts 8 is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config .* is not supported"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0 is not supported"),
        (
            {"layer_types": ["full_attention", "sliding_attention", "x"]},
            "layer_types has sliding_attention, x; supported is full",
        ),
        ({"layer_types": 3}, "layer_types has 3"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"vocab_size": 0}, "vocab_size should be an integer from 1 to 16777216, got 0"),
        ({"num_hidden_layers": -2}, "num_hidden_layers should be an integer from 1 to 4096, got -2"),
        ({"intermediate_size": "48"}, "intermediate_size should be an integer from 1 to .*, got '48'"),
        ({"intermediate_size": 48.0}, "intermediate_size should be an integer"),
        ({"hidden_size": 10**15}, "hidden_size should be an integer from 1 to 1048576"),
        ({"num_attention_heads": True}, "num_attention_heads should be an integer"),
        ({"num_attention_heads": 5}, "num_attention_heads 5 should be a multiple of num_key_value_heads 2"),
        (
            {"hidden_size": 33},
            "hidden_size 33 should be a multiple of num_attention_heads 4, or head_dim given",
        ),
        ({"head_dim": 7}, "head_dim should be even and at least 4, got 7"),
        ({"head_dim": "8"}, "head_dim should be an integer"),
        ({"head_dim": 0}, "head_dim should be an integer from 1"),
        ({"max_position_embeddings": None}, "max_position_embeddings is missing"),
        ({"rms_norm_eps": 0}, "rms_norm_eps should be a number above 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps should be a number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings should be true or false, got 'yes'"),
        ({"attention_bias": 1}, "attention_bias should be true or false, got 1"),
        ({"eos_token_id": -2}, "eos_token_id should be a token id, a list of them or null, got -2"),
        ({"eos_token_id": "</s>"}, "eos_token_id should be a token id"),
    ],
)
def test_a_wrong_config_is_refused(tmp_path, fields, message):
    (tmp_path / "config.json").write_text(json.dumps({**RAW, **fields}))
    with pytest.raises(UserError, match=message) as caught:
        read_config(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "family, fields, message",
    [
        ("granite", {"mlp_bias": True}, "mlp_bias True is not supported"),
        ("smollm3", {"mlp_bias": True}, "mlp_bias True is not supported"),
        ("smollm3", {"layer_types": ["sliding_attention"] * 3}, "layer_types has sliding_attention"),
        (
            "phi3",
            {"partial_rotary_factor": 0.75},
            "partial_rotary_factor 0.75 is not supported; supported is 1",
        ),
        ("phi3", {"architectures": ["PhiForCausalLM"]}, "supported is Phi3ForCausalLM"),
    ],
)
def test_a_family_refuses_what_it_does_not_compute(family, fields, message):
    with pytest.raises(UserError, match=message):
        read_config({**RAW, "model_type": family, **fields})


@pytest.mark.parametrize("kind", ["longrope", "su", "yarn", "linear", "llama3", "dynamic"])
def test_phi3_has_only_the_plain_rope(kind):
    """transformers reads su and yarn of a Phi-3 as longrope, and refuses the others."""
    scaling = {"type": kind, "factor": 2.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    with pytest.raises(UserError, match=f"rope type '{kind}' is not supported; supported is default"):
        read_config({**RAW, "model_type": "phi3", "rope_scaling": scaling})


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_key_value_heads_have_no_default_outside_llama(family):
    raw = {key: value for key, value in RAW.items() if key != "num_key_value_heads"}
    with pytest.raises(UserError, match="num_key_value_heads is missing"):
        read_config({**raw, "model_type": family, "sliding_window": None})


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"\xff\xfe", b'{"a": ' + b"[" * 100000])
def test_a_damaged_file_is_named_in_one_line(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match="config.json: (not JSON|should hold a JSON object)") as caught:
        read_config(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_config_is_named(tmp_path):
    with pytest.raises(UserError, match="config.json: No such file"):
        read_config(tmp_path)


KEYS = [
    *RAW,
    "head_dim",
    "hidden_act",
    "architectures",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "partial_rotary_factor",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    "attention_bias",
    "mlp_bias",
    "eos_token_id",
    "tie_word_embeddings",
    "initializer_range",
    "original_max_position_embeddings",
    "original_rope_theta",
    "num_experts",
    "attention_multiplier",
    "no_rope_layers",
    "no_rope_layer_interval",
]
ROPE_KEYS = [
    "rope_type",
    "type",
    "factor",
    "rope_theta",
    "original_max_position_embeddings",
    "beta_fast",
    "low_freq_factor",
    "high_freq_factor",
    "attention_factor",
    "truncate",
    "mscale",
]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 70)
    | st.integers()
    | st.floats()
    | st.sampled_from(["yarn", "linear", "llama3", ""])
)
VALUES = (
    SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.sampled_from(ROPE_KEYS), SCALARS, max_size=6)
)


@given(st.sampled_from(sorted(FAMILIES)), st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4))
@settings(max_examples=500)
def test_any_config_is_read_or_refused_in_one_line(family, fields):
    from longlora.decoder.rope import inverse_frequencies

    try:
        config = read_config({**RAW, "sliding_window": None, "model_type": family, **fields})
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(config, ModelConfig) and config.tensor_shapes()
        assert all(frequency > 0 for frequency in inverse_frequencies(config.rope, config.head_dim)[0])
