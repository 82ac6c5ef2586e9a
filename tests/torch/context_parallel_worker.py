"""The ranks of the context parallel tests: python context_parallel_worker.py WORLD DIRECTORY.

Each rank runs every case for this number of ranks in one process group (gloo) and writes DIRECTORY/RANK.json:
case -> what went wrong. The ranks are forked after the imports, which take longer than most cases.
"""

import json
import os
import re
import sys
import traceback
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

if __name__ == "__main__" and sys.argv[1] != "4":
    sys.modules["transformers"] = None  # longlora.torch would import it for seconds; only four ranks use it

import checks
import numpy as np
import reference
import torch
import torch.distributed as dist
from context_parallel_checks import attention_cases, judge, to_numpy, to_torch
from torch.distributed.device_mesh import init_device_mesh

from longlora.torch import context_parallel as cp
from longlora.torch.context_parallel import attention as inside

RANK = WORLD = None
GROUP = None

# ---- attention


def needed(lengths, G, H, K, shift):
    """{(source, target): number of (key, KV head) pairs that target's queries see and source owns}, by the
    mask."""
    ends = np.cumsum([0, *lengths])
    mask = reference.attention_mask(ends[-1], H, G, shift=shift)
    pairs = {}
    for target, (a, b) in enumerate(zip(ends, ends[1:])):
        seen = mask[:, a:b].any(1).reshape(K, H // K, -1).any(1)
        for source in range(target):
            n = int(seen[:, ends[source] : ends[source + 1]].sum())
            if n:
                pairs[source, target] = n
    return pairs


def everywhere(x):
    """A list of every rank's x."""
    every = [None] * WORLD
    dist.all_gather_object(every, x)
    return every


def run_attention(lengths, G, H, K, B=1, D=9, dtype="float32", shift="half", scale=None, wide=True):
    kwargs, T = {"group_size": G, "shift": shift, "scale": scale}, sum(lengths)
    whole = [checks.random((B, T, heads, D), dtype, seed) for seed, heads in enumerate((H, K, K, H))]
    a = sum(lengths[:RANK])
    q, k, v, dout = (x[:, a : a + lengths[RANK]] for x in whole)

    def once(give_lengths):
        leaves = [to_torch(x).requires_grad_() for x in (q, k, v)]
        # Rows of a wider tensor, and K and V as transposed views, as transformers has them.
        views = [torch.cat([x, x], -1)[..., :D] if wide else x for x in leaves]
        views[1:] = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in views[1:]]
        before = cp.bytes_sent()
        out = cp.s2_attention(*views, group=GROUP, lengths=lengths if give_lengths else None, **kwargs)
        forward = cp.bytes_sent()
        out.backward(to_torch(dout))
        return (
            [to_numpy(x) for x in (out, *(x.grad for x in leaves))],
            forward - before,
            cp.bytes_sent() - forward,
        )

    got, *sent = once(False)
    again, *sent_again = once(True)
    assert [x.tobytes() for x in got] == [x.tobytes() for x in again], "another run, other bits"
    assert sent == sent_again

    itemsize = whole[0].dtype.itemsize
    formula = cp.exchange(lengths, G, H, K, D, itemsize, batch=B, shift=shift)
    by_mask = {pair: 2 * B * n * D * itemsize for pair, n in needed(lengths, G, H, K, shift).items()}
    assert formula == by_mask, f"exchange {formula}, what the mask needs {by_mask}"
    assert sent[0] == sum(n for (source, _), n in formula.items() if source == RANK)
    assert sent[1] == sum(n for (_, target), n in formula.items() if target == RANK)

    everything = [np.concatenate(x, 1) for x in zip(*everywhere(got))]
    if RANK == 0:
        judge(everything, whole, kwargs)


