"""The sizes of a streaming window and the tokens that it holds; the rows of a plain cache."""

import numpy as np
import pytest
import tiny

from longlora.decoder.cache import Cache, common
from longlora.decoder.config import read_config
from longlora.decoder.streaming import StreamingCache, Window
from longlora.errors import UserError

CONFIG = read_config(tiny.CONFIG)  # 2 layers, 2 key-value heads of size 8
ROW = np.zeros(1, np.int32)


@pytest.mark.parametrize(
    "start, recent, size, chunk, places",
    [
        (4, 2048, 2052, 512, 2564),
        (4, 2044, 2048, 511, 2559),
        (4, 8192, 8196, 512, 9220),  # an eighth of the window is more than a chunk
        (0, 4096, 4096, 512, 4608),
        (0, 4104, 4104, 512, 4617),
        (4, 100, 104, 25, 129),
        (1, 3, 4, 1, 5),
        (0, 1, 1, 1, 2),
        (7, 8, 15, 2, 17),
    ],
)
def test_the_sizes_of_a_window(start, recent, size, chunk, places):
    window = Window(start, recent)
    assert (window.size, window.chunk, window.places) == (size, chunk, places)


@pytest.mark.parametrize("name, least", [("start", 0), ("recent", 1)])
def test_start_and_recent_are_integers_from_a_least_value_on(name, least):
    assert getattr(Window(**{"start": 2, "recent": 2, name: least}), name) == least
    for wrong in (least - 1, -5, True, False, 2.0, "2", None):
        words = f"^{name}_size should be an integer of at least {least}, got {wrong!r}$"
        with pytest.raises(UserError, match=words):
            Window(**{"start": 2, "recent": 2, name: wrong})


def streaming(start=2, recent=8, config=CONFIG, **fields):
    return StreamingCache(config, Window(start, recent), config.rope, **fields)


def take(cache, *tokens):
    """Add tokens and return the place of the first.

    The keys of token t in layer i are t + 100 i, its values 0.5 more.
    """
    before = int(cache.make_room(ROW, len(tokens))[0])
    for layer, pair in enumerate(cache.layers):
        for x, add in zip(pair, (0, 0.5)):
            values = np.zeros((1, len(tokens), 2, 8), np.float32)
            values += np.float32(tokens)[:, None, None] + add + 100 * layer
            x[:, before : before + len(tokens)].copy_(values)
    cache.add(ROW, len(tokens))
    return before


def held(cache, layer=0):
    """The tokens in the window, read from their values."""
    values = np.array(cache.layers[layer][1].numpy())[0, : cache._held, 0, 0]
    return (values - 0.5 - 100 * layer).tolist()


def test_a_window_holds_the_start_and_the_recent_tokens():
    cache = streaming()
    assert (cache.places, cache.rows, cache.limit, cache.longest) == (12, 1, None, 2)
    assert cache.dtype == "float32" and cache.forgotten == 0
    assert take(cache, *range(10)) == 0 and held(cache) == [*range(10)] and cache.forgotten == 0
    for token in range(10, 40):  # the window moves over its places and back several times
        assert take(cache, token) == 9
        assert held(cache) == [0, 1, *range(token - 7, token + 1)]
        assert held(cache, 1) == held(cache)
        assert cache.forgotten == token - 9 and cache.lengths.tolist() == [token + 1]
    assert take(cache, 40, 41) == 8 and held(cache) == [0, 1, *range(34, 42)]


def test_a_window_without_a_start_holds_the_recent_tokens_alone():
    cache = streaming(start=0, recent=4)
    for token in range(30):
        take(cache, token)
        assert held(cache) == [*range(max(0, token - 3), token + 1)]


def test_the_keys_of_the_start_are_rotated_by_the_number_of_forgotten_tokens():
    """A key (a, b) of frequency f rotated by n places is (a cos nf - b sin nf, b cos nf + a sin nf)."""
    cache = streaming()
    take(cache, *range(10))
    f = 1000.0 ** (-np.arange(0, 8, 2) / 8)
    for n in range(1, 8):
        take(cache, 9 + n)
        for layer in range(2):
            for place in (0, 1):
                key, x = np.array(cache.layers[layer][0].numpy())[0, place, 0], place + 100 * layer
                want = np.concatenate(
                    [x * np.cos(n * f) - x * np.sin(n * f), x * np.cos(n * f) + x * np.sin(n * f)]
                )
                np.testing.assert_allclose(key, want, rtol=1e-5, atol=1e-4)


