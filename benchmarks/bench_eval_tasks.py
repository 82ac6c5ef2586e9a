"""Log-likelihoods for tasks of lm-eval, with SmolLM2-135M's shapes and random weights: requests per second.

Ours against lm-eval's own `hf` model with a batch of 8, on the same token ids: questions of 60 to 140 tokens
with four choices, of 4 to 16 tokens or of one. There are 5 questions without examples, and 5 or 60 behind
1000 tokens of examples that all of them share. Each side runs in its own process, and their rounds in turn.
The first round is not counted.

--smoke runs our side alone on a tiny model; its figures mean nothing.
"""

import argparse
import os
import statistics
import sys
import time

import numpy as np

from longlora.decoder.config import read_config

from . import harness
from .bench_train_step import CONFIG, PAUSE, SMALL

CASES = {  # questions, tokens of the examples, and of a choice from and to
    "four choices": (5, 0, 4, 16),
    "four letters": (5, 0, 1, 1),
    "four choices, examples": (5, 1000, 4, 16),
    "four letters, examples": (5, 1000, 1, 1),
    "four letters, examples, 60 questions": (60, 1000, 1, 1),
}
BATCH = 8


def requests(case, vocab):
    """Context and continuation of each request, as lists of token ids."""
    questions, examples, least, most = CASES[case]
    random, pairs = np.random.default_rng(0), []
    start = random.integers(0, vocab, examples)
    for _ in range(questions):
        context = np.concatenate([start, random.integers(0, vocab, random.integers(60, 141))])
        for _ in range(4):
            pairs.append((context, random.integers(0, vocab, random.integers(least, most + 1))))
    return pairs


def ours(config, pairs):
    from longlora.decoder.cache import Cache
    from longlora.decoder.generate import Generator
    from longlora.decoder.model import Model
    from longlora.evaluation.likelihood import Scorer

    config = read_config(config)
    generator = Generator(Model(config).init_random(0), Cache(config, 16, 1200))
    pairs = [(context.astype(np.int32), rest.astype(np.int32)) for context, rest in pairs]
    return lambda: Scorer(generator).score(pairs)


def hf(config, pairs):
    import torch
    import transformers
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer, models

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    fields = {name: x for name, x in config.items() if name not in ("model_type", "architectures")}
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**fields)).eval()
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="a", pad_token="a")
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH, max_length=1200)
    asked = [(("", str(i)), context.tolist(), rest.tolist()) for i, (context, rest) in enumerate(pairs)]
    return lambda: lm._loglikelihood_tokens(asked, disable_tqdm=True)


SIDES = {"ours": ours, "hf": hf}


def one_side(side, case, smoke):
    """The process of one side: a round for each input line, which prints its seconds."""
    config = SMALL if smoke else CONFIG
    score = SIDES[side](config, requests(case, config["vocab_size"]))
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        score()
        print(time.perf_counter() - start, flush=True)


def measured(bench, sides, case):
    """The rounds of all sides in turn -> side -> requests per second."""
    rounds = max(1, round(bench.options.seconds))
    times = harness.in_turn(bench, sides, ["--case", case], rounds, PAUSE)
    return {side: 4 * CASES[case][0] / statistics.median(sum(found, [])) for side, found in times.items()}


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--side"]:
        parser = argparse.ArgumentParser()
        parser.add_argument("--side")
        parser.add_argument("--case")
        parser.add_argument("--smoke", action="store_true")
        return one_side(**vars(parser.parse_args(argv)))
    bench = harness.Bench("eval_tasks", argv)
    if bench.gpu is not None:
        raise SystemExit("eval_tasks: is measured on the CPU only")
    for case in CASES:
        if bench.wants(case):
            found = measured(bench, ["ours"] if bench.options.smoke else list(SIDES), case)
            us, them = found["ours"], found.get("hf")
            bench.record(case, us, them, "req/s", peer_name="hf", ratio=them and us / them)


if __name__ == "__main__":
    main()
