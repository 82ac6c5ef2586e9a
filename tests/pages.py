"""The commands and the Python of README.md and docs/*.md run here, page by page, on small files.

    python tests/pages.py PAGE.md      in an empty folder, in which files with the names of the page are made

An indented block that begins with one of PROGRAMS holds commands. A ```python block is a script, a ```yaml
block a file whose name is in its first line. A block that cannot run here says why in a comment before it,
which readers do not see: <!-- not run: why -->.
"""

import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
import tomllib
from pathlib import Path
from typing import NamedTuple

import forked
import tiny

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
OURS = ("longlora", "torchrun", "accelerate", "python", "curl")
# Programs that do not run here, and why.
NOT_RUN = {"pip": ".ci/run installs", "pytest": "it is the suite", "tensorboard": "it does not end by itself"}
PROGRAMS = (*OURS, *NOT_RUN)
# Names of the pages -> what is made for them. Numbers of the pages -> those that fit the small model.
MODELS = ("MODEL", "SmolLM2-135M.gguf")
TEXTS = ("TEXT", "OTHER", "HELD_OUT", "books", "persuasion.txt")
QUESTIONS = ("QUESTIONS", "alpaca.json", "LongAlpaca-12k.json")
NUMBERS = {"100000": "1024", "32769": "1025", "32768": "1024", "16384": "512", "8192": "256", "4096": "128"}
NUMBER = re.compile("|".join(rf"\b{number}\b" for number in NUMBERS))
# What commands get besides: the words that end a page's line replace those before.
RETRIEVAL = ("--lengths", "320,400", "--samples", "1")
BESIDES = {
    "train": ("--max-steps", "2", "--num-threads", "1"),
    "generate": ("--max-new-tokens", "4"),
    "eval passkey": RETRIEVAL,
    "eval topics": RETRIEVAL,
}
# Packages that a page needs, by what is on it.
NEEDS = {
    r"import longlora\.torch|import peft|from peft|-m longlora\.torch": ("torch", "transformers", "peft"),
    r"^ +longlora serve|import OpenAI": ("starlette", "uvicorn", "h11"),
    "import OpenAI": ("openai",),
    "--report-to tensorboard": ("tensorboard",),
    "longlora eval tasks": ("lm_eval",),
}
# A script for torchrun says so in its first line. It has these names from its reader, and here fewer ranks.
RANKS = re.compile(r"# torchrun --nproc-per-node (\d+) ")
GIVEN = """
import torch
from longlora.tools.demo import MODEL
G, batches = 32, torch.randint(2048, (2, 1, 128))
"""
FEWER = {"(2, 4)": "(1, 2)"}


class Block(NamedTuple):
    kind: str  # "commands", "text", or the language of its fence
    text: str
    reason: str | None  # why it does not run


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, fenced or indented by four spaces, from the top."""
    found, lines, reason = [], page.read_text().splitlines(), None
    i = 0
    while i < len(lines):
        line, inner = lines[i], []
        fence = re.match("```(.*)", line)
        if fence:
            while not lines[i + 1].startswith("```"):
                i += 1
                inner.append(lines[i])
            i += 1
        elif re.match(r" {4,}\S", line) and not (i and lines[i - 1].strip()):
            # In an item of a list the text goes on with its own indent, and a block has four more.
            while i < len(lines) and (not lines[i].strip() or lines[i].startswith("    ")):
                inner.append(lines[i].strip() if line[4:5] != " " else lines[i])
                i += 1
            i -= 1
        if inner:
            first = next((word for text in inner for word in text.split()[:1] if word != "#"), "")
            shell = first.strip("#") in PROGRAMS or bool(re.match(r"[A-Z_]+=", first))
            kind = fence[1] if fence else "commands" if shell else "text"
            found.append(Block(kind, "\n".join(inner), reason))
            reason = None
        elif line.strip():
            said = re.match(r"<!-- not run: (.*) -->", line)
            reason = said[1] if said else None
        i += 1
    return found


def commands(text: str) -> list[list[str]]:
    """The lines of a block as words, without the settings of variables before them."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        for part in line.split(" && "):
            words = shlex.split(part, comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):
                del words[0]
            if words:
                found.append(words)
    return found


def runs(page: Path) -> bool:
    """Whether a block of the page runs here, more than the names of extras."""
    for block in blocks(page):
        if block.reason is None and block.kind not in ("text", "commands"):
            return True
        if block.reason is None and block.kind == "commands":
            if any(words[0] not in NOT_RUN for words in commands(block.text)):
                return True
    return False


def needs(page: Path) -> set[str]:
    text = page.read_text()
    return {name for words, names in NEEDS.items() if re.search(words, text, re.M) for name in names}


