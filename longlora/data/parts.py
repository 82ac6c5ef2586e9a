"""A long text in parts that can be tokenised one by one, with the ids of the whole text."""

from collections.abc import Iterable, Iterator

from longlora.errors import UserError
from longlora.files.tokenizer import Tokenizer
from longlora.job import available_memory

BYTES_PER_BYTE = 150  # memory that the tokenizers library needs for one long word, per byte of it; measured
LARGE = 1 << 20  # bytes from which on memory is asked for
NEIGHBOURS = 256  # characters on each side of a cut that must tokenise as if the cut were not there
TRIES = 64  # places inside a text without spaces that are looked at


class Parts:
    """Cuts texts for `tokenizer`. `of` gives the parts of one.

    A text is cut after a line break or before a space, where the text around tokenises the same with and
    without the cut. The tokenizers of our families split text by a regular expression or byte by byte, so
    text far from such a place cannot depend on it.

    In a text without line breaks and spaces, such as Chinese, a place will do if no token of the vocabulary
    can lie across it. The merges of BPE make tokens only, so none of them crosses that place, wherever the
    text ends. The regular expressions look at the classes of characters: a run of digits or of punctuation is
    never cut, because they may count in it.

    Where there is no such place (a run of a single letter; a SentencePiece model that puts a space before a
    text's first word), the pieces are joined, and memory limits the length of the text.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._backend = tokenizer, tokenizer.backend
        self._tokens: set[str] = set()
        self._starts: set[str] = set()  # of the tokens
        self._longest = 0

    def of(self, pieces: Iterable[str]) -> Iterator[tuple[str, bool]]:
        """Join the pieces of a text and cut it again -> (part, whether it is the last). One part at least."""
        held, size, seen, retry = "", 0, 0, 2 * NEIGHBOURS
        for piece in pieces:
            at = self._at_line(held, piece, seen)
            if at is None and len(held) > retry:
                at = self._inside(held)
                retry = 2 * len(held)  # looking again at each piece would take quadratic time
            seen = len(held)
            if at is not None:
                yield held[:at], False
                held, seen, retry = held[at:], 0, 2 * NEIGHBOURS
                size = len(held.encode())
            held, size = held + piece, size + len(piece.encode())
            if size > LARGE and size * BYTES_PER_BYTE > available_memory():
                raise UserError(
                    f"{len(held):,} characters of a document cannot be tokenised part by part, and they do "
                    "not fit in memory; split it into several files, or into the lines of a .jsonl file"
                )
        yield held, True

    def _bare(self, text):
        return self._tokenizer.encode_parts([text])[0].tolist()

    def _clean(self, text, at):
        """Whether the text around `at` has the same ids if it is cut there."""
        left, right = text[max(0, at - NEIGHBOURS) : at], text[at : at + NEIGHBOURS]
        # A cut in a long run of spaces can agree with the run's own tokens by chance.
        if not left.strip() or not right[:2].strip():
            return False
        return self._bare(left + right) == self._bare(left) + self._bare(right)

    def _at_line(self, held, piece, seen):
        """Where to cut `held`, which `piece` follows: at its end or one of its last line breaks, or None.

        Up to `seen` it has been looked at.
        """
        low = max(0, seen - NEIGHBOURS)
        at, text = len(held) - low, held[low:] + piece[:NEIGHBOURS]
        if text[at : at + 1] != " ":  # the last line break, which may be just before `at`
            at = text.rfind("\n", 0, at) + 1
        for _ in range(8):
            if at <= 0:
                return None
            if self._clean(text, at):
                return low + at
            at = text.rfind("\n", 0, at - 1) + 1
        return None

    def _inside(self, held):
        """Where to cut `held`, some way before its end, between characters that no token holds; or None."""
        if type(self._backend.model).__name__ != "BPE":
            return None
        if not self._tokens:
            self._tokens = set(self._backend.get_vocab(with_added_tokens=True))
            self._starts = {token[:i] for token in self._tokens for i in range(1, len(token) + 1)}
            self._longest = max(map(len, self._tokens))
        last = len(held) - NEIGHBOURS
        for at in range(last, max(last - TRIES, NEIGHBOURS), -1):
            if _classes_allow(held[at - 1], held[at]) and self._apart(held, at) and self._clean(held, at):
                return at
        return None

    def _apart(self, text, at):
        """Whether no token can lie across `at`."""
        left, right = self._letters(text[at - NEIGHBOURS : at]), self._letters(text[at : at + NEIGHBOURS])
        if self._longest > min(len(left), len(right)):
            return False
        for i in range(1, self._longest):
            token = left[-i:]
            for letter in right:
                if token not in self._starts:
                    break
                token += letter
                if token in self._tokens:
                    return False
        return True

    def _letters(self, text):
        """The text in the letters of the vocabulary, such as GPT-2's letter for each byte."""
        if self._backend.normalizer is not None:
            text = self._backend.normalizer.normalize_str(text)
        if self._backend.pre_tokenizer is None:
            return text
        return "".join(word for word, _ in self._backend.pre_tokenizer.pre_tokenize_str(text))


def _classes_allow(left: str, right: str) -> bool:
    """Whether a regular expression may split, or join without counting, between these characters."""
    if left.isspace() or right.isspace():
        return right == " " and not left.isspace()
    return left.isalpha() or right.isalpha() or left.isnumeric() != right.isnumeric()
