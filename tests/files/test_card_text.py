"""The text of model cards, word for word, and cards of runs whose files are damaged."""

import json
import math
import os
from types import SimpleNamespace

import pytest
import yaml

from longlora.decoder.rope import Rope
from longlora.files import card

LINEAR = SimpleNamespace(rope=Rope("linear", 1e4, 4096, 2.5), max_position_embeddings=10240)
PLAIN = SimpleNamespace(rope=Rope("default", 1e4, 4096, 1.0), max_position_embeddings=4096)
LORA = dict(
    r=16, lora_alpha=32.0, target_modules=["q_proj", "v_proj"], modules_to_save=["embed_tokens", "norm"]
)


def model(path, raw=None, **fields):
    """A stand-in for an opened model."""
    return SimpleNamespace(path=str(path), config=SimpleNamespace(raw=raw or {}), **fields)


def run(path, options=None, rows=None, state=None):
    """Write the files of a run. A str is written as it is, other values as YAML or JSON. Returns `path`."""
    path.mkdir(exist_ok=True)
    for name, content in (("options.yaml", options), ("trainer_state.json", state)):
        if content is not None:
            (path / name).write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    if rows is not None:
        lines = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        (path / "metrics.jsonl").write_text(lines)
    return path


ADAPTER = """---
library_name: peft
base_model: org/Small-1B
pipeline_tag: text-generation
tags:
- lora
- longlora
---
<!-- longlora may write this file again. Remove this line to keep what you change. -->

A context of 10,240 tokens for `org/Small-1B`, by LongLoRA (arXiv 2309.12307) with `longlora`.
LoRA r = 16, alpha = 32 on q_proj, v_proj;
trained whole and stored here: embed_tokens, norm.

| | |
|---|---|
| data | `books` |
| trained at | 10,240 tokens |

The note.
Servers that do not take `modules_to_save` (vLLM, llama.cpp) need the merged model: `longlora merge`.
"""


def test_the_card_of_an_adapter(tmp_path):
    base = model("x", dict(_name_or_path="org/Small-1B"))
    folder = run(tmp_path / "run", dict(data="books/", sequence_length=10240))
    assert card.adapter(base, folder, 10240, LORA, "The note.") == ADAPTER
    bare = card.adapter(base, tmp_path, 10240, LORA | dict(modules_to_save=None), "")
    before, after = ADAPTER.split("embed_tokens, norm.\n\n")
    assert bare == before + "nothing.\n\n" + after.partition("The note.\n")[2]


DIRECTORY = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- longlora
---
<!-- longlora may write this file again. Remove this line to keep what you change. -->

# my_model

A context of 4,096 tokens.

| | |
|---|---|
| base model | `base` |
| positions | 4,096, as in pretraining |
| weights | bfloat16 |

The positions are in `config.json`, so nothing is set by hand:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("my_model")
tokenizer = AutoTokenizer.from_pretrained("my_model")
```
"""
GGUF = """---
base_model: org/Small-1B
pipeline_tag: text-generation
tags:
- longlora
- gguf
---
<!-- longlora may write this file again. Remove this line to keep what you change. -->

# out

A context of 10,240 tokens by LongLoRA (arXiv 2309.12307) with `longlora`.

| | |
|---|---|
| base model | `org/Small-1B` |
| data | `books` |
| positions | 10,240 by linear, factor 2.5, from 4,096 in pretraining |
| weights | q8_0 |

The positions are in the file, so nothing is set by hand but the length of the context:

```
llama-server -m model-q8_0.gguf -c 10240
```

Ollama takes a Modelfile with the lines `FROM ./model-q8_0.gguf` and `PARAMETER num_ctx 10240`.
"""


def test_the_card_of_a_whole_model(tmp_path):
    assert card.merged(model("/a/base"), None, PLAIN, 'my"model', "bfloat16", None) == DIRECTORY
    base, folder = model("x", dict(_name_or_path="org/Small-1B")), run(tmp_path / "run", dict(data="books"))
    assert card.merged(base, folder, LINEAR, "out", "q8_0", "model-q8_0.gguf") == GGUF


@pytest.mark.parametrize(
    "key",
    [
        "general.source.huggingface.repository",
        "general.repo_url",
        "general.source.repo_url",
        "general.base_model.0.repo_url",
    ],
)
def test_a_gguf_may_have_its_hub_name_under_four_keys(key):
    """The keys are from the specification of GGUF."""
    assert card.hub_name(model("m.gguf", metadata={key: "https://huggingface.co/org/Model"})) == "org/Model"
    assert card.hub_name(model("m.gguf", metadata={key: "https://example.com/org/Model"})) is None


def test_the_first_valid_hub_name_counts():
    metadata = {"general.repo_url": "org/Second", "general.source.huggingface.repository": 3}
    for first, name in (("org/First", "org/First"), ("/models/first", "org/Second"), (3, "org/Second")):
        assert card.hub_name(model("m", dict(_name_or_path=first), metadata=metadata)) == name


def test_a_base_without_a_name_is_shown_by_its_folder(tmp_path, monkeypatch):
    (tmp_path / "real`one").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real`one")
    monkeypatch.chdir(tmp_path / "link")
    for path in (".", tmp_path / "link"):
        assert "| base model | `real_one` |" in card.merged(model(path), None, PLAIN, "m", "f16", None)


