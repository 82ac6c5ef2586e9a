"""The steps of a run around a fake engine: rows, lines, checkpoints, errors and signals, the result."""

import math
import os
import signal
import types

import numpy as np
import pytest
from engines import Engine, change, made, state, steps, whole

from longlora import __version__, plots, progress
from longlora.errors import UserError
from longlora.files import adapter, card, merge
from longlora.training import metrics, resume
from longlora.training import run as run_

LOSSES = [1.5, 1.25, 0.5, 0.75, 1.0, 0.625, 0.75]


@pytest.fixture(autouse=True)
def pictures(monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "loss", lambda path, rows: drawn.append((path, len(rows))))
    return drawn


def names(run):
    return [os.path.basename(path) for path in resume.found(run.o.output_dir)]


def path(run, step):
    return resume.path_of(run.o.output_dir, step)


# ---- rows and lines ------------------------------------------------------------------------------


def test_the_rows_of_a_run(tmp_path, monkeypatch):
    """A step takes 2 s for 1,001 tokens. The time of evaluations and checkpoints does not count."""
    fields = dict(held=3, eval_steps=2, save_steps=1, warmup_steps=2, gradient_accumulation_steps=2)
    run = made(tmp_path, monkeypatch, max_steps=3, **fields)
    result = whole(run, Engine(run, LOSSES))
    rows = [dict(step=0, eval_loss=1.5, eval_perplexity=math.exp(1.5))]
    for step, share in ((1, 0.5), (2, 1.0), (3, 1.0)):
        row = dict(step=step, loss=2.0 + step - 1, grad_norm=0.5, tokens_per_s=500.5, peak_memory=4321)
        row |= dict(learning_rate=1e-2 * share, embedding_learning_rate=1e-3 * share)
        row |= dict(epoch=2 * step / 8, num_input_tokens_seen=2 * step * 128)
        if step > 1:
            row |= dict(eval_loss=LOSSES[step], eval_perplexity=math.exp(LOSSES[step]))
        rows.append(row)
    assert result.history == rows == metrics.read(run.o.output_dir)
    assert (result.loss, result.eval_loss, result.step) == (4.0, 0.75, 3)
    assert f"before: held-out perplexity {math.exp(1.5):.3f}, dense attention" in run.said


def test_tokens_per_second_have_one_decimal(tmp_path, monkeypatch):
    run = made(tmp_path, monkeypatch, max_steps=1)
    run.start(Engine(run))
    run.begin()
    with run.training():
        run.engine.move()
        run.clock.now += 3
        run.after_step(1.0, 1.0, 1000)
    assert metrics.read(run.o.output_dir)[0]["tokens_per_s"] == 333.3


