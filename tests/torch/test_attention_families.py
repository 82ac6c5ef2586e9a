"""attn_implementation="longlora_s2" in every family of transformers: right in all checks or refused by name.

The suite tries some families of each kind. LONGLORA_FAMILIES=all tries all of them, in two minutes.
"""

import os

import pytest

torch = pytest.importorskip("torch", reason="longlora.torch is for torch")
transformers = pytest.importorskip("transformers", reason="its families are tried")
import attention_matrix  # noqa: E402
from devices import device  # noqa: E402, F401 (a fixture)
from families import VERSION  # noqa: E402

pytestmark = pytest.mark.skipif(VERSION < (5, 0), reason="the families are those of transformers 5")

TRIED = "5.24.0"  # the transformers whose families the tables below name
# Refused as soon as they train, for the reason before the families.
REFUSED = {
    "has no AttentionInterface": """big_bird bloom cpmant falcon git gpt_neo gpt_neox_japanese megatron-bert
        mpt mvp openai-gpt prophetnet reformer rembert roformer rwkv trocr xglm xlm xlnet""",
    "has not called S2-Attn": "falcon_mamba mamba mamba2 xlstm",
    "attention sinks": "deepseek_v4 flint gpt_oss granite_swa granitemoe_swa mimo_v2_flash",
    "soft-capped scores": "gemma2 vaultgemma",
    "a position bias": "inkling2_loop_text inkling2_text inkling_text",
    "attention to selected tokens": "axk2 deepseek_v32 dots3_note_text glm_moe_dsa hy_v4",
    "attention to selected blocks": "minimax_m3_vl_text",
    "one mask for all heads": "doge",
}
# Refused with packed documents alone.
NOT_PACKED = {
    "convolutions carry a state": """bailing_hybrid bamba falcon_h1 granitemoehybrid jamba kimi_linear
        lara_mini lfm2 lfm2_moe lfm3 minimax nemotron_h olmo_hybrid qwen3_5 qwen3_5_moe qwen3_5_moe_text
        qwen3_5_text qwen3_next qwen4_exp qwen4_exp_text recurrent_gemma zamba zamba2 zaya""",
    "beside BltCrossAttention": "blt",
}
# Refused with padding alone: they always make a 4-D mask, which hides everything from padding.
NOT_PADDED = {"not causal attention within documents": "qwen4_exp qwen4_exp_text"}
# Models that cannot be made, or are never tiny.
ABSENT = """dots3_note gemma3n gemma4_assistant gemma4_unified gemma4_unified_assistant
    moss_transcribe_diarize musicgen musicgen_melody phi4_multimodal""".split()
QUICK = """llama gpt2 deepseek_v3 llama4_text gemma3_text gpt_bigcode bert bigbird_pegasus blt qwen3_next lfm2
    zamba bloom xglm falcon mamba gpt_oss deepseek_v32 minimax_m3_vl_text doge""".split()


def reason(table, family):
    return next((words for words, families in table.items() if family in families.split()), None)


@pytest.mark.parametrize(
    "family", attention_matrix.families() if os.environ.get("LONGLORA_FAMILIES") else QUICK
)
def test_a_family_attends_right_or_is_refused_by_name(family):
    try:
        found = attention_matrix.check(family)
    except LookupError as error:
        assert transformers.__version__ != TRIED or family in ABSENT, error
        pytest.skip(str(error))
    for refusal in filter(None, found.values()):
        assert any(name in refusal for name in attention_matrix.names(family)), f"no name in: {refusal}"
    if transformers.__version__ != TRIED:
        return
    assert {"dense", "groups", "pad"} <= set(found)
    refused = reason(REFUSED, family)
    if refused is not None:
        assert all(refused in found[name] for name in ("dense", "groups", "pad")) and found.get(
            "pack", refused
        )
        return
    wanted = dict(pack=reason(NOT_PACKED, family), pad=reason(NOT_PADDED, family))
    for name, refusal in found.items():
        words = wanted.get(name)
        assert words in refusal if words else not refusal, f"{name}: {refusal or 'right'}, wanted {words}"


def test_the_tables_name_families():
    named = " ".join([*REFUSED.values(), *NOT_PACKED.values(), *NOT_PADDED.values()]).split() + ABSENT + QUICK
    if transformers.__version__ == TRIED:
        assert set(named) <= set(attention_matrix.families())
