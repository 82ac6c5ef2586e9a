"""The words and files of a report: a step's line, the last line, options.yaml, loss.png."""

import math

import pytest
import yaml

from longlora import plots
from longlora.training import report
from longlora.training.best import Best
from longlora.training.options import TrainOptions

ROW = dict(step=3, loss=1.23456, learning_rate=2e-4, grad_norm=0.71234, tokens_per_s=12345.6)


@pytest.mark.parametrize(
    "left, clock",
    [
        (0, "0:00:00"),
        (59.9, "0:00:59"),
        (61, "0:01:01"),
        (3599, "0:59:59"),
        (3600, "1:00:00"),
        (90061, "25:01:01"),
    ],
)
def test_the_line_of_a_step(left, clock):
    line = "step 3/40  loss 1.2346  learning rate 0.0002  grad norm 0.712  12,346 tokens/s  "
    assert report.line(ROW, 40, left) == f"{line}{clock} left"
    evaluated = ROW | dict(eval_loss=2.0, eval_perplexity=7.38906)
    assert report.line(evaluated, 40, left) == f"{line}{clock} left  held-out perplexity 7.389"


def options(**fields):
    return TrainOptions(output_dir="here", **fields)


def test_the_last_line_says_what_is_saved_and_how_good_it_is():
    rows = [dict(eval_perplexity=9.0), dict(loss=3.0), dict(eval_perplexity=4.0), dict(eval_perplexity=5.0)]
    rows += [dict(loss=2.0)]
    assert report.last_line(options(), [dict(loss=3.0)]) == "saved here"
    words = "; held-out perplexity 9.000 -> {}, dense attention"
    assert report.last_line(options(), rows) == "saved here" + words.format("5.000")
    assert report.last_line(options(load_best_model_at_end=True), rows) == (
        "saved here, of the last step, as no checkpoint has a finite held-out loss" + words.format("5.000")
    )
    best = Best(2, math.log(4.0), "there")
    assert report.last_line(options(load_best_model_at_end=True), rows, best) == (
        "saved here, the best checkpoint, of step 2" + words.format("4.000")
    )


def test_options_are_written_in_their_order_and_read_back(tmp_path):
    o = TrainOptions(output_dir=str(tmp_path), r=4, target_modules=("q_proj",), learning_rate=1e-3)
    report.write_options(o)
    found = yaml.safe_load((tmp_path / "options.yaml").read_text())
    assert list(found) == list(TrainOptions.__dataclass_fields__) and found == o.to_dict()
    assert (found["r"], found["target_modules"], found["learning_rate"]) == (4, ["q_proj"], 1e-3)


@pytest.mark.parametrize(
    "rows, draws",
    [
        ([], False),
        ([dict(step=0, eval_loss=3.0)], False),
        ([dict(step=0, eval_loss=3.0), dict(step=1, loss=3.0)], True),
        ([dict(step=1, loss=3.0)], True),
    ],
)
def test_a_picture_is_drawn_once_there_is_a_loss(monkeypatch, rows, draws):
    drawn, said = [], []
    monkeypatch.setattr(plots, "loss", lambda *given: drawn.append(given))
    report.draw(options(), rows, said.append)
    assert drawn == [("here/loss.png", rows)] * draws and not said


def test_a_picture_that_cannot_be_drawn_is_reported(monkeypatch):
    monkeypatch.setattr(plots, "loss", lambda *given: 1 / 0)
    said = []
    report.draw(options(), [dict(step=1, loss=3.0)], said.append)
    assert said == ["loss.png could not be drawn: division by zero"]
