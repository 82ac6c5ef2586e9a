"""A layout: the buffers that lie one after the other in one piece of memory. It is its plan and its map.

`plan` adds up the layouts of a run, and the model cuts its arena by the same layouts. So a run cannot use
what was not planned.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from longlora import Tensor

SIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "int32": 4}  # bytes of an element
ALIGN = 64  # bytes
Shape = tuple[int, ...]
Wanted = Mapping[str, tuple[Shape, str]]  # name -> (shape, dtype)


@dataclass(frozen=True)
class Buffer:
    """A piece of memory: offset in bytes, shape and dtype."""

    offset: int
    shape: Shape
    dtype: Any  # a name of SIZES

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * SIZES[self.dtype]

    def view(self, arena: Tensor, start: int = 0) -> Tensor:
        """The Tensor of this buffer, in a layout that begins at byte `start` of `arena`."""
        return arena.view(self.shape, self.dtype, start + self.offset)


class Layout:
    """Hands out buffers. `size` is their sum in bytes; `parts`, name -> bytes, says what they are for."""

    def __init__(self) -> None:
        self.size = 0
        self.parts: dict[str, int] = {}

    def add(self, shape: Shape, dtype: str) -> Buffer:
        """Add a buffer behind all others."""
        buffer = Buffer(self.size, tuple(shape), dtype)
        self.size += -(-buffer.nbytes // ALIGN) * ALIGN
        return buffer

    def add_all(self, wanted: Wanted) -> dict[str, Buffer]:
        """Add several -> name -> Buffer."""
        return {name: self.add(*buffer) for name, buffer in wanted.items()}

    def take_turns(self, *alternatives: Wanted) -> dict[str, Buffer]:
        """Add sets of buffers that share memory: only one set is in use at a time -> all, name -> Buffer."""
        start = end = self.size
        found: dict[str, Buffer] = {}
        for wanted in alternatives:
            self.size = start
            found |= self.add_all(wanted)
            end = max(end, self.size)
        self.size = end
        return found

    def end_part(self, name: str) -> None:
        """Name everything that was added since the last part ended."""
        self.parts[name] = self.parts.get(name, 0) + self.size - sum(self.parts.values())
