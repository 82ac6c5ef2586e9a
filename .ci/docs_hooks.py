"""What mkdocs needs to make a site of pages that are written for the repository.

README.md becomes the first page, CONTRIBUTING.md and the READMEs of the kernels become pages, and the help of
each command becomes the page cli.md. Links to other files of the tree lead to the repository if mkdocs.yml
knows its address, and are left out otherwise. A link to a file that does not exist fails the build.
"""

import argparse
import os
import posixpath
import re
import sys
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
# Pages from outside docs/, by their names on the site.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "csrc/README.md": "csrc.md",
    "cuda/README.md": "cuda.md",
}
PICTURES = ("demo/attention.png", "demo/perplexity.png")


def on_files(files, config):
    for source, name in PAGES.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text()))
    for picture in PICTURES:
        files.append(File.generated(config, picture, abs_src_path=str(ROOT / picture)))
    files.append(File.generated(config, "cli.md", content=_commands()))
    return files


def on_page_markdown(markdown, page, config, files):
    name = page.file.src_uri
    source = {site: tree for tree, site in PAGES.items()}.get(name, f"docs/{name}")

    def place(found):
        image, text, link = found.groups()
        path, hash, anchor = link.partition("#")
        if not path or re.match("[a-z]+:", link):
            return found[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if not (ROOT / target).exists():
            raise PluginError(f"{source}: the link {link} leads nowhere")
        site = PAGES.get(target, target.removeprefix("docs/"))
        if files.get_file_from_path(site):
            return f"{image}[{text}]({posixpath.relpath(site, posixpath.dirname(name) or '.')}{hash}{anchor})"
        if not config.repo_url:
            return text
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{target}{hash}{anchor})"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", place, indented(markdown))


def indented(markdown):
    """The page with four spaces before what belongs to an item of a list, as mkdocs wants them.

    GitHub wants as many as the item's mark takes: two after "- ", three after "1. ". After an item of several
    paragraphs mkdocs wants an empty line.
    """
    lines, width, fenced, parts = [], 0, False, False
    for line in markdown.splitlines():
        fenced ^= line.lstrip().startswith("```")
        mark = None if fenced else re.match(r"(?:\d+\.|[-*]) +(?=\S)", line)
        if mark:
            if parts and lines[-1].strip():
                lines.append("")
            width, parts = len(mark[0]), False
        elif line.strip() and not line.startswith(" " * width):
            width, parts = 0, False
        elif width and line.strip():
            parts |= not lines[-1].strip()
            line = " " * 4 + line[width:]
        lines.append(line)
    return "\n".join([*lines, ""])


def _commands():
    """The page of the command line: what each command prints with --help."""
    sys.path.insert(0, str(ROOT))  # it needs no compiled extension
    from longlora import cli

    os.environ["COLUMNS"] = "100"
    lines = ["# Command line", "", "What `longlora COMMAND --help` prints."]
    for name, parser in _leaves(cli.parser(), ""):
        lines += ["", f"## {name}", "", "```text", parser.format_help().rstrip(), "```"]
    return "\n".join([*lines, ""])


def _leaves(parser, name):
    """The parsers of commands, and of the tasks of a command that has some."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        yield name, parser
    for word, inner in (pair for action in below for pair in action.choices.items()):
        yield from _leaves(inner, f"{name} {word}".strip())
