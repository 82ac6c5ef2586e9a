"""longlora.generate and longlora.chat answer, as functions and as commands."""

import io
import json
import os
import threading

import pytest
import tiny

import longlora
from longlora import cli
from longlora.decoder import generation_plan
from longlora.decoder.model import Model
from longlora.errors import UserError
from longlora.files.tokenizer import Tokenizer
from longlora.serving.chat import Chat
from longlora.serving.generate import read_material
from longlora.training import driver


@pytest.fixture
def base(tmp_path):
    return str(tiny.model(tmp_path / "base"))


def test_equal_prompts_get_equal_answers(base):
    answer = longlora.generate(base, "abc", max_new_tokens=12, device="cpu")
    text = "".join(answer)
    assert answer.reason == "length" and len(answer.tokens) == 12 and answer.prompt_tokens == 3
    again = longlora.generate(base, "abc", max_new_tokens=12, device="cpu")
    assert "".join(again) == text and again.tokens == answer.tokens
    assert 0 < answer.first <= answer.seconds


def test_an_adapter_answers_as_the_merged_model(tmp_path, base):
    """The tokens are those of the merged model and not those of the base."""
    run = driver.train(lambda line: None, **tiny.options(tmp_path, max_steps=3, learning_rate=0.1))
    longlora.merge(base, run.output_dir, tmp_path / "merged")
    how = dict(max_new_tokens=20, device="cpu")
    adapted = longlora.generate(base, "shift group", adapter=run.output_dir, **how)
    merged = longlora.generate(tmp_path / "merged", "shift group", **how)
    plain = longlora.generate(base, "shift group", **how)
    assert "".join(adapted) == "".join(merged)
    assert "".join(plain) and adapted.tokens == merged.tokens != plain.tokens
    assert adapted._opened.engine.cache.places == 128  # the extended context


def test_a_stop_string_ends_an_answer_and_a_file_goes_into_the_prompt(tmp_path, base, monkeypatch):
    whole = "".join(longlora.generate(base, "abc", max_new_tokens=12, device="cpu"))
    part = whole[4:6]
    stopped = longlora.generate(base, "abc", max_new_tokens=12, stop=part, device="cpu")
    assert "".join(stopped) == whole[: whole.index(part)] and stopped.reason == "stop"
    (tmp_path / "m.md").write_text("Ann is five.")
    asked = longlora.generate(
        base, material=tmp_path / "m.md", question="How old?", context=300, max_new_tokens=2, device="cpu"
    )
    assert "".join(asked) is not None and asked.prompt_tokens > 60


@pytest.mark.parametrize("late", [False, True])
def test_a_material_may_come_from_a_pipe(monkeypatch, late):
    """As by `<(command)`: a text that is longer than a pipe holds, from a writer that may be late."""

    def write():
        with os.fdopen(writer, "w", encoding="utf-8", newline="") as file:
            file.write(text)

    def now_blocking(handle, blocking):
        real(handle, blocking)
        thread.start()

    text, real = "é\r\n" * 50_000, os.set_blocking
    reader, writer = os.pipe()
    thread = threading.Thread(target=write)
    if late:  # the writer begins after the first attempt to read
        monkeypatch.setattr(os, "set_blocking", now_blocking)
    else:
        thread.start()
    assert read_material(f"/dev/fd/{reader}") == text.replace("\r\n", "\n")
    thread.join()
    os.close(reader)


