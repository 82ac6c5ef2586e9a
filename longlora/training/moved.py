"""What a run trains, and whether all of it has moved."""

import zlib
from collections.abc import Iterable
from typing import Any, Protocol

from longlora.device import host
from longlora.errors import UserError


class Trained(Protocol):
    """A trained tensor: name, kind (decoder.weights.KINDS), shape, float32 value and gradient."""

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def value(self) -> Any: ...

    @property
    def grad(self) -> Any: ...


class Moved:
    """Stops a run that trains nothing: every tensor of every kind has to change.

    It compares checksums, so that nothing is copied.
    """

    def __init__(self, parameters: Iterable[Trained]):
        self.waiting: dict[str, dict[Trained, int]] = {}
        for p in parameters:
            self.waiting.setdefault(p.kind, {})[p] = self._sum(p)
        self.first = True

    @staticmethod
    def _sum(p):
        return zlib.crc32(host(p.value))

    def check(self, step: int, low: bool) -> None:
        """Call after a step. UserError names a kind that has not moved.

        LoRA's A may wait for the second step: it has no gradient while B is zero. low: the rate is far below
        its peak, so the schedule may keep an update below the rounding of float32; then a gradient is enough.
        """
        for kind, sums in list(self.waiting.items()):
            still = [p for p, before in sums.items() if self._sum(p) == before]
            # A bias of k has almost no gradient; every other tensor has one.
            if not still or kind == "bias" and len(still) < len(sums):
                del self.waiting[kind]
                continue
            flat = [p for p in still if not host(p.grad).any()]
            if kind == "lora_A" and self.first or low and not flat:
                continue
            why = (
                "its gradient is zero"
                if flat
                else "its updates are below the rounding of float32; raise the learning rate"
            )
            names = ", ".join(p.name for p in (flat or still)[:2])
            raise UserError(
                f"step {step}: {kind} does not train: {len(flat or still)} of {len(sums)} tensors have not "
                f"moved ({names}): {why}"
            )
        self.first = False
