"""Answers of a scripted engine, and conversations in a scripted session."""

import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from served import Bytes

import longlora
from longlora.data.chat_template import ChatTemplate
from longlora.decoder.sampling import Sampling
from longlora.errors import UserError
from longlora.serving import chat as chat_
from longlora.serving import generate as generate_
from longlora.serving.answer import Answer, chat_ids
from longlora.serving.chat import HELP, Chat, prompt_lines, read_conversation
from longlora.serving.engine import Event
from longlora.serving.generate import question_about, read_material, show


class Engine:
    """Each tick sends the next list of events to the request."""

    def __init__(self, *ticks, limit=100):
        self.ticks, self.cache = list(ticks), SimpleNamespace(limit=limit)

    def submit(self, request):
        self.request = request

    def tick(self):
        for event in self.ticks.pop(0):
            self.request.notify(event)


def opened(*ticks, **how):
    return SimpleNamespace(engine=Engine(*ticks, **how), tokenizer=Bytes, end=frozenset([256]))


def made(*ticks, limit=100, count=None, prompt=(1, 2, 3), **how):
    return Answer(opened(*ticks, limit=limit), np.array(prompt), Sampling(seed=7), count, **how)


def events(text):
    return [Event(byte) for byte in text.encode()]


STOP = [Event(end=256, reason="stop")]


def test_an_answer_comes_in_pieces(monkeypatch):
    monkeypatch.setattr("time.perf_counter", lambda: clock.pop(0))
    clock, read = [10.0, 12.0, 15.0], []
    answer = made([], events("a"), events("bc"), STOP, on_read=lambda: read.append(list(answer.tokens)))
    assert (answer.reason, answer.first, answer.seconds, answer.prompt_tokens) == (None, 0.0, 0.0, 3)
    pieces = iter(answer)
    assert next(pieces) == "a" and answer.tokens == [97] and read == []
    assert next(pieces) == "b" and read == [[97]]
    assert list(pieces) == ["c"] and read == [[97]]
    assert (answer.reason, answer.first, answer.seconds) == ("stop", 2.0, 5.0)
    assert answer.tokens == [97, 98, 99] and answer.logprobs == []
    assert answer._request.cancelled and list(answer) == []
    answer._request.reused = 2
    assert answer.reused == 2


def test_an_empty_answer_also_calls_on_read():
    read = []
    assert list(made([], STOP, on_read=lambda: read.append(1))) == [] and read == [1]
    assert list(made(STOP)) == []


@pytest.mark.parametrize("count, limit, most", [(None, 100, 97), (5, 100, 5), (99, 100, 97), (5, None, 5)])
def test_the_request_of_an_answer(count, limit, most):
    answer = made(limit=limit, count=count, top_logprobs=4)
    request = answer._request
    assert request.prompt.tolist() == [1, 2, 3] and request.sampling == Sampling(seed=7)
    assert (request.max_new_tokens, request.end, request.top_logprobs) == (most, {256}, 4)
    assert made(limit=None)._request.max_new_tokens == sys.maxsize
    answer.stop()
    assert request.cancelled


@pytest.mark.parametrize("size, by", [(100, 1), (102, 3)])
def test_an_answer_needs_room(size, by):
    words = (
        f"^the prompt has {size} tokens, the context is 100: shorten it by {by} to leave room for an answer$"
    )
    with pytest.raises(UserError, match=words):
        made(prompt=range(size))
    assert made(prompt=range(99))._request.max_new_tokens == 1


def test_log_probabilities_of_an_answer():
    answer = made([Event(97, -1.5, [(98, -0.5)]), Event(98)], STOP)
    assert list(answer) == ["a", "b"] and answer.logprobs == [(97, -1.5, [(98, -0.5)])]


def test_a_stop_string_ends_an_answer():
    answer = made(events("ab"), events("Ex"), events("y"), [Event(reason="cancelled")], stop=["bE"])
    pieces = iter(answer)
    assert next(pieces) == "a" and not answer._request.cancelled
    assert list(pieces) == [] and answer.reason == "stop" and answer.tokens == [97, 98, 69]
    held = made(events("ab"), [Event(reason="length")], stop=["bE"])
    assert "".join(held) == "ab" and held.reason == "length"


def test_an_error_or_a_break_ends_an_answer():
    answer = made(events("a"), [Event(reason="error", error="no power")])
    with pytest.raises(UserError, match="^no power$"):
        list(answer)
    assert answer._request.cancelled and answer.seconds > 0 and answer.tokens == [97]
    left = made(events("ab"))
    for _ in left:
        break
    assert left._request.cancelled and left.tokens == [97]


