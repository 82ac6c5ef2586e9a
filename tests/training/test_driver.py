"""The driver around a model by hand: what it gives the model, the loss of a step, what it reads and records;
what is refused before a run; plans."""

import json
import os
import types

import numpy as np
import pytest
import tiny
from engines import Engine, Sequences, made

from longlora import plots
from longlora.decoder import model as model_
from longlora.errors import UserError
from longlora.files import open_model
from longlora.memory.plan import Plan
from longlora.training import driver, optimizer, options, profile, reporters

# ---- the steps -----------------------------------------------------------------------------------


class Corpus(Sequences):
    """Sequences of 3, 4, 5, ... targets and 10 tokens more."""

    def size(self, i):
        return 13 + i


def batch(corpus, indices, multiple=1):
    """A batch of these sequences, and where they begin: targets are their number, -100 is no target."""
    rows = [np.full(20, i) for i in indices]
    for row, i in zip(rows, indices):
        row[3 + i :] = -100
    return np.zeros((len(rows), 20), np.int32), np.stack(rows), f"from {list(indices)} by {multiple}"


class Model:
    """A model whose loss is 2 nats a target; it notes its calls."""

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
        assert cu_seqlens.startswith("from [")
        return np.float32(targets + 1)  # of sequence i each target has i + 1

    def tensors(self):
        return {"a": np.arange(3.0)}


class Optimizer:
    """Moves all by its rate; the norm of the gradient is its steps."""

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
def by_hand(tmp_path, monkeypatch):
    """A function of options -> a Driver of our Model and Optimizer, on a device."""
    monkeypatch.setattr(model_, "Model", Model)
    monkeypatch.setattr(optimizer, "AdamW", Optimizer)
    monkeypatch.setattr(driver, "batch", batch)
    monkeypatch.setattr(profile, "Recorder", Recorder)
    monkeypatch.setattr(profile, "peaks", lambda threads: ("peaks of", threads))
    monkeypatch.setattr(profile, "text", lambda found: f"{found['recorded']} steps recorded")
    monkeypatch.setattr(plots, "loss", lambda *given: None)

    def build(device="cpu", source=None, held=0, **fields):
        given = dict(fingerprint="b", adapter_fingerprint=None, base="the base", adapter=None)
        source = types.SimpleNamespace(**given | (source or {}))
        plan = types.SimpleNamespace(total=3 << 29, memory=5 << 28, checkpointing="minimal")
        setup = types.SimpleNamespace(
            config=types.SimpleNamespace(num_attention_heads=4), rope="rope: by hand", lora=None
        )
        setup.attention, setup.plan, setup.multiple = {"group_size": 32}, plan, 7
        run = made(tmp_path, monkeypatch, source=source, setup=setup, held=held, **fields)
        run.corpus = Corpus(8)
        run.held_out = Corpus(held) if held else None
        ticks = iter(range(10**6))
        run.clock.perf_counter = lambda: float(next(ticks))
        return driver.Driver(run, device)

    return build


def test_the_model_and_the_optimizer_are_made_as_the_options_say(by_hand, monkeypatch):
    monkeypatch.setattr(driver.job, "peak_memory", lambda: 77)
    adam = dict(adam_beta1=0.7, adam_beta2=0.8, adam_epsilon=1e-5, weight_decay=0.3, max_grad_norm=0.4)
    made = by_hand("cuda:3", dtype="bfloat16", seed=11, **adam)
    run, setup = made.run, made.run.setup
    assert made.model.config is setup.config and made.model.how == dict(
        dtype="bfloat16", lora=None, attention=setup.attention, plan=setup.plan, seed=11, device="cuda:3"
    )
    assert made.optimizer.how == dict(beta1=0.7, beta2=0.8, eps=1e-5, weight_decay=0.3, max_grad_norm=0.4)
    assert made.optimizer.parameters is made.parameters is made.model.parameters
    assert made.model.calls == [("load", "the base")] and made.recorder is None
    assert made.optimizer.loaded is None and made.values()["a"].tolist() == [0, 1, 2]
    assert made.state().keys() == made.optimizer.state_dict().keys() and made.peak_memory() == 77
    run.stop = types.SimpleNamespace(signal=7)
    assert made.signal() == 7


