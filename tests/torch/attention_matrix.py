"""What becomes of the attention of a tiny model of any family of transformers with "longlora_s2".

Right values are those of transformers: its eager attention, and eager attention with the reference's mask of
S²-Attn on top of transformers' own mask. A family is right if every check holds. It is refused if longlora
raises an error of its own that names the model. Anything else is a fault.
"""

import inspect
import traceback
from pathlib import Path

import reference
import torch
from devices import put
from families import SMALL, G
from family_configs import ABSENT, CONFIGS
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

import longlora
import longlora.torch

T = 20
# What CONFIGS lacks for a causal model of the family with attention that can be told from uniform.
MORE = {
    "blt": dict(
        encoder_hash_byte_group_vocab=50,
        **{
            f"{part}_config": dict(
                vocab_size=61,
                hidden_size=32,
                hidden_size_global=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
            )
            for part in ("patcher", "encoder", "decoder", "global")
        },
    ),
    "codegen": dict(rotary_dim=8),
    "gemma3n_text": dict(
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"],
        activation_sparsity_pattern=[0.0, 0.0],
        laurel_rank=4,
        vocab_size_per_layer_input=61,
        hidden_size_per_layer_input=8,
    ),
    "gptj": dict(rotary_dim=8),
    "inkling2_loop_text": dict(swa_num_key_value_heads=2),
    "inkling2_text": dict(swa_num_key_value_heads=2),
    "lara_mini": dict(layer_types=["linear_attention", "sliding_attention"]),
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "minimax_m3_vl_text": dict(
        layer_types=["full_attention", "minimax_m3_sparse"],
        index_n_heads=2,
        index_head_dim=8,
        index_block_size=4,
        index_topk_blocks=2,
    ),
    "mpt": dict(d_model=32, n_heads=4, n_layers=2, hidden_size=ABSENT),
    "xmod": dict(default_language="en_XX"),
}


def families():
    """All families with a causal language model, by model_type."""
    return sorted(NAMES)


def _configs(config):
    yield config
    for name in getattr(config, "sub_configs", {}):
        if getattr(config, name, None) is not None:
            yield from _configs(getattr(config, name))


def build(family, implementation):
    """A tiny random model of the family without dropout; the same weights for every implementation."""
    given = {**SMALL, **CONFIGS.get(family, {}), **MORE.get(family, {})}
    if "is_decoder" in inspect.signature(CONFIG_MAPPING[family]).parameters:
        given["is_decoder"] = True
    config = AutoConfig.for_model(family, **{key: x for key, x in given.items() if x is not ABSENT})
    for part in _configs(config):
        for name, value in list(vars(part).items()):
            if ("drop" in name or "jitter" in name) and isinstance(value, float):
                setattr(part, name, 0.0)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    assert size < 3_000_000, f"{size:,} parameters are not tiny"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3 if p.ndim > 1 else 1)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return put(model).float().eval()


# ---- the reference


