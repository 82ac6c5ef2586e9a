"""Writes the tables of docs/performance.md, and the charts beside it, from benchmarks/results/*-cores.jsonl.

    python -m benchmarks.page            # after a row has been measured anew; a test compares

A ratio above 1 means that longlora is better. Ratios below 1 are bold, so that losses are seen.
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
PAGE = ROOT / "docs/performance.md"
BEGIN, END = "<!-- tables begin: made by python -m benchmarks.page -->", "<!-- tables end -->"
SECTIONS = {
    "train_step": "A training step of SmolLM2-135M",
    "torch": "transformers with longlora.torch",
    "s2_attention": "S²-Attn, against SDPA in each group",
    "linear_cross_entropy": "The head and the loss, against torch's linear and cross_entropy",
    "lora_linear": "A linear with LoRA",
    "gemm": "Matrix products",
    "elementwise": "Ops that move memory",
}
PEERS = ("torch", "transformers", "peft")
OURS, THEIRS, THIRD = "#2b5a8c", "#d08a2e", "#9aa5b1"


def read():
    """The rows of all machines, each with its machine as `on`: 'Zen 5' for ...-zen5-2-cores.jsonl."""
    rows = []
    for path in sorted(RESULTS.glob("*-cores.jsonl"), reverse=True):
        on = re.sub(r".*-(zen)(\d)-.*", r"Zen \2", path.name)
        rows += [{**json.loads(line), "on": on} for line in path.read_text().splitlines()]
    return rows


def figure(value, unit):
    """For example '416 GF/s'."""
    if unit == "ms" and value < 0.1:
        value, unit = value * 1000, "us"
    if unit == "us" and value >= 1000:
        value, unit = value / 1000, "ms"
    return f"{value:.3g} {unit.replace('us', 'µs')}" if value < 1000 else f"{value:.0f} {unit}"


def ratio(value):
    text = f"{value:.2f}x" if value < 10 else f"{value:.0f}x"
    return f"**{text}**" if value < 0.995 else text


def cell(row):
    """For example '416 GF/s, 2.10x'."""
    parts = [figure(row["ours"], row["unit"])]
    if row["ratio"] is not None:
        parts.append(ratio(row["ratio"]))
    if row["benchmark"] == "elementwise" and row["of_peak"]:
        parts.append(f"{row['of_peak']:.0%} of a copy")
    return ", ".join(parts)


def table(rows):
    """The lines of a table: a row for each case and peer, a column for each machine and dtype."""
    columns = [(on, dtype) for on in ("Zen 5", "Zen 3") for dtype in ("float32", "bfloat16")]
    lines = {}
    for row in rows:
        place = lines.setdefault((row["name"], row["peer_name"] or ""), {})
        place[row["on"], row["dtype"]] = cell(row)
    used = [column for column in columns if any(column in cells for cells in lines.values())]
    yield "| case | against | " + " | ".join(f"{on}, {dtype}" for on, dtype in used) + " |"
    yield "|---" * (2 + len(used)) + "|"
    for (name, peer), cells in lines.items():
        yield f"| {name} | {peer} | " + " | ".join(cells.get(column, "") for column in used) + " |"


def tables(rows):
    """The text between BEGIN and END."""
    others = [row["ratio"] for row in rows if (row["peer_name"] or "").startswith(PEERS) and row["ratio"]]
    lost = sum(value < 0.995 for value in others)
    out = [
        f"{len(others)} comparisons with torch, transformers and PEFT; {lost} of them are below 1 (bold).\n"
        "The other rows compare longlora with itself, or with nothing."
    ]
    for benchmark, title in SECTIONS.items():
        out += [f"### {title}", "\n".join(table([row for row in rows if row["benchmark"] == benchmark]))]
    return "\n\n".join(out)


def page(text, rows):
    """The page with its tables made anew."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{tables(rows)}\n\n{END}{rest.split(END)[1]}"


def one(rows, **wanted):
    """The first row with these values."""
    return next(row for row in rows if all(row[name] == value for name, value in wanted.items()))


def drawing(width, height, parts):
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">'
    return "\n".join([head, f'<rect width="{width}" height="{height}" fill="white"/>', *parts, "</svg>", ""])


