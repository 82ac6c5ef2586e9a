"""Runs on questions and answers: the loss is that of the answers, per target token of a whole step."""

import json

import numpy as np
import pytest
import tiny
from runs import failure, numbers, run, weights

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


def test_a_run_goes_on_with_the_same_template_and_answers_only(tmp_path):
    data = write(tmp_path / "a.jsonl", PAIRS)
    fields = dict(data=data, chat_template=template(tmp_path / "t.jinja"))
    run(tmp_path, max_steps=2, **fields)
    whole = run(tmp_path, max_steps=4, output_dir=str(tmp_path / "whole"), **fields)
    again = dict(fields, max_steps=4, resume_from_checkpoint="latest")
    other = template(tmp_path / "other.jinja", TEMPLATE.replace("{{ m.content }}", "{{ m.content }} "))
    for change in (dict(chat_template=other), dict(train_on_inputs=True)):
        message = failure(tmp_path, **again | change)
        assert message.endswith("was trained with another chat template or train_on_inputs")
    assert "other data" in failure(tmp_path, **again | dict(packing_boundaries="none"))
    (tmp_path / "t.jinja").rename(tmp_path / "moved.jinja")  # the same template at another path
    text = tmp_path / "text.txt"
    text.write_text("A text. " * 200)
    message = failure(tmp_path, data=str(text), max_steps=4, resume_from_checkpoint="latest")
    assert "was trained on questions and answers, the data are text" in message
    resumed = run(tmp_path, **again | dict(chat_template=str(tmp_path / "moved.jinja")))
    assert numbers(resumed.history) == numbers(whole.history)
    for name, array in weights(tmp_path / "whole").items():
        np.testing.assert_array_equal(weights(tmp_path / "out")[name], array)


def test_a_resumed_run_may_hold_out_questions(tmp_path):
    """Which data are held out is free, and what they are does not change the steps."""
    (tmp_path / "text.txt").write_text("A text that is long enough. " * 200)
    fields = dict(data=str(tmp_path / "text.txt"))
    whole = run(tmp_path, max_steps=2, output_dir=str(tmp_path / "whole"), **fields)
    run(tmp_path, max_steps=1, **fields)
    held = dict(eval_data=write(tmp_path / "a.jsonl", PAIRS), chat_template=template(tmp_path / "t.jinja"))
    resumed = run(tmp_path, max_steps=2, resume_from_checkpoint="latest", **fields, **held)
    assert resumed.eval_loss is not None and resumed.loss == whole.loss


def test_held_out_data_follow_their_own_form(tmp_path):
    """Held-out questions do not see each other where the run learns text, and long text is split."""
    text = tmp_path / "text.txt"
    text.write_text("A text that is long enough. " * 200)
    questions, of = write(tmp_path / "a.jsonl", PAIRS), dict(chat_template=template(tmp_path / "t.jinja"))
    found = run(tmp_path, data=str(text), eval_data=questions, max_steps=1, **of)
    wanted = losses(tmp_path / "base", tmp_path / "out", rendered(PAIRS)).mean()
    assert found.history[0]["eval_loss"] == pytest.approx(wanted, rel=1e-5)
    of |= dict(data=questions, eval_data=str(text), max_steps=1)
    assert run(tmp_path, output_dir=str(tmp_path / "other"), **of).eval_loss is not None
    message = failure(tmp_path, output_dir=str(tmp_path / "no"), long_documents="refuse", **of)
    assert "text.txt: document 0 has" in message


def test_the_template_goes_with_the_adapter(tmp_path):
    """It is found where the adapter is used, and the merged model has it."""
    from longlora.data.chat_template import LLAMA_2
    from longlora.files.merge import merge
    from longlora.serving.session import Session

    data = write(tmp_path / "a.jsonl", PAIRS)
    run(tmp_path, data=data, max_steps=1, chat_template=template(tmp_path / "t.jinja"))
    run(tmp_path, data=data, max_steps=1, output_dir=str(tmp_path / "plain"))
    base, out = tmp_path / "base", tmp_path / "out"
    assert (out / "chat_template.jinja").read_text() == TEMPLATE
    assert (tmp_path / "plain" / "chat_template.jinja").read_text() == LLAMA_2
    assert Session(base, out, device="cpu", context=64).template.source == TEMPLATE
    merge(base, out, tmp_path / "merged")
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == TEMPLATE
    further = dict(adapter=str(out), target_length=None, output_dir=str(tmp_path / "further"))
    run(tmp_path, data=data, max_steps=1, **further)
    assert (tmp_path / "further" / "chat_template.jinja").read_text() == TEMPLATE


