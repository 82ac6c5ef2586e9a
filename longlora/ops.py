"""One function per op. It allocates the results as arrays of the caller's library and calls the kernel.

Shapes use the letters of csrc/ops.h: B batch, T tokens, M rows (B T), H query heads, K key/value heads, D
head size, C and N features, R rank of LoRA, F feed-forward size, V vocabulary, P positions. [M,C] also takes
[B,T,C] if the axes B and T are contiguous with each other; [M] is then [B,T].

Arrays may come from NumPy, torch, CuPy, JAX, longlora.Tensor or any library that supports DLPack. The
arrays of a call share one dtype, float32, bfloat16 or float16, unless the op says otherwise. Kernels compute
in float32. Statistics and gradients of parameters are float32. Equal inputs give equal bits for any number of
threads.

Every function raises TypeError for a wrong dtype or object, ValueError for a wrong shape, and BufferError
for an array whose memory cannot be read as it is, before it writes.
"""

import math
from collections.abc import Iterable
from typing import Any

from longlora import _C
from longlora.arrays import dtype_name, empty, empty_like, give_back, shape, zeros

Array = Any  # an array of any library that supports DLPack

BOUNDARIES = {"split": 0, "wrap": 1, "swap": 2}
SHIFTS = {"half": 0, "none": 1, "all": 2}
IGNORE = -100  # the target of a token that is not scored, as in torch.nn.functional.cross_entropy


