"""The driver on a GPU or its emulation: it computes what the CPU computes, and runs move between the two by
files.

Tolerances: in float32 the devices differ by the order of sums, 2^-24 of a value each. AdamW can turn this
into a whole step where a gradient is almost zero, but such steps hardly change the loss. On the emulation,
ten steps were within 4e-8 of the loss and 3e-7 of the gradient norm; a GPU may sum in yet another order. In
bfloat16 some numbers round differently, by 2^-8 of themselves: 6e-4 of the mean loss of 64 tokens and 9e-3 of
the norm.
"""

import json
import os
import signal
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import tiny

from longlora import _C, cuda, device
from longlora.decoder import model as model_
from longlora.decoder import plan as plan_
from longlora.decoder.config import read_config
from longlora.decoder.lora import LoraConfig
from longlora.errors import UserError
from longlora.evaluation import ppl
from longlora.files import merge, model_file
from longlora.files.open_model import open_model
from longlora.training import driver, metrics
from longlora.training import resume as checkpoint
from longlora.training.optimizer import AdamW

if not cuda.is_available():
    pytest.skip(f"no GPU and no emulation of one: {cuda.reason()}", allow_module_level=True)

GPU, CLOSE = "cuda:0", {"float32": 2e-6, "bfloat16": 2e-3}
SMALL = dict(target_length=96, sequence_length=64, group_size=32)


def run(tmp_path, said=None, **fields):
    return driver.train(
        said.append if said is not None else lambda line: None,
        **tiny.options(tmp_path, **{**SMALL, **fields}),
    )


def on_both(tmp_path, **fields):
    return [
        run(tmp_path, device=name, output_dir=str(tmp_path / name.partition(":")[0]), **fields)
        for name in ("cpu", GPU)
    ]


def numbers(rows):
    return [
        {key: value for key, value in row.items() if key not in ("tokens_per_s", "peak_memory")}
        for row in rows
    ]


def stored(path):
    """The bytes of every tensor of a run's files."""
    found = {}
    for root, _, names in os.walk(path):
        for name in names:
            if name.endswith(".safetensors"):
                data = open(os.path.join(root, name), "rb").read()
                found[os.path.relpath(os.path.join(root, name), path)] = data[
                    8 + int.from_bytes(data[:8], "little") :
                ]
    return found


@pytest.mark.parametrize("dtype", list(CLOSE))
def test_ten_steps_have_the_losses_of_the_cpu(tmp_path, dtype):
    cpu, gpu = on_both(tmp_path, dtype=dtype, max_steps=10)
    for a, b in zip(cpu.history, gpu.history, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=CLOSE[dtype]), a["step"]
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=20 * CLOSE[dtype]), a["step"]
    assert gpu.history[-1]["loss"] < gpu.history[0]["loss"]
    assert stored(tmp_path / "cpu").keys() == stored(tmp_path / "cuda").keys()


@pytest.mark.parametrize(
    "fields",
    [
        dict(full=True),
        dict(full=True, dtype="bfloat16", checkpointing="full"),
        dict(
            checkpointing="minimal",
            target_modules=["all-linear"],
            modules_to_save=[],
            per_device_train_batch_size=2,
        ),
        dict(attention="dense", group_size=None, gradient_accumulation_steps=3),
    ],
    ids=["full", "full-bfloat16", "all-linear", "dense"],
)
def test_other_kinds_of_runs_too(tmp_path, fields):
    cpu, gpu = on_both(tmp_path, max_steps=3, **fields)
    for a, b in zip(cpu.history, gpu.history, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=CLOSE[fields.get("dtype", "float32")])


def test_the_loss_is_read_in_logged_steps_only(tmp_path, monkeypatch):
    """A step waits for one number, the norm. Logged rows equal those of a run that logs every step."""
    each = run(tmp_path, device=GPU, max_steps=6, output_dir=str(tmp_path / "each"))
    reads, real = [], model_.Model.train_microbatch

    def counted(model, ids, targets, loss_scale, read=True, cu_seqlens=None):
        before = device.waits()
        found = real(model, ids, targets, loss_scale, read, cu_seqlens)
        reads.append((read, device.waits() - before))
        return found

    monkeypatch.setattr(model_.Model, "train_microbatch", counted)
    some = run(tmp_path, device=GPU, max_steps=6, logging_steps=3, output_dir=str(tmp_path / "some"))
    assert reads == [(False, 0), (False, 0), (True, 1)] * 2
    assert numbers(some.history) == [row for row in numbers(each.history) if row["step"] in (3, 6)]
    ours, theirs = stored(tmp_path / "some"), stored(tmp_path / "each")
    assert ours == theirs


