"""The border: which arrays ops and Tensor take and give, what must be refused and how, and that nothing leaks."""

import ctypes
import gc
import os
import re
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from dlpack import (
    CapsuleDestructor,
    Deleter,
    DLTensor,
    Old,
    Versioned,
    capsule_pointer,
    new_capsule,
    python_api,
    raw_is_valid,
)

from longlora import _C, Tensor, arrays, ops

BF16 = ml_dtypes.bfloat16


# ---- producers of our own, in ctypes, that count what is deleted ---------------------------------


class Producer:
    """A float32 array behind DLPack. `old` knows no keywords; the rest of the arguments falsify what the capsule says."""

    def __init__(self, array, old=False, flags=0, major=1, byte_offset=0, null_strides=False, **tensor):
        self.array, self.old, self.flags, self.major = np.ascontiguousarray(array), old, flags, major
        self.shape, self.dtype = array.shape, array.dtype
        self.deleted = self.capsules = 0
        n = array.ndim
        self.c_shape = (ctypes.c_int64 * n)(*array.shape)
        self.c_strides = (ctypes.c_int64 * n)(*[s // array.itemsize for s in self.array.strides])
        said = dict(
            data=self.array.ctypes.data - byte_offset,
            device_type=1,
            device_id=0,
            ndim=n,
            code=2,
            bits=32,
            lanes=1,
            shape=self.c_shape,
            strides=None if null_strides else self.c_strides,
            byte_offset=byte_offset,
        )
        self.tensor = DLTensor(**{**said, **tensor})
        self.deleter = Deleter(self._delete)
        self.name = b"dltensor" if old else b"dltensor_versioned"
        self.destructor = CapsuleDestructor(
            lambda capsule: self.deleter(None) if raw_is_valid(capsule, self.name) else None
        )

    def _delete(self, managed):
        self.deleted += 1

    def __dlpack__(self, **keywords):
        if self.old and keywords:
            raise TypeError("__dlpack__() got an unexpected keyword argument 'max_version'")
        self.capsules += 1
        self.managed = (
            Old(self.tensor, None, self.deleter)
            if self.old
            else Versioned(self.major, 0, None, self.deleter, self.flags, self.tensor)
        )
        return new_capsule(ctypes.addressof(self.managed), self.name, self.destructor)

    def __array_namespace__(self):
        return np


def f32(*shape):
    return np.random.default_rng(list(shape)).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("old", [False, True])
def test_capsules_are_borrowed_and_deleted_once(old):
    x = f32(5, 7)
    for kwargs in ({}, {"null_strides": True}, {"byte_offset": 64}):
        p, out = Producer(x, old=old, **kwargs), np.empty((5, 7), np.float32)
        _C.cast(out, p)
        np.testing.assert_array_equal(out, x)
        assert (p.capsules, p.deleted) == (1, 1)
    p = Producer(x, old=old)
    with pytest.raises(ValueError, match=r"cast: out axis 0 should be M=5, got 4"):
        _C.cast(np.empty((4, 7), np.float32), p)
    assert (p.capsules, p.deleted) == (1, 1), "deleted in an exception too"


def test_versioned_output_is_written():
    p, x = Producer(np.zeros((2, 3), np.float32)), f32(2, 3)
    _C.cast(p, x)
    np.testing.assert_array_equal(p.array, x)
    assert p.deleted == 1


@pytest.mark.parametrize(
    "kwargs, as_output, error, words",
    [
        (dict(flags=1), True, ValueError, "out is an output and read-only"),
        (dict(old=True), True, BufferError, "out is an output and should speak DLPack 1"),
        (
            dict(device_type=4),
            False,
            BufferError,
            "x should be on the CPU or a CUDA device, got DLPack device type 4",
        ),
        (dict(lanes=2), False, TypeError, r"x has DLPack dtype \(2, 32, 2\)"),
        (dict(code=5, bits=64), False, TypeError, r"x has DLPack dtype \(5, 64, 1\)"),
        (dict(major=2), False, BufferError, "x speaks DLPack 2, wanted 1"),
        (dict(ndim=9), False, ValueError, "x should have 2 axes, got 9"),
        (dict(byte_offset=2, data=16), False, ValueError, "x is not aligned"),
    ],
)
def test_capsules_that_must_be_refused(kwargs, as_output, error, words):
    p, other = Producer(f32(2, 3), **kwargs), np.full((2, 3), np.nan, np.float32)
    with pytest.raises(error, match="^cast: .*" + words):
        _C.cast(*((p, f32(2, 3)) if as_output else (other, p)))
    assert np.isnan(other).all() and p.deleted == 1


def test_producer_that_fails():
    class Failing:
        dtype, shape = "float32", (2, 3)

        def __dlpack__(self, max_version=None):
            raise RuntimeError("on strike")

    class Wrong(Failing):
        def __dlpack__(self, max_version=None):
            return 7

    with pytest.raises(BufferError, match="cast: x cannot be borrowed: on strike"):
        ops.cast(Failing(), "float32")
    with pytest.raises(TypeError, match="cast: x gave 7 instead of a DLPack capsule"):
        ops.cast(Wrong(), "float32")
    with pytest.raises(TypeError, match=r"cast: x must be an array \(NumPy or DLPack\), got <class 'list'>"):
        _C.cast(np.empty((1, 1), np.float32), [[1.0]])


def test_other_libraries_get_their_own_arrays_back():
    """Immutable kinds (JAX) get results by their own from_dlpack; NumPy stands in as the library of the fake producer."""
    out, rstd, total = ops.rms_norm_forward(Producer(f32(3, 8)), f32(8))
    assert type(out) is type(rstd) is np.ndarray and isinstance(total, Producer)
    want = ops.rms_norm_forward(f32(3, 8), f32(8))[0]
    np.testing.assert_array_equal(out, want)


# ---- torch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_torch_in_torch_out(dtype):
    x, w = torch.from_numpy(f32(6, 16)).to(dtype), torch.ones(16, dtype=dtype)
    out, rstd, total = ops.rms_norm_forward(x, w)
    assert out.dtype == dtype and rstd.dtype == torch.float32 and total is x
    bits = ops.rms_norm_forward(as_numpy(x), as_numpy(w))[0]
    np.testing.assert_array_equal(as_numpy(out).view(np.uint8), bits.view(np.uint8))
    parameter = torch.nn.Parameter(x.clone())  # borrowed as it is: gradients are the caller's business
    assert torch.equal(ops.rms_norm_forward(parameter, w)[0], out)
    strided = torch.empty(6, 40, dtype=dtype)[:, 3:19].copy_(x)
    assert torch.equal(ops.rms_norm_forward(strided, w)[0], out)
    dx, dweight = ops.rms_norm_backward(x, x, rstd, w)
    assert dweight.dtype == torch.float32 and dx.dtype == dtype
    assert ops.embedding_backward(
        x, torch.zeros(6, dtype=torch.int32), torch.arange(6, dtype=torch.int32), 3
    ).shape == (3, 16)


def as_numpy(t):
    return t.view(torch.int16).numpy().view(BF16) if t.dtype == torch.bfloat16 else t.numpy()


def test_torch_exchange_api_and_capsules_agree():
    class Behind:
        """A torch tensor without the C exchange API."""

        def __init__(self, t):
            self.t, self.shape, self.dtype = t, t.shape, t.dtype

        def __dlpack__(self, **keywords):
            return self.t.__dlpack__(**keywords)

    assert hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
    for t in (
        torch.from_numpy(f32(4, 6)),
        torch.from_numpy(f32(6, 4)).T,
        torch.from_numpy(f32(8, 12))[::2, ::2],
        torch.tensor([[2.0]]).expand(4, 6),
        torch.empty(0, 6),
        torch.from_numpy(f32(4, 6)).to(torch.bfloat16),
    ):
        a, b = torch.from_numpy(f32(6, t.shape[0])), torch.empty(2, 6, t.shape[1])
        _C.matmul(b[0], a, t, 1.0, 0.0)
        _C.matmul(b[1], a, Behind(t), 1.0, 0.0)
        assert torch.equal(b[0], b[1]) and torch.allclose(b[0], a @ t.float(), atol=1e-5)
    with pytest.raises(BufferError, match="cast: x cannot be borrowed: .*requires? grad"):
        ops.cast(Behind(torch.ones(2, 2, requires_grad=True)), "float32")
    with pytest.raises(TypeError, match="cast: x has DLPack dtype"):
        _C.cast(torch.empty(2, 2), torch.zeros(2, 2, dtype=torch.complex64))
    for unusual in (torch.zeros(2, 2, device="meta"), torch.zeros(2, 2).to_sparse()):
        with pytest.raises((BufferError, TypeError), match="^cast: x"):
            _C.cast(torch.empty(2, 2), unusual)


# ---- NumPy ---------------------------------------------------------------------------------------


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
    """[2,1,3,C] is [6,C] where the axes lie as one, for inputs, outputs and what has one number a row."""
    x, w, ids = f32(6, 8), f32(8), np.array([[1, 0, 3], [2, 2, 1]], np.int32)
    want = ops.rms_norm_forward(x, w)
    out, rstd = np.full((2, 1, 3, 8), np.nan, np.float32), np.full((2, 1, 3), np.nan, np.float32)
    _C.rms_norm_forward(out, rstd, None, x.reshape(out.shape), None, w, 1e-6)
    np.testing.assert_array_equal(out.reshape(6, 8), want[0])
    np.testing.assert_array_equal(rstd.reshape(6), want[1])
    wide = np.full((2, 3, 11), np.nan, np.float32)  # rows further apart, but evenly
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
        ((2, 3), (3, 2), (6,), "gate axis 1 should be 2 as up's is, got 3"),
        ((6,), (2, 3), (3, 2), "out axis 1 should be 3 as up's is, got 2"),
        ((2, 1, 3), (2, 3), (6,), "gate should have 2 axes as up has before its last ones, got 3"),
        ((2, 3), (2, 3), (5,), "out axis 0 should be M=6, got 5"),
    ],
)
def test_rows_of_several_axes_that_differ(gate, up, out, words):
    out = np.full((*out, 8), np.nan, np.float32)
    with pytest.raises(ValueError, match="^swiglu_forward: " + words):
        _C.swiglu_forward(out, f32(*gate, 8), f32(*up, 8))
    assert np.isnan(out).all()