def test_layers_without_rope_do_not_rotate_the_keys_of_the_start():
    config = read_config({**tiny.CONFIG, "model_type": "smollm3", "no_rope_layers": [0, 1]})
    cache = streaming(config=config)
    take(cache, *range(10))
    take(cache, 10)
    plain, rotated = (np.array(k.numpy())[0, :2, 0, 0] for k, _ in cache.layers)
    assert plain.tolist() == [0, 1] and (np.abs(rotated - [100, 101]) > 1).all()


def test_keep_drops_the_last_tokens_or_all():
    """It can drop the last ones alone until a token leaves the window. Then it keeps all tokens or none."""
    cache = streaming()
    take(cache, *range(9))
    assert cache.keep(0, 9) == 9 and cache.keep(0, 6) == 6 and cache.lengths.tolist() == [6]
    assert take(cache, 20) == 6 and held(cache) == [*range(6), 20]
    take(cache, 21, 22, 23, 24)
    assert cache.forgotten == 1 and cache.keep(0, 11) == 11 and held(cache)[-1] == 24
    assert cache.keep(0, 10) == 0 and cache.lengths.tolist() == [0] and cache.forgotten == 0
    assert take(cache, *range(10)) == 0 and held(cache) == [*range(10)]
    assert take(cache, 10) == 9 and held(cache) == [0, 1, *range(3, 11)]


@pytest.mark.parametrize("dtype, size", [("float32", 4), ("bfloat16", 2)])
def test_the_memory_of_a_window_is_that_of_its_places_and_sinks(dtype, size):
    cache = streaming(4, 32, dtype=dtype)  # 44 places and 4 sinks, all multiples of 64 bytes
    assert cache.nbytes == 2 * 2 * (44 + 4) * 2 * 8 * size
    assert cache.layers[0][0].shape == (1, 44, 2, 8) and cache.layers[0][0].dtype == dtype


def test_rows_of_a_cache_have_their_own_lengths():
    cache = Cache(CONFIG, 3, 6)
    assert cache.nbytes == 2 * 2 * 3 * 6 * 2 * 8 * 4 and cache.dtype == "float32"
    assert (cache.limit, cache.longest, len(cache.layers)) == (6, 6, 2)
    assert cache.make_room(np.array([2, 0]), 6).tolist() == [0, 0]
    cache.add(np.array([2, 0]), 4)
    cache.add(np.array([2]), 1)
    assert cache.lengths.tolist() == [4, 0, 5]
    found = cache.make_room(np.array([0, 2]), 1)
    assert found.tolist() == [4, 5] and found.dtype == np.int32
    with pytest.raises(ValueError, match="a sequence of 7 tokens does not fit its row of 6 places"):
        cache.make_room(np.array([0, 2]), 2)
    assert cache.keep(2, 3) == 3 and cache.lengths.tolist() == [4, 0, 3]


def test_copy_gives_a_row_the_tokens_of_another():
    cache = Cache(CONFIG, 2, 4)
    numbers = np.arange(2 * 4 * 2 * 8, dtype=np.float32).reshape(2, 4, 2, 8)
    for i, x in enumerate(x for pair in cache.layers for x in pair):
        x.copy_(numbers + 1000 * i)
    cache.copy(0, 1, 1, 3)
    want = numbers.copy()
    want[1, 1:3] = numbers[0, 1:3]
    for i, x in enumerate(x for pair in cache.layers for x in pair):
        np.testing.assert_array_equal(x.numpy(), want + 1000 * i)
    assert cache.lengths.tolist() == [0, 3]


@pytest.mark.parametrize(
    "a, b, count",
    [([], [], 0), ([1], [], 0), ([1, 2, 3], [1, 2, 4], 2), ([1, 2], [1, 2, 3], 2), ([5], [6], 0)],
)
def test_common_counts_the_equal_first_elements(a, b, count):
    found = common(np.array(a, int), np.array(b, int))
    assert found == count == common(np.array(b, int), np.array(a, int)) and type(found) is int


def test_a_window_moves_back_only_at_the_end_of_its_places(monkeypatch):
    """The window has 10 of 12 places, so every third token moves it back to the first place."""
    cache = streaming()
    take(cache, *range(10))
    moved = []
    whole = cache._look_from
    monkeypatch.setattr(cache, "_look_from", lambda first: moved.append(first) or whole(first))
    for token in range(10, 18):
        take(cache, token)
    assert moved == [1, 2, 0, 1, 2, 0, 1, 2]
