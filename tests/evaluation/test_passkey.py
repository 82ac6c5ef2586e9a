"""longlora eval passkey: prompts, answers, and their judgement."""

import json

import numpy as np
import pytest
import tiny

import longlora
from longlora import cli
from longlora.decoder.cache import Cache
from longlora.decoder.generate import Generator
from longlora.decoder.model import Model
from longlora.evaluation import passkey
from longlora.evaluation.reader import Reader
from longlora.files.open_model import open_model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(tiny.model(tmp_path_factory.mktemp("passkey") / "base", max_position_embeddings=1024))


def test_the_prompt_is_the_authors(base):
    """The tokenizer has one token per byte, so the prompt has as many bytes as tokens."""
    tokenizer = open_model(base).tokenizer()
    garbage = (
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. " * 20
    )
    for length, depth in ((700, 0.0), (700, 0.25), (701, 1.0)):
        ids, text = passkey.make_prompt(tokenizer, length, depth, 40213)
        filler = length - 247  # bytes of the other lines
        before = round(filler * depth)
        lines = [
            "There is an important info hidden inside a lot of irrelevant text. Find it and "
            "memorize them. I will quiz you about the important information there.",
            garbage[:before],
            "The pass key is 40213. Remember it. 40213 is the pass key.",
            garbage[: filler - before],
            "What is the pass key? The pass key is",
        ]
        assert text == "\n".join(lines) and len(text) == length
        np.testing.assert_array_equal(ids, list(text.encode()))


@pytest.mark.parametrize(
    "answer, hit",
    [
        (" 123.", True),
        ("123", True),
        (" 1234", False),
        (" 12", False),
        (": 123 and 9", True),
        ("9 123", False),
        ("", False),
    ],
)
def test_the_first_number_of_the_answer_counts(answer, hit):
    assert passkey.right(answer, 123) is hit


def test_what_prompts_share_is_read_once_and_changes_no_bit(base):
    opened = open_model(base)
    model = Model(opened.config).load(opened)
    random = np.random.default_rng(0)
    stem = random.integers(0, 256, 40).astype(np.int32)
    tails = [random.integers(0, 256, n).astype(np.int32) for n in (5, 23, 9)]
    prompts = [np.concatenate([stem, tail]) for tail in tails]
    alone = []
    for prompt in prompts:
        reader = Reader(Generator(model, Cache(opened.config, 1, 80), chunk=16))
        alone.append(reader.extend(0, prompt))
        assert (reader.read, reader.reused) == (len(prompt), 0)
    reader = Reader(Generator(model, Cache(opened.config, 2, 80), chunk=16))
    for row, prompt, logits in zip((0, 1, 0), prompts, alone, strict=True):
        np.testing.assert_array_equal(reader.extend(row, prompt), logits)
    assert (reader.read, reader.reused) == (45 + 31 + 17, 2 * 32)


def test_the_command_and_the_function_agree(base, capsys):
    words = "--lengths 400,500 --depths 0,1 --samples 2 --device cpu --json"
    assert cli.main(["eval", "passkey", "--model", base, *words.split()]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == longlora.eval.passkey(base, lengths=[400, 500], depths=[0, 1], samples=2, device="cpu")
    assert [(r["length"], r["depth"], r["samples"]) for r in found["results"]] == [
        (400, 1.0, 2),
        (400, 0.0, 2),
        (500, 1.0, 2),
        (500, 0.0, 2),
    ]
