"""Which token a number from 0 to 1 draws: the first whose probability, summed from the likeliest on, is above
it. Probabilities are those of transformers' logits processors."""

import numpy as np
import pytest
from test_sampling import V, logits, wanted

from longlora.decoder import sampling as sampling_
from longlora.decoder.sampling import NAMES, Sampler, Sampling, largest, log_probabilities

NUMBERS = (np.arange(50) + 0.5) / 50


class Fixed:
    """In place of the random numbers."""

    def __init__(self, number):
        self.number = number

    def random(self):
        return self.number


def drawn(sampling, x, number, prompt=()):
    sampler = Sampler(Sampling(**sampling), np.array(prompt, np.int64), len(x))
    sampler._random = Fixed(number)
    return sampler.choose(x)


def by_sum(p, number):
    """The token that the number draws from probabilities p."""
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
def test_a_number_draws_the_token_that_it_reaches(monkeypatch, sampling, first):
    """However many tokens are sorted at first."""
    monkeypatch.setattr(sampling_, "FIRST", first)
    x, prompt = logits(), [3, 7, 7, 20]
    p = np.float64(wanted(sampling, x, prompt))
    tokens = [drawn(sampling, x, number, prompt) for number in NUMBERS]
    assert tokens == [by_sum(p / p.sum(), number) for number in NUMBERS]


@pytest.mark.parametrize("sampling", [{}, dict(top_k=3), dict(top_p=0.5), dict(min_p=0.3)], ids=str)
def test_the_ends_draw_the_likeliest_and_the_last_token(sampling):
    x = np.log(np.array([0.1, 0.4, 0.3, 0.15, 0.05], np.float32))
    kept = {"top_k": [1, 2, 3], "top_p": [1, 2], "min_p": [1, 2, 3]}.get(
        next(iter(sampling), None), [1, 2, 3, 0, 4]
    )
    for number, token in ((0.0, kept[0]), (1.0 - 2.0**-53, kept[-1])):
        assert drawn(dict(temperature=1.0, **sampling), x, number) == token


def test_shares_by_pencil():
    """Halves and quarters are exact in float64: the sum that a number equals is not above it."""
    x = np.array([-np.inf, 0, 0, -np.inf, 0, 0], np.float32)
    for number, token in ((0, 1), (0.2499, 1), (0.25, 2), (0.4999, 2), (0.5, 4), (0.75, 5), (0.999, 5)):
        assert drawn(dict(temperature=1.0), x, number) == token
    # the fewest tokens whose probabilities sum to top_p or more; the two are drawn with a half each
    for number, token in ((0, 1), (0.4999, 1), (0.5, 2), (0.999, 2)):
        assert drawn(dict(temperature=1.0, top_p=0.5), x, number) == token
        assert drawn(dict(temperature=1.0, top_k=2), x, number) == token
    assert {drawn(dict(temperature=1.0, top_p=0.51), x, n) for n in NUMBERS} == {1, 2, 4}


def test_more_is_sorted_only_where_the_sorted_part_does_not_decide(monkeypatch):
    """At first one token, then eight times as many. The shares are 1/2, 1/4, 1/8 and so on."""
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


def test_penalties_and_biases_move_the_logits_before_the_draw():
    """Shares 1/2, 1/4, 1/4. A bias of ln 2 doubles a share, a penalty of ln 2 halves it."""
    half = float(np.log(2))
    x = np.float32([half, 0, 0])
    for fields, shares in (
        (dict(logit_bias={1: half}), (2, 2, 1)),
        (dict(logit_bias={0: -half, 2: half}), (1, 1, 2)),
        (dict(temperature=0.5), (4, 1, 1)),
    ):
        bounds = np.cumsum(sorted(np.array(shares) / sum(shares), reverse=True))
        order = np.argsort(-np.array(shares), kind="stable")
        for i, bound in enumerate(bounds):
            assert drawn({"temperature": 1.0, **fields}, x, bound - 0.01) == order[i]
    sampler = Sampler(Sampling(temperature=1.0, frequency_penalty=half), np.zeros(0, int), 3)
    sampler._random = Fixed(0.45)
    # 2 1 1; then 1 1 1, and the second reaches 0.45; then 1 1/2 1: the third is the second largest; then
    # 1 1/2 1/2
    assert [sampler.choose(x) for _ in range(4)] == [0, 1, 2, 0]


def test_the_largest_come_first_and_equals_in_their_order():
    x = np.array([1, 5, 3, 5, 3, 9, 3, -1.0])
    order = [5, 1, 3, 2, 4, 6, 0, 7]
    for count in range(1, 9):
        found = largest(x, count)
        assert found.tolist() == order[:count] and found.dtype == np.int64
    many = np.zeros(300)  # so many equals that only a stable sort keeps their order
    many[::2] = 1
    assert largest(many, 200).tolist() == [*range(0, 300, 2), *range(1, 100, 2)]
    assert largest(many, 300).tolist() == [*range(0, 300, 2), *range(1, 300, 2)]


def test_log_probabilities_of_rows_sum_to_one():
    x = np.float32([[0, 0, 0, 0], [1000, 1000, -np.inf, -np.inf], [-1000, -1000, -1000, -1000]])
    found = log_probabilities(np.stack([x, x]))
    assert found.shape == (2, 3, 4) and found.dtype == np.float64
    np.testing.assert_allclose(np.exp(found[1]), [[0.25] * 4, [0.5, 0.5, 0, 0], [0.25] * 4], rtol=1e-12)
    assert x[1, 0] == 1000  # what is given stays


def test_a_sampler_changes_no_logits_that_it_is_given():
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
    assert plain == Sampling(0.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0, {}, None)
    assert NAMES == (
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
        "seed",
    )
    x = logits()
    assert Sampler(plain, np.zeros(0, int), V).choose(x) == int(x.argmax())
