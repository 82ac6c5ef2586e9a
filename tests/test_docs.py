"""docs/architecture.md describes each module. The pages name only files, sections, commands and options that
exist."""

import ast
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

import longlora
from longlora import cli

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, ARCHITECTURE = ROOT / "longlora", ROOT / "docs/architecture.md"
FOLDERS = ("docs", "csrc", "cuda", "benchmarks", "demo", "examples", "tests", "longlora")
PAGES = [*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in ROOT.glob(f"{folder}/**/*.md"))]
COMMANDS = {command.name for command in cli.COMMANDS}

pytestmark = pytest.mark.skipif(not ARCHITECTURE.exists(), reason="these tests need the source tree")


def described():
    """The files in the tables of docs/architecture.md, relative to the package."""
    for section in ARCHITECTURE.read_text().split("\n### ")[1:]:
        heading, _, body = section.partition("\n")
        folders = re.findall(r"`longlora/(.*?)`", heading)
        for cell in re.findall(r"^\| (`.*?) \|", body, re.M) if folders else []:
            for name in re.findall("`(.*?)`", cell):
                yield name if len(folders) > 1 else folders[0] + name


def test_the_architecture_describes_every_module():
    modules = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")}
    modules = {name for name in modules if not name.endswith(("__init__.py", "__main__.py"))}
    assert modules - set(described()) == set()


def test_the_architecture_describes_only_what_there_is():
    names = list(described())
    assert len(names) == len(set(names))
    assert [name for name in names if not (PACKAGE / name).exists()] == []


def test_links_of_documents_lead_somewhere():
    """Paths from the root in backticks; `<...>` and `*` match any name."""
    for path in (ARCHITECTURE, ROOT / "CONTRIBUTING.md"):
        for name in re.findall(r"`((?:csrc|cuda|docs|tests|benchmarks|longlora)/[^` ]*)`", path.read_text()):
            made = {"softcap", "versions"} & set(re.split(r"\W|test_", name))
            assert made or "<" in name or list(ROOT.glob(name.rstrip("/"))), f"{path.name}: {name}"


def headings(page):
    """The anchors of a page, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    found = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in headings(target), link


def test_the_menu_of_the_site_has_every_page():
    menu = re.findall(r"- (?:\w+: )?([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert len(menu) == len(set(menu))
    assert set(menu) >= {str(page.relative_to(ROOT / "docs")) for page in ROOT.glob("docs/**/*.md")}


def test_the_reference_has_every_public_name():
    reference = (ROOT / "docs/api.md").read_text()
    shown = set(re.findall(r"^::: (\S+)$", reference, re.M))
    public = {f"longlora.{name}" for name in longlora.__all__ if name != "Session"}
    for module in ("torch/ops", "torch/context_parallel"):
        listed = (PACKAGE / module / "__init__.py").read_text().partition("__all__ = [")[2].partition("]")[0]
        public |= {f"longlora.{module.replace('/', '.')}.{name}" for name in re.findall(r'"(\w+)"', listed)}
    assert public - shown == set()


def test_the_tables_and_charts_of_performance_are_those_of_the_results(monkeypatch):
    """`python -m benchmarks.page` makes them."""
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import page

    for path, text in page.made().items():
        assert path.read_text() == text, path.name


def test_what_belongs_to_an_item_of_a_list_does_so_on_the_site():
    pytest.importorskip("mkdocs", reason="pip install '.[docs]'")
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / ".ci/docs_hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    assert hooks.indented("- a\n  b\n\n      code\n\n10. a\n\n        code\n\nb\n\n    code\n") == (
        "- a\n    b\n\n        code\n\n10. a\n\n        code\n\nb\n\n    code\n"
    )
    assert hooks.indented("1. a\n\n   b\n2. c\n3. d\n") == "1. a\n\n    b\n\n2. c\n3. d\n"
    fenced = "1. a\n\ntext\n\n```yaml\n- a: b\n  c: d\n```\n"
    assert hooks.indented(fenced) == fenced


def strings():
    """The texts of the sources that have at least 20 letters of their own: their parts between braces."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            if all(isinstance(part, ast.FormattedValue | ast.Constant) for part in parts):
                text = "".join(
                    str(part.value) if isinstance(part, ast.Constant) else "\0" for part in parts
                ).split("\0")
                if sum(map(len, text)) >= 20:
                    yield text


def test_the_messages_that_are_explained_are_those_of_the_program():
    page = (ROOT / "docs/troubleshooting.md").read_text()
    messages = [a or b for a, b in re.findall(r"^\*\*(?:``(.+)``|`(.+)`)\*\*$", page, re.M)]
    assert len(messages) >= 20
    texts = list(strings())
    for message in messages:
        near = [text for text in texts if all(part in message for part in text)]
        forms = [".*?".join(map(re.escape, text)) + r"(?:\.\.\.)?" for text in near]
        assert any(re.fullmatch(form, message) for form in forms), message


def commands(page):
    """The command lines of `longlora` and of our modules that stand in blocks of a page."""
    text = page.read_text().replace("\\\n", " ")
    for line in re.findall(r"^ {4,8}((?:longlora|torchrun|python|pip) .*)$", text, re.M):
        found = re.search(r"(?:^| )(longlora|-m longlora\.torch\.train) (\S.*)", line.partition(" # ")[0])
        if found:
            yield found[1], shlex.split(found[2])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_pages_have_options_that_exist(page):
    for program, words in commands(page):
        words = ["train", *words] if program.startswith("-m") else words
        if words[0] in COMMANDS:
            cli.parser().parse_args(words)


def test_the_pages_have_commands():
    found = {words[0] for page in PAGES for _, words in commands(page)}
    assert found >= {"train", "plan", "ppl", "merge", "inspect", "generate"}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