def test_the_prompt_of_a_chat_ends_where_the_assistant_begins():
    source = "{{ messages[0]['content'] }}{{ tail }}{% if add_generation_prompt %} Answer:{% endif %}"
    template = ChatTemplate(source, {}, "a template")
    tokenizer = SimpleNamespace(encode_parts=lambda texts: [text.encode() for text in texts])
    found = chat_ids(SimpleNamespace(tokenizer=tokenizer), template, [user("hello")], tail="!")
    assert found == b"hello! Answer:"


class Session:
    """Gives scripted answers: lists of pieces. A KeyboardInterrupt in a list is raised."""

    chosen, held = "device: a test", 5

    def __init__(self, *answers, context=100):
        self.answers, self.context, self.asked, self.saved, self.stopped = list(answers), context, [], [], 0
        self.opened = SimpleNamespace(tokenizer=SimpleNamespace(encode_parts=lambda texts: texts))

    def chat(self, messages, **how):
        self.asked.append((messages, how))
        return Said(self, *self.answers.pop(0))

    def save(self, path):
        self.saved.append(path)


class Said:
    """A scripted answer."""

    def __init__(self, session, *pieces, prompt=10, tokens=1):
        self.session, self.pieces = session, list(pieces)
        self.prompt_tokens, self.tokens = prompt, [0] * tokens

    def __iter__(self):
        return self

    def __next__(self):
        if not self.pieces:
            raise StopIteration
        piece = self.pieces.pop(0)
        if piece is KeyboardInterrupt:
            raise piece
        return piece

    def stop(self):
        self.session.stopped += 1


def user(text):
    return dict(role="user", content=text)


def assistant(text):
    return dict(role="assistant", content=text)


class Out(io.StringIO):
    """Records the whole text at each flush."""

    def __init__(self):
        super().__init__()
        self.flushed = []

    def flush(self):
        self.flushed.append(self.getvalue())


def talk(session, *lines, **how):
    out, note = Out(), io.StringIO()
    conversation = Chat(session, out=out, note=note, **how)
    conversation.run(lines)
    return conversation, out, note.getvalue()


def test_each_question_comes_with_the_conversation_so_far():
    session = Session([" a", "b \n"], ["c"])
    conversation, out, note = talk(session, " one ", "", "two\n", system="s", max_new_tokens=3)
    system = dict(role="system", content="s")
    assert session.asked == [
        ([system, user("one")], dict(max_new_tokens=3)),
        ([system, user("one"), assistant("ab"), user("two")], dict(max_new_tokens=3)),
    ]
    assert conversation.messages == [*session.asked[1][0], assistant("c")]
    assert out.getvalue() == " ab \n\nc\n" and note == ""
    assert out.flushed == [" a", " ab \n", " ab \n\n", " ab \n\nc", " ab \n\nc\n"]


@pytest.mark.parametrize("line", ["/quit", " /exit "])
def test_quit_and_exit_end_a_conversation(line):
    session = Session(["a"])
    conversation, _, note = talk(session, "one", line, "two")
    assert conversation.messages == [user("one"), assistant("a")] and note == ""


def test_an_interrupted_answer_keeps_the_pieces_that_came():
    session = Session(["a", KeyboardInterrupt, "b", "c"], ["d"])
    conversation, out, note = talk(session, "one", "two")
    assert conversation.messages == [user("one"), assistant("a"), user("two"), assistant("d")]
    assert out.getvalue() == "a\nd\n" and note == "\n(stopped)"
    assert session.stopped == 1


@pytest.mark.parametrize("context, noted", [(12, True), (13, False), (None, False), (11, True)])
def test_a_note_says_that_the_context_is_nearly_full(context, noted):
    """It comes if more than 90% are used. Here 11 tokens are used."""
    _, _, note = talk(Session(["a"], context=context), "one")
    assert note == (f"(11 of {context} tokens of the context are used)\n" if noted else "")


@pytest.mark.parametrize("context, of", [(100, " of 100"), (None, "")])
def test_a_file_goes_with_the_next_question(tmp_path, monkeypatch, context, of):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "b c.txt").write_text("de")
    session = Session(["x"], ["y"], context=context)
    _, _, note = talk(session, "/file ~/a.txt", f"/file   {tmp_path}/b c.txt", "one", "two")
    assert note == f"(read {tmp_path}/a.txt: 3{of} tokens)\n(read {tmp_path}/b c.txt: 2{of} tokens)\n"
    asked = [messages[-1] for messages, _ in session.asked]
    assert asked == [user("abc\n\nde\n\none"), user("two")]


