"""The log-likelihood of continuations of contexts. The beginning that texts share is computed once."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from longlora.decoder.cache import common
from longlora.decoder.generate import Generator
from longlora.decoder.sampling import NAN
from longlora.errors import UserError

Pair = tuple[np.ndarray, np.ndarray]  # context and continuation, int32 [N] and [M] with N, M >= 1
Asked = tuple[int, int, int]  # a place, a token that may come after it, and the number of the request


@dataclass
class _Text:
    """Tokens to read, and what is asked."""

    ids: np.ndarray
    asked: list[Asked] = field(default_factory=list)


class Scorer:
    """Scores continuations by `generator`, in the rows of its cache.

    Requests are sorted by their tokens, and the cache holds the last context. So each token of a prefix that
    requests share is read once. The continuations of one context are read side by side in the rows, and so
    are short contexts that begin alike.
    """

    def __init__(self, generator: Generator):
        self._generator, self._cache = generator, generator.cache
        self._held = [np.zeros(0, np.int32) for _ in range(self._cache.rows)]  # the tokens of each row

    def score(
        self, pairs: Sequence[Pair], done: Callable[[int], object] = lambda count: None
    ) -> list[tuple[float, bool]]:
        """Score each continuation after its context.

        pairs: together, without the last token, a pair fits in a row of the cache.
        done: is called with the number of pairs that were scored since the last call.
        Returns for each the sum of the log-probabilities of its tokens, in nats, and whether each of them is
        the likeliest one. UserError for logits that are NaN.
        """
        self._logs, self._best = np.zeros(len(pairs)), np.ones(len(pairs), bool)
        for trunk, tails, count in _joined(_grouped(pairs), self._generator.chunk // 2):
            self._read(trunk)
            for part in self._side_by_side(tails):
                self._branch(trunk.ids, part)
            done(count)
        return [(float(logs), bool(best)) for logs, best in zip(self._logs, self._best, strict=True)]

    def _read(self, text):
        """Read a text into row 0, from where it differs from what the row holds or from what is asked."""
        ids, chunk = text.ids, self._generator.chunk
        first = min([common(self._held[0], ids), *(place for place, _, _ in text.asked)])
        self._cache.keep(0, first)
        self._held[0] = ids[:first]
        for start in range(first, len(ids), chunk):
            stop = min(start + chunk, len(ids))
            asked = [one for one in text.asked if start <= one[0] < stop]
            self._score([0], ids[None, start:stop], _moved(asked, -start))
        self._held[0] = ids

    def _side_by_side(self, tails: list[_Text]) -> Iterator[list[_Text]]:
        """Cut tails, the longest first, into parts that are read in one pass."""
        while tails:
            size = max(1, min(self._cache.rows, self._generator.chunk // len(tails[0].ids)))
            yield tails[:size]
            tails = tails[size:]

    def _branch(self, trunk, tails):
        """Read tails after the trunk, which row 0 holds."""
        if len(tails) == 1:
            (tail,), count = tails, len(trunk)
            asked = _moved(tail.asked, count)
            self._read(_Text(np.concatenate([trunk, tail.ids]), asked))
            return
        rows, width = range(len(tails)), len(tails[0].ids)
        self._held[0] = trunk
        for row in rows:
            have = common(self._held[row], trunk)
            self._cache.keep(row, have)
            if have < len(trunk):
                self._cache.copy(0, row, have, len(trunk))
            self._held[row] = trunk
        ids, asked = np.zeros((len(tails), width), np.int32), []
        for row, tail in zip(rows, tails, strict=True):
            ids[row, : len(tail.ids)] = tail.ids
            asked += _moved(tail.asked, row * width)
        self._score(list(rows), ids, asked)

    def _score(self, rows, ids, asked):
        places, targets, requests = np.array(asked, np.int64).reshape(-1, 3).T
        logs, best = self._generator.score(rows, ids, places, targets)
        if np.isnan(logs).any():
            raise UserError(NAN)
        np.add.at(self._logs, requests, logs)
        np.logical_and.at(self._best, requests, best)


def _moved(asked: list[Asked], by: int) -> list[Asked]:
    return [(place + by, target, request) for place, target, request in asked]


def _grouped(pairs: Sequence[Pair]) -> Iterator[tuple[_Text, list[_Text], int]]:
    """Sort requests by their tokens, and join those of one context -> trunk, tails, number of requests.

    The trunk is the context; the tails are the different continuations, the longest first, without their last
    tokens. A single tail is part of the trunk.
    """
    inputs = [np.concatenate([context, rest[:-1]]).astype(np.int32) for context, rest in pairs]
    order = sorted(range(len(pairs)), key=lambda i: inputs[i].astype(">i4").tobytes())
    for _, group in itertools.groupby(order, lambda i: pairs[i][0].tobytes()):
        members = list(group)
        trunk, tails = _Text(pairs[members[0]][0]), dict[bytes, _Text]()
        count = len(trunk.ids)
        for i in members:
            rest = pairs[i][1]
            trunk.asked.append((count - 1, int(rest[0]), i))
            if len(rest) > 1:
                tail = tails.setdefault(rest[:-1].tobytes(), _Text(rest[:-1]))
                tail.asked += [(place, int(target), i) for place, target in enumerate(rest[1:])]
        if len(tails) == 1:
            (tail,) = tails.values()
            trunk.ids = np.concatenate([trunk.ids, tail.ids])
            trunk.asked += _moved(tail.asked, count)
            tails = {}
        yield trunk, sorted(tails.values(), key=lambda text: -len(text.ids)), len(members)


def _joined(
    groups: Iterable[tuple[_Text, list[_Text], int]], longest: int
) -> Iterator[tuple[_Text, list[_Text], int]]:
    """Join contexts of choices of one token: what they share is a trunk, and what each has more is a tail.

    A few rows take nearly as long as many. Tails have at most `longest` tokens, and what they read again of a
    longer beginning that some of them share is at most an eighth of them.
    """
    joined, shared = list[tuple[_Text, int]](), 0
    for trunk, tails, count in groups:
        if joined:
            texts = [trunk, *(text for text, _ in joined)]
            start = min([common(joined[0][0].ids, trunk.ids), *map(_first, texts)])
            sizes = [len(text.ids) - start for text in texts]
            again = (shared - start) * len(joined) if len(joined) > 1 else 0
            if not tails and max(sizes) <= longest and 8 * again <= sum(sizes):
                joined.append((trunk, count))
                shared = start
                continue
            yield _branched(joined, shared)
            joined = []
        if tails:
            yield trunk, tails, count
        else:
            joined, shared = [(trunk, count)], _first(trunk)
    if joined:
        yield _branched(joined, shared)


def _first(text: _Text) -> int:
    """The first place after which something is asked."""
    return min(place for place, _, _ in text.asked)


def _branched(joined: list[tuple[_Text, int]], shared: int) -> tuple[_Text, list[_Text], int]:
    """The trunk, the tails and the number of requests of contexts that share their first tokens."""
    if len(joined) == 1:
        return joined[0][0], [], joined[0][1]
    tails = [_Text(text.ids[shared:], _moved(text.asked, -shared)) for text, _ in joined]
    trunk = _Text(joined[0][0].ids[:shared])
    return trunk, sorted(tails, key=lambda text: -len(text.ids)), sum(count for _, count in joined)
