"""The bytes of workspace that each op takes on a GPU: csrc/workspace.h. Plans rely on them, and need no GPU.

The numbers are worked out by hand from what the comments of csrc/workspace.h say.
"""

import math

import pytest

from longlora import _C
from longlora.memory.dry_run import untouched

CUBLAS = 32 << 20
SIZES = {"float32": 4, "float64": 8, "bfloat16": 2, "int32": 4}
HALF, NONE, ALL = range(3)  # the shifts


def array(*shape, dtype="float32"):
    return untouched(math.prod(shape) * SIZES[dtype]).view(shape, dtype)


def whole(bytes):
    """Up to a multiple of 256."""
    return bytes + -bytes % 256


def test_matmul():
    assert _C.workspace("matmul", array(4, 5), array(4, 3), array(3, 5), 1.0, 0.0) == CUBLAS


@pytest.mark.parametrize(
    "dtype, n, blocks",
    [
        ("float32", 1000, 1),
        ("float32", 4096, 1),
        ("float32", 4097, 2),
        ("bfloat16", 4097, 1),
        ("float32", 1 << 30, 1024),
    ],
)
def test_sum_squares(dtype, n, blocks):
    """A float64 for each block, which takes at least 16 KiB."""
    assert _C.workspace("sum_squares", array(1, dtype="float64"), array(n, dtype=dtype)) == 8 * blocks


@pytest.mark.parametrize("M, C, bytes", [(100, 6, 256 + 4 * 4), (40000, 64, 1000 * (64 * 4 + 4))])
def test_embedding_backward(M, C, bytes):
    """A row and an id for each piece: 4 pieces of 32 tokens, 1000 of 40."""
    ids = [array(M, dtype="int32") for _ in range(2)]
    assert _C.workspace("embedding_backward", array(9, C), array(M, C), *ids) == bytes


@pytest.mark.parametrize(
    "M, C, dtype, blocks",
    [
        (3, 5, "float32", 1),  # 256 rows in a block
        (1000, 64, "float32", 16),  # 4 threads for a row: 64 rows in a block
        (1000, 64, "bfloat16", 8),  # 2 threads
        (10**6, 64, "float32", 1024),
        (1000, 512, "float32", 125),  # a warp
        (10**6, 4096, "bfloat16", 512),  # 4 warps
        (1000, 100000, "float32", 128),  # 16 warps
    ],
)
def test_rms_norm_backward(M, C, dtype, blocks):
    """A row of dweight for each block, with a multiple of 8 elements."""
    dx, x, dweight, rstd = array(M, C, dtype=dtype), array(M, C, dtype=dtype), array(C), array(M)
    weight, dout = array(C, dtype=dtype), array(M, C, dtype=dtype)
    rest = dout, x, rstd, weight, None
    assert _C.workspace("rms_norm_backward", dx, dweight, *rest) == blocks * (C + -C % 8) * 4
    assert _C.workspace("rms_norm_backward", dx, None, *rest) == 0


def test_lora_linear_forward():
    """u, where the caller does not take it."""
    M, N, C, R = 100, 40, 72, 8
    out, x, weight, lora = array(M, N), array(M, C), array(N, C), (array(R, C), array(N, R))
    for u, ab, bytes in ((None, lora, whole(4 * M * R)), (array(M, R), lora, 0), (None, (None, None), 0)):
        found = _C.workspace("lora_linear_forward", out, u, x, weight, None, *ab, None, 1.0)
        assert found == CUBLAS + bytes


@pytest.mark.parametrize("M, pieces", [(200, 1), (1000, 4), (10**5, 16)])
@pytest.mark.parametrize(
    "N, outputs, has_u, products, sums",
    [
        (40, "dx da db dweight dbias", True, 1, 8 * 72),
        (40, "dx da db dweight dbias", False, 2, 8 * 72),
        (200, "dx da db dweight dbias", True, 1, 8 * 200),
        (40, "db", False, 1, 8 * 40),
        (40, "db", True, 0, 8 * 40),
        (40, "da", False, 1, 8 * 72),
        (40, "dx", False, 1, 0),
        (40, "dbias", False, 0, 40),
        (700, "da dbias", False, 1, 700),
    ],
)
def test_lora_linear_backward(M, pieces, N, outputs, has_u, products, sums):
    """du for dx and da; u for db, unless it is given; the largest of the sums over rows, for each piece."""
    C, R = 72, 8
    shapes = {"dx": (M, C), "da": (R, C), "db": (N, R), "dweight": (N, C), "dbias": (N,)}
    wanted = [array(*shape) if name in outputs.split() else None for name, shape in shapes.items()]
    given = [array(*shape) for shape in ((M, N), (M, C), (N, C), (R, C), (N, R))]
    found = _C.workspace("lora_linear_backward", *wanted, *given, array(M, R) if has_u else None, 1.0)
    assert found == CUBLAS + products * whole(4 * M * R) + whole(4 * pieces * sums)


