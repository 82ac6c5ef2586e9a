"""A cache of fixed size for a sequence without end: its first tokens, and a window of recent ones.

This is StreamingLLM (arXiv 2309.17453). A model falls apart when its first tokens, the attention sinks, leave
a sliding window, so they stay. Attention sees the tokens that are kept as if they followed each other without
a gap: a key is rotated by its place in the cache, not by its place in the text.

Only differences of places matter to rope. So the window's keys keep the rotation of their places in the text,
and the sinks, which lie before them, are rotated further, by the number of forgotten places.
"""

from dataclasses import dataclass

import numpy as np

from longlora import _C
from longlora.decoder import rope as rope_
from longlora.decoder.cache import Cache
from longlora.decoder.config import ModelConfig
from longlora.decoder.generate import CHUNK
from longlora.device import CPU, Inputs
from longlora.errors import UserError


@dataclass(frozen=True)
class Window:
    """The first `start` tokens and the last `recent` ones. UserError for sizes that cannot be."""

    start: int
    recent: int

    def __post_init__(self) -> None:
        for name, value, least in (("start_size", self.start, 0), ("recent_size", self.recent, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UserError(f"{name} should be an integer of at least {least}, got {value!r}")

    @property
    def size(self) -> int:
        return self.start + self.recent

    @property
    def chunk(self) -> int:
        """Tokens of a prompt that are read at a time. Before they are read, as many are forgotten."""
        return max(1, min(CHUNK, self.recent // 4))

    @property
    def places(self) -> int:
        """Places of the cache. The window moves over them, and is moved back when it reaches their end."""
        return self.size + max(self.chunk, self.recent // 8)


class StreamingCache(Cache):
    """The keys and values of one sequence without end, as far as `window` keeps them.

    Before tokens are added, the oldest ones of the window are forgotten, so that with the new ones start +
    recent tokens are there.

    rope: of the model. layers: views that begin with the sinks.
    """

    def __init__(
        self, config: ModelConfig, window: Window, rope: rope_.Rope, dtype: str = "float32", device: str = CPU
    ):
        super().__init__(config, 1, window.places, dtype, device, window.start)
        self.window, self.limit, self.longest = window, None, window.chunk
        self._all, self._first, self._held = self.layers, 0, 0  # the first place in use, and the keys there
        self._whole = True  # False while tokens are forgotten: Ctrl-C may end that half way
        self._rotates = config.rope_layers or [True] * config.num_hidden_layers
        self._frequency, _ = rope_.inverse_frequencies(rope, config.head_dim)
        self._turn = [_C.Tensor((1, config.head_dim // 2), "float32", device) for _ in range(2)]
        self._zeros = _C.Tensor((1, window.start), "int32", device)
        self._zeros.fill(0)
        self._inputs = Inputs()

    @property
    def forgotten(self) -> int:
        """How many tokens have left the window."""
        return int(self.lengths[0]) - self._held

    def make_room(self, rows: np.ndarray, count: int) -> np.ndarray:
        over = self._held + count - self.window.size
        if over > 0:
            self._forget(over, count)
        return np.array([self._held], np.int32)

    def add(self, rows: np.ndarray, count: int) -> None:
        super().add(rows, count)
        self._held += count
        self._whole = True

    def keep(self, row: int, count: int) -> int:
        if count == self.lengths[row] and self._whole:
            return count
        if self.forgotten or not self._whole:
            count = 0
        self._whole = True
        self.lengths[row] = self._held = count
        self._look_from(0)
        return count

    def _look_from(self, first):
        self._first, self.layers = first, [(k[:, first:], v[:, first:]) for k, v in self._all]

    def _forget(self, over, count):
        """Forget the oldest `over` tokens of the window; there is room for `count` more then."""
        start, self._whole = self.window.start, False
        if start and not self.forgotten:
            for kept, here in zip(self._sinks, self.layers):
                for sinks, x in zip(kept, here):
                    sinks.copy_(x[:, :start])
        first, self._held = self._first + over, self._held - over
        if first + self._held + count > self.places:
            for pair in self._all:
                for x in pair:  # in pieces that do not overlap what they are copied from
                    for i in range(start, self._held, first):
                        end = min(i + first, self._held)
                        x[:, i:end].copy_(x[:, first + i : first + end])
            first = 0
        self._look_from(first)
        if start:
            self._write_sinks()

    def _write_sinks(self):
        """Write the sinks before the window, rotated further by the number of forgotten places."""
        angle = self.forgotten * self._frequency
        for table, values in zip(self._turn, (np.cos(angle), np.sin(angle))):
            self._inputs.put(table, values.astype(np.float32)[None])
        start = self.window.start
        for (keys, values), (k, v), rotates in zip(self._sinks, self.layers, self._rotates, strict=True):
            if rotates:
                _C.rope_forward(k[:, :start], keys, *self._turn, self._zeros)
            else:
                k[:, :start].copy_(keys)
            v[:, :start].copy_(values)
