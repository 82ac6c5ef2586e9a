"""The card at the end of a run: what it says is what the commands say about the result."""

import json
from types import SimpleNamespace

import pytest
import tiny

import longlora
from longlora.errors import UserError
from longlora.evaluation import passkey, ppl
from longlora.training import card, driver, options

QUIET = dict(device="cpu", say=lambda line: None)


def run(tmp_path, said, **fields):
    if not (tmp_path / "base").exists():
        tiny.model(tmp_path / "base", max_position_embeddings=256)
    tiny.text(tmp_path / "held.txt", 200, seed=1)
    how = tiny.options(tmp_path, max_steps=1, eval_passkey=1)
    return driver.train(said.append, **how | dict(target_length=288) | fields)


def test_the_card_holds_what_the_commands_measure(tmp_path):
    said = []
    result = run(tmp_path, said, eval_data=str(tmp_path / "held.txt"), max_eval_samples=1)
    out, base = tmp_path / "out", tmp_path / "base"
    card = json.loads((out / "card.json").read_text())
    assert result.stopped is None and card["lengths"] == [256, 288]
    for name, adapter in (("before", None), ("after", out)):
        wanted = longlora.ppl(base, tmp_path / "held.txt", [256, 288], adapter, max_tokens=288, device="cpu")
        assert card["perplexity"][name] == [row["perplexity"] for row in wanted["results"]]
    assert card["perplexity"]["before"] != card["perplexity"]["after"]
    found = longlora.eval.passkey(base, out, lengths=[256, 288], samples=1, seed=42, **QUIET)
    assert card["passkey"] == found["results"] and len(found["results"]) == 10
    before = longlora.eval.passkey(base, lengths=288, depths=0.5, samples=1, seed=42, **QUIET)
    assert card["sample"]["before"] == before["results"][0]["answers"][0]
    assert card["sample"]["after"]["expected"] == card["sample"]["before"]["expected"]
    assert (out / "passkey.png").exists()
    with pytest.raises(UserError, match="base"):  # the adapter goes with no other
        longlora.eval.passkey(tiny.model(tmp_path / "other", seed=9), out, lengths=256, **QUIET)
    assert f"   after: {card['sample']['after']['answer']!r}" in said
    assert any(line.split() == ["288"] + 5 * ["0%"] for line in said)


def test_a_whole_model_and_a_new_one_have_a_card(tmp_path):
    run(tmp_path, [], full=True)
    card = json.loads((tmp_path / "out/card.json").read_text())
    assert set(card) == {"lengths", "passkey", "sample"} and "before" in card["sample"]
    fields = dict(model=None, init=str(tmp_path / "base"), output_dir=str(tmp_path / "new"), full=True)
    run(tmp_path, [], target_length=None, **fields)
    assert set(json.loads((tmp_path / "new/card.json").read_text())["sample"]) == {"length", "depth", "after"}


def test_a_run_without_a_card_has_saved_its_result(tmp_path):
    """64 tokens have no room for the prompt, which has 243 bytes and the key twice."""
    said = []
    tiny.model(tmp_path / "base", max_position_embeddings=64)
    run(tmp_path, said)
    assert said[-1].startswith("no card.json: length 64 is too short: without filler the prompt has 24")
    assert (tmp_path / "out/adapter_model.safetensors").exists() and not (tmp_path / "out/card.json").exists()


def test_a_model_without_a_tokenizer_is_refused_at_once(tmp_path):
    tiny.model(tmp_path / "base", max_position_embeddings=256)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "base" / name).unlink()
    with pytest.raises(UserError, match="eval_passkey needs a model with a tokenizer"):
        run(tmp_path, [], data=str(tmp_path / "missing.bin"))


# ---- without a model -----------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch):
    """Replaces the measurements. Returns their calls, and a list of errors for passkey to raise."""
    calls, fails = [], []

    def perplexity(model, data, lengths, adapter, **how):
        calls.append(("ppl", model, adapter, data, lengths, how))
        return dict(results=[dict(length=n, perplexity=(n + (adapter == "out")) / 100) for n in lengths])

    def keys(
        model, adapter, *, lengths, depths=(0.0, 0.5, 1.0), samples=10, seed=0, device="auto", say=print
    ):
        calls.append(("passkey", model, adapter, lengths, depths, samples, seed, device))
        say("a line that nobody should see")
        if fails:
            raise UserError(fails[0])
        found = dict(results=[], context_length=128, pretrained_length=64)
        for length in lengths if isinstance(lengths, list) else [lengths]:
            for depth in depths if isinstance(depths, tuple) else [depths]:
                right = [dict(expected=f"{length} {depth} {i}", answer=f"{model}") for i in range(samples)]
                row = dict(length=length, depth=depth, samples=samples, accuracy=0.5, answers=right)
                found["results"].append(row)
        return found

    monkeypatch.setattr(ppl, "run", perplexity)
    monkeypatch.setattr(passkey, "run", keys)
    monkeypatch.setattr(passkey, "draw", lambda path, found, say: calls.append(("draw", path)))
    return calls, fails


