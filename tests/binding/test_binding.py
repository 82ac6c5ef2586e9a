"""Arguments of ops: which NumPy arrays they accept, and how they refuse others; references; the module."""

import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from longlora import _C, ops

BF16 = ml_dtypes.bfloat16


def f32(*shape):
    return np.random.default_rng(list(shape)).standard_normal(shape).astype(np.float32)


# ---- layouts -------------------------------------------------------------------------------------


def test_numpy_layouts():
    x = f32(6, 8)
    want = ops.cast(x, "float32")
    np.testing.assert_array_equal(want, x)
    for same in (
        np.pad(x, ((0, 0), (3, 5)))[:, 3:11],
        np.ascontiguousarray(x[::-1])[::-1],
        np.repeat(x, 2, axis=0)[::2],
    ):
        np.testing.assert_array_equal(ops.cast(same, "float32"), x)
    for same in (
        np.asfortranarray(x),
        np.ascontiguousarray(x[:, ::-1])[:, ::-1],
        np.repeat(x, 3, axis=1)[:, ::3],
    ):
        np.testing.assert_array_equal(ops.matmul(np.eye(6, dtype=np.float32), same), x)
        with pytest.raises(ValueError, match=r"cast: x axis 1 should be dense \(stride 1\), got stride"):
            ops.cast(same, "float32")
    row = np.broadcast_to(x[0], (5, 8))
    np.testing.assert_array_equal(ops.cast(row, "float32"), row)
    one = np.lib.stride_tricks.as_strided(
        x, (6, 1), (32, 12)
    )  # the stride of an axis of size 1 means nothing
    np.testing.assert_array_equal(ops.cast(one, "float32"), x[:, :1])
    for empty in (np.empty((0, 8), np.float32), np.empty((6, 0), np.float32)):
        assert ops.cast(empty, "bfloat16").shape == empty.shape


def test_bfloat16_by_ml_dtypes():
    x = f32(3, 5).astype(BF16)
    assert ops.cast(x, "bfloat16").dtype == BF16
    np.testing.assert_array_equal(ops.cast(x, "float32"), x.astype(np.float32))


def test_rows_may_have_several_axes():
    """[2,1,3,C] is accepted as [6,C], and [2,1,3] as [6], if the leading axes are contiguous."""
    x, w, ids = f32(6, 8), f32(8), np.array([[1, 0, 3], [2, 2, 1]], np.int32)
    want = ops.rms_norm_forward(x, w)
    out, rstd = np.full((2, 1, 3, 8), np.nan, np.float32), np.full((2, 1, 3), np.nan, np.float32)
    _C.rms_norm_forward(out, rstd, None, x.reshape(out.shape), None, w, 1e-6)
    np.testing.assert_array_equal(out.reshape(6, 8), want[0])
    np.testing.assert_array_equal(rstd.reshape(6), want[1])
    wide = np.full((2, 3, 11), np.nan, np.float32)  # rows with equal gaps
    _C.embedding_forward(wide[:, :, 2:10], x, ids)
    np.testing.assert_array_equal(wide[:, :, 2:10], x[ids])
    assert np.isnan(wide[:, :, :2]).all() and np.isnan(wide[:, :, 10:]).all()
    none = np.empty((2, 0, 8), np.float32)
    _C.swiglu_forward(none, none.copy(), none.copy())


@pytest.mark.parametrize(
    "call",
    [
        lambda x, ids, row: [ops.matmul(x, f32(8, 5)), ops.embedding_forward(f32(9, 8), ids)],
        lambda x, ids, row: [ops.embedding_backward(x, ids, ids, 9)],
        lambda x, ids, row: [
            *ops.rms_norm_forward(x, f32(8), residual=x),
            *ops.rms_norm_backward(x, x, row, f32(8), x),
        ],
        lambda x, ids, row: [*ops.lora_linear_forward(x, f32(5, 8), f32(5), f32(2, 8), f32(5, 2))],
        lambda x, ids, row: [*ops.lora_linear_backward(x, x, f32(8, 8), f32(2, 8), f32(8, 2))],
        lambda x, ids, row: [ops.swiglu_forward(x, x), *ops.swiglu_backward(x, x, x), ops.cast(x, "float16")],
        lambda x, ids, row: [
            *ops.linear_cross_entropy_forward(x, f32(9, 8), ids),
            *ops.linear_cross_entropy_backward(x, f32(9, 8), ids, row),
        ],
    ],
)
def test_every_op_takes_rows_of_several_axes(call):
    x, ids, row = f32(2, 3, 8), np.arange(6, dtype=np.int32).reshape(2, 3), np.abs(f32(2, 3))
    for got, want in zip(
        call(x, ids, row), call(x.reshape(6, 8), ids.reshape(6), row.reshape(6)), strict=True
    ):
        assert (want is None) == (got is None)
        if want is not None:
            assert got.shape == (2, 3, *want.shape[1:]) or got.shape == want.shape
            np.testing.assert_array_equal(got.reshape(want.shape), want)


