"""Extend a model from 256 to 2048 tokens, measure perplexity before and after, and merge the adapter."""

import os
import tempfile

import longlora
from longlora.tools.demo import HELD_OUT, MODEL, TEXT  # paths: put those of your model and texts here

output = tempfile.mkdtemp(prefix="longlora-")
steps = int(os.environ.get("STEPS", 60))


def perplexity(model, adapter=None):
    found = longlora.ppl(model, HELD_OUT, lengths=[256, 2048], adapter=adapter, max_tokens=8192)
    return {row["length"]: round(row["perplexity"], 2) for row in found["results"]}


print("before, by length:", perplexity(MODEL))
# A small model needs a far larger learning rate than the paper's 2e-5.
settings = dict(target_length=2048, max_steps=steps, learning_rate=2e-3)
longlora.train(model=MODEL, data=TEXT, output_dir=f"{output}/adapter", **settings)
print("after, by length:", perplexity(MODEL, f"{output}/adapter"))
longlora.merge(MODEL, f"{output}/adapter", f"{output}/merged")
print("merged, by length:", perplexity(f"{output}/merged"))
print("adapter and merged model are in", output)