def test_resuming_crosses_from_one_to_the_other(tmp_path):
    fields = dict(max_steps=4, eval_fraction=0.05, max_eval_samples=1)
    whole = {
        name: run(tmp_path, device=name, save_steps=2, output_dir=str(tmp_path / name[:4]), **fields)
        for name in ("cpu", GPU)
    }
    for first, then in (("cpu", GPU), (GPU, "cpu"), (GPU, GPU)):
        out = tmp_path / f"{first[:4]}-{then[:4]}"
        since = str(tmp_path / first[:4] / "checkpoint-2")
        resumed = run(tmp_path, device=then, output_dir=str(out), resume_from_checkpoint=since, **fields)
        if first == then:  # bit by bit
            assert numbers(resumed.history) == numbers(whole[then].history) == numbers(metrics.read(out))
            made = stored(tmp_path / then[:4])
            assert stored(out) == {
                name: data for name, data in made.items() if not name.startswith("checkpoint-2")
            }
        for a, b in zip(whole[then].history, resumed.history, strict=True):
            for key in ("loss", "eval_loss"):
                assert (key in a) == (key in b) and b.get(key, 0) == pytest.approx(
                    a.get(key, 0), rel=CLOSE["float32"]
                )


def test_a_signal_saves_and_the_run_goes_on(tmp_path):
    def say(line):
        if line.startswith("step 2/"):
            os.kill(os.getpid(), signal.SIGINT)

    fields = tiny.options(tmp_path, **SMALL, device=GPU, max_steps=4)
    stopped = driver.train(say, **fields)
    assert stopped.stopped == signal.SIGINT and stopped.step in (2, 3)  # the signal may be seen a step later
    (path,) = checkpoint.found(tmp_path / "out")
    assert path.endswith(f"checkpoint-{stopped.step}")
    resumed = run(tmp_path, device=GPU, max_steps=4, resume_from_checkpoint="latest")
    whole = run(tmp_path, device=GPU, max_steps=4, output_dir=str(tmp_path / "whole"))
    assert numbers(resumed.history) == numbers(whole.history)


@pytest.mark.parametrize("logging_steps", [1, 100])
def test_what_is_not_finite_is_named_and_never_saved(tmp_path, logging_steps):
    with pytest.raises(UserError, match=r"step \d+: the (loss|gradient) is not finite"):
        run(tmp_path, device=GPU, learning_rate=1e30, max_steps=20, logging_steps=logging_steps)
    for path in checkpoint.found(tmp_path / "out"):  # the steps before
        assert all(np.isfinite(x).all() for x in checkpoint.load(path)[1].values())
    made = model_.Model(
        read_config(tiny.CONFIG),
        lora=LoraConfig(),
        device=GPU,
        plan=plan_.plan(read_config(tiny.CONFIG), sequence_length=8, lora=LoraConfig(), device=GPU),
    ).init_random()
    optimizer = AdamW(made.parameters)
    before = {name: np.array(device.host(x)) for name, x in optimizer.state_dict().items()}
    made.parameters[0].grad.fill(float("nan"))
    with pytest.raises(UserError, match="the gradient is not finite"):
        optimizer.step(dict.fromkeys(made.kinds, 1.0))
    for name, x in optimizer.state_dict().items():
        np.testing.assert_array_equal(device.host(x), before[name])


def test_perplexity_and_merge(tmp_path):
    run(tmp_path, device="cpu", max_steps=2)
    base, data, out = (str(tmp_path / name) for name in ("base", "text.txt", "out"))
    for dtype in CLOSE:
        cpu, gpu = (
            ppl.run(base, data, [24, 64], adapter=out, max_tokens=150, bins=3, dtype=dtype, device=name)
            for name in ("cpu", GPU)
        )
        assert gpu["device"] == GPU and cpu["device"] == "cpu"
        for a, b in zip(cpu["results"], gpu["results"], strict=True):
            assert b["tokens"] == a["tokens"] and b["loss"] == pytest.approx(a["loss"], rel=CLOSE[dtype])
    for name in ("cpu", GPU):
        merge.merge(base, out, tmp_path / f"merged-{name[:4]}", device=name)
    cpu, gpu = (open_model(tmp_path / f"merged-{name[:4]}") for name in ("cpu", GPU))
    for name in cpu.names():
        np.testing.assert_allclose(gpu.read(name), cpu.read(name), rtol=1e-6, atol=1e-7)


