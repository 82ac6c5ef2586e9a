"""The model and the Trainer that TorchEngine makes, with fakes of both."""

import contextlib
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest

from longlora.decoder.lora import LoraConfig

torch = pytest.importorskip("torch", reason="longlora.torch is for torch")
pytest.importorskip("accelerate", reason="Trainer needs accelerate")
ours = pytest.importorskip(
    "longlora.torch.trainer", reason="longlora.torch.train needs transformers and peft"
)
A, B, NORM = "layers.0.q_proj.lora_A.weight", "layers.0.q_proj.lora_B.weight", "norm.weight"
SHAPES = {A: (3, 16), B: (8, 3), NORM: (16,)}


class Lora(LoraConfig):
    def tensor_shapes(self, config):
        return SHAPES


# ---- the model -----------------------------------------------------------------------------------


@pytest.fixture
def built(monkeypatch):
    """A function that builds a model with fakes, and returns what was called. No weight is read."""
    parameters = [(name, torch.nn.Parameter(torch.full(shape, 9.0))) for name, shape in SHAPES.items()]
    config = SimpleNamespace(tie_word_embeddings=False)
    lora = dict(r=3, lora_alpha=7, target_modules=("q_proj",), modules_to_save=("norm",), use_rslora=True)

    def build(start=None, tied=False, attention=None, **fields):
        called = SimpleNamespace(drawn=[])
        known = {name: fields.pop(name) for name in list(fields) if name in lora}
        options = dict(model="m", dtype="bfloat16", adapter=None, target_length=64, rope_type="yarn")
        o = SimpleNamespace(**options | dict(sequence_length=32, seed=5) | fields)

        def note(name, result):
            return lambda *given, **how: setattr(called, name, (given, how)) or result

        def draw(name, seed, out, bound):
            called.drawn.append((name, seed, bound))
            out.fill(2.0)

        monkeypatch.setattr(ours, "opened", lambda model: (f"path of {model}", {"gguf_file": "f"}))
        monkeypatch.setattr(ours, "positions", note("positions", "the positions" if o.adapter else None))
        monkeypatch.setattr(ours.AutoModelForCausalLM, "from_pretrained", note("opened", "a model"))
        monkeypatch.setattr(ours, "extend", note("extended", "extended"))
        monkeypatch.setattr(ours, "configure", note("configured", "configured"))
        monkeypatch.setattr(ours, "ExtendedModel", note("wrapped", "wrapped"))
        monkeypatch.setattr(ours, "named", note("named", parameters))
        monkeypatch.setattr(ours, "swap", note("swapped", None))
        monkeypatch.setattr(ours.Model, "draw", draw)
        config.tie_word_embeddings = tied
        called.setup = SimpleNamespace(lora=Lora(**lora | known), config=config, attention=attention)
        called.model = ours.build(o, called.setup, start)
        called.values = {name: p.detach().numpy().copy() for name, p in parameters}
        return called

    return build


def test_a_model_is_extended(built):
    found = built(attention=dict(group_size=8, boundary="wrap", shift="all"))
    assert found.model == "extended" and found.swapped == (("extended",), {})
    where, how = found.opened
    (dtype,) = how.keys() & {"dtype", "torch_dtype"}  # the name since transformers 4.56, and before
    assert where == ("path of m",) and how == {
        dtype: torch.bfloat16,
        "gguf_file": "f",
        "attn_implementation": "longlora_s2",
    }
    (base, length), how = found.extended
    lora = how.pop("lora")
    assert (base, length) == ("a model", 64)
    assert how == dict(rope="yarn", group_size=8, boundary="wrap", shift="all")
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.use_rslora) == (3, 7, 0.0, True)
    assert lora.task_type == "CAUSAL_LM" and set(lora.target_modules) == {"q_proj"}
    assert lora.modules_to_save == ["norm"] and not lora.ensure_weight_tying
    assert found.named == (("extended", found.setup), {})
    # PEFT draws A uniformly, up to 1 / sqrt(16). B is 0 in a new adapter, and norms are the base's.
    assert found.drawn == [(A, 5, 0.25)]
    assert (found.values[A] == 2).all() and (found.values[B] == 9).all() and (found.values[NORM] == 9).all()


@pytest.mark.parametrize(
    "version, name", [("4.55.4", "torch_dtype"), ("4.56.0", "dtype"), ("5.0.0", "dtype")]
)
def test_the_name_of_the_dtype_depends_on_the_version(built, monkeypatch, version, name):
    monkeypatch.setattr(ours.transformers, "__version__", version)
    _, how = built().opened
    assert how.keys() & {"dtype", "torch_dtype"} == {name}


def test_a_model_keeps_its_positions(built):
    """Without a target length, or those of an adapter. Dense attention is one group."""
    for fields in (dict(target_length=None), dict(adapter="an adapter")):
        found = built(**fields)
        assert found.model == "wrapped" and found.wrapped[0][0] == "configured"
        assert found.wrapped[0][1].r == 3
        assert found.configured == (("a model",), dict(group_size=32, boundary="split", shift="none"))
        given = found.opened[1]
        assert given.get("config") == ("the positions" if "adapter" in fields else None)
    assert found.positions[0][:2] == ("an adapter", "path of m")


