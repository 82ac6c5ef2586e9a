"""swap: equal values with our layers, whatever is asked of a model; copies, hooks, dtypes and compilers."""

import copy
import gc
import inspect
import pickle

import pytest

torch = pytest.importorskip("torch", reason="longlora.torch is for torch")
transformers = pytest.importorskip("transformers", reason="these tests swap layers of transformers' models")
peft = pytest.importorskip("peft", reason="extend makes a PeftModel")
from devices import device, put  # noqa: E402, F401 (a fixture)
from families import FAMILIES, SMALL, VERSION, close, tiny, without_interface  # noqa: E402
from swap_checks import agree, disturbed, near, own_rotary, same_output, step, swapped_copy, tokens  # noqa: E402

import longlora.torch  # noqa: E402

PARTS = dict(rms_norm=5, swiglu=2, rope=2, linear_cross_entropy=1)


def moved(model, seed=0):
    """LoRA's B off zero and every trained tensor moved, as after training."""
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same numbers everywhere
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(put(torch.randn(p.shape, generator=generator)) * 0.05)
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
    own_rotary()
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
    own_rotary()
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
    # The root of the mean over all numbers of all gradients: thousands of roundings, not the worst of a few.
    errors = [
        sum(((g[n].float() - exact_grads[n]).norm() / exact_grads[n].norm()) ** 2 for n in exact_grads) ** 0.5
        for g in (grads, plain)
    ]
    assert errors[0] <= 1.5 * errors[1], errors
    assert SMALL["vocab_size"] == model.config.vocab_size


def test_swap_twice_is_an_error():
    model = tiny("llama", "sdpa")
    longlora.torch.swap(model)
    with pytest.raises(ValueError, match="swapped already"):
        longlora.torch.swap(model)
    longlora.torch.swap(longlora.torch.unswap(model))


def test_swap_draws_no_random_numbers():
    torch.manual_seed(3)
    want = torch.randn(4)
    torch.manual_seed(3)
    longlora.torch.swap(tiny_after_seed("llama", 3))
    assert torch.equal(torch.randn(4), want)


def tiny_after_seed(family, seed):
    model = tiny(family, "sdpa")
    torch.manual_seed(seed)
    return model


# ---- what a call asks for

EXPERTS = {
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "qwen3_moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8),
    "olmoe": dict(num_experts=4, num_experts_per_tok=2, num_key_value_heads=4),
}


@pytest.mark.parametrize("family", EXPERTS)
def test_the_loss_of_the_router_is_kept(family, calls):
    changes = EXPERTS[family] | dict(output_router_logits=True, router_aux_loss_coef=0.5)
    model = disturbed(tiny(family, "eager", **changes))
    made = copy.deepcopy(model)
    longlora.torch.swap(made)
    theirs, ours = step(model.train())[0], step(made.train())[0]
    assert ours.aux_loss is not None and ours.router_logits is not None
    with torch.no_grad():  # the loss has two parts
        without = model(input_ids=tokens(), labels=tokens(), output_router_logits=False).loss
    assert (theirs.loss - without).abs() > 0.1 * without.abs()
    agree(model, made, logits=False if VERSION >= (5, 0) or family != "olmoe" else None)


@pytest.mark.parametrize(
    "asked, logits",
    [
        (dict(output_hidden_states=True), False),
        (dict(output_attentions=True), False),
        (dict(output_hidden_states=True, output_attentions=True, return_dict=True), False),
        (dict(return_dict=None), False),
        (dict(return_dict=False), True),
        (dict(num_items_in_batch=50), False),
        (dict(ignore_index=7), False),
        (dict(logits_to_keep=0), False),
        (dict(use_cache=True), False),
        (dict(attention_mask=torch.tensor([[0] * 5 + [1] * 19, [1] * 24])), False),
    ],
)
def test_what_is_asked_for_is_given(asked, logits, calls):
    model = disturbed(tiny("llama", "eager"))
    made = swapped_copy(model, **PARTS)
    asked = {name: put(x) if isinstance(x, torch.Tensor) else x for name, x in asked.items()}
    theirs, ours = step(model.train(), **asked)[0], step(made.train(), **asked)[0]
    if logits:
        near(ours, theirs, 1e-4)
    else:
        cache = ("past_key_values", "cache")
        assert set(theirs) - set(ours) == {"logits"} and calls["linear_cross_entropy"] == 1
        for name in set(ours) - set(cache):
            near(ours[name], theirs[name], 1e-4, name)
        for name in cache:
            assert (name in ours) == (name in theirs)


