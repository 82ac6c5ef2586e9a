"""Fakes that the tests of passkey and of topics share."""

import numpy as np

from longlora.evaluation import retrieval


class Words:
    """A tokenizer with one token per word. calls: the number of texts that it has encoded."""

    def __init__(self):
        self.calls = 0

    def encode(self, text):
        self.calls += 1
        return np.arange(len(text.split()), dtype=np.int32)

    def encode_parts(self, texts):
        return [self.encode(text) for text in texts]


def fake_measure(monkeypatch, cells):
    """Let retrieval.measure return `cells` as results. Returns a list that records its calls."""
    calls = []

    def measure(task, *model, **how):
        calls.append((task, model, how))
        return dict(results=[dict(cell) for cell in cells])

    monkeypatch.setattr(retrieval, "measure", measure)
    return calls
