"""adamw against the reference and against torch."""

import checks
import numpy as np
import pytest

from longlora import ops


@pytest.mark.parametrize("N", [0, 1, 7, 123, 8193])
def test_against_the_reference(N, isa):
    param, m, grad = (checks.random((N,), seed=seed) for seed in range(3))
    v, copy = checks.random((N,), seed=3) ** 2, np.full(N, np.nan, checks.DTYPES["bfloat16"])
    kwargs = dict(lr=0.01, step=3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, grad_scale=0.5)
    want, low = (
        checks.reference.adamw(param, m, v, grad, **kwargs),
        checks.plain("adamw", param, m, v, grad, **kwargs),
    )
    # Where a number and its change cancel, eight roundings of the two; v has no signs.
    noise = [8 * 2.0**-24 * (np.abs(x) + np.abs(w - x)).max(initial=0) for x, w in zip((param, m, v), want)]
    ops.adamw(param, m, v, grad, copy=copy, **kwargs)
    for got, w, p, n in zip((param, m, v), want, low, noise, strict=True):
        checks.compare(got, w, p, floor=4, noise=n)
    np.testing.assert_array_equal(copy, param.astype(copy.dtype))


@pytest.mark.parametrize("to", list(checks.DTYPES))
@pytest.mark.parametrize("N", [4, 1024, 4100])
def test_a_view_gives_the_bits_of_its_copy(N, to, isa):
    results = []
    for start in (0, 1):
        param, m, v, grad = (
            np.concatenate([x[:start], x])[start:]
            for x in (checks.random((N,), seed=seed) for seed in range(4))
        )
        v *= v
        copy = np.full(N + start, np.nan, checks.DTYPES[to])[start:]
        ops.adamw(param, m, v, grad, lr=0.01, step=3, weight_decay=0.1, copy=copy)
        assert copy.tobytes() == param.astype(copy.dtype).tobytes()
        results.append([x.tobytes() for x in (param, m, v)])
    assert results[0] == results[1]


def test_against_torch(place):
    torch = pytest.importorskip("torch", reason="torch is the peer compared with")
    start = checks.random((1000,))
    theirs = torch.nn.Parameter(torch.tensor(start.copy()))
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    param, m, v = start.copy(), np.zeros(1000, np.float32), np.zeros(1000, np.float32)
    for step in range(1, 11):
        grad = checks.random((1000,), seed=step)
        theirs.grad = torch.tensor(grad)
        optimizer.step()
        ops.adamw(param, m, v, grad, lr=1e-2, step=step, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
    np.testing.assert_allclose(param, theirs.detach().numpy(), rtol=1e-5, atol=1e-7)
    for got, name in ((m, "exp_avg"), (v, "exp_avg_sq")):  # a factor on all gradients shows only here
        np.testing.assert_allclose(got, optimizer.state[theirs][name].numpy(), rtol=1e-5, atol=1e-7)


def test_step_counts_from_one(place):
    x = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match="step should be at least 1"):
        ops.adamw(x, x.copy(), x.copy(), x.copy(), lr=1e-3, step=0)
