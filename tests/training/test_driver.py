"""The driver around a fake model: what the model gets; the loss, evaluation and profile of a run; what is
refused before a run; plans."""

import gc
import json
import os
import types
import weakref

import numpy as np
import pytest
import tiny
from engines import Engine, Sequences, fake_setup, made

from longlora import plots
from longlora.decoder import model as model_
from longlora.errors import UserError
from longlora.files import open_model
from longlora.memory.plan import Plan
from longlora.training import driver, optimizer, options, profile, reporters

# ---- the steps -----------------------------------------------------------------------------------


class Corpus(Sequences):
    """Sequence i has 3 + i targets and 13 + i tokens."""

    def size(self, i):
        return 13 + i


def batch(corpus, indices, multiple=1):
    """Stands in for sequences.batch. Every target of sequence i is i; cu_seqlens is (indices, multiple)."""
    rows = [np.full(20, i) for i in indices]
    for row, i in zip(rows, indices):
        row[3 + i :] = -100
    return np.zeros((len(rows), 20), np.int32), np.stack(rows), (list(indices), multiple)


class Model:
    """A model that records its calls. In training its loss is 2 nats per target."""

    kinds = ("lora_A", "norm")

    def __init__(self, config, **how):
        self.config, self.how, self.calls, self.batches = config, how, [], []
        self.parameters = Engine(None).parameters

    def __getattr__(self, name):
        return lambda *given: self.calls.append((name, *given))

    def train_microbatch(self, ids, targets, scale, read, cu_seqlens):
        self.batches.append((int((targets != -100).sum()), scale, read, cu_seqlens))
        for p in self.parameters:
            p.grad += 1
        return 2.0 * (targets != -100).sum() if read else None

    def losses(self, ids, targets, cu_seqlens=None):
        assert cu_seqlens == ([targets.flat[0]], 1)
        return np.float32(targets + 1)  # i + 1 for each target of sequence i

    def tensors(self):
        return {"a": np.arange(3.0)}


class Optimizer:
    """Adds the learning rate to every value. The norm of the gradient is the number of steps so far."""

    def __init__(self, parameters, **how):
        self.parameters, self.how, self.loaded, self.rates = parameters, how, None, []

    def step(self, rates):
        self.rates.append(rates)
        for p in self.parameters:
            p.value += rates[p.kind]
        return float(len(self.rates))

    def state_dict(self):
        return {f"{what}.{p.name}": p.value.copy() for p in self.parameters for what in ("value", "m", "v")}

    def load_state_dict(self, tensors, step):
        self.loaded = sorted(tensors), step


class Recorder:
    """Stands in for profile.Recorder."""

    def __init__(self, peaks):
        self.peaks, self.steps = peaks, 0

    def __enter__(self):
        self.steps += 1

    def __exit__(self, *unused):
        pass

    def report(self):
        return {"recorded": self.steps}


@pytest.fixture
def fake_driver(tmp_path, monkeypatch):
    """A function of options that returns a Driver of the fake Model and Optimizer."""
    monkeypatch.setattr(model_, "Model", Model)
    monkeypatch.setattr(optimizer, "AdamW", Optimizer)
    monkeypatch.setattr(driver, "batch", batch)
    monkeypatch.setattr(profile, "Recorder", Recorder)
    monkeypatch.setattr(profile, "peaks", lambda threads: ("peaks of", threads))
    monkeypatch.setattr(profile, "text", lambda found: f"{found['recorded']} steps recorded")
    monkeypatch.setattr(plots, "loss", lambda *given: None)

    def build(device="cpu", source=None, lora=None, held=0, **fields):
        given = dict(fingerprint="b", adapter_fingerprint=None, base="the base", adapter=None)
        source = types.SimpleNamespace(**given | (source or {}))
        plan = types.SimpleNamespace(total=3 << 29, memory=5 << 28, checkpointing="minimal")
        setup = fake_setup(lora=lora, attention={"group_size": 32}, plan=plan, multiple=7)
        run = made(tmp_path, monkeypatch, source=source, setup=setup, held=held, **fields)
        run.corpus = Corpus(8)
        run.held_out = Corpus(held) if held else None
        ticks = iter(range(10**6))
        run.clock.perf_counter = lambda: float(next(ticks))
        return driver.Driver(run, device)

    return build


