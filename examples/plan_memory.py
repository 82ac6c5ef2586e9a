"""Ask how much memory a training run needs, from the model's config.json alone: no weight is read."""

import json
import tempfile
from pathlib import Path

import longlora

# The sizes of Llama 3.2 1B. A run on your own model reads the config.json that lies beside its weights.
CONFIG = dict(
    model_type="llama", vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
    num_attention_heads=32, num_key_value_heads=8, head_dim=64, max_position_embeddings=8192,
    rms_norm_eps=1e-5, rope_theta=500000.0, tie_word_embeddings=True,
)  # fmt: skip
directory = Path(tempfile.mkdtemp(prefix="longlora-"))
(directory / "config.json").write_text(json.dumps(CONFIG))

for length in (16384, 32768, 65536):
    for checkpointing in ("none", "minimal", "full"):
        plan = longlora.plan(
            model=directory, target_length=length, dtype="bfloat16", checkpointing=checkpointing, device="cpu"
        )
        print(f"{length:6} tokens, checkpointing {checkpointing:8} {plan.total / 2**30:6.1f} GiB")

plan = longlora.plan(model=directory, target_length=65536, max_memory=16, device="cpu")
print("\nThe parts of the largest run in float32, and what would make it fit into 16 GiB:\n")
print(plan.text())
