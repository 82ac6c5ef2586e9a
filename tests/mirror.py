"""Runs tests that are written in NumPy on a device. Each call copies its arrays to the device, in the same
layout, and copies the results back.

The buffers that own the arrays' memory are copied whole, with guard zones and gaps between rows, to addresses
that are equal modulo 256. The arrays of the call become views of the copies, with their own shapes, strides
(also negative and 0) and read-only flags. So arrays that share memory on the host share it on the device.
Buffers of inputs must come back unchanged.
"""

import ctypes

import dlpack
import numpy as np

from longlora import _C, Tensor

ALIGNMENT = 256
CODES = {
    "float32": (2, 32),
    "bfloat16": (4, 16),
    "float16": (2, 16),
    "float64": (2, 64),
    "int32": (0, 32),
    "int64": (0, 64),
    "uint8": (1, 8),
    "int16": (0, 16),
    "uint32": (1, 32),
    "bool": (6, 8),
    "complex64": (5, 64),
}
installed = False  # whether ops run on a device
no_deleter = dlpack.Deleter(lambda managed: None)


def address(x):
    return x.__array_interface__["data"][0]


def memory(x):
    """(first, end) address of the array that owns x's memory, or of x if the owner is not an array."""
    owner = x
    while getattr(owner, "base", None) is not None:
        owner = owner.base
    if isinstance(owner, np.ndarray):
        return address(owner), address(owner) + owner.nbytes
    return np.lib.array_utils.byte_bounds(x)


def raw(low, high):
    """The host's memory from address low to high as an array."""
    return (
        np.frombuffer((ctypes.c_uint8 * (high - low)).from_address(low), np.uint8)
        if high > low
        else np.empty(0, np.uint8)
    )


class View:
    """An array of the call in the device's memory, as a DLPack producer."""

    def __init__(self, x, data, like):
        self.shape, self.dtype = x.shape, x.dtype
        code, bits = CODES[x.dtype.name]
        assert all(stride % x.itemsize == 0 for stride in x.strides), "DLPack counts strides in elements"
        self.sizes = (ctypes.c_int64 * x.ndim)(*x.shape)
        self.strides = (ctypes.c_int64 * x.ndim)(*[stride // x.itemsize for stride in x.strides])
        self.device = like.device_type, like.device_id
        tensor = dlpack.DLTensor(data, *self.device, x.ndim, code, bits, 1, self.sizes, self.strides, 0)
        self.managed = dlpack.Versioned(
            1, 0, None, no_deleter, 0 if x.flags.writeable else dlpack.READ_ONLY, tensor
        )

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        return dlpack.new_capsule(ctypes.addressof(self.managed), b"dltensor_versioned", None)

    def __dlpack_device__(self):
        return self.device


class Buffer:
    """A piece of the host's memory, from address low to high, and its copy on the device."""

    def __init__(self, low, high, device):
        self.host, shift = raw(low, high), low % ALIGNMENT
        self.whole = Tensor(shift + self.host.size, "uint8", **device)
        self.whole[:shift].fill(255)  # NaN before the copy
        self.copy = self.whole[shift : shift + self.host.size]
        self.like = dlpack.tensor_of(self.whole)
        self.offset = self.like.data + shift - low
        self.copy.copy_(self.host)

    def bring_back(self, written):
        back = np.empty(self.host.size, np.uint8)
        Tensor.wrap(back, back.size, "uint8").copy_(self.copy)
        if written:
            self.host[...] = back
        else:
            assert np.array_equal(back, self.host), "an op wrote to an input"


def mirrored(op, function, device):
    """Wrap `function`, _C.<op>, so that it runs on copies of its NumPy arrays on `device`.

    device: "cuda:0", or None for other memory of the CPU, which tests this file.
    """
    keyword = {} if device is None else {"device": device}
    outputs = len(_C.specs[op].split("<-")[0].split())

    def call(*args):
        arrays = [x for x in args if isinstance(x, np.ndarray)]
        if any(x.dtype.name not in CODES for x in arrays):
            return function(*args)
        merged = []
        for low, high in sorted(map(memory, arrays)):
            if merged and low < merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], high)
            else:
                merged.append([low, high])
        buffers = [Buffer(low, high, keyword) for low, high in merged]
        homes, views = {}, []
        for i, x in enumerate(args):
            if isinstance(x, np.ndarray):
                low, _ = memory(x)
                home = next(n for n in reversed(range(len(merged))) if merged[n][0] <= low)
                homes[home] = homes.get(home, False) or (i < outputs and x.flags.writeable)
                x = View(x, address(x) + buffers[home].offset, buffers[home].like)
            views.append(x)
        try:
            return function(*views)
        finally:
            for home, written in homes.items():
                buffers[home].bring_back(written)

    return call


def install(monkeypatch, device):
    """Make every op of longlora._C run on the device."""
    monkeypatch.setattr(f"{__name__}.installed", True)
    for op in _C.specs:
        monkeypatch.setattr(_C, op, mirrored(op, getattr(_C, op), device))
