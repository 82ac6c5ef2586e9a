"""What goes wrong in a run is named, with its step, and nothing is overwritten."""

import os
import subprocess
import sys

import numpy as np
import pytest
import tiny
from runs import failure, run

from longlora import job
from longlora.decoder import model as model_
from longlora.training import metrics, resume


def test_a_run_or_a_model_is_never_written_over(tmp_path):
    run(tmp_path, max_steps=1)
    before = tiny.listing(tmp_path)
    assert "holds another run" in failure(tmp_path)
    assert "holds another run or a model (config.json)" in failure(
        tmp_path, output_dir=str(tmp_path / "base")
    )
    assert "is not a directory" in failure(tmp_path, output_dir=str(tmp_path / "text.txt"))
    assert tiny.listing(tmp_path) == before


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
    assert any("evaluated on 2 sequences" in line for line in said)


def in_process(script, fields):
    """A run in a process of its own, by `script`."""
    command = [sys.executable, "-c", script, "train", *tiny.flags(fields)]
    return subprocess.run(command, capture_output=True, text=True, timeout=1200)


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
    code = "from longlora import job; print(job.peak_memory())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=1200
    )
    assert 1 << 20 < int(done.stdout) < held.nbytes < job.peak_memory()
