"""The text of an answer as its tokens come: whole characters, up to a stop string. The bytes of a token."""

import re
from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

from longlora.files.tokenizer_gguf import byte_alphabet


class TextStream:
    """Turns tokens into pieces of text. `tokenizer`: a files.Tokenizer.

    A piece never ends inside a character. What might begin one of the `stop` strings is held back until it
    cannot; a stop string itself is not part of the text. stopped: whether one has come.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), skip_special_tokens: bool = True):
        self._backend, self._stop, self._held = tokenizer.backend, [s for s in stop if s], ""
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that is certain after one more token."""
        if self.stopped:
            return ""
        self._held += self._stream.step(self._backend, token) or ""
        places = [i for i in (self._held.find(s) for s in self._stop) if i >= 0]
        if places:
            self.stopped = True
            text, self._held = self._held[: min(places)], ""
            return text
        keep = max((_beginning(self._held, s) for s in self._stop), default=0)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text

    def reason(self, reason: str) -> str:
        """Why the answer ended, where the engine says `reason`: "stop" if a stop string has cancelled it."""
        return "stop" if self.stopped and reason in ("cancelled", "length") else reason

    def finish(self) -> str:
        """What was held back, at the end of an answer."""
        text, self._held = self._held, ""
        return text


def _beginning(text, stop):
    """The length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class Spelling:
    """What each token is in a text. `tokenizer`: a files.Tokenizer."""

    def __init__(self, tokenizer: Any):
        self._backend = tokenizer.backend
        self._added = self._backend.get_added_tokens_decoder()
        decoder = self._backend.decoder
        byte_level = decoder is not None and b"ByteLevel" in decoder.__getstate__()
        self._letters = {letter: byte for byte, letter in byte_alphabet().items()} if byte_level else None

    def bytes(self, token: int) -> bytes:
        """The bytes of a token: part of a character, perhaps. A row of the model without a token has none."""
        if token in self._added:
            return self._added[token].content.encode()
        piece = self._backend.id_to_token(token)
        if piece is None:
            return b""
        if self._letters is not None:
            return bytes(self._letters[letter] for letter in piece if letter in self._letters)
        one = re.fullmatch("<0x([0-9A-Fa-f]{2})>", piece)
        return bytes([int(one[1], 16)]) if one else piece.replace("\u2581", " ").encode()

    def width(self, token: int) -> int:
        """How many characters begin in a token. Special tokens are not part of a text."""
        if token in self._added and self._added[token].special:
            return 0
        return sum(byte & 0xC0 != 0x80 for byte in self.bytes(token))