def by_the_reference(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **unused):
    """Eager attention with transformers' own mask, and with that of S²-Attn on top where this is causal."""
    H, L, S = query.shape[1], query.shape[2], key.shape[2]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    key, value = (x.repeat_interleave(H // x.shape[1], 1).double() for x in (key, value))
    scores = query.double() @ key.transpose(2, 3) * scaling
    seen = torch.ones(L, S, dtype=torch.bool, device=query.device)
    if attention_mask is not None:
        seen = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
    if L == S and not seen.triu(1).any():
        config = module.config
        mask = reference.attention_mask(L, H, config.longlora_group_size, shift=config.longlora_shift)
        seen = seen & put(mask)
    p = scores.masked_fill(~seen, -1e30).softmax(-1)  # a query that sees nothing sees all, as in eager
    return (p @ value).to(query.dtype).transpose(1, 2).contiguous(), None


def whole_mask(**how):
    return sdpa_mask(**{**how, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


AttentionInterface.register("eager_by_the_reference", by_the_reference)
AttentionMaskInterface.register("eager_by_the_reference", whole_mask)


# ---- the checks


def ids_of(B=2, seed=1):
    return put(torch.randint(3, 61, (B, T), generator=torch.Generator().manual_seed(seed)))


def off(a, b):
    """The largest difference, as a share of the largest value."""
    assert torch.isfinite(a).all()
    return ((a - b).abs().max() / b.abs().max()).item()


def logits(model, ids, **how):
    return model(ids, use_cache=False, **how).logits


def takes_positions(model):
    return "position_ids" in inspect.signature(model.forward).parameters


class Case:
    def __init__(self, family, eager):
        self.family, self.eager = family, eager
        with torch.no_grad():
            self.want = logits(self.eager, ids_of())
        self.ours = build(family, "longlora_s2")

    def set(self, training, group_size=T, shift="none"):
        longlora.torch.configure(self.ours, group_size=group_size, shift=shift).train(training)
        return self.ours


def evaluates(case):
    """Dense attention is eager's, and so are the tokens that are generated with a cache."""
    with torch.no_grad():
        assert off(logits(case.ours, ids_of()), case.want) < 1e-4
    prompt = dict(attention_mask=torch.ones_like(ids_of()[:, :9]), max_new_tokens=6, do_sample=False)
    try:
        want = case.eager.generate(ids_of()[:, :9], **prompt)
    except Exception:
        return False
    assert torch.equal(case.ours.generate(ids_of()[:, :9], **prompt), want)


def trains_densely(case):
    """One group that nobody shifts is dense attention: logits and gradients are eager's."""
    outs, grads = [], []
    for model in (case.set(True), case.eager.train()):
        torch.manual_seed(5)
        out = logits(model, ids_of())
        (
            out * torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.device)
        ).sum().backward()
        outs.append(out.detach())
        grads.append({name: p.grad for name, p in model.named_parameters()})
        model.zero_grad()
    case.eager.eval()
    assert off(*outs) < 1e-4
    assert [g is None for g in grads[0].values()] == [g is None for g in grads[1].values()]
    # Gradients that are 0 in exact arithmetic, such as those of biases of keys, have the noise of the others.
    largest = max(g.abs().max() for g in grads[1].values() if g is not None)
    for name, g in grads[0].items():
        if g is not None:
            want = grads[1][name]
            assert (g - want).abs().max() <= 1e-3 * want.abs().max() + 1e-6 * largest, name


def trains_by_groups(case):
    """S²-Attn is eager attention with the reference's mask, and no token sees a later one."""
    ours, theirs = case.set(True, G, "half"), build(case.family, "eager_by_the_reference")
    for part in _configs(theirs.config):
        part.longlora_group_size, part.longlora_shift = G, "half"
    with torch.no_grad():
        torch.manual_seed(5)
        got = logits(ours, ids_of())
        torch.manual_seed(5)
        assert off(got, logits(theirs.train(), ids_of())) < 1e-4
        assert off(got, case.want) > 1e-3, "S²-Attn is dense attention"
        other = ids_of()
        other[:, 12:] = 5
        assert off(logits(ours, other)[:, :12], got[:, :12]) < 1e-5, "a token sees the future"


def pads(case):
    """Padded sequences are the unpadded ones, where they are with eager attention."""
    row, n = ids_of()[:1, :14], 14
    for training in (False, True):
        ours = case.set(training, G, "half") if training else case.set(False)
        for place in (slice(0, n), slice(T - n, T)):
            ids, seen = put(torch.zeros(2, 1, T, dtype=torch.long))
            ids[:, place], seen[:, place] = row, 1
            how = dict(attention_mask=seen)
            alone = {}
            if takes_positions(ours):
                how["position_ids"] = (seen.cumsum(-1) - 1).clamp(min=0)
                alone["position_ids"] = put(torch.arange(n))[None]
            with torch.no_grad():
                got, want = (
                    off(logits(model, ids, **how)[:, place], logits(model, row, **alone))
                    for model in (ours, case.eager)
                )
            assert got < 1e-4 or want > 1e-4, f"training={training}, padding at {place}: {got:.2g}"


def packs(case):
    """Packed documents are the single ones."""
    if not takes_positions(case.ours):
        return False
    ids, lengths = ids_of(), (12, 8)
    rows = [ids[:1, : lengths[0]], ids[1:, : lengths[1]]]
    positions = [put(torch.arange(n))[None] for n in lengths]
    packed, both = torch.cat(rows, 1), torch.cat(positions, 1)
    for training in (False, True):
        ours = case.set(training, G, "half") if training else case.set(False)
        with torch.no_grad():
            want = torch.cat([logits(ours, x, position_ids=p) for x, p in zip(rows, positions)], 1)
            for how in ({}, dict(attention_mask=torch.ones_like(packed))):
                got = off(logits(ours, packed, position_ids=both, **how), want)
                assert got < 1e-4, f"training={training}, {list(how)}: {got:.2g}"


CHECKS = dict(evaluate=evaluates, dense=trains_densely, groups=trains_by_groups, pad=pads, pack=packs)


def _ours(error):
    """Whether longlora itself raised this error."""
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    return isinstance(error, ValueError) and Path(longlora.__file__).parent in Path(last).parents


def check(family):
    """Run the checks -> {check: "" if it holds, else why longlora refuses}, without checks that say nothing
    about the family. Any other error is a fault, and raised. LookupError if there is no tiny model of it."""
    try:
        eager = build(family, "eager")
    except Exception as error:
        raise LookupError(f"{type(error).__name__}: {error}") from error
    found, case = {}, None
    for name, run in CHECKS.items():
        try:
            case = case or Case(family, eager)
            if run(case) is not False:
                found[name] = ""
        except Exception as error:
            if not _ours(error):
                raise
            found[name] = str(error)
    return found


def names(family):
    """The names by which a message may call the family's model: its classes, and those of its configs."""
    try:
        model = build(family, "eager")
    except Exception:
        return [NAMES[family]]
    return {type(m).__name__ for m in model.modules()} | {part.model_type for part in _configs(model.config)}
