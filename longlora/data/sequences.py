"""Token ids to training batches: cut and packed into sequences, dealt out in a seeded order."""

import bisect
import copy
from collections.abc import Iterable

import numpy as np

from longlora.data.tokens import Tokens
from longlora.errors import UserError, counted
from longlora.ops import IGNORE


class Sequences:
    """The training sequences of a corpus, each of 2 to `length` tokens.

    Documents shorter than a sequence are packed: joined to the next until the sequence is full.
    long_documents says what happens to longer ones: "split", "truncate", "drop" or "refuse" (UserError).

    packing_boundaries says whether the documents of a sequence see each other. "none": a sequence is one
    text; a single token left at the very end has no target and makes no sequence. "document": every document
    is a text of its own, and its last token has no target; a piece of a single token is left out.

    Of instructions (tokens.learned is given) only the tokens of answers are targets. Those that do not see
    each other stay whole: each goes into the sequence where it leaves the least room. A sequence without a
    target is left out.

    `pieces` holds (first, last) in tokens.ids for every document's part of every sequence. `sentence` reports
    what was done, with the number of lost tokens. `where` names the corpus in messages. UserError if no
    sequence results.
    """

    def __init__(
        self,
        tokens: Tokens,
        length: int,
        long_documents: str = "split",
        where: str = "data",
        packing_boundaries: str = "none",
    ):
        self.tokens, self.length, self.apart = tokens, length, packing_boundaries == "document"
        self.what = "document" if tokens.learned is None else "sample"
        sizes = np.diff(tokens.borders)
        long = int((sizes > length).sum())
        if long and long_documents == "refuse":
            i = int(np.argmax(sizes > length))
            raise UserError(
                f"{where}: {f'document {i}' if tokens.learned is None else f'record {i + 1}'} has "
                f"{int(sizes[i]):,} tokens, more than the {length:,} of a sequence ({long} are too long); "
                "long_documents can be split, truncate or drop"
            )
        self.pieces: list[list[tuple[int, int]]] = []
        whole = self.apart and tokens.learned is not None
        lost, single = (self._pack_whole if whole else self._pack)(sizes, long_documents)
        made = len(self.pieces)
        if tokens.learned is not None:
            self.pieces = [piece for piece in self.pieces if self._count(piece)]
        if not self.pieces:
            raise UserError(f"{where}: leaves no sequence of {length} tokens")
        self.sentence = self._describe(sizes, long, long_documents, lost, single, made - len(self.pieces))

    def _describe(self, sizes, long, long_documents, lost, single, silent):
        done = {
            "split": "split",
            "truncate": f"truncated, {counted(lost, 'token')} lost",
            "drop": f"dropped, {counted(lost, 'token')} lost",
        }
        learned = ""
        if self.tokens.learned is not None:
            learned = f"{sum(map(self._count, self.pieces)):,} of them targets, "
        sentence = (
            f"{counted(len(self.tokens), self.what)}, {int(sizes.sum()):,} tokens ({learned}shortest "
            f"{int(sizes.min()):,}, median {int(np.median(sizes)):,}, longest {int(sizes.max()):,}) -> "
            f"{counted(len(self.pieces), 'sequence')} of {self.length:,}"
        )
        sentence += f"; {counted(long, f'longer {self.what}')} {done.get(long_documents)}" if long else ""
        if self.apart:
            sentence += f"; {self.what}s do not see each other"
            sentence += f", {counted(single, 'single token')} left out" if single else ""
        return sentence + (f"; {counted(silent, 'sequence')} without a target left out" if silent else "")

    def _pack(self, sizes: np.ndarray, long_documents: str) -> tuple[int, int]:
        """Fill `pieces` -> the lost tokens of long documents, the single tokens left out."""
        open_, room, lost, single = [], self.length, 0, 0
        least = 2 if self.apart else 1  # the smallest piece
        for first, size in zip(self.tokens.borders[:-1].tolist(), sizes.tolist()):
            if size > self.length and long_documents == "drop":
                lost += size
                continue
            if size > self.length and long_documents == "truncate":
                lost += size - self.length
                size = self.length
            while size >= least:
                take = min(size, room)
                open_.append((first, first + take))
                first, size, room = first + take, size - take, room - take
                if room < least:
                    self.pieces.append(open_)
                    open_, room = [], self.length
            single += size
        if self.length - room >= 2:
            self.pieces.append(open_)
        return lost, single

    def _pack_whole(self, sizes: np.ndarray, long_documents: str) -> tuple[int, int]:
        """As _pack, but each document is whole in one sequence, or each part of one that is split."""
        rooms: list[tuple[int, int]] = []  # the room left in a sequence, and its number; rising
        lost = single = 0
        for first, size in zip(self.tokens.borders[:-1].tolist(), sizes.tolist()):
            last = first + size
            if size > self.length and long_documents != "split":
                last = first + (self.length if long_documents == "truncate" else 0)
                lost += first + size - last
            while last - first >= 2:
                take = min(last - first, self.length)
                at = bisect.bisect_left(rooms, (take, 0))
                room, i = rooms.pop(at) if at < len(rooms) else (self.length, len(self.pieces))
                if i == len(self.pieces):
                    self.pieces.append([])
                self.pieces[i].append((first, first + take))
                if room - take >= 2:
                    bisect.insort(rooms, (room - take, i))
                first += take
            single += last - first
        return lost, single

    def __len__(self) -> int:
        return len(self.pieces)

    def hold_out(self, fraction: float) -> "Sequences":
        """Take the last `fraction` of the sequences, at least one, away -> Sequences of their own."""
        count = max(1, round(fraction * len(self.pieces)))
        if count >= len(self.pieces):
            raise UserError(
                f"eval_fraction {fraction:g} of {len(self.pieces)} sequences leaves none to train on"
            )
        other = copy.copy(self)
        self.pieces, other.pieces = self.pieces[:-count], self.pieces[-count:]
        return other

    def get(self, i: int) -> np.ndarray:
        """The ids of sequence i, int32 [n], n <= length."""
        return np.concatenate(self._parts(i))

    def texts(self, i: int) -> list[np.ndarray]:
        """The ids of sequence i, int32, cut where a text ends that the next does not see."""
        return self._parts(i) if self.apart else [self.get(i)]

    def _parts(self, i: int) -> list[np.ndarray]:
        return [np.asarray(self.tokens.ids[a:b], np.int32) for a, b in self.pieces[i]]

    def labels(self, i: int) -> list[np.ndarray]:
        """The target of each token of texts(i), int32: the next token of the same text, or IGNORE."""
        found = []
        for text, learned in zip(self.texts(i), self._learned(self.pieces[i]), strict=True):
            after = np.append(text[1:], np.int32(IGNORE))
            found.append(after if learned is None else np.where(np.append(learned[1:], False), after, IGNORE))
        return found

    def _learned(self, piece):
        """Which tokens of the texts of a sequence may be targets, bool; None for a text where all may."""
        parts: list = [None] * (len(piece) if self.apart else 1)
        if self.tokens.learned is not None:
            parts = [self.tokens.learned[a:b].astype(bool) for a, b in piece]
            parts = parts if self.apart else [np.concatenate(parts)]
        return parts

    def _count(self, piece):
        return sum(int(np.count_nonzero(learned[1:])) for learned in self._learned(piece))

    def targets(self, i: int) -> int:
        """The number of tokens in sequence i that another token predicts and the loss counts."""
        if self.tokens.learned is not None:
            return self._count(self.pieces[i])
        return self.size(i) - (len(self.pieces[i]) if self.apart else 1)

    def size(self, i: int) -> int:
        """The number of tokens in sequence i."""
        return sum(last - first for first, last in self.pieces[i])


