"""Model cards: the README.md of an adapter and of a merged model, with front matter that the Hub accepts."""

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from longlora.decoder.config import ModelConfig
from longlora.disk import read_bytes, write_text
from longlora.errors import UserError, printable

Path = str | os.PathLike[str]
FILE = "README.md"
MARK = "<!-- longlora may write this file again. Remove this line to keep what you change. -->"
MOST_RUNS = 8  # that a card names: a damaged file may name itself
METHOD = "LongLoRA (arXiv 2309.12307) with `longlora`"
NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)  # of a model on the Hub
CACHED = re.compile(r"models--([A-Za-z0-9][\w.-]*?)--([\w.-]+)", re.ASCII)  # its folder in the Hub's cache
REPOSITORIES = (
    "general.source.huggingface.repository",
    "general.repo_url",
    "general.source.repo_url",
    "general.base_model.0.repo_url",
)
DIRECTORY = """The positions are in `config.json`, so nothing is set by hand:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```
"""
GGUF = """The positions are in the file, so nothing is set by hand but the length of the context:

```
llama-server -m {file} -c {length}
```

Ollama takes a Modelfile with the lines `FROM ./{file}` and `PARAMETER num_ctx {length}`.
"""


def write(directory: Path, text: str) -> None:
    """Write the card, unless the directory has one without MARK: somebody else wrote that."""
    path = os.path.join(directory, FILE)
    if not os.path.lexists(path) or MARK in _read(directory, FILE):
        write_text(path, text)


def front(base: str | None, library: str | None, tags: Sequence[str]) -> str:
    """The front matter and MARK. base: the base model's name on the Hub, which refuses a path."""
    lines = [f"library_name: {library}"] if library else []
    lines += [f"base_model: {base}"] if base else []
    lines += ["pipeline_tag: text-generation", "tags:", *(f"- {tag}" for tag in tags)]
    return "\n".join(["---", *lines, "---", MARK, ""])


def merged(base: Any, run: Path | None, config: ModelConfig, name: str, dtype: str, file: str | None) -> str:
    """The card of a whole model.

    base: the opened base model. run: the directory of the adapter that is merged in, or of the run that
    trained every weight. config: that of the whole model. name: its name. dtype: of its weights.
    file: the name of a GGUF file, None for a directory.
    """
    hub = hub_name(base)
    facts = [("base model", _shown(base))]
    facts += run_facts(run) if run is not None else []
    facts += [("positions", _positions(config)), ("weights", dtype)]
    made = f" by {METHOD}" if run is not None else ""
    how = GGUF if file else DIRECTORY
    parts = [
        front(hub, None if file else "transformers", ["longlora", "gguf"] if file else ["longlora"]),
        f"# {_plain(name)}\n",
        f"A context of {config.max_position_embeddings:,} tokens{made}.\n",
        _table(facts),
        how.format(name=_plain(name), file=file, length=config.max_position_embeddings),
    ]
    return "\n".join(parts)


def adapter(base: Any, directory: Path, length: int, lora: Mapping[str, Any], note: str) -> str:
    """The card of an adapter.

    base: the opened base model. directory: of the adapter. length: the context. lora: the fields of
    adapter_config.json. note: how its positions are loaded.
    """
    facts = list(run_facts(directory))
    return "\n".join(
        [
            front(hub_name(base), "peft", ["lora", "longlora"]),
            f"A context of {length:,} tokens for {_shown(base)}, by {METHOD}.",
            f"LoRA r = {lora['r']}, alpha = {lora['lora_alpha']:g} on {', '.join(lora['target_modules'])};",
            f"trained whole and stored here: {', '.join(lora['modules_to_save'] or ()) or 'nothing'}.\n",
            *([_table(facts)] if facts else []),
            *([note] if note else []),
            "Servers that do not take `modules_to_save` (vLLM, llama.cpp) need the merged model: "
            "`longlora merge`.\n",
        ]
    )


