"""Small models of every family with random weights, and transformers' models with the same weights."""

import functools

import numpy as np
import pytest
import reference

from longlora import _C
from longlora.decoder import model as model_
from longlora.decoder import plan as plan_
from longlora.decoder.config import read_config
from longlora.decoder.lora import LoraConfig

SMALL = dict(
    vocab_size=101,
    hidden_size=48,
    intermediate_size=72,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    rms_norm_eps=1e-2,
    initializer_range=0.15,
    hidden_act="silu",
    rope_theta=1000.0,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
CONFIGS = {
    "llama": dict(SMALL, model_type="llama", tie_word_embeddings=True),
    "llama_odd": dict(
        SMALL,
        model_type="llama",
        tie_word_embeddings=False,
        num_attention_heads=3,
        num_key_value_heads=1,
        hidden_size=42,
        head_dim=14,
        intermediate_size=55,
        attention_bias=True,
        rms_norm_eps=1e-2,  # large enough that a wrong one is noticed
    ),
    "mistral": dict(SMALL, model_type="mistral", tie_word_embeddings=False, sliding_window=None, head_dim=16),
    "qwen2": dict(SMALL, model_type="qwen2", tie_word_embeddings=True, use_sliding_window=False),
    "qwen3": dict(
        SMALL,
        model_type="qwen3",
        tie_word_embeddings=False,
        use_sliding_window=False,
        head_dim=8,
        rms_norm_eps=1e-2,
    ),
    "phi3": dict(SMALL, model_type="phi3", tie_word_embeddings=False, sliding_window=None),
    "granite": dict(
        SMALL,
        model_type="granite",
        tie_word_embeddings=True,
        attention_bias=True,
        rms_norm_eps=1e-2,
        embedding_multiplier=3.0,
        residual_multiplier=0.4,
        attention_multiplier=0.11,
        logits_scaling=1.7,
    ),
    "smollm3": dict(SMALL, model_type="smollm3", tie_word_embeddings=True, no_rope_layers=[0, 1]),
}
LORAS = {
    "full": None,
    "paper": LoraConfig(r=4),
    "all": LoraConfig(
        r=3, lora_alpha=5, target_modules="all-linear", modules_to_save=("embed_tokens", "norm", "lm_head")
    ),
    "few": LoraConfig(r=2, target_modules=("v_proj", "up_proj"), modules_to_save=()),
}
FEW = LoraConfig(
    r=2, target_modules=("gate_up_proj",), modules_to_save=()
)  # Phi-3 has no v_proj and no up_proj
S2 = dict(group_size=8, boundary="split", shift="half")


def lora_of(name, lora):
    return FEW if (name, lora) == ("phi3", "few") else LORAS[lora]


def tokens(B, T, V=101, seed=0):
    """ids and targets. Some targets are not scored; some ids repeat, so that embedding rows are summed."""
    random = np.random.default_rng(seed)
    ids = random.integers(0, V // 2, (B, T)).astype(np.int32)
    targets = np.roll(ids, -1, 1)
    targets[:, -1] = -100
    targets[random.random((B, T)) < 0.2] = -100
    return ids, targets


def build(name, lora, B=2, T=37, dtype="float32", checkpointing="none", attention=S2, seed=3):
    """Our model with random weights. B is not 0, so that A has a gradient; norms are not 1, biases not 0."""
    config = read_config(CONFIGS[name])
    plan = plan_.plan(
        config,
        dtype=dtype,
        batch_size=B,
        sequence_length=T,
        group_size=attention and attention["group_size"],
        lora=lora,
        checkpointing=checkpointing,
    )
    made = model_.Model(
        config, dtype=dtype, lora=lora, plan=plan, attention=attention, seed=seed
    ).init_random()
    random = np.random.default_rng(seed)
    names = [n for n in made.names() if n.endswith(("norm.weight", "lora_B.weight", "bias"))]
    made.load_adapter(
        {n: random.normal("norm" in n, 0.2, made.tensor(n).shape).astype(np.float32) for n in names}
    )
    made.zero_grad()
    return made


def weights(made):
    """Every tensor of the model, float32, by Hugging Face name."""
    return {name: np.array(made.tensor(name).numpy(), np.float32) for name in made.names()}


@functools.lru_cache
def registered():
    """torch and transformers, with the mask of tests/reference.py registered as an attention: S2-Attn."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.set_num_threads(1)

    def s2_by_mask(module, query, key, value, attention_mask, scaling, dropout=0.0, **unused):
        T, H, repeat = query.shape[2], query.shape[1], query.shape[1] // key.shape[1]
        attention = module.config.s2 or dict(group_size=T, shift="none")
        mask = torch.from_numpy(reference.attention_mask(T, H, **attention))
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
        scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~mask, -torch.inf)
        return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None

    transformers.AttentionInterface.register("s2_by_mask", s2_by_mask)
    return torch, transformers


def peer(made, name, lora, attention):
    """The model of transformers with the same weights and LoRA -> module, name -> Parameter.

    LoRA is PEFT's y + scale (x A') B'.
    """
    torch, transformers = registered()
    config = transformers.AutoConfig.for_model(**CONFIGS[name])
    config.s2 = attention
    module = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="s2_by_mask", dtype=torch.float32
    )
    state = {n: torch.from_numpy(x) for n, x in weights(made).items()}
    module.load_state_dict(
        {n: x for n, x in state.items() if "lora_" not in n}, strict=not module.config.tie_word_embeddings
    )
    module.requires_grad_(False)
    named, trained = dict(module.named_parameters()), {p.name for p in made.parameters}
    for n in list(state):
        if n.endswith("lora_A.weight"):
            path = n.removesuffix(".lora_A.weight")
            a, b = (torch.nn.Parameter(state[f"{path}.lora_{x}.weight"]) for x in "AB")
            named[n], named[f"{path}.lora_B.weight"] = a, b
            module.get_submodule(path).register_forward_hook(
                lambda _, inputs, out, a=a, b=b: out + lora.scale * (inputs[0] @ a.T @ b.T)
            )
    for n in trained:
        named[n].requires_grad_(True)
    return module, {n: named[n] for n in trained}


def peer_losses(module, ids, targets):
    torch, _ = registered()
    logits = module(torch.from_numpy(ids).long(), use_cache=False).logits.flatten(0, 1)
    return torch.nn.functional.cross_entropy(
        logits, torch.from_numpy(targets).long().flatten(), reduction="sum"
    ), logits


def gradients(made, ids, targets, scale=0.01):
    made.zero_grad()
    loss = made.train_microbatch(ids, targets, scale)
    return loss, {p.name: p.grad.numpy().copy() for p in made.parameters}


def tensor(x):
    """A float32 Tensor on the CPU with the numbers of an array."""
    made = _C.Tensor(x.shape, "float32", "cpu")
    made.copy_(np.float32(x))
    return made


def close(got, want, tolerance, name=""):
    """The norm of the difference relative to the norm of the wanted array. NaN fails."""
    error = np.linalg.norm(np.float64(got) - want)
    assert error <= tolerance * max(np.linalg.norm(want), 1e-6), (name, error, np.linalg.norm(want))
