"""The policy of a run: every rule that does not depend on what computes the steps.

An Engine computes the steps: the driver (driver.py) with our Model and AdamW, the Trainer path
(longlora.torch.trainer) with those of torch. Run holds the number of steps, the schedule, the learning rates,
what is logged, evaluated and saved and when, and what a resumed run may change. It says what the run will do;
the lines of the steps are in report.py.
"""

import contextlib
import functools
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from longlora import __version__, disk, progress
from longlora.device import host
from longlora.errors import UserError, counted
from longlora.evaluation.ppl import perplexity
from longlora.files import adapter, base_folder, card, merge
from longlora.ops import shifted_heads
from longlora.training import best, metrics, report, reporters, resume
from longlora.training.inputs import Say, Setup, Source, read_data
from longlora.training.moved import Moved, Trained
from longlora.training.options import OF_TEXT, TrainOptions
from longlora.training.stop import Stop

# The options that a resumed run may change: the arithmetic of a step does not depend on them. Weights and
# data are compared by content, and the length of the run where the schedule depends on it.
FREE = {
    "model",
    "init",
    "adapter",
    "data",
    "chat_template",
    "output_dir",
    "cache_dir",
    "resume_from_checkpoint",
    "checkpointing",
    "max_memory",
    "num_threads",
    "device",
    "max_steps",
    "num_train_epochs",
    "warmup_steps",
    "eval_data",
    "eval_steps",
    "max_eval_samples",
    "eval_passkey",
    "save_steps",
    "save_total_limit",
    "load_best_model_at_end",
    "metric_for_best_model",
    "logging_steps",
    "report_to",
    "run_name",
    "profile",
}
# The kinds of parameters that train at embedding_learning_rate; all others train at learning_rate.
EMBEDDING_RATE = ("embedding", "head", "norm")
FEW = 10  # a run over the data that has fewer steps says so


class Engine(Protocol):
    """What computes the steps of a run.

    In a group of processes, every process calls the same methods in the same order.
    """

    @property
    def parameters(self) -> Sequence[Trained]:
        """The trained tensors, in the order of the layers."""

    def evaluate(self) -> float:
        """The mean loss of the held-out sequences in nats per token, with dense attention."""

    def values(self) -> dict[str, Any]:
        """The trained tensors, name -> float32 array."""

    def state(self) -> dict[str, Any]:
        """What the optimizer continues from: "value.", "m." and "v." before each name -> float32 array."""

    def signal(self) -> int | None:
        """The signal that ends the run after this step, the same in every process; None to go on."""

    def peak_memory(self) -> int:
        """The largest memory in use so far, in bytes."""


class Result(dict):
    """The result of a run: output_dir, step, loss, eval_loss, best_model_checkpoint, stopped, history, as
    keys and as attributes.

    The losses are the last ones, in nats per token. best_model_checkpoint is the checkpoint that is in
    output_dir with load_best_model_at_end, else None. stopped is the number of the signal that ended the run,
    or None. history holds the rows of metrics.jsonl.
    """

    def __getattr__(self, name: str) -> Any:
        return self[name]


@dataclass(frozen=True)
class Due:
    """What follows a step: an evaluation, a checkpoint, a row of metrics."""

    evaluates: bool
    saves: bool
    logs: bool


# ---- rules ---------------------------------------------------------------------------------------


def learning_rate(step: int, steps: int, peak: float, warmup: int, schedule: str) -> float:
    """The learning rate of step 1..steps: it rises linearly over `warmup` steps, then follows the schedule.

    "constant" stays at the peak. "cosine" and "linear" fall from the peak to 0 at step `steps` + 1, so that
    the last step still trains.
    """
    if step <= warmup:
        return peak * step / warmup
    if schedule == "constant":
        return peak
    done = (step - warmup) / (steps - warmup + 1)
    return peak * (0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done)


def peak_rate(o: TrainOptions, kind: str) -> float:
    """The peak learning rate of parameters of this kind."""
    return o.embedding_learning_rate if kind in EMBEDDING_RATE else o.learning_rate


