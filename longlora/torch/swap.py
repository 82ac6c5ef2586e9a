"""swap: norms, rotary embedding, SwiGLU, LoRA linears and the loss of a transformers model by our kernels.

unswap undoes it. A part is replaced only where the source of its forward is known (longlora.torch.forms): a
norm or an MLP that computes something else stays, whatever its name. Each call decides again. Where our
kernel would not do what the part did, the part does it itself: adapters that are switched off, merged, or
several at once, LoRA dropout, DoRA, quantised or sharded weights, hooks on a module that would be passed
over, a dtype or a device that the kernels lack.

A replaced module gets a class of its own, derived from the one it had. So a copy of it, its pickle and its
FSDP form compute with their own weights.
"""

import functools
import sys
import weakref
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.nn.modules.module import _has_any_global_hook
from transformers.activations import ACT2FN
from transformers.loss.loss_utils import ForCausalLMLoss

try:
    from peft.utils import ModulesToSaveWrapper
except ImportError:  # nothing is wrapped then
    ModulesToSaveWrapper = ()

from longlora import _C
from longlora.ops import IGNORE
from longlora.torch import forms, ops
from longlora.torch.attention import base_of

Model = TypeVar("Model", bound=torch.nn.Module)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TENSORS = (Tensor, torch.nn.Parameter)
_DEVICES = ("cpu", "cuda") if _C.cuda_built_for else ("cpu",)
_SILU = tuple(kind for kind in (torch.nn.SiLU, type(ACT2FN["silu"])) if forms.silu(kind))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_ENGINES = ("torch.distributed.", "deepspeed.")  # their hooks bring weights and look at no values
# A module of transformers -> its own apply_rotary_pos_emb, and the living models that use ours.
_rotated: dict[str, tuple[Callable[..., Any], "weakref.WeakSet[Any]"]] = {}


# ---- what a call looks at


def _own(module: Any) -> Any:
    """The class of a module, or the one that it had before it was swapped."""
    return getattr(module, "longlora_base", type(module))


def _plain(*tensors):
    """Whether the kernels read these: whole tensors on one device, in one of the kernels' dtypes."""
    device = tensors[0].device
    if device.type not in _DEVICES or not (torch.compiler.is_compiling() or peek_interpreter_stack() is None):
        return False
    return all(type(x) in _TENSORS and x.dtype in _DTYPES and x.device == device for x in tensors)


def _bare(module):
    """Whether nothing but the forward of its class happens in a call of `module`."""
    return not (
        "forward" in module.__dict__
        or any(getattr(module, name) for name in _HOOKS)
        or _has_any_global_hook()
    )


def _linear(module):
    return type(module).forward is torch.nn.Linear.forward and _bare(module)


def _autocast(x):
    return torch.is_autocast_enabled(x.device.type)


def _ours(module, args, kwargs):
    """Whether a call may be ours: the module is swapped still, and there is one argument."""
    return len(args) == 1 and not kwargs and getattr(module, "longlora_swapped", False)


# ---- the parts: the forward for a class of modules, or None for a class that is not known


def _norm(base: Any) -> dict[str, Any] | None:
    form = forms.norm(base)
    if form is None and base.forward is not torch.nn.RMSNorm.forward:
        return None

    def forward(self, *args, **kwargs):
        if not _ours(self, args, kwargs) or not _norm_fits(self):
            return base.forward(self, *args, **kwargs)
        x, weight = args[0], self.weight
        if not _plain(x, weight) or x.shape[-1:] != weight.shape:
            return base.forward(self, x)
        if form is None and (x.dtype != weight.dtype or _autocast(x)):
            return base.forward(self, x)
        dtype = torch.promote_types(x.dtype, weight.dtype)
        out: Any = ops.rms_norm(x.to(dtype), weight.to(dtype), _eps(self))
        return out.to(x.dtype if form is None or form.keeps else dtype)

    return {"forward": forward}


def _eps(module):
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _norm_fits(module):
    weight = getattr(module, "weight", None)
    return (
        weight is not None
        and weight.ndim == 1
        and _eps(module) is not None
        and getattr(module, "with_scale", True)
    )


