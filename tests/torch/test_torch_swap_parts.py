"""Units of longlora.torch.swap: which calls run our kernels, and which the original functions."""

import copy
import pickle
import sys
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="longlora.torch is for torch")
transformers = pytest.importorskip("transformers", reason="its layers are swapped")
peft = pytest.importorskip("peft", reason="its layers are swapped")
from families import tiny  # noqa: E402
from swap_checks import own_rotary  # noqa: E402
from torch import nn  # noqa: E402
from transformers.loss.loss_utils import ForCausalLMLoss  # noqa: E402

import longlora.torch  # noqa: E402, F401

swap = sys.modules["longlora.torch.swap"]  # longlora.torch.swap is the function


LLAMA = transformers.models.llama.modeling_llama


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def swapped(module):
    """A swapped copy of the module."""
    made = copy.deepcopy(module)
    swap.swap(nn.ModuleList([made]))
    return made


def close(a, b):
    assert a.dtype == b.dtype
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ---- the rotary embedding ------------------------------------------------------------------------


def halves(q, k, cos, sin, unsqueeze_dim=1):
    """The rotation of transformers' Llama."""

    def half(x):
        n = x.shape[-1] // 2
        return torch.cat((-x[..., n:], x[..., :n]), -1)

    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + half(q) * sin, k * cos + half(k) * sin


def rotary(dtype=torch.float32, rows=1):
    """q of 3 heads and k of 1 head of size 4, in two sequences of 5 tokens, with `rows` rows of angles."""
    angles = rand(rows, 5, 2, seed=3).repeat(1, 1, 2)
    q, k = rand(2, 3, 5, 4, dtype=dtype), rand(2, 1, 5, 4, seed=1, dtype=dtype)
    return dict(q=q, k=k, cos=angles.cos(), sin=angles.sin())


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_kernel_rotates(rows, keeps, dtype, calls):
    given = rotary(rows=rows, dtype=dtype)
    found = swap._apply_rotary_pos_emb(None, keeps, *given.values())
    for x, want in zip(found, halves(*given.values()), strict=True):
        assert x.dtype == (dtype if keeps else torch.float32)
        rounding = 2**-8 if x.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(x.float(), want, rtol=rounding, atol=1e-5)
    assert calls["rope"] == 2


X = rotary()


@pytest.mark.parametrize(
    "changes, args, how",
    [
        ({}, ("positions",), {}),
        ({}, (), dict(position_ids=None)),
        ({}, (), dict(unsqueeze_dim=2)),
        (dict(q=X["q"][0]), (), {}),
        (dict(k=X["k"][0]), (), {}),
        (dict(k=X["k"][:, :, :4]), (), {}),
        (dict(k=X["k"][..., :2]), (), {}),
        (dict(k=X["k"][:1]), (), {}),
        (dict(cos=X["cos"][..., :2]), (), {}),
        (dict(cos=X["cos"][0], sin=X["sin"][0]), (), {}),
        (dict(cos=X["cos"][:, :1], sin=X["sin"][:, :1]), (), {}),
        (dict(cos=X["cos"][..., :2], sin=X["sin"][..., :2]), (), {}),
        (dict(cos=X["cos"].expand(3, 5, 4), sin=X["sin"].expand(3, 5, 4)), (), {}),
        (dict(cos=X["cos"].clone().requires_grad_()), (), {}),
        (dict(sin=X["sin"].clone().requires_grad_()), (), {}),
        (dict(q=X["q"].double(), k=X["k"].double()), (), {}),
        (dict(k=X["k"].bfloat16()), (), {}),
        (dict(cos=X["cos"].to("meta"), sin=X["sin"].to("meta")), (), {}),
    ],
)
def test_other_rotations_run_the_original_function(changes, args, how, calls):
    given, seen = {**X, **changes}, []

    def original(*tensors, **more):
        seen.append((tensors, more))
        return "result"

    assert swap._apply_rotary_pos_emb(original, False, *given.values(), *args, **how) == "result"
    ((tensors, more),) = seen
    assert all(x is y for x, y in zip(tensors[:4], given.values(), strict=True)) and tensors[4:] == args
    assert more == ({} if args else {"unsqueeze_dim": 1}) | how and calls["rope"] == 0