def length(o: TrainOptions, sequences: int, each: int) -> tuple[int, int]:
    """The steps of a run over `sequences` sequences, `each` in a step, and how many of them warm up."""
    steps = o.max_steps if o.max_steps > 0 else max(1, math.ceil(o.num_train_epochs * sequences / each))
    return steps, int(o.warmup_steps) if o.warmup_steps >= 1 else math.ceil(o.warmup_steps * steps)


def same_run(state: dict, identity: dict, o: TrainOptions, where: str) -> None:
    """UserError unless the checkpoint `where`, of this state, belongs to a run with the same arithmetic."""
    what = {
        "template": "another chat template or train_on_inputs",
        "data": "other data",
        "base": "another base model",
        "adapter": "another start: give the adapter that it started from, or none if there was none",
        "schedule": "a schedule of another warm-up or length",
    }
    before, now = (
        "text" if of.get("template") is None else "questions and answers" for of in (state, identity)
    )
    if before != now:
        raise UserError(
            f"{where}: was trained on {before}, the data are {now}; to train its result further give it as "
            "the adapter"
        )
    for key, words in what.items():
        if state.get(key) != identity[key]:
            raise UserError(f"{where}: was trained with {words}")
    defaults = {**TrainOptions().to_dict(), **OF_TEXT}  # of an option that did not exist yet
    for name, value in o.to_dict().items():
        before = state["options"].get(name, defaults[name])
        if name not in FREE and before != value:
            raise UserError(f"{where}: was trained with {name} {before!r}, got {value!r}")


