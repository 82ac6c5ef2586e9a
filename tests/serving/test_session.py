"""longlora.Session: several answers of one model, and its cache in a file."""

import json
import os

import numpy as np
import pytest
import served
import tiny

import longlora
from longlora import cli
from longlora.decoder.model import Model
from longlora.errors import UserError
from longlora.serving.open import open_engine
from longlora.training import driver

TEXT = "A long document, which takes its time to read. "
HOW = dict(context=200, device="cpu")


@pytest.fixture
def base(tmp_path):
    return str(tiny.model(tmp_path / "base"))


def answer(session, prompt, count=8):
    found = session.generate(prompt, max_new_tokens=count)
    return "".join(found), found


def test_what_a_prompt_shares_with_the_last_is_read_once(base):
    session = longlora.Session(base, **HOW)
    text, first = answer(session, TEXT + "Who?")
    _, second = answer(session, TEXT + "When?")
    assert first.reused == 0 and second.reused == len(TEXT) + 2 and session.context == 200  # "Wh"
    again, third = answer(session, TEXT + "Who?")
    assert again == text and third.reused == len(TEXT) + 2
    assert session.held == third.prompt_tokens + 7  # the last token is chosen and not read
    assert "".join(session.chat([dict(role="user", content="x")], max_new_tokens=2)) is not None


def test_a_prompt_is_read_in_passes_of_2048_tokens(base):
    """A server's passes are shorter, because other requests wait for them."""
    assert longlora.Session(base, context=4096, device="cpu").opened.engine.generator.chunk == 2048
    assert open_engine(base, context=4096).engine.generator.chunk == 512


@pytest.mark.parametrize("cache_dtype", ["float32", "bfloat16", "float16"])
def test_a_saved_cache_is_what_was_read(base, tmp_path, cache_dtype):
    """Another process's session continues with the bits of this one."""
    session, file = longlora.Session(base, cache_dtype=cache_dtype, **HOW), tmp_path / "saved"
    answer(session, TEXT)
    assert session.save(file) == session.held == len(TEXT) + 7
    expected, here = answer(session, TEXT + "Who?", 20)
    other = longlora.Session(base, cache_dtype=cache_dtype, **HOW)
    assert other.load(file) == len(TEXT) + 7
    found, there = answer(other, TEXT + "Who?", 20)
    assert found == expected and there.reused == here.reused == len(TEXT)
    for ours, theirs in zip(session.opened.engine.cache.layers, other.opened.engine.cache.layers):
        for x, y in zip(ours, theirs):
            used = [z[0, : session.held] for z in (x, y)]
            bits = [longlora.ops.cast(z, "float32").numpy().view(np.uint32) for z in used]
            np.testing.assert_array_equal(*bits)


def test_an_answer_that_is_left_ends(base):
    session = longlora.Session(base, **HOW)
    left = session.generate(TEXT, max_new_tokens=100)
    next(iter(left))
    _, second = answer(session, TEXT)
    assert second.reused == len(TEXT) - 1 and len(second.tokens) == 8 and not session.opened.engine.busy
    assert "".join(second) == ""  # it was iterated over
    kept = session.generate(TEXT)
    pieces = iter(kept)
    next(pieces)
    assert answer(session, "b")[1].reason == "length"
    assert list(pieces) is not None and kept.reason == "cancelled"


def test_files_of_another_model_adapter_or_dtype_are_refused(base, tmp_path):
    session, file = longlora.Session(base, **HOW), tmp_path / "saved"
    answer(session, TEXT)
    session.save(file)
    run = driver.train(lambda line: None, **tiny.options(tmp_path, max_steps=1))
    other = tiny.model(tmp_path / "other", seed=1)
    for arguments, words in (
        (dict(model=other), "is the prompt cache of another model"),
        (dict(model=base, adapter=run.output_dir), "is the prompt cache of another adapter"),
        (dict(model=base, dtype="bfloat16"), "another dtype: float32, wanted bfloat16"),
        (dict(model=base, cache_dtype="float16"), "another cache dtype: float32, wanted float16"),
        (dict(model=base, context=20), rf"has {len(TEXT) + 7} tokens, the context is 20"),
    ):
        with pytest.raises(UserError, match=words):
            longlora.Session(**{**HOW, **arguments}).load(file)
    with pytest.raises(UserError, match="the cache is empty, there is nothing to save"):
        longlora.Session(base, **HOW).save(file)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t, m: m.pop("format"), "is not a longlora prompt cache 2"),
        (lambda t, m: m.pop("adapter"), "another adapter"),
        (lambda t, m: t.pop("tokens"), "has 0 tokens"),
        (
            lambda t, m: t.update(tokens=t["tokens"].reshape(1, -1)),
            "layers.0.keys should be float32 [1, 2, 8], got float32 [54",
        ),
        (lambda t, m: t.update(tokens=t["tokens"].astype(np.int64)), "got int64"),
        (lambda t, m: t["tokens"].put(3, 7), "tokens is damaged: its checksum is"),
        (lambda t, m: t["layers.0.keys"].put(9, 0.5), "layers.0.keys is damaged: its checksum is"),
        (lambda t, m: t["layers.1.values"].put(-1, 0.5), "layers.1.values is damaged: its checksum is"),
        (lambda t, m: t.pop("layers.1.keys"), "layers.1.keys should be float32 [54, 2, 8], got absent"),
        (lambda t, m: t.update({"layers.2.keys": t["layers.1.keys"]}), "layers.2.keys should be absent"),
        (lambda t, m: t["layers.1.values"].fill(np.nan), "layers.1.values is not finite"),
        (lambda t, m: t.update(tokens=t["tokens"][:-1]), "should be float32 [53, 2, 8], got float32 [54"),
    ],
)
def test_damaged_files_are_named_and_the_session_goes_on(base, tmp_path, change, words):
    session, file = longlora.Session(base, **HOW), tmp_path / "saved"
    answer(session, TEXT)
    session.save(file)
    served.rewrite(file, change)
    with pytest.raises(UserError) as caught:
        session.load(file)
    assert words in str(caught.value) and str(file) in str(caught.value)
    expected = answer(longlora.Session(base, **HOW), TEXT)[0]
    assert answer(session, TEXT)[0] == expected