def text_at(x, y, words, size=13, anchor="start", weight="normal"):
    words = words.replace("&", "&amp;")
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" font-weight="{weight}" '
        f'fill="#1b2733">{words}</text>'
    )


def step_chart(rows):
    """Bars: time and memory of a step of SmolLM2 on 2048 tokens, beside transformers + peft."""
    parts = [
        text_at(20, 26, "One training step of SmolLM2-135M on 2048 tokens, groups of 512", 16, weight="bold")
    ]
    for panel, (what, title) in enumerate((("step", "seconds"), ("memory", "peak memory, GiB"))):
        left, top = 20 + 430 * panel, 60
        parts.append(text_at(left, top, title, 14, weight="bold"))
        groups = []
        for on, dtype in (("Zen 5", "float32"), ("Zen 5", "bfloat16"), ("Zen 3", "float32")):
            peers = ("transformers+peft", "transformers+peft checkpointing")
            found = [
                one(
                    rows,
                    benchmark="train_step",
                    name=f"T=2048 G=512 {what}",
                    on=on,
                    dtype=dtype,
                    peer_name=peer,
                )
                for peer in peers
            ]
            bars = (("longlora", found[0]["ours"], OURS), (peers[0], found[0]["peer"], THEIRS))
            groups.append((f"{on}, {dtype}", [*bars, ("with checkpointing", found[1]["peer"], THIRD)]))
        longest = max(value for _, bars in groups for _, value, _ in bars)
        y = top + 24
        for label, bars in groups:
            parts.append(text_at(left, y + 4, label))
            for name, value, colour in bars:
                y += 20
                width = 220 * value / longest
                parts.append(
                    f'<rect x="{left}" y="{y - 9}" width="{width:.1f}" height="15" fill="{colour}"/>'
                )
                parts.append(text_at(left + width + 6, y + 3, f"{value:.2g}  {name}", 12))
            y += 28
    return drawing(880, 370, parts)


def attention_chart(rows):
    """Lines: the rate of S²-Attn by the size of a group, beside torch's SDPA in each group, on the Zen 5."""
    sizes = (512, 1024, 2048, 4096)
    parts = [
        text_at(20, 26, "S²-Attn, GF/s by group size: heads of 64, 2 cores of a Zen 5", 16, weight="bold")
    ]
    for panel, way in enumerate(("forward", "backward")):
        left, bottom, height, step = 70 + 430 * panel, 300, 220, 85
        parts.append(text_at(left, 58, way, 14, weight="bold"))
        for value in range(0, 501, 100):
            y = bottom - height * value / 500
            parts.append(f'<line x1="{left}" x2="{left + 3 * step}" y1="{y:g}" y2="{y:g}" stroke="#dde3ea"/>')
            parts.append(text_at(left - 8, y + 4, str(value), 11, "end"))
        for i, size in enumerate(sizes):
            parts.append(text_at(left + i * step, bottom + 18, str(size), 11, "middle"))
        for dtype, dash in (("float32", ""), ("bfloat16", ' stroke-dasharray="5 4"')):
            found = [
                one(rows, benchmark="s2_attention", name=f"{way} D=64 G={size}", on="Zen 5", dtype=dtype)
                for size in sizes
            ]
            for side, name, colour in (("ours", "longlora", OURS), ("peer", "torch", THEIRS)):
                points = [(left + i * step, bottom - height * row[side] / 500) for i, row in enumerate(found)]
                line = " ".join(f"{x:g},{y:.1f}" for x, y in points)
                parts.append(
                    f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>'
                )
                x, y = points[-1]
                up = -4 if (side == "ours") == (found[-1]["dtype"] == "bfloat16") else 10
                parts.append(text_at(x + 6, y + up, f"{name}, {dtype}", 11))
    return drawing(880, 340, parts)


def made():
    """All that is made from the results: path -> text."""
    rows = read()
    return {
        PAGE: page(PAGE.read_text(), rows),
        PAGE.with_name("step.svg"): step_chart(rows),
        PAGE.with_name("attention_by_group.svg"): attention_chart(rows),
    }


if __name__ == "__main__":
    for path, text in made().items():
        path.write_text(text)
        print(path.relative_to(ROOT))
