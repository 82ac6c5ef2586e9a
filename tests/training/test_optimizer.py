"""AdamW against the reference, and what it refuses before anything changes."""

import math

import checks
import numpy as np
import pytest
import reference

from longlora import Tensor
from longlora.errors import UserError
from longlora.training.optimizer import AdamW, decay_of

RATES = dict(linear=1e-2, norm=1e-3, bias=1e-1)


def tensor(array):
    made = Tensor(array.shape, "float32")
    made.copy_(array)
    return made


class Parameter:
    """A parameter with a random value. copy: "bfloat16", "columns" (of a wider bfloat16 tensor) or None."""

    def __init__(self, name, kind, shape, copy=None):
        start = np.random.default_rng(len(name)).standard_normal(shape).astype(np.float32)
        self.name, self.kind, self.shape, self.published = name, kind, shape, 0
        self.value, self.grad, self.m, self.v = tensor(start), *(tensor(0 * start) for _ in range(3))
        wide = Tensor((*shape[:-1], 2 * shape[-1]), "bfloat16") if copy else None
        self.copy = wide and (Tensor(shape, "bfloat16") if copy == "bfloat16" else wide[:, : shape[-1]])

    def publish(self):
        self.published += 1
        if self.copy is not None:
            self.copy.copy_(self.value)


def parameters():
    return [
        Parameter("a", "linear", (3, 4)),
        Parameter("bb", "linear", (2, 3), "bfloat16"),
        Parameter("ccc", "linear", (5, 2), "columns"),
        Parameter("dddd", "norm", (6,)),
        Parameter("eeeee", "bias", (3,)),
    ]


def gradients(step, made, size=1.0):
    random = np.random.default_rng(step)
    return [random.standard_normal(p.shape).astype(np.float32) * np.float32(size) for p in made]


def set_gradients(made, grads):
    for p, grad in zip(made, grads, strict=True):
        p.grad.copy_(grad)


def rounded(array):
    """The float32 array in bfloat16 and back."""
    return array.astype(checks.DTYPES["bfloat16"]).astype(np.float32)


@pytest.mark.parametrize(
    "how, size",
    [
        (dict(), 1.0),
        (dict(beta1=0.8, beta2=0.95, eps=1e-2, weight_decay=0.5), 1.0),
        (dict(max_grad_norm=3.0, eps=1e-2), 1.0),  # clipped
        (dict(max_grad_norm=1e-5, eps=1e-3), 1e-5),  # clipped, and 1e-6 is not small against the norm
        (dict(max_grad_norm=30.0, eps=1e-2), 1.0),  # not clipped
    ],
    ids=["defaults", "options", "clipped", "tiny", "whole"],
)
def test_steps_match_the_reference(how, size):
    """Clipping scales by limit / (norm + 1e-6), as torch.nn.utils.clip_grad_norm_ does."""
    made, limit = parameters(), how.get("max_grad_norm", math.inf)
    optimizer = AdamW(made, **how)
    wanted = [(p.value.numpy().astype(np.float64), 0.0, 0.0) for p in made]
    rest = {name: value for name, value in how.items() if name in ("beta1", "beta2", "eps")}
    for step in range(1, 4):
        grads = gradients(step, made, size)
        set_gradients(made, grads)
        norm = math.sqrt(sum(np.square(grad, dtype=np.float64).sum() for grad in grads))
        assert optimizer.step(RATES) == pytest.approx(norm, rel=1e-6) and optimizer.steps == step
        rest |= dict(step=step, grad_scale=min(1.0, limit / (norm + 1e-6)))
        for i, (p, grad) in enumerate(zip(made, grads)):
            decay = 0.0 if p.kind in ("norm", "bias") else how.get("weight_decay", 0.0)
            wanted[i] = reference.adamw(*wanted[i], grad, lr=RATES[p.kind], weight_decay=decay, **rest)
            np.testing.assert_allclose(p.value.numpy(), wanted[i][0], rtol=2e-5, atol=1e-9)
            if p.copy is not None:
                copy = Tensor(p.shape, "float32")
                copy.copy_(p.copy)
                np.testing.assert_array_equal(copy.numpy(), rounded(p.value.numpy()), p.name)
    assert [p.published for p in made] == [0, 0, 3, 0, 0]  # the kernel writes a dense copy itself


