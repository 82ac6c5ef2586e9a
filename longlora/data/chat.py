"""Records of questions and answers: their forms, their text by a chat template, and which tokens are answers.

The forms are those that Alpaca and LongAlpaca, ShareGPT, TRL and the OpenAI API use.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from longlora.data import records
from longlora.data.chat_template import ChatTemplate
from longlora.data.text import Corpus, whole
from longlora.errors import UserError, shown
from longlora.files.tokenizer import Tokenizer

TEXT = "text"  # the form of records that are plain text
AT_ONCE = 1 << 21  # characters that are tokenised in parallel
VERSION = 2  # of the rules by which records become ids and answers; older caches are not used
_ROLES = {
    **{"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant"},
    **{"system": "system", "tool": "tool", "observation": "tool", "function_response": "tool"},
}


class _Wrong(Exception):
    """A fault in a record. Whoever catches it adds the place."""


@dataclass(frozen=True)
class Sample:
    """A record. Either `plain`, prompt and completion as they are, or messages for a chat template.

    first: the number of messages before the first that may be learned. extra: names that the template reads.
    """

    plain: tuple[str, str] | None = None
    messages: Sequence[Mapping[str, Any]] = ()
    first: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)


# ---- forms ---------------------------------------------------------------------------------------


def _string(record, name, empty=False):
    value = record.get(name)
    if value is None and empty:  # files that come from tables write a field that is missing as null
        return ""
    if not isinstance(value, str) or not (empty or value.strip()):
        raise _Wrong(f"{name} should be a text{'' if empty else ' that is not empty'}, got {shown(value)}")
    return value


def _turns(found, name, role="role", content="content"):
    """The messages of a list, with the names that templates read."""
    if not isinstance(found, list) or not found:
        raise _Wrong(f"{name} should be a list of messages, got {shown(found)}")
    turns = []
    for i, turn in enumerate(found):
        said = turn.get(role) if isinstance(turn, dict) else None
        if not isinstance(said, str):
            raise _Wrong(f"{name}[{i}] should be an object with {role} and {content}, got {shown(turn)}")
        if role == "from":
            if said not in _ROLES:
                raise _Wrong(f"{name}[{i}]: from should be one of {', '.join(_ROLES)}, got {shown(said)}")
            turn = {"role": _ROLES[said], "content": turn.get(content)}
        text = turn.get("content")
        if isinstance(text, list):
            turn = {**turn, "content": _joined(text, f"{name}[{i}].content")}
        elif not (isinstance(text, str) or text is None and turn.get("tool_calls")):
            raise _Wrong(f"{name}[{i}]: {content} should be a text, got {shown(text)}")
        weight = turn.get("weight")
        if not (weight is None or type(weight) in (int, float) and weight in (0, 1)):
            raise _Wrong(f"{name}[{i}]: weight should be 0 or 1, got {shown(weight)}")
        turns.append(turn)
    return turns


def _joined(parts, name):
    """The text of the parts of a message: they become lines, as in a request to the server."""
    for i, part in enumerate(parts):
        right = isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        if not right:
            raise _Wrong(f'{name}[{i}] should be a part of type "text" with a text, got {shown(part)}')
    return "\n".join(part["text"] for part in parts)


def _learned(message):
    """Whether the loss is on this message: the assistant says it, and its weight is not 0."""
    return message["role"] == "assistant" and message.get("weight") != 0


def _answered(messages, name, first=0):
    """`messages`, if the assistant says something in one of them from `first` on."""
    said = [m for m in messages[first:] if _learned(m)]
    if not any(m.get("tool_calls") or m["content"].strip() for m in said):
        raise _Wrong(f"{name} has no answer: the assistant says nothing, or all that it says has weight 0")
    return messages


def _system(record):
    text = _string(record, "system", empty=True)
    return [{"role": "system", "content": text}] if text else []


def _alpaca(record):
    question, more = _string(record, "instruction"), _string(record, "input", empty=True)
    messages, history = _system(record), record.get("history") or []
    pairs = isinstance(history, list) and all(isinstance(x, list) and len(x) == 2 for x in history)
    if not pairs or not all(isinstance(text, str) for pair in history for text in pair):
        raise _Wrong(f"history should be a list of questions with their answers, got {shown(history)}")
    for pair in (*history, ("\n".join(filter(None, [question, more])), _string(record, "output"))):
        messages += [{"role": role, "content": x} for role, x in zip(("user", "assistant"), pair)]
    return Sample(messages=messages)


def _messages(record):
    return Sample(messages=_answered(_turns(record["messages"], "messages"), "messages"))


def _sharegpt(record):
    found = record["conversations"]
    named = found and isinstance(found[0], dict) and "role" in found[0]  # in the words of messages
    turns = _turns(found, "conversations", *(() if named else ("from", "value")))
    return Sample(messages=_answered(_system(record) + turns, "conversations"))


def _strings(record):
    return Sample(plain=(record["prompt"], _string(record, "completion")))


def _prompt(record):
    start = _turns(record["prompt"], "prompt")
    messages = start + _turns(record.get("completion"), "completion")
    return Sample(messages=_answered(messages, "completion", len(start)), first=len(start))


@dataclass(frozen=True)
class Form:
    """A form of records: those with a `key` of type `kind`. read makes a Sample of one.

    plain: no chat template is applied. wanted: what a record has, for messages.
    """

    name: str
    key: str
    kind: type
    wanted: str
    read: Callable[[Mapping[str, Any]], Sample]
    plain: bool = False


FORMS = (
    Form("messages", "messages", list, "messages", _messages),
    Form("ShareGPT", "conversations", list, "conversations", _sharegpt),
    Form("Alpaca", "instruction", str, "instruction, input and output", _alpaca),
    Form("prompt and completion", "prompt", str, "prompt and completion", _strings, plain=True),
    Form("prompt and completion messages", "prompt", list, "lists prompt and completion", _prompt),
)


def _form(record):
    """The form of a record, TEXT, or None."""
    if not isinstance(record, dict):
        return None
    if isinstance(record.get("text"), str):
        return TEXT
    return next((form for form in FORMS if isinstance(record.get(form.key), form.kind)), None)


def form_of(path: str) -> Form | None:
    """The form of the instructions at `path` by its first record, or None for text.

    UserError for a path that does not exist, and for a record that is neither.
    """
    return form_in(Corpus(path))


def form_in(corpus: Corpus) -> Form | None:
    """As form_of, for an open Corpus."""
    path = corpus.files[0]
    if any(records.kind(file) in (".txt", ".bin") for file in corpus.files):
        return None
    for place, record in records.read(path):
        form = _form(record)
        if form is None:
            wanted = "; ".join(form.wanted for form in FORMS)
            raise UserError(f'{path}: {place} should be an object with a string "text", or with {wanted}')
        return None if form == TEXT else form
    return None  # reading it reports that it holds no text


def samples(files: Sequence[str], form: Form) -> Iterator[tuple[str, Sample]]:
    """Yield the records of `files`, each with its place. UserError names a record of another form."""
    some = False
    for path in files:
        for place, record in records.read(path):
            where, found, some = f"{path}: {place}", _form(record), True
            if found is not form:
                kind = found.name if isinstance(found, Form) else found or "in an unknown form"
                raise UserError(f"{where}: should have {form.wanted}, as the first record has; it is {kind}")
            assert isinstance(record, dict)
            try:
                _check_letters(record, path, place)
                yield where, replace(form.read(record), extra=_extra(record))
            except _Wrong as error:
                raise UserError(f"{where}: {error}") from None
            except RecursionError:
                raise UserError(f"{where}: is nested too deeply") from None
    if not some:
        raise UserError(f"{files[0]}: holds no record")


def _extra(record):
    """The names that a template may read besides the messages."""
    tools = record.get("tools") or None
    if isinstance(tools, str):  # a dataset whose tools differ in their fields holds them as JSON
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            pass
    if not (tools is None or isinstance(tools, list)):
        raise _Wrong(f"tools should be a list, got {shown(tools)}")
    return {"tools": tools} if tools else {}


def _check_letters(value, path, place):
    if isinstance(value, str):
        whole(value, path, place)
    elif isinstance(value, (dict, list)):
        for x in value.values() if isinstance(value, dict) else value:
            _check_letters(x, path, place)


# ---- text and answers ----------------------------------------------------------------------------


def answers(
    template: ChatTemplate, sample: Sample, ends: Sequence[str] = ()
) -> tuple[str, list[tuple[int, int]]]:
    """Render a conversation -> its text, and where the assistant speaks: first character, and last + 1.

    That is what the template marks with {% generation %}. Without marks it is what follows the prompt that
    the template renders for an answer, to the end of the message. `ends` are the special tokens: spaces after
    the one that ends an answer are not part of it. An answer whose message has weight 0 is left out.

    UserError if the template refuses the messages, or does not show where an answer begins and ends.
    """
    messages, extra = sample.messages, sample.extra
    text, spans = template.render_marked(messages, **extra)
    if not template.marks_answers:
        return text, [
            _by_prefix(template, messages, i, text, extra, tuple(ends))
            for i, message in enumerate(messages)
            if i >= sample.first and _learned(message)
        ]
    said = [message for message in messages if message["role"] == "assistant"]
    if not all(map(_learned, said)):
        if len(said) != len(spans):
            raise UserError(
                f"{template.where}: the template marks {len(spans)} of {len(said)} answers, so it is not "
                "clear which ones have weight 0"
            )
        spans = [span for span, message in zip(spans, said) if _learned(message)]
    if sample.first:
        start = template.render(messages[: sample.first], add_generation_prompt=True, **extra)
        if not text.startswith(start):
            raise _unclear(template, start, text, sample.first)
        spans = [(first, last) for first, last in spans if first >= len(start)]
    return text, spans


def _by_prefix(template, messages, i, text, extra, ends):
    """Where message i lies in `text`, the text of all messages."""
    start = template.render(messages[:i], add_generation_prompt=True, **extra)
    turn = template.render(messages[: i + 1], **extra)
    prompted = text.startswith(start)
    if prompted and text.startswith(turn) and len(turn) > len(start):
        own = turn[len(start) :].rstrip()
        return len(start), len(start) + len(own) if own.endswith(ends) else len(turn)
    # Some templates write the last message differently, or begin an answer differently from the prompt for
    # one. Then the assistant's text must follow the prompt, and an end token must follow the text.
    said = "" if messages[i].get("tool_calls") else messages[i]["content"].strip()
    common = len(os.path.commonprefix([start, text]))
    most = records.skip_spaces(text, common) + len(said)
    first = text.rfind(said, max(0, common - len(said) + 1), most) if said else -1
    last = records.skip_spaces(text, first + len(said))
    end = next((end for end in ends if text.startswith(end, last)), None)
    if first < 0 or end is None:
        raise _unclear(template, *((turn, text) if prompted else (start, text)), i)
    return len(start) if prompted else first, last + len(end)


def _unclear(template, start, text, i):
    at = len(os.path.commonprefix([start, text]))
    before, after = start[max(0, at - 20) : at + 20], text[max(0, at - 20) : at + 20]
    return UserError(
        f"{template.where}: the template does not show which tokens are the answer in message {i + 1}: it "
        f"writes {before!r} up to there, and {after!r} with what follows; mark answers with "
        "{% generation %} in a --chat-template, or train on everything with --train-on-inputs"
    )


# ---- tokens --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Instructions:
    """How records of `form` become tokens: by `template`, with a loss on the answers or on everything.

    template: None for a plain form.
    """

    form: Form
    template: ChatTemplate | None
    everything: bool = False

    def key(self) -> list:
        """Everything that the tokens depend on, besides the records and the tokenizer."""
        return [VERSION, self.form.name, self.template and self.template.key(), self.everything]

    def encode(
        self, files: Sequence[str], tokenizer: Tokenizer
    ) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        """Tokenise the records of `files`, in parallel.

        Yields for each its ids, int32 [T], which of them are targets, bool [T], and its number of characters.
        UserError for a record without a target.
        """
        ends = _ends(tokenizer)
        waiting: list[tuple[str, str, list[tuple[int, int]], bool]] = []
        size = 0
        for where, sample in samples(files, self.form):
            try:
                waiting.append((where, *self._rendered(sample, ends), sample.plain is not None))
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
            size += max(len(waiting[-1][1]), 64)
            if size >= AT_ONCE:
                yield from self._encoded(waiting, tokenizer)
                waiting, size = [], 0
        yield from self._encoded(waiting, tokenizer)

    def _rendered(self, sample, ends):
        if sample.plain is not None:
            prompt, completion = sample.plain
            return prompt + completion, [(len(prompt), len(prompt) + len(completion))]
        assert self.template is not None
        if self.everything:
            return self.template.render(sample.messages, **sample.extra), []  # _encoded marks every token
        return answers(self.template, sample, ends)

    def _encoded(self, waiting, tokenizer):
        front, back = tokenizer.affixes()
        eos = tokenizer.eos_token_id
        found = tokenizer.encode_places([text for _, text, _, _ in waiting])
        for (where, text, spans, plain), (ids, first, last) in zip(waiting, found, strict=True):
            if (np.diff(first) < 0).any() or (np.diff(last) < 0).any():
                at = int(np.argmax((np.diff(first) < 0) | (np.diff(last) < 0)))
                raise UserError(
                    f"{where}: the tokenizer does not say which characters token {at + 2} is made of, after "
                    f"{text[max(0, int(first[at]) - 20) : int(last[at])]!r}"
                )
            learned = targets(first, last, spans)
            if plain:
                ends = back if eos is None or back[-1:].tolist() == [eos] else np.append(back, eos)
                ids = np.concatenate([front, ids, ends]).astype(np.int32)
                learned = np.concatenate([np.zeros(len(front), bool), learned, np.ones(len(ends), bool)])
            if self.everything:
                learned[:] = True
            if not learned[1:].any():
                raise UserError(f"{where}: has no token to learn: the template leaves the answer out")
            yield ids, learned, len(text)


def targets(first: np.ndarray, last: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Which tokens hold a character of one of the spans -> bool [T].

    Token i is made of the characters first[i] .. last[i] - 1, both rising. A token that the tokenizer makes
    of the end of a prompt and the beginning of an answer is part of the answer: the model has to write it.
    """
    found = np.zeros(len(first), bool)
    last = np.maximum(last, first + 1)  # a token of no character lies before the next one
    for start, end in spans:
        if start < end:
            found[np.searchsorted(last, start, "right") : np.searchsorted(first, end, "left")] = True
    return found


def _ends(tokenizer):
    """The texts of the special tokens."""
    added = tokenizer.backend.get_added_tokens_decoder().values()
    texts = {*(token.content for token in added if token.special), *tokenizer.special.values()}
    return sorted(filter(str.strip, texts))
