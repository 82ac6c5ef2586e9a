"""The training run: read, plan, say what will be done, then step after step, save, and leave everything a user needs.

Nothing here computes on activations: a step is Model.train_microbatch for each batch and one optimizer step.
"""

import contextlib
import math
import os
import signal
import threading
import time
import zlib

from longlora import __version__
from longlora.data.sequences import Order, Sequences, batch
from longlora.data.tokens import tokenise
from longlora.decoder import plan as plan_
from longlora.decoder import rope
from longlora.decoder.config import read_config
from longlora.decoder.lora import LoraConfig
from longlora.device import CPU, choose, host
from longlora.disk import write_json, write_text
from longlora.errors import UserError
from longlora.evaluation import ppl
from longlora.files import adapter, merge
from longlora.training import metrics
from longlora.training import options as options_
from longlora.training import resume as checkpoint

OPTIONS, PROFILE = "options.yaml", "profile.json"
# What a directory holds when something was trained there or a model lies in it: never written over.
TAKEN = (metrics.FILE, OPTIONS, "adapter_config.json", "config.json")
# The options that a resumed run may change: none of them is in the arithmetic of a step. Weights and data are compared by
# what they hold, the length of the run where the schedule depends on it.
FREE = {
    "model",
    "init",
    "data",
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
    "save_steps",
    "save_total_limit",
    "logging_steps",
    "profile",
}
WHOLE = ("embedding", "head", "norm")  # the kinds that embedding_learning_rate is for


class Result(dict):
    """What a run came to: output_dir, step, loss, eval_loss, stopped (None or the signal's number), history."""

    __getattr__ = dict.__getitem__


def train(say=print, **keywords):
    """Train as the keywords say (the fields of options.TrainOptions) -> Result. `say` is given the lines of the report.

    SIGINT and SIGTERM end the step, save a checkpoint and return; a second one stops at once. UserError for what cannot be
    done, and when a step goes wrong.
    """
    return run(options_.from_dict(keywords), say)


def plan(**keywords):
    """The Plan of a run with these keywords (the fields of options.TrainOptions), from the config alone."""
    return plan_of(options_.from_dict(keywords, planning=True))


def plan_of(o):
    """The Plan of a run with these options: from the config alone, no weight is read."""
    use_threads(o)
    path = o.model or o.init
    if os.path.isfile(path) and path.endswith(".gguf"):
        from longlora.files.open_model import open_model

        config = open_model(path).config
    else:
        config = read_config(path)
    return Setup(o, config, choose(o.device)[0]).plan


def use_threads(o):
    if o.num_threads:
        from longlora import set_num_threads

        set_num_threads(o.num_threads)


class Setup:
    """What the options come to for a base of `base` (a ModelConfig): config, raw, rope (a sentence), attention, multiple, lora, plan."""

    def __init__(self, o, base, device=CPU):
        self.config, self.raw = base, base.raw
        self.rope = f"rope: {base.rope.type}, as the base: {base.max_position_embeddings} positions"
        if o.target_length is not None:
            extended, self.rope = rope.extend(base, o.rope_type, o.target_length)
            self.raw = rope.to_config(base.raw, extended, o.target_length)
            self.config = read_config(self.raw)
        o.resolve(self.config)
        dense = o.attention == "dense"
        self.attention = (
            None if dense else {"group_size": o.group_size, "boundary": o.boundary, "shift": o.shift}
        )
        self.multiple = 1 if dense or o.boundary == "split" else o.group_size  # of the length of every batch
        targets = "all-linear" if o.target_modules == ("all-linear",) else o.target_modules
        self.lora = None if o.full else LoraConfig(o.r, o.lora_alpha, targets, o.modules_to_save)
        self.plan = plan_.plan(
            self.config,
            dtype=o.dtype,
            batch_size=o.per_device_train_batch_size,
            sequence_length=o.sequence_length,
            group_size=o.group_size,
            lora=self.lora,
            checkpointing=o.checkpointing,
            memory=None if o.max_memory is None else int(o.max_memory * 2**30),
            device=device,
        )


