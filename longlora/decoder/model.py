"""One decoder made of ops, with its backward written out: Llama, Mistral, Qwen2, Qwen3 and SmolLM2 are data.

All memory is one arena that plan.py lays out; every call below writes into buffers that exist already. Numbers in the
comments are the steps of one layer:

   1 n1 = rms_norm(x)   2, 3 q, k, v = n1 W1' + LoRA (and bias, norm of heads)   4 rope   5 o = s2_attention(q, k, v)
   6 h = x + o W2' + LoRA   7 n2 = rms_norm(h)   8 g, p = n2 W3'   9 a = silu(g) p   10 x' = h + a W4'

and n' is the backward of step n. d is the gradient of the residual stream, from x' down to x in one buffer. What is not
kept is computed again by the same calls, so every choice of checkpointing gives the same bits.
"""

import math
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from longlora import _C
from longlora.decoder import rope as rope_
from longlora.device import CPU, Inputs, host, send
from longlora.errors import UserError
from longlora.memory import plan as plan_
from longlora.ops import BOUNDARIES, SHIFTS

IGNORE = -100


class Parameter:
    """A trained tensor: float32 views value, grad, m, v of [shape]; copy is what the ops read, None if that is value."""

    def __init__(self, name, kind, value, grad, m, v, copy):
        self.name, self.kind, self.shape = name, kind, tuple(value.shape)
        self.value, self.grad, self.m, self.v, self.copy = value, grad, m, v, copy

    def publish(self):
        """Writes the working copy, after `value` was changed."""
        if self.copy is not None:
            self.copy.copy_(self.value)


class Linears:
    """One product of a layer, with LoRA on some of the modules whose outputs lie side by side in it.

    A's of the modules are stacked, B is block-diagonal: u = x A', out = x W' + bias + scale u B' is then one product too.
    blocks: (rows, columns, gradient) of each B on the diagonal.
    """

    def __init__(self, weight, bias, a, b, scale, dweight, dbias, da, blocks):
        self.weight, self.bias, self.a, self.b, self.scale = weight, bias, a, b, scale
        self.dweight, self.dbias, self.da = dweight, dbias, da
        self.db = blocks[0][2] if len(blocks) == 1 and blocks[0][0] == slice(0, weight.shape[0]) else None
        self.blocks = (
            []
            if self.db is not None
            else [
                (rows, columns, db, weight[rows], a[columns], b[rows, columns])
                for rows, columns, db in blocks
                if db is not None
            ]
        )
        self.learns = any(x is not None for x in (dweight, dbias, da, self.db)) or bool(self.blocks)

    def forward(self, out, u, x, residual=None):
        _C.lora_linear_forward(out, u, x, self.weight, self.bias, self.a, self.b, residual, self.scale)

    def backward(self, dx, dout, x, u):
        """dx (not if None) and the gradients of what is trained. x is not read when nothing is."""
        _C.lora_linear_backward(
            dx,
            self.da,
            self.db,
            self.dweight,
            self.dbias,
            dout,
            x,
            self.weight,
            self.a,
            self.b,
            u,
            self.scale,
            0,
        )
        for rows, columns, db, weight, a, b in self.blocks:
            _C.lora_linear_backward(
                None, None, db, None, None, dout[:, rows], None, weight, a, b, u[:, columns], self.scale, 0
            )


# The parts of a layer that can learn, in the order of the backward. Where nothing below a layer learns, its backward ends after
# the last part that does; ALL goes through to the gradient of the layer's input.
DOWN, GATE_UP, W2, O, QKV, W1, ALL = range(7)


