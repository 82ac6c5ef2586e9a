"""Units of longlora.torch.trainer and longlora.torch.moved, without training."""

import contextlib
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from longlora.errors import UserError

torch = pytest.importorskip("torch", reason="longlora.torch is for torch")
pytest.importorskip("accelerate", reason="Trainer needs accelerate")
ours = pytest.importorskip(
    "longlora.torch.trainer", reason="longlora.torch.train needs transformers and peft"
)
from accelerate.utils import DistributedType  # noqa: E402

from longlora.data.sequences import Order  # noqa: E402
from longlora.torch import moved  # noqa: E402


def fake_module(monkeypatch, name, **content):
    """Make `import name` find a module with this content."""
    made = ModuleType(name)
    vars(made).update(content)
    monkeypatch.setitem(sys.modules, name, made)


# ---- the model and the batches -------------------------------------------------------------------


def test_put_fills_a_parameter_also_under_zero(monkeypatch):
    p = torch.nn.Parameter(torch.zeros(2))
    ours.put(p, np.array([1, 2], np.float32))
    assert p.tolist() == [1, 2] and p.requires_grad
    inside = []

    @contextlib.contextmanager
    def gathered(parameters, modifier_rank):
        assert parameters == [p] and modifier_rank == 0 and p.tolist() == [1, 2]
        yield
        inside.extend(p.tolist())

    fake_module(monkeypatch, "deepspeed")
    fake_module(monkeypatch, "deepspeed.zero", GatheredParameters=gathered)
    p.ds_id = 3
    ours.put(p, np.array([3, 4], np.float32))
    assert inside == [3, 4]


class Named:
    """A model with parameters of these names. The last one is frozen."""

    def __init__(self, *names):
        self.parameters = {name: torch.nn.Parameter(torch.zeros(1)) for name in names}
        self.parameters[names[-1]].requires_grad_(False)

    def named_parameters(self):
        return self.parameters.items()


def test_parameters_by_the_names_of_the_driver():
    model = Named(
        "base_model.model.model.layers.0._checkpoint_wrapped_module.q_proj.lora_A.default.weight",
        "base_model.model.model.norm.modules_to_save.default.weight",
        "base_model.model.lm_head.weight",
    )
    first, second, _ = model.parameters.values()

    def setup(*names):
        shapes = dict.fromkeys(names, (1,))
        return SimpleNamespace(config=5, lora=SimpleNamespace(tensor_shapes={5: shapes}.__getitem__))

    a, norm = "model.layers.0.q_proj.lora_A.weight", "model.norm.weight"
    found = ours.named(model, setup(norm, a))
    assert [name for name, _ in found] == [norm, a] and found[0][1] is second and found[1][1] is first
    with pytest.raises(UserError, match="transformers' model trains other tensors: a.weight$"):
        ours.named(model, setup(norm, a, "z.weight", "a.weight"))
    with pytest.raises(UserError, match=f"trains other tensors: {norm}$"):
        ours.named(model, setup(a))


@pytest.mark.parametrize("stage", [2, 3])
def test_the_state_that_the_first_step_of_deepspeed_makes(stage):
    flat, filled = [torch.ones(3), torch.ones(2)], []
    zero = SimpleNamespace(optimizer=SimpleNamespace(state={}))
    if stage == 2:
        zero.single_partition_of_fp32_groups = flat
        zero._lazy_init_hp_params_optimizer_state = lambda: filled.append(len(zero.optimizer.state))
    else:
        zero.fp32_partitioned_groups_flat = flat
    ours.made_steps(zero, 7)
    assert filled == ([2] if stage == 2 else [])
    for x in flat:
        state = zero.optimizer.state[x]
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq"} and state["step"].item() == 7
        assert state["step"].dtype == torch.float32
        assert torch.equal(state["exp_avg"], torch.zeros_like(x))
        assert torch.equal(state["exp_avg_sq"], torch.zeros_like(x))


def test_sequences_come_in_the_order_of_the_driver():
    places = ours.Places(range(5), seed=3, first=4, count=9)
    want = Order(5, 3).take(13)[4:]
    assert len(places) == 9 and [places[i] for i in range(9)] == want == places.places


