"""Greedy answers to prompts side by side. The beginning that prompts share is computed once."""

from collections.abc import Sequence

import numpy as np

from longlora.decoder.cache import common
from longlora.decoder.generate import Generator
from longlora.decoder.sampling import Sampler, Sampling


class Reader:
    """Reads prompts into the rows of a generator's cache.

    A row takes over what any row still holds of its prompt, in whole chunks. So a prompt is cut into the same
    passes as without, and its logits have the same bits.

    read: how many tokens went through the model. reused: how many did not have to.
    """

    def __init__(self, generator: Generator):
        self._generator, self._cache = generator, generator.cache
        self._held = [np.zeros(0, np.int32) for _ in range(self._cache.rows)]
        self.read = self.reused = 0

    def extend(self, row: int, prompt: np.ndarray) -> np.ndarray:
        """Make `row` hold the tokens `prompt`, int32 [N] with N >= 1 -> logits of the next token, [V]."""
        chunk, cache = self._generator.chunk, self._cache
        # The last token is read in any case: its logits choose the next one.
        shared = [common(held, prompt[:-1]) // chunk * chunk for held in self._held]
        source = max(range(cache.rows), key=lambda other: (shared[other], other == row))
        own, kept = shared[row], shared[source]
        cache.keep(row, own)
        self._held[row] = prompt[:own]
        if kept > own:
            cache.copy(source, row, own, kept)
        logits = self._generator.extend(row, prompt[kept:])
        self._held[row] = prompt
        self.read, self.reused = self.read + len(prompt) - kept, self.reused + kept
        return logits

    def answers(
        self, prompts: Sequence[np.ndarray], count: int, end: frozenset[int] = frozenset()
    ) -> list[list[int]]:
        """The likeliest `count` tokens after each prompt, one by one, or fewer up to a token of `end`.

        UserError if the logits are NaN.
        """
        found = []
        for start in range(0, len(prompts), self._cache.rows):
            found += self._side_by_side(prompts[start : start + self._cache.rows], count, end)
        return found

    def _side_by_side(self, prompts, count, end):
        vocab = self._generator.model.config.vocab_size
        choose = Sampler(Sampling(), prompts[0], vocab).choose
        answers = [[choose(self.extend(row, prompt))] for row, prompt in enumerate(prompts)]
        while going := [row for row, ids in enumerate(answers) if len(ids) < count and ids[-1] not in end]:
            logits = self._generator.step(going, [answers[row][-1] for row in going])
            for row, scores in zip(going, logits, strict=True):
                answers[row].append(choose(scores))
        return [ids[:-1] if ids[-1] in end else ids for ids in answers]