@pytest.mark.parametrize("kind", ["linear", "lora_A", "lora_B", "embedding", "head"])
def test_matrices_decay(kind):
    assert decay_of(kind, 0.25) == 0.25


@pytest.mark.parametrize("kind", ["norm", "bias"])
def test_norms_and_biases_do_not_decay(kind):
    assert decay_of(kind, 0.25) == 0.0


def test_the_norm_of_no_parameter_and_of_one():
    assert AdamW([]).step({}) == 0.0
    (one,) = made = parameters()[:1]
    set_gradients(made, [np.full(one.shape, 2.0, np.float32)])
    assert AdamW(made).step(RATES) == pytest.approx(2 * math.sqrt(12))


def test_a_gradient_of_exactly_the_limit_is_not_clipped():
    """At a norm of 2^-20, scaling by limit / (norm + 1e-6) would halve it."""
    made = parameters()[:1]
    grad = np.zeros(made[0].shape, np.float32)
    grad[0, 0] = 2**-20
    set_gradients(made, [grad])
    AdamW(made, beta1=0.5, max_grad_norm=2**-20).step(RATES)
    assert made[0].m.numpy()[0, 0] == 2**-21


@pytest.mark.parametrize("wrong", [np.inf, np.nan])
def test_a_refused_step_changes_nothing(wrong):
    made = parameters()
    optimizer = AdamW(made)
    set_gradients(made, gradients(1, made))
    before = {name: np.array(x.numpy()) for name, x in optimizer.state_dict().items()}
    with pytest.raises(ValueError, match="learning_rates: no rate for bias, norm$"):
        optimizer.step(dict(linear=1.0))
    made[3].grad.fill(wrong)
    with pytest.raises(UserError, match="the gradient is not finite"):
        optimizer.step(RATES)
    assert optimizer.steps == 0
    for name, x in optimizer.state_dict().items():
        np.testing.assert_array_equal(x.numpy(), before[name], name)


def test_a_loaded_state_continues_bit_by_bit():
    whole = parameters()
    first = AdamW(whole, weight_decay=0.1)
    for step in range(2):
        set_gradients(whole, gradients(step, whole))
        first.step(RATES)
    state = {name: np.array(x.numpy()) for name, x in first.state_dict().items()}
    assert sorted(state) == sorted(f"{what}.{p.name}" for p in whole for what in ("value", "m", "v"))
    made = parameters()
    second = AdamW(made, weight_decay=0.1)
    second.load_state_dict(state, 2)
    assert second.steps == 2 and [p.published for p in made] == [1] * 5
    copied = Tensor(made[1].shape, "float32")
    copied.copy_(made[1].copy)
    np.testing.assert_array_equal(copied.numpy(), rounded(state["value.bb"]))
    for p in made:
        for what in ("value", "m", "v"):
            np.testing.assert_array_equal(getattr(p, what).numpy(), state[f"{what}.{p.name}"])
    for ps, optimizer in ((whole, first), (made, second)):
        set_gradients(ps, gradients(7, ps))
        optimizer.step(RATES)
    for p, q in zip(whole, made):
        np.testing.assert_array_equal(p.value.numpy(), q.value.numpy(), p.name)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda state: state.pop("m.bb"), "belongs to other parameters: m.bb$"),
        (lambda state: state.update({"v.other": state["v.a"]}), "belongs to other parameters: v.other$"),
        (
            lambda state: state.update({"v.dddd": np.zeros((2, 3), np.float32)}),
            r"v.dddd should have shape \[6\], got \[2, 3\]$",
        ),
    ],
)
def test_a_state_of_other_parameters_is_refused(change, words):
    optimizer = AdamW(parameters())
    state = {name: np.array(x.numpy()) + 1 for name, x in optimizer.state_dict().items()}
    change(state)
    with pytest.raises(UserError, match=f"^optimizer state: {words}"):
        optimizer.load_state_dict(state, 3)
    assert optimizer.steps == 0 and not optimizer.parameters[0].m.numpy().any()
