"""What extend trains is float32 whatever the dtype of the base: it moves, it computes as the base does, and
saving, loading and merging lose nothing. CheckMoved stops a training of nothing."""

import copy

import pytest

torch = pytest.importorskip("torch", reason="longlora.torch is for torch")
transformers = pytest.importorskip("transformers", reason="these tests extend models of transformers")
peft = pytest.importorskip("peft", reason="extend makes a PeftModel")
from devices import device, put  # noqa: E402, F401 (a fixture)
from families import VERSION, ids_of, tiny  # noqa: E402

import longlora.torch  # noqa: E402
from longlora.torch.extend import lora_config  # noqa: E402
from longlora.torch.masters import Masters  # noqa: E402

LOW = torch.bfloat16


def base(**changes):
    return tiny("llama", "sdpa", **changes).to(LOW)


def extended(lora=None, **changes):
    model = base(**changes)
    return longlora.torch.extend(model, 512, group_size=6, lora=None if lora is None else lora(model))


def by_peft(**changes):
    """The same model by PEFT alone: what trains whole has the dtype of the base."""
    model = extended(**changes).unload()
    return peft.PeftModelForCausalLM(model, lora_config(model))


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def whole(model):
    return {name: p for name, p in trained(model).items() if "lora_" not in name}


def step(model, rate=1e-4, steps=3):
    optimizer = torch.optim.AdamW(trained(model).values(), rate, weight_decay=0)
    for i in range(steps):
        optimizer.zero_grad()
        ids = ids_of(2, 24, seed=i)
        model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("tied", [False, True])
def test_all_that_trains_is_float32_and_moves(tied):
    """A step of 1e-4 is below half of bfloat16's step at 1, so in bfloat16 no norm would move.

    Of the numbers of an embedding, a few may have next to no gradient.
    """
    model = extended(tie_word_embeddings=tied)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    assert {p.dtype for name, p in model.named_parameters() if name not in trained(model)} == {LOW}
    step(model, steps=1)
    for name, p in whole(model).items():
        moved = (p != before[name]).float().mean().item()
        # Of an untied embedding, rows of tokens that were there move.
        assert moved == 1 if "norm" in name else moved > (0.999 if tied else 0.4), name
    if tied:
        head = model.get_base_model().lm_head.modules_to_save["default"].weight
        assert head is model.get_base_model().model.embed_tokens.modules_to_save["default"].weight


@pytest.mark.parametrize("tied", [False, True])
def test_it_computes_what_the_base_computes(tied):
    """Masters that hold what bfloat16 holds give the bits of PEFT's model in bfloat16, gradients too."""
    ours, theirs = extended(tie_word_embeddings=tied), by_peft(tie_word_embeddings=tied)
    theirs.load_state_dict(ours.state_dict())
    ids, found = ids_of(2, 24), []
    for model in (ours, theirs):
        assert torch.equal(model.eval()(ids).logits, ours.eval()(ids).logits)
        model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found.append({name: p.grad for name, p in trained(model).items()})
    assert found[0].keys() == found[1].keys()
    for name, grad in found[1].items():
        if "embed_tokens" not in name:
            assert torch.equal(found[0][name], grad.float()), name
        else:  # rows of a token are added up in float32 here, in bfloat16 there
            assert (found[0][name] - grad).norm() <= 0.01 * grad.norm()


def test_under_autocast_it_computes_as_float32_weights_do():
    ours, theirs = extended(), by_peft()
    theirs.load_state_dict(ours.state_dict())
    for p in trained(theirs).values():
        p.data = p.data.float()
    ids = ids_of(2, 24)
    with torch.autocast(ids.device.type, LOW):
        assert torch.equal(ours.eval()(ids).logits, theirs.eval()(ids).logits)
    exact = copy.deepcopy(ours).float()  # in one dtype: nothing is rounded
    assert exact(ids).logits.dtype == torch.float32


