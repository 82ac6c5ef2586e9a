"""Load an adapter of `longlora train` with stock transformers and PEFT, and generate text with it."""

import tempfile

from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

import longlora
from longlora.tools.demo import HELD_OUT, MODEL, TEXT

adapter = tempfile.mkdtemp(prefix="longlora-") + "/adapter"
longlora.train(
    model=MODEL,
    data=TEXT / "kjv-40-matthew.txt",
    output_dir=adapter,
    target_length=1024,
    max_steps=3,
    learning_rate=2e-3,
)

# On the base itself the adapter would give wrong results: its folder longlora_base has the longer positions.
model = AutoPeftModelForCausalLM.from_pretrained(adapter).eval()
tokenizer = AutoTokenizer.from_pretrained(adapter)
text = (HELD_OUT / "austen-persuasion.txt").read_text()[:2000]
prompt = tokenizer(text, return_tensors="pt").input_ids[:, :500]  # the base model reads 256 tokens
written = model.generate(prompt, max_new_tokens=20, do_sample=False)[0, 500:]
print(f"{model.config.max_position_embeddings} positions; the next words: {tokenizer.decode(written)!r}")
