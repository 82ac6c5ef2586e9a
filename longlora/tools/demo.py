"""`longlora demo` extends a small model from 256 to 2048 tokens, measures it, and teaches it to answer.

Model and texts ship with the package in longlora/assets; the scripts that made them are in the repository's
demo/. The demo uses only the public functions ppl, train and merge, and Session.
"""

import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from longlora import plots
from longlora.decoder.config import read_config
from longlora.disk import write_json
from longlora.errors import UserError
from longlora.evaluation import ppl
from longlora.files.merge import merge
from longlora.tools import demo_answers
from longlora.training.driver import train

ASSETS = Path(__file__).parents[1] / "assets"
MODEL, TEXT, HELD_OUT = ASSETS / "model", ASSETS / "train", ASSETS / "held_out"
LENGTHS = (256, 512, 1024, 2048)
TARGET = LENGTHS[-1]
GROUP = 512
STEPS = 240
# A small model needs far larger learning rates than the paper's 2e-5.
SETTINGS = dict(
    target_length=TARGET,
    group_size=GROUP,
    learning_rate=1e-3,
    embedding_learning_rate=2e-3,
    lr_scheduler_type="cosine",
    warmup_steps=10,
    logging_steps=10,
)
Curve = tuple[list[float], list[float]]
POINTS = 32  # on the curve of perplexity by position
NEXT = """Next, a model of your own: a Hugging Face directory or a .gguf file.
    longlora inspect MODEL
    longlora plan  --model MODEL --target-length 32768
    longlora train --model MODEL --data TEXT.txt --target-length 32768 --output-dir extended
    longlora ppl   --model MODEL --adapter extended --data OTHER.txt --lengths 4096,8192,16384,32768
    longlora train --model MODEL --adapter extended --data QUESTIONS.jsonl --output-dir taught
    longlora chat  --model MODEL --adapter taught
    longlora merge --model MODEL --adapter taught --output-dir merged"""


def run(
    output_dir: str | os.PathLike[str] = "longlora-demo",
    steps: int | None = None,
    say: Callable[[str], object] = print,
    device: str = "auto",
) -> dict[str, Any]:
    """Run the demo -> the content of report.json: lengths, perplexities before and after, answers.

    Writes report.json, loss.png, perplexity.png, attention.png, adapter/, merged/, questions.jsonl and
    taught/ to output_dir. steps: training steps on text (default: STEPS; the demo takes under 5 minutes on 2
    cores). device: as in train. UserError if output_dir holds anything but an earlier demo.
    """

    def indented(line: str) -> object:
        return say(f"   {line}")

    started = time.perf_counter()
    steps = STEPS if steps is None else steps
    if steps < 1:
        raise UserError(f"steps should be at least 1, got {steps}")
    output = _prepared(Path(output_dir))
    native = read_config(MODEL).max_position_embeddings
    say(
        f"A model of {_parameters():.1f} million parameters, pretrained on {native} tokens, learns to read "
        f"{TARGET}. Files go to {output}.\n"
    )

    books = ", ".join(sorted(path.stem for path in HELD_OUT.glob("*.txt")))
    say(f"1. Before: perplexity on text it has never seen ({books})")
    before, curve_before = _perplexity(say, "as it is", device=device)
    interpolated, curve_interpolated = _perplexity(
        say,
        f"positions interpolated by {TARGET // native}, untrained",
        rope_type="linear",
        target_length=TARGET,
        device=device,
    )

    say(f"\n2. LoRA and S2-Attn training on {TARGET} tokens")
    history = _extend(output, steps, indented, device)

    say("\n3. After: the same text, dense attention")
    after, curve_after = _perplexity(say, "extended", adapter=output / "adapter", device=device)

    plots.loss(output / "loss.png", history)
    plots.perplexity(
        output / "perplexity.png",
        {"before": curve_before, "interpolated, untrained": curve_interpolated, "after": curve_after},
        native=native,
    )
    plots.attention(output / "attention.png", TARGET, GROUP)
    report: dict[str, Any] = {
        "lengths": list(LENGTHS),
        "before": before,
        "interpolated": interpolated,
        "after": after,
        "native_length": native,
        "steps": steps,
        "tokens_trained": steps * TARGET,
        "loss": [[row["step"], row["loss"]] for row in history],
    }
    say("\n" + table(report))

    say(f"\n4. Training on {demo_answers.COUNT} questions and answers about the training texts")
    if demo_answers.teach(MODEL, output / "adapter", TEXT, output, indented, device) is not None:
        raise KeyboardInterrupt
    say("\n5. A question about the texts it has never seen")
    adapters = {"extended": output / "adapter", "taught": output / "taught"}
    report["answers"] = demo_answers.ask(MODEL, adapters, HELD_OUT, indented, device)
    report["seconds"] = round(time.perf_counter() - started, 1)
    write_json(output / "report.json", report)
    say(
        f"\n{report['seconds']:.0f} seconds. In {output}: report.json, loss.png, perplexity.png, "
        "attention.png,\n"
        "adapter/ and taught/ (AutoPeftModelForCausalLM loads them), merged/ (stock transformers loads it).\n"
    )
    say(NEXT)
    return report


def _extend(output: Path, steps: int, say: Callable[[str], object], device: str) -> list[dict[str, Any]]:
    """Train output/adapter, write output/merged -> the rows of metrics.jsonl."""
    result = train(
        model=MODEL,
        data=TEXT,
        output_dir=output / "adapter",
        max_steps=steps,
        say=say,
        device=device,
        **SETTINGS,
    )
    if result.stopped is not None:
        raise KeyboardInterrupt
    merge(MODEL, output / "adapter", output / "merged")
    return result.history


def table(report: dict[str, Any]) -> str:
    """The perplexities of the report as a table."""
    lines = ["Perplexity by length    before    interpolated    after training"]
    for length, *figures in zip(*(report[name] for name in ("lengths", "before", "interpolated", "after"))):
        mark = "  (pretrained on this length)" if length == report["native_length"] else ""
        before, interpolated, after = figures
        lines.append(f"{length:>20}{before:>10.1f}{interpolated:>16.1f}{after:>18.1f}{mark}")
    return "\n".join(lines)


def _prepared(output: Path) -> Path:
    """The output directory, made if necessary, without the files of an earlier demo."""
    report = output / "report.json"
    if output.exists() and not (output.is_dir() and (report.exists() or not any(output.iterdir()))):
        raise UserError(
            f"{output}: exists and holds no earlier demo (report.json); expected a new or an empty directory"
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_json(report, {"lengths": list(LENGTHS)})
        for name in ("adapter", "merged", "taught"):
            if (output / name).exists():
                shutil.rmtree(output / name)
    except OSError as error:
        raise UserError(f"{output}: cannot be written: {error.strerror}") from None
    return output


def _parameters() -> float:
    return sum(math.prod(shape) for shape in read_config(MODEL).tensor_shapes().values()) / 1e6


def _perplexity(say: Callable[[str], object], what: str, **options: Any) -> tuple[list[float], Curve]:
    """The perplexity at each length, and the curve (positions, perplexities) inside the longest windows."""
    results = ppl.run(MODEL, HELD_OUT, LENGTHS, bins=POINTS, **options)["results"]
    say(f"   {what}: " + ", ".join(f"{row['perplexity']:.1f} at {row['length']}" for row in results))
    parts = results[-1]["by_position"]
    curve = [(part["first"] + part["last"]) / 2 for part in parts], [part["perplexity"] for part in parts]
    return [row["perplexity"] for row in results], curve
