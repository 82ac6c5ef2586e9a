"""A pass over a cache gives the logits of a pass without one, however the tokens are split into pieces."""

from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from tiny import tokens

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


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 3, 5])
@pytest.mark.parametrize("chunk", [1, 4, 5, 13, 40])
def test_score_is_called_with_the_logits_after_each_token(model, rows, chunk):
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


def test_a_step_with_20_rows_gives_the_logits_of_all(model):
    """A pass takes 16 rows, so the step makes two."""
    generator, starts = Generator(model, Cache(CONFIG, 20, 9)), [tokens(1 + i % 4, seed=i) for i in range(20)]
    for row, ids in enumerate(starts):
        generator.extend(row, ids)
    order, new = np.random.default_rng(1).permutation(20).tolist(), tokens(20, seed=99).tolist()
    found = generator.step(order, new)
    assert found.shape == (20, V)
    for row, token, logits in zip(order, new, found, strict=True):
        close(logits, model.logits(np.append(starts[row], np.int32(token)))[-1])
    kept = found.copy()
    generator.step(order, new)
    np.testing.assert_array_equal(found, kept)  # a later step does not overwrite them


def test_a_pass_of_a_step_takes_16_rows(model, monkeypatch):
    generator, shapes = Generator(model, Cache(CONFIG, 40, 4)), []
    whole = generator._pass
    monkeypatch.setattr(generator, "_pass", lambda rows, ids: shapes.append(ids.shape) or whole(rows, ids))
    generator.step(range(40), [1] * 40)
    assert shapes == [(16, 1), (16, 1), (8, 1)]


def test_a_chunk_has_512_tokens_or_as_many_as_the_cache_takes(model):
    assert Generator(model, Cache(CONFIG, 1, 600)).chunk == 512
    assert Generator(model, Cache(CONFIG, 1, 10)).chunk == 10
    assert Generator(model, Cache(CONFIG, 1, 10), 4).chunk == 4
    assert Generator(model, StreamingCache(CONFIG, Window(2, 20), CONFIG.rope)).chunk == 5


def test_rope_tables_have_a_row_for_each_place_or_each_token_of_a_chunk(model):
    generator = Generator(model, Cache(CONFIG, 2, 10), 4)
    assert [table.shape for table in generator._tables] == [(10, 4)] * 2
    np.testing.assert_allclose(generator._tables[0].numpy()[1], np.cos(1000.0 ** -(np.arange(4) / 4)))
    endless = Generator(model, StreamingCache(CONFIG, Window(2, 20), CONFIG.rope))
    assert [table.shape for table in endless._tables] == [(5, 4)] * 2


def test_the_first_pass_of_a_shape_is_recorded_and_eight_recordings_are_kept(model, monkeypatch):
    generator, recorded = Generator(model, Cache(CONFIG, 1, 80)), []
    ids, start, whole = tokens(80), 0, model.network.forward
    wanted = model.logits(ids)

    def noted(batch):
        recorded.append((batch.B, batch.T))
        whole(batch)

    monkeypatch.setattr(model.network, "forward", noted)
    for size in (1, 2, 3, 4, 5, 6, 7, 8, 1, 8, 9, 9, 1):
        found = generator.extend(0, ids[start : start + size])
        start += size
        close(found, wanted[start - 1])
        assert len(generator._batches) <= 8
    assert recorded == [(1, size) for size in (1, 2, 3, 4, 5, 6, 7, 8, 9, 1)]
    assert set(generator._batches) == {(1, 9), (1, 1)}


def test_a_gpu_computes_each_pass_without_a_recording():
    """A recording holds calls whose arrays are on the CPU."""
    passes, batch = [], SimpleNamespace(ops=None)
    generator = object.__new__(Generator)
    generator.model = SimpleNamespace(device="cuda:0", network=SimpleNamespace(forward=passes.append))
    generator._forward(batch)
    generator._forward(batch)
    assert passes == [batch, batch] and batch.ops is None


def test_a_pass_of_many_rows_may_need_a_larger_arena(model):
    """17 rows of 2 tokens take more memory than a chunk, which is 1 row of 34 tokens."""
    generator = Generator(model, Cache(CONFIG, 17, 40), 34)
    generator.extend(0, tokens(3))
    generator.cache.keep(0, 0)
    before, ids = generator._arena.shape[0], tokens(17, 2)
    logs, _ = generator.score(range(17), ids, np.array([33]), np.array([3]))
    logits = np.float64(model.logits(ids[16])[-1])
    np.testing.assert_allclose(logs, [logits[3] - np.log(np.exp(logits).sum())], atol=1e-4)
    assert generator._arena.shape[0] > before
    assert set(generator._batches) == {(17, 2)}  # the batch of the old arena is gone
    arena = generator._arena
    generator.step([0, 1], [1, 2])
    assert generator._arena is arena and set(generator._batches) == {(17, 2), (2, 1)}


def test_a_recording_replays_its_calls_in_order():
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


def test_each_move_of_a_window_needs_a_new_recording(model, monkeypatch):
    generator = Generator(model, StreamingCache(CONFIG, Window(2, 8), CONFIG.rope))
    recordings = []
    monkeypatch.setattr(generate_, "RecordedOps", lambda: recordings.append(1) or RecordedOps())
    for token in tokens(10):
        generator.step([0], [token])
    assert len(recordings) == 1
    for i, token in enumerate(tokens(4)):
        generator.step([0], [token])
        assert len(recordings) == 2 + i
