"""The rules of a run before its steps: rates, length, what is due, what resuming may change, what it says."""

import types

import pytest
from engines import Engine, Parameter, made
from test_resume import FREE, KEPT, OF_ANSWERS

from longlora import disk
from longlora.errors import UserError
from longlora.files import base_folder
from longlora.training import options
from longlora.training.run import length, peak_rate, same_run, values_of


@pytest.mark.parametrize(
    "kind, rate",
    [
        *((kind, 1e-3) for kind in ("embedding", "head", "norm")),
        *((kind, 1e-2) for kind in ("lora_A", "lora_B", "linear", "bias")),
    ],
)
def test_embedding_head_and_norms_have_a_rate_of_their_own(kind, rate):
    o = options.TrainOptions(learning_rate=1e-2, embedding_learning_rate=1e-3)
    assert peak_rate(o, kind) == rate


@pytest.mark.parametrize(
    "fields, sequences, each, wanted",
    [
        (dict(max_steps=1), 100, 4, (1, 0)),
        (dict(max_steps=7, num_train_epochs=9), 100, 4, (7, 0)),
        (dict(max_steps=-1), 100, 4, (25, 0)),
        (dict(max_steps=-1), 101, 4, (26, 0)),
        (dict(max_steps=-1, num_train_epochs=2.5), 10, 4, (7, 0)),
        (dict(max_steps=-1), 1, 4, (1, 0)),
        (dict(max_steps=-1, num_train_epochs=1e-9), 1, 4, (1, 0)),
        (dict(max_steps=20, warmup_steps=1.0), 1, 1, (20, 1)),
        (dict(max_steps=20, warmup_steps=3.0), 1, 1, (20, 3)),
        (dict(max_steps=20, warmup_steps=0.25), 1, 1, (20, 5)),
        (dict(max_steps=20, warmup_steps=0.01), 1, 1, (20, 1)),
    ],
)
def test_the_number_of_steps_and_of_warm_up_steps(fields, sequences, each, wanted):
    assert length(options.TrainOptions(**fields), sequences, each) == wanted


def test_values_are_taken_from_the_optimizer_state():
    assert values_of({"value.a": 1, "m.a": 2, "v.a": 3, "value.value.b": 4}) == {"a": 1, "value.b": 4}


# ---- what a resumed run may change ---------------------------------------------------------------

IDENTITY = dict(template=None, data="d", base="b", adapter=None, schedule=[0, None])


def refusal(state, identity=IDENTITY, o=None):
    """The error of same_run for a checkpoint, or None."""
    o = o or options.TrainOptions(**options.OF_TEXT)
    try:
        same_run({"options": o.to_dict(), **IDENTITY, **state}, identity, o, "there")
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    "changed, words",
    [
        (dict(data="other"), "with other data"),
        (dict(base="other"), "with another base model"),
        (
            dict(adapter="other"),
            "with another start: give the adapter that it started from, or none if there was none",
        ),
        (dict(schedule=[0, 7]), "with a schedule of another warm-up or length"),
        (
            dict(template="t"),
            "on questions and answers, the data are text; to train its result further give it as the adapter",
        ),
    ],
)
def test_a_resumed_run_must_have_the_same_data_start_and_schedule(changed, words):
    assert refusal({}) is None
    assert refusal(changed) == f"there: was trained {words}"


def test_a_resumed_run_must_have_the_same_form_of_data():
    asks = IDENTITY | dict(template="t")
    assert refusal(asks, asks) is None
    assert refusal(asks | dict(template="u"), asks) == (
        "there: was trained with another chat template or train_on_inputs"
    )
    assert refusal({}, asks).startswith("there: was trained on text, the data are questions and answers; ")


def test_every_option_is_compared_or_free():
    o = options.TrainOptions(**options.OF_TEXT)
    for name, value in o.to_dict().items():
        given = {"options": o.to_dict() | {name: "another"}}
        if name in (*FREE, "chat_template"):  # the content of a template is compared
            assert refusal(given) is None, name
        else:
            assert name in (*KEPT, *OF_ANSWERS), name
            assert refusal(given) == f"there: was trained with {name} 'another', got {value!r}"


