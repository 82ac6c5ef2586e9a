"""A random number r from 0 to 1 draws the first token, in order of probability, whose cumulative probability
exceeds r. The probabilities are those of transformers' logits processors."""

import math

import numpy as np
import pytest
from test_sampling import V, logits, wanted

from longlora.decoder import sampling as sampling_
from longlora.decoder.sampling import NAMES, Sampler, Sampling, largest, log_probabilities

NUMBERS = (np.arange(50) + 0.5) / 50


class Fixed:
    """A generator whose every number is `number`."""

    def __init__(self, number):
        self.number = number

    def random(self):
        return self.number


def drawn(sampling, x, number, prompt=()):
    """The token that a Sampler draws from logits x when its random number is `number`."""
    sampler = Sampler(Sampling(**sampling), np.array(prompt, np.int64), len(x))
    sampler._random = Fixed(number)
    return sampler.choose(x)


def by_sum(p, number):
    """The token that `number` draws from the probabilities p."""
    order = np.argsort(-p, kind="stable")
    return int(order[(np.cumsum(p[order]) <= number).sum()])


SAMPLINGS = [
    dict(temperature=1.0),
    dict(temperature=0.3),
    dict(temperature=100.0),
    dict(temperature=1.5, top_k=4),
    dict(temperature=1.5, top_k=1),
    dict(temperature=1.5, top_k=V + 5),
    dict(temperature=1.2, top_p=0.7),
    dict(temperature=1.2, top_p=1e-6),
    dict(temperature=1.2, min_p=0.1),
    dict(temperature=2.0, min_p=1.0),
    dict(temperature=1.2, top_p=0.9, min_p=0.1),
    dict(temperature=1.0, top_k=9, top_p=0.8, min_p=0.02),
    dict(temperature=2.0, top_k=9, min_p=0.05),
    dict(temperature=1.0, repetition_penalty=1.8),
    dict(temperature=1.0, repetition_penalty=0.5),
]


@pytest.mark.parametrize("first", [1, 2, 3, 7, V, 1024])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_draws_follow_the_probabilities_of_transformers(monkeypatch, sampling, first):
    """`first` tokens are sorted first, which does not change the draw."""
    monkeypatch.setattr(sampling_, "FIRST", first)
    x, prompt = logits(), [3, 7, 7, 20]
    p = np.float64(wanted(sampling, x, prompt))
    tokens = [drawn(sampling, x, number, prompt) for number in NUMBERS]
    assert tokens == [by_sum(p / p.sum(), number) for number in NUMBERS]


@pytest.mark.parametrize(
    "sampling, last", [({}, 4), (dict(top_k=3), 3), (dict(top_p=0.5), 2), (dict(min_p=0.3), 3)], ids=str
)
def test_0_draws_the_likeliest_token_and_almost_1_the_least_likely(sampling, last):
    x = np.log(np.array([0.1, 0.4, 0.3, 0.15, 0.05], np.float32))
    assert drawn(dict(temperature=1.0, **sampling), x, 0.0) == 1
    assert drawn(dict(temperature=1.0, **sampling), x, 1.0 - 2.0**-53) == last


def test_a_number_that_equals_a_cumulative_probability_draws_the_next_token():
    """The four tokens have a quarter each, which is exact in float64."""
    x = np.array([-np.inf, 0, 0, -np.inf, 0, 0], np.float32)
    for number, token in ((0, 1), (0.2499, 1), (0.25, 2), (0.4999, 2), (0.5, 4), (0.75, 5), (0.999, 5)):
        assert drawn(dict(temperature=1.0), x, number) == token
    # Two tokens are kept, since their probabilities sum to top_p. Each is drawn with probability 1/2.
    for number, token in ((0, 1), (0.4999, 1), (0.5, 2), (0.999, 2)):
        assert drawn(dict(temperature=1.0, top_p=0.5), x, number) == token
        assert drawn(dict(temperature=1.0, top_k=2), x, number) == token
    assert {drawn(dict(temperature=1.0, top_p=0.51), x, n) for n in NUMBERS} == {1, 2, 4}


