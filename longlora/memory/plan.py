"""Plans of memory: what a run takes, what the machine has, and what would make a run fit. Sizes are bytes.

Whoever runs something declares what it takes, in parts; nothing here knows a layer or an op. The plan of a
run on a GPU covers that GPU's memory, without what the CUDA driver and cuBLAS take for themselves: that has
not been measured.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from longlora import job
from longlora.device import CPU

# What a process grows by besides the other parts: threads, NumPy's modules and small arrays, and the rounding
# of large blocks to huge pages. Measured.
GROWTH = 12 << 20
Choice = TypeVar("Choice")
Parts = dict[str, int]  # name -> bytes


class MemoryPlan:
    """What all plans have: parts, their sum, the memory there is, and sentences that would make it fit."""

    parts: Parts
    memory: int
    changes: tuple[str, ...]
    device: str

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.memory

    def sizes(self) -> dict[str, Any]:
        """What all plans say, for json.dumps; sizes in bytes."""
        return {
            "device": self.device,
            "parts": dict(self.parts),
            "total": self.total,
            "memory": self.memory,
            "fits": self.fits,
            "changes": list(self.changes),
        }

    def table(self, what: str) -> str:
        """A table in GiB, the verdict on `what`, and what would make it fit."""
        rows = {**self.parts, "total": self.total}
        width = max(len(name) for name in rows) + 2
        lines = [f"{name:<{width}}{size / 2**30:9.3f} GiB" for name, size in rows.items()]
        verdict = "fits" if self.fits else "does not fit"
        where = f" on {self.device}" if self.device != CPU else ""
        there = f"{self.memory / 2**30:.3f} GiB are available{where}"
        lines.append(f"{what}: {verdict}; {there}")
        return "\n".join([*lines, *(f"  {change}" for change in self.changes)])


@dataclass(frozen=True)
class GenerationPlan(MemoryPlan):
    """What generation takes, in `parts`: `rows` sequences of up to `context` tokens. Sizes in bytes."""

    config: Any = field(repr=False)  # ModelConfig
    dtype: str
    cache_dtype: str
    context: int
    rows: int
    device: str
    memory: int
    parts: Parts
    changes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A dict for json.dumps; sizes in bytes."""
        return {
            "dtype": self.dtype,
            "cache_dtype": self.cache_dtype,
            "context": self.context,
            "rows": self.rows,
            **self.sizes(),
        }

    def text(self) -> str:
        """A table in GiB, the verdict, and what would make it fit."""
        return self.table(f"{self.rows} x {self.context} tokens, cache in {self.cache_dtype}")


@dataclass(frozen=True)
class Plan(MemoryPlan):
    """What a run takes, in `parts`, and the choices they follow from.

    memory: what `device` has. changes: sentences, each with a change that would make the run fit; empty if it
    fits.
    """

    config: Any = field(repr=False)  # ModelConfig
    dtype: str
    batch_size: int
    sequence_length: int
    group_size: int | None
    lora: Any  # LoraConfig; None is full fine-tuning
    checkpointing: str
    memory: int
    parts: Parts
    changes: tuple[str, ...] = ()
    device: str = CPU

    def to_json(self) -> dict[str, Any]:
        """A dict for json.dumps; sizes in bytes."""
        return {
            "dtype": self.dtype,
            "batch_size": self.batch_size,
            "sequence_length": self.sequence_length,
            "group_size": self.group_size,
            "training": "full" if self.lora is None else "lora",
            "checkpointing": self.checkpointing,
            **self.sizes(),
        }

    def text(self) -> str:
        """A table in GiB, the verdict, and what would make it fit."""
        return self.table(f"checkpointing {self.checkpointing}")


@functools.cache
def own_memory() -> int:
    """Bytes that this process had resident when it first asked: Python, NumPy and other libraries."""
    return job.resident_memory()


def choose(alternatives: Iterable[tuple[Choice, Parts]], memory: int) -> tuple[Choice, Parts]:
    """The first of `alternatives` whose parts fit in `memory`, else the last."""
    for found in alternatives:
        if sum(found[1].values()) <= memory:
            break
    return found


def what_would_fit(
    total: Callable[..., int], steps: Iterable[tuple[str, str, Any]], memory: int
) -> tuple[str, ...]:
    """Find the changes that make a run fit -> sentences, in the order of `steps`.

    total(**changes): the bytes of the run with these changes.
    steps: (text, name, value), each a change of one argument of `total`. Cheap ones come first, and several
    of one name
        stand together from mild to severe.

    Each change that is enough by itself gives a sentence, of one name the mildest. If none is, the changes
    add up until the run fits, and give one sentence.
    """
    steps = list(steps)
    enough: dict[str, str] = {}
    for text, name, value in steps:
        size = total(**{name: value})
        if size <= memory:
            enough.setdefault(name, f"{text}: {size / 2**30:.3f} GiB")
    if enough:
        return tuple(enough.values())
    changed, texts, size = {}, {}, total()
    for text, name, value in steps:
        changed[name], texts[name] = value, text
        size = total(**changed)
        if size <= memory:
            return (f"{' and '.join(texts.values())}: {size / 2**30:.3f} GiB",)
    least = " and ".join(texts.values()) or "the smallest settings"
    return (f"nothing: {least} still need {size / 2**30:.3f} GiB",)
