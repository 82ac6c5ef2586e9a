"""load_best_model_at_end: which checkpoint is the best, that it stays, and that it is the result."""

import json
import math
import shutil

import pytest
from runs import equal, failure, numbers, run, weights

from longlora.errors import UserError
from longlora.training import best, options, resume
from longlora.training.driver import Driver

HELD = dict(eval_fraction=0.1, eval_steps=1, save_steps=1, load_best_model_at_end=True)


@pytest.fixture
def losses(monkeypatch):
    """The held-out losses that the driver finds: one before the first step, then one for each step."""
    given = [9.0, 5.0, 3.0, 4.0, 3.0, 6.0, 7.0]

    def evaluate(engine):
        return given[engine.run.step]

    monkeypatch.setattr(Driver, "evaluate", evaluate)
    return given


def names(path):
    return sorted(path.name for path in (path / "out").glob("checkpoint-*"))


def state(path):
    return json.loads((path / resume.STATE).read_text())


def test_the_result_is_the_checkpoint_with_the_lowest_loss(tmp_path, losses):
    said = []
    result = run(tmp_path, said, max_steps=6, **HELD)
    out = tmp_path / "out"
    equal(weights(out), weights(out / "checkpoint-2"))  # the older one of two equal losses
    assert result.best_model_checkpoint == str(out / "checkpoint-2")
    assert (result.step, result.eval_loss) == (6, 7.0)
    assert said[-1] == (
        f"saved {out}, the best checkpoint, of step 2; held-out perplexity {math.exp(9):.3f} -> "
        f"{math.exp(3):.3f}, dense attention"
    )
    found = state(out / "checkpoint-6")
    assert (found["best_metric"], found["best_global_step"]) == (3.0, 2)
    assert found["best_model_checkpoint"] == str(out / "checkpoint-2")
    plain = run(tmp_path, max_steps=6, output_dir=str(tmp_path / "plain"), eval_fraction=0.1)
    assert plain.best_model_checkpoint is None
    equal(weights(tmp_path / "plain"), weights(out / "checkpoint-6"))


