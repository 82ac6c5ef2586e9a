"""The training run: read, plan, say what will be done, then step after step, save, and leave everything a user needs.

Nothing here computes on activations: a step is Model.train_microbatch for each batch and one optimizer step.
"""
import json
import math
import os
import resource
import signal
import threading
import time

import numpy as np

from . import adapter, checkpoint, data, options as options_, plan as plan_, plots, ppl, rope
from .config import read_config
from .errors import UserError
from .safetensors_file import write_json, write_text

METRICS = "metrics.jsonl"


class Result(dict):
    """What a run came to: output_dir, step, loss, eval_loss, stopped (None or the signal's number), history."""
    __getattr__ = dict.__getitem__


def train(say=print, **keywords):
    """Train as the keywords say (the fields of options.TrainOptions) -> Result. UserError for what cannot be done."""
    return run(options_.from_dict(keywords), say)


def _extended(config, o):
    """The config with the rope that the options ask for -> (ModelConfig, raw dict, sentence)."""
    if o.target_length is None or (o.init and o.target_length == config.max_position_embeddings):
        return config, config.raw, f"rope: {config.rope.type}, unchanged ({config.max_position_embeddings} positions)"
    new, sentence = rope.extend(config, o.rope_type, o.target_length)
    raw = rope.to_config(config.raw, new, o.target_length)
    return read_config(raw), raw, sentence


