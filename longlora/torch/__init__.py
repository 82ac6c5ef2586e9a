"""The kernels for PyTorch, and S2-Attn for transformers: importing this registers attn_implementation="longlora_s2".

ops: functions with autograd. configure, extend, load: S2-Attn and LoRA on a model of transformers. swap, unswap: its layers by
our kernels. torch is needed for the first, transformers and peft for the others, which are imported when they are installed.
"""

import importlib.util

import torch

from longlora.torch import ops

if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 10):
    raise ImportError(f"longlora.torch needs torch 2.10 or newer, found {torch.__version__}")

__all__ = ["ops"]
if importlib.util.find_spec("transformers"):
    from longlora.torch.attention import configure
    from longlora.torch.swap import swap, unswap

    __all__ += ["configure", "swap", "unswap"]
    if importlib.util.find_spec("peft"):
        from longlora.torch.extend import extend, load

        __all__ += ["extend", "load"]
