"""Attention over a cache against the reference: lengths, rows, dtypes, chunks, GQA, equal bits."""

import checks
import numpy as np
import pytest

from longlora import _C, ops


def inputs(S, lengths, H, K, D, dtype="float32", cache="float32", P=None, N=None, rows=None, seed=0):
    """q, k_cache, v_cache, lengths, k, v, rows. Places from a row's length on are NaN, as are other rows."""
    B, P = len(lengths), P or max(lengths) + S + 3
    N = N or B
    q, k, v = (checks.random((B, S, heads, D), dtype, seed + i) for i, heads in enumerate((H, K, K)))
    caches = [np.full((N, P, K, D), np.nan, checks.DTYPES[cache]) for _ in range(2)]
    for b, length in enumerate(lengths):
        for i, x in enumerate(caches):
            # A sequence's keys depend on its number alone, so that it can be run by itself.
            x[b if rows is None else rows[b], :length] = checks.random(
                (length, K, D), cache, seed + 10 * b + i
            )
    return q, *caches, np.array(lengths, np.int32), k, v, None if rows is None else np.array(rows, np.int32)


def both(q, k_cache, v_cache, lengths, k, v, rows=None, scale=None):
    """The op against the reference -> out. Checks what was written, and that nothing else was."""
    want_k, want_v = k_cache.copy(), v_cache.copy()
    out = checks.check(
        "cached_attention",
        q,
        k_cache,
        v_cache,
        lengths,
        k=k,
        v=v,
        rows=rows,
        scale=scale,
        floor=4,
        noise=(8 * 2.0**-24 * np.sqrt(q.shape[3] + 1) * float(np.abs(q.astype(np.float64)).max(initial=0)),),
    )
    for b, length in enumerate(lengths):
        row = b if rows is None else rows[b]
        want_k[row, length : length + q.shape[1]] = k[b].astype(k_cache.dtype)
        want_v[row, length : length + q.shape[1]] = v[b].astype(v_cache.dtype)
    assert k_cache.tobytes() == want_k.tobytes() and v_cache.tobytes() == want_v.tobytes()
    return out


@pytest.mark.parametrize("cache", list(checks.DTYPES))
def test_every_dtype(cache, dtype, isa, poison):
    """With few query rows keys and values are read in place, if vectors fit in a head; else converted."""
    for S, D in ((1, 40), (1, 64), (2, 48), (5, 40), (20, 40)):
        both(*inputs(S, [0, 7, 300], 6, 3, D, dtype, cache))
    both(*inputs(1, [0, 7, 300], 14, 2, 64, dtype, cache))


@pytest.mark.parametrize("H,K", [(8, 8), (8, 2), (8, 1), (9, 3), (1, 1), (14, 2)])
def test_groups_of_query_heads(H, K, isa):
    for S in (1, 3, 40):
        both(*inputs(S, [70, 3], H, K, 16))


@pytest.mark.parametrize("cache", list(checks.DTYPES))
@pytest.mark.parametrize("rows", range(1, 10))
def test_every_number_of_query_rows(rows, cache, isa):
    """Up to 8 rows read keys in place, up to four at a time."""
    both(*inputs(1, [70, 3], 2 * rows, 2, 64, "bfloat16", cache))


@pytest.mark.parametrize("D", [1, 7, 16, 33, 64, 96, 128, 256])
def test_every_head_size(D, isa):
    both(*inputs(1, [67], 3, 1, D))
    both(*inputs(33, [67], 3, 1, D))


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 63, 64, 65, 254, 255, 256, 257, 511, 513])
def test_every_length(length, place):
    """Around a vector of keys, 64 keys that are converted at a time, a part of 256 and a block of 512."""
    for S in (1, 2):
        both(*inputs(S, [length], 2, 1, 8))


