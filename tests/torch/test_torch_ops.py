"""The torch operators against the float64 reference, and under opcheck, compile, autocast and checkpointing.

Memory, streams and graphs too. On the CPU, and on a GPU where there is one.
"""

import itertools
import math

import checks
import numpy as np
import pytest
import reference

torch = pytest.importorskip("torch", reason="longlora.torch is for torch")
from devices import device, gpu, put  # noqa: E402, F401 (fixtures)
from op_cases import (  # noqa: E402
    BOUNDARIES,
    CASES,
    COS,
    IDS,
    PATTERN,
    SIN,
    TARGETS,
    B,
    C,
    D,
    F,
    H,
    K,
    M,
    N,
    R,
    T,
    V,
    given,
)

from longlora.torch import ops  # noqa: E402


def plain_reference(call, *inputs):
    reference.PRECISION = np.float32
    try:
        return call(*inputs)
    finally:
        reference.PRECISION = np.float64


def judge(name, dtype, out, grads, dout, arrays, wanted):
    dout = dout.detach().float().cpu().numpy()
    dout = dout.astype(checks.DTYPES[dtype]) if dout.ndim else dout
    (want, want_grads), (low, low_grads) = (
        f(CASES[name][2], dout, *arrays) for f in (lambda c, *x: c(*x), plain_reference)
    )
    results = [("out", out, want, low)] + [
        (f"grad {i}", g, want_grads[i], low_grads[i]) for i, g in zip(wanted, grads)
    ]
    for label, got, w, p in results:
        rounded = checks.DTYPES[str(got.dtype).removeprefix("torch.")]
        # Two roundings more than the kernel's own: the sum of two results, a gradient scaled by the loss's.
        checks.compare(
            got.detach().float().cpu().numpy().astype(rounded),
            np.asarray(w, np.float64),
            np.asarray(p),
            f"{name} {label}",
            6,
        )


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, dtype):
    arrays, tensors = given(name, dtype)
    tensors = [x.requires_grad_() for x in tensors]
    out = CASES[name][1](*tensors)
    dout = (
        checks.random(tuple(out.shape), dtype, 9).astype(np.float32) if out.ndim else np.array(2, np.float32)
    )
    dout = put(dout).to(out.dtype)
    grads = torch.autograd.grad(out, tensors, dout)
    assert [g.dtype for g in grads] == [x.dtype for x in tensors]
    judge(name, dtype, out, grads, dout, arrays, range(len(tensors)))


@pytest.mark.parametrize("name", CASES)
def test_gradients_in_any_combination(name):
    _, tensors = given(name)
    full = None
    for need in sorted(itertools.product((False, True), repeat=len(tensors)), reverse=True):
        inputs = [x.clone().requires_grad_(n) for x, n in zip(tensors, need)]
        out = CASES[name][1](*inputs)
        assert out.requires_grad == any(need)
        if not any(need):
            continue
        grads = iter(torch.autograd.grad(out, [x for x, n in zip(inputs, need) if n], torch.ones_like(out)))
        grads = [next(grads) if n else None for n in need]
        full = full or grads
        for i, n in enumerate(need):
            assert not n or torch.equal(grads[i], full[i]), (name, need, i)


def orders(x):
    """x with its axes in every order in memory, and with gaps between its rows."""
    for order in itertools.permutations(range(x.ndim)):
        yield x.permute(order).contiguous().permute([order.index(axis) for axis in range(x.ndim)])
    yield torch.cat([x, torch.full_like(x, torch.nan)], -1)[..., : x.shape[-1]]


