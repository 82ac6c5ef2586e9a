"""Runs of tiny models: what is said, what is written, that a stopped run goes on bit by bit, that nothing goes wrong unsaid."""

import inspect
import json
import math
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import tiny
import yaml

from longlora import get_num_threads, set_num_threads
from longlora.decoder import model as model_
from longlora.errors import UserError
from longlora.files import adapter
from longlora.files.open_model import open_model
from longlora.training import driver, metrics, options, resume
from longlora.training.inputs import Setup
from longlora.training.run import learning_rate


@pytest.fixture(autouse=True)
def threads():
    """num_threads is for the whole process."""
    before = get_num_threads()
    yield
    set_num_threads(before)


def run(tmp_path, said=None, **fields):
    return driver.train(
        said.append if said is not None else lambda line: None, **tiny.options(tmp_path, **fields)
    )


def failure(tmp_path, **fields):
    with pytest.raises(UserError) as caught:
        run(tmp_path, **fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def numbers(rows):
    """What must be equal between equal runs: everything but times and memory."""
    return [
        {key: value for key, value in row.items() if key not in ("tokens_per_s", "peak_memory")}
        for row in rows
    ]


def weights(path):
    """The trained tensors of an adapter or of a whole model."""
    if os.path.exists(os.path.join(path, adapter.CONFIG)):
        return adapter.load(path)[1]
    found = open_model(path)
    return {name: found.read(name) for name in found.names()}


def equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], name)


# ---- a whole run ---------------------------------------------------------------------------------


