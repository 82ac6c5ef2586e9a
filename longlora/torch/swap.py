"""swap: norms, rotary embedding, SwiGLU, LoRA linears and the loss of a transformers model by our kernels.

unswap undoes it. A part is replaced only if its results on random input equal ours: a norm or an MLP that
computes something else stays, whatever its name. LoRA linears with dropout, DoRA, several adapters or merged
weights use PEFT's own forward, call by call.
"""

import functools
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.distributed.tensor import DTensor

from longlora.ops import IGNORE
from longlora.torch import ops
from longlora.torch.attention import base_of

Model = TypeVar("Model", bound=torch.nn.Module)
_MARK = "longlora_original_forward"  # on a replaced module: the forward it had as an attribute, or None
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A module of transformers -> its own apply_rotary_pos_emb, and the living models that use ours.
_rotated: dict[str, tuple[Callable[..., Any], "weakref.WeakSet[Any]"]] = {}


def _equal(ours, theirs):
    limit = 8 * torch.finfo(theirs.dtype).eps
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= limit * theirs.abs().max())


def _replace(module, forward):
    module.longlora_original_forward = module.__dict__.get("forward")
    module.forward = types.MethodType(forward, module)


# ---- the parts: each function gives our forward and a random input, or None for a module of another kind


def _norm(module):
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if "RMSNorm" not in type(module).__name__ or weight is None or eps is None or weight.ndim != 1:
        return None

    def forward(self, x):
        return ops.rms_norm(x, self.weight.to(x.dtype), eps)

    return forward, lambda: torch.randn(3, weight.shape[0], dtype=weight.dtype, device=weight.device)


def _mlp(module):
    if not all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return None

    def forward(self, x):
        return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))

    weight = getattr(module.gate_proj, "weight", None)
    if weight is None or weight.ndim != 2:
        return None
    return forward, lambda: torch.randn(3, weight.shape[1], dtype=weight.dtype, device=weight.device)


def _lora(module):
    """A LoRA linear of PEFT. Each call looks at PEFT's state, which may change between calls."""
    if not (hasattr(module, "lora_A") and isinstance(getattr(module, "base_layer", None), torch.nn.Linear)):
        return None
    original = module.forward

    def forward(self, x, *args, **kwargs):
        name = self.active_adapters[0] if len(self.active_adapters) == 1 else None
        if (
            args
            or kwargs
            or self.disable_adapters
            or self.merged
            or name not in self.lora_A
            or self.use_dora.get(name)
            or name in getattr(self, "lora_variant", {})
            or not isinstance(self.lora_dropout[name], torch.nn.Identity)
            or self.lora_B[name].bias is not None
            or type(self.base_layer) is not torch.nn.Linear
        ):
            return original(x, *args, **kwargs)
        base = self.base_layer
        a, b = (part[name].weight.to(base.weight.dtype) for part in (self.lora_A, self.lora_B))
        return ops.lora_linear(x, base.weight, base.bias, a, b, self.scaling[name])

    weight = module.base_layer.weight
    return forward, lambda: torch.randn(3, weight.shape[1], dtype=weight.dtype, device=weight.device)


_PARTS = {"lora_linear": _lora, "rms_norm": _norm, "swiglu": _mlp}


# ---- the rotary embedding: one function for all models of a family


def _apply_rotary_pos_emb(theirs, q, k, cos, sin, *args, unsqueeze_dim=1, **kwargs):
    """Ours for q [B,H,T,D], k [B,K,T,D], cos and sin [B or 1,T,D] in the kernels' dtypes; else theirs."""
    if (
        args
        or kwargs
        or q.dtype not in _DTYPES
        or k.dtype != q.dtype
        or unsqueeze_dim != 1
        or q.ndim != 4
        or cos.ndim != 3
        or cos.shape[-1] != q.shape[-1]
    ):
        return theirs(q, k, cos, sin, *args, **({} if args else {"unsqueeze_dim": unsqueeze_dim}), **kwargs)
    B, T, E = q.shape[0], q.shape[2], q.shape[3] // 2
    cos, sin = (x[..., :E].reshape(-1, E).float() for x in (cos, sin))
    positions = None
    if cos.shape[0] != T:
        positions = torch.arange(B * T, dtype=torch.int32, device=q.device).view(B, T)
    return tuple(ops.rope(x.transpose(1, 2), cos, sin, positions).transpose(1, 2) for x in (q, k))


def _set_rotary(name, function):
    module: Any = sys.modules[name]
    module.apply_rotary_pos_emb = function


def _release_rotary():
    """Give families without a swapped model their own function again.

    Only swap and unswap call this. If the collection of a model did, the function could change while
    torch.compile traces another model of the family.
    """
    for name, (theirs, users) in list(_rotated.items()):
        if not users:
            _set_rotary(name, theirs)
            del _rotated[name]


