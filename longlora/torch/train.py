"""`python -m longlora.torch.train`: the run of `longlora train` on transformers.Trainer, for torchrun and accelerate to launch.

Options, tokens and their order, schedule, metrics, adapter and checkpoints are the driver's own: a run stopped in one goes on
in the other, and on another number of processes. Trainer makes the steps: DDP by torchrun or `accelerate launch`, FSDP2 and
DeepSpeed ZeRO as accelerate's own configuration says. Rank 0 writes; all processes have to see output_dir and cache_dir.
"""

import contextlib
import math
import os
import signal
import sys
import time
from dataclasses import replace

import numpy as np
import peft
import torch
import transformers
from accelerate.utils import DistributedType, broadcast_object_list
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from longlora import _C, __version__, cli
from longlora.data import sequences as data
from longlora.decoder.model import Model
from longlora.decoder.network import Network
from longlora.errors import UserError
from longlora.evaluation import ppl
from longlora.files import adapter
from longlora.torch.attention import NAME, configure
from longlora.torch.extend import ExtendedModel, extend
from longlora.training import driver, metrics
from longlora.training import options as options_
from longlora.training import resume as checkpoint
from longlora.training.optimizer import NO_DECAY

MOMENTS = {"m": "exp_avg", "v": "exp_avg_sq"}
PRECISION = "ACCELERATE_MIXED_PRECISION"


def train(say=print, **keywords):
    """Train as the keywords say (the fields of options.TrainOptions) -> longlora.training.driver.Result. `say` is given the report.

    As longlora.training.driver.train, in every process of a group that torchrun or accelerate launched, or in one. UserError for what
    cannot be done, which is also what the options init, full, max_memory, profile, device cuda and checkpointing minimal are here.
    """
    return run(options_.from_dict(keywords), say)


def run(o, say=print):
    """As `train`, with checked options."""
    for name, given, why in (
        ("init", o.init, "a pretrained model is extended"),
        ("full", o.full, "LoRA, embedding and norms are trained"),
        ("max_memory", o.max_memory, "the memory of torch is not planned"),
        ("profile", o.profile, "torch.profiler tells"),
        (
            f"device {o.device}",
            o.device not in ("auto", "cpu"),
            "wanted auto or cpu; CUDA_VISIBLE_DEVICES chooses",
        ),
        ("checkpointing minimal", o.checkpointing == "minimal", "wanted none (auto is none) or full"),
    ):
        if given:
            raise UserError(f"{name} is not available with torch: {why}")
    driver.use_threads(o)
    if o.num_threads:
        torch.set_num_threads(o.num_threads)
    source = driver.Source(o)
    setup = driver.Setup(o, source.config)
    given = PRECISION in os.environ
    args = arguments(o)
    if args.n_gpu > 1:
        raise UserError(
            f"one process sees {args.n_gpu} GPUs; start one for each (torchrun --nproc-per-node {args.n_gpu} -m "
            "longlora.torch.train ...) or show it one (CUDA_VISIBLE_DEVICES=0)"
        )
    if args.process_index:
        say = lambda sentence: None
    with contextlib.ExitStack() as held:
        if not given:  # transformers 4 leaves this run's to the next one
            held.callback(os.environ.pop, PRECISION, None)

        def prepare():
            driver.refuse_taken(o)
            held.enter_context(checkpoint.alone(o.output_dir))
            checkpoint.sweep(o.output_dir)
            driver.read_data(o, source, setup, say)  # the other processes find it in the cache

        once(args, prepare)
        return Run(o, source, setup, args, say).run()


