"""One layer of the decoder: its weights, its buffers, its forward and its backward.

    1  n1 = rms_norm(x)             6   h = x + o Wo'
    2  q, k, v = n1 Wqkv'           7   n2 = rms_norm(h)
    3  norms of q's and k's heads   8   g, p = n2 Wgate_up'
    4  rope of q and k              9   a = silu(g) p
    5  o = s2_attention(q, k, v)    10  x' = h + a Wdown'

Families differ in data: which modules, norms and biases there are, which layers have rope, and factors. Each
product has LoRA where the run asks for it.

The backward of step n is called n'. `d` is the gradient of the residual stream: one buffer, from x' down to
x. What is not kept is computed again by the same calls, so every choice of recomputation gives the same bits.

Letters as in csrc/ops.h: M = B T tokens, C hidden, H and K query and key/value heads, D head size, F
feed-forward.
"""

import enum
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from longlora import Tensor
from longlora.decoder.modules import Fused, Norm
from longlora.decoder.weights import Weight
from longlora.memory.layout import Shape, Wanted

TILE = 2048  # tokens that the MLP handles at a time
# What the backward computes again, fastest first: n1 and a alone; all but the attention; all.
RECOMPUTE = ("none", "minimal", "full")
# The buffers that each layer keeps for its backward. An evaluation, None, has no backward.
KEPT: dict[str | None, tuple[str, ...]] = {
    "none": ("x", "qkv", "u_qkv", "o", "lse", "u_o", "h", "rstd2", "gp", "u_gate_up"),
    "minimal": ("x", "o", "lse"),
    "full": ("x",),
    None: (),
}


class Reach(enum.IntEnum):
    """How far the backward of a layer goes: to the last part that learns, or to the layer's input."""

    DOWN, GATE_UP, MLP_NORM, O_PROJ, QKV, INPUT_NORM, INPUT = range(7)


class Needs(NamedTuple):
    """The buffers of a layer in a pass."""

    own: Wanted  # each layer has its own
    shared: Wanted  # all layers use the same ones, one layer after the other
    turns: tuple[Wanted, ...]  # shared too; only one of these sets is in use at a time


def stream_eps(config: Any) -> float:
    """eps of the norms of the residual stream, which holds x / m for the model's residual multiplier m.

    x' = x + m f(norm(x)) is then x' / m = x / m + f(norm(x / m)) with eps / m^2 in the norm. No product has a
    factor.
    """
    return config.rms_norm_eps / config.residual_multiplier**2


def _rows(modules: tuple[str, ...], *rows: int) -> dict[str, int]:
    """Module -> features out. One module may hold the rows of all."""
    return dict(zip(modules, rows if len(modules) > 1 else (sum(rows),)))