def aligned_pieces_talk_to_one_neighbour():
    """Plain heads send nothing and shifted heads h rows. They travel while kernels run that do not need
    them."""
    G, H, K, D = 16, 8, 4, 8
    lengths = [2 * G] * WORLD
    each = 2 * (G // 2) * (K // 2) * D * 4
    assert cp.exchange(lengths, G, H, K, D, 4) == {(r, r + 1): each for r in range(WORLD - 1)}
    assert cp.exchange(lengths, G, H, K, D, 4, shift="none") == {}
    q, k, v = (torch.randn(1, 2 * G, heads, D) for heads in (H, K, K))
    events = []
    saved = inside._post, inside._wait, inside._C, inside.s2_attention_forward

    class Recorded:
        def s2_attention_forward(self, *args):
            events.append("local")
            return saved[2].s2_attention_forward(*args)

    try:
        inside._post = lambda *args: events.append("post") or saved[0](*args)
        inside._wait = lambda *args: events.append("wait") or saved[1](*args)
        inside.s2_attention_forward = lambda *args, **kwargs: (
            events.append("cut") or saved[3](*args, **kwargs)
        )
        inside._C = Recorded()
        before = cp.bytes_sent()
        cp.s2_attention(q, k, v, group_size=G, group=GROUP)
    finally:
        inside._post, inside._wait, inside._C, inside.s2_attention_forward = saved
    assert cp.bytes_sent() - before == (each if RANK < WORLD - 1 else 0)
    assert events == ["post", "local", "wait"] if RANK == 0 else ["post", "local", "local", "wait", "cut"], (
        events
    )


# ---- what is refused -----------------------------------------------------------------------------


@contextmanager
def refusal(kind, pattern):
    try:
        yield
    except kind as error:
        assert re.search(pattern, str(error)), error
    else:
        raise AssertionError(f"no {kind.__name__}")


def qkv(T=8, H=4, K=2, D=8, B=1, dtype=torch.float32):
    return [torch.randn(B, T, heads, D, dtype=dtype) for heads in (H, K, K)]


def bad_arguments_stop_every_rank():
    last = RANK == WORLD - 1

    def call(tensors, group=None, **kwargs):
        return cp.s2_attention(
            *tensors, group=GROUP if group is None else group, **{"group_size": 4, **kwargs}
        )

    for boundary in ("wrap", "swap", "none"):
        with refusal(ValueError, f"boundary.*'split'.*{boundary}"):
            call(qkv(), boundary=boundary)
    with refusal(ValueError, "same H"):
        call(qkv(H=8 if last else 4))
    with refusal(ValueError, "same K"):
        call(qkv(K=4 if last else 2))
    with refusal(ValueError, "same D"):
        call(qkv(D=6 if last else 8))
    with refusal(ValueError, "same B"):
        call(qkv(B=1 + last))
    with refusal(ValueError, "same group_size, got 4, .*5"):
        call(qkv(), group_size=5 if last else 4)
    with refusal(ValueError, "same shift, got half, .*all"):
        call(qkv(), shift="all" if last else "half")
    with refusal(ValueError, "same scale, got 0.5, .*0.25"):
        call(qkv(), scale=0.25 if last else 0.5)
    with refusal(ValueError, "same dtype, got torch.float32, .*torch.bfloat16"):
        call(qkv(dtype=torch.bfloat16 if last else torch.float32))
    with refusal(ValueError, "same requires_grad"):
        call([x.requires_grad_(last) for x in qkv()])
    refused = f"rank {WORLD - 1} of the group refused"
    with refusal(
        TypeError if last else ValueError, "v should be a float32.*got torch.float64" if last else refused
    ):
        call([*qkv()[:2], torch.zeros(1, 8, 2, 8, dtype=torch.float64 if last else torch.float32)])
    with refusal(TypeError if last else ValueError, "k should be.*got ndarray" if last else refused):
        call([qkv()[0], np.zeros((1, 8, 2, 8), np.float32) if last else qkv()[1], qkv()[2]])
    with refusal(ValueError, r"k should be.*with q's B, T and D, got \[1, 9, 2, 8\]" if last else refused):
        call([qkv()[0], *qkv(T=9 if last else 8)[1:]])
    with refusal(ValueError, "K that divides H=4, got 3 and 3" if last else refused):
        call(qkv(K=3 if last else 2))
    with refusal(ValueError, "v should be|got 2 and 4" if last else refused):
        call([*qkv()[:2], qkv(K=4 if last else 2)[2]])
    for group_size in (0, -3, 2.5):
        with refusal(ValueError, "group_size should be an integer"):
            call(qkv(), group_size=group_size)
    with refusal(ValueError, "shift should be one of half, none, all, got 'full'"):
        call(qkv(), shift="full")
    with refusal(ValueError, f"lengths should have {WORLD} entries"):
        call(qkv(), lengths=[8] * (WORLD + 1))
    with refusal(ValueError, "for rank . T=8"):
        call(qkv(), lengths=[7] * WORLD)
    with refusal(ValueError, "boundary"):
        call(qkv(), lengths=[8] * WORLD, boundary="wrap")
    with refusal(TypeError, "group should be"):
        call(qkv(), group="cp")
    with refusal(ValueError, 'one named "cp"'):
        call(qkv(), group=init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("dp", "tp")))
    only_first = dist.new_group([0])
    if RANK:
        with refusal((TypeError, ValueError), "not in the group|group should be"):
            call(qkv(), group=only_first)
    call(qkv())  # all that left the ranks in step