@pytest.mark.parametrize("name", CASES)
def test_any_strides(name):
    """Inputs and gradients in any layout give the values of contiguous ones, as does an expanded gradient."""
    plain = [x.requires_grad_() for x in given(name)[1]]
    want = CASES[name][1](*plain)
    dout = put(checks.random(tuple(want.shape))) if want.ndim else torch.ones_like(want)
    grads = torch.autograd.grad(want, plain, dout, retain_graph=True)
    for turned in zip(*(itertools.islice(itertools.cycle(orders(x.detach())), 25) for x in plain)):
        turned = [x.detach().requires_grad_() for x in turned]
        out = CASES[name][1](*turned)
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
        bent = dout.mT.contiguous().mT if dout.ndim > 1 else dout
        for x, got, grad in zip(turned, torch.autograd.grad(out, turned, bent), grads):
            assert got.shape == x.shape
            torch.testing.assert_close(got, grad, rtol=1e-5, atol=1e-5)
    want.sum().backward()
    for x, grad in zip(plain, torch.autograd.grad(CASES[name][1](*plain), plain, torch.ones_like(want))):
        torch.testing.assert_close(x.grad, grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_lazily_negated_views_are_what_they_stand_for(name):
    """As the imaginary parts of conjugated tensors are: inputs and gradients, together and one by one."""
    plain = [x.requires_grad_() for x in given(name)[1]]
    want = CASES[name][1](*plain)
    dout = torch.ones_like(want)
    grads = torch.autograd.grad(want, plain, dout)
    for chosen in [range(len(plain)), *([i] for i in range(len(plain)))]:
        turned = [
            (torch._neg_view(-x.detach()) if i in chosen else x.detach()).requires_grad_()
            for i, x in enumerate(plain)
        ]
        assert all(turned[i].is_neg() for i in chosen)
        out = CASES[name][1](*turned)
        assert torch.equal(out, want)
        for got, grad in zip(torch.autograd.grad(out, turned, torch._neg_view(-dout)), grads):
            assert torch.equal(got, grad)


@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "lora_linear", "swiglu"])
@pytest.mark.parametrize("lead", [(), (1,), (M, 1), (B, T), (B, 1, T), (1, B, 1, T)], ids=str)
def test_leading_axes(name, lead):
    """[...,C] gives the bits of [M,C], forward and backward. Without axes before the last there is one
    row."""
    rows = M if math.prod(lead) == M else 1
    plain = [(x[:rows] if len(x) == M else x).requires_grad_() for x in given(name)[1]]
    shaped = [
        (
            x.detach().view(*lead, x.shape[-1]) if len(x) == rows and x.ndim == 2 else x.detach()
        ).requires_grad_()
        for x in plain
    ]
    want, got = (CASES[name][1](*inputs) for inputs in (plain, shaped))
    assert got.shape == (*lead, want.shape[-1]) and torch.equal(got.view(want.shape), want)
    dout = put(checks.random(tuple(want.shape)))
    wanted, grads = (
        torch.autograd.grad(want, plain, dout),
        torch.autograd.grad(got, shaped, dout.view(got.shape)),
    )
    assert all(
        x.shape == grad.shape and torch.equal(grad.view(other.shape), other)
        for x, grad, other in zip(shaped, grads, wanted)
    )


def none_of(name):
    """A call without a row of work -> out, and its inputs."""
    first, *others = [x.requires_grad_() for x in given(name)[1]]
    empty = [x.detach()[:0].requires_grad_() for x in (first, *others)]
    if name == "packed":
        return ops.s2_attention(*empty, cu_seqlens=put(BOUNDARIES[:0]), **PATTERN), empty
    if name.startswith("loss"):
        inputs = empty[0], *others
        return ops.linear_cross_entropy(*inputs, put(TARGETS[:0]), reduction=name.partition("_")[2]), inputs
    if name == "embedding":
        return ops.embedding(first, put(IDS[:0])), [first]
    inputs = [empty[0], *(empty[i] if len(x) == len(first) else x for i, x in enumerate(others, 1))]
    return CASES[name][1](*inputs), inputs


@pytest.mark.parametrize("name", CASES)
def test_empty_batches(name):
    out, inputs = none_of(name)
    if name == "loss_mean":
        assert out.isnan()  # as torch's cross_entropy
        return
    assert out.numel() == 0 or out.item() == 0
    out.sum().backward()
    assert all((x.grad == 0).all() for x in inputs)


def test_a_sequence_without_tokens():
    q, k, v = (x[:, :0].requires_grad_() for x in given("s2_attention")[1])
    out = ops.s2_attention(q, k, v, **PATTERN)
    assert out.shape == q.shape
    out.sum().backward()
    assert q.grad.shape == q.shape


def rand(*shape):
    return put(torch.rand(shape))


