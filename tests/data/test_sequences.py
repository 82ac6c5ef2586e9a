"""How documents and samples are cut and packed into sequences, and the sentence that counts them."""

import json
import re

import numpy as np
import pytest
from test_chat import samples_of
from test_data import failure, tokens_of

from longlora.data.sequences import Order, Sequences, batch
from longlora.ops import IGNORE

APART = "document"
DOCUMENTS, SAMPLES = "; documents do not see each other", "; samples do not see each other"


def packed(tokens, length, rule, boundaries):
    """The pieces, the number of targets of each sequence, and the end of the sentence."""
    found = Sequences(tokens, length, rule, packing_boundaries=boundaries)
    ids = [[index for first, last in piece for index in range(first, last)] for piece in found.pieces]
    assert [found.get(i).tolist() for i in range(len(found))] == ids
    assert [found.size(i) for i in range(len(found))] == list(map(len, ids))
    targets = [found.targets(i) for i in range(len(found))]
    assert targets == [int((np.concatenate(found.labels(i)) != IGNORE).sum()) for i in range(len(found))]
    sentence, _, end = found.sentence.partition(f" of {length}")
    assert re.search(r" tokens \((\d+ of them targets, )?shortest \d", sentence)
    assert sentence.endswith(f" -> {len(found)} sequence{'s'[: len(found) != 1]}")
    return found.pieces, targets, end


@pytest.mark.parametrize(
    "sizes, rule, pieces, end",
    [
        ([3, 3], "split", [[(0, 3), (3, 4)], [(4, 6)]], ""),
        ([4, 4], "drop", [[(0, 4)], [(4, 8)]], ""),  # a document of 4 tokens just fits
        ([4, 4], "truncate", [[(0, 4)], [(4, 8)]], ""),
        ([4, 4], "refuse", [[(0, 4)], [(4, 8)]], ""),
        ([4, 1], "split", [[(0, 4)]], ""),  # a single token has no target
        ([4, 0, 2], "split", [[(0, 4)], [(4, 6)]], ""),
        ([9], "split", [[(0, 4)], [(4, 8)]], "; 1 longer document split"),
        ([9, 2], "truncate", [[(0, 4)], [(9, 11)]], "; 1 longer document truncated, 5 tokens lost"),
        ([2, 9, 3, 9], "drop", [[(0, 2), (11, 13)]], "; 2 longer documents dropped, 18 tokens lost"),
    ],
)
def test_joined_documents_fill_sequences_of_4(sizes, rule, pieces, end):
    targets = [sum(last - first for first, last in piece) - 1 for piece in pieces]
    assert packed(tokens_of(sizes), 4, rule, "none") == (pieces, targets, end)


@pytest.mark.parametrize(
    "sizes, rule, pieces, long, single",
    [
        ([2, 2], "split", [[(0, 2), (2, 4)]], "", ""),
        ([2, 3], "split", [[(0, 2), (2, 4)]], "", ", 1 single token left out"),
        (
            [5, 1, 6, 3],
            "split",
            [[(0, 4)], [(6, 10)], [(10, 12), (12, 14)]],
            "; 2 longer documents split",
            ", 3 single tokens left out",
        ),
        (
            [5, 2, 7],
            "truncate",
            [[(0, 4)], [(5, 7), (7, 9)], [(9, 11)]],
            "; 2 longer documents truncated, 4 tokens lost",
            "",
        ),
    ],
)
def test_documents_that_do_not_see_each_other_fill_sequences_of_4(sizes, rule, pieces, long, single):
    targets = [sum(last - first - 1 for first, last in piece) for piece in pieces]
    assert packed(tokens_of(sizes), 4, rule, APART) == (pieces, targets, long + DOCUMENTS + single)


@pytest.mark.parametrize(
    "sizes, rule, pieces, long, single",
    [
        ([5, 3, 5, 3], "split", [[(0, 5), (5, 8)], [(8, 13), (13, 16)]], "", ""),
        ([3, 5, 6, 2], "split", [[(0, 3), (3, 8)], [(8, 14), (14, 16)]], "", ""),
        # 2 tokens go where there is room for 2, not for 3
        ([5, 6, 2, 3], "split", [[(0, 5), (13, 16)], [(5, 11), (11, 13)]], "", ""),
        ([7, 2], "split", [[(0, 7)], [(7, 9)]], "", ""),
        ([8, 1, 8], "drop", [[(0, 8)], [(9, 17)]], "", ", 1 single token left out"),
        ([8, 8], "truncate", [[(0, 8)], [(8, 16)]], "", ""),
        ([19], "split", [[(0, 8)], [(8, 16)], [(16, 19)]], "; 1 longer sample split", ""),
        ([17], "split", [[(0, 8)], [(8, 16)]], "; 1 longer sample split", ", 1 single token left out"),
        (
            [9, 2, 10],
            "truncate",
            [[(0, 8)], [(9, 11)], [(11, 19)]],
            "; 2 longer samples truncated, 3 tokens lost",
            "",
        ),
        ([9, 2, 10], "drop", [[(9, 11)]], "; 2 longer samples dropped, 19 tokens lost", ""),
    ],
)
def test_samples_stay_whole_in_sequences_of_8(sizes, rule, pieces, long, single):
    """Each goes where it leaves the least room. All of its tokens but the first are targets."""
    targets = [sum(last - first - 1 for first, last in piece) for piece in pieces]
    samples = samples_of(sizes, [0] * len(sizes))
    assert packed(samples, 8, rule, APART) == (pieces, targets, long + SAMPLES + single)