def arguments(o):
    """The options as TrainingArguments, all but the number of steps; making them is what joins the group of processes."""
    checkpointing = next(
        name
        for name in ("activation_checkpointing", "gradient_checkpointing")
        if name in TrainingArguments.__dataclass_fields__
    )
    return TrainingArguments(
        output_dir=o.output_dir,
        per_device_train_batch_size=o.per_device_train_batch_size,
        gradient_accumulation_steps=o.gradient_accumulation_steps,
        max_steps=1,
        max_grad_norm=o.max_grad_norm or math.inf,
        learning_rate=o.learning_rate,
        weight_decay=o.weight_decay,
        adam_beta1=o.adam_beta1,
        adam_beta2=o.adam_beta2,
        adam_epsilon=o.adam_epsilon,
        lr_scheduler_type="constant",
        bf16=o.dtype == "bfloat16",
        seed=o.seed,
        logging_strategy="steps",
        logging_steps=1,
        save_strategy="no",
        eval_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        average_tokens_across_devices=True,
        ddp_find_unused_parameters=False,
        use_cpu=o.device == "cpu" or not torch.cuda.is_available(),
        dataloader_pin_memory=o.device != "cpu" and torch.cuda.is_available(),
        **(
            {checkpointing: True, f"{checkpointing}_kwargs": {"use_reentrant": False}}
            if o.checkpointing == "full"
            else {}
        ),
    )


def once(args, function):
    """function() on rank 0, while the others wait; a UserError there is everyone's."""
    said = [None]
    if args.process_index == 0:
        try:
            function()
        except UserError as error:
            said = [str(error)]
    if args.world_size > 1:
        broadcast_object_list(said)
    if said[0] is not None:
        raise UserError(said[0])


def build(o, setup, saved=None):
    """The base model at o.model with rope, S2-Attn and LoRA as the options say -> PeftModel.

    What is trained starts as in the driver, or as a checkpoint's tensors, `saved`, have it.
    """
    version, path, how = tuple(int(part) for part in transformers.__version__.split(".")[:2]), o.model, {}
    if os.path.isfile(path):
        path, how["gguf_file"] = os.path.split(os.path.abspath(path))
        if hasattr(
            transformers, "GgufConfig"
        ):  # else it may stay packed, and Trainer takes it for that in any case
            how["quantization_config"] = transformers.GgufConfig(dequantize=True)
    how["dtype" if version >= (4, 56) else "torch_dtype"] = getattr(torch, o.dtype)
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation=NAME, **how)
    # A head that is tied to the embedding is the embedding.
    tied, whole = setup.config.tie_word_embeddings, list(setup.lora.modules_to_save)
    whole = ["embed_tokens" if tied and name == "lm_head" else name for name in whole]
    tie = {"ensure_weight_tying": True} if tied and "embed_tokens" in whole else {}
    lora = peft.LoraConfig(
        r=setup.lora.r,
        lora_alpha=setup.lora.lora_alpha,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
        target_modules=list(setup.lora.target_modules),
        modules_to_save=whole or None,
        **tie,
    )
    # Dense attention is one group without a shift: the same kernel.
    attention = setup.attention or {"group_size": o.sequence_length, "boundary": "split", "shift": "none"}
    if o.target_length is not None:
        model = extend(model, o.target_length, rope=o.rope_type, lora=lora, **attention)
    else:
        model = ExtendedModel(configure(model, **attention), lora)
    shapes = setup.lora.tensor_shapes(setup.config)
    for name, parameter in named(model, setup):
        parameter.data = (
            parameter.data.float()
        )  # masters, as the driver's; under bfloat16 autocast does the rest
        if saved is not None:
            put(parameter, saved[f"value.{name}"])
        elif name.endswith("lora_A.weight"):
            start = _C.Tensor(shapes[name], "float32")
            Model.draw(name, o.seed, start, 1 / math.sqrt(shapes[name][1]))
            put(parameter, start.numpy())
    return model


def put(parameter, array):
    """array into a parameter that no engine has yet, but that ZeRO-3 may have parted as it was read."""
    whole = contextlib.nullcontext()
    if hasattr(parameter, "ds_id"):
        from deepspeed.zero import GatheredParameters

        whole = GatheredParameters([parameter], modifier_rank=0)
    with whole:
        parameter.data.copy_(torch.from_numpy(np.array(array)))