def test_lines_show_the_time_that_is_left(tmp_path, monkeypatch):
    """A resumed run measures only its own steps, which take 2 s each."""
    first = made(tmp_path, monkeypatch, max_steps=3)
    whole(first, Engine(first))
    run = made(tmp_path, monkeypatch, max_steps=40, logging_steps=2, resume_from_checkpoint="latest")
    whole(run, Engine(run))
    lines = [line for line in run.said if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == [f"{step}/40" for step in range(4, 41, 2)]
    left = [line.rpartition("  ")[2] for line in lines]
    assert left[:2] == ["0:01:12 left", "0:01:08 left"] and left[-1] == "0:00:00 left"


class Bar:
    """A progress bar on a terminal."""

    disable = False

    def __init__(self, **how):
        self.how, self.done, self.words = how, [], []

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        pass

    def update(self, count):
        self.done.append(count)

    def set_postfix_str(self, words):
        self.words.append(words)


def test_a_bar_replaces_the_lines(tmp_path, monkeypatch):
    bars = []
    monkeypatch.setattr(progress, "bar", lambda **how: bars.append(Bar(**how)) or bars[-1])
    first = made(tmp_path, monkeypatch, max_steps=1)
    whole(first, Engine(first))
    fields = dict(held=1, eval_steps=3, resume_from_checkpoint="latest")
    run = made(tmp_path, monkeypatch, max_steps=4, group=dict(writes=True), **fields)
    whole(run, Engine(run, LOSSES))
    assert [bar.how for bar in bars] == [
        dict(total=total, initial=done, desc="training", unit="step", disable=None)
        for total, done in ((1, 0), (4, 1))
    ]
    shown, last = f"{math.exp(LOSSES[3]):.3f}", f"{math.exp(LOSSES[4]):.3f}"
    assert bars[1].done == [1, 1, 1] and bars[1].words == [
        "loss 3.0000, 500 tokens/s",
        f"loss 4.0000, 500 tokens/s, held-out perplexity {shown}",
        f"loss 5.0000, 500 tokens/s, held-out perplexity {last}",
    ]
    assert not [line for line in run.said if line.startswith(("step ", "before: "))]


def test_a_process_that_does_not_write_shows_no_bar(tmp_path, monkeypatch):
    bars = []
    monkeypatch.setattr(progress, "bar", lambda **how: bars.append(Bar(**how)) or bars[-1])
    run = made(tmp_path, monkeypatch, group=dict(writes=False, processes=2, once=lambda function: None))
    whole(run, Engine(run))
    assert bars[0].how["disable"] is True and not os.listdir(run.o.output_dir)


# ---- checkpoints ---------------------------------------------------------------------------------


def test_the_state_and_tensors_of_a_checkpoint(tmp_path, monkeypatch):
    group = dict(processes=2)
    run = made(tmp_path, monkeypatch, save_steps=2, held=1, max_steps=3, seed=5, r=4, group=group)
    engine = Engine(run, LOSSES)
    whole(run, engine)
    assert names(run) == ["checkpoint-2", "checkpoint-3"] and engine.saved == [2, 3]
    found = state(run, 2)
    wanted = dict(global_step=2, max_steps=3, epoch=0.5, position=4, seed=5, version=__version__)
    wanted |= dict(written=5001.0, best_metric=None, best_global_step=None, best_model_checkpoint=None)
    wanted |= run.identity | dict(options=found["options"], log_history=metrics.read(run.o.output_dir)[:3])
    assert found == wanted | dict(held_out="held 1 1 1")
    assert found["options"] == {**run.o.to_dict(), "gradient_accumulation_steps": 2}
    assert run.saved == path(run, 3) and run.saved_step == 3
    tensors = resume.load(path(run, 2))[1]
    assert {name: array.max() for name, array in tensors.items()} == {
        f"{what}.{name}": 2 for what in ("value", "m", "v") for name in "abc"
    }
    written = [
        (os.path.basename(home or directory), values and values["b"][0])
        for directory, values, home in run.models
    ]
    assert written == [("checkpoint-3", None), ("checkpoint-2", 2), ("checkpoint-3", 3), ("out", 3)]


def test_a_resumed_run_goes_on(tmp_path, monkeypatch):
    first = made(tmp_path, monkeypatch, max_steps=4, save_steps=2, held=1)
    whole(first, Engine(first, LOSSES))
    there = path(first, 2)
    run = made(tmp_path, monkeypatch, max_steps=6, held=1, resume_from_checkpoint=there)
    assert (run.step, run.first, run.saved, run.saved_step, run.resumed) == (2, 2, there, 2, there)
    assert sorted(run.tensors) == sorted(f"{what}.{name}" for what in ("value", "m", "v") for name in "abc")
    result = whole(run, Engine(run, LOSSES))
    assert f"resuming: {there}, after step 2" in run.said
    assert [row["step"] for row in result.history] == [0, 1, 2, 3, 4, 5, 6]
    assert names(run) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"] and run.saved == path(run, 6)
    assert result.history[:3] == first.log.rows[:3]


def test_a_finished_run_that_is_resumed_writes_no_checkpoint(tmp_path, monkeypatch):
    first = made(tmp_path, monkeypatch, max_steps=2)
    whole(first, Engine(first))
    run = made(tmp_path, monkeypatch, max_steps=2, resume_from_checkpoint="latest")
    engine = Engine(run)
    assert whole(run, engine).step == 2 and not engine.saved


def test_a_run_that_is_stopped_before_its_first_step_can_go_on(tmp_path, monkeypatch):
    run = made(tmp_path, monkeypatch)
    result = whole(run, Engine(run, sent={0: signal.SIGTERM}))
    assert names(run) == ["checkpoint-0"] and result.stopped == signal.SIGTERM
    assert run.said[-1] == (
        f"stopped by SIGTERM after step 0; go on with --resume-from-checkpoint {path(run, 0)}"
    )


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(global_step=5), "has made 5 steps, more than the 4 of max_steps"),
        (dict(position=3), "its position is sequence 3, but 2 steps use 2"),
        (dict(data="other"), "was trained with other data"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, monkeypatch, changes, words):
    first = made(tmp_path, monkeypatch, max_steps=2)
    whole(first, Engine(first))
    change(first, 2, **changes)
    with pytest.raises(UserError, match=f"^{path(first, 2)}: {words}$"):
        made(tmp_path, monkeypatch, max_steps=4, resume_from_checkpoint="latest")


