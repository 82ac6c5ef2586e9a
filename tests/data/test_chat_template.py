"""Chat templates give the texts of transformers' apply_chat_template, in the shapes of public models."""

import datetime
import functools
import io
import json
import math
import os

import faults
import pytest
import tiny
import transformers

from longlora.data import chat_template, sandbox
from longlora.data.chat_template import LLAMA_2, ChatTemplate, find_template
from longlora.errors import UserError
from longlora.files.open_model import open_model
from longlora.files.tokenizer import Tokenizer
from longlora.files.tokenizer_gguf import byte_alphabet

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SHAPES = {
    "chatml": CHATML,
    "default system": "{% if messages[0]['role'] != 'system' %}<sys>You help.</sys>\n{% endif %}" + CHATML,
    "no system": "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + CHATML,
    "alternating": "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ m['content'] + eos_token }}{% endif %}"
    "{% endfor %}",
    "trimmed": "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</{{ m.role }}>\n{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }}:"
    "{{ m['content'] }};{% endfor %}{{ ns.n }}",
    "controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}|"
    "{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}",
    "tools": "{% if tools %}{{ tools | tojson(indent=2) }}\n{% endif %}" + CHATML,
    "json": "{{ messages | tojson }}",
    "json as wanted": "{{ messages | tojson(ensure_ascii=True, separators=(',', ':'), sort_keys=True) }}"
    "{{ {'b': 1, 'a': '\u00e9'} | tojson(true, 1, none, false) }}",
    "what is not given": "{{ tools is none }} {{ documents is none }} {{ add_generation_prompt }}"
    "{{ other is defined }} {{ pad_token is defined }} {{ bos_token }}",
    "macro": "{% macro turn(m) %}[{{ m.role }}]{{ m.content }}{% endmacro %}"
    "{% for m in messages %}{{ turn(m) }}{% endfor %}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>"
    "{% endgeneration %}{% else %}{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}",
    "blocks": "{% for m in messages %}\n    {% if m.role == 'user' %}\n    U {{ m.content }}\n"
    "    {% endif %}\n{% endfor %}\n",
    "llama 2": LLAMA_2,
}
DOUBLED = (
    "{%% set ns = namespace(x='x') %%}{%% for i in range(99) %%}{%% set ns.x = %s %%}{%% endfor %%}{{ ns.x }}"
)
USER, ASSISTANT, SYSTEM = (
    {"role": role, "content": text}
    for role, text in (
        ("user", " What's \u00e9 <b>? "),
        ("assistant", "It's a 'letter'.\n"),
        ("system", "Be brief."),
    )
)
CHATS = {
    "user": [USER],
    "turns": [USER, ASSISTANT, USER],
    "system": [SYSTEM, USER, ASSISTANT],
    "wrong order": [ASSISTANT, USER],
}


@pytest.fixture(autouse=True)
def any_machine(monkeypatch):
    """A slow machine meets the other limits first, too."""
    monkeypatch.setattr(sandbox, "MOST_SECONDS", math.inf)


def theirs(template, chat, **how):
    """What transformers renders, or the message of its error."""
    backend = transformers.PreTrainedTokenizerFast(tokenizer_object=_backend(), **SPECIAL)
    try:
        return backend.apply_chat_template(chat, chat_template=template, tokenize=False, **how), None
    except Exception as error:
        return None, str(error)


def _backend():
    import tokenizers

    return tokenizers.Tokenizer.from_str(tiny.tokenizer_json())


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_texts_equal_those_of_transformers(shape, chat):
    tools = [{"type": "function", "function": {"name": "f", "description": "d\u00e9", "parameters": {}}}]
    for how in ({}, {"add_generation_prompt": True}, {"tools": tools}):
        wanted, error = theirs(SHAPES[shape], CHATS[chat], **how)
        template = ChatTemplate(SHAPES[shape], SPECIAL, "here")
        if error is None:
            assert template.render(CHATS[chat], **how) == wanted
        else:
            with pytest.raises(UserError, match="here: the chat template refuses these messages: "):
                template.render(CHATS[chat], **how)


def test_a_template_may_ask_for_the_date():
    before = datetime.datetime.now().strftime("%d %b %Y")
    text = ChatTemplate("{{ strftime_now('%d %b %Y') }}", SPECIAL, "here").render([USER])
    assert text in (before, datetime.datetime.now().strftime("%d %b %Y"))
    assert ChatTemplate("{{ strftime_now('x' * 1000) }}", SPECIAL, "here").render([]) == "x" * 1000


