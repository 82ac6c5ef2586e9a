"""The kernels as torch functions with autograd. Importing this registers them as `torch.ops.longlora.*`.

Shapes use the letters of longlora.ops. Tensors are float32, bfloat16 or float16, on the CPU or a GPU. The
floating tensors of a call have one dtype. An input is read in place; it is copied first if its last axis is
not dense. Every function raises TypeError for a wrong dtype and ValueError for a wrong shape, before it
writes.
"""

from longlora.torch.ops import optimizer  # noqa: F401 (registers operators without a function here)
from longlora.torch.ops.attention import cached_attention, rope, s2_attention, s2_attention_with_lse
from longlora.torch.ops.linear import lora_linear, swiglu
from longlora.torch.ops.norm import rms_norm
from longlora.torch.ops.vocabulary import embedding, linear_cross_entropy

__all__ = [
    "cached_attention",
    "embedding",
    "linear_cross_entropy",
    "lora_linear",
    "rms_norm",
    "rope",
    "s2_attention",
    "s2_attention_with_lse",
    "swiglu",
]
