"""Log-likelihoods of continuations: values of transformers in float64, and each shared token is read once."""

import numpy as np
import pytest
import tiny

from longlora.decoder.cache import Cache
from longlora.decoder.generate import Generator
from longlora.decoder.model import Model
from longlora.errors import UserError
from longlora.evaluation.likelihood import Scorer
from longlora.files.open_model import open_model

LONGEST = 60


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.model(tmp_path_factory.mktemp("likelihood") / "base")


@pytest.fixture(scope="module")
def model(base):
    source = open_model(base)
    return Model(source.config).load(source)


@pytest.fixture(scope="module")
def wanted(base):
    """A function (context, continuation) -> log-probability and greedy, by transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()

    def likelihood(context, rest):
        with torch.no_grad():
            logits = theirs(torch.tensor(np.concatenate([context, rest[:-1]]))[None].long()).logits[0]
        logs = logits.double().log_softmax(-1).numpy()[-len(rest) :]
        return logs[np.arange(len(rest)), rest].sum(), bool((logs.argmax(-1) == rest).all())

    return likelihood


def scorer(model, rows=4, chunk=512):
    return Scorer(Generator(model, Cache(model.config, rows, LONGEST), chunk))


def counted(scorer):
    """A list that gets the shape of each pass."""
    passes, score = [], scorer._generator.score
    scorer._generator.score = lambda rows, ids, *rest: (passes.append(ids.shape), score(rows, ids, *rest))[1]
    return passes


def drawn(seed=0):
    """Questions with a common beginning, of one to four choices with 1 to 12 tokens each."""
    random, pairs = np.random.default_rng(seed), []
    start = random.integers(0, 256, 17)
    for _ in range(8):
        context = np.concatenate(
            [start[: random.choice([0, 9, 17])], random.integers(0, 256, random.integers(1, 25))]
        )
        pairs += [
            (context.astype(np.int32), random.integers(0, 256, random.choice([1, 2, 5, 12])).astype(np.int32))
            for _ in range(random.integers(1, 5))
        ]
    return pairs


@pytest.mark.parametrize("rows, chunk", [(1, 512), (2, 7), (4, 30), (16, 512)])
def test_values_are_those_of_transformers_whatever_the_rows_and_chunks(model, wanted, rows, chunk):
    """Logits up to 16 in float32 are 1e-6 off. The sum of 12 log-probabilities is 2e-5 off at most."""
    pairs = drawn()
    ours, counts = scorer(model, rows, chunk), []
    for _ in range(2):  # the second time the rows hold something
        for (context, rest), (logs, greedy) in zip(pairs, ours.score(pairs, counts.append), strict=True):
            value, likeliest = wanted(context, rest)
            assert logs == pytest.approx(value, abs=2e-5) and greedy == likeliest
    assert sum(counts) == 2 * len(pairs)


def test_the_likeliest_continuation_is_greedy(model, wanted):
    context = np.arange(40, 50, dtype=np.int32)
    rest = np.zeros(0, np.int32)
    for _ in range(4):
        logits = model.logits(np.concatenate([context, rest]).astype(np.int32))[-1]
        rest = np.append(rest, np.int32(logits.argmax()))
    other = rest.copy()
    other[2] = (other[2] + 1) % 256
    found = scorer(model).score(
        [(context, rest), (context, other), (context, rest[:1]), (context, other[2:])]
    )
    assert [greedy for _, greedy in found] == [True, False, True, False]
    assert all(wanted(context, x)[1] == greedy for x, (_, greedy) in zip((rest, other), found))


def test_what_requests_share_is_read_once(model):
    """20 tokens of examples, then 3 questions of 5 tokens, then 4 choices of 3 tokens for each of them."""
    start, pairs = np.arange(20), []
    for question in range(3):
        context = np.concatenate([start, 100 + 10 * question + np.arange(5)]).astype(np.int32)
        pairs += [(context, np.array([choice, 7, 8 + choice], np.int32)) for choice in range(4)]
    ours = scorer(model)
    passes = counted(ours)
    order = np.random.default_rng(0).permutation(len(pairs))
    ours.score([pairs[i] for i in order])
    assert passes == [(1, 20), (3, 5), (4, 2), (4, 2), (4, 2)]


def letters(*contexts):
    """Questions with two choices of one token."""
    return [
        (np.asarray(context, np.int32), np.array([letter], np.int32))
        for context in contexts
        for letter in (65, 66)
    ]


@pytest.mark.parametrize(
    "rows, wanted_passes", [(4, [(1, 20), (3, 9)]), (2, [(1, 20), (2, 9), (1, 4)]), (1, None)]
)
def test_short_contexts_that_begin_alike_are_read_side_by_side(model, wanted, rows, wanted_passes):
    """20 tokens of examples, then questions of 4, 9 and 6 tokens, the longest first."""
    random, start = np.random.default_rng(2), np.arange(20)
    pairs = letters(*(np.concatenate([start, [i], random.integers(0, 256, i)]) for i in (3, 8, 5)))
    ours, counts = scorer(model, rows), []
    passes = counted(ours)
    for _ in range(2):
        for pair, (logs, greedy) in zip(pairs, ours.score(pairs, counts.append), strict=True):
            assert (logs, greedy) == (pytest.approx(wanted(*pair)[0], abs=2e-5), wanted(*pair)[1])
    assert wanted_passes is None or passes == wanted_passes + wanted_passes[1:]
    assert counts == {4: [6, 6], 2: [4, 2] * 2, 1: [2] * 6}[rows]


def test_contexts_that_share_nothing_are_read_side_by_side_if_they_are_short(model):
    """Half a chunk of 16 tokens is short."""
    ours = scorer(model, chunk=16)
    passes = counted(ours)
    ours.score(letters(10 + np.arange(8), 20 + np.arange(8), 30 + np.arange(9), 40 + np.arange(8)))
    assert passes == [(2, 8), (1, 9), (1, 8)]


def test_little_is_read_again_for_a_context_that_shares_less(model):
    """Two contexts share 20 tokens, a third shares 19. 2 of 12 tokens would be read again; 2 of 16 are."""
    ours = scorer(model)
    passes = counted(ours)
    for size, third, wanted in (
        (3, 4, [(1, 20), (2, 3), (1, 4)]),
        (4, 6, [(1, 19), (3, 6)]),
        (9, 10, [(1, 19), (3, 10)]),
    ):
        start = 100 + size + np.arange(20)
        near = [np.concatenate([start, np.arange(i, i + size)]) for i in (0, 50)]
        passes.clear()
        ours.score(letters(*near, np.concatenate([start[:19], 200 + np.arange(third)])))
        assert passes == wanted


def test_choices_of_several_contexts_are_read_side_by_side(model, wanted):
    """Five rows hold three questions, so each pass reads up to five of their choices, the longest first."""
    random, start, pairs = np.random.default_rng(3), np.arange(20), []
    for question, sizes in enumerate(((1, 3, 5, 5), (4, 4, 2), (1, 1))):
        context = np.concatenate([start, [question], random.integers(0, 256, 4)]).astype(np.int32)
        pairs += [(context, random.integers(0, 256, size).astype(np.int32)) for size in sizes]
    ours = scorer(model, 5)
    passes = counted(ours)
    for _ in range(2):
        for pair, (logs, greedy) in zip(pairs, ours.score(pairs), strict=True):
            assert (logs, greedy) == (pytest.approx(wanted(*pair)[0], abs=2e-5), wanted(*pair)[1])
    assert passes == [(1, 20), (3, 5), (4, 4), (2, 2), (3, 5), (4, 4), (2, 2)]


def test_a_row_that_another_choice_would_fill_is_read_in_a_pass_of_its_own(model, wanted):
    """A row has 60 tokens. Choices of 12 tokens fit after 30, but 50 have no room for as many."""
    random = np.random.default_rng(4)
    pairs = [
        (np.append(np.arange(25), other + np.arange(size)).astype(np.int32), random.integers(0, 256, more))
        for other, size, more in ((50, 25, 3), (100, 5, 12))
        for _ in range(2)
    ]
    ours = scorer(model, 5)
    passes = counted(ours)
    for pair, (logs, greedy) in zip(pairs, ours.score(pairs), strict=True):
        assert (logs, greedy) == (pytest.approx(wanted(*pair)[0], abs=2e-5), wanted(*pair)[1])
    assert passes == [(1, 25), (2, 25), (2, 11), (2, 2)]


def test_choices_of_one_token_are_one_pass_and_a_single_continuation_too(model):
    context = np.arange(10, dtype=np.int32)
    ours = scorer(model)
    passes = counted(ours)
    ours.score([(context, np.array([choice], np.int32)) for choice in range(4)])
    ours.score([(context + 50, np.arange(6, dtype=np.int32))])
    assert passes == [(1, 10), (1, 15)]


def test_equal_requests_get_equal_scores_for_one_pass(model):
    pair = np.arange(10, dtype=np.int32), np.arange(5, dtype=np.int32)
    ours = scorer(model)
    passes = counted(ours)
    one, two = ours.score([pair, pair])
    assert one == two and passes == [(1, 14)]


def test_more_choices_than_rows_and_choices_longer_than_a_chunk(model, wanted):
    """Rows for two; a chunk of 6 tokens holds two choices of 3, and one of 8 comes alone, in two passes."""
    random, context = np.random.default_rng(1), np.arange(5, dtype=np.int32)
    pairs = [(context, random.integers(0, 256, size).astype(np.int32)) for size in (4, 9, 4, 3)]
    ours = scorer(model, 2, 6)
    passes = counted(ours)
    found = ours.score(pairs)
    assert passes == [(1, 5), (1, 6), (1, 2), (2, 3), (1, 2)]
    for pair, (logs, greedy) in zip(pairs, found):
        assert (logs, greedy) == (pytest.approx(wanted(*pair)[0], abs=2e-5), wanted(*pair)[1])


def test_more_rows_than_a_step_takes_are_read_in_one_pass(model, wanted):
    """Thirty rows need a little more memory than one of as many tokens."""
    context = np.arange(5, dtype=np.int32)
    pairs = [(context, np.array([7, i, 9], np.int32)) for i in range(30)]
    ours = scorer(model, 30)
    passes, size = counted(ours), ours._generator._arena.nbytes
    found = ours.score(pairs)
    assert passes == [(1, 5), (30, 2)] and ours._generator._arena.nbytes > size
    for i in (0, 29):
        assert found[i][0] == pytest.approx(wanted(*pairs[i])[0], abs=2e-5)


def test_logits_that_are_nan_are_named_and_forgotten(base, tmp_path, wanted):
    """After the error the rows are read again."""
    source = open_model(base)
    model = Model(source.config).load(source)
    norm = model.tensor("model.norm.weight")
    before = norm.numpy().copy()
    ours, pair = scorer(model), (np.arange(10, dtype=np.int32), np.arange(3, dtype=np.int32))
    norm.copy_(np.full_like(before, np.nan))
    with pytest.raises(UserError, match="NaN"):
        ours.score([pair])
    norm.copy_(before)
    ((logs, _),) = ours.score([pair])
    assert logs == pytest.approx(wanted(*pair)[0], abs=2e-5)
