"""The attention cases of the context parallel tests, and what their results are compared with."""

import checks
import ml_dtypes
import numpy as np
import reference
import torch

from longlora import ops

# By name and number of ranks: lengths of the pieces, G, H, K, further arguments.
FIXED = {
    2: {
        "whole groups": ([32, 32], 16, 4, 2, {}),
        "one group each": ([16, 16], 16, 4, 4, {"B": 3}),
        "cut": ([13, 24], 8, 4, 2, {"B": 2}),
        "unequal, odd group": ([50, 3], 7, 6, 3, {}),
        "group longer than everything": ([10, 11], 64, 4, 2, {}),
        "group of one": ([3, 4], 1, 2, 1, {}),
        "group of two": ([5, 6], 2, 2, 2, {}),
        "SmolLM2's heads": ([20, 31], 12, 9, 3, {}),
        "one KV head of three": ([20, 31], 12, 3, 1, {"B": 2}),
        "one head": ([20, 31], 12, 1, 1, {}),
        "one token": ([1, 0], 4, 2, 2, {}),
        "first piece empty": ([0, 19], 8, 4, 2, {}),
        "last piece empty": ([19, 0], 8, 4, 2, {}),
        "nothing": ([0, 0], 8, 4, 2, {}),
        "no batch": ([8, 9], 8, 4, 2, {"B": 0}),
        "bfloat16": ([61, 70], 32, 6, 2, {"dtype": "bfloat16"}),
        "float16": ([61, 70], 32, 6, 2, {"dtype": "float16", "B": 2}),
        "nobody shifts": ([21, 22], 8, 4, 2, {"shift": "none"}),
        "all shift": ([21, 22], 8, 4, 2, {"shift": "all"}),
        "a scale": ([21, 22], 8, 4, 2, {"scale": 0.3}),
        "long": ([512, 700], 256, 2, 1, {"D": 64}),
    },
    3: {
        "whole groups": ([16, 32, 16], 16, 4, 2, {}),
        "a group over three pieces": ([5, 6, 7], 24, 4, 2, {"B": 2}),
        "middle empty": ([9, 0, 14], 8, 4, 2, {}),
        "tiny": ([1, 1, 1], 8, 9, 3, {}),
        "bfloat16": ([20, 3, 41], 48, 9, 3, {"dtype": "bfloat16"}),
    },
    4: {
        "whole groups": ([16] * 4, 16, 8, 2, {}),
        "several groups each": ([24, 48, 24, 72], 24, 4, 4, {"dtype": "bfloat16"}),
        "a group over all pieces": ([7, 3, 9, 2], 40, 6, 3, {"B": 2}),
        "empty ones": ([0, 30, 0, 11], 12, 3, 1, {}),
        "everything at the end": ([0, 0, 0, 29], 8, 4, 2, {}),
    },
}


def attention_cases(world):
    cases, draw = dict(FIXED[world]), np.random.default_rng(world)
    for number in range(12):
        K = int(draw.integers(1, 4))
        H, G, B = K * int(draw.integers(1, 5)), int(draw.integers(1, 50)), int(draw.integers(1, 3))
        lengths = [int(x) for x in draw.integers(0, draw.choice([4, 30, 70]), world)]
        dtype, shift = (
            str(draw.choice(list(checks.DTYPES))),
            str(draw.choice(["half", "half", "half", "all", "none"])),
        )
        cases[f"random {number}"] = (
            lengths,
            G,
            H,
            K,
            {"B": B, "D": int(draw.integers(1, 20)), "dtype": dtype, "shift": shift},
        )
    return cases


def to_torch(x):
    x = np.ascontiguousarray(x)
    return (
        torch.from_numpy(x.view(np.uint16)).view(torch.bfloat16)
        if x.dtype == ml_dtypes.bfloat16
        else torch.from_numpy(x)
    )


def to_numpy(x):
    x = x.detach().contiguous()
    return x.view(torch.uint16).numpy().view(ml_dtypes.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()


def judge(got, whole, kwargs):
    """out, dq, dk, dv from pieces, against one process and the reference; whole: q, k, v, dout."""
    out, lse = ops.s2_attention_forward(*whole[:3], **kwargs)
    one = [out, *ops.s2_attention_backward(whole[3], *whole[:3], out, lse, **kwargs)]
    backward = whole[3], *whole[:3], out, lse
    want = (
        reference.s2_attention_forward(*whole[:3], **kwargs)[0],
        *reference.s2_attention_backward(*backward, **kwargs),
    )
    low = (
        checks.plain("s2_attention_forward", *whole[:3], **kwargs)[0],
        *checks.plain("s2_attention_backward", *backward, **kwargs),
    )
    # The gradient of a query that sees one key is a difference of equals: its noise is that of the terms.
    noise = (
        np.abs(reference.f64(whole[3])).max(initial=0)
        * np.abs(reference.f64(whole[2])).max(initial=0)
        * 2.0**-21
    )
    for name, x, y, w, p in zip(("out", "dq", "dk", "dv"), got, one, want, low):
        assert x.shape == w.shape and x.dtype == whole[0].dtype
        if w.size:
            plain = np.abs(p.astype(x.dtype).astype(np.float64) - w).max()
            limit = 2 * plain + 4 * checks.EPS[x.dtype] * np.abs(w).max() + noise
            for who, other in (("the reference", w), ("one process", y.astype(np.float64))):
                error = np.abs(x.astype(np.float64) - other).max()
                assert error <= limit, f"{name}: {error:.3g} from {who}, limit {limit:.3g}"