def test_reset_forgets_the_conversation_and_the_file(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    session = Session(["x"], ["y"])
    lines = ["one", f"/file {tmp_path}/a.txt", "/reset", "two"]
    conversation, _, note = talk(session, *lines, system="s")
    assert "(the conversation is forgotten)\n" in note
    assert [message["content"] for message in conversation.messages] == ["s", "two", "y"]
    assert [message["content"] for message in session.asked[1][0]] == ["s", "two"]


def test_a_conversation_is_saved_and_loaded(tmp_path):
    path, other = tmp_path / "c.json", [user("o"), assistant("p")]
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "d.json").write_text(json.dumps(other))
    session = Session(["x"], ["y"])
    lines = ["one", f"/save {path}", f"/file {tmp_path}/a.txt", f"/load {tmp_path}/d.json", "two"]
    conversation, _, note = talk(session, *lines)
    assert json.loads(path.read_text()) == [user("one"), assistant("x")]
    assert f"(saved {path})\n" in note and f"(loaded {tmp_path}/d.json: 2 messages)\n" in note
    assert conversation.messages == [*other, user("two"), assistant("y")]


@pytest.mark.parametrize("line", ["/help", "/file", "/save", "/load  ", "/other", "/reset2"])
def test_help_comes_for_help_and_for_wrong_commands(line):
    conversation, out, note = talk(Session(), line)
    assert note == HELP + "\n" and conversation.messages == [] and out.getvalue() == ""


def test_errors_do_not_end_a_conversation(monkeypatch):
    session = Session(["a"])
    raised = [UserError("no room"), KeyboardInterrupt()]
    chat = session.chat

    def fails(messages, **how):
        if raised:
            raise raised.pop(0)
        return chat(messages, **how)

    monkeypatch.setattr(session, "chat", fails)
    conversation, _, note = talk(session, "one", "two", "three")
    assert note == "(no room)\n\n(stopped)\n"
    assert conversation.messages == [user("three"), assistant("a")]


def test_by_default_a_conversation_is_written_to_the_terminal(capsys):
    conversation = Chat(Session(["a"]))
    conversation.run(["one", "/reset"])
    said = capsys.readouterr()
    assert said.out == "a\n" and said.err == "(the conversation is forgotten)\n"


NO_CONVERSATION = "should be a list of messages"


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "not JSON: "),
        ("[" * 100_000, "not JSON: it is nested too deeply"),
        ("{}", NO_CONVERSATION),
        ("[1]", NO_CONVERSATION),
        ('[{"role": "user"}]', NO_CONVERSATION),
        ('[{"role": "user", "content": "a", "name": "b"}]', NO_CONVERSATION),
        ('[{"role": "user", "content": 1}]', NO_CONVERSATION),
        ('[{"role": 1, "content": "a"}]', NO_CONVERSATION),
        ('[{"role": "user", "content": "a"}, 1]', NO_CONVERSATION),
    ],
)
def test_a_file_without_a_conversation_is_refused(tmp_path, text, words):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(UserError, match=f"c.json: {words}"):
        read_conversation(str(tmp_path / "c.json"))


@pytest.fixture
def sessions(monkeypatch):
    """A function that makes longlora.chat and longlora.generate open the session it is given."""

    def opener(session):
        def open_session(*how):
            session.how = how
            return session, dict(seed=7)

        monkeypatch.setattr(chat_, "open_session", open_session)
        monkeypatch.setattr(generate_, "open_session", open_session)
        return session

    return opener


@pytest.mark.parametrize(
    "context, length", [(100, "a context of 100 tokens"), (None, "a conversation of any length")]
)
def test_longlora_chat(sessions, capsys, context, length):
    session = sessions(Session(["a"], context=context))
    how = dict(system="s", max_new_tokens=3, prompt_cache="cache", top_k=2)
    found = longlora.chat("model", "adapter", lines=["one"], **how)
    assert session.how == ("model", "adapter", "cache", dict(top_k=2))
    asked = [dict(role="system", content="s"), user("one")]
    assert session.asked == [(asked, dict(seed=7, max_new_tokens=3))]
    assert found == [*asked, assistant("a")]
    assert session.saved == ["cache"]
    said = capsys.readouterr()
    assert said.out == "a\n" and said.err == f"device: a test; {length}; /help shows what else there is\n"


