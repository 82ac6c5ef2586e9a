"""Context parallelism in one process: errors, what ranks compare, and messages to other ranks."""

import math
import runpy
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch
import torch.distributed as dist

from longlora.torch import context_parallel as cp
from longlora.torch.context_parallel import attention as inside
from longlora.torch.context_parallel import ranks
from longlora.torch.context_parallel.plan import Kv, Message, plan_of
from longlora.torch.ops import s2_attention


def qkv(T=8, H=4, K=2, D=8, B=1, dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(B, T, heads, D, generator=draw).to(dtype) for heads in (H, K, K)]


def test_public_names():
    names = "all_to_all_bytes bytes_sent disable enable exchange lengths loss next_tokens pieces positions"
    assert cp.__all__ == [*names.split(), "ring_bytes", "s2_attention", "split", "table"]
    assert all(callable(getattr(cp, name)) for name in cp.__all__)


# ---- attention -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"lengths": [23]}, {"scale": 0.5}, {"shift": "all"}, {"shift": "none"}])
def test_one_rank_equals_the_operator(group, how):
    results = []
    alone = {name: value for name, value in how.items() if name != "lengths"}
    for function, more in ((cp.s2_attention, {"group": group, **how}), (s2_attention, alone)):
        leaves = [x.requires_grad_() for x in qkv(23)]
        out = function(*leaves, group_size=6, **more)
        out.square().sum().backward()
        results.append([out.detach(), *(x.grad for x in leaves)])
    assert all(map(torch.equal, *results))


def test_tensors_with_strides(group):
    q, k, v = qkv(9)
    want = cp.s2_attention(q, k, v, group_size=4, group=group)
    apart = [torch.stack([x, x], -1)[..., 0] for x in (q, k, v)]
    assert all(x.stride(-1) == 2 for x in apart)
    assert torch.equal(cp.s2_attention(*apart, group_size=4, group=group), want)
    leaf = q.clone().requires_grad_()
    cp.s2_attention(
        leaf, k, v, group_size=4, group=group
    ).sum().backward()  # the gradient of a sum has strides 0
    dense = q.clone().requires_grad_()
    out = cp.s2_attention(dense, k, v, group_size=4, group=group)
    out.backward(torch.ones_like(out))
    assert torch.equal(leaf.grad, dense.grad)


def test_heads_of_size_0(group):
    assert cp.s2_attention(*qkv(D=0), group_size=4, group=group).shape == (1, 8, 4, 0)


def test_autocast_decides_the_dtype(group):
    want = cp.s2_attention(*qkv(dtype=torch.bfloat16), group_size=4, group=group)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cp.s2_attention(*qkv(), group_size=4, group=group), want)
        with pytest.raises(TypeError, match="k should be a float32.*got torch.int64 on cpu"):
            cp.s2_attention(qkv()[0], qkv()[1].long(), qkv()[2], group_size=4, group=group)
        with pytest.raises(TypeError, match="v should be a float32.*got NoneType"):
            cp.s2_attention(*qkv()[:2], None, group_size=4, group=group)


X = torch.zeros(1, 8, 4, 8)
KEYS = torch.zeros(1, 8, 2, 8)


@pytest.mark.parametrize(
    "changes, error, words",
    [
        (dict(q=np.zeros((1, 8, 4, 8))), TypeError, "q should be a float32, .*got ndarray"),
        (dict(q=X.double()), TypeError, "q should be .*got torch.float64 on cpu"),
        (dict(k=KEYS.bfloat16()), TypeError, "k should be .*q's dtype and device, got torch.bfloat16 on cpu"),
        (dict(v=KEYS.to("meta")), TypeError, "v should be .*got torch.float32 on meta"),
        (dict(k=KEYS[0]), ValueError, r"k should be \[B,T,heads,D\].*got \[8, 2, 8\]"),
        (dict(k=KEYS[:, :7]), ValueError, r"k should be .*got \[1, 7, 2, 8\] and q \[1, 8, 4, 8\]"),
        (dict(v=KEYS.expand(2, 8, 2, 8)), ValueError, r"v should be .*got \[2, 8, 2, 8\]"),
        (dict(v=KEYS[..., :7]), ValueError, r"v should be .*got \[1, 8, 2, 7\]"),
        (dict(k=X[:, :, :3], v=X[:, :, :3]), ValueError, "one K that divides H=4, got 3 and 3"),
        (dict(k=X[:, :, :0], v=X[:, :, :0]), ValueError, "one K that divides H=4, got 0 and 0"),
        (dict(v=X), ValueError, "one K that divides H=4, got 2 and 4"),
        (dict(group_size=0), ValueError, "group_size should be an integer of at least 1, got 0"),
        (dict(group_size=2.5), ValueError, "group_size should be an integer of at least 1, got 2.5"),
        (dict(shift="full"), ValueError, "shift should be one of half, none, all, got 'full'"),
        (dict(boundary="wrap"), ValueError, "boundary should be 'split' .*got 'wrap'"),
        (dict(lengths=[8, 8]), ValueError, r"lengths should have 1 entries, for rank 0 T=8, got \[8, 8\]"),
        (dict(lengths=[7]), ValueError, r"lengths should have 1 entries, for rank 0 T=8, got \[7\]"),
    ],
)
def test_a_wrong_argument_is_named_with_and_without_lengths(group, changes, error, words):
    given = dict(q=X, k=KEYS, v=KEYS, group_size=1, group=group) | changes
    tensors = [given.pop(name) for name in "qkv"]
    for lengths in [given["lengths"]] if "lengths" in given else ([8], None):
        with pytest.raises(error, match=f"s2_attention: .*{words}"):
            cp.s2_attention(*tensors, **{**given, "lengths": lengths})


