"""Runs on questions and answers: the loss is that of the answers, per target token of a whole step."""

import json

import numpy as np
import pytest
import tiny
from runs import failure, numbers, run

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{{ '<|end|>' if m.role == 'assistant' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
END = tiny.CONFIG["eos_token_id"]


def write(path, pairs):
    """Write questions and answers as Alpaca's records -> the path."""
    records = [{"instruction": q, "input": "", "output": a} for q, a in pairs]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def template(path, text=TEMPLATE):
    path.write_text(text)
    return str(path)


def rendered(pairs):
    """The ids of each sample by TEMPLATE and this tokenizer, a token a byte, and which are the answer."""
    found = []
    for question, answer in pairs:
        start, said = f"<user>{question}<assistant>".encode(), answer.encode()
        ids = np.array([*start, *said, END])
        found.append((ids, np.arange(len(ids)) >= len(start)))
    return found


def losses(base, config, samples):
    """The loss of each target of the samples by transformers, float64, dense attention."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(config / "longlora_base")
    model = AutoModelForCausalLM.from_pretrained(base, config=config, dtype=torch.float64).eval()
    found = []
    for ids, learned in samples:
        with torch.no_grad():
            logits = model(torch.tensor(ids)[None]).logits[0, :-1]
        each = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        found.append(each.numpy()[learned[1:]])
    return np.concatenate(found)


PAIRS = [("What is it?" * n, "An answer. " * m) for n, m in ((1, 1), (2, 5), (4, 2), (1, 4), (3, 1), (1, 6))]


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("name", ["per_device_train_batch_size", "gradient_accumulation_steps"])
def test_the_loss_is_the_mean_over_the_targets_of_the_whole_step(tmp_path, name, everything):
    """One step over all sequences, which have different numbers of targets; then the held-out loss too."""
    fields = dict(
        data=write(tmp_path / "a.jsonl", PAIRS),
        eval_data=write(tmp_path / "b.jsonl", PAIRS[:3]),
        chat_template=template(tmp_path / "t.jinja"),
        attention="dense",
        train_on_inputs=everything,
    )
    said = []
    result = run(tmp_path, said, max_steps=1, **fields, **{name: 5})
    samples = rendered(PAIRS)
    if everything:
        samples = [(ids, np.ones(len(ids), bool)) for ids, _ in samples]
    wanted = losses(tmp_path / "base", tmp_path / "out", samples)
    assert result.loss == pytest.approx(wanted.mean(), rel=1e-5)
    held = losses(tmp_path / "base", tmp_path / "out", samples[:3])
    assert result.history[0]["eval_loss"] == pytest.approx(held.mean(), rel=1e-5)
    sizes = [len(ids) for ids, _ in samples]
    (line,) = (line for line in said if line.startswith("data: "))
    assert (
        f"6 samples, {sum(sizes)} tokens ({len(wanted)} of them targets, shortest {min(sizes)}, median "
        f"{int(np.median(sizes))}, longest {max(sizes)}) -> 5 sequences of 128" in line
    )
    assert "samples do not see each other" in line