def _swap_rotary(module, model):
    """Let the family of the attention `module` of `model` rotate by our kernel -> whether it does."""
    name = type(module).__module__
    theirs = getattr(sys.modules[name], "apply_rotary_pos_emb", None)
    if not type(module).__name__.endswith("Attention") or theirs is None:
        return False
    if name not in _rotated:
        q, cos = torch.randn(2, 2, 5, 8), torch.randn(2, 5, 4).repeat(1, 1, 2)
        try:
            same = all(map(_equal, _apply_rotary_pos_emb(theirs, q, q, cos, cos), theirs(q, q, cos, cos)))
        except (TypeError, ValueError, RuntimeError):
            return False
        if not same:
            return False
        _set_rotary(name, functools.partial(_apply_rotary_pos_emb, theirs))
        _rotated[name] = (theirs, weakref.WeakSet())
    _rotated[name][1].add(model)
    return True


# ---- the loss


def _head_of(model):
    """The linear that turns hidden states into logits, also inside PEFT's wrapper."""
    head = model.get_output_embeddings()
    if hasattr(head, "modules_to_save"):
        head = head.modules_to_save[head.active_adapters[0]]
    return head


def _loss(model):
    """The forward of a causal model that makes no logits when it trains with labels."""
    original = model.forward

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        **kwargs,
    ):
        given = dict(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
        )
        if labels is None or not self.training or kwargs.get("past_key_values") is not None:
            return original(**given, labels=labels, **kwargs)
        count, ignore = kwargs.pop("num_items_in_batch", None), kwargs.pop("ignore_index", IGNORE)
        shifted = kwargs.pop("shift_labels", None)
        kwargs.pop("logits_to_keep", None)
        hidden = getattr(self, self.base_model_prefix)(**given, **{**kwargs, "use_cache": False})[0]
        if shifted is None:
            shifted = torch.nn.functional.pad(labels, (0, 1), value=ignore)[..., 1:]
        loss = ops.linear_cross_entropy(
            hidden, _head_of(self).weight, shifted, ignore, "mean" if count is None else "sum"
        )
        from transformers.modeling_outputs import CausalLMOutputWithPast

        return CausalLMOutputWithPast(loss=loss if count is None else loss / count)

    return forward


def _plain_loss(model):
    """Whether logits are the hidden states times the head's weight, and the loss is transformers' own."""
    if (
        model.get_output_embeddings() is None
        or getattr(model.loss_function, "__name__", "") != "ForCausalLMLoss"
    ):
        return False
    ids, was = torch.arange(6, device=model.device)[None] % model.config.vocab_size, model.training
    try:
        model.eval()
        with torch.no_grad():
            hidden = getattr(model, model.base_model_prefix)(input_ids=ids, use_cache=False)[0]
            return _equal(
                torch.nn.functional.linear(hidden, _head_of(model).weight),
                model(input_ids=ids, use_cache=False).logits,
            )
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return False
    finally:
        model.train(was)


# ---- the functions


def swap(model: torch.nn.Module) -> dict[str, int]:
    """Replace the parts of `model`, a transformers model or a PeftModel around one -> number of parts by
    kind.

    The kinds are rms_norm, swiglu, lora_linear, rope and linear_cross_entropy. With the loss swapped, a
    training forward with labels gives no logits. All models of a family share one rotary function: all of
    them get ours, with equal results, until the next swap or unswap finds no swapped model of the family.
    ValueError for a model that is swapped already, or whose parameters cannot be read here (sharded, or on
    the meta device).
    """
    inner = base_of(model)
    if any(_MARK in module.__dict__ for module in inner.modules()):
        raise ValueError("swap: this model is swapped already")
    for name, p in inner.named_parameters():
        if isinstance(p, DTensor) or hasattr(p, "ds_id") or p.is_meta:
            raise ValueError(
                f"swap: {name} is sharded already, or on the meta device; swap the model before FSDP2 or "
                "DeepSpeed ZeRO-3 has it"
            )
    _release_rotary()
    counts = dict(rms_norm=0, swiglu=0, lora_linear=0, rope=0, linear_cross_entropy=0)
    for module in inner.modules():
        for kind, part in _PARTS.items():
            made = part(module)
            if made is None:
                continue
            forward, sample = made
            with torch.no_grad():
                x = sample()
                if x.dtype not in _DTYPES or not _equal(forward(module, x), module.forward(x)):
                    continue
            _replace(module, forward)
            counts[kind] += 1
        counts["rope"] += _swap_rotary(module, inner)
    if _plain_loss(inner):
        _replace(inner, _loss(inner))
        counts["linear_cross_entropy"] = 1
    return counts


def unswap(model: Model) -> Model:
    """Undo swap: give every module its own forward again -> model."""
    inner = base_of(model)
    for module in inner.modules():
        if _MARK in module.__dict__:
            before = module.__dict__.pop(_MARK)
            if before is None:
                del module.forward
            else:
                module.forward = before
    for _, users in _rotated.values():
        users.discard(inner)
    _release_rotary()
    return model
