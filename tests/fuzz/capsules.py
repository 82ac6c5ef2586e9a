"""Random DLPack capsules, right ones and wrong ones in many ways, as arguments of the binding.

A capsule is refused with a TypeError, ValueError or BufferError, or the call does what NumPy does with the
same memory and writes nothing else. Each capsule is deleted once. The inputs follow from the seed.

    python tests/fuzz/capsules.py --count 1000000 --seed 1      # a long run, best on a build with sanitizers

A failure prints the number of its input; `--first NUMBER --count 1` repeats it.
"""

import argparse
import collections
import ctypes
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dlpack  # noqa: E402
import ml_dtypes  # noqa: E402
import numpy as np  # noqa: E402

from longlora import _C, Tensor  # noqa: E402

DTYPES = {
    (2, 32): np.dtype(np.float32),
    (4, 16): np.dtype(ml_dtypes.bfloat16),
    (2, 16): np.dtype(np.float16),
    (2, 64): np.dtype(np.float64),
    (0, 32): np.dtype(np.int32),
    (0, 64): np.dtype(np.int64),
    (1, 8): np.dtype(np.uint8),
}
FLOATS = list(DTYPES)[:3]
SIZES = [0, 1, 2, 3, -1, 7, 2**31, 2**32 + 1, 2**59, 2**62, 2**63 - 1, -(2**63)]
STRIDES = [0, 1, -1, 2, 3, 8, -7, 2**31, 2**60, 2**63 - 1, -(2**63)]
MOST = 2**59  # elements, and elements between the first and the last
ARENA = 1 << 15  # bytes
MEMORY = {name: np.random.default_rng(0).integers(0, 256, ARENA, np.uint8) for name in ("input", "output")}
REFUSALS = TypeError, ValueError, BufferError