def test_a_full_model_is_the_best_one_too(tmp_path, losses):
    run(tmp_path, max_steps=3, full=True, **HELD)
    equal(weights(tmp_path / "out"), weights(tmp_path / "out" / "checkpoint-2"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# out\n" in card and "AutoModelForCausalLM.from_pretrained" in card and ", 3 steps |" in card


@pytest.mark.parametrize("limit, kept", [(1, [2]), (2, [2, 6]), (3, [2, 5, 6]), (9, [1, 2, 3, 4, 5, 6])])
def test_the_best_checkpoint_stays_and_the_newest_ones(tmp_path, losses, monkeypatch, limit, kept):
    """As TrainingArguments says: with a limit of 1 the newest stays until the run ends."""
    seen, save = [], resume.save

    def saved(*args):
        path = save(*args)
        seen.append(names(tmp_path))
        return path

    monkeypatch.setattr(resume, "save", saved)
    run(tmp_path, max_steps=6, save_total_limit=limit, **HELD)
    assert names(tmp_path) == [f"checkpoint-{step}" for step in kept]
    assert seen[-1] == [f"checkpoint-{step}" for step in ([2, 6] if limit == 1 else kept)]
    equal(weights(tmp_path / "out"), weights(tmp_path / "out" / "checkpoint-2"))


def test_only_checkpoints_count_not_every_evaluation(tmp_path, losses):
    losses[:] = [9, 1, 5, 1, 4, 6]
    result = run(tmp_path, max_steps=5, **HELD | dict(save_steps=2))
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
    assert result.best_model_checkpoint.endswith("checkpoint-4")


@pytest.mark.parametrize("since", [1, 3])
def test_a_resumed_run_knows_the_best_checkpoint(tmp_path, losses, since):
    whole = run(tmp_path, max_steps=6, **HELD)
    for output, moved in (("other", False), ("moved-on", True)):
        source = tmp_path / "out"
        if moved:  # the whole directory, so that the path in the state leads nowhere
            source = tmp_path / "moved"
            shutil.copytree(tmp_path / "out", source)
            shutil.rmtree(tmp_path / "out")
        given = dict(resume_from_checkpoint=str(source / f"checkpoint-{since}"))
        result = run(tmp_path, max_steps=6, output_dir=str(tmp_path / output), **HELD, **given)
        assert numbers(result.history) == numbers(whole.history)
        step2 = source if since > 2 else tmp_path / output
        assert result.best_model_checkpoint == str(step2 / "checkpoint-2")
        equal(weights(tmp_path / output), weights(step2 / "checkpoint-2"))


def test_a_checkpoint_in_another_directory_is_not_removed(tmp_path, losses):
    run(tmp_path, max_steps=3, **HELD)
    given = dict(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"), save_total_limit=1)
    run(tmp_path, max_steps=6, output_dir=str(tmp_path / "other"), **HELD, **given)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert [path.name for path in (tmp_path / "other").glob("checkpoint-*")] == ["checkpoint-6"]
    equal(weights(tmp_path / "other"), weights(tmp_path / "out" / "checkpoint-2"))


def test_a_run_that_has_nothing_left_to_do_writes_the_best(tmp_path, losses):
    run(tmp_path, max_steps=3, **HELD)
    before = weights(tmp_path / "out")
    (tmp_path / "out" / "adapter_model.safetensors").unlink()
    run(tmp_path, max_steps=3, resume_from_checkpoint="latest", **HELD)
    equal(weights(tmp_path / "out"), before)


def test_losses_of_other_sequences_do_not_count(tmp_path, losses):
    said = []
    run(tmp_path, max_steps=3, **HELD)
    result = run(tmp_path, said, max_steps=6, resume_from_checkpoint="latest", max_eval_samples=1, **HELD)
    assert "the best checkpoint so far does not count: other sequences are held out now" in said
    assert result.best_model_checkpoint.endswith("checkpoint-4")


def test_a_best_checkpoint_that_is_gone(tmp_path, losses):
    said = []
    run(tmp_path, max_steps=3, **HELD)
    shutil.rmtree(tmp_path / "out" / "checkpoint-2")
    losses[4:] = [8.0, 6.0, 7.0]
    result = run(tmp_path, said, max_steps=6, resume_from_checkpoint="latest", **HELD)
    assert any(line.endswith("checkpoint-2 is gone") for line in said)
    assert result.best_model_checkpoint.endswith("checkpoint-5")


def test_a_best_checkpoint_that_is_damaged_at_the_end(tmp_path, losses, monkeypatch):
    save = resume.save

    def saved(output_dir, state, *args):
        if state["global_step"] == 6:
            (tmp_path / "out" / "checkpoint-2" / resume.OPTIMIZER).write_bytes(b"")
        return save(output_dir, state, *args)

    monkeypatch.setattr(resume, "save", saved)
    message = failure(tmp_path, max_steps=6, **HELD)
    assert "checkpoint-2" in message and message.endswith(
        f"the last checkpoint is {tmp_path / 'out' / 'checkpoint-6'}"
    )


def test_without_any_finite_loss_the_last_step_is_the_result(tmp_path, losses):
    losses[1:] = [math.nan] * 3
    said = []
    result = run(tmp_path, said, max_steps=3, **HELD)
    assert result.best_model_checkpoint is None
    assert "out, of the last step, as no checkpoint has a finite held-out loss" in said[-1]
    equal(weights(tmp_path / "out"), weights(tmp_path / "out" / "checkpoint-3"))


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_never_the_best(wrong):
    assert best.better(None, 1, wrong, "a") is None and best.better(None, 1, None, "a") is None
    first = best.better(None, 1, 2.0, "a")
    assert first == best.Best(1, 2.0, "a") == best.better(first, 2, wrong, "b")
    assert best.better(first, 2, 1.0, "b") == best.Best(2, 1.0, "b")


def test_the_older_of_two_equal_losses_wins():
    first = best.Best(1, 2.0, "a")
    assert best.better(first, 2, 2.0, "b") == best.better(first, 2, None, "b") == first


def test_the_state_uses_the_names_of_transformers():
    names = ("best_metric", "best_global_step", "best_model_checkpoint", "held_out")
    assert best.to_state(best.Best(3, 2.5, "a"), "held") == dict(zip(names, (2.5, 3, "a", "held")))
    assert best.to_state(None, "held") == dict(zip(names, (None, None, None, "held")))


@pytest.mark.parametrize(
    "damage, why",
    [
        (dict(best_metric="x"), None),
        (dict(best_metric=2), None),
        (dict(best_global_step=None), None),
        (dict(best_global_step=True), None),
        (dict(best_model_checkpoint=None), None),
        (dict(held_out=1), "other sequences are held out now"),
        (dict(best_model_checkpoint="x/checkpoint-2"), "x/checkpoint-2 is gone"),
    ],
)
def test_an_unusable_state_has_no_best_checkpoint(tmp_path, damage, why):
    (tmp_path / "checkpoint-1").mkdir()
    path = str(tmp_path / "checkpoint-1")
    written = best.to_state(best.Best(1, 2.0, path), "held")
    assert best.from_state(written, path, "held") == (best.Best(1, 2.0, path), None)
    assert best.from_state(written | damage, path, "held") == (None, why)


def test_the_best_checkpoint_is_first_looked_for_beside_the_resumed_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("old/checkpoint-1", "new/checkpoint-1", "new/checkpoint-2", "other/checkpoint-2"):
        (tmp_path / path).mkdir(parents=True)
    written = best.to_state(best.Best(1, 2.0, "old/checkpoint-1"), "held")
    for newest, wanted in (
        ("new/checkpoint-2", str(tmp_path / "new/checkpoint-1")),
        ("other/checkpoint-2", "old/checkpoint-1"),
    ):
        assert best.from_state(written, newest, "held") == (best.Best(1, 2.0, wanted), None)


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(eval_fraction=0.0), "load_best_model_at_end needs eval_data or eval_fraction"),
        (dict(save_steps=3, eval_steps=2), "and save_steps that is a multiple of it, got 2 and 3"),
        (dict(save_steps=0), "eval_steps, and save_steps that is a multiple of it, got 1 and 0"),
        (dict(eval_steps=0), "eval_steps, and save_steps that is a multiple of it, got 0 and 1"),
        (dict(metric_for_best_model="accuracy"), "metric_for_best_model should be one of eval_loss, loss"),
    ],
)
def test_what_it_needs(fields, words):
    with pytest.raises(UserError, match=words):
        options.from_dict(dict(model="m", data="d", output_dir="o") | HELD | fields)
