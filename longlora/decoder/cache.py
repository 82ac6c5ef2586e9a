"""The keys and values of sequences that are being continued."""

import numpy as np

from longlora import _C, Tensor
from longlora.decoder.config import ModelConfig
from longlora.device import CPU
from longlora.memory.layout import Buffer, Layout

Pairs = list[tuple[Tensor, Tensor]]  # keys and values of each layer


def layout_of(
    config: ModelConfig, rows: int, places: int, dtype: str, sinks: int = 0
) -> tuple[Layout, list[tuple[Buffer, Buffer]], list[tuple[Buffer, Buffer]]]:
    """Plan a cache -> its Layout, and the Buffers of keys and values of each layer: [rows,places,K,D], and
    [rows,sinks,K,D] of a streaming cache."""
    layout = Layout()

    def pairs(count: int) -> list[tuple[Buffer, Buffer]]:
        shape = rows, count, config.num_key_value_heads, config.head_dim
        layers = range(config.num_hidden_layers if count else 0)
        return [(layout.add(shape, dtype), layout.add(shape, dtype)) for _ in layers]

    found = pairs(places), pairs(sinks)
    layout.end_part("cache of keys and values")
    return layout, *found


class Cache:
    """Keys and values for `rows` sequences of at most `places` tokens, in `dtype` on `device`.

    layers: keys and values of each layer, Tensors [rows,places,K,D].
    lengths: [rows], the tokens that each row has taken.
    limit: the tokens that a row can take; None if it takes any number. longest: the tokens that it can take
        in one pass.

    On the CPU memory is taken from the system as places are written.
    """

    limit: int | None
    longest: int

    def __init__(
        self,
        config: ModelConfig,
        rows: int,
        places: int,
        dtype: str = "float32",
        device: str = CPU,
        sinks: int = 0,
    ):
        layout, *buffers = layout_of(config, rows, places, dtype, sinks)
        self.rows, self.places, self.dtype, self.limit, self.longest = rows, places, dtype, places, places
        self.nbytes = layout.size
        self._arena = _C.Tensor((layout.size,), "uint8", device)
        self.layers: Pairs
        self._sinks: Pairs
        self.layers, self._sinks = (
            [(k.view(self._arena), v.view(self._arena)) for k, v in pairs] for pairs in buffers
        )
        self.lengths = np.zeros(rows, np.int64)

    def make_room(self, rows: np.ndarray, count: int) -> np.ndarray:
        """Prepare rows, int [B], for `count` more tokens each -> the keys before theirs in `layers`, int32.

        ValueError if they do not fit.
        """
        before = self.lengths[rows]
        if before.max() + count > self.places:
            raise ValueError(
                f"a sequence of {before.max() + count} tokens does not fit its row of {self.places} places"
            )
        return before.astype(np.int32)

    def add(self, rows: np.ndarray, count: int) -> None:
        """Note that rows have taken `count` more tokens each."""
        self.lengths[rows] += count

    def copy(self, source: int, target: int, start: int, stop: int) -> None:
        """Give row `target`, which holds `start` tokens, tokens start to stop of row `source`."""
        for pair in self.layers:
            for x in pair:
                x[target, start:stop].copy_(x[source, start:stop])
        self.lengths[target] = stop

    def keep(self, row: int, count: int) -> int:
        """Forget all but the first `count` tokens of a row -> how many it still has: count, or 0."""
        self.lengths[row] = count
        return count


def common(a: np.ndarray, b: np.ndarray) -> int:
    """How many first elements of two arrays are equal."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n