def made(tmp_path, monkeypatch, old=64, new=128, **fields):
    """Make the card of a run in tmp_path. Returns the content of card.json, or None, and the lines."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "held.txt").write_text("words")
    (tmp_path / "pairs.jsonl").write_text(json.dumps(dict(prompt="a", completion="b")) + "\n")
    fields = dict(model="base", data="held.txt", output_dir="out", eval_passkey=3, device="cpu") | fields
    said = []
    card.make(options.from_dict(fields), old, new, said.append)
    file = tmp_path / "out" / "card.json"
    return json.loads(file.read_text()) if file.exists() else None, said


def test_the_content_of_a_card(tmp_path, monkeypatch, measured, capsys):
    seed = 2**24 + 5  # the prompts depend on its low 24 bits
    found, said = made(tmp_path, monkeypatch, eval_data="held.txt", seed=seed, adapter="first")
    assert found["lengths"] == [64, 128]
    assert found["perplexity"] == dict(before=[0.64, 1.28], after=[0.65, 1.29])
    assert [(row["length"], row["depth"]) for row in found["passkey"]] == [
        (length, depth) for length in (64, 128) for depth in (0.0, 0.5, 1.0)
    ]
    shown = dict(expected="128 0.5 0", answer="base")
    assert found["sample"] == dict(length=128, depth=0.5, before=shown, after=shown)
    how = dict(max_tokens=256, device="cpu")
    assert measured[0] == [
        ("ppl", "base", "first", "held.txt", [64, 128], how),
        ("ppl", "base", "out", "held.txt", [64, 128], how),
        ("passkey", "base", "out", [64, 128], (0.0, 0.5, 1.0), 3, 5, "cpu"),
        ("draw", "out/passkey.png"),
        ("passkey", "base", "first", 128, 0.5, 1, 5, "cpu"),
    ]
    assert said == [
        "measuring the result at 64 and 128 tokens",
        "perplexity on held.txt, dense attention",
        "  length         64        128",
        "  before      0.640      1.280",
        "   after      0.650      1.290",
        *passkey.text(dict(results=found["passkey"], context_length=128, pretrained_length=64)).splitlines(),
        "the first key at 128 tokens, depth 0.5: 128 0.5 0",
        "  before: 'base'",
        "   after: 'base'",
    ]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "fields, models",
    [
        (dict(full=True), [("out", None), ("base", None)]),
        (dict(model=None, init="base", full=True), [("out", None)]),
        (dict(), [("base", "out"), ("base", None)]),
    ],
)
def test_which_models_are_measured(tmp_path, monkeypatch, measured, fields, models):
    """Without extended positions there is one length. Questions and answers have no perplexity."""
    for held in ({}, dict(eval_data="pairs.jsonl")):
        measured[0].clear()
        found, said = made(tmp_path, monkeypatch, old=128, **fields, **held)
        assert [call[1:3] for call in measured[0] if call[0] == "passkey"] == models
        assert "perplexity" not in found and set(found["sample"]) == {
            *("length", "depth", "after"),
            *(["before"] if len(models) > 1 else []),
        }
        assert found["lengths"] == [128] and said[0] == "measuring the result at 128 tokens"


def test_max_eval_samples_limits_the_windows_of_perplexity(tmp_path, monkeypatch, measured):
    made(tmp_path, monkeypatch, old=128, data="pairs.jsonl", eval_data="held.txt", max_eval_samples=5)
    assert {call[5]["max_tokens"] for call in measured[0] if call[0] == "ppl"} == {5 * 128}


def test_a_measurement_that_fails_leaves_no_card(tmp_path, monkeypatch, measured):
    measured[1].append("no memory")
    found, said = made(tmp_path, monkeypatch)
    assert found is None and said[-1] == "no card.json: no memory"


def test_only_a_card_needs_a_tokenizer():
    for asked, tokenizer in ((0, None), (0, "any"), (1, "any")):
        card.check(options.TrainOptions(eval_passkey=asked), SimpleNamespace(tokenizer=tokenizer))
