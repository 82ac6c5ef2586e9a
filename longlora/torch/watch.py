"""Forward passes of models that attend by S²-Attn, as hooks see them.

A model that is loaded with a registered attention function may call it, or not. So its first training pass is
checked. Every pass also keeps its position_ids, because many models do not show them to their attention.
"""

import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from longlora.torch.documents import RECURRENT

_CHECKED = "_longlora_checked"  # set on a model whose first training pass was right


class _Pass:
    """A forward pass of a watched model. Others may run inside it, such as the base model and towers."""

    def __init__(self, model, kwargs):
        self.model, self.names, self.position_ids = model, set(kwargs), kwargs.get("position_ids")
        self.asked = set()  # the ids of the modules of this model that have called the attention function
        self.ran = {}  # id -> attention module of this model that has run
        self.packed = []  # for each mask, whether it has several documents in a sequence
        self.served = 0  # the calls that our kernel has served, in passes inside this one as well
        self.others = set()  # the classes that attend by themselves, beside some that do not
        self.counts, self.hooks = False, []

    def count(self):
        """Let each attention module say that it runs."""
        self.counts = True
        for module in self.model.modules():
            if _is_attention(module) and not any(map(_is_attention, list(module.modules())[1:])):
                self.hooks.append(module.register_forward_pre_hook(_runs))

    def end(self, outer):
        """Remove the hooks, and tell the pass around this one, if there is one, what was found here."""
        for hook in self.hooks:
            hook.remove()
        if self.served:
            silent = [module for key, module in self.ran.items() if key not in self.asked]
            config = self.model.config.get_text_config()
            self.others |= {type(module).__name__ for module in silent if not _is_recurrent(module, config)}
        if outer is not None:
            outer.served += self.served
            outer.others |= self.others

    def check(self):
        """ValueError if attention layers of the model have not attended by S²-Attn, or none has."""
        name = type(self.model).__name__
        if not self.served:
            raise ValueError(
                f"longlora_s2: {name} has not called S2-Attn in its first training pass: it has no causal "
                "attention that can be chosen; use another attn_implementation"
            )
        if self.others:
            raise ValueError(
                f"longlora_s2: {', '.join(sorted(self.others))} of {name} attends by itself, not by S2-Attn; "
                "use another attn_implementation"
            )


class _Passes(threading.local):
    def __init__(self):
        self.stack = []  # the outermost first


_passes = _Passes()
_inside: weakref.WeakKeyDictionary[torch.nn.Module, frozenset[int]] = weakref.WeakKeyDictionary()


def _watched_inside(model):
    """The ids of the watched models inside of `model`. They do not change: adapters wrap smaller parts."""
    if model not in _inside:
        parts = (m for m in model.modules() if m is not model and _before in m._forward_pre_hooks.values())
        _inside[model] = frozenset(map(id, parts))
    return _inside[model]


def _is_attention(module):
    return type(module).__name__.endswith("Attention")


def _is_recurrent(module, config):
    """Whether this is the linear attention of a hybrid, which has a state in place of scores."""
    types, index = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    return types is not None and index is not None and types[index] in RECURRENT


def _runs(module, args):
    if _passes.stack:
        _passes.stack[-1].ran[id(module)] = module


def _before(model, args, kwargs):
    if torch.compiler.is_compiling():
        return
    stack = _passes.stack
    while stack and id(model) not in _watched_inside(stack[-1].model):
        stack.pop().end(None)  # it was interrupted
    stack.append(_Pass(model, kwargs))
    if len(stack) == 1 and model.training and not getattr(model, _CHECKED, False):
        stack[0].count()


def _after(model, args, output):
    if torch.compiler.is_compiling():
        return
    stack = _passes.stack
    at = next((i for i, found in enumerate(stack) if found.model is model), None)
    if at is None:
        return
    now = stack[at]
    del stack[at:]
    now.end(stack[-1] if stack else None)
    if now.counts and output is not None:
        now.check()
        setattr(model, _CHECKED, True)


def watch(model: torch.nn.Module) -> None:
    """Watch the forward passes of a transformers model.

    Its first training pass raises ValueError if an attention layer has not attended by S²-Attn, or none has.
    """
    if _before not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_before, with_kwargs=True)
        model.register_forward_hook(_after, always_call=True)


def note(module: torch.nn.Module, served: bool) -> None:
    """Say that `module` has called the attention function, and whether our kernel serves the call."""
    if _passes.stack:
        _passes.stack[-1].asked.add(id(module))
        _passes.stack[-1].served += served


def positions(B: int, T: int) -> Tensor | None:
    """The position_ids [B,T] or [1,T] that the model was given, if they are for these tokens."""
    found: Any = _passes.stack[-1].position_ids if _passes.stack else None
    fits = isinstance(found, Tensor) and found.ndim == 2 and found.shape[0] in (1, B) and found.shape[1] == T
    return found if fits else None


def remember(packed: Tensor | bool) -> None:
    """Keep for this pass whether a mask of it has several documents in a sequence."""
    if _passes.stack:
        _passes.stack[0].packed.append(packed)


def packed() -> bool:
    """Whether a mask of this pass has several documents in a sequence."""
    return bool(_passes.stack) and any(map(bool, _passes.stack[0].packed))


def is_argument(name: str) -> bool:
    """Whether the keyword argument `name` of an attention call may be the model's own, passed on."""
    return not _passes.stack or any(name in found.names for found in _passes.stack)