def test_the_original_rotation_returns_with_the_last_unswap():
    config = transformers.LlamaConfig(hidden_size=8, num_attention_heads=2)
    model = nn.ModuleList([LLAMA.LlamaAttention(config, 0)])
    own_rotary()
    original = LLAMA.apply_rotary_pos_emb
    assert swap.swap(model)["rope"] == 1 and LLAMA.apply_rotary_pos_emb is not original
    ours = LLAMA.apply_rotary_pos_emb
    other = copy.deepcopy(model)
    swap.unswap(nn.Identity())
    assert LLAMA.apply_rotary_pos_emb is ours
    assert swap.swap(other)["rope"] == 1 and LLAMA.apply_rotary_pos_emb is ours
    swap.unswap(model)
    assert LLAMA.apply_rotary_pos_emb is ours
    assert swap.unswap(other) is other
    assert LLAMA.apply_rotary_pos_emb is original and LLAMA.__name__ not in swap._rotated


# ---- norms and MLPs ------------------------------------------------------------------------------


def norm(kind=LLAMA.LlamaRMSNorm, *how, **more):
    made = kind(*(how or (8,)), **more)
    with torch.no_grad():
        made.weight.add_(rand(*made.weight.shape, seed=7))
    return made


@pytest.mark.parametrize(
    "made", [norm(), norm(eps=0.5), norm(nn.RMSNorm, 8, 0.3)], ids=["llama", "0.5", "torch"]
)
def test_norms_run_our_kernel(made, calls):
    x, ours = rand(3, 8), swapped(made)
    close(ours(x), made(x))
    assert calls["rms_norm"] == 1 and ours.weight is not made.weight
    with pytest.raises(TypeError):
        ours()
    with pytest.raises(RuntimeError):
        ours(rand(3, 7))
    close(ours(x.double()), made(x.double()))
    assert calls["rms_norm"] == 1


@pytest.mark.parametrize(
    "made",
    [
        nn.RMSNorm(8),  # without eps, which then depends on the dtype of the input
        nn.RMSNorm((2, 8), 0.3),
        nn.RMSNorm(8, 0.3, elementwise_affine=False),
        nn.LayerNorm(8),
        nn.Identity(),
    ],
    ids=str,
)
def test_other_norms_are_not_swapped(made):
    assert swap.swap(nn.ModuleList([made]))["rms_norm"] == 0 and not isinstance(made, swap.Swapped)


def test_a_norm_that_changes_after_the_swap(calls):
    made = norm(nn.RMSNorm, 8, 0.3)
    ours, x = swapped(made), rand(3, 8)
    for change in (dict(eps=None), dict(eps=0.1)):
        for each in (made, ours):
            vars(each).update(change)
        close(ours(x), made(x))
    assert calls["rms_norm"] == 1
    with torch.autocast("cpu", torch.bfloat16):
        close(ours(x), made(x))
    close(ours(x.bfloat16()), made(x.bfloat16()))
    assert calls["rms_norm"] == 1


def mlp(**changes):
    config = transformers.LlamaConfig(
        hidden_size=8, intermediate_size=6, num_attention_heads=2, num_key_value_heads=2, **changes
    )
    torch.manual_seed(0)
    return LLAMA.LlamaMLP(config)


def test_mlps_run_our_kernel_if_gate_and_up_are_alike(calls):
    x, made = rand(3, 8), mlp()
    ours = swapped(made)
    close(ours(x), made(x))
    assert calls["swiglu"] == 1
    narrow = nn.Linear(8, 1)
    for each in (made, ours):
        each.up_proj = narrow
    close(ours(x), made(x))

    class Low(nn.Linear):
        def forward(self, x):
            return super().forward(x).bfloat16()

    for each in (made, ours):
        each.up_proj = Low(8, 6)
        each.up_proj.weight = made.gate_proj.weight
        nn.init.zeros_(each.up_proj.bias)
    close(ours(x), made(x))
    wide = mlp().double()
    close(swapped(wide)(x.double()), wide(x.double()))
    assert calls["swiglu"] == 1


def test_mlps_with_a_hook_or_another_activation_are_not_swapped():
    gelu = mlp(hidden_act="gelu")
    watched = mlp()
    watched.act_fn.register_forward_hook(lambda *unused: None)
    for made in (gelu, watched):
        assert swap.swap(nn.ModuleList([made]))["swiglu"] == 0
    ours = swapped(mlp())
    ours.act_fn = nn.Tanh()
    x = rand(3, 8)
    close(ours(x), ours.down_proj(torch.tanh(ours.gate_proj(x)) * ours.up_proj(x)))


# ---- LoRA ----------------------------------------------------------------------------------------


