"""A dry run: the code of a pass runs with a recorder in place of the ops, on Tensors that nobody touches.

So the memory that ops take while they run is asked with the very arguments of the run, and no call is written twice.
"""

import mmap

from longlora import _C
from longlora.device import CPU

NORESERVE = (
    0x4000  # MAP_NORESERVE of Linux: address space alone, so an arena may be larger than the machine's memory
)


def untouched(size):
    """A Tensor of `size` bytes that costs no memory as long as nothing reads or writes it."""
    size = max(size, 1)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    return _C.Tensor.wrap(mmap.mmap(-1, size, flags=flags), (size,), "uint8")


class Recorder:
    """Has a method for every op, which computes nothing and notes what the call would take on `device`."""

    def __init__(self, device):
        self._device, self._largest = device, {}

    def __getattr__(self, op):
        if op not in _C.specs:
            raise AttributeError(f"there is no op {op!r}")
        return lambda *args: self._note(op, args)

    def _note(self, op, args):
        takes = _scratch(op, args) if self._device == CPU else {"workspace": _C.workspace(op, *args)}
        for what, size in takes.items():
            self._largest[what] = max(size, self._largest.get(what, 0))

    @property
    def bytes(self):
        """What the ops take at most. On a GPU that is the largest call. On the CPU blocks are kept for the next call, so the
        largest block of each use counts."""
        return sum(self._largest.values())


def _scratch(op, args):
    """What a call takes on the CPU: use -> bytes."""
    if op in ("lora_linear_forward", "lora_linear_backward"):
        given = dict(zip(_names(op), args))
        of_b, of_a = _C.matmul_scratch()
        out = given["out"] if op == "lora_linear_forward" else given["dx"]
        narrow = out is not None and out.dtype != "float32"
        return {
            "packed": of_b + (of_a // 4 if given.get("dweight") is None else of_a),
            "sums of a product": min(8 << 20, 4 * out.shape[0] * out.shape[1]) if narrow else 0,
        }
    if op == "linear_cross_entropy_backward":
        given = dict(zip(_names(op), args))
        x, weight = given["x"], given["weight"]
        trained = given["dweight"] is not None
        return {"large": _C.head_scratch(*x.shape, weight.shape[0], x.dtype != "float32", trained)}
    if op == "s2_attention_backward":
        given = dict(zip(_names(op), args))
        q, k = given["q"], given["k"]
        B, T, H, D = q.shape
        thread, sums = _C.attention_scratch(B, T, H, k.shape[2], D, q.dtype != "float32")
        return {"threads": _C.get_num_threads() * thread, "large": sums}
    return {}


def _names(op):
    """The names of an op's arguments, in order."""
    outputs, _, rest = _C.specs[op].partition("<-")
    return [word.partition("[")[0] for word in (outputs + rest.partition("|")[0]).split()]
