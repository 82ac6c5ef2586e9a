"""Log-probabilities of given tokens equal those of torch, for any number of rows at a time."""

import numpy as np
import pytest
import tiny
import torch
from peers import tensor

from longlora import _C
from longlora.decoder import scores
from longlora.decoder.cache import Cache
from longlora.decoder.config import read_config
from longlora.decoder.generate import Generator
from longlora.decoder.model import Model

V, C, M = 40, 16, 11
# Bytes of logits: from one row to all rows.
SIZES = [1, 4 * V, 3 * 4 * V, 3 * 4 * V + 1, 4 * 4 * V - 1, 1 << 20]


def inputs():
    """The head's input, the head, and targets of which a third are the likeliest token."""
    random = np.random.default_rng(0)
    n, head = (random.standard_normal(shape).astype(np.float32) for shape in ((M, C), (V, C)))
    targets = random.integers(0, V, M)
    targets[::3] = (n @ head.T).argmax(-1)[::3]
    return n, head, targets


def wanted(n, head, targets):
    """As scores.score, by torch in float64."""
    logits = torch.tensor(n).double() @ torch.tensor(head).double().T
    logs = logits.log_softmax(-1)[torch.arange(len(n)), torch.tensor(targets)]
    return logs.numpy(), logits.argmax(-1).numpy() == targets


@pytest.mark.parametrize("size", SIZES)
def test_scores_equal_those_of_torch(monkeypatch, size):
    monkeypatch.setattr(scores, "BLOCK", size)
    calls = _C.calls()["matmul"]
    n, head, targets = inputs()
    logs, best = scores.score(tensor(head), tensor(n), targets)
    right, likeliest = wanted(n, head, targets)
    assert logs.dtype == np.float64 and best.dtype == bool and logs.shape == best.shape == (M,)
    np.testing.assert_allclose(logs, right, atol=1e-5)
    assert best.tolist() == likeliest.tolist() and best.any() and not best.all()
    rows = max(1, min(M, size // (4 * V)))  # as many rows of float32 as the size holds, at least one
    assert _C.calls()["matmul"] - calls == -(-M // rows)


def test_few_logits_are_one_product():
    n, head, targets = inputs()
    calls = _C.calls()["matmul"]
    scores.score(tensor(head), tensor(n), targets)
    assert _C.calls()["matmul"] == calls + 1


def test_large_logits_do_not_overflow_and_nan_gives_nan():
    n, head, targets = inputs()
    logs, _ = scores.score(tensor(head * 1000), tensor(n), targets)
    np.testing.assert_allclose(logs, wanted(n, head * 1000, targets)[0], rtol=1e-5, atol=1e-2)
    head[7] = np.nan
    assert np.isnan(scores.score(tensor(head), tensor(n), targets)[0]).all()


def test_the_first_of_equal_logits_is_the_likeliest():
    n, head, _ = inputs()
    head[[5, 9]] = 100 * n[0]
    found = [scores.score(tensor(head), tensor(n[:1]), np.array([token]))[1][0] for token in (5, 9, 6)]
    assert found == [True, False, False]


def test_no_targets_give_no_scores():
    n, head, _ = inputs()
    logs, best = scores.score(tensor(head), tensor(n[:0]), np.zeros(0, int))
    assert logs.shape == best.shape == (0,)


@pytest.fixture(scope="module")
def model():
    return Model(read_config({**tiny.CONFIG, "initializer_range": 0.3}), seed=1).init_random()


def of(logits, targets):
    """The log-probability of each target, by torch in float64."""
    return torch.tensor(logits).double().log_softmax(-1)[torch.arange(len(targets)), torch.tensor(targets)]


def test_the_scores_of_a_model_follow_from_its_logits(model):
    ids = np.arange(20, dtype=np.int32) * 11 % 260
    logits = model.logits(ids)
    targets = np.where(np.arange(20) % 2, logits.argmax(-1), 7)
    logs, best = model.scores(ids, targets)
    np.testing.assert_allclose(logs, of(logits, targets), atol=1e-5)
    assert best.tolist() == (logits.argmax(-1) == targets).tolist()


def test_the_scores_of_a_generator_follow_from_the_logits_of_a_model(model):
    """Five tokens of each sequence are in the cache before. A place is an index into all new tokens."""
    ids = (np.arange(24, dtype=np.int32) * 29 % 260).reshape(2, 12)
    generator = Generator(model, Cache(model.config, 3, 16))
    for row, tokens in zip((2, 0), ids):
        generator.extend(row, tokens[:5])
    places, targets = np.array([13, 0, 6, 6]), np.array([1, 2, 3, 4])
    logs, best = generator.score([2, 0], ids[:, 5:], places, targets)
    logits = np.concatenate([model.logits(row)[5:] for row in ids])[places]
    np.testing.assert_allclose(logs, of(logits, targets), atol=1e-4)
    assert best.tolist() == (logits.argmax(-1) == targets).tolist()
    assert generator.cache.lengths.tolist() == [12, 0, 12]
