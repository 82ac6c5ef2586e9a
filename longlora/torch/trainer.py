"""The Engine of a run (longlora.training.run) on transformers.Trainer: the model, the batches, and the
tensors wherever DDP, FSDP2 or DeepSpeed ZeRO keep their parts."""

import contextlib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import peft
import torch
import transformers
from accelerate.utils import DistributedType
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from longlora import _C, job
from longlora.data import sequences
from longlora.decoder.model import Model
from longlora.decoder.network import Network
from longlora.errors import UserError
from longlora.files import adapter
from longlora.ops import IGNORE
from longlora.torch.attention import NAME, configure
from longlora.torch.extend import ExtendedModel, extend, opened, positions
from longlora.torch.moved import MOMENTS, Trained
from longlora.torch.swap import swap
from longlora.training.inputs import Setup
from longlora.training.optimizer import decay_of
from longlora.training.options import TrainOptions
from longlora.training.run import Result, Run, peak_rate

# ---- the model -----------------------------------------------------------------------------------


def build(o: TrainOptions, setup: Setup, start: Mapping[str, np.ndarray] | None = None) -> peft.PeftModel:
    """The base model at o.model with rope, S2-Attn and LoRA as the options say.

    The trained tensors start as in the driver, or from `start`, arrays by the driver's names.
    """
    assert o.model is not None and setup.lora is not None
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    path, how = opened(o.model)
    how["dtype" if version >= (4, 56) else "torch_dtype"] = getattr(torch, o.dtype)
    extended = None if o.adapter is None else positions(o.adapter, path, how)
    if extended is not None:
        how["config"] = extended
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation=NAME, **how)
    # A head that is tied to the embedding is the embedding.
    tied, whole = setup.config.tie_word_embeddings, list(setup.lora.modules_to_save)
    whole = ["embed_tokens" if tied and name == "lm_head" else name for name in whole]
    tie = {"ensure_weight_tying": True} if tied and "embed_tokens" in whole else {}
    lora = peft.LoraConfig(
        r=setup.lora.r,
        lora_alpha=setup.lora.lora_alpha,
        lora_dropout=0.0,
        use_rslora=setup.lora.use_rslora,
        task_type="CAUSAL_LM",
        target_modules=list(setup.lora.target_modules),
        modules_to_save=whole or None,
        **tie,
    )
    # Dense attention is one group without a shift, in the same kernel.
    dense = {"group_size": o.sequence_length, "boundary": "split", "shift": "none"}
    attention: dict[str, Any] = setup.attention or dense
    if o.target_length is not None and extended is None:
        model = extend(model, o.target_length, rope=o.rope_type, lora=lora, **attention)
    else:
        model = ExtendedModel(configure(model, **attention), lora)
    shapes = setup.lora.tensor_shapes(setup.config)
    for name, parameter in named(model, setup):
        if start is not None:
            put(parameter, start[name])
        elif name.endswith("lora_A.weight"):
            drawn = _C.Tensor(shapes[name], "float32")
            Model.draw(name, o.seed, drawn, 1 / math.sqrt(shapes[name][1]))
            put(parameter, drawn.numpy())
    swap(model)  # without it the logits of a long sequence are the largest tensor of a step
    return model


def put(parameter: torch.nn.Parameter, array: np.ndarray) -> None:
    """Copy `array` into a parameter that no engine holds yet, but that ZeRO-3 may have partitioned."""
    whole: Any = contextlib.nullcontext()
    if hasattr(parameter, "ds_id"):
        from deepspeed.zero import GatheredParameters

        whole = GatheredParameters([parameter], modifier_rank=0)
    with whole:
        parameter.data.copy_(torch.from_numpy(np.array(array)))


def named(model: torch.nn.Module, setup: Setup) -> list[tuple[str, torch.nn.Parameter]]:
    """The trained parameters by the driver's names, in the order of the layers; UserError for others."""
    assert setup.lora is not None
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            for part in ("_checkpoint_wrapped_module.", ".modules_to_save.default", ".default"):
                name = name.replace(part, "")
            found[name.removeprefix(adapter.PREFIX)] = parameter
    wanted = setup.lora.tensor_shapes(setup.config)
    if set(found) != set(wanted):
        raise UserError(f"transformers' model trains other tensors: {sorted(set(found) ^ set(wanted))[0]}")
    return [(name, found[name]) for name in wanted]


def made_steps(zero: Any, step: int) -> None:
    """Give DeepSpeed's ZeRO optimizer (stage 1 to 3) the state that its first step would create.

    Without this, stages 1 and 2 find the moments of the first group of parameters only (seen with DeepSpeed
    0.19).
    """
    flat = getattr(zero, "single_partition_of_fp32_groups", None) or zero.fp32_partitioned_groups_flat
    for x in flat:
        moments = {name: torch.zeros_like(x) for name in MOMENTS.values()}
        zero.optimizer.state[x] = {"step": torch.tensor(float(step)), **moments}
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._lazy_init_hp_params_optimizer_state()