class Source:
    """Where weights and tokenizer come from: a base model, or a config and random weights. dtype: of a whole model saved."""

    def __init__(self, o):
        if o.model:
            from longlora.files.open_model import open_model

            self.base = open_model(o.model)
            self.config, self.fingerprint = self.base.config, self.base.fingerprint()
            self.tokenizer = self.base.tokenizer() if self.base.has_tokenizer() else None
            self.dtype = {name: self.base.dtype(name) for name in self.base.names()}
            return
        from longlora.files.tokenizer import Tokenizer

        directory = o.init if os.path.isdir(o.init) else os.path.dirname(o.init) or "."
        self.base, self.config, self.tokenizer = None, read_config(o.init), None
        self.fingerprint = f"random {o.seed}"
        if os.path.exists(os.path.join(directory, "tokenizer.json")):
            self.tokenizer = Tokenizer.from_directory(directory).check(self.config, directory)
        self.dtype = self.config.raw.get("dtype") or self.config.raw.get("torch_dtype") or "float32"


def learning_rate(step, steps, peak, warmup, schedule):
    """The rate of step 1..steps: linear over `warmup` steps up to the peak, then constant, or down by a cosine or a line.

    The line goes from 0 at step 0 to 0 at step `steps` + 1, so that no step is wasted at 0.
    """
    if step <= warmup:
        return peak * step / warmup
    if schedule == "constant":
        return peak
    done = (step - warmup) / (steps - warmup + 1)
    return peak * (0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done)


class Stop:
    """Remembers SIGINT and SIGTERM while it is entered, so that a step ends before the run does."""

    def __init__(self):
        self.signal, self.before = None, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number, frame):
        if self.signal is not None:  # the second one means now
            raise KeyboardInterrupt
        self.signal = number

    def __exit__(self, *unused):
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Moved:
    """Stops a run that trains nothing: every kind of parameter has to change. Compared by checksums, so nothing is copied."""

    def __init__(self, parameters):
        self.waiting = {}
        for p in parameters:
            self.waiting.setdefault(p.kind, {})[p] = self._sum(p)
        self.first = True

    @staticmethod
    def _sum(p):
        return zlib.crc32(host(p.value))

    def check(self, step, low):
        """Called after a step. LoRA's A may wait for the second: while B is zero it has no gradient. low: the rate is far
        below its peak, so it may be the schedule that keeps an update below the rounding of float32; then a gradient is enough.
        """
        for kind, sums in list(self.waiting.items()):
            still = [p for p, before in sums.items() if self._sum(p) == before]
            # A bias of k has next to no gradient; of all others each tensor has one.
            if not still or kind == "bias" and len(still) < len(sums):
                del self.waiting[kind]
                continue
            flat = [p for p in still if not host(p.grad).any()]
            if kind == "lora_A" and self.first or low and not flat:
                continue
            why = (
                "its gradient is zero"
                if flat
                else "its updates are below the rounding of float32; raise the learning rate"
            )
            names = ", ".join(p.name for p in (flat or still)[:2])
            raise UserError(
                f"step {step}: {kind} does not train: {len(flat or still)} of {len(sums)} tensors have not moved "
                f"({names}): {why}"
            )
        self.first = False


def run(o, say=print):
    """As `train`, with checked options."""
    use_threads(o)
    source = Source(o)
    device, chosen = choose(o.device)
    if o.profile and device != CPU:
        raise UserError("profile times the ops of the CPU, which are waited for; give it --device cpu")
    setup = Setup(o, source.config, device)
    plan = setup.plan
    if not plan.fits:
        where = "" if device == CPU else f" on {device}"
        raise UserError(
            f"this run needs {plan.total / 2**30:.2f} GiB, there are {plan.memory / 2**30:.2f}{where}; what would "
            "make it fit: " + "; ".join(plan.changes)
        )
    refuse_taken(o)
    with checkpoint.alone(o.output_dir):
        say(chosen)
        return _run(o, source, setup, device, say)


def refuse_taken(o):
    """Stop where output_dir holds something that this run would write over."""
    if os.path.exists(o.output_dir) and not os.path.isdir(o.output_dir):
        raise UserError(f"{o.output_dir}: is not a directory")
    if o.resume_from_checkpoint:
        return
    taken = [name for name in TAKEN if os.path.exists(os.path.join(o.output_dir, name))]
    taken += [os.path.basename(path) for path in checkpoint.found(o.output_dir)]
    if taken:
        raise UserError(
            f"{o.output_dir}: holds another run or a model ({taken[0]}); resume it (resume_from_checkpoint latest) "
            "or choose another output_dir"
        )


