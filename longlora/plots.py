"""Pictures of a run as PNG files: loss, perplexity by position, attention pattern. They need no display."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

Path = str | os.PathLike[str]
Curve = tuple[Sequence[float], Sequence[float]]  # x and y of each point


def _figure(width=7, height=4, columns=1):
    """A figure of its own: pyplot would keep it, and choose a display for the whole program."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)


def _save(figure, path):
    from longlora.disk import replacing

    with replacing(path) as aside:
        figure.savefig(aside, format="png")


def loss(path: Path, metrics: Sequence[Mapping[str, Any]], title: str = "training loss") -> None:
    """Draw the loss by step. metrics: dicts with step and loss or eval_loss, as in metrics.jsonl."""
    figure, ((axes,),) = _figure()
    train = [(m["step"], m["loss"]) for m in metrics if "loss" in m]
    held_out = [(m["step"], m["eval_loss"]) for m in metrics if "eval_loss" in m]
    axes.plot(*zip(*train), color="#9ecae1" if len(train) > 20 else "#2171b5", linewidth=1, label="as logged")
    if len(train) > 20:
        smooth, mean, weight = [], 0.0, 0.0
        for _, value in train:
            mean, weight = 0.9 * mean + 0.1 * value, 0.9 * weight + 0.1
            smooth.append(mean / weight)  # unbiased: the first values do not dominate
        axes.plot([step for step, _ in train], smooth, color="#2171b5", label="smoothed (0.9)")
    if held_out:
        axes.plot(*zip(*held_out), "o-", color="#d94801", label="held out, dense attention")
    axes.set(xlabel="step", ylabel="loss per token (nats)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def perplexity(
    path: Path, curves: Mapping[str, Curve], native: int | None = None, title: str = "perplexity by position"
) -> None:
    """Draw curves, label -> (positions, perplexities), and a line at `native`, the pretraining length."""
    figure, ((axes,),) = _figure()
    for (label, (x, y)), colour in zip(curves.items(), ("#969696", "#d94801", "#2171b5", "#238b45")):
        axes.plot(x, y, label=label, color=colour, marker="o" if len(x) < 20 else None)
    if native:
        axes.axvline(native, color="black", linestyle=":", linewidth=1)
        axes.text(native, axes.get_ylim()[1], " native length", va="top", fontsize=8)
    axes.set(xlabel="tokens", ylabel="perplexity", title=title, yscale="log")
    for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis(lambda value, _: f"{value:g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    _save(figure, path)


def attention(path: Path, length: int, group_size: int, boundary: str = "split", shift: str = "half") -> None:
    """Draw which keys a query sees in a plain and in a shifted head: S2-Attn, LongLoRA section 3.2."""
    import numpy as np

    scale = max(1, length // 256)
    L, G = length // scale, max(1, group_size // scale)
    half, t, key = G // 2, np.arange(L)[:, None], np.arange(L)[None]
    plain = (key >= t // G * G) & (key <= t)
    shifted = (key >= np.where(t < half, 0, half + (t - half) // G * G)) & (key <= t)
    if boundary == "wrap":
        shifted |= (t < half) & (key >= L - half)
    if boundary == "swap":
        shifted |= (t >= L - half) & (key < half)
    figure, ((left, right),) = _figure(8, 4.2, 2)
    for axes, name, mask in (
        (left, "plain heads", plain if shift != "all" else shifted),
        (right, "shifted heads", shifted if shift != "none" else plain),
    ):
        axes.imshow(mask, cmap="Blues", extent=(0, length, length, 0), vmin=0, vmax=1.4)
        axes.set(xlabel="key", ylabel="query", title=f"{name}, group {group_size}")
    _save(figure, path)


def passkey(path: Path, results: Sequence[Mapping[str, Any]], context: int, pretrained: int) -> None:
    """Draw the share of found keys as a heat map: lengths from left to right, depths from top to bottom.

    results: rows with length, depth and accuracy, as evaluation.passkey.run returns them. A length may have
    depths of its own; one with random depths is a single block. context, pretrained: the context lengths of
    the model and of its base, in tokens. Both are marked.
    """
    from matplotlib import colormaps

    lengths = sorted({row["length"] for row in results})
    figure, ((axes,),) = _figure(max(5.0, 2.2 + 0.8 * len(lengths)), 4.6)
    colours = colormaps["RdYlGn"]
    for x, length in enumerate(lengths):
        cells = {row["depth"]: row["accuracy"] for row in results if row["length"] == length}
        depths = sorted(depth for depth in cells if depth != "random") or ["random"]
        edges = [0.0, *((a + b) / 2 for a, b in zip(depths, depths[1:])), 1.0]
        for depth, top, bottom in zip(depths, edges, edges[1:]):
            share = cells[depth]
            axes.bar(
                x, bottom - top, 1, top, color=colours(0.08 + 0.84 * share), edgecolor="white", linewidth=1
            )
            shown = f"{100 * share:.0f}" + ("\nat random" if depth == "random" else "")
            axes.text(x, (top + bottom) / 2, shown, ha="center", va="center", fontsize=8)
    marks = {pretrained: "base", context: "made for"}  # one mark if the two are equal
    for length, name in marks.items():
        if lengths[0] <= length <= lengths[-1]:  # after the last column that is not longer
            place = sum(x <= length for x in lengths) - 0.5
            axes.axvline(place, color="black", linewidth=2, linestyle="-" if length == context else ":")
            axes.text(place, -0.02, f"{name} {length:,}", ha="right", va="bottom", fontsize=8)
    axes.set(
        xlabel="tokens of the prompt",
        ylabel="depth of the key (0 is the beginning)",
        title="passkeys found, %\n",
    )
    axes.set(xlim=(-0.5, len(lengths) - 0.5), ylim=(1, 0))
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    _save(figure, path)