def test_an_option_that_a_checkpoint_lacks_has_its_default():
    for changed, words in (
        ({}, None),
        (dict(r=4), "r 8, got 4"),
        (dict(packing_boundaries="document"), "packing_boundaries 'none', got 'document'"),
    ):
        o = options.TrainOptions(**options.OF_TEXT | changed)
        assert refusal({"options": {}}, o=o) == (words and f"there: was trained with {words}")


# ---- before the first step -----------------------------------------------------------------------


def test_what_is_due_after_each_step(tmp_path, monkeypatch):
    def due(**fields):
        """For each step: e if it evaluates, s if it saves, l if it logs."""
        run, found = made(tmp_path, monkeypatch, max_steps=6, **fields), []
        for run.step in range(6):
            due = run.due()
            found.append("e" * due.evaluates + "s" * due.saves + "l" * due.logs)
            assert {type(x) for x in vars(due).values()} == {bool}
        return " ".join(word or "-" for word in found)

    assert due(held=2, eval_steps=4, save_steps=3, logging_steps=5) == "- - s el l el"
    assert due(held=2, logging_steps=4) == "- - - l - el"
    assert due(held=0, eval_steps=4, save_steps=2, logging_steps=5) == "- s - s l l"
    assert due(logging_steps=9) == "- - - - - l"
    assert due() == "l l l l l l"


def test_rates_are_those_of_the_next_step(tmp_path, monkeypatch):
    run = made(tmp_path, monkeypatch, max_steps=4, warmup_steps=2, lr_scheduler_type="linear")
    for run.step, share in enumerate((1 / 2, 1, 2 / 3, 1 / 3)):
        assert run.share(run.step + 1) == pytest.approx(share)
        assert run.rate("lora_B") == pytest.approx(1e-2 * share)
        assert run.rate("norm") == pytest.approx(1e-3 * share)


@pytest.mark.parametrize(
    "held, most, wanted", [(0, None, 0), (0, 3, 0), (5, None, 5), (5, 2, 2), (5, 9, 5), (1, None, 1)]
)
def test_max_eval_samples_limits_what_is_evaluated(tmp_path, monkeypatch, held, most, wanted):
    assert made(tmp_path, monkeypatch, held=held, max_eval_samples=most).evaluated == wanted


def test_a_group_of_processes_shares_the_sequences_of_a_step(tmp_path, monkeypatch):
    fields = dict(per_device_train_batch_size=2, gradient_accumulation_steps=3, max_steps=-1)
    run = made(tmp_path, monkeypatch, sequences=50, group=dict(processes=4), **fields)
    assert (run.each, run.steps, run.alone.gradient_accumulation_steps) == (24, 3, 12)
    run.step = 2
    assert run.position == 48 and run.o.gradient_accumulation_steps == 3
    alone = made(tmp_path, monkeypatch, sequences=50, **fields)
    assert (alone.each, alone.processes, alone.writes) == (6, 1, True)


def test_the_identity_of_a_run(tmp_path, monkeypatch):
    identity = dict(template=None, data="the text", base="the base", adapter=None)
    constant = made(tmp_path, monkeypatch, warmup_steps=3)
    assert constant.identity == identity | dict(schedule=[3, None])
    source = types.SimpleNamespace(fingerprint="f", adapter_fingerprint="a")
    fields = dict(source=source, template="t", lr_scheduler_type="cosine", max_steps=9)
    cosine = made(tmp_path, monkeypatch, **fields)
    assert cosine.identity == dict(template="t", data="the text", base="f", adapter="a", schedule=[0, 9])


# ---- what it says --------------------------------------------------------------------------------


def described(run, *parameters):
    found = Engine(run).parameters if not parameters else parameters
    return list(run._describe(found))


