"""A model draws, loads and names its weights, keeps batches for later passes, and evaluates."""

import zlib

import numpy as np
import pytest
import tiny
from tiny import tokens

from longlora import _C
from longlora.decoder import rope as rope_
from longlora.decoder.config import read_config
from longlora.decoder.lora import LoraConfig
from longlora.decoder.model import Model, _scalars
from longlora.decoder.plan import plan
from longlora.errors import UserError
from longlora.ops import BOUNDARIES, SHIFTS

CONFIG = read_config({**tiny.CONFIG, "attention_bias": True, "initializer_range": 0.2})
V, C = CONFIG.vocab_size, CONFIG.hidden_size
LORA = LoraConfig(r=4)


def trained(B=2, T=16, lora=LORA, config=CONFIG, **fields):
    """A model that can be trained. `fields` go to Model."""
    made = plan(config, batch_size=B, sequence_length=T, lora=lora, memory=1 << 40, checkpointing="none")
    return Model(config, lora=lora, plan=made, **fields).init_random()


def values(x):
    return np.array(x.numpy())


# ---- weights -----------------------------------------------------------------------------------


def philox(name, seed):
    """The random numbers of the weight `name`."""
    return np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(name.encode())]))


@pytest.mark.parametrize("shape", [(70, 4096), (2, (1 << 18) + 1), (5, 7), (64, 4096)])
def test_draw_gives_the_numbers_of_one_call_of_numpy(shape):
    """It draws large weights in pieces."""
    out = _C.Tensor(shape, "float32", "cpu")
    Model.draw("some.weight", 5, out, 0.5, normal=True)
    wanted = philox("some.weight", 5).standard_normal(shape, np.float32) * np.float32(0.5)
    np.testing.assert_array_equal(out.numpy(), wanted)
    Model.draw("some.weight", 5, out, 0.5)
    found = values(out)
    np.testing.assert_array_equal(found, philox("some.weight", 5).random(shape, np.float32) - np.float32(0.5))
    Model.draw("some.weight", 5, out, 2.0)
    np.testing.assert_array_equal(out.numpy(), found * 4)


def test_seed_and_name_decide_a_weight():
    made = Model(CONFIG, lora=LORA, seed=7).init_random()
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"):
        x = values(made.tensor(name))
        wanted = philox(name, 7).standard_normal(x.shape, np.float32) * np.float32(0.2)
        np.testing.assert_array_equal(x, wanted)
    name = "model.layers.0.mlp.up_proj.weight"
    assert (values(Model(CONFIG, seed=7).init_random(8).tensor(name)) != values(made.tensor(name))).any()
    for seed, other in ((0, Model(CONFIG)), (3, Model(CONFIG, seed=0))):
        other.init_random(seed)
        wanted = philox(name, seed).standard_normal((48, C), np.float32) * np.float32(0.2)
        np.testing.assert_array_equal(other.tensor(name).numpy(), wanted)
    a = "model.layers.1.self_attn.o_proj.lora_A.weight"  # uniform within 1 / sqrt(32 features in)
    width = np.float32(32**-0.5)
    wanted = philox(a, 7).random((4, 32), np.float32) * np.float32(2 * 32**-0.5) - width
    np.testing.assert_array_equal(made.tensor(a).numpy(), wanted)
    assert not values(made.tensor(a.replace("lora_A", "lora_B"))).any()
    for name, value in (("model.norm.weight", 1), ("model.layers.1.self_attn.q_proj.bias", 0)):
        assert (values(made.tensor(name)) == value).all()


def test_a_new_model_has_a_random_lora_a():
    """Master and working copy have it, also without init_random."""
    for dtype in ("float32", "bfloat16"):
        made = plan(CONFIG, sequence_length=4, lora=LORA, dtype=dtype, memory=1 << 40)
        made = Model(CONFIG, lora=LORA, plan=made, dtype=dtype)
        product = made.network.layers[0].o
        master = values(made.tensor("model.layers.0.self_attn.o_proj.lora_A.weight"))
        assert master.any() and np.abs(master).max() <= 32**-0.5
        copy = _C.Tensor((4, 32), "float32", "cpu")
        _C.cast(copy, product.a.data)
        np.testing.assert_allclose(copy.numpy(), master, rtol=2.0**-8)


