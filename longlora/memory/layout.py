"""A layout: the buffers that lie in one piece of memory, one after the other. It is the plan of that memory and its map.

`plan` adds up the layouts of a run, and the model cuts its arena by the same ones: a run cannot use what was not planned.
"""

import math
from dataclasses import dataclass

SIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "int32": 4}  # bytes of an element
ALIGN = 64  # bytes


@dataclass(frozen=True)
class Buffer:
    """A piece of memory: its offset in bytes, its shape and its dtype."""

    offset: int
    shape: tuple
    dtype: str

    @property
    def nbytes(self):
        return math.prod(self.shape) * SIZES[self.dtype]

    def view(self, arena, start=0):
        """The Tensor of this buffer; the layout begins at byte `start` of `arena`."""
        return arena.view(self.shape, self.dtype, start + self.offset)


class Layout:
    """Hands out buffers one after the other. `size` is their sum in bytes; `parts` says what they are for, name -> bytes."""

    def __init__(self):
        self.size, self.parts = 0, {}

    def add(self, shape, dtype):
        """-> Buffer behind all others."""
        buffer = Buffer(self.size, tuple(shape), dtype)
        self.size += -(-buffer.nbytes // ALIGN) * ALIGN
        return buffer

    def add_all(self, wanted):
        """wanted: name -> (shape, dtype) -> dict of name -> Buffer."""
        return {name: self.add(*buffer) for name, buffer in wanted.items()}

    def take_turns(self, *alternatives):
        """As add_all, for dicts that are never in use at the same time: they take the same memory -> one dict of all of them."""
        start = end = self.size
        found = {}
        for wanted in alternatives:
            self.size = start
            found |= self.add_all(wanted)
            end = max(end, self.size)
        self.size = end
        return found

    def end_part(self, name):
        """Names everything that was added since the last part ended."""
        self.parts[name] = self.parts.get(name, 0) + self.size - sum(self.parts.values())