def test_a_run_says_what_it_does_and_leaves_what_is_needed(tmp_path):
    said = []
    result = run(
        tmp_path,
        said,
        max_steps=6,
        eval_fraction=0.05,
        save_steps=2,
        eval_steps=3,
        gradient_accumulation_steps=2,
    )
    report = "\n".join(said)
    for words in (
        "S2 split, group 32 of 128 tokens, 2/4 heads shifted by 16",
        "lora_A",
        "embedding 8,320",
        "norm 160",
        "factor ceil(128 / 64) = 2",
        "steps: 6 of 1 x 2 x 128 = 256 tokens",
        "GiB planned",
        "checkpointing none",
        "longer documents split",
        "before: held-out perplexity",
        "step 6/6",
        "held-out perplexity",
    ):
        assert words in report, words
    out = tmp_path / "out"
    assert sorted(os.listdir(out)) == sorted(
        [
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
            "checkpoint-2",
            "checkpoint-4",
            "checkpoint-6",
            "config.json",
            "loss.png",
            "metrics.jsonl",
            "options.yaml",
            "tokenizer.json",
            "tokenizer_config.json",
        ]
    )
    rows = metrics.read(out)
    assert rows == result.history and [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5, 6]
    assert all(
        {"loss", "learning_rate", "grad_norm", "tokens_per_s", "peak_memory"} <= set(row) for row in rows[1:]
    )
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 3, 6]
    assert result.step == 6 and result.stopped is None and result.loss == rows[-1]["loss"] < rows[1]["loss"]
    assert result.eval_loss < rows[0]["eval_loss"]
    equal(weights(out), weights(out / "checkpoint-6"))
    assert json.loads((out / "config.json").read_text())["max_position_embeddings"] == 128
    resolved = yaml.safe_load((out / "options.yaml").read_text())
    assert (
        resolved["group_size"] == 32
        and resolved["sequence_length"] == 128
        and resolved["embedding_learning_rate"] == 1e-2
    )
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "fields",
    [
        dict(full=True),
        dict(dtype="bfloat16"),
        dict(attention="dense"),
        dict(rope_type="yarn"),
        dict(target_modules=["all-linear"], modules_to_save=[]),
        dict(boundary="wrap", group_size=64),
        dict(shift="all"),
        dict(checkpointing="full", per_device_train_batch_size=2),
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_every_kind_of_run_learns(tmp_path, fields):
    result = run(tmp_path, **fields)
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    found = weights(tmp_path / "out")
    assert all(np.isfinite(array).all() for array in found.values())


def test_a_random_start_needs_only_a_config(tmp_path):
    tiny.config(tmp_path / "init")
    fields = dict(model=None, init=str(tmp_path / "init"), full=True, target_length=None, learning_rate=1e-2)
    result = run(tmp_path, **fields)
    assert abs(result.history[0]["loss"] - math.log(260)) < 0.3 and result.loss < result.history[0]["loss"]
    (base,) = [open_model(tmp_path / "out")]
    assert base.dtype("model.norm.weight") == "float32" and base.tokenizer().vocab_size == 257
    fields["init"] += "/config.json"
    assert numbers(run(tmp_path, **fields, output_dir=str(tmp_path / "again")).history) == numbers(
        result.history
    )
    resumed = run(tmp_path, **fields, max_steps=5, resume_from_checkpoint="latest")
    assert numbers(resumed.history)[:4] == numbers(result.history) and resumed.step == 5


def test_tokens_need_no_tokenizer(tmp_path):
    base = tiny.model(tmp_path / "base")
    (base / "tokenizer.json").unlink()
    assert "wanted a token .bin" in failure(tmp_path)
    ids = np.frombuffer(tiny.text(tmp_path / "text.txt").read_bytes(), np.uint8).astype("<u2")
    ids.tofile(tmp_path / "text.bin")
    result = run(tmp_path, data=str(tmp_path / "text.bin"), max_steps=2)
    assert result.step == 2 and not (tmp_path / "out" / "tokenizer.json").exists()


def test_accumulation_changes_nothing_but_rounding(tmp_path):
    one = run(tmp_path, per_device_train_batch_size=4, output_dir=str(tmp_path / "one"))
    four = run(tmp_path, gradient_accumulation_steps=4, output_dir=str(tmp_path / "four"))
    for a, b in zip(one.history, four.history):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["grad_norm"] == pytest.approx(
            b["grad_norm"], rel=1e-4
        )


def test_the_loss_is_over_target_tokens_not_over_batches(tmp_path):
    """The last sequence is short: its few tokens may not weigh as much as a full sequence's."""
    (tmp_path / "text.txt").write_text("a" * 128 + "zq")
    base = tiny.model(tmp_path / "base")
    result = run(tmp_path, gradient_accumulation_steps=2, max_steps=1, attention="dense", target_length=128)
    plain = open_model(base)
    setup = Setup(options.from_dict(tiny.options(tmp_path, attention="dense")), plain.config)
    made = model_.Model(setup.config).load(plain)
    ids = plain.tokenizer().encode("a" * 128 + "zq").tolist() + [256]
    parts = [np.array(ids[:128], np.int32), np.array(ids[128:], np.int32)]
    losses = [made.losses(p, np.append(p[1:], -100).astype(np.int32)) for p in parts]
    assert result.loss == pytest.approx(sum(part.sum() for part in losses) / (127 + 2), rel=1e-5)


# By hand: a line or a half cosine from 1 at the end of the warm-up to 0 one step after the last.
COSINE = [0.9045084972, 0.6545084972, 0.3454915028, 0.0954915028]  # (1 + cos(k pi / 5)) / 2


@pytest.mark.parametrize(
    "schedule, wanted",
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", [0.5, 1, *COSINE]),
    ],
)
def test_schedules(schedule, wanted):
    rates = [learning_rate(step, 6, 3.0, 2, schedule) for step in range(1, 7)]
    np.testing.assert_allclose(rates, 3 * np.array(wanted), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "steps, warmup, schedule, wanted",
    [
        (3, 0, "constant", [1, 1, 1]),
        (3, 1, "constant", [1, 1, 1]),
        (4, 2, "constant", [1 / 2, 1, 1, 1]),
        (4, 0.5, "constant", [1 / 2, 1, 1, 1]),
        (4, 0.3, "constant", [1 / 2, 1, 1, 1]),
        (4, 0.2, "constant", [1, 1, 1, 1]),
        (2, 4, "constant", [1 / 4, 1 / 2]),
        (4, 0, "linear", [0.8, 0.6, 0.4, 0.2]),
        (4, 1, "linear", [1, 3 / 4, 1 / 2, 1 / 4]),
        (4, 0, "cosine", COSINE),
        (5, 1, "cosine", [1, *COSINE]),
    ],
)
def test_the_rates_of_a_run_are_the_schedules(tmp_path, steps, warmup, schedule, wanted):
    """warmup_steps counts steps if it is at least 1; below 1 it is a share of the run, rounded up."""
    result = run(
        tmp_path,
        max_steps=steps,
        warmup_steps=warmup,
        lr_scheduler_type=schedule,
        embedding_learning_rate=1e-3,
    )
    for name, peak in (("learning_rate", 1e-2), ("embedding_learning_rate", 1e-3)):
        np.testing.assert_allclose([row[name] for row in result.history], peak * np.array(wanted), rtol=1e-9)


def whole(name):
    """Whether a tensor is an embedding, a head or a norm, which embedding_learning_rate is for."""
    return any(part in name for part in ("embed_tokens", "lm_head", "norm"))