def values_of(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The trained tensors in the optimizer state of a checkpoint, name -> float32 array."""
    head = "value."
    return {name.removeprefix(head): array for name, array in tensors.items() if name.startswith(head)}


# ---- the run -------------------------------------------------------------------------------------


class Run:
    """A run around an Engine. The calls, in order:

        run = Run(...); run.start(engine); run.begin()
        with run.training():
            while run.goes_on(): the engine makes a step as run.due() and run.rate() say; run.after_step(...)
        run.finish() -> Result

    processes: how many share a step. once(function) calls the function in the one process that writes, where
    `writes` is true, while the others wait; a UserError there is raised in all.

    steps, warmup, each   steps of the run; those of the warm-up; sequences in a step
    first, step           steps made before this run and so far
    tensors               the optimizer state of the checkpoint that is resumed, or None
    evaluated             how many held-out sequences are evaluated
    """

    def __init__(
        self,
        o: TrainOptions,
        source: Source,
        setup: Setup,
        say: Say,
        processes: int = 1,
        writes: bool = True,
        once: Callable[[Callable[[], object]], object] = lambda function: function(),
    ):
        self.o, self.source, self.setup, self.say = o, source, setup, progress.quietly(say)
        self.processes, self.writes, self.once = processes, writes, once
        resumes = o.resume_from_checkpoint
        self.resumed = resume.resolve(resumes, o.output_dir) if resumes else None
        self.corpus, self.held_out, fingerprint, template = read_data(o, source, setup, say)
        count = 0 if self.held_out is None else len(self.held_out)
        self.evaluated = min(count, o.max_eval_samples or count)
        self.each = o.per_device_train_batch_size * o.gradient_accumulation_steps * processes
        self.steps, self.warmup = length(o, len(self.corpus), self.each)
        schedule = [self.warmup, self.steps if o.lr_scheduler_type != "constant" else None]
        self.identity = {
            "template": template,
            "data": fingerprint,
            "base": source.fingerprint,
            "adapter": source.adapter_fingerprint,
            "schedule": schedule,
        }
        # A checkpoint belongs to one process that makes the same steps.
        self.alone = replace(o, gradient_accumulation_steps=o.gradient_accumulation_steps * processes)
        self.step = 0
        self.tensors: dict[str, np.ndarray] | None = None
        self.rows: list[dict] = []
        self.best: best.Best | None = None
        of = "" if self.held_out is None else self.held_out.tokens.fingerprint
        self.of_best = f"{of} {count} {self.evaluated}"
        if self.resumed is not None:
            self._resume(self.resumed)
        # The checkpoint to return to, and its step; whether parameters and optimizer are those of `step`.
        self.saved, self.saved_step, self.consistent = self.resumed, self.step, True
        self.first = self.step

    def _resume(self, path):
        state, self.tensors = resume.load(path)
        same_run(state, self.identity, self.alone, path)
        self.step, self.rows = state["global_step"], state["log_history"]
        if self.o.load_best_model_at_end:
            self.best, forgotten = best.from_state(state, path, self.of_best)
            if forgotten is not None:
                self.say(f"the best checkpoint so far does not count: {forgotten}")
        if self.step > self.steps:
            raise UserError(f"{path}: has made {self.step} steps, more than the {self.steps} of max_steps")
        if state["position"] != self.position:
            raise UserError(
                f"{path}: its position is sequence {state['position']}, but {self.step} steps use "
                f"{self.position}"
            )

    @property
    def position(self) -> int:
        """How many sequences the steps so far have used."""
        return self.step * self.each

    def start(self, engine: Engine, memory: str | None = None) -> None:
        """Write the options and the metrics so far, and say what the run will do.

        memory: a sentence about the memory of the run. UserError for what would fail when the run saves.
        """
        o, self.engine = self.o, engine
        self.once(self._rehearse)
        self.once(lambda: report.write_options(o))
        self.log = metrics.Log(o.output_dir, self.rows, self.writes)
        self.reports = reporters.Reports(o, reporters.chosen(o.report_to) if self.writes else (), self.say)
        for sentence in self._describe(engine.parameters):
            self.say(sentence)
        if memory is not None:
            self.say(memory)
        if o.resume_from_checkpoint:
            self.say(
                f"resuming: {self.resumed}, after step {self.step}"
                if self.resumed
                else "resuming: no checkpoint yet, from the start"
            )

    def _rehearse(self):
        """Write everything that a checkpoint holds besides tensors, and remove it again."""
        folder, home = self.o.output_dir, resume.path_of(self.o.output_dir, self.steps)
        least = sum(3 * 4 * math.prod(p.shape) for p in self.engine.parameters)  # value, m and v in float32
        free = disk.free(folder)
        if free is not None and free < least and self.step < self.steps:
            raise UserError(
                f"{folder}: a checkpoint takes more than {least / 2**20:,.1f} MiB, its disk has "
                f"{free / 2**20:,.1f} MiB free"
            )
        if self.setup.lora is not None:
            base_folder.check(folder)
        with disk.passing(folder, "rehearsal") as aside:
            self.write_model(aside, None, home)

    def _describe(self, parameters):
        """What the run will do, line by line."""
        o, setup, processes = self.o, self.setup, self.processes
        H, n = setup.config.num_attention_heads, o.gradient_accumulation_steps
        if o.group_size is None:
            yield f"attention: dense causal, {H} heads"
        else:
            yield (
                f"attention: S2 {o.boundary}, group {o.group_size} of {o.sequence_length} tokens, "
                f"{shifted_heads(H, o.shift)}/{H} heads shifted by {o.group_size // 2}; evaluation is dense"
            )
        counts: dict[str, int] = {}
        for p in parameters:
            counts[p.kind] = counts.get(p.kind, 0) + math.prod(p.shape)
        if o.adapter is not None:
            yield f"adapter: {o.adapter} is trained further, r {o.r}, alpha {o.lora_alpha:g}"
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in counts.items())
        yield f"trainable: {kinds}; total {sum(counts.values()):,}"
        yield setup.rope
        evaluated = f"; evaluated on {counted(self.evaluated, 'sequence')}" if self.evaluated else ""
        yield f"data: {self.corpus.sentence}{evaluated}"
        each, shared = f"{o.per_device_train_batch_size} x {n} x {o.sequence_length:,}", ""
        if processes > 1:
            each, shared = f"{processes} x {each}", f" by {processes} processes"
        warmup = f" after {counted(self.warmup, 'step')} of warm-up" if self.warmup else ""
        yield (
            f"steps: {self.steps:,} of {each} = {self.each * o.sequence_length:,} tokens{shared}; "
            f"learning rate {o.learning_rate:g}, embedding, head and norms {o.embedding_learning_rate:g}, "
            f"{o.lr_scheduler_type}{warmup}"
        )
        if o.max_steps < 0 and self.steps < FEW:
            yield "few steps: a larger num_train_epochs or a smaller sequence_length makes more"

    def begin(self) -> None:
        """Evaluate before the first step, and note the parameters' checksums and the time.

        Call it once the engine can evaluate.
        """
        if self.evaluated and self.step == 0:
            loss = self.engine.evaluate()
            self._log(step=0, eval_loss=loss, eval_perplexity=perplexity(loss))
            self.say(f"before: held-out perplexity {perplexity(loss):.3f}, dense attention")
        self.moved, self.shown = Moved(self.engine.parameters), ""
        self.began = self.started = time.perf_counter()

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Entered around the steps: notes signals, shows the progress, and saves a checkpoint at the end."""
        quiet = None if self.writes else True
        with (
            self.reports,
            Stop() as self.stop,
            progress.bar(
                total=self.steps, initial=self.step, desc="training", unit="step", disable=quiet
            ) as self.bar,
        ):
            try:
                yield
            except UserError as error:
                raise UserError(f"{error}; stopped, {self._rescue()}") from None
            except Exception:
                self.say(f"stopped by an error after step {self.step}; {self._rescue()}")
                raise
            except KeyboardInterrupt:
                self.say(f"ended at once after step {self.step}; {self._left()}")
                raise
            if self.step > self.first or self.resumed is None:
                self.save()

    @contextlib.contextmanager
    def updating(self) -> Iterator[None]:
        """Entered while parameters change: until `after_step` there is no state that could be saved.

        But a UserError is raised before anything changes.
        """
        self.consistent = False
        try:
            yield
        except UserError:
            self.consistent = True
            raise

    def _rescue(self):
        """Save the steps so far after an error, unless they are saved -> what is there, in words."""
        if not self.consistent or self.processes > 1 or self.step == self.saved_step:
            return self._left()
        try:
            return f"the state after step {self.step} is saved in {self.save()}"
        except Exception as error:
            return f"and the state after step {self.step} could not be saved ({error}); {self._left()}"

    def _left(self):
        return f"the last checkpoint is {self.saved}" if self.saved else "nothing was saved"

    def goes_on(self) -> bool:
        """Whether there is another step to make."""
        return self.step < self.steps and self.engine.signal() is None

    def share(self, step: int) -> float:
        """The share of the peak learning rates in this step, which counts from 1."""
        return learning_rate(step, self.steps, 1.0, self.warmup, self.o.lr_scheduler_type)

    def rate(self, kind: str) -> float:
        """The learning rate of this kind of parameters in the next step."""
        return peak_rate(self.o, kind) * self.share(self.step + 1)

    def due(self) -> Due:
        """What follows the next step."""
        o, step, last = self.o, self.step + 1, self.step + 1 == self.steps
        evaluates = bool(self.evaluated and (last or o.eval_steps and step % o.eval_steps == 0))
        saves = bool(o.save_steps and step % o.save_steps == 0 and not last)
        return Due(evaluates, saves, evaluates or last or step % o.logging_steps == 0)

    @contextlib.contextmanager
    def named(self) -> Iterator[None]:
        """A UserError in here gets the number of the next step."""
        try:
            yield
        except UserError as error:
            raise UserError(f"step {self.step + 1}: {error}") from None

    def after_step(self, loss: float, norm: float, tokens: int) -> None:
        """Check, log, evaluate and save as is due.

        loss is the mean over the step's targets in nats, norm that of the gradient before clipping, tokens
        the number of tokens in the step.
        """
        o, due, share = self.o, self.due(), self.share(self.step + 1)
        self.step += 1
        if self.moved.waiting:
            self.consistent = False  # nothing is kept of a run that trains nothing
            self.moved.check(self.step, share < 0.5)
        self.consistent = True
        speed = tokens / (time.perf_counter() - self.started)
        row = {
            "step": self.step,
            "loss": loss,
            "grad_norm": norm,
            "tokens_per_s": round(speed, 1),
            "learning_rate": o.learning_rate * share,
            "embedding_learning_rate": o.embedding_learning_rate * share,
            "epoch": self.position / len(self.corpus),
            "num_input_tokens_seen": self.position * o.sequence_length,
        }
        if due.evaluates:
            try:
                row["eval_loss"] = self.engine.evaluate()
            except Exception:
                self._log(**row)  # the step is made, and saved as such
                raise
            row["eval_perplexity"] = perplexity(row["eval_loss"])
            self.shown = f", held-out perplexity {row['eval_perplexity']:.3f}"
        row["peak_memory"] = self.engine.peak_memory()
        self.bar.update(1)
        self.bar.set_postfix_str(f"loss {loss:.4f}, {speed:,.0f} tokens/s{self.shown}")
        if due.logs:
            self._log(**row)
            if self.bar.disable:
                each = (time.perf_counter() - self.began) / (self.step - self.first)
                self.say(report.line(row, self.steps, each * (self.steps - self.step)))
        if due.saves and self.engine.signal() is None:
            self.save()
        self.started = time.perf_counter()

    def _log(self, **row):
        self.log.add(**row)
        self.reports.log(row)

    def save(self) -> str:
        """Write checkpoint-N, N = step -> its path."""
        tensors = self.engine.state()
        output_dir, limit, chosen = self.o.output_dir, self.o.save_total_limit, self.best
        home = resume.path_of(output_dir, self.step)
        if self.o.load_best_model_at_end:
            last = self.log.rows[-1] if self.log.rows else {}
            loss = last.get("eval_loss") if last.get("step") == self.step else None
            chosen = best.better(self.best, self.step, loss, home)
        state = {
            "global_step": self.step,
            "max_steps": self.steps,
            "epoch": self.position / len(self.corpus),
            "position": self.position,
            "seed": self.o.seed,
            "written": time.time(),
            **self.identity,
            "options": self.alone.to_dict(),
            "log_history": self.log.rows,
            "version": __version__,
            **best.to_state(chosen, self.of_best),
        }
        values, kept = values_of(tensors), None if chosen is None else chosen.path

        def write():
            self.log.sync()
            model = functools.partial(self.write_model, values=values, home=home)
            resume.save(output_dir, state, tensors, model, limit, kept)

        self.once(write)
        self.saved, self.saved_step, self.best = home, self.step, chosen
        return home

    def write_model(self, directory: str, values: dict[str, Any] | None, home: str | None = None) -> None:
        """Write the adapter, or with `full` the whole model, into the directory.

        values: name -> float32 array, or None to leave the weights out; home: the name that the directory
        gets in the end.
        """
        source, setup = self.source, self.setup
        if setup.lora is not None:
            adapter.save(directory, values, setup.lora, source.base, setup.raw, source.tokenizer, home)
        else:
            read = None if values is None else lambda name: host(values[name])
            merge.save_merged(directory, read, setup.raw, source.tokenizer, source.dtype, source.beside)
            if source.base is not None:
                name = os.path.basename(os.path.realpath(home or directory))
                kept = source.base.dtype("model.embed_tokens.weight")
                text = card.merged(source.base, directory, setup.config, name, kept, None)
                card.write(directory, text)

    def _write_last(self, values):
        """Write the result: the model of `values`, or where values is None the best checkpoint's."""
        try:
            if values is None:
                assert self.best is not None
                state, tensors = resume.load(self.best.path)
                same_run(state, self.identity, self.alone, self.best.path)
                values = values_of(tensors)
            self.write_model(self.o.output_dir, values)
            if self.best is not None and self.o.save_total_limit == 1:  # as TrainingArguments means it
                resume.keep_only(self.o.output_dir, self.best.path)
        except UserError as error:
            raise UserError(f"{error}; {self._left()}") from None

    def finish(self) -> Result:
        """Write the model unless a signal stopped the run, and draw the loss -> Result."""
        o, rows = self.o, self.log.rows
        stopped = self.engine.signal() if self.step < self.steps else None
        if not stopped:
            earlier = self.best is not None and self.best.step != self.step
            values = None if earlier else self.engine.values()
            self.once(lambda: self._write_last(values))
        self.once(lambda: report.draw(o, rows, self.say))
        if stopped:
            self.say(
                f"stopped by {signal.Signals(stopped).name} after step {self.step}; go on with "
                f"--resume-from-checkpoint {self.saved}"
            )
        else:
            self.say(report.last_line(o, rows, self.best))
        self.reports.close()  # wandb may wait for its network here: all is written
        last = {key: value for row in rows for key, value in row.items()}
        return Result(
            output_dir=o.output_dir,
            step=self.step,
            loss=last.get("loss"),
            eval_loss=last.get("eval_loss"),
            best_model_checkpoint=self.best.path if self.best is not None and not stopped else None,
            stopped=stopped,
            history=rows,
        )
