"""linear_cross_entropy against the reference. It keeps only a chunk of the logits in memory."""

import subprocess
import sys

import checks
import numpy as np
import pytest

from longlora import ops


def targets_of(M, V, ignored=0.2):
    random = np.random.default_rng(0)
    return np.where(random.random(M) < ignored, -100, random.integers(0, V, M)).astype(np.int32)


def check_rounded(x, w, targets, dtype):
    """Compare with the reference.

    The plain computation is in float32 and rounds the gradient of the logits to the dtype between products.
    """
    M = len(targets)
    checks.check("linear_cross_entropy_forward", x, w, targets, floor=16)
    d = checks.random((M,), seed=2)
    losses, dx, dw = ops.linear_cross_entropy_backward(x, w, targets, d, train_weight=True)
    want = checks.reference.linear_cross_entropy_backward(x, w, targets, d, train_weight=True)
    x32, w32 = x.astype(np.float32), w.astype(np.float32)
    low, lse = checks.plain("linear_cross_entropy_forward", x, w, targets)
    g, kept = np.exp(x32 @ w32.T - lse[:, None]), targets != -100
    g[np.arange(M)[kept], targets[kept]] -= 1
    g = (g * np.where(kept, d, 0)[:, None]).astype(checks.DTYPES[dtype]).astype(np.float32)
    checks.compare(losses, want[0], low, "losses", 16)
    checks.compare(dx, want[1], g @ w32, "dx", 8)
    checks.compare(dw, want[2], g.T @ x32, "dweight", 8)
    assert (dx[~kept].astype(np.float32) == 0).all() and (losses[~kept] == 0).all()


@pytest.mark.parametrize(
    "M,C,V", [(0, 4, 5), (1, 1, 1), (7, 33, 123), (65, 64, 1000), (100, 16, 257), (3, 8, 60007)]
)
def test_forward_and_backward(M, C, V, dtype, isa, poison):
    """A GPU reads a row of 60007 in fifteen parts. The last does not fit in the shared memory of any GPU."""
    x, w, targets = (
        checks.strided(checks.random((M, C), dtype)),
        checks.strided(checks.random((V, C), dtype, 1)),
        targets_of(M, V),
    )
    check_rounded(x, w, targets, dtype)