def test_more_tokens_are_sorted_only_if_the_sorted_ones_do_not_decide(monkeypatch):
    """One token is sorted first, then eight times as many. The probabilities are 1/2, 1/4, 1/8 and so on."""
    sizes = []
    monkeypatch.setattr(sampling_, "largest", lambda x, size: sizes.append(size) or largest(x, size))
    monkeypatch.setattr(sampling_, "FIRST", 1)
    x = np.float32(-np.log(2) * np.arange(100))

    def sorted_for(number, **fields):
        sizes.clear()
        drawn(dict(temperature=1.0, **fields), x, number)
        return sizes

    assert sorted_for(0.49) == [1] and sorted_for(0.51) == [1, 8] and sorted_for(0.999) == [1, 8, 64]
    assert sorted_for(0.99, top_p=0.4) == [1] and sorted_for(0, top_p=0.6) == [1, 8]
    assert sorted_for(0, min_p=0.1) == [1, 8] and sorted_for(0, top_k=5) == [5]
    assert sorted_for(0, top_p=0.99, min_p=0.6) == [1, 8] and sorted_for(0, top_p=0.4, min_p=0.6) == [1]


@pytest.mark.parametrize(
    "fields, ends",
    [
        (dict(logit_bias={1: math.log(2)}), {0: 0.4, 1: 0.8, 2: 1}),  # 2 : 2 : 1
        (dict(logit_bias={0: -math.log(2), 2: math.log(2)}), {2: 0.5, 0: 0.75, 1: 1}),  # 1 : 1 : 2
        (dict(temperature=0.5), {0: 4 / 6, 1: 5 / 6, 2: 1}),  # 4 : 1 : 1
    ],
)
def test_bias_and_temperature_change_the_probabilities(fields, ends):
    """The probabilities are 2 : 1 : 1 before. `ends` has the cumulative probability of each token."""
    x = np.float32([math.log(2), 0, 0])
    for token, end in ends.items():
        assert drawn({"temperature": 1.0, **fields}, x, end - 0.01) == token


def test_a_frequency_penalty_of_ln_2_halves_the_probability_of_a_drawn_token():
    sampler = Sampler(Sampling(temperature=1.0, frequency_penalty=math.log(2)), np.zeros(0, int), 3)
    sampler._random = Fixed(0.45)
    x = np.float32([math.log(2), 0, 0])
    assert sampler.choose(x) == 0  # 2 : 1 : 1, token 0 ends at 0.5
    assert sampler.choose(x) == 1  # 1 : 1 : 1, token 1 ends at 0.67
    assert sampler.choose(x) == 2  # 1 : 1/2 : 1, token 2 is the second and ends at 0.8
    assert sampler.choose(x) == 0  # 1 : 1/2 : 1/2, token 0 ends at 0.5


def test_largest_sorts_in_descending_order_and_keeps_the_order_of_equals():
    x = np.array([1, 5, 3, 5, 3, 9, 3, -1.0])
    order = [5, 1, 3, 2, 4, 6, 0, 7]
    for count in range(1, 9):
        found = largest(x, count)
        assert found.tolist() == order[:count] and found.dtype == np.int64
    many = np.zeros(300)  # with so many equal numbers, only a stable sort keeps their order
    many[::2] = 1
    assert largest(many, 200).tolist() == [*range(0, 300, 2), *range(1, 100, 2)]
    assert largest(many, 300).tolist() == [*range(0, 300, 2), *range(1, 300, 2)]


def test_log_probabilities_are_those_of_each_row():
    x = np.float32([[0, 0, 0, 0], [1000, 1000, -np.inf, -np.inf], [-1000, -1000, -1000, -1000]])
    found = log_probabilities(np.stack([x, x]))
    assert found.shape == (2, 3, 4) and found.dtype == np.float64
    np.testing.assert_allclose(np.exp(found[1]), [[0.25] * 4, [0.5, 0.5, 0, 0], [0.25] * 4], rtol=1e-12)
    assert x[1, 0] == 1000  # the argument is not changed


def test_a_sampler_does_not_change_its_argument():
    x = logits()
    kept = x.copy()
    fields = dict(temperature=0.7, repetition_penalty=1.5, presence_penalty=1, logit_bias={3: 2.0}, seed=3)
    sampler = Sampler(Sampling(**fields), np.array([1, 2]), V)
    tokens = [sampler.choose(x) for _ in range(5)]
    np.testing.assert_array_equal(x, kept)
    assert all(type(token) is int for token in tokens)


def test_the_defaults_are_greedy_without_penalties():
    """As in transformers' GenerationConfig with do_sample=False, and OpenAI's API."""
    plain = Sampling()
    defaults = dict(
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        repetition_penalty=1.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        logit_bias={},
        seed=None,
    )
    assert vars(plain) == defaults and NAMES == tuple(defaults)
    x = logits()
    assert Sampler(plain, np.zeros(0, int), V).choose(x) == int(x.argmax())
