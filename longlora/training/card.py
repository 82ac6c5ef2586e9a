"""The card at the end of a run: perplexity at the old and the new length, passkeys by depth, one answer.

It opens the files that the run has read and written, as any other command would.
"""

import os
from typing import Any

from longlora.data.chat import form_of
from longlora.disk import write_json
from longlora.errors import UserError
from longlora.evaluation import passkey, ppl
from longlora.training.inputs import Say, Source
from longlora.training.options import TrainOptions

CARD, FIGURE = "card.json", "passkey.png"
WINDOWS = 2  # of the new length that perplexity is measured on, if max_eval_samples does not say
MIDDLE = 0.5  # the depth of the prompt that is shown


def check(o: TrainOptions, source: Source) -> None:
    """UserError if the run cannot have the card that it asks for."""
    if o.eval_passkey and source.tokenizer is None:
        raise UserError("eval_passkey needs a model with a tokenizer")


def make(o: TrainOptions, old: int, new: int, say: Say) -> None:
    """Measure the result of a run, say what was found, and write card.json and passkey.png beside it.

    old, new: the lengths for which the base model and the result are made. A measurement that fails is said:
    the result of the run is saved by now.
    """
    lengths = sorted({old, new})
    models: dict[str, Any] = {"after": (o.output_dir, None) if o.full else (o.model, o.output_dir)}
    if o.model:
        models = {"before": (o.model, o.adapter), **models}
    say(f"measuring the result at {' and '.join(f'{n:,}' for n in lengths)} tokens")
    try:
        card = {
            "lengths": lengths,
            **_perplexities(o, models, lengths, say),
            **_passkeys(o, models, lengths, say),
        }
        write_json(os.path.join(o.output_dir, CARD), card)
    except UserError as error:
        say(f"no {CARD}: {error}")


def _perplexities(o: TrainOptions, models: dict[str, Any], lengths: list[int], say: Say) -> dict[str, Any]:
    """The perplexity of each model at each length on the text of eval_data, if there is one."""
    if o.eval_data is None or form_of(o.eval_data) is not None:
        return {}
    found: dict[str, list[float]] = {}
    say(f"perplexity on {o.eval_data}, dense attention")
    say(f"{'length':>8}" + "".join(f"{length:>11,}" for length in lengths))
    for name, (model, adapter) in models.items():
        tokens = (o.max_eval_samples or WINDOWS) * lengths[-1]
        results = ppl.run(model, o.eval_data, lengths, adapter, max_tokens=tokens, device=o.device)["results"]
        found[name] = [row["perplexity"] for row in results]
        say(f"{name:>8}" + "".join(f"{value:>11.3f}" for value in found[name]))
    return {"perplexity": found}


def _passkeys(o: TrainOptions, models: dict[str, Any], lengths: list[int], say: Say) -> dict[str, Any]:
    """The passkeys that the result finds, and its answer to one prompt beside that of the model before."""
    how: dict[str, Any] = dict(seed=o.seed % 2**24, device=o.device, say=lambda line: None)
    found = passkey.run(*models["after"], lengths=lengths, samples=o.eval_passkey, **how)
    passkey.draw(os.path.join(o.output_dir, FIGURE), found, say)
    for line in passkey.text(found).splitlines():
        say(line)
    cell = dict(length=lengths[-1], depth=MIDDLE)
    shown = {"after": next(row for row in found["results"] if row.items() >= cell.items())["answers"][0]}
    if "before" in models:
        before = passkey.run(*models["before"], lengths=lengths[-1], depths=MIDDLE, samples=1, **how)
        shown = {"before": before["results"][0]["answers"][0], **shown}
    say(f"the first key at {cell['length']:,} tokens, depth {MIDDLE}: {shown['after']['expected']}")
    for name, answer in shown.items():
        say(f"{name:>8}: {answer['answer']!r}")
    return {"passkey": found["results"], "sample": {**cell, **shown}}