def test_generate_and_chat_keep_what_they_read_in_a_file(base, tmp_path, capsys):
    (tmp_path / "m.txt").write_text(TEXT)
    cache = str(tmp_path / "saved")
    flags = [
        "generate",
        "--model",
        base,
        "--context",
        "300",
        "--device",
        "cpu",
        "--prompt-cache",
        cache,
        "--json",
    ]
    flags += ["--material", str(tmp_path / "m.txt"), "--max-new-tokens", "3", "--question"]
    reused = []
    for question in ("Who?", "When?"):
        assert cli.main([*flags, question]) == 0
        reused.append(json.loads(capsys.readouterr().out)["reused_tokens"])
    assert reused[0] == 0 and reused[1] > len(TEXT)
    (tmp_path / "saved").write_bytes(b"something else, and long enough")
    assert cli.main([*flags, "Why?"]) == 2 and f"{cache}: " in capsys.readouterr().err
    (tmp_path / "saved").unlink()
    lines, how = [f"/file {tmp_path}/m.txt", "Who?"], dict(context=300, device="cpu", max_new_tokens=3)
    first = longlora.chat(base, prompt_cache=cache, lines=lines, **how)
    session = longlora.Session(base, context=300, device="cpu")
    held = session.load(cache)
    assert held > len(TEXT) and session.chat(first[:1], max_new_tokens=1) is not None


@pytest.mark.parametrize("path", ["file/saved", "/proc/saved"])
def test_a_cache_that_cannot_be_written_is_said_before_anything_is_read(base, tmp_path, monkeypatch, path):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(Model, "load", None)
    for how in (dict(prompt="a"), dict(question="a")):
        with pytest.raises(UserError, match="cannot be made|cannot be written"):
            longlora.generate(base, prompt_cache=os.path.join(tmp_path, path), device="cpu", **how)
    with pytest.raises(UserError, match="cannot be made|cannot be written"):
        longlora.chat(base, prompt_cache=os.path.join(tmp_path, path), device="cpu", lines=["a"])
    assert [file.name for file in tmp_path.iterdir() if file.name != "base"] == ["file"]


def test_a_streaming_answer_has_no_end(base, capsys):
    """Many windows of text in memory that does not grow; a prompt that goes on is not read again."""
    how = dict(streaming=True, start_size=4, recent_size=40, device="cpu")
    session = longlora.Session(base, **how)
    text, first = answer(session, TEXT * 4, 150)
    cache = session.opened.engine.cache
    assert session.context is None and cache.places == 54 and len(first.tokens) == 150
    assert cache.forgotten == 4 * len(TEXT) + 149 - 44
    longer = np.array([*(TEXT * 4).encode(), *first.tokens, 1, 2], np.int32)
    second = session.answer(longer, max_new_tokens=8)
    assert len("".join(second)) and second.reused == len(longer) - 3  # the answer's last token is read now
    _, third = answer(session, TEXT)  # what was forgotten is read again
    assert third.reused == 0
    flags = [
        "generate",
        "--model",
        base,
        "--device",
        "cpu",
        "--streaming",
        "--recent-size",
        "40",
        "--prompt",
        TEXT * 4,
    ]
    assert cli.main([*flags, "--max-new-tokens", "150"]) == 0
    assert capsys.readouterr().out == text + "\n"
    assert longlora.Session(base, streaming=True, device="cpu").opened.engine.cache.window.recent == 60


@pytest.mark.parametrize(
    "keywords, words",
    [
        (dict(streaming=True, recent_size=0), "recent_size should be an integer of at least 1, got 0"),
        (dict(streaming=True, start_size=64), "recent_size should be an integer of at least 1, got 0"),
        (dict(streaming=True, prompt_cache="x"), "x: a streaming session forgets what it reads"),
    ],
)
def test_streaming_that_cannot_be(base, keywords, words):
    with pytest.raises(UserError, match=words):
        longlora.generate(base, "a", device="cpu", **keywords)


def test_a_prompt_is_saved_behind_the_first_token_and_not_after_an_error(base, tmp_path):
    session, called = longlora.Session(base, **HOW), []
    answer = session.generate("abc", max_new_tokens=9, on_read=lambda: called.append(len(answer.tokens)))
    "".join(answer)
    assert called == [1]
    "".join(longlora.generate(base, "abc", prompt_cache=tmp_path / "saved", max_new_tokens=9, **HOW))
    assert session.load(tmp_path / "saved") == 3
    session.opened.engine.model.tensor("model.norm.weight").fill(float("nan"))
    with pytest.raises(UserError, match="NaN"):
        "".join(session.generate("abc", on_read=lambda: called.append(0)))
    assert called == [1]
