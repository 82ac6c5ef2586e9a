"""Passes over a cache give the logits of a pass without one, in whatever pieces the tokens come."""

import numpy as np
import pytest
import tiny

from longlora import _C
from longlora.decoder import generate as generate_
from longlora.decoder.cache import Cache
from longlora.decoder.config import read_config
from longlora.decoder.generate import Generator, RecordedOps
from longlora.decoder.model import Model
from longlora.decoder.streaming import StreamingCache, Window

CONFIG = read_config({**tiny.CONFIG, "initializer_range": 0.2})
V = CONFIG.vocab_size


@pytest.fixture(scope="module")
def model():
    return Model(CONFIG, seed=1).init_random()


def tokens(count, seed=0):
    return np.random.default_rng(seed).integers(0, V, count).astype(np.int32)


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 3, 5])
@pytest.mark.parametrize("chunk", [1, 4, 5, 13, 40])
def test_logits_after_each_token_come_in_their_order(model, rows, chunk):
    ids, parts = tokens(13), []
    generator = Generator(model, Cache(CONFIG, rows, 20), chunk)
    last = generator.extend(rows - 1, ids, parts.append)
    whole = model.logits(ids)
    close(np.concatenate(parts), whole)
    close(last, whole[-1])
    assert last.shape == (V,) and max(len(part) for part in parts) == min(rows, chunk)
    assert generator.cache.lengths.tolist() == [0] * (rows - 1) + [13]
    close(generator.extend(rows - 1, ids[:2]), model.logits(np.append(ids, ids[:2]))[-1])


def test_tokens_may_be_of_any_integer_type(model):
    ids = tokens(9)
    first = Generator(model, Cache(CONFIG, 1, 20)).extend(0, ids)
    for given in (ids.astype(np.int64), np.repeat(ids, 2)[::2], ids.astype(np.uint16)):
        np.testing.assert_array_equal(Generator(model, Cache(CONFIG, 1, 20)).extend(0, given), first)


def test_more_rows_than_a_pass_takes_go_in_two(model):
    """The logits of all rows are there after both passes."""
    generator, starts = Generator(model, Cache(CONFIG, 20, 9)), [tokens(1 + i % 4, i) for i in range(20)]
    for row, ids in enumerate(starts):
        generator.extend(row, ids)
    order, new = np.random.default_rng(1).permutation(20).tolist(), tokens(20, 99).tolist()
    found = generator.step(order, new)
    assert found.shape == (20, V)
    for row, token, logits in zip(order, new, found, strict=True):
        close(logits, model.logits(np.append(starts[row], np.int32(token)))[-1])
    kept = found.copy()
    generator.step(order, new)
    np.testing.assert_array_equal(found, kept)  # a later pass changes no logits that were given


def test_sixteen_rows_go_together(model, monkeypatch):
    generator, shapes = Generator(model, Cache(CONFIG, 40, 4)), []
    whole = generator._pass
    monkeypatch.setattr(generator, "_pass", lambda rows, ids: shapes.append(ids.shape) or whole(rows, ids))
    generator.step(range(40), [1] * 40)
    assert shapes == [(16, 1), (16, 1), (8, 1)]


def test_a_chunk_is_no_longer_than_the_cache(model):
    assert Generator(model, Cache(CONFIG, 1, 600)).chunk == 512
    assert Generator(model, Cache(CONFIG, 1, 10)).chunk == 10
    assert Generator(model, Cache(CONFIG, 1, 10), 4).chunk == 4
    assert Generator(model, StreamingCache(CONFIG, Window(2, 20), CONFIG.rope)).chunk == 5


def test_the_tables_have_the_places_of_the_cache(model):
    generator = Generator(model, Cache(CONFIG, 2, 10), 4)
    assert [table.shape for table in generator._tables] == [(10, 4)] * 2
    np.testing.assert_allclose(generator._tables[0].numpy()[1], np.cos(1000.0 ** -(np.arange(4) / 4)))
    endless = Generator(model, StreamingCache(CONFIG, Window(2, 20), CONFIG.rope))
    assert [table.shape for table in endless._tables] == [(5, 4)] * 2


def test_the_shapes_of_the_last_passes_are_remembered(model):
    """Of each shape the first pass records the calls of the ops. At most eight shapes are kept."""
    generator, made, network = Generator(model, Cache(CONFIG, 1, 80)), [], model.network
    whole = type(network).forward

    class Counted:
        def __getattr__(self, name):
            return getattr(network, name)

        def forward(self, batch):
            made.append((batch.B, batch.T))
            whole(network, batch)

    class Other:
        config, dtype, device, rope = model.config, model.dtype, model.device, model.rope
        network = Counted()

    generator.model = Other()
    ids = tokens(80)
    start = 0
    sizes = [1, 2, 3, 4, 5, 6, 7, 8, 1, 8, 9, 9, 1]
    for size in sizes:
        close(generator.extend(0, ids[start : start + size]), model.logits(ids[: start + size])[-1])
        start += size
        assert len(generator._batches) <= 8
    assert made == [(1, size) for size in (1, 2, 3, 4, 5, 6, 7, 8, 9, 1)]
    assert set(generator._batches) == {(1, 9), (1, 1)}


def test_more_rows_in_a_pass_than_planned_take_more_memory(model):
    """A pass of two rows has more sums of the attention than one row of as many tokens."""
    generator = Generator(model, Cache(CONFIG, 2, 40), 8)
    before = generator._arena.shape[0]
    ids, targets = tokens(32).reshape(2, 16), np.array([3])
    logs, _ = generator.score([0, 1], ids, np.array([31]), targets)
    logits = np.float64(model.logits(ids[1])[-1])
    np.testing.assert_allclose(logs, [logits[3] - np.log(np.exp(logits).sum())], atol=1e-4)
    assert generator._arena.shape[0] > before and set(generator._batches) == {(2, 16)}
    generator.step([0, 1], [1, 2])
    again = generator._arena
    generator.step([0, 1], [1, 2])
    assert generator._arena is again and set(generator._batches) == {(2, 16), (2, 1)}


def test_a_recording_makes_the_calls_in_their_order():
    x, y = _C.Tensor((1, 3), "float32", "cpu"), _C.Tensor((1, 3), "float32", "cpu")
    x.copy_(np.float32([[1, 2, 3]]))
    ops = RecordedOps()
    ops.scale(y, x, 2.0)
    ops.scale(y, y, 5.0)
    y.fill(0)
    ops.run()
    assert y.numpy().tolist() == [[10, 20, 30]]
    x.fill(1)
    ops.run()
    assert y.numpy().tolist() == [[10, 10, 10]]


def test_a_moved_window_is_recorded_again(model, monkeypatch):
    generator = Generator(model, StreamingCache(CONFIG, Window(2, 8), CONFIG.rope))
    recordings = []
    monkeypatch.setattr(generate_, "RecordedOps", lambda: recordings.append(1) or RecordedOps())
    for token in tokens(10):
        generator.step([0], [token])
    assert len(recordings) == 1
    for i, token in enumerate(tokens(4)):
        generator.step([0], [token])
        assert len(recordings) == 2 + i
