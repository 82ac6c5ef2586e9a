"""S²-Attn over torch.distributed: each rank of a group holds one contiguous piece of a sequence.

The rule is that of csrc/ops.h with boundary "split": a query sees the keys of its group up to itself. The
groups of plain heads begin at 0, G, 2 G, ..., those of shifted heads at 0, h, h + G, ..., with h = G // 2.
So a piece needs only the rows between the group boundary left of its first token and that token. Where
pieces are whole groups, plain heads need nothing, and shifted heads need h rows of K and V from the left
neighbour. The backward pass sends the gradients of those rows back.

plan: which rows travel, and the calls of the kernel. ranks: the process group and its pieces. attention:
the exchange and the autograd function. targets: the loss. model: transformers. costs: the table of
docs/context_parallel.md, which `python -m longlora.torch.context_parallel` prints.
"""

from longlora.torch.context_parallel.attention import bytes_sent, s2_attention
from longlora.torch.context_parallel.costs import all_to_all_bytes, ring_bytes, table
from longlora.torch.context_parallel.model import disable, enable
from longlora.torch.context_parallel.plan import exchange, pieces
from longlora.torch.context_parallel.ranks import lengths, positions, split
from longlora.torch.context_parallel.targets import loss, next_tokens

__all__ = [
    "all_to_all_bytes",
    "bytes_sent",
    "disable",
    "enable",
    "exchange",
    "lengths",
    "loss",
    "next_tokens",
    "pieces",
    "positions",
    "ring_bytes",
    "s2_attention",
    "split",
    "table",
]
