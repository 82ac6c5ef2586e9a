"""attn_implementation="longlora_s2" of transformers: S²-Attn in training, else dense causal attention.

Two functions stand in transformers' public registries. `mask` is called once for a forward pass. It turns
padding and packing into document boundaries, cu_seqlens [B,S] int32. `attention` is called by every layer. It
also looks at position_ids and cu_seq_lens_q, because transformers leaves some document boundaries out of its
masks. Masks that document boundaries cannot express stay 4-D and are refused while training. With a key/value
cache, transformers' own SDPA attends.
"""

from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

from longlora import ops as raw
from longlora.torch import ops

NAME = "longlora_s2"
# What other models ask of their attention and this one does not compute; None and False ask for nothing.
REFUSED = {
    "s_aux": "attention sinks",
    "softcap": "soft-capped scores",
    "position_bias": "a position bias",
    "head_mask": "a head mask",
    "output_attentions": "returned attention weights",
    "cache": "a paged cache",
}
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
    if hasattr(inner, "set_attn_implementation"):
        inner.set_attn_implementation(NAME)
    else:  # transformers before 4.54
        for config in configs.values():
            config._attn_implementation = NAME
    if inner.config._attn_implementation != NAME:
        raise ValueError(
            f"configure: {type(inner).__name__} has no AttentionInterface, so its attention cannot be set"
        )
    return model