def test_ranks_compare_integers():
    q, k, v = qkv(T=7, H=6, K=3, D=5, B=2, dtype=torch.bfloat16)
    bits = int.from_bytes(struct.pack("<d", 0.25), "little")
    assert inside._facts(q, k, v, 9, "all", 0.25) == (7, 2, 6, 3, 5, 9, 2, 1, bits, 0)
    assert ranks.SHOWN["scale"](bits) == 0.25
    shown = {name: ranks.SHOWN[name](1) for name in inside.FACTS[1:] if name != "scale"}
    assert shown.pop("dtype") is torch.bfloat16 and shown.pop("shift") == "none"
    assert shown.pop("requires_grad") is True and set(shown.values()) == {1}
    v.requires_grad_()
    assert inside._facts(q, k, v, 9, "none", 1.0)[-1] == 1
    with torch.no_grad():
        assert inside._facts(q, k, v, 9, "none", 1.0)[-1] == 0


# ---- messages ------------------------------------------------------------------------------------


def test_messages_are_posted_together_and_counted(group, monkeypatch):
    waited = []
    work = SimpleNamespace(wait=lambda: waited.append(1))
    posted = []
    monkeypatch.setattr(dist, "batch_isend_irecv", lambda ops: posted.append(ops) or [work] * len(ops))
    sends = [(torch.zeros(3, 2), 0), (torch.zeros(0), 0)]
    receives = [(torch.zeros(5), 0), (torch.zeros(0), 0)]
    before = cp.bytes_sent()
    pending = inside._post(group, sends, receives)
    assert cp.bytes_sent() - before == 24
    ((first, then),) = posted
    assert first.op is dist.irecv and first.tensor is receives[0][0] and first.group_peer == 0
    assert then.op is dist.isend and then.tensor is sends[0][0] and then.group is first.group is group
    inside._wait(pending)
    assert len(waited) == 2
    inside._wait(inside._post(group, sends[1:], []))
    assert len(posted) == 1 and cp.bytes_sent() - before == 24


def test_the_rows_of_a_message():
    """Rank 1 has tokens 4 to 11. The message has tokens 6 and 7 of its KV heads 1 and 2."""
    plan = plan_of((4, 8), 1, 4, 4, 2, "none")
    k, v = (torch.arange(2 * 8 * 3 * 2.0).reshape(2, 8, 3, 2) + start for start in (0, 1000))
    rows = inside._packed(Message(1, 2, Kv(1, 3, (False,)), 6, 8), plan, k, v)
    assert rows.shape == (2, 2, 2, 2, 2)
    for at, token in enumerate((2, 3)):
        for which, x in enumerate((k, v)):
            assert torch.equal(rows[at, which], x[:, token, 1:3])


def test_gradients_from_other_ranks_are_rounded_once():
    """In bfloat16, 1 + 2^-8 is 1, but 1 + 3 x 2^-8 is above 1."""
    kv = Kv(0, 1, (False,))
    plan = plan_of((3, 3), 0, 8, 1, 1, "none")
    dkv = torch.ones(2, 1, 3, 1, 1, dtype=torch.bfloat16)
    small = torch.full((2, 2, 1, 1, 1), 2.0**-8, dtype=torch.bfloat16)
    arrived = [(small, Message(0, target, kv, 1, 3)) for target in (1, 2, 3)]
    inside._add_arrived(dkv, plan, arrived)
    assert dkv[0, 0, :, 0, 0].tolist() == dkv[1, 0, :, 0, 0].tolist() == [1, 1 + 2.0**-6, 1 + 2.0**-6]