def shifted_heads(heads: int, shift: str = "half") -> int:
    """The number of shifted query heads; they are the last ones. LongLoRA section 3.2."""
    return {"half": heads - heads // 2, "none": 0, "all": heads}[shift]


def quarter_group(length: int) -> int:
    """The default group_size for sequences of `length` tokens: a quarter, made even. LongLoRA section 3.2."""
    return max(2, length // 8 * 2)


def _choice(op: str, name: str, value: str, choices: dict[str, int]) -> int:
    if value not in choices:
        raise ValueError(f"{op}: {name} should be one of {', '.join(choices)}, got {value!r}")
    return choices[value]


def _like_heads(x: Array, name: str) -> Array:
    """empty_like for x [B,T,H,D]."""
    found = shape(x, name)
    if len(found) != 4:
        raise ValueError(f"{name} should have 4 axes, got {len(found)}")
    return empty_like(x, name)


def cast(x: Array, dtype: str) -> Array:
    """Convert x [M,N] to `dtype` ("float32", "bfloat16", "float16"), rounded to nearest even -> out [M,N]."""
    out = empty(shape(x, "cast: x", 2), dtype, x)
    _C.cast(out, x)
    return give_back(x, out)


def accumulate(out: Array, x: Array, scale: float = 1.0) -> Array:
    """Add scale x [M,N] to out [M,N] in place -> out. Each may have its own of the three dtypes."""
    _C.accumulate(out, x, scale)
    return out


def scale(x: Array, scale: float) -> Array:
    """Multiply x [M,N] by a number -> out [M,N] of x's dtype."""
    out = empty_like(x, "scale: x", 2)
    _C.scale(out, x, scale)
    return give_back(x, out)


def matmul(a: Array, b: Array, alpha: float = 1.0, dtype: str | None = None) -> Array:
    """Multiply a [M,C] by b [C,N] -> alpha a b [M,N] of `dtype` (default: a's).

    a and b may have any strides, and each its own of the three dtypes.
    """
    rows, columns = shape(a, "matmul: a", 2)[:-1], shape(b, "matmul: b", 2)[1]
    out = empty((*rows, columns), dtype or dtype_name(a), a)
    _C.matmul(out, a, b, alpha, 0.0)
    return give_back(a, out)


def embedding_forward(weight: Array, ids: Array) -> Array:
    """Gather rows of weight [V,C] by ids [M] int32 -> out [M,C]. ValueError for an id outside 0..V-1."""
    rows, C = shape(ids, "embedding_forward: ids"), shape(weight, "embedding_forward: weight", 2)[1]
    out = empty((*rows, C), dtype_name(weight), weight)
    _C.embedding_forward(out, weight, ids)
    return give_back(weight, out)


def embedding_backward(dout: Array, ids: Array, order: Array, rows: int) -> Array:
    """Sum the rows of dout [M,C] by id -> dweight [rows,C] float32.

    ids [M] int32; order [M] int32 is the stable argsort of ids, which fixes the order of the sum.
    """
    dweight = zeros((rows, shape(dout, "embedding_backward: dout", 1)[-1]), "float32", dout)
    _C.embedding_backward(dweight, dout, ids, order)
    return give_back(dout, dweight)


def rms_norm_forward(
    x: Array, weight: Array, eps: float = 1e-6, residual: Array | None = None
) -> tuple[Array, Array, Array]:
    """Normalise x [M,C], with residual [M,C] added first if given -> out [M,C], rstd [M] float32, sum [M,C].

    sum = x + residual; rstd = 1/sqrt(mean(sum^2) + eps); out = sum rstd weight. weight [C]. Without a
    residual, sum is x itself. RMSNorm, arXiv 1910.07467.
    """
    name = "rms_norm_forward: x"
    out, rstd = empty_like(x, name, 2), empty(shape(x, name)[:-1], "float32", x)
    total = None if residual is None else empty_like(x, name)
    _C.rms_norm_forward(out, rstd, total, x, residual, weight, eps)
    return give_back(x, out, rstd, x if total is None else total)


def rms_norm_backward(
    dout: Array, x: Array, rstd: Array, weight: Array, dresidual: Array | None = None
) -> tuple[Array, Array]:
    """Gradients of rms_norm_forward for dout [M,C] -> dx [M,C], dweight [C] float32.

    x [M,C] is the forward's sum, rstd [M] its statistic. dresidual [M,C], if given, is added to dx.
    """
    dx = empty_like(x, "rms_norm_backward: x", 2)
    dweight = zeros(shape(weight, "rms_norm_backward: weight", 1), "float32", x)
    _C.rms_norm_backward(dx, dweight, dout, x, rstd, weight, dresidual)
    return give_back(x, dx, dweight)


def rope_forward(x: Array, cos: Array, sin: Array, positions: Array | None = None) -> Array:
    """Rotate the heads of x [B,T,H,D] by position, in the rotate-half form -> out [B,T,H,D].

    cos and sin [P,D/2] are float32 tables; positions [B,T] int32 selects their rows (default: 0..T-1).
    RoFormer, arXiv 2104.09864.
    """
    out = _like_heads(x, "rope_forward: x")
    _C.rope_forward(out, x, cos, sin, positions)
    return give_back(x, out)


def rope_backward(dout: Array, cos: Array, sin: Array, positions: Array | None = None) -> Array:
    """Rotate dout [B,T,H,D] back -> dx [B,T,H,D]. Arguments as in rope_forward."""
    dx = _like_heads(dout, "rope_backward: dout")
    _C.rope_backward(dx, dout, cos, sin, positions)
    return give_back(dout, dx)


def lora_linear_forward(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    a: Array | None = None,
    b: Array | None = None,
    scale: float = 1.0,
    residual: Array | None = None,
) -> tuple[Array, Array | None]:
    """Linear layer with LoRA -> out [M,N], u [M,R] float32 (None without a).

    u = x a^T; out = x weight^T + bias + scale u b^T + residual. x [M,C], weight [N,C], bias [N], a [R,C],
    b [N,R], residual [M,N]. LoRA, arXiv 2106.09685 section 4.1.
    """
    op = "lora_linear_forward"
    rows, N = shape(x, f"{op}: x", 2)[:-1], shape(weight, f"{op}: weight", 1)[0]
    out = empty((*rows, N), dtype_name(x), x)
    u = None if a is None else empty((*rows, shape(a, f"{op}: a", 1)[0]), "float32", x)
    _C.lora_linear_forward(out, u, x, weight, bias, a, b, residual, scale)
    return give_back(x, out, u)


def lora_linear_backward(
    dout: Array,
    x: Array,
    weight: Array,
    a: Array | None = None,
    b: Array | None = None,
    scale: float = 1.0,
    u: Array | None = None,
    train_weight: bool = False,
    train_bias: bool = False,
) -> tuple[Array, Array | None, Array | None, Array | None, Array | None]:
    """Gradients of lora_linear_forward for dout [M,N].

    -> dx [M,C], da [R,C], db [N,R], dweight [N,C], dbias [N].

    da and db are None without a and b; dweight and dbias are None unless train_weight and train_bias are set.
    All four are float32. u is the forward's result; without it, u is computed again from x.
    """
    op = "lora_linear_backward"
    dx = empty_like(x, f"{op}: x", 2)
    of_weight = shape(weight, f"{op}: weight", 1)
    da = None if a is None else zeros(shape(a, f"{op}: a"), "float32", x)
    db = None if b is None else zeros(shape(b, f"{op}: b"), "float32", x)
    dweight = zeros(of_weight, "float32", x) if train_weight else None
    dbias = zeros(of_weight[:1], "float32", x) if train_bias else None
    _C.lora_linear_backward(dx, da, db, dweight, dbias, dout, x, weight, a, b, u, scale)
    return give_back(x, dx, da, db, dweight, dbias)


def s2_attention_forward(
    q: Array,
    k: Array,
    v: Array,
    *,
    group_size: int,
    boundary: str = "split",
    shift: str = "half",
    cu_seqlens: Array | None = None,
    scale: float | None = None,
) -> tuple[Array, Array]:
    """Shifted sparse attention, causal -> out [B,T,H,D], lse [B,H,T] float32. LongLoRA section 3.2.

    q [B,T,H,D], k and v [B,T,K,D]. csrc/ops.h states the exact rule.

    group_size: tokens per group, G >= 1. group_size >= T with shift="none" is dense causal attention.
    boundary: "split" cuts the shifted groups at both ends (no leak); "wrap" is the paper's Algorithm 1,
        where the first G/2 tokens of shifted heads see the last G/2, so the future leaks; "swap" is its
        Variant 3.
    shift: how many query heads are shifted: "half", "none" or "all".
    cu_seqlens: the boundaries of packed documents, int32 [S] from 0 to T. B must be 1. Groups restart in each
        document.
    scale: factor of q k^T (default: 1/sqrt(D)). lse is the log-sum-exp of the scaled scores.
    """
    out = _like_heads(q, "s2_attention_forward: q")
    B, T, H, _ = out.shape
    lse = empty((B, H, T), "float32", q)
    _C.s2_attention_forward(
        out,
        lse,
        q,
        k,
        v,
        cu_seqlens,
        *attention_scalars("s2_attention_forward", q, group_size, boundary, shift, scale),
    )
    return give_back(q, out, lse)


def s2_attention_backward(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    *,
    group_size: int,
    boundary: str = "split",
    shift: str = "half",
    cu_seqlens: Array | None = None,
    scale: float | None = None,
) -> tuple[Array, Array, Array]:
    """Gradients of s2_attention_forward for dout [B,T,H,D] -> dq [B,T,H,D], dk and dv [B,T,K,D].

    q, k, v and the keywords are the forward's arguments, out and lse its results.
    """
    dq, dk, dv = (_like_heads(x, f"s2_attention_backward: {name}") for name, x in zip("qkv", (q, k, v)))
    _C.s2_attention_backward(
        dq,
        dk,
        dv,
        dout,
        q,
        k,
        v,
        out,
        lse,
        cu_seqlens,
        *attention_scalars("s2_attention_backward", q, group_size, boundary, shift, scale),
    )
    return give_back(q, dq, dk, dv)


def attention_scalars(
    op: str, q: Array, group_size: int, boundary: str, shift: str, scale: float | None
) -> tuple[int, int, int, float]:
    """The scalars of the attention kernels: group_size, boundary, shift, scale. ValueError for a bad name."""
    return (
        group_size,
        _choice(op, "boundary", boundary, BOUNDARIES),
        _choice(op, "shift", shift, SHIFTS),
        1 / math.sqrt(max(shape(q, f"{op}: q", 1)[-1], 1)) if scale is None else scale,
    )


def cached_attention(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    lengths: Array,
    *,
    k: Array | None = None,
    v: Array | None = None,
    rows: Array | None = None,
    scale: float | None = None,
) -> Array:
    """Attention of S new tokens over a cache of keys and values, dense and causal -> out [B,S,H,D].

    q [B,S,H,D]. k_cache and v_cache [N,P,K,D] have P places in each of N rows, and may each have a float
    dtype of their own.

    lengths: int32 [B], the keys that each sequence's row held before these S tokens. Query s sees places
        0 .. lengths[b] + s.
    k, v: [B,S,K,D], the keys and values of the new tokens. They are first written to the cache, in place.
        Without them the cache already holds them.
    rows: int32 [B], each sequence's row of the cache (default: row b). No row comes twice.
    scale: factor of q k^T (default: 1/sqrt(D)).

    A sequence's result depends on its own queries, keys and length alone, bit by bit. ValueError for a row
    or length outside the cache; on a GPU such a sequence gives NaN.
    """
    out = _like_heads(q, "cached_attention: q")
    factor = 1 / math.sqrt(max(out.shape[3], 1)) if scale is None else scale
    _C.cached_attention(out, k_cache, v_cache, q, k, v, rows, lengths, factor)
    return give_back(q, out)


def swiglu_forward(gate: Array, up: Array) -> Array:
    """silu(gate) up, element by element, for gate and up [M,F] -> out [M,F]. SwiGLU, arXiv 2002.05202."""
    out = empty_like(gate, "swiglu_forward: gate", 2)
    _C.swiglu_forward(out, gate, up)
    return give_back(gate, out)


def swiglu_backward(dout: Array, gate: Array, up: Array) -> tuple[Array, Array]:
    """Gradients of swiglu_forward for dout [M,F] -> dgate, dup [M,F]."""
    dgate, dup = empty_like(gate, "swiglu_backward: gate", 2), empty_like(up, "swiglu_backward: up", 2)
    _C.swiglu_backward(dgate, dup, dout, gate, up)
    return give_back(gate, dgate, dup)


def linear_cross_entropy_forward(
    x: Array, weight: Array, targets: Array, ignore_index: int = IGNORE
) -> tuple[Array, Array]:
    """Linear layer and cross entropy, in chunks of rows -> losses [M], lse [M] float32, in nats.

    x [M,C], weight [V,C], targets [M] int32. losses = lse - logit of the target, and 0 where the target is
    ignore_index. The logits [M,V] are never in memory as a whole.
    """
    rows = shape(x, "linear_cross_entropy_forward: x", 2)[:-1]
    losses, lse = empty(rows, "float32", x), empty(rows, "float32", x)
    _C.linear_cross_entropy_forward(losses, lse, x, weight, targets, ignore_index)
    return give_back(x, losses, lse)


def linear_cross_entropy_backward(
    x: Array,
    weight: Array,
    targets: Array,
    dlosses: Array,
    ignore_index: int = IGNORE,
    train_weight: bool = False,
) -> tuple[Array, Array, Array | None]:
    """Losses and gradients in one call -> losses [M] float32, dx [M,C], dweight [V,C] float32.

    dlosses [M] float32 is the gradient of each row's loss. dweight is None unless train_weight is set. The
    other arguments are those of linear_cross_entropy_forward, which a training step does not need to call.
    """
    op = "linear_cross_entropy_backward"
    losses, dx = empty(shape(x, f"{op}: x", 2)[:-1], "float32", x), empty_like(x, f"{op}: x")
    dweight = zeros(shape(weight, f"{op}: weight"), "float32", x) if train_weight else None
    _C.linear_cross_entropy_backward(losses, dx, dweight, x, weight, targets, dlosses, ignore_index)
    return give_back(x, losses, dx, dweight)


def adamw(
    param: Array,
    m: Array,
    v: Array,
    grad: Array,
    *,
    lr: float,
    step: int,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    grad_scale: float = 1.0,
    copy: Array | None = None,
) -> None:
    """One optimizer step in place on param, m and v [N] float32, with the gradient grad_scale grad [N].

    step counts from 1. copy [N], if given, receives the new value in its own dtype. AdamW, arXiv 1711.05101
    algorithm 2; the same as torch.optim.AdamW.
    """
    _C.adamw(param, m, v, copy, grad, lr, beta1, beta2, eps, weight_decay, step, grad_scale)


def global_norm(arrays: Iterable[Array]) -> float:
    """The 2-norm of all elements of all arrays [N]. Each device sums in float64, in a fixed order."""
    total = None
    for x in arrays:
        total = zeros((1,), "float64", x) if total is None else total
        _C.sum_squares(total, x)
    if isinstance(total, _C.Tensor):
        total = total.cpu().numpy()
    return 0.0 if total is None else math.sqrt(total[0])
