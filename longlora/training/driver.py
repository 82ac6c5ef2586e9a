"""Training with our own Model and AdamW: the functions `train` and `plan` of the package.

Nothing here computes on activations: a step is Model.train_microbatch for each batch and one step of the
optimizer.
"""

import contextlib
import gc
import math
import os
from typing import Any

import numpy as np

from longlora import disk, job
from longlora.data.sequences import Order, batch
from longlora.decoder.config import read_config
from longlora.device import CPU, choose, choose_to_plan
from longlora.errors import UserError
from longlora.memory.plan import Plan
from longlora.ops import IGNORE
from longlora.progress import quietly
from longlora.training import card, options, reporters, resume
from longlora.training.inputs import Say, Setup, Source, instructs, use_threads
from longlora.training.options import TrainOptions
from longlora.training.run import Result, Run

PROFILE = "profile.json"


def train(say: Say = print, **keywords: Any) -> Result:
    """Train as the keywords say (the fields of options.TrainOptions) -> Result.

    `say` receives the lines of the report.

    SIGINT, SIGTERM, SIGHUP, SIGUSR1 and SIGXCPU end the step, save a checkpoint and return. A SIGINT or
    SIGTERM that comes a second later stops at once. UserError for options that cannot be met, and when a step
    goes wrong.
    """
    return run(options.from_dict(keywords), say)


def plan(**keywords: Any) -> Plan:
    """The memory plan of a run from the config alone; keywords are the fields of options.TrainOptions."""
    return plan_of(options.from_dict(keywords, planning=True))


def plan_of(o: TrainOptions) -> Plan:
    """The memory plan of a run with these options, from the config alone: no weight is read."""
    use_threads(o)
    path = o.model or o.init or ""
    from longlora.files.open_model import open_model, refuse_folder_of_gguf

    refuse_folder_of_gguf(path)
    config = open_model(path).config if os.path.isfile(path) and path.endswith(".gguf") else read_config(path)
    device = choose_to_plan(o.device, o.max_memory)[0]
    return Setup(o, config, device, bool(o.data and os.path.exists(o.data)) and instructs(o)).plan


def run(o: TrainOptions, say: Say = print) -> Result:
    """As `train`, with checked options."""
    say = quietly(say)
    reporters.chosen(o.report_to)  # before anything takes time
    use_threads(o)
    source = Source(o)
    device, chosen = choose(o.device)
    if o.profile and device != CPU:
        raise UserError("profile supports the CPU only; give --device cpu")
    card.check(o, source)
    setup = Setup(o, source.config, device, instructs(o))
    plan = setup.plan
    if not plan.fits:
        where = "" if device == CPU else f" on {device}"
        raise UserError(
            f"this run needs {plan.total / 2**30:.2f} GiB, {plan.memory / 2**30:.2f} GiB are available{where}"
            "; what would make it fit: " + "; ".join(plan.changes)
        )
    resume.refuse_taken(o.output_dir, o.resume_from_checkpoint)
    with disk.alone(o.output_dir):
        say(chosen)
        resume.sweep(o.output_dir)
        result = Driver(Run(o, source, setup, say), device).train()
        if o.eval_passkey and result.stopped is None:
            gc.collect()  # run and engine refer to each other; their memory is free now
            old, new = (config.max_position_embeddings for config in (source.config, setup.config))
            card.make(o, old, new, say)
        return result


class Driver:
    """The Engine of a run (training.run.Engine) made of our Model and AdamW."""

    def __init__(self, run: Run, device: str):
        from longlora.decoder.model import Model
        from longlora.training.optimizer import AdamW

        o, setup = run.o, run.setup
        self.run, self.device = run, device
        self.recorder: Any = None
        if o.profile:  # the peaks are measured first: their memory is free again before the model is made
            from longlora import get_num_threads
            from longlora.training import profile

            self.recorder = profile.Recorder(profile.peaks(get_num_threads()))
        self.model = Model(
            setup.config,
            dtype=o.dtype,
            lora=setup.lora,
            attention=setup.attention,
            plan=setup.plan,
            seed=o.seed,
            device=device,
        )
        self.parameters = self.model.parameters
        self.optimizer = AdamW(
            self.parameters,
            beta1=o.adam_beta1,
            beta2=o.adam_beta2,
            eps=o.adam_epsilon,
            weight_decay=o.weight_decay,
            max_grad_norm=o.max_grad_norm,
        )
        if run.source.base is not None:
            self.model.load(run.source.base)
        else:
            self.model.init_random(o.seed)
        if run.source.adapter is not None:
            self.model.load_adapter(run.source.adapter, setup.lora)
            run.source.adapter = None  # its memory is free again
        if run.tensors is not None:
            self.optimizer.load_state_dict(run.tensors, run.step)

    def train(self) -> Result:
        """Make the steps of the run and finish it."""
        run, plan = self.run, self.run.setup.plan
        planned, available = plan.total / 2**30, plan.memory / 2**30
        run.start(
            self,
            f"memory: {planned:.3f} GiB planned of {available:.3f} available, {run.o.dtype}, "
            f"checkpointing {plan.checkpointing}",
        )
        run.begin()
        order, loss = Order(len(run.corpus), run.o.seed, run.position), math.nan
        with run.training():
            while run.goes_on():
                places = [
                    order.take(run.o.per_device_train_batch_size)
                    for _ in range(run.o.gradient_accumulation_steps)
                ]
                micro = [batch(run.corpus, indices, run.setup.multiple) for indices in places]
                count = sum(int((targets != IGNORE).sum()) for _, targets, _ in micro)
                with run.named():
                    total, norm = self._step(micro, count)
                loss = loss if total is None else total / count
                run.after_step(loss, norm, sum(run.corpus.size(i) for indices in places for i in indices))
        result = run.finish()
        self._report_profile()
        return result

    def _step(self, micro, count):
        """One step over batches with `count` targets in all -> the sum of the losses, the norm of the
        gradient.

        A GPU is not waited for when the loss is not needed; the sum is then None.
        """
        run, due = self.run, self.run.due()
        read = self.device == CPU or due.logs or due.saves
        # The first step also brings the memory in; it is recorded only if it is the only one.
        recorded = self.recorder is not None and (run.step > run.first or run.step + 1 == run.steps)
        with self.recorder if recorded else contextlib.nullcontext():
            self.model.zero_grad()
            sums: list[Any] = [
                self.model.train_microbatch(ids, targets, 1 / count, read, cu_seqlens)
                for ids, targets, cu_seqlens in micro
            ]
            rates = {kind: run.rate(kind) for kind in self.model.kinds}
            with run.updating():
                norm = self.optimizer.step(rates)
        return sum(sums) if read else None, norm

    def _report_profile(self):
        if self.recorder is not None and self.recorder.steps:
            from longlora.training import profile

            found = self.recorder.report()
            self.run.say(profile.text(found))
            disk.write_json(os.path.join(self.run.o.output_dir, PROFILE), found)

    def evaluate(self) -> float:
        run = self.run
        assert run.held_out is not None
        total, tokens = 0.0, 0
        for i in range(run.evaluated):
            ids, targets, cu_seqlens = batch(run.held_out, [i])
            kept = targets != IGNORE
            losses = self.model.losses(ids, targets, cu_seqlens=cu_seqlens)
            total += float(losses[kept].astype(np.float64).sum())
            tokens += int(kept.sum())
        return total / tokens

    def values(self) -> dict[str, Any]:
        return self.model.tensors()

    def state(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def signal(self) -> int | None:
        return self.run.stop.signal

    def peak_memory(self) -> int:
        return job.peak_memory()
