"""The network of a decoder: embedding, layers, final norm and head. It says what they need and runs the passes through them.

The ops that compute are an argument of a pass: longlora._C, or what stands in for it in a dry run. Nothing here allocates.
"""

import functools
from dataclasses import dataclass

from longlora.decoder.layer import Layer, Reach, Views, stream_eps
from longlora.decoder.weights import Parameter, Weight, lay_out
from longlora.memory.layout import Layout

IGNORE = -100  # the target of a token that is not scored


@dataclass(frozen=True)
class Activations:
    """The planned buffers of a pass over [B,T] tokens: dicts of name -> Buffer, `shared`, and one for each layer."""

    B: int
    T: int
    recompute: str | None
    layout: Layout
    layers: list
    shared: dict


class Network:
    """The weights and passes of a model of `config` (a ModelConfig) with the LoRA of `lora` (a LoraConfig or None).

    layers: the indices of the layers that it has, by default all.
    """

    def __init__(self, config, lora=None, layers=None):
        C, V = config.hidden_size, config.vocab_size
        lora = lora and lora.for_model(config)
        self.config, self.lora = config, lora
        self.embedding = Weight("embedding", {"model.embed_tokens.weight": V}, C)
        indices = range(config.num_hidden_layers) if layers is None else layers
        self.layers = [Layer(config, i, lora) for i in indices]
        self.norm = Weight("norm", {"model.norm.weight": C})
        tied = config.tie_word_embeddings
        self.head = self.embedding if tied else Weight("head", {"lm_head.weight": V}, C)
        self.eps = stream_eps(config)
        # the stream holds x / residual_multiplier: see stream_eps
        self.embedding_scale = config.embedding_multiplier / config.residual_multiplier
        self.logits_scale = 1 / config.logits_scaling
        self.gradients = None  # all of them in one Tensor
        self._gradients = None
        # the backward ends in this layer (their number: above all of them), and there after this part
        self.lowest, self.reach = 0, Reach.INPUT

    # ---- weights ---------------------------------------------------------------------------------

    def weights(self):
        """-> list of Weight, in the order of the parameters."""
        layers = [w for layer in self.layers for w in layer.weights()]
        head = [] if self.head is self.embedding else [self.head]
        return [self.embedding, *layers, self.norm, *head]

    def tensor_shapes(self):
        """-> dict of the file's tensors, Hugging Face name -> shape, in the order of the file. A tied head is not in it."""
        head = () if self.head is self.embedding else (self.head,)
        parts = (self.embedding, *self.layers, self.norm, *head)
        return {name: shape for part in parts for name, shape in part.tensor_shapes().items()}

    def lay_out(self, dtype, training):
        """-> Layout of the weights in `dtype`, and for training of the masters, gradients and moments of those that learn.

        What learns are the tensors of the LoraConfig, or all of the model's without one.
        """
        names = _trained(self.config, self.lora) if training else frozenset()
        products = [product for layer in self.layers for product in layer.products]
        layout, self._gradients = lay_out(self.weights(), products, names, dtype)
        self.lowest, self.reach = 0, Reach.INPUT
        if not self.embedding.learns:
            found = [(i, layer.lowest()) for i, layer in enumerate(self.layers)]
            ends = [(i, reach) for i, reach in found if reach is not None]
            self.lowest, self.reach = ends[0] if ends else (len(self.layers), Reach.INPUT)
        return layout

    def bind(self, arena):
        """Makes the Tensors of the weights, at the start of `arena`, as lay_out has planned."""
        for w in self.weights():
            w.bind(arena)
        for layer in self.layers:
            for product in layer.products:
                product.bind(arena)
        self.gradients = self._gradients.view(arena) if self._gradients.shape[0] else None

    def parameters(self):
        """-> list of Parameter, the tensors that learn."""
        return [Parameter(name, w) for w in self.weights() if w.learns for name in w.members]

    # ---- buffers ---------------------------------------------------------------------------------

    def activations(self, B, T, dtype, recompute):
        """-> Activations of a training pass over [B,T] tokens; recompute None: of an evaluation."""
        layout, layers, M, shared, turns = Layout(), [], B * T, {}, ()
        for layer in self.layers:
            needs = layer.needs(B, T, dtype, recompute)
            layers.append(layout.add_all(needs.own))
            shared, turns = needs.shared, needs.turns
        layout.end_part("kept activations")
        shared = layout.add_all(shared) | layout.take_turns(*turns)
        layout.end_part("layer in hand")
        ends = {"losses": "float32", "ids": "int32", "targets": "int32"}
        ends |= {"head_lse": "float32"} if recompute is None else {"dlosses": "float32", "order": "int32"}
        shared |= layout.add_all({name: ((M,), kind) for name, kind in ends.items()})
        shared |= layout.add_all({"positions": ((B, T), "int32"), "cu_seqlens": ((M + 1,), "int32")})
        layout.end_part("batch and tables")
        return Activations(B, T, recompute, layout, layers, shared)

    # ---- passes ----------------------------------------------------------------------------------

    def forward(self, batch):
        """batch.ids -> batch.n: the head's input."""
        x = batch.layers[0].x
        batch.ops.embedding_forward(x, self.embedding.data, batch.ids)
        _scale(batch.ops, x, self.embedding_scale)
        for layer, views in zip(self.layers, batch.layers):
            layer.forward(batch, views)
        batch.ops.rms_norm_forward(batch.n, batch.rstd, None, batch.stream, None, self.norm.data, self.eps)
        _scale(batch.ops, batch.n, self.logits_scale)

    def losses(self, batch):
        """batch.n, batch.targets -> batch.losses."""
        batch.ops.linear_cross_entropy_forward(
            batch.losses, batch.head_lse, batch.n, self.head.data, batch.targets, IGNORE
        )

    def logits(self, batch, out):
        """batch.n -> out [M,V]."""
        batch.ops.lora_linear_forward(out, None, batch.n, self.head.data, None, None, None, None, 1.0)

    def head_backward(self, batch):
        """batch.n, targets, dlosses -> losses, and d: the gradient of the stream after the last layer."""
        batch.ops.linear_cross_entropy_backward(
            batch.losses,
            batch.dn,
            self.head.grad,
            batch.n,
            self.head.data,
            batch.targets,
            batch.dlosses,
            IGNORE,
        )
        _scale(batch.ops, batch.dn, self.logits_scale)
        d, norm = batch.stream, self.norm
        batch.ops.rms_norm_backward(d, norm.grad, batch.dn, d, batch.rstd, norm.data, None)

    def layers_backward(self, batch):
        """d -> the gradients of the layers and of the embedding. batch.order is read where the embedding learns."""
        for i in range(len(self.layers) - 1, self.lowest - 1, -1):
            reach = Reach.INPUT if i > self.lowest else self.reach
            self.layers[i].backward(batch, batch.layers[i], reach)
        if self.embedding.learns:
            _scale(batch.ops, batch.stream, self.embedding_scale)
            batch.ops.embedding_backward(self.embedding.grad, batch.stream, batch.ids, batch.order)