def test_names_of_all_tensors_and_of_trained_ones():
    made, plain = trained(), Model(CONFIG, lora=LORA)
    lora = set(LORA.tensor_shapes(CONFIG))
    assert set(made.names()) == set(plain.names()) == set(CONFIG.tensor_shapes()) | lora
    assert set(made.tensors()) == {p.name for p in made.parameters} == lora
    assert made.kinds == ["lora_A", "lora_B", "embedding", "norm"] and plain.kinds == []
    assert trained(lora=None).kinds == ["embedding", "norm", "linear", "bias"]
    assert plain.tensors() == {} and len(made.names()) == len(set(made.names()))
    for name, x in made.tensors().items():
        assert x.shape == made.tensor(name).shape == LORA.tensor_shapes(CONFIG)[name]
        assert x.dtype == "float32"


def test_tensor_gives_the_master_of_a_trained_weight_and_refresh_copies_it():
    made = plan(CONFIG, sequence_length=4, lora=LORA, dtype="bfloat16", memory=1 << 40)
    made = Model(CONFIG, lora=LORA, plan=made, dtype="bfloat16").init_random()
    assert made.tensor("model.norm.weight").dtype == "float32"
    assert made.tensor("model.layers.0.mlp.up_proj.weight").dtype == "bfloat16"
    assert made.network.norm.weight.data.dtype == "bfloat16"
    made.tensor("model.norm.weight").fill(3)
    assert (values(made.network.norm.weight.data).astype(np.float32) == 1).all()
    made.refresh()
    assert (values(made.network.norm.weight.data).astype(np.float32) == 3).all()


class Source:
    """A model file, as files.open_model gives it. Every number of a weight is the length of its name.

    without: names that the file lacks. more: names that only the file has.
    """

    path = "some/model"

    def __init__(self, config, without=(), more=()):
        self.shapes = config.tensor_shapes()
        self.listed = [name for name in self.shapes if name not in without] + list(more)

    def names(self):
        return self.listed

    def read(self, name, out):
        out.copy_(np.full(self.shapes[name], len(name), np.float32))


def test_load_reads_every_weight_and_refuses_a_file_with_other_names():
    made = trained(lora=None)
    assert made.load(Source(CONFIG)) is made
    for name in CONFIG.tensor_shapes():
        assert (values(made.tensor(name)) == len(name)).all()
    q = "model.layers.0.self_attn.q_proj.weight"
    for source, odd in (
        (Source(CONFIG, without=[q]), q),
        (Source(CONFIG, more=["zzz.weight"]), "zzz.weight"),
        (Source(CONFIG, without=[q], more=["a.weight"]), "a.weight"),
    ):
        with pytest.raises(UserError, match=f"^some/model: does not fit the model's config: {odd}$"):
            made.load(source)


def test_loading_also_writes_the_working_copies():
    for load in (
        lambda made: made.load(Source(CONFIG)),
        lambda made: made.load_adapter({"model.norm.weight": np.full(C, 17, np.float32)}),
    ):
        made = plan(CONFIG, sequence_length=4, lora=LORA, dtype="bfloat16", memory=1 << 40)
        made = Model(CONFIG, lora=LORA, plan=made, dtype="bfloat16")
        assert load(made) is made
        assert (values(made.network.norm.weight.data).astype(np.float32) == 17).all()


def test_an_adapter_of_another_rank_or_scale_is_refused():
    made = Model(CONFIG, lora=LORA)
    for other, words in (
        (LoraConfig(r=8, lora_alpha=32), "r and scale should be 4 and 4, got 8 and 4"),
        (LoraConfig(r=4, lora_alpha=8), "r and scale should be 4 and 4, got 4 and 2"),
    ):
        with pytest.raises(UserError, match=f"^adapter: {words}$"):
            made.load_adapter({}, other)
    assert made.load_adapter({}, LORA) is made and made.load_adapter({}) is made
    plain = Model(CONFIG)  # a model without LoRA takes whole weights, whatever the LoraConfig
    assert plain.load_adapter({"model.norm.weight": np.ones(C, np.float32)}, LORA) is plain


def test_an_adapter_with_a_wrong_tensor_changes_nothing():
    made = Model(CONFIG).init_random()
    for wrong, words in (
        (
            {"model.layers.0.self_attn.k_proj.bias": np.ones(3)},
            r"k_proj.bias should have shape \[16\], got \[3\]",
        ),
        ({"model.layers.9.x": np.ones(3)}, "the model has no model.layers.9.x"),
    ):
        with pytest.raises(UserError, match=f"^adapter: .*{words}"):
            made.load_adapter({"model.norm.weight": np.full(C, 5, np.float32), **wrong})
        assert (values(made.tensor("model.norm.weight")) == 1).all()