def test_the_model_and_the_optimizer_get_the_options(fake_driver, monkeypatch):
    monkeypatch.setattr(driver.job, "peak_memory", lambda: 77)
    adam = dict(adam_beta1=0.7, adam_beta2=0.8, adam_epsilon=1e-5, weight_decay=0.3, max_grad_norm=0.4)
    made = fake_driver("cuda:3", lora="lora", dtype="bfloat16", seed=11, **adam)
    run, setup = made.run, made.run.setup
    assert made.model.config is setup.config and made.model.how == dict(
        dtype="bfloat16", lora="lora", attention=setup.attention, plan=setup.plan, seed=11, device="cuda:3"
    )
    assert made.optimizer.how == dict(beta1=0.7, beta2=0.8, eps=1e-5, weight_decay=0.3, max_grad_norm=0.4)
    assert made.optimizer.parameters is made.parameters is made.model.parameters
    assert made.model.calls == [("load", "the base")] and made.recorder is None
    assert made.optimizer.loaded is None and made.values()["a"].tolist() == [0, 1, 2]
    assert made.state().keys() == made.optimizer.state_dict().keys() and made.peak_memory() == 77
    run.stop = types.SimpleNamespace(signal=7)
    assert made.signal() == 7


def test_adapters_random_weights_and_states_are_loaded(fake_driver, tmp_path):
    source = dict(adapter_fingerprint="a", adapter="weights")
    first = fake_driver(source=source, lora="lora", max_steps=1)
    assert first.model.calls == [("load", "the base"), ("load_adapter", "weights", "lora")]
    assert first.run.source.adapter is None  # frees its memory
    assert fake_driver(source=dict(base=None), seed=9).model.calls == [("init_random", 9)]
    first.train()
    resumed = fake_driver(source=source, lora="lora", max_steps=2, resume_from_checkpoint="latest")
    names = sorted(f"{what}.{name}" for what in ("value", "m", "v") for name in "abc")
    assert resumed.optimizer.loaded == (names, 1)