def _run(o, source, setup, device, say):
    from tqdm import tqdm

    from longlora.decoder.model import Model
    from longlora.training.optimizer import AdamW

    checkpoint.sweep(o.output_dir)
    resumed = checkpoint.resolve(o.resume_from_checkpoint, o.output_dir) if o.resume_from_checkpoint else None
    corpus, held_out, fingerprint = read_data(o, source, setup, say)
    each = o.per_device_train_batch_size * o.gradient_accumulation_steps
    steps = o.max_steps if o.max_steps > 0 else max(1, math.ceil(o.num_train_epochs * len(corpus) / each))
    warmup = int(o.warmup_steps) if o.warmup_steps >= 1 else math.ceil(o.warmup_steps * steps)
    identity = {
        "data": fingerprint,
        "base": source.fingerprint,
        "schedule": [warmup, steps if o.lr_scheduler_type != "constant" else None],
    }

    recorder = None
    if o.profile:  # the peaks first: what they take is free again before the model is made
        from longlora import get_num_threads
        from longlora.training import profile

        recorder = profile.Recorder(profile.peaks(get_num_threads()))
    model = Model(
        setup.config,
        dtype=o.dtype,
        lora=setup.lora,
        attention=setup.attention,
        plan=setup.plan,
        seed=o.seed,
        device=device,
    )
    optimizer = AdamW(
        model.parameters,
        beta1=o.adam_beta1,
        beta2=o.adam_beta2,
        eps=o.adam_epsilon,
        weight_decay=o.weight_decay,
        max_grad_norm=o.max_grad_norm,
    )
    kinds = {p.kind for p in model.parameters}
    order, step, history = Order(len(corpus), o.seed), 0, []
    if source.base is not None:
        model.load(source.base)
    else:
        model.init_random(o.seed)
    if resumed is not None:
        state, tensors = checkpoint.load(resumed)
        same_run(state, identity, o, resumed)
        step, order.position, history = state["global_step"], state["position"], state["log_history"]
        optimizer.load_state_dict(tensors, step)
        if step > steps:
            raise UserError(f"{resumed}: has made {step} steps, which is more than the {steps} of max_steps")

    def write_model(directory):
        tensors = model.tensors()
        if setup.lora is not None:
            adapter.save(directory, tensors, setup.lora, source.base, setup.raw, source.tokenizer)
        else:
            merge.save_merged(
                directory, lambda name: host(tensors[name]), setup.raw, source.tokenizer, source.dtype
            )

    def save():
        state = {
            "global_step": step,
            "max_steps": steps,
            "epoch": order.position / len(corpus),
            "position": order.position,
            "seed": o.seed,
            **identity,
            "options": o.to_dict(),
            "log_history": log.rows,
            "version": __version__,
        }
        return checkpoint.save(o.output_dir, state, optimizer.state_dict(), write_model, o.save_total_limit)

    def evaluate():
        """Mean loss of the held-out sequences, dense attention."""
        pairs = [ppl.score(model, held_out.get(i), o.sequence_length) for i in held_out_indices]
        return sum(loss for _, loss in pairs) / sum(tokens for tokens, _ in pairs)

    held_out_indices = (
        range(min(len(held_out), o.max_eval_samples or len(held_out))) if held_out is not None else ()
    )
    write_options(o)
    log = metrics.Log(o.output_dir, history)
    for sentence in describe(o, setup, model.parameters, corpus, len(held_out_indices), steps, warmup):
        say(sentence)
    say(
        f"memory: {setup.plan.total / 2**30:.3f} GiB planned of {setup.plan.memory / 2**30:.3f} available, {o.dtype}, "
        f"checkpointing {setup.plan.checkpointing}"
    )
    if o.resume_from_checkpoint:
        say(
            f"resuming: {resumed}, after step {step}"
            if resumed
            else "resuming: no checkpoint yet, from the start"
        )
    if held_out_indices and step == 0:
        loss = evaluate()
        log.add(step=0, eval_loss=loss, eval_perplexity=ppl.perplexity(loss))
        say(f"before: held-out perplexity {ppl.perplexity(loss):.3f}, dense attention")
    moved, began, first, loss, evaluated = Moved(model.parameters), time.perf_counter(), step, math.nan, ""
    with Stop() as stop, tqdm(total=steps, initial=step, desc="training", unit="step", disable=None) as bar:
        while step < steps and stop.signal is None:
            started = time.perf_counter()
            micro = [
                batch(corpus, order.take(o.per_device_train_batch_size), setup.multiple)
                for _ in range(o.gradient_accumulation_steps)
            ]
            tokens = sum(int((targets != -100).sum()) for _, targets in micro)
            share = learning_rate(step + 1, steps, 1.0, warmup, o.lr_scheduler_type)
            rates = {
                kind: (o.embedding_learning_rate if kind in WHOLE else o.learning_rate) * share
                for kind in kinds
            }
            evaluates = held_out_indices and (
                step + 1 == steps or o.eval_steps and (step + 1) % o.eval_steps == 0
            )
            saves = o.save_steps and (step + 1) % o.save_steps == 0 and step + 1 < steps
            logs = evaluates or (step + 1) % o.logging_steps == 0 or step + 1 == steps
            read = device == CPU or logs or saves  # a GPU is not waited for when nothing is said
            # the first step of a run also faults its memory in: it is recorded only where there is no other
            recorded = (
                recorder
                if recorder is not None and (step > first or steps == step + 1)
                else contextlib.nullcontext()
            )
            with step_named(step + 1, checkpoint.found(o.output_dir)), recorded:
                model.zero_grad()
                sums = [
                    model.train_microbatch(ids, targets, loss_scale=1 / tokens, read=read)
                    for ids, targets in micro
                ]
                norm = optimizer.step(rates)
            step += 1
            if moved.waiting:
                moved.check(step, share < 0.5)
            speed = tokens / (time.perf_counter() - started)
            loss = sum(sums) / tokens if read else loss
            row = {
                "step": step,
                "loss": loss,
                "grad_norm": norm,
                "tokens_per_s": round(speed, 1),
                "learning_rate": o.learning_rate * share,
                "embedding_learning_rate": o.embedding_learning_rate * share,
                "epoch": order.position / len(corpus),
                "num_input_tokens_seen": step * each * o.sequence_length,
            }
            if evaluates:
                row["eval_loss"] = evaluate()
                row["eval_perplexity"] = ppl.perplexity(row["eval_loss"])
            row["peak_memory"] = metrics.peak_memory()
            bar.update(1)
            evaluated = (
                evaluated if "eval_loss" not in row else f", held-out perplexity {row['eval_perplexity']:.3f}"
            )
            bar.set_postfix_str(f"loss {loss:.4f}, {speed:,.0f} tokens/s{evaluated}")
            if logs:
                log.add(**row)
                left = (time.perf_counter() - began) / (step - first) * (steps - step)
                if bar.disable:
                    say(line(row, steps, left))
            if saves and stop.signal is None:
                save()
        saved = save() if step > first or resumed is None else resumed
    draw(o, log.rows)
    if recorder is not None and recorder.steps:
        found = recorder.report()
        write_json(os.path.join(o.output_dir, PROFILE), found)
        say(profile.text(found))
    stopped = stop.signal if step < steps else None
    if stopped:
        say(
            f"stopped by {signal.Signals(stopped).name} after step {step}; go on with --resume-from-checkpoint {saved}"
        )
    else:
        write_model(o.output_dir)
        say(last_line(o, log.rows))
    last = {key: value for row in log.rows for key, value in row.items()}
    return Result(
        output_dir=o.output_dir,
        step=step,
        loss=last.get("loss"),
        eval_loss=last.get("eval_loss"),
        stopped=stopped,
        history=log.rows,
    )