def test_positional_arguments():
    model = disturbed(tiny("llama", "eager")).train()
    made = swapped_copy(model, **PARTS)
    names = list(inspect.signature(model.forward).parameters)
    assert names == list(inspect.signature(made.forward).parameters)
    names = names[: names.index("labels") + 1]
    given = [tokens() if name in ("input_ids", "labels") else None for name in names]
    close(made(*given).loss, model(*given).loss)
    assert made(*given).logits is None


def test_logits_on_request(calls):
    model = disturbed(tiny("llama", "sdpa"))
    made = swapped_copy(model, **PARTS)
    inputs = dict(input_ids=tokens(), labels=tokens(), use_cache=False)
    same_output(made.train()(**inputs, skip_logits=False), model.train()(**inputs), logits=True)
    assert calls["linear_cross_entropy"] == 0
    with torch.no_grad():
        same_output(made.eval()(**inputs, skip_logits=True), model.eval()(**inputs), logits=False)
    assert calls["linear_cross_entropy"] == 1


def fewer_logits(model):
    return model(input_ids=tokens(), labels=tokens(), logits_to_keep=3)


def fewer_labels(model):
    return model(input_ids=tokens(), labels=tokens()[:, :-1])


def other_vocabulary(model):
    model.config.vocab_size = model.vocab_size = 60
    return model(input_ids=tokens() % 60, labels=tokens() % 60)


def id_out_of_range(model):
    return model(input_ids=tokens(), labels=tokens() + 50)


@pytest.mark.parametrize("call", [fewer_logits, fewer_labels, other_vocabulary, id_out_of_range])
def test_errors_stay_errors(call, device):  # noqa: F811
    if device == "cuda" and call is id_out_of_range:
        pytest.skip("torch ends the process")
    model = tiny("llama", "sdpa").train()
    made = swapped_copy(model, **PARTS)
    for each in (model, made):
        with pytest.raises((ValueError, IndexError, RuntimeError)):
            call(each)
    assert not [module for module in made.modules() if "longlora_loss" in module.__dict__]


def test_a_loss_of_ones_own(calls):
    def mine(logits, labels, vocab_size, **kwargs):
        return logits.square().mean()

    model = disturbed(tiny("llama", "sdpa"))
    made = swapped_copy(model, **PARTS)
    model.loss_function = made.loss_function = mine
    agree(model, made, logits=True)
    assert calls["linear_cross_entropy"] == 0


def test_nothing_counts():
    """No target counts: transformers' mean of nothing is NaN, and its gradient too, or zero."""
    labels = torch.full_like(tokens(), -100)
    model = disturbed(tiny("llama", "sdpa")).train()
    made = swapped_copy(model, **PARTS)
    for each in (model, made):
        assert step(each, labels=labels)[0].loss.isnan()
    zero = [step(each, labels=labels, num_items_in_batch=5)[0].loss for each in (model, made)]
    assert zero[0] == zero[1] == 0


def test_a_head_with_a_bias(calls):
    model = tiny("llama", "sdpa")
    model.lm_head = put(torch.nn.Linear(32, SMALL["vocab_size"]))
    torch.nn.init.zeros_(model.lm_head.bias)  # as of a new head
    agree(model, swapped_copy(model, **(PARTS | dict(linear_cross_entropy=0))), logits=True)
    model, made = tiny("llama", "sdpa"), tiny("llama", "sdpa")
    longlora.torch.swap(made)
    for each in (model, made):
        each.lm_head.bias = torch.nn.Parameter(each.lm_head.weight.detach()[:, 0].clone())
    agree(model, made, logits=True)
    assert calls["linear_cross_entropy"] == 0


# ---- copies


def halved(model):
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    return model


def averaged(model):
    return torch.optim.swa_utils.AveragedModel(model).module


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("make", [copy.deepcopy, averaged, pickled])
def test_copies_compute_with_their_own_weights(make, calls):
    model = disturbed(longlora.torch.extend(tiny("llama", "sdpa"), 512, group_size=6))
    longlora.torch.swap(model)
    made = halved(make(model))
    plain = longlora.torch.unswap(halved(copy.deepcopy(longlora.torch.unswap(model))))
    ran = dict(calls)
    agree(plain, made, logits=False)
    assert all(calls[name] > ran[name] for name in calls if name != "rope")  # its model is not swapped now
    assert {type(a) for a in longlora.torch.unswap(made).modules()} == {type(b) for b in plain.modules()}


