"""Chat templates: the Jinja program of a model that turns messages into the text it was trained on.

It renders as transformers' apply_chat_template does, in Jinja's sandbox: a template comes with a model and is
not trusted.
"""

import datetime
import functools
import io
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes

from longlora.data.sandbox import USED, Sandbox, Used
from longlora.disk import open_file
from longlora.errors import UserError
from longlora.files.tokenizer import Tokenizer
from longlora.files.tokenizer_files import CHAT_TEMPLATE

# The format of LLaMA-2-chat, which the authors of LongLoRA train on: for models without a template.
LLAMA_2 = (
    "{%- set bos = bos_token if bos_token is defined else '' -%}"
    "{%- set eos = eos_token if eos_token is defined else '' -%}"
    "{%- if messages and messages[0]['role'] == 'system' -%}"
    "{%- set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' -%}"
    "{%- set rest = messages[1:] -%}"
    "{%- else -%}{%- set system = '' -%}{%- set rest = messages -%}{%- endif -%}"
    "{%- for message in rest -%}"
    "{%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}"
    "{{ raise_exception('the roles of messages should alternate between user and assistant') }}"
    "{%- endif -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{ bos + '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}"
    "{%- else -%}"
    "{% generation %}{{ ' ' + message['content'] + ' ' + eos }}{% endgeneration %}"
    "{%- endif -%}"
    "{%- endfor -%}"
)


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %} marks what the assistant says. It renders to its body."""

    tags = {"generation"}
    # Marks around the body. They cannot be in a text: they are lone surrogates.
    FIRST, LAST = "\udcfe", "\udcff"

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return self.FIRST + caller() + self.LAST


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(format: str) -> str:
    if len(format) > 1000:  # the C library may take 256 times as much memory
        raise jinja2.TemplateError("the format of a date is too long")
    return datetime.datetime.now().strftime(format)


@functools.lru_cache(16)
def _compiled(source: str, where: str) -> jinja2.Template:
    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _now
    try:
        return environment.compiled(source)
    except jinja2.TemplateError as error:
        line = getattr(error, "lineno", None)
        raise UserError(
            f"{where}: the chat template is not valid{f' (line {line})' if line else ''}: {error}"
        ) from None
    except RecursionError:
        raise UserError(f"{where}: the chat template is nested too deeply") from None


class ChatTemplate:
    """A template. source: its text. special: "bos_token" and so on -> text. where: its file, for messages."""

    def __init__(self, source: str, special: Mapping[str, str], where: str):
        self.source, self.where, self._special = source, where, dict(special)
        self._template = _compiled(source, where)
        self.marks_answers = "endgeneration" in source

    def key(self) -> list[Any]:
        """Everything that the text depends on, besides the messages."""
        return [self.source, sorted(self._special.items())]

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False, **extra: Any
    ) -> str:
        """Render messages, dicts with "role" and "content" -> the text for the model.

        add_generation_prompt: end where the assistant begins to answer. extra: further names that the
        template may read, such as tools. UserError for what the template refuses.
        """
        return self.render_marked(messages, add_generation_prompt, **extra)[0]

    def render_marked(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False, **extra: Any
    ) -> tuple[str, list[tuple[int, int]]]:
        """Render messages -> the text, and first and last character of each {% generation %} block."""
        names = {**self._special, "tools": None, "documents": None, **extra}
        names |= {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
        names[USED] = Used()
        try:
            marked = self._template.render(**names)
        except jinja2.TemplateError as error:
            raise UserError(f"{self.where}: the chat template refuses these messages: {error}") from None
        except Exception as error:  # a template is a program: whatever it runs into is its author's error
            raise UserError(
                f"{self.where}: the chat template fails: {type(error).__name__}: {error}"
            ) from None
        text, spans, first = [], [], 0
        length = 0
        for piece in re.split(f"([{_Generation.FIRST}{_Generation.LAST}])", marked):
            if piece == _Generation.FIRST:
                first = length
            elif piece == _Generation.LAST:
                spans.append((first, length))
            else:
                text.append(piece)
                length += len(piece)
        return "".join(text), spans


def find_template(
    tokenizer: Tokenizer | None,
    file: str | os.PathLike[str] | None = None,
    adapter: str | os.PathLike[str] | None = None,
) -> ChatTemplate:
    """Find the chat template of a model by its tokenizer.

    file: a template to use instead. adapter: a directory whose chat_template.jinja comes first, for it was
    trained with that. A model without a template gets the format of LLaMA-2-chat. UserError for a template
    that cannot be read.
    """
    special = tokenizer.special if tokenizer is not None else {}
    if file is None and adapter is not None:
        path = os.path.join(adapter, CHAT_TEMPLATE)
        file = path if os.path.isfile(path) else None
    if file is not None:
        return ChatTemplate(_read(os.fspath(file)), special, os.fspath(file))
    own = tokenizer.chat_templates() if tokenizer is not None else {}
    source, where = own.get("default", (LLAMA_2, "the built-in chat template"))
    return ChatTemplate(source, special, where)


def _read(path):
    try:
        with io.TextIOWrapper(open_file(path), encoding="utf-8") as file:
            return file.read()
    except UnicodeDecodeError:
        raise UserError(f"{path}: the chat template is not UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