# ---- the steps -----------------------------------------------------------------------------------


class Places(torch.utils.data.Dataset):
    """The numbers of the sequences of all steps in the driver's order: for Trainer a run is one epoch."""

    def __init__(self, corpus: sequences.Sequences, seed: int, first: int, count: int):
        self.places = sequences.Order(len(corpus), seed, first).take(count)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int) -> int:
        return self.places[i]


def batch(corpus: sequences.Sequences, indices: list[int], multiple: int) -> dict[str, torch.Tensor]:
    """data.sequences.batch for transformers, whose losses shift the labels: the first is never scored."""
    ids, targets, boundaries = sequences.batch(corpus, indices, multiple)
    labels = np.full_like(targets, IGNORE)
    labels[:, 1:] = targets[:, :-1]
    arrays = {"input_ids": ids, "labels": labels}
    if boundaries is not None:
        positions = np.arange(ids.size) - np.repeat(boundaries[:-1], np.diff(boundaries))
        arrays["position_ids"] = positions.reshape(ids.shape)
    return {name: torch.from_numpy(array).long() for name, array in arrays.items()}


class Steps(Trainer):
    """Trainer with the batches, learning rates and schedule of `run`; `loss` sums the losses of a step."""

    def __init__(self, run: Run, kinds: dict[str, str], **how: Any):
        self.run, self.kinds = run, kinds
        self.loss: Any = 0.0
        self.optimizer: torch.optim.Optimizer | None = None
        super().__init__(**how)

    def get_train_dataloader(self):
        return self.accelerator.prepare(
            torch.utils.data.DataLoader(
                self.train_dataset,
                batch_size=self.run.o.per_device_train_batch_size,
                collate_fn=self.data_collator,
                pin_memory=self.args.dataloader_pin_memory,
            )
        )

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            o = self.run.o
            groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
            for name, parameter in named(model or self.model, self.run.setup):
                kind = self.kinds[name]
                groups.setdefault((peak_rate(o, kind), decay_of(kind, o.weight_decay)), []).append(parameter)
            self.optimizer = torch.optim.AdamW(
                [
                    {"params": parameters, "lr": rate, "weight_decay": decay}
                    for (rate, decay), parameters in groups.items()
                ],
                betas=(o.adam_beta1, o.adam_beta2),
                eps=o.adam_epsilon,
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        first = self.run.first + 1
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer, lambda made: self.run.share(first + made)
        )
        return self.lr_scheduler

    def training_step(self, *args, **kwargs):
        if self.is_deepspeed_enabled:  # its backward pass also updates the parameters
            self.run.consistent = False
        loss = super().training_step(*args, **kwargs)
        self.loss += loss
        return loss


class Callback(TrainerCallback):
    """Calls `begin` before the first step, `updates` before an update and `after_step` after each step.

    True from `after_step` ends the run.
    """

    def __init__(
        self, begin: Callable[[], None], updates: Callable[[], None], after_step: Callable[[float], bool]
    ):
        self.begin, self.updates, self.after_step = begin, updates, after_step

    def on_train_begin(self, args, state, control, **unused):
        self.begin()

    def on_pre_optimizer_step(self, args, state, control, **unused):
        self.updates()

    def on_log(self, args, state, control, logs=None, **unused):
        if "loss" in logs:
            stops = self.after_step(float(logs["grad_norm"]))
            control.should_training_stop = stops or control.should_training_stop


# ---- the engine ----------------------------------------------------------------------------------