class Layer:
    """Layer `index` of a model of `config`, a ModelConfig, with the LoRA of `lora`, a LoraConfig or None.

    `batch` is the network.Batch of a pass: what all layers share.
    """

    def __init__(self, config: Any, index: int, lora: Any = None):
        H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        C, F, eps = config.hidden_size, config.intermediate_size, stream_eps(config)
        self.index = index
        self.heads, self.kv_heads, self.head_dim, self.hidden, self.inner = H, K, D, C, F
        layer = f"model.layers.{index}."
        attention, mlp = layer + "self_attn.", layer + "mlp."
        qkv = _rows(config.qkv_modules, H * D, K * D, K * D)
        self.input_norm = Norm(layer + "input_layernorm", C, eps)
        self.qkv = Fused(attention, qkv, C, bias=config.qkv_bias, lora=lora)
        self.q_norm = Norm(attention + "q_norm", D, config.rms_norm_eps, config.qk_norm)
        self.k_norm = Norm(attention + "k_norm", D, config.rms_norm_eps, config.qk_norm)
        self.o = Fused(attention, {"o_proj": C}, H * D, bias=config.o_bias, lora=lora)
        self.mlp_norm = Norm(layer + "post_attention_layernorm", C, eps)
        self.gate_up = Fused(mlp, _rows(config.gate_up_modules, F, F), C, lora=lora)
        self.down = Fused(mlp, {"down_proj": C}, F, lora=lora)
        self.products = (self.qkv, self.o, self.gate_up, self.down)
        self.head_norms = config.qk_norm
        self.rotates = config.rope_layers is None or config.rope_layers[index]
        self.scale = config.attention_multiplier
        if self.scale is None:
            self.scale = 1 / math.sqrt(D)

    # ---- weights -------------------------------------------------------------------------------

    def weights(self) -> list[Weight]:
        """All of them, in the order of the parameters."""
        norms = [norm.weight for norm in (self.input_norm, self.mlp_norm, self.q_norm, self.k_norm)]
        return [w for w in norms if w.members] + [w for x in self.products for w in x.weights()]

    def tensor_shapes(self) -> dict[str, Shape]:
        """Give Hugging Face name -> shape in the order of the file, without LoRA."""
        attention = (self.input_norm.weight, self.qkv, self.q_norm.weight, self.k_norm.weight, self.o)
        parts = (*attention, self.mlp_norm.weight, self.gate_up, self.down)
        return {name: shape for part in parts for name, shape in part.tensor_shapes().items()}

    def lowest(self) -> Reach | None:
        """The last part of its backward that learns, None where nothing does."""
        learns = {
            Reach.INPUT_NORM: self.input_norm.learns,
            Reach.QKV: self.qkv.learns or self.q_norm.learns or self.k_norm.learns,
            Reach.O_PROJ: self.o.learns,
            Reach.MLP_NORM: self.mlp_norm.learns,
            Reach.GATE_UP: self.gate_up.learns,
            Reach.DOWN: self.down.learns,
        }
        return next((part for part, there in learns.items() if there), None)

    # ---- buffers -------------------------------------------------------------------------------

    def needs(self, B: int, T: int, dtype: str, recompute: str | None) -> Needs:
        """The buffers of a pass over [B,T] tokens; recompute None is an evaluation, which has no backward."""
        M, tile, F32 = B * T, min(B * T, TILE), "float32"
        C, F, D, H, K = self.hidden, self.inner, self.head_dim, self.heads, self.kv_heads
        every: dict[str, tuple[Shape, str]] = {
            "x": ((M, C), dtype),
            "n": ((M, C), dtype),
            "rstd": ((M,), F32),
            "qkv": ((M, (H + 2 * K) * D), dtype),
            "o": ((M, H * D), dtype),
            "lse": ((B, H, T), F32),
            "h": ((M, C), dtype),
            "n2": ((tile, C), dtype),
            "rstd2": ((M,), F32),
            "gp": ((M if recompute == "none" else tile, 2 * F), dtype),
            "f": ((tile, F), dtype),
        }
        if self.head_norms:
            every |= {"qk": ((M, (H + K) * D), dtype), "qk_rstd": ((H + K, M), F32)}
        # u = x A' of the products with LoRA. The last product's x is computed again, and its u with it.
        for name, product in (("u_qkv", self.qkv), ("u_o", self.o), ("u_gate_up", self.gate_up)):
            if product.rank:
                every[name] = (M, product.rank), F32
        turns: tuple[tuple[str, ...], ...] = ("n",), ("o",)
        if recompute is None:
            del every["h"]  # the stream is one buffer: h is x
        else:
            turns = ("n2", "f", "h", "rstd2", "gp"), ("do", "dqkv")  # of the MLP, of the attention's backward
            every |= {"d": every["x"], "dn": every["x"], "do": every["o"], "dqkv": every["qkv"]}

        def take(names: Iterable[str]) -> Wanted:
            return {name: every.pop(name) for name in names if name in every}

        own = take(KEPT[recompute])
        return Needs(own, turns=tuple(take(names) for names in turns), shared=every)

    # ---- forward -------------------------------------------------------------------------------

    def forward(self, batch: Any, views: "Views") -> None:
        """1 to 10: views.x -> x of the next layer."""
        ops = batch.ops
        self._attention(batch, views)
        for tile in views.tiles:
            self.mlp_norm.forward(ops, tile.n2, tile.rstd2, tile.h)
            self.gate_up.forward(ops, tile.gp, tile.u, tile.n2)
            ops.swiglu_forward(tile.f, tile.g, tile.p)
            self.down.forward(ops, tile.after, None, tile.f, tile.h)

    def _attention(self, batch, views, attend=True):
        """1 to 6: x -> h. attend=False: o and lse are kept."""
        ops, o, lse = batch.ops, views.o4, views.lse
        self.input_norm.forward(ops, views.n, views.rstd, views.x)
        self.qkv.forward(ops, views.qkv, views.u_qkv, views.n)
        self._queries_and_keys(batch, views)
        if attend and batch.cache is not None:
            cache, places = batch.cache[self.index], (batch.rows, batch.lengths)
            ops.cached_attention(o, *cache, views.q, views.k, views.v, *places, self.scale)
        elif attend:
            ops.s2_attention_forward(o, lse, views.q, views.k, views.v, *self._attends(batch))
        self.o.forward(ops, views.h, views.u_o, views.o, views.x)

    def _attends(self, batch):
        return batch.cu_seqlens, *batch.attention, self.scale

    def _queries_and_keys(self, batch, views):
        """3, 4: norms of the heads; then rope in place, where the layer has it."""
        for j, columns, norm in self._normed_heads():
            norm.forward(batch.ops, views.qk_normed[:, columns], views.qk_rstd[j], views.qkv[:, columns])
        if self.rotates:
            batch.ops.rope_forward(views.qk, views.qk, batch.cos, batch.sin, batch.positions)

    def _normed_heads(self) -> Iterator[tuple[int, slice, Norm]]:
        """Number, columns in qkv and norm of each head that has a norm."""
        for j in range(self.heads + self.kv_heads if self.head_norms else 0):
            norm = self.q_norm if j < self.heads else self.k_norm
            yield j, slice(j * self.head_dim, (j + 1) * self.head_dim), norm

    # ---- backward ------------------------------------------------------------------------------

    def backward(self, batch: Any, views: "Views", reach: Reach) -> None:
        """10' to 1': d of x' -> d of x, and the gradients of what learns; it ends after `reach`."""
        if batch.recompute != "none":
            self._attention(batch, views, attend=batch.recompute == "full")
        for tile in views.tiles:
            self._mlp_backward(batch, tile, reach)
        if reach > Reach.MLP_NORM:
            self._attention_backward(batch, views, reach)

    def _mlp_backward(self, batch, tile, reach):
        """10' to 7': d of x' -> d of h."""
        ops, again = batch.ops, batch.recompute != "none"
        if again or self.gate_up.learns:
            self.mlp_norm.forward(ops, tile.n2, tile.rstd2, tile.h)
        if again:
            self.gate_up.forward(ops, tile.gp, tile.u, tile.n2)
        if self.down.learns:  # a again, from g and p
            ops.swiglu_forward(tile.f, tile.g, tile.p)
            self.down.backward(ops, None, tile.d, tile.f, None)
        if reach == Reach.DOWN:
            return
        self.down.input_gradient(ops, tile.f, tile.d)  # the gradient of a, over a
        ops.swiglu_backward(tile.g, tile.p, tile.f, tile.g, tile.p)  # the gradients of g and p, over g and p
        self.gate_up.backward(ops, tile.dn if reach > Reach.GATE_UP else None, tile.gp, tile.n2, tile.u)
        if reach > Reach.GATE_UP:
            self.mlp_norm.backward(ops, tile.d, tile.dn, tile.h, tile.rstd2, tile.d)

    def _attention_backward(self, batch, views, reach):
        """6' to 1': d of h -> d of x."""
        ops = batch.ops
        self.o.backward(ops, views.do if reach > Reach.O_PROJ else None, views.d, views.o, views.u_o)
        if reach == Reach.O_PROJ:
            return
        if batch.recompute == "none":  # n1 again, and q and k if the inputs of their norms were kept
            self.input_norm.forward(ops, views.n, views.rstd, views.x)
            if self.head_norms:
                self._queries_and_keys(batch, views)
        gradients, q, k, v = (views.dq, views.dk, views.dv), views.q, views.k, views.v
        ops.s2_attention_backward(*gradients, views.do4, q, k, v, views.o4, views.lse, *self._attends(batch))
        if self.rotates:
            ops.rope_backward(views.dqk, views.dqk, batch.cos, batch.sin, batch.positions)
        for j, columns, norm in self._normed_heads():
            d = views.dqkv[:, columns]
            norm.backward(ops, d, d, views.qkv[:, columns], views.qk_rstd[j])
        self.qkv.backward(ops, views.dn if reach > Reach.QKV else None, views.dqkv, views.n, views.u_qkv)
        if reach > Reach.QKV:
            self.input_norm.backward(ops, views.d, views.dn, views.x, views.rstd, views.d)