def test_longlora_chat_by_default(sessions, monkeypatch):
    session = sessions(Session(["a"]))
    monkeypatch.setattr(chat_, "prompt_lines", lambda: ["typed"])
    assert longlora.chat("model") == [user("typed"), assistant("a")] and session.saved == []
    session = sessions(Session())
    session.held = 0
    assert longlora.chat("model", lines=[], prompt_cache="cache") == [] and session.saved == []
    with pytest.raises(UserError, match="max_new_tokens should be an integer of at least 1"):
        longlora.chat("model", max_new_tokens=0)


@pytest.mark.parametrize("terminal, prompt", [(True, "> "), (False, "")])
def test_typed_lines_end_with_ctrl_d(monkeypatch, capsys, terminal, prompt):
    typed, prompts = ["one", KeyboardInterrupt(), "two", EOFError(), "three"], []

    def type_one(prompt):
        prompts.append(prompt)
        one = typed.pop(0)
        if isinstance(one, str):
            return one
        raise one

    monkeypatch.setattr("builtins.input", type_one)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: terminal))
    assert list(prompt_lines()) == ["one", "two"] and prompts == [prompt] * 4
    assert capsys.readouterr().out == "\n(Ctrl-D or /quit leaves)\n"
    monkeypatch.setitem(sys.modules, "readline", None)  # a Python without readline
    typed[:] = [EOFError()]
    assert list(prompt_lines()) == []


class Asked:
    """A session that returns the arguments of its calls."""

    def save(self, path):
        return f"saved {path}"

    def chat(self, *what, **how):
        return "chat", what, how

    def generate(self, *what, **how):
        return "generate", what, how


def test_longlora_generate(sessions, tmp_path):
    session = sessions(Asked())
    kind, what, how = longlora.generate(
        "m", "a", adapter="b", max_new_tokens=3, stop="x", prompt_cache="c", top_k=2
    )
    assert session.how == ("m", "b", "c", dict(top_k=2))
    assert (kind, what, how.pop("on_read")()) == ("generate", ("a",), "saved c")
    assert how == dict(max_new_tokens=3, stop="x", seed=7)
    kind, what, how = longlora.generate("m", question="q", chat_template="t")
    assert session.how == ("m", None, None, dict(chat_template="t"))
    assert (kind, what) == ("chat", ([user("q")],))
    assert how == dict(max_new_tokens=None, stop=(), on_read=None, seed=7)
    (tmp_path / "a.md").write_text("\u00e9{question}", encoding="utf-8")
    what = longlora.generate("m", question="{q}", material=tmp_path / "a.md")[1]
    assert what == (question_about("\u00e9{question}", "{q}"),)
    (message,) = what[0]
    assert message["role"] == "user" and message["content"].endswith("\u00e9{question}\n\nQuestion: {q}")
    assert longlora.generate("m", "a", chat_template=None)[0] == "generate"


@pytest.mark.parametrize(
    "how, words",
    [
        (dict(), "generate needs a prompt, or a question"),
        (dict(prompt="a", question="b"), "generate needs a prompt, or a question"),
        (dict(prompt="a", material="x"), "material goes with a question"),
        (dict(prompt="a", chat_template="x"), "chat_template goes with a question"),
        (dict(question="a", max_new_tokens=0), "max_new_tokens should be an integer of at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_refused_before_a_session_opens(sessions, how, words):
    session = sessions(Asked())
    with pytest.raises(UserError, match=words):
        longlora.generate("m", **how)
    assert not hasattr(session, "how")


def test_files_of_material_are_read(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes("\u00e9\r\nb".encode())
    assert read_material(tmp_path / "a.txt") == "\u00e9\nb"
    (tmp_path / "b.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match="b.txt: is not UTF-8 text"):
        read_material(str(tmp_path / "b.txt"))
    monkeypatch.setattr(generate_, "pdf_text", lambda file, name: (file.read(), name))
    (tmp_path / "a.PDF").write_bytes(b"%PDF")
    assert read_material(tmp_path / "a.PDF") == (b"%PDF", str(tmp_path / "a.PDF"))


def test_each_piece_of_an_answer_is_shown_at_once(capsys):
    out = Out()
    show(["a", "b"], out)
    assert out.flushed == ["a", "ab", "ab\n"]
    show(["a"])
    assert capsys.readouterr().out == "a\n"
