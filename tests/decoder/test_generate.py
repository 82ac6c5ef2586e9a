"""Passes over a cache give transformers' logits: prompts in chunks, several sequences, four families."""

import numpy as np
import pytest
import torch
from test_weights import build

from longlora.decoder.cache import Cache
from longlora.decoder.generate import Generator
from longlora.decoder.model import Model
from longlora.files.open_model import open_model


def opened(tmp_path, family, rows=3, places=200, chunk=32, dtype="float32", **fields):
    """A small model of the family in transformers, and ours with an empty cache."""
    theirs = build(tmp_path / "base", family, **fields)
    base = open_model(tmp_path / "base")
    made = Model(base.config, dtype=dtype).load(base)
    return theirs.float().eval(), Generator(made, Cache(base.config, rows, places, dtype), chunk)


def prompts(vocab_size, *lengths):
    random = np.random.default_rng(0)
    return [random.integers(0, vocab_size, n).astype(np.int32) for n in lengths]


@torch.no_grad()
def reference(theirs, ids):
    return theirs(torch.tensor(ids)[None].long()).logits[0, -1].numpy()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "phi3", "granite", "smollm3"])
def test_prompts_and_steps_have_the_logits_of_transformers(tmp_path, family):
    """Prompts are longer or shorter than a chunk. Then all rows take steps, in another order."""
    theirs, generator = opened(tmp_path, family)
    rows = prompts(theirs.config.vocab_size, 70, 1, 33)
    for row, ids in enumerate(rows):
        np.testing.assert_allclose(generator.extend(row, ids), reference(theirs, ids), atol=2e-4)
    for step in range(3):
        order, new = [2, 0, 1], [int(x) for x in prompts(theirs.config.vocab_size, 3)[0] + step]
        found = generator.step(order, new)
        for row, token, logits in zip(order, new, found, strict=True):
            rows[row] = np.append(rows[row], np.int32(token))
            np.testing.assert_allclose(logits, reference(theirs, rows[row]), atol=2e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_greedy_tokens_equal_those_of_transformers(tmp_path, family):
    """They may differ from the first step where the two best logits are closer than the error of a pass."""
    theirs, generator = opened(tmp_path, family)
    (prompt,) = prompts(theirs.config.vocab_size, 20)
    with torch.no_grad():
        out = theirs.generate(
            torch.tensor(prompt)[None].long(),
            max_new_tokens=30,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            eos_token_id=None,
            pad_token_id=0,
        )
    logits = generator.extend(0, prompt)
    for i, token in enumerate(out.sequences[0, len(prompt) :].tolist()):
        best = out.logits[i][0].topk(2).values
        if best[0] - best[1] < 1e-3:
            assert i, "the first step says nothing"
            break
        assert int(logits.argmax()) == token
        logits = generator.step([0], [token])[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sequence_has_the_same_bits_alone_and_beside_others(tmp_path, dtype):
    """Its logits do not depend on the sequences beside it, for one to sixteen of them."""
    lengths = [5, 40, 1, 17, 33, 8, 9, 21, 30, 2, 3, 4, 6, 7, 11, 12]
    _, generator = opened(tmp_path, "llama", rows=16, dtype=dtype)
    V = generator.model.config.vocab_size
    rows = prompts(V, *lengths)
    for row, ids in enumerate(rows):
        generator.extend(row, ids)
    together = generator.step(list(range(16)), [int(ids[0]) for ids in rows])
    for row in (0, 1, 15):
        generator.cache.lengths[row] = len(rows[row])
        np.testing.assert_array_equal(generator.step([row], [int(rows[row][0])])[0], together[row])


def test_a_cache_forgets_the_last_tokens(tmp_path):
    theirs, generator = opened(tmp_path, "llama")
    (ids,) = prompts(theirs.config.vocab_size, 50)
    first = generator.extend(0, ids)
    generator.cache.lengths[0] = 32  # the state after the first chunk
    np.testing.assert_array_equal(generator.extend(0, ids[32:]), first)


def test_a_full_row_refuses_a_token(tmp_path):
    _, generator = opened(tmp_path, "llama", places=10)
    generator.extend(1, prompts(50, 9)[0])
    generator.step([1], [3])
    with pytest.raises(ValueError, match="a sequence of 11 tokens does not fit its row of 10 places"):
        generator.step([1], [3])
