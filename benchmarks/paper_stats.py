"""What benchmarks/paper.py concludes from its rows: means and spreads over the seeds, and verdicts.

A figure here is a dict, seed -> value. Two figures are compared seed by seed: equal seeds saw equal data.
"""

import json
import math
import statistics

YES, NO, NOISE, MISSING = "yes", "no", "within noise", "not yet run"


def key(run):
    return json.dumps(run, sort_keys=True)


class Stats:
    """The rows of a results file."""

    def __init__(self, rows):
        self.rows = {key(row["run"]): row for row in rows}

    def found(self, run):
        """seed -> the row of that run."""
        wanted = key(run)
        return {
            row["run"]["seed"]: row
            for row in self.rows.values()
            if key({name: value for name, value in row["run"].items() if name != "seed"}) == wanted
        }

    def of(self, run, name, length=None):
        """The figure of that name: "dense" and "own" are perplexities by length."""
        return {
            seed: row[name] if length is None else row[name][str(length)]
            for seed, row in self.found(run).items()
        }

    def ratio(self, one, other):
        """of(*one) / of(*other)."""
        ours, theirs = self.of(*one), self.of(*other)
        return {seed: ours[seed] / theirs[seed] for seed in ours.keys() & theirs.keys()}

    def lowest(self, places):
        """The figure with the lowest mean."""
        found = [self.of(*place) for place in places]
        return min(found, key=lambda figure: mean(figure) if figure else math.inf)

    def cell(self, run, name, length):
        return cell(self.of(run, name, length))

    def curve(self, run):
        """[(step, mean, spread)] over the seeds."""
        curves = [dict(map(tuple, row["curve"])) for row in self.found(run).values()]
        shared = sorted(set.intersection(*map(set, curves))) if curves else []
        by_step = {step: {i: curve[step] for i, curve in enumerate(curves)} for step in shared}
        return [(step, mean(figure), spread(figure)) for step, figure in by_step.items()]


def mean(figure):
    return statistics.fmean(figure.values())


def spread(figure):
    """The standard deviation over the seeds; 0 for one."""
    return statistics.stdev(figure.values()) if len(figure) > 1 else 0.0


def cell(figure):
    """For example 38.22 ± 0.13."""
    if not figure:
        return MISSING
    return f"{mean(figure):.2f} ± {spread(figure):.2f}" if len(figure) > 1 else f"{mean(figure):.2f}"


def above(one, other):
    """Whether `one` is larger with every seed: yes, no if it is smaller with every seed, or within noise."""
    seeds = one.keys() & other.keys()
    if not seeds:
        return MISSING
    larger = [one[seed] > other[seed] for seed in seeds]
    return YES if all(larger) else NO if not any(larger) else NOISE


def _off(one, other):
    """The mean of one / other - 1 over the seeds, None if there are none."""
    seeds = one.keys() & other.keys()
    return statistics.fmean(one[seed] / other[seed] for seed in seeds) - 1 if seeds else None


def near(one, other, share=0.01):
    """Whether the mean of one / other is at most `share` away from 1, with the difference in per cent."""
    off = _off(one, other)
    return MISSING if off is None else f"{YES if abs(off) <= share else NO} ({off:+.2%})"


def at_most(one, other, share=0.01):
    """As near, where `one` may be any amount below `other`."""
    off = _off(one, other)
    return MISSING if off is None else f"{YES if off <= share else NO} ({off:+.2%})"


def within_noise(figures):
    """Whether the means differ by no more than the largest spread."""
    if not all(figures):
        return MISSING
    means, largest = [mean(figure) for figure in figures], max(map(spread, figures))
    return YES if max(means) - min(means) <= largest else NO


def rises(figures):
    """Whether each figure is above the one before it."""
    return together(*(above(later, earlier) for earlier, later in zip(figures, figures[1:])))


def closes(one, other):
    """Whether a curve [(step, mean, spread)] that was above another ends with less than half of the gap."""
    theirs = {step: value for step, value, _ in other}
    gaps = [value - theirs[step] for step, value, _ in one if step in theirs]
    if not gaps:
        return MISSING
    return YES if max(gaps) > 0 and gaps[-1] < max(gaps) / 2 else NO


def together(*verdicts):
    """yes if all are; otherwise the worst of them."""
    return next((bad for bad in (MISSING, NO, NOISE) if bad in verdicts), YES)


def joined(verdicts):
    """{place: verdict} -> one verdict if all are equal, otherwise one for each place."""
    words = list(verdicts.values())
    if len(set(words)) == 1:
        return words[0]
    if all(word.startswith(YES) for word in words) or all(word.startswith(NO) for word in words):
        offs = (f"{place}: {verdict.partition('(')[2].rstrip(')')}" for place, verdict in verdicts.items())
        return f"{words[0].partition(' ')[0]} ({', '.join(offs)})"
    return "; ".join(f"{place}: {verdict}" for place, verdict in verdicts.items())