def named(model, setup):
    """What is trained, by the driver's names, in the order of the layers: [(name, Parameter)]. UserError if it is not that."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            for part in ("_checkpoint_wrapped_module.", ".modules_to_save.default", ".default"):
                name = name.replace(part, "")
            found[name.removeprefix(adapter.PREFIX)] = parameter
    wanted = setup.lora.tensor_shapes(setup.config)
    if set(found) != set(wanted):
        raise UserError(
            f"the model of transformers trains other tensors: {sorted(set(found) ^ set(wanted))[0]}"
        )
    return [(name, found[name]) for name in wanted]


class Trained:
    """One trained tensor, as driver.Moved and driver.describe want it: whole and float32, wherever the engine keeps its parts.

    All processes have to read and to write it in the same order.
    """

    def __init__(self, name, kind, shape):
        self.name, self.kind, self.shape = name, kind, tuple(shape)

    def bind(self, parameter, trainer):
        """Where it is, once the engine has put it there."""
        self._parameter, self._trainer = parameter, trainer

    @torch.no_grad()
    def read(self, what):
        """what: value, m or v -> float32 tensor on the CPU."""
        p = self._parameter
        if self._trainer.is_deepspeed_enabled:
            from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

            found = (
                safe_get_full_fp32_param(p)
                if what == "value"
                else safe_get_full_optimizer_state(p, MOMENTS[what])
            )
        else:
            found = p.detach() if what == "value" else self._trainer.optimizer.state[p][MOMENTS[what]]
            found = found.full_tensor() if isinstance(found, DTensor) else found
        return found.reshape(self.shape).to("cpu", torch.float32)

    @torch.no_grad()
    def restore(self, value, m, v, step):
        """The optimizer's part, float32 ndarrays, as it was after `step` steps; the parameter itself has `value` already."""
        p, arrays = self._parameter, {"value": value, "m": m, "v": v}
        tensors = {what: torch.from_numpy(np.array(array)).to(p.device) for what, array in arrays.items()}
        if self._trainer.is_deepspeed_enabled:
            from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

            safe_set_full_fp32_param(p, tensors["value"])
            for what, name in MOMENTS.items():
                safe_set_full_optimizer_state(p, tensors[what], name)
            return
        if isinstance(p, DTensor):
            where = dict(device_mesh=p.device_mesh, placements=p.placements, src_data_rank=None)
            tensors = {what: distribute_tensor(x, **where) for what, x in tensors.items()}
        moments = {name: tensors[what] for what, name in MOMENTS.items()}
        self._trainer.optimizer.state[p] = {"step": torch.tensor(float(step)), **moments}

    @property
    def value(self):
        return self.read("value").numpy()

    @property
    def grad(self):
        """Zero where the gradients so far were: the optimizer's mean of them, for they are gone themselves."""
        return self.read("m").numpy()


def made_steps(zero, step):
    """Gives DeepSpeed's ZeRO optimizer, stage 1 to 3, the state that it would else make in its first step.

    Stages 1 and 2 would then find the moments of the first group of parameters only (seen with DeepSpeed 0.19).
    """
    flat = getattr(zero, "single_partition_of_fp32_groups", None) or zero.fp32_partitioned_groups_flat
    for x in flat:
        moments = {name: torch.zeros_like(x) for name in MOMENTS.values()}
        zero.optimizer.state[x] = {"step": torch.tensor(float(step)), **moments}
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._lazy_init_hp_params_optimizer_state()


class Places(torch.utils.data.Dataset):
    """The sequences of a run's steps, by number, in the driver's order: Trainer sees one epoch that ends with the run."""

    def __init__(self, corpus, seed, first, count):
        order = data.Order(len(corpus), seed, first)
        self.places = order.take(count)

    def __len__(self):
        return len(self.places)

    def __getitem__(self, i):
        return self.places[i]


