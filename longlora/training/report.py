"""What a run reports in words and pictures: the lines of its steps, options.yaml, loss.png."""

import os
from collections.abc import Callable

from longlora.disk import write_text
from longlora.evaluation.ppl import perplexity
from longlora.training.best import Best
from longlora.training.options import TrainOptions

OPTIONS = "options.yaml"


def line(row: dict, steps: int, left: float) -> str:
    """A row of metrics as a line of the report; left: seconds until the run ends."""
    clock = f"{int(left) // 3600}:{int(left) // 60 % 60:02}:{int(left) % 60:02}"
    text = (
        f"step {row['step']}/{steps}  loss {row['loss']:.4f}  learning rate {row['learning_rate']:.3g}  "
        f"grad norm {row['grad_norm']:.3g}  {row['tokens_per_s']:,.0f} tokens/s  {clock} left"
    )
    return text + (f"  held-out perplexity {row['eval_perplexity']:.3f}" if "eval_loss" in row else "")


def last_line(o: TrainOptions, rows: list[dict], best: Best | None = None) -> str:
    """The last line of the report of a run that was not stopped; best: the checkpoint that is the result."""
    evaluated = [row["eval_perplexity"] for row in rows if "eval_perplexity" in row]
    if not evaluated:
        return f"saved {o.output_dir}"
    last, what = evaluated[-1], ""
    if best is not None:
        last, what = perplexity(best.loss), f", the best checkpoint, of step {best.step}"
    elif o.load_best_model_at_end:
        what = ", of the last step, as no checkpoint has a finite held-out loss"
    change = f"{evaluated[0]:.3f} -> {last:.3f}"
    return f"saved {o.output_dir}{what}; held-out perplexity {change}, dense attention"


def write_options(o: TrainOptions) -> None:
    """Write the options as options.yaml into output_dir; --config reads them back."""
    import yaml

    write_text(os.path.join(o.output_dir, OPTIONS), yaml.safe_dump(o.to_dict(), sort_keys=False))


def draw(o: TrainOptions, rows: list[dict], say: Callable[[str], object]) -> None:
    """Draw loss.png into output_dir, once there is a loss. A picture that fails is said and ends no run."""
    if any("loss" in row for row in rows):
        try:
            from longlora import plots

            plots.loss(os.path.join(o.output_dir, "loss.png"), rows)
        except Exception as error:
            say(f"loss.png could not be drawn: {error}")