# ---- batches -----------------------------------------------------------------------------------


def test_the_rope_of_a_model_is_the_given_one_or_that_of_its_config():
    plain = Model(CONFIG)
    assert (plain.dtype, plain.seed, plain.device) == ("float32", 0, "cpu") and plain.rope == CONFIG.rope
    assert plain.plan is plain.lora is None
    longer = rope_.extend(CONFIG, "linear", 256)[0]
    other = Model(CONFIG, rope=longer).init_random()
    assert other.rope == longer
    ids = tokens(9)
    extended = read_config(rope_.to_config(CONFIG.raw, longer, 256))
    np.testing.assert_array_equal(other.logits(ids), Model(extended).init_random().logits(ids))
    assert np.abs(other.logits(ids) - plain.init_random().logits(ids)).max() > 1e-3


def test_attention_has_split_boundaries_and_shifts_half_of_the_heads_by_default():
    """As in LongLoRA's code. Every other choice changes the loss; boundaries matter only with a shift."""
    ids = tokens(2, 16)

    def loss(**attention):
        return trained(attention={"group_size": 8, **attention}).train_microbatch(ids, ids, 0.01)

    losses = {(b, s): loss(boundary=b, shift=s) for b in BOUNDARIES for s in SHIFTS}
    assert _scalars({"group_size": 8}) == (8, BOUNDARIES["split"], SHIFTS["half"])
    assert loss() == losses["split", "half"] == loss(shift="half") == loss(boundary="split")
    assert len({losses[b, "none"] for b in BOUNDARIES}) == 1
    assert len(set(losses.values())) == len(BOUNDARIES) * (len(SHIFTS) - 1) + 1
    assert loss(group_size=4) not in losses.values()


def test_at_most_eight_batches_are_kept_for_training():
    made = trained(1, 10)
    first = made._batch(1, 10)
    assert (first.B, first.T) == (1, 10) and made._batch(1, 10) is first
    for T in range(1, 8):
        made._batch(1, T)
    assert len(made._batches) == 8 and made._batch(1, 10) is first
    made._batch(1, 9)
    assert list(made._batches) == [(1, 9)]
    with pytest.raises(UserError, match="^a batch of 1 x 11 tokens is larger than the planned 1 x 10$"):
        made._batch(1, 11)


def test_the_last_evaluation_batch_is_kept_and_lies_in_the_memory_of_training():
    made = trained(2, 16)
    one = made._evaluation_batch(1, 8)
    assert made._evaluation_batch(1, 8) is one and one.recompute is None
    other = made._evaluation_batch(1, 9)
    assert other is not one and made._evaluation_batch(1, 9) is other and (other.B, other.T) == (1, 9)
    assert made._evaluation_batch(2, 9).B == 2
    base = made.arena.numpy().ctypes.data

    def inside(batch):
        place = batch.ids.numpy().ctypes.data - base
        return made._activations <= place < made.arena.shape[0]

    assert inside(one) and inside(other) and not inside(made._evaluation_batch(8, 64))
    assert Model(CONFIG)._evaluation_batch(1, 4).T == 4


def test_rope_tables_are_as_long_as_the_plan_or_longer_if_needed():
    made = trained(1, 10)
    tables = made._rope_tables(4)
    assert [x.shape for x in tables] == [(10, 4)] * 2  # as long as the plan's sequences
    assert made._rope_tables(10) is tables
    longer = made._rope_tables(11)
    assert longer[0].shape == (11, 4) and made._rope_tables(3) is longer
    plain = Model(CONFIG)
    assert plain._rope_tables(5)[0].shape == (5, 4)
    angle = np.arange(5)[:, None] * 1000.0 ** (-np.arange(4) / 4)
    np.testing.assert_allclose(plain._rope_tables(5)[0], np.cos(angle), atol=1e-7)
    np.testing.assert_allclose(plain._rope_tables(5)[1], np.sin(angle), atol=1e-7)
    other = Model(CONFIG).init_random()
    other.logits(tokens(3), positions=np.array([6, 0, 1]))
    assert other._tables[0].shape == (7, 4)  # positions up to 6


# ---- passes ------------------------------------------------------------------------------------