def test_a_pipe_that_nobody_writes_to_is_refused(base, tmp_path, monkeypatch, capsys):
    """Each option for a file refuses it, without waiting. A device, which may have no end, is refused too."""
    monkeypatch.chdir(tmp_path)
    for name in ("pipe", "pipe.pdf"):
        os.mkfifo(name)
        with pytest.raises(UserError, match=f"^{name}: is an empty pipe, and nobody writes to it$"):
            read_material(name)
    with pytest.raises(UserError, match="/dev/zero: is a socket or a device; wanted a file or a pipe"):
        read_material("/dev/zero")
    ask = ["generate", "--model", base, "--device", "cpu", "--question", "a"]
    for option in ("--material", "--chat-template", "--prompt-cache"):
        assert cli.main([*ask, option, "pipe"]) == 2
        assert "pipe: is a" in capsys.readouterr().err
    assert cli.main([*ask[:-2], "--prompt-file", "pipe"]) == 2
    assert "pipe: is an empty pipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    "keywords, words",
    [
        (dict(prompt="a", temperature=-1), "temperature should be a number from 0"),
        (dict(prompt="a" * 64), "the prompt has 64 tokens, the context is 64: shorten it by 1 to leave room"),
        (dict(question="b", material="missing.txt"), "missing.txt: No such file"),
        (dict(question="b", material="missing.pdf"), "missing.pdf: No such file"),
        (dict(prompt="a", context=0), "context should be an integer from 1 to 16777216, got 0"),
        (dict(prompt=""), "the prompt has no tokens"),
        (dict(question="a\ud83d"), "a text holds half a character"),
    ],
)
def test_wrong_arguments_are_named(base, keywords, words):
    with pytest.raises(UserError, match=words):
        "".join(longlora.generate(base, device="cpu", **keywords))


def test_a_context_beyond_the_models_is_warned_of(base, capsys):
    longlora.Session(base, context=200, device="cpu")
    said = capsys.readouterr().err
    assert "a context of 200 tokens is longer than the 64 that the model was made for" in said
    longlora.Session(base, context=64, device="cpu")
    assert "warning" not in capsys.readouterr().err


