"""Plans of memory: what a run takes, what the machine has, and what would make a run fit. Sizes are bytes.

What a run takes is declared by whoever runs it, in parts; nothing here knows a layer or an op. The plan of a run on a GPU is of
that GPU's memory. What the CUDA driver and cuBLAS take for themselves is not in it: it has not been measured.
"""

import functools
from dataclasses import dataclass, field

from longlora.device import CPU

GROWTH = 4 << 20  # what Python's objects, threads and small arrays come to during a run


@dataclass(frozen=True)
class Plan:
    """What a run takes: parts (name -> bytes, in order), and the choices they follow from.

    memory: what `device` has. changes: sentences, each with a change that would make the run fit; empty where it fits.
    """

    config: object = field(repr=False)
    dtype: str
    batch_size: int
    sequence_length: int
    group_size: int | None
    lora: object
    checkpointing: str
    memory: int
    parts: dict
    changes: tuple = ()
    device: str = CPU

    @property
    def total(self):
        return sum(self.parts.values())

    @property
    def fits(self):
        return self.total <= self.memory

    def to_json(self):
        """A dict for json.dumps; sizes in bytes."""
        return {
            "dtype": self.dtype,
            "batch_size": self.batch_size,
            "sequence_length": self.sequence_length,
            "group_size": self.group_size,
            "training": "full" if self.lora is None else "lora",
            "checkpointing": self.checkpointing,
            "device": self.device,
            "parts": dict(self.parts),
            "total": self.total,
            "memory": self.memory,
            "fits": self.fits,
            "changes": list(self.changes),
        }

    def text(self):
        """A table in GiB, the verdict, and what would make it fit."""
        rows = {**self.parts, "total": self.total}
        width = max(len(name) for name in rows) + 2
        lines = [f"{name:<{width}}{size / 2**30:9.3f} GiB" for name, size in rows.items()]
        verdict = "fits" if self.fits else "does not fit"
        where = f" on {self.device}" if self.device != CPU else ""
        lines.append(
            f"checkpointing {self.checkpointing}: {verdict}; {self.memory / 2**30:.3f} GiB are available{where}"
        )
        return "\n".join([*lines, *(f"  {change}" for change in self.changes)])


@functools.cache
def own_memory():
    """Bytes that this process had resident when it first asked: Python, NumPy and the libraries."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmRSS:"))


def available_memory():
    """Bytes that a new process can have: MemAvailable, or what is left of the control group's limit where that is less."""
    with open("/proc/meminfo") as file:
        found = {line.split(":")[0]: int(line.split()[1]) << 10 for line in file}
    limits = [found["MemAvailable"]]
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            with open(limit) as a, open(used) as b:
                limits.append(max(0, int(a.read()) - int(b.read())))
        except (OSError, ValueError):  # no such group, or "max"
            pass
    return min(limits)


def choose(alternatives, memory):
    """The first of `alternatives`, an iterable of (choice, parts), that fits in `memory`, else the last."""
    for choice, parts in alternatives:
        if sum(parts.values()) <= memory:
            break
    return choice, parts


def what_would_fit(total, steps, memory):
    """The changes that make a run fit -> tuple of sentences, in the order of `steps`.

    total(**changes) -> bytes. steps: (text, name, value), a change of one argument of total; cheapest first, several of one name
    stand together from mild to severe. Each change that is enough alone is named, of one name the mildest. Where none is, they are
    made one after the other until the run fits.
    """
    steps, enough = list(steps), {}
    for text, name, value in steps:
        size = total(**{name: value})
        if size <= memory:
            enough.setdefault(name, f"{text}: {size / 2**30:.3f} GiB")
    if enough:
        return tuple(enough.values())
    changed, texts = {}, {}
    for text, name, value in steps:
        changed[name], texts[name] = value, text
        size = total(**changed)
        if size <= memory:
            return (f"{' and '.join(texts.values())}: {size / 2**30:.3f} GiB",)
    return (f"nothing: {' and '.join(texts.values())} still need {size / 2**30:.3f} GiB",)