def _mlp(base: Any) -> dict[str, Any] | None:
    if not forms.mlp(base):
        return None

    def forward(self, *args, **kwargs):
        if not _ours(self, args, kwargs) or not _mlp_fits(self):
            return base.forward(self, *args, **kwargs)
        gate, up = self.gate_proj(*args), self.up_proj(*args)
        if _plain(gate, up) and gate.dtype == up.dtype and gate.shape == up.shape:
            return self.down_proj(ops.swiglu(gate, up))
        return self.down_proj(self.act_fn(gate) * up)

    return {"forward": forward}


def _mlp_fits(module):
    return type(module.act_fn) in _SILU and _bare(module.act_fn)


def _lora(base: Any) -> dict[str, Any] | None:
    if not forms.lora_linear(base):
        return None

    def forward(self, *args, **kwargs):
        found = _lora_of(self, args[0]) if _ours(self, args, kwargs) else None
        return base.forward(self, *args, **kwargs) if found is None else ops.lora_linear(args[0], *found)

    return {"forward": forward}


def _lora_of(module, x):
    """weight, bias, a, b and scale of a LoRA linear of PEFT; None where it computes more than these say."""
    names = module.active_adapters
    if len(names) != 1 or names[0] not in module.lora_A or module.disable_adapters or module.merged:
        return None
    name, base = names[0], module.base_layer
    a, b, scale = module.lora_A[name], module.lora_B[name], module.scaling[name]
    if (
        name in module.lora_variant
        or type(module.lora_dropout[name]) is not torch.nn.Identity
        or not (_linear(base) and _linear(a) and _linear(b) and _bare(module.lora_dropout[name]))
        or a.bias is not None
        or b.bias is not None
        or not isinstance(scale, float | int)
        or not module.cast_input_dtype_enabled
    ):
        return None
    weight, bias, a, b = base.weight, base.bias, a.weight, b.weight
    if not _plain(x, weight, a, b, *(() if bias is None else (bias,))):
        return None
    if not _autocast(x) and (x.dtype != weight.dtype or (bias is not None and bias.dtype != weight.dtype)):
        return None
    if weight.dtype == torch.float16 and not a.dtype == b.dtype == weight.dtype:
        return None  # small numbers would vanish
    return weight, bias, a.to(weight.dtype), b.to(weight.dtype), scale


def _lora_fits(module):
    return type(module.base_layer).forward is torch.nn.Linear.forward


# ---- the loss


class _Loss:
    """The loss of one training forward: what the head computes in place of logits, and whether it did."""

    def __init__(self, targets, ignore, count):
        self.targets, self.ignore, self.count = targets, ignore, count
        self.rows: int | None = None  # of the head that computed it

    def of(self, x, weight):
        """The mean, or where a count is given the sum."""
        self.rows = weight.shape[0]
        return ops.linear_cross_entropy(
            x, weight, self.targets.to(x.device), self.ignore, "mean" if self.count is None else "sum"
        )

    def __call__(self, logits, labels, vocab_size, **unused):
        """Stands in for the model's loss function, whose `logits` are the loss already."""
        if vocab_size != self.rows:
            raise ValueError(f"the head has {self.rows} rows, but the vocabulary has {vocab_size} tokens")
        count = self.count.to(logits.device) if isinstance(self.count, Tensor) else self.count
        return logits if count is None else logits / count


def _head(base: Any) -> dict[str, Any] | None:
    if base.forward is not torch.nn.Linear.forward:
        return None

    def forward(self, *args, **kwargs):
        loss = getattr(self, "longlora_loss", None)
        if loss is None or not _ours(self, args, kwargs) or self.bias is not None:
            return base.forward(self, *args, **kwargs)
        x, weight = args[0], self.weight
        fits = _plain(x, weight) and x.shape[:-1] == loss.targets.shape and x.shape[-1:] == weight.shape[1:]
        if not fits or not (_autocast(x) or x.dtype == weight.dtype):
            return base.forward(self, x)
        return loss.of(x, weight)

    return {"forward": forward}


def _heads(model: Any, name: str) -> list[Any]:
    """The linears that may make a model's logits from hidden states, also inside PEFT's modules_to_save."""
    head: Any = getattr(model, name, None)
    found = [head]
    if isinstance(head, ModulesToSaveWrapper) and _unhooked(head):
        found = [head.original_module, *head.modules_to_save.values()]
    return [x for x in found if _is_linear(x) and _head_fits(x)]


def _is_linear(module):
    return isinstance(module, torch.nn.Module) and _own(module).forward is torch.nn.Linear.forward


def _head_fits(module):
    return module.bias is None and _unhooked(module)


