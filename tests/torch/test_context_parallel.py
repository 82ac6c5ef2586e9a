"""S²-Attn over ranks of torch.distributed.

Cases that need processes are in context_parallel_worker.py, which is started once for each number of ranks.
"""

import json
import os
from pathlib import Path

import checks
import context_parallel_worker as worker
import forked
import numpy as np
import pytest
import torch
from context_parallel_checks import FIXED, judge, to_numpy, to_torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longlora.torch import context_parallel as cp
from longlora.torch.context_parallel import attention as inside
from longlora.torch.context_parallel import costs
from longlora.torch.context_parallel.plan import plan_of

HERE = Path(__file__).resolve().parent
REPORTS = {}


def report(world, directory):
    """Case -> what went wrong on each rank."""
    if world not in REPORTS:
        env = {
            "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), os.environ["PYTHONPATH"]]),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        ranks = forked.run([HERE / "context_parallel_worker.py", world, directory], env=env)
        assert ranks.returncode == 0, ranks.stdout + ranks.stderr
        REPORTS[world] = [json.loads((directory / f"{rank}.json").read_text()) for rank in range(world)]
    return REPORTS[world]


@pytest.mark.parametrize(
    "world,case", [(world, case) for world in (2, 3, 4) for case in worker.case_names(world)]
)
def test_ranks(world, case, tmp_path_factory):
    for rank, cases in enumerate(report(world, tmp_path_factory.mktemp("ranks"))):
        assert not cases[case], f"rank {rank}:\n{cases[case]}"


# ---- without processes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "length,ranks,multiple",
    [(0, 3, 1), (1, 3, 1), (23, 4, 1), (64, 4, 16), (65, 4, 16), (7, 4, 16), (80, 3, 16)],
)
def test_pieces(length, ranks, multiple):
    sizes = cp.pieces(length, ranks, multiple)
    assert len(sizes) == ranks and sum(sizes) == length
    begins = [sum(sizes[:r]) for r in range(ranks)]
    assert all(a % multiple == 0 for a, n in zip(begins, sizes) if n)
    assert max(sizes) - min(sizes) <= 2 * multiple - 1


def test_worked_examples_of_pieces():
    assert cp.pieces(23, 4) == [6, 6, 6, 5] and cp.pieces(5, 1) == [5] and cp.pieces(0, 2) == [0, 0]
    assert cp.pieces(65, 4, 16) == [32, 16, 16, 1] and cp.pieces(7, 3, 16) == [7, 0, 0]
    assert cp.pieces(1, 1, 1) == [1]


def test_pieces_refuses():
    for arguments in ((-1, 2), (4, 0), (4, 2, 0)):
        with pytest.raises(ValueError, match="pieces: wanted"):
            cp.pieces(*arguments)


def test_next_tokens():
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert cp.next_tokens(ids).tolist() == [[2, 3, -100], [5, 6, -100]]
    assert cp.next_tokens(ids, dim=0, ignore_index=-1).tolist() == [[4, 5, 6], [-1, -1, -1]]
    assert cp.next_tokens(ids[:, :0]).shape == (2, 0)


def one_after_the_other(lengths, G, shift, scale, q, k, v, dout):
    """Run every rank's piece in this process -> out, dq, dk, dv of the whole, bytes of each pass by pair of
    ranks.

    Rows travel to the right in the forward pass and to the left in the backward pass, so ranks take turns.
    """
    boxes, totals = ({}, {}), ({}, {})
    turn = {}

    def post(group, sends, receives):
        for x, peer in sends:
            pair = turn["rank"], peer
            boxes[turn["pass"]].setdefault(pair, []).append(x.clone())
            totals[turn["pass"]][pair] = totals[turn["pass"]].get(pair, 0) + x.nbytes
        return receives

    def wait(receives):
        for x, peer in receives:
            x.copy_(boxes[turn["pass"]][peer, turn["rank"]].pop(0))

    H, K, ranks = q.shape[2], k.shape[2], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inside, "_post", post)
        patch.setattr(inside, "_wait", wait)
        for rank, T in enumerate(lengths):
            a = sum(lengths[:rank])
            turn.update({"rank": rank, "pass": 0})
            leaves = [to_torch(x[:, a : a + T]).requires_grad_() for x in (q, k, v)]
            plan = plan_of(tuple(lengths), rank, G, H, K, shift)
            ranks.append(
                (leaves, inside._Attention.apply(*leaves, plan, G, scale, None), to_torch(dout[:, a : a + T]))
            )
        for rank, (_, out, gradient) in reversed(list(enumerate(ranks))):
            turn.update({"rank": rank, "pass": 1})
            out.backward(gradient)
    assert not any(left for box in boxes for left in box.values())
    results = zip(*((out, *(x.grad for x in leaves)) for leaves, out, _ in ranks))
    return [np.concatenate([to_numpy(x) for x in pieces], 1) for pieces in results], totals


def checked_exchange(lengths, G, H, K, B, D, dtype, shift, scale=None):
    """Run both passes. The results equal those of one process, and both passes send what cp.exchange says.

    Returns what it says.
    """
    shapes = [(B, sum(lengths), heads, D) for heads in (H, K, K, H)]
    whole = [checks.random(shape, dtype, seed) for seed, shape in enumerate(shapes)]
    scale = D**-0.5 if scale is None else scale
    got, (there, back) = one_after_the_other(lengths, G, shift, scale, *whole)
    judge(got, whole, {"group_size": G, "shift": shift, "scale": scale})
    sent = cp.exchange(lengths, G, H, K, D, whole[0].dtype.itemsize, batch=B, shift=shift)
    assert there == sent == {(a, b): n for (b, a), n in back.items()}
    return sent


