"""Results are arrays of the caller's library, on its device."""

import contextlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from longlora import Tensor, arrays


class Foreign:
    """An array of a library that only has DLPack. It is on the device (kind, index) of DLPack."""

    def __init__(self, dtype="float32", **fields):
        self.dtype, self.shape = dtype, (2, 3)
        vars(self).update(fields)

    def __dlpack__(self):
        raise NotImplementedError


@pytest.fixture
def made(monkeypatch):
    """What arrays.Tensor is called with; the result is the call."""
    kind = type("Made", (), {"__init__": lambda self, *call: setattr(self, "call", call)})
    monkeypatch.setattr(arrays, "Tensor", kind)
    return kind


def test_names_and_shapes():
    torch = pytest.importorskip("torch")
    for x, name in (
        (np.zeros(2, np.int32), "int32"),
        (torch.zeros(2, dtype=torch.bfloat16), "bfloat16"),
        (Tensor((2,), "float16"), "float16"),
        (SimpleNamespace(dtype="jax.numpy.uint8"), "uint8"),
    ):
        assert arrays.dtype_name(x) == name
    x = np.zeros((2, 3))
    assert arrays.shape(x, "op: x") == arrays.shape(x, "op: x", 2) == (2, 3)
    assert arrays.shape(Foreign(shape=[4]), "op: x") == (4,)
    with pytest.raises(ValueError, match="^op: x should have at least 3 axes, got 2$"):
        arrays.shape(x, "op: x", 3)
    with pytest.raises(ValueError, match="^op: x should have at least 1 axis, got 0$"):
        arrays.shape(np.float32(1), "op: x", 1)
    for call, words in ((arrays.dtype_name, ""), (lambda x: arrays.shape(x, "op: x"), "op: x: ")):
        with pytest.raises(TypeError, match=f"^{words}wanted an array .*, got list$"):
            call([1])
    with pytest.raises(TypeError, match="got list$"):
        arrays.empty((1,), "float32", [1])


def test_results_of_each_library(monkeypatch, made):
    torch, ml_dtypes = pytest.importorskip("torch"), pytest.importorskip("ml_dtypes")
    like = np.zeros((2, 3), np.float16)
    for dtype, wanted in (("float32", np.float32), ("bfloat16", ml_dtypes.bfloat16)):
        found = arrays.empty((4, 5), dtype, like)
        assert type(found) is np.ndarray and found.shape == (4, 5) and found.dtype == wanted
    assert arrays.empty_like(like, "x").dtype == np.float16 and arrays.empty_like(like, "x").shape == (2, 3)
    mine = like.view(type("Mine", (np.ndarray,), {}))
    assert type(arrays.empty_like(mine, "x")) is np.ndarray
    for device in ("cpu", "meta"):
        found = arrays.empty((4, 5), "bfloat16", torch.zeros(2, device=device))
        assert (found.shape, found.dtype, found.device.type) == ((4, 5), torch.bfloat16, device)
    assert arrays.empty_like(torch.zeros(2, 3, dtype=torch.int64), "x").dtype == torch.int64
    tensor = made()
    tensor.device = "cuda:3"
    assert arrays.empty((4, 5), "int32", tensor).call == ((4, 5), "int32", "cuda:3")
    for fields, device in (
        ({}, "cpu"),
        (dict(__dlpack_device__=lambda: (1, 0)), "cpu"),
        (dict(__dlpack_device__=lambda: (2, 1)), "cuda:1"),
    ):
        assert arrays.empty((4,), "int32", Foreign(**fields)).call == ((4,), "int32", device)
        assert arrays.empty_like(Foreign(**fields), "x").call == ((2, 3), "float32", device)
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(TypeError, match="bfloat16 in NumPy needs the package ml_dtypes"):
        arrays.empty((1,), "bfloat16", like)


def test_results_for_cupy_are_made_on_its_device(monkeypatch, made):
    inside = []

    @contextlib.contextmanager
    def device():
        inside.append("device 1")
        yield
        inside.clear()

    cupy = SimpleNamespace(ndarray=Foreign, empty=lambda *call: (*call, *inside))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    like = Foreign(device=device(), __dlpack_device__=lambda: (2, 1))
    assert arrays.empty((4,), "float32", like) == ((4,), "float32", "device 1")
    assert arrays.empty((4,), "bfloat16", like).call == ((4,), "bfloat16", "cuda:1")
    for name in ("cupy", "torch"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert arrays.empty((4,), "float32", like).call == ((4,), "float32", "cuda:1")


def test_zeros():
    like = np.full((2, 3), 7.0, np.float32)
    assert arrays.zeros((2,), "int32", like).tolist() == [0, 0]
    assert arrays.zeros((2,), "int32", Tensor((1,), "float32")).numpy().tolist() == [0, 0]


def test_results_go_back_without_a_copy():
    result, x = Tensor((2,), "float32"), np.zeros(2)
    library = SimpleNamespace(from_dlpack=lambda x: ("theirs", x))
    like = Foreign(__array_namespace__=lambda: library)
    assert arrays.give_back(like, result) == ("theirs", result)
    assert arrays.give_back(like, result, None, like) == (("theirs", result), None, like)
    for other in (x, result, Foreign()):
        assert arrays.give_back(other, result) is result
        assert arrays.give_back(other, result, None) == (result, None)
    torch = pytest.importorskip("torch")
    assert arrays.give_back(torch.zeros(1), result) is result


def test_zeros_of_a_tensor_overwrite_what_its_memory_held(monkeypatch):
    used = Tensor((2,), "float32")
    used.fill(7)
    monkeypatch.setattr(arrays, "empty", lambda *given: used)
    assert arrays.zeros((2,), "float32", used) is used and used.numpy().tolist() == [0, 0]