@pytest.mark.parametrize(
    "gate, up, out, words",
    [
        ((2, 3), (3, 2), (6,), "gate axis 1 should be 2 like up's, got 3"),
        ((6,), (2, 3), (3, 2), "out axis 1 should be 3 like up's, got 2"),
        ((2, 1, 3), (2, 3), (6,), "gate should have 2 leading axes like up, got 3"),
        ((2, 3), (2, 3), (5,), "out axis 0 should be M=6, got 5"),
    ],
)
def test_rows_of_several_axes_that_differ(gate, up, out, words):
    out = np.full((*out, 8), np.nan, np.float32)
    with pytest.raises(ValueError, match="^swiglu_forward: " + words):
        _C.swiglu_forward(out, f32(*gate, 8), f32(*up, 8))
    assert np.isnan(out).all()


def test_rows_of_several_axes_that_are_not_contiguous():
    x, out = f32(3, 2, 8).transpose(1, 0, 2), np.full((2, 3, 8), np.nan, np.float32)
    with pytest.raises(ValueError, match=r"up axes 0..1 .* the stride of axis 0 should be 48, got 8"):
        _C.swiglu_forward(out, x, x)
    with pytest.raises(ValueError, match=r"out axes 0..1 .* the stride of axis 0 should be 33, got 44"):
        _C.swiglu_forward(np.empty((2, 4, 11), np.float32)[:, :3, :8], f32(2, 3, 8), f32(2, 3, 8))
    assert np.isnan(out).all()


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


def unaligned(x):
    bytes_ = np.empty(x.nbytes + 1, np.uint8)
    view = bytes_[1:].view(x.dtype).reshape(x.shape)
    view[...] = x
    return view


