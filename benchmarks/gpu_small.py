"""Compares each op on the GPU with the CPU, once, on small odd shapes. It needs NumPy only.

compute-sanitizer runs on this program, and it replaces the op tests on machines without pytest. --training
compares a few training steps of the demo's model instead; --smoke makes them short.
"""

import argparse
import math
import sys

import numpy as np

from longlora import _C, cuda
from longlora.device import host, send

TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}  # relative to the largest value; sums have about 100 terms
rng = np.random.default_rng(0)


def random(*shape):
    return rng.standard_normal(shape, np.float32)


def calls():
    """Yield (op, arguments).

    An array is an input of the common dtype, (array, dtype) an input of another dtype, and
    (array, "out", dtype) an output, of the common dtype if dtype is "common".
    """
    M, C, N, R, F, V = 37, 72, 40, 8, 56, 90
    H, K, D, T, G = 4, 2, 24, 45, 16
    ids, targets = (rng.integers(0, V, M, dtype=np.int32) for _ in range(2))
    targets[::5] = -100
    order = np.argsort(ids, kind="stable").astype(np.int32)
    x, dout, w, rstd = random(M, C), random(M, C), random(C), (np.abs(random(M)) + 1, "float32")
    q, k, v = random(1, T, H, D), random(1, T, K, D), random(1, T, K, D)
    scalars = (G, 0, 0, 1 / math.sqrt(D))
    angle = random(T, D // 2)
    tables = (np.cos(angle), "float32"), (np.sin(angle), "float32")

    def out(*shape, dtype="common"):
        return np.zeros(shape, np.float32), "out", dtype

    def f32(*shape):
        return out(*shape, dtype="float32")

    yield "matmul", (out(M, N), random(M, C), random(C, N), 0.5, 0.0)
    yield "embedding_forward", (out(M, C), random(V, C), ids)
    yield "embedding_backward", (f32(V, C), dout, ids, order)
    yield "rms_norm_forward", (out(M, C), f32(M), None, x, None, w, 1e-5)
    yield "rms_norm_backward", (out(M, C), f32(C), dout, x, rstd, w, None)
    yield "rope_forward", (out(1, T, H, D), q, *tables, None)
    yield "rope_backward", (out(1, T, H, D), q, *tables, None)
    a, b, weight, dy = random(R, C), random(N, R), random(N, C), random(M, N)
    yield "lora_linear_forward", (out(M, N), f32(M, R), x, weight, random(N), a, b, None, 2.0)
    yield (
        "lora_linear_backward",
        (out(M, C), f32(R, C), f32(N, R), f32(N, C), f32(N), dy, x, weight, a, b, None, 2.0),
    )
    yield "s2_attention_forward", (out(1, T, H, D), f32(1, H, T), q, k, v, None, *scalars)
    for S in (1, 12):
        cache = [(random(1, 300, K, D), "out", "common") for _ in range(2)]
        new = [random(1, S, heads, D) for heads in (H, K, K)]
        yield "cached_attention", (out(1, S, H, D), *cache, *new, None, np.int32([280]), scalars[3])
    for boundary, length in ((0, T), (1, 3 * G), (2, 3 * G)):
        q, k, v, do = (random(1, length, heads, D) for heads in (H, K, K, H))
        o, lse = np.empty_like(q), np.empty((1, H, length), np.float32)
        _C.s2_attention_forward(o, lse, q, k, v, None, G, boundary, 0, scalars[3])
        yield (
            "s2_attention_backward",
            (
                out(*q.shape),
                out(*k.shape),
                out(*v.shape),
                do,
                q,
                k,
                v,
                o,
                (lse, "float32"),
                None,
                G,
                boundary,
                0,
                scalars[3],
            ),
        )
    gate, up, df = random(M, F), random(M, F), random(M, F)
    yield "swiglu_forward", (out(M, F), gate, up)
    yield "swiglu_backward", (out(M, F), out(M, F), df, gate, up)
    head = random(V, C) / 8
    yield "linear_cross_entropy_forward", (f32(M), f32(M), x, head, targets, -100)
    yield (
        "linear_cross_entropy_backward",
        (f32(M), out(M, C), f32(V, C), x, head, targets, (random(M), "float32"), -100),
    )


def tensor(array, dtype, device):
    """A Tensor with the array's values in `dtype` on `device`."""
    there = send(array, device) if device != "cpu" else array
    if array.dtype == np.int32:
        return there
    out = _C.Tensor(array.shape, dtype, device)
    out.copy_(there)
    return out


def run(op, args, dtype, device):
    """Call the op -> its outputs as float32 ndarrays."""
    given, outputs = [], []
    for arg in args:
        if isinstance(arg, tuple):
            own = arg[-1] if arg[-1] != "common" else dtype
            given.append(tensor(arg[0], own, device))
            outputs += [given[-1]] if arg[1] == "out" else []
        else:
            given.append(tensor(arg, dtype, device) if isinstance(arg, np.ndarray) else arg)
    getattr(_C, op)(*given)
    found = []
    for x in outputs:
        as_float = _C.Tensor(x.shape, "float32", device)
        as_float.copy_(x)
        found.append(np.array(host(as_float)))
    return found


def ops():
    """Compare the ops of `calls`, then those with other shapes -> the number of wrong ones."""
    wrong = 0
    for dtype, tolerance in TOLERANCE.items():
        for op, args in calls():
            error = 0.0
            for ours, theirs in zip(run(op, args, dtype, "cuda:0"), run(op, args, dtype, "cpu"), strict=True):
                error = max(error, float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-3)))
            good = error <= tolerance  # False for NaN
            wrong += not good
            print(f"{op:<30} {dtype:<9} {error:.2e} {'' if good else 'WRONG'}", flush=True)
    x, grad = random(1000), random(1000)
    found = []
    for device in ("cuda:0", "cpu"):
        param, m, v, copy = (tensor(x * s, "float32", device) for s in (1, 0, 0, 1))
        _C.adamw(param, m, v, copy, tensor(grad, "float32", device), 1e-2, 0.9, 0.95, 1e-8, 0.1, 1, 0.5)
        squares = _C.Tensor((1,), "float64", device)
        _C.sum_squares(squares, param)
        total = tensor(np.ones((10, 100), np.float32), "float32", device)
        _C.accumulate(total, param.reshape((10, 100)), 3.0)
        narrow = _C.Tensor((10, 100), "bfloat16", device)
        _C.scale(total, total, 0.7)
        _C.cast(narrow, total)
        total.copy_(narrow)
        found.append(np.concatenate([host(param), host(copy), host(squares), host(total).reshape(-1)]))
    good = np.abs(found[0] - found[1]).max() <= 1e-4 * np.abs(found[1]).max()
    print(f"adamw, sum_squares, accumulate, scale, cast: {'right' if good else 'WRONG'}")
    return wrong + (not good)


