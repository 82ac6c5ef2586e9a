"""Teach a model to answer: train on the answers to questions, then ask it."""

import json
import os
import tempfile

import longlora
from longlora.tools.demo import MODEL  # a path: put that of your model here

output = tempfile.mkdtemp(prefix="longlora-")
steps = int(os.environ.get("STEPS", 60))
wrote = {"Emma": "Jane Austen", "Moby Dick": "Herman Melville", "Hamlet": "William Shakespeare"}
with open(f"{output}/alpaca.json", "w") as file:
    json.dump([{"instruction": f"Who wrote {book}?", "output": name} for book, name in wrote.items()], file)

# Each step sees all three: conversations are packed, and do not see each other.
settings = dict(sequence_length=256, max_steps=steps, learning_rate=1e-3)
longlora.train(model=MODEL, data=f"{output}/alpaca.json", output_dir=f"{output}/adapter", **settings)

session = longlora.Session(MODEL, f"{output}/adapter")
for book in wrote:
    question = {"role": "user", "content": f"Who wrote {book}?"}
    print(book, "is by", "".join(session.chat([question], max_new_tokens=30)).strip())
