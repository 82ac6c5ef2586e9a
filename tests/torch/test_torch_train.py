"""longlora.torch.train against the driver: equal losses, adapters and files; one continues the checkpoints of
the other; what is refused. Groups of processes are in test_torch_groups.py."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from smollm2 import converted, smollm2  # noqa: F401 (fixtures)
from torch_runs import close, run, same_rows, trained

import longlora
from longlora import get_num_threads, set_num_threads
from longlora.data.sequences import Sequences
from longlora.data.tokens import Tokens
from longlora.disk import read_json
from longlora.errors import UserError
from longlora.evaluation import ppl
from longlora.files import adapter, merge
from longlora.files.open_model import open_model
from longlora.tools import demo
from longlora.training import driver, metrics, resume

torch = pytest.importorskip("torch", reason="longlora.torch is for torch")
pytest.importorskip("accelerate", reason="Trainer needs accelerate")
ours = pytest.importorskip("longlora.torch.train", reason="longlora.torch.train needs transformers and peft")
trainer = pytest.importorskip("longlora.torch.trainer", reason="it is a part of longlora.torch.train")


@pytest.fixture(autouse=True)
def threads():
    """num_threads applies to the whole process."""
    before = get_num_threads(), torch.get_num_threads()
    yield
    set_num_threads(before[0])
    torch.set_num_threads(before[1])


def failure(tmp_path, **fields):
    with pytest.raises(UserError) as caught:
        run(ours.train, tmp_path, "out", **fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- against the driver --------------------------------------------------------------------------


def test_a_run_is_the_drivers(tmp_path):
    """Two batches of two of a text that ends in a short sequence, more than an epoch of it, evaluated, saved
    on the way."""
    fields = dict(
        data=str(tiny.text(tmp_path / "few.txt", 320)),
        eval_fraction=0.1,
        eval_steps=2,
        save_steps=3,
        max_steps=7,
        save_total_limit=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        embedding_learning_rate=3e-3,
        weight_decay=0.1,
        lr_scheduler_type="cosine",
        warmup_steps=0.3,
    )
    said, wanted = [], []
    theirs = run(driver.train, tmp_path, "theirs", wanted, **fields)
    mine = run(ours.train, tmp_path, "mine", said, **fields)
    assert theirs.history[-1]["epoch"] > 1
    same_rows(mine.history, theirs.history)
    assert metrics.read(tmp_path / "mine") == mine.history
    assert {name: mine[name] for name in ("step", "stopped")} == {
        name: theirs[name] for name in ("step", "stopped")
    }
    close(trained(tmp_path / "mine"), trained(tmp_path / "theirs"))
    listing = {
        os.path.relpath(path, tmp_path / "mine"): text
        for path, text in tiny.listing(tmp_path / "mine").items()
    }
    listed = {
        os.path.relpath(path, tmp_path / "theirs"): text
        for path, text in tiny.listing(tmp_path / "theirs").items()
    }
    assert listing.keys() == listed.keys()
    for name in listing:
        if name.endswith(("config.json", "README.md", "tokenizer.json")):
            assert listing[name].replace(b"/mine/", b"/theirs/") == listed[name], name

    def sentences(lines):
        return [
            line
            for line in lines
            if line.startswith(("attention:", "trainable:", "rope:", "data:", "steps:"))
        ]

    def before(lines):
        return [
            float(re.match(r"before: held-out perplexity ([\d.]+), dense attention$", line)[1])
            for line in lines
            if "before" in line
        ]

    assert sentences(said) == sentences(wanted) and len(sentences(said)) == 5
    assert re.fullmatch(r"device: cpu, (1 thread|([2-9]|\d\d+) threads)", said[0])
    assert before(said) == pytest.approx(before(wanted), rel=1e-5) and len(before(said)) == 1
    assert any(line.startswith("step 7/7") and "held-out perplexity" in line for line in said)


@pytest.mark.parametrize(
    "fields",
    [
        dict(tie_word_embeddings=False, modules_to_save=["embed_tokens", "lm_head", "norm"]),
        dict(rope_type="yarn", boundary="wrap", group_size=64),
        dict(attention="dense", checkpointing="full"),
        dict(target_modules=["all-linear"], modules_to_save=[], shift="all", max_grad_norm=0),
        dict(target_length=None, modules_to_save=["lm_head"], r=3, lora_alpha=7),
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_every_kind_of_run_is_the_drivers(tmp_path, fields):
    if "tie_word_embeddings" in fields:
        tiny.model(tmp_path / "base", tie_word_embeddings=fields["tie_word_embeddings"])
        fields = {name: value for name, value in fields.items() if name != "tie_word_embeddings"}
    mine, theirs = (
        run(train, tmp_path, name, **fields)
        for train, name in ((ours.train, "mine"), (driver.train, "theirs"))
    )
    same_rows(mine.history, theirs.history)
    close(trained(tmp_path / "mine"), trained(tmp_path / "theirs"))


def test_a_gguf_base_is_trained_as_the_driver_does(tmp_path):
    """The base is the demo's model: GGUF can hold its tokenizer."""
    model = merge.merge(demo.MODEL, None, tmp_path / "gguf", format="gguf", dtype="q8_0")
    fields = dict(model=model, target_length=512, sequence_length=128, group_size=32, learning_rate=1e-3)
    mine, theirs = (
        run(train, tmp_path, name, **fields)
        for train, name in ((ours.train, "mine"), (driver.train, "theirs"))
    )
    same_rows(mine.history, theirs.history)
    close(trained(tmp_path / "mine"), trained(tmp_path / "theirs"))


