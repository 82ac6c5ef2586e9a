"""One run of benchmarks/paper.py: train the demo's model in one way, and evaluate it.

The package trains it, as `longlora train` does. Observed, a subclass of the package's model, has what the
package has no option for: the patterns of attention that lost in the paper, and evaluation with the pattern
of the training.
"""

import functools
import math
import tempfile
import time
from unittest import mock

import numpy as np

from longlora import _C
from longlora.data.text import Corpus
from longlora.decoder import model as decoder
from longlora.device import CPU
from longlora.evaluation import ppl
from longlora.files.open_model import open_model
from longlora.ops import SHIFTS
from longlora.tools.demo import HELD_OUT, MODEL, TEXT
from longlora.training import options
from longlora.training.driver import Driver
from longlora.training.inputs import Setup, Source
from longlora.training.run import Run

NATIVE = 256  # tokens that the demo's model was pretrained on
CURVE_SAMPLES = 8  # held-out sequences that an evaluation during the training takes


def dilated(heads, length, group):
    """Each query sees `group` keys, in steps that grow evenly over the heads from 1 to 2 -> bool [H,T,T]."""
    mask = np.zeros((heads, length, length), bool)
    query = np.arange(length)
    for head in range(heads):
        for j in range(group):
            key = query - int(j * (1 + head / max(heads - 1, 1)))
            mask[head, query[key >= 0], key[key >= 0]] = True
    return mask


def strided(heads, length, group):
    """Half of the heads see the last `group` keys, the others every sqrt(T)-th key -> bool [H,T,T]."""
    past = np.arange(length)[:, None] - np.arange(length)[None]
    local, stride = (past >= 0) & (past < group), (past >= 0) & (past % math.isqrt(length) == 0)
    return np.stack([local if head < heads // 2 else stride for head in range(heads)])


MASKS = {"dilated": dilated, "strided": strided}


class Masked:
    """The ops with torch's attention under a mask in place of S2-Attn: the reference for MASKS."""

    def __init__(self, mask):
        import torch

        self.mask = torch.from_numpy(mask)

    def __getattr__(self, name):
        return getattr(_C, name)

    def _attention(self, q, k, v, scale):
        """q [B,T,H,D], k and v [B,T,K,D] -> [B,T,H,D]."""
        import torch

        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        length, share = q.shape[2], q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(share, 1) for x in (k, v))
        mask = self.mask[:, :length, :length]
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)

    def s2_attention_forward(self, out, lse, q, k, v, cu_seqlens, group, boundary, shift, scale):
        import torch

        with torch.no_grad():
            inputs = (torch.from_dlpack(x) for x in (q, k, v))
            torch.from_dlpack(out).copy_(self._attention(*inputs, scale))

    def s2_attention_backward(
        self, dq, dk, dv, dout, q, k, v, out, lse, cu_seqlens, group, boundary, shift, scale
    ):
        import torch

        inputs = [torch.from_dlpack(x).detach().clone().requires_grad_() for x in (q, k, v)]
        result = self._attention(*inputs, scale)
        gradients = torch.autograd.grad(result, inputs, torch.from_dlpack(dout))
        for place, gradient in zip((dq, dk, dv), gradients):
            torch.from_dlpack(place).copy_(gradient)


class Observed(decoder.Model):
    """The package's Model with a pattern of the paper, which can also evaluate with the pattern it trains
    with.

    pattern: None, "layers" (every second layer is shifted in all its heads), or a name of MASKS.
    own: whether the next evaluations use the pattern of the training. They are dense otherwise.
    """

    def __init__(self, *arguments, pattern=None, **keywords):
        super().__init__(*arguments, **keywords)
        self.own, self.masked = False, None
        if pattern == "layers":
            for layer in self.network.layers:
                layer._attends = functools.partial(self._in_turns, layer)
        elif pattern is not None:
            mask = MASKS[pattern](
                self.config.num_attention_heads, self.plan.sequence_length, self._attention[0]
            )
            self.masked = Masked(mask)

    @staticmethod
    def _in_turns(layer, batch):
        group, boundary, shift = batch.attention
        if shift != SHIFTS["none"]:  # the evaluation is dense: it shifts nothing
            shift = SHIFTS["all" if layer.index % 2 else "none"]
        return batch.cu_seqlens, group, boundary, shift, layer.scale

    def _fill(self, batch, ids, attention, positions, cu_seqlens):
        attention = self._attention if self.own else attention
        batch.ops = self.masked if self.masked is not None and attention is not None else _C
        super()._fill(batch, ids, attention, positions, cu_seqlens)


@functools.cache
def held_out():
    """The tokens of the held-out texts: those of `longlora demo`."""
    base = open_model(MODEL)
    return ppl.read_ids(Corpus(str(HELD_OUT)), base.tokenizer(), base.config)


@functools.cache
def _cache():
    """A folder for the tokens of the training text, as long as this process lives."""
    return tempfile.TemporaryDirectory()


def perplexities(model, lengths):
    return {str(row["length"]): row["perplexity"] for row in ppl.measure(model, held_out(), lengths)}


def perform(run):
    """Make the run -> its row without its key: dense and own perplexities by length, a curve, seconds.

    run: dict of
        train    options of `longlora train`
        seed     of LoRA's start and the order of the data
        lengths  of the dense evaluation
        pattern  as Observed takes it, if any
        own      the length at which to evaluate with the pattern of the training too, if any
        curve    evaluate every N steps, if any
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        keywords = dict(run["train"], model=MODEL, data=TEXT, output_dir=folder, cache_dir=_cache().name)
        if run.get("curve"):
            keywords |= dict(eval_data=HELD_OUT, eval_steps=run["curve"], max_eval_samples=CURVE_SAMPLES)
        o = options.from_dict(keywords | {"seed": run["seed"], "device": CPU})
        source = Source(o)
        setup = Setup(o, source.config, CPU)
        model = functools.partial(Observed, pattern=run.get("pattern"))
        with mock.patch.object(decoder, "Model", model):
            driver = Driver(Run(o, source, setup, lambda line: None), CPU)
        result = driver.train()
    if result.stopped is not None:
        raise KeyboardInterrupt
    trained = time.perf_counter()
    row = {"dense": perplexities(driver.model, run["lengths"]), "loss": result.loss}
    if run.get("own"):
        driver.model.own = True
        row["own"] = perplexities(driver.model, [run["own"]])
    if run.get("curve"):
        row["curve"] = [[m["step"], math.exp(m["eval_loss"])] for m in result.history if "eval_loss" in m]
    row["train_seconds"] = round(trained - started, 1)
    row["seconds"] = round(time.perf_counter() - started, 1)
    return row
