"""The keys and values of sequences that are being continued."""

import numpy as np

from longlora import _C, Tensor
from longlora.decoder.config import ModelConfig
from longlora.device import CPU
from longlora.memory.layout import Layout


def layout_of(config: ModelConfig, rows: int, places: int, dtype: str) -> tuple[Layout, list]:
    """Plan a cache -> its Layout, and the Buffers of keys and values of each layer, [rows,places,K,D]."""
    layout, shape = Layout(), (rows, places, config.num_key_value_heads, config.head_dim)
    buffers = [(layout.add(shape, dtype), layout.add(shape, dtype)) for _ in range(config.num_hidden_layers)]
    layout.end_part("cache of keys and values")
    return layout, buffers


class Cache:
    """Keys and values for `rows` sequences of at most `places` tokens, in `dtype` on `device`.

    layers: keys and values of each layer, Tensors [rows,places,K,D].
    lengths: int32 [rows], the tokens that each row holds. To forget a row's last tokens, make it smaller.

    On the CPU memory is taken from the system as places are written.
    """

    def __init__(
        self, config: ModelConfig, rows: int, places: int, dtype: str = "float32", device: str = CPU
    ):
        layout, buffers = layout_of(config, rows, places, dtype)
        self.rows, self.places, self.dtype = rows, places, dtype
        self.nbytes = layout.size
        self._arena = _C.Tensor((layout.size,), "uint8", device)
        self.layers: list[tuple[Tensor, Tensor]] = [
            (k.view(self._arena), v.view(self._arena)) for k, v in buffers
        ]
        self.lengths = np.zeros(rows, np.int32)
