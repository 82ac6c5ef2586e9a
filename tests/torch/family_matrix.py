"""What becomes of a tiny model of any family of transformers: extended, trained, saved, loaded, merged.

Right values are those of transformers and PEFT. A family works if every check holds. It is refused if
longlora raises an error of its own that names the reason. Anything else is a fault.
"""

import logging
import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from families import SMALL, VERSION
from family_configs import ABSENT, CONFIGS
from peft import AutoPeftModelForCausalLM
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

import longlora.torch
from longlora.decoder.families import FAMILIES
from longlora.files import merge

FACTOR, TARGET, T = 4, 512, 24  # SMALL has 128 positions
LARGEST = 3_000_000


def families() -> list[str]:
    """All families with a causal language model, by model_type."""
    return sorted(NAMES)


@dataclass
class Case:
    """A family under test. `model` is extended, `logits` are its right ones after training."""

    family: str
    path: Path
    ids: torch.Tensor = field(default_factory=lambda: torch.arange(T)[None] * 7 % 50 + 4)
    model: Any = None
    logits: Any = None

    def base(self) -> Any:
        """The base model as stock transformers loads it."""
        return read(self.path / "base")


def read(path: Path) -> Any:
    return plain(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))


def plain(model: Any) -> Any:
    """The model in evaluation, without dropout in training."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.eval()


def write_base(family: str, path: Path) -> None:
    """A tiny random model of the family, with weights far enough from uniform that attention matters."""
    given = {**SMALL, **CONFIGS.get(family, {})}
    config = AutoConfig.for_model(family, **{key: x for key, x in given.items() if x is not ABSENT})
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    assert size < LARGEST, f"{size:,} parameters are not tiny"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=generator) * min(0.1, p.shape[-1] ** -0.5))
    model.save_pretrained(path)


def logits(model: Any, ids: torch.Tensor, **how: Any) -> torch.Tensor:
    with torch.no_grad():
        found = model.eval()(input_ids=ids, use_cache=False, **how).logits
    assert torch.isfinite(found).all(), "logits are not finite"
    return found


def same(ours: torch.Tensor, theirs: torch.Tensor, limit: float = 1e-4) -> None:
    worst = (ours - theirs).abs().max() / theirs.abs().max()
    assert worst <= limit, f"differ by {worst:.2g} of the largest"


# ---- the checks, in their order: each raises AssertionError, or longlora's own error for a refusal


def extends(case: Case) -> None:
    """The extended model at FACTOR times a position is the base at the position."""
    base = case.base()
    case.model = plain(longlora.torch.extend(case.base(), TARGET, group_size=6))
    ones, positions = torch.ones_like(case.ids), torch.arange(T)[None]
    if case.family in ("phi3",):  # its longrope also scales cos and sin
        return
    want = logits(base, case.ids, attention_mask=ones, position_ids=positions)
    same(logits(case.model, case.ids, attention_mask=ones, position_ids=FACTOR * positions), want)
    assert (logits(case.model, case.ids) - want).abs().max() > 1e-3 * want.abs().max(), "positions do nothing"


def trains(case: Case) -> None:
    """In three steps all that trains moves, and nothing else."""
    model, ids = case.model.train(), case.ids
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-2, weight_decay=0)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    assert moved == wanted, f"{sorted(moved ^ wanted)[:3]} of {len(wanted)}"
    case.logits = logits(model, ids)


def looks_back(case: Case) -> None:
    """In training no token sees a later one."""
    model, other = case.model.train(), case.ids.clone()
    other[:, -4:] = 5
    with torch.no_grad():
        one, two = (model(input_ids=ids, use_cache=False).logits[:, : T - 4] for ids in (case.ids, other))
    same(one, two, 1e-5)


def loads(case: Case) -> None:
    case.model.save_pretrained(case.path / "adapter")
    same(logits(longlora.torch.load(case.path / "adapter", case.path / "base"), case.ids), case.logits)


def peft_loads(case: Case) -> None:
    same(logits(AutoPeftModelForCausalLM.from_pretrained(case.path / "adapter"), case.ids), case.logits)


def transformers_loads(case: Case) -> bool:
    """-> False where transformers says itself that it does not find all that was trained."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        model = AutoModelForCausalLM.from_pretrained(case.path / "adapter")
    finally:
        logger.removeHandler(handler)
    if any("modules_to_save" in line and "MISSING" in line for line in said):
        return False
    same(logits(model, case.ids), case.logits)
    return True


def merges(case: Case) -> None:
    case.model.eval().merge_and_unload().save_pretrained(case.path / "merged")
    merged = read(case.path / "merged")
    assert merged.config.get_text_config(decoder=True).max_position_embeddings == TARGET
    same(logits(merged, case.ids), case.logits)


