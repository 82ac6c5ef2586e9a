"""A real model, SmolLM2-135M, from file to adapter.

Perplexity and logits equal transformers', every gradient equals autograd's. Then the model is extended by 4:
S2-Attn lowers the perplexity of the interpolated model, and PEFT finds the same logits. Six training
steps lower that perplexity by a fifth. With LONGLORA_WHOLE=1 there are 18 longer steps, which halve it and
take two minutes.
"""

import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import reference
from smollm2 import converted, smollm2  # noqa: F401 (fixtures)

import longlora
from longlora.decoder import plan, rope
from longlora.decoder.config import read_config
from longlora.decoder.lora import LoraConfig
from longlora.decoder.model import Model
from longlora.evaluation import ppl
from longlora.files import adapter, merge
from longlora.files.open_model import open_model
from longlora.training import driver

torch = pytest.importorskip("torch", reason="transformers on torch is the peer compared with")
transformers = pytest.importorskip("transformers", reason="the peer compared with")
TEXT = Path(longlora.__file__).parent / "assets"
HELD_OUT = TEXT / "held_out" / "kjv-44-acts.txt"
LENGTH, STEPS, FACTOR = (1024, 18, 0.5) if os.environ.get("LONGLORA_WHOLE") else (512, 6, 0.85)


@pytest.fixture(scope="module")
def base(smollm2):  # noqa: F811
    return open_model(smollm2)


@pytest.fixture(scope="module")
def peer(converted):  # noqa: F811
    return transformers.AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32)


@pytest.fixture(scope="module")
def acts(base):
    return base.tokenizer().encode(HELD_OUT.read_text())[:1024]


def test_logits_and_perplexity_equal_those_of_transformers(base, peer, acts):
    model = Model(base.config).load(base)
    with torch.no_grad():
        theirs = peer(torch.from_numpy(acts[None]).long()).logits[0]
    short = model.logits(acts[:256])
    assert np.abs(short - theirs[:256].numpy()).max() <= 1e-3 * np.abs(short).max()
    want = (
        torch.nn.functional.cross_entropy(theirs[:-1].double(), torch.from_numpy(acts[1:]).long())
        .exp()
        .item()
    )
    tokens, loss = ppl.score(model, acts, 1024)
    assert tokens == len(acts) - 1
    assert abs(math.exp(loss / tokens) / want - 1) < 1e-3


def autograd(converted, config, lora, trained, T, G, dtype):  # noqa: F811
    """transformers' model with LoRA by hooks and S2-Attn by mask, in `dtype` -> f(values by name, ids) ->
    loss, gradients by name."""

    def s2_by_mask(module, q, k, v, attention_mask, scaling, dropout=0.0, **unused):
        mask = torch.from_numpy(reference.attention_mask(T, q.shape[1], G))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        p = (q @ k.transpose(2, 3) * scaling).masked_fill(~mask, -torch.inf).softmax(-1)
        return (p @ v).transpose(1, 2).contiguous(), None

    transformers.AttentionInterface.register("s2_of_this_test", s2_by_mask)
    made = transformers.AutoModelForCausalLM.from_pretrained(
        converted,
        config=transformers.LlamaConfig(**config.raw),
        dtype=dtype,
        attn_implementation="s2_of_this_test",
    ).requires_grad_(False)
    named = dict(made.named_parameters())
    for name, shape in lora.tensor_shapes(config).items():
        named.setdefault(name, torch.zeros(shape, dtype=dtype))
        if name.endswith("lora_A.weight"):
            path = name.removesuffix(".lora_A.weight")
            made.get_submodule(path).register_forward_hook(
                lambda _, x, out, path=path: (
                    out
                    + lora.scale
                    * (x[0] @ named[f"{path}.lora_A.weight"].T @ named[f"{path}.lora_B.weight"].T)
                )
            )
    for name in trained:
        named[name].requires_grad_(True)

    def gradients(given, ids):
        for name in trained:
            named[name].grad = None
        for name, array in given.items():
            named[name].data = torch.from_numpy(array).to(dtype)
        logits = made(torch.from_numpy(ids[None]).long(), use_cache=False).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[:-1], torch.from_numpy(ids[1:]).long())
        loss.backward()
        return loss.item(), {name: named[name].grad.double().numpy() for name in trained}

    return gradients