def modes_of_torch():
    tensors = qkv()
    with torch.no_grad():
        assert not cp.s2_attention(*tensors, group_size=4, group=GROUP).requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        mixed = cp.s2_attention(*tensors, group_size=4, group=GROUP)
    low = cp.s2_attention(*(x.bfloat16() for x in tensors), group_size=4, group=GROUP)
    assert mixed.dtype == torch.bfloat16 and torch.equal(mixed, low)
    mesh = init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("dp", "cp"))
    for group in (mesh, mesh["cp"]):
        one, other = (cp.s2_attention(*tensors, group_size=4, group=x) for x in (group, GROUP))
        assert torch.equal(one, other)
    leaves = [x.clone().requires_grad_() for x in tensors]
    cp.s2_attention(*leaves, group_size=5, group=GROUP).sum().backward()  # a gradient of strides 0
    dense = [x.clone().requires_grad_() for x in tensors]
    out = cp.s2_attention(*dense, group_size=5, group=GROUP)
    out.backward(torch.ones_like(out))
    assert all(torch.equal(x.grad, y.grad) for x, y in zip(leaves, dense))
    compiled = [x.clone().requires_grad_() for x in tensors]
    torch.compile(lambda *x: cp.s2_attention(*x, group_size=5, group=GROUP) * 1, backend="eager")(
        *compiled
    ).sum().backward()
    assert all(torch.equal(x.grad, y.grad) for x, y in zip(compiled, dense))


# ---- helpers and the loss ------------------------------------------------------------------------


def helpers():
    ids = torch.arange(2 * 23).reshape(2, 23)
    mine = cp.split(ids, 1, GROUP)
    sizes = cp.lengths(mine.shape[1], GROUP)
    assert list(sizes) == cp.pieces(23, WORLD)
    assert torch.equal(torch.cat(everywhere(mine), 1), ids)
    assert torch.equal(torch.cat(everywhere(cp.positions(sizes, GROUP))), torch.arange(23))
    assert mine.data_ptr() == ids[:, sum(sizes[:RANK]) :].data_ptr()
    assert all(x.shape[1] % 4 == 0 for x in everywhere(cp.split(ids, 1, GROUP, multiple=4))[:-1])


def loss_is_the_mean_over_all_targets():
    draw = torch.Generator().manual_seed(1)
    x, weight = torch.randn(2, 19, 6, generator=draw), torch.randn(11, 6, generator=draw)
    targets = cp.next_tokens(torch.randint(11, (2, 19), generator=draw))
    targets[0, 3:12] = -100
    whole = weight.clone().requires_grad_()
    want = torch.nn.functional.cross_entropy((x @ whole.T).flatten(0, 1), targets.flatten())
    want.backward()
    for gradients in ("mean", "sum"):
        mine = weight.clone().requires_grad_()
        local = cp.split(targets, 1, GROUP)
        total = total_of(cp.split(x, 1, GROUP) @ mine.T, local)
        loss = cp.loss(total, local, GROUP, gradients=gradients)
        loss.backward()
        dist.all_reduce(mine.grad)
        mine.grad /= WORLD if gradients == "mean" else 1
        assert abs(loss - want) <= 1e-6 * abs(want)
        assert (mine.grad - whole.grad).abs().max() <= 1e-6 * whole.grad.abs().max()
    mesh = init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("dp", "cp"))
    assert torch.equal(cp.loss(total, local, mesh), loss)
    assert torch.isnan(cp.loss(total.detach() * 0, torch.full_like(local, -100), GROUP))
    with refusal(ValueError, "gradients should be"):
        cp.loss(total, local, GROUP, gradients="average")
    with refusal(ValueError, "total should be a sum"):
        cp.loss(x, local, GROUP)


# ---- transformers --------------------------------------------------------------------------------


def tiny(family="Llama", group_size=12, **config):
    import transformers

    from longlora.torch import configure

    torch.manual_seed(3)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=128,
        initializer_range=0.3,
        **config,
    )
    return configure(getattr(transformers, f"{family}ForCausalLM")(config).train(), group_size)


