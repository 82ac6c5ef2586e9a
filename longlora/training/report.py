"""What a run reports in words and pictures: the lines of its steps, options.yaml, loss.png."""

import contextlib
import os
from collections.abc import Callable
from typing import Any

from longlora.disk import write_text
from longlora.training.options import TrainOptions

OPTIONS = "options.yaml"


class Quiet:
    """A stream for progress: what cannot be written to `file` is dropped. A full disk ends no run."""

    def __init__(self, file: Any):
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._file.flush()


def quietly(say: Callable[[str], object]) -> Callable[[str], None]:
    """`say`, but a line that cannot be written ends no run: the disk is full, or nobody reads any more.

    A terminal that lacks a character gets its code.
    """

    def speak(line):
        try:
            say(line)
        except UnicodeEncodeError as error:
            with contextlib.suppress(OSError, ValueError):
                say(line.encode(error.encoding, "backslashreplace").decode(error.encoding))
        except OSError:
            pass

    return speak


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


def write_options(o: TrainOptions) -> None:
    """Write the options as options.yaml into output_dir; --config reads them back."""
    import yaml

    write_text(os.path.join(o.output_dir, OPTIONS), yaml.safe_dump(o.to_dict(), sort_keys=False))


def draw(o: TrainOptions, rows: list[dict]) -> None:
    """Draw loss.png into output_dir, once there is a loss."""
    if any("loss" in row for row in rows):
        from longlora import plots

        plots.loss(os.path.join(o.output_dir, "loss.png"), rows)
