"""longlora.torch: what a call costs beside one of torch's own, S2-Attn through torch beside the raw op, and the training step of
transformers + peft with our attention and layers against the same without (its S2-Attn then by SDPA, see bench_train_step)."""
from benchmarks import bench_train_step
from benchmarks.harness import Bench
from longlora import ops as raw


def main(argv=None):
    bench = Bench("torch", argv)
    if bench.gpu is not None:
        return print("  bench_host, bench_s2_attention and bench_train_step have what there is of this on a GPU")
    torch = bench.torch
    from longlora.torch import ops
    functional = torch.nn.functional
    for grad in (False, True):
        x, weight = torch.randn(2, 64, requires_grad=grad), torch.ones(64, requires_grad=grad)
        q, k, v = (torch.randn(1, 4, 2, 16, requires_grad=grad) for _ in range(3))
        bent = [t.detach().transpose(1, 2).requires_grad_(grad) for t in (q, k, v)]
        how = ", with gradient" if grad else ""
        bench.row(f"a tiny rms_norm{how}", lambda: ops.rms_norm(x, weight), lambda: functional.rms_norm(x, (64,), weight))
        bench.row(f"a tiny swiglu{how}", lambda: ops.swiglu(x, x), lambda: functional.silu(x) * x)
        bench.row(f"a tiny attention{how}", lambda: ops.s2_attention(q, k, v, group_size=2),
                  lambda: functional.scaled_dot_product_attention(*bent, is_causal=True))
    for L in (2048, 8192):
        q, k, v = (bench.random(1, L, 8, 64) for _ in range(3))
        there = [bench.to_torch(x) for x in (q, k, v)]
        bench.row(f"s2_attention L={L} G=512 through torch", lambda: ops.s2_attention(*there, group_size=512),
                  lambda: raw.s2_attention_forward(q, k, v, group_size=512), flops=4 * 8 * L * 256 * 64, peer_name="raw op")
    bench_train_step.compare(bench, "torch", ("peer", "peer checkpointing"), [(2048, 512)])


if __name__ == "__main__":
    main()
