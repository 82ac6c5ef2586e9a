"""Context parallelism in a transformers model: enable and disable."""

import inspect
from typing import Any, TypeVar

import torch

from longlora.torch.context_parallel.attention import s2_attention
from longlora.torch.context_parallel.ranks import agree, lengths, positions, process_group

Model = TypeVar("Model", bound=torch.nn.Module)


def _refused(model, kwargs):
    """The error in the arguments of a model's forward pass, or None."""
    mask = kwargs.get("attention_mask")
    if not model.training:
        return NotImplementedError(
            "context parallel: only training is done over several ranks; call disable(model) or "
            "model.train() first"
        )
    if mask is not None and not bool((mask == 1).all()):
        return ValueError(
            "context parallel: attention_mask should be None or all ones, got one that hides tokens; "
            "padding at the right end needs no mask, only targets of -100"
        )
    for name in ("past_key_values", "cache"):  # what transformers calls it until 5.23, and later
        if kwargs.get(name) is not None:
            return ValueError(f"context parallel: {name} should be None, got a cache")
    if kwargs.get("labels") is not None and kwargs.get("shift_labels") is None:
        return ValueError(
            "context parallel: labels would be shifted inside each piece, and its last target would be lost; "
            "use next_tokens, split and loss of longlora.torch.context_parallel"
        )
    return None


class _Parallel:
    """The state of an enabled model: hooks around its forward pass, called by its attention modules."""

    def __init__(self, group):
        self.group = group
        self.lengths = None  # the pieces' lengths during a forward pass
        self.seen = set()  # the lengths of all forward passes
        self.compared = False  # whether the ranks have compared the arguments of an attention call
        self.hooks = []

    def __deepcopy__(self, memo):
        return self

    def before(self, model, args, kwargs):
        """Refuse what pieces cannot do, agree on the lengths, and give the model the positions of its
        piece."""
        x = args[0] if args else kwargs.get("input_ids")
        x = kwargs.get("inputs_embeds") if x is None else x
        given = kwargs.get("position_ids")
        if x is None or len(args) > 1:
            raise TypeError(
                "context parallel: input_ids or inputs_embeds should be given, all arguments but the first "
                "by name"
            )
        B, T = x.shape[:2]
        facts = {"T": T, "B": B, "position_ids": given is not None}
        self.lengths = agree("context parallel", facts, _refused(model, kwargs), self.group, x.device)
        self.seen.add(self.lengths)
        whole = positions(self.lengths, self.group, x.device)[None]
        if given is not None:
            error = None
            if given.shape[-1] != T or not bool((given == whole).all()):
                error = ValueError(
                    "context parallel: position_ids should be those of the piece in the whole sequence, or "
                    "None; packed documents are not supported"
                )
            agree("context parallel", {"T": T}, error, self.group, x.device)
        kwargs.update(attention_mask=None, position_ids=whole)
        kwargs.setdefault("use_cache", False)
        return args, kwargs

    def after(self, *_):
        self.lengths = None

    def __call__(self, module, q, k, v, *, documents, boundary, shift, scale, window):
        """Attend for a module of the model: q [B,T,H,D], k and v [B,T,K,D] of its piece -> out [B,T,H,D]."""
        from longlora.torch.attention import group_size_of  # needs transformers; the rest here does not

        if not module.training:
            raise NotImplementedError(
                "context parallel: only training is done over several ranks, got a module in eval mode"
            )
        sizes = self.lengths
        if sizes is None:
            # Outside of the model's forward pass, this recomputes checkpointed layers in the backward pass.
            if torch._C._current_graph_task_id() < 0:
                raise RuntimeError(
                    "context parallel: call the model that enable() was given, not one inside or around it"
                )
            # All ranks have seen the same lengths, so either all of them ask or none does.
            sizes = (
                next(iter(self.seen)) if len(self.seen) == 1 else lengths(q.shape[1], self.group, q.device)
            )
        if documents is None:
            raise ValueError(
                f"context parallel: {type(module).__name__} does not attend causally to its own tokens"
            )
        if documents.cu_seqlens is not None:
            raise ValueError(
                "context parallel: packed documents and padding are not supported, got an attention mask"
            )
        if window is not None and sum(sizes) > window:
            raise ValueError(
                f"context parallel: a sliding window of {window} tokens is active at {sum(sizes)}"
            )
        out = s2_attention(
            q,
            k,
            v,
            group_size=group_size_of(module.config, sum(sizes)),
            group=self.group,
            boundary=boundary,
            shift=shift,
            scale=scale,
            lengths=sizes if self.compared else None,
        )
        self.compared = True
        return out


def _check(model):
    """ValueError for a model that would compute something else in pieces."""
    from longlora.torch.attention import NAME, base_of  # needs transformers; the rest here does not
    from longlora.torch.documents import carries_state

    name, inner = model.config._attn_implementation, base_of(model)
    if name != NAME:
        raise ValueError(f'enable: model should have attn_implementation="{NAME}", got {name!r}')
    kind = type(inner).__name__
    if carries_state(inner.config):
        raise ValueError(
            f"enable: {kind} has linear attention or convolutions, whose state does not go from piece to "
            "piece"
        )
    if "position_ids" not in inspect.signature(type(inner).forward).parameters:
        raise ValueError(f"enable: {kind} takes no position_ids, and would begin each piece at position 0")
    if any(hasattr(module, "create_position_ids_from_input_ids") for module in inner.modules()):
        raise ValueError(f"enable: {kind} counts positions from its padding, not from 0")


def enable(model: Model, mesh: Any) -> Model:
    """Let the transformers model attend over the ranks of mesh while it trains, each with its piece -> model.

    model: one with attn_implementation="longlora_s2", or the PeftModel around it, before DDP or FSDP2 wrap
    it. The group size is that of configure(), or a quarter of the whole sequence. mesh: as `group` of
    s2_attention. Each call of the model takes input_ids [B,T] or inputs_embeds [B,T,C] of this rank's
    piece. The ranks tell each other their lengths once, and position_ids become those of the whole
    sequence. The loss is `loss`.

    ValueError for another attn_implementation, and for models that would compute something else in pieces:
    with a state or convolutions along the sequence, or without position_ids that begin at 0. A forward pass
    raises ValueError, on every rank, for a mask that hides tokens, labels that would be shifted inside the
    piece, packed documents and caches, and NotImplementedError for evaluation.
    """
    _check(model)
    disable(model)
    state = _Parallel(process_group("enable", mesh))
    for module in model.modules():
        module._longlora_cp = state
    state.hooks = [
        model.register_forward_pre_hook(state.before, with_kwargs=True),
        model.register_forward_hook(state.after, always_call=True),
    ]
    return model


def disable(model: Model) -> Model:
    """Undo enable -> model."""
    for module in model.modules():
        state = module.__dict__.pop("_longlora_cp", None)
        for hook in state.hooks if state else ():
            hook.remove()
    return model
