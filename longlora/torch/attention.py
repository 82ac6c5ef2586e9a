"""attn_implementation="longlora_s2" of transformers: S²-Attn in training, else dense causal attention.

Two functions stand in transformers' public registries. `mask` is called once for a forward pass. It turns
padding, packing and position_ids that start again into Documents. `attention` is called by every layer. A
mask that no Documents equal stays 4-D and is refused while training. Transformers' own SDPA attends where a
sequence does not attend causally to itself: in towers, in cross-attention and with a key/value cache.
"""

import functools
import math
import sys
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    AttentionMaskInterface,
    and_masks,
    causal_mask_function,
    packed_sequence_mask_function,
    sdpa_mask,
)

from longlora import ops as raw
from longlora.torch import ops, watch
from longlora.torch.documents import Documents, keep_apart, of_4d, of_function, restarts

NAME = "longlora_s2"
# What other models ask of their attention and this one does not compute; None and False ask for nothing.
REFUSED = {
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "softcap": "soft-capped scores",
    "position_bias": "a position bias",
    "head_mask": "a head mask",
    "indices": "attention to selected tokens",
    "block_indices": "attention to selected blocks",
    "output_attentions": "returned attention weights",
    "cache": "a paged cache",
}
# Tensors that models pass on to every attention function, and that change nothing here.
KNOWN = {"position_ids", "cache_position", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
Model = TypeVar("Model", bound=torch.nn.Module)


def configure(
    model: Model, group_size: int | None = None, boundary: str = "split", shift: str = "half"
) -> Model:
    """Let `model`, a transformers model or a PeftModel around one, train with S²-Attn -> model.

    group_size: tokens of a group; None for a quarter of each sequence. boundary: "split", "wrap" or "swap".
    shift: "half", "none" or "all" of the heads. They are as in longlora.ops.s2_attention_forward, and are
    kept in the model's config, so save_pretrained writes them. ValueError for a setting out of range, or a
    model whose attention cannot be chosen. LongLoRA (arXiv 2309.12307) section 3.2.
    """
    if group_size is not None and (
        isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1
    ):
        raise ValueError(f"configure: group_size should be None or an integer above 0, got {group_size!r}")
    for name, value, choices in (("boundary", boundary, raw.BOUNDARIES), ("shift", shift, raw.SHIFTS)):
        if value not in choices:
            raise ValueError(f"configure: {name} should be one of {', '.join(choices)}, got {value!r}")
    configs = {
        id(m.config): m.config
        for m in model.modules()
        if hasattr(m, "config") and hasattr(m.config, "to_dict")
    }
    for config in configs.values():
        config.longlora_group_size = group_size
        config.longlora_boundary = boundary
        config.longlora_shift = shift
    inner = base_of(model)
    _can_be_set(inner)
    if hasattr(inner, "set_attn_implementation"):
        inner.set_attn_implementation(NAME)
    else:  # transformers before 4.54
        for config in configs.values():
            config._attn_implementation = NAME
    if inner.config._attn_implementation != NAME:
        raise ValueError(_NO_INTERFACE.format(f"configure: {type(inner).__name__}"))
    watch.watch(inner)
    return model


_NO_INTERFACE = "{} has no AttentionInterface, so its attention cannot be set"


def _can_be_set(model):
    """ValueError if transformers can set the attention of no part of the model."""
    parts = [m for m in model.modules() if hasattr(m, "_can_set_attn_implementation")]  # since transformers 5
    if parts and not any(m._can_set_attn_implementation() for m in parts):
        raise ValueError(_NO_INTERFACE.format(f"configure: {type(model).__name__}"))


def base_of(model: torch.nn.Module) -> Any:
    """The transformers model inside a PeftModel, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def group_size_of(config: Any, T: int) -> int:
    """The tokens of a group for sequences of T tokens: as configured, or a quarter."""
    return getattr(config, "longlora_group_size", None) or raw.quarter_group(T)


# ---- the two functions of transformers' registries


def mask(
    batch_size: int,
    kv_length: int,
    q_length: int | None = None,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    cache_position: Tensor | None = None,
    device: torch.device | str | None = None,
    **how: Any,
) -> Documents | Tensor | None:
    """Make the mask of a forward pass, as AttentionMaskInterface wants it.

    -> Documents where they equal the mask, else the 4-D mask that SDPA takes. cache_position is what
    transformers 4 passes in place of q_length, q_offset and device.
    """
    where: dict[str, Any] = {"q_length": q_length, "q_offset": q_offset, "device": device}
    length: Any = q_length
    if cache_position is not None:
        where, length = {"cache_position": cache_position}, cache_position.shape[0]
        device = cache_position.device
    # One token needs no mask. A cache of several kinds of layers may give it the wrong number of keys.
    if length == kv_length > 1 and isinstance(q_offset, int) and q_offset == 0 and kv_offset == 0:
        padding = None if attention_mask is None else attention_mask[:, :length].bool()
        tokens = batch_size, length, torch.device(device or "cpu")
        found, mask_function = _square(mask_function, padding, *tokens, how)
        if found is not None:
            return found
    return sdpa_mask(
        batch_size=batch_size,
        kv_length=kv_length,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **where,
        **how,
    )


def _square(function, padding, B, T, device, how):
    """The mask of T tokens for themselves -> its Documents or None, and the function of a 4-D mask.

    Both keep documents apart whose position_ids start again. ValueError if the model cannot.
    """
    config, compiling = how.get("config"), torch.compiler.is_compiling()
    model = getattr(config, "model_type", "this")
    window = how.get("local_size") is not None and T > how["local_size"]
    # A model that always wants a 4-D mask computes with it. A function from elsewhere may be any mask.
    reads = function is causal_mask_function and how.get("allow_is_causal_skip") is False
    found = None
    if not (reads or how.get("use_vmap") or compiling and window):
        found = of_function(function, padding, B, T, device, model)
    position_ids = None if compiling else watch.positions(B, T)
    if found is not None:
        if position_ids is not None:
            found = found.restarted(position_ids, B)
        keep_apart(found, config)
        watch.remember(found.packed)
    elif position_ids is not None:
        again = restarts(position_ids, padding, B, T).to(device)
        watch.remember(again.any())
        if bool(again.any()):
            keep_apart(Documents(T, packed=True, model=model), config)
            function = and_masks(function, packed_sequence_mask_function(again.cumsum(1)))
            how["allow_is_causal_skip"] = False
    return found, function


def _refuse(module, how):
    """ValueError for what an attention module asks for and this one does not compute."""
    for name, value in how.items():
        if value is None or value is False:
            continue
        what = REFUSED.get(name)
        if what is None and isinstance(value, Tensor) and name not in KNOWN and not watch.is_argument(name):
            what = "a tensor that is unknown here"
        if what is not None:
            raise ValueError(f"longlora_s2: {what} ({name}) of {type(module).__name__} is not supported")


def _refuse_training(T, S, dropout, window):
    """ValueError for what S²-Attn does not train with."""
    if window is not None and T > window:
        raise ValueError(
            f"longlora_s2: a sliding window of {window} tokens is active at {T}; S2-Attn cannot train with it"
        )
    if dropout:
        raise ValueError(
            f"longlora_s2: dropout of attention weights is not supported, got {dropout} "
            "(config.attention_dropout)"
        )
    if T != S:
        raise ValueError(
            f"longlora_s2: in training there should be a key for each query, got {T} queries and {S} keys"
        )


def _documents(module, query, S, given, causal, how):
    """The Documents of an attention call, or None where transformers' SDPA attends with `given`."""
    B, T, config = query.shape[0], query.shape[2], module.config
    name, model = type(module).__name__, getattr(config, "model_type", "this")
    if isinstance(given, Documents):
        found = given
        if (T, S) != (found.length, found.length):
            raise ValueError(
                f"longlora_s2: the mask of {name} is for {found.length} tokens, got {T} queries and {S} keys"
            )
    elif given is not None and given.ndim != 4:
        raise ValueError(f"longlora_s2: the attention mask of {name} should have 4 axes, got {given.ndim}")
    elif not causal or not module.training and (T != S or given is not None):
        if not causal and T != S and watch.packed():
            raise ValueError(
                f"longlora_s2: packed documents are not supported beside {name}, which may see all of them; "
                "give each its own row"
            )
        return None
    elif given is not None:
        return keep_apart(of_4d(given, B, T, name, model), config)
    else:
        found = Documents(T, model=model)
    position_ids, ends = how.get("position_ids"), how.get("cu_seq_lens_q")
    if isinstance(position_ids, Tensor) and position_ids.ndim == 2 and position_ids.shape[1] == T:
        found = found.restarted(position_ids, B)
    if found.cu_seqlens is None and ends is not None:
        found = Documents(T, ends.to(torch.int32), packed=ends.shape[-1] > 2, model=model)
    return keep_apart(found, config)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Documents | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **how: Any,
) -> tuple[Tensor, None]:
    """Attend for one layer, as AttentionInterface wants it -> out [B,T,H,E], None.

    query [B,H,T,D], key [B,K,S,D], value [B,K,S,E], attention_mask as `mask` makes it. ValueError for
    anything that is asked for and not computed.
    """
    _refuse(module, how)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    T, S, config = query.shape[2], key.shape[2], module.config
    if module.training and (causal or isinstance(attention_mask, Documents)):
        _refuse_training(T, S, dropout, how.get("sliding_window"))
    documents = _documents(module, query, S, attention_mask, causal, how)
    watch.note(module, documents is not None)
    parallel = getattr(module, "_longlora_cp", None)  # set by context_parallel.enable
    if documents is None and parallel is None:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **how,
        )
    scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    group_size, boundary, shift = max(T, 1), "split", "none"
    if module.training:
        group_size, boundary = group_size_of(config, T), getattr(config, "longlora_boundary", "split")
        shift = getattr(config, "longlora_shift", "half")
    q, k, v = (x.transpose(1, 2) for x in _of_one_width(query, key, value))
    if parallel is not None:
        settings = dict(boundary=boundary, shift=shift, scale=scale, window=how.get("sliding_window"))
        out = parallel(module, q, k, v, documents=documents, **settings)
    else:
        out = ops.s2_attention(
            q,
            k,
            v,
            group_size=group_size,
            boundary=boundary,
            shift=shift,
            cu_seqlens=documents.cu_seqlens,
            scale=scale,
        )
    return out if out.shape[-1] == value.shape[-1] else out[..., : value.shape[-1]], None


def _of_one_width(query, key, value):
    """The three with zeros at the end of the narrower heads. They change neither scores nor the sums."""
    D = max(query.shape[-1], value.shape[-1])
    return [x if x.shape[-1] == D else functional.pad(x, (0, D - x.shape[-1])) for x in (query, key, value)]


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)


def _watch_what_is_loaded():
    """Watch every model that gets this attention by name, which never comes to `configure`."""
    theirs = getattr(PreTrainedModel, "get_correct_attn_implementation", None)  # since transformers 5
    if theirs is None:
        return

    @functools.wraps(theirs)
    def ours(self, *args, **kwargs):
        found = theirs(self, *args, **kwargs)
        if found == NAME:
            for name, classes in vars(sys.modules[type(self).__module__]).items():
                if name.endswith("_ATTENTION_CLASSES") and NAME not in classes:
                    raise ValueError(_NO_INTERFACE.format(f"longlora_s2: {type(self).__name__}"))
            watch.watch(self)
        return found

    setattr(PreTrainedModel, theirs.__name__, ours)


_watch_what_is_loaded()