def test_answers_of_joined_samples_are_the_targets():
    """The answers are the tokens 3, 4 and 6 to 10. The first token of a sequence is never a target."""
    found = Sequences(samples_of([5, 6], [3, 1]), 4)
    assert found.sentence == (
        "2 samples, 11 tokens (5 of them targets, shortest 5, median 5, longest 6) -> 3 sequences of 4; "
        "2 longer samples split"
    )
    none = IGNORE
    wanted = [[none, none, 3, none], [none, 6, 7, none], [9, 10, none]]
    for i, labels in enumerate(wanted):
        (found_labels,) = found.labels(i)
        assert found_labels.tolist() == labels and found_labels.dtype == np.int32
        assert found.targets(i) == sum(label != none for label in labels)


@pytest.mark.parametrize("boundaries", ["none", APART])
def test_sequences_without_an_answer_are_left_out(boundaries):
    found = Sequences(samples_of([4, 4, 4], [4, 1, 4]), 4, packing_boundaries=boundaries)
    assert found.pieces == [[(4, 8)]]
    assert "(3 of them targets, " in found.sentence and " -> 1 sequence of 4; " in found.sentence
    assert found.sentence.endswith("; 2 sequences without a target left out")
    silent = samples_of([4, 4], [4, 4])
    assert failure(Sequences, silent, 4) == "data: leaves no sequence of 4 tokens"


def test_the_held_out_share_is_rounded_and_never_all():
    for fraction, count in ((0.26, 1), (0.5, 2), (0.7, 3), (0.01, 1)):
        found = Sequences(tokens_of([16]), 4)
        held = found.hold_out(fraction)
        assert [len(found), len(held)] == [4 - count, count]
        assert held.get(count - 1).tolist() == [12, 13, 14, 15] and found.get(0).tolist() == [0, 1, 2, 3]
    assert (
        failure(Sequences(tokens_of([16]), 4).hold_out, 0.9)
        == "eval_fraction 0.9 of 4 sequences leaves none to train on"
    )


def test_a_batch_counts_the_borders_of_all_its_texts():
    """Rows of 7 and 5 tokens are padded to 8. The padding of each row is a piece of its own."""
    found = Sequences(tokens_of([3, 4, 5]), 8, packing_boundaries=APART)
    ids, targets, cu_seqlens = batch(found, [0, 1], 4)
    assert ids.tolist() == [[0, 1, 2, 3, 4, 5, 6, 0], [7, 8, 9, 10, 11, 0, 0, 0]]
    none = IGNORE
    assert targets.tolist() == [[1, 2, none, 4, 5, 6, none, none], [8, 9, 10, 11, none, none, none, none]]
    assert cu_seqlens.tolist() == [0, 3, 7, 8, 13, 16]
    assert batch(found, [0, 1])[0].shape == (2, 7)


@pytest.mark.parametrize("sizes", [[4, 5, 9], [9, 5], [3, 4, 4, 9, 1]])
def test_the_first_document_that_is_too_long_is_refused(sizes):
    i = next(i for i, size in enumerate(sizes) if size > 4)
    many = sum(size > 4 for size in sizes)
    found = failure(Sequences, tokens_of(sizes), 4, "refuse", "some.txt")
    assert found == (
        f"some.txt: document {i} has {sizes[i]} tokens, more than the 4 of a sequence ({many} are too long); "
        "long_documents can be split, truncate or drop"
    )


@pytest.mark.parametrize("n, seed", [(5, 3), (7, 42)])
def test_the_order_of_each_epoch_is_a_permutation_by_numpy(n, seed):
    """A run may be resumed years later, so this never changes."""
    epochs = [np.random.default_rng([seed, epoch]).permutation(n).tolist() for epoch in range(4)]
    whole = [i for epoch in epochs for i in epoch]
    assert Order(n, seed).take(4 * n) == whole
    for position in (0, 1, n - 1, n, n + 1, 2 * n, 2 * n + 1):
        order = Order(n, seed, position)
        assert order.take(4) == whole[position : position + 4] and order.position == position + 4
    assert json.dumps(order.take(1))  # plain integers