@pytest.mark.parametrize("rope_type", ["yarn", None], ids=["extended", "as the base"])
def test_an_adapter_is_trained_further_as_the_driver_does(tmp_path, rope_type):
    first = dict(target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head", "embed_tokens", "norm"])
    first |= dict(rope_type=rope_type, target_length=256) if rope_type else dict(target_length=None)
    run(driver.train, tmp_path, "first", **first, r=4)
    path = tmp_path / "first" / adapter.CONFIG
    path.write_text(json.dumps(read_json(path) | dict(use_rslora=True)))
    fields = dict(
        adapter=str(tmp_path / "first"),
        eval_data=str(tmp_path / "text.txt"),
        max_eval_samples=2,
        target_length=None,
        sequence_length=64,
        group_size=16,
    )
    mine, theirs = (
        run(train, tmp_path, name, **fields)
        for train, name in ((ours.train, "mine"), (driver.train, "theirs"))
    )
    same_rows(mine.history, theirs.history)
    close(trained(tmp_path / "mine"), trained(tmp_path / "theirs"))
    fields |= dict(output_dir=str(tmp_path / "on"), max_steps=5)
    fields["resume_from_checkpoint"] = str(tmp_path / "theirs" / "checkpoint-4")
    on = driver.train(lambda line: None, **tiny.options(tmp_path, **fields))
    fields |= dict(resume_from_checkpoint=str(tmp_path / "mine" / "checkpoint-4"))
    fields |= dict(output_dir=str(tmp_path / "mine-on"))
    same_rows(ours.train(lambda line: None, **tiny.options(tmp_path, **fields)).history, on.history)


def test_the_result_is_the_best_checkpoint(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setattr(trainer.TorchEngine, "evaluate", lambda engine: [9.0, 5.0, 3.0, 4.0][engine.run.step])
    fields = dict(eval_fraction=0.1, eval_steps=1, save_steps=1, load_best_model_at_end=True, max_steps=3)
    result = run(ours.train, tmp_path, "out", **fields, save_total_limit=1, report_to="tensorboard")
    (path,) = resume.found(tmp_path / "out")
    assert result.best_model_checkpoint == path == str(tmp_path / "out" / "checkpoint-2")
    best, found = trained(path), trained(tmp_path / "out")
    assert all(np.array_equal(found[name], best[name]) for name in best)
    assert len(list((tmp_path / "out" / "runs").glob("*/events.out.tfevents.*"))) == 1


def test_bfloat16_learns_as_the_driver_does(tmp_path):
    """The base and the products are bfloat16 in both, the stream between layers only in the driver."""
    mine, theirs = (
        run(train, tmp_path, name, dtype="bfloat16", checkpointing="full")
        for train, name in ((ours.train, "mine"), (driver.train, "theirs"))
    )
    for a, b in zip(mine.history, theirs.history):
        assert a["loss"] == pytest.approx(b["loss"], rel=5e-3)
    assert all(array.dtype == np.float32 for array in trained(tmp_path / "mine").values())


def test_steps_of_smollm2_are_the_drivers(tmp_path, converted):  # noqa: F811
    """The medians of five steps count: a step of this model may be ill-conditioned, and then a rounding moves
    its loss and its gradient ten times as far. Losses are 2e-6 apart in the median and 1e-5 in one step,
    gradient norms up to 3e-4.

    Adam's first steps have the size of the rate even where the gradient is only rounding. Adapters are
    up to 4e-3 of the way that they moved apart. A higher rate carries more of that into the weights.
    """
    torch.set_num_threads(get_num_threads())
    text = Path(longlora.__file__).parent / "assets" / "held_out" / "kjv-44-acts.txt"
    fields = dict(
        model=str(converted),
        data=str(text),
        target_length=32768,
        sequence_length=128,
        group_size=32,
        max_steps=5,
        learning_rate=1e-4,
        embedding_learning_rate=1e-5,
        num_threads=None,
    )
    mine, theirs = (
        run(train, tmp_path, name, **fields)
        for train, name in ((ours.train, "mine"), (driver.train, "theirs"))
    )
    assert (
        [row["step"] for row in mine.history] == [row["step"] for row in theirs.history] == list(range(1, 6))
    )

    def apart(key):
        return [abs(a[key] / b[key] - 1) for a, b in zip(mine.history, theirs.history)]

    assert np.median(apart("loss")) <= 2e-5 and max(apart("loss")) <= 1e-3
    assert np.median(apart("grad_norm")) <= 1e-3
    base, mine, theirs = open_model(converted), trained(tmp_path / "mine"), trained(tmp_path / "theirs")
    for kind in ("lora_A", "lora_B", "norm", "embed"):
        moved = differs = 0
        for name in theirs:
            if kind in name:
                start = base.read(name) if "lora_" not in name else 0
                moved += np.linalg.norm(theirs[name] - start) ** 2
                differs += np.linalg.norm(mine[name] - theirs[name]) ** 2
        assert 0 < differs**0.5 <= 3e-2 * moved**0.5, kind


def test_a_batch_of_packed_documents_by_hand():
    """Positions start again with each document; the first token of a document is not a label."""
    tokens = Tokens(np.arange(14, dtype=np.int32), np.array([0, 3, 7, 8, 14]), "")
    inputs = trainer.batch(Sequences(tokens, 8, packing_boundaries="document"), [1, 0], 1)
    none = -100
    assert {name: x.tolist() for name, x in inputs.items()} == {
        "input_ids": [[8, 9, 10, 11, 12, 13, 0], [0, 1, 2, 3, 4, 5, 6]],
        "labels": [[none, 9, 10, 11, 12, 13, none], [none, 1, 2, none, 4, 5, 6]],
        "position_ids": [[0, 1, 2, 3, 4, 5, 0], [0, 1, 2, 0, 1, 2, 3]],
    }
    assert "position_ids" not in trainer.batch(Sequences(tokens, 8), [0], 1)


def test_questions_and_answers_are_the_drivers(tmp_path):
    """Four batches a step, with different numbers of targets; the last ones are held out."""
    pairs = [
        ("What is it?" * n, "An answer. " * m) for n, m in ((1, 1), (2, 5), (4, 2), (1, 4), (3, 1), (1, 6))
    ]
    records = [{"instruction": q, "output": a} for q, a in pairs]
    (tmp_path / "a.json").write_text(json.dumps(records))
    fields = dict(
        data=str(tmp_path / "a.json"),
        eval_data=str(tmp_path / "a.json"),
        gradient_accumulation_steps=4,
        max_steps=3,
    )
    theirs = run(driver.train, tmp_path, "theirs", **fields)
    mine = run(ours.train, tmp_path, "mine", **fields)
    same_rows(mine.history, theirs.history)
    close(trained(tmp_path / "mine"), trained(tmp_path / "theirs"))


def test_packed_documents_train_as_if_each_were_alone(tmp_path):
    """Two documents of 64 tokens in one sequence, or a sequence each; the groups are of 16. Evaluated
    likewise."""
    tiny.documents(tmp_path / "few.jsonl", [64, 64])
    tiny.documents(tmp_path / "held.jsonl", [64, 64], seed=1)
    fields = dict(
        data=str(tmp_path / "few.jsonl"),
        eval_data=str(tmp_path / "held.jsonl"),
        max_steps=3,
        group_size=16,
        packing_boundaries="document",
    )
    together = run(ours.train, tmp_path, "together", **fields)
    apart = run(ours.train, tmp_path, "apart", sequence_length=64, per_device_train_batch_size=2, **fields)
    for a, b in zip(together.history, apart.history, strict=True):
        for key in {"loss", "eval_loss", "grad_norm"} & a.keys():
            assert a[key] == pytest.approx(b[key], rel=1e-4 if key == "grad_norm" else 1e-5)
    joined = run(ours.train, tmp_path, "joined", **{**fields, "packing_boundaries": "none"})
    assert joined.history[1]["loss"] != pytest.approx(together.history[1]["loss"], rel=1e-4)


@pytest.mark.parametrize(
    "fields",
    [
        dict(),
        dict(attention="dense"),
        dict(checkpointing="full", shift="all"),
        dict(per_device_train_batch_size=3, gradient_accumulation_steps=2),
    ],
    ids=str,
)
def test_packed_documents_train_as_in_the_driver(tmp_path, fields):
    random = np.random.default_rng(3)
    tiny.documents(tmp_path / "few.jsonl", random.integers(5, 90, 60))
    tiny.documents(tmp_path / "held.jsonl", random.integers(5, 90, 20), seed=1)
    fields = dict(
        data=str(tmp_path / "few.jsonl"),
        eval_data=str(tmp_path / "held.jsonl"),
        packing_boundaries="document",
        **fields,
    )
    mine, theirs = (
        run(train, tmp_path, name, **fields)
        for train, name in ((ours.train, "mine"), (driver.train, "theirs"))
    )
    same_rows(mine.history, theirs.history)
    close(trained(tmp_path / "mine"), trained(tmp_path / "theirs"))


@pytest.mark.parametrize("train", [driver.train, ours.train], ids=["driver", "torch"])
def test_rates_and_decay_by_hand(tmp_path, train):
    """Adam's first step moves every number that has a gradient by the rate, whatever its size. Decay shrinks
    a matrix by rate x decay and leaves norms alone. A has no gradient while B is zero, so it changes by decay
    only. A run without decay gives its start."""
    rate, slow, decay = 1e-2, 1e-3, 0.5
    fields = dict(
        max_steps=1,
        learning_rate=rate,
        embedding_learning_rate=slow,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        modules_to_save=["embed_tokens", "lm_head", "norm"],
    )
    tiny.model(tmp_path / "base", tie_word_embeddings=False)
    for name, weight_decay in (("plain", 0.0), ("decayed", decay)):
        run(train, tmp_path, name, weight_decay=weight_decay, **fields)
    base, plain, decayed = (
        open_model(tmp_path / "base"),
        trained(tmp_path / "plain"),
        trained(tmp_path / "decayed"),
    )
    for name, array in decayed.items():
        if "lora_A" in name:
            np.testing.assert_allclose(array, plain[name] * (1 - rate * decay), rtol=1e-6)
            continue
        start, lost = (
            (np.float32(0), 0)
            if "lora_B" in name
            else (base.read(name), 0 if "norm" in name else slow * decay)
        )
        moved = np.abs(array - start * (1 - lost))
        wanted = rate if "lora_B" in name else slow
        seen = moved
        if name == "model.embed_tokens.weight":  # rows of the bytes that are in the text
            seen = moved[(moved > 1e-6).any(-1)]
        assert np.median(seen) == pytest.approx(wanted, rel=1e-3), name
        assert moved.max() <= wanted * 1.001, name


# ---- adapters and checkpoints of one in the other ------------------------------------------------


@pytest.mark.parametrize(
    "first, then",
    [(driver.train, ours.train), (ours.train, driver.train), (ours.train, ours.train)],
    ids=["driver-torch", "torch-driver", "torch-torch"],
)
def test_a_run_goes_on_in_the_other(tmp_path, first, then):
    fields = dict(
        max_steps=6,
        eval_fraction=0.1,
        eval_steps=2,
        lr_scheduler_type="linear",
        warmup_steps=2,
        weight_decay=0.1,
    )
    whole = run(first, tmp_path, "whole", save_steps=2, **fields)
    since = tmp_path / "whole" / "checkpoint-4"
    said = []
    rest = run(then, tmp_path, "rest", said, resume_from_checkpoint=str(since), **fields)
    assert any("checkpoint-4, after step 4" in line for line in said)
    assert rest.history[:5] == whole.history[:5]
    same_rows(rest.history, whole.history, rel=0 if first is then else 1e-5)
    if first is then:
        tensors = [resume.load(tmp_path / output / "checkpoint-6")[1] for output in ("rest", "whole")]
        for name in tensors[1]:
            np.testing.assert_array_equal(*(found[name] for found in tensors), name)
    close(trained(tmp_path / "rest"), trained(tmp_path / "whole"))


def test_a_run_that_is_done_is_finished_by_resuming(tmp_path):
    run(ours.train, tmp_path, "out")
    before = trained(tmp_path / "out")
    (tmp_path / "out" / "adapter_model.safetensors").unlink()
    again = run(ours.train, tmp_path, "out", resume_from_checkpoint="latest")
    assert again.step == 4 and len(again.history) == 4
    for name, array in trained(tmp_path / "out").items():
        np.testing.assert_array_equal(array, before[name])
    assert "4 steps, more than the 3" in failure(tmp_path, max_steps=3, resume_from_checkpoint="latest")
    for fields, words in (
        (dict(learning_rate=0.02), "learning_rate 0.01, got 0.02"),
        (dict(weight_decay=0.1), "weight_decay 0.0, got 0.1"),
        (dict(gradient_accumulation_steps=2), "gradient_accumulation_steps 1, got 2"),
        (dict(lr_scheduler_type="cosine"), "a schedule of another warm-up or length"),
        (dict(data=str(tiny.text(tmp_path / "other.txt", seed=1))), "other data"),
        (dict(model=str(tiny.model(tmp_path / "other", seed=1))), "another base model"),
    ):
        assert f"was trained with {words}" in failure(tmp_path, resume_from_checkpoint="latest", **fields)


def test_a_signal_ends_the_step_and_saves(tmp_path):
    said = []

    def say(line):
        said.append(line)
        if line.startswith("step 2/"):
            os.kill(os.getpid(), signal.SIGINT)

    fields = tiny.options(tmp_path, max_steps=6)
    result = ours.train(say, **fields)
    assert result.stopped == signal.SIGINT and result.step in (2, 3)
    assert (
        f"stopped by SIGINT after step {result.step}" in said[-1]
        and not (tmp_path / "out" / adapter.CONFIG).exists()
    )
    rest = run(ours.train, tmp_path, "out", max_steps=6, resume_from_checkpoint="latest")
    whole = run(ours.train, tmp_path, "whole", max_steps=6)
    same_rows(rest.history, whole.history, rel=0)


def test_an_error_between_steps_keeps_the_steps_so_far(tmp_path, monkeypatch):
    """The resumed run ends with the bits of one that met no error."""
    real, calls = trainer.batch, []

    def batch(*args):
        calls.append(args)
        if len(calls) == 4:
            raise MemoryError("no memory")
        return real(*args)

    monkeypatch.setattr(trainer, "batch", batch)
    said = []
    with pytest.raises(MemoryError):
        run(ours.train, tmp_path, "out", said, max_steps=6)
    (path,) = resume.found(tmp_path / "out")
    step = resume.load(path)[0]["global_step"]
    assert (
        said[-1] == f"stopped by an error after step {step}; the state after step {step} is saved in {path}"
    )
    monkeypatch.setattr(trainer, "batch", real)
    run(ours.train, tmp_path, "out", max_steps=6, resume_from_checkpoint="latest")
    run(ours.train, tmp_path, "whole", max_steps=6)
    a, b = trained(tmp_path / "out"), trained(tmp_path / "whole")
    assert all(np.array_equal(a[name], b[name]) for name in b)


@pytest.mark.parametrize("at", ["while it updates", "after it"])
def test_an_error_around_an_update_saves_nothing_of_it(tmp_path, monkeypatch, at):
    """The parameters may be those of no step, or of a step that was not counted."""
    real, calls = torch.optim.AdamW.step, []

    def step(self, *args, **kwargs):
        calls.append(self)
        if len(calls) < 3:
            return real(self, *args, **kwargs)
        if at == "after it":
            real(self, *args, **kwargs)
        raise MemoryError("no memory")

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    said = []
    with pytest.raises(MemoryError):
        run(ours.train, tmp_path, "out", said, max_steps=6)
    assert said[-1] == "stopped by an error after step 2; nothing was saved"
    assert not resume.found(tmp_path / "out")


def test_an_adapter_is_read_everywhere(tmp_path):
    """Ours by `longlora ppl` and `longlora merge`; the driver's by PEFT, which trains on."""
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    from longlora.torch import load

    held_out = tiny.text(tmp_path / "held.txt", 300, seed=9)
    fields = dict(eval_data=str(held_out), max_steps=3)
    mine, theirs = (
        run(train, tmp_path, name, **fields)
        for train, name in ((ours.train, "mine"), (driver.train, "theirs"))
    )
    (found,) = ppl.run(tmp_path / "base", held_out, [128], adapter=tmp_path / "mine")["results"]
    assert found["loss"] == pytest.approx(mine.eval_loss, rel=2e-2)  # this one has no token after the text
    merge.merge(tmp_path / "base", tmp_path / "mine", tmp_path / "merged")
    (merged,) = ppl.run(tmp_path / "merged", held_out, [128])["results"]
    assert merged["loss"] == pytest.approx(found["loss"], rel=1e-5)

    model = load(str(tmp_path / "theirs"), str(tmp_path / "base"), is_trainable=True)
    ids = torch.from_numpy(open_model(tmp_path / "base").tokenizer().encode(held_out.read_text())).long()
    windows = [{"input_ids": ids[i : i + 128], "labels": ids[i : i + 128]} for i in range(0, 128 * 8, 128)]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    model.eval()
    with torch.no_grad():
        start = model(**{name: x[None] for name, x in windows[0].items()}).loss.item()
        assert start == pytest.approx(
            plain(**{name: x[None] for name, x in windows[0].items()}).loss.item(), rel=1e-3
        )
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert len(before) == len(trained(tmp_path / "theirs"))
    args = TrainingArguments(
        output_dir=str(tmp_path / "on"),
        max_steps=2,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    Trainer(model=model, args=args, train_dataset=windows).train()
    assert all((p != before[name]).any() for name, p in model.named_parameters() if p.requires_grad)
    model.save_pretrained(tmp_path / "on")
    assert trained(tmp_path / "on").keys() == trained(tmp_path / "theirs").keys()


# ---- what is refused -----------------------------------------------------------------------------


def test_logits_are_never_whole(tmp_path, monkeypatch):
    """Nor in evaluation."""
    rows, linear = set(), torch.nn.functional.linear

    def watched(x, weight, bias=None):
        rows.add(weight.shape[0])
        return linear(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    held_out = str(tiny.text(tmp_path / "held.txt", 80, seed=9))
    run(ours.train, tmp_path, "out", max_steps=2, eval_data=held_out, eval_steps=1)
    assert rows and tiny.CONFIG["vocab_size"] not in rows


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(full=True), "full is not available with torch"),
        (dict(modules_to_save=["wte"]), "modules_to_save should be a list of"),
        (dict(group_size=31), "group_size should be even"),
        (dict(data="nothing.txt"), "nothing.txt: no such file"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_options_that_do_not_apply_are_named(tmp_path, fields, words):
    assert words in failure(tmp_path, **fields)
    assert not (tmp_path / "out" / adapter.CONFIG).exists() and not (tmp_path / "out" / metrics.FILE).exists()


def test_accelerates_configuration_is_heeded_or_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert "mixed_precision is bf16, dtype is float32" in failure(tmp_path)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert "asks for FSDP, but here accelerate does not do it" in failure(tmp_path)


def test_a_run_is_never_written_over_and_numbers_stay_finite(tmp_path):
    run(ours.train, tmp_path, "out", max_steps=1)
    before = tiny.listing(tmp_path / "out")
    assert "holds another run" in failure(tmp_path)
    assert tiny.listing(tmp_path / "out") == before
    fields = tiny.options(
        tmp_path, learning_rate=1e30, max_steps=20, save_steps=1, output_dir=str(tmp_path / "wild")
    )
    with pytest.raises(
        UserError, match=r"step \d+: the (loss|gradient) is not finite; stopped, the last checkpoint is"
    ):
        ours.train(lambda line: None, **fields)
    with pytest.raises(UserError, match="step 2: lora_A does not train: .* below the rounding of float32"):
        run(ours.train, tmp_path, "slow", learning_rate=1e-30, embedding_learning_rate=1e-2)


def test_the_command_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "longlora.torch.train", *tiny.flags(tiny.options(tmp_path, full=True))],
        capture_output=True,
        text=True,
        timeout=1200,
    )
    tiny.refused(done, "full is not available with torch")