def training(steps, length):
    """Train the demo's model on the bytes of its text, on the CPU and the GPU -> whether the losses agree."""
    from longlora.decoder import plan as plan_
    from longlora.decoder.lora import LoraConfig
    from longlora.decoder.model import Model
    from longlora.files.open_model import open_model
    from longlora.tools import demo
    from longlora.training.optimizer import AdamW

    base = open_model(demo.MODEL)
    text = np.frombuffer(sorted(demo.TEXT.glob("*.txt"))[0].read_bytes()[: steps * length + 1], np.uint8)
    losses = {}
    for dtype in TOLERANCE:
        for device in ("cpu", "cuda:0"):
            given, attention = (
                dict(dtype=dtype, lora=LoraConfig(), device=device),
                {"group_size": length // 4},
            )
            about = plan_.plan(base.config, sequence_length=length, **attention, **given)
            model = Model(base.config, plan=about, attention=attention, **given).load(base)
            optimizer, found = AdamW(model.parameters, max_grad_norm=1.0), []
            for step in range(steps):
                ids = text[step * length : (step + 1) * length + 1].astype(np.int32)[None]
                model.zero_grad()
                found.append(model.train_microbatch(ids[:, :-1], ids[:, 1:], 1 / length) / length)
                optimizer.step(dict.fromkeys(model.kinds, 1e-3))
            losses[dtype, device] = np.array(found)
            print(dtype, device, *(f"{loss:.5f}" for loss in found), flush=True)
    bounds = {"float32": 1e-4, "bfloat16": 1e-2}
    return all(
        np.abs(losses[dtype, "cuda:0"] / losses[dtype, "cpu"] - 1).max() <= bound
        for dtype, bound in bounds.items()
    )


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--training", action="store_true", help="compare training steps of the demo's model")
    parser.add_argument("--smoke", action="store_true", help="fewer and shorter steps")
    asked = parser.parse_args(argv)
    if not cuda.is_available():
        print(f"no GPU: {cuda.reason()}")
        return 2
    if asked.training:
        good = training(*((2, 32) if asked.smoke else (6, 512)))
        print("the losses agree" if good else "the losses of GPU and CPU differ")
        return 0 if good else 1
    wrong = ops()
    print(f"{wrong} wrong" if wrong else "every op agrees with the CPU's")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
