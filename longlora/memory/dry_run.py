"""A dry run: the code of a pass runs with a recorder in place of the ops, on Tensors that nobody touches.

The recorder asks what memory each op takes for the very arguments of the run, so no call is written down
twice.
"""

import ctypes
import itertools
import mmap
from collections.abc import Callable
from typing import Any

from longlora import _C
from longlora.device import CPU
from longlora.errors import UserError
from longlora.job import NORESERVE

APART = 1 << 46  # bytes between two addresses of _nowhere
# Addresses that no system gives to a process. They differ, since ops refuse outputs that overlap.
_nowhere = itertools.cycle(range(1 << 60, 1 << 62, APART))


def untouched(size: int) -> _C.Tensor:
    """A uint8 Tensor [size] that costs no memory as long as nothing reads or writes it.

    It may exceed what the machine has. Where the system forbids that (ulimit -v, vm.overcommit_memory 2) it
    lies at addresses that no process has. UserError for sizes beyond any machine.
    """
    size, flags = max(size, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    memory: Any
    try:
        memory = mmap.mmap(-1, size, flags=flags)
    except OSError as error:
        if size > APART:
            raise UserError(
                f"the plan needs {size} bytes of address space, though no memory: {error.strerror}"
            ) from None
        memory = (ctypes.c_ubyte * size).from_address(next(_nowhere))
    return _C.Tensor.wrap(memory, (size,), "uint8")


class Recorder:
    """Has a method for every op, which only notes the memory that the call would take on `device`.

    On a GPU a call takes one block of workspace, and all calls share the largest. On the CPU a call takes
    several blocks of scratch, which are kept for the next call: a run ends up with the largest first block of
    any call, the largest second one, and so on.
    """

    def __init__(self, device: str):
        self._device = device
        self._blocks: list[int] = []

    def __getattr__(self, op: str) -> Callable[..., None]:
        if op not in _C.specs:
            raise AttributeError(f"there is no op {op!r}")
        return lambda *args: self._note(op, args)

    def _note(self, op: str, args: tuple[Any, ...]) -> None:
        blocks = _C.scratch(op, *args) if self._device == CPU else (_C.workspace(op, *args),)
        ranked = itertools.zip_longest(self._blocks, sorted(blocks, reverse=True), fillvalue=0)
        self._blocks = [max(pair) for pair in ranked]

    @property
    def bytes(self) -> int:
        """What the ops hold at most."""
        return sum(self._blocks)