def test_logits_and_the_reading_of_weights(tmp_path):
    base = open_model(tiny.model(tmp_path / "base"))
    ids = np.arange(40, dtype=np.int32)
    for dtype in CLOSE:
        cpu, gpu = (model_.Model(base.config, dtype=dtype, device=name).load(base) for name in ("cpu", GPU))
        np.testing.assert_array_equal(device.host(gpu.arena), device.host(cpu.arena))
        a, b = cpu.logits(ids), gpu.logits(ids)
        assert np.abs(a - b).max() <= (1e-4 if dtype == "float32" else 5e-2) * np.abs(a).max()
        assert isinstance(b, np.ndarray) and b.dtype == np.float32


def test_weights_go_through_a_small_piece_of_host_memory(tmp_path, monkeypatch):
    """Loading never holds a whole tensor in the host's memory."""
    base, pinned = open_model(tiny.model(tmp_path / "base")), []
    made = model_.Model(base.config, dtype="float32", device=GPU)

    def counted(*args, **kwargs):
        pinned.append(_C.Tensor(*args, **kwargs))
        return pinned[-1]

    monkeypatch.setattr(model_file, "CHUNK", 1024)
    monkeypatch.setattr(device, "_thread", threading.local())
    monkeypatch.setattr(device, "_C", SimpleNamespace(Tensor=counted))
    made.load(base)
    assert pinned and all(x.pinned and x.nbytes <= 4 * model_file.CHUNK for x in pinned)
    assert 4 * max(np.prod(base.shape(name)) for name in base.names()) > 2 * 4 * model_file.CHUNK
    np.testing.assert_array_equal(
        device.host(made.arena), model_.Model(base.config, dtype="float32").load(base).arena.numpy()
    )


@pytest.mark.parametrize(
    "lora", [LoraConfig(), LoraConfig(target_modules="all-linear"), None], ids=["paper", "all", "full"]
)
@pytest.mark.parametrize(
    "fields",
    [
        dict(),
        dict(model_type="qwen2"),
        dict(model_type="qwen3", num_attention_heads=3, num_key_value_heads=1),
    ],
    ids=["llama", "qwen2", "qwen3"],
)
def test_the_plan_has_the_workspace_that_a_step_takes(fields, lora):
    """The largest workspace of a step's calls is what was planned."""
    config, length = read_config({**tiny.CONFIG, **fields}), 40
    asked, pieces = [], cuda._arenas.__dict__.setdefault("pieces", {})
    pieces.clear()
    about = plan_.plan(config, dtype="bfloat16", sequence_length=length, group_size=16, lora=lora, device=GPU)
    made = model_.Model(
        config, dtype="bfloat16", lora=lora, plan=about, attention=dict(group_size=16), device=GPU
    ).init_random()
    optimizer, ids = AdamW(made.parameters), np.arange(length, dtype=np.int32)[None]
    real = {op: getattr(_C, op) for op in _C.specs}
    try:
        for op, function in real.items():

            def call(*args, op=op, function=function):
                asked.append((_C.workspace(op, *args), op))
                function(*args)

            setattr(_C, op, call)
        made.zero_grad()
        made.train_microbatch(ids, ids, 1 / length)
        optimizer.step(dict.fromkeys(made.kinds, 1e-3))
        made.losses(ids[0], ids[0])
    finally:
        for op, function in real.items():
            setattr(_C, op, function)
    planned = about.parts["workspace of the ops"]
    assert max(asked)[0] == planned > 0, (max(asked), planned)
    (piece,) = pieces.values()
    assert planned <= piece.nbytes < planned + (1 << 20)
    assert made.arena.nbytes <= sum(
        size for name, size in about.parts.items() if name != "workspace of the ops"
    )


def test_the_plan_counts_the_memory_of_the_gpu(tmp_path):
    config = read_config(tiny.CONFIG)
    about = plan_.plan(config, sequence_length=64, lora=LoraConfig(), device=GPU)
    free, total = cuda.memory_info(GPU)
    assert about.device == GPU and about.memory <= total and "runtime" not in about.parts and about.fits
    assert about.text().splitlines()[-1].endswith("GiB are available on cuda:0")
    done = tiny.command(
        "plan", "--model", tiny.model(tmp_path / "base"), "--target-length", 128, "--device", "cuda", "--json"
    )
    assert json.loads(done.stdout)["device"] == GPU
    with pytest.raises(UserError, match=r"0\.00 GiB are available on cuda:0; what would make it fit"):
        run(tmp_path, device=GPU, max_memory=1e-4)
