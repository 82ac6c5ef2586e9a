"""S²-Attn over torch.distributed: every rank of a group holds a contiguous piece of one sequence.

The rule of csrc/ops.h with boundary "split": a query at t of a plain head sees keys (t // G) * G .. t, of a shifted head the
same with borders 0, h, h + G, ..., h = G // 2. So a piece needs of the pieces before it only what lies between the border
left of its first token and that token: nothing for plain heads when pieces are whole groups, h tokens of K and V of the
shifted heads' KV heads from the one left neighbour. The backward pass sends the gradients of those rows back.

A piece [a, b) is computed for each kind of head as at most two calls of the kernel: [a, e), the rest of the group that the
piece begins in, after the rows received for it (the cut group, at most G rows, copied together), and [e, b), which begins at
a border and needs nobody; e = a or e = b where one of them is empty. Only the cut groups wait for the exchange. The queries
of the received rows are zeros, their results are thrown away: the price of a kernel that has as many queries as keys, at most
one group's attention for a kind of head, a fourth of that when pieces are whole groups.

Docs, with the table that `python -m longlora.torch.context_parallel` prints: docs/context_parallel.md.
"""

import struct
from dataclasses import dataclass
from functools import lru_cache
from math import sqrt
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from longlora import _C
from longlora.ops import IGNORE, SHIFTS, s2_attention_backward, s2_attention_forward, shifted_heads

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What the ranks compare, as integers, and how a message shows it. T, the first, is each one's own.
SHOWN = {
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
FACTS = ("T", "B", "H", "K", "D", "group_size", "shift", "dtype", "scale", "requires_grad")

# ---- who needs what ------------------------------------------------------------------------------


def _start(t, G, shifted):
    """The first key that a query at t sees, boundary "split"."""
    h = G // 2
    if not shifted:
        return t // G * G
    return 0 if t < h else h + (t - h) // G * G


def _end(t, G, shifted):
    """The border after t."""
    return G // 2 if shifted and t < G // 2 else _start(t, G, shifted) + G


class Kv(NamedTuple):
    """KV heads first .. last - 1, which serve query heads of these kinds (False plain, True shifted)."""

    first: int
    last: int
    kinds: tuple


class Message(NamedTuple):
    """Rows first .. last - 1 of the whole sequence, K and V, go from source to target for the KV heads kv."""

    source: int
    target: int
    kv: Kv
    first: int
    last: int


def _plain_heads(H, shift):
    return H - shifted_heads(H, shift)


def _kv_kinds(H, K, shift):
    """The KV heads by what they serve: plain heads only, both (at most one), shifted heads only."""
    plain, R = _plain_heads(H, shift), H // K
    both, rest = plain // R, -(-plain // R)
    kinds = Kv(0, both, (False,)), Kv(both, rest, (False, True)), Kv(rest, K, (True,))
    return [kv for kv in kinds if kv.first < kv.last]


@lru_cache(64)
def _messages(lengths, G, H, K, shift):
    """Every message of a forward pass, by rising target, then KV heads, then source."""
    messages, kinds, a = [], _kv_kinds(H, K, shift), 0
    for target, length in enumerate(lengths):
        for kv in kinds if length else ():
            need, source, b, found = min(_start(a, G, kind) for kind in kv.kinds), target, a, []
            while b > need:
                source -= 1
                first = max(need, b - lengths[source])
                if first < b:
                    found.append(Message(source, target, kv, first, b))
                b -= lengths[source]
            messages += reversed(found)
        a += length
    return messages


def exchange(lengths, group_size, H, K, D, itemsize, batch=1, shift="half"):
    """What one call sends: {(source, target): bytes} of the forward pass; the backward pass sends the same the other way.

    lengths: tokens of each rank's piece. Every row a message holds is a K and a V row of D numbers for each of its KV heads:
    2 * batch * rows * KV heads * D * itemsize bytes. A KV head that serves both kinds of head is sent once. With pieces of
    whole groups there is one message per border: 2 * batch * (G // 2) * (KV heads of shifted heads) * D * itemsize.
    """
    total = {}
    for m in _messages(tuple(lengths), group_size, H, K, shift):
        rows = batch * (m.last - m.first) * (m.kv.last - m.kv.first)
        total[m.source, m.target] = total.get((m.source, m.target), 0) + 2 * rows * D * itemsize
    return total


class Call(NamedTuple):
    """The kernel on rows first .. last - 1 of a piece, query heads h0 .. h1 - 1 with KV heads k0 .. k1 - 1.

    `prefix` received rows come before them, the last ones of what was received for KV heads number `kv` of the plan.
    again: these are the shifted heads of a KV head that serves plain ones too, so its gradients are a second term.
    """

    first: int
    last: int
    h0: int
    h1: int
    k0: int
    k1: int
    shift: str
    again: bool = False
    prefix: int = 0
    kv: int = 0


@dataclass(frozen=True)
class Plan:
    """One rank's part: what it sends and receives, and its calls of the kernel."""

    kinds: list  # of Kv
    begin: int  # the first token of the piece
    prefix: list  # rows received for each of `kinds`
    sends: list  # of Message
    receives: list
    local: list  # Calls that need nobody
    cut: list  # Calls with a prefix
    shared: int  # the KV head that calls of both kinds have, or -1


@lru_cache(64)
def _plan(lengths, rank, G, H, K, shift):
    a, T, R = sum(lengths[:rank]), lengths[rank], H // K
    kinds, plain = _kv_kinds(H, K, shift), _plain_heads(H, shift)
    messages = _messages(lengths, G, H, K, shift)
    local, cut, prefix, shared = [], [], [], -1
    for number, kv in enumerate(kinds):
        prefix.append(a - min(_start(a, G, kind) for kind in kv.kinds) if T else 0)
        for shifted in kv.kinds if T and a else ():
            h0, h1 = kv.first * R, kv.last * R
            if len(kv.kinds) == 2:
                h0, h1, shared = (plain, h1, kv.first) if shifted else (h0, plain, kv.first)
            heads = h0, h1, kv.first, kv.last, "none", shifted and shared == kv.first
            received, rest = a - _start(a, G, shifted), 0
            if received:
                rest = min(_end(a, G, shifted) - a, T)
                cut.append(Call(0, rest, *heads, received, number))
            if rest < T:
                local.append(Call(rest, T, *heads))
    if T and not a:
        local.append(Call(0, T, 0, H, 0, K, shift))
    return Plan(
        kinds,
        a,
        prefix,
        [m for m in messages if m.source == rank],
        [m for m in messages if m.target == rank],
        local,
        cut,
        shared,
    )


# ---- the group -----------------------------------------------------------------------------------

_sent = 0


def bytes_sent():
    """Bytes that this process has handed to isend for S²-Attn, since it began."""
    return _sent


def _process_group(op, group):
    """A ProcessGroup from a ProcessGroup or a DeviceMesh: of one dimension, or its dimension "cp"."""
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
            f"{op}: group should be a torch.distributed ProcessGroup or DeviceMesh, got {type(group).__name__}"
        )
    if dist.get_rank(group) < 0:
        raise ValueError(f"{op}: this process is not in the group")
    return group


