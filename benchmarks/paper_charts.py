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


def _legend(axes):
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)


def _dots(axes, rows, kinds):
    """A row of dots for each (name, figures). kinds: label and style of each figure of a row."""
    for kind, (label, style) in enumerate(kinds):
        points = [(at, figures[kind]) for at, (_, figures) in enumerate(rows) if figures[kind]]
        if points:
            y, found = zip(*points)
            x, error = [mean(figure) for figure in found], [spread(figure) for figure in found]
            axes.errorbar(x, y, xerr=error, fmt="o", markersize=6, capsize=3, label=label, **style)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    _legend(axes)


def attention(stats):
    """Table 1: what the shift is for; Tables 6 and 7: other patterns and groups."""
    figure, (left, right) = _figure()
    left.axhline(0, color=GREY, linewidth=1)
    for how, tested, label, style in (
        ("s2", "dense", "S²-Attn", dict(color=BLUE)),
        ("short", "dense", "short", dict(color=RED)),
        ("short", "own", "short, evaluated as short", dict(color=RED, linestyle="--")),
    ):
        ratios = [stats.ratio((full(T, how), tested, T), (full(T, "dense"), "dense", T)) for T in TARGETS]
        above = [{seed: 100 * (value - 1) for seed, value in ratio.items()} for ratio in ratios]
        _line(left, TARGETS, above, label=label, **style)
    _lengths(left, TARGETS)
    left.set(xlabel="tokens, trained and evaluated", ylabel="perplexity above dense attention's (%)")
    left.set_title("Table 1: attention in the training", fontsize=10)
    _legend(left)
    runs = {(f"S²-Attn, {name}" if "/" in name else name): one for name, one in GROUPS.items()}
    runs |= {name: one for name, one in PATTERNS.items() if one != longlora()}
    rows = [(name, [_of(stats, one, tested) for tested in ("dense", "own")]) for name, one in runs.items()]
    hollow = dict(color=LIGHT, markerfacecolor="white")
    _dots(right, rows, [("dense", dict(color=BLUE)), ("as trained", hollow)])
    right.set(xlabel=f"perplexity at {TARGET}, by evaluation")
    right.set_title("Tables 6 and 7: patterns and groups", fontsize=10)
    return figure


def _of(stats, one, tested):
    return stats.of(one, tested, TARGET) if tested == "dense" or "own" in one else {}


def training(stats):
    """Table 2: what is trained; Figure 5: by step."""
    figure, (left, right) = _figure()
    runs = what_is_trained().runs
    rows = [(name, [stats.of(runs[name, rate], "dense", TARGET) for rate in ONE_RATE]) for name in TRAINED]
    _dots(left, rows, [(f"rate {rate:g}", dict(color=c)) for rate, c in zip(ONE_RATE, (RED, BLUE))])
    left.set(xlabel=f"perplexity at {TARGET}")
    left.set_title("Table 2: what is trained", fontsize=10)
    for (name, one), colour in zip(CURVES.items(), (BLUE, GREY)):
        curve = stats.curve(one)
        if curve:
            x, y, error = zip(*curve)
            right.errorbar(x, y, yerr=error, color=colour, label=name, marker="o", markersize=4, capsize=3)
    right.set(xlabel="step", ylabel="perplexity, evaluated dense")
    right.set_title("Figure 5: by step, trained with S²-Attn", fontsize=10)
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
    left.set(xlabel="tokens in evaluation", ylabel="perplexity")
    left.set_title(f"Tables 3 and 14: LongLoRA, pretrained on {NATIVE} tokens", fontsize=10)
    _legend(left)
    measured = [
        stats.ratio(({"time": T}, "s2_seconds"), ({"time": T}, "dense_seconds")) for T in paper_cost.LENGTHS
    ]
    _line(right, paper_cost.LENGTHS, measured, color=BLUE, label="measured")
    model = [paper_cost.expected(paper_cost.demo(), T) for T in paper_cost.LENGTHS]
    right.plot(paper_cost.LENGTHS, model, color=GREY, linestyle="--", label="operations")
    _lengths(right, paper_cost.LENGTHS)
    right.set(xlabel="tokens of a sequence", ylabel="S²-Attn / dense, one step", ylim=(0, 1.1))
    right.set_title("Tables 11 to 13: what S²-Attn saves", fontsize=10)
    _legend(right)
    return figure


CHARTS = {"paper-attention.png": attention, "paper-training.png": training, "paper-lengths.png": lengths}


def write(folder, stats):
    """Draw every chart into the folder."""
    for name, draw in CHARTS.items():
        draw(stats).savefig(folder / name, format="png")