def test_rows_of_several_axes_that_do_not_lie_as_one():
    x, out = f32(3, 2, 8).transpose(1, 0, 2), np.full((2, 3, 8), np.nan, np.float32)
    with pytest.raises(ValueError, match=r"up axes 0..1 should lie as one, with stride 48 of axis 0, got 8"):
        _C.swiglu_forward(out, x, x)
    with pytest.raises(
        ValueError, match=r"out axes 0..1 should lie as one, with stride 33 of axis 0, got 44"
    ):
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
    """x as a field of packed structures of `count` numbers and a byte: strides are no multiple of 4 bytes."""
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
            "x axis 1 has a stride that is no multiple of its",
        ),
        (
            dict(x=lambda x: field_of_packed(x, 8)),
            ValueError,
            "x axis 0 has a stride that is no multiple of its",
        ),
        (dict(x=lambda x: x.astype(">f4")), TypeError, "x is not in the machine's byte order"),
        (dict(x=lambda x: x.astype(np.complex64)), TypeError, "x has dtype complex64, which no op takes"),
        (
            dict(x=lambda x: x.astype(np.int32)),
            TypeError,
            "x should be float32, bfloat16 or float16, got int32",
        ),
        (dict(x=lambda x: x.astype(np.float16)), TypeError, "x should be float32 as out is, got float16"),
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
    gate_up(both[:, :6], both[:, 6:], both[:, :6], both[:, 6:])  # ~: over the inputs themselves
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
    ):  # another dtype of the same bytes
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
    for got, want in zip((dq, dk, dv), ops.s2_attention_backward(dout, q, k, v, out, lse, group_size=4)):
        np.testing.assert_array_equal(got, want)
    with pytest.raises(ValueError, match="dq is an output and overlaps dk"):
        _C.s2_attention_backward(dq, dq[:, :, 2:], dv, dout, q, k, v, out, lse, None, 4, 0, 0, D**-0.5)


