"""Chat templates: the Jinja program of a model that turns messages into the text it was trained on.

It renders as transformers' apply_chat_template does, in Jinja's sandbox: a template comes with a model and is
not trusted.
"""

import datetime
import functools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from longlora.errors import UserError
from longlora.files.tokenizer import Tokenizer
from longlora.files.tokenizer_files import CHAT_TEMPLATE

# The most rounds of loops and calls in a rendering, and the most characters or digits of a product.
MOST = 2_000_000
MOST_TEXT = 1 << 27  # characters that a rendering may write and join, in all
# Names that no template can use.
_COUNTED, _SIZED, _USED = "longlora counted", "longlora sized", "longlora used"
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


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox, without results that fill the memory, and without calls without end."""

    intercepted_binops = frozenset(["*", "**", "+"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            size = abs(right) * 4 if isinstance(right, (int, float)) else 0
        elif operator == "+":
            size = 0
            _sized(context, left), _sized(context, right)
        else:
            sizes = [len(x) if hasattr(x, "__len__") else x for x in (left, right)]
            lists = any(hasattr(x, "__len__") for x in (left, right))
            size = sizes[0] * sizes[1] if lists and all(isinstance(x, int) for x in sizes) else 0
        if size > MOST:
            raise jinja2.TemplateError(f"a result of {operator} is too large")
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        _count(__context)
        return super().call(__context, __obj, *args, **kwargs)


class _Used:
    """What a rendering has used: rounds and calls, and characters that were written or joined."""

    def __init__(self):
        self.rounds = self.text = 0


def _count(context):
    """Count a round or a call; an error once a rendering has made more than MOST of them."""
    used = context[_USED]
    used.rounds += 1
    if used.rounds > MOST:
        raise jinja2.TemplateError(f"it makes more than {MOST:,} calls and rounds of loops")


@jinja2.pass_context
def _counted(context: Any, items: Any) -> Iterator[Any]:
    """The items of a loop; each is counted."""
    for item in items:
        _count(context)
        yield item


@jinja2.pass_context
def _sized(context: Any, value: Any) -> Any:
    """`value`, which is written or joined; an error once a rendering has used more than MOST_TEXT of it."""
    used = context[_USED]
    used.text += len(value) if isinstance(value, (str, list)) else 0
    if used.text > MOST_TEXT:
        raise jinja2.TemplateError(f"it writes more than {MOST_TEXT:,} characters")
    return value


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(16)
def _compiled(source: str, where: str) -> jinja2.Template:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters |= {"tojson": _to_json, _COUNTED: _counted, _SIZED: _sized}

    def through(filter, node):
        return jinja2.nodes.Filter(node, filter, [], [], None, None, lineno=node.lineno)

    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
    try:
        tree = environment.parse(source)
        for loop in list(tree.find_all(jinja2.nodes.For)):
            loop.iter = through(_COUNTED, loop.iter)
        joined: tuple[Any, ...] = jinja2.nodes.Output, jinja2.nodes.Concat
        for node in list(tree.find_all(joined)):
            parts = [
                x if isinstance(x, jinja2.nodes.TemplateData) else through(_SIZED, x) for x in node.nodes
            ]
            node.nodes = parts
        code = environment.compile(tree)
        return environment.template_class.from_code(environment, code, environment.make_globals(None))
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
        names[_USED] = _Used()
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
        with open(path, encoding="utf-8") as file:
            return file.read()
    except UnicodeDecodeError:
        raise UserError(f"{path}: the chat template is not UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
