"""Layouts: the places of buffers, and the size of a layout."""

import numpy as np

from longlora import Tensor
from longlora.memory.layout import ALIGN, Buffer, Layout


def test_buffers_lie_one_after_the_other():
    layout = Layout()
    found = [layout.add((3, 5), "float32"), layout.add((7,), "bfloat16"), layout.add((0, 4), "int32")]
    assert found == [
        Buffer(0, (3, 5), "float32"),
        Buffer(ALIGN, (7,), "bfloat16"),
        Buffer(2 * ALIGN, (0, 4), "int32"),
    ]
    assert [b.nbytes for b in found] == [60, 14, 0] and layout.size == 2 * ALIGN


def test_sets_that_take_turns_share_memory():
    layout = Layout()
    before = layout.add((16,), "float32")
    found = layout.take_turns(
        {"a": ((16,), "float32"), "b": ((16,), "float32")}, {"c": ((48,), "float32")}, {}
    )
    after = layout.add((1,), "int32")
    assert (before.offset, found["a"].offset, found["b"].offset, found["c"].offset) == (0, 64, 128, 64)
    assert after.offset == 64 + 48 * 4 and layout.size == after.offset + ALIGN


def test_parts_add_up_to_the_size():
    layout = Layout()
    layout.add((16,), "float32")
    layout.end_part("one")
    assert layout.parts == {"one": 64}
    layout.add_all({"a": ((32,), "float16"), "b": ((16,), "int32")})
    layout.end_part("two")
    layout.add((1,), "float32")
    layout.end_part("one")
    assert layout.parts == {"one": 128, "two": 128} and layout.size == 256


def test_views_of_an_arena():
    layout = Layout()
    layout.add((5,), "float32")
    buffer = layout.add((2, 3), "float32")
    arena = Tensor((layout.size + 64,), "uint8")
    view = buffer.view(arena, start=64)
    view.copy_(np.arange(6, dtype=np.float32).reshape(2, 3))
    np.testing.assert_array_equal(arena.numpy()[128:152].view(np.float32), np.arange(6))
    buffer.view(arena).copy_(np.full((2, 3), 7, np.float32))
    np.testing.assert_array_equal(arena.numpy()[64:88].view(np.float32), np.full(6, 7))
