"""The network of a decoder: embedding, layers, final norm and head; what they need, and the passes over them.

The ops that compute belong to the Batch of a pass: they are longlora._C, or a recorder in a dry run. Nothing
here takes memory.
"""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from longlora import Tensor
from longlora.decoder.layer import Layer, Reach, Views, stream_eps
from longlora.decoder.modules import Norm
from longlora.decoder.weights import Parameter, Weight, lay_out
from longlora.memory.layout import Buffer, Layout, Shape, Wanted
from longlora.ops import IGNORE

# Keys and values of each layer, [N,P,K,D] in N rows of P places. See longlora.decoder.cache.
Caches = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Activations:
    """The planned buffers of a pass over [B,T] tokens, by name: `shared`, and those that each layer has."""

    B: int
    T: int
    recompute: str | None  # None is an evaluation
    layout: Layout
    layers: list[dict[str, Buffer]]
    shared: dict[str, Buffer]


class Network:
    """The weights of a model of `config`, a ModelConfig, and the passes over them.

    lora: a LoraConfig or None. layers: the indices of the layers it has, by default all.
    """

    def __init__(self, config: Any, lora: Any = None, layers: Iterable[int] | None = None):
        C, V, eps = config.hidden_size, config.vocab_size, stream_eps(config)
        self.config, self.lora = config, lora and lora.for_model(config)
        self.embedding = Weight("embedding", {"model.embed_tokens.weight": V}, C)
        indices = range(config.num_hidden_layers) if layers is None else layers
        self.layers = [Layer(config, i, self.lora) for i in indices]
        self.norm = Norm("model.norm", C, eps)
        self.tied = config.tie_word_embeddings
        self.head = self.embedding if self.tied else Weight("head", {"lm_head.weight": V}, C)
        # The residual stream holds x / residual_multiplier: see stream_eps.
        self.embedding_scale = config.embedding_multiplier / config.residual_multiplier
        self.logits_scale = 1 / config.logits_scaling
        self.gradients: Any = None  # all of them, as one Tensor
        self._gradients: Buffer | None = None
        # The backward goes down to this layer, and there as far as this. With all layers frozen it enters
        # none.
        self.lowest, self.reach = 0, Reach.INPUT

    # ---- weights -------------------------------------------------------------------------------

    def weights(self) -> list[Weight]:
        """All of them, in the order of the parameters."""
        layers = [w for layer in self.layers for w in layer.weights()]
        return [self.embedding, *layers, self.norm.weight, *([] if self.tied else [self.head])]

    def tensor_shapes(self) -> dict[str, Shape]:
        """Give Hugging Face name -> shape in the order of the file, without LoRA and without a tied head."""
        parts = (self.embedding, *self.layers, self.norm.weight, *(() if self.tied else (self.head,)))
        return {name: shape for part in parts for name, shape in part.tensor_shapes().items()}

    def lay_out(self, dtype: str, training: bool) -> Layout:
        """Plan the weights in `dtype`; for training also masters, gradients and moments of those that learn.

        The tensors of the LoraConfig learn, or all of the model's without one.
        """
        names = _trained(self.config, self.lora) if training else frozenset()
        blocks = [product.lay_out_b for layer in self.layers for product in layer.products]
        layout, self._gradients = lay_out(self.weights(), names, dtype, blocks)
        self.lowest, self.reach = 0, Reach.INPUT
        if not self.embedding.learns:
            found = [(i, layer.lowest()) for i, layer in enumerate(self.layers)]
            ends = [(i, reach) for i, reach in found if reach is not None]
            self.lowest, self.reach = ends[0] if ends else (len(self.layers), Reach.INPUT)
        return layout

    def bind(self, arena: Tensor) -> None:
        """Make the Tensors of the weights, at the start of `arena`, as lay_out has planned."""
        for w in self.weights():
            w.bind(arena)
        for layer in self.layers:
            for product in layer.products:
                product.bind(arena)
        if self._gradients is not None and self._gradients.shape[0]:
            self.gradients = self._gradients.view(arena)

    def parameters(self) -> list[Parameter]:
        """The tensors that learn."""
        return [Parameter(name, w) for w in self.weights() if w.learns for name in w.members]

    # ---- buffers -------------------------------------------------------------------------------

    def activations(self, B: int, T: int, dtype: str, recompute: str | None) -> Activations:
        """Plan a training pass over [B,T] tokens; recompute None is an evaluation."""
        layout, needs = Layout(), [layer.needs(B, T, dtype, recompute) for layer in self.layers]
        layers = [layout.add_all(one.own) for one in needs]
        layout.end_part("kept activations")
        shared = layout.add_all(needs[0].shared) | layout.take_turns(*needs[0].turns)
        layout.end_part("layer in hand")
        shared |= layout.add_all(self._ends(B, B * T, recompute is not None))
        layout.end_part("batch and tables")
        return Activations(B, T, recompute, layout, layers, shared)

    @staticmethod
    def _ends(B: int, M: int, training: bool) -> Wanted:
        """What a pass over M tokens of B sequences needs before the first layer and after the last."""
        names = {"losses": "float32", "ids": "int32", "targets": "int32", "positions": "int32"}
        names |= {"dlosses": "float32", "order": "int32"} if training else {"head_lse": "float32"}
        ends: dict[str, tuple[Shape, str]] = {name: ((M,), dtype) for name, dtype in names.items()}
        ends["cu_seqlens"] = (M + 1,), "int32"
        if not training:
            ends |= {"rows": ((B,), "int32"), "lengths": ((B,), "int32")}
        return ends

    # ---- passes --------------------------------------------------------------------------------

    def forward(self, batch: "Batch") -> None:
        """batch.ids -> batch.n: the head's input."""
        ops, x = batch.ops, batch.layers[0].x
        ops.embedding_forward(x, self.embedding.data, batch.ids)
        _scale(ops, x, self.embedding_scale)
        for layer, views in zip(self.layers, batch.layers):
            layer.forward(batch, views)
        self.norm.forward(ops, batch.n, batch.rstd, batch.stream)
        _scale(ops, batch.n, self.logits_scale)

    def losses(self, batch: "Batch") -> None:
        """batch.n, targets -> losses."""
        outputs = batch.losses, batch.head_lse
        batch.ops.linear_cross_entropy_forward(*outputs, batch.n, self.head.data, batch.targets, IGNORE)

    def logits(self, batch: "Batch", out: Tensor) -> None:
        """batch.n -> out [M,V]."""
        batch.ops.lora_linear_forward(out, None, batch.n, self.head.data, None, None, None, None, 1.0)

    def head_backward(self, batch: "Batch") -> None:
        """batch.n, targets, dlosses -> losses, and d: the gradient of the stream after the last layer."""
        outputs, d = (batch.losses, batch.dn, self.head.grad), batch.stream
        inputs = batch.n, self.head.data, batch.targets, batch.dlosses
        batch.ops.linear_cross_entropy_backward(*outputs, *inputs, IGNORE)
        _scale(batch.ops, batch.dn, self.logits_scale)
        self.norm.backward(batch.ops, d, batch.dn, d, batch.rstd)

    def layers_backward(self, batch: "Batch") -> None:
        """d -> the gradients of layers and embedding. batch.order is read if the embedding learns."""
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
    """A pass over [B,T] tokens: the ops that compute it, its buffers, and how the tokens attend.

    The buffers are those of `needs`, in `arena` from byte `start` on.
    Whoever runs the pass fills `ids`, `targets`, `dlosses` and `order`, all [M], and calls `attend`.
    """

    def __init__(self, ops: Any, network: Network, needs: Activations, arena: Tensor, start: int):
        self.ops, self.recompute, self.B, self.T = ops, needs.recompute, needs.B, needs.T
        shared = {name: b.view(arena, start) for name, b in needs.shared.items()}
        tensors = [shared | {name: b.view(arena, start) for name, b in own.items()} for own in needs.layers]
        # x after the last layer. In training the gradient of the stream takes its place; an evaluation has
        # one buffer for the stream.
        self.stream = shared["d"] if "d" in shared else shared["x"]
        after = [own["x"] for own in tensors[1:]] + [self.stream]
        self.layers = [
            Views(layer, own, self.B, self.T, x) for layer, own, x in zip(network.layers, tensors, after)
        ]
        self.n, self.rstd, self.dn = shared["n"], shared["rstd"], shared.get("dn")
        self.ids, self.targets, self.order = shared["ids"], shared["targets"], shared.get("order")
        self.losses, self.dlosses = shared["losses"], shared.get("dlosses")
        self.head_lse = shared.get("head_lse")
        self._positions, self._cu_seqlens = (
            shared["positions"].reshape((self.B, self.T)),
            shared["cu_seqlens"],
        )
        self.attention: tuple[int, int, int] | None = None
        self.cos: Any = None
        self.sin: Any = None
        self.positions: Tensor | None = None
        self.cu_seqlens: Tensor | None = None
        # Of a pass over a cache: the sequences' rows in it, and the keys that these held before.
        self.cache: Caches | None = None
        self.recorded: Caches | None = None  # the cache of the calls that `ops` has recorded
        self.rows, self.lengths = shared.get("rows"), shared.get("lengths")

    def attend_to_cache(self, cache: "Caches", tables: Iterable[Any]) -> None:
        """Attend to `cache` and to the tokens of this pass, which are written to it.

        cache: of each layer. tables: cos and sin of rope. The caller fills rows and lengths, and positions.
        """
        self.cache = cache
        self.cos, self.sin = tables
        self.positions, self.cu_seqlens = self._positions, None

    def attend(
        self,
        attention: tuple[int, int, int],
        tables: Iterable[Any],
        positions: bool = False,
        boundaries: int | None = None,
    ) -> None:
        """Say how the tokens attend.

        attention: group_size, boundary and shift as the op takes them.
        tables: cos and sin of rope.
        positions: whether self.positions, int32 [B,T], holds rows of the tables. If not, each row of tokens
            has 0 to T-1.
        boundaries: how many boundaries of packed documents self.cu_seqlens, int32, holds; B is 1 then. None:
            no documents are packed.
        """
        self.attention, self.cache = attention, None
        self.cos, self.sin = tables
        self.positions = self._positions if positions else None
        self.cu_seqlens = None if boundaries is None else self._cu_seqlens[:boundaries]