@pytest.mark.parametrize(
    "family, fields, share",
    [
        ("llama", dict(), 1),
        ("llama", dict(modules_to_save=["embed_tokens", "lm_head", "norm"]), 1),
        ("llama", dict(warmup_steps=4), 1 / 4),
        ("qwen2", dict(full=True), 1),
        ("qwen3", dict(full=True), 1),
    ],
    ids=["lora", "lora-head", "warm-up", "qwen2", "qwen3"],
)
def test_both_learning_rates_reach_their_kinds(tmp_path, family, fields, share):
    """Adam's first step moves an element by the rate, wherever its gradient is not next to 0. LoRA's A has
    its first gradient in step 2, when B has moved: Adam's mean is then 0.1 / 0.19 of it, that of its square
    0.05 / 0.0975."""
    base = open_model(tiny.model(tmp_path / "base", model_type=family, tie_word_embeddings=False))
    run(tmp_path, max_steps=2, save_steps=1, learning_rate=1e-3, embedding_learning_rate=1e-5, **fields)
    first, second = (weights(tmp_path / "out" / f"checkpoint-{step}") for step in (1, 2))
    for name, array in first.items():
        if "k_proj.bias" in name:  # its gradient is nothing but rounding
            continue
        if "lora_A" in name:
            moved, wanted = second[name] - array, 1e-3 * min(1, 2 * share) * 0.73495
        elif "lora_B" in name:
            moved, wanted = array, 1e-3 * share
        else:
            whole = any(part in name for part in ("embed_tokens", "lm_head", "norm"))
            moved, wanted = array - base.read(name), (1e-5 if whole else 1e-3) * share
        assert np.abs(moved).max() == pytest.approx(wanted, rel=0.05), name