class Layer:
    """The parameters of one layer as the ops read them, and the gradients of its norms (None where frozen)."""

    def __init__(self, model, i):
        view = model._view
        self.w1, self.dw1 = view(f"w1.{i}"), view(f"grad.w1.{i}")
        self.w2, self.dw2 = view(f"w2.{i}"), view(f"grad.w2.{i}")
        self.q_norm, self.dq_norm = view(f"q_norm.{i}"), view(f"grad.q_norm.{i}")
        self.k_norm, self.dk_norm = view(f"k_norm.{i}"), view(f"grad.k_norm.{i}")
        for group, (_, outs) in plan_.widths(model.config).items():
            blocks, modules = [], plan_.GROUPS[group][1]
            for j, name in enumerate(plan_.adapted(group, model.lora)):
                first = sum(outs[: modules.index(name)])
                rows, columns = (
                    slice(first, first + outs[modules.index(name)]),
                    slice(j * model.lora.r, (j + 1) * model.lora.r),
                )
                blocks.append((rows, columns, view(f"grad.{group}.B.{name}.{i}")))
            setattr(
                self,
                group,
                Linears(
                    view(f"{group}.weight.{i}"),
                    view(f"{group}.bias.{i}"),
                    view(f"{group}.A.{i}"),
                    view(f"{group}.B.{i}"),
                    model.lora.scale if blocks else 1.0,
                    view(f"grad.{group}.weight.{i}"),
                    view(f"grad.{group}.bias.{i}"),
                    view(f"grad.{group}.A.{i}"),
                    blocks,
                ),
            )
        heads = self.dq_norm is not None or self.dk_norm is not None
        learns = {
            W1: self.dw1 is not None,
            QKV: self.qkv.learns or heads,
            O: self.o.learns,
            W2: self.dw2 is not None,
            GATE_UP: self.gate_up.learns,
            DOWN: self.down.learns,
        }
        self.last = next((part for part, there in learns.items() if there), None)  # the last one that learns


