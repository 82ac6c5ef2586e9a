"""The card at the end of a run: what it says is what the commands say about the result."""

import json

import pytest
import tiny

import longlora
from longlora.errors import UserError
from longlora.training import driver

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