def lora(bias=True, dtype=torch.float32, **how):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6, bias=bias, dtype=dtype))
    config = peft.LoraConfig(
        **{**dict(r=2, lora_alpha=3, target_modules=["0"], init_lora_weights=False), **how}
    )
    made = peft.inject_adapter_in_model(config, model)[0]
    made.lora_A.float(), made.lora_B.float()
    return made


@pytest.mark.parametrize("bias", [True, False])
def test_parts_of_a_lora_linear(bias):
    made = lora(bias)
    weight, b, a, up, scale = swap._lora_of(made, rand(3, 8))
    assert weight is made.base_layer.weight and b is made.base_layer.bias and scale == 1.5
    assert torch.equal(a, made.lora_A["default"].weight) and torch.equal(up, made.lora_B["default"].weight)
    ours = swapped(made)
    assert isinstance(ours, swap.Swapped)
    close(ours(rand(3, 8)), made(rand(3, 8)))


def hooked(part):
    def change(made):
        part(made).register_forward_hook(lambda *unused: None)

    return change


@pytest.mark.parametrize(
    "change",
    [
        hooked(lambda made: made.base_layer),
        hooked(lambda made: made.lora_A["default"]),
        hooked(lambda made: made.lora_B["default"]),
        hooked(lambda made: made.lora_dropout["default"]),
        lambda made: setattr(made, "_active_adapter", ["default", "other"]),
        lambda made: setattr(made, "_active_adapter", ["other"]),
        lambda made: setattr(made, "_active_adapter", []),
        lambda made: setattr(made, "_disable_adapters", True),
        lambda made: made.merged_adapters.append("default"),
        lambda made: made.lora_variant.update(default=1),
        lambda made: made.lora_dropout.update({"default": nn.Dropout(0.5)}),
        lambda made: setattr(made.lora_A["default"], "bias", nn.Parameter(torch.ones(2))),
        lambda made: setattr(made.lora_B["default"], "bias", nn.Parameter(torch.ones(6))),
        lambda made: made.scaling.update(default=torch.tensor(1.0)),
        lambda made: setattr(made, "cast_input_dtype_enabled", False),
        lambda made: setattr(made.base_layer, "forward", lambda x: x),
        lambda made: setattr(made, "base_layer", nn.Bilinear(8, 8, 6)),
        lambda made: made.base_layer.double(),
        lambda made: made.base_layer.bfloat16(),
        lambda made: setattr(made.base_layer, "bias", nn.Parameter(torch.ones(6).bfloat16())),
        lambda made: setattr(made.base_layer, "bias", nn.Parameter(torch.ones(6).double())),
        lambda made: made.lora_A["default"].double(),
        lambda made: made.lora_B["default"].to("meta"),
    ],
)
def test_other_lora_linears_run_the_code_of_peft(change):
    made = lora()
    change(made)
    assert swap._lora_of(made, rand(3, 8)) is None


def test_dtypes_of_a_lora_linear():
    low = lora(dtype=torch.bfloat16)
    x = rand(3, 8, dtype=torch.bfloat16)
    for given, known in ((x, True), (x.float(), False), (x.double(), False)):
        assert (swap._lora_of(low, given) is not None) == known
    assert {part.dtype for part in swap._lora_of(low, x)[:4]} == {torch.bfloat16}  # A and B are float32
    half = lora(dtype=torch.float16)
    assert swap._lora_of(half, x.half()) is None
    half.half()
    assert swap._lora_of(half, x.half()) is not None
    half.lora_A["default"].float()
    assert swap._lora_of(half, x.half()) is None
    half.half().lora_B["default"].float()
    assert swap._lora_of(half, x.half()) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert swap._lora_of(lora(), x) is not None and swap._lora_of(low, x.float()) is not None


def test_lora_calls_that_run_the_code_of_peft(calls):
    made = lora()
    ours = swapped(made)
    close(ours(rand(3, 8), adapter_names=None), made(rand(3, 8)))
    assert calls["lora_linear"] == 0
    ours.longlora_swapped = False
    close(ours(rand(3, 8)), made(rand(3, 8)))
    assert calls["lora_linear"] == 0


# ---- the loss ------------------------------------------------------------------------------------


def test_the_loss_is_divided_by_the_count():
    x, weight, targets = rand(1, 3, 8), rand(5, 8, seed=1), torch.tensor([[1, -100, 4]])
    logits = (x @ weight.T)[0]
    total = nn.functional.cross_entropy(logits, targets[0], reduction="sum")
    for count, want in ((None, total / 2), (4, total / 4), (torch.tensor(8), total / 8)):
        loss = swap._Loss(targets, -100, count)
        assert loss.rows is None
        found = loss.of(x, weight)
        assert loss.rows == 5
        close(loss(found, None, 5), want)
        with pytest.raises(ValueError, match="the head has 5 rows, but the vocabulary has 6 tokens"):
            loss(found, None, vocab_size=6)