@pytest.mark.parametrize("shift", ["half", "none", "all"])
@pytest.mark.parametrize("H, K", [(4, 2), (6, 2), (4, 4), (3, 1)])
@pytest.mark.parametrize(
    "lengths, G", [((5, 0, 7, 3), 4), ((4, 8), 4), ((1, 1, 9), 6), ((2, 6), 4), ((12,), 5), ((6, 6), 9)]
)
def test_the_calls_of_all_ranks_are_the_pattern(lengths, G, H, K, shift):
    """Every query is in one call, with the keys that the reference gives it, own or received."""
    mask = reference.attention_mask(sum(lengths), H, G, "split", shift)
    sent, arrived = [], []
    for rank, T in enumerate(lengths):
        plan, seen = plan_of(lengths, rank, G, H, K, shift), np.zeros_like(mask)
        assert plan.begin == sum(lengths[:rank])
        rows = [[] for _ in plan.kinds]
        for m in plan.receives:
            rows[plan.kinds.index(m.kv)] += range(m.first, m.last)
        for found, count in zip(rows, plan.prefix, strict=True):
            assert found == list(range(plan.begin - count, plan.begin))
        for c in plan.cut + plan.local:
            assert (c.prefix > 0) == (c in plan.cut) and c.first < c.last
            kv = plan.kinds[c.kv]
            assert c.prefix == 0 or (kv.first, kv.last) == (c.k0, c.k1) and c.prefix <= plan.prefix[c.kv]
            assert (c.h1 - c.h0) % (c.k1 - c.k0) == 0
            each = (c.h1 - c.h0) // (c.k1 - c.k0)
            assert all(c.k0 + (h - c.h0) // each == h // (H // K) for h in range(c.h0, c.h1))
            assert c.again == (c.k0 == plan.shared and c.h0 > c.k0 * (H // K))  # the other heads of a KV head
            begin = plan.begin + c.first - c.prefix
            inner = reference.attention_mask(c.prefix + c.last - c.first, c.h1 - c.h0, G, "split", c.shift)
            place = seen[c.h0 : c.h1, plan.begin + c.first : plan.begin + c.last, begin : plan.begin + c.last]
            assert not place.any()
            place |= inner[:, c.prefix :]
        piece = slice(plan.begin, plan.begin + T)
        assert np.array_equal(seen[:, piece], mask[:, piece])
        sent += plan.sends
        arrived += plan.receives
    assert sorted(sent) == sorted(arrived) and all(m.first < m.last for m in sent)


def test_the_program_prints_the_table(capsys):
    runpy.run_module("longlora.torch.context_parallel", run_name="__main__")
    assert capsys.readouterr().out == f"{cp.table()}\n"


# ---- ranks ---------------------------------------------------------------------------------------


def fake_ranks(monkeypatch, others):
    """This process is rank 0. The ranks from 1 on have the facts `others`."""

    def all_gather(every, mine, group):
        for x, row in zip(every, [mine.tolist(), *others], strict=True):
            x.copy_(torch.tensor(row))

    monkeypatch.setattr(dist, "get_world_size", lambda group: 1 + len(others))
    monkeypatch.setattr(dist, "all_gather", all_gather)


def test_ranks_with_different_facts_are_refused(monkeypatch):
    def agree(facts, error=None):
        return ranks.agree("op", facts, error, None, "cpu")

    fake_ranks(monkeypatch, [[0, 9, 2], [0, 0, 2]])
    assert agree({"T": 4, "B": 2}) == (4, 9, 0)
    with pytest.raises(ValueError, match="op: all ranks should have the same B, got 3, 2, 2"):
        agree({"T": 4, "B": 3})
    fake_ranks(monkeypatch, [[0, 9, 1], [0, 0, 0]])
    with pytest.raises(ValueError, match="the same dtype, got torch.float16, torch.bfloat16, torch.float32"):
        agree({"T": 4, "dtype": 2})
    with pytest.raises(ValueError, match="the same requires_grad, got True, True, False"):
        agree({"T": 4, "requires_grad": 1})
    fake_ranks(monkeypatch, [[0, 9, 1], [1, 0, 5]])
    with pytest.raises(ValueError, match="op: rank 2 of the group refused its arguments"):
        agree({"T": 4, "B": 1})
    with pytest.raises(TypeError, match="mine"):
        agree({"T": 4, "B": 1}, TypeError("mine"))


def test_the_process_group_of_a_mesh(group):
    mesh = dist.init_device_mesh("cpu", (1,))
    assert ranks.process_group("op", group) is group
    assert ranks.process_group("op", mesh) is mesh.get_group()
    both = dist.init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "cp"))
    assert ranks.process_group("op", both) is both["cp"].get_group()
    for dims in (("dp", "tp"), None):
        with pytest.raises(ValueError, match='op: group should be a mesh .*one named "cp"'):
            ranks.process_group("op", dist.init_device_mesh("cpu", (1, 1), mesh_dim_names=dims))
    with pytest.raises(TypeError, match="op: group should be a .*ProcessGroup or DeviceMesh, got str"):
        ranks.process_group("op", "cp")


def test_a_process_outside_the_group_is_refused(group, monkeypatch):
    monkeypatch.setattr(dist, "get_rank", lambda group: -1)
    with pytest.raises(ValueError, match="op: this process is not in the group"):
        ranks.process_group("op", group)


def test_lengths_pieces_and_positions(group, monkeypatch):
    assert cp.lengths(7, group) == (7,) and cp.lengths(0, group) == (0,)
    with pytest.raises(ValueError, match="lengths: length should be at least 0, got -1"):
        cp.lengths(-1, group)
    with pytest.raises(TypeError, match="^lengths: group should be"):
        cp.lengths(7, None)
    monkeypatch.setattr(dist, "get_rank", lambda group: 2)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 3)
    assert cp.positions((4, 5, 3), group).tolist() == [9, 10, 11]
    assert cp.positions((4, 5, 3), group, "meta").is_meta
    x = torch.arange(40).reshape(2, 20)
    assert cp.split(x, 1, group).tolist() == [[14, 15, 16, 17, 18, 19], [34, 35, 36, 37, 38, 39]]
    assert cp.split(x, 1, group, multiple=8).tolist() == [[16, 17, 18, 19], [36, 37, 38, 39]]
    assert cp.split(x.T, 0, group).data_ptr() == x[:, 14:].data_ptr()