# ---- Tensor --------------------------------------------------------------------------------------


def tensor(array):
    t = Tensor(array.shape, array.dtype.name)
    t.copy_(array)
    return t


def test_tensor_and_numpy_share_memory():
    t = Tensor((3, 4), "float32")
    assert (t.shape, t.dtype, t.device, t.ndim, t.nbytes) == ((3, 4), "float32", "cpu", 2, 48)
    assert repr(t) == "longlora.Tensor(shape=(3, 4), dtype='float32')"
    t.fill(2)
    for x in (t.numpy(), np.asarray(t), np.from_dlpack(t), memoryview(t)):
        assert x.shape == (3, 4)
        x[1, 2] += 1
    assert t.numpy()[1, 2] == 6 and t.numpy().ctypes.data % 64 == 0
    assert torch.from_dlpack(t)[1, 2] == 6
    for dtype in arrays.DTYPES:
        t = Tensor((2, 3), dtype)
        t.fill(3)
        assert np.asarray(t).dtype.name == dtype and (np.asarray(t) == 3).all()
        assert str(torch.from_dlpack(t).dtype) == "torch." + dtype
    with pytest.raises(BufferError, match="no bfloat16"):
        memoryview(Tensor(3, "bfloat16"))
    for shape in ((), 0, 5, (0, 7), (2, 1, 0, 3)):
        assert Tensor(shape).numpy().shape == Tensor(shape).shape
        assert np.from_dlpack(Tensor(shape)).shape == Tensor(shape).shape


