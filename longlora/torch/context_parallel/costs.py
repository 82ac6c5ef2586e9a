"""What S²-Attn, ring attention and all-to-all send, computed, as the table of docs/context_parallel.md."""

from longlora.torch.context_parallel.plan import exchange

NVLINK = 450e9  # bytes per second in one direction, an H100's
NETWORK = 400e9 / 8  # bytes per second in one direction, a port of 400 Gb/s
# The rows of the table: tokens and ranks.
SIZES = (
    (2**17, 8),
    (2**20, 64),
    (2**24, 1024),
    (2**20, 8),
    (2**22, 8),
    (2**24, 8),
    (2**24, 32),
    (2**24, 256),
    (2**20, 1024),
)


def _busiest(sent, ranks):
    """The bytes that the busiest rank sends or receives, from {(source, target): bytes}."""
    out, into = [0] * ranks, [0] * ranks
    for (source, target), n in sent.items():
        out[source] += n
        into[target] += n
    return max(out + into)


def ring_bytes(length: int, ranks: int, K: int, D: int, itemsize: int, batch: int = 1) -> int:
    """The bytes that a rank sends in ring attention for one layer, forward and backward.

    With N ranks and L tokens, K and V make N-1 steps in each pass and their gradients make N in the backward
    pass: (2 (N-1) + 2 (N-1) + 2 N) L/N K D itemsize. 0 for one rank.
    """
    return 0 if ranks == 1 else batch * (6 * ranks - 4) * length * K * D * itemsize // ranks


def all_to_all_bytes(
    length: int, ranks: int, H: int, K: int, D: int, itemsize: int, batch: int = 1
) -> int | None:
    """The bytes that a rank sends in all-to-all over the heads for one layer, forward and backward.

    With N ranks and L tokens, q, k, v and out travel forward and their gradients backward, (N-1)/N of a piece
    each: 2 (N-1)/N L/N (2 H + 2 max(K, N)) D itemsize. None where there are more ranks than heads.
    """
    if ranks > H:
        return None
    return batch * 4 * (ranks - 1) * length * (H + max(K, ranks)) * D * itemsize // ranks**2


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


def table(group_size: int = 8192, H: int = 32, K: int = 8, D: int = 128, itemsize: int = 2) -> str:
    """Compute the scaling table as Markdown: bytes and times of one layer, both passes, on the busiest
    rank."""
    head = ["tokens", "ranks", "tokens per rank"]
    for name in ("S²-Attn", "ring", "all-to-all"):
        head += [f"{name}: {what}" for what in ("bytes", "NVLink", "400 Gb/s")]
    rows = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for L, N in SIZES:
        s2 = 2 * _busiest(exchange([L // N] * N, group_size, H, K, D, itemsize), N)
        cells = [f"{L // 2**20}M" if L >= 2**20 else f"{L // 2**10}k", str(N), f"{L // N:,}"]
        for n in (s2, ring_bytes(L, N, K, D, itemsize), all_to_all_bytes(L, N, H, K, D, itemsize)):
            cells += (
                ["not possible", "", ""] if n is None else [_bytes(n), _time(n, NVLINK), _time(n, NETWORK)]
            )
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)