class Batch:
    """The buffers of a pass over [B,T] tokens, cut into the views that the ops want. buffers: name -> Tensor, of a layout.

    Lists have one entry per layer: what is kept has its own memory in each, the rest is the same for all.
    """

    def __init__(self, config, buffers, B, T, layers):
        H, K, D, F = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.intermediate_size,
        )
        self.B, self.T, self.M = B, T, B * T

        def per_layer(name):
            return [buffers.get(f"{name}.{i}", buffers.get(name)) for i in range(layers)]

        def heads(x):
            return x.reshape((B, T, x.shape[1] // D, D))

        self.x, self.h, self.o, self.qkv, self.lse = (
            per_layer(name) for name in ("x", "h", "o", "qkv", "lse")
        )
        if self.h[0] is None:
            self.h = self.x  # evaluation: the stream is one buffer
        self.rstd2, self.gp = per_layer("rstd2"), per_layer("gp")
        self.u = {group: per_layer(f"u.{group}") for group in plan_.GROUPS}
        self.o4 = [heads(x) for x in self.o]
        # q and k side by side go through rope in one call; with norms of heads they get a buffer of their own
        both = (
            [heads(buffers["qk"])] * layers if config.qk_norm else [heads(x)[:, :, : H + K] for x in self.qkv]
        )
        self.qk4, self.q4, self.k4 = both, [x[:, :, :H] for x in both], [x[:, :, H:] for x in both]
        self.v4 = [heads(x)[:, :, H + K :] for x in self.qkv]
        for name in (
            "n",
            "rstd",
            "d",
            "dn",
            "do",
            "dqkv",
            "n2",
            "f",
            "losses",
            "dlosses",
            "head_lse",
            "qk",
            "qk_rstd",
            "ids",
            "targets",
            "order",
        ):
            setattr(self, name, buffers.get(name))
        self.stream = self.x[0] if self.d is None else self.d  # x after the last layer
        if self.dqkv is not None:
            d4 = heads(self.dqkv)
            self.do4, self.dqk4 = heads(self.do), d4[:, :, : H + K]
            self.dq4, self.dk4, self.dv4 = d4[:, :, :H], d4[:, :, H : H + K], d4[:, :, H + K :]
        self.head_columns = [slice(h * D, (h + 1) * D) for h in range(H + K)] if config.qk_norm else []
        self.tiles = [self._tile(start, F) for start in range(0, self.M, plan_.TILE)]

    def _tile(self, start, F):
        """For tokens start.. of the MLP -> n2, f, d, dn, and per layer x', h, rstd2, g and p, g, p, u."""
        rows = slice(start, min(start + plan_.TILE, self.M))
        count = slice(0, rows.stop - rows.start)
        layers = []
        for i, gp in enumerate(self.gp):
            gp = gp[rows] if gp.shape[0] == self.M else gp[count]
            u = self.u["gate_up"][i]
            after = self.x[i + 1] if i + 1 < len(self.x) else self.stream
            layers.append(
                (after[rows], self.h[i][rows], self.rstd2[i][rows], gp, gp[:, :F], gp[:, F:], u and u[rows])
            )
        gradients = (None, None) if self.dn is None else (self.d[rows], self.dn[rows])
        return self.n2[count], self.f[count], *gradients, layers


class Model:
    """A decoder of `config` (config.ModelConfig) on `device` ("cpu", "cuda:0").

    dtype is that of weights and activations; lora a LoraConfig, or None: full fine-tuning. With a `plan` (plan.plan of the
    same config, dtype and lora) it can be trained on up to the plan's batch; without one it evaluates only. rope is the
    rope.Rope of this run (default: the config's); attention dict(group_size, boundary, shift) for training, None dense:
    evaluation is always dense. Fill it by load(), or init_random(); both leave LoRA at its start, A random by `seed`, B 0.
    """

    def __init__(
        self, config, *, dtype="float32", lora=None, rope=None, plan=None, attention=None, seed=0, device=CPU
    ):
        if dtype not in plan_.DTYPES:
            raise UserError(f"dtype should be one of {', '.join(plan_.DTYPES)}, got {dtype!r}")
        if plan is not None and dtype == "float16":
            raise UserError("dtype float16 would need loss scaling to train; train in float32 or bfloat16")
        self.config, self.dtype, self.lora, self.rope = config, dtype, lora, rope or config.rope
        self.plan, self.seed, self.device = plan, seed, device
        self._attention = self._scalars(attention)
        layout = plan_.parameters(config, dtype, lora, plan is not None)
        size = layout.size
        self._activations = size
        if plan is not None:
            size += plan.activations(plan.batch_size, plan.sequence_length).size
        self.arena = _C.Tensor((size,), "uint8", device)
        self._views = {name: self._carve(self.arena, b) for name, b in layout.buffers.items()}
        self._layers = [Layer(self, i) for i in range(config.num_hidden_layers)]
        self._embedding, self._norm = self._view("embedding"), self._view("norm")
        self._head = self._embedding if config.tie_word_embeddings else self._view("head")
        self._dembedding, self._dnorm = self._view("grad.embedding"), self._view("grad.norm")
        self._dhead = self._dembedding if config.tie_word_embeddings else self._view("grad.head")
        # the backward's last layer, and the part of it where it ends
        self._end = 0, ALL
        if self._dembedding is None:
            self._end = next(
                ((i, layer.last) for i, layer in enumerate(self._layers) if layer.last is not None),
                (len(self._layers), ALL),
            )
        self._places = self._name_places()
        self.parameters = list(self._trained(layout))
        self._batches, self._tables, self._evaluated, self._inputs = {}, None, (None, None), Inputs()
        self._init_lora()

    # ---- parameters ------------------------------------------------------------------------------

    @staticmethod
    def _carve(arena, buffer, start=0):
        return arena.view(buffer.shape, buffer.dtype, start + buffer.offset)

    def _view(self, name):
        return self._views.get(name)

    def _name_places(self):
        """Hugging Face name -> (Stored, slices of its buffer): where each tensor lies."""
        places = {}
        for s in plan_.stored(self.config, self.lora):
            for name, first, last in s.members:
                places[name] = s, slice(first, last)
        return places

    def _block(self, s):
        """The block of group.B.i that holds this B."""
        group, _, module, i = s.key.split(".")
        modules, outs = plan_.GROUPS[group][1], plan_.widths(self.config)[group][1]
        first, column = (
            sum(outs[: modules.index(module)]),
            plan_.adapted(group, self.lora).index(module) * self.lora.r,
        )
        whole = self._view(f"{group}.B.{i}")
        return whole[first : first + s.shape[0], column : column + self.lora.r]

    def _trained(self, layout):
        for name, (s, rows) in self._places.items():
            value = self._view("value." + s.key)
            if value is None:
                continue
            if s.kind == "lora_B":
                group, _, _, i = s.key.split(".")
                shared = layout.buffers[f"{group}.B.{i}"] is layout.buffers["value." + s.key]
                copy = None if shared else self._block(s)
            else:
                copy = None if self.dtype == "float32" else self._view(s.key)[rows]
            grad, m, v = (self._view(f"{what}.{s.key}")[rows] for what in ("grad", "m", "v"))
            yield Parameter(name, s.kind, value[rows], grad, m, v, copy)

    def _write(self, name, fill):
        """Has `fill(out)` write the tensor `name` where it belongs, out a Tensor of its shape: the master if it is trained."""
        s, rows = self._places[name]
        master = self._view("value." + s.key)
        if master is not None:
            fill(master[rows])
        elif s.kind == "lora_B":
            fill(self._block(s))
        else:
            fill(self._view(s.key)[rows])

    def refresh(self):
        """Writes every working copy, after the masters (Parameter.value) were changed."""
        for p in self.parameters:
            p.publish()

    @property
    def kinds(self):
        """The kinds of what is trained, in a fixed order."""
        found = {p.kind for p in self.parameters}
        return [kind for kind in plan_.KINDS if kind in found]

    def tensors(self):
        """-> dict of what is trained, Hugging Face name -> float32 Tensor, the master itself."""
        return {p.name: p.value for p in self.parameters}

    def load(self, checkpoint):
        """Reads every weight of `checkpoint` (weights.open_model) into place -> self. UserError if it is another model's.

        Copied even where the file has the run's dtype: q, k and v, gate and up lie under each other here and not in the file,
        and a mapped file that somebody truncates or writes over would end or change the run hours later.
        """
        wanted = self.config.tensor_shapes()
        if set(checkpoint.names()) != set(wanted):
            odd = sorted(set(checkpoint.names()) ^ set(wanted))
            raise UserError(f"{checkpoint.path}: is not of the model's config: {odd[0]}")
        names = checkpoint.names()
        np.empty(16 << 20, np.uint8)  # freed again: now the C library keeps the memory of smaller arrays
        with ThreadPoolExecutor(
            _C.get_num_threads()
        ) as pool:  # NumPy, which converts, lets go of the interpreter
            for _ in pool.map(lambda name: self._write(name, lambda out: checkpoint.read(name, out)), names):
                pass
        self.refresh()
        return self

    def load_adapter(self, tensors, lora=None):
        """Copies an adapter's float32 ndarrays (Hugging Face name -> array) into place -> self.

        UserError for a rank or a tensor that this model does not have.
        """
        if (
            lora is not None
            and self.lora is not None
            and (lora.r, lora.scale) != (self.lora.r, self.lora.scale)
        ):
            raise UserError(
                f"adapter: r and scale should be {self.lora.r} and {self.lora.scale:g}, got {lora.r} and "
                f"{lora.scale:g}"
            )
        for name, array in tensors.items():
            if name not in self._places:
                raise UserError(f"adapter: the model has no {name}")
            s, rows = self._places[name]
            shape = (rows.stop - rows.start, *s.shape[1:])
            if tuple(array.shape) != shape:
                raise UserError(f"adapter: {name} should have shape {list(shape)}, got {list(array.shape)}")
        for name, array in tensors.items():
            self._write(name, lambda out: out.copy_(array))
        self.refresh()
        return self

    def init_random(self, seed=None):
        """Weights as in transformers, normal(0, initializer_range), biases 0, norms 1 -> self; by seed and name alone."""
        seed = self.seed if seed is None else seed
        for name in self.config.tensor_shapes():
            s, _ = self._places[name]
            if s.kind in ("norm", "bias"):
                self._write(name, lambda out: out.fill(1 if s.kind == "norm" else 0))
            else:
                self._write(
                    name, lambda out: self.draw(name, seed, out, self.config.initializer_range, normal=True)
                )
        self.refresh()
        return self

    def _init_lora(self):
        """As PEFT: A kaiming-uniform with a = sqrt(5), that is uniform within 1/sqrt(features in); B zero, as the arena is."""
        for name, (s, _) in self._places.items():
            if s.kind == "lora_A":
                self._write(name, lambda out: self.draw(name, self.seed, out, 1 / math.sqrt(s.shape[1])))
        for p in self.parameters:
            if p.kind == "lora_A":
                p.publish()

    @staticmethod
    def draw(name, seed, out, width, normal=False):
        """Random rows of `out` [N,C]: normal(0, width), or uniform in -width .. width."""
        random = np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(name.encode())]))
        rows, columns = out.shape
        step = max(1, (1 << 18) // max(columns, 1))
        for start in range(0, rows, step):
            count = min(step, rows - start)
            if normal:
                part = random.standard_normal((count, columns), np.float32) * np.float32(width)
            else:
                part = random.random((count, columns), np.float32) * np.float32(2 * width) - np.float32(width)
            out[start : start + count].copy_(part)

    def zero_grad(self):
        """Gradients to 0; every micro-batch adds to them."""
        self._views["grad"].fill(0)

    # ---- buffers ---------------------------------------------------------------------------------

    @staticmethod
    def _scalars(attention):
        """(group_size, boundary, shift) as the op takes them; None where dense."""
        if attention is None:
            return None
        return (
            attention["group_size"],
            BOUNDARIES[attention.get("boundary", "split")],
            SHIFTS[attention.get("shift", "half")],
        )

    def _attention_scalars(self, v, training):
        scale = 1 / math.sqrt(self.config.head_dim)
        if training and self._attention is not None:
            return (*self._attention, scale)
        return (max(v.T, 1), BOUNDARIES["split"], SHIFTS["none"], scale)

    def _rope_tables(self, length):
        if self._tables is None or self._tables[0].shape[0] < length:
            longest = max(length, self.plan.sequence_length if self.plan is not None else 0)
            self._tables = [
                send(x, self.device) for x in rope_.tables(self.rope, self.config.head_dim, longest)
            ]
        return self._tables

    def _batch(self, B, T):
        """The buffers of a training pass; made once per shape."""
        found = self._batches.get((B, T))
        if found is None:
            layout = self.plan.activations(B, T)
            if layout.size > self.arena.shape[0] - self._activations:
                raise UserError(
                    f"a batch of {B} x {T} tokens is larger than the planned {self.plan.batch_size} x "
                    f"{self.plan.sequence_length}"
                )
            if len(self._batches) >= 8:  # ragged lengths: views are cheap, but not without end
                self._batches.clear()
            buffers = {
                name: self._carve(self.arena, b, self._activations) for name, b in layout.buffers.items()
            }
            found = self._batches[B, T] = Batch(self.config, buffers, B, T, len(self._layers))
        return found

    def _evaluation_batch(self, T):
        """The buffers of an evaluation: the training pass's memory where it is large enough, else their own, kept for the next."""
        length, found = self._evaluated
        if length != T:
            self._evaluated = found = None, None  # its memory is free before the next is taken
            layout = plan_.evaluation(self.config, self.dtype, T, self.lora)
            arena, start = self.arena, self._activations
            if layout.size > arena.shape[0] - start:
                arena, start = _C.Tensor((layout.size,), "uint8", self.device), 0
            buffers = {name: self._carve(arena, b, start) for name, b in layout.buffers.items()}
            found = Batch(self.config, buffers, 1, T, len(self._layers))
            self._evaluated = T, found
        return found

    # ---- forward ---------------------------------------------------------------------------------

    def _queries(self, layer, i, v, cos, sin):
        """3, 4: norms of heads, then rope in place on q and k."""
        for j, columns in enumerate(v.head_columns):
            weight, x = (
                layer.q_norm if j < self.config.num_attention_heads else layer.k_norm,
                v.qkv[i][:, columns],
            )
            _C.rms_norm_forward(
                v.qk[:, columns], v.qk_rstd[j], None, x, None, weight, self.config.rms_norm_eps
            )
        _C.rope_forward(v.qk4[i], v.qk4[i], cos, sin, None)

    def _attention_forward(self, layer, i, v, tables, scalars, attend=True):
        """1 to 6: x -> h. attend=False: o and lse are there already."""
        x = v.x[i]
        _C.rms_norm_forward(v.n, v.rstd, None, x, None, layer.w1, self.config.rms_norm_eps)
        layer.qkv.forward(v.qkv[i], v.u["qkv"][i], v.n)
        self._queries(layer, i, v, *tables)
        if attend:
            _C.s2_attention_forward(v.o4[i], v.lse[i], v.q4[i], v.k4[i], v.v4[i], None, *scalars)
        layer.o.forward(v.h[i], v.u["o"][i], v.o[i], x)

    def _mlp_forward(self, layer, i, v):
        """7 to 10: h -> x of the next layer."""
        for n2, f, _, _, layers in v.tiles:
            after, h, rstd2, gp, g, p, u = layers[i]
            _C.rms_norm_forward(n2, rstd2, None, h, None, layer.w2, self.config.rms_norm_eps)
            layer.gate_up.forward(gp, u, n2)
            _C.swiglu_forward(f, g, p)
            layer.down.forward(after, None, f, h)

    def _forward(self, ids, v, training):
        """ids [M] -> v.stream: x after the last layer."""
        tables, scalars = self._rope_tables(v.T), self._attention_scalars(v, training)
        self._inputs.put(v.ids, ids)
        _C.embedding_forward(v.x[0], self._embedding, v.ids)
        for i, layer in enumerate(self._layers):
            self._attention_forward(layer, i, v, tables, scalars)
            self._mlp_forward(layer, i, v)

    # ---- backward --------------------------------------------------------------------------------

    def _layer_backward(self, layer, i, v, tables, scalars, keeps, last):
        """d: gradient of x' -> gradient of x; less where the part `last` is the last one that is needed."""
        eps = self.config.rms_norm_eps
        if keeps != "none":
            self._attention_forward(layer, i, v, tables, scalars, attend=keeps == "full")
        for n2, f, d, dn, layers in v.tiles:
            _, h, rstd2, gp, g, p, u = layers[i]
            if keeps != "none" or layer.gate_up.learns:
                _C.rms_norm_forward(n2, rstd2, None, h, None, layer.w2, eps)
            if keeps != "none":
                layer.gate_up.forward(gp, u, n2)
            if layer.down.learns:  # 10': a again from g and p; then da takes its place
                _C.swiglu_forward(f, g, p)
                layer.down.backward(None, d, f, None)
            if last == DOWN:
                continue
            _C.lora_linear_backward(
                f,
                None,
                None,
                None,
                None,
                d,
                None,
                layer.down.weight,
                layer.down.a,
                layer.down.b,
                None,
                layer.down.scale,
                0,
            )
            _C.swiglu_backward(g, p, f, g, p)  # 9', dg and dp over g and p
            layer.gate_up.backward(dn if last > GATE_UP else None, gp, n2, u)  # 8'
            if last > GATE_UP:
                _C.rms_norm_backward(
                    d, layer.dw2, dn, h, rstd2, layer.w2, d
                )  # 7': d is now the gradient of h
        if last <= W2:
            return
        layer.o.backward(v.do if last > O else None, v.d, v.o[i], v.u["o"][i])  # 6'
        if last == O:
            return
        if keeps == "none":  # n1 again; and q, k where what was kept is what went into their norms
            _C.rms_norm_forward(v.n, v.rstd, None, v.x[i], None, layer.w1, eps)
            if v.qk is not None:
                self._queries(layer, i, v, *tables)
        _C.s2_attention_backward(
            v.dq4, v.dk4, v.dv4, v.do4, v.q4[i], v.k4[i], v.v4[i], v.o4[i], v.lse[i], None, *scalars
        )  # 5'
        _C.rope_backward(v.dqk4, v.dqk4, *tables, None)  # 4'
        for j, columns in enumerate(v.head_columns):  # 3'
            query = j < self.config.num_attention_heads
            weight, dweight = (layer.q_norm, layer.dq_norm) if query else (layer.k_norm, layer.dk_norm)
            d, x = v.dqkv[:, columns], v.qkv[i][:, columns]
            _C.rms_norm_backward(d, dweight, d, x, v.qk_rstd[j], weight, None)
        layer.qkv.backward(v.dn if last > QKV else None, v.dqkv, v.n, v.u["qkv"][i])  # 2'
        if last > QKV:
            _C.rms_norm_backward(v.d, layer.dw1, v.dn, v.x[i], v.rstd, layer.w1, v.d)  # 1'

    def train_microbatch(self, ids, targets, loss_scale, read=True):
        """ids, targets [B,T] int32 (targets -100: not scored) -> the sum of the losses; adds the gradients of loss_scale x sum.

        loss_scale is 1 over the target tokens of the whole optimizer step, so accumulation changes nothing. UserError if the
        sum is not finite; the gradients are then of no use. With read=False a GPU is not waited for, and the result is None.
        """
        if self.plan is None:
            raise UserError("this model was made without a plan: it evaluates only")
        B, T = ids.shape
        v = self._batch(B, T)
        ids, targets = (np.ascontiguousarray(x, np.int32).reshape(-1) for x in (ids, targets))
        tables, scalars, keeps = (
            self._rope_tables(T),
            self._attention_scalars(v, True),
            self.plan.checkpointing,
        )
        self._forward(ids, v, True)
        # the head: final norm, then logits, losses and their gradient by chunks
        _C.rms_norm_forward(v.n, v.rstd, None, v.d, None, self._norm, self.config.rms_norm_eps)
        self._inputs.put(v.targets, targets)
        self._inputs.put(v.dlosses, np.where(targets == IGNORE, np.float32(0), np.float32(loss_scale)))
        _C.linear_cross_entropy_backward(
            v.losses, v.dn, self._dhead, v.n, self._head, v.targets, v.dlosses, IGNORE
        )
        _C.rms_norm_backward(v.d, self._dnorm, v.dn, v.d, v.rstd, self._norm, None)
        lowest, last = self._end
        for i in range(len(self._layers) - 1, lowest - 1, -1):
            self._layer_backward(self._layers[i], i, v, tables, scalars, keeps, ALL if i > lowest else last)
        if self._dembedding is not None:
            self._inputs.put(v.order, np.argsort(ids, kind="stable").astype(np.int32))
            _C.embedding_backward(self._dembedding, v.d, v.ids, v.order)
        if not read:
            return None
        total = float(host(v.losses).sum(dtype=np.float64))
        if not math.isfinite(total):
            raise UserError(f"the loss is not finite: {total}")
        return total

    # ---- evaluation ------------------------------------------------------------------------------

    def _hidden(self, ids):
        """ids [T] -> the buffers, with the final norm's output in n."""
        ids = np.ascontiguousarray(ids, np.int32)
        v = self._evaluation_batch(ids.shape[0])
        self._forward(ids, v, False)
        _C.rms_norm_forward(v.n, v.rstd, None, v.stream, None, self._norm, self.config.rms_norm_eps)
        return v

    def losses(self, ids, targets):
        """ids, targets [T] int32 -> float32 ndarray [T]: each token's loss, 0 where the target is -100. Dense attention."""
        v = self._hidden(ids)
        self._inputs.put(v.targets, np.ascontiguousarray(targets, np.int32))
        _C.linear_cross_entropy_forward(v.losses, v.head_lse, v.n, self._head, v.targets, IGNORE)
        return np.array(host(v.losses))

    def logits(self, ids):
        """ids [T] int32 -> float32 ndarray [T,V], all at once: for short texts."""
        v = self._hidden(ids)
        rows, out = (
            _C.Tensor((v.T, self.config.vocab_size), dtype, self.device) for dtype in (self.dtype, "float32")
        )
        _C.lora_linear_forward(rows, None, v.n, self._head, None, None, None, None, 1.0)
        _C.cast(out, rows)
        return host(out)
