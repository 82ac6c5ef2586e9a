"""Extend a transformers model in your own training loop, save the adapter with PEFT, and merge it."""

import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import longlora
import longlora.torch
from longlora.tools.demo import MODEL, TEXT

length, output = 1024, tempfile.mkdtemp(prefix="longlora-")
text = (TEXT / "austen-prideprejudice.txt").read_text()[:20000]
ids = AutoTokenizer.from_pretrained(MODEL, model_max_length=1 << 20)(text, return_tensors="pt").input_ids[0]

# A PeftModel: positions are interpolated, attention has LoRA, embedding and norms train whole.
model = longlora.torch.extend(AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32), length)
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-3)
model.train()  # attention is S2-Attn in training, and dense in evaluation and generation
for step, sequence in enumerate(ids[: 3 * length].split(length), 1):
    loss = model(input_ids=sequence[None], labels=sequence[None]).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.3f}")
model.save_pretrained(f"{output}/adapter")
longlora.merge(MODEL, f"{output}/adapter", f"{output}/merged")
print("adapter and merged model are in", output)
