"""Perplexity: which targets are scored, and values equal to those of transformers."""

import functools
import json
import math

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from longlora import get_num_threads, set_num_threads
from longlora.data import text
from longlora.errors import UserError
from longlora.evaluation import ppl
from longlora.files import base_folder
from longlora.files.open_model import open_model
from longlora.training import driver


@pytest.fixture(autouse=True)
def one_thread():
    """A second thread slows such small models down."""
    before = get_num_threads()
    set_num_threads(1)
    yield
    set_num_threads(before)


@given(count=st.integers(0, 60), length=st.integers(2, 20), stride=st.integers(1, 20))
@settings(max_examples=300)
def test_a_sliding_window_scores_every_target_once_with_all_the_context_there_is(count, length, stride):
    stride = min(stride, length - 1)  # if stride = length, the first target of a window has no context
    seen = []
    for first, last, start in ppl.windows(count, length, stride):
        assert first < start <= last <= min(first + length, count)
        seen += range(start, last)
    assert seen == list(range(1, count))


@given(count=st.integers(0, 60), length=st.integers(2, 20))
@settings(max_examples=100)
def test_windows_side_by_side_score_all_their_targets(count, length):
    found = ppl.windows(count, length)
    assert [first for first, _, _ in found] == list(range(0, max(count - 1, 0), length))
    assert all(last == min(first + length, count) and start == first + 1 for first, last, start in found)


def losses_of(base, config=None, adapted=None):
    """A function ids [N] -> losses of transformers [N - 1] float64. adapted(model) is the model to use."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = config and AutoConfig.from_pretrained(base_folder.find(config))
    model = AutoModelForCausalLM.from_pretrained(base, config=config, dtype=torch.float32)
    model = (adapted(model) if adapted else model).eval()

    def losses(ids):
        with torch.no_grad():
            logits = model(torch.tensor(ids)[None]).logits[0, :-1].double()
        return torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none").numpy()

    return losses


def ids_of(path):
    from transformers import AutoTokenizer

    return lambda text: AutoTokenizer.from_pretrained(path)(text).input_ids


def test_perplexity_is_transformers(tmp_path):
    base, path = tiny.model(tmp_path / "base"), tiny.text(tmp_path / "t.txt", 60)
    ids, losses = ids_of(base)(path.read_text()), losses_of(base)
    found = ppl.run(str(base), str(path), [16, 64], bins=4)["results"]
    for result, length in zip(found, (16, 64)):
        parts = [losses(ids[i : i + length]) for i in range(0, len(ids) - 1, length)]
        wanted = np.concatenate(parts)
        assert result["length"] == length and result["tokens"] == len(wanted)
        assert result["loss"] == pytest.approx(wanted.mean(), rel=1e-5)
        assert result["perplexity"] == pytest.approx(math.exp(wanted.mean()), rel=1e-5)
        bins = result["by_position"]
        assert [b["first"] for b in bins] == [length * i // 4 for i in range(4)]
        # the loss at position t is that of predicting token t + 1
        quarter = np.concatenate([part[length // 4 : length // 2] for part in parts])
        assert bins[1]["loss"] == pytest.approx(quarter.mean(), rel=1e-5) and bins[1]["tokens"] == len(
            quarter
        )
        assert sum(b["tokens"] for b in bins) == len(wanted)


def test_a_stride_is_the_usual_sliding_window(tmp_path):
    """The loop of transformers' page on perplexity, with the mean over tokens."""
    base, path = tiny.model(tmp_path / "base"), tiny.text(tmp_path / "t.txt", 30)
    ids, losses, total, count, previous = ids_of(base)(path.read_text()), losses_of(base), 0.0, 0, 0
    for begin in range(0, len(ids), 16):
        end = min(begin + 48, len(ids))
        part = losses(ids[begin:end])[-(end - previous) :]
        total, count, previous = total + part.sum(), count + len(part), end
        if end == len(ids):
            break
    (found,) = ppl.run(str(base), str(path), 48, stride=16)["results"]
    assert found["tokens"] == count == len(ids) - 1 and found["loss"] == pytest.approx(
        total / count, rel=1e-5
    )


def test_adapter_and_interpolation_are_in_the_number(tmp_path):
    driver.train(lambda line: None, **tiny.options(tmp_path, max_steps=8))
    base, path, out = (
        str(tmp_path / "base"),
        str(tiny.text(tmp_path / "held.txt", 200, seed=3)),
        str(tmp_path / "out"),
    )
    before, linear, ntk, after = (
        ppl.run(base, path, 128, **how)["results"][0]["loss"]
        for how in ({}, dict(rope_type="linear"), dict(rope_type="ntk", target_length=256), dict(adapter=out))
    )
    assert after < min(before, linear) and len({before, linear, ntk}) == 3
    ids, losses = (
        ids_of(tmp_path / "base")((tmp_path / "held.txt").read_text()),
        losses_of(tmp_path / "base", out),
    )
    wanted = np.concatenate([losses(ids[i : i + 128]) for i in range(0, len(ids) - 1, 128)])
    assert linear == pytest.approx(wanted.mean(), rel=1e-5)  # the saved config has the rope