def field_of_packed(x, count):
    """x as a field of packed structures of `count` numbers and a byte. No stride is a multiple of 4 bytes."""
    structure = [("number", np.float32, (count,)), ("byte", np.uint8)]
    packed = np.zeros((x.shape[0], x.shape[1] // count), structure)["number"]
    packed[...] = x.reshape(packed.shape)
    return packed[..., 0] if count == 1 else packed[:, 0]


@pytest.mark.parametrize(
    "change, error, words",
    [
        (
            dict(x=lambda x: field_of_packed(x, 1)),
            ValueError,
            "x axis 1 has a stride that is not a multiple of the",
        ),
        (
            dict(x=lambda x: field_of_packed(x, 8)),
            ValueError,
            "x axis 0 has a stride that is not a multiple of the",
        ),
        (dict(x=lambda x: x.astype(">f4")), TypeError, "x is not in the machine's byte order"),
        (dict(x=lambda x: x.astype(np.complex64)), TypeError, "x has dtype complex64, which no op takes"),
        (
            dict(x=lambda x: x.astype(np.int32)),
            TypeError,
            "x should be float32, bfloat16 or float16, got int32",
        ),
        (dict(x=lambda x: x.astype(np.float16)), TypeError, "x should be float32 like out, got float16"),
        (dict(x=unaligned), ValueError, "x is not aligned"),
        (dict(x=lambda x: x[0]), ValueError, "x should have 2 axes, got 1"),
        (dict(x=lambda x: x.reshape(4, 2, 1, 2, 2)), ValueError, "x should have 2 axes, got 5"),
        (dict(x=lambda x: None), TypeError, "x must be an array, got None"),
        (dict(x=lambda x: "text"), TypeError, "x must be an array .*, got <class 'str'>"),
        (dict(weight=lambda w: w[:7]), ValueError, "weight axis 0 should be C=8, got 7"),
        (dict(rstd=lambda r: r.astype(np.float64)), TypeError, "rstd should be float32, got float64"),
        (dict(rstd=lambda r: r[:3]), ValueError, "rstd axis 0 should be M=4, got 3"),
        (dict(out=lambda o: o[:, :7]), ValueError, "out axis 1 should be C=8, got 7"),
        (dict(out=read_only), ValueError, "out is an output and read-only"),
        (
            dict(out=lambda o: np.lib.stride_tricks.as_strided(o, (4, 8), (0, 4))),
            ValueError,
            "out is an output and has elements",
        ),
        (
            dict(out=lambda o: np.lib.stride_tricks.as_strided(o, (4, 8), (16, 4))),
            ValueError,
            "out is an output and has elements",
        ),
        (dict(eps=lambda e: "small"), TypeError, "eps should be a number, got 'small'"),
        (dict(eps=lambda e: None), TypeError, "eps should be a number, got None"),
    ],
)
def test_what_is_refused_is_named_and_nothing_written(change, error, words):
    given = dict(
        out=np.full((4, 8), np.nan, np.float32),
        rstd=np.full(4, np.nan, np.float32),
        sum=None,
        x=f32(4, 8),
        residual=None,
        weight=f32(8),
        eps=1e-6,
    )
    outputs = given["out"], given["rstd"]
    given |= {name: f(given[name]) for name, f in change.items()}
    with pytest.raises(error, match="^rms_norm_forward: " + words):
        _C.rms_norm_forward(*given.values())
    assert all(np.isnan(x).all() for x in outputs)


def test_counts_of_arguments():
    for arguments in ((), (f32(2, 2),), (f32(2, 2),) * 3):
        with pytest.raises(TypeError, match=rf"cast: takes 2 arguments \(out.*\), got {len(arguments)}"):
            _C.cast(*arguments)
    with pytest.raises(TypeError, match="takes no keyword arguments"):
        _C.cast(out=f32(2, 2), x=f32(2, 2))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1.5, "4", 2**80])
def test_integers_are_integers(value):
    q = f32(1, 4, 2, 8)
    with pytest.raises(
        (TypeError, OverflowError), match="s2_attention_forward: group_size should be an integer, got"
    ):
        ops.s2_attention_forward(q, q, q, group_size=value)


def test_what_the_spec_cannot_say_is_refused_by_the_kernels():
    def refused(words, function, *args, **kwargs):
        with pytest.raises(ValueError, match=words):
            function(*args, **kwargs)

    q, k = f32(1, 8, 3, 8), f32(1, 8, 2, 8)
    ids = np.array([0, 7], np.int32)
    refused("s2_attention_forward: ", ops.s2_attention_forward, q, k, k, group_size=4)  # K does not divide H
    refused("s2_attention_forward: ", ops.s2_attention_forward, q, q, q, group_size=0)
    refused("s2_attention_forward: ", ops.s2_attention_forward, q, q, q, group_size=3, boundary="wrap")
    refused(
        "s2_attention_forward: boundary should be one of",
        ops.s2_attention_forward,
        q,
        q,
        q,
        group_size=4,
        boundary="leap",
    )
    for cu in ([0, 5, 4, 8], [1, 8], [0, 9], [0, 4]):
        refused(
            "s2_attention_forward: ",
            ops.s2_attention_forward,
            q,
            q,
            q,
            group_size=4,
            cu_seqlens=np.array(cu, np.int32),
        )
    refused("rope_forward: ", ops.rope_forward, f32(1, 4, 2, 7), f32(9, 3), f32(9, 3))  # odd D
    refused("rope_forward: ", ops.rope_forward, f32(1, 4, 2, 8), f32(3, 4), f32(3, 4))  # a table too short
    refused("embedding_forward: ", ops.embedding_forward, f32(7, 4), ids)
    refused("embedding_forward: ", ops.embedding_forward, f32(7, 4), -ids)
    refused("linear_cross_entropy_forward: ", ops.linear_cross_entropy_forward, f32(2, 4), f32(7, 4), ids)


