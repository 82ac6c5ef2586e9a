"""The decoder has the loss and gradients of transformers and autograd, in single passes and in whole runs."""

import numpy as np
import pytest
from peers import (
    CONFIGS,
    LORAS,
    S2,
    build,
    close,
    gradients,
    lora_of,
    peer,
    peer_losses,
    registered,
    tokens,
    weights,
)

from longlora import _C, set_num_threads
from longlora.decoder import layer as layer_
from longlora.decoder import model as model_
from longlora.decoder import plan as plan_
from longlora.decoder.config import read_config
from longlora.decoder.families import FAMILIES
from longlora.decoder.layer import Reach
from longlora.decoder.lora import LoraConfig
from longlora.errors import UserError
from longlora.training.optimizer import AdamW

# A second thread only slows such small models.
pytestmark = pytest.mark.usefixtures("one_thread")


ATTENTION = ("q", "k", "v", "o", "qkv")


def linears(name, *names):
    """Names of LoRA's tensors in both layers."""
    if name == "phi3":
        fused = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}
        names = [fused.get(n, n) for n in names]
    return {
        f"model.layers.{i}.{'self_attn' if n in ATTENTION else 'mlp'}.{n}_proj.lora_{x}.weight"
        for i in range(2)
        for n in names
        for x in "AB"
    }


def norms(name):
    inner = [f"self_attn.{n}_norm" for n in "qk"] if name == "qwen3" else []
    return {"model.norm.weight"} | {
        f"model.layers.{i}.{n}.weight"
        for i in range(2)
        for n in ("input_layernorm", "post_attention_layernorm", *inner)
    }


def head(name):
    return set() if CONFIGS[name]["tie_word_embeddings"] else {"lm_head.weight"}


def whole(name):
    """Every parameter of transformers' model. A tied head is the embedding."""
    _, transformers = registered()
    module = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**CONFIGS[name]))
    return set(dict(module.named_parameters()))


EMBEDDING = {"model.embed_tokens.weight"}
# The names that train, for each key of LORAS.
TRAINED = {
    "full": whole,
    "paper": lambda name: EMBEDDING | norms(name) | linears(name, "q", "k", "v", "o"),
    "all": lambda name: (
        EMBEDDING | norms(name) | head(name) | linears(name, "q", "k", "v", "o", "gate", "up", "down")
    ),
    "few": lambda name: linears(name, *([] if name == "phi3" else ["v"]), "up"),
}


OTHER = {
    "dense": None,
    "all shifted": dict(group_size=37, shift="all"),
    "one group": dict(group_size=200, shift="half"),
}
CASES = [(name, lora, S2) for name in CONFIGS for lora in LORAS]
CASES += [(name, lora, a) for name, lora in (("llama", "paper"), ("qwen3", "full")) for a in OTHER.values()]


def test_every_family_is_here():
    assert {config["model_type"] for config in CONFIGS.values()} == set(FAMILIES)


@pytest.mark.parametrize("name,lora,attention", CASES)
def test_gradients_equal_those_of_autograd(name, lora, attention):
    made = build(name, lora_of(name, lora), attention=attention)
    module, named = peer(made, name, lora_of(name, lora), attention)
    ids, targets = tokens(2, 37)
    loss, found = gradients(made, ids, targets)
    total, _ = peer_losses(module, ids, targets)
    (total * 0.01).backward()
    assert set(found) == TRAINED[lora](name)
    close(loss, total.item(), 1e-6)
    for n, parameter in named.items():
        close(found[n], parameter.grad.numpy(), 2e-5, n)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", LORAS)
@pytest.mark.parametrize("name", CONFIGS)
def test_checkpointing_changes_no_bit(name, lora, dtype, monkeypatch):
    monkeypatch.setattr(layer_, "TILE", 32)  # several tiles, the last one short
    ids, targets = tokens(2, 37)
    kept = [
        gradients(build(name, lora_of(name, lora), dtype=dtype, checkpointing=c), ids, targets)
        for c in layer_.RECOMPUTE
    ]
    for loss, found in kept[1:]:
        assert loss == kept[0][0]
        for n, gradient in kept[0][1].items():
            np.testing.assert_array_equal(found[n], gradient, n)