def batch(
    sequences: Sequences, indices: Iterable[int], multiple: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """The sequences `indices` as a batch -> ids, targets, cu_seqlens.

    ids and targets [B,T] are int32; the targets are those of Sequences.labels. T is the length of the longest
    row, rounded up to `multiple`: a short rest of a document costs no more than its length. Shorter rows end
    in padding.

    cu_seqlens is None if every row is one text. Otherwise (packing_boundaries "document") it holds the
    boundaries of the documents among the B*T tokens, int32 [S], from 0 to B*T. Padding forms pieces of its
    own.
    """
    rows = [list(zip(sequences.texts(i), sequences.labels(i))) for i in indices]
    lengths = [sum(len(text) for text, _ in row) for row in rows]
    T = -(-max(lengths) // multiple) * multiple
    ids, targets = np.zeros((len(rows), T), np.int32), np.full((len(rows), T), IGNORE, np.int32)
    starts = []
    for row, texts in enumerate(rows):
        first = 0
        for text, labels in texts:
            last = first + len(text)
            ids[row, first:last] = text
            targets[row, first:last] = labels
            starts.append(row * T + first)
            first = last
        if first < T:
            starts.append(row * T + first)
    return ids, targets, np.array([*starts, len(rows) * T], np.int32) if sequences.apart else None


class Order:
    """Endless seeded permutations of 0..n-1.

    `position`, how many numbers were taken, alone determines what comes next, so resuming is exact.
    """

    def __init__(self, n: int, seed: int, position: int = 0):
        self.n, self.seed, self.position, self._epoch = n, seed, position, -1

    def take(self, count: int) -> list[int]:
        """The next `count` numbers."""
        out = []
        for _ in range(count):
            epoch, place = divmod(self.position, self.n)
            if epoch != self._epoch:
                random = np.random.default_rng([self.seed, epoch])
                self._epoch, self._places = epoch, random.permutation(self.n)
            out.append(int(self._places[place]))
            self.position += 1
        return out