def batch(sequences, indices, multiple):
    """As data.batch, in the words of transformers, whose losses shift the labels themselves: the first is no one's target."""
    ids, targets = data.batch(sequences, indices, multiple)
    labels = np.full_like(targets, -100)
    labels[:, 1:] = targets[:, :-1]
    return {"input_ids": torch.from_numpy(ids).long(), "labels": torch.from_numpy(labels).long()}


class Steps(Trainer):
    """Trainer with the driver's batches, learning rates and schedule. `loss` sums this process's since it was set to 0.

    share(i): of the peak rates, after i steps; trained(model) -> [(kind, Parameter)].
    """

    def __init__(self, o, share, trained, **how):
        self.o, self.share, self.trained, self.loss = o, share, trained, 0.0
        super().__init__(**how)

    def get_train_dataloader(self):
        return self.accelerator.prepare(
            torch.utils.data.DataLoader(
                self.train_dataset,
                batch_size=self.o.per_device_train_batch_size,
                collate_fn=self.data_collator,
                pin_memory=self.args.dataloader_pin_memory,
            )
        )

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            groups = {}
            for kind, parameter in self.trained(model or self.model):
                rate = self.o.embedding_learning_rate if kind in driver.WHOLE else self.o.learning_rate
                groups.setdefault((rate, 0.0 if kind in NO_DECAY else self.o.weight_decay), []).append(
                    parameter
                )
            self.optimizer = torch.optim.AdamW(
                [
                    {"params": parameters, "lr": rate, "weight_decay": decay}
                    for (rate, decay), parameters in groups.items()
                ],
                betas=(self.o.adam_beta1, self.o.adam_beta2),
                eps=self.o.adam_epsilon,
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, self.share)
        return self.lr_scheduler

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.loss += loss
        return loss


class Callback(TrainerCallback):
    """Calls the run when Trainer has prepared everything, and after each step."""

    def __init__(self, run):
        self.run = run

    def on_train_begin(self, args, state, control, **unused):
        self.run.begin()

    def on_log(self, args, state, control, logs=None, **unused):
        if "loss" in logs:
            control.should_training_stop = (
                self.run.after_step(float(logs["grad_norm"])) or control.should_training_stop
            )


