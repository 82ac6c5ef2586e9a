"""extend and load: positions, trained parameters, round trips through files."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="longlora.torch is for torch")
transformers = pytest.importorskip("transformers", reason="these tests extend models of transformers")
peft = pytest.importorskip("peft", reason="extend makes a PeftModel")
import families  # noqa: E402
from devices import device, put  # noqa: E402, F401 (a fixture)
from families import VERSION, close, ids_of, tiny  # noqa: E402

import longlora.torch  # noqa: E402
from longlora.evaluation import ppl  # noqa: E402
from longlora.files import merge  # noqa: E402
from longlora.torch.extend import lora_config  # noqa: E402
from longlora.torch.positions import set_rope  # noqa: E402


def tokens():
    return ids_of(2, 24)


def with_an_adapter(model):
    """Without PEFT's model around it, as transformers' own integration does."""
    return peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), model)


def moved(model, seed=0):
    """LoRA's B off zero and every trained tensor moved, as after training."""
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same numbers everywhere
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(put(torch.randn(p.shape, generator=generator)) * 0.05)
    return model


@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "phi3", "gpt_neox", "smollm3", "olmo2", "granite", "mistral"]
)
def test_a_family_trains(family):
    model = longlora.torch.extend(tiny(family, "sdpa"), 512, group_size=6)
    assert isinstance(model, peft.PeftModel) and model.config.max_position_embeddings == 512
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("lora_A" in name for name in trained) and any("norm" in name for name in trained)
    assert any("embed" in name for name in trained) and not any("mlp" in name for name in trained)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    for _ in range(2):  # B is zero at first, and so is A's gradient
        optimizer.zero_grad()
        model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert not [name for name in still if name in trained], "some do not train"
    assert len(still) == len(before) - len(trained), "something frozen moved"


# From 128 positions to 300, then to 1024, by pencil: theta with D numbers rotated, and the words of
# transformers. llama3's second factor counts from the 300 that its first one, ceil(300 / 128), reaches.
POSITIONS = {
    "linear": (lambda D: 10000.0, dict(rope_type="linear", factor=8.0)),
    "ntk": (lambda D: 10000.0 * 8 ** (D / (D - 2)), dict(rope_type="default")),
    "yarn": (lambda D: 10000.0, dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=128)),
    "llama3": (
        lambda D: 10000.0,
        dict(
            rope_type="llama3",
            factor=3 * 1024 / 300,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=128,
        ),
    ),
}


