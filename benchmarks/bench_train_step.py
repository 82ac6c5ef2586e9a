"""One training step of LongLoRA on SmolLM2-135M's shapes, ours against transformers + peft: seconds and peak memory.

Both train the same: LoRA r = 8 on q, k, v, o, the tied embedding and all norms; S2-Attn; AdamW; one sequence a step; random
weights. The peer's attention is SDPA per kind of head, groups as a batch by views, with is_causal; it runs with and without
gradient checkpointing. Each side is a process of its own: its memory is the peak resident size of that process, the interpreter
and the imports included.
"""
import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

import numpy as np

from . import harness

CONFIG = dict(model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=49152, hidden_size=576, intermediate_size=1536,
              num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, head_dim=64, max_position_embeddings=8192,
              rms_norm_eps=1e-5, tie_word_embeddings=True, hidden_act="silu", attention_bias=False, initializer_range=0.04,
              rope_theta=100000.0, bos_token_id=1, eos_token_id=2)
CASES = [(2048, 512), (4096, 1024)]
RATE = 1e-4


def tokens(length):
    return np.random.default_rng(0).integers(0, CONFIG["vocab_size"], length + 1).astype(np.int32)


def our_step(length, group, dtype, layers):
    from longlora.adapter import LoraConfig
    from longlora.config import read_config
    from longlora.model import Model
    from longlora.optimizer import AdamW
    from longlora.plan import plan
    config = read_config(CONFIG | {"num_hidden_layers": layers})
    about = plan(config, dtype=dtype, sequence_length=length, group_size=group, lora=LoraConfig())
    model = Model(config, dtype=dtype, lora=LoraConfig(), plan=about,
                  attention={"group_size": group, "boundary": "split", "shift": "half"})
    model.init_random(0)
    optimizer = AdamW(model.parameters, max_grad_norm=1.0)
    rates = dict.fromkeys((p.kind for p in model.parameters), RATE)
    ids = tokens(length)

    def step():
        model.zero_grad()
        loss = model.train_microbatch(ids[None, :-1], ids[None, 1:], loss_scale=1 / length)
        optimizer.step(rates)
        return loss / length

    return step, about.checkpointing


def s2_attention(module, query, key, value, attention_mask, scaling=None, group=None, **_):
    """S2-Attn by SDPA, q [1,H,T,D], k and v [1,K,T,D]: plain heads in T/G groups; shifted heads in two halves and the rest."""
    import torch
    sdpa = torch.nn.functional.scaled_dot_product_attention
    heads, length = query.shape[1:3]
    key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    plain, shifted, half = slice(0, heads // 2), slice(heads // 2, heads), group // 2

    def grouped(chosen, start, stop, size):
        parts = [x[0, chosen, start:stop].unflatten(1, (-1, size)).transpose(0, 1) for x in (query, key, value)]
        return sdpa(*parts, is_causal=True, scale=scaling).transpose(0, 1).flatten(1, 2)

    first, last = grouped(shifted, 0, half, half), grouped(shifted, length - half, length, half)
    middle = grouped(shifted, half, length - half, group)
    out = torch.cat([grouped(plain, 0, length, group), torch.cat([first, middle, last], 1)])
    return out.transpose(0, 1)[None], None


def torch_step(length, group, dtype, checkpointing=False, swapped=False):
    """transformers + peft, as people train; `swapped`: with longlora.torch's attention and layers in it."""
    import functools

    import torch
    import transformers
    from peft import LoraConfig, get_peft_model
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    transformers.AttentionInterface.register("s2_sdpa", functools.partial(s2_attention, group=group))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{key: value for key, value in CONFIG.items() if key not in ("model_type", "architectures")})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation="s2_sdpa")
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    # By hand, not by modules_to_save: the head stays tied to the embedding and no second copy of either is kept.
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name or "norm" in name:
            parameter.requires_grad_(True)
    if swapped:
        import longlora.torch
        longlora.torch.swap(longlora.torch.configure(model, group))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], RATE, fused=True)
    ids = torch.from_numpy(tokens(length)[None, :-1].astype(np.int64))

    def step():
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def one_side(side, length, group, dtype, repeats, layers):
    """In a process of its own: a warm-up step, then `repeats` timed ones -> one JSON line."""
    kept = None
    if side == "ours":
        step, kept = our_step(length, group, dtype, layers)
    else:
        step = torch_step(length, group, dtype, side == "peer checkpointing", side == "torch")
    losses, times = [step()], []
    for _ in range(repeats):
        start = time.perf_counter()
        losses.append(step())
        times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"seconds": statistics.median(times), "gib": peak, "losses": losses, "checkpointing": kept}))


def measured(bench, sides, length, group, dtype, threads=None, layers=CONFIG["num_hidden_layers"], least=2):
    """Each side in a process of its own -> dict of what they printed."""
    figures, repeats = {}, max(least, round(bench.options.seconds * 2))
    for side in sides:
        command = [sys.executable, "-m", "benchmarks.bench_train_step", "--side", side, "--length", str(length), "--group", str(group),
                   "--dtype", dtype, "--repeats", str(repeats), "--layers", str(layers)]
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": str(threads or bench.options.threads)}, check=True,
                              stdout=subprocess.PIPE, text=True)
        figures[side] = json.loads(done.stdout.splitlines()[-1])
    return figures


def compare(bench, ours, peers, cases):
    """Rows of time and memory: side `ours` against each of `peers`."""
    for length, group in cases:
        for dtype in ("float32", "bfloat16"):
            name = f"T={length} G={group}"
            if not bench.wants(name, dtype):
                continue
            figures = measured(bench, (ours, *peers), length, group, dtype)
            for side in peers:
                for what, unit in (("seconds", "s"), ("gib", "GiB")):
                    bench.record(f"{name} {'step' if unit == 's' else 'memory'}", figures[ours][what], figures[side][what], unit,
                                 dtype=dtype, peer_name=side.replace("peer", "transformers+peft"))


def scaling(bench):
    """Ours against ours: all threads over one; and, in two layers, a token of a long sequence over one of a short."""
    def seconds(length, dtype, **how):
        return measured(bench, ("ours",), length, 512, dtype, **how)["ours"]["seconds"]

    for dtype in ("float32", "bfloat16"):
        name, threads = "T=2048 G=512 on all threads", bench.options.threads
        if bench.wants(name, dtype) and threads > 1:
            bench.record(name, seconds(2048, dtype), seconds(2048, dtype, threads=1), "s", dtype=dtype, peer_name="1 thread")
        name = "2 layers, a token of T=32768 G=512"
        if bench.wants(name, dtype):
            ours, near = (seconds(T, dtype, layers=2, least=1) / T * 1e6 for T in (32768, 2048))
            bench.record(name, ours, near, "us", dtype=dtype, peer_name="T=2048 G=512")


def main(argv=None):
    if argv is None:
        argv = sys.argv[1:]
    if argv[:1] == ["--side"]:
        parser = argparse.ArgumentParser()
        parser.add_argument("--side")
        for name in ("length", "group", "repeats", "layers"):
            parser.add_argument(f"--{name}", type=int)
        parser.add_argument("--dtype")
        return one_side(**vars(parser.parse_args(argv)))
    bench = harness.Bench("train_step", argv)
    compare(bench, "ours", ("peer", "peer checkpointing"), CASES)
    scaling(bench)


if __name__ == "__main__":
    main()