def calls():
    """Every operator with the arguments of one call."""
    q, k, v = given("s2_attention")[1]
    how = (4, "split", "half", 0.3)
    x, weight, bias, a, b = given("lora_linear")[1]
    norm_x, norm_weight = given("rms_norm")[1]
    head_x, head = given("loss_mean")[1]
    cos, sin, targets = put(COS), put(SIN), put(TARGETS).int()
    rows, ids = rand(M), put(IDS.ravel()).int()
    grad = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    yield "s2_attention_forward", (*grad, None, *how)
    yield "s2_attention_forward", (*grad, put(BOUNDARIES), *how)
    yield "s2_attention_backward", (q, q, k, v, q, rand(B, H, T), None, *how)
    yield "rms_norm_forward", (norm_x.requires_grad_(), norm_weight.requires_grad_(), 1e-6)
    yield "add_rms_norm_forward", (norm_x.clone(), norm_x, norm_weight, 1e-6)
    yield "rms_norm_backward", (norm_x.detach(), norm_x.detach(), rows, norm_weight.detach(), None, True)
    yield "rms_norm_forward", (rand(B, T, C).requires_grad_(), norm_weight.detach().requires_grad_(), 1e-6)
    yield (
        "rms_norm_backward",
        (
            rand(B, T, C),
            rand(T, B, C).transpose(0, 1),
            rand(B, T),
            norm_weight.detach(),
            rand(B, T, C),
            False,
        ),
    )
    yield "rope_forward", (q.clone().requires_grad_(), cos, sin, None)
    yield "rope_backward", (q.clone().requires_grad_(), cos, sin, None)
    yield (
        "lora_linear_forward",
        (x.requires_grad_(), weight, bias, a.requires_grad_(), b.requires_grad_(), 0.5),
    )
    yield "lora_linear_forward", (x, weight.clone().requires_grad_(), None, None, None, 0.5)
    yield "lora_linear_forward", (rand(B, T, C).requires_grad_(), weight.detach(), None, a, b, 0.5)
    yield (
        "lora_linear_backward",
        (
            rand(M, N),
            x.detach(),
            weight.detach(),
            a.detach(),
            b.detach(),
            rand(M, R),
            0.5,
            [True, True, True, False, False],
        ),
    )
    yield "swiglu_forward", tuple(x.requires_grad_() for x in given("swiglu")[1])
    yield "swiglu_backward", (rand(M, F), *given("swiglu")[1])
    yield (
        "swiglu_forward",
        (rand(B, T, F).requires_grad_(), rand(F, T, B).requires_grad_().mT.transpose(0, 1).mT),
    )
    yield "linear_cross_entropy_forward", (head_x.requires_grad_(), head.requires_grad_(), targets, -100)
    yield "linear_cross_entropy_backward", (head_x.detach(), head.detach(), targets, rows, -100, True)
    yield "linear_cross_entropy_step", (head_x, head, targets, -100, True, True)
    yield "embedding_forward", (head.clone().requires_grad_(), ids)
    yield "embedding_backward", (rand(M, C), ids, V)
    yield "matmul", (rand(M, C).requires_grad_(), rand(C, N).requires_grad_(), 0.5)
    yield "cast", (rand(M, C).requires_grad_(), torch.bfloat16)
    yield "scale", (rand(M, C).requires_grad_(), 0.5)
    cache, lengths = (rand(2, 9, K, D), rand(2, 9, K, D)), put(torch.tensor([4, 0], dtype=torch.int32))
    one = [x.detach()[:, :1] for x in (q, k, v)]
    yield "cached_attention_", (one[0], *cache, lengths[:B], *one[1:], None, None)
    yield "accumulate_", (rand(M, C), rand(M, C), 0.5)
    yield "adamw_", (*(rand(9) for _ in range(4)), 1e-3, 0.9, 0.999, 1e-8, 0.1, 1, 1.0)
    yield "sum_squares", (rand(9),)


def test_every_operator_has_a_call_here():
    from longlora import _C

    names = {name for name, _ in calls()}
    assert names == {
        op.removeprefix("longlora::").partition(".")[0]
        for op in torch._C._dispatch_get_all_op_names()
        if op.startswith("longlora::")
    }
    inplace = {op: f"{op}_" for op in ("accumulate", "adamw", "cached_attention")}
    assert {inplace.get(op, op) for op in _C.specs} <= names


@pytest.mark.parametrize("index", range(len(list(calls()))))
def test_opcheck(index):
    name, arguments = list(calls())[index]
    torch.library.opcheck(getattr(torch.ops.longlora, name).default, arguments)