def test_long_sequences(place):
    """Parts have 256 keys up to 4096, then 512, and more beyond 64 parts."""
    for length in (4095, 4096, 5001, 32767, 32768, 40000):
        both(*inputs(1, [length], 2, 1, 16))
    both(*inputs(1, [5001], 2, 1, 8))


@pytest.mark.parametrize("S", [31, 32, 33, 64, 130, 600])
def test_chunks_of_a_prompt(S, isa):
    """Up to 32 query rows of a KV head the keys are cut into parts, and beyond that the queries."""
    both(*inputs(S, [0, 100], 2, 2, 16, "bfloat16" if S == 64 else "float32"))


def test_chunks_give_what_one_pass_gives(place):
    """A prompt in chunks, and token by token, against s2_attention over all of it."""
    T, H, K, D = 150, 4, 2, 16
    q, k, v = (checks.random((1, T, heads, D), seed=i) for i, heads in enumerate((H, K, K)))
    want, _ = ops.s2_attention_forward(q, k, v, group_size=T, shift="none")
    for chunk in (150, 64, 7, 1):
        caches = [np.full((1, T, K, D), np.nan, np.float32) for _ in range(2)]
        for first in range(0, T, chunk):
            part = slice(first, first + chunk)
            new, length = (k[:, part], v[:, part]), np.array([first], np.int32)
            got = ops.cached_attention(q[:, part], *caches, length, k=new[0], v=new[1])
            np.testing.assert_allclose(got, want[:, part], atol=2e-6)


@pytest.mark.parametrize("S", [1, 4, 40])
def test_a_sequence_does_not_depend_on_its_neighbours(S, isa):
    """Rows in another order, in a larger cache, and alone: the same bits."""
    lengths = [300, 0, 17, 1000]
    together = inputs(S, lengths, 6, 2, 32, N=7, rows=[5, 2, 6, 0])
    out = both(*together)
    for b, length in enumerate(lengths):
        q, _, _, _, k, v, _ = together
        _, k_cache, v_cache, _, _, _, _ = inputs(S, lengths, 6, 2, 32, N=7, rows=[5, 2, 6, 0])
        row = [5, 2, 6, 0][b]
        alone = ops.cached_attention(
            q[b : b + 1],
            k_cache[row : row + 1, : length + S].copy(),
            v_cache[row : row + 1, : length + S].copy(),
            np.array([length], np.int32),
            k=k[b : b + 1],
            v=v[b : b + 1],
        )
        np.testing.assert_array_equal(alone[0], out[b])


def test_a_cache_that_is_already_written(place):
    q, k_cache, v_cache, lengths, k, v, _ = inputs(2, [5, 9], 4, 2, 16)
    first = both(q, k_cache, v_cache, lengths, k, v)
    again = checks.check("cached_attention", q, k_cache, v_cache, lengths, floor=4)
    np.testing.assert_array_equal(again, first)


def test_views(place):
    """k and v are parts of one product, and the places of the cache have gaps."""
    q, k_cache, v_cache, lengths, k, v, _ = inputs(3, [4, 60], 4, 2, 16)
    dense = both(q, k_cache.copy(), v_cache.copy(), lengths, k, v)
    fused = np.concatenate([x.reshape(2, 3, -1) for x in (q, k, v)], -1)
    parts = [fused[..., a:b].reshape(2, 3, -1, 16) for a, b in ((0, 64), (64, 96), (96, 128))]
    strided = ops.cached_attention(
        parts[0], checks.strided(k_cache), checks.strided(v_cache), lengths, k=parts[1], v=parts[2]
    )
    np.testing.assert_array_equal(strided, dense)


def test_large_scores_and_infinite_keys(isa):
    q, k_cache, v_cache, lengths, k, v, _ = inputs(1, [40], 2, 2, 8)
    both(q * np.float32(300), k_cache.copy(), v_cache.copy(), lengths, k, v)
    q = np.abs(q) + 1
    k_cache[:, 3] = -np.inf
    out = ops.cached_attention(q, k_cache, v_cache, lengths, k=k, v=v)
    assert np.isfinite(out).all()
    k_cache[:, :], k[:] = -np.inf, -np.inf
    assert (ops.cached_attention(q, k_cache, v_cache, lengths, k=k, v=v) == 0).all()