def test_tensor_views():
    arena = Tensor(1 << 12, "uint8")
    a, b = arena.view((4, 8), "float32", 64), arena.view((3, 5), "bfloat16", 1024)
    a.copy_(f32(4, 8))
    b.fill(-1)
    assert (
        a.numpy().base is not None
        and (arena.numpy()[64:192].view(np.float32).reshape(4, 8) == f32(4, 8)).all()
    )
    np.testing.assert_array_equal(a[1:3, 2:].numpy(), f32(4, 8)[1:3, 2:])
    np.testing.assert_array_equal(a[-1].numpy(), f32(4, 8)[-1])
    np.testing.assert_array_equal(a[:, 3].numpy(), f32(4, 8)[:, 3])
    np.testing.assert_array_equal(
        a.reshape((2, 2, 8))[1, :, 1:].numpy(), f32(4, 8).reshape(2, 2, 8)[1, :, 1:]
    )
    np.testing.assert_array_equal(np.asarray(a[:, 2:4]), f32(4, 8)[:, 2:4])
    np.testing.assert_array_equal(torch.from_dlpack(a[:, 2:4]).numpy(), f32(4, 8)[:, 2:4])
    for view in (
        lambda: arena.view(8, "float32", 2),
        lambda: arena.view(8, "float32", -4),
        lambda: arena.view(1025, "float32"),
        lambda: a[:, 1:].view(3),
        lambda: a[:, 1:].reshape(28),
        lambda: a.reshape(31),
        lambda: Tensor((-1,)),
        lambda: Tensor((1 << 40, 1 << 40)),
        lambda: Tensor((1,) * 5),
    ):
        with pytest.raises(ValueError, match="^Tensor"):
            view()
    for index in (4, -5, (0, 8), (0, 0, 0), slice(0, 4, 2)):
        with pytest.raises(IndexError, match="^Tensor"):
            a[index]
    with pytest.raises(TypeError, match="index should be an integer or a slice, got 'rows'"):
        a["rows"]
    for dtype in ("float8", "f4"):
        with pytest.raises(TypeError, match="dtype should be float32, .* got"):
            Tensor(3, dtype)
    with pytest.raises(MemoryError, match="cannot be had"):
        Tensor(1 << 55, "uint8")


def test_views_keep_their_memory_and_nothing_else():
    t = Tensor(1 << 20)
    t.fill(7)
    view = t[5:10]
    for _ in range(100_000):  # a chain of views of views, were they to hold each other
        view = view[:]
    array, capsule = view.numpy(), np.from_dlpack(view)
    before = sys.getrefcount(t)
    other = t[:4]
    assert sys.getrefcount(t) == before + 1
    del t, view, other
    gc.collect()
    assert (array == 7).all() and (capsule == 7).all()