def test_a_key_stands_for_all_that_a_text_depends_on():
    """A key finds tokenised data again: equal for equal templates, another for other texts or tokens."""
    keys = [
        ChatTemplate(source, special, "here").key()
        for source in ("a", "b")
        for special in (SPECIAL, {**SPECIAL, "bos_token": "<t>"})
    ]
    assert all(keys.count(key) == 1 for key in keys)
    turned = dict(reversed(SPECIAL.items()))
    assert ChatTemplate("a", turned, "elsewhere").key() == keys[0]
    assert ChatTemplate(CHATML, SPECIAL, "here").marks_answers is False
    assert ChatTemplate(SHAPES["generation"], SPECIAL, "here").marks_answers is True


def test_answers_are_marked():
    text, spans = ChatTemplate(SHAPES["generation"], SPECIAL, "here").render_marked(
        [USER, ASSISTANT, USER, ASSISTANT]
    )
    assert [text[a:b] for a, b in spans] == [ASSISTANT["content"] + "</s>"] * 2
    assert not ChatTemplate(CHATML, SPECIAL, "here").render_marked([USER])[0].endswith("assistant\n")


def test_a_template_reaches_nothing_of_python():
    """In Jinja's sandbox it gets no attribute of Python and changes no argument."""
    for source in ("{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}"):
        with pytest.raises(UserError, match="refuses these messages"):
            ChatTemplate(source, SPECIAL, "here").render([USER])
    assert ChatTemplate("{{ raise_exception.__globals__ }}", SPECIAL, "here").render([USER]) == ""


@pytest.mark.parametrize(
    "source, words",
    [
        ("{% if %}", r"here: the chat template is not valid \(line 1\)"),
        ("{{ 1 / 0 }}", "here: the chat template fails: ZeroDivisionError"),
        ("{{ messages[7]['role'] }}", "here: the chat template refuses"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "here: the chat template fails"),
        (
            "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
            "refuses these messages: it makes more than 2,000,000 calls and rounds of loops",
        ),
        ("{% if true %}\n{% endif %}\n{% for %}", r"here: the chat template is not valid \(line 3\)"),
        ("{{ 'x' | nothing }}", r"here: the chat template is not valid .*No filter named 'nothing'"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "here: the chat template is nested too deeply"),
        ("{{ raise_exception('not so') }}", "here: the chat template refuses these messages: not so"),
        ("{{ 10 ** 600000 }}", r"a result of \*\* is too large"),
        ("{{ 10 ** (10 ** 10) }}", r"a result of \*\* is too large"),
        ("{{ 'x' * 2000001 }}", r"a result of \* is too large"),
        ("{{ 99999 * ([1] * 999) }}", r"a result of \* is too large"),
        (DOUBLED % "ns.x ~ ns.x", "refuses these messages: it writes more than 134,217,728 characters"),
        (DOUBLED % "ns.x + ns.x", "it writes more than 134,217,728 characters"),
        (
            "{% set x = 'x' * 2000000 %}{% macro m() %}{% for i in range(99999) %}{{ x }}{% endfor %}"
            "{% endmacro %}{{ m() | length }}",
            "it writes more than 134,217,728 characters",
        ),
    ],
)
def test_a_template_that_fails_is_one_line(source, words):
    with pytest.raises(UserError, match=words):
        ChatTemplate(source, SPECIAL, "here").render([USER])


def test_small_results_are_rendered():
    source = (
        "{{ 2 ** 10 }} {{ 3 * 4 }} {{ 'ab' * 3 }} {{ 2 * [1] }} {{ 2 * 0.5 }} "
        "{{ 4 ** -1 }} {{ 9999 * 9999 }} "
        "{{ (2 ** 500000) % 7 }}"  # the powers of 2 are 1, 2, 4, 1, 2, 4, ...
    )
    assert ChatTemplate(source, SPECIAL, "here").render([USER]) == "1024 12 ababab [1, 1] 1.0 0.25 99980001 4"
    assert ChatTemplate("{{ ('x' * 2000000) | length }}", SPECIAL, "here").render([USER]) == "2000000"


def test_rounds_of_all_loops_and_calls_are_counted(monkeypatch):
    monkeypatch.setattr(sandbox, "MOST", 9)
    macro = "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(n) }}"
    assert ChatTemplate(macro, SPECIAL, "here").render([], n=2) == ""  # 7 calls
    with pytest.raises(UserError, match="it makes more than 9 calls and rounds"):
        ChatTemplate(macro, SPECIAL, "here").render([], n=40)
    source = "{% for i in range(2) %}{% for j in range(n) %}x{% endfor %}{% endfor %}"
    template = ChatTemplate(source, SPECIAL, "here")
    assert [template.render([], n=n) for n in (1, 2, 2)] == ["xx", "xxxx", "xxxx"]
    with pytest.raises(UserError, match="it makes more than 9 calls and rounds"):
        template.render([], n=3)
    assert ChatTemplate("{% for i in range(8) %}x{% endfor %}", SPECIAL, "here").render([]) == "xxxxxxxx"
    with pytest.raises(UserError, match="it makes more than 9 calls and rounds"):
        ChatTemplate("{% for i in range(9) %}x{% endfor %}", SPECIAL, "here").render([])


