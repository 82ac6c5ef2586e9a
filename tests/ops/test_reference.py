"""The reference itself: every backward against finite differences of its forward, in float64."""

import numpy as np
import pytest
import reference


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def agrees(forward, arguments, gradients, dout, eps=1e-6):
    """Compare the gradient of each argument with finite differences of sum(forward * dout)."""
    for i, gradient in enumerate(gradients):
        if gradient is None:
            continue
        want = np.zeros_like(arguments[i])
        for at in np.ndindex(*arguments[i].shape):
            moved = []
            for sign in (1, -1):
                changed = [np.array(a, copy=True) for a in arguments]
                changed[i][at] += sign * eps
                moved.append((forward(*changed) * dout).sum())
            want[at] = (moved[0] - moved[1]) / (2 * eps)
        np.testing.assert_allclose(gradient, want, rtol=1e-6, atol=1e-7, err_msg=f"argument {i}")


def test_rms_norm():
    x, w, dout = normal(3, 5), normal(5), normal(3, 5, seed=1)
    _, rstd, _ = reference.rms_norm_forward(x, w, 1e-3)
    agrees(
        lambda x, w: reference.rms_norm_forward(x, w, 1e-3)[0],
        [x, w],
        reference.rms_norm_backward(dout, x, rstd, w),
        dout,
    )
    dx, _ = reference.rms_norm_backward(dout, x, rstd, w, dout)
    np.testing.assert_allclose(dx, reference.rms_norm_backward(dout, x, rstd, w)[0] + dout)


def test_rope():
    x, dout, angle = normal(2, 3, 2, 6), normal(2, 3, 2, 6, seed=1), normal(9, 3)
    cos, sin, where = np.cos(angle), np.sin(angle), np.array([[4, 0, 8], [1, 1, 2]])
    for positions in (None, where):
        agrees(
            lambda x, positions=positions: reference.rope_forward(x, cos, sin, positions),
            [x],
            [reference.rope_backward(dout, cos, sin, positions)],
            dout,
        )


def test_lora_linear():
    x, w, b, a, B, dout = (
        normal(4, 3),
        normal(5, 3),
        normal(5),
        normal(2, 3),
        normal(5, 2),
        normal(4, 5, seed=1),
    )
    dx, da, dB, dw, db = reference.lora_linear_backward(
        dout, x, w, a, B, 0.7, train_weight=True, train_bias=True
    )
    agrees(
        lambda x, w, b, a, B: reference.lora_linear_forward(x, w, b, a, B, 0.7)[0],
        [x, w, b, a, B],
        [dx, dw, db, da, dB],
        dout,
    )


def test_swiglu():
    gate, up, dout = normal(3, 4), normal(3, 4, seed=1), normal(3, 4, seed=2)
    agrees(reference.swiglu_forward, [gate, up], reference.swiglu_backward(dout, gate, up), dout)


def test_embedding():
    weight, ids, dout = normal(4, 3), np.array([2, 0, 2]), normal(3, 3, seed=1)
    agrees(
        lambda w: reference.embedding_forward(w, ids),
        [weight],
        [reference.embedding_backward(dout, ids, np.argsort(ids), 4)],
        dout,
    )


def test_linear_cross_entropy():
    x, w, targets, d = normal(4, 3), normal(6, 3), np.array([1, -100, 5, 0]), normal(4, seed=1)
    losses, dx, dw = reference.linear_cross_entropy_backward(x, w, targets, d, train_weight=True)
    agrees(lambda x, w: reference.linear_cross_entropy_forward(x, w, targets)[0], [x, w], [dx, dw], d)
    np.testing.assert_array_equal(losses, reference.linear_cross_entropy_forward(x, w, targets)[0])
    assert losses[1] == 0 and (dx[1] == 0).all()


@pytest.mark.parametrize("boundary", ["split", "wrap", "swap"])
@pytest.mark.parametrize("shift", ["half", "none", "all"])
def test_s2_attention(boundary, shift):
    q, k, v, dout = (
        normal(1, 8, 4, 2),
        normal(1, 8, 2, 2),
        normal(1, 8, 2, 2, seed=1),
        normal(1, 8, 4, 2, seed=1),
    )
    kwargs = dict(group_size=4, boundary=boundary, shift=shift)
    out, lse = reference.s2_attention_forward(q, k, v, **kwargs)
    agrees(
        lambda *a: reference.s2_attention_forward(*a, **kwargs)[0],
        [q, k, v],
        reference.s2_attention_backward(dout, q, k, v, out, lse, **kwargs),
        dout,
    )


def test_s2_attention_packed():
    q, k, v, dout = (
        normal(1, 9, 3, 2),
        normal(1, 9, 1, 2),
        normal(1, 9, 1, 2, seed=1),
        normal(1, 9, 3, 2, seed=1),
    )
    kwargs = dict(group_size=2, cu_seqlens=np.array([0, 4, 4, 9]))
    out, lse = reference.s2_attention_forward(q, k, v, **kwargs)
    agrees(
        lambda *a: reference.s2_attention_forward(*a, **kwargs)[0],
        [q, k, v],
        reference.s2_attention_backward(dout, q, k, v, out, lse, **kwargs),
        dout,
    )


def test_the_rule_written_out():
    """The first key of each query for G = 4 and L = 10, by hand."""
    mask = reference.attention_mask(10, 2, 4)
    assert mask[0].argmax(1).tolist() == [0, 0, 0, 0, 4, 4, 4, 4, 8, 8]
    assert mask[1].argmax(1).tolist() == [0, 0, 2, 2, 2, 2, 6, 6, 6, 6]
    wrap, swap = (reference.attention_mask(8, 2, 4, boundary) for boundary in ("wrap", "swap"))
    assert wrap[1][1].tolist() == [1, 1, 0, 0, 0, 0, 1, 1] and swap[1][6].tolist() == [1, 1, 0, 0, 0, 0, 1, 0]
    assert reference.attention_mask(5, 3, 2)[:, 1].tolist() == [
        [1, 1, 0, 0, 0],
        [0, 1, 0, 0, 0],
        [0, 1, 0, 0, 0],
    ]


def test_adamw_is_gradient_descent_with_its_moments():
    param, m, v = reference.adamw(
        np.array([1.0]), np.zeros(1), np.zeros(1), np.array([0.3]), lr=0.1, step=1, eps=0, weight_decay=0.5
    )
    np.testing.assert_allclose([param[0], m[0], v[0]], [1 * (1 - 0.05) - 0.1, 0.03, 0.00009])