def test_labels_are_targets_one_place_later(monkeypatch):
    """The label of a token is the token itself, because the losses of transformers compare with the next."""
    ids = np.array([[5, 6, 7, 8], [9, 10, 11, 0]], np.int32)
    targets = np.array([[6, 7, 8, -100], [10, 11, -100, -100]], np.int32)
    boundaries = np.array([0, 2, 4, 7, 8], np.int32)
    asked = []

    def made(*given):
        asked.append(given)
        return ids, targets, boundaries if given[2] == 4 else None

    monkeypatch.setattr(ours.sequences, "batch", made)
    found = ours.batch("corpus", [3, 1], 1)
    assert {name: x.tolist() for name, x in found.items()} == {
        "input_ids": ids.tolist(),
        "labels": [[-100, 6, 7, 8], [-100, 10, 11, -100]],
    }
    assert all(x.dtype == torch.int64 for x in found.values())
    assert ours.batch("corpus", [3, 1], 4)["position_ids"].tolist() == [[0, 1, 0, 1], [0, 1, 2, 0]]
    assert asked == [("corpus", [3, 1], 1), ("corpus", [3, 1], 4)]


# ---- the steps -----------------------------------------------------------------------------------


def test_events_of_trainer():
    told = []
    stops = iter((False, True, False))
    callback = ours.Callback(
        lambda: told.append("begin"),
        lambda: told.append("updates"),
        lambda norm: told.append(norm) or next(stops),
    )
    callback.on_train_begin(None, None, None, model=1)
    callback.on_pre_optimizer_step(None, None, None, model=1)
    control = SimpleNamespace(should_training_stop=False)
    callback.on_log(None, None, control, logs={"train_runtime": 1.0})
    assert told == ["begin", "updates"] and not control.should_training_stop
    for stopped in (False, True, True):
        callback.on_log(None, None, control, logs={"loss": 1.0, "grad_norm": "0.5"})
        assert control.should_training_stop is stopped
    assert told[2:] == [0.5] * 3


OPTIONS = SimpleNamespace(
    learning_rate=0.1,
    embedding_learning_rate=0.01,
    weight_decay=0.5,
    adam_beta1=0.8,
    adam_beta2=0.7,
    adam_epsilon=1e-5,
    per_device_train_batch_size=3,
)


def steps(**fields):
    """The Trainer of a run that has made 4 steps. Only what the tests need is set."""
    made = object.__new__(ours.Steps)
    run = SimpleNamespace(o=OPTIONS, setup="the setup", first=4, share=lambda step: 1 / step, consistent=True)
    vars(made).update({"run": run, "optimizer": None, "loss": 0.0, **fields})
    return made


def test_the_optimizer_has_a_group_for_each_rate_and_decay(monkeypatch):
    kinds = dict(a="lora_A", b="lora_B", e="embedding", n="norm", h="head", m="norm")
    parameters = {name: torch.nn.Parameter(torch.ones(1)) for name in kinds}
    asked = []
    monkeypatch.setattr(ours, "named", lambda *what: asked.append(what) or list(parameters.items()))
    trainer = steps(kinds=kinds, model="the model")
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is torch.optim.AdamW and trainer.optimizer is optimizer
    assert trainer.create_optimizer() is optimizer and asked == [("the model", "the setup")]
    names = {id(p): name for name, p in parameters.items()}
    found = {
        "".join(names[id(p)] for p in group["params"]): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
    }
    assert found == {"ab": (0.1, 0.5), "eh": (0.01, 0.5), "nm": (0.01, 0.0)}
    assert optimizer.defaults["betas"] == (0.8, 0.7) and optimizer.defaults["eps"] == 1e-5
    steps(kinds=kinds, model="the model").create_optimizer("another")
    assert asked[1] == ("another", "the setup")


def test_rates_follow_the_schedule_of_the_run():
    p = torch.nn.Parameter(torch.ones(1))
    for given in (True, False):
        optimizer = torch.optim.SGD([p], lr=2.0)
        trainer = steps(optimizer=None if given else optimizer)
        schedule = trainer.create_scheduler(9, *([optimizer] if given else []))
        assert trainer.lr_scheduler is schedule
        rates = []
        for _ in range(3):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        assert rates == [2 / 5, 2 / 6, 2 / 7]  # four steps were made before


