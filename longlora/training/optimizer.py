"""AdamW on float32 masters, with the global gradient norm clipped."""

import math

import numpy as np

from longlora import _C
from longlora.device import CPU, host
from longlora.errors import UserError

NO_DECAY = ("norm", "bias")  # as Trainer of transformers: weight decay is for matrices


class AdamW:
    """Decoupled weight decay (arXiv 1711.05101, algorithm 2) on `parameters` (model.Parameter), as torch.optim.AdamW has it.

    `steps` counts those made. Norms and biases are not decayed.
    """

    def __init__(self, parameters, *, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, max_grad_norm=0.0):
        self.parameters = list(parameters)
        self.beta1, self.beta2, self.eps, self.weight_decay, self.max_grad_norm = (
            beta1,
            beta2,
            eps,
            weight_decay,
            max_grad_norm,
        )
        self.steps = 0
        self._flat = [self._flatten(p) for p in self.parameters]
        self._squares = _C.Tensor(
            (1,), "float64", self.parameters[0].value.device if self.parameters else CPU
        )

    @staticmethod
    def _flatten(p):
        """param, m, v, copy, grad as the op takes them; copy None where it is not dense and is written by a cast."""
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

    def step(self, learning_rates):
        """One step with learning_rates (kind -> rate) -> the global norm of the gradient, before clipping.

        max_grad_norm 0 clips never. UserError if the norm is not finite; then nothing was changed: a loss that is not finite
        makes a gradient that is not. On a GPU the norm is the one number of a step that is waited for, since adamw takes the
        clipping as a number and nothing that is not finite may reach the masters: the GPU is idle for one trip of 8 bytes.
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
        scale = (
            self.max_grad_norm / (norm + 1e-6) if self.max_grad_norm and norm > self.max_grad_norm else 1.0
        )
        self.steps += 1
        for p, (value, m, v, copy, grad) in zip(self.parameters, self._flat):
            decay = 0.0 if p.kind in NO_DECAY else self.weight_decay
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
                decay,
                self.steps,
                scale,
            )
            if p.copy is not None and copy is None:
                p.publish()
        return norm

    def state_dict(self):
        """-> dict of float32 Tensors: "value.", "m." and "v." before each parameter's name. The very ones, not copies."""
        return {f"{what}.{p.name}": getattr(p, what) for p in self.parameters for what in ("value", "m", "v")}

    def load_state_dict(self, state, steps):
        """Puts back what state_dict gave after `steps` steps; the next ones give the same bits as if there had been no stop."""
        wanted = {f"{what}.{p.name}": p.shape for p in self.parameters for what in ("value", "m", "v")}
        if set(state) != set(wanted):
            odd = sorted(set(state) ^ set(wanted))
            raise UserError(f"optimizer state: it is of other parameters: {odd[0]}")
        for name, shape in wanted.items():
            if tuple(state[name].shape) != shape:
                raise UserError(
                    f"optimizer state: {name} should have shape {list(shape)}, got {list(state[name].shape)}"
                )
        self.steps = int(steps)
        for p in self.parameters:
            for what in ("value", "m", "v"):
                getattr(p, what).copy_(state[f"{what}.{p.name}"])
            p.publish()
