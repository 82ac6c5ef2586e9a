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
Tail = tuple[int, "_Text"]  # the index of a parent, and a text that continues it


@dataclass
class _Text:
    """Tokens to read, what is asked about them, and texts that continue them."""

    ids: np.ndarray
    asked: list[Asked] = field(default_factory=list)
    tails: list["_Text"] = field(default_factory=list)


class Scorer:
    """Scores continuations by `generator`, in the rows of its cache.

    Requests are sorted by their tokens, and the cache holds the last context. So each token of a prefix that
    requests share is read once. Short contexts that begin alike are read side by side in the rows, and then
    the continuations of them all.
    """

    def __init__(self, generator: Generator):
        self._generator, self._cache = generator, generator.cache
        self._held = [np.zeros(0, np.int32) for _ in range(self._cache.rows)]  # the tokens of each row

    def score(
        self, pairs: Sequence[Pair], done: Callable[[int], object] = lambda count: None
    ) -> list[tuple[float, bool]]:
        """Score each continuation after its context.

        pairs: together, without the last token, a pair fits in a row of the cache.
        done: is called after each pass that completes pairs, with the number of these pairs.
        Returns for each the sum of the log-probabilities of its tokens, in nats, and whether each of them is
        the likeliest one. UserError for logits that are NaN.
        """
        self._logs, self._best = np.zeros(len(pairs)), np.ones(len(pairs), bool)
        self._left, self._done = np.array([len(rest) for _, rest in pairs]), done  # tokens to score
        for trunk in _joined(_grouped(pairs), self._generator.chunk // 2):
            self._read(0, trunk)
            self._branch([trunk.ids], [(0, tail) for tail in trunk.tails])
        return [(float(logs), bool(best)) for logs, best in zip(self._logs, self._best, strict=True)]

    def _read(self, row, text):
        """Read a text into a row. Tokens that the row holds are kept, up to the first that is asked about."""
        ids, chunk = text.ids, self._generator.chunk
        first = min([common(self._held[row], ids), *(place for place, _, _ in text.asked)])
        self._keep(row, ids[:first])
        for start in range(first, len(ids), chunk):
            stop = min(start + chunk, len(ids))
            asked = [one for one in text.asked if start <= one[0] < stop]
            self._score([row], ids[None, start:stop], _moved(asked, -start))
        self._held[row] = ids

    def _branch(self, parents, tails):
        """Read tails after their parents: (i, tail) after parents[i], which row i holds."""
        for part in self._side_by_side(parents, tails):
            heads = [np.concatenate([parents[i], tail.ids]) for i, tail in part]
            if len(part) == 1:
                ((row, tail),) = part
                self._read(row, _Text(heads[0], _moved(tail.asked, len(parents[row]))))
            else:
                self._read_part(parents, part, heads)
            leaves = [
                (len(leaf.ids), n, (row, leaf))
                for row, (_, tail) in enumerate(part)
                for n, leaf in enumerate(tail.tails)
            ]
            self._branch(heads, [leaf for *_, leaf in sorted(leaves, key=lambda x: (-x[0], x[1]))])

    def _side_by_side(self, parents: list[np.ndarray], tails: list[Tail]) -> Iterator[list[Tail]]:
        """Cut tails, the longest first, into parts that are read in one pass.

        The first tail of a parent in a part takes its row; each further one needs a row beyond the parents'.
        All rows of a part grow by as many tokens as its longest tail has.
        """
        part = list[Tail]()
        for row, tail in tails:
            if part:
                width, used = len(part[0][1].ids), [row, *(other for other, _ in part)]
                further = len(used) - len(set(used))
                if (
                    width * len(used) > self._generator.chunk
                    or further > self._cache.rows - len(parents)
                    or width + max(len(parents[i]) for i in used) > self._cache.places
                ):
                    yield part
                    part = []
            part.append((row, tail))
        if part:
            yield part

    def _read_part(self, parents, part, heads):
        """Read tails after their parents in one pass. With a single parent, tail n goes to row n."""
        spare, rows, width = len(parents), list[int](), len(part[0][1].ids)
        ids, asked = np.zeros((len(part), width), np.int32), []
        for n, (source, tail) in enumerate(part):
            row, parent = source, parents[source]
            if source in rows:
                row, spare = spare, spare + 1
            have = common(self._held[row], parent)
            self._keep(row, parent[:have])
            if have < len(parent):
                self._cache.copy(source, row, have, len(parent))
            rows.append(row)
            ids[n, : len(tail.ids)] = tail.ids
            asked += _moved(tail.asked, n * width)
        self._score(rows, ids, asked)
        for row, head in zip(rows, heads, strict=True):
            self._held[row] = head

    def _keep(self, row, ids):
        """Forget all tokens of a row but these first ones."""
        self._cache.keep(row, len(ids))
        self._held[row] = ids

    def _score(self, rows, ids, asked):
        places, targets, requests = np.array(asked, np.int64).reshape(-1, 3).T
        logs, best = self._generator.score(rows, ids, places, targets)
        if np.isnan(logs).any():
            raise UserError(NAN)
        np.add.at(self._logs, requests, logs)
        np.logical_and.at(self._best, requests, best)
        np.subtract.at(self._left, requests, 1)
        finished = int((self._left[np.unique(requests)] == 0).sum())
        if finished:
            self._done(finished)


def _moved(asked: list[Asked], by: int) -> list[Asked]:
    return [(place + by, target, request) for place, target, request in asked]


def _grouped(pairs: Sequence[Pair]) -> Iterator[_Text]:
    """Sort requests by their tokens, and join those of one context -> the contexts.

    Tails are the different continuations, without their last tokens. A single one is part of the context.
    """
    inputs = [np.concatenate([context, rest[:-1]]).astype(np.int32) for context, rest in pairs]
    order = sorted(range(len(pairs)), key=lambda i: inputs[i].astype(">i4").tobytes())
    for _, group in itertools.groupby(order, lambda i: pairs[i][0].tobytes()):
        members = list(group)
        text, tails = _Text(pairs[members[0]][0]), dict[bytes, _Text]()
        count = len(text.ids)
        for i in members:
            rest = pairs[i][1]
            text.asked.append((count - 1, int(rest[0]), i))
            if len(rest) > 1:
                tail = tails.setdefault(rest[:-1].tobytes(), _Text(rest[:-1]))
                tail.asked += [(place, int(target), i) for place, target in enumerate(rest[1:])]
        if len(tails) == 1:
            (tail,) = tails.values()
            text.ids = np.concatenate([text.ids, tail.ids])
            text.asked += _moved(tail.asked, count)
        else:
            text.tails = _longest_first(tails.values())
        yield text


def _joined(texts: Iterable[_Text], longest: int) -> Iterator[_Text]:
    """Join short contexts: what they share is a trunk, and what each has more is a tail of it.

    A pass over many tokens takes less time per token than one over few. A tail has at most `longest` tokens.
    Where only some contexts share a longer beginning, each reads it again: at most an eighth of what is read.
    """
    joined = list[_Text]()
    shared = asked = most = total = 0  # asked: the first place that is asked about
    for text in texts:
        size, first = len(text.ids), min(place for place, _, _ in text.asked)
        if joined:
            start = min(common(joined[0].ids, text.ids), asked, first)
            again = (shared - start) * len(joined) if len(joined) > 1 else 0
            read = total + size - start * (len(joined) + 1)
            if max(most, size) - start <= longest and 8 * again <= read:
                joined.append(text)
                shared, asked, most, total = start, min(asked, first), max(most, size), total + size
                continue
            yield _branched(joined, shared)
        joined, shared, asked, most, total = [text], first, first, size, size
    if joined:
        yield _branched(joined, shared)


def _branched(texts: list[_Text], shared: int) -> _Text:
    """Join texts that share their first `shared` tokens -> these tokens, with the rest of each as a tail."""
    if len(texts) == 1:
        return texts[0]
    tails = [_Text(text.ids[shared:], _moved(text.asked, -shared), text.tails) for text in texts]
    return _Text(texts[0].ids[:shared], tails=_longest_first(tails))


def _longest_first(texts: Iterable[_Text]) -> list[_Text]:
    return sorted(texts, key=lambda text: -len(text.ids))