# ---- the best checkpoint -------------------------------------------------------------------------

BEST = dict(held=1, eval_steps=1, save_steps=1, load_best_model_at_end=True)


def test_the_best_checkpoint_is_the_result(tmp_path, monkeypatch):
    run = made(tmp_path, monkeypatch, max_steps=5, **BEST)
    result = whole(run, Engine(run, LOSSES))
    assert result.best_model_checkpoint == path(run, 2) and run.models[-1][1]["b"][0] == 2
    assert [state(run, step)["best_metric"] for step in (1, 2, 3, 5)] == [1.25, 0.5, 0.5, 0.5]
    assert len(names(run)) == 5
    assert run.said[-1].startswith(f"saved {run.o.output_dir}, the best checkpoint, of step 2; ")


def test_the_last_step_may_be_the_best(tmp_path, monkeypatch):
    """Its checkpoint is not read again."""
    run = made(tmp_path, monkeypatch, max_steps=2, **BEST)
    monkeypatch.setattr(resume, "load", None)
    result = whole(run, Engine(run, LOSSES))
    assert result.best_model_checkpoint == path(run, 2) and run.models[-1][1]["b"][0] == 2


def test_without_load_best_model_the_last_step_is_the_result(tmp_path, monkeypatch):
    run = made(tmp_path, monkeypatch, save_total_limit=1, **BEST | dict(load_best_model_at_end=False))
    result = whole(run, Engine(run, LOSSES))
    assert result.best_model_checkpoint is None and run.models[-1][1]["b"][0] == 4
    assert names(run) == ["checkpoint-4"]
    assert run.said[-1].startswith(f"saved {run.o.output_dir}; ")


def test_earlier_losses_count_only_for_the_same_held_out_sequences(tmp_path, monkeypatch):
    first = made(tmp_path, monkeypatch, max_steps=3, **BEST)
    whole(first, Engine(first, LOSSES))
    run = made(tmp_path, monkeypatch, max_steps=4, resume_from_checkpoint="latest", **BEST)
    assert whole(run, Engine(run, LOSSES)).best_model_checkpoint == path(run, 2)
    assert not [line for line in run.said if "does not count" in line]
    other = BEST | dict(held=2)
    run = made(tmp_path, monkeypatch, max_steps=6, resume_from_checkpoint="latest", **other)
    assert whole(run, Engine(run, LOSSES)).best_model_checkpoint == path(run, 5)
    assert "the best checkpoint so far does not count: other sequences are held out now" in run.said
    run = made(tmp_path, monkeypatch, max_steps=6, resume_from_checkpoint="latest", held=2)
    assert run.best is None  # load_best_model_at_end is off


def test_a_best_checkpoint_of_another_run_is_not_the_result(tmp_path, monkeypatch):
    run = made(tmp_path, monkeypatch, max_steps=3, **BEST)
    engine = Engine(run, LOSSES)
    run.start(engine)
    run.begin()
    steps(run, engine)
    change(run, 2, data="other")
    words = f"^{path(run, 2)}: was trained with other data; the last checkpoint is {path(run, 3)}$"
    with pytest.raises(UserError, match=words):
        run.finish()


# ---- errors and signals --------------------------------------------------------------------------


def test_a_user_error_saves_the_steps_before_it(tmp_path, monkeypatch):
    run = made(tmp_path, monkeypatch)
    words = f"^step 3: no; stopped, the state after step 2 is saved in {path(run, 2)}$"
    with pytest.raises(UserError, match=words):
        whole(run, Engine(run, fails={3: UserError("no")}))
    assert names(run) == ["checkpoint-2"]


def test_an_unexpected_error_in_an_update_saves_nothing(tmp_path, monkeypatch):
    """An update may have changed only some of the parameters."""
    run = made(tmp_path, monkeypatch, save_steps=1)
    with pytest.raises(ZeroDivisionError):
        whole(run, Engine(run, fails={3: ZeroDivisionError()}))
    assert run.said[-1] == f"stopped by an error after step 2; the last checkpoint is {path(run, 2)}"
    assert names(run) == ["checkpoint-1", "checkpoint-2"]
    run = made(tmp_path / "other", monkeypatch)
    with pytest.raises(ZeroDivisionError):
        whole(run, Engine(run, fails={3: ZeroDivisionError()}))
    assert run.said[-1] == "stopped by an error after step 2; nothing was saved" and not names(run)