def _agree(op, facts, error, group, device):
    """Rank by rank the value of facts' first entry; the others must be equal on all ranks, and no rank may have an error.

    All ranks call this, also those that found something wrong with their arguments, so that all of them stop.
    """
    mine = torch.tensor([error is not None, *facts.values()], dtype=torch.int64, device=device)
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, mine, group=group)
    every = torch.stack(every).tolist()
    if error is not None:
        raise error
    for rank, (bad, *_) in enumerate(every):
        if bad:
            raise ValueError(f"{op}: rank {rank} of the group refused its arguments and says there why")
    for column, name in enumerate(facts):
        values = [row[column + 1] for row in every]
        if column and len(set(values)) > 1:
            got = ", ".join(str(SHOWN[name](x)) for x in values)
            raise ValueError(f"{op}: all ranks should have the same {name}, got {got}")
    return tuple(row[1] for row in every)


def lengths(length, group, device="cpu"):
    """The piece lengths of all ranks, from each one's own: a collective call. device: one that the group communicates on."""
    error = None if length >= 0 else ValueError(f"lengths: length should be at least 0, got {length}")
    return _agree("lengths", {"length": length}, error, _process_group("lengths", group), device)


def pieces(length, ranks, multiple=1):
    """Lengths of contiguous pieces of `length` tokens: multiples of `multiple`, as even as that allows, the last ones shorter.

    multiple=group_size makes pieces of whole groups, for which plain heads exchange nothing.
    """
    if length < 0 or ranks < 1 or multiple < 1:
        raise ValueError(
            f"pieces: wanted length >= 0, ranks >= 1, multiple >= 1, got {length}, {ranks}, {multiple}"
        )
    blocks = -(-length // multiple)
    borders = [min(-(-blocks * r // ranks) * multiple, length) for r in range(ranks + 1)]
    return [b - a for a, b in zip(borders, borders[1:])]


def split(x, dim, group, multiple=1):
    """This rank's piece of the whole sequence x along `dim`, by `pieces`: a view."""
    group = _process_group("split", group)
    sizes, rank = pieces(x.shape[dim], dist.get_world_size(group), multiple), dist.get_rank(group)
    return x.narrow(dim, sum(sizes[:rank]), sizes[rank])


def positions(lengths, group, device=None):
    """The positions in the whole sequence of this rank's piece, int64 [T], for RoPE; lengths of all ranks."""
    rank = dist.get_rank(_process_group("positions", group))
    begin = sum(lengths[:rank])
    return torch.arange(begin, begin + lengths[rank], device=device)


def next_tokens(ids, dim=-1, ignore_index=IGNORE):
    """Targets of the whole sequence ids: the token after each one, ignore_index after the last.

    To be called before `split`, because the last target of a piece is the first token of the right neighbour's.
    """
    if not ids.shape[dim]:
        return ids.clone()
    end = torch.full_like(ids.narrow(dim, 0, 1), ignore_index)
    return torch.cat([ids.narrow(dim, 1, ids.shape[dim] - 1), end], dim)


# ---- the attention -------------------------------------------------------------------------------


def _post(group, sends, receives):
    """Starts sending and receiving (tensor, rank) -> what to wait for; it keeps the tensors alive."""
    global _sent
    _sent += sum(x.nbytes for x, _ in sends)
    ops = [dist.P2POp(dist.irecv, x, group=group, group_peer=peer) for x, peer in receives if x.numel()]
    ops += [dist.P2POp(dist.isend, x, group=group, group_peer=peer) for x, peer in sends if x.numel()]
    return (dist.batch_isend_irecv(ops) if ops else []), ops


def _wait(pending):
    for work in pending[0]:
        work.wait()


def _buffers(plan, B, D, like):
    """For each kind of KV heads the rows before the piece, [rows,2,B,heads,D], K and V: rows lie together, as they travel."""
    return [like.new_empty(rows, 2, B, kv.last - kv.first, D) for rows, kv in zip(plan.prefix, plan.kinds)]


def _arrivals(plan, buffers):
    """(rows, message) for every message to this rank: the part of the buffers where its rows belong."""
    for m in plan.receives:
        number = plan.kinds.index(m.kv)
        offset = plan.begin - plan.prefix[number]
        yield buffers[number][m.first - offset : m.last - offset], m


def _rows(call, buffers, x, which):
    """K (which 0) or V (1) of a cut group [B,N,heads,D]: the received rows, then the piece's own."""
    before = buffers[call.kv][len(buffers[call.kv]) - call.prefix :, which].transpose(0, 1)
    return torch.cat([before, x[:, call.first : call.last, call.k0 : call.k1]], 1)


def _padded(call, x):
    """Query rows of a cut group [B,N,heads,D]: zeros for the received rows, then the piece's own."""
    x = x[:, call.first : call.last, call.h0 : call.h1]
    return torch.cat([x.new_zeros(x.shape[0], call.prefix, *x.shape[2:]), x], 1)


def _part(call, x, kv=False):
    """A call's rows and heads of x [B,T,heads,D], a view."""
    return (
        x[:, call.first : call.last, call.k0 : call.k1]
        if kv
        else x[:, call.first : call.last, call.h0 : call.h1]
    )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, plan, group_size, scale, group):
        B, T, H, D = q.shape
        out, lse = q.new_empty(B, T, H, D), q.new_empty(B, H, T, dtype=torch.float32)
        buffers = _buffers(plan, B, D, k)
        sends = []
        for m in plan.sends:
            rows = k.new_empty(m.last - m.first, 2, B, m.kv.last - m.kv.first, D)
            for which, x in enumerate((k, v)):
                part = x[:, m.first - plan.begin : m.last - plan.begin, m.kv.first : m.kv.last]
                rows[:, which] = part.transpose(0, 1)
            sends.append((rows, m.target))
        pending = _post(group, sends, [(rows, m.source) for rows, m in _arrivals(plan, buffers)])
        for c in plan.local:
            _C.s2_attention_forward(
                _part(c, out),
                lse[:, c.h0 : c.h1, c.first : c.last],
                _part(c, q),
                _part(c, k, True),
                _part(c, v, True),
                None,
                group_size,
                0,
                SHIFTS[c.shift],
                scale,
            )
        _wait(pending)
        for c in plan.cut:
            o, s = s2_attention_forward(
                _padded(c, q),
                _rows(c, buffers, k, 0),
                _rows(c, buffers, v, 1),
                group_size=group_size,
                shift="none",
                scale=scale,
            )
            _part(c, out).copy_(o[:, c.prefix :])
            lse[:, c.h0 : c.h1, c.first : c.last] = s[:, :, c.prefix :]
        ctx.save_for_backward(q, k, v, out, lse, *buffers)
        ctx.plan, ctx.group_size, ctx.scale, ctx.group = plan, group_size, scale, group
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        q, k, v, out, lse, *buffers = ctx.saved_tensors
        plan, dout = ctx.plan, _dense(dout)
        (B, T, H, D), K = q.shape, k.shape[2]
        dq, dkv = q.new_empty(q.shape), k.new_empty(2, B, T, K, D)
        second = k.new_empty(2, B, T, 1, D) if plan.shared >= 0 else None
        shares = [x.zero_() for x in _buffers(plan, B, D, k)]

        def target(c):
            return second[:, :, c.first : c.last] if c.again else dkv[:, :, c.first : c.last, c.k0 : c.k1]

        # The cut groups first: the neighbours wait for their share.
        for c in plan.cut:
            # With out, dout and lse of zero the received rows' queries have a probability of exp(0) and gradients of zero.
            before = lse.new_zeros(B, c.h1 - c.h0, c.prefix)
            gq, *gkv = s2_attention_backward(
                _padded(c, dout),
                _padded(c, q),
                _rows(c, buffers, k, 0),
                _rows(c, buffers, v, 1),
                _padded(c, out),
                torch.cat([before, lse[:, c.h0 : c.h1, c.first : c.last]], 2),
                group_size=ctx.group_size,
                shift="none",
                scale=ctx.scale,
            )
            _part(c, dq).copy_(gq[:, c.prefix :])
            for which, g in enumerate(gkv):
                shares[c.kv][len(shares[c.kv]) - c.prefix :, which] += g[:, : c.prefix].transpose(0, 1)
                target(c)[which].copy_(g[:, c.prefix :])
        sends = [(rows, m.source) for rows, m in _arrivals(plan, shares)]
        arrived = [(k.new_empty(m.last - m.first, 2, B, m.kv.last - m.kv.first, D), m) for m in plan.sends]
        pending = _post(ctx.group, sends, [(rows, m.target) for rows, m in arrived])
        for c in plan.local:
            _C.s2_attention_backward(
                _part(c, dq),
                *target(c),
                _part(c, dout),
                _part(c, q),
                _part(c, k, True),
                _part(c, v, True),
                _part(c, out),
                lse[:, c.h0 : c.h1, c.first : c.last],
                None,
                ctx.group_size,
                0,
                SHIFTS[c.shift],
                ctx.scale,
            )
        if second is not None:
            dkv[:, :, :, plan.shared : plan.shared + 1] += second
        _wait(pending)
        # Shares of the right neighbours, in the order of their ranks, summed in float32 and rounded once.
        for kv in plan.kinds:
            mine = [(rows, m) for rows, m in arrived if m.kv == kv]
            if mine:
                first = min(m.first for _, m in mine) - plan.begin
                rows_of = dkv[:, :, first:, kv.first : kv.last]
                total = rows_of.float()
                for rows, m in mine:
                    total[:, :, m.first - plan.begin - first : m.last - plan.begin - first] += rows.permute(
                        1, 2, 0, 3, 4
                    )
                rows_of.copy_(total)
        return dq, *dkv, None, None, None, None


def _dense(x):
    return x if x.shape[-1] < 2 or x.stride(-1) == 1 else x.contiguous()


def _refused(q, k, v, group_size, boundary, shift):
    """The error that a rank's own arguments deserve, or None."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if (
            not isinstance(x, torch.Tensor)
            or x.dtype not in DTYPES
            or x.dtype != q.dtype
            or x.device != q.device
        ):
            got = f"{x.dtype} on {x.device}" if isinstance(x, torch.Tensor) else type(x).__name__
            return TypeError(
                f"s2_attention: {name} should be a float32, bfloat16 or float16 tensor, of q's dtype and device, "
                f"got {got}"
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
            "s2_attention: over several ranks boundary should be 'split' ('wrap' and 'swap' tie the two ends of "
            f"the sequence together), got {boundary!r}"
        )
    return None


@torch.compiler.disable
def s2_attention(q, k, v, *, group_size, group, boundary="split", shift="half", scale=None, lengths=None):
    """S²-Attn of one sequence whose contiguous pieces lie on the ranks of `group`, with autograd; LongLoRA section 3.2.

    q [B,T,H,D], k and v [B,T,K,D]: this rank's piece, RoPE with the positions in the whole sequence applied, T its own on
    each rank and possibly 0 -> out [B,T,H,D]. float32, bfloat16 or float16; under autocast its dtype. group: a ProcessGroup
    or a DeviceMesh (of one dimension, or with one named "cp"), ranks in the order of the pieces. group_size, shift and scale
    as longlora.ops.s2_attention_forward has them; boundary "split" only. lengths: the tokens of each rank's piece, as
    `lengths()` gives them. Without it the ranks tell each other here, and compare all arguments as well: TypeError or
    ValueError on every rank when one of them refuses its own or when they differ. With it nothing is sent but `exchange`.

    Every rank of the group makes the same calls in the same order, forward and backward; gradients of K and V rows that other
    ranks used come back in the backward pass and are summed in the order of the ranks: equal inputs give equal bits.
    """
    if isinstance(q, torch.Tensor) and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (
            x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in (q, k, v)
        )
    group = _process_group("s2_attention", group)
    error = _refused(q, k, v, group_size, boundary, shift)
    if error is None:
        B, T, H, D = q.shape
        K, scale = k.shape[2], 1 / sqrt(max(D, 1)) if scale is None else float(scale)
        (bits,) = struct.unpack("q", struct.pack("d", scale))
        grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        facts = T, B, H, K, D, group_size, SHIFTS[shift], DTYPES.index(q.dtype), bits, grad
    elif lengths is None:
        facts = (0,) * len(FACTS)
    else:
        raise error
    if lengths is None:
        device = q.device if isinstance(q, torch.Tensor) else "cpu"
        lengths = _agree("s2_attention", dict(zip(FACTS, facts)), error, group, device)
    elif len(lengths) != dist.get_world_size(group) or lengths[dist.get_rank(group)] != T:
        raise ValueError(
            f"s2_attention: lengths should have {dist.get_world_size(group)} entries, that of rank "
            f"{dist.get_rank(group)} being T={T}, got {list(lengths)}"
        )
    plan = _plan(tuple(lengths), dist.get_rank(group), group_size, H, K, shift)
    return _Attention.apply(_dense(q), _dense(k), _dense(v), plan, group_size, scale, group)


# ---- the loss ------------------------------------------------------------------------------------


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


def loss(total, targets, group, *, gradients="mean", ignore_index=IGNORE):
    """The loss of a step: the sum over the targets of all ranks divided by their number, the same value on every rank.

    total: 0-d, the sum of the losses over this rank's targets (cross_entropy with reduction="sum"). targets: those of this
    rank, integers of any shape; what is ignore_index does not count. Make them with `next_tokens` before `split`: the last
    target of a piece is a token of the right neighbour. group: a ProcessGroup, or a DeviceMesh, of which all dimensions count:
    the one over which the gradients of the parameters are reduced afterwards, data parallel ranks included.

    backward() gives each rank the gradient of its own targets' share. gradients says how the shares are combined: "mean", as
    DDP and FSDP2 average them over the ranks of `group`, or "sum" for one's own all_reduce(SUM). Without any target nan.
    """
    if gradients not in ("mean", "sum"):
        raise ValueError(f"loss: gradients should be 'mean' or 'sum', got {gradients!r}")
    if total.ndim:
        raise ValueError(f"loss: total should be a sum, 0-d, got {list(total.shape)}")
    if isinstance(group, DeviceMesh):
        groups = [_process_group("loss", group.get_group(dim)) for dim in range(group.ndim)]
    else:
        groups = [_process_group("loss", group)]
    ranks = 1
    for each in groups:
        ranks *= dist.get_world_size(each)
    return _Mean.apply(total, (targets != ignore_index).sum(), groups, ranks if gradients == "mean" else 1)


# ---- transformers --------------------------------------------------------------------------------


class _Model:
    """What enable() gives a model: its attention modules call it, its forward tells it the lengths of the pieces."""

    def __init__(self, group):
        self.group = group
        self.lengths = None  # of the forward pass under way
        self.seen = set()  # lengths of all forward passes
        self.compared = False  # the ranks have compared the arguments of an attention call
        self.hooks = []

    def __deepcopy__(self, memo):
        return self

    def before(self, model, args, kwargs):
        x = args[0] if args else kwargs.get("input_ids")
        x = kwargs.get("inputs_embeds") if x is None else x
        mask, given, error = kwargs.get("attention_mask"), kwargs.get("position_ids"), None
        if x is None or len(args) > 1:
            raise TypeError(
                "context parallel: input_ids or inputs_embeds should be given, all arguments but the first by name"
            )
        B, T = x.shape[:2]
        if not model.training:
            error = NotImplementedError(
                "context parallel: only training is done over several ranks; disable(model) first, or "
                "model.train()"
            )
        elif mask is not None and not bool((mask == 1).all()):
            error = ValueError(
                "context parallel: attention_mask should be None or all ones, got one that hides tokens; "
                "padding at the right end needs no mask, only targets of -100"
            )
        elif kwargs.get("past_key_values") is not None:
            error = ValueError("context parallel: past_key_values should be None, got a cache")
        elif kwargs.get("labels") is not None and kwargs.get("shift_labels") is None:
            error = ValueError(
                "context parallel: labels would be shifted inside each piece and lose a target at every border; "
                "use next_tokens, split and loss of longlora.torch.context_parallel"
            )
        facts = {"T": T, "B": B, "position_ids": given is not None}
        self.lengths = _agree("context parallel", facts, error, self.group, x.device)
        self.seen.add(self.lengths)
        whole = positions(self.lengths, self.group, x.device)[None]
        if given is not None:
            if given.shape[-1] != T or not bool((given == whole).all()):
                error = ValueError(
                    "context parallel: position_ids should be those of the piece in the whole sequence (packed "
                    "documents are not supported), or be left out"
                )
            _agree("context parallel", {"T": T}, error, self.group, x.device)
        kwargs.update(attention_mask=None, position_ids=whole)
        kwargs.setdefault("use_cache", False)
        return args, kwargs

    def after(self, *_):
        self.lengths = None

    def __call__(self, module, q, k, v, *, cu_seqlens, boundary, shift, scale, window):
        """What longlora.torch.attention calls: q [B,T,H,D], k and v [B,T,K,D] of a module's piece -> out [B,T,H,D]."""
        from longlora.torch.attention import group_size_of

        if not module.training:
            raise NotImplementedError(
                "context parallel: only training is done over several ranks, got a module in eval mode"
            )
        sizes = self.lengths
        if sizes is None:
            # Outside of the model's forward only to recompute checkpointed layers in the backward pass.
            if torch._C._current_graph_task_id() < 0:
                raise RuntimeError(
                    "context parallel: call the very model that enable() was given (not one around it, as PEFT's)"
                )
            # All ranks have seen the same set, so that they all ask or all do not.
            sizes = (
                next(iter(self.seen)) if len(self.seen) == 1 else lengths(q.shape[1], self.group, q.device)
            )
        if cu_seqlens is not None:
            raise ValueError(
                "context parallel: packed documents and padding are not supported, got an attention mask"
            )
        if window is not None and sum(sizes) > window:
            raise ValueError(
                f"context parallel: a sliding window of {window} tokens is active at {sum(sizes)}"
            )
        out = s2_attention(
            q,
            k,
            v,
            group_size=group_size_of(module.config, sum(sizes)),
            group=self.group,
            boundary=boundary,
            shift=shift,
            scale=scale,
            lengths=sizes if self.compared else None,
        )
        self.compared = True
        return out


def enable(model, mesh):
    """From now on the transformers model attends over the ranks of mesh in training; each rank gives it its own piece.

    model: one with attn_implementation="longlora_s2", or the PeftModel around it; before DDP or FSDP2 wrap it. The group size is
    configure()'s, or a quarter of the whole sequence. mesh: as `group` of s2_attention. Each call of the model takes input_ids
    [B,T] of this rank's piece: the ranks tell each other their lengths once, position_ids become those of the whole sequence.
    A mask that hides tokens, labels to be shifted inside the piece, packed documents, a cache and evaluation are refused. The
    loss is `loss`. Returns model.
    """
    name = model.config._attn_implementation
    if name != "longlora_s2":
        raise ValueError(f'enable: model should have attn_implementation="longlora_s2", got {name!r}')
    disable(model)
    state = _Model(_process_group("enable", mesh))
    for module in model.modules():
        module._longlora_cp = state
    state.hooks = [
        model.register_forward_pre_hook(state.before, with_kwargs=True),
        model.register_forward_hook(state.after, always_call=True),
    ]
    return model


def disable(model):
    """Undoes enable. Returns model."""
    for module in model.modules():
        state = module.__dict__.pop("_longlora_cp", None)
        for hook in state.hooks if state else ():
            hook.remove()
    return model


# ---- the table of the docs -----------------------------------------------------------------------

NVLINK, NETWORK = (
    450e9,
    400e9 / 8,
)  # bytes per second and direction: NVLink of an H100, a network port of 400 Gb/s


def _busiest(sent, ranks):
    """The most that one rank sends or receives, of {(source, target): bytes}."""
    out, into = [0] * ranks, [0] * ranks
    for (source, target), n in sent.items():
        out[source] += n
        into[target] += n
    return max(out + into)


def ring_bytes(length, ranks, K, D, itemsize, batch=1):
    """Ring attention, one layer, forward and backward, sent by a rank: K and V make N-1 steps in each pass, and in the
    backward pass their gradients make N: (2 (N-1) + 2 (N-1) + 2 N) L/N K D itemsize, 0 for one rank."""
    return 0 if ranks == 1 else batch * (6 * ranks - 4) * length * K * D * itemsize // ranks


def all_to_all_bytes(length, ranks, H, K, D, itemsize, batch=1):
    """All-to-all over heads, one layer, sent by a rank: q, k, v, out forward, their gradients backward, each (N-1)/N of a
    piece: 2 (N-1)/N L/N (2 H + 2 max(K, N)) D itemsize. None when there are more ranks than heads."""
    return (
        None
        if ranks > H
        else batch * 4 * (ranks - 1) * length * (H + max(K, ranks)) * D * itemsize // ranks**2
    )


def _bytes(n):
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.3g} {unit}"
        n /= 1024
    return f"{n:.4g} GiB"


def _time(n, rate):
    n = 1e6 * n / rate
    for unit in ("µs", "ms"):
        if n < 999.5:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} s"


def table(group_size=8192, H=32, K=8, D=128, itemsize=2):
    """The scaling table as Markdown: bytes and times of one layer, forward and backward, of the busiest rank. All computed."""
    head = ["tokens", "ranks", "tokens per rank"]
    head += [
        f"{name}: {what}"
        for name in ("S²-Attn", "ring", "all-to-all")
        for what in ("bytes", "NVLink", "400 Gb/s")
    ]
    rows = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    sizes = [
        (2**17, 8),
        (2**20, 64),
        (2**24, 1024),
        (2**20, 8),
        (2**22, 8),
        (2**24, 8),
        (2**24, 32),
        (2**24, 256),
        (2**20, 1024),
    ]
    for L, N in sizes:
        s2 = 2 * _busiest(exchange([L // N] * N, group_size, H, K, D, itemsize), N)
        cells = [f"{L // 2**20}M" if L >= 2**20 else f"{L // 2**10}k", str(N), f"{L // N:,}"]
        for n in (s2, ring_bytes(L, N, K, D, itemsize), all_to_all_bytes(L, N, H, K, D, itemsize)):
            cells += (
                ["not possible", "", ""] if n is None else [_bytes(n), _time(n, NVLINK), _time(n, NETWORK)]
            )
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