def block(x, norm, weights, ids):
    """A small decoder layer of our ops, and the loss."""
    cos, sin = put(COS), put(SIN)
    qkv, a, b, gate_up, head = weights
    y = ops.rms_norm(x, norm)
    q, k, v = ops.lora_linear(y, qkv, None, a, b, 2.0).view(B, T, -1, D).split((H, K, K), 2)
    attended = ops.s2_attention(ops.rope(q, cos, sin), ops.rope(k, cos, sin), v, group_size=4)
    y, total = ops.rms_norm(attended.reshape(B, T, H * D)[..., :C], norm, residual=x)
    gate, up = ops.lora_linear(y, gate_up).chunk(2, -1)
    return ops.linear_cross_entropy((ops.swiglu(gate, up) + total), head, ids)


def block_inputs():
    shapes = [((H + 2 * K) * D, C), (R, C), ((H + 2 * K) * D, R), (2 * C, C), (V, C)]
    weights = [
        put(checks.random(shape, seed=i) * np.float32(0.3)).requires_grad_() for i, shape in enumerate(shapes)
    ]
    return (
        put(checks.random((B, T, C))).requires_grad_(),
        put(torch.ones(C)).requires_grad_(),
        weights,
        put(IDS),
    )


def run(function, inputs):
    loss = function(*inputs)
    return loss, torch.autograd.grad(loss, [inputs[0], inputs[1], *inputs[2]])


@pytest.mark.parametrize("backend, dynamic", [("aot_eager", False), ("aot_eager", True), ("inductor", False)])
def test_compile_gives_the_same_values_in_one_graph(backend, dynamic):
    torch._dynamo.reset()
    inputs = block_inputs()
    loss, grads = run(block, inputs)
    other, compiled = run(torch.compile(block, fullgraph=True, backend=backend, dynamic=dynamic), inputs)
    torch.testing.assert_close(other, loss)
    for a, b in zip(compiled, grads):
        torch.testing.assert_close(a, b)


def test_checkpointing_and_inference_mode():
    inputs = block_inputs()
    loss, grads = run(block, inputs)
    other, again = run(lambda *x: torch.utils.checkpoint.checkpoint(block, *x, use_reentrant=False), inputs)
    assert torch.equal(loss, other) and all(map(torch.equal, grads, again))
    with torch.inference_mode():
        torch.testing.assert_close(block(*inputs), loss.detach())


def test_autocast(device):  # noqa: F811
    inputs = block_inputs()
    loss, _ = run(block, inputs)
    with torch.autocast(device, torch.bfloat16):
        x, norm, (qkv, a, b, _, head), ids = inputs
        y = ops.rms_norm(x, norm)
        assert y.dtype == torch.float32 and ops.lora_linear(y, qkv, None, a, b).dtype == torch.bfloat16
        mixed = rand(1, 5, 2, 8), rand(1, 5, 2, 8).bfloat16(), rand(1, 5, 2, 8)
        assert ops.s2_attention(*mixed, group_size=2).dtype == torch.bfloat16
        low = block(*inputs)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, loss, rtol=0.03, atol=0.03)
    low.backward()
    assert inputs[0].grad.dtype == torch.float32


def test_float16_autocast_keeps_small_gradients(device):  # noqa: F811
    """They are scaled before they are rounded to float16."""
    x, weight, ids = rand(4096, 16) * 0.5, rand(512, 16) * 1e-3, put(np.arange(4096) % 512)

    def gradient(scale, low):
        rows = x.detach().requires_grad_()
        with torch.autocast(device, torch.float16, enabled=low):
            loss = ops.linear_cross_entropy(rows, weight, ids)
        (loss * scale).backward()
        return rows.grad / scale

    want = gradient(1.0, False)
    assert want.abs().mean() < 1e-6
    assert (gradient(2.0**16, True) - want).norm() <= 2e-3 * want.norm()