def test_a_step_is_the_mean_over_its_targets(fake_driver):
    """Of two batches of two sequences each, both gradients are scaled by the number of targets in both."""
    made = fake_driver(max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    result = made.train()
    assert "memory: 1.500 GiB planned of 1.250 available, float32, checkpointing minimal" in made.run.said
    assert made.model.calls == [("load", "the base"), ("zero_grad",), ("zero_grad",)]
    taken = []
    for step in (0, 2):
        first, second = made.model.batches[step : step + 2]
        count = first[0] + second[0]
        assert first[1] == second[1] == 1 / count and first[2] and second[2]
        taken += [*first[3][0], *second[3][0]]
        sizes = [13 + i for i in taken[-4:]]
        # The clock ticks when a step ends and when the next one begins: a step takes 1 s.
        assert result.history[step // 2]["tokens_per_s"] == pytest.approx(sum(sizes), abs=0.1)
    assert sorted(taken) == list(range(8))  # an epoch
    assert all(multiple == 7 for *_, (_, multiple) in made.model.batches)
    assert [row["loss"] for row in result.history] == [2.0, 2.0]
    assert [row["grad_norm"] for row in result.history] == [1.0, 2.0]
    assert made.optimizer.rates == [{"lora_A": 1e-2, "norm": 1e-3}] * 2


@pytest.mark.parametrize(
    "device, read", [("cpu", [True] * 6), ("cuda:0", [False, True, True, True, False, True])]
)
def test_the_loss_of_a_gpu_is_read_only_when_it_is_needed(fake_driver, device, read):
    """Steps 3 and 6 are logged, steps 2 and 4 are saved."""
    made = fake_driver(device, max_steps=6, logging_steps=3, save_steps=2)
    result = made.train()
    assert [given[2] for given in made.model.batches] == read
    assert [(row["step"], row["loss"]) for row in result.history] == [(3, 2.0), (6, 2.0)]


@pytest.mark.parametrize(
    "since, until, recorded", [(0, 1, 1), (0, 2, 1), (0, 4, 3), (2, 3, 1), (2, 5, 2), (2, 2, 0)]
)
def test_every_step_but_the_first_is_recorded(fake_driver, tmp_path, since, until, recorded):
    """The first step, also of a resumed run, is recorded only if it is the only one."""
    fields = {}
    if since:
        fake_driver(max_steps=since).train()
        fields = dict(resume_from_checkpoint="latest")
    made = fake_driver(max_steps=until, profile=True, **fields)
    made.train()
    assert made.recorder.peaks[0] == "peaks of" and made.recorder.steps == recorded
    words, path = f"{recorded} steps recorded", tmp_path / "out" / "profile.json"
    assert (words in made.run.said) == path.exists() == bool(recorded)
    if recorded:
        assert json.loads(path.read_text()) == {"recorded": recorded}


def test_without_a_profile_nothing_is_recorded(fake_driver, tmp_path):
    made = fake_driver(max_steps=2)
    result = made.train()
    assert made.recorder is None and result.step == 2 and "profile.json" not in os.listdir(tmp_path / "out")


def test_an_evaluation_is_the_mean_over_all_targets(fake_driver):
    """Sequence i has 3 + i targets, each with a loss of i + 1."""
    made = fake_driver(held=3)
    total, count = sum((3 + i) * (i + 1) for i in range(3)), 3 + 4 + 5
    assert made.evaluate() == pytest.approx(total / count)
    made.run.evaluated = 2
    assert made.evaluate() == pytest.approx((3 * 1 + 4 * 2) / 7)


# ---- before a run --------------------------------------------------------------------------------


@pytest.fixture
def untrained(tmp_path, monkeypatch):
    """A function of options that calls `train` with a driver that trains nothing. Returns what was recorded:
    the lines in `said`, the `device` and the numbers of `threads`. `result` is what the driver returns."""
    seen = types.SimpleNamespace(said=[], result=types.SimpleNamespace(stopped=None), device=None, threads=[])

    class Driver:
        def __init__(self, run, device):
            seen.device, seen.run = device, run

        def train(self):
            return seen.result

    monkeypatch.setattr(driver, "Driver", Driver)
    monkeypatch.setattr(driver, "use_threads", lambda o: seen.threads.append(o.num_threads))

    def start(**fields):
        assert driver.train(seen.said.append, **tiny.options(tmp_path, **fields)) is seen.result
        return seen

    start.seen = seen
    return start


def refused(start, **fields):
    with pytest.raises(UserError) as caught:
        start(**fields)
    return str(caught.value)


def test_a_run_says_its_device_and_uses_its_threads(untrained, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoint-3.partial").mkdir()
    seen = untrained(num_threads=3)
    assert seen.said[0].startswith("device: cpu, ") and seen.device == "cpu" and seen.threads == [3]
    assert "checkpoint-3.partial" not in os.listdir(tmp_path / "out")


def test_a_missing_reporter_is_refused_before_anything_else(untrained, monkeypatch):
    def fail(wanted):
        raise UserError(f"no {wanted}")

    monkeypatch.setattr(reporters, "chosen", fail)
    assert refused(untrained, model="nowhere", report_to=["wandb"]) == "no ('wandb',)"


def test_a_profile_of_a_gpu_is_refused(untrained, monkeypatch):
    monkeypatch.setattr(driver, "choose", lambda wanted: ("cuda:0", "device: a GPU"))
    words = "profile supports the CPU only; give --device cpu"
    assert refused(untrained, device="auto", profile=True) == words
    monkeypatch.setattr(driver, "choose", lambda wanted: ("cpu", "device: none"))
    assert untrained(device="auto", profile=True).said[0] == "device: none"


@pytest.mark.parametrize("device, where", [("cpu", ""), ("cuda:0", " on cuda:0")])
def test_a_run_that_does_not_fit_names_the_device(untrained, monkeypatch, device, where, tmp_path):
    plan = types.SimpleNamespace(fits=False, total=3 << 29, memory=5 << 28, changes=["less", "more"])
    monkeypatch.setattr(driver, "choose", lambda wanted: (device, "device: this"))
    monkeypatch.setattr(driver, "Setup", lambda *given: types.SimpleNamespace(plan=plan, given=given))
    assert refused(untrained, device="auto") == (
        f"this run needs 1.50 GiB, 1.25 GiB are available{where}; what would make it fit: less; more"
    )
    assert not (tmp_path / "out").exists()


def test_a_directory_with_results_is_refused(untrained, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    assert "holds another run or a model (config.json)" in refused(untrained)


@pytest.mark.parametrize("passkeys, stopped, makes", [(1, None, True), (1, 15, False), (0, None, False)])
def test_only_a_finished_run_makes_a_card(untrained, monkeypatch, passkeys, stopped, makes):
    cards = []
    monkeypatch.setattr(driver.card, "make", lambda o, old, new, say: cards.append((old, new)))
    untrained.seen.result.stopped = stopped
    untrained(eval_passkey=passkeys)
    assert cards == [(64, 128)] * makes


def test_the_memory_of_a_run_is_free_before_its_card(tmp_path, monkeypatch):
    """A run and its engine refer to each other, so only a collection frees them."""

    class Cycle:
        def __init__(self, run, device):
            self.run, run.engine = run, self
            engines.append(weakref.ref(self))

        def train(self):
            return types.SimpleNamespace(stopped=None)

    engines, left = [], []
    monkeypatch.setattr(driver, "Driver", Cycle)
    monkeypatch.setattr(driver.card, "make", lambda *given: left.append(engines[0]()))
    gc.disable()
    try:
        driver.train(print, **tiny.options(tmp_path, eval_passkey=1))
    finally:
        gc.enable()
    assert left == [None]


# ---- plans ---------------------------------------------------------------------------------------


def test_a_plan_needs_only_a_config(tmp_path, monkeypatch):
    threads = []
    monkeypatch.setattr(driver, "use_threads", lambda o: threads.append(o.num_threads))
    path = tiny.config(tmp_path / "config")
    fields = dict(device="cpu", max_memory=64.0, num_threads=3)
    found = driver.plan(model=str(path), **fields)
    assert isinstance(found, Plan) and found.fits and threads == [3]
    for init in (str(path), str(path / "config.json")):
        whole = driver.plan(init=init, full=True, **fields)
        assert whole.lora is None and found.lora is not None


def test_a_plan_depends_on_the_form_of_the_data(tmp_path):
    """Questions and answers are kept apart, text is not. Data that do not exist yet count as text."""
    path = str(tiny.config(tmp_path / "config"))
    chat, text = tmp_path / "chat.jsonl", tmp_path / "text.jsonl"
    chat.write_text(json.dumps({"instruction": "a", "output": "b"}) + "\n")
    text.write_text(json.dumps({"text": "a"}) + "\n")
    missing = tmp_path / "none.jsonl"
    for data, packed in ((chat, "document"), (text, "none"), (missing, "none"), (None, "none")):
        given = dict(model=path, device="cpu", data=data and str(data), output_dir="o")
        o = options.from_dict(given, planning=True)
        driver.plan_of(o)
        assert o.packing_boundaries == packed


def test_a_plan_of_a_gguf_file_reads_its_header(tmp_path, monkeypatch):
    """A directory whose name ends in .gguf is read as a directory."""
    read, real = [], open_model.open_model
    path = tiny.config(tmp_path / "dir.gguf")

    def opened(path):
        read.append(os.path.basename(path))
        return types.SimpleNamespace(config=real(tiny.model(tmp_path / "base")).config)

    monkeypatch.setattr(open_model, "open_model", opened)
    (tmp_path / "file.gguf").write_bytes(b"GGUF")
    for name in ("file.gguf", "dir.gguf"):
        assert driver.plan(model=str(tmp_path / name), device="cpu", max_memory=64.0).fits
    assert read == ["file.gguf"] and path.is_dir()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="folder/m.gguf"):
        driver.plan(model=str(tmp_path / "folder"), device="cpu")