@pytest.mark.parametrize("deepspeed", [False, True])
def test_the_losses_of_a_step_are_added(monkeypatch, deepspeed):
    given = []
    monkeypatch.setattr(
        ours.Trainer, "training_step", lambda self, *args, **more: given.append((args, more)) or 1.5
    )
    trainer = steps(is_deepspeed_enabled=deepspeed)
    assert trainer.training_step("model", inputs="inputs") == 1.5
    trainer.training_step("model", "inputs")
    assert trainer.loss == 3.0 and given[0] == (("model",), {"inputs": "inputs"})
    assert trainer.run.consistent is not deepspeed  # DeepSpeed's backward pass may update


def test_batches_keep_the_order_of_the_sequences():
    made = []
    trainer = steps(
        train_dataset=[7, 5, 3, 1],
        data_collator=list,
        accelerator=SimpleNamespace(prepare=lambda loader: made.append(loader) or loader),
        args=SimpleNamespace(dataloader_pin_memory=False),
    )
    loader = trainer.get_train_dataloader()
    assert made == [loader] and list(loader) == [[7, 5, 3], [1]] and loader.pin_memory is False
    trainer.args.dataloader_pin_memory = True
    assert trainer.get_train_dataloader().pin_memory is True


# ---- the engine ----------------------------------------------------------------------------------


def engine(size=1, index=0, **fields):
    """The engine of process `index` of `size`. Only what the tests need is set."""
    made = object.__new__(ours.TorchEngine)
    made.args = SimpleNamespace(device=torch.device("cpu"), world_size=size, process_index=index)
    made._signal, made.parameters, made.trainer = None, [], None
    vars(made).update(fields)
    return made


def stepping(gather, signal=None, step=5):
    """An engine after a step of two sequences, and what the run is told. `gather` is accelerate's.

    Sequence n has 10 n tokens.
    """
    after = []
    run = SimpleNamespace(
        stop=SimpleNamespace(signal=signal),
        named=contextlib.nullcontext,
        step=step,
        first=4,
        each=2,
        corpus=SimpleNamespace(size=lambda place: 10 * place),
        after_step=lambda *told: after.append(told),
        consistent=True,
    )
    trainer = SimpleNamespace(
        loss=torch.tensor(3.0),
        accelerator=SimpleNamespace(gather=gather),
        train_dataset=SimpleNamespace(places=[1, 2, 3, 4, 5, 6]),
    )
    return engine(run=run, trainer=trainer), after


def test_a_step_combines_losses_and_signals_of_all_processes():
    def gather(mine):
        assert mine.tolist() == [[3.0, 0.0]]
        return torch.cat([mine, torch.tensor([[5.0, 15.0]])])

    made, after = stepping(gather)
    assert made._after_step(0.25) is True and made.signal() == 15
    assert after == [(4.0, 0.25, 70)] and made.trainer.loss == 0.0
    made, after = stepping(lambda mine: mine)
    assert made._after_step(0.25) is False and made.signal() is None
    made, after = stepping(lambda mine: mine, signal=2, step=4)
    assert made._after_step(0.5) is True and made.signal() == 2 and after == [(3.0, 0.5, 30)]
    made._updates()
    assert made.run.consistent is False


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run(bad):
    made, after = stepping(lambda mine: mine * torch.tensor([[bad, 1.0]]))
    with pytest.raises(UserError, match="the loss is not finite"):
        made._after_step(0.5)
    made, after = stepping(lambda mine: mine)
    with pytest.raises(UserError, match="the gradient is not finite"):
        made._after_step(bad)
    assert not after


@pytest.mark.parametrize("index, wanted", [(0, [0, 2]), (1, [1, 2])])
def test_processes_share_the_evaluation(monkeypatch, index, wanted):
    """Of three sequences, process 1 has one. It also evaluates the last one, which process 0 counts."""
    made, modes = [], []
    labels = {0: [-100, 1, 2], 1: [-100, 1, -100], 2: [-100, 1, 2]}

    def batch(corpus, indices, multiple):
        made.append((corpus, indices, multiple))
        return {"labels": torch.tensor([labels[indices[0]]], device="cpu")}

    class Model:
        training = True

        def train(self, mode):
            modes.append(mode)

        def eval(self):
            modes.append(False)

        def __call__(self, labels, num_items_in_batch, skip_logits):
            assert num_items_in_batch == 1 and skip_logits is True and modes == [False]
            return SimpleNamespace(loss=torch.tensor(10.0 * len(made), device="cpu"))

    def gather(mine):
        assert mine.shape == (1, 2) and mine.dtype == torch.float64
        return torch.cat([mine, torch.tensor([[7.0, 3.0]], dtype=torch.float64, device="cpu")])

    monkeypatch.setattr(ours, "batch", batch)
    run = SimpleNamespace(held_out="held out", evaluated=3, setup=SimpleNamespace(multiple=4))
    trainer = SimpleNamespace(model=Model(), accelerator=SimpleNamespace(gather=gather))
    with torch.device("meta"):  # a default device, which is not that of the run
        loss = engine(2, index, run=run, trainer=trainer).evaluate()
    assert made == [("held out", [i], 4) for i in wanted] and modes == [False, True]
    assert loss == ((10 + 20 + 7) / (2 + 2 + 3) if index == 0 else (10 + 7) / (1 + 3))