def test_a_training_pass_returns_the_sum_of_the_losses_and_adds_gradients():
    made, ids = trained(), tokens(2, 16)
    targets = np.roll(ids, -1, 1)
    targets[0, 3:9] = -100
    total = made.train_microbatch(ids, targets, 0.01)
    assert type(total) is float and total == pytest.approx(made.losses(ids, targets).sum(), rel=1e-5)
    made.train_microbatch(ids, targets, 0.01)
    each = np.float64(made._batch(2, 16).losses.numpy())
    assert total == each.sum()  # added in float64
    assert made.losses(ids, targets)[0, 3] == 0 and made.losses(ids[0], targets[0]).shape == (16,)
    made.zero_grad()
    made.train_microbatch(ids, targets, 0.01)
    gradients = [values(p.grad) for p in made.parameters]
    made.zero_grad()
    assert all(not values(p.grad).any() for p in made.parameters)
    assert made.train_microbatch(ids, targets, 0.01, read=False) is None
    for p, gradient in zip(made.parameters, gradients, strict=True):
        np.testing.assert_array_equal(p.grad.numpy(), gradient)
    made.train_microbatch(ids, targets, 0.01)  # adds the same gradients
    for p, gradient in zip(made.parameters, gradients, strict=True):
        np.testing.assert_allclose(p.grad.numpy(), 2 * gradient, rtol=1e-4, atol=1e-6)


def test_a_batch_without_targets_has_no_loss_and_no_gradient():
    made, ids = trained(), tokens(2, 16)
    made.zero_grad()
    assert made.train_microbatch(ids, np.full((2, 16), -100), 0.01) == 0
    assert all(not values(p.grad).any() for p in made.parameters)


def test_losses_follow_from_the_logits():
    made, ids = Model(CONFIG).init_random(), tokens(3, 7)
    targets = tokens(3, 7, seed=1)
    targets[1, 2] = -100
    x = np.float64(made.logits(ids))
    logs = x - np.log(np.exp(x).sum(-1, keepdims=True))
    wanted = -np.take_along_axis(logs, np.maximum(targets, 0)[..., None], -1)[..., 0] * (targets != -100)
    found = made.losses(ids.astype(np.int64), targets.astype(np.int64))
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert found.dtype == np.float32 and x.shape == (3, 7, V)
    np.testing.assert_allclose(made.logits(ids[2]), x[2], atol=1e-5)


def test_positions_count_within_each_row_by_default():
    made, ids = Model(CONFIG).init_random(), tokens(2, 6)
    plain, own = made.logits(ids), np.tile(np.arange(6), (2, 1))
    np.testing.assert_allclose(made.logits(ids, positions=own), plain, atol=1e-5)
    np.testing.assert_allclose(made.logits(ids, positions=own + 90), plain, atol=1e-3)  # rope is relative
    assert np.abs(made.logits(ids, positions=2 * own) - plain).max() > 1e-3
    for wrong in (own[:1], own - 1, own[:, :5], np.append(own, 3)):
        with pytest.raises(ValueError, match="positions should be integers from 0, one for each id"):
            made.logits(ids, positions=wrong)


def test_packed_documents_do_not_see_each_other():
    made, ids = Model(CONFIG).init_random(), tokens(2, 8)
    found = made.logits(ids, cu_seqlens=[0, 5, 5, 6, 16]).reshape(16, V)
    for start, stop in ((0, 5), (5, 6), (6, 16)):
        alone = made.logits(ids.reshape(-1)[start:stop])
        np.testing.assert_allclose(found[start:stop], alone, atol=1e-4)
    positions = made._forward(ids, None, [0, 5, 5, 6, 16]).positions
    assert values(positions).tolist() == [[*range(5), 0, *range(10)]]
    # rope is relative, so positions that do not restart give the same logits
    shifted = made.logits(ids, cu_seqlens=[0, 5, 6, 16], positions=np.arange(16))
    np.testing.assert_allclose(shifted.reshape(16, V), found, atol=1e-3)
    for wrong in ([0, 5, 15], [1, 16], [0, 9, 8, 16], [], [[0, 16]], [0, 17], [16], [0], 16):
        with pytest.raises(ValueError, match="cu_seqlens should rise from 0 to 16, got"):
            made.logits(ids, cu_seqlens=wrong)


def test_no_tokens_have_no_logits():
    made = Model(CONFIG).init_random()
    none = np.zeros((0,), np.int32)
    assert made.logits(none).shape == (0, V) and made.losses(none, none).shape == (0,)
    assert made.logits(none, positions=none).shape == (0, V)