def test_dweight_accumulates(place):
    x, w, targets, d = (
        checks.random((9, 8)),
        checks.random((20, 8), seed=1),
        targets_of(9, 20),
        checks.random((9,), seed=2),
    )
    losses, dx, dw = ops.linear_cross_entropy_backward(x, w, targets, d, train_weight=True)
    twice = dw.copy()
    ops._C.linear_cross_entropy_backward(losses, dx, twice, x, w, targets, d, -100)
    np.testing.assert_allclose(twice, 2 * dw, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("exponent", [-30, -15, 16])
def test_gradients_of_losses_of_any_size(exponent, dtype, isa, poison):
    """Scaling dlosses by a power of two scales both gradients exactly, as far as dx can represent them.

    For the mean over 32768 tokens and probabilities of 2^-12, gradients of logits are too small for float16;
    for a loss scale of 2^16 they are too large.
    """
    M, C, V = 8, 16, 4096
    x, w = (
        checks.random((M, C), dtype, scale=2**-7),
        (checks.random((V, C), seed=1, scale=2**-4) + 2).astype(checks.DTYPES[dtype]),
    )
    targets, d = targets_of(M, V), (checks.random((M,), seed=2) + 4).astype(np.float32)
    _, dx, dw = ops.linear_cross_entropy_backward(x, w, targets, d, train_weight=True)
    d[targets == -100] = 1e30  # not used: the target is ignored
    _, dx_scaled, dw_scaled = ops.linear_cross_entropy_backward(
        x, w, targets, np.ldexp(d, exponent), train_weight=True
    )
    np.testing.assert_array_equal(dw_scaled, np.ldexp(dw, exponent))
    want = np.ldexp(dx.astype(np.float32), exponent)
    np.testing.assert_allclose(
        dx_scaled.astype(np.float32), want, rtol=0, atol=2.0**-24 if dtype == "float16" else 0
    )


def check_backward(x, w, targets, d, trained, atol=1e-5):
    losses, _ = checks.check("linear_cross_entropy_forward", x, w, targets, floor=16)
    again, dx, dw = ops.linear_cross_entropy_backward(x, w, targets, d, train_weight=trained)
    want = checks.reference.linear_cross_entropy_backward(x, w, targets, d, train_weight=True)
    np.testing.assert_array_equal(again, losses)
    np.testing.assert_allclose(dx, want[1], atol=atol)
    if trained:
        np.testing.assert_allclose(dw, want[2], atol=10 * atol)


def chunk_bytes(M, C, V, dtype, trained):
    """The bytes of the block that holds a chunk. A backward pass allocates it first."""
    tensor = ops._C.Tensor
    x, rows = tensor((M, C), dtype), tensor((M,), "float32")
    dweight = tensor((V, C), "float32") if trained else None
    args = rows, x, dweight, x, tensor((V, C), dtype), tensor((M,), "int32"), rows, -100
    return ops._C.scratch("linear_cross_entropy_backward", *args)[0]


@pytest.mark.parametrize("M,V,trained", [(237, 70001, True), (1099, 2500, False)])
def test_more_than_one_chunk(M, V, trained, cpu_isa):
    """237 rows of a trained head: 112 in the first chunk, 125 in the second. A unit has 16 rows.

    1099 rows of a frozen head: three chunks of at most 512 rows.
    """
    C = 8
    rows, logits = chunk_bytes(512, C, V, "float32", trained), 4 * M * V
    assert chunk_bytes(M, C, V, "float32", trained) <= min(rows, logits - 1)
    x, w, d = checks.random((M, C)), checks.random((V, C), seed=1), checks.random((M,), seed=2)
    check_backward(x, w, targets_of(M, V), d, trained)


def test_more_rows_than_a_gpu_takes_at_once(dtype, place):
    """A GPU takes at most 2048 rows at a time, here 1088 and then 1012. Each part needs its own targets."""
    x, w = checks.random((2100, 8), dtype), checks.random((37, 8), dtype, 1)
    check_rounded(x, w, targets_of(2100, 37), dtype)


def test_more_than_one_chunk_of_kept_bfloat16(cpu_isa):
    """A chunk keeps the exponentials of the whole vocabulary in 16 bits. Here 128 of the 133 rows fit."""
    M, C, V = 133, 8, 200001
    rows, kept = chunk_bytes(128, C, V, "bfloat16", True), 2 * M * V
    assert chunk_bytes(M, C, V, "bfloat16", True) < min(rows, kept)
    check_rounded(
        checks.random((M, C), "bfloat16"), checks.random((V, C), "bfloat16", 1), targets_of(M, V), "bfloat16"
    )


@pytest.mark.parametrize("trained", [True, False])
def test_a_maximum_that_grows_along_the_vocabulary(trained, isa, poison):
    """Logits rise or fall by up to 210 along the vocabulary.

    In every seventh row the target has the largest logit, so loss and gradient are close to 0.
    """
    M, C, V = 41, 9, 7001
    x, w = checks.random((M, C)), checks.random((V, C), seed=1)
    x[:, 0], w[:, 0] = np.linspace(-3, 3, M), np.linspace(0, 70, V)
    x, w = np.round(8 * x) / 8, np.round(8 * w) / 8  # logits without rounding errors
    targets, d = targets_of(M, V), checks.random((M,), seed=2)
    targets[::7] = (x @ w.T).argmax(1)[::7]
    check_backward(x, w, targets, d, trained, atol=7e-5)  # the largest weight is 70


@pytest.mark.parametrize("trained", [False, True])
def test_rows_before_and_after_the_answers_are_left_out(trained, dtype, poison):
    """On the CPU, whole units of ignored rows at both ends of a chunk are not read, whatever they hold."""
    M, C, V, answers = 80, 24, 123, slice(32, 48)
    x, w, d = checks.random((M, C), dtype), checks.random((V, C), dtype, 1), checks.random((M,), seed=2)
    targets = np.full(M, -100, np.int32)
    targets[40:44] = 7
    x[:32] = x[48:] = np.nan
    losses, dx, *dw = ops.linear_cross_entropy_backward(x, w, targets, d, train_weight=trained)
    alone = ops.linear_cross_entropy_backward(
        x[answers], w, targets[answers], d[answers], train_weight=trained
    )
    assert losses[answers].tobytes() == alone[0].tobytes() and dx[answers].tobytes() == alone[1].tobytes()
    assert [x.tobytes() for x in dw if x is not None] == [x.tobytes() for x in alone[2:] if x is not None]
    rest = np.delete(np.arange(M), np.r_[answers])
    assert (losses[rest] == 0).all() and (dx[rest].astype(np.float32) == 0).all()


def test_large_logits(isa):
    """The largest one may be far above those of the 128 tokens before."""
    x, w = checks.random((5, 8), scale=300), checks.random((300, 8), seed=1, scale=30)
    checks.check("linear_cross_entropy_forward", x, w, targets_of(5, 300, 0), floor=16)


def test_same_bits_for_any_number_of_threads(dtype, place, each_thread_count):
    x, w, targets, d = (
        checks.random((77, 40), dtype),
        checks.random((999, 40), dtype, 1),
        targets_of(77, 999),
        checks.random((77,), seed=2),
    )
    results = each_thread_count(
        lambda: ops.linear_cross_entropy_backward(x, w, targets, d, train_weight=True)
    )
    for result in results[1:]:
        for got, want in zip(result, results[0]):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("bad", [5, -1, -101])
def test_a_target_out_of_range_is_named(bad):
    with pytest.raises(ValueError, match=rf"targets\[1\] should be 0..4 .*{bad}"):
        ops.linear_cross_entropy_forward(
            checks.random((2, 3)), checks.random((5, 3)), np.array([0, bad], np.int32)
        )


@pytest.mark.parametrize("bad", [5, -1, -101, 2**31 - 1])
def test_a_target_out_of_range_has_a_loss_of_nan_on_cuda(bad, cuda, poison):
    x, w, d = checks.random((4, 16)), checks.random((5, 16), seed=1), checks.random((4,), seed=2)
    targets, rest = np.array([1, bad, -100, 4], np.int32), [0, 2, 3]
    losses, _ = ops.linear_cross_entropy_forward(x, w, targets)
    again, dx, _ = ops.linear_cross_entropy_backward(x, w, targets, d, train_weight=True)
    assert np.isnan(losses[1]) and np.isnan(again[1])
    want, want_dx, _ = ops.linear_cross_entropy_backward(
        x, w, np.where(targets == bad, -100, targets).astype(np.int32), d
    )
    np.testing.assert_array_equal(again[rest], want[rest])
    np.testing.assert_array_equal(dx[rest], want_dx[rest])


@pytest.mark.parametrize("trained, limit", [(True, 64), (False, 20)])
@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_memory_does_not_grow_with_the_rows(kind, trained, limit):
    """The peak of extra memory in MiB, beside arguments and results."""
    code = """
import sys
import ml_dtypes
import numpy as np
from longlora import job, ops
def high():
    return job.peak_memory() >> 10
V, C = 128256, 16
w = np.random.default_rng(0).standard_normal((V, C), np.float32).astype(np.dtype(sys.argv[1]))
for M in (128, 512):
    x, t = np.ones((M, C), w.dtype), np.zeros(M, np.int32)
    d = np.ones(M, np.float32)
    losses, dx = np.ones(M, np.float32), np.ones_like(x)
    dw = np.ones((V, C), np.float32) if sys.argv[2] == "True" else None
    before = high()
    ops._C.linear_cross_entropy_backward(losses, dx, dw, x, w, t, d, -100)
    assert high() - before < int(sys.argv[3]) * 1024 + 4096 * (M == 128), high() - before
"""
    subprocess.run([sys.executable, "-c", code, kind, str(trained), str(limit)], check=True, timeout=1200)