def test_tensor_buffer_requests():
    t = tensor(f32(4, 6))
    assert (
        bytes(t) == f32(4, 6).tobytes() and memoryview(t).format == "f" and memoryview(t).strides == (24, 4)
    )
    assert memoryview(t[:, 2:]).tolist() == f32(4, 6)[:, 2:].tolist()
    with pytest.raises(
        BufferError, match="not contiguous"
    ):  # a plain run of bytes cannot be had of a strided view
        import hashlib

        hashlib.sha256(t[:, 2:])
    flags = dict(nd=0x8, c=0x20 | 0x18, f=0x40 | 0x18, any=0x80 | 0x18)
    get = python_api("PyObject_GetBuffer", ctypes.c_int, ctypes.py_object, ctypes.c_void_p, ctypes.c_int)
    release = python_api("PyBuffer_Release", None, ctypes.c_void_p)
    view = ctypes.create_string_buffer(256)
    for name, flag in flags.items():
        with pytest.raises(BufferError):
            get(t[:, 2:], view, flag)
        if name != "f":  # rows, not columns
            get(t, view, flag)
            release(view)
    with pytest.raises(BufferError):
        get(t, view, flags["f"])


def test_tensor_wrap(tmp_path):
    import mmap

    x = f32(8, 8)
    (tmp_path / "file").write_bytes(b"head" + x.tobytes())
    with open(tmp_path / "file", "rb") as file:
        buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    t = Tensor.wrap(buffer, (8, 8), "float32", offset=4)
    np.testing.assert_array_equal(ops.cast(t, "float32").numpy(), x)
    with pytest.raises(BufferError):
        buffer.close()  # the Tensor still needs it
    for view in (t, t[1:], t.view(4), t.reshape((4, 16)), t.reshape(64)[3:]):
        assert not view.numpy().flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            view.fill(0)
        with pytest.raises(ValueError, match="read-only"):
            view.copy_(np.zeros(view.shape, np.float32))
    with pytest.raises(ValueError, match="cast: out is an output and read-only"):
        _C.cast(t, x)
    with pytest.raises(BufferError, match="read-only tensor needs max_version"):
        t.__dlpack__()
    assert not np.from_dlpack(t).flags.writeable and np.from_dlpack(t, copy=True).flags.writeable
    for offset, shape in ((5, (8, 8)), (8, (8, 8)), (-4, (8, 8)), (1 << 40, 1)):
        with pytest.raises(ValueError, match="^Tensor.wrap: .* offset|^Tensor.wrap: offset"):
            Tensor.wrap(buffer, shape, "float32", offset)
    with pytest.raises(TypeError):
        Tensor.wrap(7, 1, "uint8")
    del t, view
    buffer.close()
    array = bytearray(8)
    Tensor.wrap(array, 2, "float32").fill(1)
    assert array == np.ones(2, np.float32).tobytes()


def test_tensor_copy_and_fill():
    x = f32(5, 6)
    for dtype in ("float32", "bfloat16", "float16"):
        t = Tensor((5, 6), dtype)
        for source in (
            x,
            np.asfortranarray(x),
            x[:, ::-1][:, ::-1],
            torch.from_numpy(x),
            x.astype(BF16),
            tensor(x),
        ):
            t.copy_(source)
            np.testing.assert_array_equal(t.numpy(), np.asarray(source).astype(t.numpy().dtype))
        Tensor((5, 9), dtype)[:, 1:7].copy_(x)
    for dtype in ("uint8", "float16", "float32", "int64"):
        large = Tensor((3, 87383), dtype)  # 262,149 elements: 2**18 and a rest
        for number in (7, 0, 2):
            large.fill(number)
            assert (large.numpy() == number).all()
    column = Tensor((6, 5))
    column[:, 1].fill(3)
    assert (column.numpy()[:, 1] == 3).all()
    Tensor(()).copy_(np.array(2, np.float32))
    for source, error, words in (
        (x[:4], ValueError, "source axis 0 should be 5, got 4"),
        (x[0], ValueError, "source should have 2 axes, got 1"),
        (x.astype(int), TypeError, "source should be float16, got int64"),
        (t[:], ValueError, "source overlaps"),
        (None, TypeError, "source must be an array, got None"),
        ([1], TypeError, "source must be an array"),
    ):
        with pytest.raises(error, match="Tensor.copy_: " + words):
            t.copy_(source)
    for dtype, number in (
        ("uint8", 256),
        ("uint8", -1),
        ("int32", 0.5),
        ("int32", 2**31),
        ("int64", float("nan")),
    ):
        with pytest.raises(ValueError, match=rf"Tensor.fill: {re.escape(str(number))} is no {dtype}"):
            Tensor(3, dtype).fill(number)


