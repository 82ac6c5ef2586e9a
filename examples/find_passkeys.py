"""Does a model find a number in a long text? A table and a heat map by length and depth."""

import os
import tempfile

import longlora
from longlora.tools.demo import MODEL  # a path: put that of your model here, and adapter="extended"

output = tempfile.mkdtemp(prefix="longlora-")
samples = min(10, int(os.environ.get("STEPS", 10)))
depths = [0.1, 0.5, 0.9]

found = longlora.eval.passkey(MODEL, lengths=[128, 256], depths=depths, samples=samples, output_dir=output)
for row in found["results"]:
    print(f"{row['length']} tokens, depth {row['depth']}: {row['right']} of {row['samples']} keys found")
first = found["results"][0]["answers"][0]
print(f"The first key is {first['expected']}, the model says {first['answer']!r}. {output}/passkey.png")