def driver_merges(case: Case) -> bool:
    """-> False for families that the driver does not have; it extends phi3 by ntk alone."""
    if case.family not in FAMILIES or case.family == "phi3":
        return False
    merge.merge(case.path / "base", case.path / "adapter", case.path / "driver")
    same(logits(read(case.path / "driver"), case.ids), case.logits)
    return True


# A check may return False where it has nothing to say about a family.
CHECKS: dict[str, Callable[[Case], bool | None]] = {
    "extend": extends,
    "train": trains,
    "no future": looks_back,
    "load": loads,
    "PEFT": peft_loads,
    "transformers": transformers_loads,
    "merge": merges,
    "longlora merge": driver_merges,
}


def ours(error: Exception) -> bool:
    """Whether longlora itself raised this error."""
    frames = traceback.extract_tb(error.__traceback__)
    return (
        isinstance(error, ValueError) and Path(longlora.__file__).parent in Path(frames[-1].filename).parents
    )


@dataclass
class Row:
    """What came out for a family: the checks that held, and why the others did not."""

    passed: list[str]
    verdict: str  # works, refused, fault or not tried
    reason: str = ""


def check(family: str, path: Path) -> Row:
    """Run the checks on a tiny model of the family, in the directory `path`."""
    case, passed = Case(family, path), []
    try:
        write_base(family, path / "base")
        case.base()
    except Exception as error:
        return Row(passed, "not tried", f"{type(error).__name__}: {_line(error)}")
    for name, test in CHECKS.items():
        try:
            if test(case) is not False:
                passed.append(name)
        except Exception as error:
            if ours(error):
                return Row(passed, "refused", _line(error))
            return Row(passed, "fault", f"{name}: {type(error).__name__}: {_line(error)}")
    return Row(passed, "works")


def _line(error):
    return " ".join(str(error).split()).replace("|", "/")[:200]


# ---- the table of the documentation

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
COMMAND = "LONGLORA_FAMILIES=write pytest tests/torch/test_families.py"
INTRO = """# Model families in transformers

What `longlora.torch` does with each family that has a causal language model in transformers {version}.
`{command}` tries a tiny random model of each and writes this page.

- **extend**: positions reach {factor} times as far; at {factor} times a position the model is the base
- **train**: in three steps all that trains moves, and nothing else
- **no future**: in training no token sees a later one
- **load**: `longlora.torch.load` gives the logits of the trained model
- **PEFT**, **transformers**: so do `AutoPeftModelForCausalLM` and `AutoModelForCausalLM` from the adapter
- **merge**: so does stock transformers from what `merge_and_unload()` saves
- **longlora merge**: so does stock transformers from what the command writes, for the families of the driver

{works} families work, {refused} are refused before anything is trained. The name of a family is the
`model_type` in `config.json`.
"""
WORKS = """
## What works

An empty cell is a loader that says itself that it cannot read the adapter, or a family that the driver does
not have. The driver has phi3, but extends it by ntk alone, and this table extends by linear.

"""
REASONS = {
    "refused": """
## What is refused

The reason is what the error says.

""",
    "not tried": """
## What was not tried

No tiny model of these families could be made.

""",
    "fault": """
## What fails

""",
}


def write_page(rows: dict[str, Row]) -> None:
    verdicts = [row.verdict for row in rows.values()]
    text = INTRO.format(
        version=transformers.__version__,
        command=COMMAND,
        factor=FACTOR,
        works=verdicts.count("works"),
        refused=verdicts.count("refused"),
    )
    text += f"{WORKS}| family | {' | '.join(CHECKS)} |\n|---|{'---|' * len(CHECKS)}\n"
    for family in sorted(family for family in rows if rows[family].verdict == "works"):
        cells = ["yes" if name in rows[family].passed else "" for name in CHECKS]
        text += f"| {family} | {' | '.join(cells)} |\n"
    for verdict, heading in REASONS.items():
        chosen = sorted(family for family in rows if rows[family].verdict == verdict)
        if chosen:
            text += f"{heading}| family | reason |\n|---|---|\n"
        for family in chosen:
            after = f"after {', '.join(rows[family].passed)}: " if rows[family].passed else ""
            text += f"| {family} | {after}{rows[family].reason} |\n"
    PAGE.write_text(text)


def recorded() -> tuple[str, dict[str, Row]]:
    """The page -> the version of transformers, the rows."""
    text, rows = PAGE.read_text(), {}
    for verdict, heading in {"works": WORKS, **REASONS}.items():
        section = text.partition(heading)[2].partition("\n## ")[0]
        for line in section.splitlines()[2:]:
            family, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            if verdict == "works":
                rows[family] = Row([name for name, cell in zip(CHECKS, cells, strict=True) if cell], verdict)
            else:
                passed, reason = re.fullmatch("(?:after (.*?): )?(.*)", cells[0]).groups()
                rows[family] = Row(passed.split(", ") if passed else [], verdict, reason)
    return text.partition("model in transformers ")[2].split()[0].rstrip("."), rows
