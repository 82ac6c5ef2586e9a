"""One layer of the decoder: its weights, its buffers, its forward and its backward.

    1  n1 = rms_norm(x)             6   h = x + o Wo'
    2  q, k, v = n1 Wqkv'           7   n2 = rms_norm(h)
    3  norms of q's and k's heads   8   g, p = n2 Wgate_up'
    4  rope of q and k              9   a = silu(g) p
    5  o = s2_attention(q, k, v)    10  x' = h + a Wdown'

Families differ in data: which norms, biases and modules there are. Each product has LoRA where the run asks for it.

The backward of step n is called n'. `d` is the gradient of the residual stream, one buffer from x' down to x. What
is not kept is computed again by the same calls, so every choice of recomputation gives the same bits.

Letters as in csrc/ops.h: M = B T tokens, C hidden, H and K query and key/value heads, D head size, F feed-forward.
"""

import enum
import math
from typing import Any, NamedTuple

from longlora.decoder.weights import Fused, Weight

TILE = 2048  # tokens that the MLP handles at a time
# What the backward computes again, fastest first. With "none" a layer keeps all that its backward reads but n1 and
# a, with "minimal" its input, the attention's output and its statistics, with "full" its input.
RECOMPUTE = ("none", "minimal", "full")


class Reach(enum.IntEnum):
    """How far down a layer the backward goes: to the last part that learns, or through to the layer's input."""

    DOWN, GATE_UP, MLP_NORM, O_PROJ, QKV, INPUT_NORM, INPUT = range(7)


class Needs(NamedTuple):
    """The buffers of a layer in a pass, each a dict of name -> (shape, dtype)."""

    own: dict  # each layer has its own
    shared: dict  # all layers use the same ones, one layer after the other
    turns: tuple  # of dicts: shared as well, and only one of the dicts is in use at a time