FLOW = swap.forms.LossFlow("lm_head", ("self", "labels"), True, ("softcap",))


def causal(**changes):
    made = dict(
        longlora_swapped=True, loss_function=ForCausalLMLoss, config=SimpleNamespace(return_dict=True)
    )
    return SimpleNamespace(**{**made, **changes})


LABELS = torch.tensor([[3, 4, 5]])


def test_the_targets_of_a_call():
    loss = swap._loss_of(causal(), FLOW, dict(labels=LABELS))
    assert loss.targets.tolist() == [[4, 5, -100]] and loss.ignore == -100 and loss.count is None
    given = dict(labels=LABELS, ignore_index=-1, num_items_in_batch=7)
    loss = swap._loss_of(causal(), FLOW, given)
    assert loss.targets.tolist() == [[4, 5, -1]] and loss.ignore == -1 and loss.count == 7
    shifted = torch.tensor([[9, 9, 9]])
    assert swap._loss_of(causal(), FLOW, {**given, "shift_labels": shifted}).targets is shifted
    plain = swap._loss_of(causal(), FLOW._replace(keywords=False), {**given, "shift_labels": shifted})
    assert plain.targets.tolist() == [[4, 5, -100]] and plain.count is None
    for keep in (0, None):
        assert swap._loss_of(causal(), FLOW, dict(labels=LABELS, logits_to_keep=keep)) is not None
    for config, returns in (({}, None), (dict(return_dict=False), True)):
        model = causal(config=SimpleNamespace(**config))
        assert swap._loss_of(model, FLOW, dict(labels=LABELS, return_dict=returns)) is not None


@pytest.mark.parametrize(
    "model, given",
    [
        (causal(), dict(labels=None)),
        (causal(), dict(labels=[[3, 4]])),
        (causal(), dict(labels=LABELS.float())),
        (causal(), dict(labels=LABELS, return_dict=False)),
        (causal(), dict(labels=LABELS, logits_to_keep=1)),
        (causal(), dict(labels=LABELS, logits_to_keep=torch.tensor(0))),
        (causal(longlora_swapped=False), dict(labels=LABELS)),
        (SimpleNamespace(), dict(labels=LABELS)),
        (causal(config=SimpleNamespace(return_dict=False)), dict(labels=LABELS)),
        (causal(config=SimpleNamespace(softcap=5.0)), dict(labels=LABELS)),
        (causal(loss_function=len), dict(labels=LABELS)),
    ],
)
def test_calls_that_must_make_logits(model, given):
    assert swap._loss_of(model, FLOW, given) is None


def test_a_head_returns_the_loss_where_it_can(calls):
    torch.manual_seed(0)
    made = nn.Linear(8, 5, bias=False)
    made.__class__ = swap._class_of(nn.Linear)
    assert made.longlora_kind == "head"
    x, targets = rand(1, 3, 8), torch.tensor([[1, 2, 4]])
    logits = made(x)
    assert logits.shape == (1, 3, 5) and calls["linear_cross_entropy"] == 0
    made.longlora_loss = loss = swap._Loss(targets, -100, None)
    close(made(x), nn.functional.cross_entropy(logits[0], targets[0]))
    assert calls["linear_cross_entropy"] == 1 and loss.rows == 5
    loss.rows = None
    assert made(rand(1, 2, 8)).shape == (1, 2, 5)  # the targets have another shape
    with torch.autocast("cpu", torch.bfloat16):
        assert made(x.bfloat16()).shape == ()
    calls["linear_cross_entropy"], loss.rows = 0, None
    made.bias = nn.Parameter(torch.zeros(5))
    close(made(x), logits)
    made.bias = None
    for wrong in (x.bfloat16(), rand(1, 3, 7)):
        with pytest.raises(RuntimeError):
            made(wrong)
    close(copy.deepcopy(made).double()(x.double()).float(), logits)
    made.longlora_swapped = False
    close(made(x), logits)
    assert calls["linear_cross_entropy"] == 0 and loss.rows is None


