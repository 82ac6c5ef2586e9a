"""Memory plans of round sizes: totals, texts, the first choice that fits, and the changes that would help."""

import pytest
import tiny

from longlora import job
from longlora.decoder import generation_plan
from longlora.decoder.config import read_config
from longlora.memory import plan as plan_
from longlora.memory.plan import GenerationPlan, Plan, choose, what_would_fit

PARTS = {"weights": 1 << 30, "a longer name": 1 << 29}
GIB = 1 << 30


def generation(**fields):
    given = dict(config="c", dtype="bfloat16", cache_dtype="float16", context=100, rows=3, device="cpu")
    return GenerationPlan(**{**given, "memory": 3 << 29, "parts": PARTS, **fields})


def training(**fields):
    given = dict(config="c", dtype="bfloat16", batch_size=2, sequence_length=64, group_size=16, lora="l")
    return Plan(**{**given, "checkpointing": "full", "memory": 3 << 29, "parts": PARTS, **fields})


def test_a_plan_that_needs_all_the_memory_fits():
    assert generation().total == 3 << 29
    for memory, fits in ((3 << 29, True), ((3 << 29) - 1, False)):
        assert generation(memory=memory).fits is training(memory=memory).fits is fits


def test_the_text_of_a_plan():
    assert generation().text().splitlines() == [
        "weights            1.000 GiB",
        "a longer name      0.500 GiB",
        "total              1.500 GiB",
        "3 x 100 tokens, cache in float16: fits; 1.500 GiB are available",
    ]
    tight = training(memory=GIB, device="cuda:1", changes=("this: 1 GiB", "that: 2 GiB"))
    assert tight.text().splitlines()[3:] == [
        "checkpointing full: does not fit; 1.000 GiB are available on cuda:1",
        "  this: 1 GiB",
        "  that: 2 GiB",
    ]


def test_a_plan_as_json():
    sizes = dict(parts=PARTS, total=3 << 29, memory=GIB, fits=False, changes=["this"])
    plan = generation(memory=GIB, changes=("this",), device="cuda:0")
    how = dict(dtype="bfloat16", cache_dtype="float16", context=100, rows=3)
    assert plan.to_json() == {**how, **sizes, "device": "cuda:0"}
    how = dict(dtype="bfloat16", batch_size=2, sequence_length=64, group_size=16, checkpointing="full")
    for lora, kind in (("l", "lora"), (None, "full")):
        plan = training(memory=GIB, changes=("this",), lora=lora)
        assert plan.to_json() == {**how, **sizes, "training": kind, "device": "cpu"}


def test_a_plan_does_not_print_its_config():
    for plan in (generation(), training()):
        assert plan.fits and "config" not in repr(plan)


def test_the_first_choice_that_fits_is_taken_or_else_the_last():
    choices = [("none", {"a": 6, "b": 4}), ("minimal", {"a": 5}), ("full", {"a": 2, "b": 1})]
    for memory, name in (
        (11, "none"),
        (10, "none"),
        (9, "minimal"),
        (5, "minimal"),
        (3, "full"),
        (0, "full"),
    ):
        assert choose(iter(choices), memory) == (name, dict(choices)[name])


def test_choices_after_the_first_that_fits_are_not_computed():
    def alternatives():
        yield "first", {"a": 1}
        raise AssertionError("computed")

    assert choose(alternatives(), 1)[0] == "first"


@pytest.mark.parametrize(
    "memory, changes",
    [
        (400, ["4 rows: 400.000 GiB", "--dtype bfloat16: 400.000 GiB", "--context 50: 400.000 GiB"]),
        (399, ["2 rows: 200.000 GiB"]),
        (200, ["2 rows: 200.000 GiB"]),
        (199, ["2 rows and --dtype bfloat16: 100.000 GiB"]),
        (100, ["2 rows and --dtype bfloat16: 100.000 GiB"]),
        (50, ["2 rows and --dtype bfloat16 and --context 50: 50.000 GiB"]),
        (49, ["nothing: 2 rows and --dtype bfloat16 and --context 50 still need 50.000 GiB"]),
    ],
)
def test_what_would_fit(memory, changes):
    """8 rows of 100 tokens in float32 take 800 GiB. Changes are combined only if no single one is enough."""

    def total(rows=8, dtype="float32", context=100):
        return rows * context * {"float32": GIB, "bfloat16": GIB // 2}[dtype]

    steps = [
        ("4 rows", "rows", 4),
        ("2 rows", "rows", 2),
        ("--dtype bfloat16", "dtype", "bfloat16"),
        ("--context 50", "context", 50),
    ]
    assert what_would_fit(total, iter(steps), memory * GIB) == tuple(changes)


def test_nothing_is_left_to_change():
    wanted = "nothing: the smallest settings still need 2.000 GiB"
    assert what_would_fit(lambda: 2 * GIB, [], GIB) == (wanted,)


def test_the_memory_of_the_process_is_measured_once(monkeypatch):
    before = plan_.own_memory()
    monkeypatch.setattr(job, "resident_memory", lambda: 12345)
    assert plan_.own_memory() == before and plan_.own_memory.__wrapped__() == 12345


def test_the_process_may_grow_by_a_few_mebibytes():
    """Threads and modules take them. A plan with more would refuse runs that fit."""
    plan = generation_plan.plan(read_config(tiny.CONFIG), context=8, memory=1 << 40)
    assert 4 << 20 < plan.parts["runtime"] - plan_.own_memory() < 24 << 20 and plan.fits
