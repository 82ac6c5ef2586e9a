"""longlora eval passkey: prompts, answers and their judgement, and the file of results."""

import json
import random
import shutil

import numpy as np
import pytest
import tiny

import longlora
from longlora import cli
from longlora.decoder.cache import Cache
from longlora.decoder.generate import Generator
from longlora.decoder.model import Model
from longlora.errors import UserError
from longlora.evaluation import passkey, retrieval
from longlora.evaluation.reader import Reader
from longlora.files.open_model import open_model
from longlora.serving.open import Prepared

HOW = dict(device="cpu", say=lambda line: None)
GARBAGE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. " * 20
FIXED = 247  # bytes of the prompt without filler, with a key of five digits


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Its tokenizer has one token per byte."""
    return str(tiny.model(tmp_path_factory.mktemp("passkey") / "base", max_position_embeddings=512))


@pytest.mark.parametrize("length, depth", [(700, 0.0), (700, 0.25), (701, 1.0), (FIXED, 0.5), (248, 0.5)])
def test_the_prompt_is_the_authors(base, length, depth):
    ids, text = passkey.make_prompt(open_model(base).tokenizer(), length, depth, 40213)
    filler = length - FIXED
    before = round(filler * depth)
    lines = [
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
        "I will quiz you about the important information there.",
        GARBAGE[:before],
        "The pass key is 40213. Remember it. 40213 is the pass key.",
        GARBAGE[: filler - before],
        "What is the pass key? The pass key is",
    ]
    assert text == "\n".join(lines) and len(text) == length
    np.testing.assert_array_equal(ids, list(text.encode()))


def test_a_seed_makes_a_key_and_a_depth():
    """The keys of cells, seeds and samples are their own."""
    drawn = {
        passkey.sample_of(*x)[1] for x in ((0, 99, 0.5, 0), (1, 99, 0.5, 0), (0, 98, 0.5, 0), (0, 99, 0.5, 1))
    }
    assert len(drawn) == 4
    generator = random.Random("7 4096 random 3")
    where = generator.random()
    assert passkey.sample_of(7, 4096, "random", 3) == (where, generator.randint(1, 50000))
    assert passkey.sample_of(7, 4096, 0.25, 3)[0] == 0.25


@pytest.mark.parametrize("unit, guess", [(1, 0), (1, 50), (7, 13), (7, 1000), (1000, 5), (0.01, 3)])
def test_the_longest_that_fits(unit, guess):
    calls = []

    def tokens(n):
        calls.append(n)
        assert len(calls) < 25
        return int(n * unit)

    found = retrieval.longest(tokens, 700, guess, 5000)
    assert found == max(n for n in range(5001) if int(n * unit) <= 700)


@pytest.mark.parametrize(
    "answer, hit",
    [
        (" 123.", True),
        ("123", True),
        (" 1234", False),
        (" 12", False),
        (": 123 and 9", True),
        ("9 123", False),
        (" 0123", False),
        ("", False),
    ],
)
def test_the_first_number_of_the_answer_counts(answer, hit):
    assert passkey.right(answer, 123) is hit


# ---- reading prompts -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(base):
    opened = open_model(base)
    return Model(opened.config).load(opened)


def reader(model, rows, chunk=16):
    return Reader(Generator(model, Cache(model.config, rows, 120), chunk=chunk))


def prompts():
    """Random tokens. The first 40 are the same in all prompts."""
    generator = np.random.default_rng(0)
    stem = generator.integers(0, 256, 40)
    tails = [generator.integers(0, 256, n) for n in (5, 23, 9)]
    return [np.concatenate([stem, tail]).astype(np.int32) for tail in tails]


def test_what_prompts_share_is_read_once_and_changes_no_bit(model):
    """40 tokens are two chunks of 16 and a rest. The third prompt finds them in its own row."""
    alone = [reader(model, 1).extend(0, prompt) for prompt in prompts()]
    together = reader(model, 2)
    for row, prompt, logits in zip((0, 1, 0), prompts(), alone, strict=True):
        np.testing.assert_array_equal(together.extend(row, prompt), logits)
    assert together.read == 45 + 31 + 17 and together.reused == 2 * 32
    again = reader(model, 1)
    first = again.extend(0, prompts()[0][:33])
    np.testing.assert_array_equal(again.extend(0, prompts()[0][:33]), first)
    assert again.read == 33 + 1  # all but the last token, which two chunks hold


def test_a_new_reader_holds_no_token(model):
    """Not even token 0, with which the prompt begins."""
    prompt, small = np.array([0, 7, 9], np.int32), reader(model, 2, chunk=1)
    logits = small.extend(0, prompt)
    assert (small.read, small.reused) == (3, 0)
    np.testing.assert_allclose(logits, model.logits(prompt)[-1], atol=1e-4)


def test_a_row_copies_only_the_tokens_that_it_lacks(model):
    """Chunks have 16 tokens. A row copies nothing that it holds as well as another row."""
    ours, copied, (first, second, _) = reader(model, 3), [], prompts()
    copy = ours._cache.copy
    ours._cache.copy = lambda *what: (copied.append(what), copy(*what))
    ours.extend(1, first[:33])
    ours.extend(2, first)
    assert copied == [(1, 2, 0, 32)] and (ours.read, ours.reused) == (33 + 13, 32)
    for row in (1, 2):
        ours.extend(row, second)
    assert copied == [(1, 2, 0, 32), (1, 2, 32, 48)] and ours.reused == 32 + 32 + 48
    ours.extend(2, second)
    assert len(copied) == 2 and ours.reused == 32 + 32 + 48 + 48


def test_prompts_side_by_side_are_answered_as_one_by_one(model):
    alone = [reader(model, 1).answers([prompt], 9)[0] for prompt in prompts()]
    assert alone == reader(model, 3).answers(prompts(), 9) == reader(model, 2).answers(prompts(), 9)
    assert all(len(answer) == 9 for answer in alone) and len({tuple(answer) for answer in alone}) == 3
    again = reader(model, 2)
    again.answers(prompts(), 9)
    assert again.answers(prompts(), 9) == alone  # the answers in the cache are no part of the next prompt
    end = frozenset(alone[0][4:5])
    cut = [answer[: next((i for i, x in enumerate(answer) if x in end), 9)] for answer in alone]
    assert reader(model, 3).answers(prompts(), 9, end) == cut and len(cut[0]) < 9


def test_an_answer_is_what_a_session_says(base, model):
    """The engine of the server reads and chooses on its own."""
    session = longlora.Session(base, device="cpu", context=120)
    for prompt, ids in zip(prompts(), reader(model, 3, chunk=120).answers(prompts(), 9), strict=True):
        answer = session.answer(prompt, max_new_tokens=9)
        assert list(answer) and answer.tokens == ids


# ---- the command and its file --------------------------------------------------------------------


def test_the_command_and_the_function_agree(base, capsys):
    words = "--lengths 300,520 --depths 0,1,random --samples 2 --device cpu --json --seed 4"
    assert cli.main(["eval", "passkey", "--model", base, *words.split()]) == 0
    printed = capsys.readouterr()
    found, how = json.loads(printed.out), dict(lengths=[520, 300], depths=["random", 1, 0], samples=2, seed=4)
    assert "length 300, depth 1.0: 0 of 2 right (2 of 6 cells)" in printed.err
    assert "warning" not in printed.err  # 520 tokens are more than the model is made for, on purpose
    assert found == longlora.eval.passkey(base, **how, **HOW)
    cells = [(row["length"], row["depth"], row["samples"], row["right"]) for row in found["results"]]
    assert cells == [(length, depth, 2, 0) for length in (300, 520) for depth in (0.0, 1.0, "random")]
    assert [answer["tokens"] for row in found["results"] for answer in row["answers"]] == 6 * [300] + 6 * [
        520
    ]
    assert found["context_length"] == found["pretrained_length"] == 512
    assert cli.main(["eval", "passkey", "--model", base, *words.replace("--json", "").split()]) == 0
    table = capsys.readouterr().out.splitlines()[-4:]
    assert table[0].split() == ["length", "0.0", "1.0", "random"] and table[1].split() == ["300"] + 3 * ["0%"]


def test_a_model_that_says_the_key_is_right(base, monkeypatch):
    """Each answer is replaced by what stands after the first "The pass key is" of its prompt."""

    def answers(self, prompts, count, end):
        texts = [bytes(prompt.tolist()).decode() for prompt in prompts]
        return [list(text.partition("The pass key is")[2][:count].encode()) for text in texts]

    monkeypatch.setattr(Reader, "answers", answers)
    found = longlora.eval.passkey(base, lengths=300, depths=[0, 0.5, 1], samples=3, **HOW)
    assert [row["accuracy"] for row in found["results"]] == [1.0, 1.0, 1.0]
    assert all(a["answer"] == f" {a['expected']}." for row in found["results"] for a in row["answers"])


def unread(prepared):
    raise AssertionError("weights are read")


def test_a_run_continues_cell_by_cell(base, tmp_path, monkeypatch):
    """A run that fails in its second cell leaves the first. The next one asks for nothing twice."""
    whole = longlora.eval.passkey(base, lengths=[300, 320], depths=[0, 1], samples=3, **HOW)
    ask, asked = retrieval._answers, []

    def failing(opened, reader, prompts):
        asked.append(len(prompts))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return ask(opened, reader, prompts)

    monkeypatch.setattr(retrieval, "_answers", failing)
    how = dict(output_dir=tmp_path / "out", **HOW)
    with pytest.raises(KeyboardInterrupt):
        longlora.eval.passkey(base, lengths=[300, 320], depths=[0, 1], samples=2, **how)
    stored = json.loads((tmp_path / "out/passkey.json").read_text())
    assert [(row["length"], row["depth"], row["samples"]) for row in stored["results"]] == [(300, 1.0, 2)]
    found = longlora.eval.passkey(base, lengths=[300, 320], depths=[0, 1], samples=3, **how)
    assert asked == [2, 2, 1, 3, 3, 3] and found == whole
    monkeypatch.setattr(Prepared, "load", unread)
    assert longlora.eval.passkey(base, lengths=320, depths=1, samples=1, **how) == whole  # the whole file
    assert len(asked) == 6 and (tmp_path / "out/passkey.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(seed=1), ["another seed: 0, wanted 1"]),
        (dict(dtype="bfloat16"), ["another dtype: 'float32', wanted 'bfloat16'"]),
        (dict(cache_dtype="float16"), ["another cache dtype"]),
        (dict(model="other"), ["another model"]),
        (dict(text="{}"), ["holds no results of longlora eval"]),
        (dict(text="["), ["not JSON"]),
        (dict(damage="right"), ["is damaged"]),
        (dict(damage="answers"), ["is damaged"]),
        (dict(damage="tokens"), ["is damaged"]),
        (dict(damage="results"), ["is damaged"]),
        (dict(damage="length"), ["is damaged"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_results_of_other_settings_are_refused_and_kept(base, tmp_path, monkeypatch, change, words):
    other, file = tmp_path / "other", tmp_path / "out/passkey.json"
    how = dict(lengths=300, depths=1, samples=1, output_dir=tmp_path / "out", **HOW)
    longlora.eval.passkey(base, **how)
    if "model" in change:
        shutil.copytree(base, other)
        tiny.model(other, seed=5)
    if "text" in change:
        file.write_text(change["text"])
    if "damage" in change:
        file.write_text(file.read_text().replace(f'"{change["damage"]}"', '"x"'))
    before = file.read_bytes()
    monkeypatch.setattr(Prepared, "load", unread)
    settings = {k: v for k, v in change.items() if k in ("seed", "dtype", "cache_dtype")}
    with pytest.raises(UserError) as error:
        longlora.eval.passkey(other if "model" in change else base, **{**how, **settings})
    assert all(word in str(error.value) for word in [str(file), *words])
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    "words, said",
    [
        ("--lengths 300 --depths 1.5", "depths should be numbers from 0 to 1, or random, got 1.5"),
        ("--lengths 300 --depths nan", "depths should be numbers from 0 to 1"),
        ("--lengths 300 --depths middle", "expected random, or numbers from 0 to 1, got 'middle'"),
        ("--lengths 200", "length 200 is too short: without filler the prompt has 2"),
        ("--lengths 0", "lengths should be an integer from 1"),
        ("--lengths 4k", "expected integers separated by commas, got '4k'"),
        ("--lengths 300 --samples 0", "samples should be an integer from 1"),
        ("--lengths 300 --seed -1", "seed should be an integer from 0"),
        ("--lengths 9000000", "the model does not fit in memory: with 1 x 9000064 tokens it needs"),
        ("--lengths 9000000", "what would make it fit: --lengths 2249952: "),
        ("--lengths 16777216", "lengths should be an integer from 1 to 16777152"),
        ("--lengths 300 --adapter missing", "missing"),
        ("--lengths 300 --output-dir /dev/null/out", "/dev/null/out: cannot be made: Not a directory"),
        ("--lengths 300 --typo 1", "eval passkey: unknown option '--typo'"),
        ("--lengths 300 --deepths 1", "did you mean --depths?"),
    ],
)
def test_bad_input_is_one_line(base, capsys, words, said, monkeypatch):
    from longlora import job

    monkeypatch.setattr(job, "memory", lambda own: own + (1 << 30))
    monkeypatch.setattr(Prepared, "load", unread)
    try:
        code = cli.main(["eval", "passkey", "--model", base, "--device", "cpu", *words.split()])
    except SystemExit as stop:
        code = stop.code
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and said in line, line


@pytest.mark.parametrize(
    "given", [dict(lengths=300.0), dict(lengths=[]), dict(lengths=300, samples=True), dict(lengths="300")]
)
def test_numbers_are_integers(base, given):
    with pytest.raises(UserError, match="(lengths|samples) should be an integer"):
        longlora.eval.passkey(base, **given, **HOW)


def test_a_null_byte_in_a_name_is_one_line(base):
    with pytest.raises(UserError, match=r"^a\\x00b: cannot be made: embedded null byte$"):
        longlora.eval.passkey(base, lengths=300, output_dir="a\0b", **HOW)


def test_an_unknown_task_is_named(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["eval", "needle"])
    assert stop.value.code == 2 and "invalid choice: 'needle'" in capsys.readouterr().err
