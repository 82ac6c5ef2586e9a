"""The paper's tables as data: for each one the runs, what is shown of them, and what must come out.

A run is a dict as paper_run.perform takes it, without its seed. Runs that several tables share are equal
dicts, and are made once. Numbers of tables and figures are those of arXiv 2309.12307v3.
"""

from collections.abc import Callable
from typing import NamedTuple

from . import paper_cost
from .paper_run import NATIVE
from .paper_stats import Stats, above, at_most, closes, joined, near, rises, together, within_noise

STEPS = 60
CURVE = 6  # steps between two evaluations of Figure 5
TOKENS = 2048  # of a step: one sequence of 8 times the native length, two of 4 times, four of twice
TARGETS = (2 * NATIVE, 4 * NATIVE, 8 * NATIVE)
TARGET = 4 * NATIVE  # of the tables with one target
SEEDS = (0, 1, 2)
# A small model needs far larger rates than the paper's 2e-5. These are the best of a few that were tried.
LORA_RATE, EMBEDDING_RATE, FULL_RATE = 4e-3, 1e-3, 2e-3
LORA, BOTH = dict(modules_to_save=()), {}
NORMS = ("input_layernorm", "post_attention_layernorm", "norm")


class Table(NamedTuple):
    """One table or figure of the paper.

    runs    label -> run without its seed
    shows   Stats -> the header and the rows of a Markdown table
    claims  Stats -> [(what must come out, whether it does)]
    seeds   how often each run is made
    note    Stats -> a sentence below the table, or nothing
    """

    title: str
    runs: dict
    shows: Callable[[Stats], list[list[str]]]
    claims: Callable[[Stats], list[tuple[str, str]]]
    seeds: tuple[int, ...] = SEEDS
    note: Callable[[Stats], str] = lambda stats: ""


def run(target=TARGET, lengths=None, own=True, curve=None, pattern=None, **changes):
    """A run that trains LoRA+ with S2-Attn to `target` tokens, but for the changes in options of `train`.

    Rates: the usual ones of what is trained. own: evaluate with the attention of the training too.
    """
    train = dict(
        target_length=target,
        group_size=target // 4,
        per_device_train_batch_size=TOKENS // target,
        max_steps=STEPS,
        learning_rate=FULL_RATE if changes.get("full") else LORA_RATE,
        embedding_learning_rate=FULL_RATE if changes.get("full") else EMBEDDING_RATE,
        lr_scheduler_type="cosine",
        warmup_steps=6,
        logging_steps=10,
    )
    train |= changes
    dense = train.get("attention") == "dense"
    if dense:
        del train["group_size"]
    made = {"train": train, "lengths": list(lengths or [target])}
    if own and not dense:
        made["own"] = target
    return made | ({"curve": curve} if curve else {}) | ({"pattern": pattern} if pattern else {})


def upto(target):
    """The lengths at which a model for `target` tokens is evaluated: to twice the target."""
    return [NATIVE << i for i in range(5) if NATIVE << i <= 2 * target]


def longlora(target=TARGET):
    """LongLoRA as it is: the run that most tables share."""
    return run(target, upto(target), curve=CURVE if target == TARGET else None)


def full(target, attention):
    """Full fine-tuning. attention: dense, s2 or short, which shifts no head."""
    how = {"dense": dict(attention="dense"), "s2": {}, "short": dict(shift="none")}[attention]
    curve = CURVE if (target, attention) == (TARGET, "s2") else None
    return run(target, upto(target), curve=curve, full=True, **how)


def short_attention() -> Table:
    """Table 1, full fine-tuning: dense attention, groups without a shift, and S2-Attn."""
    runs = {(how, T): full(T, how) for how in ("dense", "s2", "short") for T in TARGETS}
    names = {"dense": "dense attention", "s2": "S2-Attn", "short": "short attention"}

    def shows(stats):
        rows = [["trained with", "evaluated with", *(f"{T} ({T // NATIVE}x)" for T in TARGETS)]]
        for how, tested in (("dense", "dense"), ("s2", "dense"), ("short", "dense"), *OWN):
            cells = [stats.cell(runs[how, T], tested, T) for T in TARGETS]
            rows.append([names[how], "dense" if tested == "dense" else "as trained", *cells])
        return rows

    def claims(stats):
        def each(judge, one, other):
            return joined(
                {
                    T: judge(stats.of(runs[one[0], T], one[1], T), stats.of(runs[other[0], T], other[1], T))
                    for T in TARGETS
                }
            )

        dense, s2, short, short_own = ("dense",) * 2, ("s2", "dense"), ("short", "dense"), ("short", "own")
        gaps = [stats.ratio((runs["short", T], "own", T), (runs["dense", T], "dense", T)) for T in TARGETS]
        return [
            ("S2-Attn is within 1 % of dense attention", each(near, s2, dense)),
            ("short attention, evaluated as short, is worse than S2-Attn", each(above, short_own, s2)),
            ("short attention, evaluated dense, is worse than S2-Attn", each(above, short, s2)),
            ("short attention, evaluated as short, falls behind further the longer the text", rises(gaps)),
        ]

    return Table("Table 1: what the shift is for", runs, shows, claims)


