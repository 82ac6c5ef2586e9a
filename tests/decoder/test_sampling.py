"""Tokens have the probabilities of transformers' logits processors, or those of worked examples."""

import numpy as np
import pytest
import torch
import transformers

from longlora.decoder import sampling as sampling_module
from longlora.decoder.sampling import Sampler, Sampling, largest, log_probabilities
from longlora.errors import UserError

V = 50


def logits(seed=0):
    return (np.random.default_rng(seed).standard_normal(V) * 3).astype(np.float32)


def shares(sampling, x, prompt=(), count=4000):
    """The share of draws in which each token comes first."""
    counts = np.zeros(V)
    for seed in range(count):
        sampler = Sampler(Sampling(**{**sampling, "seed": seed}), np.array(prompt, np.int64), V)
        counts[sampler.choose(x)] += 1
    return counts / count


def wanted(sampling, x, prompt=()):
    """The probabilities that transformers' processors give, in the same order."""
    ids, scores = torch.tensor([list(prompt)], dtype=torch.long), torch.tensor(x)[None]
    if "repetition_penalty" in sampling:
        scores = transformers.RepetitionPenaltyLogitsProcessor(sampling["repetition_penalty"])(ids, scores)
    scores = transformers.TemperatureLogitsWarper(float(sampling["temperature"]))(ids, scores)
    if "top_k" in sampling:
        scores = transformers.TopKLogitsWarper(sampling["top_k"])(ids, scores)
    if "top_p" in sampling:
        scores = transformers.TopPLogitsWarper(sampling["top_p"])(ids, scores)
    if "min_p" in sampling:
        scores = transformers.MinPLogitsWarper(sampling["min_p"])(ids, scores)
    return scores.softmax(-1)[0].numpy()


@pytest.mark.parametrize(
    "sampling",
    [
        dict(temperature=1.0),
        dict(temperature=0.3),
        dict(temperature=1.5, top_k=4),
        dict(temperature=1.2, top_p=0.7),
        dict(temperature=1.2, min_p=0.1),
        dict(temperature=1.0, top_k=9, top_p=0.8, min_p=0.02),
        dict(temperature=1.0, repetition_penalty=1.8),
    ],
    ids=str,
)
def test_tokens_have_the_probabilities_of_transformers(sampling):
    """In 4,000 draws an excluded token never comes, and a share differs by at most five deviations."""
    x, prompt = logits(), [3, 7, 7, 20]
    p, got = wanted(sampling, x, prompt), shares(sampling, x, prompt)
    assert not got[p == 0].any()
    assert (np.abs(got - p) <= 5 * np.sqrt(p * (1 - p) / 4000) + 1e-9).all()


@pytest.mark.parametrize("scale", [0.01, 3.0, 20.0])
@pytest.mark.parametrize(
    "sampling",
    [
        {},
        dict(top_p=0.8),
        dict(top_p=0.9999),
        dict(min_p=0.05),
        dict(min_p=1e-6, top_p=0.99),
        dict(top_k=3000),
    ],
    ids=str,
)
def test_sorting_a_part_of_a_long_vocabulary_gives_the_same_tokens(monkeypatch, sampling, scale):
    """Logits are flat or steep, and some are equal."""
    x = np.round(np.random.default_rng(1).standard_normal(20_000) * scale, 3).astype(np.float32)

    def drawn():
        seeds = range(20)
        return [Sampler(Sampling(temperature=1.0, seed=i, **sampling), [], len(x)).choose(x) for i in seeds]

    some = drawn()
    monkeypatch.setattr("longlora.decoder.sampling.FIRST", len(x))
    assert drawn() == some and len(set(some)) > 1


@pytest.mark.parametrize("how", [{}, dict(top_p=0.9), dict(min_p=0.5)], ids=str)
def test_no_more_is_sorted_than_decides_the_draw(monkeypatch, how):
    """100 of 10,000 tokens share all of the probability, so the first sort decides every draw."""
    sizes = []

    def counted(x, size):
        sizes.append(size)
        return largest(x, size)

    monkeypatch.setattr(sampling_module, "largest", counted)
    x = np.full(10_000, -50.0, np.float32)
    x[5000:5100] = 0
    for seed in range(20):
        sampler = Sampler(Sampling(temperature=1.0, seed=seed, **how), np.zeros(0, np.int64), len(x))
        assert 5000 <= sampler.choose(x) < 5100
    assert sizes == [sampling_module.FIRST] * 20


def test_greedy_takes_the_first_of_the_likeliest_tokens():
    x = np.zeros(V, np.float32)
    x[[8, 5]] = 2
    sampler = Sampler(Sampling(), np.zeros(0, np.int64), V)
    assert [sampler.choose(x) for _ in range(3)] == [5, 5, 5]  # no penalty


def test_a_logit_far_above_the_others_is_drawn():
    """The exponential of its distance is infinite."""
    x = np.zeros(V, np.float32)
    x[7] = 1000
    assert Sampler(Sampling(temperature=1.0, seed=0), np.zeros(0, np.int64), V).choose(x) == 7


