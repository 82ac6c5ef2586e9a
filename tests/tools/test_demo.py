"""`longlora demo`: its assets, its output, and that the context gets longer. Tests run only a few steps."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest

from longlora.errors import UserError
from longlora.files import adapter
from longlora.files.open_model import open_model
from longlora.tools import demo

STEPS = 60


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Run a short demo over the files of an earlier one -> (its directory, its output)."""
    output = tmp_path_factory.mktemp("demo") / "out"
    for name in ("adapter/adapter_config.json", "adapter/checkpoint-9/old", "merged/old", "report.json"):
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text("{}")
    ran = subprocess.run(
        [sys.executable, "-m", "longlora", "demo", "--output-dir", output, "--steps", str(STEPS)],
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert ran.returncode == 0, ran.stderr
    return output, ran.stdout


@pytest.fixture(scope="module")
def report(done):
    return json.loads((done[0] / "report.json").read_text())


def test_what_ships():
    base = open_model(demo.MODEL)
    assert base.config.max_position_embeddings == 256 and base.config.rope.type == "default"
    assert demo.TARGET == 8 * base.config.max_position_embeddings
    assert sum(path.stat().st_size for path in demo.ASSETS.rglob("*") if path.is_file()) < 12 << 20
    assert base.tokenizer().decode(base.tokenizer().encode("And God said, £5.")) == "And God said, £5."
    assert "public domain" in (demo.ASSETS / "README.md").read_text()


def test_held_out_text_is_not_in_the_training_text():
    def passages(folder):
        lines = itertools.chain.from_iterable(path.read_text().splitlines() for path in folder.glob("*.txt"))
        return {line for line in lines if len(line) > 60}

    held_out = passages(demo.HELD_OUT)
    assert len(held_out) > 500
    assert not held_out & passages(demo.TEXT)


def test_the_context_gets_longer(report):
    before, interpolated, after = (
        dict(zip(report["lengths"], report[name])) for name in ("before", "interpolated", "after")
    )
    native, target = min(before), max(before)
    assert report["lengths"] == [256, 512, 1024, 2048] == list(demo.LENGTHS)
    assert before[target] > 1.5 * before[native]
    assert interpolated[native] > 1.5 * before[native]
    assert after[target] < 0.85 * min(before[target], interpolated[target])


def test_what_it_leaves(done, report):
    output, printed = done
    for name in ("loss.png", "perplexity.png", "attention.png"):
        data = (output / name).read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 5000
    assert report["steps"] == STEPS and report["loss"][-1][0] == STEPS and len(report["loss"]) >= 2
    assert demo.table(report) in printed and demo.NEXT in printed and str(output) in printed
    lora, tensors, raw = adapter.load(output / "adapter", open_model(demo.MODEL))
    assert lora.r == 8 and "model.embed_tokens.weight" in tensors
    assert (
        raw["max_position_embeddings"]
        == demo.TARGET
        == open_model(output / "merged").config.max_position_embeddings
    )


def test_it_answers_the_question(done, report):
    """The texts are as long as the model has learned to read; only the model that was taught answers."""
    right = {"austen-persuasion": "Jane Austen.", "kjv-44-acts": "It is from the Bible."}
    assert {answer["book"] for answer in report["answers"]} == set(right) and len(report["answers"]) == 4
    for answer in report["answers"]:
        taught = answer["asked"] == "taught"
        assert (answer["answer"] == right[answer["book"]]) == taught, answer
        assert 1500 < answer["tokens"] < demo.TARGET
        assert f"Who wrote this? {answer['answer']}" in done[1]
    assert adapter.load(done[0] / "taught", open_model(demo.MODEL))[0].r == 8


def test_transformers_gives_the_merged_models_perplexity(done, report):
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(done[0] / "merged", dtype=torch.float32)
    base = open_model(demo.MODEL)
    total = count = 0
    for path in sorted(demo.HELD_OUT.glob("*.txt")):
        ids = base.tokenizer().encode(path.read_text())
        for first in range(0, len(ids) - 1, demo.TARGET):
            window = torch.from_numpy(ids[None, first : first + demo.TARGET].astype(np.int64))
            with torch.no_grad():
                total += model(window, labels=window).loss.item() * (window.shape[1] - 1)
            count += window.shape[1] - 1
    assert np.exp(total / count) == pytest.approx(
        report["after"][-1], rel=0.01
    )  # merged weights are rounded to bfloat16


def test_nothing_of_an_earlier_demo_stays(done):
    assert [path for path in done[0].rglob("*") if path.name in ("old", "checkpoint-9")] == []


@pytest.mark.parametrize("left", ["adapter", "merged", "taught"])
def test_an_earlier_demo_is_removed_first(tmp_path, monkeypatch, left):
    """Old files are removed first, so that none is left if the demo is stopped."""

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo.ppl, "run", stop)
    (tmp_path / "report.json").write_text("{}")
    (tmp_path / left).mkdir()
    (tmp_path / left / "old").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        demo.run(tmp_path, say=lambda line: None)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_only_an_earlier_demo_is_replaced(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no earlier demo"):
        demo.run(tmp_path, say=lambda line: None)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(UserError, match="steps should be at least 1, got 0"):
        demo.run(tmp_path / "new", steps=0)
    assert not (tmp_path / "new").exists()
