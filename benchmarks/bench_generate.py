"""Generation with SmolLM2-135M's shapes and random weights: tokens per second by context and dtype.

Ours against transformers with its cache and, where it is installed, llama.cpp (llama-cpp-python), each with
weights and cache in the same dtype. A round reads a prompt of `context` tokens (prefill) and then adds a few
tokens one by one (decode). Each side runs in its own process, and their rounds in turn, because a machine's
speed changes over time. The first round is not counted.

`of_peak` compares with a floor. For prefill that is the multiply-adds at the machine's float32 peak: all
products, the head for one token, and causal attention. For decode it is the bytes of weights and cache that a
token reads, at the machine's read bandwidth. The machine is a side of its own: it does these multiply-adds
and reads these bytes in all threads, and takes its turn like the others.

--smoke runs our side and the machine on a tiny model; its figures mean nothing.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from longlora import _C
from longlora.decoder.config import read_config

from . import harness
from .bench_train_step import CONFIG, PAUSE, SMALL

CONTEXTS = (512, 2048, 8000)
DTYPES = ("float32", "bfloat16", "float16")
STEPS = 16  # tokens of a round's decode
PIECES = 32  # of a thread's multiply-adds, so that a thread that is slowed down gets fewer
LLAMA_CPP = {"float32": 0, "float16": 1, "bfloat16": 30}  # ggml's numbers of the dtypes


def shapes(smoke):
    return SMALL if smoke else CONFIG


# ---- the sides: each gives two functions, read(ids) and step(token) -------------------------------


def ours(smoke, context, dtype):
    from longlora.decoder.cache import Cache
    from longlora.decoder.generate import LONG_CHUNK, Generator
    from longlora.decoder.model import Model

    config = read_config(shapes(smoke))
    model = Model(config, dtype=dtype).init_random(0)
    generator = Generator(model, Cache(config, 1, context + STEPS, dtype), LONG_CHUNK)

    def read(ids):
        generator.cache.keep(0, 0)
        return int(generator.extend(0, ids).argmax())

    return read, lambda token: int(generator.step([0], [token])[0].argmax())


def transformers(smoke, context, dtype):
    import torch
    import transformers

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    fields = {name: x for name, x in shapes(smoke).items() if name not in ("model_type", "architectures")}
    config = transformers.LlamaConfig(**fields)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    kept = {}

    @torch.inference_mode()
    def forward(ids, cache):
        out = model(torch.tensor(ids)[None].long(), past_key_values=cache, use_cache=True, logits_to_keep=1)
        kept["cache"] = out.past_key_values
        return int(out.logits[0, -1].argmax())

    return lambda ids: forward(ids, None), lambda token: forward([token], kept["cache"])


def llama_cpp(smoke, context, dtype):
    import llama_cpp

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "random.gguf")
        write_gguf(path, shapes(smoke), dtype)
        threads = int(os.environ["OMP_NUM_THREADS"])
        model = llama_cpp.Llama(
            path,
            n_ctx=context + STEPS,
            n_batch=512,
            n_threads=threads,
            n_threads_batch=threads,
            type_k=LLAMA_CPP[dtype],
            type_v=LLAMA_CPP[dtype],
            verbose=False,
            use_mmap=False,
        )

    def forward(ids):
        model.eval(ids)
        logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
        return int(np.ctypeslib.as_array(logits, (model.n_vocab(),)).argmax())

    def read(ids):
        model.reset()
        return forward([int(i) for i in ids])

    return read, lambda token: forward([token])


def write_gguf(path, config, dtype):
    """A GGUF file of the shapes with random weights and no vocabulary."""
    import gguf

    random, C, D = np.random.default_rng(0), config["hidden_size"], config["head_dim"]
    H, K, F = config["num_attention_heads"], config["num_key_value_heads"], config["intermediate_size"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(C)
    writer.add_feed_forward_length(F)
    writer.add_head_count(H)
    writer.add_head_count_kv(K)
    writer.add_rope_dimension_count(D)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    layer = {"attn_q": (H * D, C), "attn_k": (K * D, C), "attn_v": (K * D, C), "attn_output": (C, H * D)}
    layer |= {"ffn_gate": (F, C), "ffn_up": (F, C), "ffn_down": (C, F), "attn_norm": (C,), "ffn_norm": (C,)}
    tensors = {"token_embd": (config["vocab_size"], C), "output_norm": (C,)}
    for i in range(config["num_hidden_layers"]):
        tensors |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    kind = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    for name, shape in tensors.items():
        x = random.standard_normal(shape, np.float32) * config["initializer_range"]
        stored = gguf.GGMLQuantizationType["F32" if len(shape) == 1 else kind]
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(x, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def machine(smoke, context, dtype):
    """The floor: multiply-adds in registers, and NumPy's "or" over arrays that no cache holds."""
    flops, bytes = floors(read_config(shapes(smoke)), context, dtype)
    threads = int(os.environ["OMP_NUM_THREADS"])
    rounds = max(1, round(flops / _C.peak(1) / threads / PIECES))
    arrays = [np.ones(round(bytes / 8 / threads), np.uint64) for _ in range(threads)]
    pool = ThreadPoolExecutor(threads)

    def read(ids):
        list(pool.map(_C.peak, [rounds] * (threads * PIECES)))

    return read, lambda token: list(pool.map(np.bitwise_or.reduce, arrays))


