"""The charts of docs/paper.md. A chart takes the Stats of the results and gives a figure of its own.

Colours belong to what is drawn: dense attention, S2-Attn and short attention have theirs in every chart.
"""

from . import paper_cost
from .paper_run import NATIVE
from .paper_stats import mean, spread
from .paper_tables import (
    CURVES,
    GROUPS,
    ONE_RATE,
    PATTERNS,
    TARGET,
    TARGETS,
    TRAINED,
    full,
    longlora,
    upto,
    what_is_trained,
)

GREY, BLUE, RED, GREEN, LIGHT = "#636363", "#2171b5", "#d94801", "#238b45", "#9ecae1"


def _figure(height=3.6):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _line(axes, x, figures, **style):
    """Draw the means of figures by x with their spreads; figures without a value are left out."""
    points = [(at, mean(figure), spread(figure)) for at, figure in zip(x, figures) if figure]
    if points:
        x, y, error = zip(*points)
        axes.errorbar(x, y, yerr=error, capsize=3, marker="o", markersize=4, **style)


def _lengths(axes, lengths):
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.minorticks_off()


def _legend(axes, **where):
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, **where)


def attention(stats):
    """Table 1: what the shift is for; Tables 6 and 7: other patterns and groups."""
    figure, (left, right) = _figure()
    for how, tested, label, style in (
        ("dense", "dense", "dense", dict(color=GREY)),
        ("s2", "dense", "S²-Attn", dict(color=BLUE)),
        ("short", "dense", "short", dict(color=RED)),
        ("short", "own", "short, evaluated as short", dict(color=RED, linestyle="--")),
    ):
        found = [stats.of(full(T, how), tested, T) for T in TARGETS]
        _line(left, TARGETS, found, label=label, **style)
    _lengths(left, TARGETS)
    left.set(
        xlabel="tokens, trained and evaluated",
        ylabel="perplexity",
        title="Table 1: attention in the training",
    )
    _legend(left)
    rows = [(f"group {name}" if "/" in name else name, one, LIGHT) for name, one in GROUPS.items()]
    rows += [(name, one, BLUE if one == longlora() else RED) for name, one in PATTERNS.items()]
    rows = [(name, stats.of(one, "dense", TARGET), colour) for name, one, colour in rows]
    _bars(right, [row for row in rows if row[1]])
    right.set(xlabel=f"perplexity at {TARGET}, evaluated dense", title="Tables 6 and 7: patterns and groups")
    return figure


def _bars(axes, rows):
    """Horizontal bars of (name, figure, colour), the first on top, from a bit below the smallest value."""
    for place, (_, found, colour) in enumerate(rows):
        axes.barh(place, mean(found), xerr=spread(found), color=colour, height=0.7, capsize=2)
        axes.text(mean(found) + spread(found), place, f" {mean(found):.1f}", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows], fontsize=8)
    axes.invert_yaxis()
    if rows:
        low, high = min(mean(row[1]) for row in rows), max(mean(row[1]) for row in rows)
        axes.set_xlim(low - 0.3 * (high - low) - 0.5, high + 0.15 * (high - low) + 0.5)
    axes.grid(axis="y", visible=False)


def training(stats):
    """Table 2: what is trained; Figure 5: by step."""
    figure, (left, right) = _figure()
    runs, width = what_is_trained().runs, 0.38
    for offset, (rate, colour) in enumerate(zip(ONE_RATE, (LIGHT, BLUE))):
        for place, name in enumerate(TRAINED):
            found = stats.of(runs[name, rate], "dense", TARGET)
            if found:
                label = f"rate {rate:g}" if place == 0 else None
                at = place + (offset - 0.5) * width
                left.barh(
                    at, mean(found), xerr=spread(found), height=width, color=colour, label=label, capsize=2
                )
                left.text(mean(found) + spread(found), at, f" {mean(found):.1f}", va="center", fontsize=7)
    left.set_yticks(range(len(TRAINED)), TRAINED, fontsize=8)
    left.invert_yaxis()
    left.grid(axis="y", visible=False)
    left.set(xlim=(30, None), xlabel=f"perplexity at {TARGET}", title="Table 2: what is trained")
    _legend(left, loc="lower right")
    for (name, one), colour in zip(CURVES.items(), (BLUE, GREY)):
        curve = stats.curve(one)
        if curve:
            x, y, error = zip(*curve)
            right.errorbar(x, y, yerr=error, color=colour, label=name, marker="o", markersize=4, capsize=3)
    right.set(xlabel="step", ylabel="perplexity", title="Figure 5: by step, S²-Attn, evaluated dense")
    _legend(right)
    return figure


def lengths(stats):
    """Tables 3 and 14: by length of the evaluation; Tables 11 to 13: what S2-Attn saves."""
    figure, (left, right) = _figure()
    for T, colour in zip(TARGETS, (GREEN, BLUE, RED)):
        found = [stats.of(longlora(T), "dense", n) for n in upto(T)]
        _line(left, upto(T), found, color=colour, label=f"trained to {T}")
        left.axvline(T, color=colour, linestyle=":", linewidth=1)
    _lengths(left, upto(TARGETS[-1]))
    left.set(
        xlabel="tokens in evaluation",
        ylabel="perplexity",
        title=f"Tables 3, 14: LongLoRA from {NATIVE} tokens",
    )
    _legend(left)
    measured = [
        stats.ratio(({"time": T}, "s2_seconds"), ({"time": T}, "dense_seconds")) for T in paper_cost.LENGTHS
    ]
    _line(right, paper_cost.LENGTHS, measured, color=BLUE, label="measured")
    model = [paper_cost.expected(paper_cost.demo(), T) for T in paper_cost.LENGTHS]
    right.plot(paper_cost.LENGTHS, model, color=GREY, linestyle="--", label="operations")
    _lengths(right, paper_cost.LENGTHS)
    right.set(
        xlabel="tokens of a sequence",
        ylabel="S²-Attn / dense, one step",
        ylim=(0, 1.1),
        title="Tables 11 to 13: what S²-Attn saves",
    )
    _legend(right)
    return figure


CHARTS = {"paper-attention.png": attention, "paper-training.png": training, "paper-lengths.png": lengths}


def write(folder, stats):
    """Draw every chart into the folder."""
    for name, draw in CHARTS.items():
        draw(stats).savefig(folder / name, format="png")
