"""Float32 masters of what trains whole, in a model of lower precision.

AdamW moves a weight by about the learning rate. Next to 1, bfloat16 has steps of 2^-7, so a norm that is
stored in it never moves. PEFT keeps LoRA's A and B in float32; the modules that train whole have the base's
dtype there. Here they are float32 too, and compute in the base's dtype, so that activations take no more
memory.
"""

from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper

from longlora.errors import UserError

LOW = (torch.bfloat16, torch.float16)


class Masters(ModulesToSaveWrapper):
    """PEFT's wrapper of a module that trains whole: the copy that trains has float32 weights.

    Under autocast, autocast decides what computes in which dtype. Merging rounds the weights to the base's.
    """

    def _dtypes(self, copied):
        """{name: its dtype in the base} for each weight of the copy whose dtype differs from the base's."""
        base = dict(self.original_module.named_parameters())
        return {
            name: base[name].dtype
            for name, p in copied.named_parameters()
            if name in base and base[name].dtype != p.dtype
        }

    def _forward_wrapped(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active_adapters:
            return super()._forward_wrapped(*args, **kwargs)
        copied = self.modules_to_save[self.active_adapters[0]]
        lower = self._dtypes(copied)
        if not lower or torch.is_autocast_enabled(next(copied.parameters()).device.type):
            return super()._forward_wrapped(*args, **kwargs)
        if type(copied) is torch.nn.Embedding:  # rounding what was looked up is less than rounding the table
            return copied(*args, **kwargs).to(lower["weight"])
        weights = dict(copied.named_parameters())
        weights |= {name: weights[name].to(dtype) for name, dtype in lower.items()}
        return torch.func.functional_call(copied, weights, args, kwargs)

    def unload_and_optionally_merge_module(self, *args: Any, **kwargs: Any) -> torch.nn.Module:
        """As PEFT's: the module that takes the wrapper's place in the plain model."""
        module = super().unload_and_optionally_merge_module(*args, **kwargs)
        lower, weights = self._dtypes(module), dict(module.named_parameters())
        for name, dtype in lower.items():
            weights[name].data = weights[name].data.to(dtype)
        return module


def raise_trained(model: torch.nn.Module) -> None:
    """Make every parameter of the PeftModel `model` that trains float32, in place.

    UserError names one that can only train in the dtype of the base, such as the biases of frozen linears.
    """
    wrappers = [module for module in model.modules() if type(module) is ModulesToSaveWrapper]
    for wrapper in wrappers:
        for p in wrapper.modules_to_save.parameters():
            if p.requires_grad and p.dtype in LOW:
                p.data = p.data.float()
    for wrapper in wrappers:  # a head that is tied to the embedding is float32 with it
        if any(p.dtype in LOW for p in wrapper.original_module.parameters()):
            wrapper.__class__ = Masters
    for name, p in model.named_parameters():
        if p.requires_grad and p.dtype in LOW:
            dtype = str(p.dtype).rpartition(".")[2]
            raise UserError(
                f"extend: {name} would train in {dtype}, where small steps are lost; load the base with "
                "dtype=torch.float32, or train by LoRA and modules_to_save alone"
            )
