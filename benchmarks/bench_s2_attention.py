"""S2-Attn against torch's best form of it: the shifted heads moved by one index, groups folded into the batch, SDPA with
is_causal. Useful FLOPs, causal half only: forward 4 H L (G/2) D, backward 2.5 times that."""
import functools

from benchmarks.harness import Bench
from longlora import ops
from longlora.profile import pairs

L, H = 8192, 8
CASES = [(D, G) for D in (64, 128) for G in (512, 1024, 2048, 4096)] + [(80, 512), (96, 300)]
# (T, D, G) and its round neighbour
ODD = [((8192, 80, 512), (8192, 64, 512)), ((8192, 96, 512), (8192, 128, 512)), ((8192, 64, 300), (8192, 64, 256)),
       ((5000, 64, 512), (4096, 64, 512))]


class Peer:
    """q, k, v [1,L,H,D] -> out: half of the heads rolled by half a group (wrap, as the paper's Algorithm 1), SDPA per group."""

    def __init__(self, torch, tensors, G):
        self.torch, self.G = torch, G
        self.q, self.k, self.v = (x.requires_grad_() for x in tensors)

    def fold(self, x):
        B, T, heads, D = x.shape
        x = self.torch.cat([x[:, :, :heads // 2], x[:, :, heads // 2:].roll(-self.G // 2, 1)], 2)
        return x.reshape(B * T // self.G, self.G, heads, D).transpose(1, 2)

    def forward(self):
        out = self.torch.nn.functional.scaled_dot_product_attention(self.fold(self.q), self.fold(self.k), self.fold(self.v), is_causal=True)
        out = out.transpose(1, 2).reshape(self.q.shape)
        return self.torch.cat([out[:, :, :H // 2], out[:, :, H // 2:].roll(self.G // 2, 1)], 2)


def main(argv=None):
    bench = Bench("s2_attention", argv)
    for dtype in "float32", "bfloat16":
        for D, G in CASES:
            name = f"D={D} G={G}"
            if not any(bench.wants(f"{way} {name}", dtype) for way in ("forward", "backward")):
                continue
            q, k, v, dout = (bench.random(1, L, H, D, dtype=dtype) for _ in range(4))
            peer = None
            if L % G == 0:
                peer = Peer(bench.torch, [bench.to_torch(x) for x in (q, k, v)], G)
                out_torch, dout_torch = peer.forward(), bench.to_torch(dout)
            out, lse = ops.s2_attention_forward(q, k, v, group_size=G)
            flops = 4 * H * L * G / 2 * D

            def backward():
                return bench.torch.autograd.grad(out_torch, (peer.q, peer.k, peer.v), dout_torch, retain_graph=True)

            def forward():
                with bench.torch.no_grad():
                    return peer.forward()
            bench.row(f"forward {name}", lambda: ops.s2_attention_forward(q, k, v, group_size=G), peer and forward, dtype=dtype, flops=flops)
            bench.row(f"backward {name}", lambda: ops.s2_attention_backward(dout, q, k, v, out, lse, group_size=G), peer and backward,
                      dtype=dtype, flops=2.5 * flops)
        for cases in ODD:
            ways, flops, names = [], [], []
            for T, D, G in cases:
                q, k, v, dout = (bench.random(1, T, H, D, dtype=dtype) for _ in range(4))
                out, lse = ops.s2_attention_forward(q, k, v, group_size=G)
                ways.append((functools.partial(ops.s2_attention_forward, q, k, v, group_size=G),
                             functools.partial(ops.s2_attention_backward, dout, q, k, v, out, lse, group_size=G)))
                flops.append(4 * pairs(T, H, G, "split", "half") * D)
                names.append(f"T={T} D={D} G={G}")
            for i, way in enumerate(("forward", "backward")):
                bench.neighbour(f"odd {way} {names[0]}", ways[0][i], ways[1][i], *((1, 2.5)[i] * n for n in flops), names[1], dtype=dtype)


if __name__ == "__main__":
    main()
