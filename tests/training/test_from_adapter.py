"""Training that starts from an adapter: the same tensors are trained further, and one adapter comes out."""

import json
import shutil

import numpy as np
import pytest
import tiny
from runs import adapter_of, equal, failure, numbers, run, weights

from longlora.data.sequences import Order, Sequences, batch
from longlora.data.tokens import tokenise
from longlora.decoder.config import read_config
from longlora.decoder.lora import LoraConfig
from longlora.decoder.model import Model
from longlora.disk import read_json
from longlora.errors import UserError
from longlora.evaluation import ppl
from longlora.files import adapter
from longlora.files.open_model import open_model
from longlora.files.safetensors import SafetensorsFile
from longlora.files.safetensors import save as save_tensors
from longlora.ops import IGNORE
from longlora.training import config_file, driver, from_adapter, options
from longlora.training.inputs import Setup
from longlora.training.optimizer import AdamW

# Every option of the first run that the adapter decides, none at its default.
FIRST = dict(
    r=4,
    lora_alpha=12,
    target_modules=["q_proj", "v_proj", "down_proj"],
    modules_to_save=["embed_tokens", "norm"],
    target_length=256,
    rope_type="yarn",
)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A directory with the base model, a text and `out`, the adapter of a first run."""
    path = tmp_path_factory.mktemp("first")
    run(path, max_steps=3, **FIRST)
    return path


def further(path, output, said=None, **fields):
    """A second run from the adapter of the first."""
    fields = dict(adapter=str(path / "out"), output_dir=str(output), target_length=None, **fields)
    return run(path, said, **fields)


def by_hand(path, steps, length, rate):
    """The steps of such a run by Model and AdamW alone -> the losses, the trained tensors."""
    base = open_model(path / "base")
    lora, tensors, raw = adapter.load(path / "out", base)
    config = read_config(raw)
    o = options.from_dict(tiny.options(path, adapter=str(path / "out"), target_length=None))
    model = Model(
        config,
        lora=lora,
        plan=Setup(o, base.config).plan,
        attention=dict(group_size=length // 4, boundary="split", shift="half"),
    )
    model.load(base).load_adapter(tensors, lora)
    optimizer = AdamW(model.parameters, beta1=0.9, beta2=0.95, eps=1e-8, max_grad_norm=1.0)
    tokens = tokenise(
        str(path / "text.txt"), base.tokenizer(), config.vocab_size, str(path / "by-hand"), print
    )
    corpus = Sequences(tokens, length, "split", "text.txt", "none")
    order, losses = Order(len(corpus), 42, 0), []
    for _ in range(steps):
        ids, targets, _ = batch(corpus, order.take(1), 1)
        count = int((targets != IGNORE).sum())
        model.zero_grad()
        losses.append(model.train_microbatch(ids, targets, 1 / count) / count)
        optimizer.step(dict.fromkeys(model.kinds, rate))
    return losses, {name: np.array(x.numpy()) for name, x in model.tensors().items()}


def test_the_steps_are_those_from_the_adapters_tensors_with_a_new_optimizer(first, tmp_path):
    result = further(first, tmp_path / "out", max_steps=3, learning_rate=3e-3, sequence_length=128)
    losses, wanted = by_hand(first, 3, 128, 3e-3)
    assert [row["loss"] for row in result.history] == losses
    found = weights(tmp_path / "out")
    equal(found, wanted)
    before = weights(first / "out")
    assert all((found[name] != before[name]).any() for name in found)


def test_one_adapter_comes_out_as_the_first_one_was(first, tmp_path):
    said = []
    result = further(first, tmp_path / "out", said, max_steps=1, eval_data=str(first / "text.txt"))
    names = {path.name for path in (first / "out").iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} - {"checkpoint-1"} == names - {"checkpoint-3"}
    for name in ("adapter_config.json", "longlora_base/config.json"):
        ours, theirs = ((path / "out" / name).read_text() for path in (tmp_path, first))
        assert ours.replace(str(tmp_path / "out"), "OUT") == theirs.replace(str(first / "out"), "OUT"), name
    assert any(line.startswith(f"adapter: {first / 'out'} is trained further, r 4") for line in said)
    assert "rope: yarn, as the adapter: 256 positions" in said
    assert result.history[0]["step"] == 0


def test_the_loss_before_the_first_step_is_that_of_the_adapter(first, tmp_path):
    ids = np.random.default_rng(3).integers(0, 256, 1000).astype(np.uint16)
    ids.tofile(tmp_path / "held.bin")
    fields = dict(eval_data=str(tmp_path / "held.bin"), max_steps=1, sequence_length=128)
    result = further(first, tmp_path / "out", **fields)
    (wanted,) = ppl.run(first / "base", tmp_path / "held.bin", 128, adapter=first / "out", device="cpu")[
        "results"
    ]
    assert result.history[0]["step"] == 0 and result.history[0]["eval_loss"] == wanted["loss"]


def test_after_texts_come_instructions(first, tmp_path):
    """A question a record; its loss before the first step is that of the adapter on the answers."""
    pairs = [
        ("Which group is long? " * n, "The shifted one. " * m) for n, m in ((1, 1), (3, 2), (2, 5), (1, 3))
    ]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(dict(prompt=p, completion=c)) + "\n" for p, c in pairs))
    fields = dict(eval_data=str(data), max_steps=2, eval_steps=1, save_steps=1, load_best_model_at_end=True)
    result = further(first, tmp_path / "out", data=str(data), **fields)
    model, _ = ppl.open_for_evaluation(first / "base", first / "out")
    total = count = 0
    for prompt, completion in pairs:
        ids = np.array([*prompt.encode(), *completion.encode(), tiny.CONFIG["eos_token_id"]], np.int32)
        targets = np.append(ids[1:], np.int32(IGNORE)).astype(np.int32)
        targets[: len(prompt.encode()) - 1] = IGNORE
        total += float(model.losses(ids, targets).sum())
        count += int((targets != IGNORE).sum())
    assert result.history[0]["eval_loss"] == pytest.approx(total / count, rel=1e-6)
    best = min(result.history[1:], key=lambda row: row["eval_loss"])
    assert result.best_model_checkpoint == str(tmp_path / "out" / f"checkpoint-{best['step']}")
    assert best["eval_loss"] < result.history[0]["eval_loss"]
    equal(weights(tmp_path / "out"), weights(result.best_model_checkpoint))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resuming_gives_the_bits_of_never_having_stopped(first, tmp_path, dtype):
    fields = dict(dtype=dtype, lr_scheduler_type="cosine")
    whole = further(first, tmp_path / "whole", max_steps=4, save_steps=2, **fields)
    shutil.copytree(first / "out", tmp_path / "elsewhere")  # where an adapter lies does not matter
    resumed = further(
        first,
        tmp_path / "resumed",
        **fields,
        max_steps=4,
        resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"),
    )
    assert numbers(resumed.history) == numbers(whole.history)
    equal(weights(tmp_path / "resumed"), weights(tmp_path / "whole"))
    # options.yaml gives every option, each equal to the adapter's
    again = options.from_dict(config_file.read(tmp_path / "whole" / "options.yaml") | dict(init=None), "yaml")
    Setup(again, read_config(str(first / "base")))


def test_the_adapter_is_a_part_of_the_runs_identity(first, tmp_path):
    further(first, tmp_path / "out", max_steps=2)
    latest = dict(output_dir=str(tmp_path / "out"), resume_from_checkpoint="latest", max_steps=3)
    path = tmp_path / "changed"
    shutil.copytree(first / "out", path)
    tensors = SafetensorsFile(path / "adapter_model.safetensors")
    arrays = {name: np.array(tensors.array(name)) for name in tensors.entries}
    arrays["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"][0, 0] += 1e-3
    save_tensors(path / "adapter_model.safetensors", arrays, tensors.metadata)
    before = tiny.listing(tmp_path / "out")
    for given in (dict(adapter=str(path), target_length=None), FIRST):
        message = failure(first, **given, **latest)
        assert "was trained with another start: give the adapter that it started from" in message
    assert tiny.listing(tmp_path / "out") == before
    run(first, output_dir=str(tmp_path / "plain"), max_steps=1, **FIRST)
    plain = dict(output_dir=str(tmp_path / "plain"), resume_from_checkpoint="latest", max_steps=3)
    assert "or none if there was none" in failure(
        first, adapter=str(first / "out"), target_length=None, **plain
    )


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(r=8), "r should be 4, as in the adapter DIR, got 8; leave r out"),
        (dict(lora_alpha=16.0), "lora_alpha should be 12.0, as in the adapter DIR, got 16.0"),
        (
            dict(target_modules=["q_proj", "v_proj"]),
            "be q_proj v_proj down_proj, as in the adapter DIR, got q_proj v_proj",
        ),
        (
            dict(target_modules=["all-linear"]),
            "target_modules should be q_proj v_proj down_proj, as in the adapter",
        ),
        (
            dict(modules_to_save=["norm"]),
            "modules_to_save should be embed_tokens norm, as in the adapter DIR, got norm",
        ),
        (
            dict(modules_to_save=[]),
            "be embed_tokens norm, as in the adapter DIR, got none; leave modules_to_save out",
        ),
        (dict(target_length=128), "target_length should be 256, as in the adapter DIR, got 128"),
        (dict(rope_type="linear"), "rope_type should be yarn, as in the adapter DIR, got linear"),
        (dict(sequence_length=512), "sequence_length should be at most target_length 256, got 512"),
        (dict(full=True), "adapter and full exclude each other"),
        (dict(model=None, init="base", full=True), "adapter and full exclude each other"),
        (dict(adapter="nowhere"), "nowhere: no such directory; wanted an adapter"),
        (dict(target_modules=["q"]), "target_modules should be a list of q_proj"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_an_option_that_the_adapter_decides_may_not_differ(first, tmp_path, fields, words):
    given = dict(output_dir=str(tmp_path / "out"), adapter=str(first / "out"), target_length=None) | fields
    assert words.replace("DIR", str(first / "out")) in failure(first, **given)
    assert not (tmp_path / "out").exists()


def test_equal_options_may_be_given(first, tmp_path):
    given = FIRST | dict(target_modules=["down_proj", "v_proj", "q_proj"], rope_type="yarn")
    given["modules_to_save"] = ["embed_tokens", "input_layernorm", "norm"]  # norm means every norm
    run(first, adapter=str(first / "out"), output_dir=str(tmp_path / "a"), max_steps=1, **given)
    further(first, tmp_path / "b", max_steps=1)
    equal(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_an_adapter_of_another_base_model_is_refused(first, tmp_path):
    given = dict(adapter=str(first / "out"), target_length=None, output_dir=str(tmp_path / "out"))
    for name, fields in (("seed", dict(seed=5)), ("shape", dict(hidden_size=64))):
        other = str(tiny.model(tmp_path / name, **fields))
        assert "is an adapter for a base model other than" in failure(first, model=other, **given)
    with pytest.raises(UserError, match="its config has other shapes"):
        driver.plan(model=other, adapter=str(first / "out"))


def test_the_plan_is_that_of_the_first_run(first):
    fields = dict(model=str(first / "base"), device="cpu", max_memory=64.0)  # any process fits
    wanted = driver.plan(**fields, **FIRST)
    found = driver.plan(**fields, adapter=str(first / "out"))
    assert found.to_json() == wanted.to_json()
    shown = tiny.command(
        "plan", "--json", "--adapter", first / "out", *tiny.flags(fields), "--sequence-length", "64"
    )
    assert shown.returncode == 0, shown.stderr
    found, wanted = json.loads(shown.stdout), driver.plan(**fields, **FIRST, sequence_length=64).to_json()
    for parts in (found["parts"], wanted["parts"]):
        del parts["runtime"]  # what this process holds
    assert found["parts"] == wanted["parts"]


def test_an_adapter_that_extends_nothing_keeps_the_positions_of_its_base(tmp_path):
    run(tmp_path, max_steps=1, target_length=None)
    given = dict(adapter=str(tmp_path / "out"), output_dir=str(tmp_path / "second"), max_steps=1)
    said = []
    run(tmp_path, said, **given, target_length=64, rope_type="linear")  # as the base has them
    assert "rope: default, as the base: 64 positions" in said
    assert not (tmp_path / "second" / "longlora_base").exists()
    given["output_dir"] = str(tmp_path / "third")
    assert "target_length should be 64, as in the adapter" in failure(tmp_path, **given, target_length=128)
    given |= dict(target_length=None, sequence_length=128)
    assert "at most the 64 tokens of the adapter, got 128" in failure(tmp_path, **given)


DECIDED = ("r", "lora_alpha", "target_modules", "modules_to_save", "target_length", "rope_type")


def taken(tmp_path, adapter_fields, target=None, **fields):
    """The options that an adapter decides, and the results of take_over."""
    base = tiny.model(tmp_path / "base")
    path = adapter_of(tmp_path / "adapter", base, target, **adapter_fields)
    o = options.from_dict(dict(model=str(base), adapter=str(path), **fields), planning=True)
    lora, raw = from_adapter.take_over(o, open_model(base).config)
    found = {name: getattr(o, name) for name in DECIDED}
    assert type(found["lora_alpha"]) is float
    return found, lora, raw


@pytest.mark.parametrize(
    "given",
    [
        {},
        dict(r=4, lora_alpha=12, target_length=256, rope_type="yarn"),
        dict(target_modules=["down_proj", "v_proj", "q_proj"]),
        dict(modules_to_save=["embed_tokens", "input_layernorm", "norm"]),  # norm means every norm
    ],
    ids=lambda given: "-".join(given),
)
def test_an_adapter_sets_the_options_that_it_decides(tmp_path, given):
    modules = dict(target_modules=("q_proj", "v_proj", "down_proj"), modules_to_save=("embed_tokens", "norm"))
    wanted = dict(r=4, lora_alpha=12, **modules)
    found, lora, raw = taken(tmp_path, wanted, 256, **given)
    assert found == dict(wanted, target_length=256, rope_type="yarn") and lora == LoraConfig(**wanted)
    assert raw["max_position_embeddings"] == 256 and read_config(raw).rope.type == "yarn"


def test_an_adapter_that_extends_nothing_sets_no_target_length(tmp_path):
    """The rope type then has no effect, so any is accepted."""
    given = dict(target_modules=["all-linear"], target_length=64, rope_type="yarn")
    every = LoraConfig(target_modules="all-linear").target_modules
    found, lora, raw = taken(tmp_path, dict(target_modules=every, modules_to_save=()), **given)
    assert raw is None and lora.target_modules == found["target_modules"] == every
    assert (found["target_length"], found["rope_type"], found["modules_to_save"]) == (None, "yarn", ())


def test_an_adapter_without_saved_modules_refuses_some(tmp_path):
    with pytest.raises(UserError, match="modules_to_save should be none, as in the adapter .*, got norm; "):
        taken(tmp_path, dict(modules_to_save=()), modules_to_save=["norm"])


# ---- PEFT ----------------------------------------------------------------------------------------


@pytest.fixture
def foreign(tmp_path):
    """An adapter that PEFT made itself, with rsLoRA, in bfloat16 -> its directory."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = tiny.model(tmp_path / "base", tie_word_embeddings=False)
    torch.manual_seed(0)
    lora = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        lora_dropout=0.1,
        use_rslora=True,
        target_modules=["q_proj", "o_proj"],
        modules_to_save=["lm_head", "norm"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    model.save_pretrained(tmp_path / "foreign")
    return tmp_path / "foreign"


def test_an_adapter_of_peft_is_trained_further_and_peft_reads_the_result(foreign, tmp_path):
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    given = dict(adapter=str(foreign), target_length=None, max_steps=2, eval_data=str(tmp_path / "held.bin"))
    ids = np.random.default_rng(4).integers(0, 256, 64).astype(np.uint16)
    ids.tofile(tmp_path / "held.bin")
    result = run(tmp_path, **given)
    assert read_json(tmp_path / "out" / "adapter_config.json")["use_rslora"] is True

    def theirs(path):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
        loaded = peft.PeftModel.from_pretrained(model, path).eval()
        with torch.no_grad():
            return loaded(torch.tensor(ids[None].astype(np.int64))).logits[0]

    def loss(logits):
        return float(torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:].astype(np.int64))))

    assert result.history[0]["eval_loss"] == pytest.approx(loss(theirs(foreign)), rel=1e-5)
    assert result.history[-1]["eval_loss"] == pytest.approx(loss(theirs(tmp_path / "out")), rel=1e-5)
    ours, _ = ppl.open_for_evaluation(tmp_path / "base", tmp_path / "out")
    np.testing.assert_allclose(ours.logits(ids.astype(np.int32)), theirs(tmp_path / "out"), atol=2e-4)


def test_what_merge_does_not_read_is_not_trained_further_either(first, tmp_path):
    shutil.copytree(first / "out", tmp_path / "dora")
    path = tmp_path / "dora" / "adapter_config.json"
    path.write_text(json.dumps(read_json(path) | dict(use_dora=True)))
    given = dict(adapter=str(tmp_path / "dora"), target_length=None, output_dir=str(tmp_path / "out"))
    assert "use_dora True is not supported" in failure(first, **given)