def make_files(page: Path) -> None:
    """Make what the page names, small, in the current folder."""
    records = [{"instruction": f"Say {i}.", "output": f"It is {i}."} for i in range(8)]
    base = tiny.model("a model")
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = [["o", "n"]]  # a GGUF file needs one
    tokenizer["model"]["vocab"]["on"] = 257
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    for name in MODELS:
        Path(name).symlink_to(base)
    for name in TEXTS:
        if not name.endswith(".txt"):
            Path(name).mkdir()
        tiny.text(name if name.endswith(".txt") else f"{name}/text.txt", 400)
    for name in QUESTIONS:
        if name.endswith(".json"):
            Path(name).write_text(json.dumps(records))
        else:
            Path(name).mkdir()
            Path(name, "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    Path("book.txt").write_text("Anne Elliot reads.")
    Path("books.jsonl").write_text('{"text": "Anne Elliot reads.", "label": 0}\n')
    Path("longlora").mkdir()
    Path("longlora/assets").symlink_to(ROOT / "longlora/assets")
    if not re.search("output.dir.{1,2}extended", page.read_text()):
        words = "train --model MODEL --data TEXT --target-length 32768 --output-dir extended"
        Runner().command(["longlora", *words.split()])


def fewer(text: str) -> str:
    return NUMBER.sub(lambda found: NUMBERS[found[0]], text)


def small(words: list[str]) -> list[str]:
    """The words of a longlora command as they run here: with small numbers, few steps, on the CPU."""
    words = [fewer(word) for word in words]
    besides = BESIDES.get(words[0]) or BESIDES.get(" ".join(words[:2]), ())
    return [*(re.sub("^cuda$", "cpu", word) for word in words), *besides]


class Runner:
    """Runs the blocks of one page in the current folder."""

    url: str | None = None  # of the server, once a command has started it

    def command(self, words: list[str]) -> None:
        if words[0] == "pip":
            self.installs(words)
        elif words[0] == "longlora" and words[1] == "serve":
            self.serve(small(words[1:]))
        elif words[0] == "longlora":
            from longlora import cli

            assert cli.main(small(words[1:])) == 0, words
        elif "longlora.torch.train" in words:
            from longlora.torch import train

            given = words[words.index("longlora.torch.train") + 1 :]
            assert train.main(small(["train", *given])[1:]) == 0, words
        elif words[0] == "curl":
            self.ask(words)
        else:
            assert words[0] in NOT_RUN, f"{words}: say why it does not run, or run it here"

    def installs(self, words: list[str]) -> None:
        """The extras that are asked for exist."""
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for word in words:
            for names in re.findall(r"^(?:\.|longlora)\[(.*)\]$", word):
                assert set(names.split(",")) <= set(extras), words

    def serve(self, words: list[str]) -> None:
        """Start the server on a free port, in a thread that ends with the process."""
        import longlora
        from longlora import cli

        args, started = vars(cli.parser().parse_args(words)), threading.Event()
        del args["command"]

        def ready(server) -> None:
            self.url = server.url
            started.set()

        how = dict(args, port=0, ready=ready)
        threading.Thread(target=longlora.serve, kwargs=how, daemon=True).start()
        assert started.wait(600), words

    def ask(self, words: list[str]) -> None:
        """Ask the server, where curl is installed."""
        words = [self.at_the_server(fewer(word)) for word in words]
        if shutil.which("curl"):
            done = subprocess.run([*words, "--fail"], check=True, capture_output=True, timeout=1200)
            assert json.loads(done.stdout)["choices"], words

    def at_the_server(self, text: str) -> str:
        """The text with the address of our server."""
        if "127.0.0.1:8000" in text:
            assert self.url, "the page has started no server"
            text = text.replace("http://127.0.0.1:8000", self.url)
        return text

    def script(self, text: str) -> None:
        if RANKS.match(text):
            for wide, narrow in FEWER.items():
                assert wide in text
                text = text.replace(wide, narrow)
            Path("script.py").write_text(GIVEN + text)
            launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "script.py"]
            done = forked.run(launch)
            print(done.stdout, done.stderr)
            done.check_returncode()
            return
        program = compile(fewer(self.at_the_server(text)), "the page", "exec")
        exec(program, {"__name__": "__main__", "MODEL": "MODEL"})


def run(page: Path) -> None:
    """Run the blocks of `page` in order, in the current folder."""
    runner = Runner()
    for block in blocks(page):
        if block.reason is not None or block.kind == "text":
            continue
        print(f"\n---- {block.text}\n", flush=True)
        sys.stdin = io.StringIO("")  # what chat reads
        if block.kind == "python":
            runner.script(block.text)
        elif block.kind == "yaml":
            path = Path(block.text.splitlines()[0].removeprefix("# "))
            path.parent.mkdir(exist_ok=True)
            path.write_text(block.text)
        else:
            assert block.kind == "commands", f"a block of {block.kind!r}: is it run?"
            for words in commands(block.text):
                runner.command(words)
    print("\n---- all blocks have run")


if __name__ == "__main__":
    make_files(Path(sys.argv[1]).resolve())
    run(Path(sys.argv[1]))