def _unhooked(module):
    """Whether nobody looks at what goes through a module; engines of training may bring its weights."""
    hooks = [hook for name in _HOOKS for hook in getattr(module, name).values()]
    return (
        "forward" not in module.__dict__
        and not _has_any_global_hook()
        and all((getattr(hook, "__module__", None) or "").startswith(_ENGINES) for hook in hooks)
    )


def _causal(base: Any) -> dict[str, Any] | None:
    """A causal model's forward whose head gives the loss, in training with labels. It returns no logits."""
    flow, own = forms.loss_flow(base.forward), getattr(base, "loss_function", None)
    if flow is None or not isinstance(own, property) or not forms.causal_loss(ForCausalLMLoss):
        return None
    get_loss: Any = own.fget

    def forward(self, *args, skip_logits=None, **kwargs):
        skip = self.training if skip_logits is None else skip_logits
        loss = _loss_of(self, flow, dict(zip(flow.names[1:], args)) | kwargs) if skip else None
        heads = [] if loss is None else [x for x in _heads(self, flow.head) if isinstance(x, Swapped)]
        if loss is None or not heads:
            return base.forward(self, *args, **kwargs)
        for module in (self, *heads):
            module.longlora_loss = loss
        try:
            output = base.forward(self, *args, **kwargs)
        finally:
            for module in (self, *heads):
                del module.longlora_loss
        if loss.rows is None:
            return output
        return type(output)(**{name: value for name, value in output.items() if name != "logits"})

    def loss_function(self):
        loss = getattr(self, "longlora_loss", None)
        return get_loss(self) if loss is None or loss.rows is None else loss

    property_ = property(loss_function, own.fset)
    return {"forward": forward, "loss_function": property_, "longlora_head": flow.head}


def _causal_fits(module):
    flow = forms.loss_flow(_own(module).forward)
    return flow is not None and _unset(module, flow) and bool(_heads(module, flow.head))


def _unset(model, flow):
    return all(getattr(model.config, name, None) is None for name in flow.unset)


def _loss_of(model, flow, given):
    """The _Loss of a call of a causal model; None for a call that has to make logits."""
    labels, returns, keep = (given.get(name) for name in ("labels", "return_dict", "logits_to_keep"))
    if (
        not isinstance(labels, Tensor)
        or labels.is_floating_point()
        or not getattr(model, "longlora_swapped", False)
        or not (getattr(model.config, "return_dict", True) if returns is None else returns)
        or not (isinstance(keep, int | None) and not keep)
        or not _unset(model, flow)
        or model.loss_function is not ForCausalLMLoss
    ):
        return None
    options = given if flow.keywords else {}
    ignore, targets = options.get("ignore_index", IGNORE), options.get("shift_labels")
    if targets is None:
        targets = torch.nn.functional.pad(labels, (0, 1), value=ignore)[..., 1:]
    return _Loss(targets, ignore, options.get("num_items_in_batch"))


# ---- the classes of replaced modules


class Swapped(torch.nn.Module):
    """A module whose forward may be ours. Its class derives from this and from `longlora_base`."""

    longlora_base: ClassVar[Any]
    longlora_kind: ClassVar[str]
    longlora_swapped = True  # false where unswap could not give the class back, because FSDP2 derived from it

    def __reduce_ex__(self, protocol):
        return (_again, (self.longlora_base,), *super().__reduce_ex__(protocol)[2:])


_PARTS = {
    "rms_norm": (_norm, _norm_fits),
    "swiglu": (_mlp, _mlp_fits),
    "lora_linear": (_lora, _lora_fits),
    "linear_cross_entropy": (_causal, _causal_fits),
    "head": (_head, _head_fits),
}


@functools.cache
def _class_of(base: Any) -> Any:
    """The class that replaces `base`; None where base is not known."""
    for kind, (part, _) in _PARTS.items():
        methods = part(base)
        if methods is not None:
            methods["forward"] = functools.wraps(base.forward)(methods["forward"])
            names = {
                "__module__": base.__module__,
                "__qualname__": base.__qualname__,
                "__doc__": base.__doc__,
            }
            own = {"longlora_base": base, "longlora_kind": kind}
            return type(base.__name__, (Swapped, base), names | own | methods)
    return None


def _again(base):
    """A new module for a copy or a pickle."""
    made = _class_of(base) or base
    return made.__new__(made)


# ---- the rotary embedding: one function for all models of a family


