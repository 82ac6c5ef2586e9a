"""The ranks of a process group: what they agree on, and which piece of the sequence each one holds."""

import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from longlora.ops import SHIFTS
from longlora.torch.context_parallel.plan import pieces

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The facts that ranks compare are integers; a message shows them like this.
SHOWN: dict[str, Callable[[int], Any]] = {
    "T": int,
    "B": int,
    "H": int,
    "K": int,
    "D": int,
    "group_size": int,
    "requires_grad": bool,
    "position_ids": bool,
    "shift": list(SHIFTS).__getitem__,
    "dtype": DTYPES.__getitem__,
    "scale": lambda bits: struct.unpack("d", struct.pack("q", bits))[0],
}


def process_group(op: str, group: Any) -> dist.ProcessGroup:
    """The ProcessGroup of a ProcessGroup or DeviceMesh. In a mesh of several dimensions it is that of "cp".

    TypeError for something else; ValueError for a mesh without "cp", or a group without this process. op
    names the caller.
    """
    if isinstance(group, DeviceMesh):
        if group.ndim > 1:
            if "cp" not in (group.mesh_dim_names or ()):
                raise ValueError(
                    f'{op}: group should be a mesh of one dimension or have one named "cp", got {group}'
                )
            group = group["cp"]
        group = group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"{op}: group should be a torch.distributed ProcessGroup or DeviceMesh, "
            f"got {type(group).__name__}"
        )
    if dist.get_rank(group) < 0:
        raise ValueError(f"{op}: this process is not in the group")
    return group


def agree(
    op: str,
    facts: dict[str, int],
    error: Exception | None,
    group: dist.ProcessGroup,
    device: torch.device | str,
) -> tuple[int, ...]:
    """Exchange the facts of all ranks -> the first fact of each rank, by rank.

    The other facts should be equal on all ranks; ValueError if they are not. All ranks call this, also one
    that has found an error in its own arguments, so that all ranks stop: that one raises its error, the
    others a ValueError that names it.
    """
    mine = torch.tensor([error is not None, *facts.values()], dtype=torch.int64, device=device)
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, mine, group=group)
    table = torch.stack(every).tolist()
    if error is not None:
        raise error
    for rank, (refused, *_) in enumerate(table):
        if refused:
            raise ValueError(f"{op}: rank {rank} of the group refused its arguments; its own error says why")
    for column, name in enumerate(facts):
        values = [row[column + 1] for row in table]
        if column and len(set(values)) > 1:
            got = ", ".join(str(SHOWN[name](x)) for x in values)
            raise ValueError(f"{op}: all ranks should have the same {name}, got {got}")
    return tuple(row[1] for row in table)


def lengths(length: int, group: Any, device: torch.device | str = "cpu") -> tuple[int, ...]:
    """Gather the lengths of all ranks' pieces from each rank's own: a collective call -> lengths by rank.

    device: one that the group communicates on. ValueError on every rank if one length is below 0.
    """
    error = None if length >= 0 else ValueError(f"lengths: length should be at least 0, got {length}")
    return agree("lengths", {"length": length}, error, process_group("lengths", group), device)


def split(x: Tensor, dim: int, group: Any, multiple: int = 1) -> Tensor:
    """This rank's piece of the whole sequence x along `dim`, as `pieces` divides it: a view of x."""
    group = process_group("split", group)
    sizes, rank = pieces(x.shape[dim], dist.get_world_size(group), multiple), dist.get_rank(group)
    return x.narrow(dim, sum(sizes[:rank]), sizes[rank])


def positions(lengths: Sequence[int], group: Any, device: torch.device | str | None = None) -> Tensor:
    """The positions of this rank's piece in the whole sequence, for RoPE -> int64 [T].

    lengths: those of all ranks' pieces.
    """
    rank = dist.get_rank(process_group("positions", group))
    begin = sum(lengths[:rank])
    return torch.arange(begin, begin + lengths[rank], device=device)