def test_replicas_compute_with_their_own_weights():
    """As DataParallel makes them."""
    model = disturbed(tiny("llama", "sdpa"))
    longlora.torch.swap(model)
    norm = model.model.norm
    replica = norm._replicate_for_data_parallel()
    replica.weight = norm.weight.detach() * 2
    x = put(torch.randn(3, 32, generator=torch.Generator().manual_seed(0)))
    close(replica(x), 2 * norm(x))


def test_files_of_a_swapped_model(tmp_path):
    model = disturbed(tiny("llama", "sdpa"))
    names = [name for name, _ in model.named_modules()], list(model.state_dict())
    longlora.torch.swap(model)
    assert ([name for name, _ in model.named_modules()], list(model.state_dict())) == names
    assert type(model).__name__ == "LlamaForCausalLM" and repr(model).startswith("LlamaForCausalLM(")
    model.save_pretrained(tmp_path)
    loaded = put(transformers.AutoModelForCausalLM.from_pretrained(tmp_path))
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    with torch.no_grad():
        close(loaded.eval()(tokens()).logits, longlora.torch.unswap(model).eval()(tokens()).logits)


# ---- hooks and wrappers


def watched(model, names):
    """What hooks on the modules of these names see -> a list of shapes."""
    seen = []
    for name, module in model.named_modules():
        if name.endswith(names):
            module.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    return seen