class Run:
    """What driver._run does, around Trainer."""

    def __init__(self, o, source, setup, args, say):
        self.o, self.source, self.setup, self.args, self.say = o, source, setup, args, say
        self.resumed = (
            checkpoint.resolve(o.resume_from_checkpoint, o.output_dir) if o.resume_from_checkpoint else None
        )
        self.corpus, self.held_out, fingerprint = driver.read_data(o, source, setup, say)
        self.each = o.per_device_train_batch_size * o.gradient_accumulation_steps * args.world_size
        self.steps = (
            o.max_steps
            if o.max_steps > 0
            else max(1, math.ceil(o.num_train_epochs * len(self.corpus) / self.each))
        )
        self.warmup = int(o.warmup_steps) if o.warmup_steps >= 1 else math.ceil(o.warmup_steps * self.steps)
        schedule = [self.warmup, self.steps if o.lr_scheduler_type != "constant" else None]
        self.identity = {"data": fingerprint, "base": source.fingerprint, "schedule": schedule}
        # A checkpoint is that of one process that makes the same steps.
        self.alone = replace(o, gradient_accumulation_steps=o.gradient_accumulation_steps * args.world_size)
        self.step, self.tensors, rows = 0, None, []
        if self.resumed is not None:
            state, self.tensors = checkpoint.load(self.resumed)
            driver.same_run(state, self.identity, self.alone, self.resumed)
            self.step, rows = state["global_step"], state["log_history"]
            if self.step > self.steps:
                raise UserError(
                    f"{self.resumed}: has made {self.step} steps, which is more than the {self.steps} of max_steps"
                )
            if state["position"] != self.step * self.each:
                raise UserError(
                    f"{self.resumed}: stands at sequence {state['position']}, {self.step} steps make "
                    f"{self.step * self.each}"
                )
        self.first, self.rows, self.stopped = self.step, rows, None
        self.evaluated = (
            0 if self.held_out is None else min(len(self.held_out), o.max_eval_samples or len(self.held_out))
        )

    def share(self, made):
        """The share of the peak learning rates of the step that follows `made` steps of this run since it began."""
        return driver.learning_rate(
            self.first + made + 1, self.steps, 1.0, self.warmup, self.o.lr_scheduler_type
        )

    def run(self):
        from tqdm import tqdm

        o, args = self.o, self.args
        left = self.steps - self.step
        kinds = {
            name: w.kind for w in Network(self.setup.config, self.setup.lora).weights() for name in w.members
        }
        shapes = self.setup.lora.tensor_shapes(self.setup.config)
        self.trained = [Trained(name, kinds[name], shape) for name, shape in shapes.items()]
        if left:
            args.max_steps = left
            self.trainer = Steps(
                o,
                self.share,
                lambda model: [(kinds[name], parameter) for name, parameter in named(model, self.setup)],
                model=build(o, self.setup, self.tensors),
                args=args,
                callbacks=[Callback(self)],
                train_dataset=Places(self.corpus, o.seed, self.step * self.each, left * self.each),
                data_collator=lambda places: batch(self.corpus, places, self.setup.multiple),
            )
            self.trainer.remove_callback(transformers.PrinterCallback)
            self._check_engine()
            if o.dtype == "bfloat16" and self.trainer.is_fsdp_enabled:  # the loss is float32, and so it stays
                sharding = self.trainer.accelerator.state.fsdp_plugin
                sharding.mixed_precision_policy = replace(sharding.mixed_precision_policy, output_dtype=None)
        if args.process_index == 0:
            driver.write_options(o)
            self.log = metrics.Log(o.output_dir, self.rows)
            self.rows = self.log.rows
        for sentence in driver.describe(
            o,
            self.setup,
            self.trained,
            self.corpus,
            self.evaluated,
            self.steps,
            self.warmup,
            None if args.world_size == 1 else args.world_size,
        ):
            self.say(sentence)
        if o.resume_from_checkpoint:
            self.say(
                f"resuming: {self.resumed}, after step {self.step}"
                if self.resumed
                else "resuming: no checkpoint yet, from the start"
            )
        saved = self.resumed
        with (
            driver.Stop() as self.stop,
            tqdm(
                total=self.steps,
                initial=self.step,
                desc="training",
                unit="step",
                disable=True if args.process_index else None,
            ) as self.bar,
        ):
            if left:
                self.trainer.train()
                saved = self.save()
        once(args, lambda: driver.draw(o, self.rows))
        stopped = self.stopped if self.step < self.steps else None
        if stopped:
            self.say(
                f"stopped by {signal.Signals(stopped).name} after step {self.step}; go on with "
                f"--resume-from-checkpoint {saved}"
            )
        else:
            tensors = (
                self._gather("value")["value"]
                if left
                else {name: self.tensors[f"value.{name}"] for name in shapes}
            )
            once(args, lambda: self._write_model(o.output_dir, tensors))
            self.say(driver.last_line(o, self.rows))
        last = {key: value for row in self.rows for key, value in row.items()}
        return driver.Result(
            output_dir=o.output_dir,
            step=self.step,
            loss=last.get("loss"),
            eval_loss=last.get("eval_loss"),
            stopped=stopped,
            history=self.rows,
        )

    def _check_engine(self):
        """Stop where accelerate was told something that it does not do here, or that this run would not do right."""
        accelerator = self.trainer.accelerator
        kind, precision = accelerator.distributed_type, accelerator.mixed_precision
        if precision != ("bf16" if self.o.dtype == "bfloat16" else "no"):
            raise UserError(
                f"accelerate's mixed_precision is {precision}, dtype is {self.o.dtype}; wanted bf16 with bfloat16, "
                "no with float32"
            )
        for name in ("FSDP", "DEEPSPEED"):
            if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("1", "true") and kind != name:
                raise UserError(
                    f"accelerate's configuration asks for {name}, but here accelerate does not do it (one process, "
                    f"or {self.args.device.type})"
                )
        if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
            raise UserError(
                "accelerate's fsdp_version is 1; wanted 2 (accelerate to-fsdp2 converts the configuration)"
            )
        if (
            kind == DistributedType.MEGATRON_LM
            or getattr(accelerator, "parallelism_config", None) is not None
        ):
            raise UserError(
                "accelerate's configuration splits layers or sequences; wanted DDP, FSDP2 or DeepSpeed ZeRO"
            )
        if kind == DistributedType.DEEPSPEED:
            for name in ("optimizer", "scheduler"):
                if name in accelerator.state.deepspeed_plugin.deepspeed_config:
                    raise UserError(
                        f"the DeepSpeed configuration has {name!r}; here the options of the run say that"
                    )

    def begin(self):
        """Everything is where the engine wants it: what was saved is put back, and nothing has moved yet."""
        parameters = dict(named(self.trainer.model, self.setup))
        for p in self.trained:
            p.bind(parameters[p.name], self.trainer)
        if self.trainer.is_deepspeed_enabled:
            made_steps(self.trainer.model_wrapped.optimizer, self.step)
        if self.tensors is not None:
            for p in self.trained:
                p.restore(*(self.tensors[f"{what}.{p.name}"] for what in ("value", "m", "v")), self.step)
        self.trainer.loss, self.heldout = 0.0, ""
        if self.evaluated and self.step == 0:
            loss = self._evaluate()
            self._add(step=0, eval_loss=loss, eval_perplexity=ppl.perplexity(loss))
            self.say(f"before: held-out perplexity {ppl.perplexity(loss):.3f}, dense attention")
        self.moved, self.began = driver.Moved(self.trained), time.perf_counter()
        self.started = self.began

    def after_step(self, norm):
        """What the driver does after a step -> whether it was the last one."""
        o, args, trainer = self.o, self.args, self.trainer
        self.step += 1
        mine = torch.stack(
            [trainer.loss.float(), torch.tensor(float(self.stop.signal or 0), device=args.device)]
        )
        everyone = trainer.accelerator.gather(mine[None])
        loss, self.stopped = everyone[:, 0].double().mean().item(), int(everyone[:, 1].max()) or None
        trainer.loss = 0.0
        with driver.step_named(self.step, checkpoint.found(o.output_dir)):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise UserError(
                    "the loss is not finite" if not math.isfinite(loss) else "the gradient is not finite"
                )
        share = self.share(self.step - self.first - 1)
        if self.moved.waiting:
            self.moved.check(self.step, share < 0.5)
        now = time.perf_counter()
        places = trainer.train_dataset.places[(self.step - self.first - 1) * self.each :][: self.each]
        tokens = (
            sum(last - first for place in places for first, last in self.corpus.pieces[place]) - self.each
        )
        speed, self.started = tokens / (now - self.started), now
        row = {
            "step": self.step,
            "loss": loss,
            "grad_norm": norm,
            "tokens_per_s": round(speed, 1),
            "learning_rate": o.learning_rate * share,
            "embedding_learning_rate": o.embedding_learning_rate * share,
            "epoch": self.step * self.each / len(self.corpus),
            "num_input_tokens_seen": self.step * self.each * o.sequence_length,
        }
        if self.evaluated and (self.step == self.steps or o.eval_steps and self.step % o.eval_steps == 0):
            row["eval_loss"] = self._evaluate()
            row["eval_perplexity"] = ppl.perplexity(row["eval_loss"])
            self.heldout = f", held-out perplexity {row['eval_perplexity']:.3f}"
        row["peak_memory"] = (
            torch.cuda.max_memory_allocated() if args.device.type == "cuda" else metrics.peak_memory()
        )
        self.bar.update(1)
        self.bar.set_postfix_str(f"loss {loss:.4f}, {speed:,.0f} tokens/s{self.heldout}")
        if self.step % o.logging_steps == 0 or self.step == self.steps or "eval_loss" in row:
            self._add(**row)
            if self.bar.disable:
                left = (now - self.began) / (self.step - self.first) * (self.steps - self.step)
                self.say(driver.line(row, self.steps, left))
        if o.save_steps and self.step % o.save_steps == 0 and self.step < self.steps and not self.stopped:
            self.save()
        return self.stopped is not None

    def _add(self, **row):
        if self.args.process_index == 0:
            self.log.add(**row)
        else:
            self.rows.append(row)

    @torch.no_grad()
    def _evaluate(self):
        """Mean loss of the held-out sequences, dense attention. Every process makes as many passes: sharded, they have to."""
        model, args = self.trainer.model, self.args
        training, total = model.training, torch.zeros(2, dtype=torch.float64, device=args.device)
        model.eval()
        for start in range(0, self.evaluated, args.world_size):
            i = start + args.process_index
            inputs = batch(self.held_out, [min(i, self.evaluated - 1)], self.setup.multiple)
            inputs = {name: x.to(args.device) for name, x in inputs.items()}
            loss = model(**inputs, num_items_in_batch=1).loss
            if i < self.evaluated:
                total += torch.stack([loss.double(), (inputs["labels"] != -100).sum().double()])
        model.train(training)
        loss, tokens = self.trainer.accelerator.gather(total[None]).sum(0).tolist()
        return loss / tokens

    def _gather(self, *whats):
        """-> dict of dicts, what -> name -> float32 ndarray, on rank 0; empty on the others, which help."""
        found = {what: {} for what in whats}
        for p in self.trained:
            for what in whats:
                array = p.read(what).numpy()
                if self.args.process_index == 0:
                    found[what][p.name] = array
        return found

    def _write_model(self, directory, tensors):
        adapter.save(
            directory, tensors, self.setup.lora, self.source.base, self.setup.raw, self.source.tokenizer
        )

    def save(self):
        """Writes checkpoint-N, the driver's -> its path."""
        found = self._gather("value", *MOMENTS)
        optimizer = {f"{what}.{name}": array for what in found for name, array in found[what].items()}
        state = {
            "global_step": self.step,
            "max_steps": self.steps,
            "epoch": self.step * self.each / len(self.corpus),
            "position": self.step * self.each,
            "seed": self.o.seed,
            **self.identity,
            "options": self.alone.to_dict(),
            "log_history": self.rows,
            "version": __version__,
        }
        once(
            self.args,
            lambda: checkpoint.save(
                self.o.output_dir,
                state,
                optimizer,
                lambda directory: self._write_model(directory, found["value"]),
                self.o.save_total_limit,
            ),
        )
        return os.path.join(self.o.output_dir, f"checkpoint-{self.step}")


def main(argv=None):
    parser = cli.Parser(
        prog="python -m longlora.torch.train",
        allow_abbrev=False,
        description="extend a model by longlora's kernels in torch; start it by torchrun or accelerate launch",
    )
    options_.add_flags(parser)
    try:
        result = run(
            options_.from_flags(parser.parse_args(options_.dashed(sys.argv[1:] if argv is None else argv)))
        )
    except UserError as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"longlora: error: {error}", file=sys.stderr)
        else:
            time.sleep(2)  # the first to end is the end of all: rank 0 shall have said why
        return 2
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0 if result.stopped is None else 128 + result.stopped


def leave(code):
    """Ends the process. In a group at once: gloo's threads let go of their tensors late, and while the interpreter ends, that
    aborts it (seen with torch 2.13)."""
    sys.stdout.flush()
    sys.stderr.flush()
    if "RANK" in os.environ:
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    leave(main())