# ---- the loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradients, weight", [("mean", 3.0), ("sum", 1.0)])
def test_the_loss_is_the_mean_over_the_targets_of_all_ranks(group, monkeypatch, gradients, weight):
    """The two other ranks add 10 to the sum of the losses, and 5 targets."""
    total = torch.tensor(4.0, requires_grad=True)
    asked = []

    def all_reduce(both, group):
        asked.append(group)
        both += torch.tensor([10.0, 5.0], dtype=torch.float64)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 3)
    loss = cp.loss(total, torch.tensor([[1, -100], [7, 0]]), group, gradients=gradients)
    assert loss.item() == 14 / 8 and loss.dtype == torch.float32 and asked == [group]
    (2 * loss).backward()
    assert total.grad.item() == 2 * weight / 8
    other = cp.loss(total, torch.tensor([[1, -100], [7, 0]]), group, ignore_index=7)
    assert other.item() == 14 / 8
    assert cp.loss(total, torch.tensor([7, 7, 1]), group, ignore_index=7).item() == pytest.approx(14 / 6)


def test_the_loss_is_reduced_over_every_dimension_of_a_mesh(group, monkeypatch):
    mesh, asked = dist.init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "cp")), []
    monkeypatch.setattr(dist, "all_reduce", lambda both, group: asked.append(group))
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    total = torch.tensor(6.0, requires_grad=True)
    loss = cp.loss(total, torch.tensor([1, 2, 3]), mesh)
    loss.backward()
    assert loss.item() == 2 and total.grad.item() == pytest.approx(4 / 3)
    assert asked == [mesh.get_group("dp"), mesh.get_group("cp")]


def test_the_loss_without_targets_is_nan(group):
    assert math.isnan(cp.loss(torch.tensor(0.0), torch.tensor([-100]), group))


def test_bad_arguments_of_the_loss_are_named(group):
    none = torch.tensor([-100])
    with pytest.raises(ValueError, match="loss: gradients should be 'mean' or 'sum', got 'average'"):
        cp.loss(torch.tensor(0.0), none, group, gradients="average")
    with pytest.raises(ValueError, match=r"loss: total should be a sum, 0-d, got \[2\]"):
        cp.loss(torch.zeros(2), none, group)
    with pytest.raises(TypeError, match="loss: group should be"):
        cp.loss(torch.tensor(0.0), none, None)
