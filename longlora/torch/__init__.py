"""The kernels for PyTorch, and S²-Attn for transformers: an import registers
attn_implementation="longlora_s2".

ops: functions with autograd, which need torch alone. configure: S²-Attn in a transformers model. swap and
unswap: its layers by our kernels; these three need transformers. extend and load: a longer context and LoRA.
CheckMoved: a callback of Trainer that stops a training of nothing. These three need peft too. Names whose
libraries are not installed are missing.
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
        from longlora.torch.moved import CheckMoved

        __all__ += ["extend", "load", "CheckMoved"]
