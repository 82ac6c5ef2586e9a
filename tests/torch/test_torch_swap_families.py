"""A swapped model of any family of transformers does what the model does: loss, logits, hidden states,
gradients.

The suite tries the families below. LONGLORA_FAMILIES=all tries all of them (minutes).
"""

import copy
import os

import pytest

torch = pytest.importorskip("torch", reason="longlora.torch is for torch")
transformers = pytest.importorskip("transformers", reason="its families are tried")
from devices import device, put  # noqa: E402, F401 (a fixture)
from families import SMALL  # noqa: E402
from family_configs import ABSENT, CONFIGS  # noqa: E402
from swap_checks import agree, disturbed, step  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES  # noqa: E402

import longlora.torch  # noqa: E402

NORM, MLP, ROPE, LOSS = "rms_norm", "swiglu", "rope", "linear_cross_entropy"
# What is replaced in families that have something else beside it.
QUICK = {
    "bamba": {NORM, MLP, ROPE},  # gated norms; its loss has a part of its own
    "bart": set(),  # its loss is its own
    "cohere": {MLP},  # scaled logits
    "falcon_h1": {NORM, ROPE},  # gated norms, scaled gates and logits
    "gemma2": {ROPE},  # norms of 1 + w, soft caps
    "gemma3_text": {ROPE, LOSS},  # norms of 1 + w, no soft cap
    "gpt_oss": {NORM, LOSS},
    "gptj": set(),  # its head has a bias
    "granitemoehybrid": {NORM, ROPE},
    "mixtral": {NORM, ROPE, LOSS},
    "nemotron_h": {NORM, LOSS},  # gated norms
    "olmo_hybrid": {NORM, MLP, ROPE, LOSS},
    "qwen3_5_text": {MLP, LOSS},  # gated norms, norms of 1 + w
    "qwen3_next": {MLP, ROPE, LOSS},
    "zamba2": {NORM, ROPE, LOSS},  # gated norms
}
MORE = {"gptj": dict(rotary_dim=4), "codegen": dict(rotary_dim=4)}
LARGEST = 5_000_000
WHOLE = os.environ.get("LONGLORA_FAMILIES")
built: set[str] = set()


def made(family):
    """A tiny model with random weights and a copy; skips a family that transformers cannot train so."""
    given = SMALL | CONFIGS.get(family, {}) | MORE.get(family, {})
    make = transformers.AutoModelForCausalLM.from_config
    try:
        config = transformers.AutoConfig.for_model(
            family, **{key: x for key, x in given.items() if x is not ABSENT}
        )
        with torch.device("meta"):
            size = sum(p.numel() for p in make(config).parameters())
        if size > LARGEST:
            pytest.skip(f"{size:,} parameters are not tiny")
        torch.manual_seed(0)
        model = disturbed(put(make(config, attn_implementation="eager")))
        other = copy.deepcopy(model)
        for each in (model, other):  # the first step of some leads to another attention
            step(each.train())
    except Exception as error:
        pytest.skip(f"{type(error).__name__}: {' '.join(str(error).split())[:150]}")
    built.add(family)
    return model, other


@pytest.mark.parametrize("family", sorted(NAMES) if WHOLE else QUICK)
def test_a_swapped_model_does_what_it_did(family):
    model, swapped = made(family)
    counts = longlora.torch.swap(swapped)
    if family in QUICK:
        assert {name for name, count in counts.items() if count} == QUICK[family]
    try:
        agree(model, swapped, 1e-3, logits=not counts[LOSS], output_hidden_states=True)
    finally:
        longlora.torch.unswap(swapped)


def test_enough_families_were_tried():
    assert len(built) >= (150 if WHOLE else len(QUICK)), sorted(set(NAMES if WHOLE else QUICK) - built)