class Layer:
    """Layer `index` of a model of `config`, with the LoRA of `lora` (a LoraConfig or None)."""

    def __init__(self, config, index, lora=None):
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        C, F, D = config.hidden_size, config.intermediate_size, config.head_dim
        Q, P = self.heads * D, self.kv_heads * D
        self.hidden, self.inner = C, F
        layer, attention = f"model.layers.{index}.", f"model.layers.{index}.self_attn."

        def norm(name, size, there=True):
            return Weight("norm", {f"{name}.weight": size} if there else {})

        self.input_norm = norm(layer + "input_layernorm", C)
        self.qkv = Fused(attention, _rows(config.qkv_modules, Q, P, P), C, bias=config.qkv_bias, lora=lora)
        self.q_norm = norm(attention + "q_norm", D, config.qk_norm)
        self.k_norm = norm(attention + "k_norm", D, config.qk_norm)
        self.o = Fused(attention, {"o_proj": C}, Q, bias=config.o_bias, lora=lora)
        self.mlp_norm = norm(layer + "post_attention_layernorm", C)
        self.gate_up = Fused(layer + "mlp.", _rows(config.gate_up_modules, F, F), C, lora=lora)
        self.down = Fused(layer + "mlp.", {"down_proj": C}, F, lora=lora)
        self.products = (self.qkv, self.o, self.gate_up, self.down)
        self.head_norms, self.head_eps = config.qk_norm, config.rms_norm_eps
        self.stream_eps = stream_eps(config)
        self.rotates = config.rope_layers is None or config.rope_layers[index]
        factor = config.attention_multiplier
        self.scale = 1 / math.sqrt(D) if factor is None else factor

    # ---- weights ---------------------------------------------------------------------------------

    def weights(self):
        """-> list of Weight, in the order of the parameters."""
        norms = [self.input_norm, self.mlp_norm, self.q_norm, self.k_norm]
        products = [w for product in self.products for w in product.weights()]
        return [w for w in norms if w.members] + products

    def tensor_shapes(self):
        """-> dict of the file's tensors, Hugging Face name -> shape, in the order of the file; none of LoRA."""
        parts = (
            self.input_norm,
            self.qkv,
            self.q_norm,
            self.k_norm,
            self.o,
            self.mlp_norm,
            self.gate_up,
            self.down,
        )
        return {name: shape for part in parts for name, shape in part.tensor_shapes().items()}

    def lowest(self):
        """The Reach of its last part that learns, None where nothing does."""
        learns = {
            Reach.INPUT_NORM: self.input_norm.learns,
            Reach.QKV: self.qkv.learns or self.q_norm.learns or self.k_norm.learns,
            Reach.O_PROJ: self.o.learns,
            Reach.MLP_NORM: self.mlp_norm.learns,
            Reach.GATE_UP: self.gate_up.learns,
            Reach.DOWN: self.down.learns,
        }
        return next((part for part, there in learns.items() if there), None)

    # ---- buffers ---------------------------------------------------------------------------------

    def needs(self, B, T, dtype, recompute):
        """-> Needs of a pass over [B,T] tokens; recompute None is an evaluation, which has no backward."""
        M, tile, f32 = B * T, min(B * T, TILE), "float32"
        C, F, D = self.hidden, self.inner, self.head_dim
        Q, S, both = self.heads * D, (self.heads + 2 * self.kv_heads) * D, self.heads + self.kv_heads
        x = {"x": ((M, C), dtype)}
        n = {"n": ((M, C), dtype)}
        qkv = {"qkv": ((M, S), dtype)}
        o, lse = {"o": ((M, Q), dtype)}, {"lse": ((B, self.heads, T), f32)}
        # u = x A' of each product with LoRA but the last, whose x is computed again anyway
        products = {"u_qkv": self.qkv, "u_o": self.o, "u_gate_up": self.gate_up}
        u = {name: ((M, product.rank), f32) for name, product in products.items() if product.rank}
        norms = {"rstd": ((M,), f32)}
        if self.head_norms:
            norms |= {"qk": ((M, both * D), dtype), "qk_rstd": ((both, M), f32)}
        h, rstd2 = {"h": ((M, C), dtype)}, {"rstd2": ((M,), f32)}
        gp = {"gp": ((M if recompute == "none" else tile, 2 * F), dtype)}
        mlp = {"n2": ((tile, C), dtype), "f": ((tile, F), dtype)}
        if recompute is None:  # the stream is one buffer, x, and so h is x
            return Needs({}, x | qkv | lse | u | norms | rstd2 | gp | mlp, (n, o))
        own = {"none": x | qkv | o | lse | u | h | rstd2 | gp, "minimal": x | o | lse, "full": x}[recompute]

        def rest(wanted):
            return {name: buffer for name, buffer in wanted.items() if name not in own}

        shared = n | norms | {"d": ((M, C), dtype), "dn": ((M, C), dtype)} | rest(qkv | o | lse | u)
        backward = {"do": ((M, Q), dtype), "dqkv": ((M, S), dtype)}
        return Needs(own, shared, (mlp | rest(h | rstd2 | gp), backward))

    # ---- forward ---------------------------------------------------------------------------------

    def forward(self, batch, views):
        """1 to 10: views.x -> views.after. batch: what the whole pass shares (network.Batch)."""
        self._attention(batch, views)
        for tile in views.tiles:
            self._mlp_norm(batch.ops, tile)
            self.gate_up.forward(batch.ops, tile.gp, tile.u, tile.n2)
            batch.ops.swiglu_forward(tile.f, tile.g, tile.p)
            self.down.forward(batch.ops, tile.after, None, tile.f, tile.h)

    def _attention(self, batch, views, attend=True):
        """1 to 6: x -> h. attend=False: o and lse are kept."""
        ops = batch.ops
        self._input_norm(ops, views)
        self.qkv.forward(ops, views.qkv, views.u_qkv, views.n)
        self._queries_and_keys(batch, views)
        if attend:
            q, k, v = views.q, views.k, views.v
            ops.s2_attention_forward(
                views.o4, views.lse, q, k, v, batch.cu_seqlens, *batch.attention, self.scale
            )
        self.o.forward(ops, views.h, views.u_o, views.o, views.x)

    def _input_norm(self, ops, views):
        weight = self.input_norm.data
        ops.rms_norm_forward(views.n, views.rstd, None, views.x, None, weight, self.stream_eps)

    def _mlp_norm(self, ops, tile):
        weight = self.mlp_norm.data
        ops.rms_norm_forward(tile.n2, tile.rstd2, None, tile.h, None, weight, self.stream_eps)

    def _queries_and_keys(self, batch, views):
        """3, 4: norms of the heads, then rope in place, in the layers that have it."""
        for j, columns, norm in self._normed_heads():
            out, x = views.qk_normed[:, columns], views.qkv[:, columns]
            batch.ops.rms_norm_forward(out, views.qk_rstd[j], None, x, None, norm.data, self.head_eps)
        if self.rotates:
            batch.ops.rope_forward(views.qk, views.qk, batch.cos, batch.sin, batch.positions)

    def _normed_heads(self):
        """(number, columns in qkv, norm) of each head that has one."""
        for j in range(self.heads + self.kv_heads if self.head_norms else 0):
            norm = self.q_norm if j < self.heads else self.k_norm
            yield j, slice(j * self.head_dim, (j + 1) * self.head_dim), norm

    # ---- backward --------------------------------------------------------------------------------

    def backward(self, batch, views, reach):
        """d: gradient of x' -> gradient of x, and the gradients of what learns; it ends after `reach`."""
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
            self._mlp_norm(ops, tile)
        if again:
            self.gate_up.forward(ops, tile.gp, tile.u, tile.n2)
        if self.down.learns:  # a again from g and p; then its gradient takes its place
            ops.swiglu_forward(tile.f, tile.g, tile.p)
            self.down.backward(ops, None, tile.d, tile.f, None)
        if reach == Reach.DOWN:
            return
        self.down.input_gradient(ops, tile.f, tile.d)
        ops.swiglu_backward(tile.g, tile.p, tile.f, tile.g, tile.p)  # the gradients of g and p over g and p
        self.gate_up.backward(ops, tile.dn if reach > Reach.GATE_UP else None, tile.gp, tile.n2, tile.u)
        if reach > Reach.GATE_UP:
            norm = self.mlp_norm
            ops.rms_norm_backward(tile.d, norm.grad, tile.dn, tile.h, tile.rstd2, norm.data, tile.d)

    def _attention_backward(self, batch, views, reach):
        """6' to 1': d of h -> d of x."""
        ops = batch.ops
        self.o.backward(ops, views.do if reach > Reach.O_PROJ else None, views.d, views.o, views.u_o)
        if reach == Reach.O_PROJ:
            return
        if batch.recompute == "none":  # n1 again; and q, k where what was kept is what went into their norms
            self._input_norm(ops, views)
            if self.head_norms:
                self._queries_and_keys(batch, views)
        gradients, q, k, v = (views.dq, views.dk, views.dv), views.q, views.k, views.v
        scalars = batch.cu_seqlens, *batch.attention, self.scale
        ops.s2_attention_backward(*gradients, views.do4, q, k, v, views.o4, views.lse, *scalars)
        if self.rotates:
            ops.rope_backward(views.dqk, views.dqk, batch.cos, batch.sin, batch.positions)
        for j, columns, norm in self._normed_heads():
            d, x = views.dqkv[:, columns], views.qkv[:, columns]
            ops.rms_norm_backward(d, norm.grad, d, x, views.qk_rstd[j], norm.data, None)
        self.qkv.backward(ops, views.dn if reach > Reach.QKV else None, views.dqkv, views.n, views.u_qkv)
        if reach > Reach.QKV:
            norm = self.input_norm
            ops.rms_norm_backward(views.d, norm.grad, views.dn, views.x, views.rstd, norm.data, views.d)