def files_of(path):
    """A tokenizer without a vocabulary, with the files that lie in `path`."""
    files = {name: (path / name).read_bytes() for name in os.listdir(path)}
    return Tokenizer(UserError("no vocabulary"), SPECIAL, files, str(path))


def test_a_template_comes_from_adapter_model_or_gguf(tmp_path):
    """The adapter's file comes before the model's, a GGUF file has its own, and errors name the file."""
    path, adapter = tmp_path / "base", tmp_path / "adapter"
    path.mkdir()
    adapter.mkdir()
    (path / "chat_template.jinja").write_text("of the model")
    found = find_template(files_of(path), adapter=adapter)
    assert (found.source, found.where) == ("of the model", str(path / "chat_template.jinja"))
    (adapter / "chat_template.jinja").write_text("of the adapter: {{ bos_token }}")
    found = find_template(files_of(path), adapter=adapter)
    assert (found.render([]), found.where) == ("of the adapter: <s>", str(adapter / "chat_template.jinja"))
    (tmp_path / "mine").write_text("{{ eos_token }}")
    found = find_template(files_of(path), tmp_path / "mine", adapter)
    assert (found.render([]), found.where) == ("</s>", str(tmp_path / "mine"))
    with pytest.raises(UserError, match="none: No such file or directory"):
        find_template(files_of(path), tmp_path / "none")
    with pytest.raises(UserError, match="/dev/null: is a pipe, a socket or a device; wanted a file"):
        find_template(files_of(path), "/dev/null")
    (path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match="base/chat_template.jinja: the chat template is not UTF-8"):
        find_template(files_of(path))

    metadata = {"tokenizer.chat_template": "g {{ bos_token }}"} | gguf_tokenizer()
    found = find_template(Tokenizer.from_gguf(metadata, "x.gguf"))
    assert (found.source, found.where) == ("g {{ bos_token }}", "x.gguf")
    found = find_template(Tokenizer.from_gguf(gguf_tokenizer(), "x.gguf"))
    assert (found.source, found.where) == (LLAMA_2, "the built-in chat template")

    (path / "chat_template.jinja").unlink()
    config = path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "c {{ bos_token }}"}))
    found = find_template(files_of(path))
    assert (found.render([]), found.where) == ("c <s>", str(config))
    config.write_text(json.dumps({"chat_template": 7}))
    with pytest.raises(UserError, match="tokenizer_config.json: chat_template should be a text, or a list"):
        find_template(files_of(path))
    for without in ([{"name": "tool_use", "template": "t"}, "x"], None):
        config.write_text(json.dumps({"chat_template": without}))
        assert find_template(files_of(path)).source == LLAMA_2
    config.unlink()
    for none in (files_of(path), None):
        assert find_template(none).source == LLAMA_2
    assert find_template(files_of(path)).render([USER]) == "<s>[INST] " + USER["content"] + " [/INST]"


def test_a_template_file_is_utf_8_in_every_locale(tmp_path, monkeypatch):
    (tmp_path / "mine").write_text("\u00e9", encoding="utf-8")
    monkeypatch.setattr(io, "TextIOWrapper", functools.partial(io.TextIOWrapper, encoding="ascii"))
    assert find_template(None, tmp_path / "mine").source == "\u00e9"


def test_a_template_file_that_cannot_be_read_is_named(monkeypatch):
    monkeypatch.setattr(chat_template, "open_file", lambda path: faults.Unreadable())
    with pytest.raises(UserError, match="^mine: cannot be read: Input/output error$"):
        find_template(None, "mine")


def gguf_tokenizer():
    """The metadata of a GGUF with a small byte-level tokenizer."""
    letters = list(byte_alphabet().values())
    tokens = ["<s>", "</s>", *letters, letters[0] + letters[1]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3] + [1] * 257,
        "tokenizer.ggml.merges": [f"{letters[0]} {letters[1]}"],
        "tokenizer.ggml.bos_token_id": 0,
    }


def test_the_file_of_a_template_wins_over_the_config(tmp_path):
    """chat_template.jinja wins, then tokenizer_config.json, of a list the default, then LLaMA-2's format."""
    path = tiny.model(tmp_path / "base")

    def found(*file):
        return find_template(open_model(path).tokenizer(), *file).source

    assert found() == LLAMA_2
    config = json.loads((path / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    assert found() == "d"
    (path / "chat_template.jinja").write_text("j")
    assert found() == "j"
    (tmp_path / "mine.jinja").write_text("m")
    assert found(tmp_path / "mine.jinja") == "m"
    (tmp_path / "mine.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match="mine.jinja: the chat template is not UTF-8"):
        found(tmp_path / "mine.jinja")
