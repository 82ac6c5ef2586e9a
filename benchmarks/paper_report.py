"""The tables and verdicts of benchmarks/paper.py as Markdown."""


def markdown(rows):
    """Rows of cells, the first one the header -> a Markdown table."""
    header, *others = ("| " + " | ".join(cells) + " |" for cells in rows)
    return "\n".join([header, "|" + "---|" * len(rows[0]), *others])


def missing(stats, table):
    """A sentence about the runs of the table that are not there."""
    counts = [len(stats.found(one)) for one in table.runs.values()]
    made, wanted = sum(counts), len(counts) * len(table.seeds)
    return (
        "" if made == wanted else f"So far {made} of {wanted} runs are made. A figure without ± has one seed."
    )


def block(stats, table):
    """The table and the verdicts on its claims."""
    claims = "\n".join(f"- {claim}: **{verdict}**" for claim, verdict in table.claims(stats))
    return "\n\n".join(
        filter(None, [markdown(table.shows(stats)), missing(stats, table), table.note(stats), claims])
    )


def text(stats, tables):
    return "\n\n".join(f"## {table.title}\n\n{block(stats, table)}" for table in tables.values())


def write_page(page, stats, tables):
    """Put the blocks of the tables between their marks in the page. A mark that is missing is an error."""
    found = page.read_text()
    for name, table in tables.items():
        begin, end = f"<!-- table {name} begins -->\n", f"<!-- table {name} ends -->"
        before, rest = found.split(begin)
        found = before + begin + block(stats, table) + "\n" + end + rest.split(end)[1]
    page.write_text(found)
