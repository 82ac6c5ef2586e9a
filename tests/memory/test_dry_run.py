"""The dry run of a step makes exactly the calls of a step."""

import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import peers
import pytest
from systems import on_linux

from longlora import _C, job
from longlora.decoder import plan as plan_
from longlora.decoder.layer import RECOMPUTE
from longlora.errors import UserError
from longlora.memory.dry_run import Recorder, untouched
from longlora.training.optimizer import AdamW

BORDERS = [0, 30, 74]


def shapes(args):
    return tuple((tuple(x.shape), x.dtype) if isinstance(x, _C.Tensor) else x for x in args)


def calls_of_a_step(made, monkeypatch, cu_seqlens):
    """Make a step on ids [2, 37] -> [(op, arguments)]."""
    calls = []
    for op in _C.specs:
        function = getattr(_C, op)

        def noted(*args, op=op, function=function):
            calls.append((op, args))
            function(*args)

        monkeypatch.setattr(_C, op, noted)
    ids, targets = peers.tokens(2, 37)
    made.train_microbatch(ids, targets, 1.0, cu_seqlens=cu_seqlens)
    AdamW(made.parameters).step(dict.fromkeys(made.kinds, 1e-3))
    return calls


def alike(calls):
    """[(op, shapes and scalars)], without the tables of rope and the length of cu_seqlens."""
    found = []
    for op, args in calls:
        if op.startswith("rope"):
            args = (*args[:2], *args[4:])
        if op.startswith("s2_attention"):
            place = 5 if op.endswith("forward") else 9
            args = (*args[:place], args[place] is None, *args[place + 1 :])
        found.append((op, shapes(args)))
    return found


@pytest.mark.parametrize("cu_seqlens", [None, BORDERS], ids=["rows", "packed"])
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("lora", ["full", "paper", "few"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "granite", "smollm3"])
def test_a_dry_run_makes_the_calls_of_a_step(name, lora, recompute, cu_seqlens, monkeypatch):
    lora = peers.lora_of(name, lora)
    made = peers.build(name, lora, dtype="bfloat16", checkpointing=recompute)
    noted = []
    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "_note", lambda self, op, args: noted.append((op, args)))
        plan_.plan(
            made.config,
            dtype="bfloat16",
            batch_size=2,
            sequence_length=37,
            group_size=8,
            lora=lora,
            checkpointing=recompute,
            packed=cu_seqlens is not None,
        )
    step = calls_of_a_step(made, monkeypatch, cu_seqlens)
    assert alike(noted) == alike([call for call in step if call[0] not in ("adamw", "cast")])


def test_the_recorder_keeps_the_largest_block_of_each_rank(monkeypatch):
    monkeypatch.setattr(_C, "scratch", lambda op, *args: args)
    monkeypatch.setattr(_C, "workspace", lambda op, *args: args[0])
    cpu, gpu = Recorder("cpu"), Recorder("cuda:0")
    for blocks in ((3, 10), (7,), (2, 8, 5), (0, 0, 0, 0), ()):
        cpu.matmul(*blocks)
    for size in (3, 10, 7):
        gpu.matmul(size)
    assert cpu.bytes == 10 + 5 + 2 and gpu.bytes == 10
    with pytest.raises(AttributeError, match="there is no op 'matmull'"):
        cpu.matmull()


def strict():
    """Whether the system limits address space to its memory."""
    path = "/proc/sys/vm/overcommit_memory"
    return os.path.exists(path) and Path(path).read_text().strip() == "2"


@pytest.mark.skipif(strict(), reason="the system forbids overcommitment")
def test_untouched_memory_costs_none():
    """Bytes: sixteen times the machine's memory."""
    total = os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE
    before = job.resident_memory()
    arena = untouched(16 * total)
    rows = arena.view((total // 4, 4), "float32", 12 * total)[total // 8 :]
    assert rows.shape == (total // 4 - total // 8, 4) and job.resident_memory() - before < 1 << 20
    assert untouched(0).shape == (1,)
    np.testing.assert_array_equal(arena[:8].numpy(), 0)


@on_linux
def test_a_plan_needs_no_address_space():
    """Under ulimit -v a model of 16 GiB has the parts that it has without, and what would make it fit."""
    script = """if True:
        import json, resource, sys
        from longlora import _C
        from longlora.decoder import plan
        from longlora.decoder.config import read_config
        from longlora.decoder.lora import LoraConfig
        from longlora.memory.dry_run import untouched
        config = dict(
            model_type="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336,
            num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192,
            rms_norm_eps=1e-5, tie_word_embeddings=False, hidden_act="silu", initializer_range=0.02)
        how = dict(dtype="bfloat16", sequence_length=8192, group_size=2048, lora=LoraConfig(), memory=8 << 30)
        free = plan.plan(read_config(config), **how)
        resource.setrlimit(resource.RLIMIT_AS, (2 << 30, -1))
        limited = plan.plan(read_config(config), **how)
        a, b = untouched(8 << 30), untouched(8 << 30)
        assert a.shape == b.shape == (8 << 30,) and a[1 << 30:].shape == (7 << 30,)
        assert free.total > 16 << 30 and limited.changes and limited.changes == free.changes
        print(free.parts == limited.parts)
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=1200)
    assert done.stdout == "True\n", done.stderr


def test_no_machine_has_that_much():
    with pytest.raises(UserError, match="needs 9223372036854775807 bytes of address space, though no memory"):
        untouched((1 << 63) - 1)
