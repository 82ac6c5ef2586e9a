"""swap on models of PEFT: whatever the state of the adapters, a swapped model does what the model does."""

import copy

import pytest

torch = pytest.importorskip("torch", reason="longlora.torch is for torch")
transformers = pytest.importorskip("transformers", reason="these tests swap layers of transformers' models")
peft = pytest.importorskip("peft", reason="PEFT makes the adapters")
from devices import device, put  # noqa: E402, F401 (a fixture)
from families import tiny  # noqa: E402
from swap_checks import agree, disturbed, step, swapped_copy, tokens  # noqa: E402

import longlora.torch  # noqa: E402

TARGETS = ["q_proj", "v_proj", "down_proj"]
PARTS = dict(rms_norm=5, swiglu=2, rope=2, linear_cross_entropy=1)
FORWARD = 6  # LoRA linears of a forward pass


def adapted(kind=peft.LoraConfig, family="llama", **config):
    config = dict(r=4, target_modules=TARGETS, task_type="CAUSAL_LM") | config
    torch.manual_seed(0)
    return disturbed(put(peft.get_peft_model(tiny(family, "sdpa"), kind(**config))))


def twice(model, make):
    """The model and a swapped copy, after make(model) on both."""
    made = swapped_copy(model, **PARTS, lora_linear=FORWARD)
    make(model), make(made)
    return model, made


