"""The torch operators against the float64 reference, and as citizens of torch: opcheck, compile, autocast, checkpointing, memory."""
import itertools
import multiprocessing

import checks
import numpy as np
import pytest
import reference

torch = pytest.importorskip("torch", reason="longlora.torch is for torch")
import longlora.torch  # noqa: E402
from longlora.torch import ops  # noqa: E402

B, T, H, K, D, C, N, R, F, V = 2, 13, 4, 2, 8, 12, 10, 3, 9, 21
M = B * T
TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TARGETS = np.where(np.arange(M) % 5 == 0, -100, np.arange(M) * 7 % V)
IDS = np.arange(M).reshape(B, T) * 5 % V
COS, SIN = (f(np.arange(T)[:, None] * 0.7 ** np.arange(D // 2)).astype(np.float32) for f in (np.cos, np.sin))
PATTERN = dict(group_size=4, boundary="split", shift="half")
BORDERS = np.array([[0, 5, 13, 13], [0, 1, 9, 13]], np.int32)


def attention_reference(dout, q, k, v, **how):
    out, lse = reference.s2_attention_forward(q, k, v, **how)
    return out, reference.s2_attention_backward(dout, q, k, v, out, lse, **how)


def packed_reference(dout, q, k, v):
    parts = [attention_reference(dout[b:b + 1], q[b:b + 1], k[b:b + 1], v[b:b + 1], cu_seqlens=BORDERS[b], **PATTERN)
             for b in range(B)]
    return (np.concatenate([out for out, _ in parts]), [np.concatenate(x) for x in zip(*(grads for _, grads in parts))])


def norm_reference(dout, x, weight, residual=None):
    out, rstd, total = reference.rms_norm_forward(x, weight, 1e-6, residual)
    dx, dweight = reference.rms_norm_backward(dout, total, rstd, weight, None if residual is None else dout)
    return (out if residual is None else out + total), ([dx, dweight] if residual is None else [dx, dweight, dx])


def linear_reference(dout, x, weight, bias, a, b):
    out, u = reference.lora_linear_forward(x, weight, bias, a, b, 0.5)
    dx, da, db, dweight, dbias = reference.lora_linear_backward(dout, x, weight, a, b, 0.5, u, True, True)
    return out, [dx, dweight, dbias, da, db]


def loss_reference(reduction):
    def call(dout, x, weight):
        kept = TARGETS != -100
        scale = {"mean": 1 / kept.sum(), "sum": 1.0, "none": 1.0}[reduction]
        dlosses = dout * scale * np.ones(M)
        losses, dx, dweight = reference.linear_cross_entropy_backward(x, weight, TARGETS, dlosses, train_weight=True)
        return losses if reduction == "none" else np.array(losses.sum() * scale), [dx, dweight]
    return call


def embedding_reference(dout, weight):
    return reference.embedding_forward(weight, IDS.ravel()), [reference.embedding_backward(dout, IDS.ravel(), None, V)]


def rope_reference(dout, x):
    return reference.rope_forward(x, COS, SIN), [reference.rope_backward(dout, COS, SIN)]


def summed(pair):
    return pair[0] + pair[1]


QKV = [(B, T, H, D), (B, T, K, D), (B, T, K, D)]
# name: shapes of the differentiable inputs, the call, its reference
CASES = {
    "s2_attention": (QKV, lambda q, k, v: ops.s2_attention(q, k, v, **PATTERN), lambda *x: attention_reference(*x, **PATTERN)),
    "packed": (QKV, lambda q, k, v: ops.s2_attention(q, k, v, cu_seqlens=torch.from_numpy(BORDERS), **PATTERN), packed_reference),
    "rms_norm": ([(M, C), (C,)], ops.rms_norm, norm_reference),
    "add_rms_norm": ([(M, C), (C,), (M, C)], lambda x, weight, residual: summed(ops.rms_norm(x, weight, 1e-6, residual)),
                     norm_reference),
    "rope": ([(B, T, H, D)], lambda x: ops.rope(x, torch.from_numpy(COS), torch.from_numpy(SIN)), rope_reference),
    "lora_linear": ([(M, C), (N, C), (N,), (R, C), (N, R)], lambda *x: ops.lora_linear(*x, 0.5), linear_reference),
    "swiglu": ([(M, F), (M, F)], ops.swiglu,
               lambda dout, *x: (reference.swiglu_forward(*x), reference.swiglu_backward(dout, *x))),
    **{f"loss_{reduction}": ([(M, C), (V, C)], lambda x, weight, r=reduction: ops.linear_cross_entropy(
        x, weight, torch.from_numpy(TARGETS), reduction=r), loss_reference(reduction)) for reduction in ("mean", "sum", "none")},
    "embedding": ([(V, C)], lambda weight: ops.embedding(weight, torch.from_numpy(IDS)).view(M, C), embedding_reference),
    "matmul": ([(M, C), (C, N)], lambda a, b: torch.ops.longlora.matmul(a, b, 0.5), lambda dout, a, b: (
        0.5 * reference.matmul(a, b), [0.5 * reference.f64(dout) @ reference.f64(b).T, 0.5 * reference.f64(a).T @ dout])),
    "cast": ([(M, C)], lambda x: torch.ops.longlora.cast(x, torch.float32), lambda dout, x: (reference.f64(x), [dout])),
}


def given(name, dtype="float32"):
    """Inputs as NumPy arrays rounded to dtype, and the tensors of the same values."""
    arrays = [checks.random(shape, dtype, seed) for seed, shape in enumerate(CASES[name][0])]
    return arrays, [torch.tensor(x.astype(np.float32)).to(TORCH[dtype]) for x in arrays]


def plain_reference(call, *inputs):
    reference.PRECISION = np.float32
    try:
        return call(*inputs)
    finally:
        reference.PRECISION = np.float64


def judge(name, dtype, out, grads, dout, arrays, wanted):
    dout = dout.detach().float().numpy()
    dout = dout.astype(checks.DTYPES[dtype]) if dout.ndim else dout
    (want, want_grads), (low, low_grads) = (f(CASES[name][2], dout, *arrays) for f in (lambda c, *x: c(*x), plain_reference))
    results = [("out", out, want, low)] + [(f"grad {i}", g, want_grads[i], low_grads[i]) for i, g in zip(wanted, grads)]
    for label, got, w, p in results:
        rounded = checks.DTYPES[str(got.dtype).removeprefix("torch.")]
        # two more roundings to the dtype than the kernel's own: a sum of two results, a gradient scaled by the loss's
        checks.compare(got.detach().float().numpy().astype(rounded), np.asarray(w, np.float64), np.asarray(p), f"{name} {label}", 6)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, dtype):
    arrays, tensors = given(name, dtype)
    tensors = [x.requires_grad_() for x in tensors]
    out = CASES[name][1](*tensors)
    dout = torch.tensor(checks.random(tuple(out.shape), dtype, 9).astype(np.float32)).to(out.dtype) if out.ndim else torch.tensor(2.0)
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


@pytest.mark.parametrize("name", CASES)
def test_any_strides(name):
    """Every axis order of an input gives the values of the contiguous one; so does a gradient that is one number, expanded."""
    _, tensors = given(name)
    want = CASES[name][1](*tensors)
    turned = [x.transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for x in tensors]
    out = CASES[name][1](*turned)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    out.sum().backward()
    assert all(torch.isfinite(x.grad).all() and x.grad.shape == x.shape for x in turned)


@pytest.mark.parametrize("name", ["s2_attention", "rms_norm", "add_rms_norm", "rope", "lora_linear", "swiglu"])
def test_empty_batches(name):
    tensors = [x[:0].clone().requires_grad_() if i == 0 or len(x) == len(given(name)[1][0]) else x.clone().requires_grad_()
               for i, x in enumerate(given(name)[1])]
    out = CASES[name][1](*tensors)
    assert out.shape[0] == 0
    out.sum().backward()
    assert all((x.grad == 0).all() for x in tensors)


def calls():
    """Every operator with the arguments of one call."""
    q, k, v = given("s2_attention")[1]
    how = (4, "split", "half", 0.3)
    x, weight, bias, a, b = given("lora_linear")[1]
    norm_x, norm_weight = given("rms_norm")[1]
    head_x, head = given("loss_mean")[1]
    cos, sin, targets = torch.from_numpy(COS), torch.from_numpy(SIN), torch.from_numpy(TARGETS).int()
    rows, ids = torch.rand(M), torch.from_numpy(IDS.ravel()).int()
    grad = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    yield "s2_attention_forward", (*grad, None, *how)
    yield "s2_attention_forward", (*grad, torch.from_numpy(BORDERS), *how)
    yield "s2_attention_backward", (q, q, k, v, q, torch.zeros(B, H, T), None, *how)
    yield "rms_norm_forward", (norm_x.requires_grad_(), norm_weight.requires_grad_(), 1e-6)
    yield "add_rms_norm_forward", (norm_x.clone(), norm_x, norm_weight, 1e-6)
    yield "rms_norm_backward", (norm_x.detach(), norm_x.detach(), rows, norm_weight.detach(), None, True)
    yield "rope_forward", (q.clone().requires_grad_(), cos, sin, None)
    yield "rope_backward", (q.clone().requires_grad_(), cos, sin, None)
    yield "lora_linear_forward", (x.requires_grad_(), weight, bias, a.requires_grad_(), b.requires_grad_(), 0.5)
    yield "lora_linear_forward", (x, weight.clone().requires_grad_(), None, None, None, 0.5)
    yield "lora_linear_backward", (torch.rand(M, N), x.detach(), weight.detach(), a.detach(), b.detach(), torch.rand(M, R), 0.5,
                                   [True, True, True, False, False])
    yield "swiglu_forward", tuple(x.requires_grad_() for x in given("swiglu")[1])
    yield "swiglu_backward", (torch.rand(M, F), *given("swiglu")[1])
    yield "linear_cross_entropy_forward", (head_x.requires_grad_(), head.requires_grad_(), targets, -100)
    yield "linear_cross_entropy_backward", (head_x.detach(), head.detach(), targets, rows, -100, True)
    yield "linear_cross_entropy_step", (head_x, head, targets, -100, True, True)
    yield "embedding_forward", (head.clone().requires_grad_(), ids)
    yield "embedding_backward", (torch.rand(M, C), ids, V)
    yield "matmul", (torch.rand(M, C, requires_grad=True), torch.rand(C, N, requires_grad=True), 0.5)
    yield "cast", (torch.rand(M, C, requires_grad=True), torch.bfloat16)
    yield "accumulate_", (torch.rand(M, C), torch.rand(M, C), 0.5)
    yield "adamw_", (*(torch.rand(9) for _ in range(4)), 1e-3, 0.9, 0.999, 1e-8, 0.1, 1, 1.0)
    yield "sum_squares", (torch.rand(9),)


def test_every_operator_has_a_call_here():
    from longlora import _C
    names = {name for name, _ in calls()}
    assert names == {op.removeprefix("longlora::").partition(".")[0] for op in torch._C._dispatch_get_all_op_names()
                     if op.startswith("longlora::")}
    inplace = {"accumulate": "accumulate_", "adamw": "adamw_"}
    assert {inplace.get(op, op) for op in _C.specs} <= names


@pytest.mark.parametrize("index", range(23))
def test_opcheck(index):
    name, arguments = list(calls())[index]
    torch.library.opcheck(getattr(torch.ops.longlora, name).default, arguments)


def test_opcheck_saw_them_all():
    assert len(list(calls())) == 23


def block(x, norm, weights, ids):
    """A small decoder layer of our ops, and the loss."""
    cos, sin = torch.from_numpy(COS), torch.from_numpy(SIN)
    qkv, a, b, gate_up, head = weights
    y = ops.rms_norm(x, norm)
    q, k, v = ops.lora_linear(y, qkv, None, a, b, 2.0).view(B, T, -1, D).split((H, K, K), 2)
    attended = ops.s2_attention(ops.rope(q, cos, sin), ops.rope(k, cos, sin), v, group_size=4)
    y, total = ops.rms_norm(attended.reshape(B, T, H * D)[..., :C], norm, residual=x)
    gate, up = ops.lora_linear(y, gate_up).chunk(2, -1)
    return ops.linear_cross_entropy((ops.swiglu(gate, up) + total), head, ids)


def block_inputs():
    shapes = [((H + 2 * K) * D, C), (R, C), ((H + 2 * K) * D, R), (2 * C, C), (V, C)]
    weights = [torch.tensor(checks.random(shape, seed=i) * 0.3).requires_grad_() for i, shape in enumerate(shapes)]
    return torch.tensor(checks.random((B, T, C))).requires_grad_(), torch.ones(C, requires_grad=True), weights, torch.from_numpy(IDS)


def run(function, inputs):
    loss = function(*inputs)
    return loss, torch.autograd.grad(loss, [inputs[0], inputs[1], *inputs[2]])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_gives_the_same_values_in_one_graph(backend):
    torch._dynamo.reset()
    inputs = block_inputs()
    loss, grads = run(block, inputs)
    other, compiled = run(torch.compile(block, fullgraph=True, backend=backend), inputs)
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


def test_autocast():
    inputs = block_inputs()
    loss, _ = run(block, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        x, norm, (qkv, a, b, _, head), ids = inputs
        y = ops.rms_norm(x, norm)
        assert y.dtype == torch.float32 and ops.lora_linear(y, qkv, None, a, b).dtype == torch.bfloat16
        mixed = torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2, 8, dtype=torch.bfloat16), torch.randn(1, 5, 2, 8)
        assert ops.s2_attention(*mixed, group_size=2).dtype == torch.bfloat16
        low = block(*inputs)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, loss, rtol=0.03, atol=0.03)
    low.backward()
    assert inputs[0].grad.dtype == torch.float32


def test_a_gradient_of_a_gradient_is_refused():
    q = torch.randn(1, 4, 1, 8, requires_grad=True)
    grad, = torch.autograd.grad(ops.s2_attention(q, q, q, group_size=2).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="gradient of a gradient"):
        grad.sum().backward()


@pytest.mark.parametrize("call, error, words", [
    (lambda q: ops.s2_attention(q, q[:, :3], q, group_size=2), ValueError, "k axis 1"),
    (lambda q: ops.s2_attention(q, q.double(), q, group_size=2), TypeError, "k should be"),
    (lambda q: ops.s2_attention(q, q, q, group_size=0), ValueError, "group_size"),
    (lambda q: ops.s2_attention(q, q, q, group_size=2, boundary="warp"), ValueError, "split, wrap, swap"),
    (lambda q: ops.s2_attention(q, q, q, group_size=2, cu_seqlens=torch.tensor([[0, 4]] * 3, dtype=torch.int32)), ValueError, "B=1"),
    (lambda q: ops.linear_cross_entropy(q.view(-1, 8), q.view(-1, 8), torch.zeros(4), reduction="max"), ValueError, "mean, sum, none"),
])
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call(torch.randn(1, 4, 1, 8))


def test_q_k_and_v_are_not_copied():
    """As transformers holds them, [B,H,T,D] in memory: what is allocated is the results, and nothing of q's size beside them."""
    q, k, v = (torch.randn(1, heads, 512, 64).transpose(1, 2).requires_grad_() for heads in (4, 2, 2))
    size = q.numel() * 4

    def allocated(function):
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


def _in_a_worker(queue):
    q = torch.randn(1, 64, 2, 16)
    queue.put(ops.s2_attention(q, q, q, group_size=16).isfinite().all().item())


def test_a_forked_worker():
    """As DataLoader's: forked after the parent has used the threads."""
    q = torch.randn(1, 256, 2, 16)
    ops.s2_attention(q, q, q, group_size=16)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    worker = context.Process(target=_in_a_worker, args=(queue,))
    worker.start()
    assert queue.get(timeout=60) is True
    worker.join(60)
    assert worker.exitcode == 0
