"""llama.cpp in a process of its own: a file that it rejects may end it. Requests are lines of JSON."""

import json
import sys

import llama_cpp
import numpy as np

F32 = 0  # ggml's number of the type
opened: dict = {}


def model(path, context):
    """The model at `path` with keys and values in float32. The one before is closed."""
    if (path, context) not in opened:
        opened.clear()
        flags = dict(n_ctx=context, logits_all=True, n_threads=1, n_threads_batch=1, verbose=False)
        opened[path, context] = llama_cpp.Llama(path, type_k=F32, type_v=F32, **flags)
    return opened[path, context]


def answer(request):
    llama = model(request["path"], request["context"])
    if "texts" in request:
        return [llama.tokenize(text.encode(), add_bos=True, special=True) for text in request["texts"]]
    llama.reset()
    llama.eval(request["ids"])
    tokens = []
    for _ in range(request["new"]):
        tokens.append(int(np.argmax(llama.scores[llama.n_tokens - 1])))
        llama.eval(tokens[-1:])
    np.save(request["out"], llama.scores[: llama.n_tokens])
    return tokens


print(json.dumps("ready"), flush=True)
for line in sys.stdin:
    try:
        print(json.dumps(answer(json.loads(line))), flush=True)
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