def total_of(logits, targets):
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def text(rows, length):
    return torch.randint(61, (rows, length), generator=torch.Generator().manual_seed(length))


def one_process(ids, model=None):
    """Loss and gradients of the whole batch in this process."""
    model = model or tiny()
    targets = cp.next_tokens(ids)
    loss = total_of(model(input_ids=ids).logits, targets) / (targets != -100).sum()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def same_gradients(model, want, scale=1.0):
    for (name, p), (_, w) in zip(model.named_parameters(), want.items(), strict=True):
        grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        error, limit = (grad * scale - w).abs().max(), 2e-5 * w.abs().max()
        assert error <= limit, f"{name}: {error:.3g} above {limit:.3g}"


def transformers_model():
    """DDP over four pieces; checkpointed layers, with two forward passes of different lengths before the
    backward."""
    ids = text(2, 50)
    want, grads = one_process(ids, tiny(group_size=None))
    model = torch.nn.parallel.DistributedDataParallel(cp.enable(tiny(group_size=None), GROUP))
    mine, targets = (cp.split(x, 1, GROUP) for x in (ids, cp.next_tokens(ids)))
    loss = cp.loss(total_of(model(input_ids=mine).logits, targets), targets, GROUP)
    loss.backward()
    assert abs(loss - want) <= 1e-5 * want
    same_gradients(model, grads)

    model = cp.enable(tiny(), GROUP)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    sums = dict.fromkeys(grads, 0)
    losses = []
    # Pieces of 13 on all ranks but the last: only the whole of the lengths tells the two apart.
    for length in (52, 49):
        ids = text(1, length)
        sums = {name: sums[name] + g for name, g in one_process(ids)[1].items()}
        mine, targets = (x[:, 13 * RANK : 13 * RANK + 13] for x in (ids, cp.next_tokens(ids)))
        losses.append(
            cp.loss(total_of(model(input_ids=mine).logits, targets), targets, GROUP, gradients="sum")
        )
    sum(losses).backward()
    for p in model.parameters():
        dist.all_reduce(p.grad)
    same_gradients(model, sums)

    last = RANK == WORLD - 1
    refused = f"rank {WORLD - 1} of the group refused"
    ones = torch.ones_like(mine)
    model(
        input_ids=mine,
        attention_mask=ones,
        position_ids=torch.arange(13 * RANK, 13 * RANK + mine.shape[1])[None],
    )
    mask = ones.clone()
    mask[:, -1] = not last
    with refusal(ValueError, "attention_mask should be None or all ones" if last else refused):
        model(input_ids=mine, attention_mask=mask)
    with refusal(
        ValueError, "position_ids should be those of the piece" if RANK else "rank 1 of the group refused"
    ):
        model(input_ids=mine, position_ids=torch.arange(mine.shape[1])[None])
    with refusal(ValueError, "labels would be shifted inside each piece"):
        model(input_ids=mine, labels=mine)
    with refusal(ValueError, "same B, got 1, 1, 1, 2"):
        model(input_ids=mine.repeat(1 + last, 1))
    with refusal(TypeError, "all arguments but the first by name"):
        model(mine, ones)
    with refusal(NotImplementedError, "only training"):
        model.eval()(input_ids=mine)
    cp.disable(model)
    whole = tiny().eval()
    assert torch.equal(model(input_ids=mine).logits, whole(input_ids=mine).logits)
    windowed = cp.enable(tiny("Mistral", sliding_window=40), GROUP)
    with refusal(ValueError, "a sliding window of 40 tokens is active at 49"):
        windowed(input_ids=mine)
    whole.set_attn_implementation("sdpa")
    with refusal(ValueError, "longlora_s2"):
        cp.enable(whole, GROUP)


def families():
    """Families that hide positions from their attention, or have values narrower than keys; those refused."""
    from attention_matrix import build, logits

    from longlora.torch import configure

    ids = text(2, 20)
    for family in ("gpt2", "gpt_bigcode", "llama4_text", "deepseek_v3", "bert"):
        model = configure(build(family, "longlora_s2"), 6).train()
        want = cp.split(logits(model, ids), 1, GROUP)
        got = cp.enable(model, GROUP)(input_ids=cp.split(ids, 1, GROUP)).logits
        assert (got - want).abs().max() <= 1e-5 * want.abs().max(), family
    for family, words in (
        ("qwen3_next", "Qwen3NextForCausalLM has linear attention or convolutions"),
        ("lfm2", "Lfm2ForCausalLM has linear attention or convolutions"),
        ("bart", "BartForCausalLM takes no position_ids"),
        ("roberta", "RobertaForCausalLM counts positions from its padding"),
    ):
        with refusal(ValueError, words):
            cp.enable(build(family, "longlora_s2"), GROUP)
    model = cp.enable(configure(build("llama", "longlora_s2"), 6).train(), GROUP)
    for name in ("cache", "past_key_values"):
        with refusal(ValueError, f"{name} should be None, got a cache"):
            model(input_ids=ids, **{name: object()})


