"""S²-Attn of a sequence in pieces, with autograd: the exchange of rows and the calls of the kernel.

The exchange is posted before the first kernel and awaited when only cut groups are left, in both passes.
Gradients that come back are added in the order of the ranks, so equal inputs give equal bits.
"""

import math
import struct
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longlora import _C
from longlora.ops import BOUNDARIES, SHIFTS, s2_attention_backward, s2_attention_forward
from longlora.torch.context_parallel.plan import plan_of
from longlora.torch.context_parallel.ranks import DTYPES, agree, process_group
from longlora.torch.ops.layout import dense

# The arguments that the ranks compare. T, the first, may differ.
FACTS = ("T", "B", "H", "K", "D", "group_size", "shift", "dtype", "scale", "requires_grad")

# ---- the exchange

_sent = 0


def bytes_sent() -> int:
    """The bytes that this process has sent for S²-Attn since it began."""
    return _sent


def _post(group, sends, receives):
    """Start to send and receive (tensor, rank) pairs -> what _wait takes, which keeps the tensors alive."""
    global _sent
    _sent += sum(x.nbytes for x, _ in sends)
    ops = [dist.P2POp(dist.irecv, x, group=group, group_peer=peer) for x, peer in receives if x.numel()]
    ops += [dist.P2POp(dist.isend, x, group=group, group_peer=peer) for x, peer in sends if x.numel()]
    return (dist.batch_isend_irecv(ops) if ops else []), ops


def _wait(pending):
    for work in pending[0]:
        work.wait()


def _message(m, like, B, D):
    """A new tensor for the rows of message m, K and V [rows,2,B,heads,D]."""
    return like.new_empty(m.last - m.first, 2, B, m.kv.last - m.kv.first, D)


def _packed(m, plan, k, v):
    """The rows of message m, copied from this rank's k and v [B,T,K,D]."""
    rows = _message(m, k, k.shape[0], k.shape[3])
    for which, x in enumerate((k, v)):
        part = x[:, m.first - plan.begin : m.last - plan.begin, m.kv.first : m.kv.last]
        rows[:, which] = part.transpose(0, 1)
    return rows


def _buffers(plan, like, B, D):
    """For each kind of KV heads, space for the rows before the piece, K and V [rows,2,B,heads,D].

    Rows come first, because each message fills some of them and should lie in memory as one.
    """
    return [like.new_empty(rows, 2, B, kv.last - kv.first, D) for rows, kv in zip(plan.prefix, plan.kinds)]


def _arrivals(plan, buffers):
    """For every message to this rank, the part of the buffers that holds its rows, and the message."""
    for m in plan.receives:
        number = plan.kinds.index(m.kv)
        offset = plan.begin - plan.prefix[number]
        yield buffers[number][m.first - offset : m.last - offset], m


def _add_arrived(dkv, plan, arrived):
    """Add the gradients that other ranks sent back to dkv [2,B,T,K,D].

    They are summed in float32, in the order of the ranks, and rounded once.
    """
    for kv in plan.kinds:
        mine = [(rows, m) for rows, m in arrived if m.kv == kv]
        if mine:
            first = min(m.first for _, m in mine) - plan.begin
            rows_of = dkv[:, :, first:, kv.first : kv.last]
            total = rows_of.float()
            for rows, m in mine:
                at = slice(m.first - plan.begin - first, m.last - plan.begin - first)
                total[:, :, at] += rows.permute(1, 2, 0, 3, 4)
            rows_of.copy_(total)


# ---- the calls of the kernel


def _queries(c, x):
    """The rows and query heads of call c in x [B,T,H,D], a view."""
    return x[:, c.first : c.last, c.h0 : c.h1]


def _keys(c, x):
    """The rows and KV heads of call c in x [B,T,K,D], a view."""
    return x[:, c.first : c.last, c.k0 : c.k1]


def _statistics(c, lse):
    """The rows and query heads of call c in lse [B,H,T], a view."""
    return lse[:, c.h0 : c.h1, c.first : c.last]


def _padded(c, x):
    """The queries of a cut group [B,N,heads,D]: zeros for the received rows, then the piece's own."""
    x = _queries(c, x)
    return torch.cat([x.new_zeros(x.shape[0], c.prefix, *x.shape[2:]), x], 1)


