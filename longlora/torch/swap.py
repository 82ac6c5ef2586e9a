"""swap: RMSNorm, rotary embedding, SwiGLU, LoRA linears and the loss of a model of transformers become ours; unswap: undone.

A part is replaced only after its result on random input was compared with what it replaces: a norm or an MLP that computes
something else, whatever it is called, stays as it is. LoRA linears that do what the kernel does not (dropout, DoRA, several
adapters, a merged weight) go PEFT's way, call by call.
"""

import functools
import sys
import types
import weakref

import torch
from torch.distributed.tensor import DTensor

from longlora.ops import IGNORE
from longlora.torch import ops

_MARK = "longlora_original_forward"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_rotated = {}  # module of transformers -> (its own apply_rotary_pos_emb, the living models that use ours)


def _equal(ours, theirs):
    limit = 8 * torch.finfo(theirs.dtype).eps
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= limit * theirs.abs().max())


def _replace(module, forward):
    setattr(module, _MARK, module.__dict__.get("forward"))
    module.forward = types.MethodType(forward, module)


def _known(x):
    return x.dtype in _DTYPES


def _norm(module):
    weight, eps = (
        getattr(module, "weight", None),
        getattr(module, "variance_epsilon", getattr(module, "eps", None)),
    )
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
    """A LoRA linear of PEFT with one plain adapter; the check of each call is PEFT's own state, which may change."""
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


def _apply_rotary_pos_emb(theirs, q, k, cos, sin, *args, unsqueeze_dim=1, **kwargs):
    """Ours for q [B,H,T,D], k [B,K,T,D], cos and sin [B or 1,T,D] in the kernels' dtypes; theirs for any other call."""
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


def _release_rotary():
    """Families without a swapped model have their own function again. Called by swap and unswap only: were it called when a model
    is collected, the function could change while torch.compile traces another model of the family."""
    for name, (theirs, users) in list(_rotated.items()):
        if not users:
            sys.modules[name].apply_rotary_pos_emb = theirs
            del _rotated[name]


def _swap_rotary(name, model):
    module = sys.modules[name]
    if name not in _rotated:
        theirs = module.apply_rotary_pos_emb
        q, cos = torch.randn(2, 2, 5, 8), torch.randn(2, 5, 4).repeat(1, 1, 2)
        try:
            same = all(map(_equal, _apply_rotary_pos_emb(theirs, q, q, cos, cos), theirs(q, q, cos, cos)))
        except (TypeError, ValueError, RuntimeError):
            return False
        if not same:
            return False
        module.apply_rotary_pos_emb = functools.partial(_apply_rotary_pos_emb, theirs)
        _rotated[name] = (theirs, weakref.WeakSet())
    _rotated[name][1].add(model)
    return True


def _head_of(model):
    """What multiplies the hidden states into logits: the linear itself, inside whatever PEFT wraps around it."""
    head = model.get_output_embeddings()
    if hasattr(head, "modules_to_save"):
        head = head.modules_to_save[head.active_adapters[0]]
    return head


def _loss(model):
    """CausalLM.forward that, when training with labels, never makes the logits."""
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
        count, ignore, shifted, _ = (
            kwargs.pop(name, default)
            for name, default in (
                ("num_items_in_batch", None),
                ("ignore_index", IGNORE),
                ("shift_labels", None),
                ("logits_to_keep", None),
            )
        )
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
    """Whether the model's logits are its hidden states times the head's weight, and its loss transformers' for causal models."""
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


def swap(model):
    """Replace what can be replaced in `model`, one of transformers or a PeftModel -> dict of kind -> number of modules.

    Kinds: rms_norm, swiglu, lora_linear, rope, linear_cross_entropy. With the loss swapped, a training forward with labels
    gives no logits. The rotary embedding is one function for all models of a family: all of them get ours, with equal results,
    until the next swap or unswap finds no swapped model of the family left.
    ValueError where nothing can be compared: a model that is swapped already, or whose parameters are not here (shards, meta).
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if any(_MARK in module.__dict__ for module in inner.modules()):
        raise ValueError("swap: this model is swapped already")
    away = [
        name
        for name, p in inner.named_parameters()
        if isinstance(p, DTensor) or hasattr(p, "ds_id") or p.is_meta
    ]
    if away:
        raise ValueError(
            f"swap: {away[0]} is sharded already, or on the meta device; swap the model before an engine has it "
            "(FSDP2, DeepSpeed ZeRO-3)"
        )
    _release_rotary()
    counts = dict(rms_norm=0, swiglu=0, lora_linear=0, rope=0, linear_cross_entropy=0)
    for module in inner.modules():
        lora = (
            hasattr(module, "lora_A")
            and hasattr(module, "base_layer")
            and isinstance(module.base_layer, torch.nn.Linear)
        )
        for kind, made in (
            ("lora_linear", _lora(module) if lora else None),
            ("rms_norm", _norm(module)),
            ("swiglu", _mlp(module)),
        ):
            if made is None:
                continue
            forward, sample = made
            with torch.no_grad():
                x = sample()
                if not _known(x) or not _equal(forward(module, x), module.forward(x)):
                    continue
            _replace(module, forward)
            counts[kind] += 1
        source = sys.modules[type(module).__module__]
        if (
            type(module).__name__.endswith("Attention")
            and hasattr(source, "apply_rotary_pos_emb")
            and _swap_rotary(source.__name__, inner)
        ):
            counts["rope"] += 1
    if _plain_loss(inner):
        _replace(inner, _loss(inner))
        counts["linear_cross_entropy"] = 1
    return counts


def unswap(model):
    """Undo swap: every module has its own forward again -> model."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
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