OWN = (("s2", "own"), ("short", "own"))
TRAINED = {
    "LoRA, r = 8": dict(r=8, **LORA),
    "LoRA, r = 64": dict(r=64, **LORA),
    "LoRA, r = 64, alpha = 128": dict(r=64, lora_alpha=128.0, **LORA),
    "LoRA, r = 8, and norms": dict(modules_to_save=NORMS),
    "LoRA, r = 8, and embedding": dict(modules_to_save=("embed_tokens",)),
    "LoRA+: r = 8, norms and embedding": BOTH,
    "everything": dict(full=True),
}
ONE_RATE = (1e-3, 4e-3)


def what_is_trained() -> Table:
    """Table 2: LoRA, norms, embedding, everything. As in the paper all of it learns at one rate."""
    runs = {
        (name, rate): run(learning_rate=rate, embedding_learning_rate=rate, own=False, **options)
        for rate in ONE_RATE
        for name, options in TRAINED.items()
    }
    r8, r64, wide, _, embedding, both, everything = TRAINED

    def shows(stats):
        rows = [["trained", *(f"rate {rate:g}" for rate in ONE_RATE)]]
        return rows + [
            [name, *(stats.cell(runs[name, rate], "dense", TARGET) for rate in ONE_RATE)] for name in TRAINED
        ]

    def claims(stats):
        def at(name, rate):
            return stats.of(runs[name, rate], "dense", TARGET)

        def by_rate(judge):
            return joined({f"rate {rate:g}": judge(rate) for rate in ONE_RATE})

        def alone(rate):
            return together(*(above(at(name, rate), at(both, rate)) for name in (r8, r64)))

        def full(rate):
            return at_most(at(both, rate), at(everything, rate))

        def most(rate):
            least, seeds = at(both, rate), at(r8, rate).keys() & at(both, rate).keys()
            half = {seed: (at(r8, rate)[seed] + least[seed]) / 2 for seed in seeds}
            return together(above(at(r8, rate), least), above(half, at(embedding, rate)))

        def best(*names):
            return stats.lowest([(runs[name, rate], "dense", TARGET) for name in names for rate in ONE_RATE])

        return [
            ("LoRA alone is worse than LoRA+, with rank 8 and with rank 64", by_rate(alone)),
            ("LoRA+ is at most 1 % above training everything", by_rate(full)),
            ("the embedding gives most of LoRA+'s gain", by_rate(most)),
            (
                "so it is with rank 64 and alpha = 128",
                by_rate(lambda rate: above(at(wide, rate), at(both, rate))),
            ),
            ("LoRA alone is worse than LoRA+, each at its best", above(best(r8, r64, wide), best(both))),
        ]

    return Table("Table 2: what is trained", runs, shows, claims)


PATTERNS = {
    "across heads: S2-Attn": longlora(),
    "across layers": run(pattern="layers"),
    "only plain groups (P1)": run(shift="none"),
    "only shifted groups (P2)": run(shift="all"),
    "dilated, by masks": run(pattern="dilated"),
    "strided, by masks": run(pattern="strided"),
}
LONGER = {
    name: one | {"train": one["train"] | {"max_steps": 4 * STEPS}} for name, one in list(PATTERNS.items())[:4]
}


def patterns(title="Table 6: patterns of attention", runs=PATTERNS) -> Table:
    """Table 6: other patterns of the same cost."""
    ours, *others = runs

    def shows(stats):
        rows = [["pattern of the training", "evaluated with the pattern", "evaluated dense"]]
        return rows + [
            [name, *(stats.cell(one, tested, TARGET) for tested in ("own", "dense"))]
            for name, one in runs.items()
        ]

    def claims(stats):
        def worse(name, tested):
            return above(*(stats.of(runs[one], tested, TARGET) for one in (name, ours)))

        return [
            (
                f"S2-Attn is better, evaluated {how}, than",
                joined({name: worse(name, tested) for name in others}),
            )
            for tested, how in (("dense", "dense"), ("own", "as trained"))
        ]

    return Table(title, runs, shows, claims)


def longer_patterns() -> Table:
    """Table 6 with more steps: whether its differences are a matter of too few."""
    return patterns("Table 6 with four times the steps", LONGER)