@pytest.mark.parametrize("kind", POSITIONS)
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_extended_twice_the_positions_are_those_of_transformers(kind, family):
    """gpt_neox rotates a quarter of each head."""
    dim = 32 if family == "llama" else 8
    model = longlora.torch.extend(tiny(family, "sdpa", hidden_size=128), 300, rope=kind)
    again = longlora.torch.extend(model.merge_and_unload(), 1024, rope=kind).get_base_model()
    theta, scaling = POSITIONS[kind]
    config = transformers.LlamaConfig(
        head_dim=dim, max_position_embeddings=1024, rope_theta=theta(dim), rope_scaling={**scaling}
    )
    wanted = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    rotary = again.model.rotary_emb if family == "llama" else again.gpt_neox.rotary_emb
    assert rotary.inv_freq.shape == (dim // 2,)
    torch.testing.assert_close(rotary.inv_freq.cpu(), wanted.inv_freq, rtol=1e-6, atol=0)
    assert rotary.attention_scaling == pytest.approx(wanted.attention_scaling, rel=1e-6)
    assert again.config.max_position_embeddings == 1024
    if family == "gpt_neox" and VERSION >= (5, 0):
        assert again.config.rope_parameters["partial_rotary_factor"] == 0.25


def test_phi3_is_interpolated_in_the_words_of_its_config(tmp_path):
    """Its config takes no "linear". LongRoPE with equal factors is linear interpolation, and scales cos and
    sin by sqrt(1 + ln(factor) / ln(original length)) (arXiv 2402.13753)."""
    before = tiny("phi3", "sdpa").model.rotary_emb.inv_freq.clone()
    model = longlora.torch.extend(tiny("phi3", "sdpa"), 512)
    rotary = model.get_base_model().model.rotary_emb
    torch.testing.assert_close(rotary.inv_freq, before / 4, rtol=1e-6, atol=0)
    scale = (1 + np.log(4) / np.log(128)) ** 0.5
    assert rotary.attention_scaling == pytest.approx(scale, rel=1e-6)
    if VERSION >= (5, 0):
        assert model.config.rope_parameters["partial_rotary_factor"] == 1
    for kind in ("yarn", "llama3"):
        with pytest.raises(ValueError, match=f"a phi3 config does not take rope type {kind} .*; ntk changes"):
            longlora.torch.extend(tiny("phi3", "sdpa"), 512, rope=kind)
    ntk = longlora.torch.extend(tiny("phi3", "sdpa"), 512, rope="ntk").get_base_model().model.rotary_emb
    theta = 10000.0 * 4 ** (8 / 6)
    torch.testing.assert_close(ntk.inv_freq.cpu(), theta ** -(torch.arange(0, 8, 2) / 8), rtol=1e-5, atol=0)


@pytest.mark.skipif(VERSION < (5, 0), reason="the config is spelled for transformers 5")
def test_what_else_depends_on_the_positions_is_extended_too(tmp_path):
    """DeepSeek scales its scores by the factor of yarn: by (0.1 mscale ln(factor) + 1) squared."""
    rope = dict(rope_type="yarn", rope_theta=10000.0, factor=2.0, mscale=1.0, mscale_all_dim=1.0)
    rope["original_max_position_embeddings"] = 64
    config = transformers.DeepseekV3Config(
        **{**families.SMALL, "num_key_value_heads": 4},
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        rope_parameters=rope,
    )
    torch.manual_seed(0)
    model = put(transformers.AutoModelForCausalLM.from_config(config)).eval()
    set_rope(model, "yarn", 512)
    scores = model.model.layers[1].self_attn.scaling
    assert scores == pytest.approx(16**-0.5 * (0.1 * np.log(8) + 1) ** 2, rel=1e-6)
    model.save_pretrained(tmp_path)
    close(
        put(transformers.AutoModelForCausalLM.from_pretrained(tmp_path))(tokens()).logits,
        model(tokens()).logits,
    )


def test_a_refused_extension_changes_nothing():
    model = tiny("phi3", "sdpa")
    config, rotary = model.config.to_dict(), model.model.rotary_emb
    with pytest.raises(ValueError, match="does not take rope type yarn"):
        set_rope(model, "yarn", 512)
    assert model.config.to_dict() == config and model.model.rotary_emb is rotary


@pytest.mark.parametrize("tied", [False, True])
def test_round_trips_keep_everything(tmp_path, tied):
    tiny("llama", "sdpa", tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    base = put(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    model = moved(longlora.torch.extend(base, 512, group_size=6, boundary="split", shift="all"))
    want, trained = model.eval()(tokens()).logits, model.train()(input_ids=tokens(), labels=tokens()).loss
    model.save_pretrained(tmp_path / "adapter")
    assert (
        json.loads((tmp_path / "adapter" / "longlora_base" / "config.json").read_text())[
            "max_position_embeddings"
        ]
        == 512
    )
    loaded = put(longlora.torch.load(tmp_path / "adapter", tmp_path / "base"))
    close(loaded.eval()(tokens()).logits, want)
    close(loaded.train()(input_ids=tokens(), labels=tokens()).loss, trained)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert any(
        p.requires_grad
        for p in longlora.torch.load(tmp_path / "adapter", tmp_path / "base", is_trainable=True).parameters()
    )
    # the driver reads the same files
    merge.merge(str(tmp_path / "base"), str(tmp_path / "adapter"), str(tmp_path / "driver"))
    model.eval().merge_and_unload().save_pretrained(tmp_path / "merged")
    for name in ("merged", "driver"):
        merged = put(
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, attn_implementation="sdpa")
        )
        assert merged.config.max_position_embeddings == 512
        close(merged(tokens()).logits, want)


def test_the_drivers_adapter_is_loaded(tmp_path):
    import tiny as runs

    base, text = runs.model(tmp_path / "base"), runs.text(tmp_path / "text.txt", 300)
    from longlora.training import driver

    driver.train(lambda line: None, **runs.options(tmp_path, max_steps=2))
    from longlora.files.open_model import open_model

    ids = torch.from_numpy(open_model(str(base)).tokenizer().encode(text.read_text())[:64].astype(np.int64))[
        None
    ]
    loss = longlora.torch.load(tmp_path / "out", base)(input_ids=ids, labels=ids).loss
    ours = ppl.run(str(base), str(text), [64], adapter=str(tmp_path / "out"), max_tokens=64)["results"][0]
    assert ours["tokens"] == 63 and abs(loss.item() - ours["loss"]) < 1e-4 * ours["loss"]


def test_lora_of_ones_own():
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = longlora.torch.extend(tiny("llama", "sdpa"), 512, lora=lora)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("q_proj.lora" in name for name in trained) and len(trained) == 4
    assert lora_config(tiny("llama", "sdpa"), r=3).r == 3


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: longlora.torch.extend(tiny("llama", "sdpa"), 128), "above the 128 tokens"),
        (
            lambda: longlora.torch.extend(tiny("llama", "sdpa"), 512, rope="cubic"),
            "rope type should be one of",
        ),
        (lambda: longlora.torch.extend(tiny("llama", "sdpa"), 512, group_size=-1), "group_size"),
        (lambda: longlora.torch.extend("path/of/a/model", 512), "model should be an Auto.*, got str"),
        (lambda: longlora.torch.extend(tiny("llama", "sdpa"), 512, lora={"r": 8}), "LoraConfig, got dict"),
        (
            lambda: longlora.torch.extend(tiny("llama", "sdpa").model, 512),
            "LlamaModel has no language model head",
        ),
        (
            lambda: longlora.torch.extend(
                peft.get_peft_model(tiny("llama", "sdpa"), peft.LoraConfig(target_modules=["q_proj"])), 512
            ),
            "has an adapter already; give the base model, and its LoRA as lora=",
        ),
        (
            lambda: longlora.torch.extend(longlora.torch.extend(tiny("llama", "sdpa"), 512), 1024),
            "has an adapter already",
        ),
        (
            lambda: longlora.torch.extend(with_an_adapter(tiny("llama", "sdpa")), 512),
            "has an adapter already",
        ),
        (lambda: longlora.torch.load("nowhere", "base"), "nowhere is not the directory of an adapter"),
        (lambda: longlora.torch.extend(tiny("gpt_neox", "sdpa"), 512, rope="ntk"), "a model that rotates 2"),
        (
            lambda: longlora.torch.extend(
                tiny("llama", "sdpa"), 512, lora=peft.LoraConfig(task_type="SEQ_CLS")
            ),
            "CAUSAL_LM, got",
        ),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
