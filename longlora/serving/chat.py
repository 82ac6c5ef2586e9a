"""longlora chat: a conversation at the terminal. The cache keeps what was said and what was read."""

import os
import sys
from typing import Any

from longlora.data.chat_template import find_template
from longlora.decoder.sampling import Sampling
from longlora.device import choose
from longlora.disk import write_json
from longlora.errors import UserError
from longlora.serving.generate import Answer, chat_ids, read_material
from longlora.serving.open import Opened, open_engine

HELP = """/file PATH   read a .txt, .md or .pdf file; the next question is about it
/reset       forget the conversation
/save PATH   save the conversation as JSON
/help        show this
/quit        leave (also Ctrl-D); Ctrl-C stops an answer"""


class Chat:
    """A conversation with `opened`. out: where answers go; note: where remarks go."""

    def __init__(
        self,
        opened: Opened,
        sampling: Sampling,
        max_new_tokens: int | None = None,
        system: str | None = None,
        template: Any = None,
        out: Any = None,
        note: Any = None,
    ):
        self._opened, self._sampling, self._most = opened, sampling, max_new_tokens
        self._template = template or find_template(opened.base, opened.tokenizer.special)
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
        answer = Answer(
            self._opened, chat_ids(self._opened, self._template, messages), self._sampling, self._most
        )
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
        used, places = answer.prompt_tokens + len(answer.tokens), self._opened.engine.cache.places
        if used > 0.9 * places:
            self._note.write(f"({used} of {places} tokens of the context are used)\n")

    def _command(self, line):
        name, _, rest = line.partition(" ")
        rest = os.path.expanduser(rest.strip())
        if name == "/file" and rest:
            text = read_material(rest)
            self._material.append(text)
            count = len(self._opened.tokenizer.backend.encode(text, add_special_tokens=False).ids)
            self._note.write(f"(read {rest}: {count} of {self._opened.engine.cache.places} tokens)\n")
        elif name == "/reset":
            self.messages, self._material = list(self._start), []
            self._note.write("(the conversation is forgotten)\n")
        elif name == "/save" and rest:
            write_json(rest, self.messages)
            self._note.write(f"(saved {rest})\n")
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


def chat(
    model: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | None = None,
    *,
    system: str | None = None,
    max_new_tokens: int | None = None,
    context: int | None = None,
    dtype: str = "auto",
    cache_dtype: str = "auto",
    chat_template: str | os.PathLike[str] | None = None,
    device: str = "auto",
    lines: Any = None,
    **sampling: Any,
) -> list[dict[str, str]]:
    """Hold a conversation at the terminal -> its messages. The arguments are those of longlora.generate.

    system: the system message. lines: what the user says, by default what is typed.
    """
    how = Sampling(**sampling)
    device, chosen = choose(device)
    opened = open_engine(model, adapter, context=context, dtype=dtype, cache_dtype=cache_dtype, device=device)
    template = find_template(opened.base, opened.tokenizer.special, chat_template)
    conversation = Chat(opened, how, max_new_tokens, system, template)
    print(
        f"{chosen}; a context of {opened.engine.cache.places} tokens; /help shows what else there is",
        file=sys.stderr,
    )
    conversation.run(prompt_lines() if lines is None else lines)
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