def stream_eps(config):
    """eps of the norms of the residual stream, which holds x / m for the residual multiplier m of the model.

    x' = x + m f(norm(x)) is then x' / m = x / m + f(norm(x / m)) with eps / m^2 in the norm: no product has a factor.
    """
    return config.rms_norm_eps / config.residual_multiplier**2


def _rows(modules, *rows):
    """-> dict of module -> features out. One module may hold the rows of all."""
    return dict(zip(modules, rows if len(modules) > 1 else (sum(rows),)))


class Tile(NamedTuple):
    """The buffers of the MLP for a tile of tokens."""

    n2: Any
    f: Any  # a, then its gradient
    h: Any
    rstd2: Any
    gp: Any
    g: Any
    p: Any
    u: Any
    after: Any  # x'
    d: Any
    dn: Any


class Views:
    """The buffers of one layer in a pass over [B,T] tokens, cut as the ops want them: q is [B,T,H,D], qkv [M,...].

    tensors: name -> Tensor, all that Layer.needs asks for. after: x of the next layer.
    """

    def __init__(self, layer, tensors, B, T, after):
        H, D, both = layer.heads, layer.head_dim, layer.heads + layer.kv_heads

        def heads(x):
            return x.reshape((B, T, x.shape[1] // D, D))

        self.x, self.n, self.rstd = tensors["x"], tensors["n"], tensors["rstd"]
        self.qkv, self.o, self.lse = tensors["qkv"], tensors["o"], tensors["lse"]
        self.h = tensors.get("h", self.x)
        self.u_qkv, self.u_o = tensors.get("u_qkv"), tensors.get("u_o")
        self.o4, qkv = heads(self.o), heads(self.qkv)
        # q and k lie side by side and go through rope in one call. Where their heads have norms, they have another
        # buffer: the backward of the norms reads what went in.
        self.qk_normed, self.qk_rstd = tensors.get("qk"), tensors.get("qk_rstd")
        self.qk = qkv[:, :, :both] if self.qk_normed is None else heads(self.qk_normed)
        self.q, self.k, self.v = self.qk[:, :, :H], self.qk[:, :, H:], qkv[:, :, both:]
        self.d, self.dn, self.do, self.dqkv = (tensors.get(name) for name in ("d", "dn", "do", "dqkv"))
        if self.dqkv is not None:
            dqkv = heads(self.dqkv)
            self.do4, self.dqk, self.dv = heads(self.do), dqkv[:, :, :both], dqkv[:, :, both:]
            self.dq, self.dk = self.dqk[:, :, :H], self.dqk[:, :, H:]
        self.tiles = [self._tile(layer, tensors, start, after) for start in range(0, B * T, TILE)]

    def _tile(self, layer, tensors, start, after):
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