@pytest.mark.parametrize("lora", ["full", "paper"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_tiles_change_only_rounding(name, lora, monkeypatch):
    ids, targets = tokens(2, 37)
    _, whole = gradients(build(name, lora_of(name, lora)), ids, targets)
    monkeypatch.setattr(layer_, "TILE", 7)
    _, tiled = gradients(build(name, lora_of(name, lora)), ids, targets)
    for n, gradient in whole.items():
        close(tiled[n], gradient, 1e-5, n)


@pytest.mark.parametrize("lora", ["full", "paper"])
@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16_is_near_float32(name, lora):
    """A gradient has the error of about a hundred roundings to bfloat16, each by half a unit,
    2^-9, in either direction: sqrt(100) 2^-9 = 0.02. A single draw may be five times as far off where a
    sum cancels, so the test takes the median of twelve.
    """
    errors, losses = {}, []
    for seed in range(12):
        ids, targets = tokens(2, 37, seed=seed)
        wide = build(name, lora_of(name, lora), seed=seed)
        narrow = build(name, lora_of(name, lora), dtype="bfloat16", seed=seed)
        narrow.load_adapter(weights(wide))
        loss, exact = gradients(wide, ids, targets)
        rounded_loss, rounded = gradients(narrow, ids, targets)
        losses.append(abs(rounded_loss / loss - 1))
        for n, gradient in exact.items():
            errors.setdefault(n, []).append(
                np.linalg.norm(np.float64(rounded[n]) - gradient) / np.linalg.norm(gradient)
            )
    assert np.median(losses) <= 2.0**-9
    assert np.median(list(errors.values())) <= 0.03
    for n, draws in errors.items():
        assert np.median(draws) <= 0.05, n


def test_gradients_of_micro_batches_add_up():
    """Four micro-batches of one sequence give the gradients of one micro-batch of four."""
    ids, targets = tokens(4, 37)
    made = build("llama", LORAS["paper"], B=4)
    loss, whole = gradients(made, ids, targets)
    made.zero_grad()
    parts = sum(made.train_microbatch(ids[i : i + 1], targets[i : i + 1], 0.01) for i in range(4))
    assert abs(parts - loss) <= 1e-6 * loss
    for p in made.parameters:
        close(p.grad.numpy(), whole[p.name], 1e-5, p.name)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_any_number_of_threads_gives_equal_bits(name):
    ids, targets = tokens(2, 37)
    found, grain = [], _C.get_grain()
    _C.set_grain(0)  # all threads take part
    for threads in (1, 2, 3):
        set_num_threads(threads)
        found.append(gradients(build(name, LORAS["paper"]), ids, targets))
    _C.set_grain(grain)
    for loss, other in found[1:]:
        assert loss == found[0][0]
        for n, gradient in found[0][1].items():
            np.testing.assert_array_equal(other[n], gradient, n)


def rates(made, rate=3e-3):
    return dict.fromkeys(made.kinds, rate)


@pytest.mark.parametrize("name,lora", [("llama", "paper"), ("qwen2", "full"), ("qwen3", "all")])
def test_ten_losses_equal_those_of_torch(name, lora):
    """Ten steps check what a single gradient does not: AdamW, clipping, the working copies."""
    torch, _ = registered()
    made = build(name, lora_of(name, lora))
    module, named = peer(made, name, lora_of(name, lora), S2)
    decayed = [p for n, p in named.items() if "norm" not in n and "bias" not in n]
    plain = [p for n, p in named.items() if "norm" in n or "bias" in n]
    torch_optimizer = torch.optim.AdamW(
        [dict(params=decayed, weight_decay=0.1), dict(params=plain, weight_decay=0.0)], lr=3e-3
    )
    ours = AdamW(made.parameters, weight_decay=0.1, max_grad_norm=0.5)
    for step in range(10):
        ids, targets = tokens(2, 37, seed=step % 3)
        count = int((targets != -100).sum())
        made.zero_grad()
        loss = made.train_microbatch(ids, targets, 1 / count) / count
        norm = ours.step(rates(made))
        torch_optimizer.zero_grad()
        total, _ = peer_losses(module, ids, targets)
        (total / count).backward()
        torch_norm = float(torch.nn.utils.clip_grad_norm_(list(named.values()), 0.5))
        torch_optimizer.step()
        close(loss, total.item() / count, 3e-5, f"loss of step {step}")
        close(norm, torch_norm, 1e-3, f"norm of step {step}")
    assert norm > 0.5  # otherwise nothing was clipped


def run(made, optimizer, steps):
    out = []
    for step in steps:
        ids, targets = tokens(2, 37, seed=step)
        made.zero_grad()
        out.append((made.train_microbatch(ids, targets, 0.01), optimizer.step(rates(made))))
    return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", LORAS)
def test_resume_gives_the_same_bits(lora, dtype):
    made = build("qwen3", LORAS[lora], dtype=dtype)
    optimizer = AdamW(made.parameters, weight_decay=0.01, max_grad_norm=1.0)
    run(made, optimizer, range(3))
    kept = {n: np.array(x) for n, x in optimizer.state_dict().items()}
    went_on = run(made, optimizer, range(3, 6))
    again = build("qwen3", LORAS[lora], dtype=dtype)  # the seed decides the frozen weights
    other = AdamW(again.parameters, weight_decay=0.01, max_grad_norm=1.0)
    other.load_state_dict(kept, 3)
    assert run(again, other, range(3, 6)) == went_on
    for p, q in zip(made.parameters, again.parameters, strict=True):
        np.testing.assert_array_equal(p.value.numpy(), q.value.numpy(), p.name)


@pytest.mark.parametrize("name", CONFIGS)
def test_evaluation_equals_transformers(name):
    made = build(name, LORAS["all"], T=16)  # evaluation is longer and needs its own buffers
    module, _ = peer(made, name, LORAS["all"], None)
    ids, targets = tokens(1, 61)
    total, logits = peer_losses(module, ids, targets)
    close(made.logits(ids[0]), logits.detach().numpy(), 1e-5)
    losses = made.losses(ids[0], targets[0])
    close(losses.sum(dtype=np.float64), total.item(), 1e-6)
    assert (losses[targets[0] == -100] == 0).all() and (losses[targets[0] != -100] > 0).all()
    short = made.losses(ids[0, :7], targets[0, :7])  # this fits in the buffers of training
    np.testing.assert_allclose(
        short, losses[:7], rtol=1e-5, atol=1e-6
    )  # attention is causal: later tokens change nothing


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("lora", ["paper", "all", "few"])
def test_a_model_without_a_plan_only_evaluates(lora, dtype):
    """It has no masters, gradients or moments, and gives the losses of the trained one."""
    trained = build("qwen2", LORAS[lora], dtype="float32" if dtype == "float16" else dtype)
    made = model_.Model(trained.config, dtype=dtype, lora=LORAS[lora]).load_adapter(weights(trained))
    ids, targets = tokens(1, 50)
    close(
        made.losses(ids[0], targets[0]), trained.losses(ids[0], targets[0]), 1e-2 if dtype == "float16" else 0
    )
    assert not made.parameters and made.arena.nbytes < trained.arena.nbytes
    with pytest.raises(UserError, match="made without a plan, so it can only evaluate"):
        made.train_microbatch(ids, targets, 1.0)


def test_training_and_evaluation_do_not_change_each_other():
    """Evaluation borrows the memory of the training pass. Neither may leave a trace in the other."""
    made = build("llama", LORAS["paper"])
    ids, targets = tokens(2, 37)
    before, first = made.losses(ids[0], targets[0]), gradients(made, ids, targets)
    np.testing.assert_array_equal(made.losses(ids[0], targets[0]), before)
    again = gradients(made, ids, targets)
    assert again[0] == first[0]
    for n, gradient in first[1].items():
        np.testing.assert_array_equal(again[1][n], gradient, n)


def test_shorter_batches_use_the_same_memory_and_longer_ones_are_refused():
    made = build("llama", LORAS["paper"], B=2, T=37)
    for B, T in ((1, 1), (1, 5), (2, 20), (1, 74)):
        ids, targets = tokens(B, T)
        targets[0, 0] = 1
        loss, found = gradients(made, ids, targets)
        exact = build("llama", LORAS["paper"], B=B, T=T)
        assert (loss, *map(np.ndarray.tobytes, found.values())) == (
            (w := gradients(exact, ids, targets))[0],
            *map(np.ndarray.tobytes, w[1].values()),
        )
    with pytest.raises(UserError, match="2 x 38 tokens is larger than the planned 2 x 37"):
        made.train_microbatch(*tokens(2, 38), 1.0)


def test_random_weights_follow_the_rules_of_transformers_and_peft():
    """Weights are normal(0, initializer_range), LoRA A lies within 1/sqrt(C), B is zero. Seed and name decide
    all of them."""
    config = read_config(CONFIGS["qwen2"])
    made = model_.Model(config, lora=LORAS["paper"], seed=5).init_random()
    again, other = (
        weights(model_.Model(config, lora=LORAS["paper"], seed=seed).init_random()) for seed in (5, 6)
    )
    for name, x in weights(made).items():
        np.testing.assert_array_equal(again[name], x)
        if name.endswith("lora_A.weight"):
            assert (
                np.abs(x).max() <= x.shape[1] ** -0.5
                and np.abs(x).max() > 0.9 * x.shape[1] ** -0.5
                and abs(x.mean()) < 0.02
            )
        elif name.endswith(("lora_B.weight", "bias")):
            assert not x.any()
        elif "norm" in name:
            assert (x == 1).all()
        else:
            assert abs(x.std() / 0.15 - 1) < 0.05 and abs(x.mean()) < 0.01
        if x.any() and "norm" not in name:
            assert not np.array_equal(other[name], x)


def test_a_step_reads_no_activation_before_it_writes_it():
    """The test fills the arena's activations with NaN before the second pass. Its gradients stay the same."""
    made = build("qwen3", LORAS["all"], checkpointing="minimal")
    ids, targets = tokens(2, 37)
    _, clean = gradients(made, ids, targets)
    made.arena[made._activations :].fill(255)  # bytes of NaN in every float dtype
    _, found = gradients(made, ids, targets)
    for n, gradient in clean.items():
        np.testing.assert_array_equal(found[n], gradient, n)


def test_errors_say_what_is_wrong():
    config = read_config(CONFIGS["llama"])
    with pytest.raises(UserError, match="dtype should be one of float32, bfloat16, float16, got 'int8'"):
        model_.Model(config, dtype="int8")
    plan = plan_.plan(config, sequence_length=8, lora=LORAS["paper"])
    with pytest.raises(UserError, match="float16 cannot be trained without loss scaling"):
        model_.Model(config, dtype="float16", plan=plan)
    made = build("llama", LORAS["paper"])
    ids, targets = tokens(2, 37)
    for borders in ([0, 5, 73], [1, 74], [0, 50, 40, 74], [], [[0, 74]]):
        with pytest.raises(ValueError, match="cu_seqlens should rise from 0 to 74"):
            made.train_microbatch(ids, targets, 1.0, cu_seqlens=borders)
        with pytest.raises(ValueError, match="cu_seqlens should rise from 0 to 74"):
            made.losses(ids, targets, cu_seqlens=borders)
    for positions in (np.zeros((2, 36)), np.full((2, 37), -1)):
        with pytest.raises(ValueError, match="positions should be integers from 0"):
            made.logits(ids, positions=positions)
    made.load_adapter({"model.norm.weight": np.full(48, np.nan, np.float32)})
    with pytest.raises(UserError, match="the loss is not finite"):
        made.train_microbatch(*tokens(2, 37), 1.0)
    optimizer = AdamW(made.parameters)
    made.parameters[0].grad.fill(float("inf"))
    before = made.parameters[1].value.numpy().copy()
    with pytest.raises(UserError, match="the gradient is not finite"):
        optimizer.step(rates(made))
    np.testing.assert_array_equal(made.parameters[1].value.numpy(), before)
    with pytest.raises(ValueError, match="no rate for lora_A"):
        optimizer.step({k: 1.0 for k in made.kinds if k != "lora_A"})
    with pytest.raises(UserError, match="belongs to other parameters"):
        optimizer.load_state_dict({}, 1)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize(
    "targets, last",
    [
        (("down_proj",), Reach.DOWN),
        (("up_proj", "down_proj"), Reach.GATE_UP),
        (("o_proj",), Reach.O_PROJ),
        (("v_proj",), Reach.QKV),
    ],
)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_the_backward_ends_where_nothing_below_learns(name, targets, last, checkpointing):
    """The gradients have the bits of a backward down to the embedding. The lowest layer calls fewer ops."""
    made = build(
        name, LoraConfig(r=2, target_modules=targets, modules_to_save=()), checkpointing=checkpointing
    )
    network = made.network
    assert (network.lowest, network.reach) == (0, last)
    ids, targets = tokens(2, 37)
    counts, found = [], []
    for reach in (last, Reach.INPUT):
        network.reach = reach
        before = sum(_C.calls().values())
        found.append(gradients(made, ids, targets))
        counts.append(sum(_C.calls().values()) - before)
    assert found[0][0] == found[1][0] and counts[0] < counts[1]
    for n, gradient in found[1][1].items():
        np.testing.assert_array_equal(found[0][1][n], gradient, n)


def test_a_step_computes_nothing_twice_that_it_keeps():
    """The test counts how often each op runs in a step."""
    before = dict(_C.calls())
    gradients(build("llama", LORAS["paper"], checkpointing="none"), *tokens(2, 37))
    none = {n: c - before[n] for n, c in _C.calls().items()}
    before = dict(_C.calls())
    gradients(build("llama", LORAS["paper"], checkpointing="minimal"), *tokens(2, 37))
    minimal = {n: c - before[n] for n, c in _C.calls().items()}
    assert none["s2_attention_forward"] == minimal["s2_attention_forward"] == 2
    assert none["lora_linear_forward"] == 2 * 4 and minimal["lora_linear_forward"] == 2 * (4 + 3)
    assert none["linear_cross_entropy_forward"] == 0 and none["linear_cross_entropy_backward"] == 1