@pytest.mark.parametrize(
    "family, fields",
    [("llama", dict()), ("qwen2", dict(full=True)), ("qwen3", dict(full=True))],
    ids=["lora", "bias", "norms"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_decays_is_what_decays_under_the_trainer_of_transformers(tmp_path, family, fields):
    """Rate x decay is 1/2: a step halves what decays, and moves all by at most the rate, 0.01."""
    import peft
    from transformers import AutoModelForCausalLM, Trainer

    base = tiny.model(tmp_path / "base", model_type=family, tie_word_embeddings=False)
    theirs, lora = AutoModelForCausalLM.from_pretrained(base), options.TrainOptions()
    if not fields:
        theirs = peft.get_peft_model(
            theirs,
            peft.LoraConfig(
                target_modules=list(lora.target_modules), modules_to_save=list(lora.modules_to_save)
            ),
        )
    decayed = {
        name.replace(".modules_to_save", "").replace(".default", "").removeprefix("base_model.model.")
        for name in Trainer.get_decay_parameter_names(None, theirs)
    }
    run(tmp_path, max_steps=2, save_steps=1, weight_decay=50, **fields)
    first, second = (weights(tmp_path / "out" / f"checkpoint-{step}") for step in (1, 2))
    assert 0 < len(decayed & set(first)) < len(first)
    for name, array in first.items():
        if "lora_A" in name:  # it starts within 1 / sqrt(32) = 0.1768 and has no gradient yet
            assert name in decayed and 0.08 < np.abs(array).max() < 0.0884
        elif "lora_B" in name:  # 0, 0.01, then half of that and 0.01; 0.02 without decay
            assert name in decayed and 0.005 < np.abs(second[name]).max() < 0.0151
        else:
            start = open_model(base).read(name)
            kept = 0.5 if name in decayed else 1
            assert np.abs(start).max() > 0.1 and np.abs(array - kept * start).max() < 0.0101, name


@pytest.mark.parametrize("beta1, beta2, share", [(0.9, 0.95, 0.734964), (0.5, 0, 2 / 3), (0, 0.5, 1.224745)])
def test_adams_means_are_those_of_the_options(tmp_path, beta1, beta2, share):
    """LoRA's A has its first gradient in step 2: it moves by sqrt(1 + beta2) / (1 + beta1) of the rate."""
    run(tmp_path, max_steps=2, save_steps=1, adam_beta1=beta1, adam_beta2=beta2)
    first, second = (weights(tmp_path / "out" / f"checkpoint-{step}") for step in (1, 2))
    moved = [np.abs(second[name] - first[name]).max() for name in first if "lora_A" in name]
    assert moved == pytest.approx([1e-2 * share] * 8, rel=2e-3)


@pytest.mark.parametrize("limit", [0, 0.5])
def test_gradients_are_clipped_to_the_norm_of_the_options(tmp_path, limit):
    """Where epsilon is far above gradients, a step is rate / epsilon, here 1, times the clipped gradient."""
    result = run(tmp_path, max_steps=1, full=True, learning_rate=1e3, adam_epsilon=1e3, max_grad_norm=limit)
    base, (row,) = open_model(tmp_path / "base"), result.history
    moved = math.sqrt(
        sum(
            np.square(array - base.read(name), dtype=np.float64).sum()
            for name, array in weights(tmp_path / "out").items()
        )
    )
    assert row["grad_norm"] > 0.6 and moved == pytest.approx(limit or row["grad_norm"], rel=1e-3)


def test_the_seed_is_that_of_lora_and_of_the_order(tmp_path):
    results = [run(tmp_path, max_steps=1, seed=seed, output_dir=str(tmp_path / f"{seed}")) for seed in (1, 2)]
    assert results[0].loss != results[1].loss  # B is 0, so it is the order that differs
    start = [weights(result.output_dir) for result in results]
    assert all((start[0][name] != start[1][name]).all() for name in start[0] if "lora_A" in name)


@pytest.mark.parametrize(
    "epochs, accumulation, steps", [(0.1, 4, 3), (0.01, 4, 1), (0.04, 4, 1), (0.05, 4, 2), (0.06, 1, 6)]
)
def test_epochs_are_rounded_up_to_whole_steps(tmp_path, epochs, accumulation, steps):
    """An epoch here is 100 sequences."""
    (np.arange(12_800) % 250).astype("<u2").tofile(tmp_path / "ids.bin")
    result = run(
        tmp_path,
        data=str(tmp_path / "ids.bin"),
        max_steps=-1,
        num_train_epochs=epochs,
        gradient_accumulation_steps=accumulation,
    )
    assert result.step == steps
    for row, step in zip(result.history, range(1, steps + 1), strict=True):
        assert row["epoch"] == pytest.approx(step * accumulation / 100)
        assert row["num_input_tokens_seen"] == step * accumulation * 128
    state, _ = resume.load(tmp_path / "out" / f"checkpoint-{steps}")
    wanted = dict(global_step=steps, max_steps=steps, position=steps * accumulation, seed=42)
    assert {name: state[name] for name in wanted} == wanted and state["epoch"] == result.history[-1]["epoch"]


@pytest.mark.parametrize(
    "fields, steps",
    [
        (dict(logging_steps=2), [2, 4, 5]),
        (dict(logging_steps=5), [5]),
        (dict(logging_steps=7), [5]),
        (dict(logging_steps=4, eval_fraction=0.05, eval_steps=3), [0, 3, 4, 5]),
    ],
)
def test_every_nth_step_and_the_last_are_logged(tmp_path, fields, steps):
    said = []
    result = run(tmp_path, said, max_steps=5, **fields)
    assert [row["step"] for row in result.history] == steps
    assert metrics.read(tmp_path / "out") == result.history
    told = [line.split()[1] for line in said if line.startswith("step ")]
    assert told == [f"{step}/5" for step in steps if step]


# ---- packed documents ----------------------------------------------------------------------------

needs_packing = pytest.mark.skipif(
    "cu_seqlens" not in inspect.signature(model_.Model.train_microbatch).parameters,
    reason="Model.train_microbatch does not take cu_seqlens yet",
)


def mean_loss(base, config, documents):
    """The mean loss of transformers over the targets of documents that do not see each other, dense attention."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(config)
    model = AutoModelForCausalLM.from_pretrained(base, config=config, dtype=torch.float32).eval()
    losses = []
    for ids in documents:
        with torch.no_grad():
            logits = model(torch.tensor(ids)[None]).logits[0, :-1].double()
        target = torch.tensor(ids[1:])
        losses.append(torch.nn.functional.cross_entropy(logits, target, reduction="none"))
    return torch.cat(losses).mean().item()


def test_a_batch_of_packed_documents_reaches_the_model_with_its_borders(tmp_path, monkeypatch):
    seen = []

    class Recording(model_.Model):
        def train_microbatch(self, ids, targets, loss_scale, read=True, cu_seqlens=None):
            seen.append((cu_seqlens.tolist(), int((targets >= 0).sum())))
            return super().train_microbatch(ids, targets, loss_scale, read)

    monkeypatch.setattr(model_, "Model", Recording)
    tiny.documents(tmp_path / "few.jsonl", [64, 64, 30, 98, 128])
    fields = dict(data=str(tmp_path / "few.jsonl"), packing_boundaries="document", max_steps=3)
    run(tmp_path, **fields)
    assert sorted(seen) == [([0, 30, 128], 126), ([0, 64, 128], 126), ([0, 128], 127)]


@needs_packing
def test_held_out_documents_do_not_see_each_other(tmp_path):
    tiny.documents(tmp_path / "few.jsonl", [64, 64, 30, 98, 128])
    fields = dict(data=str(tmp_path / "few.jsonl"), max_steps=1)
    held = tiny.documents(tmp_path / "held.jsonl", [64, 64, 20, 60, 48], seed=1)
    fields["eval_data"] = str(tmp_path / "held.jsonl")
    apart = run(tmp_path, packing_boundaries="document", output_dir=str(tmp_path / "apart"), **fields)
    joined = run(tmp_path, output_dir=str(tmp_path / "joined"), **fields)
    losses = (
        mean_loss(tmp_path / "base", tmp_path / "apart", documents)
        for documents in (held, [np.concatenate(held[:2]), np.concatenate(held[2:])])
    )
    for result, wanted in zip((apart, joined), losses, strict=True):
        assert result.history[0]["eval_loss"] == pytest.approx(wanted, rel=1e-5)
    assert apart.history[0]["eval_loss"] != pytest.approx(joined.history[0]["eval_loss"], rel=1e-3)


@needs_packing
@pytest.mark.parametrize("name", ["per_device_train_batch_size", "gradient_accumulation_steps"])
def test_packed_documents_train_as_if_each_were_alone(tmp_path, name):
    """A step over three sequences. The last one is shorter, so that the batch of three ends in padding."""
    documents = tiny.documents(tmp_path / "few.jsonl", [64, 64, 30, 98, 70])
    fields = dict(data=str(tmp_path / "few.jsonl"), packing_boundaries="document", attention="dense")
    result = run(tmp_path, max_steps=1, **fields, **{name: 3})
    wanted = mean_loss(tmp_path / "base", tmp_path / "out", documents)
    assert result.loss == pytest.approx(wanted, rel=1e-5)


@needs_packing
def test_s2_attention_of_a_document_does_not_depend_on_what_it_is_packed_with(tmp_path):
    """One step over two documents of 64 tokens: packed into a sequence, or a sequence each. The groups are of 16."""
    tiny.documents(tmp_path / "few.jsonl", [64, 64])
    fields = dict(data=str(tmp_path / "few.jsonl"), max_steps=2, group_size=16, packing_boundaries="document")
    together = run(tmp_path, output_dir=str(tmp_path / "together"), **fields)
    fields.update(sequence_length=64, per_device_train_batch_size=2)
    apart = run(tmp_path, output_dir=str(tmp_path / "apart"), **fields)
    for a, b in zip(together.history, apart.history, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


# ---- stopping and going on -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        dict(),
        dict(full=True),
        dict(dtype="bfloat16", lr_scheduler_type="cosine", warmup_steps=0.3),
        dict(full=True, dtype="bfloat16"),
        dict(gradient_accumulation_steps=2, per_device_train_batch_size=2, weight_decay=0.1),
    ],
    ids=["lora", "full", "bfloat16", "full-bfloat16", "batches"],
)
def test_resuming_gives_the_bits_of_never_having_stopped(tmp_path, fields):
    fields = dict(
        fields, max_steps=7, eval_fraction=0.1, eval_steps=2, data=str(tiny.text(tmp_path / "few.txt", 400))
    )
    whole = run(tmp_path, save_steps=3, **fields)
    assert whole.history[-1]["epoch"] > 1 or "gradient_accumulation_steps" not in fields
    for step in (3, 6):
        other, since = tmp_path / f"from-{step}", tmp_path / "out" / f"checkpoint-{step}"
        resumed = run(tmp_path, **fields, output_dir=str(other), resume_from_checkpoint=str(since))
        assert numbers(resumed.history) == numbers(whole.history) == numbers(metrics.read(other))
        equal(weights(other), weights(tmp_path / "out"))
        ours, theirs = (resume.load(path / "checkpoint-7")[1] for path in (other, tmp_path / "out"))
        equal(ours, theirs)


def test_resume_latest_goes_on_in_place_and_may_go_further(tmp_path):
    run(tmp_path, max_steps=2)
    assert "has made 2 steps, which is more than the 1 of max_steps" in failure(
        tmp_path, max_steps=1, resume_from_checkpoint="latest"
    )
    said = []
    result = run(
        tmp_path, said, max_steps=4, resume_from_checkpoint="latest", checkpointing="full", num_threads=2
    )
    whole = run(tmp_path, max_steps=4, output_dir=str(tmp_path / "whole"))
    assert numbers(result.history) == numbers(whole.history) and any(
        "checkpoint-2, after step 2" in line for line in said
    )
    equal(weights(tmp_path / "out"), weights(tmp_path / "whole"))


def test_a_run_killed_after_its_last_checkpoint_is_finished_by_resuming(tmp_path):
    first = run(tmp_path, max_steps=2)
    before = weights(tmp_path / "out")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / "out" / name).unlink()
    again = run(tmp_path, max_steps=2, resume_from_checkpoint="latest")
    assert again.step == 2 and again.loss == first.loss and numbers(again.history) == numbers(first.history)
    equal(weights(tmp_path / "out"), before)


def test_rows_after_the_checkpoint_that_is_resumed_are_made_anew(tmp_path):
    run(tmp_path, max_steps=4, save_steps=2)
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    with open(tmp_path / "out" / metrics.FILE, "a") as file:
        file.write('{"step": 5, "lo')  # a run was killed while it wrote this line
    assert [row["step"] for row in metrics.read(tmp_path / "out")] == [1, 2, 3, 4]
    result = run(tmp_path, max_steps=4, resume_from_checkpoint="latest")
    assert [row["step"] for row in metrics.read(tmp_path / "out")] == [1, 2, 3, 4]
    assert metrics.read(tmp_path / "out") == result.history


def test_a_half_written_line_is_no_row(tmp_path):
    one, two = {"step": 1}, {"step": 2}
    for text, rows in (
        ('{"step": 1}\n{"st', [one]),
        ('{"step": 1}\n{"step": 2}', [one]),
        ('{"step": 1}\n{"step": 2}\n', [one, two]),
        ("", []),
    ):
        (tmp_path / metrics.FILE).write_text(text)
        assert metrics.read(tmp_path) == rows
    (tmp_path / metrics.FILE).write_text('{"st\n{"step": 2}\n')
    with pytest.raises(UserError, match="is damaged"):
        metrics.read(tmp_path)


def test_an_option_that_a_checkpoint_does_not_know_has_its_default(tmp_path):
    first = run(tmp_path, max_steps=2)
    path = tmp_path / "out" / "checkpoint-2" / resume.STATE
    state = json.loads(path.read_text())
    del state["options"]["packing_boundaries"]
    path.write_text(json.dumps(state))
    message = failure(tmp_path, packing_boundaries="document", resume_from_checkpoint="latest")
    assert "packing_boundaries 'none', got 'document'" in message
    again = run(tmp_path, max_steps=3, resume_from_checkpoint="latest")
    assert again.step == 3 and numbers(again.history[:2]) == numbers(first.history)


def test_resume_latest_without_a_checkpoint_starts(tmp_path):
    said = []
    run(tmp_path, said, resume_from_checkpoint="latest")
    assert any("no checkpoint yet" in line for line in said)


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(learning_rate=2e-3), "was trained with learning_rate 0.01, got 0.002"),
        (dict(seed=1), "seed 42, got 1"),
        (dict(group_size=64), "group_size 32, got 64"),
        (dict(r=4), "r 8, got 4"),
        (dict(dtype="bfloat16"), "dtype 'float32'"),
        (dict(data="other.txt"), "other data"),
        (dict(model="other"), "another base model"),
        (dict(eval_fraction=0.3), "other data"),
        (dict(packing_boundaries="document"), "packing_boundaries 'none', got 'document'"),
        (dict(warmup_steps=3), "another warm-up or length"),
        (dict(resume_from_checkpoint="base"), "is not a checkpoint"),
    ],
)
def test_a_resumed_run_must_be_the_run_that_stopped(tmp_path, fields, words):
    run(tmp_path, max_steps=2)
    tiny.text(tmp_path / "other.txt", seed=5)
    tiny.model(tmp_path / "other", seed=5)
    fields = {
        key: str(tmp_path / value) if value in ("other.txt", "other", "base") else value
        for key, value in fields.items()
    }
    before = tiny.listing(tmp_path / "out")
    assert words in failure(tmp_path, **{**dict(max_steps=4, resume_from_checkpoint="latest"), **fields})
    assert tiny.listing(tmp_path / "out") == before


# Every option stands in one of the two. KEPT: a resumed run must have it as it was; here is another value.
KEPT = dict(
    packing_boundaries="document",
    target_length=256,
    sequence_length=126,
    rope_type="yarn",
    attention="dense",
    group_size=64,
    boundary="swap",
    shift="all",
    r=4,
    lora_alpha=8.0,
    target_modules=["q_proj"],
    modules_to_save=[],
    full=True,
    dtype="bfloat16",
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    learning_rate=2e-2,
    embedding_learning_rate=2e-2,
    lr_scheduler_type="linear",
    weight_decay=0.1,
    adam_beta1=0.8,
    adam_beta2=0.9,
    adam_epsilon=1e-6,
    max_grad_norm=0.5,
    long_documents="drop",
    eval_fraction=0.2,
    seed=1,
)
# FREE: a resumed run may change it, to this value for one.
FREE = dict(
    model="copy",
    init=None,
    data="copy.jsonl",
    output_dir="other",
    cache_dir="elsewhere",
    eval_data="held.txt",
    resume_from_checkpoint="out/checkpoint-2",
    checkpointing="full",
    max_memory=2.0,
    num_threads=2,
    device="auto",
    max_steps=4,
    num_train_epochs=2.0,
    warmup_steps=0.25,
    eval_steps=1,
    max_eval_samples=1,
    save_steps=1,
    save_total_limit=1,
    logging_steps=2,
    profile=False,
)
FIRST = dict(
    max_steps=2,
    eval_fraction=0.1,
    sequence_length=128,
    group_size=32,
    embedding_learning_rate=1e-2,
    lr_scheduler_type="cosine",
)


def few(path):
    """Eight documents of 60 tokens and an end: 4 sequences of 128 tokens, and of 126."""
    path.write_text("".join(json.dumps({"text": letter * 60}) + "\n" for letter in "abcdefgh"))
    return str(path)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A directory with a finished run of the options FIRST."""
    path = tmp_path_factory.mktemp("stopped")
    run(path, data=few(path / "few.jsonl"), **FIRST)
    return path


@pytest.mark.parametrize("name", KEPT)
def test_what_is_in_the_arithmetic_may_not_change_on_resuming(stopped, name):
    before = tiny.listing(stopped / "out")
    fields = dict(FIRST, data=str(stopped / "few.jsonl"), resume_from_checkpoint="latest")
    fields[name] = KEPT[name]
    if name == "attention":
        del fields["group_size"]  # dense attention has none
    message = failure(stopped, **fields)
    assert f"was trained with {name} " in message and message.endswith(f", got {KEPT[name]!r}")
    assert tiny.listing(stopped / "out") == before


def test_everything_else_may_change_on_resuming(tmp_path):
    assert sorted([*KEPT, *FREE]) == sorted(options.TrainOptions.__dataclass_fields__)
    first = run(tmp_path, max_steps=2, data=few(tmp_path / "few.jsonl"), warmup_steps=1)
    shutil.copytree(tmp_path / "base", tmp_path / "copy")
    few(tmp_path / "copy.jsonl")
    tiny.text(tmp_path / "held.txt", 100)
    paths = "model", "data", "output_dir", "cache_dir", "eval_data", "resume_from_checkpoint"
    fields = FREE | {name: str(tmp_path / FREE[name]) for name in paths}
    result = run(tmp_path, **fields)
    assert [row["step"] for row in result.history] == [1, 2, 3, 4] and result.eval_loss
    assert numbers(result.history)[:2] == numbers(first.history)
    result = run(
        tmp_path,
        max_steps=3,
        data=few(tmp_path / "few.jsonl"),
        warmup_steps=1,
        profile=True,
        resume_from_checkpoint="latest",
    )
    assert result.step == 3


def test_a_schedule_that_depends_on_the_length_of_the_run_keeps_it(tmp_path):
    run(tmp_path, max_steps=2, lr_scheduler_type="cosine")
    message = failure(tmp_path, max_steps=4, lr_scheduler_type="cosine", resume_from_checkpoint="latest")
    assert "another warm-up or length" in message


def started(tmp_path, **fields):
    """A run in a process of its own, past its first steps."""
    process = subprocess.Popen(
        [sys.executable, "-m", "longlora", "train", *tiny.flags(tiny.options(tmp_path, **fields))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("step 3/"):
            return process
    raise AssertionError(process.communicate()[1])


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_step_saves_and_the_run_goes_on_exactly(tmp_path, number, code):
    fields = dict(max_steps=20_000)
    process = started(tmp_path, **fields)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    (path,) = resume.found(tmp_path / "out")
    state, _ = resume.load(path)
    step = state["global_step"]
    assert (
        f"stopped by {number.name} after step {step}" in output
        and path in output
        and "Traceback" not in errors
    )
    assert metrics.read(tmp_path / "out")[-1]["step"] == step
    assert not (tmp_path / "out" / adapter.CONFIG).exists()  # the run has not ended
    whole = run(tmp_path, max_steps=step + 2, output_dir=str(tmp_path / "whole"))
    resumed = run(tmp_path, max_steps=step + 2, resume_from_checkpoint="latest")
    assert numbers(resumed.history) == numbers(whole.history)
    equal(weights(tmp_path / "out"), weights(tmp_path / "whole"))


def test_two_runs_do_not_share_a_directory(tmp_path):
    process = started(tmp_path, max_steps=100_000)
    try:
        assert "another run is writing there now" in failure(tmp_path, resume_from_checkpoint="latest")
    finally:
        process.kill()
        process.communicate()
    run(tmp_path, resume_from_checkpoint="latest")  # the lock died with its holder


# ---- what goes wrong -----------------------------------------------------------------------------


def test_a_run_or_a_model_is_never_written_over(tmp_path):
    run(tmp_path, max_steps=1)
    before = tiny.listing(tmp_path)
    assert "holds another run" in failure(tmp_path)
    assert "holds another run or a model (config.json)" in failure(
        tmp_path, output_dir=str(tmp_path / "base")
    )
    assert "is not a directory" in failure(tmp_path, output_dir=str(tmp_path / "text.txt"))
    assert tiny.listing(tmp_path) == before


@pytest.mark.parametrize(
    "name",
    [
        "metrics.jsonl",
        "options.yaml",
        "adapter_config.json",
        "config.json",
        "checkpoint-12/trainer_state.json",
    ],
)
def test_one_file_of_a_run_or_a_model_is_enough_to_refuse(tmp_path, name):
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).write_text("{}")
    assert f"holds another run or a model ({name.partition('/')[0]})" in failure(tmp_path)


def test_a_loss_that_is_not_finite_stops_with_the_step(tmp_path):
    message = failure(tmp_path, learning_rate=1e30, max_steps=20, save_steps=1)
    assert message.startswith("step ") and "not finite" in message and "stopped" in message
    step = int(message.split()[1].rstrip(":"))
    assert step > 1 and metrics.read(tmp_path / "out")[-1]["step"] == step - 1
    (newest,) = resume.found(tmp_path / "out")[-1:]
    assert newest.endswith(f"checkpoint-{step - 1}") and newest in message


@pytest.mark.parametrize(
    "spoilt, row, column",
    [("model.layers.1.mlp.up_proj.weight", 3, 4), ("model.embed_tokens.weight", 8000, 7)],
)
def test_weights_that_are_not_finite_are_named(tmp_path, spoilt, row, column):
    """A tensor of 288,000 numbers is read piece by piece."""

    def spoil(name, array):
        if name == spoilt:
            array[row, column] = np.nan

    tiny.model(tmp_path / "base", change=spoil, vocab_size=9000)
    assert f"{spoilt} is not finite at [{row}, {column}]" in failure(tmp_path)


@pytest.mark.parametrize(
    "fields, kind",
    [
        (dict(learning_rate=1e-30, embedding_learning_rate=0.01), "lora_A"),
        (dict(embedding_learning_rate=1e-30), "embedding"),
    ],
)
def test_updates_lost_in_rounding_are_named(tmp_path, fields, kind):
    message = failure(tmp_path, **fields)
    assert (
        f"{kind} does not train" in message
        and "below the rounding" in message
        and message.startswith("step ")
    )


def test_a_warm_up_may_start_below_rounding(tmp_path):
    fields = dict(max_steps=12, warmup_steps=10, lr_scheduler_type="cosine")
    assert run(tmp_path, **fields, learning_rate=3e-7, save_steps=11).step == 12
    resumed = run(
        tmp_path,
        **fields,
        learning_rate=3e-7,
        output_dir=str(tmp_path / "resumed"),
        resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-11"),
    )
    assert resumed.step == 12


@pytest.mark.parametrize("kind, step", [("lora_B", 1), ("lora_A", 2), ("norm", 1), ("embedding", 1)])
def test_a_kind_without_gradient_is_named(tmp_path, monkeypatch, kind, step):
    class Broken(model_.Model):
        def train_microbatch(self, *args, **kwargs):
            loss = super().train_microbatch(*args, **kwargs)
            for p in self.parameters:
                if p.kind == kind:
                    p.grad.fill(0)
            return loss

    monkeypatch.setattr(model_, "Model", Broken)
    message = failure(tmp_path)
    assert message.startswith(f"step {step}: {kind} does not train") and "its gradient is zero" in message
    assert not resume.found(tmp_path / "out")


def test_a_run_that_does_not_fit_says_what_would(tmp_path):
    message = failure(tmp_path, max_memory=1e-6)
    assert (
        "this run needs" in message
        and "what would make it fit" in message
        and not (tmp_path / "out").exists()
    )


def test_what_is_evaluated_can_be_limited(tmp_path):
    said = []
    run(
        tmp_path,
        said,
        eval_data=str(tiny.text(tmp_path / "held.txt", 900, seed=9)),
        max_eval_samples=2,
        max_steps=1,
    )
    assert any("2 sequences are evaluated" in line for line in said)


def in_process(script, fields):
    """A run in a process of its own, by `script`."""
    command = [sys.executable, "-c", script, "train", *tiny.flags(fields)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_full_disk_leaves_the_older_checkpoints(tmp_path):
    """Files may not grow above 50 kB: the metrics may, the optimizer's state may not."""
    run(tmp_path, max_steps=1)
    before = tiny.listing(tmp_path / "out")
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); "
        "from longlora.cli import main; sys.exit(main())"
    )
    fields = tiny.options(tmp_path, max_steps=3, save_steps=2, resume_from_checkpoint="latest")
    done = in_process(script, fields)
    tiny.refused(done, "checkpoint-2", "cannot be written")
    assert "step 2/3" in done.stdout
    after = tiny.listing(tmp_path / "out")
    kept = [name for name in before if "checkpoint-1" in name or name.endswith("adapter_model.safetensors")]
    assert kept and all(after[name] == before[name] for name in kept)
    assert not [name for name in after if "partial" in name]
    assert run(tmp_path, max_steps=3, resume_from_checkpoint="latest").step == 3


def test_a_run_takes_no_torch(tmp_path):
    script = (
        "import sys; from longlora.cli import main; code = main(); "
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules); sys.exit(code)"
    )
    done = in_process(script, tiny.options(tmp_path))
    assert done.returncode == 0, done.stderr


def test_peak_memory_is_not_that_of_the_program_that_started_it():
    """As far as /proc says it: subprocess lends a child its parent's pages until it runs its own program."""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("this system has no /proc/self/status to read the peak from")
    held = np.ones(300 << 20, np.uint8)
    code = "from longlora.training import metrics; print(metrics.peak_memory())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert 1 << 20 < int(done.stdout) < held.nbytes < metrics.peak_memory()