def add_other(model):
    torch.manual_seed(5)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=TARGETS, task_type="CAUSAL_LM"))
    put(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".other." in name:
                p.add_(0.05)


def use_other(model):
    add_other(model)
    model.set_adapter("other")


def use_both(model):
    add_other(model)
    model.base_model.set_adapter(["default", "other"])


def merge(model):
    model.merge_adapter()


def bring_back(model):
    model.merge_adapter()
    model.unmerge_adapter()


def switch_off(model):
    model.disable_adapter_layers()
    model.get_input_embeddings().weight.requires_grad_()  # a step needs a gradient


def loras(model):
    return [module for module in model.modules() if hasattr(module, "lora_A")]


def scale(model):
    for module in loras(model):
        module.scale_layer(0.25)


def learn_the_scale(model):
    for module in loras(model):
        module.scaling["default"] = torch.tensor(0.3, device=module.weight.device, requires_grad=True)


def only_half_trains(model):
    for name, p in model.named_parameters():
        p.requires_grad_("lora_A" in name or name.endswith("norm.weight"))


@pytest.mark.parametrize(
    "make, ours",
    [
        (lambda model: None, True),
        (use_other, True),
        (bring_back, True),
        (scale, True),
        (only_half_trains, True),
        (use_both, False),
        (switch_off, False),
        (learn_the_scale, False),
    ],
)
def test_the_state_of_adapters_decides_at_each_call(make, ours, calls):
    model, made = twice(adapted(), make)
    agree(model, made, logits=False)
    assert calls["lora_linear"] == (2 * FORWARD if ours else 0)


def test_merged_adapters(calls):
    model, made = twice(adapted(), merge)
    with torch.no_grad():
        want = model.eval()(tokens()).logits
        assert torch.allclose(made.eval()(tokens()).logits, want, rtol=1e-4, atol=1e-5)
    assert calls["lora_linear"] == 0


def test_adapters_come_and_go():
    """One swapped model through the states, and back."""
    model, made = twice(adapted(), add_other)
    for name in ("other", "default"):
        for each in (model, made):
            each.set_adapter(name)
        agree(model, made, logits=False)
    with model.disable_adapter(), made.disable_adapter(), torch.no_grad():
        assert torch.allclose(made(tokens()).logits, model(tokens()).logits, rtol=1e-4, atol=1e-5)
    agree(model, made, logits=False)
    for each in (model, made):
        each.delete_adapter("default")
        each.set_adapter("other")
    agree(model, made, logits=False)
    plain, unloaded = model.merge_and_unload(), made.merge_and_unload()
    with torch.no_grad():
        assert torch.allclose(unloaded(tokens()).logits, plain(tokens()).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "config, ours",
    [
        (dict(use_rslora=True), True),
        (dict(rank_pattern={"v_proj": 7}, alpha_pattern={"q_proj": 3}), True),
        (dict(use_dora=True), False),
        (dict(lora_bias=True), False),
        (dict(lora_dropout=0.3), False),
    ],
)
def test_kinds_of_lora(config, ours, calls):
    model = adapted(**config)
    agree(model, swapped_copy(model, **PARTS, lora_linear=FORWARD), logits=False)
    assert calls["lora_linear"] == (2 * FORWARD if ours else 0)


def test_adalora(calls):
    model = adapted(peft.AdaLoraConfig, r=None, total_step=10)
    agree(model, swapped_copy(model, **PARTS), limit=2e-4)


def test_biases_that_train(calls):
    torch.manual_seed(0)
    base = tiny("qwen2", "sdpa")  # its q, k and v have a bias
    model = disturbed(put(peft.get_peft_model(base, peft.LoraConfig(target_modules=TARGETS, bias="all"))))
    agree(model, swapped_copy(model, **PARTS, lora_linear=FORWARD), logits=False)
    assert calls["lora_linear"] == 2 * FORWARD


class Packed(torch.nn.Linear):
    """A linear that keeps its weight in 8 bits, as those of bitsandbytes and others do."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        scale = linear.weight.abs().amax() / 127
        self.weight = torch.nn.Parameter((linear.weight / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale.detach())

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


class Wrapped(torch.Tensor):
    """A weight of a type of its own, as quantised tensors and those of tensor parallelism are."""


def pack(model, names):
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if name in names and isinstance(child, torch.nn.Linear):
                setattr(parent, name, put(Packed(child)))
    return model


def test_packed_weights(calls):
    base = pack(tiny("llama", "sdpa"), {*TARGETS, "gate_proj", "lm_head"})
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = disturbed(put(peft.get_peft_model(base, config)))
    made = swapped_copy(model, rms_norm=5, swiglu=2, rope=2)
    agree(model, made, logits=True)
    assert calls["lora_linear"] == calls["linear_cross_entropy"] == 0 and calls["swiglu"] == 4


def test_weights_of_another_type(calls):
    model, made = adapted(), adapted()
    for each in (model, made):
        for module in each.modules():
            if isinstance(module, torch.nn.Linear) or "RMSNorm" in type(module).__name__:
                weight = module.weight.detach().as_subclass(Wrapped)
                module.weight = torch.nn.Parameter(weight, requires_grad=False)
        each.get_input_embeddings().weight.requires_grad_()
    longlora.torch.swap(made)
    agree(model, made, logits=True)
    assert calls["lora_linear"] == calls["rms_norm"] == calls["linear_cross_entropy"] == 0


# ---- the head


def test_lora_on_the_head(calls):
    model = adapted(target_modules=[*TARGETS, "lm_head"])
    made = swapped_copy(model, rms_norm=5, swiglu=2, rope=2, lora_linear=FORWARD + 1)
    agree(model, made, logits=True)
    assert step(made.train())[1].keys() >= {
        "base_model.model.lm_head.lora_A.default.weight",
        "base_model.model.lm_head.lora_B.default.weight",
    }
    assert calls["linear_cross_entropy"] == 0


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_that_trains_whole(tied, calls):
    torch.manual_seed(0)
    config = dict(modules_to_save=["lm_head", "norm"], r=4, target_modules=TARGETS, task_type="CAUSAL_LM")
    if tied:
        config |= dict(modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    base = tiny("llama", "sdpa", tie_word_embeddings=tied)
    model = disturbed(put(peft.get_peft_model(base, peft.LoraConfig(**config))))
    made = copy.deepcopy(model)
    assert longlora.torch.swap(made)["linear_cross_entropy"] == 1
    agree(model, made, logits=False)
    assert calls["linear_cross_entropy"] == 1
    for each in (model, made):
        add_other(each)  # has no head of its own: the base's computes
        each.set_adapter("other")
    agree(model, made)
    for each in (model, made):
        each.set_adapter("default")
    agree(model, made, logits=False)


def test_tokens_of_the_head_that_train(calls):
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=TARGETS, trainable_token_indices=[3, 5])
    model = disturbed(put(peft.get_peft_model(tiny("llama", "sdpa", tie_word_embeddings=True), config)))
    made = copy.deepcopy(model)
    longlora.torch.swap(made)
    agree(model, made, logits=True)


def test_the_old_head_behind_a_cast(calls):
    """As prepare_model_for_kbit_training of older PEFT wrapped it."""
    model = adapted()
    inner = model.get_base_model()
    inner.lm_head = torch.nn.Sequential(inner.lm_head, torch.nn.Identity())
    made = swapped_copy(model, rms_norm=5, swiglu=2, rope=2, lora_linear=FORWARD)
    agree(model, made, logits=True)