def test_lora_adapters_random_weights_and_states_reach_the_model(by_hand, tmp_path):
    source = dict(adapter_fingerprint="a", adapter="weights")
    first = by_hand(source=source, max_steps=1)
    assert first.model.calls == [("load", "the base"), ("load_adapter", "weights", None)]
    assert first.run.source.adapter is None  # its memory is free again
    assert by_hand(source=dict(base=None), seed=9).model.calls == [("init_random", 9)]
    first.train()
    resumed = by_hand(source=source, max_steps=2, resume_from_checkpoint="latest")
    names = sorted(f"{what}.{name}" for what in ("value", "m", "v") for name in "abc")
    assert resumed.optimizer.loaded == (names, 1)


def test_lora_is_that_of_the_setup(by_hand, monkeypatch):
    monkeypatch.setattr(driver.resume, "resolve", lambda *given: None)
    made = by_hand()
    made.run.setup.lora = "lora"
    assert driver.Driver(made.run, "cpu").model.how["lora"] == "lora"


def test_a_step_is_the_mean_over_its_targets(by_hand):
    """Two batches of two sequences: every batch's gradient counts by the targets of both."""
    made = by_hand(max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    result = made.train()
    assert "memory: 1.500 GiB planned of 1.250 available, float32, checkpointing minimal" in made.run.said
    assert made.model.calls == [("load", "the base"), ("zero_grad",), ("zero_grad",)]
    taken = []
    for step in (0, 2):
        first, second = made.model.batches[step : step + 2]
        count = first[0] + second[0]
        assert first[1] == second[1] == 1 / count and first[2] and second[2]
        taken += [int(i) for _, _, _, words in (first, second) for i in words[6:-6].split(",")]
        sizes = [13 + i for i in taken[-4:]]
        # The clock ticks once when a step ends and once when the next one begins.
        assert result.history[step // 2]["tokens_per_s"] == pytest.approx(sum(sizes), abs=0.1)
    assert sorted(taken) == list(range(8))  # an epoch
    assert all(words.endswith(" by 7") for *_, words in made.model.batches)
    assert [row["loss"] for row in result.history] == [2.0, 2.0]
    assert [row["grad_norm"] for row in result.history] == [1.0, 2.0]
    assert made.optimizer.rates == [{"lora_A": 1e-2, "norm": 1e-3}] * 2


@pytest.mark.parametrize(
    "device, read", [("cpu", [True] * 6), ("cuda:0", [False, True, True, True, False, True])]
)
def test_a_gpu_is_waited_for_when_the_loss_is_needed(by_hand, device, read):
    """It is logged after steps 3 and 6, and saved after 2 and 4."""
    made = by_hand(device, max_steps=6, logging_steps=3, save_steps=2)
    result = made.train()
    assert [given[2] for given in made.model.batches] == read
    assert [(row["step"], row["loss"]) for row in result.history] == [(3, 2.0), (6, 2.0)]


@pytest.mark.parametrize(
    "since, until, recorded", [(0, 1, 1), (0, 2, 1), (0, 4, 3), (2, 3, 1), (2, 5, 2), (2, 2, 0)]
)
def test_all_steps_but_the_first_are_recorded(by_hand, tmp_path, since, until, recorded):
    """Unless it is the only one; a resumed run has a first step too."""
    fields = {}
    if since:
        by_hand(max_steps=since).train()
        fields = dict(resume_from_checkpoint="latest")
    made = by_hand(max_steps=until, profile=True, **fields)
    made.train()
    assert made.recorder.peaks[0] == "peaks of" and made.recorder.steps == recorded
    words, path = f"{recorded} steps recorded", tmp_path / "out" / "profile.json"
    assert (words in made.run.said) == path.exists() == bool(recorded)
    if recorded:
        assert json.loads(path.read_text()) == {"recorded": recorded}


def test_without_a_profile_nothing_is_recorded(by_hand, tmp_path):
    made = by_hand(max_steps=2)
    result = made.train()
    assert made.recorder is None and result.step == 2 and "profile.json" not in os.listdir(tmp_path / "out")


def test_an_evaluation_is_the_mean_over_all_targets(by_hand):
    """Sequence i has 3 + i targets, each with a loss of i + 1."""
    made = by_hand(held=3)
    total, count = sum((3 + i) * (i + 1) for i in range(3)), 3 + 4 + 5
    assert made.evaluate() == pytest.approx(total / count)
    made.run.evaluated = 2
    assert made.evaluate() == pytest.approx((3 * 1 + 4 * 2) / 7)


# ---- before a run --------------------------------------------------------------------------------


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A function of options: `train` with a driver that trains nothing -> what it says, its result."""
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


def test_a_run_says_its_device_and_uses_its_threads(alone, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoint-3.partial").mkdir()
    seen = alone(num_threads=3)
    assert seen.said[0].startswith("device: cpu, ") and seen.device == "cpu" and seen.threads == [3]
    assert "checkpoint-3.partial" not in os.listdir(tmp_path / "out")


def test_reporters_are_looked_for_before_anything_else(alone, monkeypatch):
    def fail(wanted):
        raise UserError(f"no {wanted}")

    monkeypatch.setattr(reporters, "chosen", fail)
    assert refused(alone, model="nowhere", report_to=["wandb"]) == "no ('wandb',)"


def test_a_profile_of_a_gpu_is_refused(alone, monkeypatch):
    monkeypatch.setattr(driver, "choose", lambda wanted: ("cuda:0", "device: a GPU"))
    words = "profile supports the CPU only; give --device cpu"
    assert refused(alone, device="auto", profile=True) == words
    monkeypatch.setattr(driver, "choose", lambda wanted: ("cpu", "device: none"))
    assert alone(device="auto", profile=True).said[0] == "device: none"


@pytest.mark.parametrize("device, where", [("cpu", ""), ("cuda:0", " on cuda:0")])
def test_a_run_that_does_not_fit_says_where(alone, monkeypatch, device, where, tmp_path):
    plan = types.SimpleNamespace(fits=False, total=3 << 29, memory=5 << 28, changes=["less", "more"])
    monkeypatch.setattr(driver, "choose", lambda wanted: (device, "device: this"))
    monkeypatch.setattr(driver, "Setup", lambda *given: types.SimpleNamespace(plan=plan, given=given))
    assert refused(alone, device="auto") == (
        f"this run needs 1.50 GiB, 1.25 GiB are available{where}; what would make it fit: less; more"
    )
    assert not (tmp_path / "out").exists()


def test_a_directory_that_is_taken_is_refused(alone, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    assert "holds another run or a model (config.json)" in refused(alone)


@pytest.mark.parametrize("passkeys, stopped, makes", [(1, None, True), (1, 15, False), (0, None, False)])
def test_a_card_is_made_of_a_run_that_was_not_stopped(alone, monkeypatch, passkeys, stopped, makes):
    cards = []
    monkeypatch.setattr(driver.card, "make", lambda o, old, new, say: cards.append((old, new)))
    alone.seen.result.stopped = stopped
    alone(eval_passkey=passkeys)
    assert cards == [(64, 128)] * makes


def test_a_card_needs_a_tokenizer(alone, tmp_path):
    (tiny.model(tmp_path / "base") / "tokenizer.json").unlink()
    assert refused(alone, eval_passkey=1) == "eval_passkey needs a model with a tokenizer"


# ---- plans ---------------------------------------------------------------------------------------


def test_a_plan_needs_a_config_alone(tmp_path, monkeypatch):
    threads = []
    monkeypatch.setattr(driver, "use_threads", lambda o: threads.append(o.num_threads))
    path = tiny.config(tmp_path / "config")
    fields = dict(device="cpu", max_memory=64.0, num_threads=3)
    found = driver.plan(model=str(path), **fields)
    assert isinstance(found, Plan) and found.fits and threads == [3]
    for init in (str(path), str(path / "config.json")):
        whole = driver.plan(init=init, full=True, **fields)
        assert whole.lora is None and found.lora is not None


def test_a_plan_reads_what_there_is_of_the_data(tmp_path):
    """Questions and answers are packed apart, text is not; what is not there yet may be text."""
    path = str(tiny.config(tmp_path / "config"))
    chat, text = tmp_path / "chat.jsonl", tmp_path / "text.jsonl"
    chat.write_text(json.dumps({"instruction": "a", "output": "b"}) + "\n")
    text.write_text(json.dumps({"text": "a"}) + "\n")
    for data, packed in (
        (chat, "document"),
        (text, "none"),
        (tmp_path / "none.jsonl", "none"),
        (None, "none"),
    ):
        o = options.from_dict(
            dict(model=path, device="cpu", data=data and str(data), output_dir="o"), planning=True
        )
        assert driver.plan_of(o).total > 0 and o.packing_boundaries == packed


def test_a_plan_of_a_gguf_file_reads_its_header(tmp_path, monkeypatch):
    """A directory may be called so too."""
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