def test_an_unexpected_error_between_updates_saves_the_steps(tmp_path, monkeypatch):
    run = made(tmp_path, monkeypatch, max_steps=3)
    engine = Engine(run)
    run.start(engine)
    run.begin()
    with pytest.raises(MemoryError), run.training():
        with run.updating():
            engine.move()
        run.clock.now += 2
        run.after_step(1.0, 1.0, 1)
        raise MemoryError
    words = f"stopped by an error after step 1; the state after step 1 is saved in {path(run, 1)}"
    assert run.said[-1] == words and names(run) == ["checkpoint-1"]


def test_a_saved_step_is_not_saved_again_after_an_error(tmp_path, monkeypatch):
    run = made(tmp_path, monkeypatch, save_steps=2)
    engine = Engine(run, fails={3: UserError("no")})
    with pytest.raises(UserError, match=f"^step 3: no; stopped, the last checkpoint is {path(run, 2)}$"):
        whole(run, engine)
    assert engine.saved == [2]


def test_one_process_of_a_group_saves_nothing_after_an_error(tmp_path, monkeypatch):
    run = made(tmp_path, monkeypatch, group=dict(processes=2))
    with pytest.raises(UserError, match="^step 3: no; stopped, nothing was saved$"):
        whole(run, Engine(run, fails={3: UserError("no")}))


def test_an_error_while_saving_after_an_error_is_reported(tmp_path, monkeypatch):
    run = made(tmp_path, monkeypatch, save_steps=1)
    engine = Engine(run, fails={3: UserError("no")})
    save = resume.save

    def fail(output_dir, state, *rest):
        if state["global_step"] == 2:
            raise UserError("full")
        return save(output_dir, state, *rest)

    monkeypatch.setattr(resume, "save", fail)
    words = (
        f"^full; stopped, and the state after step 2 could not be saved \\(full\\); the last checkpoint is "
        f"{path(run, 1)}$"
    )
    with pytest.raises(UserError, match=words):
        whole(run, engine)


