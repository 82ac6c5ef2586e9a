"""What a run reports in words and pictures: the sentences before, between and after its steps, options.yaml,
loss.png."""

import math
import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from longlora.disk import write_text
from longlora.ops import shifted_heads
from longlora.training.options import TrainOptions

if TYPE_CHECKING:
    from longlora.training.run import Run, Trained

OPTIONS = "options.yaml"


def line(row: dict, steps: int, left: float) -> str:
    """A row of metrics as a line of the report; left: seconds until the run ends."""
    clock = f"{int(left) // 3600}:{int(left) // 60 % 60:02}:{int(left) % 60:02}"
    text = (
        f"step {row['step']}/{steps}  loss {row['loss']:.4f}  learning rate {row['learning_rate']:.3g}  "
        f"grad norm {row['grad_norm']:.3g}  {row['tokens_per_s']:,.0f} tokens/s  {clock} left"
    )
    return text + (f"  held-out perplexity {row['eval_perplexity']:.3f}" if "eval_loss" in row else "")


def last_line(o: TrainOptions, rows: list[dict]) -> str:
    """The last line of the report of a run that was not stopped."""
    evaluated = [row["eval_perplexity"] for row in rows if "eval_perplexity" in row]
    if not evaluated:
        return f"saved {o.output_dir}"
    change = f"{evaluated[0]:.3f} -> {evaluated[-1]:.3f}"
    return f"saved {o.output_dir}; held-out perplexity {change}, dense attention"


def describe(run: "Run", parameters: "Iterable[Trained]") -> Iterator[str]:
    """What the run will do, line by line."""
    o, setup, processes = run.o, run.setup, run.processes
    H, B, n = setup.config.num_attention_heads, o.per_device_train_batch_size, o.gradient_accumulation_steps
    if o.group_size is None:
        yield f"attention: dense causal, {H} heads"
    else:
        yield (
            f"attention: S2 {o.boundary}, group {o.group_size} of {o.sequence_length} tokens, "
            f"{shifted_heads(H, o.shift)}/{H} heads shifted by {o.group_size // 2}; evaluation is dense"
        )
    counts: dict[str, int] = {}
    for p in parameters:
        counts[p.kind] = counts.get(p.kind, 0) + math.prod(p.shape)
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in counts.items())
    yield f"trainable: {kinds}; total {sum(counts.values()):,}"
    yield setup.rope
    evaluated = f"; {run.evaluated:,} sequences are evaluated" if run.evaluated else ""
    yield f"data: {run.corpus.sentence}{evaluated}"
    each, shared = f"{B} x {n} x {o.sequence_length:,}", ""
    if processes > 1:
        each, shared = f"{processes} x {each}", f" by {processes} processes"
    warmup = f" after {run.warmup} steps of warm-up" if run.warmup else ""
    yield (
        f"steps: {run.steps:,} of {each} = {run.each * o.sequence_length:,} tokens{shared}; "
        f"learning rate {o.learning_rate:g}, embedding, head and norms {o.embedding_learning_rate:g}, "
        f"{o.lr_scheduler_type}{warmup}"
    )


def write_options(o: TrainOptions) -> None:
    """Write the options as options.yaml into output_dir; --config reads them back."""
    import yaml

    write_text(os.path.join(o.output_dir, OPTIONS), yaml.safe_dump(o.to_dict(), sort_keys=False))


def draw(o: TrainOptions, rows: list[dict]) -> None:
    """Draw loss.png into output_dir, once there is a loss."""
    if any("loss" in row for row in rows):
        from longlora import plots

        plots.loss(os.path.join(o.output_dir, "loss.png"), rows)
