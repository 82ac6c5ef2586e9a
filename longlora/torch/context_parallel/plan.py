"""Which rows of K and V travel between the ranks, and how a rank calls the kernel on its piece.

A piece [a, b) is computed for each kind of head by at most two calls of the kernel. [a, e) is the rest of
the group in which the piece begins, the cut group: it follows the rows received for it, at most G together.
[e, b) begins at a group boundary and needs no other rank. Either may be empty. Only cut groups wait for the
exchange.

The kernel has as many queries as keys, so the queries of received rows are zeros and their results are
dropped. This costs at most the attention of one group for each kind of head, a quarter of that where pieces
are whole groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from longlora.ops import shifted_heads


def pieces(length: int, ranks: int, multiple: int = 1) -> list[int]:
    """Divide `length` tokens into contiguous pieces -> the length of each rank's piece.

    All pieces but the last that is not empty are multiples of `multiple`, as even as that allows. With
    multiple=group_size they are whole groups, for which plain heads exchange nothing. ValueError for
    length < 0, ranks < 1 or multiple < 1.
    """
    if length < 0 or ranks < 1 or multiple < 1:
        raise ValueError(
            f"pieces: wanted length >= 0, ranks >= 1, multiple >= 1, got {length}, {ranks}, {multiple}"
        )
    blocks = -(-length // multiple)
    ends = [min(-(-blocks * r // ranks) * multiple, length) for r in range(ranks + 1)]
    return [b - a for a, b in zip(ends, ends[1:])]


def _start(t, G, shifted):
    """The first key that a query at t sees."""
    h = G // 2
    if not shifted:
        return t // G * G
    return 0 if t < h else h + (t - h) // G * G


def _end(t, G, shifted):
    """The group boundary after t."""
    return G // 2 if shifted and t < G // 2 else _start(t, G, shifted) + G


class Kv(NamedTuple):
    """KV heads first .. last - 1. They serve query heads of these kinds: False is plain, True is shifted."""

    first: int
    last: int
    kinds: tuple[bool, ...]


class Message(NamedTuple):
    """K and V in rows first .. last - 1 of the whole sequence, for the KV heads kv, from source to target."""

    source: int
    target: int
    kv: Kv
    first: int
    last: int


def _kv_kinds(H, K, shift):
    """The KV heads by the kinds of head they serve: plain, both (at most one KV head), shifted."""
    plain, R = H - shifted_heads(H, shift), H // K
    both, rest = plain // R, -(-plain // R)
    kinds = Kv(0, both, (False,)), Kv(both, rest, (False, True)), Kv(rest, K, (True,))
    return [kv for kv in kinds if kv.first < kv.last]


@lru_cache(64)
def _messages(lengths, G, H, K, shift):
    """All messages of a forward pass, by rising target, then KV heads, then source."""
    messages: list[Message] = []
    kinds, a = _kv_kinds(H, K, shift), 0
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


def exchange(
    lengths: Sequence[int],
    group_size: int,
    H: int,
    K: int,
    D: int,
    itemsize: int,
    batch: int = 1,
    shift: str = "half",
) -> dict[tuple[int, int], int]:
    """Count what one forward pass sends -> {(source, target): bytes}. The backward pass sends as much back.

    lengths: the tokens of each rank's piece; H query heads, K KV heads of D numbers of itemsize bytes. A
    message holds a K and a V row for each of its KV heads: 2 batch rows heads D itemsize bytes. A KV head
    that serves both kinds of query head is sent once. With pieces of whole groups there is one message for
    each boundary between pieces: 2 batch (G // 2) (KV heads that serve shifted heads) D itemsize.
    """
    total: dict[tuple[int, int], int] = {}
    for m in _messages(tuple(lengths), group_size, H, K, shift):
        rows = batch * (m.last - m.first) * (m.kv.last - m.kv.first)
        total[m.source, m.target] = total.get((m.source, m.target), 0) + 2 * rows * D * itemsize
    return total


class Call(NamedTuple):
    """The kernel on rows first .. last - 1 of a piece, query heads h0 .. h1 - 1, KV heads k0 .. k1 - 1.

    prefix: the number of received rows before them, the last ones received for KV heads number kv of the
    plan. again: the KV head of these shifted heads serves plain heads too, so this call gives the second
    term of its gradients.
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
    """One rank's part: its messages and its calls of the kernel."""

    kinds: list[Kv]
    begin: int  # the first token of the piece
    prefix: list[int]  # the number of rows received for each of `kinds`
    sends: list[Message]
    receives: list[Message]
    local: list[Call]  # without received rows
    cut: list[Call]  # with received rows
    shared: int  # the KV head that serves plain and shifted heads in two calls, or -1


@lru_cache(64)
def plan_of(lengths: tuple[int, ...], rank: int, G: int, H: int, K: int, shift: str) -> Plan:
    """Plan the part of `rank` where the ranks hold pieces of these lengths. Letters as in `exchange`."""
    a, T, R = sum(lengths[:rank]), lengths[rank], H // K
    kinds, plain = _kv_kinds(H, K, shift), H - shifted_heads(H, shift)
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
    sends = [m for m in messages if m.source == rank]
    receives = [m for m in messages if m.target == rank]
    return Plan(kinds, a, prefix, sends, receives, local, cut, shared)
