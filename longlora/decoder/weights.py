"""Weights: which tensors the ops read, how the files call them, which of them learn, and where they lie in memory."""

from longlora.memory.layout import SIZES, Buffer, Layout

DTYPES = ("float32", "bfloat16", "float16")
# How a tensor takes part in training. Each kind has a learning rate and a choice of weight decay of its own.
KINDS = ("lora_A", "lora_B", "embedding", "head", "norm", "linear", "bias")


class Weight:
    """One tensor as the ops read it.

    members: Hugging Face name -> rows. Tensors of the file whose products are computed together lie under each other here.
    Shape is [all rows, *columns].

    `data` is what the ops read, in the model's dtype. A weight that learns also has `value` (the master), `grad`, and AdamW's
    moments `m` and `v`: float32, of the same shape, None where it is frozen. In a float32 model `data` is `value` itself.
    """

    def __init__(self, kind, members, *columns):
        self.kind, self.members, rows = kind, {}, 0
        for name, count in members.items():
            self.members[name] = slice(rows, rows + count)
            rows += count
        self.shape = (rows, *columns)
        self.places = {}  # "data", "value", "grad", "m", "v" -> Buffer
        self.data = self.value = self.grad = self.m = self.v = None

    @property
    def learns(self):
        """Whether lay_out gave it a gradient."""
        return "value" in self.places

    def tensor_shapes(self):
        """-> dict of the file's tensors, Hugging Face name -> shape."""
        return {name: (rows.stop - rows.start, *self.shape[1:]) for name, rows in self.members.items()}

    def bind(self, arena):
        """Makes the Tensors, views of `arena`, which lay_out has planned."""

        def view(what):
            return self.places[what].view(arena) if what in self.places else None

        self.value, self.grad, self.m, self.v = view("value"), view("grad"), view("m"), view("v")
        shared = self.learns and self.places.get("data") is self.places["value"]
        self.data = self.value if shared else view("data")


class Parameter:
    """A trained tensor of the file: float32 views value, grad, m, v. copy is what the ops read, None where that is `value`."""

    def __init__(self, name, weight):
        rows = weight.members[name]
        self.name, self.kind = name, weight.kind
        self.value, self.grad, self.m, self.v = (
            x[rows] for x in (weight.value, weight.grad, weight.m, weight.v)
        )
        self.shape = tuple(self.value.shape)
        self.copy = None if weight.data is weight.value else weight.data[rows]

    def publish(self):
        """Writes the working copy, after `value` was changed."""
        if self.copy is not None:
            self.copy.copy_(self.value)


class Fused:
    """One matrix product: modules that read the same input, with LoRA on some of them.

    u = x A', out = x W' + bias + scale u B'. The modules' outputs lie side by side in `out`, so their weights are stacked. The A of
    those with LoRA are stacked too, and B is block-diagonal: LoRA of several modules stays one product.

    path: what the modules' names begin with. modules: name -> features out. lora: a LoraConfig or None.
    """

    def __init__(self, path, modules, features, *, bias=False, lora=None):
        self.features, rows = features, sum(modules.values())
        self.weight = Weight("linear", {f"{path}{name}.weight": n for name, n in modules.items()}, features)
        self.bias = Weight("bias", {f"{path}{name}.bias": n for name, n in modules.items()} if bias else {})
        adapted = [name for name in modules if lora is not None and name in lora.target_modules]
        r, self.scale = (lora.r, lora.scale) if adapted else (0, 1.0)
        self.rank = r * len(adapted)
        self.a = Weight("lora_A", dict.fromkeys((f"{path}{n}.lora_A.weight" for n in adapted), r), features)
        self.b_masters = [Weight("lora_B", {f"{path}{n}.lora_B.weight": modules[n]}, r) for n in adapted]
        self.b, self._b_place, self._b_shape = None, None, (rows, self.rank)
        self._blocks, first = [], 0  # (rows, columns) of each master in b
        for name, n in modules.items():
            if name in adapted:
                j = len(self._blocks)
                self._blocks.append((slice(first, first + n), slice(j * r, (j + 1) * r)))
            first += n

    def weights(self):
        """-> list of Weight, in the order of the parameters."""
        return [w for w in (self.weight, self.bias, self.a, *self.b_masters) if w.members]

    def tensor_shapes(self):
        """-> dict of the file's tensors, in the order of the file: each module's weight, then its bias."""
        weights, biases = list(self.weight.tensor_shapes().items()), list(self.bias.tensor_shapes().items())
        return dict(weights if not biases else [x for pair in zip(weights, biases) for x in pair])

    def place_b(self, layout, dtype):
        """Plans b: a buffer of its own, unless it is one float32 master."""
        if not self.rank:
            return
        master = self.b_masters[0]
        if dtype == "float32" and master.shape == self._b_shape and master.learns:
            self._b_place = master.places["data"] = master.places["value"]
        else:
            self._b_place = layout.add(self._b_shape, dtype)

    def bind(self, arena):
        """Makes the Tensors, after those of its weights."""
        self.b = None
        if not self.rank:
            return
        if self.b_masters[0].data is not None:
            self.b = self.b_masters[0].data
            return
        self.b = self._b_place.view(arena)
        for master, (rows, columns) in zip(self.b_masters, self._blocks):
            master.data = self.b[rows, columns]

    @property
    def learns(self):
        return any(w.learns for w in self.weights())

    def forward(self, ops, out, u, x, residual=None):
        ops.lora_linear_forward(
            out, u, x, self.weight.data, self.bias.data, self.a.data, self.b, residual, self.scale
        )

    def backward(self, ops, dx, dout, x, u):
        """dx, unless it is None, and the gradients of what learns. x is not read where nothing learns, and may be None."""
        whole = [w.grad for w in self.b_masters if w.shape == self._b_shape]  # one B, which is all of b
        db = whole[0] if whole else None
        gradients = self.a.grad, db, self.weight.grad, self.bias.grad
        weights = self.weight.data, self.a.data, self.b
        ops.lora_linear_backward(dx, *gradients, dout, x, *weights, u, self.scale, 0)
        for master, (rows, columns) in zip(self.b_masters, self._blocks):
            if not whole and master.learns:
                gradients = None, master.grad, None, None
                weights = self.weight.data[rows], self.a.data[columns], master.data
                ops.lora_linear_backward(
                    None, *gradients, dout[:, rows], None, *weights, u[:, columns], self.scale, 0
                )

    def input_gradient(self, ops, dx, dout):
        """dx alone."""
        weights = self.weight.data, self.a.data, self.b
        ops.lora_linear_backward(dx, None, None, None, None, dout, None, *weights, None, self.scale, 0)


def lay_out(weights, products, names, dtype):
    """Plans the memory of all parameters -> (Layout, the Buffer of all gradients).

    weights: every Weight; products: every Fused; names: Hugging Face names of what learns; dtype: of what the ops read.
    """
    layout = Layout()
    learned = [w for w in weights if not names.isdisjoint(w.members)]
    frozen = [w for w in weights if names.isdisjoint(w.members) and w.kind != "lora_B"]
    read = [w for w in learned if w.kind != "lora_B"]  # of lora_B the ops read the block-diagonal matrix

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
    for product in products:
        product.place_b(layout, dtype)
    layout.end_part("trained parameters, working copies")
    start = layout.size
    place("grad", learned, "float32")
    gradients = Buffer(start, ((layout.size - start) // SIZES["float32"],), "float32")
    layout.end_part("gradients")
    place("m", learned, "float32")
    place("v", learned, "float32")
    layout.end_part("moments")
    return layout, gradients