def loss_without_logits():
    """A swapped model makes the loss of its piece, and no logits."""
    from longlora.torch import swap

    ids = text(2, 50)
    want, grads = one_process(ids)
    model = tiny()
    assert swap(model)["linear_cross_entropy"] == 1
    cp.enable(model, GROUP)
    mine, targets = (cp.split(x, 1, GROUP) for x in (ids, cp.next_tokens(ids)))
    out = model(input_ids=mine, labels=targets, shift_labels=targets, num_items_in_batch=1)
    assert out.logits is None
    loss = cp.loss(out.loss, targets, GROUP, gradients="sum")
    loss.backward()
    assert abs(loss - want) <= 1e-5 * want
    for p in model.parameters():
        dist.all_reduce(p.grad)
    same_gradients(model, grads)


def peft_model():
    """LoRA on a model over four pieces."""
    from peft import LoraConfig, get_peft_model

    def lora(model):
        torch.manual_seed(4)
        return get_peft_model(
            model,
            LoraConfig(
                r=2, target_modules=["q_proj", "k_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
            ),
        )

    ids = text(1, 50)
    targets = cp.next_tokens(ids)
    want = lora(tiny())
    (total_of(want(input_ids=ids).logits, targets) / 49).backward()
    mine, targets = (cp.split(x, 1, GROUP) for x in (ids, targets))
    model = cp.enable(lora(tiny()), GROUP)
    cp.loss(total_of(model(input_ids=mine).logits, targets), targets, GROUP, gradients="sum").backward()
    trained = [(p, w) for p, w in zip(model.parameters(), want.parameters()) if w.requires_grad]
    assert len(trained) == 8
    for p, w in trained:
        dist.all_reduce(p.grad)
        assert (p.grad - w.grad).abs().max() <= 2e-5 * w.grad.abs().max()


def fsdp():
    """Two sequences, two pieces of each: FSDP2 over a mesh dp x cp."""
    from torch.distributed.fsdp import fully_shard

    ids = text(2, 45)
    want, grads = one_process(ids)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    model = cp.enable(tiny(), mesh)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    row = mesh.get_local_rank("dp")
    mine, targets = (cp.split(x[row : row + 1], 1, mesh) for x in (ids, cp.next_tokens(ids)))
    loss = cp.loss(total_of(model(input_ids=mine).logits, targets), targets, mesh)
    loss.backward()
    assert abs(loss - want) <= 1e-5 * want
    same_gradients(model, grads)


OTHERS = {
    "aligned": aligned_pieces_talk_to_one_neighbour,
    "bad": bad_arguments_stop_every_rank,
    "modes": modes_of_torch,
    "helpers": helpers,
    "loss": loss_is_the_mean_over_all_targets,
}
FOUR = {
    "transformers": transformers_model,
    "families": families,
    "loss without logits": loss_without_logits,
    "peft": peft_model,
    "fsdp": fsdp,
}


def case_names(world):
    return [*attention_cases(world), *OTHERS, *(FOUR if world == 4 else ())]


def main(rank, world, directory):
    global RANK, WORLD, GROUP
    RANK, WORLD = rank, world
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/init",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=1200),
    )
    GROUP = dist.group.WORLD
    attention, report = attention_cases(world), {}
    for name in case_names(world):
        try:
            if name in attention:
                *arguments, kwargs = attention[name]
                run_attention(*arguments, **kwargs)
            else:
                {**OTHERS, **FOUR}[name]()
            report[name] = ""
        except Exception:
            report[name] = traceback.format_exc()
    Path(directory, f"{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


def forked(rank, world, directory):
    """-> the process of this rank."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        main(rank, world, directory)
        code = 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    ranks = [forked(rank, int(sys.argv[1]), sys.argv[2]) for rank in range(int(sys.argv[1]))]
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in ranks))
