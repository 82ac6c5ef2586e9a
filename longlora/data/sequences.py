"""Token ids to training batches: cut and packed into sequences, dealt out in a seeded order."""

import copy

import numpy as np

from longlora.data.tokens import Tokens
from longlora.errors import UserError
from longlora.ops import IGNORE


class Sequences:
    """The training sequences of a corpus, each of 2 to `length` tokens.

    Documents shorter than a sequence are packed: joined to the next until the sequence is full.
    long_documents says what happens to longer ones: "split", "truncate", "drop" or "refuse" (UserError). A
    single token left at the very end has no target and makes no sequence. `sentence` reports what was done,
    with every token that is lost. `where` names the corpus in messages. UserError if no sequence results.
    """

    def __init__(self, tokens: Tokens, length: int, long_documents: str = "split", where: str = "data"):
        self.tokens, self.length = tokens, length
        sizes = np.diff(tokens.borders)
        long = int((sizes > length).sum())
        if long and long_documents == "refuse":
            i = int(np.argmax(sizes > length))
            raise UserError(
                f"{where}: document {i} has {int(sizes[i]):,} tokens, the sequence {length:,} ({long} such); "
                "long_documents can be split, truncate or drop"
            )
        self.pieces: list[list[tuple[int, int]]] = []  # for each sequence (first, last) in tokens.ids
        lost = self._pack(sizes, long_documents)
        if not self.pieces:
            raise UserError(f"{where}: leaves no sequence of {length} tokens")
        done = {
            "split": "split",
            "truncate": f"truncated, {lost:,} tokens lost",
            "drop": f"dropped, {lost:,} tokens lost",
        }
        self.sentence = (
            f"{len(tokens):,} documents, {int(sizes.sum()):,} tokens (shortest {int(sizes.min()):,}, median "
            f"{int(np.median(sizes)):,}, longest {int(sizes.max()):,}) -> {len(self.pieces):,} sequences of "
            f"{length:,}" + (f"; {long:,} longer documents {done.get(long_documents)}" if long else "")
        )

    def _pack(self, sizes: np.ndarray, long_documents: str) -> int:
        """Fill `pieces` from documents of these sizes -> the tokens of long documents that are lost."""
        open_, room, lost = [], self.length, 0
        for first, size in zip(self.tokens.borders[:-1].tolist(), sizes.tolist(), strict=True):
            if size > self.length and long_documents == "drop":
                lost += size
                continue
            if size > self.length and long_documents == "truncate":
                lost += size - self.length
                size = self.length
            while size:
                take = min(size, room)
                open_.append((first, first + take))
                first, size, room = first + take, size - take, room - take
                if room == 0:
                    self.pieces.append(open_)
                    open_, room = [], self.length
        if open_ and self.length - room >= 2:
            self.pieces.append(open_)
        return lost

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

    def targets(self, i: int) -> int:
        """The number of targets in sequence i: of its tokens that a token before them predicts."""
        return sum(last - first for first, last in self.pieces[i]) - 1

    def get(self, i: int) -> np.ndarray:
        """The ids of sequence i, int32 [n], n <= length."""
        return np.concatenate([np.asarray(self.tokens.ids[a:b], np.int32) for a, b in self.pieces[i]])


def batch(sequences: Sequences, indices: list[int], multiple: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The sequences `indices` as ids and targets [B,T] int32.

    Targets are the next tokens, and IGNORE where there is none. T is the length of the longest row, rounded
    up to `multiple`: a short rest of a document costs no more than its length. Shorter rows end in padding.
    """
    rows = [sequences.get(i) for i in indices]
    length = -(-max(map(len, rows)) // multiple) * multiple
    ids, targets = np.zeros((len(rows), length), np.int32), np.full((len(rows), length), IGNORE, np.int32)
    for row, found in enumerate(rows):
        ids[row, : len(found)] = found
        targets[row, : len(found) - 1] = found[1:]
    return ids, targets


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