def _whole(c, buffers, k, v):
    """K and V of a cut group [B,N,heads,D]: the received rows, then the piece's own."""
    received = buffers[c.kv][len(buffers[c.kv]) - c.prefix :].transpose(0, 2)
    return [torch.cat([received[:, which], _keys(c, x)], 1) for which, x in enumerate((k, v))]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, plan, group_size, scale, group):
        B, T, H, D = q.shape
        out, lse = q.new_empty(B, T, H, D), q.new_empty(B, H, T, dtype=torch.float32)
        buffers = _buffers(plan, k, B, D)
        sends = [(_packed(m, plan, k, v), m.target) for m in plan.sends]
        pending = _post(group, sends, [(rows, m.source) for rows, m in _arrivals(plan, buffers)])
        for c in plan.local:
            _C.s2_attention_forward(
                _queries(c, out),
                _statistics(c, lse),
                _queries(c, q),
                _keys(c, k),
                _keys(c, v),
                None,
                group_size,
                BOUNDARIES["split"],
                SHIFTS[c.shift],
                scale,
            )
        _wait(pending)
        for c in plan.cut:
            keys, values = _whole(c, buffers, k, v)
            o, s = s2_attention_forward(
                _padded(c, q), keys, values, group_size=group_size, shift="none", scale=scale
            )
            _queries(c, out).copy_(o[:, c.prefix :])
            _statistics(c, lse).copy_(s[:, :, c.prefix :])
        ctx.save_for_backward(q, k, v, out, lse, *buffers)
        ctx.plan, ctx.group_size, ctx.scale, ctx.group = plan, group_size, scale, group
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        q, k, v, out, lse, *buffers = ctx.saved_tensors
        plan, dout = ctx.plan, dense(dout)
        (B, T, _, D), K = q.shape, k.shape[2]
        dq, dkv = q.new_empty(q.shape), k.new_empty(2, B, T, K, D)
        # The second term of the gradients of the KV head that serves both kinds of head, if there is one.
        second = k.new_empty(2, B, T, int(plan.shared >= 0), D)
        shares = [x.zero_() for x in _buffers(plan, k, B, D)]

        def target(c):
            return second[:, :, c.first : c.last] if c.again else dkv[:, :, c.first : c.last, c.k0 : c.k1]

        # Cut groups come first, because other ranks wait for the gradients of the rows that they sent.
        for c in plan.cut:
            # With out, dout and lse of zero, the queries of received rows have a probability of exp(0) and
            # gradients of zero.
            before = lse.new_zeros(B, c.h1 - c.h0, c.prefix)
            keys, values = _whole(c, buffers, k, v)
            gq, *gkv = s2_attention_backward(
                _padded(c, dout),
                _padded(c, q),
                keys,
                values,
                _padded(c, out),
                torch.cat([before, _statistics(c, lse)], 2),
                group_size=ctx.group_size,
                shift="none",
                scale=ctx.scale,
            )
            _queries(c, dq).copy_(gq[:, c.prefix :])
            for which, g in enumerate(gkv):
                shares[c.kv][len(shares[c.kv]) - c.prefix :, which] += g[:, : c.prefix].transpose(0, 1)
                target(c)[which].copy_(g[:, c.prefix :])
        sends = [(rows, m.source) for rows, m in _arrivals(plan, shares)]
        arrived = [(_message(m, k, B, D), m) for m in plan.sends]
        pending = _post(ctx.group, sends, [(rows, m.target) for rows, m in arrived])
        for c in plan.local:
            _C.s2_attention_backward(
                _queries(c, dq),
                *target(c),
                _queries(c, dout),
                _queries(c, q),
                _keys(c, k),
                _keys(c, v),
                _queries(c, out),
                _statistics(c, lse),
                None,
                ctx.group_size,
                BOUNDARIES["split"],
                SHIFTS[c.shift],
                ctx.scale,
            )
        if plan.shared >= 0:
            dkv[:, :, :, plan.shared : plan.shared + 1] += second
        _wait(pending)
        _add_arrived(dkv, plan, arrived)
        return dq, *dkv, None, None, None, None


# ---- the function


