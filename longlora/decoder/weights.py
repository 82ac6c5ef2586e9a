"""Weights: the tensors that the ops read, their names in files, their places in memory, which of them learn.

A Weight is declared where it is used. `lay_out` then plans the memory of all, and `bind` makes the Tensors.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from longlora import Tensor
from longlora.memory.layout import SIZES, Buffer, Layout, Shape

DTYPES = ("float32", "bfloat16", "float16")
# How a tensor takes part in training. Each kind has its own learning rate and its own choice of weight decay.
KINDS = ("lora_A", "lora_B", "embedding", "head", "norm", "linear", "bias")


class Weight:
    """One tensor as the ops read it.

    members: Hugging Face name -> rows. Modules that are computed as one product have one Weight, in which
        their tensors lie under each other. Without members the model does not have this weight, and all its
        Tensors are None.
    columns: the rest of the shape.

    data        what the ops read, in the model's dtype
    value       the master, float32; in a float32 model it is `data` itself
    grad, m, v  the gradient and AdamW's moments, float32
    All but data are None where the weight is frozen.
    """

    def __init__(self, kind: str, members: Mapping[str, int], *columns: int):
        self.kind, rows = kind, 0
        self.members: dict[str, slice] = {}
        for name, count in members.items():
            self.members[name] = slice(rows, rows + count)
            rows += count
        self.shape: Shape = (rows, *columns)
        self.places: dict[str, Buffer] = {}  # of "data", "value", "grad", "m" and "v"
        self.data: Any = None
        self.value: Any = None
        self.grad: Any = None
        self.m: Any = None
        self.v: Any = None

    @property
    def learns(self) -> bool:
        """Whether lay_out has given it a master."""
        return "value" in self.places

    def tensor_shapes(self) -> dict[str, Shape]:
        """Give Hugging Face name -> shape of its members."""
        return {name: (rows.stop - rows.start, *self.shape[1:]) for name, rows in self.members.items()}

    def bind(self, arena: Tensor) -> None:
        """Make the Tensors that lay_out has planned, as views of `arena`."""

        def view(what):
            return self.places[what].view(arena) if what in self.places else None

        self.value, self.grad, self.m, self.v = view("value"), view("grad"), view("m"), view("v")
        shared = self.learns and self.places.get("data") is self.places["value"]
        self.data = self.value if shared else view("data")


class Parameter:
    """A tensor of the file that learns: its name, kind and shape, and views of its Weight.

    value, grad, m, v: float32. copy: what the ops read, or None if that is `value`.
    """

    def __init__(self, name: str, weight: Weight):
        rows = weight.members[name]
        self.name, self.kind = name, weight.kind
        self.value: Tensor = weight.value[rows]
        self.grad: Tensor = weight.grad[rows]
        self.m: Tensor = weight.m[rows]
        self.v: Tensor = weight.v[rows]
        self.shape = tuple(self.value.shape)
        self.copy: Tensor | None = None if weight.data is weight.value else weight.data[rows]

    def publish(self) -> None:
        """Write the working copy, after `value` has changed."""
        if self.copy is not None:
            self.copy.copy_(self.value)


def lay_out(
    weights: list[Weight], names: frozenset[str], dtype: str, others: Iterable[Callable[[Layout, str], None]]
) -> tuple[Layout, Buffer]:
    """Plan the memory of all weights -> Layout, and the Buffer that all gradients lie in.

    names: the Hugging Face names of what learns. dtype: of what the ops read. others: functions of (layout,
    dtype) that add what the ops read in place of the lora_B, when the masters have their places.
    """
    layout = Layout()
    learned = [w for w in weights if not names.isdisjoint(w.members)]
    frozen = [w for w in weights if names.isdisjoint(w.members) and w.kind != "lora_B"]
    read = [w for w in learned if w.kind != "lora_B"]

    def place(what, some, dtype):
        for w in some:
            w.places[what] = layout.add(w.shape, dtype)

    place("data", frozen, dtype)
    layout.end_part("frozen weights")
    place("value", learned, "float32")
    layout.end_part("trained parameters, float32")
    if dtype == "float32":
        for w in read:
            w.places["data"] = w.places["value"]
    else:
        place("data", read, dtype)
    for add in others:
        add(layout, dtype)
    layout.end_part("trained parameters, working copies")
    start = layout.size
    place("grad", learned, "float32")
    gradients = Buffer(start, ((layout.size - start) // SIZES["float32"],), "float32")
    layout.end_part("gradients")
    place("m", learned, "float32")
    place("v", learned, "float32")
    layout.end_part("moments")
    return layout, gradients
