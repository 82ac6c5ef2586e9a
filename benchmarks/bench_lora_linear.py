"""The linear layer with LoRA, forward and backward.

It is compared with PEFT's layer and with our own frozen linear layer (rank 0).
"""

import importlib.util

from benchmarks.harness import Bench
from longlora import _C

SHAPES = [
    (2048, 576, 576, 8),
    (2048, 576, 192, 8),
    (2048, 2048, 2048, 8),
    (2048, 2048, 2048, 16),
    (2048, 2048, 2048, 64),
]


def peft_layer(torch, weight, a, b, scale):
    """PEFT's LoRA linear layer with these weights. Only a and b are trained."""
    from peft import LoraConfig, inject_adapter_in_model

    model = torch.nn.Sequential(
        torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    )
    model[0].weight.data = weight
    rank = a.shape[0]
    inject_adapter_in_model(
        LoraConfig(r=rank, lora_alpha=scale * rank, lora_dropout=0.0, target_modules=["0"]), model
    )
    model[0].lora_A["default"].weight.data = a
    model[0].lora_B["default"].weight.data = b
    return model


def by_formula(torch, weight, a, b, scale):
    """The formula of PEFT's layer, for machines without peft."""
    functional = torch.nn.functional
    a, b = (x.detach().clone().requires_grad_() for x in (a, b))
    return lambda x: functional.linear(x, weight) + functional.linear(functional.linear(x, a), b) * scale


def on_gpu(bench):
    """8192 tokens, square layers of Llama-2-7B's size: LoRA against the frozen linear layer and PEFT."""
    gpu, dtype = bench.gpu, "bfloat16"
    m, c, n = gpu.size((8192, 4096, 4096), (32, 64, 48))
    for r in gpu.size((8, 16, 64), (8,)):
        name = f"M={m} C={c} N={n} R={r}"
        if not bench.wants(f"forward+backward forward over frozen {name}", dtype):
            continue
        x, dout = bench.random(m, c, dtype=dtype), bench.random(m, n, dtype=dtype)
        weight = bench.random(n, c, dtype=dtype, scale=c**-0.5)
        a, b = bench.random(r, c, dtype=dtype, scale=c**-0.5), bench.random(n, r, dtype=dtype)
        out, dx = gpu.zeros((m, n), dtype), gpu.zeros((m, c), dtype)
        u, da, db = gpu.zeros((m, r)), gpu.zeros((r, c)), gpu.zeros((n, r))

        def forward():
            _C.lora_linear_forward(out, u, x, weight, None, a, b, None, 2.0)

        def both():
            forward()
            _C.lora_linear_backward(dx, da, db, None, None, dout, x, weight, a, b, u, 2.0)

        def frozen_forward():
            _C.lora_linear_forward(out, None, x, weight, None, None, None, None, 1.0)

        def frozen():
            frozen_forward()
            _C.lora_linear_backward(dx, None, None, None, None, dout, None, weight, None, None, None, 1.0)

        flops = 2 * m * n * c
        # time over the frozen linear's: + 8 % is a ratio of 1 / 1.08
        over = (1 / 1.08, 1 / 1.03)
        bench.row(
            f"forward over frozen {name}",
            forward,
            frozen_forward,
            dtype=dtype,
            flops=flops + 2 * m * r * (n + c),
            peer_name="frozen",
            target=over,
            judged="ratio",
        )
        flops = 4 * m * n * c + 6 * m * r * (n + c)
        bench.row(
            f"forward+backward over frozen {name}",
            both,
            frozen,
            dtype=dtype,
            flops=flops,
            peer_name="frozen",
            target=over,
            judged="ratio",
        )
        peer, peer_name = None, ""
        if gpu.torch is not None:
            with_peft = importlib.util.find_spec("peft") is not None
            layer = (peft_layer if with_peft else by_formula)(gpu.torch, weight, a, b, 2.0)
            xt, peer_name = (
                x.detach().clone().requires_grad_(),
                "peft" if with_peft else "PEFT's formula in torch",
            )
            peer = gpu.can(lambda: layer(xt).backward(dout))
            bench.row(
                f"torch's frozen linear {name}",
                frozen,
                lambda: (gpu.torch.mm(x, weight.T), gpu.torch.mm(dout, weight)),
                dtype=dtype,
                flops=4 * m * n * c,
            )
        bench.row(
            f"forward+backward {name}",
            both,
            peer,
            dtype=dtype,
            flops=flops,
            peer_name=peer_name,
            target=(1.2, 1.4),
            judged="ratio",
        )


def main(argv=None):
    bench = Bench("lora_linear", argv)
    if bench.gpu is not None:
        return on_gpu(bench)
    for dtype in "float32", "bfloat16":
        for m, c, n, r in SHAPES:
            name = f"M={m} C={c} N={n} R={r}"
            if not bench.wants(f"forward+backward {name}", dtype) and not bench.wants(
                f"over frozen {name}", dtype
            ):
                continue
            x, dout = bench.random(m, c, dtype=dtype), bench.random(m, n, dtype=dtype)
            weight = bench.random(n, c, dtype=dtype, scale=c**-0.5)
            a, b = bench.random(r, c, dtype=dtype, scale=c**-0.5), bench.random(n, r, dtype=dtype)
            out, dx = bench.random(m, n, dtype=dtype), bench.random(m, c, dtype=dtype)
            u, da, db = bench.random(m, r), bench.random(r, c), bench.random(n, r)
            torch = bench.torch
            layer = peft_layer(torch, *(bench.to_torch(t) for t in (weight, a, b)), 2.0)
            xt, dt = bench.to_torch(x).requires_grad_(), bench.to_torch(dout)

            def ours():
                _C.lora_linear_forward(out, u, x, weight, None, a, b, None, 2.0)
                _C.lora_linear_backward(dx, da, db, None, None, dout, x, weight, a, b, u, 2.0)

            def frozen():
                _C.lora_linear_forward(out, None, x, weight, None, None, None, None, 1.0)
                _C.lora_linear_backward(dx, None, None, None, None, dout, None, weight, None, None, None, 1.0)

            def peer():
                xt.grad = None
                layer(xt).backward(dt)

            flops = 4 * m * n * c + 6 * m * r * (n + c)
            bench.row(f"forward+backward {name}", ours, peer, dtype=dtype, flops=flops, peer_name="peft")
            bench.row(f"over frozen {name}", ours, frozen, dtype=dtype, flops=flops, peer_name="frozen")


if __name__ == "__main__":
    main()