def _refused(q, k, v, group_size, boundary, shift):
    """The error in a rank's own arguments, or None."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        tensor = isinstance(x, Tensor)
        if not tensor or x.dtype not in DTYPES or x.dtype != q.dtype or x.device != q.device:
            got = f"{x.dtype} on {x.device}" if tensor else type(x).__name__
            return TypeError(
                f"s2_attention: {name} should be a float32, bfloat16 or float16 tensor, of q's dtype and "
                f"device, got {got}"
            )
        if x.ndim != 4 or x.shape[:2] != q.shape[:2] or x.shape[3] != q.shape[3]:
            return ValueError(
                f"s2_attention: {name} should be [B,T,heads,D] with q's B, T and D, got {list(x.shape)} "
                f"and q {list(q.shape)}"
            )
    if v.shape != k.shape or not k.shape[2] or q.shape[2] % k.shape[2]:
        return ValueError(
            f"s2_attention: k and v should have one K that divides H={q.shape[2]}, got {k.shape[2]} and "
            f"{v.shape[2]}"
        )
    if not isinstance(group_size, int) or group_size < 1:
        return ValueError(f"s2_attention: group_size should be an integer of at least 1, got {group_size!r}")
    if shift not in SHIFTS:
        return ValueError(f"s2_attention: shift should be one of {', '.join(SHIFTS)}, got {shift!r}")
    if boundary != "split":
        return ValueError(
            "s2_attention: over several ranks boundary should be 'split' ('wrap' and 'swap' connect the two "
            f"ends of the sequence), got {boundary!r}"
        )
    return None


def _facts(q, k, v, group_size, shift, scale):
    """FACTS of these arguments, as integers."""
    (bits,) = struct.unpack("q", struct.pack("d", scale))
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    B, T, H, D = q.shape
    return T, B, H, k.shape[2], D, group_size, SHIFTS[shift], DTYPES.index(q.dtype), bits, int(grad)


@torch.compiler.disable
def s2_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group_size: int,
    group: Any,
    boundary: str = "split",
    shift: str = "half",
    scale: float | None = None,
    lengths: Sequence[int] | None = None,
) -> Tensor:
    """S²-Attn of one sequence in contiguous pieces on the ranks of `group` -> this rank's piece of out.

    q [B,T,H,D], k and v [B,T,K,D] of one dtype, float32, bfloat16 or float16 (autocast's, under autocast):
    this rank's piece, rotated by its positions in the whole sequence. T is the rank's own and may be 0. out
    [B,T,H,D]. group: a ProcessGroup or a DeviceMesh (of one dimension, or with one named "cp"); its ranks
    are in the order of the pieces. group_size, shift and scale as in longlora.ops.s2_attention_forward;
    boundary "split" only.

    lengths: the tokens of each rank's piece, as `lengths()` gives them. Without it the ranks exchange them
    here and compare all arguments; if one rank refuses its own, or they differ, TypeError or ValueError on
    every rank. With it the ranks send nothing but the rows that `exchange` counts.

    Every rank makes the same calls in the same order, forward and backward. LongLoRA section 3.2.
    """
    if isinstance(q, Tensor) and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in (q, k, v))
    group = process_group("s2_attention", group)
    error = _refused(q, k, v, group_size, boundary, shift)
    facts = (0,) * len(FACTS)
    if error is None:
        scale = 1 / math.sqrt(max(q.shape[-1], 1)) if scale is None else float(scale)
        facts = _facts(q, k, v, group_size, shift, scale)
    if lengths is None:
        device = q.device if isinstance(q, Tensor) else "cpu"
        lengths = agree("s2_attention", dict(zip(FACTS, facts)), error, group, device)
    elif error is not None:
        raise error
    elif len(lengths) != dist.get_world_size(group) or lengths[dist.get_rank(group)] != q.shape[1]:
        raise ValueError(
            f"s2_attention: lengths should have {dist.get_world_size(group)} entries, for rank "
            f"{dist.get_rank(group)} T={q.shape[1]}, got {list(lengths)}"
        )
    plan = plan_of(tuple(lengths), dist.get_rank(group), group_size, q.shape[2], k.shape[2], shift)
    return _Attention.apply(dense(q), dense(k), dense(v), plan, group_size, scale, group)