def kept(name, **arrays):
    """A fake Trained with these arrays."""
    return SimpleNamespace(name=name, read=lambda what: torch.tensor([arrays[what]]))


def test_only_the_first_process_returns_values_and_state():
    parameters = [kept("a", value=1.0, m=2.0, v=3.0), kept("b", value=4.0, m=5.0, v=6.0)]
    first = engine(trainer="trainer", parameters=parameters)
    assert first.values() == {"a": [1.0], "b": [4.0]}
    state = {name: array.item() for name, array in first.state().items()}
    assert state == {"value.a": 1, "value.b": 4, "m.a": 2, "m.b": 5, "v.a": 3, "v.b": 6}
    other = engine(2, 1, trainer="trainer", parameters=parameters)
    assert other.values() == {} and other.state() == {}
    done = engine(parameters=parameters, run=SimpleNamespace(tensors={"value.a": 8, "value.b": 9, "m.a": 1}))
    assert done.values() == {"a": 8, "b": 9}


def test_peak_memory_is_that_of_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5)
    monkeypatch.setattr(ours.job, "peak_memory", lambda: 6)
    made = engine()
    assert made.peak_memory() == 6
    made.args.device = torch.device("cuda")
    assert made.peak_memory() == 5


@pytest.mark.parametrize("deepspeed", [False, True])
@pytest.mark.parametrize("saved", [False, True])
def test_a_run_starts_from_its_saved_tensors(monkeypatch, deepspeed, saved):
    did = []
    p = SimpleNamespace(
        name="a",
        bind=lambda *what: did.append(("bind", *what)),
        restore=lambda *what: did.append(("restore", *what)),
    )
    run = SimpleNamespace(setup="setup", step=6, begin=lambda: did.append(("begin",)))
    run.tensors = {"value.a": 1, "m.a": 2, "v.a": 3} if saved else None
    trainer = SimpleNamespace(model="model", optimizer="optimizer", is_deepspeed_enabled=deepspeed, loss=5.0)
    trainer.model_wrapped = SimpleNamespace(optimizer="zero")
    monkeypatch.setattr(ours, "named", lambda *what: {("model", "setup"): [("a", "parameter")]}[what])
    monkeypatch.setattr(ours, "made_steps", lambda *what: did.append(("made", *what)))
    engine(run=run, trainer=trainer, parameters=[p])._begin()
    want = [("bind", "parameter", "optimizer", deepspeed), ("made", "zero", 6), ("restore", 1, 2, 3, 6)]
    assert did == [x for x, here in zip(want, (True, deepspeed, saved)) if here] + [("begin",)]
    assert trainer.loss == 0.0


# ---- accelerate ----------------------------------------------------------------------------------


def accelerator(kind="NO", precision="no", deepspeed_config=(), **fields):
    plugin = SimpleNamespace(deepspeed_config=deepspeed_config)
    return SimpleNamespace(
        distributed_type=DistributedType(kind),
        mixed_precision=precision,
        state=SimpleNamespace(deepspeed_plugin=plugin),
        is_fsdp2=True,
        **fields,
    )


@pytest.fixture
def plain(monkeypatch):
    for name in ("FSDP", "DEEPSPEED"):
        monkeypatch.delenv(f"ACCELERATE_USE_{name}", raising=False)


def test_supported_configurations_of_accelerate(plain, monkeypatch):
    for made in (accelerator(), accelerator(parallelism_config=None), accelerator("MULTI_CPU")):
        ours.check_accelerator(made, "float32", "cpu")
    ours.check_accelerator(accelerator(precision="bf16"), "bfloat16", "cpu")
    for name in ("FSDP", "DEEPSPEED"):
        for said in ("1", "true", "True"):
            monkeypatch.setenv(f"ACCELERATE_USE_{name}", said)
            ours.check_accelerator(accelerator(name), "float32", "cuda")
        monkeypatch.setenv(f"ACCELERATE_USE_{name}", "false")
        ours.check_accelerator(accelerator(), "float32", "cuda")


