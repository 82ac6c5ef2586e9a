"""Public names of longlora.torch, layouts of tensors, and what a call of an operator runs."""

import math
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="longlora.torch is for torch")

import op_cases  # noqa: E402

import longlora.torch  # noqa: E402
from longlora.torch import ops  # noqa: E402
from longlora.torch.ops import attention, layout, linear, register, vocabulary  # noqa: E402


def test_public_names():
    pytest.importorskip("transformers", reason="configure needs it")
    pytest.importorskip("peft", reason="extend needs it")
    names = ["ops", "configure", "swap", "unswap", "extend", "load", "CheckMoved"]
    assert longlora.torch.__all__ == names
    assert all(callable(getattr(longlora.torch, name)) for name in names[1:])
    kernels = "cached_attention embedding linear_cross_entropy lora_linear rms_norm rope s2_attention"
    assert ops.__all__ == [*kernels.split(), "s2_attention_with_lse", "swiglu"]
    assert all(callable(getattr(ops, name)) for name in ops.__all__)


# ---- layouts -------------------------------------------------------------------------------------


def test_a_tensor_is_copied_only_where_its_last_axis_is_not_dense():
    x = torch.arange(24.0).reshape(4, 6)
    assert layout.dense(None) is None and layout.dense(x) is x
    for view in (x[:, :3], x[:, :1].expand(4, 1), x.t()[:, :1], x.t()[::2, :1]):
        assert layout.dense(view) is view
    copied = layout.dense(x.t())
    assert copied.is_contiguous() and torch.equal(copied, x.t())
    assert layout.dense(x[:, ::2]).is_contiguous()


def test_rows_have_two_to_four_axes():
    assert layout.rows(None) is None
    for shape, wanted in (
        ((3,), (1, 3)),
        ((2, 3), (2, 3)),
        ((2, 2, 3), (2, 2, 3)),
        ((2, 2, 2, 3), (2, 2, 2, 3)),
        ((2, 1, 2, 2, 3), (8, 3)),
    ):
        x = torch.arange(math.prod(shape)).reshape(shape)
        found = layout.rows(x)
        assert found.shape == wanted and torch.equal(found.flatten(), x.flatten())
        assert found.data_ptr() == x.data_ptr()
    wide = torch.arange(24.0).reshape(4, 6)
    view = wide[:, :3]
    assert layout.rows(view) is view  # whose rows lie apart
    assert layout.rows(wide.reshape(2, 2, 6)[..., :3]).shape == (4, 3)
    turned = layout.rows(wide.reshape(2, 2, 6).transpose(0, 1))
    assert turned.shape == (4, 6) and torch.equal(turned[1], wide[2])
    assert torch.equal(layout.rows(wide.t()), wide.t()) and layout.rows(wide.t()).is_contiguous()


def test_statistics_have_one_to_four_axes():
    for shape, wanted in (((), (1,)), ((2,), (2,)), ((2, 1, 1, 3), (2, 1, 1, 3)), ((2, 1, 1, 1, 3), (6,))):
        assert layout.flat(torch.zeros(shape)).shape == wanted


def test_new_tensors():
    x = torch.zeros(3, 4, dtype=torch.bfloat16)
    for given in (x, x.t(), x.t()[1:]):
        made = layout.new_like(given)
        assert made.shape == given.shape and made.dtype == torch.bfloat16 and made.is_contiguous()
    assert layout.new_floats(x, 2, 3).shape == (2, 3) and layout.new_floats(x, 2).dtype == torch.float32
    assert layout.new_floats(x).shape == () and layout.new_floats(x.to("meta"), 2).is_meta


def test_needed_gradients_are_cast():
    ctx, grad = SimpleNamespace(needs_input_grad=(False, True)), torch.ones(2)
    assert layout.cast_gradient(ctx, 0, grad, grad) is None
    assert layout.cast_gradient(ctx, 1, grad, grad.bfloat16()).dtype == torch.bfloat16