def test_an_interrupt_reports_what_is_saved(tmp_path, monkeypatch):
    run = made(tmp_path, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        whole(run, Engine(run, fails={2: KeyboardInterrupt()}))
    assert run.said[-1] == "ended at once after step 1; nothing was saved" and not names(run)


@pytest.mark.parametrize("error", [UserError("no held-out data"), OSError("no disk")])
def test_a_step_whose_evaluation_fails_is_saved_with_its_row(tmp_path, monkeypatch, error):
    run = made(tmp_path, monkeypatch, held=1, eval_steps=2)
    with pytest.raises(type(error), match=str(error)):
        whole(run, Engine(run, [1.5, 0, error]))
    assert [row["step"] for row in state(run, 2)["log_history"]] == [0, 1, 2]
    assert "eval_loss" not in metrics.read(run.o.output_dir)[-1]


@pytest.mark.parametrize(
    "warmup, step", [(0, 1), (2, 1), (4, 2), (5, 3)], ids=["none", "half", "a quarter", "a fifth"]
)
def test_untrained_kinds_are_reported_from_half_of_the_peak_rate_on(tmp_path, monkeypatch, warmup, step):
    """Only lora_A moves here; the norms have a gradient but stay."""
    run = made(tmp_path, monkeypatch, max_steps=6, warmup_steps=warmup)
    engine = Engine(run)

    def move():
        engine.parameters[0].value += 1

    engine.move = move
    with pytest.raises(
        UserError, match=f"^step {step}: norm does not train: .*; stopped, nothing was saved$"
    ):
        whole(run, engine)
    assert not names(run)


def test_a_signal_ends_a_run_after_its_step(tmp_path, monkeypatch, pictures):
    run = made(tmp_path, monkeypatch, save_steps=2)
    engine = Engine(run, sent={2: signal.SIGUSR1})
    result = whole(run, engine)
    assert engine.saved == [2] and names(run) == ["checkpoint-2"]  # not again at the end
    assert (result.step, result.stopped, result.best_model_checkpoint) == (2, signal.SIGUSR1, None)
    assert run.said[-1] == (
        f"stopped by SIGUSR1 after step 2; go on with --resume-from-checkpoint {path(run, 2)}"
    )
    assert run.models[-1][2] == path(run, 2)  # of the checkpoint; no final model is written
    assert pictures == [(os.path.join(run.o.output_dir, "loss.png"), 2)]


def test_a_signal_in_the_last_step_changes_nothing(tmp_path, monkeypatch):
    run = made(tmp_path, monkeypatch, max_steps=2)
    result = whole(run, Engine(run, sent={2: signal.SIGTERM}))
    assert result.stopped is None and run.said[-1] == f"saved {run.o.output_dir}"
    assert run.models[-1][0] == run.o.output_dir


def test_a_stopped_run_reports_no_best_checkpoint(tmp_path, monkeypatch):
    run = made(tmp_path, monkeypatch, **BEST)
    result = whole(run, Engine(run, LOSSES, sent={2: signal.SIGTERM}))
    assert result.best_model_checkpoint is None and result.eval_loss == 0.5


def test_a_result_has_keys_and_attributes(tmp_path, monkeypatch, pictures):
    run = made(tmp_path, monkeypatch, max_steps=2)
    result = whole(run, Engine(run))
    assert sorted(result) == sorted(
        ["output_dir", "step", "loss", "eval_loss", "best_model_checkpoint", "stopped", "history"]
    )
    assert result.output_dir == result["output_dir"] == str(tmp_path / "out") and result.eval_loss is None
    assert result.loss == 3.0 and result.history == run.log.rows and len(pictures) == 1


def test_reports_get_the_rows_and_are_closed(tmp_path, monkeypatch):
    events = []

    class Reports:
        def __init__(self, o, names, say):
            assert list(names) == ["one"]

        log = events.append
        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *unused: None  # noqa: E731

        def close(self):
            events.append("closed")

    monkeypatch.setattr(run_.reporters, "chosen", lambda wanted: ["one"])
    monkeypatch.setattr(run_.reporters, "Reports", Reports)
    run = made(tmp_path, monkeypatch, max_steps=2, held=1)
    result = whole(run, Engine(run, LOSSES))
    assert events == [*result.history, "closed"]


# ---- the model -----------------------------------------------------------------------------------


def written(tmp_path, monkeypatch, lora, base):
    """A run, and a list of the calls that write its model: function, arguments."""
    found = []

    def record(module, name):
        monkeypatch.setattr(module, name, lambda *given: found.append((name, *given)) or name)

    for module, name in ((adapter, "save"), (merge, "save_merged"), (card, "merged"), (card, "write")):
        record(module, name)
    source = types.SimpleNamespace(base=base, tokenizer="t", dtype="bfloat16", beside={}, fingerprint="f")
    source.adapter_fingerprint = None
    run = made(tmp_path, monkeypatch, source=source)
    run.setup.lora, run.setup.raw = lora, {"raw": 1}
    del run.write_model
    return run, found


def test_an_adapter_is_written_with_its_home(tmp_path, monkeypatch):
    run, found = written(tmp_path, monkeypatch, "lora", "base")
    run.write_model("here", {"a": 1}, "home")
    assert found == [("save", "here", {"a": 1}, "lora", "base", {"raw": 1}, "t", "home")]


@pytest.mark.parametrize("home, name", [(None, "here"), ("there/checkpoint-2", "checkpoint-2")])
def test_the_card_of_a_whole_model_has_its_final_name(tmp_path, monkeypatch, home, name):
    base = types.SimpleNamespace(dtype=lambda name: f"dtype of {name}")
    run, found = written(tmp_path, monkeypatch, None, base)
    values = {"a": np.arange(3.0)}
    run.write_model("some/here", values, home)
    (saved, directory, read, *rest), merged, wrote = found
    assert (saved, directory, rest) == ("save_merged", "some/here", [{"raw": 1}, "t", "bfloat16", {}])
    assert read("a") is values["a"]
    kept = "dtype of model.embed_tokens.weight"
    assert merged == ("merged", base, "some/here", run.setup.config, name, kept, None)
    assert wrote == ("write", "some/here", "merged")


def test_a_model_from_random_weights_has_no_card(tmp_path, monkeypatch):
    run, found = written(tmp_path, monkeypatch, None, None)
    run.write_model("here", None)
    assert found == [("save_merged", "here", None, {"raw": 1}, "t", "bfloat16", {})]