def test_overlaps():
    def gate_up(gate, up, dgate, dup):
        _C.swiglu_backward(dgate, dup, f32(4, 6), gate, up)

    both, grad = f32(4, 12), np.empty((4, 12), np.float32)
    gate_up(both[:, :6], both[:, 6:], grad[:, :6], grad[:, 6:])  # column ranges of one matrix do not overlap
    np.testing.assert_array_equal(
        grad, np.concatenate(ops.swiglu_backward(f32(4, 6), both[:, :6], both[:, 6:]), 1)
    )
    gate_up(both[:, :6], both[:, 6:], both[:, :6], both[:, 6:])  # ~ allows the inputs themselves
    np.testing.assert_array_equal(grad, both)
    for dgate, dup, words in (
        (grad[:, :6], grad[:, 5:11], "dgate is an output and overlaps dup"),
        (grad[:, :6], grad[:, :6], "dgate is an output and overlaps dup"),
        (both[:, 1:7], grad[:, 6:], "dgate is an output and overlaps gate"),
    ):
        with pytest.raises(ValueError, match="swiglu_backward: " + words):
            gate_up(both[:, :6], both[:, 6:], dgate, dup)
    x = f32(9, 8)
    with pytest.raises(ValueError, match="cast: out is an output and overlaps x"):
        _C.cast(x[1:], x[:-1])
    with pytest.raises(ValueError, match="cast: out is an output and overlaps x"):
        _C.cast(x[::-1], x)
    with pytest.raises(
        ValueError, match="cast: out is an output and overlaps x"
    ):  # the same bytes as another dtype
        _C.cast(x[:4].view(np.float16)[:, :8], x[:4])


def test_q_k_v_in_one_matrix_are_apart():
    B, T, H, K, D = 2, 6, 4, 2, 8
    packed, grads = f32(B, T, (H + 2 * K) * D), np.full((B, T, (H + 2 * K) * D), np.nan, np.float32)
    split = [slice(0, H * D), slice(H * D, (H + K) * D), slice((H + K) * D, None)]

    def heads(x):
        return np.lib.stride_tricks.as_strided(x, (B, T, x.shape[-1] // D, D), (*x.strides[:2], 4 * D, 4))

    (q, k, v), (dq, dk, dv) = ([heads(x[..., columns]) for columns in split] for x in (packed, grads))
    out, lse = ops.s2_attention_forward(q, k, v, group_size=4)
    dout = f32(B, T, H, D)
    _C.s2_attention_backward(dq, dk, dv, dout, q, k, v, out, lse, None, 4, 0, 0, D**-0.5)
    grads = ops.s2_attention_backward(dout, q, k, v, out, lse, group_size=4)
    for got, want in zip((dq, dk, dv), grads, strict=True):
        np.testing.assert_array_equal(got, want)
    with pytest.raises(ValueError, match="dq is an output and overlaps dk"):
        _C.s2_attention_backward(dq, dq[:, :, 2:], dv, dout, q, k, v, out, lse, None, 4, 0, 0, D**-0.5)


# ---- references and the module -------------------------------------------------------------------


def test_references_are_given_back():
    x, w = f32(4, 8), f32(8)
    before = [sys.getrefcount(a) for a in (x, w)]
    for _ in range(10):
        ops.rms_norm_forward(x, w)
        with pytest.raises(ValueError):
            ops.rms_norm_forward(x, w[:3])
    assert [sys.getrefcount(a) for a in (x, w)] == before


def test_every_op_says_its_spec():
    for name, spec in _C.specs.items():
        assert getattr(_C, name).__doc__ == spec and getattr(_C, name).__name__ == name
    before = _C.calls()
    ops.cast(f32(2, 2), "float16")
    after = _C.calls()
    assert after["cast"] == before["cast"] + 1 and set(after) == set(_C.specs)


def test_loaded_twice_is_refused():
    script = """
import sys, longlora.ops
del sys.modules["longlora._C"]
try:
    import longlora._C
except ImportError as error:
    assert "once" in str(error), error
else:
    raise SystemExit("a second copy was loaded")
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_rounds_of_peak_are_counted():
    assert _C.peak(2000) == 2 * _C.peak(1000) > 0
    for wrong, error in ((0, ValueError), (-1, ValueError), (1.5, TypeError), (1 << 70, OverflowError)):
        with pytest.raises(error):
            _C.peak(wrong)