class Tile(NamedTuple):
    """The buffers of the MLP for some tokens."""

    n2: Tensor
    f: Tensor  # a, then its gradient
    h: Tensor
    rstd2: Tensor
    gp: Tensor  # g and p side by side
    g: Tensor
    p: Tensor
    u: Tensor | None
    after: Tensor  # x'
    d: Tensor | None
    dn: Tensor | None


class Views:
    """The buffers of one layer in a pass over [B,T] tokens, cut as the ops want them: q is [B,T,H,D].

    tensors: all that Layer.needs asks for, by name. after: x of the next layer.
    """

    def __init__(self, layer: Layer, tensors: Mapping[str, Tensor], B: int, T: int, after: Tensor):
        H, D, both = layer.heads, layer.head_dim, layer.heads + layer.kv_heads

        def heads(x: Tensor) -> Tensor:
            return x.reshape((B, T, x.shape[1] // D, D))

        self.x, self.n, self.rstd = tensors["x"], tensors["n"], tensors["rstd"]
        self.qkv, self.o, self.lse = tensors["qkv"], tensors["o"], tensors["lse"]
        self.h = tensors.get("h", self.x)
        self.u_qkv, self.u_o = tensors.get("u_qkv"), tensors.get("u_o")
        self.o4, qkv = heads(self.o), heads(self.qkv)
        # q and k lie side by side and go through rope in one call. Where their heads have norms, they have
        # another buffer, since the backward of the norms reads what went in.
        self.qk_normed, self.qk_rstd = tensors.get("qk"), tensors.get("qk_rstd")
        self.qk = qkv[:, :, :both] if self.qk_normed is None else heads(self.qk_normed)
        self.q, self.k, self.v = self.qk[:, :, :H], self.qk[:, :, H:], qkv[:, :, both:]
        self.d, self.dn, self.do, self.dqkv = (tensors.get(name) for name in ("d", "dn", "do", "dqkv"))
        if self.dqkv is not None:
            dqkv = heads(self.dqkv)
            self.do4, self.dqk, self.dv = heads(tensors["do"]), dqkv[:, :, :both], dqkv[:, :, both:]
            self.dq, self.dk = self.dqk[:, :, :H], self.dqk[:, :, H:]
        self.tiles = [self._tile(layer, tensors, start, after) for start in range(0, B * T, TILE)]

    def _tile(self, layer, tensors, start, after):
        """The Tile of the tokens from `start` on."""
        M, F = self.x.shape[0], layer.inner
        rows = slice(start, min(start + TILE, M))
        count = slice(0, rows.stop - start)
        gp, u = tensors["gp"], tensors.get("u_gate_up")
        gp = gp[rows if gp.shape[0] == M else count]
        return Tile(
            n2=tensors["n2"][count],
            f=tensors["f"][count],
            h=self.h[rows],
            rstd2=tensors["rstd2"][rows],
            gp=gp,
            g=gp[:, :F],
            p=gp[:, F:],
            u=None if u is None else u[rows],
            after=after[rows],
            d=None if self.d is None else self.d[rows],
            dn=None if self.dn is None else self.dn[rows],
        )