class TorchEngine:
    """The Engine of a run (training.run.Engine): a model of transformers, and Trainer."""

    def __init__(self, run: Run, args: TrainingArguments):
        self.run, self.args, setup = run, args, run.setup
        assert setup.lora is not None
        self._signal: int | None = None
        kinds = {name: w.kind for w in Network(setup.config, setup.lora).weights() for name in w.members}
        shapes = setup.lora.tensor_shapes(setup.config)
        self.parameters = [Trained(name, kinds[name], shape) for name, shape in shapes.items()]
        left = run.steps - run.step
        self.trainer: Any = None
        if left:
            args.max_steps = left
            start, saved = run.source.adapter, run.tensors
            if saved is not None:
                start = {name: saved[f"value.{name}"] for name in shapes}
            self.trainer = Steps(
                run,
                kinds,
                model=build(run.o, setup, start),
                args=args,
                callbacks=[Callback(self._begin, self._updates, self._after_step)],
                train_dataset=Places(run.corpus, run.o.seed, run.position, left * run.each),
                data_collator=lambda places: batch(run.corpus, places, setup.multiple),
            )
            self.trainer.remove_callback(transformers.PrinterCallback)
            check_accelerator(self.trainer.accelerator, run.o.dtype, args.device.type)
            if run.o.dtype == "bfloat16" and self.trainer.is_fsdp_enabled:  # the loss is float32 and stays so
                sharding = self.trainer.accelerator.state.fsdp_plugin
                sharding.mixed_precision_policy = replace(sharding.mixed_precision_policy, output_dtype=None)
        run.source.adapter = None  # its memory is free again

    def train(self) -> Result:
        """Make the steps of the run and finish it."""
        self.run.start(self)
        with self.run.training():
            if self.trainer is not None:
                self.trainer.train()
        return self.run.finish()

    def _begin(self):
        """Every tensor is where the engine wants it: restore what was saved; nothing has moved yet."""
        run, parameters = self.run, dict(named(self.trainer.model, self.run.setup))
        for p in self.parameters:
            p.bind(parameters[p.name], self.trainer.optimizer, self.trainer.is_deepspeed_enabled)
        if self.trainer.is_deepspeed_enabled:
            made_steps(self.trainer.model_wrapped.optimizer, run.step)
        if run.tensors is not None:
            for p in self.parameters:
                p.restore(*(run.tensors[f"{what}.{p.name}"] for what in ("value", "m", "v")), run.step)
        self.trainer.loss = 0.0
        run.begin()

    def _updates(self):
        self.run.consistent = False  # until Run.after_step

    def _after_step(self, norm):
        """After a step -> whether it was the last one because of a signal, in any process."""
        run, trainer = self.run, self.trainer
        signal = torch.tensor(float(run.stop.signal or 0), device=self.args.device)
        everyone = trainer.accelerator.gather(torch.stack([trainer.loss.float(), signal])[None])
        loss, self._signal = everyone[:, 0].double().mean().item(), int(everyone[:, 1].max()) or None
        trainer.loss = 0.0
        with run.named():
            if not math.isfinite(loss):
                raise UserError("the loss is not finite")
            if not math.isfinite(norm):
                raise UserError("the gradient is not finite")
        places = trainer.train_dataset.places[(run.step - run.first) * run.each :][: run.each]
        run.after_step(loss, norm, sum(run.corpus.size(place) for place in places))
        return self._signal is not None

    @torch.no_grad()
    def evaluate(self) -> float:
        """As Engine.evaluate. Every process makes the same number of passes, which sharded models need."""
        run, model, args = self.run, self.trainer.model, self.args
        assert run.held_out is not None
        training, total = model.training, torch.zeros(2, dtype=torch.float64, device=args.device)
        model.eval()
        for start in range(0, run.evaluated, args.world_size):
            i = start + args.process_index
            inputs = batch(run.held_out, [min(i, run.evaluated - 1)], run.setup.multiple)
            inputs = {name: x.to(args.device) for name, x in inputs.items()}
            loss = model(**inputs, num_items_in_batch=1, skip_logits=True).loss
            if i < run.evaluated:
                total += torch.stack([loss.double(), (inputs["labels"] != IGNORE).sum().double()])
        model.train(training)
        loss, tokens = self.trainer.accelerator.gather(total[None]).sum(0).tolist()
        return loss / tokens

    def _gather(self, what):
        """value, m or v of every tensor: name -> float32 array on rank 0, nothing on the others."""
        found = {}
        for p in self.parameters:
            array = p.read(what).numpy()
            if self.args.process_index == 0:
                found[p.name] = array
        return found

    def values(self) -> dict[str, Any]:
        if self.trainer is None:  # the run has nothing left to do but to write its model
            assert self.run.tensors is not None
            return {p.name: self.run.tensors[f"value.{p.name}"] for p in self.parameters}
        return self._gather("value")

    def state(self) -> dict[str, Any]:
        return {
            f"{what}.{name}": array
            for what in ("value", *MOMENTS)
            for name, array in self._gather(what).items()
        }

    def signal(self) -> int | None:
        return self._signal

    def peak_memory(self) -> int:
        return torch.cuda.max_memory_allocated() if self.args.device.type == "cuda" else job.peak_memory()


def check_accelerator(accelerator: Any, dtype: str, device: str) -> None:
    """UserError if accelerate is configured for what it does not do here, or for what this run lacks."""
    kind, precision = accelerator.distributed_type, accelerator.mixed_precision
    if precision != ("bf16" if dtype == "bfloat16" else "no"):
        raise UserError(
            f"accelerate's mixed_precision is {precision}, dtype is {dtype}; wanted bf16 with bfloat16, "
            "no with float32"
        )
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("1", "true") and kind != name:
            raise UserError(
                f"accelerate's configuration asks for {name}, but here accelerate does not do it (one "
                f"process, or {device})"
            )
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise UserError(
            "accelerate's fsdp_version is 1; wanted 2 (accelerate to-fsdp2 converts the configuration)"
        )
    parallel = getattr(accelerator, "parallelism_config", None)
    if kind == DistributedType.MEGATRON_LM or parallel is not None:
        raise UserError(
            "accelerate's configuration splits layers or sequences; wanted DDP, FSDP2 or DeepSpeed ZeRO"
        )
    if kind == DistributedType.DEEPSPEED:
        for name in ("optimizer", "scheduler"):
            if name in accelerator.state.deepspeed_plugin.deepspeed_config:
                raise UserError(
                    f"the DeepSpeed configuration has {name!r}; here the options of the run decide that"
                )