def test_a_model_starts_from_the_tensors_of_a_run(built):
    start = {name: np.full(shape, i, np.float32) for i, (name, shape) in enumerate(SHAPES.items())}
    found = built(start)
    assert found.drawn == [] and all(np.array_equal(found.values[name], start[name]) for name in SHAPES)


@pytest.mark.parametrize(
    "modules, tied, whole, tying",
    [
        (("embed_tokens", "lm_head"), False, ["embed_tokens", "lm_head"], False),
        (("lm_head",), True, ["embed_tokens"], True),
        (("embed_tokens", "norm"), True, ["embed_tokens", "norm"], True),
        (("norm",), True, ["norm"], False),
        ((), True, None, False),
    ],
)
def test_a_tied_head_trains_as_the_embedding(built, modules, tied, whole, tying):
    lora = built(modules_to_save=modules, tied=tied).extended[1]["lora"]
    assert lora.modules_to_save == whole and bool(lora.ensure_weight_tying) is tying


# ---- the engine ----------------------------------------------------------------------------------


@dataclass
class Policy:
    output_dtype: object = "bfloat16"
    param_dtype: object = "bfloat16"


@pytest.fixture
def engine(monkeypatch):
    """A function that makes the engine of a run. It returns the engine and what was called."""

    def make(fsdp=False, dtype="float32", **fields):
        called, did = {}, []
        accelerator = SimpleNamespace(state=SimpleNamespace())
        accelerator.state.fsdp_plugin = SimpleNamespace(mixed_precision_policy=Policy())

        def steps(*given, **how):
            called["steps"] = given, how
            return SimpleNamespace(
                accelerator=accelerator,
                is_fsdp_enabled=fsdp,
                remove_callback=lambda kind: did.append(kind),
                train=lambda: did.append("train"),
            )

        monkeypatch.setattr(ours, "Steps", steps)
        monkeypatch.setattr(ours, "build", lambda *given: called.update(build=given) or "the model")
        monkeypatch.setattr(ours, "Places", lambda *given: ("places", *given))
        monkeypatch.setattr(ours, "check_accelerator", lambda *given: called.update(check=given))
        monkeypatch.setattr(ours, "batch", lambda *given: given)
        weights = [SimpleNamespace(kind="q", members=(A, B)), SimpleNamespace(kind="norm", members=(NORM,))]
        monkeypatch.setattr(ours, "Network", lambda *given: SimpleNamespace(weights=lambda: weights))
        run = SimpleNamespace(
            o=SimpleNamespace(dtype=dtype, seed=3),
            setup=SimpleNamespace(config="config", lora=Lora(), multiple=4),
            source=SimpleNamespace(adapter="the adapter"),
            **dict(steps=10, step=4, tensors=None, corpus="corpus", position=8, each=2) | fields,
        )
        run.start = lambda engine: did.append(("start", engine))
        run.finish = lambda: did.append("finish") or "the result"
        run.training = contextlib.nullcontext
        args = SimpleNamespace(device=torch.device("cpu"))
        return ours.TorchEngine(run, args), SimpleNamespace(did=did, accelerator=accelerator, **called)

    return make


def test_the_trainer_of_a_run(engine):
    made, called = engine()
    assert [(p.name, p.kind, p.shape) for p in made.parameters] == [
        (A, "q", (3, 16)),
        (B, "q", (8, 3)),
        (NORM, "norm", (16,)),
    ]
    run, args = made.run, made.args
    assert called.build == (run.o, run.setup, "the adapter") and run.source.adapter is None
    (given, kinds), how = called.steps
    assert given is run and kinds == {A: "q", B: "q", NORM: "norm"}
    assert args.max_steps == 6 and how["args"] is args and how["model"] == "the model"
    (callback,) = how["callbacks"]
    assert (callback.begin, callback.updates, callback.after_step) == (
        made._begin,
        made._updates,
        made._after_step,
    )
    assert how["train_dataset"] == ("places", "corpus", 3, 8, 12)  # from the position on, two for each step
    assert how["data_collator"]([1, 2]) == ("corpus", [1, 2], 4)
    assert called.check == (called.accelerator, "float32", "cpu")
    assert made.signal() is None and called.did == [ours.transformers.PrinterCallback]
    called.did.clear()
    assert made.train() == "the result" and called.did == [("start", made), "train", "finish"]


def test_a_run_goes_on_from_its_checkpoint(engine):
    saved = {f"value.{name}": i for i, name in enumerate(SHAPES)} | {f"m.{A}": 7}
    made, called = engine(tensors=saved)
    assert called.build[2] == {A: 0, B: 1, NORM: 2}
    made, called = engine(tensors=saved, step=10)  # all its steps are made
    assert made.trainer is None and made.run.source.adapter is None and not hasattr(called, "build")
    assert made.train() == "the result" and called.did == [("start", made), "finish"]


@pytest.mark.parametrize("fsdp", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loss_stays_float32_under_fsdp(engine, fsdp, dtype):
    _, called = engine(fsdp, dtype)
    policy = called.accelerator.state.fsdp_plugin.mixed_precision_policy
    assert policy == Policy(output_dtype=None if fsdp and dtype == "bfloat16" else "bfloat16")
