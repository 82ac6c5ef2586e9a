"""S2-Attn against the reference: boundaries, shifts, GQA, odd sizes, documents, causality, equal bits."""

import itertools

import checks
import mirror
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from longlora import _C, ops

BOUNDARIES, SHIFTS = ("split", "wrap", "swap"), ("half", "none", "all")


def inputs(B, T, H, K, D, dtype="float32", scale=1.0):
    return [checks.random((B, T, heads, D), dtype, seed, scale) for seed, heads in enumerate((H, K, K, H))]


def score_noise(q, k, scale=None, **pattern):
    """Eight roundings of the largest root of a sum of squared products q k over all visible scores.

    A score may happen to be small although its products are not; its error is that of the products.
    """
    if not q.size:
        return 0.0
    squares = (reference._heads(x, q.shape[2] // x.shape[2]) ** 2 for x in (q, k))
    visible = reference._scores(
        *squares,
        1.0,
        pattern["group_size"],
        pattern.get("boundary", "split"),
        pattern.get("shift", "half"),
        pattern.get("cu_seqlens"),
    )
    return (
        8 * 2.0**-24 * abs(q.shape[3] ** -0.5 if scale is None else scale) * np.sqrt(visible.max(initial=0))
    )


def both(q, k, v, dout, **kwargs):
    """Forward and backward against the reference -> the ops' results. Backward gets the op's out and lse."""
    # An error of the scores moves the weights by as much, relatively, and with them the weighted values.
    scores = score_noise(q, k, **kwargs)
    out, lse = checks.check(
        "s2_attention_forward",
        q,
        k,
        v,
        floor=4,
        noise=(scores * np.abs(v.astype(np.float64)).max(initial=0), scores),
        **kwargs,
    )
    grads = ops.s2_attention_backward(dout, q, k, v, out, lse, **kwargs)
    want = reference.s2_attention_backward(dout, q, k, v, out, lse, **kwargs)
    # Tensor cores multiply 16-bit numbers: on a GPU the plain computation also rounds between products.
    between = q.dtype if q.dtype != np.float32 and mirror.installed else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "BETWEEN", between)
        low = checks.plain("s2_attention_backward", dout, q, k, v, out, lse, **kwargs)
    for name, got, w, p in zip(("dq", "dk", "dv"), grads, want, low, strict=True):
        # If a query sees one key, its gradient is a difference of equal terms and has their noise.
        noise = (
            np.abs(dout.astype(np.float64)).max(initial=0)
            * np.abs(v.astype(np.float64)).max(initial=0)
            * 2.0**-21
        )
        assert got.shape == w.shape
        if w.size:
            error, plain = (np.abs(x.astype(got.dtype).astype(np.float64) - w).max() for x in (got, p))
            limit = 2 * plain + 4 * checks.EPS[got.dtype] * np.abs(w).max() + noise
            assert error <= limit, f"{name}: {error:.3g} above {limit:.3g}"
    return (out, lse, *grads)


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("shift", SHIFTS)
def test_every_pattern(boundary, shift, dtype, isa, poison):
    for T, G in ((24, 8), (24, 24), (63, 7), (130, 65), (60 if checks.EMULATED else 300, 2)):
        q, k, v, dout = inputs(1, T, 5, 5, 9, dtype)
        both(q, k, v, dout, group_size=G, boundary=boundary, shift=shift)


@pytest.mark.parametrize("H,K", [(8, 8), (8, 2), (8, 1), (6, 3), (14, 2), (9, 3), (1, 1), (3, 1)])
def test_the_rule_is_on_query_heads(H, K, isa):
    q, k, v, dout = inputs(2, 37, H, K, 16)
    both(q, k, v, dout, group_size=8)


def test_more_query_heads_on_a_kv_head_than_a_task_has(isa):
    """A task of the CPU's forward pass has at most 8 heads."""
    q, k, v, dout = inputs(1, 20, 20, 1, 8)
    both(q, k, v, dout, group_size=16)


@pytest.mark.parametrize("G", [1, 2, 3, 8, 145])
def test_every_length(G, place):
    for T in (0, 1, 2, 7, G // 2, G // 2 + 1, G - 1, G, G + 1, 3 * G // 2, 5 * G // 2, 4 * G + 3):
        q, k, v, dout = inputs(1, T, 2, 1, 8)
        both(q, k, v, dout, group_size=G)


@pytest.mark.parametrize("D", [33, 80, 96, 104, 128, 192, 256])
def test_every_head_size(D, dtype, isa, poison):
    """Three query heads, one of them plain, on one KV head; then rows at odd addresses."""
    for pad in (0, 1):
        arrays = inputs(1, 70, 3, 1, D, dtype)
        both(*([checks.strided(x, pad) for x in arrays] if pad else arrays), group_size=48)


@pytest.mark.parametrize("D", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_segments_of_several_tiles(D, boundary, dtype, place):
    """Whole tiles, partial tiles, and tiles with two runs of tokens: up to 128 queries by 64 keys.

    D is each size that the 16-bit kernels are compiled for.
    """
    both(
        *inputs(1, 300, 2, 1, D, dtype),
        group_size=150,
        boundary=boundary,
        scale=-0.1 if boundary == "swap" else None,
    )


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_any_scale(scale, dtype, isa):
    both(*inputs(1, 40, 2, 1, 16, dtype), group_size=16, scale=scale)


def test_the_lengths_that_broke_others(place):
    for T, G in ((4274, 2048), (8, 1024), (513, 512)):
        q, k, v = (checks.random((1, T, 2, 8), seed=seed) for seed in range(3))
        out, lse = ops.s2_attention_forward(q, k, v, group_size=G)
        start = np.arange(T) // G * G
        for t in (0, T // 2, T - 1):
            s = (k[0, start[t] : t + 1, 0].astype(np.float64) @ q[0, t, 0]) / np.sqrt(8)
            p = np.exp(s - s.max())
            np.testing.assert_allclose(out[0, t, 0], p @ v[0, start[t] : t + 1, 0] / p.sum(), atol=1e-5)
        assert np.isfinite(lse).all()


@settings(max_examples=checks.fewer(60))
@given(data=st.data())
def test_anything(place, data):
    draw = data.draw
    B, K, D = (
        draw(st.integers(0, 3)),
        draw(st.integers(1, 3)),
        draw(st.sampled_from([1, 2, 7, 16, 33, 64, 80, 96, 128])),
    )
    H, G, boundary = K * draw(st.integers(1, 4)), draw(st.integers(1, 70)), draw(st.sampled_from(BOUNDARIES))
    T = draw(st.integers(0, 150))
    T = T // G * G if boundary != "split" else T
    q, k, v, dout = inputs(B, T, H, K, D, draw(st.sampled_from(list(checks.DTYPES))))
    if draw(st.booleans()):
        q, k, v, dout = map(checks.strided, (q, k, v, dout))
    before = _C.get_isa()
    _C.set_isa(draw(st.sampled_from([i for i, there in enumerate(_C.isa_supported) if there])))
    try:
        both(q, k, v, dout, group_size=G, boundary=boundary, shift=draw(st.sampled_from(SHIFTS)))
    finally:
        _C.set_isa(before)


@pytest.mark.parametrize("boundaries", [[0, 40], [0, 0, 1, 8, 40], [0, 13, 13, 27, 40, 40]])
def test_packed_documents_are_separate_runs(boundaries, isa):
    q, k, v, dout = inputs(1, 40, 4, 2, 16)
    cu = np.array(boundaries, np.int32)
    packed = both(q, k, v, dout, group_size=6, cu_seqlens=cu)
    for first, last in itertools.pairwise(boundaries):
        piece = [x[:, first:last] for x in (q, k, v, dout)]
        out, lse = ops.s2_attention_forward(*piece[:3], group_size=6)
        alone = (out, lse, *ops.s2_attention_backward(piece[3], *piece[:3], out, lse, group_size=6))
        for i, (a, b) in enumerate(zip(packed, alone, strict=True)):
            np.testing.assert_array_equal(a[:, :, first:last] if i == 1 else a[:, first:last], b)


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_packed_documents_of_several_tiles(D, dtype, place):
    both(
        *inputs(1, 420, 2, 1, D, dtype),
        group_size=140,
        cu_seqlens=np.array([0, 150, 151, 151, 270, 420], np.int32),
    )


def test_many_documents_in_a_group_longer_than_all(place):
    """As packed documents and as the sequences of a batch. G is much longer than each of them."""
    T, L = 1 << 15, 64
    q, k, v, _ = inputs(1, T, 1, 1, 1)
    cu = np.arange(0, T + 1, L, dtype=np.int32)
    out, lse = ops.s2_attention_forward(q, k, v, group_size=10**6, cu_seqlens=cu)
    want = ops.s2_attention_forward(*(x.reshape(T // L, L, 1, 1) for x in (q, k, v)), group_size=10**6)
    np.testing.assert_array_equal(out.reshape(-1), want[0].reshape(-1))
    np.testing.assert_array_equal(lse.reshape(-1), want[1].reshape(-1))


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("shift", SHIFTS)
def test_causality(boundary, shift, place):
    """A change of token t moves nothing before t, but with wrap, where the first h queries see the future."""
    T, G = 32, 8
    q, k, v, _ = inputs(1, T, 4, 2, 8)
    before, _ = ops.s2_attention_forward(q, k, v, group_size=G, boundary=boundary, shift=shift)
    leaked = False
    for t in range(T):
        other = [x.copy() for x in (q, k, v)]
        for x in other:
            x[:, t] += 1
        after, _ = ops.s2_attention_forward(*other, group_size=G, boundary=boundary, shift=shift)
        moved = (before != after).any(axis=(0, 2, 3))
        assert moved[t]
        early = np.flatnonzero(moved[:t])
        # swap lets the last queries see the first keys, which is the past.
        if boundary == "wrap" and shift != "none" and t >= T - G // 2:
            assert early.tolist() == list(range(G // 2))
            leaked = True
        else:
            assert early.size == 0
    assert leaked == (boundary == "wrap" and shift != "none")


def test_the_default_group_is_a_quarter_made_even():
    """At least 2, and never more than a quarter else. The paper trains 8192 tokens in groups of 2048."""
    lengths = (1, 8, 15, 16, 72, 8192, 100_000)
    assert [ops.quarter_group(length) for length in lengths] == [2, 2, 2, 4, 18, 2048, 25_000]


def test_wrap_is_the_papers_algorithm(place):
    """Roll half of the heads by -G/2, attend causally inside groups, roll back (LongLoRA, Algorithm 1)."""
    B, T, H, D, G = 2, 48, 4, 8, 16
    q, k, v, _ = (x.astype(np.float64) for x in inputs(B, T, H, H, D))
    rolled = []
    for x in (q, k, v):
        x = x.copy()
        x[:, :, H // 2 :] = np.roll(x[:, :, H // 2 :], -G // 2, 1)
        rolled.append(x.reshape(B * T // G, G, H, D))
    s = np.einsum("bthd,bshd->bhts", rolled[0], rolled[1]) / np.sqrt(D)
    s = np.where(np.tril(np.ones((G, G), bool)), s, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    want = np.einsum("bhts,bshd->bthd", p / p.sum(-1, keepdims=True), rolled[2]).reshape(B, T, H, D)
    want[:, :, H // 2 :] = np.roll(want[:, :, H // 2 :], G // 2, 1)
    got, _ = ops.s2_attention_forward(
        *(x.astype(np.float32) for x in (q, k, v)), group_size=G, boundary="wrap"
    )
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_one_key_moves_exactly_the_queries_that_see_it(place):
    T, G, H = 40, 8, 4
    q, k, v, _ = inputs(1, T, H, H, 8)
    mask = reference.attention_mask(T, H, G)
    before, _ = ops.s2_attention_forward(q, k, v, group_size=G)
    for which in (1, 2):
        for t in (0, 3, 4, 17, 39):
            other = [q, k.copy(), v.copy()]
            other[which][0, t] += 1
            after, _ = ops.s2_attention_forward(*other, group_size=G)
            seen = mask[:, :, t].copy()
            if which == 1:
                seen[mask.sum(-1) == 1] = False  # a query with one key: its weight is 1 whatever the key
            np.testing.assert_array_equal((before != after).any(-1)[0].T, seen)


def test_dense_attention_is_one_long_group(place):
    q, k, v, dout = inputs(1, 200, 4, 2, 32)
    both(q, k, v, dout, group_size=10**12, shift="none")


@pytest.mark.parametrize(
    "G,kwargs",
    [(1400, {}), (1500, dict(boundary="wrap")), (1500, dict(boundary="swap")), (1501, dict(shift="none"))],
)
def test_groups_longer_than_a_chunk(G, kwargs, dtype, place):
    """Chunks of the backward pass have 1024 rows at most. A plain and a shifted head share a KV head."""
    both(*inputs(1, checks.fewer(1500), 2, 1, 8, dtype), group_size=checks.fewer(G), **kwargs)


def test_more_sums_than_are_kept_at_once():
    """The backward pass of narrow dtypes sums 64 MiB at a time. This batch of equal rows needs 92 MiB."""
    q, k, v, dout = (np.broadcast_to(x, (3000, *x.shape[1:])) for x in inputs(1, 20, 2, 1, 96, "bfloat16"))
    out, lse = ops.s2_attention_forward(q, k, v, group_size=6)
    for x in (out, lse, *ops.s2_attention_backward(dout, q, k, v, out, lse, group_size=6)):
        assert np.isfinite(x[0].astype(np.float32)).all() and (x == x[:1]).all()


@pytest.mark.parametrize(
    "shape", [(0, 5, 2, 2, 4), (2, 0, 2, 2, 4), (2, 5, 0, 2, 4), (2, 5, 0, 0, 4), (2, 5, 2, 2, 0)]
)
def test_sizes_of_zero(shape, dtype, poison, isa):
    """No heads: the gradients of the keys are zero. No elements in a head: all scores are zero."""
    q, k, v, dout = inputs(*shape, dtype)
    out, lse = ops.s2_attention_forward(q, k, v, group_size=2, shift="none")
    assert np.array_equal(
        lse, np.broadcast_to(np.log(np.arange(shape[1]) % 2 + 1).astype(np.float32), lse.shape)
    )
    grads = ops.s2_attention_backward(dout, q, k, v, out, lse, group_size=2, shift="none")
    for got, x in zip(grads, (q, k, v), strict=True):
        assert np.array_equal(got, np.zeros_like(x))


def test_infinities_and_nan_stay_where_they_are(dtype, isa):
    """A query with all scores -inf gives 0 and lse -inf. NaN in a key reaches only queries that see it."""
    q, k, v, dout = inputs(1, 40, 2, 2, 8, dtype)
    q, other = np.abs(q) + q.dtype.type(0.1), k.copy()
    other[0, 8] = -np.inf
    out, lse = ops.s2_attention_forward(q, other, v, group_size=8, shift="none")
    assert (out[0, 8] == 0).all() and np.isneginf(lse[0, :, 8]).all()
    assert np.isfinite(out).all() and np.isfinite(np.delete(lse, 8, 2)).all()
    assert all(
        np.isfinite(x).all()
        for x in ops.s2_attention_backward(
            dout, q, k, v, out, np.where(lse > -1e30, 9, lse), group_size=8, shift="none"
        )
    )
    other = k.copy()
    other[0, 20] = np.nan
    out, _ = ops.s2_attention_forward(q, other, v, group_size=8, shift="none")
    assert np.flatnonzero(np.isnan(out).any(axis=(0, 2, 3))).tolist() == [20, 21, 22, 23]


@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_larger_inputs(scale, isa):
    q, k, v, dout = inputs(1, 40, 2, 2, 16)
    both(q * np.float32(scale), k, v, dout, group_size=16)


def test_logits_of_ten_thousands(isa):
    """A score s is rounded by at least |s| 2^-24, which is its weight's relative error: no more is lost."""
    q, k, v, dout = inputs(1, 40, 2, 2, 16)
    q = q * np.float32(5e3)
    out, lse = ops.s2_attention_forward(q, k, v, group_size=16)
    want, want_lse = reference.s2_attention_forward(q, k, v, group_size=16)
    largest = np.abs(np.einsum("bthd,bshd->bhts", q, k)).max() / 4
    assert largest > 5e3
    assert np.abs(out - want).max() <= 4 * largest * 2.0**-24 * np.abs(v).max()
    assert np.abs(lse - want_lse).max() <= 4 * largest * 2.0**-24
    assert all(
        np.isfinite(x).all() for x in ops.s2_attention_backward(dout, q, k, v, out, lse, group_size=16)
    )


def test_views_of_one_matrix_and_broadcast_gradients(place):
    B, T, H, K, D = 2, 30, 4, 2, 16
    fused = checks.random((B, T, (H + 2 * K) * D))
    q = fused[..., : H * D].reshape(B, T, H, D)
    k = fused[..., H * D : (H + K) * D].reshape(B, T, K, D)
    v = fused[..., (H + K) * D :].reshape(B, T, K, D)
    dout = np.broadcast_to(np.float32([1] * D), (B, T, H, D))  # as from y.sum().backward(): strides 0
    views = both(q, k, v, dout, group_size=8)
    dense = both(*(np.ascontiguousarray(x) for x in (q, k, v, dout)), group_size=8)
    for a, b in zip(views, dense, strict=True):
        np.testing.assert_array_equal(a, b)


def test_offsets_beyond_2_to_the_31():
    T, D, far = 3, 8, (1 << 31) // 2 + 64
    memory = np.zeros(2 * far + D, np.float32)  # committed only where it is touched
    q = np.lib.stride_tricks.as_strided(memory, (1, T, 1, D), (0, 4 * far, 4 * D, 4))
    q[...] = checks.random((1, T, 1, D))
    k, v = checks.random((1, T, 1, D), seed=1), checks.random((1, T, 1, D), seed=2)
    out, _ = ops.s2_attention_forward(q, k, v, group_size=4)
    np.testing.assert_array_equal(out, ops.s2_attention_forward(q.copy(), k, v, group_size=4)[0])


@pytest.mark.parametrize("T,G", [(700, 200), (2500, 2300)])
def test_equal_bits(T, G, place, each_thread_count):
    T, G = checks.fewer(T), checks.fewer(G)
    q, k, v, dout = inputs(1, T, 6, 2, 32)

    def once():
        out, lse = ops.s2_attention_forward(q, k, v, group_size=G)
        return (out, lse, *ops.s2_attention_backward(dout, q, k, v, out, lse, group_size=G))

    results = each_thread_count(once) + [once() for _ in range(checks.fewer(5))]
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(group_size=0), "group_size should be at least 1, got 0"),
        (dict(group_size=1.5), "group_size should be an integer"),
        (dict(boundary="roll"), "boundary should be one of split, wrap, swap, got 'roll'"),
        (dict(shift="some"), "shift should be one of half, none, all"),
        (dict(boundary="wrap", group_size=7), "multiple of group_size=7, got 24"),
        (dict(cu_seqlens=np.array([], np.int32)), "cu_seqlens"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_written(change, message, place):
    q, k, v, _ = inputs(1, 24, 4, 2, 8)
    with pytest.raises((ValueError, TypeError), match=message):
        ops.s2_attention_forward(q, k, v, **{"group_size": 8, **change})


def test_an_error_begins_with_the_function():
    q, k, v, dout = inputs(1, 24, 4, 2, 8)
    with pytest.raises(ValueError, match="^s2_attention_forward: boundary should be one of"):
        ops.s2_attention_forward(q, k, v, group_size=8, boundary="roll")
    out, lse = ops.s2_attention_forward(q, k, v, group_size=8)
    with pytest.raises(ValueError, match="^s2_attention_backward: boundary should be one of"):
        ops.s2_attention_backward(dout, q, k, v, out, lse, group_size=8, boundary="roll")


@pytest.mark.parametrize("boundary,shift", [(-1, 0), (3, 0), (0, -1), (0, 3)])
def test_numbers_that_name_no_boundary_and_no_shift_are_refused(boundary, shift):
    q, k, v, out = inputs(1, 24, 4, 2, 8)
    lse = np.zeros((1, 4, 24), np.float32)
    with pytest.raises(ValueError, match="should be 0"):
        ops._C.s2_attention_forward(out, lse, q, k, v, None, 8, boundary, shift, 1.0)


BAD_BOUNDARIES = [
    ([0, 20], "begin with 0 and end with T=24"),
    ([0, 9, 8, 24], "should not decrease, got 8 after 9"),
    ([5, 24], "begin with 0"),
    ([-(2**31), 2**31 - 1, 24], "begin with 0"),
    ([0, 2**31 - 1, -5, 24], "should not decrease"),
]


@pytest.mark.parametrize("boundaries,message", BAD_BOUNDARIES)
def test_invalid_document_boundaries_are_named(boundaries, message):
    q, k, v, _ = inputs(1, 24, 4, 2, 8)
    with pytest.raises(ValueError, match=message):
        ops.s2_attention_forward(q, k, v, group_size=8, cu_seqlens=np.array(boundaries, np.int32))


@pytest.mark.parametrize("boundary", ["wrap", "swap"])
def test_documents_of_a_length_that_the_boundary_does_not_allow_are_named(boundary):
    """T=24 is a multiple of 8, the documents' 12 is not. Without shifted heads every length is allowed."""
    q, k, v, dout = inputs(1, 24, 4, 2, 8)
    cu = np.array([0, 12, 24], np.int32)
    kwargs = dict(group_size=8, boundary=boundary, cu_seqlens=cu)
    with pytest.raises(ValueError, match=f"boundary {boundary} needs .* multiple of group_size=8, got 12"):
        ops.s2_attention_forward(q, k, v, **kwargs)
    out, lse = ops.s2_attention_forward(q, k, v, **kwargs, shift="none")
    with pytest.raises(ValueError, match=f"boundary {boundary} needs .* multiple of group_size=8, got 12"):
        ops.s2_attention_backward(dout, q, k, v, out, lse, **kwargs)
    want, want_lse = reference.s2_attention_forward(q, k, v, group_size=8, shift="none", cu_seqlens=cu)
    np.testing.assert_allclose(out, want, atol=2e-6)
    np.testing.assert_allclose(lse, want_lse, atol=2e-6)


def test_heads_wider_than_256_are_refused_on_cuda(cuda, dtype):
    q, k, v, dout = inputs(1, 9, 2, 1, 257, dtype)
    out, lse = np.full_like(q, np.nan), np.full((1, 2, 9), np.nan, np.float32)
    with pytest.raises(ValueError, match="s2_attention_forward: D should be at most 256 on a GPU, got 257"):
        _C.s2_attention_forward(out, lse, q, k, v, None, 4, 0, 0, 1.0)
    with pytest.raises(ValueError, match="s2_attention_backward: D should be at most 256 on a GPU, got 257"):
        _C.s2_attention_backward(
            out, np.full_like(k, np.nan), np.full_like(v, np.nan), dout, q, k, v, q, lse, None, 4, 0, 0, 1.0
        )
    assert np.isnan(out.astype(np.float32)).all() and np.isnan(lse).all()


def test_heads_that_do_not_divide(place):
    q, k, v = checks.random((1, 8, 4, 8)), checks.random((1, 8, 3, 8)), checks.random((1, 8, 3, 8))
    with pytest.raises(ValueError, match="divide H=4, got 3"):
        ops.s2_attention_forward(q, k, v, group_size=4)
    with pytest.raises(ValueError, match="B=1, got B=2"):
        ops.s2_attention_forward(
            *(np.concatenate([q, q]) for _ in range(3)), group_size=4, cu_seqlens=np.array([0, 8], np.int32)
        )


@pytest.mark.parametrize(
    "boundaries", [[5, 1000000, -3, 24, 7], [30, 20, 10, 0], [-(2**31), 2**31 - 1], [2**31 - 1, -(2**31)]]
)
def test_boundaries_that_a_gpu_cannot_refuse(boundaries, dtype, cuda, poison):
    """The host does not read them: nothing outside of the outputs is written, and the next call is right."""
    q, k, v, dout = inputs(1, 40, 4, 2, 16, dtype)
    cu = np.array(boundaries, np.int64).astype(np.int32)
    out, lse = ops.s2_attention_forward(q, k, v, group_size=6, cu_seqlens=cu)
    ops.s2_attention_backward(
        dout, q, k, v, np.nan_to_num(out), np.nan_to_num(lse), group_size=6, cu_seqlens=cu
    )
    both(q, k, v, dout, group_size=6, cu_seqlens=np.array([0, 13, 40], np.int32))


@pytest.mark.parametrize("boundary", ["wrap", "swap"])
def test_a_document_of_a_wrong_length_is_nan(boundary, dtype, cuda):
    q, k, v, dout = inputs(1, 40, 2, 2, 16, dtype)
    kwargs = dict(
        group_size=6, boundary=boundary, shift="all", cu_seqlens=np.array([0, 12, 28, 40], np.int32)
    )
    out, lse = ops.s2_attention_forward(q, k, v, **kwargs)
    results = (out, np.moveaxis(lse, 1, 2), *ops.s2_attention_backward(dout, q, k, v, out, lse, **kwargs))
    for x in results:
        x = x.astype(np.float32)
        assert np.isnan(x[:, 12:28]).all() and np.isfinite(x[:, :12]).all() and np.isfinite(x[:, 28:]).all()


@pytest.mark.parametrize("bad", [None, np.inf])
def test_rows_have_the_same_bits_for_any_number_of_threads(bad, dtype, isa, each_thread_count):
    """One infinity takes a whole task off a matrix unit. So tasks must not depend on threads."""
    T = checks.fewer(700)
    q, k, v, dout = inputs(1, T, 6, 3, 32, dtype)
    if bad:
        q[0, T // 2], k[0, T // 2 + 60], v[0, T - 100] = bad, bad, bad
    out, *results = each_thread_count(lambda: ops.s2_attention_forward(q, k, v, group_size=q.shape[1]))
    assert all(got.tobytes() == want.tobytes() for result in results for got, want in zip(result, out))
    out, *results = each_thread_count(
        lambda: ops.s2_attention_backward(dout, q, k, v, *out, group_size=q.shape[1])
    )
    assert all(got.tobytes() == want.tobytes() for result in results for got, want in zip(result, out))