@pytest.mark.parametrize(
    "shape", [(0, 1, 4, 2, 8), (2, 0, 4, 2, 8), (2, 3, 0, 2, 8), (2, 3, 0, 0, 8), (2, 3, 4, 2, 0)]
)
def test_sizes_of_zero(shape, dtype, isa, poison):
    B, S, H, K, D = shape
    q, k = checks.random((B, S, H, D), dtype), checks.random((B, S, K, D), dtype)
    cache = np.zeros((2, 9, K, D), q.dtype)
    out = ops.cached_attention(q, cache, cache.copy(), np.full(B, 2, np.int32), k=k, v=k)
    assert out.shape == q.shape
    assert cache[:B, 2 : 2 + S].tobytes() == k.tobytes()


def test_equal_bits(place, each_thread_count):
    def once():
        results = []
        for S in (1, 40):
            args = inputs(S, [checks.fewer(5000), 20], 6, 2, 32)
            results += [ops.cached_attention(*args[:4], k=args[4], v=args[5]), *args[1:3]]
        return results

    results = each_thread_count(once) + [once() for _ in range(3)]
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            np.testing.assert_array_equal(a, b)


BAD = [
    (dict(lengths=[5, -1]), r"lengths\[1\] should be in 0..P-S=9, got -1"),
    (dict(lengths=[10, 5]), r"lengths\[0\] should be in 0..P-S=9, got 10"),
    (dict(rows=[0, 3]), r"rows\[1\] should be in 0..2, got 3"),
    (dict(rows=[-1, 0]), r"rows\[0\] should be in 0..2, got -1"),
    (dict(rows=[1, 1]), r"rows should differ, got 1 at 0 and 1"),
]


@pytest.mark.parametrize("change,message", BAD)
def test_wrong_places_are_named_before_anything_is_written(change, message):
    arrays = inputs(3, [5, 9], 4, 2, 8, P=12, N=3)
    q, k_cache, v_cache, lengths, k, v, _ = arrays
    before = k_cache.tobytes(), v_cache.tobytes()
    given = dict(lengths=lengths, rows=None) | {name: np.array(x, np.int32) for name, x in change.items()}
    with pytest.raises(ValueError, match="cached_attention: " + message):
        ops.cached_attention(q, k_cache, v_cache, given["lengths"], k=k, v=v, rows=given["rows"])
    assert before == (k_cache.tobytes(), v_cache.tobytes())


def test_wrong_shapes_are_named(place):
    q, k_cache, v_cache, lengths, k, v, _ = inputs(1, [5, 9], 4, 2, 8)
    with pytest.raises(ValueError, match="k and v go together, got only k"):
        ops.cached_attention(q, k_cache, v_cache, lengths, k=k)
    with pytest.raises(ValueError, match="k_cache axis 2 should divide H=3, got 2"):
        ops.cached_attention(q[:, :, :3], k_cache, v_cache, lengths)
    with pytest.raises(ValueError, match="k_cache axis 0 should be at least B=2, got 1"):
        ops.cached_attention(q, k_cache[:1], v_cache[:1], lengths)
    with pytest.raises(TypeError, match="lengths"):
        ops.cached_attention(q, k_cache, v_cache, lengths.astype(np.int64))


def test_scratch_is_what_is_said():
    _C.scratch_peak()
    for S in (1, 40):
        q, k_cache, v_cache, lengths, k, v, _ = inputs(S, [900, 20], 6, 2, 32)
        args = np.empty_like(q), k_cache, v_cache, q, k, v, None, lengths, 1.0
        held = _C.scratch_peak()
        _C.cached_attention(*args)
        assert _C.scratch_peak() - held == sum(_C.scratch("cached_attention", *args))
