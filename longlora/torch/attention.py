"""attn_implementation="longlora_s2" of transformers: S2-Attn while the model trains, dense causal attention otherwise.

Two functions stand in transformers' public registries. `mask` turns padding and packing into borders of documents, cu_seqlens,
[B,S] int32, once for a forward pass; `attention` is called by every layer, and sees also the position_ids and cu_seq_lens_q that
transformers leaves out of its masks. Masks that no borders can say stay 4-D and are refused while training. With a key/value
cache, transformers' own SDPA attends.
"""

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

from longlora import ops as raw
from longlora.torch import ops

NAME = "longlora_s2"
# What other models hand to their attention and this one does not do; None and False ask for nothing.
REFUSED = {
    "s_aux": "attention sinks",
    "softcap": "soft-capped scores",
    "position_bias": "a position bias",
    "head_mask": "a head mask",
    "output_attentions": "returned attention weights",
    "cache": "a paged cache",
}


def configure(model, group_size=None, boundary="split", shift="half"):
    """Train `model`, one of transformers or a PeftModel around it, with S2-Attn -> model. LongLoRA section 3.2.

    group_size in tokens, None for a quarter of each sequence; boundary "split", "wrap" or "swap", shift "half", "none" or "all"
    as in longlora.ops.s2_attention_forward. Kept in the model's config, and so in what save_pretrained writes. ValueError
    names what is out of range.
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
        config.longlora_group_size, config.longlora_boundary, config.longlora_shift = (
            group_size,
            boundary,
            shift,
        )
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if hasattr(inner, "set_attn_implementation"):
        inner.set_attn_implementation(NAME)
    else:  # transformers before 4.54
        for config in configs.values():
            config._attn_implementation = NAME
    if inner.config._attn_implementation != NAME:
        raise ValueError(
            f"configure: {type(inner).__name__} does not let its attention be chosen (no AttentionInterface)"
        )
    return model


def group_size_of(config, T):
    """Tokens of a group for sequences of T: as configured, or a quarter, even."""
    return getattr(config, "longlora_group_size", None) or raw.quarter_group(T)


def _rows(function, b, q, k):
    """A mask function of transformers at the pairs (q, k) of every sequence -> bool [B,T]."""
    return function(b, torch.zeros((), dtype=torch.long, device=b.device), q, k).expand(
        b.shape[0], q.shape[1]
    )


def _borders(starts):
    """starts [B,T] bool, true where a document begins -> cu_seqlens [B,S] int32; shorter rows repeat T."""
    B, T = starts.shape
    at = torch.where(starts, torch.arange(T, device=starts.device), T).sort(1).values
    if not torch.compiler.is_compiling():
        at = at[:, : int(starts.sum(1).max())]
    return torch.cat([at, at.new_full((B, 1), T)], 1).to(torch.int32)


def _documents(function, padding, B, T, device):
    """Borders that say the same as mask `function` and `padding` [B,T] bool or None; None when there are no such borders.

    A document's tokens see all of its own up to themselves and nothing else; what is padded is a document that nobody reads.
    """
    b, t = torch.arange(B, device=device)[:, None], torch.arange(T, device=device)[None]
    apart = ~_rows(function, b, t, (t - 1).clamp(min=0))
    apart[:, :1] = True
    starts = apart
    if padding is not None:
        change = torch.zeros_like(apart)
        change[:, 1:] = padding[:, 1:] != padding[:, :-1]
        starts = apart | change
    if torch.compiler.is_compiling():
        return _borders(starts)
    first = torch.where(starts, t, 0).cummax(1).values
    exact = (
        _rows(function, b, t, first).all()
        and not (_rows(function, b, t, (t + 1).clamp(max=T - 1)) & (t < T - 1)).any()
    )
    exact = (
        exact
        and not (_rows(function, b, t, (first - 1).clamp(min=0)) & apart.gather(1, first) & (first > 0)).any()
    )
    if padding is not None:  # tokens after a gap would see those before it
        exact = exact and bool(((change & padding).sum(1) + padding[:, 0] <= 1).all())
    return _borders(starts) if exact else None


def mask(
    batch_size,
    kv_length,
    q_length=None,
    q_offset=0,
    kv_offset=0,
    mask_function=causal_mask_function,
    attention_mask=None,
    cache_position=None,
    device=None,
    **how,
):
    """AttentionMaskInterface's function -> None for plain causal, cu_seqlens [B,S] int32, or a 4-D mask as SDPA takes it."""
    if cache_position is not None:  # transformers 4
        where, length = {"cache_position": cache_position}, cache_position.shape[0]
        device = cache_position.device
    else:
        where, length = {"q_length": q_length, "q_offset": q_offset, "device": device}, q_length
    square = length == kv_length and isinstance(q_offset, int) and q_offset == 0 and kv_offset == 0
    if square and mask_function is causal_mask_function and attention_mask is None:
        return None
    window = how.get("local_size") is not None and kv_length > how["local_size"]
    if square and not (torch.compiler.is_compiling() and (window or how.get("use_vmap"))):
        padding = None if attention_mask is None else attention_mask[:, :length].bool()
        found = _documents(mask_function, padding, batch_size, length, torch.device(device or "cpu"))
        if found is not None:
            found.longlora_seen = padding
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


