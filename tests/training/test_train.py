"""Whole runs of tiny models: what they say and write; rates, decay, steps and rows with values by hand."""

import json
import math
import os

import numpy as np
import pytest
import tiny
import yaml
from runs import equal, failure, numbers, run, weights

from longlora.decoder import model as model_
from longlora.files.open_model import open_model
from longlora.training import metrics, options, resume
from longlora.training.inputs import Setup
from longlora.training.run import learning_rate


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
        "1 longer document split",
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
            "longlora_base",
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
    assert json.loads((out / "longlora_base" / "config.json").read_text())["max_position_embeddings"] == 128
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
    "epochs, accumulation, steps",
    [(0.1, 4, 3), (0.01, 4, 1), (0.04, 4, 1), (0.05, 4, 2), (0.06, 1, 6), (0.1, 1, 10)],
)
def test_epochs_are_rounded_up_to_whole_steps(tmp_path, epochs, accumulation, steps):
    """An epoch here is 100 sequences."""
    (np.arange(12_800) % 250).astype("<u2").tofile(tmp_path / "ids.bin")
    said = []
    result = run(
        tmp_path,
        said,
        data=str(tmp_path / "ids.bin"),
        max_steps=-1,
        num_train_epochs=epochs,
        gradient_accumulation_steps=accumulation,
    )
    assert result.step == steps
    assert any(line.startswith("few steps: ") for line in said) == (steps < 10)
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
