"""extend, load and swap: positions, trained parameters, round trips through files, equal values with our
layers."""

import copy
import gc
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="longlora.torch is for torch")
transformers = pytest.importorskip("transformers", reason="transformers is what is extended here")
peft = pytest.importorskip("peft", reason="extend makes a PeftModel")
from devices import device, put  # noqa: E402, F401 (a fixture)
from families import FAMILIES, SMALL, VERSION, close, ids_of, tiny, without_interface  # noqa: E402

import longlora.torch  # noqa: E402
from longlora.evaluation import ppl  # noqa: E402
from longlora.files import merge  # noqa: E402
from longlora.torch.extend import lora_config  # noqa: E402


def tokens():
    return ids_of(2, 24)


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
        (
            lambda: longlora.torch.extend(
                tiny("llama", "sdpa"), 512, lora=peft.LoraConfig(task_type="SEQ_CLS")
            ),
            "CAUSAL_LM, got",
        ),
        (lambda: longlora.torch.swap(swapped(tiny("llama", "sdpa"))), "swapped already"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def swapped(model):
    longlora.torch.swap(model)
    return model


def grads_of(model, **inputs):
    model.zero_grad()
    loss = model(input_ids=tokens(), labels=tokens(), use_cache=False, **inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


ALL = dict(rms_norm=5, swiglu=2, lora_linear=0, rope=2, linear_cross_entropy=1)
EXPECTED = {
    "llama": ALL,
    "mistral": ALL,
    "qwen2": ALL,
    "smollm3": ALL,
    "qwen3": ALL | dict(rms_norm=9),
    "olmo2": ALL | dict(rms_norm=9),  # norms of heads
    "phi3": ALL | dict(swiglu=0),  # gate and up are one linear
    "olmo": ALL | dict(rms_norm=0),
    "stablelm": ALL | dict(rms_norm=0),  # their norms take the mean off
    "starcoder2": ALL | dict(rms_norm=0, swiglu=0),  # so do its norms; its MLP is GELU
    "gpt_neox": ALL | dict(rms_norm=0, swiglu=0),  # so do its norms; its MLP is GELU
    "gemma": ALL | dict(rms_norm=0, swiglu=0),  # its norm is (1 + w), its MLP GeGLU
    "granite": ALL | dict(linear_cross_entropy=0),  # it scales its logits
    # It scales its logits and rotates neighbours.
    "cohere": ALL | dict(rms_norm=0, rope=0, linear_cross_entropy=0),
    "glm": ALL | dict(swiglu=0, rope=0),
    "helium": ALL | dict(rope=0),  # they rotate neighbours
}


@pytest.mark.parametrize("family", FAMILIES)
def test_swapped_layers_give_the_same_values(family):
    without_interface(family)
    changes = dict(logits_scaling=4.0) if family == "granite" else {}
    model = tiny(family, "longlora_s2", **changes).train()
    loss, grads = grads_of(model)
    logits = model.eval()(tokens()).logits
    counts = longlora.torch.swap(model)
    try:
        assert counts == EXPECTED[family]
        assert (model(tokens()).logits - logits).abs().max() <= 1e-4 * logits.abs().max()
        other, again = grads_of(model.train())
        close(other, loss)
        assert set(again) == set(grads)
        for name in grads:
            assert (again[name] - grads[name]).norm() <= 1e-4 * grads[name].norm() + 1e-6, name
    finally:
        longlora.torch.unswap(model)
    other, again = grads_of(model)
    assert torch.equal(other, loss) and all(torch.equal(again[name], grads[name]) for name in grads), (
        "unswap left something"
    )
    assert model(input_ids=tokens(), labels=tokens()).logits is not None


def test_swapped_lora_linears():
    model = moved(
        longlora.torch.extend(tiny("llama", "sdpa", tie_word_embeddings=True), 512, group_size=6)
    ).train()
    loss, grads = grads_of(model)
    counts = longlora.torch.swap(model)
    assert counts["lora_linear"] == 8 and counts["linear_cross_entropy"] == 1
    other, again = grads_of(model)
    close(other, loss)
    assert set(again) == set(grads) and all(
        (again[n] - grads[n]).norm() <= 1e-4 * grads[n].norm() for n in grads
    )
    assert (
        model(input_ids=tokens(), labels=tokens()).logits is None
        and model.eval()(input_ids=tokens()).logits is not None
    )
    with model.disable_adapter():  # PEFT's state decides call by call
        plain = model(tokens()).logits
    longlora.torch.unswap(model)
    with model.disable_adapter():
        close(plain, model(tokens()).logits)


def test_swapped_lora_linears_that_peft_merged():
    """The base's weights hold the adapter then: it may not be added again."""
    model = moved(longlora.torch.extend(tiny("llama", "sdpa"), 512, group_size=6)).eval()
    want = model(tokens()).logits
    with model.disable_adapter():
        assert (model(tokens()).logits - want).abs().max() > 1e-2 * want.abs().max()
    assert longlora.torch.swap(model)["lora_linear"] == 8
    model.merge_adapter()
    merged = model(tokens()).logits
    assert (merged - want).abs().max() <= 1e-4 * want.abs().max()
    model.unmerge_adapter()
    assert (model(tokens()).logits - want).abs().max() <= 1e-4 * want.abs().max()
    longlora.torch.unswap(model)


def test_swapped_loss_counts_as_trainer_does():
    model = tiny("llama", "longlora_s2").train()
    labels = tokens().clone()
    labels[0, :5] = -100
    kwargs = dict(input_ids=tokens(), labels=labels, use_cache=False, num_items_in_batch=torch.tensor(50))
    want = model(**kwargs).loss
    longlora.torch.swap(model)
    close(model(**kwargs).loss, want)
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    close(model(**{**kwargs, "labels": labels, "shift_labels": shifted}).loss, want)
    longlora.torch.unswap(model)


def test_two_swapped_models_of_a_family():
    one, two, three = (tiny("llama", "sdpa") for _ in range(3))
    gc.collect()  # other tests' models
    longlora.torch.unswap(one)
    source = transformers.models.llama.modeling_llama
    theirs = source.apply_rotary_pos_emb
    longlora.torch.swap(one), longlora.torch.swap(two)
    longlora.torch.unswap(one)
    assert source.apply_rotary_pos_emb is not theirs
    longlora.torch.unswap(two)
    assert source.apply_rotary_pos_emb is theirs
    longlora.torch.swap(one)
    exact = tiny(
        "llama", "sdpa"
    ).double()  # the kernels have no float64: others of the family go their own way
    assert exact(tokens()).logits.dtype == torch.float64
    ours = source.apply_rotary_pos_emb
    del one

    def collecting(graph, inputs):
        gc.collect()  # between a model's trace and its guards
        return graph

    torch._dynamo.reset()
    close(torch.compile(three, backend=collecting)(tokens(), use_cache=False).logits, three(tokens()).logits)
    assert source.apply_rotary_pos_emb is ours
    longlora.torch.unswap(three)
    assert source.apply_rotary_pos_emb is theirs, "a swapped model that is gone still decides for its family"


def test_bfloat16_within_its_noise():
    model = tiny("llama", "longlora_s2").bfloat16().train()
    exact = copy.deepcopy(model).float()
    want, exact_grads = grads_of(exact)
    plain_loss, plain = grads_of(model)
    longlora.torch.swap(model)
    loss, grads = grads_of(model)
    longlora.torch.unswap(model)
    assert (loss - want).abs() <= 2 * (plain_loss - want).abs() + 4e-3 * want.abs()
    worst = [
        max((g[n].float() - exact_grads[n]).norm() / exact_grads[n].norm() for n in exact_grads)
        for g in (grads, plain)
    ]
    assert worst[0] <= 2 * worst[1], worst
    assert SMALL["vocab_size"] == model.config.vocab_size