def read_data(o, source, setup, say):
    """-> Sequences to train on, Sequences held out or None, and a string that tells the former from others."""
    cache = o.cache_dir or os.path.join(o.output_dir, "cache")
    if os.path.isdir(cache):
        checkpoint.sweep(cache)

    def sequences(path):
        tokens = tokenise(path, source.tokenizer, setup.config.vocab_size, cache, say)
        return Sequences(tokens, o.sequence_length, o.long_documents, path)

    corpus, held_out = sequences(o.data), None
    if o.eval_data:
        held_out = sequences(o.eval_data)
    elif o.eval_fraction:
        held_out = corpus.hold_out(o.eval_fraction)
    return corpus, held_out, f"{corpus.tokens.fingerprint} {len(corpus)}"


def same_run(state, identity, o, where):
    """A resumed run must be the run that was stopped: what is in its arithmetic may not differ."""
    what = {
        "data": "other data",
        "base": "another base model",
        "schedule": "a schedule of another warm-up or length",
    }
    for key, words in what.items():
        if state.get(key) != identity[key]:
            raise UserError(f"{where}: was trained with {words}")
    for name, value in o.to_dict().items():
        if name not in FREE and state["options"].get(name) != value:
            raise UserError(f"{where}: was trained with {name} {state['options'].get(name)!r}, got {value!r}")