@pytest.mark.parametrize(
    "M, V, rows, row",
    [
        (100, 1001, 100, 1008),
        (2048, 37, 2048, 40),
        (2100, 37, 1088, 40),  # two chunks, of 1088 and 1012 rows
        (5000, 128256, 896, 128256),  # 915 would fit
        (100, 10**7, 11, 10**7),
        (3, 2 * 10**8, 1, 2 * 10**8),
    ],
)
def test_linear_cross_entropy(M, V, rows, row):
    """The float32 logits of a chunk of rows, at most 448 MiB of them, behind four scalars."""
    x, weight, targets, losses, dx, dlosses, lse = (
        array(M, 8),
        array(V, 8),
        array(M, dtype="int32"),
        *(array(*shape) for shape in ((M,), (M, 8), (M,), (M,))),
    )
    bytes = CUBLAS + 256 + whole(4 * rows * row)
    assert _C.workspace("linear_cross_entropy_forward", losses, lse, x, weight, targets, -100) == bytes
    args = losses, dx, None, x, weight, targets, dlosses, -100
    assert _C.workspace("linear_cross_entropy_backward", *args) == bytes


def attention(B, T, H, K, D, shift=HALF, dtype="bfloat16", documents=None):
    q, dq, out, dout = (array(B, T, H, D, dtype=dtype) for _ in range(4))
    k, v, dk, dv = (array(B, T, K, D, dtype=dtype) for _ in range(4))
    cu_seqlens = None if documents is None else array(documents + 1, dtype="int32")
    rest = dout, q, k, v, out, array(B, H, T), cu_seqlens, 4, 0, shift, 1.0
    return _C.workspace("s2_attention_backward", dq, dk, dv, *rest)


@pytest.mark.parametrize(
    "H, K, shift, dtype, mixed",
    [
        (3, 1, HALF, "bfloat16", True),
        (3, 1, HALF, "float32", False),  # the outputs keep the sums
        (3, 1, NONE, "bfloat16", False),
        (3, 1, ALL, "bfloat16", False),
        (4, 2, HALF, "bfloat16", False),
        (6, 2, HALF, "bfloat16", False),
        (9, 3, HALF, "bfloat16", True),
        (0, 2, HALF, "bfloat16", False),
    ],
)
def test_s2_attention_backward(H, K, shift, dtype, mixed):
    """A number for each query row; dk and dv of the KV head that has plain and shifted query heads."""
    B, T, D = 2, 100, 8
    assert attention(B, T, H, K, D, shift, dtype) == whole(4 * B * T * H) + mixed * 2 * 4 * B * T * D


def test_what_attention_on_a_gpu_refuses():
    T, documents = 1 << 28, 1 << 26
    for fits in (dict(T=T), dict(documents=documents), dict(D=256)):
        assert attention(**{**dict(B=1, T=64, H=1, K=1, D=1), **fits}) == 4 * fits.get("T", 64)
    for words, large in (
        ("D should be at most 256 on a GPU, got 257", dict(D=257)),
        (f"T should be at most 2.28 .* got T={T + 1}", dict(T=T + 1)),
        ("T should be .* cu_seqlens at most 2.26 long on a GPU, got T=4", dict(documents=documents + 1)),
    ):
        with pytest.raises(ValueError, match=f"s2_attention_backward: {words}"):
            attention(**{**dict(B=1, T=4, H=1, K=1, D=1), **large})


@pytest.mark.parametrize(
    "S, H, K, P, parts",
    [
        (1, 4, 2, 256, 0),
        (1, 4, 2, 257, 2),
        (1, 4, 2, 1000, 4),
        (1, 4, 2, 100000, 64),
        (16, 4, 2, 1000, 4),
        (17, 4, 2, 1000, 0),  # more query rows than 32 on a KV head
        (2, 17, 1, 1000, 0),
    ],
)
def test_cached_attention(S, H, K, P, parts):
    """For each part of 256 keys and each query row: a row, a maximum and a sum."""
    B, D = 3, 64
    out, q, k, v = array(B, S, H, D), array(B, S, H, D), array(B, S, K, D), array(B, S, K, D)
    caches, lengths = (array(B, P, K, D), array(B, P, K, D)), array(B, dtype="int32")
    found = _C.workspace("cached_attention", out, *caches, q, k, v, None, lengths, 1.0)
    assert found == B * parts * S * H * (D + 2) * 4


@pytest.mark.parametrize("op", ["swiglu_forward", "scale", "accumulate"])
def test_the_others_take_none(op):
    scalars = {"scale": (2.0,), "accumulate": (2.0,)}.get(op, (array(3, 4),))
    assert _C.workspace(op, array(3, 4), array(3, 4), *scalars) == 0