def test_a_run_describes_itself(tmp_path, monkeypatch):
    fields = dict(group_size=32, warmup_steps=1, held=1, per_device_train_batch_size=2, max_steps=1200)
    run = made(tmp_path, monkeypatch, gradient_accumulation_steps=3, **fields)
    assert described(run) == [
        "attention: S2 split, group 32 of 128 tokens, 2/4 heads shifted by 16; evaluation is dense",
        "trainable: lora_A 6, norm 12; total 18",
        "rope: fake",
        "data: 8 fake sequences; evaluated on 1 sequence",
        "steps: 1,200 of 2 x 3 x 128 = 768 tokens; learning rate 0.01, embedding, head and norms 0.001, "
        "constant after 1 step of warm-up",
    ]


def test_a_dense_run_of_an_adapter_in_a_group_describes_itself(tmp_path, monkeypatch):
    fields = dict(attention="dense", adapter="given", r=4, lora_alpha=2.5, lr_scheduler_type="linear")
    run = made(tmp_path, monkeypatch, group=dict(processes=2), **fields)
    found = Parameter("x", "lora_A", 40, 50), Parameter("y", "lora_A", 3), Parameter("z", "lora_B", 8)
    assert described(run, *found) == [
        "attention: dense causal, 4 heads",
        "adapter: given is trained further, r 4, alpha 2.5",
        "trainable: lora_A 2,003, lora_B 8; total 2,011",
        "rope: fake",
        "data: 8 fake sequences",
        "steps: 4 of 2 x 1 x 1 x 128 = 256 tokens by 2 processes; learning rate 0.01, embedding, head and "
        "norms 0.001, linear",
    ]


@pytest.mark.parametrize(
    "sequences, fields, few",
    [(9, dict(max_steps=-1), True), (10, dict(max_steps=-1), False), (50, dict(max_steps=3), False)],
)
def test_few_steps_get_a_hint(tmp_path, monkeypatch, sequences, fields, few):
    lines = described(made(tmp_path, monkeypatch, sequences=sequences, **fields))
    wanted = "few steps: a larger num_train_epochs or a smaller sequence_length makes more"
    assert (lines[-1] == wanted) == few


def test_a_start_says_its_memory_and_writes_options_and_metrics(tmp_path, monkeypatch):
    run = made(tmp_path, monkeypatch)
    run.start(Engine(run), "memory: little")
    assert run.said == [*described(run), "memory: little"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["metrics.jsonl", "options.yaml"]
    ((directory, values, home),) = run.models  # the rehearsal
    assert values is None and home == str(tmp_path / "out" / "checkpoint-4")
    assert directory.startswith(str(tmp_path / "out" / ".rehearsal."))
    again = made(tmp_path, monkeypatch, resume_from_checkpoint="latest")
    again.start(Engine(again))
    assert again.said == [*described(again), "resuming: no checkpoint yet, from the start"]


def test_one_process_of_a_group_writes(tmp_path, monkeypatch):
    asked = []
    group = dict(processes=2, writes=False, once=asked.append)
    run = made(tmp_path, monkeypatch, report_to=["tensorboard"], group=group)
    run.start(Engine(run))
    assert not list((tmp_path / "out").iterdir()) and len(asked) == 2 and not run.reports._open


@pytest.mark.parametrize("free, fits", [(12 * 18 - 1, False), (12 * 18, True), (None, True), (0, False)])
def test_a_checkpoint_needs_twelve_bytes_for_each_number(tmp_path, monkeypatch, free, fits):
    """Value, m and v of each of the 18 numbers take 4 bytes."""
    run = made(tmp_path, monkeypatch)
    monkeypatch.setattr(disk, "free", lambda folder: free)
    if fits:
        run.start(Engine(run))
    else:
        words = "out: a checkpoint takes more than 0.0 MiB, its disk has 0.0 MiB free"
        with pytest.raises(UserError, match=words):
            run.start(Engine(run))
        run = made(tmp_path, monkeypatch)
        run.step = run.steps  # no checkpoint is left to write
        run.start(Engine(run))


@pytest.mark.parametrize("lora", [None, "lora"])
def test_the_base_folder_is_checked_only_for_an_adapter(tmp_path, monkeypatch, lora):
    looked = []
    monkeypatch.setattr(base_folder, "check", looked.append)
    run = made(tmp_path, monkeypatch)
    run.setup.lora = lora
    run.start(Engine(run))
    assert looked == ([run.o.output_dir] if lora else [])
