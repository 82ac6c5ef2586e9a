"""What a tiny config of a family needs beside families.SMALL.

It needs something where SMALL is refused, is not tiny, or leaves a family without attention. Sliding windows
and dropout of attention weights, which S²-Attn refuses, are switched off where the family can do without
them; the base has the positions of pretraining.
"""

from typing import Any

ABSENT = object()  # for a key of SMALL that the family does not have
OPEN = dict(sliding_window=None)
PLAIN_ROPE = dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0))
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
ROUTED = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_group=1, topk_group=1)
MLA = dict(
    num_key_value_heads=4,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
)
DEEPSEEK = dict(**MLA, **ROUTED, first_k_dense_replace=1)
INDEXED = dict(index_topk=64, index_head_dim=16, index_n_heads=2)  # more keys than a test has tokens
MAMBA = dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8)
LINEAR = dict(
    layer_types=["linear_attention", "full_attention"],
    head_dim=16,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
)
SHARED = dict(shared_expert_intermediate_size=16)
SEQ2SEQ = dict(
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
)
TEXT = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    pad_token_id=0,
)
VISION = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    depth=1,
    num_heads=4,
    out_hidden_size=32,
    image_size=28,
    patch_size=14,
)
WRAPPER = dict(text_config=TEXT, vision_config=VISION)
CONFIGS: dict[str, dict[str, Any]] = {
    "afmoe": dict(EXPERTS, num_dense_layers=1, head_dim=8, sliding_window=128, global_attn_every_n_layers=2),
    "apertus": PLAIN_ROPE,
    "apertus1p5_text": PLAIN_ROPE,
    "axk1": dict(MLA, **ROUTED),
    "axk2": dict(MLA, **ROUTED, **INDEXED),
    "bailing_hybrid": dict(
        MLA,
        num_experts=4,
        num_experts_per_token=2,
        moe_intermediate_size=16,
        num_expert_group=1,
        topk_group=1,
        linear_head_dim=8,
        linear_num_heads=4,
        layer_types=["linear_attention", "full_attention"],
        mlp_layer_types=["dense", "sparse"],
    ),
    "bamba": dict(MAMBA, attn_layer_indices=[1]),
    "bart": SEQ2SEQ,
    "bigbird_pegasus": SEQ2SEQ,
    "blenderbot": SEQ2SEQ,
    "cohere_compass_text": dict(
        head_dim=8,
        rope_parameters=dict.fromkeys(("full_attention", "sliding_attention"), PLAIN_ROPE["rope_parameters"]),
    ),
    "cwm": dict(PLAIN_ROPE, head_dim=8, layer_types=["full_attention"] * 2),
    "dbrx": dict(
        d_model=32,
        n_heads=4,
        n_layers=2,
        max_seq_len=128,
        attn_config=dict(kv_n_heads=2, rope_theta=10000.0, clip_qkv=8.0),
        ffn_config=dict(ffn_hidden_size=16, moe_num_experts=4, moe_top_k=2, hidden_size=32),
    ),
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
    "deepseek_v32": dict(DEEPSEEK, **INDEXED),
    "deepseek_v4": dict(
        ROUTED, **INDEXED, head_dim=16, q_lora_rank=16, o_lora_rank=16, o_groups=2, qk_rope_head_dim=8
    ),
    "dots1": dict(ROUTED, n_shared_experts=1, **OPEN),
    "dots3_note_text": dict(MLA, **ROUTED, **INDEXED, per_layer_config=None),
    "dots3_note": dict(text_config=dict(TEXT, **{**MLA, **ROUTED, **INDEXED}, per_layer_config=None)),
    "emu3": dict(
        text_config=TEXT,
        vq_config=dict(
            base_channels=32,
            channel_multiplier=[1],
            num_res_blocks=1,
            codebook_size=61,
            embed_dim=4,
            latent_channels=4,
            hidden_size=32,
        ),
    ),
    "ernie4_5_moe": dict(moe_num_experts=4, moe_k=2, moe_intermediate_size=16),
    "exaone_moe": dict(EXPERTS, head_dim=8, sliding_window=128),
    "falcon_h1": dict(MAMBA, mamba_d_ssm=64, mamba_expand=2, head_dim=8),
    "gemma": dict(head_dim=8),
    "gemma3": WRAPPER,
    "gemma3_text": dict(head_dim=8),
    "gemma4": dict(
        text_config=dict(TEXT, hidden_size_per_layer_input=8, vocab_size_per_layer_input=61),
        vision_config=VISION,
    ),
    "gemma4_text": dict(head_dim=8, hidden_size_per_layer_input=8, vocab_size_per_layer_input=61),
    "gemma4_unified": dict(text_config=TEXT, vision_config=VISION, audio_config=None),
    "git": dict(vision_config=VISION),
    "got_ocr2": dict(
        text_config=TEXT,
        vision_config=dict(VISION, output_channels=32, window_size=2, global_attn_indexes=[0], mlp_dim=48),
    ),
    "glm": dict(head_dim=8),
    "glm4": dict(head_dim=8),
    "glm4_moe": dict(ROUTED, head_dim=8),
    "glm4_moe_lite": dict(MLA, **ROUTED),
    "glm_moe_dsa": dict(DEEPSEEK, **INDEXED),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "gpt_oss": dict(PLAIN_ROPE, num_local_experts=4, num_experts_per_tok=2, head_dim=8),
    "granitemoehybrid": dict(
        MAMBA, position_embedding_type="rope", layer_types=["linear_attention", "full_attention"]
    ),
    "helium": dict(head_dim=8),
    "hunyuan_v1_dense": dict(head_dim=8),
    "hunyuan_v1_moe": dict(head_dim=8, num_experts=4, moe_topk=2),
    "hy_v3": dict(EXPERTS, head_dim=8),
    "hy_v4": dict(MLA, **ROUTED, **INDEXED, head_dim=16),
    "inkling2_loop_text": dict(
        ROUTED,
        head_dim=8,
        swa_head_dim=8,
        swa_num_attention_heads=4,
        num_hidden_layers=3,
        loop_layer_index_start=1,
        loop_layer_index_end=2,
        n_layers_per_attn_res_block=1,
        loop_gate_rank=4,
        unpadded_vocab_size=61,
    ),
    "inkling2_text": dict(
        ROUTED, head_dim=8, swa_head_dim=8, swa_num_attention_heads=4, unpadded_vocab_size=61
    ),
    "inkling_text": dict(
        ROUTED, head_dim=8, swa_head_dim=8, swa_num_attention_heads=4, swa_num_key_value_heads=2
    ),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, num_experts=4, mamba_d_state=8, mamba_dt_rank=4),
    "kimi_linear": dict(
        MLA,
        num_experts=4,
        num_experts_per_token=2,
        moe_intermediate_size=16,
        linear_head_dim=8,
        linear_num_heads=4,
        layer_types=["linear_attention", "full_attention"],
    ),
    "kolibri1": dict(
        num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8, **SHARED
    ),
    "laguna": dict(EXPERTS, head_dim=8, **SHARED),
    "lara_mini": dict(
        {**LINEAR, "layer_types": ["sliding_attention", "full_attention"]}, **EXPERTS, **SHARED
    ),
    "lfm2_moe": dict(EXPERTS, num_dense_layers=1, layer_types=["conv", "full_attention"]),
    "lfm3": dict(head_dim=8, layer_types=["conv", "full_attention"]),
    "llama4": WRAPPER,
    "llama4_text": dict(head_dim=8, num_local_experts=4, intermediate_size_mlp=48),
    "longcat_flash": dict(
        MLA,
        head_dim=8,
        n_routed_experts=4,
        zero_expert_num=2,
        moe_topk=2,
        ffn_hidden_size=48,
        expert_ffn_hidden_size=16,
        num_layers=1,
    ),
    "mamba2": dict(num_heads=4, head_dim=16, n_groups=1, state_size=8),
    "marian": SEQ2SEQ,
    "mbart": SEQ2SEQ,
    "mellum": dict(num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8),
    "mimo_v2_flash": dict(ROUTED, head_dim=12, v_head_dim=8),
    "minicpm3": MLA,
    "ministral": dict(head_dim=8, layer_types=["full_attention"] * 2),
    "ministral3": dict(
        head_dim=8,
        rope_parameters=dict(
            rope_type="default",
            rope_theta=10000.0,
            llama_4_scaling_beta=0.1,
            original_max_position_embeddings=128,
        ),
    ),
    "mistral": OPEN,
    "mllama": dict(
        text_config=dict(TEXT, cross_attention_layers=[1]),
        vision_config=dict(
            VISION,
            num_global_layers=1,
            attention_heads=4,
            vision_output_dim=64,
            intermediate_layers_indices=[0],
        ),
    ),
    "mvp": SEQ2SEQ,
    "nemotron_h": dict(
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
        num_hidden_layers=4,
        head_dim=8,
        ssm_state_size=8,
        mamba_num_heads=4,
        mamba_head_dim=16,
        n_groups=1,
        n_routed_experts=4,
        moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=16,
    ),
    "pegasus": SEQ2SEQ,
    "phi3": dict(OPEN, original_max_position_embeddings=128),
    "phimoe": dict(num_local_experts=4, **OPEN),
    "plbart": SEQ2SEQ,
    "prophetnet": dict(
        num_hidden_layers=ABSENT,
        num_encoder_layers=1,
        num_decoder_layers=1,
        num_encoder_attention_heads=4,
        num_decoder_attention_heads=4,
    ),
    "qwen2_moe": dict(EXPERTS, **SHARED),
    "qwen3": dict(head_dim=8),
    "qwen3_5": dict(text_config=dict(TEXT, **{**LINEAR}), vision_config=VISION),
    "qwen3_5_moe": dict(text_config=dict(TEXT, **{**LINEAR, **EXPERTS, **SHARED}), vision_config=VISION),
    "qwen3_5_moe_text": dict(LINEAR, **EXPERTS, **SHARED),
    "qwen3_5_text": LINEAR,
    "qwen3_moe": dict(
        head_dim=8, num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    "qwen3_next": dict(LINEAR, **EXPERTS, **SHARED),
    "qwen4_exp": dict(
        text_config=dict(
            {**TEXT, **LINEAR, **EXPERTS, **SHARED, "layer_types": ["linear_attention", "indexed_attention"]},
            ple_embed_dim=8,
            ngram_vocab_size_base=128,
            split_ngram_parts=1,
            hc_lowrank=8,
            indexer_budget=64,
            indexer_n_heads=2,
            indexer_kv_heads=1,
            indexer_head_dim=16,
            indexer_compress_ratio=4,
        ),
        vision_config=VISION,
    ),
    "qwen4_exp_text": dict(
        {**LINEAR, "layer_types": ["linear_attention", "indexed_attention"]},
        **INDEXED,
        **EXPERTS,
        **SHARED,
        ple_embed_dim=8,
        ngram_vocab_size_base=128,
        split_ngram_parts=1,
        hc_lowrank=8,
        indexer_budget=64,
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=16,
        indexer_compress_ratio=4,
    ),
    "recurrent_gemma": dict(num_hidden_layers=3, head_dim=8, lru_width=32),
    "reformer": dict(is_decoder=True, axial_pos_embds_dim=[16, 16], axial_pos_shape=[8, 16]),
    "roc_bert": dict(pronunciation_vocab_size=61, shape_vocab_size=61),
    "sarvam_mla": dict(DEEPSEEK, q_lora_rank=None),
    "sarvam_moe": dict(ROUTED, first_k_dense_replace=1, head_dim=8),
    "seed_oss": dict(attention_dropout=0.0, residual_dropout=0.0, head_dim=8),
    "smollm3": dict(no_rope_layers=[1, 0]),
    "solar_open": dict(ROUTED, head_dim=8),
    "starcoder2": OPEN,
    "whisper": dict(SEQ2SEQ, num_hidden_layers=1),
    "xlnet": dict(
        n_layer=2,
        n_head=4,
        d_model=32,
        d_inner=48,
        max_position_embeddings=ABSENT,
        num_key_value_heads=ABSENT,
    ),
    "youtu": MLA,
    "zamba": dict(
        num_hidden_layers=4,
        layers_block_type=["linear_attention", "hybrid", "linear_attention", "hybrid"],
        n_mamba_heads=2,
        attention_head_dim=16,
        attention_hidden_size=64,
        mamba_dt_rank=4,
        mamba_d_state=8,
    ),
    "zamba2": dict(
        use_mem_rope=True,
        num_hidden_layers=3,
        layers_block_type=["linear_attention", "hybrid", "linear_attention"],
        mamba_d_state=8,
        mamba_headdim=16,
        n_mamba_heads=4,
        attention_head_dim=16,
        attention_hidden_size=64,
        adapter_rank=4,
    ),
    "zaya": dict({**EXPERTS, "num_experts_per_tok": 1}, head_dim=8, router_hidden_size=16),
}