SIDES = {"machine": machine, "ours": ours, "transformers": transformers, "llama.cpp": llama_cpp}


def one_side(side, context, dtype, smoke):
    """The process of one side: a round for each input line, which prints the seconds of its two parts."""
    read, step = SIDES[side](smoke, context, dtype)
    ids = np.random.default_rng(0).integers(0, shapes(smoke)["vocab_size"], context).astype(np.int32)
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        token = read(ids)
        middle = time.perf_counter()
        for _ in range(STEPS):
            token = step(token)
        print(middle - start, (time.perf_counter() - middle) / STEPS, flush=True)


# ---- the whole -----------------------------------------------------------------------------------


def measured(bench, sides, context, dtype):
    """The rounds of all sides in turn -> side -> tokens per second of prefill and of decode."""
    rounds, found = max(2, round(2 * bench.options.seconds)), {}
    words = ["--dtype", dtype, "--context", str(context)]
    for side, times in harness.in_turn(bench, sides, words, rounds, PAUSE).items():
        prefill, decode = (statistics.median(part) for part in zip(*times))
        found[side] = context / prefill, 1 / decode
    return found


def floors(config, context, dtype):
    """FLOPs of a prefill, and bytes that a decoded token reads behind `context` tokens."""
    L, C, F = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    D, H, K, V = config.head_dim, config.num_attention_heads, config.num_key_value_heads, config.vocab_size
    layers = L * (C * D * (2 * H + 2 * K) + 3 * C * F)
    pairs = context * (context + 1) / 2
    flops = 2 * layers * context + 4 * L * H * D * pairs + 2 * C * V
    width = 4 if dtype == "float32" else 2
    return flops, width * (layers + C * V + 2 * L * K * D * (context + STEPS / 2))


def peers():
    import importlib.util

    names = {"transformers": "transformers", "llama.cpp": "llama_cpp"}
    return [side for side, module in names.items() if importlib.util.find_spec(module)]


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--side"]:
        parser = argparse.ArgumentParser()
        parser.add_argument("--side")
        parser.add_argument("--context", type=int)
        parser.add_argument("--dtype")
        parser.add_argument("--smoke", action="store_true")
        return one_side(**vars(parser.parse_args(argv)))
    bench = harness.Bench("generate", argv)
    if bench.gpu is not None:
        raise SystemExit("generate: is measured on the CPU only")
    smoke, config = bench.options.smoke, read_config(shapes(bench.options.smoke))
    for context in (32,) if smoke else CONTEXTS:
        for dtype in DTYPES:
            if not bench.wants(f"context {context}", dtype):
                continue
            sides = ["machine", "ours", *([] if smoke else peers())]
            found = measured(bench, sides, context, dtype)
            floor = found.pop("machine")
            flops, bytes = floors(config, context, dtype)
            print(f"  multiply-adds {floor[0] * flops / context / 1e9:.0f} GF/s, ", end="")
            print(f"reading {floor[1] * bytes / 1e9:.1f} GB/s")
            for part, name in enumerate(("prefill", "decode")):
                us, others = (
                    found["ours"][part],
                    {side: x[part] for side, x in found.items() if side != "ours"},
                )
                for side, them in (others or {None: None}).items():
                    bench.record(
                        f"{name}, context {context}",
                        us,
                        them,
                        "tok/s",
                        dtype=dtype,
                        peer_name=side,
                        ratio=them and us / them,
                        peak=floor[part],
                    )


if __name__ == "__main__":
    main()