def test_the_length_is_sequence_length_or_else_target_length(tmp_path):
    for options, length in (
        (dict(sequence_length=2048, target_length=8192), "2,048 tokens"),
        (dict(sequence_length=None, target_length=8192), "8,192 tokens"),
        (dict(target_length=8192), "8,192 tokens"),
    ):
        assert dict(card.run_facts(run(tmp_path, options, []))) == {"trained at": length}


ROWS = [dict(step=0, eval_perplexity=21.5), dict(step=30, eval_perplexity=9.25), dict(step=12)]


@pytest.mark.parametrize(
    "rows, said",
    [
        (ROWS, ["100 tokens, 30 steps", "21.500 before, 9.250 after, with dense attention"]),
        (ROWS[:1], ["100 tokens, 0 steps", "21.500, with dense attention"]),
        (ROWS[2:], ["100 tokens, 12 steps"]),
        ([dict(step=1.5, eval_perplexity=None)], ["100 tokens"]),
        ([dict(step=True, eval_perplexity=True), [], "x", 3], ["100 tokens"]),
        ([dict(step="3", eval_perplexity="21.5")], ["100 tokens"]),
        ([dict(step=-1, eval_perplexity=math.nan), dict(eval_perplexity=math.inf)], ["100 tokens"]),
        ([dict(step=10**400, eval_perplexity=10**400)], ["100 tokens"]),
        ([dict(eval_perplexity=8)], ["100 tokens", "8.000, with dense attention"]),
        ('{"step": 7}\n{"step": 9', ["100 tokens, 7 steps"]),
        ("[" * 100_000 + '\n{"step": 7}\r\n', ["100 tokens, 7 steps"]),
        ("7\n", ["100 tokens"]),
    ],
)
def test_rows_without_valid_metrics_are_skipped(tmp_path, rows, said):
    path = run(tmp_path, dict(target_length=100), rows)
    assert [value for _, value in card.run_facts(path)] == said


@pytest.mark.parametrize(
    "options",
    [
        "{",
        "- a",
        "3",
        "",
        "a: !!int ''",
        "a: !!bool x",
        "a: !!timestamp x",
        "a: !!python/name:os.system",
        "a: 2026-02-30",
        "a: " + "[" * 400,
        'data: [x]\nadapter: "a\\0b"',
        "adapter: 3",
        "sequence_length: 0x" + "f" * 4000,
        "sequence_length: true",
    ],
)
def test_damaged_options_add_nothing_to_a_card(tmp_path, options):
    """yaml raises its own errors and Python's: ValueError, KeyError, RecursionError."""
    assert list(card.run_facts(run(tmp_path, options, "\0"))) == []


@pytest.mark.parametrize("state", ["{", "[]", "3", '{"options": [], "log_history": {}}', '{"options": 3}'])
def test_a_damaged_checkpoint_adds_nothing_to_a_card(tmp_path, state):
    assert list(card.run_facts(run(tmp_path, state=state))) == []


def test_bytes_that_are_not_utf8_do_not_hide_other_options(tmp_path):
    run(tmp_path)
    (tmp_path / "options.yaml").write_bytes(b"# caf\xe9\ndata: caf\xc3\xa9\n")
    assert dict(card.run_facts(tmp_path)) == {"data": "`café`"}


def test_a_pipe_is_not_waited_for(tmp_path):
    run(tmp_path)
    os.mkfifo(tmp_path / "options.yaml")
    assert list(card.run_facts(tmp_path)) == []


def test_a_path_is_shown_by_its_last_name_without_markup(tmp_path):
    data = 'books/a`b|c"d\\e<f>g\x1b/'
    assert dict(card.run_facts(run(tmp_path, dict(data=data)))) == {"data": "`a_b_c_d_e_f_g_x1b`"}


def test_only_a_card_with_our_mark_is_replaced(tmp_path):
    path = tmp_path / "README.md"
    card.write(tmp_path, "one " + card.MARK)
    card.write(tmp_path, "two")
    assert path.read_text() == "two"
    card.write(tmp_path, "three")
    assert path.read_text() == "two"
    path.unlink()
    path.symlink_to(tmp_path / "gone")  # a dangling link is the user's too
    card.write(tmp_path, "four")
    assert path.is_symlink() and not (tmp_path / "gone").exists()