def test_files_keep_float32_and_merging_rounds_once(tmp_path):
    base(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    how = {"dtype" if VERSION >= (4, 56) else "torch_dtype": LOW}
    model = put(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", **how))
    model = longlora.torch.extend(model, 512, group_size=6)
    step(model)
    values = {name: p.detach().clone() for name, p in trained(model).items()}
    model.save_pretrained(tmp_path / "adapter")
    again = longlora.torch.load(tmp_path / "adapter", tmp_path / "base", is_trainable=True, **how)
    found = trained(again)
    assert found.keys() == values.keys()
    assert all(torch.equal(put(found[name].detach()), values[name]) for name in values)
    merged = model.eval().merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {LOW} and not any(
        isinstance(module, Masters) for module in merged.modules()
    )
    for name, p in merged.named_parameters():
        for theirs, value in values.items():
            if "lora_" not in theirs and theirs.replace(".modules_to_save.default", "").endswith("." + name):
                assert torch.equal(p, value.to(LOW)), name
    merged.save_pretrained(tmp_path / "merged")
    stock = put(
        transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "merged", attn_implementation="longlora_s2", **how
        )
    )
    assert torch.equal(stock(ids_of(1, 24)).logits, merged(ids_of(1, 24)).logits)


def test_a_head_of_its_own_and_a_whole_mlp():
    """Modules of any kind: a linear, and one with linears inside."""
    model = extended(lambda model: lora_config(model, modules_to_save=["lm_head", "mlp"]))
    names = {
        type(module.original_module).__name__ for module in model.modules() if isinstance(module, Masters)
    }
    assert names == {"Linear", "LlamaMLP"}
    before = {name: p.detach().clone() for name, p in whole(model).items()}
    step(model)
    assert all((p != before[name]).float().mean() > 0.9 for name, p in whole(model).items())
    with model.disable_adapter():  # the base's own weights
        plain = model.eval()(ids_of(1, 24)).logits
    assert not torch.equal(plain, model(ids_of(1, 24)).logits)


def test_a_copy_has_its_own_weights():
    model = extended()
    other, ids = copy.deepcopy(model), ids_of(1, 24)
    want = model.eval()(ids).logits
    with torch.no_grad():
        for p in whole(other).values():
            p.mul_(1.5)
    assert torch.equal(model(ids).logits, want) and not torch.equal(other.eval()(ids).logits, want)


def test_what_can_only_train_in_the_dtype_of_the_base_is_refused():
    with pytest.raises(ValueError, match="would train in bfloat16, where small steps are lost"):
        extended(lambda model: lora_config(model, bias="all"), attention_bias=True)
    assert longlora.torch.extend(
        tiny("llama", "sdpa", attention_bias=True), 512, lora=lora_config(base(), bias="all")
    )


def test_fsdp2_trains_the_masters(tmp_path):
    """One process: sharded and not, the losses and the masters are the same."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    alone, model = extended(tie_word_embeddings=True), extended(tie_word_embeddings=True)
    step(alone)
    kind = "nccl" if put(torch.zeros(1)).is_cuda else "gloo"
    dist.init_process_group(kind, init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        for layer in model.get_base_model().model.layers:
            fully_shard(layer)
        fully_shard(model)
        step(model)
        found = {name: p.full_tensor().detach() for name, p in trained(model).items()}
    finally:
        dist.destroy_process_group()
    assert {x.dtype for x in found.values()} == {torch.float32}
    for name, p in trained(alone).items():
        torch.testing.assert_close(found[name], p.detach(), rtol=1e-6, atol=1e-7)


# ---- CheckMoved


def trainer(model, tmp_path, **changes):
    rows = [{"input_ids": ids, "labels": ids} for ids in ids_of(8, 24).cpu()]
    how = dict(
        max_steps=3,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    how |= dict(use_cpu=not next(model.parameters()).is_cuda)
    args = transformers.TrainingArguments(str(tmp_path / "run"), **{**how, **changes})
    return transformers.Trainer(model, args, train_dataset=rows, callbacks=[longlora.torch.CheckMoved()])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(bf16=True),
        dict(lr_scheduler_type="linear", warmup_steps=2),
        dict(gradient_accumulation_steps=2),
    ],
    ids=["plain", "autocast", "first rate 0", "accumulation"],
)
def test_a_training_of_everything_goes_on(tmp_path, changes):
    model = extended(tie_word_embeddings=True)
    before = {name: p.detach().clone() for name, p in trained(model).items()}
    trainer(model, tmp_path, **changes).train()
    assert all(not torch.equal(p, before[name]) for name, p in trained(model).items())


def without_gradient(part):
    def change(model):
        for name, p in trained(model).items():
            if part in name:
                p.register_hook(torch.zeros_like)

    return change


@pytest.mark.parametrize(
    "change, changes, words",
    [
        (
            without_gradient("norm"),
            {},
            "step 1: norm does not train: 5 of 5 tensors .*: its gradient is zero",
        ),
        (without_gradient("lora_B"), {}, "step 1: lora_B does not train: 8 of 8 .*: its gradient is zero"),
        (without_gradient("lora_A"), {}, "step 2: lora_A does not train: 8 of 8 .*: its gradient is zero"),
        (without_gradient("embed_tokens"), {}, "step 1: embedding does not train: 1 of 1 .*gradient is zero"),
        (lambda model: None, dict(learning_rate=1e-12), "below the rounding of float32; raise the learning"),
        (lambda model: model.to(LOW), {}, "embedding would train in bfloat16, where small steps are lost"),
    ],
    ids=["norm", "lora_B", "lora_A", "embedding", "rate", "bfloat16"],
)
def test_a_training_of_nothing_stops(tmp_path, change, changes, words):
    model = extended()
    change(model)
    with pytest.raises(ValueError, match=words):
        trainer(model, tmp_path, **changes).train()
