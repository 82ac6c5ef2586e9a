"""longlora chat: a conversation at the terminal. The cache keeps what was said and what was read."""

import json
import os
import sys
from typing import Any

from longlora.disk import read_bytes, write_json
from longlora.errors import UserError, reason
from longlora.serving.generate import read_material
from longlora.serving.session import Session, check, open_session

HELP = """/file PATH   read a .txt, .md or .pdf file; the next question is about it
/reset       forget the conversation
/save PATH   save the conversation as JSON
/load PATH   continue a conversation that was saved
/help        show this
/quit        leave (also Ctrl-D); Ctrl-C stops an answer"""


class Chat:
    """A conversation in `session`.

    system: the system message. out: where answers go; note: where remarks go. how: see Session.answer.
    """

    def __init__(
        self, session: Session, system: str | None = None, out: Any = None, note: Any = None, **how: Any
    ):
        self._session, self._how = session, how
        self._start = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[dict[str, str]] = list(self._start)
        self._material: list[str] = []
        self._out, self._note = out or sys.stdout, note or sys.stderr

    def say(self, text: str) -> None:
        """Answer one line of the user."""
        if text.startswith("/"):
            self._command(text)
            return
        content = "\n\n".join([*self._material, text])
        messages = [*self.messages, {"role": "user", "content": content}]
        answer = self._session.chat(messages, **self._how)
        pieces: list[str] = []
        iterator = iter(answer)
        while True:
            try:
                piece = next(iterator, None)
                if piece is None:
                    break
                pieces.append(piece)
                self._out.write(piece)
                self._out.flush()
            except KeyboardInterrupt:
                answer.stop()
                for _ in iterator:
                    pass
                self._note.write("\n(stopped)")
                break
        self._out.write("\n")
        self._out.flush()
        self._material = []
        self.messages = [*messages, {"role": "assistant", "content": "".join(pieces).strip()}]
        used, context = answer.prompt_tokens + len(answer.tokens), self._session.context
        if context is not None and used > 0.9 * context:
            self._note.write(f"({used} of {context} tokens of the context are used)\n")

    def _command(self, line):
        name, _, rest = line.partition(" ")
        rest = os.path.expanduser(rest.strip())
        if name == "/file" and rest:
            text = read_material(rest)
            self._material.append(text)
            count = len(self._session.opened.tokenizer.encode_parts([text])[0])
            context = self._session.context
            self._note.write(f"(read {rest}: {count}{f' of {context}' if context else ''} tokens)\n")
        elif name == "/reset":
            self.messages, self._material = list(self._start), []
            self._note.write("(the conversation is forgotten)\n")
        elif name == "/save" and rest:
            write_json(rest, self.messages)
            self._note.write(f"(saved {rest})\n")
        elif name == "/load" and rest:
            self.messages, self._material = read_conversation(rest), []
            self._note.write(f"(loaded {rest}: {len(self.messages)} messages)\n")
        else:
            self._note.write(HELP + "\n")

    def run(self, lines: Any) -> None:
        """Answer each of `lines` until they end or one is /quit. A user's error does not end the chat."""
        for line in lines:
            line = line.strip()
            if line in ("/quit", "/exit"):
                return
            if not line:
                continue
            try:
                self.say(line)
            except UserError as error:
                self._note.write(f"({error})\n")
            except KeyboardInterrupt:  # outside of an answer: a file is read, or a long text becomes tokens
                self._note.write("\n(stopped)\n")


def read_conversation(path: str) -> list[dict[str, str]]:
    """The messages that /save has written. UserError for a file that holds anything else."""
    try:
        found = json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {reason(error)}") from None
    keys = {"role", "content"}
    if not isinstance(found, list) or not all(
        isinstance(x, dict) and x.keys() == keys and all(isinstance(x[key], str) for key in keys)
        for x in found
    ):
        raise UserError(f"{path}: should be a list of messages, each with a role and a content")
    return found


def chat(
    model: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | None = None,
    *,
    system: str | None = None,
    max_new_tokens: int | None = None,
    prompt_cache: str | os.PathLike[str] | None = None,
    lines: Any = None,
    **options: Any,
) -> list[dict[str, str]]:
    """Hold a conversation at the terminal -> its messages.

    system: the system message. lines: what the user says, by default what is typed.
    prompt_cache: a file. What it holds is not read again, and at the end it holds the conversation's cache.
    max_new_tokens, options: as for longlora.generate.
    """
    check(max_new_tokens, ())
    session, sampling = open_session(model, adapter, prompt_cache, options)
    conversation = Chat(session, system, max_new_tokens=max_new_tokens, **sampling)
    length = f"a context of {session.context} tokens" if session.context else "a conversation of any length"
    print(f"{session.chosen}; {length}; /help shows what else there is", file=sys.stderr)
    conversation.run(prompt_lines() if lines is None else lines)
    if prompt_cache is not None and session.held:
        session.save(prompt_cache)
    return conversation.messages


def prompt_lines() -> Any:
    """Yield the lines that the user types, with a prompt, until Ctrl-D. Ctrl-C at the prompt begins anew."""
    try:
        import readline  # noqa: F401 (history and editing of the line)
    except ImportError:
        pass
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            yield input(prompt)
        except EOFError:
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit leaves)")