def test_equals_are_kept_by_min_p_and_the_first_by_top_k():
    x = (np.arange(V) % 2).astype(np.float32)
    first = Sampler(Sampling(temperature=1.0, top_k=3, seed=0), np.zeros(0, np.int64), V)
    assert {first.choose(x) for _ in range(40)} == {1, 3, 5}
    x = np.zeros(V, np.float32)
    x[[8, 5]] = 2
    both = Sampler(Sampling(temperature=1.0, min_p=1, seed=0), np.zeros(0, np.int64), V)
    assert {both.choose(x) for _ in range(40)} == {5, 8}


def test_penalties_count_the_answer_and_bias_is_added():
    x = np.zeros(V, np.float32)
    x[1], x[2], x[3] = 1.0, 0.7, 0.2
    sampler = Sampler(Sampling(presence_penalty=0.4, frequency_penalty=0.25), np.array([2, 2]), V)
    # 1: 1.0; then 1 has 1 - 0.4 - 0.25 = 0.35, so 2; then 2 has 0.05, so 1 again; then 1 has 0.1, so 3.
    assert [sampler.choose(x) for _ in range(4)] == [1, 2, 1, 3]
    for token in (0, 9, V - 1):
        assert Sampler(Sampling(logit_bias={token: 1.5}), np.zeros(0, np.int64), V).choose(x) == token


def test_the_repetition_penalty_counts_the_answer_as_transformers_does():
    """Greedy choices, token by token. Chosen tokens are penalised like those of the prompt."""
    x, ids = np.linspace(0.9, 0.5, V, dtype=np.float32), [4, 9]
    sampler = Sampler(Sampling(repetition_penalty=2), np.array(ids), V)
    processor = transformers.RepetitionPenaltyLogitsProcessor(2.0)
    for _ in range(12):
        wanted = int(processor(torch.tensor([ids]), torch.tensor(x)[None].clone()).argmax())
        assert sampler.choose(x) == wanted
        ids.append(wanted)
    assert len(set(ids)) == 14


def test_a_seed_gives_the_same_tokens():
    def tokens(seed):
        sampler = Sampler(Sampling(temperature=1.0, seed=seed), np.zeros(0, np.int64), V)
        return [sampler.choose(logits(i)) for i in range(20)]

    assert tokens(5) == tokens(5) != tokens(6)


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("temperature", -0.1, "temperature should be a number from 0 to 100, got -0.1"),
        ("temperature", float("nan"), "temperature should be a number"),
        ("top_k", 2.0, "top_k should be an integer from 0"),
        ("top_p", 0, "top_p should be a number above 0 to 1, got 0"),
        ("min_p", 1.1, "min_p should be a number from 0 to 1"),
        ("repetition_penalty", 0, "repetition_penalty should be a number above 0"),
        ("presence_penalty", 3, "presence_penalty should be a number from -2 to 2"),
        ("frequency_penalty", True, "frequency_penalty should be a number"),
        ("seed", -1, "seed should be an integer from 0 to 2"),
    ],
)
def test_wrong_values_are_named(name, value, words):
    with pytest.raises(UserError, match=words):
        Sampling(**{name: value})


@pytest.mark.parametrize(
    "name, low, high, below, above",
    [
        ("temperature", 0, 100, -1e-9, 100.1),
        ("top_k", 0, 1 << 31, -1, (1 << 31) + 1),
        ("top_p", 1e-9, 1, 0, 1.001),
        ("min_p", 0, 1, -1e-9, 1.001),
        ("repetition_penalty", 1e-9, 100, 0, 100.1),
        ("presence_penalty", -2, 2, -2.01, 2.01),
        ("frequency_penalty", -2.0, 2.0, -2.01, 2.01),
        ("seed", 0, (1 << 64) - 1, -1, 1 << 64),
        ("seed", None, 7, True, 1.0),
    ],
)
def test_limits_belong_to_their_range(name, low, high, below, above):
    for value in (low, high):
        assert getattr(Sampling(**{name: value}), name) == value
    for value in (below, above, "1"):
        with pytest.raises(UserError, match=f"{name} should be"):
            Sampling(**{name: value})


def test_a_bias_of_an_unknown_token_and_nan_logits_are_refused():
    with pytest.raises(UserError, match="logit_bias names token 50, the model has tokens 0 to 49"):
        Sampler(Sampling(logit_bias={V: 1.0}), np.zeros(0, np.int64), V)
    with pytest.raises(UserError, match="NaN"):
        Sampler(Sampling(), np.zeros(0, np.int64), V).choose(np.full(V, np.nan, np.float32))


def test_log_probabilities_equal_those_of_torch():
    x = logits().reshape(2, -1) * 500  # the exponential of twice the largest is infinite
    np.testing.assert_allclose(
        log_probabilities(x), torch.tensor(x).double().log_softmax(-1).numpy(), rtol=1e-12, atol=1e-12
    )


def test_each_penalty_works_without_the_other():
    """The first of two near equals has 1 - 0.4 after its turn. The second has 0.9."""
    x = np.zeros(V, np.float32)
    x[3], x[4] = 1, 0.9
    for name in ("presence_penalty", "frequency_penalty"):
        sampler = Sampler(Sampling(**{name: 0.4}), np.zeros(0, np.int64), V)
        assert [sampler.choose(x) for _ in range(2)] == [3, 4]