def _version(x):
    """Changes when x is written to."""
    return 0 if x.is_inference() else x._version


def _from_4d(given, T):
    """cu_seqlens that say what a 4-D mask [B,1,T,T] says, None if it is plain causal; ValueError if nothing does."""
    kept, version = getattr(given, "longlora_borders", None), _version(given)
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
                "longlora_s2: this 4-D attention mask is not causal attention within documents; S2-Attn cannot "
                "train with it (switch to another attn_implementation, or give a 2-D mask or position_ids)"
            )
        found = _borders(starts)
        kept = given.longlora_borders = version, None if found.shape[1] == 2 else found
    return kept[1]


def _with_restarts(borders, position_ids, B, T):
    """borders, or None, and those where position_ids [B,T] start again: transformers' masks have these only without a padding mask.

    Positions of padding say nothing. The answer is kept on position_ids: every layer asks.
    """
    kept, version = getattr(position_ids, "longlora_borders", None), _version(position_ids)
    if kept is None or kept[0] is not borders or kept[1] != version:
        p, starts = (
            position_ids.expand(B, T),
            torch.zeros(B, T + 1, dtype=torch.bool, device=position_ids.device),
        )
        starts[:, 0] = True
        if borders is not None:
            starts.scatter_(1, borders.long(), True)
        starts, restarts = starts[:, :T], p[:, 1:] <= p[:, :-1]
        seen = getattr(borders, "longlora_seen", None)
        if seen is not None:
            restarts = restarts & seen[:, 1:] & seen[:, :-1]
        restarts = torch.nn.functional.pad(restarts, (1, 0))
        found = _borders(starts | restarts) if (restarts & ~starts).any() else borders
        kept = position_ids.longlora_borders = borders, version, found
    return kept[2]


def attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **how):
    """AttentionInterface's function. query [B,H,T,D], key and value [B,K,S,D] -> out [B,T,H,D], None.

    ValueError names what asks for something that is not computed; nothing is passed over.
    """
    for name, what in REFUSED.items():
        if how.get(name) is not None and how[name] is not False:
            raise ValueError(f"longlora_s2: {what} ({name}) is not supported")
    if is_causal is False or not getattr(module, "is_causal", True):
        raise ValueError(
            f"longlora_s2: {type(module).__name__} is not causal; only causal attention is supported"
        )
    T, S, config = query.shape[2], key.shape[2], module.config
    borders = attention_mask is not None and attention_mask.ndim == 2
    if not module.training and (T != S or attention_mask is not None and not borders):
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
    parallel = getattr(module, "_longlora_cp", None)  # context_parallel.enable's, which refuses by itself
    positions, cu_seqlens = how.get("position_ids"), attention_mask
    if (
        positions is not None
        and positions.ndim == 2
        and (cu_seqlens is None or borders)
        and not torch.compiler.is_compiling()
    ):
        cu_seqlens = _with_restarts(cu_seqlens, positions, query.shape[0], T)
    if cu_seqlens is None and how.get("cu_seq_lens_q") is not None:
        cu_seqlens = how["cu_seq_lens_q"].to(torch.int32)
    group_size, boundary, shift = max(T, 1), "split", "none"
    if module.training:
        window = how.get("sliding_window")
        if window is not None and T > window:
            raise ValueError(
                f"longlora_s2: a sliding window of {window} tokens is active at {T}; S2-Attn does not train with one"
            )
        if dropout:
            raise ValueError(
                f"longlora_s2: dropout of attention weights is not supported, got {dropout} (config.attention_dropout)"
            )
        if T != S:
            raise ValueError(
                f"longlora_s2: in training there should be a key for each query, got {T} queries and {S} keys"
            )
        if not borders and attention_mask is not None:
            cu_seqlens = _from_4d(attention_mask, T)
        group_size, boundary = group_size_of(config, T), getattr(config, "longlora_boundary", "split")
        shift = getattr(config, "longlora_shift", "half")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if parallel is not None:
        return parallel(
            module,
            q,
            k,
            v,
            cu_seqlens=cu_seqlens,
            boundary=boundary,
            shift=shift,
            scale=scaling,
            window=how.get("sliding_window"),
        ), None
    return ops.s2_attention(
        q, k, v, group_size=group_size, boundary=boundary, shift=shift, cu_seqlens=cu_seqlens, scale=scaling
    ), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)
