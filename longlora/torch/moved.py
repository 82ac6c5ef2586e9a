"""Tensors that train, read wherever DDP, FSDP2 or DeepSpeed ZeRO keep their parts, and a callback of
transformers.Trainer that checks that each kind of them moves."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerCallback

from longlora.errors import UserError
from longlora.torch.attention import base_of
from longlora.torch.masters import LOW
from longlora.training.moved import Moved

MOMENTS = {"m": "exp_avg", "v": "exp_avg_sq"}  # our names of Adam's moments -> torch's


class Trained:
    """One trained tensor (training.moved.Trained): whole and float32, wherever the engine keeps its parts.

    All processes must read and write the tensors in the same order.
    """

    def __init__(self, name: str, kind: str, shape: Iterable[int]):
        self.name, self.kind, self.shape = name, kind, tuple(shape)

    def bind(self, parameter: torch.nn.Parameter, optimizer: Any, deepspeed: bool) -> None:
        """Say where the tensor is, and whether DeepSpeed has it. Call once the engine has put it there."""
        self._parameter, self._optimizer, self._deepspeed = parameter, optimizer, deepspeed

    @torch.no_grad()
    def read(self, what: str) -> torch.Tensor:
        """value, m or v -> float32 tensor on the CPU."""
        p = self._parameter
        if self._deepspeed:
            from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

            if what == "value":
                found = safe_get_full_fp32_param(p)
            else:
                found = safe_get_full_optimizer_state(p, MOMENTS[what])
        else:
            found = p.detach() if what == "value" else self._optimizer.state[p][MOMENTS[what]]
            found = found.full_tensor() if isinstance(found, DTensor) else found
        return found.reshape(self.shape).to("cpu", torch.float32)

    @torch.no_grad()
    def restore(self, value: np.ndarray, m: np.ndarray, v: np.ndarray, step: int) -> None:
        """Put back the state of the optimizer after `step` steps, float32; the parameter has `value`
        already."""
        p, arrays = self._parameter, {"value": value, "m": m, "v": v}
        tensors = {what: torch.from_numpy(np.array(array)).to(p.device) for what, array in arrays.items()}
        if self._deepspeed:
            from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

            safe_set_full_fp32_param(p, tensors["value"])
            for what, name in MOMENTS.items():
                safe_set_full_optimizer_state(p, tensors[what], name)
            return
        if isinstance(p, DTensor):
            where = dict(device_mesh=p.device_mesh, placements=p.placements, src_data_rank=None)
            tensors = {what: distribute_tensor(x, **where) for what, x in tensors.items()}
        moments = {name: tensors[what] for what, name in MOMENTS.items()}
        self._optimizer.state[p] = {"step": torch.tensor(float(step)), **moments}

    @property
    def value(self) -> np.ndarray:
        """The tensor, float32."""
        return self.read("value").numpy()

    @property
    def grad(self) -> np.ndarray:
        """The optimizer's mean of the gradients: zero where all of them were zero. They are freed
        themselves."""
        return self.read("m").numpy()


class CheckMoved(TrainerCallback):
    """Stops a training in which a kind of parameter does not move, as `longlora train` does.

    Trainer(..., callbacks=[longlora.torch.CheckMoved()]). The kinds are lora_A, lora_B, embedding, head, norm
    and so on. UserError, a ValueError, after the first step (for lora_A the second) names the kind and why;
    before it, a parameter that would train in bfloat16 or float16. For optimizers with Adam's moments.
    """

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **unused):
        from accelerate.state import AcceleratorState, DistributedType

        deepspeed = AcceleratorState().distributed_type == DistributedType.DEEPSPEED
        trained = []
        for name, kind, p in _trained(model):
            if p.dtype in LOW and not deepspeed:  # DeepSpeed has masters of its own
                dtype = str(p.dtype).rpartition(".")[2]
                raise UserError(
                    f"{kind} would train in {dtype}, where small steps are lost ({name}); keep it float32"
                )
            trained.append(Trained(name, kind, getattr(p, "ds_shape", p.shape)))
            trained[-1].bind(p, optimizer, deepspeed)
        self.moved = Moved(trained)

    def on_optimizer_step(self, args, state, control, optimizer=None, **unused):
        rate = max(group["lr"] for group in optimizer.param_groups)
        if self.moved.waiting and rate and not getattr(optimizer, "step_was_skipped", False):
            self.moved.check(state.global_step + 1, rate < 0.5 * args.learning_rate)


def _trained(model):
    """The parameters of a PeftModel that train: (name, kind, parameter)."""
    head = base_of(model).get_output_embeddings()
    heads = [] if head is None else [id(module) for module in head.modules()]
    seen = set()
    for path, module in model.named_modules():
        for last, p in module.named_parameters(prefix=path, recurse=False):
            # An expert that gets no token in a step does not move.
            if p.requires_grad and id(p) not in seen and "expert" not in path:
                seen.add(id(p))
                yield last, _kind(path, last, module, id(module) in heads), p


def _kind(path, name, module, is_head):
    for which in "AB":
        if f"lora_{which}" in path or f"lora_embedding_{which}" in name:
            return f"lora_{which}"
    if isinstance(module, torch.nn.Embedding):
        return "embedding"
    if name.endswith("bias"):
        return "bias"
    return "head" if is_head else "norm" if "Norm" in type(module).__name__ else "linear"