class Capsules:
    """A producer. What it says of its array can be changed before it is asked."""

    def __init__(self, rng, memory, key, shape):
        self.rng, self.memory, self.key = rng, memory, key
        itemsize = DTYPES[key].itemsize
        self.shape, self.strides = list(shape), dense(shape)
        if rng.random() < 0.3:  # rows apart
            self.strides = [s + (i < len(shape) - 1) * 5 for i, s in enumerate(self.strides)]
        self.lanes, self.ndim, self.offset = 1, len(shape), rng.randrange(ARENA // 8) * 8
        self.base, self.no_shape, self.no_strides = memory.ctypes.data, False, False
        self.device, self.told_device = (1, 0), (1, 0)
        self.old, self.version, self.flags = rng.random() < 0.3, (1, 0), 0
        self.name = b"dltensor" if self.old else b"dltensor_versioned"
        self.answer = None  # of __dlpack__ instead of a capsule
        self.made = self.deleted = 0
        if rng.random() < 0.5:
            for _ in range(rng.choice([1, 1, 1, 2, 3])):
                rng.choice(MUTATIONS)(self, rng)
        self.itemsize = itemsize

    def _delete(self, managed):
        self.deleted += 1

    def __dlpack_device__(self):
        if isinstance(self.told_device, Exception):
            raise self.told_device
        return self.told_device

    def __dlpack__(self, **keywords):
        if self.old and keywords:
            raise TypeError("__dlpack__() got an unexpected keyword argument")
        if isinstance(self.answer, Exception):
            raise self.answer
        if self.answer is not None:
            return self.answer
        self.made += 1
        self.arrays = [(ctypes.c_int64 * 8)(*numbers[:8]) for numbers in (self.shape, self.strides)]
        tensor = dlpack.DLTensor(
            self.base,
            *self.device,
            self.ndim,
            *self.key,
            self.lanes,
            None if self.no_shape else self.arrays[0],
            None if self.no_strides else self.arrays[1],
            self.offset,
        )
        self.deleter = dlpack.Deleter(self._delete)
        old = self.name == b"dltensor"
        self.managed = (
            dlpack.Old(tensor, None, self.deleter)
            if old
            else dlpack.Versioned(*self.version, None, self.deleter, self.flags, tensor)
        )
        name = self.name
        self.destructor = dlpack.CapsuleDestructor(
            lambda capsule: self.deleter(None) if dlpack.raw_is_valid(capsule, name) else None
        )
        return dlpack.new_capsule(ctypes.addressof(self.managed), name, self.destructor)

    def sizes_and_strides(self):
        sizes = self.shape[: self.ndim]
        return sizes, dense(sizes) if self.no_strides else self.strides[: self.ndim]

    def must_be_refused(self):
        if self.answer is not None or self.told_device != (1, 0) or self.device[0] not in (1, 3, 13):
            return True
        if self.name not in (b"dltensor", b"dltensor_versioned") or not 0 <= self.ndim <= 4:
            return True
        if self.name == b"dltensor_versioned" and self.version[0] != 1:
            return True
        if self.key not in DTYPES or self.lanes != 1 or (self.no_shape and self.ndim):
            return True
        sizes, strides = self.sizes_and_strides()
        if min(sizes, default=0) < 0:
            return True
        given = zip(sizes, [0] * 4 if self.no_strides else strides)
        if (
            product(max(n, 1) for n in sizes) >= MOST
            or sum(abs((max(n, 1) - 1) * s) for n, s in given) >= MOST
        ):
            return True
        return self.base is None and 0 not in sizes

    def in_arena(self):
        sizes, strides = self.sizes_and_strides()
        if 0 in sizes:
            return True
        reach = [(n - 1) * s * DTYPES[self.key].itemsize for n, s in zip(sizes, strides)]
        low, high = sum(r for r in reach if r < 0), sum(r for r in reach if r > 0) + 8
        return self.base is not None and self.offset + low >= 0 and self.offset + high <= ARENA

    def view(self, memory):
        """NumPy's view of the same elements in `memory`."""
        sizes, strides = self.sizes_and_strides()
        dtype = DTYPES[self.key]
        if 0 in sizes:
            return np.empty(sizes, dtype)
        steps = [s * dtype.itemsize if n > 1 else 0 for n, s in zip(sizes, strides)]
        return np.lib.stride_tricks.as_strided(np.frombuffer(memory, dtype, 1, self.offset), sizes, steps)


def product(numbers):
    total = 1
    for n in numbers:
        total *= n
    return total


def dense(shape):
    return [product(shape[i + 1 :]) for i in range(len(shape))]


def _entry(name, choices):
    def mutate(c, rng):
        numbers = getattr(c, name)
        while len(numbers) < 4:
            numbers.append(1)
        numbers[rng.randrange(4)] = rng.choice(choices)

    return mutate


def _set(name, *choices):
    return lambda c, rng: setattr(c, name, rng.choice(choices))


MUTATIONS = [
    _entry("shape", SIZES),
    _entry("strides", STRIDES),
    lambda c, rng: setattr(
        c, "key", rng.choice([*DTYPES, (rng.randrange(20), rng.choice([1, 8, 16, 32, 64, 255]))])
    ),
    lambda c, rng: setattr(c, "offset", rng.randrange(ARENA)),
    _set("offset", 0, 1, 2, 4, 2**63, 2**64 - 1),
    _set("lanes", 0, 1, 2, 65535),
    _set("ndim", -1, 0, 1, 2, 3, 4, 5, 9, 2**31 - 1, -(2**31)),
    _set("base", None),
    _set("no_shape", True),
    _set("no_strides", True),
    _set("device", (0, 0), (1, 3), (2, 0), (2, -1), (3, 0), (4, 0), (13, 0), (2**31 - 1, 2**31 - 1), (-1, 0)),
    _set(
        "told_device",
        (1, 0),
        (2, 0),
        (2, 2**31 - 1),
        (1,),
        [1, 0],
        None,
        ("1", 0),
        (2**70, 0),
        RuntimeError("no"),
    ),
    _set("version", (0, 8), (1, 1), (1, 2**32 - 1), (2, 0), (2**32 - 1, 0)),
    _set("flags", 1, 2, 3, 4, 2**64 - 1),
    _set("name", b"dltensor", b"dltensor_versioned", b"used_dltensor", b"", b"tensor"),
    _set("answer", 7, None, "capsule", RuntimeError("no"), BufferError("no"), TypeError("no")),
]


def same(got, want):
    return got.tobytes() == want.tobytes() or np.array_equal(
        got.astype(np.float64), want.astype(np.float64), equal_nan=True
    )


def shape_of(c):
    """The sizes of c where they are ordinary, else some."""
    sizes = c.shape[: c.ndim] if 0 <= c.ndim <= 4 else [2, 3]
    return [n if 0 <= n <= 9 else 2 for n in sizes]


def copied(c, rng):
    """-> what the call found, what NumPy finds."""
    out = Tensor(shape_of(c), DTYPES.get(c.key, np.dtype("f4")).name)
    out.copy_(c)
    return out.numpy(), c.view(c.memory)


def cast_from(c, rng):
    out = np.empty(shape_of(c), DTYPES[rng.choice(FLOATS)])
    _C.cast(out, c)
    return out, c.view(c.memory).astype(out.dtype)


def cast_to(c, rng):
    x = np.ones(shape_of(c), np.float32)
    before = c.memory.copy()
    try:
        _C.cast(c, x)
    except REFUSALS:
        assert c.memory.tobytes() == before.tobytes(), "written and refused"
        raise
    c.view(before)[...] = 1
    return c.memory, before


def multiplied(c, rng):
    sizes = shape_of(c)
    b = np.eye(sizes[-1] if sizes else 1, dtype=np.float32)
    out = np.empty((*sizes[:-1], len(b)), np.float32)
    _C.matmul(out, c, b, 1.0, 0.0)
    want = c.view(c.memory).astype(np.float32)
    return (out, want) if np.isfinite(want).all() else (b, b)  # NaN times 0


def embedded(c, rng):
    weight = np.arange(200, dtype=np.float32).reshape(100, 2)
    out = np.empty((*shape_of(c), 2), np.float32)
    _C.embedding_forward(out, weight, c)
    return out, weight[c.view(c.memory)]


CALLS = [copied, cast_from, cast_to, multiplied, embedded]


def try_one(seed, number):
    """Make one call -> "refused", "accepted", or "skipped" if the capsule lies about memory that exists."""
    rng = random.Random(f"{seed} {number}")
    call = rng.choice(CALLS)
    memory = MEMORY["output" if call is cast_to else "input"]
    key = (0, 32) if call is embedded else rng.choice(FLOATS if call is not copied else list(DTYPES))
    axes = rng.randrange(5) if call is copied else 1 if call is embedded and rng.random() < 0.5 else 2
    c = Capsules(rng, memory, key, [rng.randrange(7) for _ in range(axes)])
    if call is embedded:
        at = min(c.offset, ARENA - 64) // 4 * 4
        memory[at : at + 64].view(np.int32)[:] = rng.randrange(105)
    refuse = c.must_be_refused()
    if not refuse and not c.in_arena():
        return "skipped"
    try:
        got, want = call(c, rng)
    except REFUSALS as error:
        assert str(error) and "SystemError" not in str(error)
        outcome = "refused"
    else:
        assert not refuse, "accepted"
        assert same(got, want), f"got {got}, wanted {want}"
        outcome = "accepted"
    assert c.deleted == c.made, f"{c.made} capsules, {c.deleted} deleted"
    return outcome


def run(seed, first, count):
    """Try inputs first .. first+count-1 -> how many were accepted, refused and skipped."""
    outcomes = collections.Counter()
    with np.errstate(all="ignore"):
        for number in range(first, first + count):
            try:
                outcomes[try_one(seed, number)] += 1
            except BaseException:
                print(f"input {number} of seed {seed} failed", file=sys.stderr)
                raise
    return outcomes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=100_000)
    options = parser.parse_args()
    print(dict(run(options.seed, options.first, options.count)))