def errors_of_steps(base, converted, acts, layers, steps, dtype):  # noqa: F811
    """LoRA on q, k, v, o (B off zero), embedding and norms, S2-Attn, interpolated, the first `layers` layers,
    against torch in `dtype` -> relative errors of the losses [steps] and of the gradients, name ->
    [steps]."""
    T, G = 75, 20
    raw = {**base.config.raw, "num_hidden_layers": layers}
    new, _ = rope.extend(read_config(raw), "linear", 32768)
    config = read_config(rope.to_config(raw, new, 32768))
    lora = LoraConfig()
    made = Model(
        config,
        lora=lora,
        attention={"group_size": G},
        plan=plan.plan(config, sequence_length=T, group_size=G, lora=lora),
    )
    made.load_adapter({name: base.read(name) for name in config.tensor_shapes()})
    peer = autograd(converted, config, lora, [p.name for p in made.parameters], T, G, dtype)
    losses, errors = [], {}
    for step in range(steps):
        random = np.random.default_rng(step)
        given = {
            name: (random.standard_normal(shape) * 0.02).astype(np.float32)
            for name, shape in lora.tensor_shapes(config).items()
            if "lora_" in name
        }
        made.load_adapter(given)
        ids = acts[step * T :][:T]
        targets = np.append(ids[1:], np.int32(-100)).astype(np.int32)
        made.zero_grad()
        loss = made.train_microbatch(ids[None], targets[None], loss_scale=1 / (T - 1)) / (T - 1)
        want_loss, want = peer(given, ids)
        losses.append(abs(loss / want_loss - 1))
        for p in made.parameters:
            error = np.linalg.norm(p.grad.numpy() - want[p.name]) / np.linalg.norm(want[p.name])
            errors.setdefault(p.name, []).append(error)
    return losses, errors


def test_every_gradient_equals_autograds(base, converted, acts):  # noqa: F811
    """The first three layers are compared with float64.

    The error of a float32 sum of n products is about sqrt(n) u, where u = 2^-24: here 24 to 39 u. A step
    chains about thirty such sums, forward and backward: 39 sqrt(30) = 214 u, so the limit is 256 u. The test
    takes the median of five steps, because one step may be ill-conditioned. The loss is a mean, so its error
    is far smaller.

    Deeper layers of this model enlarge some roundings tenfold. The next test has all layers and a wide limit.
    """
    losses, errors = errors_of_steps(base, converted, acts, 3, 5, torch.float64)
    medians = {name: np.median(steps) * 2**24 for name, steps in errors.items()}
    middle, most = np.median(list(medians.values())), max(medians.values())
    print(f"loss {np.median(losses) * 2**24:.1f} u, gradients {middle:.0f} u, up to {most:.0f} u")
    assert len(errors) == 1 + 3 * (8 + 2) + 1
    assert np.median(losses) <= 2.0**-24 * 8
    assert middle <= 128
    assert most <= 256, max(medians, key=medians.get)


def test_every_gradient_of_the_whole_model_is_near_autograds(base, converted, acts):  # noqa: F811
    """All layers in one step are compared with torch's float32.

    A layer that takes another's weights or buffers is off by its whole size, roundings by ten-thousandths.
    """
    (loss,), errors = errors_of_steps(base, converted, acts, base.config.num_hidden_layers, 1, torch.float32)
    print(f"loss {loss:.1e}, gradients up to {max(errors.values())[0]:.1e}")
    assert len(errors) == 1 + 30 * (8 + 2) + 1
    assert loss <= 1e-3
    assert max(errors.values())[0] <= 1e-2, max(errors, key=errors.get)


def test_extension_lowers_the_perplexity(base, smollm2, converted, acts, tmp_path):  # noqa: F811
    """Steps of one sequence, in four groups, AdamW at 2e-3 for LoRA and 1e-4 for embedding and norms; dense
    evaluation."""
    held_out = tmp_path / "held_out.txt"
    held_out.write_text(HELD_OUT.read_text()[: 6 * LENGTH])
    native = ppl.run(smollm2, held_out, [LENGTH])["results"][0]["perplexity"]
    before = ppl.run(smollm2, held_out, [LENGTH], rope_type="linear", target_length=32768)["results"][0][
        "perplexity"
    ]
    assert before > 3 * native
    output, books = tmp_path / "run", tmp_path / "books"
    books.mkdir()
    for path in (TEXT / "train").glob("kjv-*.txt"):
        shutil.copy(path, books)
    done = driver.train(
        say=lambda line: None,
        model=smollm2,
        data=books,
        target_length=32768,
        sequence_length=LENGTH,
        group_size=LENGTH // 4,
        learning_rate=2e-3,
        embedding_learning_rate=1e-4,
        max_steps=STEPS,
        output_dir=output,
        seed=1,
    )
    after = ppl.run(smollm2, held_out, [LENGTH], adapter=output)["results"][0]["perplexity"]
    print(f"native {native:.2f}, interpolated {before:.2f}, after {STEPS} steps {after:.2f}")
    assert after < FACTOR * before
    assert done.step == STEPS and done.stopped is None

    # PEFT and stock transformers read what we trained.
    peft = pytest.importorskip("peft", reason="PEFT is the peer that loads the adapter")
    lora, tensors, raw = adapter.load(output, base)
    made = Model(read_config(raw), lora=lora).load(base)
    made.load_adapter(tensors)
    ours = made.logits(acts[:200])
    config = transformers.AutoConfig.from_pretrained(output / "longlora_base")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32, config=config)
    theirs = peft.PeftModel.from_pretrained(theirs, str(output)).eval()
    merge.merge(smollm2, output, tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    x = torch.from_numpy(acts[None, :200]).long()
    with torch.no_grad():
        for name, logits in (("peft", theirs(x).logits[0]), ("merged", merged(x).logits[0])):
            assert np.abs(ours - logits.numpy()).max() <= 1e-3 * np.abs(ours).max(), name