def test_a_gradient_of_a_gradient_is_refused():
    q = rand(1, 4, 1, 8).requires_grad_()
    (grad,) = torch.autograd.grad(
        ops.s2_attention(q, q, q, group_size=2).square().sum(), q, create_graph=True
    )
    with pytest.raises(RuntimeError, match="gradient of a gradient"):
        grad.sum().backward()


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda q: ops.s2_attention(q, q[:, :3], q, group_size=2), ValueError, "k axis 1"),
        (lambda q: ops.s2_attention(q, q.double(), q, group_size=2), TypeError, "k should be"),
        (lambda q: ops.s2_attention(q, q, q, group_size=0), ValueError, "group_size"),
        (lambda q: ops.s2_attention(q, q, q, group_size=2, boundary="warp"), ValueError, "split, wrap, swap"),
        (
            lambda q: ops.s2_attention(
                q, q, q, group_size=2, cu_seqlens=torch.tensor([[0, 4]] * 3, dtype=torch.int32)
            ),
            ValueError,
            "B=1",
        ),
        (
            lambda q: ops.linear_cross_entropy(q.view(-1, 8), q.view(-1, 8), rand(4), reduction="max"),
            ValueError,
            "mean, sum, none",
        ),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call(rand(1, 4, 1, 8))


def test_q_k_and_v_are_not_copied(device):  # noqa: F811
    """q, k and v lie in memory as [B,H,T,D], as in transformers. Only the results are allocated, no
    copies."""
    q, k, v = (put(torch.randn(1, heads, 512, 64)).transpose(1, 2).requires_grad_() for heads in (4, 2, 2))
    size = q.numel() * 4

    def allocated(function):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            kept = function()
            return torch.cuda.max_memory_allocated() - before, kept
        with torch.profiler.profile(profile_memory=True) as profile:
            kept = function()
        events = [e.self_cpu_memory_usage for e in profile.key_averages() if e.self_cpu_memory_usage > 0]
        return sum(events), kept

    forward, out = allocated(lambda: ops.s2_attention(q, k, v, group_size=128))
    lse = 4 * 512 * 4
    assert forward == size + lse
    dout = torch.randn_like(out)
    backward, _ = allocated(lambda: torch.autograd.grad(out, (q, k, v), dout))
    assert size * 2 <= backward < size * 2.2


# ---- the GPU's queues


def test_work_goes_to_the_current_stream(gpu):  # noqa: F811
    """The stream waits before it fills the input: on any other stream the op would see zeros."""
    streams = [torch.cuda.Stream() for _ in range(3)]
    inputs, outs = [torch.zeros(64, 64, device="cuda") for _ in streams], []
    torch.cuda.synchronize()
    for i, (stream, x) in enumerate(zip(streams, inputs)):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            x.fill_(i + 1)
            outs.append(ops.swiglu(x, x))
    torch.cuda.synchronize()
    for x, out in zip(inputs, outs):
        torch.testing.assert_close(out, torch.nn.functional.silu(x) * x)


@pytest.mark.parametrize("name", CASES)
def test_a_cuda_graph(name, gpu):  # noqa: F811
    """Forward and backward captured; replayed on other numbers they give what a call on those gives."""
    inputs = [x.requires_grad_() for x in given(name)[1]]
    other = [torch.randn_like(x) for x in inputs]

    def work():
        out = CASES[name][1](*inputs)
        return [out, *torch.autograd.grad(out, inputs, torch.ones_like(out))]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    with torch.no_grad():
        for x, y in zip(inputs, other):
            x.copy_(y)
    graph.replay()
    replayed = [x.clone() for x in captured]
    assert all(map(torch.equal, replayed, work()))


def test_a_gpu_that_is_not_the_current_one(gpu):  # noqa: F811
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    x = torch.randn(4, 8, device="cuda:1")
    torch.testing.assert_close(ops.swiglu(x, x), torch.nn.functional.silu(x) * x)


# ---- processes


class Attended(torch.utils.data.Dataset):
    """Rows that a worker computes by an op."""

    def __len__(self):
        return 6

    def __getitem__(self, i):
        q = torch.from_numpy(checks.random((1, 64, 2, 16), seed=i))
        return ops.s2_attention(q, q, q, group_size=16)[0]


def test_workers_of_a_dataloader_by_fork():
    """Forked after this process has used its threads."""
    want = torch.stack(list(Attended()[i] for i in range(6)))
    loader = torch.utils.data.DataLoader(
        Attended(), batch_size=2, num_workers=2, multiprocessing_context="fork"
    )
    assert torch.equal(torch.cat(list(loader)), want)
