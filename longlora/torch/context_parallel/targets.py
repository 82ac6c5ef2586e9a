"""Targets of a sequence in pieces, and the loss over all ranks."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from longlora.ops import IGNORE
from longlora.torch.context_parallel.ranks import process_group


def next_tokens(ids: Tensor, dim: int = -1, ignore_index: int = IGNORE) -> Tensor:
    """The targets of the whole sequence ids: the token after each one, and ignore_index after the last.

    Call it before `split`: the last target of a piece is the first token of the right neighbour's.
    """
    if not ids.shape[dim]:
        return ids.clone()
    end = torch.full_like(ids.narrow(dim, 0, 1), ignore_index)
    return torch.cat([ids.narrow(dim, 1, ids.shape[dim] - 1), end], dim)


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, total, count, groups, factor):
        both = torch.stack([total.detach().double(), count.double()])
        for group in groups:
            dist.all_reduce(both, group=group)
        ctx.weight = factor / both[1]
        return (both[0] / both[1]).to(total.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        return (dloss * ctx.weight).to(dloss.dtype), None, None, None


def loss(
    total: Tensor, targets: Tensor, group: Any, *, gradients: str = "mean", ignore_index: int = IGNORE
) -> Tensor:
    """The loss of a step: the sum over all ranks' targets divided by their number -> 0-d, equal on every
    rank.

    total: 0-d, the sum of the losses over this rank's targets (cross_entropy with reduction="sum"). targets:
    integers of any shape, this rank's piece of `next_tokens`; ignore_index does not count. group: the
    ProcessGroup or DeviceMesh (all its dimensions) over which the gradients of the parameters are reduced
    afterwards, data parallel ranks included. nan if there is no target.

    backward() gives each rank the gradient of its own targets' share. gradients says how the shares are
    combined: "mean", as DDP and FSDP2 average them over the ranks of `group`, or "sum" for an all_reduce(SUM)
    of your own. ValueError for another word or a total that is not 0-d.
    """
    if gradients not in ("mean", "sum"):
        raise ValueError(f"loss: gradients should be 'mean' or 'sum', got {gradients!r}")
    if total.ndim:
        raise ValueError(f"loss: total should be a sum, 0-d, got {list(total.shape)}")
    if isinstance(group, DeviceMesh):
        groups = [process_group("loss", group.get_group(dim)) for dim in range(group.ndim)]
    else:
        groups = [process_group("loss", group)]
    ranks = 1
    for each in groups:
        ranks *= dist.get_world_size(each)
    return _Mean.apply(total, (targets != ignore_index).sum(), groups, ranks if gradients == "mean" else 1)