@pytest.mark.parametrize(
    "world, name", [(world, name) for world in FIXED for name in FIXED[world] if name != "long"]
)
def test_named_pieces(world, name):
    """The ranks send exactly the rows that the mask needs."""
    lengths, G, H, K, how = FIXED[world][name]
    how = {"B": 1, "D": 9, "dtype": "float32", "shift": "half", **how}
    sent = checked_exchange(lengths, G, H, K, **how)
    each = 2 * how["B"] * how["D"] * np.dtype(checks.DTYPES[how["dtype"]]).itemsize
    needed = worker.needed(lengths, G, H, K, how["shift"])
    assert sent == {pair: n * each for pair, n in needed.items()}


@settings(max_examples=80)
@given(st.data())
def test_any_pieces(data):
    draw = data.draw
    lengths = draw(st.lists(st.integers(0, 40), min_size=1, max_size=7))
    K, B, D = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 20))
    H, G = K * draw(st.integers(1, 5)), draw(st.integers(1, 60))
    dtype, shift = draw(st.sampled_from(list(checks.DTYPES))), draw(st.sampled_from(["half", "all", "none"]))
    checked_exchange(lengths, G, H, K, B, D, dtype, shift)


def test_what_is_sent_does_not_grow_with_the_length_or_the_ranks():
    for tokens, ranks in ((2**13, 1), (2**13, 2), (2**14, 32), (2**16, 1024)):
        sent = cp.exchange([tokens] * ranks, 2**13, 32, 8, 128, 2)
        assert sent == {(r, r + 1): 2 * 2**12 * 4 * 128 * 2 for r in range(ranks - 1)}


def test_the_table_of_the_docs_is_the_one_that_is_computed():
    assert cp.table() in (HERE.parents[1] / "docs/context_parallel.md").read_text()


def test_the_peers_formulas():
    """What ring attention and all-to-all send for one layer, both passes, step by step for four ranks."""
    L, N, H, K, D = 4096, 4, 8, 4, 16
    piece = L // N * D * 2
    ring = (N - 1) * 2 * K * piece + (N - 1) * 2 * K * piece + N * 2 * K * piece
    assert cp.ring_bytes(L, N, K, D, 2) == ring
    assert cp.all_to_all_bytes(L, N, H, K, D, 2) == 2 * (H + K + K + H) * piece * (N - 1) // N
    assert cp.all_to_all_bytes(L, 16, H, K, D, 2) is None
    # On 8 ranks each needs a KV head of its own: all 8 tensors have 8 heads, and 7/8 of a piece is sent.
    assert cp.all_to_all_bytes(L, 8, H, K, D, 2, batch=3) == 3 * 8 * 8 * (L // 8 * D * 2) * 7 // 8
    assert cp.ring_bytes(L, 1, K, D, 2) == 0 and cp.ring_bytes(L, N, K, D, 2, batch=3) == 3 * ring


def test_units_of_bytes_and_times():
    assert [costs._bytes(n) for n in (0, 1023, 1024, 1536, 2**20, 5 * 2**29, 2**40)] == [
        "0 B",
        "1.02e+03 B",
        "1 KiB",
        "1.5 KiB",
        "1 MiB",
        "2.5 GiB",
        "1024 GiB",
    ]
    rate = 1e9
    assert [costs._time(n, rate) for n in (2500, 999.4e3, 999.6e3, 2.5e6, 999.4e6, 999.6e6, 12e9)] == [
        "2.5 µs",
        "999 µs",
        "1 ms",
        "2.5 ms",
        "999 ms",
        "1 s",
        "12 s",
    ]


def test_the_busiest_rank():
    assert costs._busiest({(0, 1): 5, (0, 2): 4, (2, 1): 3}, 3) == 9
    assert costs._busiest({(0, 1): 5, (0, 2): 4, (2, 1): 6}, 3) == 11
    assert costs._busiest({}, 2) == 0


def test_a_small_table(monkeypatch):
    """With groups of 2^12 tokens, each message has K and V of 2^11 tokens and of two KV heads of size 2."""
    monkeypatch.setattr(costs, "SIZES", ((2**13, 2), (2**21, 8)))
    head, line, short, long = costs.table(group_size=2**12, H=4, K=4, D=2, itemsize=4).splitlines()
    assert head.startswith(
        "| tokens | ranks | tokens per rank | S²-Attn: bytes | S²-Attn: NVLink | S²-Attn: 4"
    )
    assert head.count("|") == line.count("|") == 13
    # One message in each pass: 2 x 2^11 x 2 x 2 x 4 bytes, at 450 and at 50 GB/s.
    s2 = "128 KiB | 0.291 µs | 2.62 µs"
    # A tensor of a piece has 2^12 x 4 x 2 x 4 bytes. Ring: 2 + 2 + 4 of them. All-to-all: half of 8 of them.
    assert short == f"| 8k | 2 | 4,096 | {s2} | 1 MiB | 2.33 µs | 21 µs | 512 KiB | 1.17 µs | 10.5 µs |"
    assert long.startswith(f"| 2M | 8 | 262,144 | {s2} | 352 MiB | 820 µs | 7.38 ms | ")
    assert long.endswith(" | not possible |  |  |")
