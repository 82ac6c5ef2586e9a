"""Adapters have equal logits in PEFT and here, merged or not. Errors say what is wrong with an adapter."""

import json
import os
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from smollm2 import converted, smollm2  # noqa: F401 (fixtures)
from test_tokenizer import directory, trained
from test_weights import build

from longlora.decoder import rope as rope_
from longlora.decoder.families import FAMILIES
from longlora.decoder.lora import LoraConfig
from longlora.decoder.rope import Rope
from longlora.errors import UserError
from longlora.files import adapter, base_folder, merge
from longlora.files.open_model import open_model
from longlora.tools import inspect

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*ensure_weight_tying:UserWarning")
TARGET = 200


def made(base, lora, seed=0):
    """Random trained tensors of an adapter."""
    rng = np.random.default_rng(seed)
    shapes = lora.tensor_shapes(base.config)
    return {name: (rng.standard_normal(shape) * 0.2).astype(np.float32) for name, shape in shapes.items()}


def extended(base, kind=None):
    kind = kind or ("ntk" if base.config.family == "phi3" else "linear")
    return rope_.to_config(base.config.raw, rope_.extend(base.config, kind, TARGET)[0], TARGET)


def saved(tmp_path, lora=None, kind=None, **fields):
    """Save a tiny base and an adapter for it -> path of the base, path of the adapter, tensors."""
    build(tmp_path / "base", **fields)
    base, lora = open_model(tmp_path / "base"), lora or LoraConfig()
    tensors = made(base, lora)
    adapter.save(tmp_path / "adapter", tensors, lora, base, extended(base, kind))
    return tmp_path / "base", tmp_path / "adapter", tensors


def with_peft(base, path):
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        base, config=AutoConfig.from_pretrained(base_folder.find(path) or base), dtype=torch.float32
    )
    return PeftModel.from_pretrained(model, path).eval()


def logits(model, count=TARGET):
    vocab = model.config.vocab_size
    with torch.no_grad():
        return model(torch.arange(count)[None] * 7 % vocab).logits[0].double().numpy()