@pytest.mark.parametrize(
    "made, dtype, words",
    [
        (accelerator(precision="bf16"), "float32", "mixed_precision is bf16, dtype is float32"),
        (accelerator(precision="no"), "bfloat16", "mixed_precision is no, dtype is bfloat16"),
        (accelerator(precision="fp16"), "bfloat16", "mixed_precision is fp16, dtype is bfloat16"),
        (accelerator("MEGATRON_LM"), "float32", "splits layers or sequences"),
        (accelerator(parallelism_config="tp"), "float32", "splits layers or sequences"),
        (
            accelerator("DEEPSPEED", deepspeed_config={"optimizer"}),
            "float32",
            "configuration has 'optimizer'",
        ),
        (
            accelerator("DEEPSPEED", deepspeed_config={"scheduler"}),
            "float32",
            "configuration has 'scheduler'",
        ),
    ],
)
def test_unsupported_configurations_of_accelerate(plain, made, dtype, words):
    with pytest.raises(UserError, match=words):
        ours.check_accelerator(made, dtype, "cpu")


def test_a_request_that_accelerate_does_not_follow(plain, monkeypatch):
    old = accelerator("FSDP")
    old.is_fsdp2 = False
    with pytest.raises(UserError, match="fsdp_version is 1; wanted 2"):
        ours.check_accelerator(old, "float32", "cpu")
    for name in ("FSDP", "DEEPSPEED"):
        for said in ("1", "true", "TRUE"):
            monkeypatch.setenv(f"ACCELERATE_USE_{name}", said)
            with pytest.raises(UserError, match=rf"asks for {name}, but .* \(one process, or cpu\)"):
                ours.check_accelerator(accelerator(), "float32", "cpu")
        monkeypatch.delenv(f"ACCELERATE_USE_{name}")


# ---- tensors that train --------------------------------------------------------------------------


def test_a_tensor_is_read_and_restored():
    p = torch.nn.Parameter(torch.arange(6.0).bfloat16())
    optimizer = SimpleNamespace(state={p: {"exp_avg": torch.full((6,), 2.0), "exp_avg_sq": torch.ones(6)}})
    found = moved.Trained("a", "norm", [2, 3])
    assert (found.name, found.kind, found.shape) == ("a", "norm", (2, 3))
    found.bind(p, optimizer, False)
    assert found.value.tolist() == [[0, 1, 2], [3, 4, 5]] and found.value.dtype == np.float32
    assert found.grad.tolist() == [[2, 2, 2], [2, 2, 2]] and found.read("v").tolist() == [[1, 1, 1]] * 2
    m, v = np.full(6, 3, np.float32), np.full(6, 4, np.float32)
    found.restore(np.zeros(6, np.float32), m, v, 9)
    state = optimizer.state[p]
    assert state.keys() == {"step", "exp_avg", "exp_avg_sq"} and state["step"].dtype == torch.float32
    assert state["step"].item() == 9 and state["exp_avg"].tolist() == [3] * 6
    assert state["exp_avg_sq"].tolist() == [4] * 6 and found.value.tolist() == [[0, 1, 2], [3, 4, 5]]
    m[:] = 0
    assert state["exp_avg"].tolist() == [3] * 6  # a copy


def test_a_tensor_under_deepspeed(monkeypatch):
    p = torch.nn.Parameter(torch.zeros(2))
    held = {"value": torch.ones(2), "exp_avg": torch.full((2,), 2.0), "exp_avg_sq": torch.full((2,), 3.0)}

    def write(p, value, name="value"):
        held[name] = value

    fake_module(monkeypatch, "deepspeed")
    fake_module(
        monkeypatch,
        "deepspeed.utils",
        safe_get_full_fp32_param=lambda p: held["value"],
        safe_get_full_optimizer_state=lambda p, name: held[name],
        safe_set_full_fp32_param=write,
        safe_set_full_optimizer_state=write,
    )
    found = moved.Trained("a", "norm", (1, 2))
    found.bind(p, None, True)
    assert [found.read(what).tolist() for what in ("value", "m", "v")] == [[[1, 1]], [[2, 2]], [[3, 3]]]
    found.restore(*(np.full(2, x, np.float32) for x in (7, 8, 9)), 5)
    assert {name: x.tolist() for name, x in held.items()} == {
        "value": [7, 7],
        "exp_avg": [8, 8],
        "exp_avg_sq": [9, 9],
    }