GROUPS = {
    "dense attention": run(attention="dense"),
    "T/2": run(group_size=TARGET // 2),
    "T/4": longlora(),
    "T/6": run(group_size=TARGET // 12 * 2),
    "T/8": run(group_size=TARGET // 8),
}


def group_sizes() -> Table:
    """Table 7: smaller groups."""

    def at(stats, name):
        return stats.of(GROUPS[name], "dense", TARGET)

    def shows(stats):
        return [
            ["group", *GROUPS],
            ["perplexity", *(stats.cell(g, "dense", TARGET) for g in GROUPS.values())],
        ]

    def claims(stats):
        return [
            ("T/4 is within 1 % of T/2", near(at(stats, "T/4"), at(stats, "T/2"))),
            ("T/4 is within 1 % of dense attention", near(at(stats, "T/4"), at(stats, "dense attention"))),
            ("T/8 is worse than T/4", above(at(stats, "T/8"), at(stats, "T/4"))),
            ("T/8 is worse than T/6", above(at(stats, "T/8"), at(stats, "T/6"))),
        ]

    return Table("Table 7: the size of a group", GROUPS, shows, claims)


ENDS = {
    "split: no token sees the other end": longlora(),
    "wrap: Algorithm 1": run(boundary="wrap", own=False),
    "swap: the last tokens see the first": run(boundary="swap", own=False),
}


def boundaries() -> Table:
    """Table 8: what shifted groups do at the ends of the text."""

    def shows(stats):
        return [
            ["ends", "perplexity"],
            *([name, stats.cell(one, "dense", TARGET)] for name, one in ENDS.items()),
        ]

    def claims(stats):
        found = [stats.of(one, "dense", TARGET) for one in ENDS.values()]
        return [("the three are within the noise of the seeds", within_noise(found))]

    return Table("Table 8: the ends of the text", ENDS, shows, claims)


def lengths() -> Table:
    """Tables 3 and 14: perplexity by the length of the evaluation, and beyond the trained length."""
    runs = {}
    for T in TARGETS:
        runs["full, dense attention", T] = full(T, "dense")
        runs["full, S2-Attn", T] = full(T, "s2")
        runs["LongLoRA", T] = longlora(T)

    def shows(stats):
        columns = upto(TARGETS[-1])
        rows = [["trained", "to", *map(str, columns)]]
        for (name, T), one in runs.items():
            rows.append(
                [name, str(T), *(stats.cell(one, "dense", n) if n in one["lengths"] else "" for n in columns)]
            )
        return rows

    def claims(stats):
        def ratio(T, longer, shorter):
            one = runs["LongLoRA", T]
            return stats.ratio((one, "dense", longer), (one, "dense", shorter))

        flat = {T: near(ratio(T, T, NATIVE), {seed: 1.0 for seed in SEEDS}, 0.05) for T in TARGETS}
        breaks = {T: above(ratio(T, 2 * T, T), ratio(T, T, T // 2)) for T in TARGETS}
        full_dense = {
            T: at_most(
                stats.of(runs["LongLoRA", T], "dense", T),
                stats.of(runs["full, dense attention", T], "dense", T),
            )
            for T in TARGETS
        }
        return [
            ("LongLoRA: flat within 5 % from 256 tokens to the trained length", joined(flat)),
            ("LongLoRA: the step past the trained length is worse than the one before it", joined(breaks)),
            ("LongLoRA is at most 1 % above full fine-tuning with dense attention", joined(full_dense)),
        ]

    return Table("Tables 3 and 14, Figure 4: by length", runs, shows, claims)


CURVES = {"LongLoRA": longlora(), "full fine-tuning": full(TARGET, "s2")}


def steps() -> Table:
    """Figure 5: perplexity by step."""

    def shows(stats):
        found = {name: stats.curve(one) for name, one in CURVES.items()}
        marks = sorted({step for curve in found.values() for step, *_ in curve})
        rows = [["step", *map(str, marks)]]
        for name, curve in found.items():
            by_step = {step: f"{mean:.1f}" for step, mean, _ in curve}
            rows.append([name, *(by_step.get(step, "") for step in marks)])
        return rows

    def claims(stats):
        ours, theirs = (stats.curve(one) for one in CURVES.values())
        return [("LongLoRA is behind full fine-tuning at first, and the gap closes", closes(ours, theirs))]

    return Table("Figure 5: by step", CURVES, shows, claims)


def costs() -> Table:
    """Tables 11 to 13: floating-point operations of a step against measured time, dense and S2-Attn."""
    runs = {T: {"time": T} for T in paper_cost.LENGTHS}

    def shows(stats):
        return paper_cost.table(stats, runs)

    def claims(stats):
        shares = [stats.ratio((one, "s2_seconds"), (one, "dense_seconds")) for one in runs.values()]
        return [
            ("the share of S2-Attn's time in dense attention's falls with the length", rises(shares[::-1]))
        ]

    def note(stats):
        return paper_cost.busy(stats, runs)

    return Table("Tables 11 to 13: cost", runs, shows, claims, seeds=(0,), note=note)


TABLES = {
    "1": short_attention,
    "2": what_is_trained,
    "3": lengths,
    "5": steps,
    "6": patterns,
    "6-longer": longer_patterns,
    "7": group_sizes,
    "8": boundaries,
    "cost": costs,
}
