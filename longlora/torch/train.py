"""`python -m longlora.torch.train`: the run of `longlora train` on transformers.Trainer.

The policy of the run is the driver's own (longlora.training.run): options, tokens and their order, schedule,
metrics, adapter and checkpoints. So a run that stopped in one continues in the other, and on another number
of processes. Trainer makes the steps: DDP by torchrun or `accelerate launch`, FSDP2 and DeepSpeed ZeRO as
accelerate's own configuration says. Rank 0 writes; all processes must see output_dir and cache_dir.
"""

import contextlib
import functools
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments

from longlora import cli, disk
from longlora.errors import UserError, counted
from longlora.guard import guarded
from longlora.job import processors
from longlora.progress import quietly
from longlora.torch.trainer import TorchEngine
from longlora.training import options, reporters, resume
from longlora.training.inputs import Say, Setup, Source, instructs, read_data, use_threads
from longlora.training.options import TrainOptions
from longlora.training.run import Result, Run

PRECISION = "ACCELERATE_MIXED_PRECISION"
# Options of `longlora train` that are refused here, and why.
REFUSED = {
    "init": "a pretrained model is extended",
    "full": "LoRA, embedding and norms are trained",
    "max_memory": "the memory of torch is not planned",
    "profile": "use torch.profiler",
    "eval_passkey": "use longlora eval passkey on the result",
}


def train(say: Say = print, **keywords: Any) -> Result:
    """Train as the keywords say (the fields of options.TrainOptions) -> Result.

    `say` receives the lines of the report.

    Call it as longlora.train, in one process or in every process of a group that torchrun or accelerate
    launched. UserError for options that cannot be met, and for those that this path does not have: init,
    full, max_memory, profile, eval_passkey, a device other than auto and cpu, checkpointing minimal.
    """
    return run(options.from_dict(keywords), say)


def run(o: TrainOptions, say: Say = print) -> Result:
    """As `train`, with checked options."""
    say = quietly(say)
    refuse(o)
    reporters.chosen(o.report_to)  # before anything takes time
    use_threads(o)
    if o.num_threads:
        torch.set_num_threads(o.num_threads)
    elif "OMP_NUM_THREADS" not in os.environ:  # torch knows no quota of a control group
        torch.set_num_threads(min(torch.get_num_threads(), processors()))
    source = Source(o)
    setup = Setup(o, source.config, instructs=instructs(o))
    with contextlib.ExitStack() as held:
        if PRECISION not in os.environ:  # transformers 4 leaves the variable of this run to the next one
            held.callback(os.environ.pop, PRECISION, None)
        args = arguments(o)
        if args.n_gpu > 1:
            raise UserError(
                f"one process sees {args.n_gpu} GPUs; start one process for each (torchrun --nproc-per-node "
                f"{args.n_gpu} -m longlora.torch.train ...) or show it one GPU (CUDA_VISIBLE_DEVICES=0)"
            )
        if args.process_index:
            say = _silent

        def prepare():
            resume.refuse_taken(o.output_dir, o.resume_from_checkpoint)
            held.enter_context(disk.alone(o.output_dir))
            say(place(args))
            resume.sweep(o.output_dir)
            read_data(o, source, setup, say)  # the other processes find it in the cache

        once(args, prepare)
        writes, by_one = args.process_index == 0, functools.partial(once, args)
        return TorchEngine(Run(o, source, setup, say, args.world_size, writes, by_one), args).train()


def refuse(o: TrainOptions) -> None:
    """UserError names an option that this path does not have."""
    for name, why in REFUSED.items():
        if getattr(o, name):
            raise UserError(f"{name} is not available with torch: {why}")
    if o.device not in ("auto", "cpu"):
        raise UserError(
            f"device {o.device} is not available with torch: wanted auto or cpu; "
            "CUDA_VISIBLE_DEVICES chooses a GPU"
        )
    if o.checkpointing == "minimal":
        raise UserError("checkpointing minimal is not available with torch: wanted none (also auto) or full")


def place(args: TrainingArguments) -> str:
    """The sentence that says where a run computes."""
    device, processes = args.device, args.world_size
    if device.type == "cuda":
        what = f"{device}, {torch.cuda.get_device_name(device)}"
    else:  # whose number in a group is that of the process
        what = f"{device.type}, {counted(torch.get_num_threads(), 'thread')}"
    return f"device: {what}" + (f", in the first of {processes} processes" if processes > 1 else "")


def _silent(sentence: str) -> None:
    """The report of all processes but one."""


def arguments(o: TrainOptions) -> TrainingArguments:
    """The options as TrainingArguments, without max_steps. Making them joins the group of processes."""
    checkpointing = next(
        name
        for name in ("activation_checkpointing", "gradient_checkpointing")
        if name in TrainingArguments.__dataclass_fields__
    )
    recompute = {checkpointing: True, f"{checkpointing}_kwargs": {"use_reentrant": False}}
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
        seed=o.seed % 2**32,  # NumPy's; what is random in a run is ours and takes the whole seed
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
        **(recompute if o.checkpointing == "full" else {}),
    )


def once(args: TrainingArguments, function: Callable[[], object]) -> None:
    """Call function() on rank 0 while the others wait. A UserError there is raised in every process."""
    said: list[str | None] = [None]
    if args.process_index == 0:
        try:
            function()
        except UserError as error:
            said = [str(error)]
    if args.world_size > 1:
        broadcast_object_list(said)
    if said[0] is not None:
        raise UserError(said[0])


def main(argv: Sequence[str] | None = None) -> int:
    """The command line -> the exit code: that of longlora.guard, or 128 + n after the signal n."""
    parser = cli.Parser(
        prog="python -m longlora.torch.train",
        allow_abbrev=False,
        description="extend a model with longlora's kernels in torch; for torchrun and accelerate launch",
        epilog="--checkpointing auto means none here; minimal, and a --device other than auto and cpu,"
        " are refused",
    )
    options.add_flags(parser, set(TrainOptions.__dataclass_fields__) - set(REFUSED))

    def trained():
        try:
            given = options.dashed(sys.argv[1:] if argv is None else argv)
            result = run(options.from_flags(parser.parse_args(given)))
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        return 0 if result.stopped is None else 128 + result.stopped

    speaks = os.environ.get("RANK", "0") == "0"
    code = guarded(trained, speaks=speaks)
    if code == 2 and not speaks:
        time.sleep(2)  # the first process that ends ends all: let rank 0 print its message first
    return code


def leave(code: int) -> NoReturn:
    """End the process, in a group at once.

    gloo's threads release their tensors late; that aborts an interpreter that is ending (seen with torch
    2.13).
    """
    if "RANK" in os.environ:
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    leave(main())