def reference(base, path, tensors, lora):
    """The right logits: transformers computes them from weights that are merged by hand."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        base, config=AutoConfig.from_pretrained(base_folder.find(path) or base), dtype=torch.float64
    )
    state = model.state_dict()
    with torch.no_grad():
        for name, array in tensors.items():
            if name in state:
                state[name].copy_(torch.from_numpy(array))
            elif ".lora_A." in name:
                change = tensors[name.replace("lora_A", "lora_B")].astype(np.float64) @ array.astype(
                    np.float64
                )
                state[name.replace(".lora_A", "")].add_(torch.from_numpy(lora.scale * change))
    return logits(model.eval())


@pytest.mark.parametrize(
    "family, lora",
    [
        *((family, LoraConfig()) for family in FAMILIES),
        ("qwen2", LoraConfig(r=3, lora_alpha=7.5, target_modules="all-linear", use_rslora=True)),
        ("phi3", LoraConfig(target_modules="all-linear")),
        ("phi3", LoraConfig(target_modules=("gate_up_proj",), modules_to_save=("norm",))),
        ("llama", LoraConfig(modules_to_save=None)),
        ("qwen3", LoraConfig(target_modules=("q_proj", "down_proj"), modules_to_save=("norm",))),
        ("llama", LoraConfig(modules_to_save=("embed_tokens", "lm_head", "norm"))),
    ],
    ids=[*FAMILIES, "all-linear", "phi3-all-linear", "phi3-gate-up", "lora-only", "norms", "head"],
)
@pytest.mark.parametrize("tied", [False, True])
def test_peft_and_the_merged_model_give_our_logits(tmp_path, family, tied, lora):
    from transformers import AutoModelForCausalLM

    base, path, tensors = saved(tmp_path, lora, family=family, tie_word_embeddings=tied)
    wanted = reference(base, path, tensors, lora)
    near = dict(rtol=0, atol=2e-4 * np.abs(wanted).max())
    np.testing.assert_allclose(logits(with_peft(base, path)), wanted, **near)
    merge.merge(base, path, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    np.testing.assert_allclose(logits(merged), wanted, **near)
    assert merged.config.tie_word_embeddings is tied and merged.config.max_position_embeddings == TARGET
    back, again, raw = adapter.load(path, open_model(base))
    assert (
        back.scale == lora.scale and raw["max_position_embeddings"] == TARGET and set(again) == set(tensors)
    )
    for name, array in tensors.items():
        np.testing.assert_array_equal(again[name], array)


# From 64 positions to TARGET, by hand. Heads have 8 numbers, so NTK raises theta by factor^(8 / 6).
ROPES = {
    "linear": (Rope("linear", 10000.0, 64, 4.0), dict(rope_type="linear", factor=4.0)),
    "ntk": (
        Rope("ntk", 10000.0 * 4 ** (8 / 6), 64, 4.0, original_theta=10000.0),
        dict(rope_type="default", rope_theta=10000.0 * 4 ** (8 / 6)),
    ),
    "yarn": (
        Rope("yarn", 10000.0, 64, 3.125),
        dict(rope_type="yarn", factor=3.125, original_max_position_embeddings=64),
    ),
    "llama3": (
        Rope("llama3", 10000.0, 64, 4.0, low_freq_factor=1.0, high_freq_factor=4.0),
        dict(
            rope_type="llama3",
            factor=4.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
}


@pytest.mark.parametrize("kind", rope_.EXTENSIONS)
def test_an_adapter_and_a_merged_model_keep_the_rope(tmp_path, kind):
    from transformers import AutoConfig

    base, path, tensors = saved(tmp_path, kind=kind)
    merge.merge(base, path, tmp_path / "merged")
    ours, theirs = ROPES[kind]
    assert open_model(tmp_path / "merged").config.rope == ours
    for place in (path / base_folder.FOLDER, tmp_path / "merged"):
        found = AutoConfig.from_pretrained(place).rope_parameters
        assert {key: value for key, value in found.items() if key != "type"} == {
            "rope_theta": 10000.0,
            **theirs,
        }


# PEFT takes the names of a family's own linears.
PEFT_TARGETS = {"phi3": ["qkv_proj", "o_proj"]}


@pytest.mark.parametrize(
    "family, lora",
    [
        *((family, {}) for family in FAMILIES),
        *(
            ("qwen3", fields)
            for fields in (
                dict(r=3, target_modules="all-linear", modules_to_save=["lm_head"]),
                dict(target_modules=["v_proj"], modules_to_save=["norm"]),
                dict(
                    target_modules=["up_proj", "o_proj"],
                    modules_to_save=["model.norm", "k_norm", "post_attention_layernorm"],
                ),
            )
        ),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_trains_the_tensors_that_peft_trains(tmp_path, family, lora, tied):
    from peft import LoraConfig as Theirs
    from peft import get_peft_model

    model = build(tmp_path, family, tie_word_embeddings=tied)
    ours = LoraConfig(**lora)
    # PEFT takes a tied head under the embedding's name.
    whole = ["embed_tokens" if tied and name == "lm_head" else name for name in ours.modules_to_save]
    how = dict(
        target_modules=lora.get("target_modules", PEFT_TARGETS.get(family, list(ours.target_modules))),
        modules_to_save=whole,
        ensure_weight_tying=tied and "embed_tokens" in whole,
    )
    wanted = {
        name.removeprefix(adapter.PREFIX)
        .replace(".modules_to_save.default", "")
        .replace(".default", ""): tuple(p.shape)
        for name, p in get_peft_model(
            model, Theirs(task_type="CAUSAL_LM", r=ours.r, **how)
        ).named_parameters()
        if p.requires_grad
    }
    assert ours.tensor_shapes(open_model(tmp_path).config) == wanted


def test_an_adapter_has_the_files_and_fields_of_peft(tmp_path):
    base, path, _ = saved(tmp_path, LoraConfig(r=4, lora_alpha=7.5))
    assert sorted(os.listdir(path)) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "longlora_base",
    ]
    text = (path / "adapter_config.json").read_text()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"
    found = json.loads(text)
    assert (found["r"], found["lora_alpha"], found["use_rslora"]) == (4, 7.5, False)
    assert found["peft_type"] == "LORA" and found["base_model_name_or_path"] == str(path / "longlora_base")
    assert found["needs_the_positions_in_its_folder_longlora_base"] == str(base)
    assert found["modules_to_save"] == ["embed_tokens", "input_layernorm", "post_attention_layernorm", "norm"]
    assert (path / "README.md").read_text().startswith("---\nlibrary_name: peft\npipeline_tag: ")


def test_peft_warns_of_nothing_but_the_positions(tmp_path):
    for tied in (False, True):
        base, path, _ = saved(tmp_path / str(tied), tie_word_embeddings=tied)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            with_peft(base, path)
        said = {str(warning.message) for warning in seen if warning.category is not FutureWarning}
        assert len(said) == 1 and f"Unexpected keyword arguments ['{base_folder.KEY}']" in said.pop()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        dict(r=4, lora_alpha=7),
        dict(r=2, use_rslora=True, target_modules="all-linear"),
        dict(target_modules=["v_proj"], modules_to_save=None),
    ],
    ids=["a", "b", "c"],
)
def test_an_adapter_of_peft_is_read(tmp_path, tied, fields):
    from peft import LoraConfig as Theirs
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    model = build(tmp_path / "base", tie_word_embeddings=tied)
    fields = {
        "target_modules": ["q_proj", "o_proj"],
        "modules_to_save": ["embed_tokens", "input_layernorm", "norm"],
        **fields,
    }
    theirs = get_peft_model(model, Theirs(task_type="CAUSAL_LM", ensure_weight_tying=tied, **fields))
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    theirs.save_pretrained(tmp_path / "adapter")
    wanted = logits(theirs.eval(), 60)
    merge.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    np.testing.assert_allclose(logits(merged, 60), wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


def test_an_untied_adapter_of_a_tied_base_is_refused(tmp_path):
    """Without ensure_weight_tying PEFT trains the embedding and keeps the old head, so they differ."""
    from peft import LoraConfig as Theirs
    from peft import get_peft_model

    theirs = get_peft_model(
        build(tmp_path / "base", tie_word_embeddings=True),
        Theirs(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    )
    theirs.save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        UserError, match="ties its head to the embedding, but this adapter was trained without"
    ):
        adapter.load(tmp_path / "adapter", open_model(tmp_path / "base"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_merged_weights_are_rounded_once_to_the_dtype_of_the_base(tmp_path, dtype):
    base, path, tensors = saved(tmp_path, dtype=getattr(torch, dtype))
    merge.merge(base, path, tmp_path / "merged")
    before, after = open_model(base), open_model(tmp_path / "merged")
    assert (tmp_path / "merged").stat().st_mode & 0o777 == 0o755  # mkdtemp makes 0o700
    assert after.config.raw["torch_dtype"] == dtype and before.names() == after.names()
    name = "model.layers.1.self_attn.v_proj.weight"
    a, b = (tensors[name.replace("weight", f"lora_{side}.weight")] for side in "AB")
    exact = before.read(name) + 2 * (b @ a)
    assert after.dtype(name) == dtype
    np.testing.assert_array_equal(
        after.read(name), torch.from_numpy(exact).to(getattr(torch, dtype)).float().numpy()
    )
    name = "model.layers.0.mlp.up_proj.weight"
    np.testing.assert_array_equal(after.read(name), before.read(name))


def test_a_merged_model_may_have_shards(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(merge, "SHARD", 3000)
    base, path, tensors = saved(tmp_path)
    (base / "generation_config.json").write_text('{"do_sample": true}')
    merge.merge(base, path, tmp_path / "merged")
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    np.testing.assert_allclose(logits(merged), reference(base, path, tensors, LoraConfig()), atol=1e-3)
    assert (tmp_path / "merged" / "generation_config.json").exists()
    monkeypatch.undo()
    merge.save_merged(tmp_path / "merged", open_model(base).read, open_model(base).config.raw)
    again = open_model(tmp_path / "merged")
    np.testing.assert_array_equal(again.read("lm_head.weight"), open_model(base).read("lm_head.weight"))


def test_the_tokenizer_goes_into_adapter_and_merged_model(tmp_path):
    from transformers import AutoTokenizer

    build(tmp_path / "base", vocab_size=512)
    directory(
        tmp_path / "base", trained("gpt2"), tokenizer_class="PreTrainedTokenizerFast", eos_token="<|im_end|>"
    )
    build(tmp_path / "base", vocab_size=512)
    base = open_model(tmp_path / "base")
    adapter.save(
        tmp_path / "adapter", made(base, LoraConfig()), LoraConfig(), base, extended(base), base.tokenizer()
    )
    merge.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    for path in ("adapter", "merged"):
        assert (
            AutoTokenizer.from_pretrained(tmp_path / path)("a b").input_ids
            == base.tokenizer().encode("a b").tolist()
        )


def test_a_merge_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    base, path, _ = saved(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    with pytest.raises(UserError, match="there: exists and is not an empty directory"):
        merge.merge(base, path, tmp_path / "there")
    assert os.listdir(tmp_path / "there") == ["file"]

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merge, "write_json", full)
    with pytest.raises(UserError, match="new: cannot be written: No space left on device"):
        merge.merge(base, path, tmp_path / "new")
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base", "there"]


def test_an_adapter_for_another_base_is_refused(tmp_path):
    base, path, _ = saved(tmp_path)
    other = build(tmp_path / "other")
    with torch.no_grad():
        other.model.norm.weight += 1
    other.save_pretrained(tmp_path / "other")
    build(tmp_path / "bigger", hidden_size=32)
    for name in ("other", "bigger"):
        with pytest.raises(UserError, match=f"is an adapter for a base model other than .*{name}"):
            adapter.load(path, open_model(tmp_path / name))


def edit(path, change):
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    file = path / "adapter_model.safetensors"
    with safe_open(file, "np") as found:
        metadata = found.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata)


FIRST = "base_model.model.model.layers.0.self_attn.q_proj."


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda t: t.pop(FIRST + "lora_A.weight"),
            "1 tensors of the adapter are missing: model.layers.0.self_attn.q_proj.lora_A",
        ),
        (
            lambda t: t.pop("base_model.model.model.norm.weight"),
            "1 tensors of the adapter are missing: model.norm.weight",
        ),
        (
            lambda t: t.update({FIRST + "lora_magnitude_vector": np.ones(3, np.float32)}),
            "1 tensors do not belong to this adapter: .*",
        ),
        (
            lambda t: t.update({FIRST + "lora_A.weight": np.ones((8, 15), np.float32)}),
            "should have shape \\[8, 16\\], got",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.ones(16, np.float32)}),
            "1 tensors lack PEFT's prefix 'base_model.model.'",
        ),
        (lambda t: t[FIRST + "lora_B.weight"].__setitem__((0, 0), np.nan), "lora_B.weight is not finite"),
        (lambda t: t.clear(), "tensors of the adapter are missing"),
    ],
)
def test_wrong_tensors_of_an_adapter_are_named(tmp_path, change, message):
    base, path, _ = saved(tmp_path)
    edit(path, change)
    with pytest.raises(UserError, match=message) as caught:
        adapter.load(path, open_model(base))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=message):
        adapter.load(path)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported; supported is LORA"),
        ({"use_dora": True}, "use_dora True is not supported"),
        ({"bias": "all"}, "bias 'all' is not supported"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern .* is not supported"),
        ({"use_rslora": "yes"}, "use_rslora should be true or false, got 'yes'"),
        ({"r": 0}, "r should be an integer above 0, got 0"),
        ({"r": "8"}, "r should be an integer above 0, got '8'"),
        ({"lora_alpha": -1}, "lora_alpha should be a number above 0"),
        ({"target_modules": "q_.*"}, "target_modules should be a list of q_proj"),
        ({"target_modules": ["c_attn"]}, "target_modules should be a list of q_proj"),
        ({"target_modules": 3}, "target_modules should be"),
        (
            {"target_modules": ["qkv_proj"]},
            "adapter_config.json: target_modules: a llama model has no qkv_proj; it has",
        ),
        ({"modules_to_save": ["score"]}, "modules_to_save should be a list of embed_tokens"),
    ],
)
def test_wrong_fields_of_an_adapter_config_are_named(tmp_path, fields, message):
    base, path, _ = saved(tmp_path)
    file = path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    with pytest.raises(UserError, match=message):
        adapter.load(path, open_model(base))


@given(
    st.dictionaries(
        st.sampled_from(
            [
                *adapter.FREE,
                "use_dora",
                "layers_to_transform",
                "rank_pattern",
                "init_lora_weights",
                "r",
                "lora_alpha",
                "target_modules",
                "modules_to_save",
                "use_rslora",
                "peft_type",
            ]
        ),
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.lists(st.integers() | st.text(), max_size=2)
        | st.just("LORA")
        | st.dictionaries(st.text(), st.integers(), max_size=1),
        max_size=3,
    )
)
@settings(max_examples=200)
def test_any_adapter_config_is_read_or_refused_in_one_line(tmp_path_factory, fields):
    path = tmp_path_factory.getbasetemp() / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": "LORA", "target_modules": ["q_proj"], **fields}))
    try:
        assert adapter.read_lora(path.parent).scale > 0
    except UserError as error:
        assert "\n" not in str(error)


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not an adapter: it has no adapter_config.json"):
        adapter.load(tmp_path)
    _, path, _ = saved(tmp_path)
    (path / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="adapter_model.safetensors: No such file"):
        adapter.load(path)


def test_the_newest_checkpoint_of_a_stopped_run_is_named(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-11.old", "checkpoint-x"):
        (tmp_path / name).mkdir()
    for read in (adapter.load, inspect.describe):
        with pytest.raises(UserError) as error:
            read(tmp_path)
        newest = f"; a run was stopped here, its newest checkpoint is {tmp_path}/checkpoint-10"
        assert str(error.value).endswith(newest)


def test_qwen3_norm_means_all_norms_as_in_peft(tmp_path):
    build(tmp_path / "base", "qwen3")
    shapes = LoraConfig().tensor_shapes(open_model(tmp_path / "base").config)
    assert "model.layers.0.self_attn.q_norm.weight" in shapes


def test_inspect_describes_a_base_and_an_adapter(tmp_path):
    base, path, tensors = saved(tmp_path, tie_word_embeddings=True)
    found = inspect.describe(base)
    assert (found["kind"], found["format"], found["rope"]) == ("model", "huggingface", "default, theta 10000")
    assert found["parameters"] == sum(
        p.numel() for p in build(tmp_path / "again", tie_word_embeddings=True).parameters()
    )
    found = inspect.describe(path)
    assert found["kind"] == "adapter" and found["base"] == str(base)
    assert found["rope"] == "linear, theta 10000, factor 4, pretrained at 64" and found["positions"] == TARGET
    assert sum(found["trained"].values()) == sum(array.size for array in tensors.values())
    assert "modules to save" in inspect.text(found)
    json.dumps(found)
    with pytest.raises(UserError, match="is neither a model .* nor an adapter"):
        inspect.describe(tmp_path)


@pytest.mark.parametrize("family", ["phi3", "granite", "smollm3"])
def test_inspect_describes_other_families(tmp_path, family):
    base, path, tensors = saved(tmp_path, family=family, tie_word_embeddings=True)
    model, found = build(tmp_path / "again", family, tie_word_embeddings=True), inspect.describe(base)
    assert (found["kind"], found["family"]) == ("model", family)
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    found = inspect.describe(path)
    attention = ["qkv_proj", "o_proj"] if family == "phi3" else ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert (found["kind"], found["family"], found["target_modules"]) == ("adapter", family, attention)
    assert sum(found["trained"].values()) == sum(array.size for array in tensors.values())


def test_an_adapter_may_name_parts_of_a_fused_linear(tmp_path):
    """PEFT writes such adapters for target_modules of several families. It adapts those that exist."""
    base, path, tensors = saved(tmp_path, family="phi3")
    file = path / "adapter_config.json"
    assert json.loads(file.read_text())["target_modules"] == ["qkv_proj", "o_proj"]
    names = ["q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"]
    file.write_text(json.dumps({**json.loads(file.read_text()), "target_modules": names}))
    lora, found, _ = adapter.load(path, open_model(base))
    assert lora.target_modules == ("qkv_proj", "o_proj") and found.keys() == tensors.keys()


def test_smollm2_is_merged_from_a_gguf(smollm2, converted, tmp_path):  # noqa: F811
    """The base is quantised, permuted and tied. Our merged model equals PEFT on transformers' own."""
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    base, lora = open_model(smollm2), LoraConfig(modules_to_save=("input_layernorm", "norm"))
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in lora.tensor_shapes(base.config).items():
        noise = rng.standard_normal(shape, np.float32) * np.float32(0.01)
        tensors[name] = noise if ".lora_" in name else base.read(name) + noise
    raw = rope_.to_config(base.config.raw, rope_.extend(base.config, "linear", 16384)[0], 16384)
    adapter.save(tmp_path / "adapter", tensors, lora, base, raw, base.tokenizer())
    merge.merge(smollm2, tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    config = AutoConfig.from_pretrained(tmp_path / "adapter" / base_folder.FOLDER)
    theirs = AutoModelForCausalLM.from_pretrained(converted, config=config, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    assert config.rope_parameters["factor"] == 2 and merged.config.rope_parameters["factor"] == 2
    one, two = logits(theirs, 30), logits(merged, 30)
    np.testing.assert_allclose(two, one, rtol=0, atol=1e-4 * np.abs(one).max())
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "merged")("a b").input_ids
        == base.tokenizer().encode("a b").tolist()
    )