def test_a_head_in_float64_makes_logits():
    """The kernels do not support float64."""
    model = tiny("llama", "sdpa", num_hidden_layers=1).double().train()
    made, ids = swapped(model), torch.arange(3, 12)[None]
    theirs, found = (each(ids, labels=ids) for each in (model, made))
    close(found.loss, theirs.loss)
    close(found.logits, theirs.logits)
    assert not hasattr(made, "longlora_loss") and not hasattr(made.lm_head, "longlora_loss")


def test_linears_that_may_be_heads():
    plain, biased, hooked_ = nn.Linear(2, 3, bias=False), nn.Linear(2, 3), nn.Linear(2, 3, bias=False)
    hooked_.register_forward_pre_hook(lambda *unused: None)
    own = nn.Linear(2, 3, bias=False)
    own.forward = lambda x: x
    model = SimpleNamespace(
        plain=plain, biased=biased, hooked=hooked_, own=own, none=None, norm=nn.Identity()
    )
    found = {name: swap._heads(model, name) for name in (*vars(model), "missing")}
    assert found.pop("plain") == [plain] and not any(found.values())
    engines = nn.Linear(2, 3, bias=False)

    def hook(*unused):
        pass

    for name, ignored in (
        ("torch.distributed.fsdp", True),
        ("deepspeed.zero", True),
        ("mine", False),
        (None, False),
    ):
        hook.__module__ = name
        handle = engines.register_forward_hook(hook)
        assert bool(swap._heads(SimpleNamespace(head=engines), "head")) is ignored
        handle.remove()


# ---- classes -------------------------------------------------------------------------------------


def test_a_swapped_class_keeps_its_name():
    made = norm()
    ours = swapped(made)
    kind = type(ours)
    assert (
        kind.__name__ == "LlamaRMSNorm"
        and kind.__module__ == LLAMA.__name__
        and kind is swap._class_of(type(made))
    )
    assert kind.__qualname__ == "LlamaRMSNorm" and kind.__doc__ == type(made).__doc__
    assert kind.forward.__name__ == "forward" and kind.forward.__wrapped__ is type(made).forward
    assert swap._own(ours) is swap._own(made) is type(made)
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert (
            type(again) is kind and torch.equal(again.weight, ours.weight) and again.weight is not ours.weight
        )
    assert swap._class_of(nn.Conv1d) is None

    class Inner(type(made)):
        pass

    assert swap._class_of(Inner).__qualname__ == Inner.__qualname__ != Inner.__name__


def test_swap_and_unswap_a_norm():
    made = norm()
    own = norm()
    own.forward = lambda x: x
    model = nn.ModuleList([made, own])
    assert swap.swap(model) == dict(rms_norm=1, swiglu=0, lora_linear=0, linear_cross_entropy=0, rope=0)
    assert (
        type(own) is LLAMA.LlamaRMSNorm and swap.unswap(model) is model and type(made) is LLAMA.LlamaRMSNorm
    )
    assert "longlora_swapped" not in vars(made)
    swap.swap(model)
    sharded = type("FSDPNorm", (type(made),), {})
    made.__class__ = sharded
    swap.unswap(model)
    assert type(made) is sharded and made.longlora_swapped is False
    assert swap.swap(model)["rms_norm"] == 1 and type(made) is sharded and made.longlora_swapped is True
    swap.unswap(model)
    made.variance_epsilon = None
    assert swap.swap(model)["rms_norm"] == 0 and made.longlora_swapped is False


def test_tensors_that_the_kernels_read():
    x = torch.ones(2)
    assert swap._plain(x) and swap._plain(x.bfloat16(), nn.Parameter(x.half()))
    assert not swap._plain(x.to("meta")) and not swap._plain(x, x.to("meta")) and not swap._plain(x.double())
    assert not swap._plain(x, x.double()) and not swap._plain(
        x.as_subclass(type("Mine", (torch.Tensor,), {}))
    )
    seen = []
    torch.vmap(lambda row: seen.append(swap._plain(row)) or row)(torch.ones(2, 2))
    assert seen == [False]


def test_hooks_of_every_kind_are_found():
    def none(*unused):
        return None

    for add in (
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ):
        made = nn.Linear(2, 2)
        assert swap._bare(made) and swap._unhooked(made) and swap._linear(made)
        handle = getattr(made, add)(none)
        assert not swap._bare(made) and not swap._unhooked(made) and not swap._linear(made)
        handle.remove()
        assert swap._bare(made)
    handle = nn.modules.module.register_module_forward_hook(none)
    try:
        assert not swap._bare(made) and not swap._unhooked(made)
    finally:
        handle.remove()
    assert not swap._linear(nn.Identity())
