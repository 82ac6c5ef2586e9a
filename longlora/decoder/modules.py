"""What a layer is made of: norms and matrix products, each with its weights, its forward and its backward.

`ops` is longlora._C, or what stands in for it in a dry run. Tensors that are written come first, as in the
ops.
"""

from collections.abc import Mapping
from typing import Any

from longlora import Tensor
from longlora.decoder.weights import Weight
from longlora.memory.layout import Buffer, Layout, Shape


class Norm:
    """RMSNorm over `size` columns, called `name` in the files. there=False: the model has no such norm."""

    def __init__(self, name: str, size: int, eps: float, there: bool = True):
        self.weight, self.eps = Weight("norm", {f"{name}.weight": size} if there else {}), eps

    @property
    def learns(self) -> bool:
        return self.weight.learns

    def forward(self, ops: Any, out: Any, rstd: Any, x: Any) -> None:
        ops.rms_norm_forward(out, rstd, None, x, None, self.weight.data, self.eps)

    def backward(self, ops: Any, dx: Any, dout: Any, x: Any, rstd: Any, dresidual: Any = None) -> None:
        """dx, with `dresidual` added to it, and the weight's gradient if it learns."""
        ops.rms_norm_backward(dx, self.weight.grad, dout, x, rstd, self.weight.data, dresidual)


class Fused:
    """One matrix product for all modules that read the same input, with LoRA on some of them.

        u = x A'        out = x W' + bias + scale u B'

    The modules' outputs lie side by side in `out`, so their weights lie under each other in W. A holds the A
    of each module with LoRA in the same way. B is block-diagonal, one block for each of them.

    path: the prefix of the modules' names. modules: name -> features out. lora: a LoraConfig, or None.
    """

    def __init__(
        self, path: str, modules: Mapping[str, int], features: int, *, bias: bool = False, lora: Any = None
    ):
        adapted = [name for name in modules if lora is not None and name in lora.target_modules]
        r = lora.r if adapted else 0
        self.scale: float = lora.scale if adapted else 1.0
        self.rank = r * len(adapted)
        self.weight = Weight("linear", {f"{path}{name}.weight": n for name, n in modules.items()}, features)
        self.bias = Weight("bias", {f"{path}{name}.bias": n for name, n in modules.items()} if bias else {})
        self.a = Weight("lora_A", {f"{path}{name}.lora_A.weight": r for name in adapted}, features)
        self.blocks = [
            Weight("lora_B", {f"{path}{name}.lora_B.weight": modules[name]}, r) for name in adapted
        ]
        self.b: Any = None
        self.b_place: Buffer | None = None
        self._b_shape = (sum(modules.values()), self.rank)
        self._one_block = [block.shape for block in self.blocks] == [self._b_shape]
        self._where: list[tuple[slice, slice]] = []  # rows and columns of each block in b
        # Blocks whose gradient is a call of its own: rows, columns, gradient, and the weights of its module.
        self._apart: list[tuple[slice, slice, Any, tuple[Any, Any, Any]]] = []
        row = 0
        for name, rows in modules.items():
            if name in adapted:
                column = r * len(self._where)
                self._where.append((slice(row, row + rows), slice(column, column + r)))
            row += rows

    def weights(self) -> list[Weight]:
        """All of them, in the order of the parameters."""
        return [w for w in (self.weight, self.bias, self.a, *self.blocks) if w.members]

    def tensor_shapes(self) -> dict[str, Shape]:
        """Give Hugging Face name -> shape without LoRA, in the file's order: weight and bias by module."""
        shapes, biases = {}, iter(self.bias.tensor_shapes().items())
        for name, shape in self.weight.tensor_shapes().items():
            shapes[name] = shape
            shapes.update([next(biases)] if self.bias.members else [])
        return shapes

    @property
    def learns(self) -> bool:
        return any(w.learns for w in self.weights())

    def lay_out_b(self, layout: Layout, dtype: str) -> None:
        """Plan b. A single block that learns in float32 is b itself; else b holds a copy of each block."""
        if self._one_block and self.blocks[0].learns and dtype == "float32":
            self.b_place = self.blocks[0].places["data"] = self.blocks[0].places["value"]
        elif self.blocks:
            self.b_place = layout.add(self._b_shape, dtype)

    def bind(self, arena: Tensor) -> None:
        """Make the Tensor of b, after those of its weights."""
        if self.b_place is None:
            return
        if "data" in self.blocks[0].places:
            self.b = self.blocks[0].data
            return
        self.b = self.b_place.view(arena)
        for block, (rows, columns) in zip(self.blocks, self._where):
            block.data = self.b[rows, columns]
            if block.learns and not self._one_block:
                weights = self.weight.data[rows], self.a.data[columns], block.data
                self._apart.append((rows, columns, block.grad, weights))

    def forward(self, ops: Any, out: Any, u: Any, x: Any, residual: Any = None) -> None:
        """out, with `residual` added to it, and u unless it is None."""
        weights = self.weight.data, self.bias.data, self.a.data, self.b
        ops.lora_linear_forward(out, u, x, *weights, residual, self.scale)

    def backward(self, ops: Any, dx: Any, dout: Any, x: Any, u: Any) -> None:
        """dx unless it is None, and the gradients of what learns. x may be None where nothing does."""
        db = self.blocks[0].grad if self._one_block else None
        gradients = self.a.grad, db, self.weight.grad, self.bias.grad
        weights = self.weight.data, self.a.data, self.b
        ops.lora_linear_backward(dx, *gradients, dout, x, *weights, u, self.scale)
        for rows, columns, db, weights in self._apart:
            none, part, u_part = (None, None), dout[:, rows], u[:, columns]
            ops.lora_linear_backward(*none, db, *none, part, None, *weights, u_part, self.scale)

    def input_gradient(self, ops: Any, dx: Any, dout: Any) -> None:
        """dx alone."""
        weights = self.weight.data, self.a.data, self.b
        ops.lora_linear_backward(dx, None, None, None, None, dout, None, *weights, None, self.scale)