@pytest.mark.parametrize(
    "name", ["lm_head", "base_layer", "lora_A.default", "lora_B.default", "act_fn", "norm"]
)
def test_hooks_see_what_they_saw(name):
    lora = dict(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = disturbed(put(peft.get_peft_model(tiny("llama", "sdpa"), peft.LoraConfig(**lora))))
    made = swapped_copy(model, **PARTS, lora_linear=4)
    seen = [watched(each, name) for each in (model, made)]
    agree(model, made, logits=None)
    assert seen[0] == seen[1] and seen[0]


def test_hooks_of_all_modules_see_what_they_saw():
    model = disturbed(tiny("llama", "sdpa")).train()
    made = swapped_copy(model, **PARTS)
    seen = []
    for each in (model, made):
        names = []
        handle = torch.nn.modules.module.register_module_forward_hook(
            lambda module, inputs, output, names=names: names.append(type(module).__name__)
        )
        try:
            step(each)
        finally:
            handle.remove()
        seen.append(names)
    assert seen[0] == seen[1]


def test_a_forward_of_ones_own_stays():
    model, made = tiny("llama", "sdpa"), tiny("llama", "sdpa")
    for each in (model, made):
        for layer in each.model.layers:
            norm = layer.input_layernorm
            norm.forward = lambda x, norm=norm: 2 * type(norm).forward(norm, x)
    counts = longlora.torch.swap(made)
    assert counts == dict(PARTS, rms_norm=3, lora_linear=0)
    agree(model, made, logits=False)


def test_accelerates_wrapper_outlives_the_swap():
    pytest.importorskip("accelerate", reason="accelerate wraps forward")
    from accelerate.utils import convert_outputs_to_fp32

    own_rotary()
    model = disturbed(tiny("llama", "sdpa")).train()
    want = step(model)[0]
    longlora.torch.swap(model)
    model.forward = convert_outputs_to_fp32(model.forward)  # as Accelerator.prepare
    assert step(model)[0].logits is None
    longlora.torch.unswap(model)
    same_output(step(model)[0], want, 0)


# ---- dtypes

LOW = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("weight", [torch.float32, *LOW])
@pytest.mark.parametrize("x", [torch.float32, *LOW, torch.float64])
@pytest.mark.parametrize("family", ["llama", "olmo2", "helium"])
def test_norms_of_mixed_dtypes(family, x, weight):
    norm = disturbed(tiny(family, "sdpa")).model.norm.to(weight)
    made = copy.deepcopy(norm)
    rows = put(torch.randn(5, 32, generator=torch.Generator().manual_seed(0))).to(x)
    holder = torch.nn.ModuleList([made])
    assert longlora.torch.swap(holder)["rms_norm"] == 1
    for autocast in (False, True):
        with torch.autocast(rows.device.type, torch.bfloat16, enabled=autocast):
            near(made(rows), norm(rows), 2e-2 if {x, weight} & set(LOW) else 1e-6)


@pytest.mark.parametrize("low", LOW)
def test_autocast(low, calls):
    """Within the noise of the low dtype, and in the dtypes that transformers has."""
    model = disturbed(longlora.torch.extend(tiny("qwen3", "sdpa"), 512, group_size=6)).train()
    made = copy.deepcopy(model)
    longlora.torch.swap(made)
    exact = step(model)[0].loss.item()
    with torch.autocast(tokens().device.type, low):
        theirs, ours = step(model), step(made)
    assert ours[0].loss.dtype == theirs[0].loss.dtype == torch.float32
    noise = 4 * abs(theirs[0].loss.item() - exact) + 1e-3 * exact
    assert abs(ours[0].loss.item() - exact) <= noise
    assert {n: g.dtype for n, g in ours[1].items()} == {n: g.dtype for n, g in theirs[1].items()}
    assert min(calls[name] for name in calls) > 0


def test_half_precision_keeps_float32_adapters():
    """LoRA's B after a few steps is smaller than what float16 can say."""
    lora = dict(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = put(peft.get_peft_model(tiny("llama", "sdpa").half(), peft.LoraConfig(**lora)))
    linear = model.base_model.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        linear.base_layer.weight.zero_()
        linear.lora_A["default"].weight.fill_(1)
        linear.lora_B["default"].weight.fill_(1e-8)
    made = copy.deepcopy(linear)
    longlora.torch.swap(torch.nn.ModuleList([made]))
    x = put(torch.full((2, 32), 1000.0).half())
    assert linear(x).abs().min() > 0
    close(made(x).float(), linear(x).float())


def test_rope_in_the_dtypes_of_cos(calls):
    source = transformers.models.llama.modeling_llama
    generator = torch.Generator().manual_seed(0)
    q, k = (put(torch.randn(2, heads, 5, 8, generator=generator)) for heads in (4, 2))
    cos, sin = (put(torch.randn(2, 5, 4, generator=generator).repeat(1, 1, 2)) for _ in range(2))
    own_rotary()
    theirs, model = source.apply_rotary_pos_emb, tiny("llama", "sdpa")
    longlora.torch.swap(model)
    for a, b in ((torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16,) * 2):
        inputs = q.to(a), k.to(a), cos.to(b), sin.to(b)
        near(source.apply_rotary_pos_emb(*inputs), theirs(*inputs), 2e-2 if b == torch.bfloat16 else 1e-6)
    assert calls["rope"] == 6
    longlora.torch.unswap(model)


def test_angles_that_learn():
    """Our kernel has no gradient for cos and sin."""
    source = transformers.models.llama.modeling_llama
    model = tiny("llama", "sdpa")
    longlora.torch.swap(model)
    q = put(torch.ones(1, 2, 3, 4))
    cos = put(torch.ones(1, 3, 4)).requires_grad_()
    source.apply_rotary_pos_emb(q, q, cos, cos)[0].sum().backward()
    assert cos.grad.abs().sum() > 0
    longlora.torch.unswap(model)


# ---- compilers, checkpoints, transforms


@pytest.mark.parametrize("extended", [False, True])
def test_compiled_whole(extended, calls):
    model = tiny("llama", "sdpa")
    if extended:
        model = longlora.torch.extend(model, 512, group_size=6)
    model = disturbed(model).train()
    made = copy.deepcopy(model)
    longlora.torch.swap(made)
    torch._dynamo.reset()
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    agree_in_training(model, compiled)
    assert min(calls[name] for name in calls if extended or name != "lora_linear") > 0


def agree_in_training(model, made):
    theirs, want = step(model)
    ours, found = step(made)
    same_output(ours, theirs, logits=False)
    found = {name.removeprefix("_orig_mod."): grad for name, grad in found.items()}
    assert found.keys() == want.keys()
    for name, grad in want.items():
        assert (found[name] - grad).norm() <= 1e-4 * grad.norm() + 1e-6, name


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model = disturbed(longlora.torch.extend(tiny("llama", "sdpa"), 512, group_size=6)).train()
    made = copy.deepcopy(model)
    longlora.torch.swap(made)
    made.gradient_checkpointing_enable({"use_reentrant": reentrant})
    agree_in_training(model, made)


def test_transforms_of_torch_func():
    """Our kernels have no rules for vmap."""
    norm = disturbed(tiny("llama", "sdpa")).model.norm
    made = copy.deepcopy(norm)
    longlora.torch.swap(torch.nn.ModuleList([made]))
    rows = put(torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0)))
    close(torch.vmap(made)(rows), norm(rows))
    weight = norm.weight.detach()

    def total(module):
        return lambda w: torch.func.functional_call(module, {"weight": w}, rows).square().sum()

    close(torch.func.grad(total(made))(weight), torch.func.grad(total(norm))(weight))


def test_weights_on_no_device(calls):
    norm = tiny("llama", "sdpa").model.norm.to("meta")
    longlora.torch.swap(torch.nn.ModuleList([norm]))
    assert norm(torch.ones(3, 32, device="meta")).is_meta and calls["rms_norm"] == 0