class LoraLayer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lora_A, self.lora_B = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
        self.lora_embedding_A, self.lora_embedding_B = (torch.nn.Parameter(torch.ones(1)) for _ in "AB")


class SomeNorm(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))


class Whole(torch.nn.Module):
    def __init__(self, headless=False):
        super().__init__()
        self.layer, self.norm, self.mlp = LoraLayer(), SomeNorm(), torch.nn.Linear(1, 1)
        self.embed, self.head = torch.nn.Embedding(1, 1), torch.nn.Linear(1, 1, bias=False)
        self.experts, self.frozen = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1).requires_grad_(False)
        self.headless = headless

    def get_output_embeddings(self):
        return None if self.headless else self.head


def test_kinds_of_trained_tensors():
    want = {
        "norm.weight": "norm",
        "layer.lora_A.weight": "lora_A",
        "layer.lora_B.weight": "lora_B",
        "layer.lora_embedding_A": "lora_A",
        "layer.lora_embedding_B": "lora_B",
        "mlp.weight": "linear",
        "mlp.bias": "bias",
        "embed.weight": "embedding",
        "head.weight": "head",
    }
    for headless in (False, True):
        model = Whole(headless)
        found = list(moved._trained(model))
        assert {name: kind for name, kind, _ in found} == want | (
            {"head.weight": "linear"} if headless else {}
        )
        assert all(p is model.get_parameter(name) for name, _, p in found)
    tied = Whole()
    tied.head.weight = tied.embed.weight
    names = [name for name, *_ in moved._trained(tied)]
    assert "head.weight" not in names and "embed.weight" in names and len(names) == len(set(names)) == 8


@pytest.mark.parametrize("deepspeed", [False, True])
def test_training_in_low_precision_needs_deepspeed(monkeypatch, deepspeed):
    import accelerate.state

    kind = DistributedType.DEEPSPEED if deepspeed else DistributedType.NO
    monkeypatch.setattr(accelerate.state, "AcceleratorState", lambda: SimpleNamespace(distributed_type=kind))
    model, check, bound = Whole(), moved.CheckMoved(), []
    monkeypatch.setattr(moved.Trained, "bind", lambda self, *what: bound.append((self, *what)))
    monkeypatch.setattr(moved, "Moved", lambda trained: trained)
    model.norm.weight.ds_shape = (4, 2)
    check.on_train_begin(None, None, None, model=model, optimizer="optimizer")
    shapes = {trained.name: trained.shape for trained in check.moved}
    assert shapes["norm.weight"] == (4, 2) and shapes["mlp.weight"] == (1, 1)
    assert [how[2:] for how in bound] == [("optimizer", deepspeed)] * len(shapes)
    for dtype, word in ((torch.float16, "float16"), (torch.bfloat16, "bfloat16")):
        model.to(dtype)
        if deepspeed:
            check.on_train_begin(None, None, None, model=model, optimizer="optimizer")
        else:
            with pytest.raises(UserError, match=f"lora_A would train in {word}, .*lora_embedding_A"):
                check.on_train_begin(None, None, None, model=model, optimizer="optimizer")


def test_which_steps_are_checked():
    check, told = moved.CheckMoved(), []
    check.moved = SimpleNamespace(waiting={"norm": 1}, check=lambda *what: told.append(what))
    args, state = SimpleNamespace(learning_rate=1.0), SimpleNamespace(global_step=4)

    def step(*rates, **fields):
        told.clear()
        optimizer = SimpleNamespace(param_groups=[{"lr": rate} for rate in rates], **fields)
        check.on_optimizer_step(args, state, None, optimizer=optimizer)
        return told

    assert step(1.0) == [(5, False)] and step(0.5) == [(5, False)] and step(0.1, 0.49) == [(5, True)]
    assert step(0.0, 0.6) == [(5, False)] and step(0.0) == []
    assert step(1.0, step_was_skipped=True) == [] and step(1.0, step_was_skipped=False) == [(5, False)]
    check.moved.waiting = {}
    assert step(1.0) == []