def _attention(o, length):
    """The options' attention for sequences of `length` -> dict for Model, or None for dense."""
    if o.attention == "dense":
        if o.group_size is not None:
            raise UserError("group_size is of s2 attention, got attention dense")
        return None
    group = o.group_size
    if group is None:
        group = max(2, length // 4 // 2 * 2)
    if group % 2:
        raise UserError(f"group_size should be even, since half of it is the shift, got {group}")
    if group > length:
        raise UserError(f"group_size should be at most the sequence length {length}, got {group}")
    if o.boundary != "split" and length % group:
        raise UserError(f"boundary {o.boundary} needs a sequence length that is a multiple of group_size, got {length} and {group}")
    return {"group_size": group, "boundary": o.boundary, "shift": o.shift}


def learning_rate(step, steps, peak, warmup, schedule):
    """The rate of step 1..steps: linear from 0 over `warmup` steps, then constant, cosine to 0, or linear to 0."""
    if step <= warmup:
        return peak * step / warmup
    if schedule == "constant":
        return peak
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (0.5 * (1 + math.cos(math.pi * min(done, 1))) if schedule == "cosine" else max(0.0, 1 - done))


def _planned(config, o):
    """-> sequence length, attention, LoraConfig or None, Plan."""
    length = o.sequence_length or o.target_length or config.max_position_embeddings
    if length > config.max_position_embeddings:
        raise UserError(f"sequence_length {length} is above the {config.max_position_embeddings} positions of the model; set target_length")
    attention = _attention(o, length)
    lora = None if o.full else adapter.LoraConfig(o.r, o.lora_alpha, o.target_modules, o.modules_to_save)
    return length, attention, lora, plan_.plan(
        config, dtype=o.dtype, batch_size=o.per_device_train_batch_size, sequence_length=length,
        group_size=attention["group_size"] if attention else None, lora=lora, checkpointing=o.checkpointing)


def plan_of(o):
    """The Plan of a run with these options: from the config alone, no weight is read."""
    if o.num_threads:
        from ._C import set_num_threads
        set_num_threads(o.num_threads)
    return _planned(_extended(_config(o), o)[0], o)[3]


def _config(o):
    """The config of the options' model, without opening a Hugging Face model's weights."""
    path = o.model or o.init
    if os.path.isfile(path) and path.endswith(".gguf"):
        from .weights import open_model
        return open_model(path).config
    return read_config(path)


class Source:
    """Where weights and tokenizer come from: a base model, or a config with random weights."""

    def __init__(self, o):
        from .tokenizer import Tokenizer
        from .weights import open_model
        self.base = open_model(o.model) if o.model else None
        if self.base is not None:
            self.config, self.tokenizer, self.dtype = self.base.config, self.base.tokenizer(), None
            return
        directory = o.init if os.path.isdir(o.init) else os.path.dirname(o.init) or "."
        self.config = read_config(o.init)
        self.tokenizer = Tokenizer.from_directory(directory).check(self.config, directory)
        self.dtype = self.config.raw.get("torch_dtype") or self.config.raw.get("dtype") or "float32"


def peak_memory():
    """The largest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Stop:
    """Remembers SIGINT and SIGTERM while it is entered, so that a step ends before the run does."""

    def __init__(self):
        self.signal = None

    def __enter__(self):
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number, frame):
        if self.signal is not None:    # the second one means now
            raise KeyboardInterrupt
        self.signal = number

    def __exit__(self, *unused):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def run(o, say=print):
    """As `train`, with checked options."""
    from .model import Model
    from .optimizer import AdamW
    if o.num_threads:
        from ._C import set_num_threads
        set_num_threads(o.num_threads)
    resumed = checkpoint.resolve(o.resume_from_checkpoint, o.output_dir) if o.resume_from_checkpoint else None
    if resumed is None and os.path.exists(os.path.join(o.output_dir, METRICS)):
        raise UserError(f"{o.output_dir}: holds another run; resume it (resume_from_checkpoint) or choose another output_dir")
    source = Source(o)
    config, raw, rope_sentence = _extended(source.config, o)
    length, attention, lora, plan = _planned(config, o)
    if not plan.fits:
        raise UserError(f"this run needs {plan.total / 2**30:.2f} GiB and there are {plan.memory / 2**30:.2f}; it would fit with: "
                        + ("; ".join(plan.changes) or "a smaller model"))

    cache = o.cache_dir or os.path.join(o.output_dir, "cache")
    _make(cache)
    def sequences(path):
        tokens = data.tokenise(path, source.tokenizer, config.vocab_size, cache, say)
        return data.Sequences(tokens, length, o.long_documents, path)
    corpus = sequences(o.data)
    held_out = list(range(len(corpus) - int(len(corpus) * o.eval_fraction), len(corpus))) if o.eval_fraction else []
    kept = len(corpus) - len(held_out)
    if not kept:
        raise UserError(f"{o.data}: {len(corpus)} sequences leave nothing to train on")
    evaluation = [corpus.get(i) for i in held_out]
    if o.eval_data:
        other = sequences(o.eval_data)
        evaluation = [other.get(i) for i in range(len(other))]
    each = o.per_device_train_batch_size * o.gradient_accumulation_steps
    steps = o.max_steps if o.max_steps > 0 else max(1, math.ceil(o.num_train_epochs * kept / each))
    warmup = int(o.warmup_steps) if o.warmup_steps >= 1 else int(math.ceil(o.warmup_steps * steps))

    model = Model(config, dtype=o.dtype, lora=lora, attention=attention, plan=plan, seed=o.seed)
    if source.base is not None:
        model.load(source.base)
    else:
        model.init_random(o.seed)
    optimizer = AdamW(model.parameters, beta1=o.adam_beta1, beta2=o.adam_beta2, eps=o.adam_epsilon, weight_decay=o.weight_decay,
                      max_grad_norm=o.max_grad_norm)
    order, step, history = data.Order(kept, o.seed), 0, []
    if resumed is not None:
        state, tensors = checkpoint.load(resumed)
        _same_run(state["options"], o, resumed)
        optimizer.load_state_dict(tensors, state["global_step"])
        model.refresh()
        step, order.position, history = state["global_step"], state["position"], state["log_history"]

    def write_model(directory):
        if lora is not None:
            adapter.save(directory, model.tensors(), lora, source.base, raw, source.tokenizer)
        else:
            found = model.tensors()
            dtype = source.dtype or {name: source.base.dtype(name) for name in source.base.names()}
            adapter.save_merged(directory, found.__getitem__, raw, source.tokenizer, dtype)

    def save():
        state = {"global_step": step, "position": order.position, "log_history": history, "options": o.to_dict(),
                 "max_steps": steps}
        return checkpoint.save(o.output_dir, step, state, optimizer.state_dict(), write_model, o.save_total_limit)

    write_json(os.path.join(o.output_dir, "options.json"), o.to_dict())
    write_text(os.path.join(o.output_dir, METRICS), "".join(json.dumps(m) + "\n" for m in history))
    for line in describe(o, config, model, attention, rope_sentence, plan, corpus, len(evaluation), steps, each, length):
        say(line)
    if resumed:
        say(f"resumed from {resumed}, step {step}")

    def evaluate():
        tokens = total = 0
        for ids in evaluation:
            count, loss = ppl.score(model, ids, length)
            tokens, total = tokens + count, total + loss
        return total / tokens

    def log(entry):
        history.append(entry)
        with open(os.path.join(o.output_dir, METRICS), "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    from tqdm import tqdm
    eval_loss = None
    with Stop() as stop, tqdm(total=steps, initial=step, desc="training", unit="step", disable=None) as bar:
        while step < steps and stop.signal is None:
            started, before = time.perf_counter(), _sizes(model) if step < 2 else None
            micro = [data.batch(corpus, order.take(o.per_device_train_batch_size), length)
                     for _ in range(o.gradient_accumulation_steps)]
            count = sum(int((targets != -100).sum()) for _, targets in micro)
            model.zero_grad()
            loss = sum(model.train_microbatch(ids, targets, loss_scale=1 / count) for ids, targets in micro) / count
            if not math.isfinite(loss):
                raise UserError(f"step {step + 1}: the loss is {loss}; nothing was saved of this step"
                                + ("; lower the learning rate" if step else "; the base model gives no finite loss on this data"))
            rate = learning_rate(step + 1, steps, o.learning_rate, warmup, o.lr_scheduler_type)
            other = learning_rate(step + 1, steps, o.embedding_learning_rate, warmup, o.lr_scheduler_type)
            norm = optimizer.step({kind: other if not o.full and kind in ("embedding", "norm", "head") else rate
                                   for kind in model.kinds})
            if not math.isfinite(norm):
                raise UserError(f"step {step + 1}: the norm of the gradient is {norm}; nothing was saved of this step")
            step += 1
            if before is not None:
                _moved(before, _sizes(model), step, o)
            speed = count / (time.perf_counter() - started)
            bar.update(1)
            bar.set_postfix(loss=f"{loss:.4f}", tokens_per_s=f"{speed:.0f}")
            entry = {"step": step, "loss": loss, "learning_rate": rate, "grad_norm": norm, "tokens_per_s": round(speed, 1),
                     "peak_memory": peak_memory(), "num_input_tokens_seen": step * each * length, "epoch": order.position / kept}
            if evaluation and (step == steps or (o.eval_steps and step % o.eval_steps == 0)):
                eval_loss = entry["eval_loss"] = evaluate()
            if step % o.logging_steps == 0 or step == steps or "eval_loss" in entry:
                log(entry)
                if bar.disable:
                    say(f"step {step}/{steps}  loss {loss:.4f}  lr {rate:.3g}  grad norm {norm:.3f}  {speed:.0f} tokens/s"
                        + (f"  held-out perplexity {math.exp(entry['eval_loss']):.3f}" if "eval_loss" in entry else ""))
            if step < steps and stop.signal is None and o.save_steps and step % o.save_steps == 0:
                save()
        saved = save()
    plots.loss(os.path.join(o.output_dir, "loss.png"), history)
    if stop.signal is not None and step < steps:
        say(f"stopped by signal {stop.signal} after step {step}; go on with --resume-from-checkpoint {saved}")
    else:
        write_model(o.output_dir)
        say(f"saved {o.output_dir}" + (f"; held-out perplexity {math.exp(eval_loss):.3f}, dense attention" if eval_loss else ""))
    return Result(output_dir=o.output_dir, step=step, loss=history[-1]["loss"] if history else None, eval_loss=eval_loss,
                  stopped=stop.signal if step < steps else None, history=history)


def describe(o, config, model, attention, rope_sentence, plan, corpus, evaluation, steps, each, length):
    """What the run will do, line by line."""
    H = config.num_attention_heads
    if attention is None:
        yield f"attention: dense causal, {H} heads"
    else:
        shifted = {"half": H - H // 2, "none": 0, "all": H}[attention["shift"]]
        yield (f"attention: S2 {attention['boundary']}, group {attention['group_size']} tokens, {shifted}/{H} heads shifted by "
               f"{attention['group_size'] // 2}; evaluation is dense")
    counts = {}
    for p in model.parameters:
        counts[p.kind] = counts.get(p.kind, 0) + int(np.prod(p.value.shape))
    yield "trainable: " + ", ".join(f"{kind} {n:,}" for kind, n in counts.items()) + f"; total {sum(counts.values()):,}"
    yield rope_sentence
    yield f"data: {corpus.sentence}" + (f"; {evaluation} sequences held out" if evaluation else "")
    yield f"steps: {steps} of {each} x {length} = {each * length:,} tokens; learning rate {o.learning_rate:g}, {o.lr_scheduler_type}"
    yield f"memory: {plan.total / 2**30:.2f} GiB planned, checkpointing {plan.checkpointing}, {o.dtype}"


def _make(directory):
    try:
        os.makedirs(directory, exist_ok=True)
    except OSError as error:
        raise UserError(f"{directory}: cannot be made: {error.strerror}") from None


def _same_run(before, o, where):
    """A resumed run must be the run that was stopped: only what does not change its arithmetic may differ."""
    free = {"resume_from_checkpoint", "output_dir", "num_threads", "cache_dir", "save_steps", "save_total_limit", "logging_steps",
            "checkpointing", "model", "init", "data", "eval_data"}
    for name, value in o.to_dict().items():
        old = before.get(name)
        if name not in free and (list(old) if isinstance(old, (list, tuple)) else old) != (
                list(value) if isinstance(value, tuple) else value):
            raise UserError(f"{where}: was trained with {name} {old!r}, got {value!r}")


def _sizes(model):
    """Per parameter the sum of squares of its values: equal bits, equal sums."""
    from . import _C
    out = {}
    for p in model.parameters:
        total = np.zeros(1)
        _C.sum_squares(total, p.value.reshape((int(np.prod(p.value.shape)),)))
        out.setdefault(p.kind, []).append(total[0])
    return out


def _moved(before, after, step, o):
    """Stops when a kind of parameter did not move. LoRA's A has no gradient while B is zero, so it is asked at step 2."""
    for kind in after:
        if before[kind] == after[kind] and not (kind == "lora_A" and step == 1):
            if step == 2 and kind != "lora_A":
                continue
            rate = o.embedding_learning_rate if kind in ("embedding", "norm", "head") and not o.full else o.learning_rate
            if rate == 0:
                continue
            raise UserError(f"step {step}: no {kind} parameter has moved; this would train nothing of that kind")