def test_plain_prompts_need_no_template(tmp_path):
    data = tmp_path / "a.jsonl"
    data.write_text(json.dumps({"prompt": "one two", "completion": " three"}) + "\n")
    (tmp_path / "base").mkdir()
    tiny.model(tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").write_text("{% if %}")  # is not looked at
    said = []
    result = run(tmp_path, said, data=str(data), max_steps=1, attention="dense")
    text = b"one two three"
    wanted = losses(
        tmp_path / "base", tmp_path / "out", [(np.array([*text, END]), np.arange(len(text) + 1) >= 7)]
    )
    assert result.loss == pytest.approx(wanted.mean(), rel=1e-5) and len(wanted) == 7
    assert f"{data}: records of prompt and completion; loss and perplexity are over the answers" in said


def test_a_new_model_learns_by_the_template_beside_its_config(tmp_path):
    """--init --full: the whole model that results has the template."""
    template(tiny.config(tmp_path / "new") / "chat_template.jinja")
    fields = dict(model=None, init=str(tmp_path / "new"), full=True, target_length=None, sequence_length=64)
    said = []
    data = write(tmp_path / "a.jsonl", [pair for pair in PAIRS if len("".join(pair)) < 40])
    run(tmp_path, said, data=data, max_steps=1, **fields)
    over = "loss and perplexity are over the answers"
    assert f"{data}: records of Alpaca, rendered by {tmp_path}/new/chat_template.jinja; {over}" in said
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TEMPLATE


def test_a_record_with_a_text_is_text_and_that_is_said(tmp_path):
    data, said = tmp_path / "a.jsonl", []
    data.write_text(json.dumps({"instruction": "a", "output": "b", "text": "shift group " * 20}) + "\n")
    run(tmp_path, said, data=str(data), max_steps=1)
    assert f"{data}: records of text; loss and perplexity are over everything" in said
    assert any(line.startswith("data: 1 document, 241 tokens") for line in said)


LONG = [("What is it?", "An answer. " * 20), *PAIRS]


@pytest.mark.parametrize(
    "fields, words",
    [
        (
            dict(pairs=LONG),
            "record 1 has 249 tokens, more than the 128 of a sequence (1 are too long); long_documents",
        ),
        (dict(chat_template="t.jinja", data="text.txt"), "chat_template is for conversations; "),
        (dict(train_on_inputs=True, data="text.txt"), "train_on_inputs is for questions and answers; "),
        (dict(chat_template="none.jinja"), "none.jinja: No such file or directory"),
        (dict(chat_template="bad.jinja"), "bad.jinja: the chat template is not valid (line 1)"),
        (dict(pairs=[("a", "")]), "line 1: output should be a text that is not empty"),
        (dict(boundary="wrap"), "packing_boundaries document needs boundary split"),
        (dict(pairs=[("Q" * 200, "A")], long_documents="truncate"), "leaves no sequence of 128 tokens"),
        (dict(eval_data="held.jsonl"), "held.jsonl: line 1: completion should be a text that is not empty"),
    ],
)
def test_what_a_run_cannot_use_is_refused(tmp_path, fields, words):
    tiny.text(tmp_path / "text.txt")
    template(tmp_path / "t.jinja")
    template(tmp_path / "bad.jinja", "{% if %}")
    (tmp_path / "held.jsonl").write_text('{"prompt": "a"}\n')
    fields = dict(data="a.jsonl", chat_template="t.jinja", max_steps=1) | fields
    write(tmp_path / "a.jsonl", fields.pop("pairs", PAIRS))
    if fields["data"] == "text.txt" and "train_on_inputs" in fields:
        del fields["chat_template"]
    paths = {"data", "chat_template", "eval_data"}
    message = failure(tmp_path, **{k: str(tmp_path / v) if k in paths else v for k, v in fields.items()})
    assert words in message


def test_explicit_options_win_over_the_defaults_of_instructions(tmp_path):
    said = []
    fields = dict(data=write(tmp_path / "a.jsonl", LONG), chat_template=template(tmp_path / "t.jinja"))
    run(tmp_path, said, max_steps=1, long_documents="split", packing_boundaries="none", **fields)
    line = next(line for line in said if line.startswith("data: "))
    assert "1 longer sample split" in line and "do not see each other" not in line


def test_the_command_line_trains_on_a_list_of_records(tmp_path):
    """From the flags to the metrics, in a process of its own."""
    records = [{"instruction": q, "input": "", "output": a} for q, a in PAIRS]
    (tmp_path / "alpaca.json").write_text(json.dumps(records))
    fields = tiny.options(tmp_path, data=str(tmp_path / "alpaca.json"), max_steps=30, eval_fraction=0.2)
    done = tiny.command("train", *tiny.flags(fields))
    assert done.returncode == 0, done.stderr
    assert "alpaca.json: records of Alpaca, rendered by the built-in chat template" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.5 * rows[1]["loss"]
    assert rows[-1]["eval_loss"] < rows[0]["eval_loss"]