def base_of(model: torch.nn.Module) -> Any:
    """The transformers model inside a PeftModel, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def group_size_of(config: Any, T: int) -> int:
    """The tokens of a group for sequences of T tokens: as configured, or a quarter."""
    return getattr(config, "longlora_group_size", None) or raw.quarter_group(T)


# ---- document boundaries: cu_seqlens [B,S] int32, where short rows repeat T at their end


def _at_pairs(function, b, q, k):
    """What a mask function of transformers gives at the pairs (q, k) of every sequence -> bool [B,T]."""
    return function(b, torch.zeros((), dtype=torch.long, device=b.device), q, k).expand(
        b.shape[0], q.shape[1]
    )


def _boundaries(starts):
    """starts [B,T] bool, true where a document begins -> cu_seqlens."""
    B, T = starts.shape
    at = torch.where(starts, torch.arange(T, device=starts.device), T).sort(1).values
    if not torch.compiler.is_compiling():
        at = at[:, : int(starts.sum(1).max())]
    return torch.cat([at, at.new_full((B, 1), T)], 1).to(torch.int32)


def _documents(function, padding, B, T, device):
    """The cu_seqlens that equal mask `function` with `padding` [B,T] bool or None, None where none do.

    A token sees its own document up to itself, and nothing else. Padding is a document that no token reads.
    """
    b, t = torch.arange(B, device=device)[:, None], torch.arange(T, device=device)[None]
    apart = ~_at_pairs(function, b, t, (t - 1).clamp(min=0))
    apart[:, :1] = True
    starts = apart
    if padding is not None:
        change = torch.zeros_like(apart)
        change[:, 1:] = padding[:, 1:] != padding[:, :-1]
        starts = apart | change
    if torch.compiler.is_compiling():
        return _boundaries(starts)
    # Three pairs of each token stand for the whole mask [T,T]: with the first token of its document, the next
    # token, and the last token of the document before.
    first = torch.where(starts, t, 0).cummax(1).values
    exact = (
        _at_pairs(function, b, t, first).all()
        and not (_at_pairs(function, b, t, (t + 1).clamp(max=T - 1)) & (t < T - 1)).any()
    )
    before = _at_pairs(function, b, t, (first - 1).clamp(min=0)) & apart.gather(1, first) & (first > 0)
    exact = exact and not before.any()
    if padding is not None:  # tokens after a gap of padding would see those before it
        exact = exact and bool(((change & padding).sum(1) + padding[:, 0] <= 1).all())
    return _boundaries(starts) if exact else None


def _version(x):
    """A number that changes when x is written to."""
    return 0 if x.is_inference() else x._version


def _from_4d(given, T):
    """The cu_seqlens that equal a 4-D mask [B,1,T,T], None for a plain causal one; ValueError where none do.

    The answer is kept on the mask, because every layer asks.
    """
    kept, version = getattr(given, "longlora_boundaries", None), _version(given)
    if kept is None or kept[0] != version:
        seen = given if given.dtype == torch.bool else given == 0
        if given.shape[1] != 1 or given.shape[-2:] != (T, T):
            raise ValueError(
                f"longlora_s2: a 4-D attention mask should be [B,1,{T},{T}], got {list(given.shape)}"
            )
        seen = seen[:, 0]
        starts = torch.ones(seen.shape[:2], dtype=torch.bool, device=seen.device)
        starts[:, 1:] = ~seen.diagonal(-1, 1, 2)
        number = starts.cumsum(1)
        causal = torch.ones(T, T, dtype=torch.bool, device=seen.device).tril()
        if not torch.equal(seen, (number[:, :, None] == number[:, None]) & causal):
            raise ValueError(
                "longlora_s2: this 4-D attention mask is not causal attention within documents, and S2-Attn "
                "cannot train with it; give a 2-D mask or position_ids, or use another attn_implementation"
            )
        found = _boundaries(starts)
        kept = given.longlora_boundaries = version, None if found.shape[1] == 2 else found
    return kept[1]


def _with_restarts(cu_seqlens, position_ids, B, T):
    """cu_seqlens, or None, and the boundaries where position_ids [B,T] start again.

    The masks of transformers have those only where there is no padding mask. Positions of padding do not
    count. The answer is kept on position_ids, because every layer asks.
    """
    kept, version = getattr(position_ids, "longlora_boundaries", None), _version(position_ids)
    if kept is None or kept[0] is not cu_seqlens or kept[1] != version:
        p = position_ids.expand(B, T)
        starts = torch.zeros(B, T + 1, dtype=torch.bool, device=position_ids.device)
        starts[:, 0] = True
        if cu_seqlens is not None:
            starts.scatter_(1, cu_seqlens.long(), True)
        starts, restarts = starts[:, :T], p[:, 1:] <= p[:, :-1]
        seen = getattr(cu_seqlens, "longlora_seen", None)
        if seen is not None:
            restarts = restarts & seen[:, 1:] & seen[:, :-1]
        restarts = torch.nn.functional.pad(restarts, (1, 0))
        found = _boundaries(starts | restarts) if (restarts & ~starts).any() else cu_seqlens
        kept = position_ids.longlora_boundaries = cu_seqlens, version, found
    return kept[2]


def _cu_seqlens(attention_mask, how, B, T):
    """The document boundaries of an attention call, from its mask and its keywords; None for one document."""
    if attention_mask is not None and attention_mask.ndim != 2:
        return _from_4d(attention_mask, T)
    found, position_ids = attention_mask, how.get("position_ids")
    if position_ids is not None and position_ids.ndim == 2 and not torch.compiler.is_compiling():
        found = _with_restarts(found, position_ids, B, T)
    if found is None and how.get("cu_seq_lens_q") is not None:
        found = how["cu_seq_lens_q"].to(torch.int32)
    return found


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
) -> Tensor | None:
    """Make the mask of a forward pass, as AttentionMaskInterface wants it.

    -> None for plain causal attention, cu_seqlens [B,S] int32 for documents, else the 4-D mask that SDPA
    takes. cache_position is what transformers 4 passes in place of q_length, q_offset and device.
    """
    where: dict[str, Any] = {"q_length": q_length, "q_offset": q_offset, "device": device}
    length = q_length
    if cache_position is not None:
        where, length = {"cache_position": cache_position}, cache_position.shape[0]
        device = cache_position.device
    square = length == kv_length and isinstance(q_offset, int) and q_offset == 0 and kv_offset == 0
    if square and mask_function is causal_mask_function and attention_mask is None:
        return None
    window = how.get("local_size") is not None and kv_length > how["local_size"]
    if square and not (torch.compiler.is_compiling() and (window or how.get("use_vmap"))):
        padding = None if attention_mask is None else attention_mask[:, :length].bool()
        found = _documents(mask_function, padding, batch_size, length, torch.device(device or "cpu"))
        if found is not None:
            found.longlora_seen = padding  # for _with_restarts
            return None if found.shape[1] == 2 else found
    return sdpa_mask(
        batch_size=batch_size,
        kv_length=kv_length,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **where,
        **how,
    )


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


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **how: Any,
) -> tuple[Tensor, None]:
    """Attend for one layer, as AttentionInterface wants it -> out [B,T,H,D], None.

    query [B,H,T,D], key and value [B,K,S,D], attention_mask as `mask` makes it. ValueError for anything
    that is asked for and not computed.
    """
    for name, what in REFUSED.items():
        if how.get(name) is not None and how[name] is not False:
            raise ValueError(f"longlora_s2: {what} ({name}) is not supported")
    if is_causal is False or not getattr(module, "is_causal", True):
        raise ValueError(
            f"longlora_s2: {type(module).__name__} is not causal; only causal attention is supported"
        )
    T, S, config = query.shape[2], key.shape[2], module.config
    documents = attention_mask is None or attention_mask.ndim == 2
    if not module.training and (T != S or not documents):
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=0.0,
            scaling=scaling,
            is_causal=is_causal,
            **how,
        )
    group_size, boundary, shift = max(T, 1), "split", "none"
    if module.training:
        _refuse_training(T, S, dropout, how.get("sliding_window"))
        group_size, boundary = group_size_of(config, T), getattr(config, "longlora_boundary", "split")
        shift = getattr(config, "longlora_shift", "half")
    cu_seqlens = _cu_seqlens(attention_mask, how, query.shape[0], T)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    parallel = getattr(module, "_longlora_cp", None)  # set by context_parallel.enable
    if parallel is not None:
        window = how.get("sliding_window")
        settings = dict(boundary=boundary, shift=shift, scale=scaling, window=window)
        return parallel(module, q, k, v, cu_seqlens=cu_seqlens, **settings), None
    return ops.s2_attention(
        q, k, v, group_size=group_size, boundary=boundary, shift=shift, cu_seqlens=cu_seqlens, scale=scaling
    ), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)
