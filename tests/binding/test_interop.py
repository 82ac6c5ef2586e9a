"""Ops on JAX and CuPy arrays: no copies, results of the same kind, no writes to immutable arrays."""

import checks
import numpy as np
import pytest
import reference

from longlora import Tensor, cuda, ops

try:
    import jax

    jnp = jax.numpy
except ImportError:
    jax = None
needs_jax = pytest.mark.skipif(jax is None, reason="these tests pass JAX arrays")


@pytest.fixture
def cupy():
    if not cuda.is_available():
        pytest.skip(f"CuPy arrays need a GPU: {cuda.reason()}")
    return pytest.importorskip("cupy", reason="these tests pass CuPy arrays")


def arrays(*shapes, dtype="float32"):
    made = [checks.random(shape, dtype, seed) for seed, shape in enumerate(shapes)]
    return made, [jnp.asarray(x) for x in made]


@needs_jax
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_on_jax(dtype):
    (q, k, v), given = arrays((1, 37, 4, 8), (1, 37, 2, 8), (1, 37, 2, 8), dtype=dtype)
    out, lse = ops.s2_attention_forward(*given, group_size=8)
    assert isinstance(out, jax.Array) and out.dtype == given[0].dtype and lse.dtype == jnp.float32
    want, _ = reference.s2_attention_forward(q, k, v, group_size=8)
    low, _ = checks.plain("s2_attention_forward", q, k, v, group_size=8)
    checks.compare(np.asarray(out), want, low, floor=4)
    grads = ops.s2_attention_backward(out, *given, out, lse, group_size=8)
    assert all(isinstance(g, jax.Array) and g.shape == x.shape for g, x in zip(grads, given, strict=True))
    assert all(np.array_equal(np.asarray(g), x) for g, x in zip(given, (q, k, v), strict=True)), (
        "an input was written to"
    )


@needs_jax
def test_other_ops_on_jax():
    (x, weight, other), (jx, jweight, jother) = arrays((9, 16), (16,), (5, 16))
    out, rstd, total = ops.rms_norm_forward(jx, jweight)
    assert total is jx and isinstance(out, jax.Array)
    checks.compare(
        np.asarray(out), *(f("rms_norm_forward", x, weight)[0] for f in (named, checks.plain)), floor=4
    )
    y, _ = ops.lora_linear_forward(jx, jother)
    assert isinstance(y, jax.Array)
    checks.compare(
        np.asarray(y),
        *(f("lora_linear_forward", x, other)[0] for f in (named, checks.plain)),
        noise=checks.noise_of("lora_linear_forward", x, other)[0],
    )


def named(name, *inputs):
    return getattr(reference, name)(*inputs)


@needs_jax
def test_results_share_their_memory():
    """A result shares the memory that the kernel wrote."""
    _, (x,) = arrays((64, 64))
    gate = ops.swiglu_forward(x, x)
    assert isinstance(gate, jax.Array)
    there = Tensor((64, 64), "float32")
    there.fill(2)
    assert jnp.from_dlpack(there).unsafe_buffer_pointer() == np.from_dlpack(there).ctypes.data


@needs_jax
def test_an_immutable_output_is_refused():
    _, (x,) = arrays((4, 4))
    before = np.array(x)
    with pytest.raises((BufferError, ValueError, TypeError), match="out"):
        ops.accumulate(x, x)
    assert np.array_equal(np.asarray(x), before)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_attention_on_cupy(cupy, dtype):
    q, k, v = (
        checks.random(shape, dtype, seed)
        for seed, shape in enumerate([(1, 37, 4, 8), (1, 37, 2, 8), (1, 37, 2, 8)])
    )
    given = [cupy.asarray(x) for x in (q, k, v)]
    out, lse = ops.s2_attention_forward(*given, group_size=8)
    assert isinstance(out, cupy.ndarray) and out.dtype == given[0].dtype and lse.dtype == np.float32
    want, _ = reference.s2_attention_forward(q, k, v, group_size=8)
    low, _ = checks.plain("s2_attention_forward", q, k, v, group_size=8)
    checks.compare(cupy.asnumpy(out), want, low, floor=4)
    grads = ops.s2_attention_backward(out, *given, out, lse, group_size=8)
    assert all(
        isinstance(g, cupy.ndarray) and g.shape == x.shape and cupy.isfinite(g).all()
        for g, x in zip(grads, given, strict=True)
    )


def test_cupys_memory_and_stream_are_used(cupy):
    """An output of the caller is written in place, after earlier work on its stream."""
    stream, x, total = (
        cupy.cuda.Stream(non_blocking=True),
        cupy.zeros((512, 512), "float32"),
        cupy.ones((512, 512), "float32"),
    )
    cupy.cuda.Device().synchronize()
    with stream:
        for _ in range(50):
            x += 1
        assert ops.accumulate(total, x, 2.0) is total
    stream.synchronize()
    assert (total == 101).all()
