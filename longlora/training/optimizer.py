"""AdamW on float32 masters, with the global gradient norm clipped."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from longlora import _C
from longlora.device import CPU, host
from longlora.errors import UserError

# The kinds of parameters without weight decay, as in transformers' Trainer: decay is for matrices.
NO_DECAY = ("norm", "bias")


def decay_of(kind: str, weight_decay: float) -> float:
    """The weight decay of parameters of this kind."""
    return 0.0 if kind in NO_DECAY else weight_decay


class AdamW:
    """Decoupled weight decay (arXiv 1711.05101, algorithm 2) on `parameters`, equal to torch.optim.AdamW.

    parameters are decoder.model.Parameters. `steps` counts the steps made. max_grad_norm 0 never clips.
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        *,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
    ):
        self.parameters = list(parameters)
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
        self.weight_decay, self.max_grad_norm = weight_decay, max_grad_norm
        self.steps = 0
        self._flat = [self._flatten(p) for p in self.parameters]
        device = self.parameters[0].value.device if self.parameters else CPU
        self._squares = _C.Tensor((1,), "float64", device)

    @staticmethod
    def _flatten(p):
        """param, m, v, copy, grad as the op takes them; copy is None if it is not dense (a cast writes
        it)."""
        size = math.prod(p.shape)
        try:
            copy = None if p.copy is None else p.copy.reshape((size,))
        except ValueError:
            copy = None
        return (
            p.value.reshape((size,)),
            p.m.reshape((size,)),
            p.v.reshape((size,)),
            copy,
            p.grad.reshape((size,)),
        )

    def step(self, learning_rates: Mapping[str, float]) -> float:
        """Make one step with learning_rates (kind -> rate) -> the norm of the gradient before clipping.

        UserError if the norm is not finite, before anything changes; a loss that is not finite makes such a
        gradient. ValueError if a kind has no rate. On a GPU the norm is the one number of a step that is
        waited for: adamw takes the clipping as a number, and the check must come first. The GPU is idle for
        one transfer of 8 bytes.
        """
        missing = sorted({p.kind for p in self.parameters} - set(learning_rates))
        if missing:
            raise ValueError(f"learning_rates: no rate for {', '.join(missing)}")
        self._squares.fill(0)
        for *_, grad in self._flat:
            _C.sum_squares(self._squares, grad)
        squares = float(host(self._squares)[0])
        if not math.isfinite(squares):
            raise UserError("the gradient is not finite")
        norm = math.sqrt(squares)
        clips = self.max_grad_norm and norm > self.max_grad_norm
        scale = self.max_grad_norm / (norm + 1e-6) if clips else 1.0
        self.steps += 1
        for p, (value, m, v, copy, grad) in zip(self.parameters, self._flat):
            _C.adamw(
                value,
                m,
                v,
                copy,
                grad,
                learning_rates[p.kind],
                self.beta1,
                self.beta2,
                self.eps,
                decay_of(p.kind, self.weight_decay),
                self.steps,
                scale,
            )
            if p.copy is not None and copy is None:
                p.publish()
        return norm

    def state_dict(self) -> dict[str, Any]:
        """The float32 Tensors, not copies: "value.", "m." and "v." before the name of each parameter."""
        return {f"{what}.{p.name}": getattr(p, what) for p in self.parameters for what in ("value", "m", "v")}

    def load_state_dict(self, state: Mapping[str, Any], steps: int) -> None:
        """Restore the state_dict of `steps` steps; the steps after it give the same bits as without a stop.

        UserError if names or shapes differ.
        """
        wanted = {f"{what}.{p.name}": p.shape for p in self.parameters for what in ("value", "m", "v")}
        if set(state) != set(wanted):
            odd = sorted(set(state) ^ set(wanted))
            raise UserError(f"optimizer state: belongs to other parameters: {odd[0]}")
        for name, shape in wanted.items():
            if tuple(state[name].shape) != shape:
                found = list(state[name].shape)
                raise UserError(f"optimizer state: {name} should have shape {list(shape)}, got {found}")
        self.steps = int(steps)
        for p in self.parameters:
            for what in ("value", "m", "v"):
                getattr(p, what).copy_(state[f"{what}.{p.name}"])
            p.publish()
