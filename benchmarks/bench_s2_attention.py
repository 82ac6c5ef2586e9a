"""S2-Attn against its fastest form in torch: one index moves the shifted heads, groups are folded into the
batch, and SDPA runs with is_causal.

FLOPs count the causal half only: forward 4 H L (G/2) D, backward 2.5 times that. On a GPU the dtype is
bfloat16, forward and backward are timed together, and SDPA is forced to its flash and cuDNN backends in turn.
"""

import functools
import math

from benchmarks.harness import Bench
from longlora import _C, ops
from longlora.training.profile import pairs

L, H = 8192, 8
CASES = [(D, G) for D in (64, 128) for G in (512, 1024, 2048, 4096)] + [(80, 512), (96, 300)]
# (T, D, G) of an odd shape and of its round neighbour
ODD = [
    ((8192, 80, 512), (8192, 64, 512)),
    ((8192, 96, 512), (8192, 128, 512)),
    ((8192, 64, 300), (8192, 64, 256)),
    ((5000, 64, 512), (4096, 64, 512)),
]


class Peer:
    """q, k, v [1,L,H,D] -> out. Half of the heads are rolled by half a group, as in the paper's Algorithm 1
    ("wrap"); then SDPA runs on each group.
    """

    def __init__(self, torch, tensors, G):
        self.torch, self.G = torch, G
        self.q, self.k, self.v = (x.requires_grad_() for x in tensors)

    def fold(self, x):
        B, T, heads, D = x.shape
        x = self.torch.cat([x[:, :, : heads // 2], x[:, :, heads // 2 :].roll(-self.G // 2, 1)], 2)
        return x.reshape(B * T // self.G, self.G, heads, D).transpose(1, 2)

    def forward(self):
        out = self.torch.nn.functional.scaled_dot_product_attention(
            self.fold(self.q), self.fold(self.k), self.fold(self.v), is_causal=True
        )
        out = out.transpose(1, 2).reshape(self.q.shape)
        return self.torch.cat([out[:, :, : H // 2], out[:, :, H // 2 :].roll(self.G // 2, 1)], 2)


class GpuPeer:
    """q [1,L,H,D], k and v [1,L,K,D] -> out, by one backend of SDPA with enable_gqa.

    An index shifts the tokens of the shifted heads, and its inverse shifts the result back. Groups are folded
    into the batch.
    """

    def __init__(self, torch, tensors, G, backend):
        self.torch, self.G, self.backend = torch, G, backend
        self.tensors = [x.detach().clone().requires_grad_() for x in tensors]
        L = tensors[0].shape[1]
        self.index = (torch.arange(L, device=tensors[0].device) + G // 2) % L
        self.inverse = (torch.arange(L, device=tensors[0].device) - G // 2) % L

    def fold(self, x):
        half = x.shape[2] // 2
        x = self.torch.cat([x[:, :, :half], x[:, self.index, half:]], 2)
        return x.reshape(-1, self.G, *x.shape[2:]).transpose(1, 2)

    def step(self, dout):
        from torch.nn.attention import sdpa_kernel

        q, k, v = self.tensors
        with sdpa_kernel(self.backend):
            out = self.torch.nn.functional.scaled_dot_product_attention(
                self.fold(q), self.fold(k), self.fold(v), is_causal=True, enable_gqa=k.shape[2] != q.shape[2]
            )
            out, half = out.transpose(1, 2).reshape(q.shape), q.shape[2] // 2
            out = self.torch.cat([out[:, :, :half], out[:, self.inverse, half:]], 2)
            return self.torch.autograd.grad(out, (q, k, v), dout)


def on_gpu(bench):
    """The heads of Llama-2-7B and Llama-3-8B, and heads with D = 64, at the paper's context lengths."""
    gpu, dtype = bench.gpu, "bfloat16"
    for H, K, D in gpu.size([(32, 32, 128), (32, 8, 128), (32, 32, 64)], [(2, 1, 64)]):
        for L in gpu.size([8192, 16384, 32768], [32]):
            G, name = L // 4, f"H={H} K={K} D={D} L={L} G={L // 4}"
            if not any(bench.wants(f"{what} {name}", dtype) for what in ("forward", "forward+backward")):
                continue
            q, k, v, dout = (bench.random(1, L, heads, D, dtype=dtype) for heads in (H, K, K, H))
            out, dq, dk, dv = (gpu.zeros((1, L, heads, D), dtype) for heads in (H, H, K, K))
            lse, scalars = (
                gpu.zeros((1, H, L)),
                (G, ops.BOUNDARIES["split"], ops.SHIFTS["half"], 1 / math.sqrt(D)),
            )

            def forward():
                _C.s2_attention_forward(out, lse, q, k, v, None, *scalars)

            def both():
                forward()
                _C.s2_attention_backward(dq, dk, dv, dout, q, k, v, out, lse, None, *scalars)

            flops = 4 * D * pairs(L, H, G, "split", "half")
            bench.row(f"forward {name}", forward, dtype=dtype, flops=flops)
            for backend in gpu.size(["FLASH_ATTENTION", "CUDNN_ATTENTION"], [None]):
                peer = None
                if backend is not None:
                    theirs = GpuPeer(
                        gpu.torch, (q, k, v), G, getattr(gpu.torch.nn.attention.SDPBackend, backend)
                    )
                    peer = gpu.can(lambda: theirs.step(dout))
                bench.row(
                    f"forward+backward {name}",
                    both,
                    peer,
                    dtype=dtype,
                    flops=3.5 * flops,
                    peer_name=(backend or "").lower(),
                    judged="ratio",
                    target=(0.9, 1.1) if backend == "FLASH_ATTENTION" else None,
                )


def main(argv=None):
    bench = Bench("s2_attention", argv)
    if bench.gpu is not None:
        return on_gpu(bench)
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
                return bench.torch.autograd.grad(
                    out_torch, (peer.q, peer.k, peer.v), dout_torch, retain_graph=True
                )

            def forward():
                with bench.torch.no_grad():
                    return peer.forward()

            bench.row(
                f"forward {name}",
                lambda: ops.s2_attention_forward(q, k, v, group_size=G),
                peer and forward,
                dtype=dtype,
                flops=flops,
            )
            bench.row(
                f"backward {name}",
                lambda: ops.s2_attention_backward(dout, q, k, v, out, lse, group_size=G),
                peer and backward,
                dtype=dtype,
                flops=2.5 * flops,
            )
        for cases in ODD:
            ways, flops, names = [], [], []
            for T, D, G in cases:
                q, k, v, dout = (bench.random(1, T, H, D, dtype=dtype) for _ in range(4))
                out, lse = ops.s2_attention_forward(q, k, v, group_size=G)
                ways.append(
                    (
                        functools.partial(ops.s2_attention_forward, q, k, v, group_size=G),
                        functools.partial(ops.s2_attention_backward, dout, q, k, v, out, lse, group_size=G),
                    )
                )
                flops.append(4 * pairs(T, H, G, "split", "half") * D)
                names.append(f"T={T} D={D} G={G}")
            for i, way in enumerate(("forward", "backward")):
                bench.neighbour(
                    f"odd {way} {names[0]}",
                    ways[0][i],
                    ways[1][i],
                    *((1, 2.5)[i] * n for n in flops),
                    names[1],
                    dtype=dtype,
                )


if __name__ == "__main__":
    main()