@contextlib.contextmanager
def step_named(step, checkpoints):
    """What goes wrong in a step is said with its number and with what there is to go back to."""
    try:
        yield
    except UserError as error:
        left = f"the last checkpoint is {checkpoints[-1]}" if checkpoints else "nothing was saved"
        raise UserError(f"step {step}: {error}; stopped, {left}") from None


def write_options(o):
    import yaml

    write_text(os.path.join(o.output_dir, OPTIONS), yaml.safe_dump(o.to_dict(), sort_keys=False))


def line(row, steps, left):
    left = f"{int(left) // 3600}:{int(left) // 60 % 60:02}:{int(left) % 60:02}"
    text = (
        f"step {row['step']}/{steps}  loss {row['loss']:.4f}  learning rate {row['learning_rate']:.3g}  grad norm "
        f"{row['grad_norm']:.3g}  {row['tokens_per_s']:,.0f} tokens/s  {left} left"
    )
    return text + (f"  held-out perplexity {row['eval_perplexity']:.3f}" if "eval_loss" in row else "")


def last_line(o, rows):
    evaluated = [row["eval_perplexity"] for row in rows if "eval_perplexity" in row]
    if not evaluated:
        return f"saved {o.output_dir}"
    return f"saved {o.output_dir}; held-out perplexity {evaluated[0]:.3f} -> {evaluated[-1]:.3f}, dense attention"


def draw(o, rows):
    if any("loss" in row for row in rows):
        from longlora import plots

        plots.loss(os.path.join(o.output_dir, "loss.png"), rows)


def describe(o, setup, parameters, corpus, held_out, steps, warmup, processes=None):
    """What the run will do, line by line. processes: how many share a step, None when there is but one."""
    H, B, n = setup.config.num_attention_heads, o.per_device_train_batch_size, o.gradient_accumulation_steps
    if setup.attention is None:
        yield f"attention: dense causal, {H} heads"
    else:
        shifted = {"half": H - H // 2, "none": 0, "all": H}[o.shift]
        yield (
            f"attention: S2 {o.boundary}, group {o.group_size} of {o.sequence_length} tokens, {shifted}/{H} heads shifted "
            f"by {o.group_size // 2}; evaluation is dense"
        )
    counts = {}
    for p in parameters:
        counts[p.kind] = counts.get(p.kind, 0) + math.prod(p.shape)
    yield (
        "trainable: "
        + ", ".join(f"{kind} {count:,}" for kind, count in counts.items())
        + f"; total {sum(counts.values()):,}"
    )
    yield setup.rope
    yield f"data: {corpus.sentence}" + (f"; {held_out:,} sequences are evaluated" if held_out else "")
    each, shared = f"{B} x {n} x {o.sequence_length:,}", ""
    if processes is not None:
        each, shared = f"{processes} x {each}", f" by {processes} processes"
    yield (
        f"steps: {steps:,} of {each} = {(processes or 1) * B * n * o.sequence_length:,} tokens{shared}; learning rate "
        f"{o.learning_rate:g}, embedding, head and norms {o.embedding_learning_rate:g}, {o.lr_scheduler_type}"
        + (f" after {warmup} steps of warm-up" if warmup else "")
    )
