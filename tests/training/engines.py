"""A run around a fake engine: no model, no data, and a clock that the tests set."""

import json
import os
import types

import numpy as np

from longlora.training import options, resume
from longlora.training import run as run_


class Sequences:
    """A corpus of `count` sequences."""

    def __init__(self, count):
        self.count, self.sentence = count, f"{count} fake sequences"
        self.tokens = types.SimpleNamespace(fingerprint=f"held {count}")

    def __len__(self):
        return self.count


class Parameter:
    """A trained tensor of zeros, with a gradient of ones."""

    def __init__(self, name, kind, *shape):
        self.name, self.kind, self.shape = name, kind, shape
        self.value, self.grad = np.zeros(shape, np.float32), np.ones(shape, np.float32)


class Clock:
    """Stands in for the module time. perf_counter() is `now`; each call of time() is a second later."""

    def __init__(self):
        self.now, self.written = 1000.0, 5000.0

    def perf_counter(self):
        return self.now

    def time(self):
        self.written += 1
        return self.written


class Engine:
    """An engine of three tensors. A step takes 2 s and adds 1 to every value; an evaluation takes 100 s.

    losses: step -> its held-out loss, or the exception that the evaluation raises
    fails: step -> the exception that the step raises
    sent: step -> the signal that arrives in the step
    """

    def __init__(self, run, losses=(), fails=None, sent=None):
        self.run, self.losses, self.fails, self.sent = run, losses, fails or {}, sent or {}
        self.parameters = [
            Parameter("a", "lora_A", 2, 3),
            Parameter("b", "norm", 5),
            Parameter("c", "norm", 7),
        ]
        self.saved = []  # the steps at which state() was called

    def evaluate(self):
        self.run.clock.now += 100
        loss = self.losses[self.run.step]
        if isinstance(loss, BaseException):
            raise loss
        return loss

    def values(self):
        return {p.name: p.value for p in self.parameters}

    def state(self):
        self.saved.append(self.run.step)
        return {f"{what}.{p.name}": p.value.copy() for p in self.parameters for what in ("value", "m", "v")}

    def signal(self):
        return next((number for step, number in self.sent.items() if step <= self.run.step), None)

    def peak_memory(self):
        return 4321

    def move(self):
        for p in self.parameters:
            p.value += 1


def fake_setup(**more):
    """What a Run needs of a Setup."""
    config = types.SimpleNamespace(num_attention_heads=4)
    return types.SimpleNamespace(**dict(config=config, rope="rope: fake", lora=None) | more)


def made(
    tmp_path, monkeypatch, sequences=8, held=0, template=None, source=None, setup=None, group=None, **fields
):
    """A Run with these options, which reads no files. sequences, held: how many to train on and to hold out.

    group: the keywords of Run for a group of processes. The Run also has `said`, its lines; `clock`; and
    `models`, the (directory, values, home) of each model that it writes.
    """
    given = dict(
        model="base", data="text", output_dir=str(tmp_path / "out"), sequence_length=128, max_steps=4
    )
    given |= dict(learning_rate=1e-2, embedding_learning_rate=1e-3, warmup_steps=0, eval_fraction=0.1)
    o = options.from_dict(given | fields)
    o.resolve(types.SimpleNamespace(max_position_embeddings=128), template is not None)
    held_out = Sequences(held) if held else None
    monkeypatch.setattr(
        run_, "read_data", lambda *given: (Sequences(sequences), held_out, "the text", template)
    )
    clock, said, models = Clock(), [], []
    monkeypatch.setattr(run_, "time", clock)
    source = source or types.SimpleNamespace(fingerprint="the base", adapter_fingerprint=None)
    run = run_.Run(o, source, setup or fake_setup(), said.append, **group or {})
    run.said, run.clock, run.models = said, clock, models

    def write_model(directory, values, home=None):
        models.append((str(directory), values and {name: x.copy() for name, x in values.items()}, home))

    run.write_model = write_model
    os.makedirs(o.output_dir, exist_ok=True)
    return run


def steps(run, engine):
    """Run all training steps of a run that has started."""
    with run.training():
        while run.goes_on():
            with run.named(), run.updating():
                if run.step + 1 in engine.fails:
                    raise engine.fails[run.step + 1]
                engine.move()
            run.clock.now += 2
            run.after_step(2.0 + run.step, 0.5, 1001)


def whole(run, engine):
    """Start the run, make its steps and finish it. Returns the Result."""
    run.start(engine)
    run.begin()
    steps(run, engine)
    return run.finish()


def state(run, step):
    """Read the trainer_state.json of a checkpoint."""
    with open(os.path.join(resume.path_of(run.o.output_dir, step), resume.STATE)) as file:
        return json.load(file)


def change(run, step, **fields):
    """Change fields of the trainer_state.json of a checkpoint."""
    path = os.path.join(resume.path_of(run.o.output_dir, step), resume.STATE)
    found = state(run, step) | fields
    with open(path, "w") as file:
        json.dump(found, file)
