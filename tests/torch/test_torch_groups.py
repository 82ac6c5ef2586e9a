"""longlora.torch.train in groups of processes makes the steps of one process, and continues its checkpoints.

The processes run on the CPU over gloo; torch_worker.py says what they pretend.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import forked
import numpy as np
import pytest
import tiny
from torch_runs import close, run, same_rows, trained

from longlora.training import metrics, resume

pytest.importorskip("torch", reason="longlora.torch is for torch")
pytest.importorskip("accelerate", reason="Trainer needs accelerate")
ours = pytest.importorskip("longlora.torch.train", reason="longlora.torch.train needs transformers and peft")

HERE = Path(__file__).parent

# As `accelerate config` writes it.
FSDP2 = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "FSDP",
    "machine_rank": 0,
    "num_machines": 1,
    "num_processes": 2,
    "main_process_port": 0,
    "mixed_precision": "no",
    "use_cpu": False,
    "fsdp_config": {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_reshard_after_forward": True,
        "fsdp_cpu_ram_efficient_loading": True,
        "fsdp_state_dict_type": "SHARDED_STATE_DICT",
    },
}
DEEPSPEED = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "DEEPSPEED",
    "machine_rank": 0,
    "num_machines": 1,
    "num_processes": 2,
    "main_process_port": 0,
    "mixed_precision": "no",
    "use_cpu": False,
}


def launched(tmp_path, output, config=None, fork=True, **fields):
    """A run by two processes: by torchrun, or by accelerate launch with `config` -> what it said.

    fork: the launcher and the processes are forked (forked.py), not started as users start them."""
    fields = tiny.options(tmp_path, output_dir=str(tmp_path / output), **fields)
    if config is None:
        command = [
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "-m",
            "longlora.torch.train",
        ]
    else:
        file = tmp_path / "accelerate.yaml"
        file.write_text(json.dumps(config))
        command = ["accelerate.commands.launch", "--config_file", str(file), str(HERE / "torch_worker.py")]
    words, env = ["-m", *command, *tiny.flags(fields)], {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    if fork:
        done = forked.run(words, env=env)
    else:
        done = subprocess.run(
            [sys.executable, *words], capture_output=True, text=True, timeout=1200, env={**os.environ, **env}
        )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def two_equal_one(tmp_path, config):
    """Two processes make the steps of one with twice the batches: rows, adapter, checkpoints. One goes on for
    two.

    The text ends in a short sequence, which makes the two processes' shares of a step's tokens unequal."""
    fields = dict(
        data=str(tiny.text(tmp_path / "few.txt", 320)),
        eval_data=str(tiny.text(tmp_path / "held.txt", 80, seed=9)),
        max_steps=5,
        embedding_learning_rate=3e-3,
        lr_scheduler_type="cosine",
        weight_decay=0.1,
        per_device_train_batch_size=2,
    )
    one = run(ours.train, tmp_path, "one", gradient_accumulation_steps=4, save_steps=2, **fields)
    said = launched(
        tmp_path, "two", config, fork=False, gradient_accumulation_steps=2, save_steps=2, **fields
    )
    assert said.count("step 5/5") == 1 and "2 x 2 x 2 x 128 = 1,024 tokens by 2 processes" in said
    assert "device: cpu, 1 thread, in the first of 2 processes" in said
    same_rows(metrics.read(tmp_path / "two"), one.history, rel=2e-5)
    close(trained(tmp_path / "two"), trained(tmp_path / "one"))
    for name, array in resume.load(tmp_path / "two" / "checkpoint-5")[1].items():
        want = resume.load(tmp_path / "one" / "checkpoint-5")[1][name]
        assert np.linalg.norm(array - want) <= 2e-2 * np.linalg.norm(want), name
    last = str(tmp_path / "two" / "checkpoint-4")
    rest = run(
        ours.train, tmp_path, "rest", gradient_accumulation_steps=4, resume_from_checkpoint=last, **fields
    )
    same_rows(rest.history, one.history, rel=2e-5)


def test_two_processes_by_torchrun_make_the_steps_of_one(tmp_path):
    two_equal_one(tmp_path, None)


def test_two_processes_by_fsdp2_make_the_steps_of_one(tmp_path):
    two_equal_one(tmp_path, FSDP2)


def test_two_go_on_for_one_by_fsdp2(tmp_path):
    """The head is untied: accelerate shards the last norm and the head as a unit of their own."""
    tiny.model(tmp_path / "base", tie_word_embeddings=False)
    one = run(ours.train, tmp_path, "one", gradient_accumulation_steps=2, max_steps=4, save_steps=2)
    first = str(tmp_path / "one" / "checkpoint-2")
    launched(tmp_path, "two", FSDP2, max_steps=4, resume_from_checkpoint=first)
    same_rows(metrics.read(tmp_path / "two"), one.history, rel=2e-5)
    close(trained(tmp_path / "two"), trained(tmp_path / "one"))


def test_swapped_layers_under_fsdp2(tmp_path):
    worker = HERE / "swap_fsdp2_worker.py"
    for done in forked.together([[worker, rank, tmp_path] for rank in range(2)]):
        assert done.returncode == 0, done
        for case in json.loads(done.stdout):
            parts = dict(rms_norm=10, swiglu=2, lora_linear=8, rope=2, linear_cross_entropy=1)
            assert case["counts"] == parts, case["case"]
            assert case["losses"] == pytest.approx(case["alone"], rel=1e-5), case["case"]
            assert case["logits"] == case["wants_logits"], case["case"]
            assert case["names"] == case["wanted"] and case["numbers"] > 0 and case["apart"] < 1e-4, case[
                "case"
            ]


@pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="deepspeed is not installed")
@pytest.mark.parametrize("stage", [2, 3])
def test_two_processes_by_deepspeed_make_the_steps_of_one(tmp_path, stage):
    two_equal_one(
        tmp_path, {**DEEPSPEED, "deepspeed_config": {"zero_stage": stage, "zero3_init_flag": stage == 3}}
    )
