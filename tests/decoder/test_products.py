"""Products of several modules with LoRA equal NumPy's. Weights have their places, kinds and scales."""

import numpy as np
import pytest
import tiny
from peers import close, tensor

from longlora import _C
from longlora.decoder.config import read_config
from longlora.decoder.layer import Layer, Reach
from longlora.decoder.lora import LoraConfig
from longlora.decoder.modules import Fused, Norm
from longlora.decoder.network import Network
from longlora.decoder.weights import Parameter, Weight, lay_out

MODULES, C, M = {"q_proj": 6, "k_proj": 4, "v_proj": 2}, 8, 5
ROWS = {"q_proj": slice(0, 6), "k_proj": slice(6, 10), "v_proj": slice(10, 12)}


def made(modules, targets, learns=True, bias=True, dtype="float32"):
    """A Fused with random weights, and their arrays by name."""
    lora = LoraConfig(r=3, lora_alpha=6, target_modules=targets)
    product = Fused("p.", modules, C, bias=bias, lora=lora)
    weights = product.weights()
    names = frozenset(name for w in weights for name in w.members) if learns else frozenset()
    layout, gradients = lay_out(weights, names, dtype, [product.lay_out_b])
    arena = _C.Tensor((layout.size,), "uint8", "cpu")
    arena.fill(0)
    for w in weights:
        w.bind(arena)
    product.bind(arena)
    random, arrays = np.random.default_rng(0), {}
    for w in weights:
        for name, rows in w.members.items():
            out = (w.value if learns else w.data)[rows]
            arrays[name] = random.standard_normal(out.shape).astype(np.float32)
            out.copy_(arrays[name])
            if learns:
                Parameter(name, w).publish()
    return product, arrays


def by_module(arrays, modules, x):
    """y = x W' + bias + 2 (x A') B' of each module, side by side, and all u = x A' (None without LoRA)."""
    parts, us = [], []
    for name in modules:
        y = x @ arrays[f"p.{name}.weight"].T + arrays.get(f"p.{name}.bias", 0)
        if f"p.{name}.lora_A.weight" in arrays:
            us.append(x @ arrays[f"p.{name}.lora_A.weight"].T)
            y = y + 2 * us[-1] @ arrays[f"p.{name}.lora_B.weight"].T
        parts.append(y)
    return np.concatenate(parts, 1), np.concatenate(us, 1) if us else None