def test_the_command_generate_answers_as_the_function(base, capsys, monkeypatch):
    flags = ["generate", "--model", base, "--max-new-tokens", "5", "--device", "cpu"]
    assert cli.main([*flags, "--prompt", "abc"]) == 0
    text = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"abc")))
    assert cli.main([*flags, "--prompt", "-", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["text"] + "\n" == text and found["reason"] == "length" and len(found["tokens"]) == 5
    assert cli.main([*flags, "--prompt", "a", "--prompt-file", "b"]) == 2


def chat(base, lines, **how):
    session = longlora.Session(base, context=400, device="cpu")
    out, note = io.StringIO(), io.StringIO()
    conversation = Chat(session, out=out, note=note, max_new_tokens=6, **how)
    conversation.run(lines)
    return conversation, out.getvalue(), note.getvalue()


def test_a_conversation_keeps_its_history(base, tmp_path):
    conversation, out, _ = chat(
        base, ["one", "", "two", f"/save {tmp_path}/c.json", "/quit", "three"], system="s"
    )
    roles = [message["role"] for message in conversation.messages]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert out.count("\n") >= 2 and json.loads((tmp_path / "c.json").read_text()) == conversation.messages
    again, _, note = chat(base, [f"/load {tmp_path}/c.json"])
    assert again.messages == conversation.messages and "5 messages" in note


def test_a_file_without_a_conversation_is_not_loaded(base, tmp_path):
    (tmp_path / "c.json").write_text("{}")
    conversation, _, note = chat(base, [f"/load {tmp_path}/c.json"])
    assert f"({tmp_path}/c.json: " in note and conversation.messages == []


def test_chat_reads_files_resets_and_survives_errors(base, tmp_path):
    (tmp_path / "m.txt").write_text("material")
    lines = [f"/file {tmp_path}/m.txt", "what", "/file missing.txt", "/help", "/reset", "x" * 1000, "\udce9"]
    conversation, _, note = chat(base, [*lines, "again"])
    assert "read " in note and "missing.txt: No such file" in note and "/reset" in note
    assert "to leave room for an answer" in note and "half a character, '\\udce9' at" in note
    assert [message["content"] for message in conversation.messages[::2]] == ["again"]


def test_ctrl_c_ends_the_answer_and_not_the_chat(base):
    class Interrupting(io.StringIO):
        def write(self, text):
            if not self.tell():
                super().write(text)
                raise KeyboardInterrupt
            return super().write(text)

    session, note = longlora.Session(base, context=400, device="cpu"), io.StringIO()
    conversation = Chat(session, max_new_tokens=50, out=Interrupting(), note=note)
    conversation.run(["one", "two"])
    assert "(stopped)" in note.getvalue() and not session.opened.engine.busy
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 2


def test_ctrl_c_before_an_answer_does_not_end_the_chat(base, monkeypatch):
    """While a file is read, or a long text becomes tokens. The conversation stays as it was."""
    calls = []

    def encode(self, texts):
        calls.append(texts)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return before(self, texts)

    before = Tokenizer.encode_parts
    monkeypatch.setattr(Tokenizer, "encode_parts", encode)
    conversation, _, note = chat(base, ["one", "two", "three"])
    assert "(stopped)" in note
    assert [message["content"] for message in conversation.messages[::2]] == ["one", "three"]


def test_a_pdf_without_pypdf_says_what_to_install(base, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pypdf", None)
    (tmp_path / "a.pdf").write_bytes(b"%PDF-1.4")
    with pytest.raises(UserError, match=r"needs pypdf: pip install 'longlora\[pdf\]'"):
        longlora.generate(base, material=tmp_path / "a.pdf", question="q", device="cpu")


def test_an_answer_that_does_not_fit_is_refused_before_weights_are_read(base, monkeypatch):
    def load(self, source):
        raise AssertionError("weights are read")

    monkeypatch.setattr(Model, "load", load)
    monkeypatch.setattr("longlora.job.memory", lambda *_: 1 << 30)
    monkeypatch.setattr(generation_plan, "own_memory", lambda: 1 << 28)
    with pytest.raises(UserError) as caught:
        longlora.generate(base, "a", context=1 << 24, device="cpu")
    assert "with 1 x 16777216 tokens it needs 4." in str(caught.value)
    assert "1.00 GiB are available; what would make it fit: --context " in str(caught.value)
    with pytest.raises(UserError, match="context should be an integer from 1 to 16777216, got 16777217"):
        longlora.generate(base, "a", context=(1 << 24) + 1, device="cpu")


def test_an_error_says_by_how_much_material_is_too_long(base, tmp_path):
    (tmp_path / "m.txt").write_text("x" * 500)
    short = longlora.generate(base, question="", context=600, device="cpu", material=tmp_path / "m.txt")
    with pytest.raises(UserError) as caught:
        longlora.generate(base, question="", context=300, device="cpu", material=tmp_path / "m.txt")
    count = short.prompt_tokens
    wanted = f"the prompt has {count} tokens, the context is 300: shorten it by {count - 299} to"
    assert wanted in str(caught.value)


def test_a_stop_string_that_never_comes_changes_nothing(base):
    plain = longlora.generate(base, "abc", max_new_tokens=30, device="cpu")
    text = "".join(plain)
    never = text[-1] + text[-1:] + "never"  # its beginning is held back, also at the end
    answer = longlora.generate(base, "abc", max_new_tokens=30, stop=[never, "nor this"], device="cpu")
    assert "".join(answer) == text and answer.reason == "length" and answer.tokens == plain.tokens


@pytest.mark.parametrize("how", [{}, dict(streaming=True, recent_size=8)], ids=["context", "streaming"])
def test_nan_logits_end_the_answer_and_not_the_session(base, how):
    session = longlora.Session(base, device="cpu", **how)
    expected = "".join(session.generate("abc", max_new_tokens=20))
    norm = session.opened.engine.model.tensor("model.norm.weight")
    kept = norm.numpy().copy()
    norm.fill(float("nan"))
    with pytest.raises(UserError, match="the model's logits are NaN"):
        "".join(session.generate("abcd", max_new_tokens=5))
    norm.copy_(kept)
    again = session.generate("abc", max_new_tokens=20)
    assert "".join(again) == expected and again.reused == 0  # a failed answer leaves nothing to reuse
    with pytest.raises(UserError, match="the prompt has no tokens"):
        "".join(session.generate(""))
