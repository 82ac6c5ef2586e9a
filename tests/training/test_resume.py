"""A stopped run continues bit by bit; what a resumed run may change."""

import json
import shutil
import signal
import subprocess
import sys

import pytest
import tiny
from runs import equal, failure, numbers, run, weights

from longlora.errors import UserError
from longlora.files import adapter
from longlora.training import metrics, options, resume


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
    assert "has made 2 steps, more than the 1 of max_steps" in failure(
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
    adapter=None,
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
    eval_passkey=1,
    save_steps=1,
    save_total_limit=1,
    load_best_model_at_end=True,
    metric_for_best_model="loss",
    logging_steps=2,
    report_to=["tensorboard"],
    run_name="again",
    profile=False,
)
# Options of questions and answers; tests/training/test_instructions.py resumes with them.
OF_ANSWERS = ["chat_template", "train_on_inputs"]
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
    assert sorted([*KEPT, *FREE, *OF_ANSWERS]) == sorted(options.TrainOptions.__dataclass_fields__)
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
    output, errors = process.communicate(timeout=1200)
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
