"""The choice of the next token from the logits: greedy, or drawn at random, with the usual penalties."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import numpy as np

from longlora.errors import UserError

NAN = "the model's logits are NaN"
FIRST = 1024  # tokens that are sorted first, to draw one
# name -> (lowest, highest, whether the lowest itself is allowed)
LIMITS = dict(
    temperature=(0, 100, True),
    top_k=(0, 1 << 31, True),
    top_p=(0, 1, False),
    min_p=(0, 1, True),
    repetition_penalty=(0, 100, False),
    presence_penalty=(-2, 2, True),
    frequency_penalty=(-2, 2, True),
)


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The names are those of transformers' GenerationConfig and of OpenAI's API.

    The steps, in this order: repetition, presence and frequency penalties, logit_bias, temperature, top_k,
    top_p, min_p. UserError for a value out of range.

    temperature: 0 takes the most likely token, the first one among equals.
    top_k: keep the k most likely tokens; 0 keeps all.
    top_p: keep the fewest tokens, from the most likely on, whose probabilities sum to top_p or more.
    min_p: drop tokens less likely than min_p times the most likely one.
    repetition_penalty: divides positive logits of tokens in prompt and answer, and multiplies negative ones.
    presence_penalty: is subtracted from the logits of tokens in the answer.
    frequency_penalty: is subtracted once for each time that the token is in the answer.
    logit_bias: token -> number added to its logit.
    seed: None draws differently each time.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, (low, high, inclusive) in LIMITS.items():
            value = getattr(self, name)
            kinds = int if name == "top_k" else (int, float)
            right = isinstance(value, kinds) and not isinstance(value, bool)
            if not right or not (low <= value if inclusive else low < value) or value > high:
                kind = "an integer" if name == "top_k" else "a number"
                lowest = f"from {low}" if inclusive else f"above {low}"
                raise UserError(f"{name} should be {kind} {lowest} to {high}, got {value!r}")
        seed = self.seed
        if seed is not None and (
            isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 64
        ):
            raise UserError(f"seed should be an integer from 0 to 2^64 - 1, got {seed!r}")


NAMES = tuple(f.name for f in fields(Sampling))


class Sampler:
    """Chooses the tokens of one answer. `prompt`: int [N], the tokens before it."""

    def __init__(self, sampling: Sampling, prompt: np.ndarray, vocab_size: int):
        self.sampling = sampling
        self._random = np.random.Generator(np.random.Philox(sampling.seed))
        for token in sampling.logit_bias:
            if not 0 <= token < vocab_size:
                raise UserError(f"logit_bias names token {token}, the model has tokens 0 to {vocab_size - 1}")
        self._seen = np.zeros(vocab_size, bool)
        self._seen[np.asarray(prompt, np.int64)] = True
        self._counts = np.zeros(vocab_size, np.int64)

    def choose(self, logits: np.ndarray) -> int:
        """Choose the next token by `logits`, float32 [V], and count it. UserError for a NaN."""
        s, x = self.sampling, logits.astype(np.float64)
        if np.isnan(x).any():
            raise UserError(NAN)
        if s.repetition_penalty != 1:
            seen = x[self._seen]
            x[self._seen] = np.where(seen > 0, seen / s.repetition_penalty, seen * s.repetition_penalty)
        if s.presence_penalty or s.frequency_penalty:
            x -= s.presence_penalty * (self._counts > 0) + s.frequency_penalty * self._counts
        for token, bias in s.logit_bias.items():
            x[token] += bias
        token = int(x.argmax()) if s.temperature == 0 else self._draw(x / s.temperature)
        self._seen[token] = True
        self._counts[token] += 1
        return token

    def _draw(self, x):
        """Draw from the softmax of x, after top_k, top_p and min_p. Equal logits: the first token first.

        Sorting a whole vocabulary is slow. So only the likeliest tokens are sorted, as many as decide the
        draw.
        """
        s, drawn = self.sampling, self._random.random()
        most = min(s.top_k or len(x), len(x))
        size, enough = most if s.top_k else min(FIRST, most), False
        while not enough:
            order = largest(x, size)
            p = np.exp(x[order] - x[order[0]])
            p /= p.sum() if size == most else np.exp(x - x[order[0]]).sum()
            sums, least = np.cumsum(p), s.min_p * p[0]
            plain = s.top_p == 1 and not s.min_p and size < most
            enough = size == most or p[-1] < least or sums[-1] > (drawn if plain else s.top_p)
            size = min(8 * size, most)
        if s.top_p < 1:
            order = order[: int(np.searchsorted(sums, s.top_p)) + 1]
            p = p[: len(order)]
        if s.min_p:
            order, p = order[p >= least], p[p >= least]
        whole = 1.0 if plain else p.sum()
        place = int(np.searchsorted(np.cumsum(p), drawn * whole, "right"))
        return int(order[min(place, len(p) - 1)])


def largest(x: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` largest numbers, int64 [count], the largest first; of equals the first ones."""
    if count < len(x):
        found = np.flatnonzero(x >= np.partition(x, len(x) - count)[len(x) - count])
        return found[np.argsort(-x[found], kind="stable")[:count]]
    return np.argsort(-x, kind="stable")


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """The natural logarithms of the softmax of `logits`, float32 [...,V] -> float64."""
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))