class Dropped(torch.autograd.Function):
    """Gives a result that needs gradients, and none of it to its input."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@pytest.mark.parametrize("name", op_cases.CASES)
def test_the_gradient_of_one_input_alone(name):
    """It is that of a call in which all inputs train, and the others get none."""
    inputs = [x.requires_grad_() for x in op_cases.given(name)[1]]
    wanted = torch.autograd.grad(op_cases.CASES[name][1](*inputs).square().sum(), inputs)
    for i, want in enumerate(wanted):
        given = [x.detach().requires_grad_(i == j) for j, x in enumerate(inputs)]
        op_cases.CASES[name][1](*given).square().sum().backward()
        assert [x.grad is not None for x in given] == [i == j for j in range(len(given))]
        torch.testing.assert_close(given[i].grad, want)


@pytest.mark.parametrize("name", op_cases.CASES)
def test_a_result_without_a_gradient(name):
    inputs = [x.requires_grad_() for x in op_cases.given(name)[1]]
    out = op_cases.CASES[name][1](*inputs)
    Dropped.apply(out).sum().backward()
    assert all(x.grad is None or not x.grad.any() for x in inputs)


# ---- calls ---------------------------------------------------------------------------------------


def test_the_scale_of_a_cached_attention():
    """Two keys have the scores 4 and 0. The default scale is 1 / sqrt(4)."""
    q = torch.tensor([4.0, 0, 0, 0]).reshape(1, 1, 1, 4)
    keys = torch.zeros(1, 2, 1, 4)
    keys[0, 0, 0, 0] = 1
    values = torch.zeros(1, 2, 1, 4)
    values[0, 0] = 1
    lengths = torch.tensor([1], dtype=torch.int32)
    zero = torch.zeros(1, 1, 1, 4)
    for scale, factor in ((None, 0.5), (0.25, 0.25)):
        out = ops.cached_attention(q, keys.clone(), values.clone(), lengths, zero, zero, scale=scale)
        want = 1 / (1 + math.exp(-4 * factor))
        assert out.flatten().tolist() == pytest.approx([want] * 4, rel=1e-5)


def test_the_default_pattern_is_the_papers():
    torch.manual_seed(0)
    q, k = torch.randn(1, 8, 2, 4), torch.randn(1, 8, 1, 4)
    for function in (ops.s2_attention, lambda *x, **how: ops.s2_attention_with_lse(*x, **how)[0]):
        want = function(q, k, k, group_size=4, boundary="split", shift="half")
        assert torch.equal(function(q, k, k, group_size=4), want)


def test_the_logarithms_of_the_sums_have_no_gradient():
    q, k = torch.randn(1, 8, 2, 4, requires_grad=True), torch.randn(1, 8, 1, 4)
    out, lse = ops.s2_attention_with_lse(q, k, k, group_size=4)
    assert out.requires_grad and not lse.requires_grad


def test_boundaries_of_another_batch_size_are_refused():
    q, k = torch.zeros(2, 4, 2, 4), torch.zeros(2, 4, 1, 4)
    with pytest.raises(ValueError, match="cu_seqlens axis 0 should be B=2, got 3"):
        ops.s2_attention(q, k, k, group_size=2, cu_seqlens=torch.tensor([[0, 4]] * 3, dtype=torch.int32))


def test_the_loss_computes_gradients_only_if_they_are_needed(monkeypatch):
    torch.manual_seed(0)
    steps = []
    step = vocabulary.linear_cross_entropy_step
    monkeypatch.setattr(vocabulary, "linear_cross_entropy_step", lambda *x: steps.append(x[4:]) or step(*x))
    x, targets = torch.randn(2, 3, 8), torch.tensor([[1, 2, -100], [0, 4, 3]])
    weight = torch.randn(5, 8)
    want = torch.nn.functional.cross_entropy(
        (x @ weight.T).flatten(0, 1), targets.flatten(), reduction="none"
    )

    def check_loss(x, weight, reduction, wanted, limit=1e-5):
        steps.clear()
        found = ops.linear_cross_entropy(x, weight, targets, reduction=reduction)
        whole = {"none": want.view(2, 3), "sum": want.sum(), "mean": want.sum() / 5}[reduction]
        torch.testing.assert_close(found.float(), whole, rtol=limit, atol=limit)
        assert steps == wanted

    learns = weight.clone().requires_grad_()
    for reduction in ("mean", "sum", "none"):
        check_loss(x, weight, reduction, [])
        mean = reduction == "mean"
        check_loss(x, learns, reduction, [] if reduction == "none" else [(mean, True)])
        check_loss(
            x.clone().requires_grad_(), weight, reduction, [] if reduction == "none" else [(mean, False)]
        )
        with torch.no_grad():
            check_loss(x, learns, reduction, [])
        check_loss(x.half(), weight.half().requires_grad_(), reduction, [], 1e-2)
    with torch.autocast("cpu", torch.float16):
        check_loss(x, learns, "mean", [], 1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        check_loss(x, learns, "mean", [(True, True)], 2e-2)
    with pytest.raises(ValueError, match="reduction should be one of mean, sum, none, got 'max'"):
        ops.linear_cross_entropy(x, weight, targets, reduction="max")


def test_plain_tensors_skip_the_dispatcher(monkeypatch):
    """The arguments decide whether a call runs the kernel, the autograd function or the operator."""
    taken = []

    def way(name):
        return lambda *args: taken.append(name) or name

    call = register._caller(way("operator"), way("kernel"), way("apply"))
    x, learns = torch.ones(2), torch.ones(2, requires_grad=True)
    negative = torch.ones(2, dtype=torch.complex64).conj().imag
    assert negative.is_neg()
    mine = x.as_subclass(type("Mine", (torch.Tensor,), {}))
    for args, wanted in (
        ((x, None, True, 1, 1.0, "a", [True]), "kernel"),
        ((x, torch.nn.Parameter(x)), "apply"),
        ((learns, x), "apply"),
        ((x, learns, x), "apply"),
        ((x, negative), "operator"),
        ((x, mine), "operator"),
        ((x, object()), "operator"),
        ((x.to("meta"),), "operator"),
    ):
        assert call(*args) == wanted
    with torch.no_grad():
        assert call(learns) == "kernel"
    with torch.autocast("cpu"):
        assert call(x) == "operator"
    with torch.overrides.TorchFunctionMode():
        assert call(x) == "operator"
    with torch.utils._python_dispatch.TorchDispatchMode():
        assert call(x) == "operator"
    torch.vmap(lambda row: call(row) and row)(torch.ones(2, 2))
    assert taken[-1] == "operator"
    assert call(x) == "kernel"
    monkeypatch.setattr(register, "is_compiling", lambda: True)
    assert call(x) == "operator"


def test_shapes_and_dtypes_on_the_meta_device():
    meta = torch.ones(2, 3, 8, device="meta")
    weight, a, b = (torch.ones(n, m, device="meta") for n, m in ((5, 8), (2, 8), (5, 2)))
    out, u = torch.ops.longlora.lora_linear_forward(meta, weight, None, a, b, 1.0)
    assert out.shape == (2, 3, 5) and u.shape == (2, 3, 2) and u.dtype == torch.float32
    assert torch.ops.longlora.lora_linear_forward(meta, weight, None, None, None, 1.0)[1].shape == (0,)
    for wanted in ([True] * 5, [False] * 5, [False, True, False, True, False]):
        grads = linear._shapes_lora_linear_backward(meta, meta, weight, a, b, u, 1.0, wanted)
        shapes = [(2, 3, 8), (2, 8), (5, 2), (5, 8), (5,)]
        assert [tuple(x.shape) for x in grads] == [s if want else (0,) for s, want in zip(shapes, wanted)]
    grads = linear._shapes_lora_linear_backward(meta, meta, weight, None, None, u, 1.0, [True] * 5)
    assert [tuple(x.shape) for x in grads] == [(2, 3, 8), (0,), (0,), (5, 8), (5,)]
    assert grads[3].dtype == torch.float32
    low = torch.ones(3, 8, device="meta", dtype=torch.bfloat16)
    ids = torch.ones(3, dtype=torch.int32, device="meta")
    table = torch.ops.longlora.embedding_backward(low, ids, 7)
    assert table.shape == (7, 8) and table.dtype == torch.float32
    assert torch.ops.longlora.embedding_forward(low, ids).dtype == torch.bfloat16
    q, k = (torch.ones(2, 4, heads, 8, device="meta", dtype=torch.bfloat16) for heads in (2, 1))
    out, lse = attention.s2_attention_forward(q, k, k, None, 2, "split", "half", 1.0)
    assert out.shape == q.shape and lse.shape == (2, 2, 4) and lse.dtype == torch.float32
    assert out.dtype == torch.bfloat16
