"""The linear layer with LoRA: forward and backward against PEFT's layer, and against our own frozen linear (rank 0)."""
from benchmarks.harness import Bench
from longlora import _C

SHAPES = [(2048, 576, 576, 8), (2048, 576, 192, 8), (2048, 2048, 2048, 8), (2048, 2048, 2048, 16), (2048, 2048, 2048, 64)]


def peft_layer(torch, weight, a, b, scale):
    """PEFT's LoRA linear holding these weights; only a and b are trained."""
    from peft import LoraConfig, inject_adapter_in_model
    model = torch.nn.Sequential(torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype))
    model[0].weight.data = weight
    rank = a.shape[0]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=scale * rank, lora_dropout=0.0, target_modules=["0"]), model)
    model[0].lora_A["default"].weight.data = a
    model[0].lora_B["default"].weight.data = b
    return model


def main(argv=None):
    bench = Bench("lora_linear", argv)
    for dtype in "float32", "bfloat16":
        for m, c, n, r in SHAPES:
            name = f"M={m} C={c} N={n} R={r}"
            if not bench.wants(f"forward+backward {name}", dtype) and not bench.wants(f"over frozen {name}", dtype):
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
                _C.lora_linear_backward(dx, da, db, None, None, dout, x, weight, a, b, u, 2.0, 0)

            def frozen():
                _C.lora_linear_forward(out, None, x, weight, None, None, None, None, 1.0)
                _C.lora_linear_backward(dx, None, None, None, None, dout, None, weight, None, None, None, 1.0, 0)

            def peer():
                xt.grad = None
                layer(xt).backward(dt)

            flops = 4 * m * n * c + 6 * m * r * (n + c)
            bench.row(f"forward+backward {name}", ours, peer, dtype=dtype, flops=flops, peer_name="peft")
            bench.row(f"over frozen {name}", ours, frozen, dtype=dtype, flops=flops, peer_name="frozen")


if __name__ == "__main__":
    main()
