"""Calls of longlora.torch against calls of torch, S2-Attn through torch against the raw op, and the training
step of transformers + peft with our attention and layers against the step without them.

The step without them computes S2-Attn by SDPA, as in bench_train_step.
"""

from benchmarks import bench_train_step
from benchmarks.harness import Bench
from longlora import ops as raw


def main(argv=None):
    bench = Bench("torch", argv)
    if bench.gpu is not None:
        return print(
            "  bench_torch runs on the CPU; on a GPU run bench_host, bench_s2_attention and bench_train_step"
        )
    torch = bench.torch
    from longlora.torch import ops

    functional = torch.nn.functional
    x, weight, matrix = torch.randn(2, 64), torch.ones(64), torch.randn(64, 64)
    q, k, v = (torch.randn(1, 4, 2, 16) for _ in range(3))
    bent = [t.transpose(1, 2) for t in (q, k, v)]
    tiny = {
        "rms_norm": (
            lambda x, weight: ops.rms_norm(x, weight),
            lambda x, weight: functional.rms_norm(x, (64,), weight),
            (x, weight),
            (x, weight),
        ),
        "swiglu": (ops.swiglu, lambda x, y: functional.silu(x) * y, (x, x), (x, x)),
        "swiglu with 3 axes": (
            ops.swiglu,
            lambda x, y: functional.silu(x) * y,
            (x[None], x[None]),
            (x[None], x[None]),
        ),
        "linear": (ops.lora_linear, functional.linear, (x, matrix), (x, matrix)),
        "attention": (
            lambda q, k, v: ops.s2_attention(q, k, v, group_size=2),
            lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, is_causal=True),
            (q, k, v),
            bent,
        ),
    }

    def timed(call, given, how):
        given = [t.detach().requires_grad_(how != "forward") for t in given]
        dout = torch.ones_like(call(*given))
        if how == "forward and backward":
            return lambda: torch.autograd.grad(call(*given), given, dout)
        return lambda: call(*given)

    for how in ("forward", "forward, with gradient", "forward and backward"):
        for name, (ours, theirs, *inputs) in tiny.items():
            bench.row(
                f"a tiny {name}, {how}",
                *(timed(call, given, how) for call, given in zip((ours, theirs), inputs)),
            )
    for L in (2048, 8192):
        q, k, v = (bench.random(1, L, 8, 64) for _ in range(3))
        there = [bench.to_torch(x) for x in (q, k, v)]
        bench.row(
            f"s2_attention L={L} G=512 through torch",
            lambda: ops.s2_attention(*there, group_size=512),
            lambda: raw.s2_attention_forward(q, k, v, group_size=512),
            flops=4 * 8 * L * 256 * 64,
            peer_name="raw op",
        )
    bench_train_step.compare(bench, "torch", ("peer", "peer checkpointing"), [(2048, 512)])


if __name__ == "__main__":
    main()