CASES = [
    (MODULES, ("q_proj", "k_proj", "v_proj")),
    (MODULES, ("q_proj", "v_proj")),
    (MODULES, ("k_proj",)),
    (MODULES, ()),
    ({"o_proj": 7}, ("o_proj",)),
    ({"o_proj": 7}, ()),
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("modules, targets", CASES)
def test_a_fused_product_equals_the_products_of_its_modules(modules, targets, learns, bias):
    product, arrays = made(modules, targets, learns, bias)
    x, N = np.random.default_rng(1).standard_normal((M, C)), sum(modules.values())
    wanted, u = by_module(arrays, modules, x)
    out, out_u = tensor(np.zeros((M, N))), tensor(np.zeros(u.shape)) if targets else None
    product.forward(_C, out, out_u, tensor(x))
    close(out.numpy(), wanted, 1e-6)
    assert product.rank == 3 * len(targets) and product.scale == (2 if targets else 1)
    if targets:
        close(out_u.numpy(), u, 1e-6)
    residual = np.random.default_rng(2).standard_normal((M, N))
    product.forward(_C, out, None, tensor(x), tensor(residual))
    close(out.numpy(), wanted + residual, 1e-6)


@pytest.mark.parametrize("modules, targets", CASES)
def test_the_gradients_of_a_fused_product_equal_those_of_its_modules(modules, targets):
    product, arrays = made(modules, targets)
    random, N = np.random.default_rng(1), sum(modules.values())
    x, d = random.standard_normal((M, C)), random.standard_normal((M, N))
    _, u = by_module(arrays, modules, x)
    for w in product.weights():
        w.grad.fill(0)
    dx = tensor(np.zeros((M, C)))
    product.backward(_C, dx, tensor(d), tensor(x), tensor(u) if targets else None)
    wanted, start = {}, 0
    wanted_dx = np.zeros((M, C))
    for name, rows in modules.items():
        part = d[:, start : start + rows]
        wanted[f"p.{name}.weight"], wanted[f"p.{name}.bias"] = part.T @ x, part.sum(0)
        wanted_dx += part @ arrays[f"p.{name}.weight"]
        if name in targets:
            a, b = (np.float64(arrays[f"p.{name}.lora_{letter}.weight"]) for letter in "AB")
            wanted[f"p.{name}.lora_A.weight"] = 2 * (part @ b).T @ x
            wanted[f"p.{name}.lora_B.weight"] = 2 * part.T @ (x @ a.T)
            wanted_dx += 2 * part @ b @ a
        start += rows
    close(dx.numpy(), wanted_dx, 1e-6)
    found = {name: w.grad[rows].numpy() for w in product.weights() for name, rows in w.members.items()}
    assert set(found) == set(wanted)
    for name, gradient in wanted.items():
        close(found[name], gradient, 1e-6, name)
    dx = tensor(np.zeros((M, C)))
    product.input_gradient(_C, dx, tensor(d))
    close(dx.numpy(), wanted_dx, 1e-6)


def test_the_ops_read_a_block_diagonal_b():
    product, arrays = made(MODULES, ("q_proj", "v_proj"))
    b = np.zeros((12, 6), np.float32)
    b[:6, :3], b[10:, 3:] = arrays["p.q_proj.lora_B.weight"], arrays["p.v_proj.lora_B.weight"]
    np.testing.assert_array_equal(product.b.numpy(), b)


def test_a_single_block_that_learns_in_float32_is_not_copied():
    for dtype, learns, shared in (
        ("float32", True, True),
        ("bfloat16", True, False),
        ("float32", False, False),
    ):
        product, _ = made({"o_proj": 7}, ("o_proj",), learns, dtype=dtype)
        assert (product.b is product.blocks[0].value) is shared
        assert product.b.dtype == dtype and product.b.shape == (7, 3)
    assert made({"o_proj": 7}, ())[0].b is None


def test_the_tensors_of_a_product_come_module_by_module():
    product = Fused("x.", {"a": 2, "b": 3}, 4, bias=True)
    assert list(product.tensor_shapes().items()) == [
        ("x.a.weight", (2, 4)),
        ("x.a.bias", (2,)),
        ("x.b.weight", (3, 4)),
        ("x.b.bias", (3,)),
    ]
    assert list(Fused("x.", {"a": 2}, 4).tensor_shapes().items()) == [("x.a.weight", (2, 4))]
    assert [w.kind for w in product.weights()] == ["linear", "bias"] and not product.learns
    lora = Fused("x.", {"q_proj": 2}, 4, lora=LoraConfig(target_modules=("q_proj",)))
    assert [w.kind for w in lora.weights()] == ["linear", "lora_A", "lora_B"]
    assert (lora.rank, lora.scale) == (8, 2)


def test_a_norm_that_the_model_lacks_has_no_weight():
    norm = Norm("n", 4, 0.5, there=False)
    assert norm.weight.members == {} and not norm.learns and norm.weight.kind == "norm"
    assert Norm("n", 4, 0.5).weight.members == {"n.weight": slice(0, 4)}


# ---- places ------------------------------------------------------------------------------------


def test_a_weight_holds_its_tensors_one_after_the_other():
    w = Weight("linear", {"a": 2, "b": 3, "c": 1}, 4)
    assert w.members == {"a": slice(0, 2), "b": slice(2, 5), "c": slice(5, 6)} and w.shape == (6, 4)
    assert w.tensor_shapes() == {"a": (2, 4), "b": (3, 4), "c": (1, 4)} and w.kind == "linear"
    assert not w.learns and w.data is w.value is w.grad is w.m is w.v is None
    assert Weight("bias", {"a": 2}).tensor_shapes() == {"a": (2,)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_trained_weight_has_a_master_a_gradient_and_moments(dtype):
    """The order in memory is frozen weights, masters, working copies, gradients, moments."""
    frozen, one, two = (
        Weight("linear", {"f": 16}, 16),
        Weight("norm", {"n": 32}),
        Weight("head", {"h": 16}, 8),
    )
    layout, gradients = lay_out([frozen, one, two], frozenset({"n", "h"}), dtype, [])
    size = {"float32": 4, "bfloat16": 2}[dtype]
    copies = 0 if dtype == "float32" else 2 * (32 + 128)
    assert layout.parts == {
        "frozen weights": 256 * size,
        "trained parameters, float32": 4 * 160,
        "trained parameters, working copies": copies,
        "gradients": 4 * 160,
        "moments": 2 * 4 * 160,
    }
    assert (gradients.offset, gradients.nbytes) == (256 * size + 640 + copies, 640)
    arena = _C.Tensor((layout.size,), "uint8", "cpu")
    arena.fill(0)
    for w in (frozen, one, two):
        w.bind(arena)
    assert not frozen.learns and frozen.value is frozen.grad is None and frozen.data.dtype == dtype
    assert one.learns and two.learns
    assert (one.data is one.value) is (two.data is two.value) is (dtype == "float32")
    for i, x in enumerate((one.value, two.value, one.grad, two.grad, one.m, two.m, one.v, two.v)):
        x.fill(i + 1)
        assert x.dtype == "float32"
    for i, x in enumerate((one.value, two.value, one.grad, two.grad, one.m, two.m, one.v, two.v)):
        assert (x.numpy() == i + 1).all()  # they do not overlap
    assert set(gradients.view(arena).numpy().tolist()) == {3, 4}
    p = Parameter("h", two)
    assert (p.name, p.kind, p.shape) == ("h", "head", (16, 8)) and (p.copy is None) is (dtype == "float32")
    p.publish()
    assert (np.float32(two.data.numpy()) == 2).all() and (p.grad.numpy() == 4).all()
    assert (p.m.numpy() == 6).all() and (p.v.numpy() == 8).all()


def network(lora, training=True, **fields):
    made = Network(read_config({**tiny.CONFIG, **fields}), lora)
    made.lay_out("float32", training)
    return made


@pytest.mark.parametrize(
    "targets, saved, end",
    [
        (("down_proj",), (), Reach.DOWN),
        (("gate_proj",), (), Reach.GATE_UP),
        ((), ("post_attention_layernorm",), Reach.MLP_NORM),
        (("o_proj", "down_proj"), (), Reach.O_PROJ),
        (("k_proj",), (), Reach.QKV),
        ((), ("q_norm",), Reach.QKV),
        ((), ("k_norm",), Reach.QKV),
        (("down_proj",), ("input_layernorm",), Reach.INPUT_NORM),
        (("q_proj", "k_proj", "v_proj", "o_proj"), (), Reach.QKV),
        (("q_proj", "k_proj", "v_proj", "o_proj"), ("norm",), Reach.INPUT_NORM),
        ((), ("model.norm",), None),
        ((), ("lm_head",), None),
    ],
)
def test_the_backward_ends_at_the_lowest_trained_part_of_a_layer(targets, saved, end):
    fields = dict(model_type="qwen3", tie_word_embeddings=False)
    made = network(LoraConfig(target_modules=targets, modules_to_save=saved), **fields)
    assert made.layers[1].lowest() == end
    assert (made.lowest, made.reach) == ((2, Reach.INPUT) if end is None else (0, end))


def test_the_backward_ends_at_the_embedding_if_that_is_trained():
    for lora in (None, LoraConfig()):
        assert (network(lora).lowest, network(lora).reach) == (0, Reach.INPUT)
    assert network(LoraConfig(), training=False).lowest == 2


def test_the_kind_of_each_weight():
    made = network(LoraConfig(target_modules="all-linear"), tie_word_embeddings=False, attention_bias=True)
    kinds = {name: w.kind for w in made.weights() for name in w.members}
    layer = "model.layers.1."
    assert kinds["model.embed_tokens.weight"] == "embedding" and kinds["lm_head.weight"] == "head"
    assert kinds["model.norm.weight"] == kinds[f"{layer}input_layernorm.weight"] == "norm"
    assert kinds[f"{layer}mlp.up_proj.weight"] == "linear"
    assert kinds[f"{layer}self_attn.k_proj.bias"] == "bias"
    assert kinds[f"{layer}mlp.down_proj.lora_A.weight"] == "lora_A"
    assert kinds[f"{layer}self_attn.v_proj.lora_B.weight"] == "lora_B"


def test_the_multipliers_of_granite():
    """The residual stream holds x / m for a residual multiplier m: embedding / m, eps / m^2."""
    fields = dict(
        model_type="granite",
        embedding_multiplier=6.0,
        residual_multiplier=0.5,
        attention_multiplier=0.25,
        logits_scaling=8.0,
        rms_norm_eps=1e-3,
    )
    made = network(None, **fields)
    assert (made.embedding_scale, made.logits_scale) == (12, 0.125) and made.layers[0].scale == 0.25
    for norm in (made.norm, made.layers[0].input_norm, made.layers[1].mlp_norm):
        assert norm.eps == pytest.approx(4e-3)
    plain = network(None)
    assert (plain.embedding_scale, plain.logits_scale) == (1, 1)
    assert plain.layers[0].scale == pytest.approx(8**-0.5)
    heads = Layer(read_config({**tiny.CONFIG, "model_type": "qwen3", "rms_norm_eps": 0.25}), 1)
    assert heads.q_norm.eps == heads.k_norm.eps == heads.input_norm.eps == 0.25