def _scale(ops, x, scale):
    if scale != 1:
        ops.scale(x, x, scale)


@functools.lru_cache(8)
def _trained(config, lora):
    """The Hugging Face names of what learns."""
    return frozenset(config.tensor_shapes() if lora is None else lora.tensor_shapes(config))


class Batch:
    """A pass over [B,T] tokens: the ops that compute it, its buffers in `arena` from byte `start` on, and how it attends.

    Whoever runs a pass fills ids, targets, dlosses and order, and sets:
      attention   (group_size, boundary, shift) as the op takes them
      cos, sin    the tables of rope
      positions   rows of the tables, int32 [B,T]; None: each row of tokens has 0 to T-1
      cu_seqlens  the borders of packed documents, int32 [S], where B is 1; None without
    positions_room and cu_seqlens_room are the memory for the last two.
    """

    def __init__(self, ops, network, activations, arena, start):
        self.ops, self.recompute = ops, activations.recompute
        self.B, self.T = activations.B, activations.T
        shared = {name: b.view(arena, start) for name, b in activations.shared.items()}
        tensors = [
            shared | {name: b.view(arena, start) for name, b in own.items()} for own in activations.layers
        ]
        # x after the last layer: training has the stream's gradient there later, an evaluation has one buffer for the stream
        self.stream = shared["d"] if "d" in shared else shared["x"]
        after = [own["x"] for own in tensors[1:]] + [self.stream]
        self.layers = [
            Views(layer, own, self.B, self.T, x) for layer, own, x in zip(network.layers, tensors, after)
        ]
        self.n, self.rstd, self.dn = shared["n"], shared["rstd"], shared.get("dn")
        self.ids, self.targets, self.order = shared["ids"], shared["targets"], shared.get("order")
        self.losses, self.dlosses, self.head_lse = (
            shared.get(name) for name in ("losses", "dlosses", "head_lse")
        )
        self.positions_room, self.cu_seqlens_room = shared["positions"], shared["cu_seqlens"]
        self.attention = self.cos = self.sin = self.positions = self.cu_seqlens = None