def _apply_rotary_pos_emb(theirs, keeps, q, k, cos, sin, *args, unsqueeze_dim=1, **kwargs):
    """Ours for q [B,H,T,D], k [B,K,T,D], cos and sin [B or 1,T,D]; else theirs. keeps: as forms.rotation."""
    if (
        args
        or kwargs
        or unsqueeze_dim != 1
        or not (q.ndim == k.ndim == 4 and q.shape[2:] == k.shape[2:] and q.shape[0] == k.shape[0])
        or not (cos.shape == sin.shape and cos.ndim == 3 and cos.shape[1:] == q.shape[2:])
        or cos.shape[0] not in (1, q.shape[0])
        or cos.requires_grad
        or sin.requires_grad
        or not _plain(q, k, cos, sin)
        or not q.dtype == k.dtype
    ):
        return theirs(q, k, cos, sin, *args, **({} if args else {"unsqueeze_dim": unsqueeze_dim}), **kwargs)
    if not keeps:
        dtype = torch.promote_types(q.dtype, cos.dtype)
        q, k = q.to(dtype), k.to(dtype)
    B, T, E = q.shape[0], q.shape[2], q.shape[3] // 2
    cos, sin = (x[..., :E].reshape(-1, E).float() for x in (cos, sin))
    positions = None
    if cos.shape[0] != T:
        positions = torch.arange(B * T, dtype=torch.int32, device=q.device).view(B, T)
    return tuple(ops.rope(x.transpose(1, 2), cos, sin, positions).transpose(1, 2) for x in (q, k))


def _set_rotary(name, function):
    source: Any = sys.modules[name]
    source.apply_rotary_pos_emb = function


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
    if not type(module).__name__.endswith("Attention") or name not in sys.modules:
        return False
    if name not in _rotated:
        source: Any = sys.modules[name]
        keeps = forms.rotation(source)
        if keeps is None:
            return False
        theirs = source.apply_rotary_pos_emb
        _set_rotary(name, functools.partial(_apply_rotary_pos_emb, theirs, keeps))
        _rotated[name] = (theirs, weakref.WeakSet())
    _rotated[name][1].add(model)
    return True


# ---- the functions


def swap(model: torch.nn.Module) -> dict[str, int]:
    """Replace the parts of `model`, a transformers model or a PeftModel around one -> number of parts by
    kind.

    The kinds are rms_norm, swiglu, lora_linear, rope and linear_cross_entropy. With the loss swapped, a
    training forward with labels gives no logits; forward takes skip_logits=False to have them, or True to do
    without in evaluation. All models of a family share one rotary function: all of
    them get ours, with equal results, until the next swap or unswap finds no swapped model of the family.
    The gradient of a gradient is not available. ValueError for a model that is swapped already.
    """
    inner = base_of(model)
    if any(isinstance(x, Swapped) and x.longlora_swapped for x in inner.modules()):
        raise ValueError("swap: this model is swapped already")
    _release_rotary()
    counts = dict.fromkeys((*_PARTS, "rope"), 0)
    for module in list(inner.modules()):
        kind = None if _is_linear(module) else _put(module)  # of the linears only heads are parts
        if kind is not None:
            counts[kind] += 1
        if kind == "linear_cross_entropy":
            for head in _heads(module, module.longlora_head):
                _put(head)
        counts["rope"] += _swap_rotary(module, inner)
    del counts["head"]
    return counts


def _put(module: Any) -> str | None:
    """Give a module the class whose forward is ours -> its kind; None for a module that stays."""
    if isinstance(module, Swapped):
        if _PARTS[module.longlora_kind][1](module):
            module.longlora_swapped = True
            return module.longlora_kind
        return None
    kind: Any = type(module)
    made = _class_of(kind)
    if made is None or "forward" in module.__dict__ or not _PARTS[made.longlora_kind][1](module):
        return None
    module.__class__ = made
    return made.longlora_kind


def unswap(model: Model) -> Model:
    """Undo swap: give every module its own class again -> model."""
    inner = base_of(model)
    for module in inner.modules():
        if isinstance(module, Swapped):
            if "longlora_base" in vars(type(module)):
                module.__class__ = module.longlora_base
                module.__dict__.pop("longlora_swapped", None)
            else:  # FSDP2 has made a class of it
                module.longlora_swapped = False
    for _, users in _rotated.values():
        users.discard(inner)
    _release_rotary()
    return model