def authors_of(base, ids, length):
    """What the authors' loop gives by transformers, window by window -> (windows, loss, accuracy).

    Windows begin every 256 tokens while length + 1 tokens are left, and the last of them is dropped.
    The loss is that of transformers for labels = ids. The accuracy counts the token after the window too.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    starts, first = [], 0
    while first + length + 1 <= len(ids):
        starts.append(first)
        first += 256
    losses, shares = [], []
    for first in starts[:-1]:
        window = torch.tensor(ids[first : first + length + 1])
        with torch.no_grad():
            done = model(window[None, :-1], labels=window[None, :-1])
        losses.append(done.loss.item())
        shares.append((done.logits[0].argmax(-1) == window[1:]).double().mean().item())
    return len(losses), np.mean(losses), np.mean(shares)


def test_the_authors_protocol_is_their_loop(tmp_path):
    """Two documents are one stream; ours keeps them apart."""
    base, path = tiny.model(tmp_path / "base"), tmp_path / "t.jsonl"
    texts = [tiny.text(tmp_path / "t.txt", words, seed=words).read_text() for words in (90, 110)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    ids = [x for text in texts for x in ids_of(base)(text)]
    found = ppl.run(base, path, [48, 64], protocol="authors")
    for result in found["results"]:
        windows, loss, accuracy = authors_of(base, ids, result["length"])
        theirs = result.pop("authors")
        assert theirs["windows"] == windows and 3 <= windows
        assert theirs["loss"] == pytest.approx(loss, rel=1e-5)
        assert theirs["perplexity"] == pytest.approx(2.71828**loss, rel=1e-5)
        assert theirs["accuracy"] == pytest.approx(accuracy, abs=1e-12) and accuracy > 0
        assert abs(theirs["loss"] - result["loss"]) > 1e-3  # the two numbers differ
    assert found == ppl.run(base, path, [48, 64])


@pytest.mark.parametrize("more, windows", [(256, 0), (257, 1), (512, 1), (513, 2)])
def test_the_authors_windows_need_a_token_after_them_and_the_last_is_left_out(tmp_path, more, windows):
    """By their code: range(0, N - L, 256), without its last element."""
    base, path = tiny.model(tmp_path / "base"), tmp_path / "t.txt"
    path.write_text("a" * (32 + more))
    if windows:
        (found,) = ppl.run(base, path, 32, protocol="authors")["results"]
        assert found["authors"]["windows"] == windows
        return
    with pytest.raises(UserError, match="at least 289 tokens for windows of 32, the data has 288"):
        ppl.run(base, path, 32, protocol="authors")


def test_the_table_has_the_authors_numbers_below_ours(tmp_path):
    base, path = tiny.model(tmp_path / "base"), tiny.text(tmp_path / "t.txt", 100)
    found = ppl.run(base, path, [32, 64], protocol="authors")
    lines = ppl.text(found).splitlines()
    assert lines[:3] == ppl.text(ppl.run(base, path, [32, 64])).splitlines()
    for line, result in zip(lines[-2:], found["results"], strict=True):
        theirs = result["authors"]
        wanted = [str(result["length"]), str(theirs["windows"]), f"{theirs['loss']:.4f}"]
        assert line.split() == [*wanted, f"{theirs['perplexity']:.3f}", f"{theirs['accuracy']:.4f}"]


@pytest.mark.parametrize("limit", [None, 2])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_a_run_says_of_held_out_text_is_transformers(tmp_path, limit):
    """Dense, before and after training: the mean over the targets of 2 or 4 sequences (the last is short)."""
    from peft import PeftModel

    path = tiny.text(tmp_path / "held.txt", 70, seed=3)
    said = []
    fields = tiny.options(tmp_path, eval_data=str(path), max_eval_samples=limit, max_steps=2)
    rows = driver.train(said.append, **fields).history
    base, out = tmp_path / "base", tmp_path / "out"
    ids = [*ids_of(base)(path.read_text()), 256]  # the end of the text is a target too
    parts = [ids[i : i + 128] for i in range(0, len(ids) - 1, 128)]
    assert len(parts) == 4
    for row, adapter in ((rows[0], None), (rows[-1], out)):
        adapt = None if adapter is None else functools.partial(PeftModel.from_pretrained, model_id=adapter)
        losses = losses_of(base, out, adapt)
        wanted = np.concatenate([losses(part) for part in parts[:limit]]).mean()
        assert row["eval_loss"] == pytest.approx(wanted, rel=1e-5)
        assert row["eval_perplexity"] == pytest.approx(math.exp(wanted), rel=1e-4)
        assert any(f"held-out perplexity {row['eval_perplexity']:.3f}" in line for line in said)


def test_documents_are_windows_of_their_own(tmp_path):
    base = tiny.model(tmp_path / "base")
    texts = ["context of the token", "a", "", "long"]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    parts = ppl.read_ids(text.Corpus(str(path)), open_model(base).tokenizer(), open_model(base).config)
    assert [len(ids) for ids in parts] == [20, 1, 4]
    (found,) = ppl.run(str(base), str(path), 64)["results"]
    assert found["tokens"] == 19 + 3
    binary = tmp_path / "t.bin"
    np.concatenate(parts[:1]).astype("<u2").tofile(binary)
    assert ppl.run(str(base), str(binary), 64)["results"][0]["tokens"] == 19
    (found,) = ppl.run(str(base), str(path), 64, max_tokens=10)["results"]
    assert found["tokens"] == 9


def test_memory_does_not_grow_with_the_vocabulary(tmp_path):
    """2048 tokens by 65,536 entries are 512 MiB of logits. They are never in memory as a whole."""
    import subprocess
    import sys

    base = tiny.model(tmp_path / "base", vocab_size=65536, max_position_embeddings=2048)
    path = tiny.text(tmp_path / "t.txt", 700)
    script = (
        "import resource; from longlora.evaluation import ppl\n"
        f"made, _ = ppl.open_for_evaluation({str(base)!r})\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"print(ppl.run({str(base)!r}, {str(path)!r}, 2048)['results'][0]['tokens'],"
        " (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=1200)
    tokens, growth = map(int, done.stdout.split())
    assert tokens > 2048 and growth < 150, growth


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(rope_type="linear", target_length=64), "target length should be above the 64 tokens"),
        (dict(rope_type="x"), "rope type"),
        (dict(adapter="base"), "is not an adapter"),
        (dict(model="no"), "no such file"),
        (dict(data="no.txt"), "no such file"),
        (dict(data="one.txt"), "at least two tokens"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, fields, words):
    tiny.model(tmp_path / "base")
    (tmp_path / "one.txt").write_text("a")
    given = {**dict(model="base", data=str(tiny.text(tmp_path / "t.txt")), lengths=64), **fields}
    for name in ("model", "data", "adapter"):
        if name in given:
            given[name] = str(tmp_path / given[name])
    with pytest.raises(UserError) as caught:
        ppl.run(**given)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_the_table_and_the_json_hold_the_same(tmp_path):
    base, path = tiny.model(tmp_path / "base"), tiny.text(tmp_path / "t.txt", 100)
    done = tiny.command("ppl", "--model", base, "--data", path, "--lengths", "32,64", "--json")
    results = json.loads(done.stdout)["results"]
    assert [set(result) for result in results] == [{"length", "tokens", "loss", "perplexity"}] * 2
    table = tiny.command("ppl", "--model", base, "--data", path, "--lengths", "32,64").stdout
    for result in results:
        assert f"{result['perplexity']:.3f}" in table and f"{result['tokens']:,}" in table


def test_lengths_that_no_document_has_are_said(tmp_path):
    base, path = tiny.model(tmp_path / "base"), tmp_path / "t.jsonl"
    path.write_text('{"text": "context of the token"}\n{"text": "long"}\n')  # of 20 and 4 tokens
    found = ppl.run(base, path, [16, 20, 21, 4096])
    assert found["longest_document"] == 20
    *_, last, note = ppl.text(found).splitlines()
    assert note == "no document has 21, 4,096 tokens; the longest has 20"
    assert last.split() == ["4096", "-", "-", "-"]
    assert "no document" not in ppl.text(ppl.run(base, path, [16, 20]))


def test_what_a_directory_holds_besides_its_text_is_said(tmp_path):
    """The result is that of the text alone."""
    base, data = tiny.model(tmp_path / "base"), tmp_path / "data"
    data.mkdir()
    tiny.text(data / "t.txt", 100)
    alone = ppl.run(base, data, 64)
    assert alone["left_out"] is None
    (data / "README.md").write_text("about the text")
    (data / ".t.txt.swp").write_text("half of it")
    (data / "empty.txt").write_text("")
    found = ppl.run(base, data, 64)
    assert found["results"] == alone["results"]
    wanted = "left out 1 hidden (.t.txt.swp), 1 of another kind (README.md), 1 without text (empty.txt)"
    assert found["left_out"] == wanted
    shown = tiny.command("ppl", "--model", base, "--data", data, "--lengths", "64").stdout
    assert shown.splitlines()[-1] == wanted