def test_tensor_dlpack_keywords():
    t = tensor(f32(2, 3))
    assert t.__dlpack_device__() == (1, 0)
    assert '"dltensor"' in repr(t.__dlpack__()) and '"dltensor_versioned"' in repr(
        t.__dlpack__(max_version=(1, 0))
    )
    assert '"dltensor"' in repr(t.__dlpack__(max_version=(0, 8)))
    copy = np.from_dlpack(t, copy=True)
    copy[...] = 0
    assert (t.numpy() == f32(2, 3)).all()
    pointer = capsule_pointer(t[:, 1:].__dlpack__(max_version=(1, 0), copy=True), b"dltensor_versioned")
    assert pointer
    for keywords, error in (
        (dict(stream=1), BufferError),
        (dict(dl_device=(2, 99)), BufferError),
        (dict(dl_device=1), TypeError),
        (dict(max_version="1"), TypeError),
        (dict(colour=1), TypeError),
    ):
        with pytest.raises(error):
            t.__dlpack__(**keywords)
    before = sys.getrefcount(t)
    for keywords in ({}, dict(max_version=(1, 0))):
        capsule = t.__dlpack__(**keywords)
        assert sys.getrefcount(t) == before + 1
        del capsule  # that nobody took
        assert sys.getrefcount(t) == before
        taken = torch.from_dlpack(t)
        del taken
        assert sys.getrefcount(t) == before


def test_references_are_given_back():
    x, w = f32(4, 8), f32(8)
    before = [sys.getrefcount(a) for a in (x, w)]
    for _ in range(10):
        ops.rms_norm_forward(x, w)
        with pytest.raises(ValueError):
            ops.rms_norm_forward(x, w[:3])
    assert [sys.getrefcount(a) for a in (x, w)] == before


def test_calls_leak_nothing():
    x, t, u, out = f32(8, 8), tensor(f32(8, 8)), torch.from_numpy(f32(8, 8)), np.empty((8, 8), np.float16)
    producers = Producer(x), Producer(x, old=True)

    def rounds(count, *arrays):
        """Good calls and bad ones, exports taken and not -> resident bytes."""
        for _ in range(count):
            for a in arrays:
                for arguments in ((out, a), (x[:3], a), (a, None), (a, x[:3])):
                    try:
                        _C.cast(*arguments)
                    except (ValueError, TypeError, BufferError):
                        pass
            np.from_dlpack(t, copy=True)
            memoryview(t), t[1:, 2:].numpy(), t.__dlpack__(), torch.from_dlpack(t)
        return int(open("/proc/self/statm").read().split()[1]) * 4096

    before = [sys.getrefcount(p) for p in producers]
    rounds(50, *producers)
    assert [sys.getrefcount(p) for p in producers] == before and all(
        p.deleted == p.capsules for p in producers
    )
    count, threads = 3000, _C.get_num_threads()
    _C.set_num_threads(1)  # waking the others would take most of the time
    held = [rounds(count, x, t, u) for _ in range(5)][1:]
    _C.set_num_threads(threads)
    grown = min(b - a for a, b in zip(held, held[1:]))  # allocators take more at first; leaks, every time
    assert grown < count * 32, f"{grown} bytes more after {count} rounds: an object for each is leaked"


@pytest.mark.skipif(
    "ASAN_OPTIONS" in os.environ, reason="the sanitizer's allocator has its own idea of memory"
)
def test_memory_of_a_large_tensor_is_committed_late_and_returned():
    script = """
import longlora.ops
def resident(): return int(open("/proc/self/statm").read().split()[1]) * 4096
before = resident()
t = longlora.Tensor(256 << 20, "uint8")
assert resident() - before < 16 << 20
t[:128 << 20].fill(1)
assert resident() - before > 100 << 20
view = t[:10]
del t
assert resident() - before > 100 << 20
del view
assert resident() - before < 16 << 20
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_an_export_outlives_the_interpreter():
    script = (
        "import longlora, numpy as np, sys; sys.modules['keep'] = np.from_dlpack(longlora.Tensor((4, 4)))"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


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