def hub_name(model: Any) -> str | None:
    """The name on the Hub of an opened model: by its place in the Hub's cache, or by what its files say."""
    for part in os.path.abspath(model.path).split(os.sep):
        cached = CACHED.fullmatch(part)
        if cached:
            return f"{cached[1]}/{cached[2]}"
    metadata = getattr(model, "metadata", {})
    told = [model.config.raw.get("_name_or_path"), *(metadata.get(key) for key in REPOSITORIES)]
    names = [text.removeprefix("https://huggingface.co/") for text in told if isinstance(text, str)]
    return next((name for name in names if NAME.fullmatch(name)), None)


def run_facts(adapter: Path) -> Iterator[tuple[str, str]]:
    """Give what the directory of an adapter says about its training: names and values for a table.

    An adapter that was trained further also says what it was trained on before. Damaged files are skipped: a
    card must not make the run fail.
    """
    runs = list(_runs(adapter))
    data, lengths = [], []
    for options, rows in runs:
        if isinstance(options.get("data"), str):
            data.append(_code(os.path.basename(os.path.normpath(options["data"]))))
        length = options.get("sequence_length") or options.get("target_length")
        steps = [row["step"] for row in rows if _is_count(row.get("step"))]
        if _is_count(length):
            lengths.append(f"{length:,} tokens" + (f", {max(steps):,} steps" if steps else ""))
    if data:
        yield "data", ", then ".join(data)
    if lengths:
        yield "trained at", ", then ".join(lengths)
    rows = runs[-1][1]
    found = [row["eval_perplexity"] for row in rows if _is_number(row.get("eval_perplexity"))]
    if found:
        change = f"{found[0]:.3f} before, {found[-1]:.3f} after" if len(found) > 1 else f"{found[0]:.3f}"
        yield "held-out perplexity", f"{change}, with dense attention"


def _table(facts):
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts)]) + "\n"


def _runs(adapter):
    """The runs that made the adapter, the first one first: options and metrics of each."""
    runs: list[Any] = []
    while isinstance(adapter, (str, os.PathLike)) and len(runs) < MOST_RUNS:
        runs.insert(0, _run(adapter))
        adapter = runs[0][0].get("adapter")
    return runs


def _run(adapter):
    """The options of the run that made the adapter, and the rows of its metrics."""
    import yaml

    try:
        options = yaml.safe_load(_read(adapter, "options.yaml"))
    except Exception:  # yaml raises errors of many kinds for a damaged file
        options = None
    rows: Any = [_json(line) for line in _read(adapter, "metrics.jsonl").splitlines()]
    if not isinstance(options, dict):  # a checkpoint has both in one file
        state = _json(_read(adapter, "trainer_state.json"))
        state = state if isinstance(state, dict) else {}
        options, rows = state.get("options"), state.get("log_history")
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return options if isinstance(options, dict) else {}, rows


def _read(directory, name):
    try:
        return read_bytes(os.path.join(directory, name)).decode("utf-8", "replace")
    except UserError:
        return ""


def _json(text):
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_number(value):
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_count(value):
    return type(value) is int and 0 <= value <= sys.maxsize  # Python refuses to print thousands of digits


def _plain(text):
    """The text without the characters that mean something in Markdown or in a string of Python."""
    return re.sub(r'[`|"\\<>]', "_", printable(str(text)))


def _code(text: object) -> str:
    return f"`{_plain(text)}`"


def _shown(base: Any) -> str:
    return _code(hub_name(base) or os.path.basename(os.path.realpath(base.path)))


def _positions(config: ModelConfig) -> str:
    rope, length = config.rope, f"{config.max_position_embeddings:,}"
    if rope.type == "default":
        return f"{length}, as in pretraining"
    return f"{length} by {rope.type}, factor {rope.factor:g}, from {rope.original_length:,} in pretraining"
