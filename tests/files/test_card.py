"""A model card has front matter for the Hub and the facts of the training. A user's README stays."""

import json
import shutil

import pytest
import yaml
from gguf_cases import base
from test_adapter import extended, made

from longlora.decoder.lora import LoraConfig
from longlora.files import adapter, card
from longlora.files.merge import merge
from longlora.files.open_model import open_model

MINE = "# My own words\n"


def trained(tmp_path, path=None, **raw):
    """A base with a tokenizer and an adapter for it."""
    path = base(path or tmp_path / "base")
    if raw:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | raw))
    opened = open_model(path)
    adapter.save(tmp_path / "adapter", made(opened, LoraConfig()), LoraConfig(), opened, extended(opened))
    return path, tmp_path / "adapter"


def front(directory):
    """The front matter of a card, and the text after it."""
    _, matter, text = (directory / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(matter), text


OPTIONS = dict(data="/home/me/books", sequence_length=4096, target_length=8192)
ROWS = [dict(step=0, eval_perplexity=21.5), dict(step=1), dict(step=12, eval_perplexity=9.25)]


@pytest.mark.parametrize("place", ["run", "checkpoint", "damaged", "bare"])
@pytest.mark.parametrize("format", ["huggingface", "gguf"])
def test_a_merged_model_has_a_card(tmp_path, place, format):
    path, folder = trained(tmp_path, _name_or_path="org/Small-1B")
    if place == "checkpoint":
        state = dict(options=OPTIONS, log_history=ROWS)
        (folder / "trainer_state.json").write_text(json.dumps(state))
    elif place != "bare":
        text = yaml.safe_dump(OPTIONS) if place == "run" else "{"
        (folder / "options.yaml").write_text(text)
        lines = [json.dumps(row) + "\n" for row in ROWS] + ["{"]
        (folder / "metrics.jsonl").write_text("".join(lines) if place == "run" else "[]\n1\n{")
    merge(path, folder, tmp_path / "out", format=format)
    matter, text = front(tmp_path / "out")
    library = dict(library_name="transformers") if format == "huggingface" else {}
    tags = ["longlora"] + (["gguf"] if format == "gguf" else [])
    known = dict(base_model="org/Small-1B", pipeline_tag="text-generation", tags=tags)
    assert matter == known | library
    assert "# out\n" in text and "| base model | `org/Small-1B` |" in text
    assert "| positions | 200 by linear, factor 4, from 64 in pretraining |" in text
    run = [
        "| data | `books` |",
        "| trained at | 4,096 tokens, 12 steps |",
        "| held-out perplexity | 21.500 before, 9.250 after, with dense attention |",
    ]
    for line in run:
        assert (line in text) is (place in ("run", "checkpoint"))
    how = 'from_pretrained("out")' if format == "huggingface" else "llama-server -m model-f32.gguf -c 200"
    assert how in text and "longlora" in text


def test_the_card_of_a_base_alone_names_no_adapter(tmp_path):
    merge(base(tmp_path / "a`b|c"), None, tmp_path / "out", dtype="bf16")
    matter, text = front(tmp_path / "out")
    assert "base_model" not in matter and "A context of 64 tokens.\n" in text
    assert "| base model | `a_b_c` |" in text and "| weights | bfloat16 |" in text


@pytest.mark.parametrize(
    "raw, place, name",
    [
        ({}, "base", None),
        (dict(_name_or_path="/models/x/y"), "base", None),
        (dict(_name_or_path=["a/b"]), "base", None),
        (dict(_name_or_path="a/b: c"), "base", None),
        (dict(_name_or_path="a/b"), "base", "a/b"),
        (dict(_name_or_path="a/b"), "models--org--Model-1--x/snapshots/0123", "org/Model-1--x"),
    ],
)
def test_a_card_names_a_base_of_the_hub(tmp_path, raw, place, name):
    (tmp_path / place).mkdir(parents=True)
    path, folder = trained(tmp_path, tmp_path / place, **raw)
    assert card.hub_name(open_model(path)) == name
    matter, text = front(folder)
    assert matter.get("base_model") == name and matter["library_name"] == "peft"
    assert (
        (name or path.name) in text and "longlora_base" in text and "LoRA r = 8, alpha = 16 on q_proj" in text
    )


def test_the_card_of_a_run_has_its_figures(tmp_path):
    """options.yaml and metrics.jsonl are there when a run writes its adapter."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "options.yaml").write_text(yaml.safe_dump(OPTIONS))
    (tmp_path / "adapter" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    _, folder = trained(tmp_path)
    _, text = front(folder)
    assert (
        "| data | `books` |\n| trained at | 4,096 tokens, 12 steps |\n| held-out perplexity | 21.500" in text
    )


def test_the_card_of_an_adapter_that_was_trained_further_names_both_runs(tmp_path):
    _, folder = trained(tmp_path)
    further = OPTIONS | dict(data="q.jsonl", sequence_length=2048, adapter=str(tmp_path / "second"))
    for name, options in (("second", OPTIONS), ("adapter", further)):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "options.yaml").write_text(yaml.safe_dump(options))
        rows = ROWS if name == "adapter" else [dict(step=240)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name / "metrics.jsonl").write_text(lines)
    facts = dict(card.run_facts(folder))
    assert facts["data"] == "`books`, then `q.jsonl`"
    assert facts["trained at"] == "4,096 tokens, 240 steps, then 2,048 tokens, 12 steps"
    assert facts["held-out perplexity"].startswith("21.500 before, 9.250 after")
    (tmp_path / "second" / "options.yaml").write_text(yaml.safe_dump(dict(data="x", adapter=str(folder))))
    assert len(dict(card.run_facts(folder))["data"].split(", then ")) == card.MOST_RUNS


def test_the_users_readme_stays(tmp_path):
    path, folder = trained(tmp_path)
    ours = (folder / "README.md").read_text()
    (folder / "README.md").write_text("old " + card.MARK)
    trained(tmp_path)
    assert (folder / "README.md").read_text() == ours
    (folder / "README.md").write_text(MINE)
    trained(tmp_path)
    assert (folder / "README.md").read_text() == MINE
    (folder / "README.md").unlink()
    (folder / "README.md").mkdir()
    trained(tmp_path)
    shutil.rmtree(folder / "README.md")
