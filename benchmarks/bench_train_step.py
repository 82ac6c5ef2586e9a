"""One training step of LongLoRA on SmolLM2-135M's shapes, ours against transformers + peft: seconds and peak
memory.

Both sides train the same: LoRA r = 8 on q, k, v, o, the tied embedding and all norms; S2-Attn; AdamW; one
sequence per step; random weights. The peer calls SDPA with is_causal once per kind of head, with the groups
as a batch. It runs with and without gradient checkpointing. Each side runs in its own process. Their steps
are timed in turn, because a machine's speed changes over time. The memory of a side is the peak resident size
of its process, which includes the interpreter and imported modules.

On a GPU only our side runs, in bfloat16 with random weights of Llama-2-7B's shapes. Rows give tokens per
second, the GPU memory in use, and how far the plan is from it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import numpy as np

from longlora import job

from . import harness

CONFIG = dict(
    model_type="llama",
    architectures=["LlamaForCausalLM"],
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    hidden_act="silu",
    attention_bias=False,
    initializer_range=0.04,
    rope_theta=100000.0,
    bos_token_id=1,
    eos_token_id=2,
)
CASES = [(2048, 512), (4096, 1024)]
LLAMA2 = dict(
    CONFIG,
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=128,
    max_position_embeddings=4096,
    initializer_range=0.02,
    tie_word_embeddings=False,
    rope_theta=10000.0,
)
SMALL = dict(
    LLAMA2,
    vocab_size=260,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
GPU_CASES = {8192: (15_000, 22_700), 32768: (10_000, 14_800)}  # length -> tokens/s: must, aim
RATE = 1e-4
ALONE = "ours on 1 thread"
PAUSE = 0.5  # seconds before a step: the idle threads of the other side spin for a while


def tokens(length):
    return np.random.default_rng(0).integers(0, CONFIG["vocab_size"], length + 1).astype(np.int32)


def our_step(length, group, dtype, layers):
    from longlora.decoder.config import read_config
    from longlora.decoder.lora import LoraConfig
    from longlora.decoder.model import Model
    from longlora.decoder.plan import plan
    from longlora.training.optimizer import AdamW

    config = read_config(CONFIG | {"num_hidden_layers": layers})
    about = plan(config, dtype=dtype, sequence_length=length, group_size=group, lora=LoraConfig())
    model = Model(
        config,
        dtype=dtype,
        lora=LoraConfig(),
        plan=about,
        attention={"group_size": group, "boundary": "split", "shift": "half"},
    )
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
    """S2-Attn by SDPA: q [1,H,T,D], k and v [1,K,T,D].

    Plain heads have T/G groups. Shifted heads have half a group at either end and whole groups between.
    """
    import torch

    sdpa = torch.nn.functional.scaled_dot_product_attention
    heads, length = query.shape[1:3]
    key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    plain, shifted, half = slice(0, heads // 2), slice(heads // 2, heads), group // 2

    def grouped(chosen, start, stop, size):
        parts = [
            x[0, chosen, start:stop].unflatten(1, (-1, size)).transpose(0, 1) for x in (query, key, value)
        ]
        return sdpa(*parts, is_causal=True, scale=scaling).transpose(0, 1).flatten(1, 2)

    first, last = grouped(shifted, 0, half, half), grouped(shifted, length - half, length, half)
    middle = grouped(shifted, half, length - half, group)
    out = torch.cat([grouped(plain, 0, length, group), torch.cat([first, middle, last], 1)])
    return out.transpose(0, 1)[None], None


def torch_step(length, group, dtype, checkpointing=False, swapped=False):
    """A step of transformers + peft. `swapped`: with the attention and layers of longlora.torch."""
    import functools

    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    transformers.AttentionInterface.register("s2_sdpa", functools.partial(s2_attention, group=group))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{key: value for key, value in CONFIG.items() if key not in ("model_type", "architectures")}
    )
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=getattr(torch, dtype), attn_implementation="s2_sdpa"
    )
    model = get_peft_model(
        model, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    )
    # modules_to_save would copy the embedding and untie the head.
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


def one_side(side, length, group, dtype, layers):
    """The process of one side: a warm-up step, then one step per input line.

    It prints the seconds of each step and, at the end, its memory and losses as JSON.
    """
    kept = None
    if side.startswith("ours"):
        step, kept = our_step(length, group, dtype, layers)
    else:
        step = torch_step(length, group, dtype, side == "peer checkpointing", side == "torch")
    losses = [step()]
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        losses.append(step())
        print(time.perf_counter() - start, flush=True)
    print(json.dumps({"gib": job.peak_memory() / 2**30, "losses": losses, "checkpointing": kept}))


def gpu_step(length, device, repeats, smoke):
    """The process of the steps on a GPU. It prints one JSON line."""
    from longlora import cuda
    from longlora.decoder.config import read_config
    from longlora.decoder.lora import LoraConfig
    from longlora.decoder.model import Model
    from longlora.decoder.plan import plan
    from longlora.training.optimizer import AdamW

    from .gpu import Gpu

    gpu = Gpu(device, smoke)
    config, (before, total) = read_config(SMALL if smoke else LLAMA2), cuda.memory_info(gpu.index)
    about = plan(
        config,
        dtype="bfloat16",
        sequence_length=length,
        group_size=length // 4,
        lora=LoraConfig(),
        device=gpu.device,
    )
    if not about.fits:
        raise SystemExit(f"{length} tokens do not fit: {about.text()}")
    model = Model(
        config,
        dtype="bfloat16",
        lora=LoraConfig(),
        plan=about,
        device=gpu.device,
        attention={"group_size": length // 4, "boundary": "split", "shift": "half"},
    )
    fill(model, gpu)
    optimizer = AdamW(model.parameters, max_grad_norm=1.0)
    rates, norms = dict.fromkeys(model.kinds, 1e-5), []
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (1, length + 1)).astype(np.int32)

    def step():
        model.zero_grad()
        model.train_microbatch(ids[:, :-1], ids[:, 1:], loss_scale=1 / length, read=False)
        norms.append(optimizer.step(rates))

    for _ in range(2):
        step()
    cuda.synchronize(gpu.index)
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    cuda.synchronize(gpu.index)
    seconds = (time.perf_counter() - start) / repeats
    print(
        json.dumps(
            {
                "seconds": seconds,
                "planned": about.total,
                "measured": before - cuda.memory_info(gpu.index)[0],
                "others": total - before,
                "checkpointing": about.checkpointing,
                "norms": norms,
            }
        )
    )


def fill(model, gpu):
    """Fill the model with random weights, drawn on the GPU if torch is there."""
    if gpu.torch is None:
        return model.init_random(0)
    for name in model.config.tensor_shapes():  # Model has filled LoRA's
        there = gpu.torch.from_dlpack(model.tensor(name))
        if name.endswith("norm.weight"):
            there.fill_(1)
        else:
            there.normal_(0, model.config.initializer_range)
    gpu.torch.cuda.synchronize()
    model.refresh()


def on_gpu(bench):
    for length, target in GPU_CASES.items():
        length = bench.gpu.size(length, 32)
        name = f"Llama-2-7B T={length} G={length // 4}"
        if not bench.wants(name, "bfloat16"):
            continue
        repeats = bench.gpu.size(max(2, round(3 * bench.options.seconds)), 1)
        command = [
            sys.executable,
            "-m",
            "benchmarks.bench_train_step",
            "--gpu",
            "--length",
            str(length),
            "--repeats",
            str(repeats),
            "--device",
            bench.gpu.device,
            *["--smoke"] * bench.gpu.smoke,
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"  {name}: failed", flush=True)
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        bench.record(
            f"{name} step, checkpointing {found['checkpointing']}",
            length / found["seconds"],
            None,
            "tok/s",
            dtype="bfloat16",
            target=target,
            judged="ours",
        )
        bench.record(f"{name} memory", found["measured"] / 2**30, None, "GiB", dtype="bfloat16")
        bench.record(
            f"{name} context and other processes", found["others"] / 2**30, None, "GiB", dtype="bfloat16"
        )
        bench.record(
            f"{name} plan's error",
            abs(found["planned"] / max(found["measured"], 1) - 1) * 100,
            None,
            "%",
            dtype="bfloat16",
            target=(5, 2),
            judged="ours",
        )


def measured(bench, sides, length, group, dtype, layers=CONFIG["num_hidden_layers"], least=2):
    """Run each side in its own process, their steps in turn -> side -> its JSON, with its median seconds."""
    repeats, running = max(least, round(bench.options.seconds * 2)), {}
    for side in sides:
        environment = os.environ | {"OMP_NUM_THREADS": "1" if side == ALONE else str(bench.options.threads)}
        command = [
            sys.executable,
            "-m",
            "benchmarks.bench_train_step",
            "--side",
            side,
            "--length",
            str(length),
            "--group",
            str(group),
            "--dtype",
            dtype,
            "--layers",
            str(layers),
        ]
        running[side] = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        if running[side].stdout.readline() != "ready\n":
            raise SystemExit(f"{side} failed")
    times, figures = {side: [] for side in sides}, {}
    for _ in range(repeats):
        for side, process in running.items():
            time.sleep(PAUSE)
            print(file=process.stdin, flush=True)
            times[side].append(float(process.stdout.readline()))
    for side, process in running.items():
        said, _ = process.communicate()
        figures[side] = json.loads(said.splitlines()[-1]) | {"seconds": statistics.median(times[side])}
    return figures


def compare(bench, ours, peers, cases):
    """Record time and memory of side `ours` against each of `peers`."""
    for length, group in cases:
        for dtype in ("float32", "bfloat16"):
            name = f"T={length} G={group}"
            if not bench.wants(name, dtype):
                continue
            for side in peers:
                figures = measured(bench, (ours, side), length, group, dtype)
                for what, unit in (("seconds", "s"), ("gib", "GiB")):
                    bench.record(
                        f"{name} {'step' if unit == 's' else 'memory'}",
                        figures[ours][what],
                        figures[side][what],
                        unit,
                        dtype=dtype,
                        peer_name=side.replace("peer", "transformers+peft"),
                    )


def scaling(bench):
    """Ours against ours: all threads against one, and the cost per token of a long and a short sequence."""
    for dtype in ("float32", "bfloat16"):
        name = "T=2048 G=512 on all threads"
        if bench.wants(name, dtype) and bench.options.threads > 1:
            figures = measured(bench, ("ours", ALONE), 2048, 512, dtype)
            bench.record(
                name,
                figures["ours"]["seconds"],
                figures[ALONE]["seconds"],
                "s",
                dtype=dtype,
                peer_name="1 thread",
            )
        name = "2 layers, a token of T=32768 G=512"
        if bench.wants(name, dtype):
            ours, near = (
                measured(bench, ("ours",), T, 512, dtype, layers=2, least=1)["ours"]["seconds"] / T * 1e6
                for T in (32768, 2048)
            )
            bench.record(name, ours, near, "us", dtype=dtype, peer_name="T=2048 G=512")


def main(argv=None):
    if argv is None:
        argv = sys.argv[1:]
    if argv[:1] == ["--side"]:
        parser = argparse.ArgumentParser()
        parser.add_argument("--side")
        for name in ("length", "group", "layers"):
            parser.add_argument(f"--{name}", type=int)
        parser.add_argument("--dtype")
        return one_side(**vars(parser.parse_args(argv)))
    if argv[:1] == ["--gpu"]:
        parser = argparse.ArgumentParser()
        for name in ("length", "repeats"):
            parser.add_argument(f"--{name}", type=int)
        parser.add_argument("--device")
        parser.add_argument("--smoke", action="store_true")
        return gpu_step(**vars(parser.parse_args(argv[1:])))
    bench = harness.Bench("train_step", argv)
    if bench.gpu is not None:
        return on_gpu(bench)
    compare(bench, "ours", ("peer", "peer checkpointing"), CASES)
    scaling(bench)


if __name__ == "__main__":
    main()
